"""Keys and values of tokens seen before: what a prefill writes, and what a decoded token reads and adds."""
import functools

import flax
import jax
import jax.numpy as jnp

from srlm_jax.models.attention import Kernels
from srlm_jax.models.config import Config
from srlm_jax.sharding import AXES, constrain, spec


@flax.struct.dataclass
class Cache:
  """Of `slots` rows; a prefix, which all rows share, has no B. Heads come before positions, so that a row's keys of
  one head are one matrix, whatever the number of heads on a chip."""
  k: jax.Array  # [L, B, K, S, H]
  v: jax.Array  # [L, B, K, S, H]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config: Config, batch: int, size: int, unrolled: bool) -> Cache | tuple[Cache, ...]:
  """A cache of `size` tokens a row; `unrolled`: one of a single layer for every layer."""
  def zeros(layers):
    return constrain(jnp.zeros((layers, batch, config.K, size, config.H), config.dtype), 'LBKSH')
  if unrolled:
    return tuple(Cache(zeros(1), zeros(1)) for _ in range(config.layers))
  return Cache(zeros(config.layers), zeros(config.layers))


@jax.jit
def as_prefix(cache):
  """The first row of a cache (or of every layer's), for all rows to see: [L, K, P, H]."""
  return jax.tree.map(lambda x: constrain(x[:, 0], 'LKSH'), cache)


def _sharded(*dims):
  """shard_map by the letters of the inputs; the outputs are the activations and the cache."""
  return functools.partial(jax.shard_map, in_specs=tuple(spec(d) for d in dims),
                           out_specs=(spec('BTKGH'), spec('LBKSH'), spec('LBKSH')), check_vma=False)


@flax.struct.dataclass
class Prefill:
  """The tokens of a call begin rows: row source[i] is copied to slot target[i] of the cache, for i < copies."""
  shared: jax.Array  # [B] tokens of the prefix that come before a row's own
  source: jax.Array  # [N]
  target: jax.Array  # [N]
  copies: jax.Array  # []

  def attend(self, kernels: Kernels, q, k, v, cache: Cache, prefix: Cache, layer):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H] and the cache."""
    @_sharded('BTKGH', 'BTKH', 'BTKH', 'B', 'LBKSH', 'LBKSH', 'LKSH', 'LKSH', '', '', '', '')
    def local(q, k, v, shared, cache_k, cache_v, prefix_k, prefix_v, layer, source, target, copies):
      out = kernels.prefill(q, k, v, prefix_k[layer], prefix_v[layer], shared)
      first = jax.lax.axis_index(AXES['B']) * cache_k.shape[1]  # of this chip's slots
      new = [jax.lax.all_gather(x, AXES['B'], tiled=True).swapaxes(1, 2) for x in (k, v)]  # [B, K, T, H]

      def copy(i, caches):
        slot = target[i] - first
        at = (layer, jnp.clip(slot, 0, cache_k.shape[1] - 1), 0, 0, 0)
        def one(cache, x):
          row = x[source[i]][None, None].astype(cache.dtype)
          row = jnp.where((0 <= slot) & (slot < cache.shape[1]), row, jax.lax.dynamic_slice(cache, at, row.shape))
          return jax.lax.dynamic_update_slice(cache, row, at)
        return tuple(one(*pair) for pair in zip(caches, new, strict=True))
      return out, *jax.lax.fori_loop(0, copies, copy, (cache_k, cache_v))
    out, cache_k, cache_v = local(q, k, v, self.shared, cache.k, cache.v, prefix.k, prefix.v, layer, self.source,
                                  self.target, self.copies)
    return out, Cache(cache_k, cache_v)


@flax.struct.dataclass
class Decode:
  """The call adds one token to every live row."""
  shared: jax.Array  # [B] tokens of the prefix that come before a row's own
  length: jax.Array  # [B] tokens of its own in the cache
  live: jax.Array    # [B] others are neither read nor written

  def attend(self, kernels: Kernels, q, k, v, cache: Cache, prefix: Cache, layer):
    """q [B, 1, K, G, H], k and v [B, 1, K, H] -> [B, 1, K, G, H] and the cache."""
    @_sharded('BTKGH', 'BTKH', 'BTKH', 'B', 'B', 'B', 'LBKSH', 'LBKSH', 'LKSH', 'LKSH', '')
    def local(q, k, v, shared, length, live, cache_k, cache_v, prefix_k, prefix_v, layer):
      position = jnp.where(live, length, cache_k.shape[3])
      cache_k, cache_v = kernels.append(cache_k, cache_v, k[:, 0], v[:, 0], layer, position)
      out = kernels.decode(q[:, 0], cache_k, cache_v, layer, jnp.where(live, length + 1, 0), prefix_k[layer],
                           prefix_v[layer], shared)
      return out[:, None], cache_k, cache_v
    out, cache_k, cache_v = local(q, k, v, self.shared, self.length, self.live, cache.k, cache.v, prefix.k, prefix.v,
                                  layer)
    return out, Cache(cache_k, cache_v)
