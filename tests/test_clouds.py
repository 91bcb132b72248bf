import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance

from srlm_jax.eval import clouds


def test_principal_components_are_the_eigenvectors_of_the_covariance():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(40, 7)) @ rng.normal(size=(7, 7)) + 5
  coordinates, explained = clouds.pca(points)
  values, vectors = np.linalg.eigh(np.cov(points.T))
  axes = vectors[:, [-1, -2]]
  axes = axes * [np.sign(column[np.abs(column).argmax()]) for column in axes.T]
  np.testing.assert_allclose(coordinates, (points - points.mean(0)) @ axes, atol=1e-9)
  np.testing.assert_allclose(explained, values[[-1, -2]] / values.sum(), rtol=1e-9)
  # The sign is that of the axis, so mirrored points have mirrored coordinates.
  np.testing.assert_allclose(clouds.pca(-points)[0], -coordinates, atol=1e-9)


def test_the_variance_of_equal_points_is_zero():
  coordinates, explained = clouds.pca(np.ones((4, 3)))
  assert explained == [0, 0] and not coordinates.any()
  assert clouds.compare(clouds.distances(np.ones((40, 3))), 20) == clouds.Energy(0, 0, 0, 1)


def test_distances_are_euclidean():
  points = np.random.default_rng(0).normal(size=(30, 5)) + 100
  np.testing.assert_allclose(clouds.distances(points), distance.cdist(points, points), atol=1e-9)


def test_the_energy_coefficient_by_hand():
  """{0, 1} and {3, 5}: between 3.5, within 1 and 2."""
  apart = clouds.distances(np.array([[0.], [1.], [3.], [5.]]))
  first = np.array([[1, 1, 0, 0]])
  assert clouds.coefficient(apart, first, 1 - first)[0] == pytest.approx((7 - 3) / 7)


def test_the_energy_distance_is_that_of_scipy():
  """scipy's has the root, and its means within a set include pairs of a point with itself."""
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=25), rng.normal(size=40) + 0.7
  apart = clouds.distances(np.concatenate([a, b])[:, None])
  first = np.arange(65)[None] < 25
  found = clouds.coefficient(apart, first, ~first)[0]
  between = apart[:25, 25:].mean()
  with_self = sum(part.mean() for part in (apart[:25, :25], apart[25:, 25:]))
  without = sum(part.sum() / (n * (n - 1)) for n, part in (
      (25, apart[:25, :25]), (40, apart[25:, 25:])))
  wanted = stats.energy_distance(a, b) ** 2 + with_self - without
  assert found * 2 * between == pytest.approx(wanted)


def compare(a, b) -> clouds.Energy:
  return clouds.compare(clouds.distances(np.concatenate([a, b])), len(a))


def test_two_different_sets_are_told_apart():
  rng = np.random.default_rng(0)
  found = compare(rng.normal(size=(30, 6)), rng.normal(size=(20, 6)) + 2)
  assert found.p_value == 0.001 and 0.2 < found.low < found.value < found.high < 1
  # Another spread around the same center is found too.
  assert compare(rng.normal(size=(40, 6)), 3 * rng.normal(size=(40, 6))).p_value == 0.001


def test_p_values_of_equal_distributions_are_uniform():
  rng = np.random.default_rng(0)
  found = [compare(rng.normal(size=(20, 4)), rng.normal(size=(15, 4))) for _ in range(40)]
  assert stats.kstest([x.p_value for x in found], 'uniform').pvalue > 0.05
  assert sum(x.low <= 0 <= x.high for x in found) >= 38
  assert abs(np.mean([x.value for x in found])) < 0.01  # unbiased


@pytest.mark.slow  # 30 s
@pytest.mark.parametrize('shift', [0, 0.5, 3])
def test_intervals_cover_the_distance_of_the_populations(shift):
  """At least as often as they say; near 0, where the bootstrap is too wide, nearly always."""
  rng = np.random.default_rng(0)

  def draw(n, m):
    return rng.normal(size=(n, 16)), rng.normal(size=(m, 16)) + shift / 4
  first = np.arange(4000)[None] < 2000
  wanted = clouds.coefficient(clouds.distances(np.concatenate(draw(2000, 2000))), first, ~first)[0]
  found = [compare(*draw(60, 50)) for _ in range(100)]
  assert sum(x.low <= wanted <= x.high for x in found) >= (99 if not shift else 92)
