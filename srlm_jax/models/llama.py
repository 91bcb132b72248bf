"""Llama in Flax.

  B batch           D model width         F feed-forward width
  T query position  K key/value heads     V vocabulary
  S key position    G query heads per K   H head width           L layer
"""
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from srlm_jax.models import attention, vocab
from srlm_jax.models.config import Config
from srlm_jax.sharding import constrain


@flax.struct.dataclass
class Cache:
  """Keys and values of the tokens seen so far; a row is valid up to its own length."""
  k: jax.Array  # [L, B, S, K, H]
  v: jax.Array  # [L, B, S, K, H]

  @classmethod
  def empty(cls, config: Config, batch: int, size: int):
    if size > config.context:
      raise ValueError(f'a cache of {size} tokens; the model was made for {config.context}')
    zeros = jnp.zeros((config.layers, batch, size, config.K, config.H), config.dtype)
    return cls(k=constrain(zeros, 'LBSKH'), v=constrain(zeros, 'LBSKH'))

  def write(self, layer, k, v, positions):
    """Puts k and v [B, T, K, H] at each row's positions [B, T] of one layer; the rest stays in place."""
    rows = jnp.arange(k.shape[0])[:, None]
    return Cache(k=self.k.at[layer, rows, positions].set(k.astype(self.k.dtype), mode='drop'),
                 v=self.v.at[layer, rows, positions].set(v.astype(self.v.dtype), mode='drop'))


class Module(nn.Module):
  config: Config

  def weight(self, name: str, dims: str, init=None):
    """A parameter named after its dimensions, e.g. wq_DKGH, in the dtype of activations."""
    shape = tuple(getattr(self.config, d) for d in dims)
    w = self.param(f'{name}_{dims}', init or nn.initializers.normal(self.config.D ** -0.5), shape, jnp.float32)
    return w.astype(self.config.dtype)


class RMSNorm(Module):
  @nn.compact
  def __call__(self, x):
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + self.config.norm_eps)
    return y.astype(x.dtype) * self.weight('scale', 'D', nn.initializers.ones)


class Attention(Module):
  @nn.compact
  def __call__(self, x, positions, cache, layer):
    """x [B, T, D], positions [B, T], cache or None, layer [] -> [B, T, D] and the cache."""
    c = self.config
    q = jnp.einsum('BTD,DKGH->BTKGH', x, self.weight('wq', 'DKGH'))
    k = jnp.einsum('BTD,DKH->BTKH', x, self.weight('wk', 'DKH'))
    v = jnp.einsum('BTD,DKH->BTKH', x, self.weight('wv', 'DKH'))
    if c.attention_bias:
      q += self.weight('bq', 'KGH', nn.initializers.zeros)
      k += self.weight('bk', 'KH', nn.initializers.zeros)
      v += self.weight('bv', 'KH', nn.initializers.zeros)
    q = attention.rope(q, positions, c.rope_theta, c.rope_scaling)
    k = attention.rope(k, positions, c.rope_theta, c.rope_scaling)
    if cache is not None:
      cache = cache.write(layer, k, v, positions)
      k, v = cache.k[layer], cache.v[layer]
    out = attention.attend(q, k, v, attention.causal(positions, k.shape[1]))
    out = jnp.einsum('BTKGH,KGHD->BTD', out, self.weight('wo', 'KGHD'))
    if c.attention_bias:
      out += self.weight('bo', 'D', nn.initializers.zeros)
    return out, cache


class MLP(Module):
  @nn.compact
  def __call__(self, x):
    gate = jnp.einsum('BTD,DF->BTF', x, self.weight('gate', 'DF'))
    up = jnp.einsum('BTD,DF->BTF', x, self.weight('up', 'DF'))
    return jnp.einsum('BTF,FD->BTD', nn.silu(gate) * up, self.weight('down', 'FD'))


class Block(Module):
  @nn.compact
  def __call__(self, carry, layer, positions):
    x, cache = carry
    x = constrain(x, 'BTD')
    y, cache = Attention(self.config, name='attention')(
        RMSNorm(self.config, name='attention_norm')(x), positions, cache, layer)
    drop = nn.Dropout(self.config.dropout, deterministic=not self.has_rng('dropout'))
    x = x + drop(y)
    x = x + drop(MLP(self.config, name='mlp')(RMSNorm(self.config, name='mlp_norm')(x)))
    return (x, cache), None


class Llama(Module):
  remat: bool = False  # recompute each layer in the backward pass

  @nn.compact
  def __call__(self, tokens, positions=None, cache=None, at=None):
    """tokens [B, T] -> logits [B, T, V], float32, and the cache (None without one).

    positions [B, T]: each token's place in its row, by default 0, 1, ..; at [B]: the one column whose
    logits are wanted, [B, 1, V] then.
    """
    c = self.config
    if tokens.shape[1] > c.context:
      raise ValueError(f'a row of {tokens.shape[1]} tokens; the model was made for {c.context}')
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    table = self.weight('embed', 'VD')
    x = vocab.embed(table, tokens)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    layers = nn.scan(
        block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast), length=c.layers)
    (x, cache), _ = layers(c, name='layers')((x, cache), jnp.arange(c.layers), positions)
    x = RMSNorm(c, name='final_norm')(x)
    if at is not None:
      x = jnp.take_along_axis(x, at[:, None, None], axis=1)  # [B, 1, D]
    head = table.T if c.tied else self.weight('lm_head', 'DV')
    logits = jnp.einsum('BTD,DV->BTV', x, head, preferred_element_type=jnp.float32)
    return constrain(logits, 'BTV'), cache


def abstract_params(config: Config):
  """The parameters as shapes, without memory; a mesh must be set."""
  return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def init_params(config: Config, key):
  """Random float32 parameters; a mesh must be set."""
  batch = math.prod(jax.sharding.get_abstract_mesh().shape.values())  # a row for every chip
  return Llama(config).init(key, jnp.zeros((batch, 1), jnp.int32))['params']


def param_count(config: Config) -> int:
  """The exact number of parameters, from the config alone.

  >>> from srlm_jax.models.config import PRESETS
  >>> param_count(PRESETS['llama2-70b'])
  68976648192
  """
  c = config
  kv, heads = c.K * c.H, c.K * c.G * c.H
  block = 2 * c.D * heads + 2 * c.D * kv + 3 * c.D * c.F + 2 * c.D
  bias = (heads + 2 * kv + c.D) if c.attention_bias else 0
  return c.layers * (block + bias) + c.D + c.V * c.D * (1 if c.tied else 2)
