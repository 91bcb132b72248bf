"""Aggregates judgements into scores: the mean and spread of those that parsed, and statistics."""
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import fractions
import itertools
import math
import operator
import statistics

import numpy as np

from srlm_jax import records, schema

DRAWS = 4000         # bootstrap resamples
WEIGHTS = 2_000_000  # of the prompts in the resamples that are computed together


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one response."""
  mean: float | None    # None if fewer judgements parsed than the quorum
  # Population standard deviation of the parsed judgements. None if `mean` is None.
  spread: float | None
  judgements: Sequence[schema.Judgement]


def of(judgements: Sequence[schema.Judgement], quorum: int) -> Score:
  """The judgements of one response -> its score.

  A judgement that failed to parse is missing data. It does not count as a score of 0.
  """
  parsed = [j.score for j in judgements if j.score is not None]
  if parsed and len(parsed) >= quorum:
    return Score(statistics.fmean(parsed), statistics.pstdev(parsed), judgements)
  return Score(None, None, judgements)


def by_response(judgements: Iterable[schema.Judgement], quorum: int) -> dict[str, Score]:
  """All judgement records -> {response id: Score}."""
  grouped = {}
  for judgement in judgements:
    grouped.setdefault(judgement.response_id, []).append(judgement)
  return {response_id: of(group, quorum) for response_id, group in grouped.items()}


def by_prompt(responses: Iterable[schema.Response]) -> Iterator[list[schema.Response]]:
  """Yields the responses to each prompt, which follow each other."""
  for _, group in itertools.groupby(responses, operator.attrgetter('prompt_id')):
    yield list(group)


class Judged:
  """The scores of responses, which are asked for in the order in which they were judged.

  counts: {score, or None for a judgement without one: judgements}, of those that were read so far
  """

  def __init__(self, judgements: Iterable[schema.Judgement], quorum: int, source):
    """`source`: the path of the judgements, for errors."""
    self.counts, self._quorum = Counter(), quorum
    self._found = records.Matched(judgements, operator.attrgetter('response_id'), source)

  def of(self, response_id: str) -> Score:
    """The score of a response; without a mean if no judgement is of it."""
    judgements = self._found.of(response_id)
    self.counts.update(j.score for j in judgements)
    return of(judgements, self._quorum)

  def finish(self, other):
    """Raises InputError for judgements of other responses; see `records.Matched`."""
    self._found.finish(other)


class Mean:
  """A running mean: exactly `statistics.fmean` of the numbers that were added.

  >>> mean = Mean()
  >>> mean.value, mean.add(0.1), mean.add(0.2), mean.value
  (None, None, None, 0.15000000000000002)
  """

  def __init__(self):
    self.count, self._sum = 0, fractions.Fraction()

  def add(self, value: float):
    self.count += 1
    self._sum += fractions.Fraction(value)

  @property
  def value(self) -> float | None:
    """None without a number."""
    return float(self._sum) / self.count if self.count else None

  def rounded(self, digits: int) -> float | None:
    return None if self.value is None else round(self.value, digits)


def orders(replies: list[tuple[float, float]]) -> list[float]:
  """(rank, score) per reply, rank 0 is best -> one number per pair of replies with different ranks.

  The number is positive for a concordant pair (the better rank has the higher score), negative for
  a discordant pair, and 0 if the scores tie.

  >>> orders([(0, 5.0), (1, 3.0), (1, 4.0), (2, 3.0)])
  [2.0, 1.0, 4.0, 0.0, 1.0]
  """
  return [(b[0] - a[0]) * (a[1] - b[1])
          for a, b in itertools.combinations(replies, 2) if a[0] != b[0]]


def ranks(values: Iterable[float]) -> tuple[int, ...]:
  """The place of each value among the distinct ones: what rank correlations depend on.

  >>> ranks([2.5, 1.0, 4.0, 2.5])
  (1, 0, 2, 1)
  """
  values = list(values)
  places = {value: i for i, value in enumerate(sorted({*values}))}
  return tuple(places[value] for value in values)


def standard_error(values: Sequence[float]) -> float:
  """The standard error of the mean; 0 for a single value."""
  return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def intervals(sums: np.ndarray, counts: np.ndarray) -> list[list[float] | None]:
  """sums, counts [prompts, measures] -> the 95 % interval of sum / count per measure.

  Percentile bootstrap over prompts (Efron 1979): the pairs of one prompt are not independent, so
  whole prompts are resampled. None for a measure without any count. The random seed is fixed.
  """
  prompts, measures = sums.shape
  if not prompts:
    return [None] * measures
  rng, size = np.random.default_rng(0), max(1, WEIGHTS // prompts)
  numerators, denominators = np.empty((2, DRAWS, measures))
  for start in range(0, DRAWS, size):  # all weights together would be DRAWS x prompts
    rows = slice(start, min(start + size, DRAWS))
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), rows.stop - start)
    numerators[rows], denominators[rows] = weights @ sums, weights @ counts
  found = []
  for numerator, denominator in zip(numerators.T, denominators.T, strict=True):
    defined = denominator > 0
    ratios = numerator[defined] / denominator[defined]
    found.append(np.percentile(ratios, (2.5, 97.5)).tolist() if defined.any() else None)
  return found


def histogram(values: Iterable[float]) -> dict[str, int]:
  """The count of each score, or a Counter of scores, after rounding to whole scores.

  >>> histogram([4.0, 3.7, 2.0]), histogram(Counter({4.0: 1, 3.7: 5}))
  ({'2': 1, '4': 2}, {'4': 6})
  """
  counts = Counter()
  for value, count in Counter(values).items():
    counts[whole(value)] += count
  return {str(score): count for score, count in sorted((+counts).items())}


def whole(value: float) -> int:
  """Rounds a score to a whole number, halves up.

  Scores of the word-category template often end in .5. Rounding halves to even would favour even
  scores.

  >>> whole(2.5), whole(3.5)
  (3, 4)
  """
  return math.floor(value + 0.5)
