"""Makes what the next model trains on from candidates and their scores: preference pairs, or positives for SFT."""
from collections import Counter
import statistics

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.reward import scores as scoring, strategies


def run(config, workdir):
  """MODEL/respond and MODEL/judge -> MODEL/pairs/pairs.jsonl (positives.jsonl for positives_only), scores.jsonl with
  every candidate's mean and spread, and counts of why prompts gave none."""
  spec = catalog.find('reward.pairs')
  config = spec.view(config)
  c, folder = config.pairs, spec.folder(workdir, config).parent
  strategies.check(c.strategy)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  prompts, judgements = load(config, folder)
  if not prompts or not judgements:
    raise InputError(f'{folder} holds {len(prompts)} answered prompts and {len(judgements)} judgements; answer and '
                     f'judge prompts first')
  s.begin()
  if not hosts.is_first_host():
    return s.finish()
  made, dropped = [], Counter()
  for prompt, candidates in prompts.values():
    new = (_positives if c.strategy == strategies.POSITIVES else _pair)(prompt, candidates, c)
    if isinstance(new, str):
      dropped[new] += 1
    else:
      made += new
  if c.strategy == 'consistency' and made:
    taus = {name: strategies.kendall_tau(candidates) for name, (_, candidates) in prompts.items()}
    rate = strategies.consistency_rate([tau for tau in taus.values() if tau is not None])
    made = [dict(p, tau=taus[p['id']], confidence=rate) for p in made]
  everyone = [candidate for _, candidates in prompts.values() for candidate in candidates]
  records.write(s.folder / 'scores.jsonl', (dict(id=x.id, score=x.score, spread=x.spread) for x in everyone))
  what = 'positives' if c.strategy == strategies.POSITIVES else 'pairs'
  records.write(s.folder / f'{what}.jsonl', made)
  found = summary(config, prompts, judgements, made, dropped)
  hosts.say(f'{s.title}: {table(found)}')
  s.finish(**found)


def load(config, folder) -> tuple[dict[str, tuple[dict, list[strategies.Candidate]]], list[dict]]:
  """What the stages of one model wrote -> {prompt id: (record with id and prompt, its candidates)}, judgements."""
  strategy, quorum = config.pairs.strategy, config.judge.quorum
  fields = ('id', 'prompt_id', 'prompt', 'response', 'finish')
  responses = [(r, False) for r in records.read_shards(folder / 'respond', 'responses', *fields)]
  judgements = list(records.read_shards(folder / 'judge', 'judgements', 'response_id', 'score'))
  again, implicit = {}, {}
  if strategy == 'consistency':
    found = records.read_shards(folder / 'judge_again', 'judgements', 'response_id', 'score')
    again = {name: s.mean for name, s in scoring.by_response(found, quorum).items()}
  if strategy == 'agreement':
    implicit = {r['id']: r['reward'] for r in records.read_shards(folder / 'implicit', 'rewards', 'id', 'reward')}
  if strategy == 'temporal':
    responses += [(r, True) for r in records.read_shards(folder / 'respond_older', 'responses', *fields)]
    judgements += records.read_shards(folder / 'judge_older', 'judgements', 'response_id', 'score')
  scores = scoring.by_response(judgements, quorum)
  prompts = {}
  for r, older in responses:
    score = scores.get(r['id'])
    candidate = strategies.Candidate(
        r['id'], r['response'], r['finish'], score.mean if score else None, score.spread if score else None,
        again.get(r['id']), implicit.get(r['id']), older)
    prompts.setdefault(r['prompt_id'], (dict(id=r['prompt_id'], prompt=r['prompt']), []))[1].append(candidate)
  return prompts, judgements


def _pair(prompt: dict, candidates, config) -> list[dict] | str:
  choice = strategies.PAIRS[config.strategy](candidates, config)
  if isinstance(choice, str):
    return choice
  record = dict(prompt, chosen=choice[0].response, rejected=choice[1].response)
  for side, candidate in zip(('chosen', 'rejected'), choice, strict=True):
    record |= {f'{side}_{key}': getattr(candidate, key) for key in ('score', 'spread', 'finish', 'id')}
  return [record]


def _positives(prompt: dict, candidates, config) -> list[dict] | str:
  found = strategies.positives_only(candidates, config)
  return found if isinstance(found, str) else [
      dict(id=c.id, prompt=prompt['prompt'], response=c.response, score=c.score, finish=c.finish) for c in found]


def summary(config, prompts, judgements, made, dropped) -> dict:
  """The yield, why the other prompts gave nothing, ties, margins, lengths in characters."""
  pairs = [m for m in made if 'chosen' in m]
  candidates = [c for _, c in prompts.values()]
  parsed = [j['score'] for j in judgements if j['score'] is not None]
  chosen, rejected = ([len(p[side]) for p in pairs] for side in ('chosen', 'rejected'))
  margins = [p['chosen_score'] - p['rejected_score'] for p in pairs]
  return dict(
      strategy=config.pairs.strategy, pairs=len(pairs), positives=len(made) - len(pairs), prompts=len(prompts),
      pairs_per_1000_prompts=round(1000 * len(made) / len(prompts), 1),
      judgements=len(judgements), parsed=len(parsed), score_histogram=scoring.histogram(parsed),
      dropped=dict(dropped), all_scores_equal=sum(map(strategies.has_tie, candidates)),
      spread=_mean([c.spread for group in candidates for c in group if c.spread is not None]),
      margin=_mean(margins), smallest_margin=round(min(margins), 2) if margins else None,
      chosen_characters=_mean(chosen), rejected_characters=_mean(rejected),
      chosen_minus_rejected_characters=_mean([a - b for a, b in zip(chosen, rejected, strict=True)]),
      confidence=round(pairs[0]['confidence'], 4) if pairs and 'confidence' in pairs[0] else None)


def table(found: dict) -> str:
  """The summary laid out for reading."""
  what = 'positives' if found['strategy'] == strategies.POSITIVES else 'pairs'
  lines = [f'{found[what] or "no"} {what} from {found["prompts"]} prompts by {found["strategy"]} '
           f'({found["pairs_per_1000_prompts"]:g} per 1,000); {found["parsed"]} of {found["judgements"]} judgements '
           f'parsed, scores {found["score_histogram"]}']
  lines += [f'  {"nothing: " + why:44}{n:6}' for why, n in found['dropped'].items()]
  shown = dict(all_scores_equal='prompts whose scores are all equal', margin='score, chosen minus rejected',
               smallest_margin='the smallest of them', chosen_characters='characters of the chosen',
               rejected_characters='characters of the rejected', spread='spread of the judgements of one response',
               confidence='confidence in every pair')
  lines += [f'  {label:44}{found[key]:6g}' for key, label in shown.items() if found[key] is not None]
  return '\n'.join(lines)


def _mean(values: list[float]) -> float | None:
  return round(statistics.fmean(values), 2) if values else None


if __name__ == '__main__':
  cli.main(run)
