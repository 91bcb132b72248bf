"""Grouped-query attention in plain XLA, the arrays that all attention kernels take, and RoPE.

Training attends within packed rows (`packed`). The sampler has two forms, `prefill` and `decode`,
over a row's own keys and over a prefix that all rows share. `models/kernels.py` holds the TPU and
GPU kernels and selects one set per platform.
"""
from collections.abc import Callable
import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp

from srlm_jax.models.config import Config, RopeScaling

BLOCK = 64  # keys that `decode` reads at a time
QUERIES = 128  # least queries of a block of `packed`
MOST_BLOCKS = 8  # of `packed`; each is compiled by itself
# Rows that a CPU decodes together: short rows wait for few longer ones, and a block of keys stays
# in the processor's cache.
ROWS = 2


@flax.struct.dataclass
class Segments:
  """Rows of single-response examples: a query attends to the earlier keys of its own segment."""
  segment_ids: jax.Array  # [B, T] the response that a token belongs to, from 1; 0 = padding
  positions: jax.Array    # [B, T] of a token within its example

  def mask(self, window: int | None):
    """-> [B, T, S], True where a query attends to a key."""
    return self._visible(window) & (self.segment_ids[:, :, None] == self.segment_ids[:, None])

  def _visible(self, window: int | None):
    """-> [B or 1, T, S], True for the earlier keys of a row that are in the window."""
    causal = jnp.tri(self.segment_ids.shape[1], dtype=bool)[None]
    if window is None:
      return causal
    return causal & (self.positions[:, :, None] - self.positions[:, None] < window)

  def key_segments(self):
    """-> [B, S = T], for kernels that allow one segment per key."""
    return self.segment_ids


@flax.struct.dataclass
class PairSegments(Segments):
  """Rows of pairs [prompt | chosen | rejected]: both responses attend to the prompt they share.

  The prompt has the segment of chosen; `second_segment` adds that of rejected. Neither response
  attends to the other.
  """
  second_segment: jax.Array  # [B, T] the second response that a prompt token belongs to; 0 = none

  def mask(self, window: int | None):
    """-> [B, T, S], True where a query attends to a key."""
    query = self.segment_ids[:, :, None]
    same = (query == self.segment_ids[:, None]) | (query == self.second_segment[:, None])
    return self._visible(window) & same

  def key_segments(self):
    """-> [B, S = 2 T]: kernels that allow one segment per key get every key twice."""
    second = jnp.where(self.second_segment > 0, self.second_segment, -1)
    return jnp.concatenate([self.segment_ids, second], 1)


@flax.struct.dataclass
class SharedSegments(Segments):
  """Rows of a context and its continuations [context | a | b ..], for `packed` only.

  Segment 0 is the context, which all others attend to. Padding may have any segment, as it comes
  last.
  """

  def mask(self, window: int | None):
    """-> [B, T, S], True where a query attends to a key."""
    key = self.segment_ids[:, None]
    return self._visible(window) & ((self.segment_ids[:, :, None] == key) | (key == 0))


@flax.struct.dataclass
class Cache:
  """Keys and values of all slots. Heads precede positions, so that the keys of a slot and head are
  one matrix, however many heads a chip holds."""
  k: jax.Array  # [L, B, K, S, H]
  v: jax.Array  # [L, B, K, S, H]


@flax.struct.dataclass
class Prefix:
  """A prefix that all rows share: row b attends to its first length[b] tokens."""
  k: jax.Array       # [L, K, W, H]
  v: jax.Array       # [L, K, W, H]
  length: jax.Array  # [B]


def attend(q, k, v, mask):
  """q [B, T, K, G, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, K, G, H].

  The softmax is in float32.
  """
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32)
  scores *= q.shape[-1] ** -0.5
  scores = jnp.where(mask[:, None, None], scores, -1e30)  # finite: a fully masked row is not NaN
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', probs, v)


def below(positions: int, window: int | None) -> int | None:
  """The window, or None if rows of so many positions cannot exceed it."""
  return window if window is not None and window < positions else None


def band(T: int, window: int | None):
  """-> [T, S = T], True where a query of a whole row attends to a key."""
  mask = jnp.tri(T, dtype=bool)
  return mask if window is None else mask & ~jnp.tri(T, k=-window, dtype=bool)


def causal(q, k, v, *, window: int | None):
  """q [B, T, K, G, H], k and v [B, T, K, H] of whole rows from position 0 -> [B, T, K, G, H]."""
  B, T = q.shape[:2]
  return attend(q, k, v, jnp.broadcast_to(band(T, window), (B, T, T)))


