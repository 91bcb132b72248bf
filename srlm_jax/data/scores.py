"""Judgements to scores: the mean of those that parsed, where there are enough."""
from collections import Counter
from collections.abc import Iterable
import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
  mean: float | None  # None: fewer parsed judgements than the quorum
  judgements: list[dict]


def by_response(judgements: Iterable[dict], quorum: int) -> dict[str, Score]:
  """Judgement records -> {response id: Score}; a failed parse is missing, never a number."""
  grouped = {}
  for judgement in judgements:
    grouped.setdefault(judgement['response_id'], []).append(judgement)
  scores = {}
  for name, group in grouped.items():
    parsed = [j['score'] for j in group if j['score'] is not None]
    scores[name] = Score(sum(parsed) / len(parsed) if parsed and len(parsed) >= quorum else None, group)
  return scores


def histogram(values: Iterable[float]) -> dict[str, int]:
  """How often each value occurs, rounded to a whole score.

  >>> histogram([4.0, 3.7, 2.0])
  {'2': 1, '4': 2}
  """
  return {str(k): n for k, n in sorted(Counter(round(v) for v in values).items())}
