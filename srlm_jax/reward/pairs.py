"""Makes the training data of the next model from candidates and scores.

The data are preference pairs, or positive examples for SFT with `pairs.strategy=positives_only`.
"""
from collections import Counter
import dataclasses
import statistics

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.reward import scores as scoring, strategies


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt with its scored candidates."""
  id: str
  text: str
  candidates: list[strategies.Candidate]


def run(config, workdir):
  """Writes MODEL/pairs: pairs.jsonl or positives.jsonl, and scores.jsonl.

  Reads MODEL/respond, MODEL/judge and what the strategy needs. scores.jsonl has the mean and the
  spread of every candidate. done.json counts the reasons why prompts gave no pair.
  """
  spec = catalog.find('reward.pairs')
  config = spec.view(config)
  strategy, folder = config.pairs.strategy, spec.folder(workdir, config).parent
  strategies.check(strategy)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  prompts, judgements = load(config, folder)
  if not prompts or not judgements:
    raise InputError(f'{folder} holds {len(prompts)} answered prompts and {len(judgements)} '
                     f'judgements; run the respond and judge stages first')
  s.begin()
  if not hosts.is_first_host():
    return s.finish()
  made, dropped = select(prompts, config.pairs)
  records.write(s.folder / 'scores.jsonl', (
      dict(id=c.id, score=c.score, spread=c.spread) for p in prompts for c in p.candidates))
  kind = 'positives' if strategy == strategies.POSITIVES else 'pairs'
  records.write(s.folder / f'{kind}.jsonl', made)
  found = summary(strategy, prompts, judgements, made, dropped)
  hosts.say(f'{s.title}: {table(found)}')
  s.finish(**found)


def load(config, folder) -> tuple[list[Prompt], list[dict]]:
  """Reads the stages of one model -> prompts with candidates, and the sampler's judgements."""
  strategy, quorum = config.pairs.strategy, config.judge.quorum
  fields = ('id', 'prompt_id', 'prompt', 'response', 'finish')
  responses = [(r, False) for r in records.read_shards(folder / 'respond', 'responses', *fields)]
  judgements = list(records.read_shards(
      folder / 'judge', 'judgements', 'response_id', 'score'))
  again, implicit = {}, {}
  if strategy == 'consistency':
    found = records.read_shards(folder / 'judge_again', 'judgements', 'response_id', 'score')
    again = {name: score.mean for name, score in scoring.by_response(found, quorum).items()}
  if strategy == 'agreement':
    implicit = {r['id']: r['reward'] for r in records.read_shards(
        folder / 'implicit', 'rewards', 'id', 'reward')}
  if strategy == 'temporal':
    responses += [(r, True) for r in records.read_shards(
        folder / 'respond_older', 'responses', *fields)]
    judgements += records.read_shards(
        folder / 'judge_older', 'judgements', 'response_id', 'score')
  scores = scoring.by_response(judgements, quorum)
  prompts = {}
  for r, older in responses:
    score = scores.get(r['id'], scoring.Score(None, None, []))
    prompt = prompts.setdefault(r['prompt_id'], Prompt(r['prompt_id'], r['prompt'], []))
    prompt.candidates.append(strategies.Candidate(
        r['id'], r['response'], r['finish'], score.mean, score.spread, again.get(r['id']),
        implicit.get(r['id']), older))
  return list(prompts.values()), judgements


def select(prompts: list[Prompt], config) -> tuple[list[dict], Counter]:
  """-> records of pairs or positives, and the number of prompts without any, by reason."""
  make = _positives if config.strategy == strategies.POSITIVES else _pair
  made, dropped = [], Counter()
  for prompt in prompts:
    new = make(prompt, config)
    if isinstance(new, str):
      dropped[new] += 1
    else:
      made += new
  if config.strategy == 'consistency' and made:
    taus = {p.id: strategies.kendall_tau(p.candidates) for p in prompts}
    rate = strategies.consistency_rate([tau for tau in taus.values() if tau is not None])
    made = [dict(pair, tau=taus[pair['id']], confidence=rate) for pair in made]
  return made, dropped


def _pair(prompt: Prompt, config) -> list[dict] | str:
  choice = strategies.PAIRS[config.strategy](prompt.candidates, config)
  if isinstance(choice, str):
    return choice
  chosen, rejected = choice
  record = dict(
      id=prompt.id, prompt=prompt.text, chosen=chosen.response, rejected=rejected.response)
  for side, candidate in (('chosen', chosen), ('rejected', rejected)):
    record |= {f'{side}_{field}': getattr(candidate, field)
               for field in ('score', 'spread', 'finish', 'id')}
  return [record]


def _positives(prompt: Prompt, config) -> list[dict] | str:
  found = strategies.positives_only(prompt.candidates, config)
  if isinstance(found, str):
    return found
  return [dict(id=c.id, prompt=prompt.text, response=c.response, score=c.score, finish=c.finish)
          for c in found]


def summary(
    strategy: str, prompts: list[Prompt], judgements: list[dict], made: list[dict],
    dropped: Counter) -> dict:
  """The statistics of done.json: yield, drop reasons, ties, score margins, mean lengths.

  Lengths are in characters.
  """
  pairs = [m for m in made if 'chosen' in m]
  parsed = [j['score'] for j in judgements if j['score'] is not None]
  chosen, rejected = ([len(p[side]) for p in pairs] for side in ('chosen', 'rejected'))
  margins = [p['chosen_score'] - p['rejected_score'] for p in pairs]
  return dict(
      strategy=strategy, pairs=len(pairs), positives=len(made) - len(pairs), prompts=len(prompts),
      pairs_per_1000_prompts=round(1000 * len(made) / len(prompts), 1),
      judgements=len(judgements), parsed=len(parsed), score_histogram=scoring.histogram(parsed),
      dropped=dict(dropped),
      all_scores_equal=sum(strategies.has_tie(p.candidates) for p in prompts),
      spread=_mean([c.spread for p in prompts for c in p.candidates if c.spread is not None]),
      margin=_mean(margins), smallest_margin=round(min(margins), 2) if margins else None,
      chosen_characters=_mean(chosen), rejected_characters=_mean(rejected),
      chosen_minus_rejected_characters=_mean(
          [a - b for a, b in zip(chosen, rejected, strict=True)]),
      confidence=round(pairs[0]['confidence'], 4) if pairs and 'confidence' in pairs[0] else None)


def table(found: dict) -> str:
  """Formats the summary."""
  kind = 'positives' if found['strategy'] == strategies.POSITIVES else 'pairs'
  lines = [f'{found[kind] or "no"} {kind} from {found["prompts"]} prompts by {found["strategy"]} '
           f'({found["pairs_per_1000_prompts"]:g} per 1,000); {found["parsed"]} of '
           f'{found["judgements"]} judgements parsed, scores {found["score_histogram"]}']
  lines += [f'  {"dropped, " + why:48}{n:6}' for why, n in found['dropped'].items()]
  labels = dict(
      all_scores_equal='prompts whose scores are all equal',
      margin='mean score margin, chosen minus rejected',
      smallest_margin='smallest score margin',
      chosen_characters='characters per chosen response',
      rejected_characters='characters per rejected response',
      spread='standard deviation of judgements per response',
      confidence='confidence of every pair')
  lines += [f'  {label:48}{found[key]:6g}' for key, label in labels.items()
            if found[key] is not None]
  return '\n'.join(lines)


def _mean(values: list[float]) -> float | None:
  return round(statistics.fmean(values), 2) if values else None


if __name__ == '__main__':
  cli.main(run)