def packed(q, k, v, segments: Segments, *, window: int | None):
  """q [B, T, K, G, H], k and v [B, T, K, H] of packed rows -> [B, T, K, G, H].

  In blocks of queries, each over the keys up to its own end: later keys are masked anyway.
  """
  T, mask = q.shape[1], segments.mask(window)
  block = max(QUERIES, -(-T // MOST_BLOCKS))
  ends = [*range(block, T, block), T]
  return jnp.concatenate([
      attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
      for start, end in zip([0, *ends], ends, strict=False)], 1)


def prefill(q, k, v, layer, prefix: Prefix, *, window: int | None):
  """q [B, T, K, G, H], k and v [B, T, K, H] -> [B, T, K, G, H], causal after the prefix.

  `layer` []: of the prefix. With a window, a query attends to that many tokens, its own included.
  """
  B, T = k.shape[:2]
  W = prefix.k.shape[2]
  prefix_kv = (jnp.broadcast_to(x[layer].swapaxes(0, 1), (B, W, *k.shape[2:]))
               for x in (prefix.k, prefix.v))
  k, v = (jnp.concatenate([x.astype(own.dtype), own], 1)
          for x, own in zip(prefix_kv, (k, v), strict=True))
  prefix_mask = jnp.broadcast_to(jnp.arange(W) < prefix.length[:, None, None], (B, T, W))
  if window is not None:
    position = prefix.length[:, None] + jnp.arange(T)  # [B, T]
    prefix_mask &= jnp.arange(W) > position[..., None] - window
  own_mask = jnp.broadcast_to(band(T, window), (B, T, T))
  return attend(q, k, v, jnp.concatenate([prefix_mask, own_mask], -1))


def decode(q, cache: Cache, layer, length, prefix: Prefix, *, window: int | None,
           row_block: int | None):
  """One token per row: q [B, K, G, H], layer [], length [B] -> [B, K, G, H].

  Row b attends to its prefix and to the first length[b] keys of the cache, both of `layer`, as far
  as they are among the last `window` ones. The prefix is read once for all rows. The cache is read
  block by block, `row_block` rows at a time (None: all), from the first to the last key that these
  rows see: the unused end of the cache is not read, and no layer is copied.
  """
  B, (K, S, H) = q.shape[0], cache.k.shape[2:]
  block, size = math.gcd(S, BLOCK), math.gcd(B, row_block or B)

  def product(equation, a, b):
    a = a.astype(b.dtype)
    if row_block:  # XLA's CPU backend has no bfloat16 product of rows with a float32 result
      a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

  def add(softmax, q, keys, values, dims, mask):
    scores = product(f'BKGH,{dims}->BKGS', q, keys) * H ** -0.5
    return softmax.add(jnp.where(mask[:, None, None], scores, -jnp.inf),
                       lambda weights: product(f'BKGS,{dims}->BKGH', weights, values))

  softmax, W = _Softmax.empty(q.shape), prefix.k.shape[2]
  if window is None or not W:
    softmax = add(softmax, q, prefix.k[layer], prefix.v[layer], 'KSH',
                  jnp.arange(W) < prefix.length[:, None])
  else:
    width, first_visible = min(W, BLOCK), prefix.length + length - window

    def read_shared(i, softmax):
      start = jnp.minimum(i * width, W - width)  # the last block may overlap the one before
      keys, values = (jax.lax.dynamic_slice(x, (layer, 0, start, 0), (1, K, width, H))[0]
                      for x in (prefix.k, prefix.v))
      key = start + jnp.arange(width)
      is_new = (i * width <= key) & (key < prefix.length[:, None])
      return add(softmax, q, keys, values, 'KSH', is_new & (first_visible[:, None] <= key))
    softmax = jax.lax.fori_loop(first_block(prefix, length, window, width), -(-W // width),
                                read_shared, softmax)

  def rows(first):
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    some_q, some_length = take(q), take(length)

    def read(i, softmax):
      start, shape = (layer, first, 0, i * block, 0), (1, size, K, block, H)
      keys, values = (jax.lax.dynamic_slice(x, start, shape)[0] for x in (cache.k, cache.v))
      key = i * block + jnp.arange(block)
      mask = key < some_length[:, None]
      if window is not None:
        mask &= some_length[:, None] - window <= key
      return add(softmax, some_q, keys, values, 'BKSH', mask)
    start, end = 0, -(-some_length.max() // block)
    if window is not None:  # idle rows see nothing
      start = jnp.where(some_length > 0, jnp.maximum(some_length - window, 0) // block, end).min()
    return jax.lax.fori_loop(start, end, read, jax.tree.map(take, softmax)).mean()

  if size == B:
    return rows(0).astype(q.dtype)
  return jax.lax.map(rows, jnp.arange(0, B, size)).reshape(q.shape).astype(q.dtype)


def first_block(prefix: Prefix, length, window: int, block: int):
  """length [B] -> []: the first block of the prefix that any row sees; their number if none."""
  first = jnp.maximum(prefix.length + length - window, 0)
  sees = (length > 0) & (first < prefix.length)
  return jnp.where(sees, first // block, -(-prefix.k.shape[2] // block)).min()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Softmax:
  """Online-softmax accumulator (Milakov and Gimelshein 2018); weights are relative to `peak`."""
  peak: jax.Array    # [B, K, G] highest score so far
  weight: jax.Array  # [B, K, G]
  value: jax.Array   # [B, K, G, H]

  @classmethod
  def empty(cls, shape):
    peak = jnp.full(shape[:-1], -1e30)  # finite, because inf - inf is NaN
    return cls(peak, jnp.zeros(shape[:-1]), jnp.zeros(shape))

  def add(self, scores, values):
    """scores [B, K, G, S], -inf where masked; values: weights of that shape -> [B, K, G, H]."""
    peak = jnp.maximum(self.peak, scores.max(-1, initial=-1e30))
    old, new = jnp.exp(self.peak - peak), jnp.exp(scores - peak[..., None])
    weight = self.weight * old + new.sum(-1)
    return _Softmax(peak, weight, self.value * old[..., None] + values(new))

  def mean(self):
    """-> [B, K, G, H]; zeros where everything was masked."""
    return self.value / jnp.maximum(self.weight, 1e-30)[..., None]


def append(cache: Cache, k, v, layer, position) -> Cache:
  """Writes k and v [B, K, H] at position[b] of `layer` in slot b; positions >= S write nothing."""
  rows = jnp.arange(k.shape[0])
  return Cache(*(old.at[layer, rows, :, position].set(new.astype(old.dtype), mode='drop')
                 for old, new in ((cache.k, k), (cache.v, v))))


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The attention functions of a platform, with the signatures of those above, and the shapes that
  they need."""
  name: str
  packed: Callable
  prefill: Callable
  decode: Callable
  append: Callable
  width_multiple: int  # of the width of a prefill or a training batch
  size_multiple: int   # of the size of a cache
  prefill_tokens: int  # narrower prefills take as many rows as make up this many tokens
  unrolled: bool       # each layer's parameters and cache are separate arrays, not one stack
  fused: bool = False  # q, k and v have one weight: parameters come from `llama.fuse`
  formats: Callable | None = None  # parameters -> their sharding and memory layout; None = as given


XLA = Kernels('xla', packed, prefill, functools.partial(decode, row_block=None), append,
              width_multiple=16, size_multiple=BLOCK, prefill_tokens=256, unrolled=False)
# On a CPU, a loop over stacked layers would copy each layer's weights and cache out of the stack
# for every token, and small matrix products are as fast per token as large ones.
CPU = dataclasses.replace(XLA, name='xla for a cpu', prefill_tokens=32, unrolled=True,
                          decode=functools.partial(decode, row_block=ROWS))


def divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size` and is at most `most`.

  >>> divisor(4096 + 384, 1024), divisor(4096, 1024)
  (896, 1024)
  """
  if size % 128:
    raise ValueError(f'the kernels need a multiple of 128 keys, not {size}')
  return max(n for n in range(128, max(most, 128) + 1, 128) if size % n == 0)


def rotation(positions, config: Config):
  """positions [B, T] -> the sines and cosines of RoPE's angles, twice [B, T, H / 2], float32."""
  half = config.H // 2
  freq = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling:
    freq = stretch(freq, config.rope_scaling)
  # Angles are float32, because bfloat16 rounds 257 to 256.
  angle = positions[..., None].astype(jnp.float32) * freq
  return jnp.sin(angle), jnp.cos(angle)


def rope(x, sin, cos):
  """x [B, T, ..., H] -> x with pairs of features rotated, by the angles of `rotation`."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = (jnp.expand_dims(y, tuple(range(2, x.ndim - 1))) for y in (sin, cos))
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def stretch(freq, s: RopeScaling):
  """freq [H / 2] -> [H / 2], as in Llama 3.1: low frequencies are divided by the factor, high ones
  are kept, those between are interpolated."""
  turns = s.original_context * freq / (2 * jnp.pi)  # over the original context
  keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  keep = jnp.clip(keep, 0, 1)
  return freq * (keep + (1 - keep) / s.factor)
