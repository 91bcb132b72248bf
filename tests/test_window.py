"""Sliding windows in every attention kernel, compared with dense attention in numpy."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import attend, decode_inputs, prefill_inputs

from srlm_jax.models import attention, cpu, kernels, packed
from srlm_jax.models.attention import Cache, Prefix
from srlm_jax.models.config import PRESETS

CONFIG = dataclasses.replace(PRESETS['tiny-test'], H=128)


def cpp_decode(q, cache, layer, length, prefix, *, window):
  """`cpu.decode` takes one layer."""
  if not cpu.supports(CONFIG):
    pytest.skip('there is no C++ compiler')
  one = [x[1:2] for x in (cache.k, cache.v, prefix.k, prefix.v)]
  return cpu.decode(q, Cache(*one[:2]), layer, length, Prefix(*one[2:], prefix.length),
                    window=window)


DECODE = {  # name: function, keys of a block, rows that are read together
    'tpu': (functools.partial(kernels.tpu_decode, interpret=True), 128, 1),
    'gpu': (functools.partial(kernels.gpu_decode, interpret=True), 64, 1),
    'xla': (attention.XLA.decode, 64, 8),
    'xla for a cpu': (attention.CPU.decode, 64, 2),
    'c++': (cpp_decode, 1, 1)}
# In turn: less than a block; several blocks, from the prefix of some rows and from after that of
# others; the token itself; about two blocks; the longest row but one token; more than any row.
WINDOWS = [20, 400, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 200, 639, 1000))]
K, G, H, S, W = SHAPE = 4, 2, 128, 384, 256
LENGTH = np.array([1, 128, S, S - 100, S // 2, 0, 129, 7])  # block boundaries; an idle row
PREFIX_LENGTH = np.array([0, W, W // 3, 0, W, W // 2, 1, W])
BUSY = LENGTH > 0


def visible(position, prefix_length, W, S, window):
  """position [B, T] of queries, prefix_length [B] -> [B, T, W + S], by the definition."""
  mask = np.zeros((*position.shape, W + S), bool)
  for b, t in np.ndindex(position.shape):
    p, n = position[b, t], prefix_length[b]
    for key in range(max(p - window + 1, 0), p + 1):
      mask[b, t, key if key < n else W + key - n] = True
  return mask


def wanted_decode(q, cache, layer, prefix, window):
  mask = visible((PREFIX_LENGTH + LENGTH - 1)[:, None], PREFIX_LENGTH, W, S, window)
  return attend(q[:, None], cache.k[layer], cache.v[layer], layer, prefix, mask)[BUSY, 0]




@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('name', DECODE)
def test_decode_sees_the_window_and_reads_nothing_before_it(name, window):
  """The blocks before a row's window are NaN, which a product with weight 0 would keep."""
  q, cache, prefix = decode_inputs(*SHAPE, PREFIX_LENGTH)
  wanted = wanted_decode(q, cache, 1, prefix, window)
  decode, block, rows = DECODE[name]
  first = np.where(BUSY, np.maximum(LENGTH - window, 0), S)  # of the row's own keys
  first = first.reshape(-1, rows).min(1).repeat(rows)
  unread = np.arange(S) < (first // block * block)[:, None]
  cache = Cache(*(jnp.where(unread[:, None, :, None], jnp.nan, x) for x in (cache.k, cache.v)))
  if name != 'gpu':  # which reads the whole prefix, once for all rows
    first = np.maximum(PREFIX_LENGTH + LENGTH - window, 0)
    first = np.where(BUSY & (first < PREFIX_LENGTH), first, W).min()
    unread = np.arange(W)[:, None] < first // block * block
    prefix = Prefix(*(jnp.where(unread, jnp.nan, x) for x in (prefix.k, prefix.v)), prefix.length)
  out = jax.jit(functools.partial(decode, window=window))(
      q, cache, jnp.int32(1), jnp.asarray(LENGTH), prefix)
  np.testing.assert_allclose(np.asarray(out)[BUSY], wanted, atol=1e-5)
