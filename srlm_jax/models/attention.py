"""Attention over grouped heads, and the rotary embedding of positions."""
import jax
import jax.numpy as jnp

from srlm_jax.models.config import RopeScaling


def attend(q, k, v, visible):
  """q [B, T, K, G, H], k and v [B, S, K, H], visible [B, T, S] -> [B, T, K, G, H]; softmax in float32."""
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  scores = jnp.where(visible[:, None, None], scores, -1e30)  # finite: a row that sees nothing stays a number
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', probs, v)


def causal(positions, size: int):
  """positions [B, T], the query's place in the row -> visible [B, T, S = size]: keys up to and including it."""
  return jnp.arange(size) <= positions[..., None]


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
