import jax
import numpy as np
import pytest
from scipy import stats

from srlm_jax import InputError
from srlm_jax.sample import draw
from srlm_jax.sample.draw import Sampling

TOP_P_AND_K = [(0.05, 0), (0.5, 0), (0.9, 0), (0.999, 0), (1.0, 1), (1.0, 7), (0.6, 7),
               (0.9, 1000), (1.0, 0)]


def reference(logits, temperature, top_p, top_k):
  """logits [V] -> the truncated distribution [V], computed by sorting."""
  probs = np.exp((logits - logits.max()) / temperature)
  order = np.argsort(-probs)
  kept = order[:top_k or None]
  share = np.cumsum(probs[kept]) / probs[kept].sum()
  kept = kept[:(share < top_p).sum() + 1] if top_p < 1 else kept
  out = np.zeros(len(logits))
  out[kept] = probs[kept]
  return out / out.sum()


def keys(count, seed=2):
  return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize('top_p, top_k', TOP_P_AND_K)
def test_draws_reach_the_same_tokens_as_sorting_keeps(top_p, top_k):
  logits = np.random.default_rng(0).normal(size=12).astype(np.float32)
  rows = np.broadcast_to(logits, (3_000, 12))
  run = jax.jit(draw.draw, static_argnums=2)
  drawn = np.bincount(run(rows, keys(len(rows)), Sampling(0.8, top_p, 1, top_k)), minlength=12)
  expected = reference(logits, 0.8, top_p, top_k)
  assert not drawn[expected == 0].any() and drawn[expected > 0.01].all()


@pytest.mark.parametrize('temperature, top_p, top_k, V', [
    (1.0, 1.0, 0, 300), (0.7, 0.9, 0, 300), (1.3, 1.0, 5, 128), (0.5, 0.8, 20, 1000),
    (1.0, 0.3, 0, 300), (0.7, 0.9, 0, 3000)])
def test_draws_match_the_reference_distribution_and_its_support(temperature, top_p, top_k, V):
  """Chi-square test of 20,000 draws."""
  rng = np.random.default_rng(1)
  logits, count = rng.normal(size=V).astype(np.float32), 20_000
  rows = np.broadcast_to(logits, (count, V))
  sampling = Sampling(temperature, top_p, 1, top_k)
  drawn = np.asarray(jax.jit(draw.draw, static_argnums=2)(rows, keys(count), sampling))
  expected = reference(logits, temperature, top_p, top_k)
  counts, support = np.bincount(drawn, minlength=V), expected > 0
  assert counts[~support].sum() == 0
  # The test statistic needs several bins with several expected draws each.
  assert support.sum() >= 5 and min(expected[support]) * count > 3
  assert stats.chisquare(counts[support], expected[support] * count).pvalue > 1e-3


def test_invert_inverts_the_cumulative_distribution():
  """At both ends, at zero-probability tokens between them, and across several blocks."""
  probs = np.zeros(400)
  probs[[3, 127, 128, 300]] = 0.25, 0.25, 0.25, 0.25
  uniform = np.asarray([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-24],
                       np.float32)
  rows = np.broadcast_to(np.log(np.maximum(probs, 1e-38)), (8, 400)).astype(np.float32)
  found = draw.invert(np.exp(rows), uniform)
  assert found.tolist() == [3, 3, 127, 127, 128, 128, 300, 300]


def test_rounding_errors_never_draw_a_token_outside_the_support():
  mass = np.asarray([[0.5, 0.0, 0.5, 0.0]] * 3, np.float32)
  # Rounding raised the second sum, although its token has no mass.
  sums = np.asarray([[0.5, 0.50000006, 1.0, 1.0]] * 3, np.float32)
  threshold = np.asarray([[0.5], [0.50000003], [1.0]], np.float32)  # no sum is above the last
  assert draw._first_above(mass, sums, threshold).tolist() == [2, 2, 2]


def test_greedy_and_very_low_temperatures_return_the_argmax():
  logits = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
  expected = logits.argmax(-1).tolist()
  for temperature in (1e-38, 1e-6):
    drawn = draw.draw(logits, keys(5), Sampling(temperature, 0.9, 1))
    assert drawn.tolist() == expected
  assert draw.draw(logits, keys(5), Sampling(0.0, 0.5, 1, 3)).tolist() == expected


def test_tokens_that_tie_with_the_last_one_of_the_top_p_set_are_in_it():
  rows = np.log(np.broadcast_to(np.asarray([0.4, 0.2, 0.2, 0.1, 0.1], np.float32), (2_000, 5)))
  drawn = np.bincount(draw.draw(rows, keys(2_000), Sampling(1.0, 0.5, 1)), minlength=5)
  assert drawn[1:3].min() > 300 and not drawn[3:].any()


def test_rows_with_their_own_sampling_draw_as_rows_that_share_it():
  """Of every kind beside each other: bit for bit where the compiler divides alike."""
  logits = np.random.default_rng(0).normal(size=(80, 500)).astype(np.float32) * 2
  kinds = [Sampling(0.7, 0.9, 1), Sampling(1.3, 1.0, 1, 7), Sampling(1.0, 1.0, 1)]
  per_row = draw.PerRow.empty(80)
  for i, sampling in enumerate([*kinds, Sampling(0.0, 0.5, 1, 3)]):
    per_row.set(slice(i, None, 4), sampling)
  found = np.asarray(jax.jit(draw.draw_per_row)(logits, keys(80), per_row))
  run = jax.jit(draw.draw, static_argnums=2)
  for i, sampling in enumerate(kinds):
    own = slice(i, None, 4)
    wanted = run(logits[own], keys(80)[own], sampling)
    assert found[own].tolist() == wanted.tolist()
  assert found[3::4].tolist() == logits[3::4].argmax(-1).tolist()


@pytest.mark.parametrize('top_p', [1e-30, 1e-40, 1e-60])
def test_a_tiny_top_p_ends_and_gives_the_most_likely_token(top_p):
  """Also one that is 0 in float32, or that the device flushes to 0."""
  logits = np.random.default_rng(0).normal(size=(64, 5_000)).astype(np.float32)
  per_row = draw.PerRow.empty(64)
  per_row.set(slice(None), Sampling(5.0, top_p, 1))
  for drawn in (jax.jit(draw.draw, static_argnums=2)(logits, keys(64), Sampling(5.0, top_p, 1)),
                jax.jit(draw.draw_per_row)(logits, keys(64), per_row)):
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_nan_ends():
  drawn = draw.draw(np.full((2, 7), np.nan, np.float32), keys(2), Sampling(1.0, 0.5, 1))
  assert drawn.shape == (2,)


def test_a_draw_does_not_depend_on_the_other_rows():
  logits = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)
  run, sampling = jax.jit(draw.draw, static_argnums=2), Sampling(1.0, 0.5, 1)
  whole = np.asarray(run(logits, keys(30), sampling))
  assert [int(run(logits[i:i + 1], keys(30)[i:i + 1], sampling)[0])
          for i in range(30)] == whole.tolist()


@pytest.mark.parametrize('bad', [
    (-0.1, 1.0, 5), (float('nan'), 1.0, 5), (1.0, 0.0, 5), (1.0, 1.1, 5), (1.0, 1.0, 0),
    (1.0, 1.0, 5, -1)])
def test_out_of_range_values_are_rejected_by_name(bad):
  with pytest.raises(InputError, match='(temperature|top_p|max_tokens|top_k) is'):
    Sampling(*bad)
