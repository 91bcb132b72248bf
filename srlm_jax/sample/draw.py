"""Samples the next token of every row: temperature, top-k, top-p, then one draw."""
import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np

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


@flax.struct.dataclass
class PerRow:
  """The values of `Sampling` for rows that differ in them."""
  temperature: jax.Array  # [B]
  top_p: jax.Array        # [B]
  top_k: jax.Array        # [B]

  @classmethod
  def empty(cls, row_count: int):
    """Greedy rows as numpy arrays, which `set` writes to."""
    return cls(np.zeros(row_count, np.float32), np.ones(row_count, np.float32),
               np.zeros(row_count, np.int32))

  def set(self, rows, sampling: Sampling):
    """Gives some rows the values of `sampling`."""
    for field in dataclasses.fields(self):
      getattr(self, field.name)[rows] = getattr(sampling, field.name)


def draw(logits, keys, sampling: Sampling):
  """logits [B, V] float32, keys [B], the PRNG key of each row -> tokens [B] int32.

  Top-p by rejection: a token of the whole distribution is drawn until one is in the top-p set. It
  is, if the tokens with a higher probability have together less than top_p of the mass; tokens that
  tie with the last one of the set are in it. After a rejection, only tokens with a higher
  probability can be drawn, so every row ends, on average after 1 / top_p draws. No sorting.
  """
  if sampling.temperature == 0:
    return argmax(logits)
  probs = _probs(logits, sampling.temperature)
  if 0 < sampling.top_k < probs.shape[-1]:
    probs = jnp.where(_largest(probs, sampling.top_k), probs, 0)
  if sampling.top_p == 1:
    return _from_all(probs, keys)
  return _from_top_p(probs, keys, sampling.top_p * probs.sum(-1))


def draw_per_row(logits, keys, sampling: PerRow):
  """As `draw`, where every row has its own values; but for rounding, the tokens are the same."""
  is_greedy = sampling.temperature == 0

  def sample():
    probs = _probs(logits, jnp.where(is_greedy, 1, sampling.temperature)[:, None])
    count = jnp.where(sampling.top_k > 0, sampling.top_k, probs.shape[-1])[:, None]
    probs = jax.lax.cond((sampling.top_k > 0).any(),
                         lambda: jnp.where(_largest(probs, count), probs, 0), lambda: probs)
    is_whole = is_greedy | (sampling.top_p == 1)
    limit = sampling.top_p * probs.sum(-1)
    return jnp.where(is_whole, _from_all(probs, keys), _from_top_p(probs, keys, limit, is_whole))
  token = argmax(logits)
  return jnp.where(is_greedy, token, jax.lax.cond(is_greedy.all(), lambda: token, sample))


def _probs(logits, temperature):
  """The probabilities [B, V]; the maximum becomes 0 first, so that a very low temperature does not
  overflow."""
  return jax.nn.softmax((logits - logits.max(-1, keepdims=True)) / temperature, -1)


def _from_all(probs, keys):
  """Draws from the whole of probs [B, V] -> tokens [B]."""
  return invert(probs, jax.vmap(jax.random.uniform)(keys))


def _from_top_p(probs, keys, limit, is_done=False):
  """Draws from the top-p sets of probs [B, V], whose masses are `limit` [B] -> tokens [B].

  Rows of `is_done` [B] need no token.
  """
  def attempt(state):
    t, floor, token, accepted = state
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys)
    new = invert(jnp.where(probs > floor, probs, 0), uniform)
    prob = jnp.take_along_axis(probs, new[:, None], 1)
    above = jnp.where(probs > prob, probs, 0).sum(-1)
    # The most likely token is in every set, also if the limit is so small that it became 0. With
    # ~(..), NaN ends the loop.
    found = accepted | (above <= 0) | ~(above >= limit)
    return (t + 1, jnp.where(found[:, None], floor, prob), jnp.where(accepted, token, new), found)

  B = len(probs)
  start = (0, jnp.full((B, 1), -1.0), jnp.zeros(B, jnp.int32), jnp.full(B, is_done))
  return jax.lax.while_loop(lambda state: ~state[3].all(), attempt, start)[2]


def invert(probs, uniform):
  """probs [B, V], not normalized, uniform [B] in [0, 1) -> tokens [B] int32.

  Inverse transform sampling: the token at which the cumulative probability exceeds `uniform`. One
  random number per row is far cheaper than one per entry of the vocabulary.
  """
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


def argmax(logits):
  """logits [.., V] -> the first largest entry [..]; XLA's own argmax is slow on a CPU."""
  V = logits.shape[-1]
  is_largest = logits == logits.max(-1, keepdims=True)
  return jnp.where(is_largest, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def _first_above(mass, sums, threshold):
  """mass [B, entries], its cumulative sums [B, entries], threshold [B, 1] -> index [B].

  The first index with mass whose sum is above the threshold. If rounding leaves none, the last
  index with mass.
  """
  above = (sums > threshold) & (mass > 0)
  last = mass.shape[-1] - 1 - (mass[:, ::-1] > 0).argmax(-1)
  return jnp.where(above.any(-1), above.argmax(-1), last)


def _largest(probs, count):
  """probs [B, V] -> mask [B, V] of the `count` largest entries, with all that tie with the last.

  `count`: one number, or [B, 1].

  Finds the cutoff bit by bit instead of sorting: the order of floats that are not negative is the
  order of their bit patterns.
  """
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def set_bit(i, cutoff):
    raised = cutoff | (1 << (30 - i))
    enough = (bits >= raised).sum(-1, keepdims=True) >= count
    return jnp.where(enough, raised, cutoff)
  return bits >= jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((len(probs), 1), jnp.int32))
