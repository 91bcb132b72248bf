"""Samples the next token of every row: temperature, top-k, top-p, then one draw."""
import dataclasses

import jax
import jax.numpy as jnp

from srlm_jax import InputError

LANES = 128  # probabilities per block of the two-level search; the lanes of a TPU vector register


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. Raises InputError if a value is out of range."""
  temperature: float  # 0: greedy
  top_p: float        # sample from the smallest set of tokens with at least this mass; 1: all
  max_tokens: int     # maximum number of generated tokens
  top_k: int = 0      # sample from this many most likely tokens, before top-p; 0: all

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise InputError(f'temperature is {self.temperature}; it must be at least 0 (greedy)')
    if not 0 < self.top_p <= 1:
      raise InputError(f'top_p is {self.top_p}; it must be above 0 and at most 1')
    if self.top_k < 0:
      raise InputError(f'top_k is {self.top_k}; it must be at least 0 (all tokens)')
    if self.max_tokens < 1:
      raise InputError(f'max_tokens is {self.max_tokens}; it must be at least 1')


def draw(logits, uniform, sampling: Sampling):
  """logits [B, V] float32, uniform [B] float32 in [0, 1) -> tokens [B] int32.

  Inverse transform sampling: draws the token at which the cumulative probability exceeds
  `uniform`. One random number per row is far cheaper than one per entry of the vocabulary.
  """
  if sampling.temperature == 0:
    return logits.argmax(-1).astype(jnp.int32)
  # The maximum becomes 0 first, so that a very low temperature does not overflow.
  scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
  probs = truncate(jax.nn.softmax(scaled, -1), sampling.top_k, sampling.top_p)
  B, V = probs.shape
  probs = jnp.pad(probs, ((0, 0), (0, -V % LANES))).reshape(B, -1, LANES)
  mass = probs.sum(-1)  # [B, V / LANES]
  sums = mass.cumsum(-1)
  threshold = uniform[:, None] * sums[:, -1:]
  block = _first_above(mass, sums, threshold)[:, None]
  before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0), 1), 0)
  inside = jnp.take_along_axis(probs, block[..., None], 1)[:, 0]  # [B, LANES]
  lane = _first_above(inside, inside.cumsum(-1), threshold - before)
  return (block[:, 0] * LANES + lane).astype(jnp.int32)


def _first_above(mass, sums, threshold):
  """mass [B, entries], its cumulative sums [B, entries], threshold [B, 1] -> index [B].

  The first index with mass whose sum is above the threshold. If rounding leaves none, the last
  index with mass.
  """
  above = (sums > threshold) & (mass > 0)
  last = mass.shape[-1] - 1 - (mass[:, ::-1] > 0).argmax(-1)
  return jnp.where(above.any(-1), above.argmax(-1), last)


def truncate(probs, top_k: int, top_p: float):
  """probs [B, V] -> [B, V], zero for tokens that top-k or top-p excludes, not renormalized.

  Top-p is the share of the mass that top-k leaves. Tokens that tie with the last kept one are kept
  too.
  """
  if 0 < top_k < probs.shape[-1]:
    probs = jnp.where(_largest(probs, lambda kept: kept.sum(-1) >= top_k), probs, 0)
  if top_p < 1:
    mass = top_p * probs.sum(-1)
    kept = _largest(probs, lambda kept: jnp.where(kept, probs, 0).sum(-1) >= mass)
    probs = jnp.where(kept, probs, 0)
  return probs


def _largest(probs, enough):
  """probs [B, V] -> mask [B, V] of the fewest largest entries for which `enough` is true.

  `enough` maps a mask [B, V] to a bool [B]. Ties with the smallest kept entry are kept. Finds
  the cutoff bit by bit instead of sorting: the order of floats that are not negative is the order
  of their bit patterns.
  """
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def set_bit(i, cutoff):
    raised = cutoff | (1 << (30 - i))
    return jnp.where(enough(bits >= raised)[:, None], raised, cutoff)
  return bits >= jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((len(probs), 1), jnp.int32))
