"""Attention over grouped heads, by plain XLA, and the rotary embedding of positions.

The sampler attends in two ways, `prefill` and `decode`, over keys of a row's own and over a prefix that all rows share.
`models/kernels.py` has what an accelerator does instead, and chooses.
"""
from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from srlm_jax.models.config import RopeScaling

BLOCK = 64  # keys that plain decoding reads at a time
ROWS = 2  # rows that a CPU reads together: few wait for a longer one, and a block of their keys stays in its cache


def attend(q, k, v, visible):
  """q [B, T, K, G, H], k and v [B, S, K, H], visible [B, T, S] -> [B, T, K, G, H]; softmax in float32."""
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  scores = jnp.where(visible[:, None, None], scores, -1e30)  # finite: a row that sees nothing stays a number
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', probs, v)


def causal(positions, size: int):
  """positions [B, T], the query's place in the row -> visible [B, T, S = size]: keys up to and including it."""
  return jnp.arange(size) <= positions[..., None]


def train(q, k, v, segments, shared=None):
  """q [B, T, K, G, H] over k, v [B, T, K, H] of the same tokens, as `packed.Packed` says -> [B, T, K, G, H]."""
  return attend(q, k, v, visible(segments, shared))


def visible(segments, shared=None):
  """segments, shared [B, T] -> [B, T, S]: whether a query sees a key (`packed.Packed`)."""
  query = segments[:, :, None]
  same = query == segments[:, None] if shared is None else (query == segments[:, None]) | (query == shared[:, None])
  return jnp.tri(segments.shape[1], dtype=bool) & same


def prefill(q, k, v, prefix_k, prefix_v, shared):
  """q [B, T, K, G, H] over k, v [B, T, K, H] of the same tokens and the first shared [B] of prefix [K, P, H] ->
  [B, T, K, G, H]."""
  B, T, P = *k.shape[:2], prefix_k.shape[1]
  before = (jnp.broadcast_to(x.swapaxes(0, 1), (B, P, *k.shape[2:])) for x in (prefix_k, prefix_v))
  k, v = (jnp.concatenate([x.astype(y.dtype), y], 1) for x, y in zip(before, (k, v), strict=True))
  seen = jnp.broadcast_to(jnp.arange(P) < shared[:, None, None], (B, T, P))
  own = jnp.broadcast_to(jnp.tri(T, dtype=bool), (B, T, T))
  return attend(q, k, v, jnp.concatenate([seen, own], -1))


