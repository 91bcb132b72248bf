"""Aggregates judgements into scores: the mean and spread of those that parsed, and statistics."""
from collections import Counter
from collections.abc import Iterable
import dataclasses
import itertools
import math
import statistics

import numpy as np

from srlm_jax import schema

DRAWS = 4000  # bootstrap resamples


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one response."""
  mean: float | None    # None if fewer judgements parsed than the quorum
  # Population standard deviation of the parsed judgements. None if `mean` is None.
  spread: float | None
  judgements: list[schema.Judgement]


def by_response(judgements: Iterable[schema.Judgement], quorum: int) -> dict[str, Score]:
  """Judgement records -> {response id: Score}.

  A judgement that failed to parse is missing data. It does not count as a score of 0.
  """
  grouped = {}
  for judgement in judgements:
    grouped.setdefault(judgement.response_id, []).append(judgement)
  scores = {}
  for response_id, group in grouped.items():
    parsed = [j.score for j in group if j.score is not None]
    if parsed and len(parsed) >= quorum:
      scores[response_id] = Score(statistics.fmean(parsed), statistics.pstdev(parsed), group)
    else:
      scores[response_id] = Score(None, None, group)
  return scores


def orders(replies: list[tuple[float, float]]) -> list[float]:
  """(rank, score) per reply, rank 0 is best -> one number per pair of replies with different ranks.

  The number is positive for a concordant pair (the better rank has the higher score), negative for
  a discordant pair, and 0 if the scores tie.

  >>> orders([(0, 5.0), (1, 3.0), (1, 4.0), (2, 3.0)])
  [2.0, 1.0, 4.0, 0.0, 1.0]
  """
  return [(b[0] - a[0]) * (a[1] - b[1])
          for a, b in itertools.combinations(replies, 2) if a[0] != b[0]]


def standard_error(values: list[float]) -> float:
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
  rng = np.random.default_rng(0)
  weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS)  # [DRAWS, prompts]
  numerators, denominators = weights @ sums, weights @ counts               # [DRAWS, measures]
  found = []
  for numerator, denominator in zip(numerators.T, denominators.T, strict=True):
    defined = denominator > 0
    ratios = numerator[defined] / denominator[defined]
    found.append(np.percentile(ratios, (2.5, 97.5)).tolist() if defined.any() else None)
  return found


def histogram(values: Iterable[float]) -> dict[str, int]:
  """The count of each score, after rounding to whole scores.

  >>> histogram([4.0, 3.7, 2.0])
  {'2': 1, '4': 2}
  """
  return {str(k): n for k, n in sorted(Counter(map(whole, values)).items())}


def whole(value: float) -> int:
  """Rounds a score to a whole number, halves up.

  Scores of the word-category template often end in .5. Rounding halves to even would favour even
  scores.

  >>> whole(2.5), whole(3.5)
  (3, 4)
  """
  return math.floor(value + 0.5)
