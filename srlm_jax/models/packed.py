"""Attention without a cache: over whole rows, and over packed rows, with TPU and GPU kernels.

`attention.packed` does the same in plain XLA.
"""
import functools

import flax
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp
import numpy as np

from srlm_jax.models import attention
from srlm_jax.models.attention import Kernels, PairSegments, Segments, SharedSegments
from srlm_jax.sharding import spec

BLOCK = 512  # queries and keys per block of splash attention


@flax.struct.dataclass
class Causal:
  """Each row is one example, from position 0; plain XLA on every platform."""

  def attend(self, kernels: Kernels, q, k, v, cache, prefix, layer, *, window: int | None):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H]; there is no cache."""
    return attention.causal(q, k, v, window=window), cache


@flax.struct.dataclass
class Packed:
  """Rows hold several examples."""
  segments: Segments

  def attend(self, kernels: Kernels, q, k, v, cache, prefix, layer, *, window: int | None):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H]; there is no cache."""
    window = attention.below(q.shape[1], window)
    local = jax.shard_map(
        functools.partial(kernels.packed, window=window), out_specs=spec('BTKGH'), check_vma=False,
        in_specs=(spec('BTKGH'), spec('BTKH'), spec('BTKH'), spec('BT')))
    return local(q, k, v, self.segments), cache


@flax.struct.dataclass
class Shared:
  """Each row is a context and its continuations; plain XLA on every platform."""
  segments: SharedSegments

  def attend(self, kernels: Kernels, q, k, v, cache, prefix, layer, *, window: int | None):
    """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H]; there is no cache."""
    window = attention.below(q.shape[1], window)
    return attention.packed(q, k, v, self.segments, window=window), cache


def tpu_packed(q, k, v, segments: Segments, *, window: int | None, interpret=False):
  """As `attention.packed`, by splash attention; ValueError unless T is a multiple of 128.

  Splash attention allows one segment per key, so rows of pairs pass every key twice.
  """
  T, G = q.shape[1], q.shape[3]
  if T % 128:
    raise ValueError(f'splash attention needs a multiple of 128; the rows have {T} tokens')
  key_segments = segments.key_segments()
  copies = key_segments.shape[1] // T
  k, v = (jnp.einsum('BTKH->BKTH', x) for x in (k, v))
  visible = np.tri(T, dtype=bool)  # in each copy
  if window is None:
    k, v = (jnp.tile(x, (1, 1, copies, 1)) for x in (k, v))
  else:
    visible &= ~np.tri(T, k=-window, dtype=bool)
    if copies > 1:
      source, second = beside_rejected(segments)
      key_segments = jnp.concatenate([segments.segment_ids, second], 1)
      k, v = (jnp.concatenate([x, jnp.take_along_axis(x, source[:, None, :, None], 2)], 2)
              for x in (k, v))
  # Most blocks of the second copy are fully masked, but that depends on the segments, so the static
  # mask cannot skip them.
  mask = splash_attention_mask.NumpyMask(np.tile(visible, copies))
  block = attention.divisor(T, BLOCK)
  sizes = dict.fromkeys(
      ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
       'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'), block)
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
      splash_attention_mask.MultiHeadMask([mask] * G), interpret=interpret,
      block_sizes=splash_attention_kernel.BlockSizes(**sizes))
  scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5  # splash does not scale
  q = jnp.einsum('BTKGH->BKGTH', scaled).astype(q.dtype)
  ids = splash_attention_kernel.SegmentIds(q=segments.segment_ids, kv=key_segments)
  out = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids)
  return jnp.einsum('BKGTH->BTKGH', out)


def beside_rejected(segments: PairSegments):
  """The keys of rows of pairs, with every prompt directly before the rejected response.

  In the rows, chosen stands between them, so that their distance is larger than in position.
  -> source [B, T], where the key at each place comes from, and its segment [B, T]; -1: none.
  """
  ids, positions, T = segments.segment_ids, segments.positions, segments.segment_ids.shape[1]
  place = jnp.broadcast_to(jnp.arange(T), ids.shape)
  before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
  starts = (ids != before) & (positions > 0)  # of rejected; the prompt starts a pair at position 0
  # Where position 0 is, counted back from the next rejected response.
  zero = jax.lax.cummin(jnp.where(starts, place - positions, T), axis=1, reverse=True)
  is_prompt = place >= zero
  source = jnp.where(is_prompt, place - positions + place - zero, 0)
  return source, jnp.where(is_prompt, jnp.take_along_axis(segments.second_segment, source, 1), -1)


def gpu_packed(q, k, v, segments: Segments, *, window: int | None):
  """As `attention.packed`, by cuDNN: float16 or bfloat16, H a multiple of 8 and at most 128."""
  B, T, K, G, H = q.shape
  out = jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v,
                                     mask=segments.mask(window)[:, None], implementation='cudnn')
  return out.reshape(q.shape)
