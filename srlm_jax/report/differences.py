"""Differences between two models of a run: paired by prompt where the records allow it."""
from collections.abc import Iterator
import dataclasses
import itertools

from srlm_jax import records, schema
from srlm_jax.report import estimates, external, measures
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Evaluated

FEWEST = 10           # prompts; fewer decide nothing
SIGNIFICANT = 0.05    # p-value of the sign test of a head-to-head file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """A measure of a model minus that of another one."""
  measure: str           # key of measures.MEASURES
  model: str
  against: str
  change: Value          # for head_to_head: the win rate minus one half
  ours: float | None     # the two values on the same prompts
  theirs: float | None
  paired: bool           # by prompt; else both are taken as measured on different prompts
  judge: str = ''        # name of the outside judge, if the file has it
  file: schema.HeadToHead | None = None  # None also for a mean over seeds

  @property
  def undecided(self) -> str:
    """Why the change can decide nothing: a reason; '' if it can."""
    change = self.change
    if change.of != 'seeds' and change.count is not None and change.count < FEWEST:
      return f'{change.counted} cannot decide, {FEWEST} are needed'
    if change.low is None or change.high is None:
      return 'without an interval it decides nothing'
    # All verdicts of a file may be equal: its sign test says what that means.
    if not self.file and change.sign and change.high - change.low <= 1e-9 * abs(change.value):
      return f'it is the same on all {change.of}, so its spread is not known and it decides nothing'
    return ''

  @property
  def is_chance(self) -> bool:
    """Whether the sign test of a head-to-head file finds no difference."""
    return bool(self.file) and (self.file.p_value is None or self.file.p_value >= SIGNIFICANT)

  @property
  def sign(self) -> int:
    """1 if the model is better, -1 if it is worse, 0 if this is not known."""
    return 0 if self.undecided or self.is_chance else self.change.sign


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinTieLoss:
  """On how many prompts the answer of a was better than, as good as, or worse than that of b."""
  a: str
  b: str
  by: str               # 'oracle', the name of the judge, or 'program' for a file of graded answers
  count: int
  wins: int
  ties: int
  losses: int
  rate: Value           # win rate, 0 to 1: ties count half
  source: str = ''      # file in WORKDIR/eval, for an outside judge


def between(a: Evaluated, b: Evaluated, ranked: list[schema.RankedPrompt],
            outside: external.External) -> list[Difference]:
  """Every measured difference of model a minus model b."""
  found = [
      by_prompt('oracle', a, b, a.graded, b.graded),
      *_head_to_head(a, b, outside),
      *(_apart(name, a, b, outside) for name in ('alpaca_controlled', 'alpaca', 'mt_bench')),
      *(by_prompt(name, a, b, *({p: length(r) for p, r in x.answers.items()} for x in (a, b)))
        for name, length in (('characters', lambda r: len(r.response)),
                             ('tokens', lambda r: r.n_tokens))),
      _by_pair('pairwise_all', a, b, ranked, both_scored=False),
      _by_pair('pairwise', a, b, ranked, both_scored=True),
      by_prompt('parsed', a, b, *map(_parse_rates, (a, b)))]
  return [difference for difference in found if difference]


def by_prompt(measure: str, a: Evaluated, b: Evaluated, ours: dict[str, float],
              theirs: dict[str, float]) -> Difference | None:
  """The difference of one number per prompt, over the prompts that both have; None without any."""
  same = [p for p in ours if p in theirs]
  if not same:
    return None
  mine, other = ([float(x[p]) for p in same] for x in (ours, theirs))
  return Difference(
      measure=measure, model=a.model, against=b.model, paired=True, ours=sum(mine) / len(same),
      theirs=sum(other) / len(same),
      change=estimates.mean([x - y] for x, y in zip(mine, other, strict=True)))


