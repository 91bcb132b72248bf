"""Attention over packed rows, of TPU and GPU, against the one by XLA: values and gradients."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Batches
from srlm_jax.models import attention, kernels, packed
from srlm_jax.models.config import PRESETS


def batch(responses, T=256):
  rng = np.random.default_rng(0)
  def size():
    return [1] * int(rng.integers(5, T // 5))
  examples = [Example(f'e{i}', size(), tuple(size() for _ in range(responses))) for i in range(12 // responses)]
  made = Batches(examples, len(examples), 1, 0, T, multiple=T).at(0)
  rows = [made[name][:2] for name in ('segments', 'shared')[:responses]]
  assert rows[0].shape[1] == T and (rows[0].max(1) > responses).all()
  return rows


def run(f, rows, K=2, G=2, H=128, dtype=jnp.float32):
  """Output and gradients of a weighted sum of what is not padding."""
  rng = np.random.default_rng(1)
  B, T = rows[0].shape
  q, k, v, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in (
      (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)))
  weight *= (rows[0] > 0)[..., None, None, None]
  def total(q, k, v):
    out = f(q, k, v, *rows) * (rows[0] > 0)[..., None, None, None]
    return (out * weight).sum(), out
  (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize('responses', [1, 2])
def test_splash_attention_equals_xla_forward_and_backward(responses):
  rows = batch(responses)
  for a, b in zip(run(functools.partial(packed.tpu_train, interpret=True), rows), run(attention.train, rows),
                  strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('responses', [1, 2])
def test_cudnn_is_told_the_same(responses, monkeypatch):
  plain = jax.nn.dot_product_attention
  def by_xla(*args, implementation, **how):
    assert implementation == 'cudnn'
    return plain(*args, **how, implementation='xla')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  rows = batch(responses, 128)
  for a, b in zip(run(packed.gpu_train, rows, H=16), run(attention.train, rows, H=16), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_a_row_of_a_pair_by_hand():
  segments = np.array([[1, 1, 1, 2, 3, 0]])  # a prompt of two tokens, chosen, rejected; another example; padding
  shared = np.array([[2, 2, 0, 0, 0, 0]])
  seen = np.asarray(attention.visible(segments, shared))[0, :5]
  assert [np.flatnonzero(row).tolist() for row in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4]]
  alone = np.asarray(attention.visible(segments))[0, :5]
  assert [np.flatnonzero(row).tolist() for row in alone] == [[0], [0, 1], [0, 1, 2], [3], [4]]


def test_widths_that_splash_cannot_cut_are_refused():
  with pytest.raises(ValueError, match='multiples of 128; the rows are 96'):
    run(packed.tpu_train, [np.ones((1, 96), np.int32)])


def test_each_platform_trains_with_its_own():
  big = PRESETS['llama2-70b']
  half = dataclasses.replace(big, dtype='bfloat16')
  for platform, train in (('tpu', packed.tpu_train), ('cuda', packed.gpu_train), ('cpu', attention.train)):
    for remat in (False, True):
      choice = kernels.to_train(platform, half, remat)
      assert choice.train is train and choice.unrolled == (platform == 'cpu' and not remat)