def decode(q, k, v, layer, length, prefix_k, prefix_v, shared, *, together: int | None):
  """One token a row: q [B, K, G, H] over the first length [B] keys of layer [] of the cache k, v [L, B, K, S, H] and
  the first shared [B] of prefix [K, P, H] -> [B, K, G, H].

  The prefix is one matrix product for all rows. A row's own keys are read block by block, `together` rows at once
  (None: all), as many blocks as the longest of them has: the cache's empty end is not read, nor a layer of it copied.
  """
  B, (K, S, H) = q.shape[0], k.shape[2:]
  block, size = math.gcd(S, BLOCK), math.gcd(B, together or B)

  def product(equation, a, b):
    a = a.astype(b.dtype)
    if together:  # on a CPU, which has no product of bfloat16 rows with a float32 result
      a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

  scores = product('BKGH,KPH->BKGP', q, prefix_k) * H ** -0.5
  seen = (jnp.arange(prefix_k.shape[1]) < shared[:, None])[:, None, None]
  sums = _Sums.empty(q.shape).add(jnp.where(seen, scores, -jnp.inf), lambda w: product('BKGP,KPH->BKGH', w, prefix_v))

  def rows(first):
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    mine, n = take(q), take(length)

    def read(i, sums):
      at, shape = (layer, first, 0, i * block, 0), (1, size, K, block, H)
      keys, values = (jax.lax.dynamic_slice(x, at, shape)[0] for x in (k, v))
      visible = (i * block + jnp.arange(block) < n[:, None])[:, None, None]
      scores = jnp.where(visible, product('BKGH,BKSH->BKGS', mine, keys) * H ** -0.5, -jnp.inf)
      return sums.add(scores, lambda w: product('BKGS,BKSH->BKGH', w, values))
    return jax.lax.fori_loop(0, -(-n.max() // block), read, jax.tree.map(take, sums)).mean()

  if size == B:
    return rows(0).astype(q.dtype)
  return jax.lax.map(rows, jnp.arange(0, B, size)).reshape(q.shape).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Sums:
  """A softmax-weighted mean of values under way (Milakov and Gimelshein 2018): weights are relative to `peak`."""
  peak: jax.Array    # [B, K, G] highest score so far
  weight: jax.Array  # [B, K, G]
  value: jax.Array   # [B, K, G, H]

  @classmethod
  def empty(cls, shape):
    return cls(jnp.full(shape[:-1], -1e30), jnp.zeros(shape[:-1]), jnp.zeros(shape))  # finite, for inf - inf is none

  def add(self, scores, values):
    """scores [B, K, G, S], -inf where unseen; values: weights of that shape -> [B, K, G, H]."""
    peak = jnp.maximum(self.peak, scores.max(-1, initial=-1e30))
    old, new = jnp.exp(self.peak - peak), jnp.exp(scores - peak[..., None])
    return _Sums(peak, self.weight * old + new.sum(-1), self.value * old[..., None] + values(new))

  def mean(self):
    """[B, K, G, H]; zeros where nothing was seen."""
    return self.value / jnp.maximum(self.weight, 1e-30)[..., None]


def append(cache_k, cache_v, k, v, layer, position):
  """Writes k, v [B, K, H] at position [B] of layer [] of caches [L, B, K, S, H]; beyond S nothing is written."""
  rows = jnp.arange(k.shape[0])
  return tuple(cache.at[layer, rows, :, position].set(new.astype(cache.dtype), mode='drop')
               for cache, new in ((cache_k, k), (cache_v, v)))


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How a platform attends: functions as those above, and the shapes that they want."""
  name: str
  train: Callable
  prefill: Callable
  decode: Callable
  append: Callable
  width: int  # a prefill's tokens a row are a multiple of it
  group: int  # tokens that are prefilled together, where rows have fewer
  block: int  # a cache's tokens a row are a multiple of it
  unrolled: bool  # wants every layer's arrays on their own
  formats: Callable | None = None  # parameters -> where and in which layout they are wanted, if not as they come


XLA = Kernels('xla', train, prefill, functools.partial(decode, together=None), append, width=16, group=256, block=BLOCK,
              unrolled=False)
# A CPU's loop over stacked layers copies each layer's weights and cache out of the stack at every token; and a small
# product costs it no more a token than a large one.
CPU = dataclasses.replace(XLA, name='xla for a cpu', decode=functools.partial(decode, together=ROWS), group=32,
                          unrolled=True)


def divisor(size: int, most: int) -> int:
  """The largest multiple of 128 up to `most` that divides `size`.

  >>> divisor(4096 + 384, 1024), divisor(4096, 1024)
  (896, 1024)
  """
  if size % 128:
    raise ValueError(f'the kernels want multiples of 128 keys, not {size}')
  return max(n for n in range(128, max(most, 128) + 1, 128) if size % n == 0)


def rope(x, positions, theta: float, scaling: RopeScaling | None):
  """Rotates pairs of features by angles of their position. x [B, T, ..., H], positions [B, T]."""
  half = x.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling:
    freq = stretch(freq, scaling)
  # bf16 rounds 257 to 256, so angles stay float32
  angle = positions.reshape(*positions.shape, *(1,) * (x.ndim - 2)).astype(jnp.float32) * freq
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def stretch(freq, s: RopeScaling):
  """Divides slow frequencies by the factor, keeps fast ones, blends between (Llama 3.1). freq [H / 2]."""
  turns = s.original_context * freq / (2 * jnp.pi)  # over the original context
  keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
  return freq * (keep + (1 - keep) / s.factor)
