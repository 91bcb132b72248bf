"""Makes the training data of the next model from candidates and scores.

The data are preference pairs, or positive examples for SFT with `pairs.strategy=positives_only`.
"""
import array
from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import operator

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
  seen = survey(s, config)
  s.begin()
  if not hosts.is_first_host():
    return s.finish()
  kind = 'positives' if strategy == strategies.POSITIVES else 'pairs'
  made = Made(config.pairs, seen.rate)
  with (records.replacing(s.folder / 'scores.jsonl') as scores,
        records.replacing(s.folder / f'{kind}.jsonl') as out):
    for prompt in read(s, config):
      scores.writelines(records.dump(schema.CandidateScore(id=c.id, score=c.score, spread=c.spread))
                        for c in prompt.candidates)
      out.writelines(map(records.dump, made.of(prompt)))
  found = summary(seen, made)
  hosts.log(f'{s.title}: {table(found)}')
  s.finish(found)


def read(s: stage.Stage, config,
         judged: Sequence[scoring.Judged] = ()) -> Iterator[ScoredPrompt]:
  """Yields the prompts with their scored candidates, one by one.

  All files are in the order of the prompts, so no more of them than one prompt is in memory.
  judged: those of `_judged`, if the caller wants their counts
  """
  responses, of_older = 'respond/responses-*.jsonl', 'respond_older/responses-*.jsonl'
  own, older_scores, again = judged or _judged(s, config)
  implicit, older = (
      records.Matched(s.read(file), operator.attrgetter(key), s.path(file))
      if catalog.needs(name, config) else None
      for name, file, key in (('implicit', 'implicit/rewards-*.jsonl', 'id'),
                              ('respond_older', of_older, 'prompt_id')))

  def candidate(r: schema.Response, scores: scoring.Judged, is_older: bool):
    score = scores.of(r.id)
    return strategies.Candidate(
        r.id, r.response, r.finish, score.mean, score.spread,
        again.of(r.id).mean if again else None,
        next((x.reward for x in implicit.of(r.id)), None) if implicit else None,
        is_older, r.token_ids)
  for group in scoring.by_prompt(s.read(responses)):
    prompt_id = group[0].prompt_id
    candidates = [candidate(r, own, False) for r in group]
    if older:
      candidates += [candidate(r, older_scores, True) for r in older.of(prompt_id)]
    yield ScoredPrompt(prompt_id, group[0].prompt, candidates, group[0].messages)
  for file in (older, own, again, implicit):
    if file:
      file.finish(s.path(responses))
  if older_scores:
    older_scores.finish(s.path(of_older))


def _judged(s: stage.Stage, config) -> list[scoring.Judged | None]:
  """The scores by the sampler, of its own and of the older model's responses, and by that model.

  None: the strategy does not need them.
  """
  files = dict(judge=True, judge_older=catalog.needs('judge_older', config),
               judge_again=catalog.needs('judge_again', config))
  return [scoring.Judged(s.read(f'{name}/judgements-*.jsonl'), config.judge.quorum,
                         s.path(f'{name}/judgements-*.jsonl')) if is_needed else None
          for name, is_needed in files.items()]


@dataclasses.dataclass(frozen=True)
class Survey:
  """The statistics of what the stage reads."""
  prompts: int
  judgements: int          # by the sampler
  parsed: int              # that have a score
  histogram: dict[str, int]
  all_scores_equal: int    # prompts
  spread: float | None     # mean standard deviation of the judgements of a response
  rate: float              # strategy `consistency`: the soft label; otherwise 1


def survey(s: stage.Stage, config) -> Survey:
  """Reads all inputs once, before anything is written. Raises InputError as they do."""
  prompts, equal, spread, taus = 0, 0, scoring.Mean(), array.array('d')
  judged = _judged(s, config)
  for prompt in read(s, config, judged):
    prompts += 1
    equal += strategies.has_tie(prompt.candidates)
    for candidate in prompt.candidates:
      if candidate.spread is not None:
        spread.add(candidate.spread)
    if config.pairs.strategy == 'consistency':
      tau = strategies.kendall_tau(prompt.candidates)
      taus.extend([] if tau is None else [tau])
  counts = sum((scores.counts for scores in judged[:2] if scores), Counter())
  judgements = counts.total()
  if not prompts or not judgements:
    raise InputError(f'{s.folder.parent} has {prompts} answered prompts and {judgements} '
                     f'judgements; run the respond and judge stages first')
  del counts[None]
  return Survey(
      prompts, judgements, counts.total(), scoring.histogram(counts), equal,
      spread.rounded(2), strategies.consistency_rate(taus) if taus else 1.0)


class Made:
  """The pairs or positives that are made of prompts, one by one, and their statistics.

  count: pairs or positives; dropped: the number of prompts without any, by reason
  """

  def __init__(self, config, rate: float):
    """`config`: the section `pairs`; `rate`: the soft label with the strategy `consistency`."""
    self.config, self._rate = config, rate
    self.count, self.dropped, self.smallest_margin = 0, Counter(), None
    self.margin, self.chosen, self.rejected, self.longer = (scoring.Mean() for _ in range(4))

  def of(self, prompt: ScoredPrompt) -> list[schema.Pair] | list[schema.Positive]:
    """The pair or the positives of a prompt; [] if there are none."""
    is_positive = self.config.strategy == strategies.POSITIVES
    found = (_positives if is_positive else _pair)(prompt, self.config)
    if isinstance(found, str):
      self.dropped[found] += 1
      return []
    self.count += len(found)
    if is_positive:
      return found
    pair, = found
    margin = pair.chosen_score - pair.rejected_score
    if self.smallest_margin is None or margin < self.smallest_margin:
      self.smallest_margin = margin
    for mean, value in ((self.margin, margin), (self.chosen, len(pair.chosen)),
                        (self.rejected, len(pair.rejected)),
                        (self.longer, len(pair.chosen) - len(pair.rejected))):
      mean.add(value)
    if self.config.strategy == 'consistency':
      pair = dataclasses.replace(pair, tau=strategies.kendall_tau(prompt.candidates),
                                 soft_label=self._rate)
    return [pair]


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


def summary(seen: Survey, made: Made) -> schema.PairsSummary:
  """The statistics of done.json: yield, drop reasons, ties, score margins, mean lengths."""
  strategy = made.config.strategy
  is_positive, smallest = strategy == strategies.POSITIVES, made.smallest_margin
  return schema.PairsSummary(
      strategy=strategy, pairs=0 if is_positive else made.count,
      positives=made.count if is_positive else 0, prompts=seen.prompts,
      pairs_per_1000_prompts=round(1000 * made.count / seen.prompts, 1),
      judgements=seen.judgements, parsed=seen.parsed, score_histogram=seen.histogram,
      dropped=dict(made.dropped), all_scores_equal=seen.all_scores_equal, spread=seen.spread,
      margin=made.margin.rounded(2),
      smallest_margin=None if smallest is None else round(smallest, 2),
      chosen_characters=made.chosen.rounded(2), rejected_characters=made.rejected.rounded(2),
      chosen_minus_rejected_characters=made.longer.rounded(2),
      soft_label=round(seen.rate, 4) if strategy == 'consistency' and made.count else None)


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


if __name__ == '__main__':
  cli.main(run)
