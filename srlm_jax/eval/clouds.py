"""Sets of points: principal components, and the energy distance of two sets with an interval."""
import dataclasses

import numpy as np

DRAWS = 999  # permutations, and bootstrap samples


@dataclasses.dataclass(frozen=True)
class Energy:
  """The energy coefficient of two sets, its 95 % interval and the p-value of equal distributions.
  """
  value: float
  low: float
  high: float
  p_value: float


def pca(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
  """points [N, D] -> their coordinates [N, 2] on the first two principal components, and the share
  of the variance that each explains.

  The entry of a component with the largest absolute value is positive, so that signs are fixed.
  N and D are at least 2.
  """
  centered = points - points.mean(0)
  _, scales, components = np.linalg.svd(centered, full_matrices=False)
  axes = components[:2]
  axes = axes * np.sign(axes[range(2), np.abs(axes).argmax(1)])[:, None]
  variances = scales ** 2
  return centered @ axes.T, (variances[:2] / max(variances.sum(), 1e-300)).tolist()


def distances(points: np.ndarray) -> np.ndarray:
  """points [N, D] -> Euclidean distances [N, N]."""
  centered = points - points.mean(0)
  products = centered @ centered.T
  squares = np.diag(products)
  found = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
  np.fill_diagonal(found, 0)
  return found


def compare(apart: np.ndarray, count: int) -> Energy:
  """apart [N, N]: distances of the points of two sets, of which the first has `count` -> `Energy`.

  The p-value is that of a permutation test. The interval is a percentile bootstrap over the points
  of each set. Random draws are fixed. Both sets need several points.
  """
  rng = np.random.default_rng(0)
  total = len(apart)
  label = np.arange(total) < count
  value = float(coefficient(apart, label[None], ~label[None])[0])
  shuffled = rng.permuted(np.tile(label, (DRAWS, 1)), axis=1)
  # Rounding must not hide a draw that is as far apart as the sets.
  reached = (coefficient(apart, shuffled, ~shuffled) >= value - 1e-12).sum()
  weights = [rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in (count, total - count)]
  first = np.pad(weights[0], ((0, 0), (0, total - count)))
  second = np.pad(weights[1], ((0, 0), (count, 0)))
  low, high = np.percentile(coefficient(apart, first, second), (2.5, 97.5))
  return Energy(value, float(low), float(high), float((reached + 1) / (DRAWS + 1)))


def coefficient(apart: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """apart [N, N] distances, a and b [R, N] weights of the points in two sets -> [R], the energy
  coefficient (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / 2 E|X - Y|.

  Szekely and Rizzo 2013, "Energy statistics", with means over pairs of different points. 0 where
  all points of the sets are equal.
  """
  a, b = a.astype(float), b.astype(float)
  between = ((a @ apart) * b).sum(1) / (a.sum(1) * b.sum(1))
  within = [((x @ apart) * x).sum(1) / (x.sum(1) ** 2 - (x ** 2).sum(1)) for x in (a, b)]
  return np.where(between > 0, 1 - sum(within) / (2 * np.where(between > 0, between, 1)), 0)
