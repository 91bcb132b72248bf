"""Makes preference pairs: of a prompt's candidates the one with the highest mean score against the lowest."""
from collections import Counter

from srlm_jax import InputError, stage
from srlm_jax.data import records, scores as scoring


def run(config, workdir):
  """MODEL/respond and MODEL/judge -> MODEL/pairs/pairs.jsonl, and counts of why prompts gave none."""
  folder = stage.model_folder(workdir, config.name).parent
  sources = [p for part in ('respond', 'judge') for p in sorted((folder / part).glob('*-of-*.jsonl'))]
  s = stage.Stage(config, workdir, 'pairs', ('pairs', 'judge'), sources)
  if s.done:
    return
  responses = list(records.read_shards(
      folder / 'respond', 'responses', 'id', 'prompt_id', 'prompt', 'response', 'finish'))
  judgements = list(records.read_shards(folder / 'judge', 'judgements', 'response_id', 'score'))
  if not responses or not judgements:
    raise InputError(f'{folder} holds {len(responses)} responses and {len(judgements)} judgements: nothing to pair')
  s.begin()
  if not stage.is_first_host():
    return s.finish()
  scores = scoring.by_response(judgements, config.judge.quorum)
  prompts = {}
  for response in responses:
    prompts.setdefault(response['prompt_id'], []).append(response)
  pairs, dropped = [], Counter()
  for candidates in prompts.values():
    pair = max_min(candidates, scores, config.pairs.unfinished_chosen)
    if isinstance(pair, str):
      dropped[pair] += 1
    else:
      pairs.append(pair)
  records.write(s.folder / 'pairs.jsonl', pairs)
  parsed = [j['score'] for j in judgements if j['score'] is not None]
  stage.say(f'{s.title}: {len(parsed)} of {len(judgements)} judgements parsed; '
            + (f'{len(pairs)} pairs from {len(prompts)} prompts' if pairs else 'no pairs to train on'))
  s.finish(pairs=len(pairs), prompts=len(prompts), pairs_per_1000_prompts=round(1000 * len(pairs) / len(prompts), 1),
           judgements=len(judgements), parsed=len(parsed), dropped=dict(dropped),
           score_histogram=scoring.histogram(parsed),
           chosen_minus_rejected_characters=_mean(len(p['chosen']) - len(p['rejected']) for p in pairs),
           margin=_mean(p['chosen_score'] - p['rejected_score'] for p in pairs))


def max_min(candidates: list[dict], scores: dict[str, scoring.Score], unfinished_chosen: bool) -> dict | str:
  """One prompt's candidates -> a pair, or the reason why there is none (PAPER 2.2).

  Only candidates with a score and a text take part. A response cut by length may be rejected, not chosen (unless
  `unfinished_chosen`). Among equals the first candidate is taken.
  """
  valid = [(scores[c['id']].mean, c) for c in candidates
           if c['response'].strip() and c['id'] in scores and scores[c['id']].mean is not None]
  if len(valid) < 2:
    return 'fewer than two scored candidates'
  best = max((v for v in valid if unfinished_chosen or v[1]['finish'] == 'eos'), key=lambda v: v[0], default=None)
  if best is None:
    return 'no finished candidate'
  worst = min(valid, key=lambda v: v[0])
  if best[0] <= worst[0]:
    return 'all scores equal' if worst[0] == max(score for score, _ in valid) else 'best candidate unfinished'
  if best[1]['response'] == worst[1]['response']:
    return 'same text'
  chosen, rejected = best[1], worst[1]
  return dict(id=chosen['prompt_id'], prompt=chosen['prompt'], chosen=chosen['response'], rejected=rejected['response'],
              chosen_score=best[0], rejected_score=worst[0], chosen_finish=chosen['finish'],
              rejected_finish=rejected['finish'], chosen_id=chosen['id'], rejected_id=rejected['id'])


def _mean(values) -> float | None:
  values = list(values)
  return round(sum(values) / len(values), 2) if values else None


if __name__ == '__main__':
  stage.main(run)
