"""Rows that hold several examples: who sees whom, and attention over them on TPU and GPU; by XLA: `attention.train`."""
import flax
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp
import numpy as np

from srlm_jax.models import attention
from srlm_jax.models.attention import Kernels
from srlm_jax.sharding import spec

BLOCK = 512  # of queries and of keys, in splash attention


@flax.struct.dataclass
class Packed:
  """A token sees, of itself and those before it, its own segment, and the prompt that this shares with another.

  So of a row [prompt | chosen | rejected] both responses see the prompt, and neither sees the other.
  """
  segments: jax.Array  # [B, T] the response to which a token belongs, from 1; 0: padding
  shared: jax.Array | None = None  # [B, T] of a prompt's token the second response to which it belongs, or 0

  def attend(self, kernels: Kernels, q, k, v, cache, prefix, layer):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H] and the cache, which is none."""
    rows = [x for x in (self.segments, self.shared) if x is not None]
    local = jax.shard_map(kernels.train, in_specs=tuple(map(spec, ('BTKGH', 'BTKH', 'BTKH', *['BT'] * len(rows)))),
                          out_specs=spec('BTKGH'), check_vma=False)
    return local(q, k, v, *rows), cache


def tpu_train(q, k, v, segments, shared=None, *, interpret=False):
  """As `attention.train`, by splash attention, which knows one segment a key: for the prompts that are in two, the keys
  come twice. T is a multiple of 128, or it is a ValueError."""
  T, G = q.shape[1], q.shape[3]
  if T % 128:
    raise ValueError(f'splash attention wants multiples of 128; the rows are {T} tokens wide')
  copies, keys = 1, segments
  if shared is not None:
    copies, keys = 2, jnp.concatenate([segments, jnp.where(shared > 0, shared, -1)], 1)
  # what comes later is hidden; and of the second copy most blocks are no one's, but that is known too late to skip them
  mask = splash_attention_mask.NumpyMask(np.tile(np.tri(T, dtype=bool), copies))
  block = attention.divisor(T, BLOCK)
  sizes = dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
                         'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'), block)
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
      splash_attention_mask.MultiHeadMask([mask] * G), interpret=interpret,
      block_sizes=splash_attention_kernel.BlockSizes(**sizes))
  q = jnp.einsum('BTKGH->BKGTH', q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash does not scale
  k, v = (jnp.tile(jnp.einsum('BTKH->BKTH', x), (1, 1, copies, 1)) for x in (k, v))
  ids = splash_attention_kernel.SegmentIds(q=segments, kv=keys)
  out = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids)
  return jnp.einsum('BKGTH->BTKGH', out)


def gpu_train(q, k, v, segments, shared=None):
  """As `attention.train`, by cuDNN: float16 or bfloat16, H a multiple of 8 up to 128."""
  B, T, K, G, H = q.shape
  mask = attention.visible(segments, shared)[:, None]
  return jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, mask=mask, implementation='cudnn').reshape(
      q.shape)
