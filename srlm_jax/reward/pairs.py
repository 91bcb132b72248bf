"""Makes the training data of the next model from candidates and scores.

The data are preference pairs, or positive examples for SFT with `pairs.strategy=positives_only`.
"""
from collections import Counter
import dataclasses
import statistics

from srlm_jax import catalog, cli, hosts, InputError, records, schema, stage
from srlm_jax.conversation import Messages
from srlm_jax.reward import scores as scoring, strategies


@dataclasses.dataclass(frozen=True)
class ScoredPrompt:
  """A prompt with its scored candidates."""
  id: str
  text: str
  candidates: list[strategies.Candidate]
  messages: Messages = ()


def run(config, workdir):
  """Writes MODEL/pairs: pairs.jsonl or positives.jsonl, and scores.jsonl.

  Reads MODEL/respond, MODEL/judge and what the strategy needs. scores.jsonl has the mean and the
  spread of every candidate. done.json counts the reasons why prompts gave no pair.
  """
  spec = catalog.find('reward.pairs')
  config = spec.view(config)
  strategy = config.pairs.strategy
  strategies.check(strategy)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  prompts, judgements = load(s, config)
  if not prompts or not judgements:
    raise InputError(f'{s.folder.parent} has {len(prompts)} answered prompts and {len(judgements)} '
                     f'judgements; run the respond and judge stages first')
  s.begin()
  if not hosts.is_first_host():
    return s.finish()
  made, dropped = select(prompts, config.pairs)
  records.write(s.folder / 'scores.jsonl', (
      schema.CandidateScore(id=c.id, score=c.score, spread=c.spread)
      for p in prompts for c in p.candidates))
  kind = 'positives' if strategy == strategies.POSITIVES else 'pairs'
  records.write(s.folder / f'{kind}.jsonl', made)
  found = summary(strategy, prompts, judgements, made, dropped)
  hosts.log(f'{s.title}: {table(found)}')
  s.finish(found)


def load(s: stage.Stage, config) -> tuple[list[ScoredPrompt], list[schema.Judgement]]:
  """Reads the inputs -> prompts with candidates, and the sampler's judgements."""
  quorum = config.judge.quorum
  responses = [(r, False) for r in s.read('respond/responses-*.jsonl')]
  judgements = list(s.read('judge/judgements-*.jsonl'))
  again, implicit = {}, {}
  if catalog.needs('judge_again', config):
    found = s.read('judge_again/judgements-*.jsonl')
    scores = scoring.by_response(found, quorum)
    again = {name: score.mean for name, score in scores.items()}
  if catalog.needs('implicit', config):
    rewards = s.read('implicit/rewards-*.jsonl')
    implicit = {r.id: r.reward for r in rewards}
  if catalog.needs('respond_older', config):
    older = s.read('respond_older/responses-*.jsonl')
    responses += [(r, True) for r in older]
    judgements += s.read('judge_older/judgements-*.jsonl')
  scores = scoring.by_response(judgements, quorum)
  prompts = {}
  for r, older in responses:
    score = scores.get(r.id, scoring.Score(None, None, []))
    prompt = prompts.setdefault(r.prompt_id, ScoredPrompt(r.prompt_id, r.prompt, [], r.messages))
    prompt.candidates.append(strategies.Candidate(
        r.id, r.response, r.finish, score.mean, score.spread, again.get(r.id), implicit.get(r.id),
        older, r.token_ids))
  return list(prompts.values()), judgements


def select(prompts: list[ScoredPrompt], config) -> tuple[
    list[schema.Pair] | list[schema.Positive], Counter]:
  """-> pairs or positives, and the number of prompts without any, by reason."""
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
    made = [dataclasses.replace(pair, tau=taus[pair.id], soft_label=rate) for pair in made]
  return made, dropped


def _pair(prompt: ScoredPrompt, config) -> list[schema.Pair] | str:
  choice = strategies.PAIRS[config.strategy](prompt.candidates, config)
  if isinstance(choice, str):
    return choice
  chosen, rejected = choice
  return [schema.Pair(
      id=prompt.id, prompt=prompt.text, chosen=chosen.response, rejected=rejected.response,
      chosen_finish=chosen.finish, rejected_finish=rejected.finish, chosen_id=chosen.id,
      rejected_id=rejected.id, chosen_score=chosen.score, rejected_score=rejected.score,
      chosen_spread=chosen.spread, rejected_spread=rejected.spread,
      chosen_token_ids=chosen.token_ids, rejected_token_ids=rejected.token_ids,
      messages=prompt.messages)]


def _positives(prompt: ScoredPrompt, config) -> list[schema.Positive] | str:
  found = strategies.positives_only(prompt.candidates, config)
  if isinstance(found, str):
    return found
  return [schema.Positive(id=c.id, prompt=prompt.text, response=c.response, score=c.score,
                          finish=c.finish, token_ids=c.token_ids, messages=prompt.messages)
          for c in found]


def summary(
    strategy: str, prompts: list[ScoredPrompt], judgements: list[schema.Judgement],
    made: list[schema.Pair] | list[schema.Positive], dropped: Counter) -> schema.PairsSummary:
  """The statistics of done.json: yield, drop reasons, ties, score margins, mean lengths."""
  pairs = [] if strategy == strategies.POSITIVES else made
  parsed = [j.score for j in judgements if j.score is not None]
  chosen, rejected = [len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]
  margins = [p.chosen_score - p.rejected_score for p in pairs]
  is_weighted = strategy == 'consistency' and pairs
  return schema.PairsSummary(
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
      soft_label=round(pairs[0].soft_label, 4) if is_weighted else None)


def table(found: schema.PairsSummary) -> str:
  """Formats the summary."""
  kind = 'positives' if found.strategy == strategies.POSITIVES else 'pairs'
  lines = [f'{getattr(found, kind) or "no"} {kind} from {found.prompts} prompts by '
           f'{found.strategy} ({found.pairs_per_1000_prompts:g} per 1,000); {found.parsed} of '
           f'{found.judgements} judgements parsed, scores {found.score_histogram}']
  lines += [f'  {"dropped, " + why:48}{n:6}' for why, n in found.dropped.items()]
  labels = dict(
      all_scores_equal='prompts whose scores are all equal',
      margin='mean score margin, chosen minus rejected',
      smallest_margin='smallest score margin',
      chosen_characters='characters per chosen response',
      rejected_characters='characters per rejected response',
      spread='standard deviation of judgements per response',
      soft_label='soft label of every pair')
  values = {label: getattr(found, key) for key, label in labels.items()}
  lines += [f'  {label:48}{value:6g}' for label, value in values.items() if value is not None]
  return '\n'.join(lines)


def _mean(values: list[float]) -> float | None:
  return round(statistics.fmean(values), 2) if values else None


if __name__ == '__main__':
  cli.main(run)
