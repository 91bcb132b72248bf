"""Rows that hold several examples: who sees whom, and attention over them."""
import functools

import flax
import jax

from srlm_jax.models.attention import Kernels
from srlm_jax.sharding import spec


@flax.struct.dataclass
class Packed:
  """A token sees, of itself and those before it, its own segment, and the prompt that this shares with another.

  So of a row [prompt | chosen | rejected] both responses see the prompt, and neither sees the other.
  """
  segments: jax.Array  # [B, T] the response to which a token belongs, from 1; 0: padding
  shared: jax.Array    # [B, T] of a prompt's token the second response to which it belongs; 0: there is none

  def attend(self, kernels: Kernels, q, k, v, cache, prefix, layer):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H] and the cache, which is none."""
    @functools.partial(jax.shard_map, in_specs=tuple(map(spec, ('BTKGH', 'BTKH', 'BTKH', 'BT', 'BT'))),
                       out_specs=spec('BTKGH'), check_vma=False)
    def local(q, k, v, segments, shared):
      return kernels.train(q, k, v, segments, shared)
    return local(q, k, v, self.segments, self.shared), cache
