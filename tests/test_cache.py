import dataclasses

from conftest import full_logits, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import attention, cache as caches, llama
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']
LENGTHS = [4, 9, 12, 7, 7, 1, 3, 12]  # tokens of the prompts, without the last one
PREFIX = 5  # tokens that some prompts share


def apply(model, params, tokens, positions, cache, prefix, view):
  """-> logits and the cache."""
  hidden, cache = model.apply({'params': params}, tokens, positions, cache, prefix, view,
                              method='hidden_and_cache')
  return model.apply({'params': params}, hidden, method='logits'), cache


def prefilled(model, params, tokens, slots, size=64):
  """-> a cache with tokens[i] in slot slots[i], the prefix, and the prefix length of each row.

  The prefix holds the first PREFIX tokens of row 0.
  """
  rows, unrolled = len(tokens), model.kernels.unrolled
  @jax.jit
  def run(cache, prefix, tokens, view):
    positions = view.prefix_length[:, None] + jnp.arange(tokens.shape[1])
    return apply(model, params, tokens, positions, cache, prefix, view)[1]
  none = caches.as_prefix(caches.empty(model.config, rows, 0, unrolled))
  first = jnp.broadcast_to(tokens[:1, :PREFIX], (rows, PREFIX))
  one = jnp.zeros(1, jnp.int32)
  prefix = caches.as_prefix(run(
      caches.empty(model.config, rows, 8, unrolled), none, first,
      caches.Prefill(jnp.zeros(rows, jnp.int32), source=one, target=one, copies=jnp.int32(1))))
  tokens = np.asarray(tokens)
  length = np.where((tokens[:, :PREFIX] == tokens[0, :PREFIX]).all(1), PREFIX, 0)
  own = jnp.asarray([np.roll(row, -n) for row, n in zip(tokens, length, strict=True)])
  length = jnp.asarray(length)
  cache = run(caches.empty(model.config, rows, size, unrolled), prefix, own,
              caches.Prefill(length, source=jnp.arange(rows), target=jnp.asarray(slots),
                             copies=jnp.int32(rows)))
  return cache, prefix, length


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('unrolled', [False, True])
@pytest.mark.parametrize('config', [
    TINY, dataclasses.replace(TINY, tied=True, biases='qkvo', qk_norm='all', norms='post',
                              window=4)])
def test_cached_decoding_equals_the_full_forward_pass_for_ragged_rows(shape, unrolled, config):
  """Rows with and without the shared prefix, in permuted slots; the prefix exceeds a window."""
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
    full = np.asarray(full_logits(llama.Llama(config), params, tokens))
  with jax.set_mesh(mesh):
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    kernels = attention.CPU if unrolled else attention.XLA
    model = llama.Llama(config, kernels=kernels)
    params = llama.unroll(params) if unrolled else params
    cache, prefix, prefix_length = prefilled(model, params, jnp.asarray(tokens[:, :12]), slots)
    @jax.jit
    def step(cache, token, view):
      positions = (view.prefix_length + view.length)[:, None]
      return apply(model, params, token[:, None], positions, cache, prefix, view)
    row = np.argsort(slots)  # of each slot
    prefix_length = prefix_length[row]
    for t in range(6):
      position, live = lengths[row] + t, np.arange(rows) != 2
      view = caches.Decode(prefix_length, jnp.asarray(position) - prefix_length, jnp.asarray(live))
      logits, cache = step(cache, jnp.asarray(tokens[row, position]), view)
      np.testing.assert_allclose(np.asarray(logits)[live, 0], full[row, position][live], atol=1e-5)


def test_prefill_writes_its_target_slots_and_decode_its_live_slots(mesh):
  params, model = init(TINY), llama.Llama(TINY)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, TINY.V, (2, 8)), jnp.int32)
  before = jax.tree.map(lambda x: x + 7, caches.empty(TINY, 6, 64, False))
  none = caches.as_prefix(caches.empty(TINY, 1, 0, False))
  # The fourth copy is beyond `copies`.
  view = caches.Prefill(jnp.zeros(2, jnp.int32), source=jnp.asarray([1, 0, 1, 0]),
                        target=jnp.asarray([5, 0, 3, 2]), copies=jnp.int32(3))
  run = jax.jit(lambda *given: apply(model, params, *given)[1])
  cache = run(tokens, jnp.broadcast_to(jnp.arange(8), (2, 8)), before, none, view)
  for slot, row in ((0, 0), (5, 1), (3, 1)):
    assert (cache.k[:, slot, :, 8:] == 7).all() and not (cache.k[:, slot, :, :8] == 7).any()
    np.testing.assert_array_equal(cache.k[:, slot], cache.k[:, 5 if row else 0])
  others = jnp.asarray([1, 2, 4])
  assert (cache.k[:, others] == 7).all() and (cache.v[:, others] == 7).all()
  decode = caches.Decode(jnp.zeros(6, jnp.int32), jnp.full(6, 8), jnp.arange(6) == 3)
  after = run(jnp.ones((6, 1), jnp.int32), jnp.full((6, 1), 8), cache, none, decode)
  changed = np.argwhere(np.asarray(after.k != cache.k).any((0, 2, 4)))
  np.testing.assert_array_equal(changed, [[3, 8]])


def test_the_cache_may_be_bfloat16(mesh):
  """Also on a CPU, and with one query head per key/value head."""
  config = dataclasses.replace(TINY, dtype='bfloat16', K=4, G=1)
  params = init(config)
  tokens = np.random.default_rng(0).integers(1, config.V, (8, 24), np.int32)
  full = full_logits(llama.Llama(config), params, tokens)
  model, params = llama.Llama(config, kernels=attention.CPU), llama.unroll(params)
  cache, prefix, prefix_length = prefilled(model, params, jnp.asarray(tokens[:, :12]), range(8))
  view = caches.Decode(prefix_length, 12 - prefix_length, jnp.ones(8, bool))
  logits, _ = jax.jit(lambda: apply(
      model, params, tokens[:, 12:13], jnp.full((8, 1), 12), cache, prefix, view))()
  np.testing.assert_allclose(logits[:, 0], full[:, 12], atol=0.05)