def wins(found: list[Evaluated], outside: external.External) -> list[WinTieLoss]:
  """Every pair of models that was compared: by the oracle, and by the judges of the files.

  A later model is `a`; of a file, a and b are as the file has them.
  """
  made = []
  for b, a in itertools.combinations(found, 2):
    same = [p for p in a.graded if p in b.graded]
    if same:
      made.append(_counted(a.model, b.model, [a.graded[p] - b.graded[p] for p in same]))
  for path, file in outside.head_to_head.items():
    if file.count:
      made.append(WinTieLoss(
          a=file.a, b=file.b, by=external.judged_by(file) or 'program', count=file.count,
          wins=file.wins, ties=file.ties, losses=file.losses, rate=external.rate(file),
          source=path))
  return made


def _counted(a: str, b: str, margins: list[float]) -> WinTieLoss:
  outcomes = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
  return WinTieLoss(a=a, b=b, by='oracle', count=len(outcomes), wins=outcomes.count(1.0),
                    ties=outcomes.count(0.5), losses=outcomes.count(0.0),
                    rate=estimates.mean([x] for x in outcomes))


def _head_to_head(a: Evaluated, b: Evaluated, outside: external.External) -> Iterator[Difference]:
  """The comparisons of both models by outside judges, in either direction.

  Those of answers that a program graded are left out: the oracle's grades are in the run.
  """
  for file in outside.head_to_head.values():
    judge = external.judged_by(file)
    if judge and (rate := external.rate_of(file, a.model, b.model)):
      low, high = (None if x is None else x - 0.5 for x in (rate.low, rate.high))
      yield Difference(
          measure='head_to_head', model=a.model, against=b.model, ours=rate.value,
          theirs=1 - rate.value, paired=True, judge=judge, file=file,
          change=dataclasses.replace(rate, value=rate.value - 0.5, low=low, high=high))


def _apart(measure: str, a: Evaluated, b: Evaluated, outside: external.External):
  """The difference of two benchmark results, of which only the means are known."""
  ours, theirs = (outside.of_model(x.model).get(measure) for x in (a, b))
  if not ours or not theirs:
    return None
  return Difference(measure=measure, model=a.model, against=b.model, paired=False,
                    ours=ours.value, theirs=theirs.value, change=estimates.apart(ours, theirs))


def _by_pair(measure: str, a: Evaluated, b: Evaluated, ranked: list[schema.RankedPrompt],
             both_scored: bool) -> Difference | None:
  """The difference in the share of pairs of replies that a judge orders as people ranked them.

  Equal scores are errors, as in `eval.agreement`. both_scored: only the pairs whose replies have
  scores of both judges; else all pairs, and a pair without scores is an error.
  """
  if not a.judgements or not b.judgements or None in (a.quorum, b.quorum):
    return None
  asked = {j.response_id for j in a.judgements} & {j.response_id for j in b.judgements}
  groups = []  # of each prompt: (whether a is right, whether b is right) of every pair
  for prompt in ranked:
    replies = [(reply.rank, name) for reply in prompt.replies
               if (name := records.join(prompt.id, reply.id)) in asked]
    pairs = [sorted(pair) for pair in itertools.combinations(replies, 2)
             if pair[0][0] != pair[1][0]]
    groups.append([
        (_is_right(a.scores, better, worse), _is_right(b.scores, better, worse))
        for (_, better), (_, worse) in pairs
        if not both_scored or all(x in y.scores for x in (better, worse) for y in (a, b))])
  change = estimates.mean([float(x) - float(y) for x, y in group] for group in groups)
  if not change:
    return None
  every = [pair for group in groups for pair in group]
  ours, theirs = (sum(pair[i] for pair in every) / len(every) for i in range(2))
  return Difference(measure=measure, model=a.model, against=b.model, change=change, ours=ours,
                    theirs=theirs, paired=True)


def _is_right(scores: dict[str, float], better: str, worse: str) -> bool:
  return better in scores and worse in scores and scores[better] > scores[worse]


def _parse_rates(found: Evaluated) -> dict[str, float]:
  """{prompt id: share of the judgements of its replies that have a score}."""
  return {prompt: sum(group) / len(group)
          for prompt, group in measures.parsed(found.judgements).items()}
