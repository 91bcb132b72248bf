"""The KV cache: what a prefill writes, and what a decoded token reads and appends."""
import functools

import flax
import jax
import jax.numpy as jnp

from srlm_jax.models.attention import below, Cache, Kernels, Prefix
from srlm_jax.models.config import Config
from srlm_jax.sharding import AXES, constrain, spec


@flax.struct.dataclass
class PrefixCache:
  """Keys and values of a prefix that all rows share, of every layer: a `Cache` without slots."""
  k: jax.Array  # [L, K, W, H]
  v: jax.Array  # [L, K, W, H]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config: Config, slots: int, size: int, unrolled: bool) -> Cache | tuple[Cache, ...]:
  """A cache of zeros with `size` tokens per slot; `unrolled`: a tuple of one cache per layer."""
  def zeros(layers):
    shape = layers, slots, config.K, size, config.H
    return constrain(jnp.zeros(shape, config.dtype), 'LBKSH')
  if unrolled:
    return tuple(Cache(zeros(1), zeros(1)) for _ in range(config.layers))
  return Cache(zeros(config.layers), zeros(config.layers))


@jax.jit
def as_prefix(cache: Cache | tuple[Cache, ...]) -> PrefixCache | tuple[PrefixCache, ...]:
  """The first slot of a cache (or of every layer's cache), as a prefix for all rows."""
  def one(cache):
    return PrefixCache(*(constrain(x[:, 0], 'LKWH') for x in (cache.k, cache.v)))
  return tuple(map(one, cache)) if isinstance(cache, tuple) else one(cache)


CACHE, PREFIX = spec('LBKSH'), spec('LKWH')


@flax.struct.dataclass
class Prefill:
  """Writes prompt K/V into the slots: row source[i] goes to slot target[i], for i < copies."""
  prefix_length: jax.Array  # [A] tokens of the prefix that precede a row's own tokens
  source: jax.Array         # [B] rows; entries from `copies` on are not read
  target: jax.Array         # [B] slots
  copies: jax.Array         # []

  def attend(self, kernels: Kernels, q, k, v, cache: Cache, prefix: PrefixCache, layer, *,
             window: int | None):
    """q [A, T, K, G, H], k and v [A, T, K, H] -> [A, T, K, G, H] and the cache."""
    window = below(prefix.k.shape[2] + q.shape[1], window)

    @functools.partial(
        jax.shard_map, check_vma=False, out_specs=(spec('ATKGH'), CACHE),
        in_specs=(spec('ATKGH'), spec('ATKH'), spec('ATKH'), CACHE, PREFIX, spec(''),
                  Prefill(spec('A'), spec(''), spec(''), spec(''))))
    def local(q, k, v, cache, prefix, layer, view):
      out = kernels.prefill(q, k, v, layer, Prefix(prefix.k, prefix.v, view.prefix_length),
                            window=window)
      slots = cache.k.shape[1]  # of this chip
      first = jax.lax.axis_index(AXES['B']) * slots
      new = [jax.lax.all_gather(x, AXES['A'], tiled=True).swapaxes(1, 2) for x in (k, v)]  # AKTH

      def copy(i, caches):
        slot = view.target[i] - first
        start = (layer, jnp.clip(slot, 0, slots - 1), 0, 0, 0)
        def one(cache, x):
          row = x[view.source[i]][None, None].astype(cache.dtype)
          old = jax.lax.dynamic_slice(cache, start, row.shape)
          row = jnp.where((0 <= slot) & (slot < slots), row, old)
          return jax.lax.dynamic_update_slice(cache, row, start)
        return tuple(one(*pair) for pair in zip(caches, new, strict=True))
      return out, Cache(*jax.lax.fori_loop(0, view.copies, copy, (cache.k, cache.v)))
    return local(q, k, v, cache, prefix, layer, self)


@flax.struct.dataclass
class Decode:
  """Appends one token to every live slot."""
  prefix_length: jax.Array  # [B] tokens of the prefix that precede a slot's own tokens
  length: jax.Array         # [B] the slot's own tokens in the cache
  live: jax.Array           # [B] other slots are neither read nor written

  def attend(self, kernels: Kernels, q, k, v, cache: Cache, prefix: PrefixCache, layer, *,
             window: int | None):
    """q [B, 1, K, G, H], k and v [B, 1, K, H] -> [B, 1, K, G, H] and the cache."""
    window = below(prefix.k.shape[2] + cache.k.shape[3], window)

    @functools.partial(
        jax.shard_map, check_vma=False, out_specs=(spec('BTKGH'), CACHE),
        in_specs=(spec('BTKGH'), spec('BTKH'), spec('BTKH'), CACHE, PREFIX, spec(''), spec('B')))
    def local(q, k, v, cache, prefix, layer, view):
      position = jnp.where(view.live, view.length, cache.k.shape[3])
      cache = kernels.append(cache, k[:, 0], v[:, 0], layer, position)
      out = kernels.decode(q[:, 0], cache, layer, jnp.where(view.live, view.length + 1, 0),
                           Prefix(prefix.k, prefix.v, view.prefix_length), window=window)
      return out[:, None], cache
    return local(q, k, v, cache, prefix, layer, self)
