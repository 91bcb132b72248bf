"""Llama in Flax.

  B batch           D model width         F feed-forward width
  T query position  K key/value heads     V vocabulary
  S key position    G query heads per K   H head width           L layer
"""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from srlm_jax.models import attention, int8, vocab
from srlm_jax.models.config import Config
from srlm_jax.sharding import constrain


class Module(nn.Module):
  config: Config

  def weight(self, name: str, dims: str, init=None):
    """A parameter named after its dimensions, e.g. wq_DKGH, in the dtype of activations."""
    shape = tuple(getattr(self.config, d) for d in dims)
    w = self.param(f'{name}_{dims}', init or nn.initializers.normal(self.config.D ** -0.5), shape, jnp.float32)
    return w if isinstance(w, int8.Int8) else w.astype(self.config.dtype)

  def dense(self, equation: str, x, name: str, dtype=None):
    """x times a parameter, whose dimensions are the equation's second term."""
    return int8.product(equation, x, self.weight(name, equation.partition(',')[2].partition('->')[0]), dtype)


class RMSNorm(Module):
  @nn.compact
  def __call__(self, x):
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + self.config.norm_eps)
    return y.astype(x.dtype) * self.weight('scale', 'D', nn.initializers.ones)


class Attention(Module):
  kernels: attention.Kernels

  @nn.compact
  def __call__(self, x, positions, cache, prefix, layer, view):
    """x [B, T, D], positions [B, T], layer [] -> [B, T, D] and the cache; without one (view is None), causal."""
    c = self.config
    q = self.dense('BTD,DKGH->BTKGH', x, 'wq')
    k = self.dense('BTD,DKH->BTKH', x, 'wk')
    v = self.dense('BTD,DKH->BTKH', x, 'wv')
    if c.attention_bias:
      q += self.weight('bq', 'KGH', nn.initializers.zeros)
      k += self.weight('bk', 'KH', nn.initializers.zeros)
      v += self.weight('bv', 'KH', nn.initializers.zeros)
    q = attention.rope(q, positions, c.rope_theta, c.rope_scaling)
    k = attention.rope(k, positions, c.rope_theta, c.rope_scaling)
    if view is None:
      out = attention.attend(q, k, v, attention.causal(positions, k.shape[1]))
    else:
      out, cache = view.attend(self.kernels, q, k, v, cache, prefix, layer)
    out = self.dense('BTKGH,KGHD->BTD', out, 'wo')
    if c.attention_bias:
      out += self.weight('bo', 'D', nn.initializers.zeros)
    return out, cache


class MLP(Module):
  @nn.compact
  def __call__(self, x):
    gate = self.dense('BTD,DF->BTF', x, 'gate')
    up = self.dense('BTD,DF->BTF', x, 'up')
    return self.dense('BTF,FD->BTD', nn.silu(gate) * up, 'down')


class Block(Module):
  kernels: attention.Kernels

  @nn.compact
  def __call__(self, carry, layer, positions, prefix, view):
    x, cache = carry
    x = constrain(x, 'BTD')
    y, cache = Attention(self.config, self.kernels, name='attention')(
        RMSNorm(self.config, name='attention_norm')(x), positions, cache, prefix, layer, view)
    drop = nn.Dropout(self.config.dropout, deterministic=not self.has_rng('dropout'))
    x = x + drop(y)
    x = x + drop(MLP(self.config, name='mlp')(RMSNorm(self.config, name='mlp_norm')(x)))
    return (x, cache), None


class Llama(Module):
  kernels: attention.Kernels = attention.XLA  # to sample with; unrolled ones want parameters as from `unroll`
  remat: bool = False  # recompute each layer in the backward pass

  @nn.compact
  def __call__(self, tokens, positions=None, cache=None, prefix=None, view=None, targets=None):
    """tokens [B, T] -> logits [B, T, V], float32, and the cache (None without one).

    positions [B, T]: each token's place in its example, by default 0, 1, .. The sampler passes a cache, the prefix that
    its rows share, and a view of them: `cache.Prefill` or `cache.Decode`. Training passes `packed.Packed`, and targets
    (at, label) [B, R], and has the log-probs [B, R] of the labels as predicted by the tokens at those places.
    """
    c = self.config
    if view is None and tokens.shape[1] > c.context:  # the sampler's rows are padded, and measured by it
      raise ValueError(f'a row of {tokens.shape[1]} tokens; the model was made for {c.context}')
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    table = self.weight('embed', 'VD')
    x = vocab.embed(table, tokens)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    if self.kernels.unrolled:
      caches = []
      for i in range(c.layers):
        own = (None, None) if cache is None else (cache[i], prefix[i])
        (x, new), _ = block(c, self.kernels, name=f'layer_{i}')((x, own[0]), 0, positions, own[1], view)
        caches.append(new)
      cache = tuple(caches)
    else:
      layers = nn.scan(
          block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast), length=c.layers)
      (x, cache), _ = layers(c, self.kernels, name='layers')((x, cache), jnp.arange(c.layers), positions, prefix, view)
    x = RMSNorm(c, name='final_norm')(x)
    if targets is not None:
      at, label = targets
      head = table.T if c.tied else self.weight('lm_head', 'DV')
      return vocab.logps(jnp.take_along_axis(x, at[..., None], 1), head, label), cache
    logits = (jnp.einsum('BTD,VD->BTV', x, table, preferred_element_type=jnp.float32) if c.tied else
              self.dense('BTD,DV->BTV', x, 'lm_head', jnp.float32))
    return constrain(logits, 'BTV'), cache


@jax.jit
def unroll(params):
  """Parameters of stacked layers -> the same with every layer's on their own, for a model that is `unrolled`."""
  rest = {name: x for name, x in params.items() if name != 'layers'}
  layers, form = jax.tree.flatten(params['layers'])
  return rest | {f'layer_{i}': form.unflatten([x[i] for x in layers]) for i in range(len(layers[0]))}


def abstract_params(config: Config):
  """The parameters as shapes, without memory; a mesh must be set."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


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
