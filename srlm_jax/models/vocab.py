"""The two operations where the vocabulary is split across chips: look-up and log-probability."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srlm_jax.sharding import AXES, spec

CHUNK = 256  # tokens of a row whose logits are there together


def embed(table, tokens):
  """table [V, D], tokens [B, T] -> [B, T, D]; each chip looks up its own block of the vocabulary."""
  def local(table, tokens):
    i, here = _local(tokens, table.shape[0])
    return jax.lax.psum(jnp.where(here[..., None], table[i], 0), 'tensor')
  return jax.shard_map(local, in_specs=(P('tensor', None), spec('BT')), out_specs=spec('BTD'))(table, tokens)


def token_logps(logits, tokens):
  """log p(tokens) under float32 logits [B, T, V] -> [B, T]; no chip ever holds a whole row of logits."""
  return jax.shard_map(_token_logps, in_specs=(spec('BTV'), spec('BT')), out_specs=spec('BT'))(logits, tokens)


def logps(x, w, labels):
  """log p(labels) under the logits x @ w: x [B, R, D], w [D, V], labels [B, R] -> [B, R], float32.

  CHUNK tokens of a row at a time, and again in the backward pass: there are never more logits than those.
  """
  def local(x, w, labels):
    # its gradient is added up in float32 over the chunks; and over the chips once, in w's own dtype like all others
    w = jax.lax.pcast(w, AXES['B'], to='varying').astype(jnp.float32)

    def one(x, labels):
      return _token_logps(jnp.einsum('BTD,DV->BTV', x, w.astype(x.dtype), preferred_element_type=jnp.float32), labels)
    R = labels.shape[1]
    parts = -(-R // CHUNK)
    if parts == 1:
      return one(x, labels)
    size = -(-R // parts)

    def cut(a):
      a = jnp.pad(a, ((0, 0), (0, parts * size - R), *[(0, 0)] * (a.ndim - 2)))
      return jnp.moveaxis(a.reshape(a.shape[0], parts, size, *a.shape[2:]), 1, 0)
    _, found = jax.lax.scan(lambda _, part: (None, jax.checkpoint(one)(*part)), None, (cut(x), cut(labels)))
    return jnp.moveaxis(found, 0, 1).reshape(labels.shape[0], -1)[:, :R]
  # w is whole but for the vocabulary: it is gathered once, not for every chunk
  return jax.shard_map(local, in_specs=(spec('BTD'), P(None, 'tensor'), spec('BT')), out_specs=spec('BT'))(x, w, labels)


def _token_logps(logits, tokens):
  """`token_logps` of one chip: logits [B, T, V on this chip]."""
  i, here = _local(tokens, logits.shape[-1])
  peak = jax.lax.pmax(jax.lax.stop_gradient(logits).max(-1), 'tensor')
  log_z = jnp.log(jax.lax.psum(jnp.exp(logits - peak[..., None]).sum(-1), 'tensor')) + peak
  picked = jnp.take_along_axis(logits, i[..., None], -1)[..., 0]
  return jax.lax.psum(jnp.where(here, picked, 0), 'tensor') - log_z


def next_logps(logits, tokens):
  """log p of every token after the first, given those before: logits [B, T, V], tokens [B, T] -> [B, T]; column 0 is
  0, nothing predicts it."""
  logps = token_logps(logits, jnp.roll(tokens, -1, axis=1))  # column t: of token t + 1
  return jnp.roll(logps, 1, axis=1).at[:, 0].set(0)


def _local(tokens, size):
  """The index of each token in this chip's block of the vocabulary, and whether it is there."""
  i = tokens - jax.lax.axis_index('tensor') * size
  return jnp.clip(i, 0, size - 1), (i >= 0) & (i < size)
