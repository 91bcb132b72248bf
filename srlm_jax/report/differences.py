"""Differences between two models of a run: paired by prompt where the records allow it."""
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import statistics

import numpy as np

from srlm_jax import records, schema
from srlm_jax.report import estimates, external, keyed
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


def pairs(ranked: Iterable[schema.RankedPrompt]) -> np.ndarray:
  """Prompts -> a table with a row per pair of replies that people ranked apart.

  Fields: id of the better reply, worse_id, prompt_id.
  """
  return keyed.table(((*(hash(records.join(prompt.id, reply.id)) for reply in (a, b)),
                       hash(prompt.id))
                      for prompt in ranked
                      for a, b in itertools.combinations(
                          sorted(prompt.replies, key=lambda reply: reply.rank), 2)
                      if a.rank != b.rank), 'worse_id', 'prompt_id')


def between(a: Evaluated, b: Evaluated, ranked: np.ndarray,
            outside: external.External) -> list[Difference]:
  """Every measured difference of model a minus model b. ranked: the table of `pairs`."""
  answers = keyed.both(a.answers.rows, b.answers.rows)
  parsed = keyed.both(a.parsed, b.parsed)
  found = [
      by_prompt('oracle', a, b, *(x['score'] for x in keyed.both(a.graded, b.graded))),
      *_head_to_head(a, b, outside),
      *(_apart(name, a, b, outside) for name in ('alpaca_controlled', 'alpaca', 'mt_bench')),
      *(by_prompt(name, a, b, *(x[name] for x in answers)) for name in ('characters', 'tokens')),
      _by_pair('pairwise_all', a, b, ranked, both_scored=False),
      _by_pair('pairwise', a, b, ranked, both_scored=True),
      by_prompt('parsed', a, b, *(x['parsed'] / x['judgements'] for x in parsed))]
  return [difference for difference in found if difference]


def by_prompt(measure: str, a: Evaluated, b: Evaluated, ours: np.ndarray, theirs: np.ndarray
              ) -> Difference | None:
  """The difference of one number per prompt [prompts], on the same prompts; None without any."""
  if not len(ours):
    return None
  return Difference(
      measure=measure, model=a.model, against=b.model, paired=True, ours=statistics.fmean(ours),
      theirs=statistics.fmean(theirs),
      change=estimates.mean_of(ours - theirs, np.ones(len(ours))))


def wins(found: list[Evaluated], outside: external.External) -> list[WinTieLoss]:
  """Every pair of models that was compared: by the oracle, and by the judges of the files.

  A later model is `a`; of a file, a and b are as the file has them.
  """
  made = []
  for b, a in itertools.combinations(found, 2):
    ours, theirs = keyed.both(a.graded, b.graded)
    if len(ours):
      made.append(_counted(a.model, b.model, ours['score'] - theirs['score']))
  for path, file in outside.head_to_head.items():
    if file.count:
      made.append(WinTieLoss(
          a=file.a, b=file.b, by=external.judged_by(file) or 'program', count=file.count,
          wins=file.wins, ties=file.ties, losses=file.losses, rate=external.rate(file),
          source=path))
  return made


def _counted(a: str, b: str, margins: np.ndarray) -> WinTieLoss:
  outcomes = (1 + np.sign(margins)) / 2
  wins, ties, losses = (int((outcomes == x).sum()) for x in (1, 0.5, 0))
  return WinTieLoss(a=a, b=b, by='oracle', count=len(outcomes), wins=wins, ties=ties, losses=losses,
                    rate=estimates.mean_of(outcomes, np.ones(len(outcomes))))


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


def _by_pair(measure: str, a: Evaluated, b: Evaluated, ranked: np.ndarray,
             both_scored: bool) -> Difference | None:
  """The difference in the share of pairs of replies that a judge orders as people ranked them.

  Equal scores are errors, as in `eval.agreement`. both_scored: only the pairs whose replies have
  scores of both judges; else all pairs that both judged, and one without scores is an error.
  """
  if None in (a.quorum, b.quorum):
    return None
  scores = [(_scores(x, ranked['id']), _scores(x, ranked['worse_id'])) for x in (a, b)]
  every = [x for better, worse in scores for x in (better[1], worse[1])]  # whether it was judged
  if both_scored:
    every = [~np.isnan(x[0]) for pair in scores for x in pair]
  counts = np.logical_and.reduce(every)
  ours, theirs = (better[0][counts] > worse[0][counts] for better, worse in scores)
  if not len(ours):
    return None
  change = estimates.mean_of(*keyed.totals(
      ranked['prompt_id'][counts], ours.astype(float) - theirs))
  return Difference(measure=measure, model=a.model, against=b.model, change=change,
                    ours=float(ours.mean()), theirs=float(theirs.mean()), paired=True)


def _scores(found: Evaluated, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The scores of replies, NaN without one, and whether they were judged."""
  place = keyed.find(found.replies['id'], ids)
  scores = np.full(len(ids), np.nan)
  scores[place >= 0] = found.replies['score'][place[place >= 0]]
  return scores, place >= 0
