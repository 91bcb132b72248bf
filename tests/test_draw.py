import jax
import numpy as np
import pytest
from scipy import stats

from srlm_jax import InputError
from srlm_jax.sample import draw
from srlm_jax.sample.draw import Sampling

CUTS = [(0.05, 0), (0.5, 0), (0.9, 0), (0.999, 0), (1.0, 1), (1.0, 7), (0.6, 7), (0.9, 1000), (1.0, 0)]


def reference(logits, temperature, top_p, top_k):
  """The distribution of one row, plainly: sorted, cut, made to sum to 1."""
  probs = np.exp((logits - logits.max()) / temperature)
  order = np.argsort(-probs)
  kept = order[:top_k or None]
  share = np.cumsum(probs[kept]) / probs[kept].sum()
  kept = kept[:(share < top_p).sum() + 1] if top_p < 1 else kept
  out = np.zeros(len(logits))
  out[kept] = probs[kept]
  return out / out.sum()


@pytest.mark.parametrize('top_p,top_k', CUTS)
def test_the_cuts_keep_the_same_tokens_as_sorting_does(top_p, top_k):
  logits = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32) * 3
  kept = np.asarray(jax.jit(draw.truncate, static_argnums=(1, 2))(jax.nn.softmax(logits / 0.8, -1), top_k, top_p))
  for row, found in zip(logits, kept, strict=True):
    wanted = reference(row, 0.8, top_p, top_k)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found / found.sum(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('temperature,top_p,top_k,V', [
    (1.0, 1.0, 0, 300), (0.7, 0.9, 0, 300), (1.3, 1.0, 5, 128), (0.5, 0.8, 20, 1000)])
def test_draws_follow_the_reference_in_distribution_and_in_support(temperature, top_p, top_k, V):
  """Chi-square of 20,000 draws, seeded."""
  rng = np.random.default_rng(1)
  logits, count = rng.normal(size=V).astype(np.float32), 20_000
  uniform = jax.random.uniform(jax.random.key(2), (count,))
  rows = np.broadcast_to(logits, (count, V))
  drawn = np.asarray(jax.jit(draw.draw, static_argnums=2)(rows, uniform, Sampling(temperature, top_p, 1, top_k)))
  wanted = reference(logits, temperature, top_p, top_k)
  counts = np.bincount(drawn, minlength=V)
  assert counts[wanted == 0].sum() == 0
  assert (wanted > 0).sum() >= 5 and min(wanted[wanted > 0]) * count > 3
  assert stats.chisquare(counts[wanted > 0], wanted[wanted > 0] * count).pvalue > 1e-3


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
  """The ends, and places without mass between them, over several blocks."""
  probs = np.zeros(400)
  probs[[3, 127, 128, 300]] = 0.25, 0.25, 0.25, 0.25
  uniform = np.asarray([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-24], np.float32)
  rows = np.broadcast_to(np.log(np.maximum(probs, 1e-38)), (8, 400)).astype(np.float32)
  found = draw.draw(rows, uniform, Sampling(1.0, 0.999, 1))
  assert found.tolist() == [3, 3, 127, 127, 128, 128, 300, 300]


def test_however_sums_are_rounded_no_token_outside_the_support_is_drawn():
  mass = np.asarray([[0.5, 0.0, 0.5, 0.0]] * 3, np.float32)
  sums = np.asarray([[0.5, 0.50000006, 1.0, 1.0]] * 3, np.float32)  # a sum that rounding raised where there is no mass
  wanted = np.asarray([[0.5], [0.50000003], [1.0]], np.float32)  # and one that none passes
  assert draw._passing(mass, sums, wanted).tolist() == [2, 2, 2]


def test_greedy_is_the_argmax_and_so_is_the_lowest_temperature():
  logits = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
  for temperature in (1e-38, 1e-6):
    assert draw.draw(logits, np.full(5, 0.7), Sampling(temperature, 0.9, 1)).tolist() == logits.argmax(-1).tolist()
  assert draw.draw(logits, np.zeros(5), Sampling(0.0, 0.5, 1, 3)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize('bad', [(-0.1, 1.0, 5), (float('nan'), 1.0, 5), (1.0, 0.0, 5), (1.0, 1.1, 5), (1.0, 1.0, 0),
                                 (1.0, 1.0, 5, -1)])
def test_a_number_out_of_range_is_refused_by_name(bad):
  with pytest.raises(InputError, match='(temperature|top_p|max_tokens|top_k) is'):
    Sampling(*bad)
