"""Operations where the vocabulary is split across chips: embedding lookup and log-probabilities."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from srlm_jax.sharding import AXES, spec

MOST_LOGITS = 2**28  # bytes of logits that a chip holds at the same time


def embed(table, tokens):
  """table [V, D], tokens [B, T] -> [B, T, D]; each chip looks up its block of the vocabulary."""
  def local(table, tokens):
    i, here = _local(tokens, table.shape[0])
    return jax.lax.psum(jnp.where(here[..., None], table[i], 0), 'tensor')
  return jax.shard_map(local, in_specs=(P('tensor', None), spec('BT')),
                       out_specs=spec('BTD'))(table, tokens)


def token_logps(logits, tokens):
  """float32 logits [B, T, V], tokens [B, T] -> their log-probs [B, T].

  No chip holds a whole row of logits.
  """
  return jax.shard_map(_token_logps, in_specs=(spec('BTV'), spec('BT')),
                       out_specs=spec('BT'))(logits, tokens)


def target_logps(x, w, targets):
  """x [B, N, D], w [D, V], targets [B, N] -> their log-probs [B, N] under logits x @ w, float32.

  Logits of more than MOST_LOGITS bytes are computed in parts, and recomputed in the backward pass.
  """
  def local(x, w, targets):
    # The gradient of w is summed over parts in float32, and over chips once, in w's own dtype like
    # all other gradients.
    w = jax.lax.pcast(w, AXES['B'], to='varying').astype(jnp.float32)

    def one(x, targets):
      logits = jnp.einsum('BND,DV->BNV', x, w.astype(x.dtype), preferred_element_type=jnp.float32)
      return _token_logps(logits, targets)
    N = targets.shape[1]
    parts = min(N, -(-targets.size * w.shape[1] * 4 // MOST_LOGITS))
    if parts == 1:
      return one(x, targets)
    size = -(-N // parts)

    def cut(a):
      a = jnp.pad(a, ((0, 0), (0, parts * size - N), *[(0, 0)] * (a.ndim - 2)))
      return jnp.moveaxis(a.reshape(a.shape[0], parts, size, *a.shape[2:]), 1, 0)
    _, logps = jax.lax.scan(lambda _, part: (None, jax.checkpoint(one)(*part)), None,
                            (cut(x), cut(targets)))
    return jnp.moveaxis(logps, 0, 1).reshape(targets.shape[0], -1)[:, :N]
  # w is gathered over all but the vocabulary once, not once per part.
  return jax.shard_map(local, in_specs=(spec('BND'), P(None, 'tensor'), spec('BN')),
                       out_specs=spec('BN'))(x, w, targets)


@jax.custom_vjp
def _token_logps(logits, tokens):
  """`token_logps` on one chip: logits [..., V on this chip], tokens [...] -> [...]."""
  return _forward(logits, tokens)[0]


def _forward(logits, tokens):
  i, here = _local(tokens, logits.shape[-1])
  peak = jax.lax.pmax(logits.max(-1), 'tensor')
  log_total = peak + jnp.log(jax.lax.psum(jnp.exp(logits - peak[..., None]).sum(-1), 'tensor'))
  picked = jnp.take_along_axis(logits, i[..., None], -1)[..., 0]
  logps = jax.lax.psum(jnp.where(here, picked, 0), 'tensor') - log_total
  return logps, (logits, tokens, log_total)


def _backward(kept, gradient):
  """The gradient of the logits, in one pass: that of log-softmax is one-hot minus softmax."""
  logits, tokens, log_total = kept
  i, here = _local(tokens, logits.shape[-1])
  hit = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == i[..., None])
  hit &= here[..., None]
  return gradient[..., None] * (hit - jnp.exp(logits - log_total[..., None])), None


_token_logps.defvjp(_forward, _backward)


def next_token_logps(logits, tokens):
  """logits [B, T, V], tokens [B, T] -> log-prob [B, T] of each token given those before it.

  Column 0 is 0, because nothing predicts the first token.
  """
  logps = token_logps(logits, jnp.roll(tokens, -1, axis=1))  # column t holds that of token t + 1
  return jnp.roll(logps, 1, axis=1).at[:, 0].set(0)


def _local(tokens, size: int):
  """-> the index of each token in this chip's block of the vocabulary, and whether it is there."""
  i = tokens - jax.lax.axis_index('tensor') * size
  return jnp.clip(i, 0, size - 1), (i >= 0) & (i < size)
