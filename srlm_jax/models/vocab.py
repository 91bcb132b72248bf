"""The two operations where the vocabulary is split across chips: look-up and log-probability."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srlm_jax.sharding import spec


def embed(table, tokens):
  """table [V, D], tokens [B, T] -> [B, T, D]; each chip looks up its own block of the vocabulary."""
  def local(table, tokens):
    i, here = _local(tokens, table.shape[0])
    return jax.lax.psum(jnp.where(here[..., None], table[i], 0), 'tensor')
  return jax.shard_map(local, in_specs=(P('tensor', None), spec('BT')), out_specs=spec('BTD'))(table, tokens)


def token_logps(logits, tokens):
  """log p(tokens) under float32 logits [B, T, V] -> [B, T]; no chip ever holds a whole row of logits."""
  def local(logits, tokens):
    i, here = _local(tokens, logits.shape[-1])
    peak = jax.lax.pmax(jax.lax.stop_gradient(logits).max(-1), 'tensor')
    log_z = jnp.log(jax.lax.psum(jnp.exp(logits - peak[..., None]).sum(-1), 'tensor')) + peak
    picked = jnp.take_along_axis(logits, i[..., None], -1)[..., 0]
    return jax.lax.psum(jnp.where(here, picked, 0), 'tensor') - log_z
  return jax.shard_map(local, in_specs=(spec('BTV'), spec('BT')), out_specs=spec('BT'))(logits, tokens)


def next_logps(logits, tokens):
  """log p of every token after the first, given those before: logits [B, T, V], tokens [B, T] -> [B, T]; column 0 is
  0, nothing predicts it."""
  logps = token_logps(logits, jnp.roll(tokens, -1, axis=1))  # column t: of token t + 1
  return jnp.roll(logps, 1, axis=1).at[:, 0].set(0)


def _local(tokens, size):
  """The index of each token in this chip's block of the vocabulary, and whether it is there."""
  i = tokens - jax.lax.axis_index('tensor') * size
  return jnp.clip(i, 0, size - 1), (i >= 0) & (i < size)
