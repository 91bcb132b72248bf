"""Attention over packed rows on TPU and GPU, compared with plain XLA: values and gradients."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import config as configs
from srlm_jax.data import packing
from srlm_jax.data.examples import Example
from srlm_jax.models import attention, kernels, packed
from srlm_jax.models.attention import PairSegments, Segments
from srlm_jax.models.config import PRESETS


def draw(responses, T=256):
  """Segments of two packed rows [2, T]."""
  rng = np.random.default_rng(0)
  def tokens():
    return [1] * int(rng.integers(5, T // 5))
  def row():
    examples = [Example('', tokens(), tuple(tokens() for _ in range(responses)))
                for _ in range(8)]
    fitting = np.cumsum([len(e) for e in examples]) <= T
    made = packing.layout([e for e, fits in zip(examples, fitting, strict=True) if fits])
    return [np.pad(x, (0, T - len(x)))
            for x in (made.segment_ids, made.positions, made.second_segment)]
  segment_ids, positions, second = map(np.stack, zip(row(), row(), strict=True))
  assert (segment_ids.max(1) > responses).all() and (segment_ids == 0).any()
  if responses == 1:
    return Segments(segment_ids, positions)
  return PairSegments(segment_ids, positions, second)


def run(f, segments, K=2, G=2, H=128, dtype=jnp.float32, window=None):
  """The output without padding, and the gradients of a weighted sum of it."""
  rng = np.random.default_rng(1)
  B, T = segments.segment_ids.shape
  q, k, v, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in (
      (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)))
  real = (segments.segment_ids > 0)[..., None, None, None]
  def total(q, k, v):
    out = f(q, k, v, segments, window=window) * real
    return (out * weight).sum(), out
  (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize('responses', [1, 2])
def test_splash_attention_equals_xla_forward_and_backward(responses):
  segments = draw(responses)
  found = run(functools.partial(packed.tpu_packed, interpret=True), segments)
  for a, b in zip(found, run(attention.packed, segments), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('responses', [1, 2])
def test_the_arguments_of_cudnn_mean_the_same_to_xla(responses, monkeypatch):
  plain = jax.nn.dot_product_attention
  def by_xla(*args, implementation, **how):
    assert implementation == 'cudnn'
    return plain(*args, **how, implementation='xla')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  segments = draw(responses, 128)
  found = run(packed.gpu_packed, segments, H=16)
  for a, b in zip(found, run(attention.packed, segments, H=16), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_the_mask_of_a_pair_by_hand():
  # a prompt of two tokens, chosen, rejected; another example; padding
  ids = jnp.asarray([[1, 1, 1, 2, 3, 0]])
  positions = jnp.asarray([[0, 1, 2, 2, 0, 0]])
  second = jnp.asarray([[2, 2, 0, 0, 0, 0]])
  mask = np.asarray(PairSegments(ids, positions, second).mask(None))[0, :5]
  assert [np.flatnonzero(row).tolist() for row in mask] == [
      [0], [0, 1], [0, 1, 2], [0, 1, 3], [4]]
  mask = np.asarray(Segments(ids, positions).mask(None))[0, :5]
  assert [np.flatnonzero(row).tolist() for row in mask] == [[0], [0, 1], [0, 1, 2], [3], [4]]


def test_widths_that_splash_attention_does_not_support_are_refused():
  with pytest.raises(ValueError, match='multiple of 128; the rows have 96'):
    run(packed.tpu_packed, Segments(*np.ones((2, 1, 96), np.int32)))


def test_the_training_kernels_of_each_platform():
  big = PRESETS['llama2-70b']
  half = dataclasses.replace(big, dtype='bfloat16')
  for platform, function in (('tpu', packed.tpu_packed), ('cuda', packed.gpu_packed),
                             ('cpu', attention.packed)):
    for remat in configs.REMAT:
      choice = kernels.for_training(platform, half, remat)
      assert choice.packed is function
      assert choice.unrolled == (platform == 'cpu' and remat == 'none')
