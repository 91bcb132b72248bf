import dataclasses

from conftest import forward, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import attention, cache as caches, llama
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']
LENGTHS, PREFIX = [4, 9, 12, 7, 7, 1, 3, 12], 5  # of the prompts, the last token held back; tokens that some share


def prefilled(model, params, tokens, slots, size=64):
  """A cache whose slot slots[i] holds tokens[i], and the keys of the first `PREFIX` tokens of row 0 as the prefix."""
  rows, unrolled = len(tokens), model.kernels.unrolled
  run = jax.jit(lambda cache, prefix, tokens, view: model.apply(
      {'params': params}, tokens, view.shared[:, None] + jnp.arange(tokens.shape[1]), cache, prefix, view)[1])
  none, zeros = caches.as_prefix(caches.empty(model.config, rows, 0, unrolled)), jnp.zeros(rows, jnp.int32)
  first = jnp.broadcast_to(tokens[:1, :PREFIX], (rows, PREFIX))
  prefix = caches.as_prefix(run(caches.empty(model.config, rows, 8, unrolled), none, first, caches.Prefill(
      zeros, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.int32(1))))
  shared = jnp.asarray([PREFIX if (row[:PREFIX] == tokens[0, :PREFIX]).all() else 0 for row in np.asarray(tokens)])
  own = jnp.asarray([np.roll(row, -n) for row, n in zip(np.asarray(tokens), np.asarray(shared), strict=True)])
  cache = run(caches.empty(model.config, rows, size, unrolled), prefix, own, caches.Prefill(
      shared, jnp.arange(rows), jnp.asarray(slots), jnp.int32(rows)))
  return cache, prefix, shared


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('unrolled', [False, True])
@pytest.mark.parametrize('config', [TINY, dataclasses.replace(TINY, tied=True, attention_bias=True)])
def test_cached_decoding_equals_the_full_forward_pass_for_ragged_rows(shape, unrolled, config):
  """Rows of a shared prefix and rows of their own, in slots of another order."""
  if config is not TINY and shape != (1, 1, 1):
    return
  rows, mesh = len(LENGTHS), make_mesh(*shape)
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, config.V, (rows, 24), np.int32)
  tokens[1:4, :PREFIX] = tokens[0, :PREFIX]
  tokens[0:4, PREFIX] = [1, 2, 3, 4]
  lengths, slots = np.maximum(LENGTHS, [PREFIX] * 4 + [0] * 4), rng.permutation(rows)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = jax.tree.map(np.asarray, init(config))
    full = np.asarray(forward(llama.Llama(config), params, tokens)[0])
  with jax.set_mesh(mesh):
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    kernels = attention.CPU if unrolled else attention.XLA
    model = llama.Llama(config, kernels=kernels)
    params = llama.unroll(params) if unrolled else params
    cache, prefix, shared = prefilled(model, params, jnp.asarray(tokens[:, :12]), slots)
    step = jax.jit(lambda cache, token, view: model.apply(
        {'params': params}, token[:, None], (view.shared + view.length)[:, None], cache, prefix, view))
    back = np.argsort(slots)  # the row in each slot
    for t in range(6):
      at, live = lengths[back] + t, np.arange(rows) != 2
      view = caches.Decode(jnp.asarray(shared)[back], jnp.asarray(at) - jnp.asarray(shared)[back], jnp.asarray(live))
      logits, cache = step(cache, jnp.asarray(tokens[back, at]), view)
      np.testing.assert_allclose(np.asarray(logits)[live, 0], full[back, at][live], atol=1e-5)


def test_only_the_named_slots_and_only_live_rows_are_written(mesh):
  params, model = init(TINY), llama.Llama(TINY)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, TINY.V, (2, 8)), jnp.int32)
  before = jax.tree.map(lambda x: x + 7, caches.empty(TINY, 6, 64, False))
  none = caches.as_prefix(caches.empty(TINY, 1, 0, False))
  zeros = jnp.zeros(2, jnp.int32)
  view = caches.Prefill(zeros, jnp.asarray([1, 0, 1, 0]), jnp.asarray([5, 0, 3, 2]), jnp.int32(3))  # the last is none
  apply = jax.jit(lambda *given: model.apply({'params': params}, *given)[1])
  cache = apply(tokens, None, before, none, view)
  for slot, row in ((0, 0), (5, 1), (3, 1)):
    assert (cache.k[:, slot, :, 8:] == 7).all() and not (cache.k[:, slot, :, :8] == 7).any()
    np.testing.assert_array_equal(cache.k[:, slot], cache.k[:, 5 if row else 0])
  assert (cache.k[:, jnp.asarray([1, 2, 4])] == 7).all() and (cache.v[:, jnp.asarray([1, 2, 4])] == 7).all()
  decode = caches.Decode(jnp.zeros(6, jnp.int32), jnp.full(6, 8), jnp.arange(6) == 3)
  after = apply(jnp.ones((6, 1), jnp.int32), jnp.full((6, 1), 8), cache, none, decode)
  changed = np.argwhere(np.asarray(after.k != cache.k).any((0, 2, 4)))
  np.testing.assert_array_equal(changed, [[3, 8]])


def test_a_sampler_s_cache_may_be_bfloat16(mesh):
  """On a CPU too, with one query head a key head."""
  config = dataclasses.replace(TINY, dtype='bfloat16', K=4, G=1)
  params = init(config)
  tokens = np.random.default_rng(0).integers(1, config.V, (8, 24), np.int32)
  full = forward(llama.Llama(config), params, tokens)[0]
  model, params = llama.Llama(config, kernels=attention.CPU), llama.unroll(params)
  cache, prefix, shared = prefilled(model, params, jnp.asarray(tokens[:, :12]), range(8))
  view = caches.Decode(shared, 12 - shared, jnp.ones(8, bool))
  logits, _ = jax.jit(lambda: model.apply(
      {'params': params}, tokens[:, 12:13], jnp.full((8, 1), 12), cache, prefix, view))()
  np.testing.assert_allclose(logits[:, 0], full[:, 12], atol=0.05)
