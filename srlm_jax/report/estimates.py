"""Means with their 95 % intervals.

Values of one prompt are not independent, so prompts are what is counted: the standard error of a
mean is that over prompts, and the interval is Student's t interval with prompts - 1 degrees of
freedom. For one value per prompt this is the usual standard error. Means over seeds have the same
interval, with seeds in the place of prompts. Shares have Wilson's interval.
"""
import array
from collections.abc import Iterable, Sequence
import dataclasses
import math

import numpy as np
from scipy import special

NORMAL = float(special.ndtri(0.975))  # half a normal 95 % interval, in standard errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
  """A number, its 95 % interval and what it was measured on. None: not known, or undefined."""
  value: float
  low: float | None = None
  high: float | None = None
  count: int | None = None
  of: str = 'prompts'  # what `count` counts: prompts, pairs, replies, judgements, questions, ..

  @property
  def sign(self) -> int:
    """1 if the interval is above 0, -1 if it is below, 0 if it includes 0 or is not known."""
    if self.low is None or self.high is None:
      return 0
    return int(self.low > 0) - int(self.high < 0)

  @property
  def counted(self) -> str:
    """What it was measured on.

    >>> Value(value=0.5, count=1).counted, Value(value=0.5, count=4000).counted
    ('1 prompt', '4,000 prompts')
    """
    return f'{self.count:,} {self.of if self.count != 1 else self.of.removesuffix("s")}'


def mean(groups: Iterable[Iterable[float]], of: str = 'prompts') -> Value | None:
  """The values of each prompt -> their mean over all values; None without any value.

  >>> mean([[1.0], [2.0], [4.0]]).value
  2.3333333333333335
  """
  sums, counts = array.array('d'), array.array('q')
  for group in groups:
    values = list(group)
    sums.append(math.fsum(values))
    counts.append(len(values))
  return mean_of(sums, counts, of)


def mean_of(sums: Sequence[float], counts: Sequence[int], of: str = 'prompts') -> Value | None:
  """The sum and the number of the values of each prompt -> the `mean` over all values.

  The standard error is sqrt(P / (P - 1) * sum_p (sum of residuals of prompt p)^2) / N for N values
  of P prompts (the cluster-robust variance of Liang and Zeger 1986 with its usual correction).
  """
  sums, counts = (np.asarray(x, float) for x in (sums, counts))
  sums, counts = sums[counts > 0], counts[counts > 0]
  if not len(counts):
    return None
  number, count = float(counts.sum()), len(counts)
  value = math.fsum(sums) / number
  if count < 2:
    return Value(value=value, count=count, of=of)
  squares = math.fsum((sums - counts * value) ** 2)
  error = math.sqrt(count / (count - 1) * squares) / number
  return around(value, error, count, of)


def share_of(sums: Sequence[float], counts: Sequence[int], of: str = 'prompts') -> Value | None:
  """The numbers of yes and of all values of each prompt -> the share of yes.

  It has Wilson's interval, that of as many independent values as give the standard error of
  `mean`, which keeps it between 0 and 1; where all values are equal, of as many as there are
  prompts.

  >>> share_of([1, 1, 0, 1], [1, 1, 1, 1]).value
  0.75
  """
  found = mean_of(sums, counts, of)
  if found is None or found.low is None:
    return found
  p, error = found.value, (found.high - found.value) / _t(found.count)
  values = p * (1 - p) / error ** 2 if error > 0 else found.count
  return dataclasses.replace(found, **wilson(p, values))


def wilson(p: float, count: float) -> dict[str, float]:
  """The ends of Wilson's 95 % interval of a share p of `count` independent values."""
  z = NORMAL
  middle = (p + z * z / (2 * count)) / (1 + z * z / count)
  width = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
  return dict(low=max(0.0, middle - width), high=min(1.0, middle + width))


def around(value: float, error: float, count: int, of: str = 'prompts') -> Value:
  """A mean of `count` independent values with its standard error -> with Student's interval."""
  if count < 2:
    return Value(value=value, count=count, of=of)
  width = _t(count) * error
  return Value(value=value, low=value - width, high=value + width, count=count, of=of)


def apart(a: Value, b: Value) -> Value:
  """a - b for values of independent samples, with an interval if both have one.

  The variances add up: the half widths of the intervals add as squares. If both were measured on
  the same prompts, the true interval is narrower.
  """
  value, low, high = a.value - b.value, None, None
  if None not in (a.low, a.high, b.low, b.high):
    width = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    low, high = value - width, value + width
  counts = [x.count for x in (a, b) if x.count is not None]
  return Value(value=value, low=low, high=high, count=min(counts, default=None), of=a.of)


def _t(count: int) -> float:
  """Half of Student's 95 % interval for `count` values, in standard errors."""
  return float(special.stdtrit(count - 1, 0.975))
