"""The next token of every row: its distribution cut by temperature, top-k and top-p, and one draw from it."""
import dataclasses

import jax
import jax.numpy as jnp

from srlm_jax import InputError

LANES = 128  # tokens of the vocabulary that are added up before the first look at the sum


@dataclasses.dataclass(frozen=True)
class Sampling:
  temperature: float  # 0: greedy
  top_p: float        # sample from the smallest set of tokens with at least this mass; 1: all
  max_tokens: int     # generated, at most
  top_k: int = 0      # sample from this many most likely tokens, before top-p; 0: all

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise InputError(f'temperature is {self.temperature}; it is 0 (greedy) or more')
    if not 0 < self.top_p <= 1:
      raise InputError(f'top_p is {self.top_p}; it is above 0 and at most 1')
    if self.top_k < 0:
      raise InputError(f'top_k is {self.top_k}; it is 0 (all tokens) or more')
    if self.max_tokens < 1:
      raise InputError(f'max_tokens is {self.max_tokens}; it is 1 or more')


def draw(logits, uniform, sampling: Sampling):
  """logits [B, V], float32, uniform [B] in [0, 1) -> tokens [B], int32.

  By inversion: the token at which the cumulative probability passes `uniform`. One random number a token is far
  cheaper than one for every entry of the vocabulary.
  """
  if sampling.temperature == 0:
    return logits.argmax(-1).astype(jnp.int32)
  scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature  # no temperature is too low for this
  probs = truncate(jax.nn.softmax(scaled, -1), sampling.top_k, sampling.top_p)
  B, V = probs.shape
  probs = jnp.pad(probs, ((0, 0), (0, -V % LANES))).reshape(B, -1, LANES)
  mass = probs.sum(-1)  # [B, V / LANES]
  sums = mass.cumsum(-1)
  wanted = uniform[:, None] * sums[:, -1:]
  block = _passing(mass, sums, wanted)[:, None]
  before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0), 1), 0)
  inside = jnp.take_along_axis(probs, block[..., None], 1)[:, 0]  # [B, LANES]
  lane = _passing(inside, inside.cumsum(-1), wanted - before)
  return (block[:, 0] * LANES + lane).astype(jnp.int32)


def _passing(mass, sums, wanted):
  """The first place [B] of mass [B, N] whose cumulative sums [B, N] pass wanted [B, 1]; never one without mass,
  however the sums are rounded."""
  passing = (sums > wanted) & (mass > 0)
  last = mass.shape[-1] - 1 - (mass[:, ::-1] > 0).argmax(-1)
  return jnp.where(passing.any(-1), passing.argmax(-1), last)


def truncate(probs, top_k: int, top_p: float):
  """Zeroes probs [B, V] outside the top_k most likely tokens, then outside the smallest set of most likely ones with a
  share >= top_p of what is left; ties are kept together."""
  if 0 < top_k < probs.shape[-1]:
    probs = jnp.where(_largest(probs, lambda kept: kept.sum(-1) >= top_k), probs, 0)
  if top_p < 1:
    mass = top_p * probs.sum(-1)
    probs = jnp.where(_largest(probs, lambda kept: jnp.where(kept, probs, 0).sum(-1) >= mass), probs, 0)
  return probs


def _largest(probs, enough):
  """The entries [B, V] at or above the highest cut at which they are `enough` ([B, V] -> [B], for kept entries).

  The cut is found bit by bit, without sorting: the bits of positive floats order as the floats do.
  """
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def refine(i, cut):
    tried = cut | (1 << (30 - i))
    return jnp.where(enough(bits >= tried)[:, None], tried, cut)
  return bits >= jax.lax.fori_loop(0, 31, refine, jnp.zeros((len(probs), 1), jnp.int32))
