"""Judgements to scores: the mean of those that parsed, where there are enough, and how far apart they are."""
from collections import Counter
from collections.abc import Iterable
import dataclasses
import itertools
import math
import statistics

import numpy as np

DRAWS = 4000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Score:
  mean: float | None    # None: fewer parsed judgements than the quorum
  spread: float | None  # standard deviation of the parsed judgements; None where there is no mean
  judgements: list[dict]


def by_response(judgements: Iterable[dict], quorum: int) -> dict[str, Score]:
  """Judgement records -> {response id: Score}; a failed parse is missing, never a number."""
  grouped = {}
  for judgement in judgements:
    grouped.setdefault(judgement['response_id'], []).append(judgement)
  scores = {}
  for name, group in grouped.items():
    parsed = [j['score'] for j in group if j['score'] is not None]
    enough = parsed and len(parsed) >= quorum
    scores[name] = Score(statistics.fmean(parsed) if enough else None, statistics.pstdev(parsed) if enough else None,
                         group)
  return scores


def orders(replies: list[tuple[float, float]]) -> list[float]:
  """(rank, score) of each reply, rank 0 the best -> a number for every two replies of different rank: above 0 where
  their scores have the order of the ranks, below 0 where they have the opposite one, 0 where the scores tie.

  >>> orders([(0, 5.0), (1, 3.0), (1, 4.0), (2, 3.0)])
  [2.0, 1.0, 4.0, 0.0, 1.0]
  """
  return [(b[0] - a[0]) * (a[1] - b[1]) for a, b in itertools.combinations(replies, 2) if a[0] != b[0]]


def standard_error(values: list[float]) -> float:
  """Of the mean; 0 of a single value."""
  return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def intervals(sums: np.ndarray, counts: np.ndarray) -> list[list[float] | None]:
  """Two arrays [prompts, measures] -> of each measure the 95 % interval of sum / count over all prompts.

  The percentiles of that ratio when prompts are drawn with replacement (the bootstrap of Efron 1979), because what
  belongs to one prompt is not independent. None where a measure has no count. The draws are the same in every run.
  """
  prompts, measures = sums.shape
  if not prompts:
    return [None] * measures
  drawn = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS)
  above, below = drawn @ sums, drawn @ counts
  return [np.percentile(above[:, i][holds] / below[:, i][holds], (2.5, 97.5)).tolist()
          if (holds := below[:, i] > 0).any() else None for i in range(measures)]


def histogram(values: Iterable[float]) -> dict[str, int]:
  """How often each value occurs, rounded to a whole score.

  >>> histogram([4.0, 3.7, 2.0])
  {'2': 1, '4': 2}
  """
  return {str(k): n for k, n in sorted(Counter(map(whole, values)).items())}


def whole(value: float) -> int:
  """Rounded to a whole score, halves up: of word scores, which often end in .5, every whole one gets its share.

  >>> whole(2.5), whole(3.5)
  (3, 4)
  """
  return math.floor(value + 0.5)
