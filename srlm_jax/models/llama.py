"""Llama in Flax, and what other families change in it, by the fields of `config.Config`.

  B batch           D model width         F feed-forward width
  T query position  K key/value heads     V vocabulary
  S key position    G query heads per K   H head width
  N targets         L layer               M pairs
  A prefill rows    W shared prefix
"""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from srlm_jax.models import attention, int8, packed, vocab
from srlm_jax.models.config import Config
from srlm_jax.sharding import constrain, constrain_residual


class Module(nn.Module):
  """A Flax module whose parameters are named after their dimensions."""
  config: Config

  def weight(self, name: str, dims: str, init=None):
    """A parameter named after its dimensions, e.g. wq_DKGH, in the dtype of activations."""
    shape = tuple(getattr(self.config, d) for d in dims)
    init = init or nn.initializers.normal(self.config.D ** -0.5)
    w = self.param(f'{name}_{dims}', init, shape, jnp.float32)
    return w if isinstance(w, int8.Int8) else w.astype(self.config.dtype)

  def dense(self, equation: str, x, name: str):
    """x times a parameter, whose dimensions are the equation's second term."""
    dims = equation.partition(',')[2].partition('->')[0]
    return int8.product(equation, x, self.weight(name, dims))


class RMSNorm(Module):
  """Root mean square normalization over the last dimensions together, in float32."""
  dims: str = 'D'

  @nn.compact
  def __call__(self, x):
    """x [..., dims] -> the same shape."""
    axes = tuple(range(-len(self.dims), 0))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axes, keepdims=True) + self.config.norm_eps)
    return y.astype(x.dtype) * self.weight('scale', self.dims, nn.initializers.ones)


class Attention(Module):
  """Grouped-query attention with RoPE."""
  kernels: attention.Kernels

  @nn.compact
  def __call__(self, x, rotation, cache, prefix, layer, view):
    """x [B, T, D], `attention.rotation` of its positions, layer [] -> [B, T, D] and the cache.

    `view` decides what a query attends to: `packed.Causal` and `packed.Packed` without a cache
    (None), `cache.Prefill` and `cache.Decode` with one.
    """
    c = self.config
    if self.kernels.fused:
      heads = self.projection('BTD,DKCH->BTKCH', x, 'qkv')
      q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    else:
      q = self.projection('BTD,DKGH->BTKGH', x, 'q')
      k = self.projection('BTD,DKH->BTKH', x, 'k')
      v = self.projection('BTD,DKH->BTKH', x, 'v')
    if c.qk_norm:
      dims = ('H', 'H') if c.qk_norm == 'head' else ('KGH', 'KH')
      q, k = (RMSNorm(c, one, name=f'{name}_norm')(x)
              for name, one, x in zip('qk', dims, (q, k), strict=True))
    if self.kernels.fused and not c.qk_norm:  # one operation: on TPU 1 % of a decoded token
      qk = attention.rope(heads[..., :-1, :], *rotation)
      q, k = qk[..., :-1, :], qk[..., -1, :]
    else:
      q, k = (attention.rope(x, *rotation) for x in (q, k))
    out, cache = view.attend(self.kernels, q, k, v, cache, prefix, layer, window=c.window)
    return self.projection('BTKGH,KGHD->BTD', out, 'o'), cache

  def projection(self, equation: str, x, name: str):
    """x times the weight w`name`, plus the bias b`name` if one of its parts has one."""
    out = self.dense(equation, x, f'w{name}')
    if not set(name) & set(self.config.biases):
      return out
    dims = equation.rpartition('BT')[2]
    return out + self.weight(f'b{name}', dims, nn.initializers.zeros)


class MLP(Module):
  """The gated feed-forward layer (SwiGLU)."""

  @nn.compact
  def __call__(self, x):
    """x [B, T, D] -> [B, T, D]."""
    gate = self.dense('BTD,DF->BTF', x, 'gate')
    up = self.dense('BTD,DF->BTF', x, 'up')
    return self.dense('BTF,FD->BTD', constrain(nn.silu(gate) * up, 'BTF'), 'down')


class Block(Module):
  """One transformer layer; its signature is that of the body of a scan over layers."""
  kernels: attention.Kernels

  @nn.compact
  def __call__(self, carry, rotation, prefix, view):
    """carry = (x [B, T, D], cache, layer []) -> the same after this layer, None."""
    # Without all of these constraints, XLA makes all-reduces of what the residual stream splits.
    x, cache, layer = carry
    drop = nn.Dropout(self.config.dropout, deterministic=not self.has_rng('dropout'))
    x = constrain_residual(x)
    y, cache = Attention(self.config, self.kernels, name='attention')(
        self.before(x, 'attention_norm'), rotation, cache, prefix, layer, view)
    x = constrain_residual(x + drop(self.after(y, 'attention_norm')))
    y = MLP(self.config, name='mlp')(self.before(x, 'mlp_norm'))
    x = constrain_residual(x + drop(self.after(y, 'mlp_norm')))
    return (x, cache, layer + 1), None

  def before(self, x, norm: str):
    """The residual stream [B, T, D] -> what attention or MLP reads."""
    is_here = self.config.norms == 'pre'
    return constrain(RMSNorm(self.config, name=norm)(x) if is_here else x, 'BTD')

  def after(self, y, norm: str):
    """The output [B, T, D] of attention or MLP -> what is added to the residual stream."""
    y = constrain_residual(y)
    return RMSNorm(self.config, name=norm)(y) if self.config.norms == 'post' else y


def recomputed(remat: str):
  """-> Block, with what its backward pass recomputes.

  none: nothing. dots: all but the products with weights, whose results are kept. full: the whole
  layer, of which only the input is kept.
  """
  policies = dict(dots=jax.checkpoint_policies.save_only_these_names(int8.PRODUCT), full=None)
  return Block if remat == 'none' else nn.remat(Block, prevent_cse=False, policy=policies[remat])


class Llama(Module):
  """Hidden states, and from them logits or the log-probs of targets.

  `Llama(config).apply({'params': params}, ..., method='hidden')` calls one of the methods.
  """
  kernels: attention.Kernels = attention.XLA  # if they are unrolled, parameters come from `unroll`
  remat: str = 'none'  # see `recomputed`

  def setup(self):
    c = self.config
    self.embed = self.weight('embed', 'VD')
    if not c.tied:
      self.lm_head = self.weight('lm_head', 'DV')
    block = recomputed(self.remat)
    if self.kernels.unrolled:
      self.layer = [block(c, self.kernels) for _ in range(c.layers)]
    else:
      self.layers = nn.scan(
          block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
          in_axes=(nn.broadcast, nn.broadcast, nn.broadcast), length=c.layers)(c, self.kernels)
    self.final_norm = RMSNorm(c)

  def __call__(self, tokens):
    """tokens [B, T], one example per row -> logits [B, T, V], float32.

    ValueError if the rows are longer than the model's context.
    """
    T = tokens.shape[1]
    if T > self.config.context:
      raise ValueError(f'a row has {T} tokens; the model supports {self.config.context}')
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return self.logits(self.hidden(tokens, positions, packed.Causal()))

  def hidden(self, tokens, positions, view: packed.Causal | packed.Packed):
    """tokens [B, T], positions [B, T] within each example -> final hidden states [B, T, D].

    Dropout is on where a 'dropout' key is passed.
    """
    return self._hidden(tokens, positions, None, None, view)[0]

  def hidden_and_cache(self, tokens, positions, cache, prefix, view):
    """tokens [B, T], positions [B, T], a cache, the prefix that its rows share, and `cache.Prefill`
    or `cache.Decode` -> final hidden states [B, T, D] and the updated cache."""
    return self._hidden(tokens, positions, cache, prefix, view)

  def logits(self, hidden):
    """hidden [B, T, D] -> logits [B, T, V], float32."""
    if self.config.tied:
      logits = jnp.einsum('BTD,VD->BTV', hidden, self.embed, preferred_element_type=jnp.float32)
    else:
      logits = int8.product('BTD,DV->BTV', hidden, self.lm_head, jnp.float32)
    return constrain(logits, 'BTV')

  def token_logps(self, hidden, targets):
    """hidden [B, N, D], at the positions that predict targets [B, N] -> their log-probs [B, N].

    float32; holds at most `vocab.MOST_LOGITS` bytes of logits at once.
    """
    head = self.embed.T if self.config.tied else self.lm_head
    return vocab.target_logps(hidden, head, targets)

  def _hidden(self, tokens, positions, cache, prefix, view):
    x = vocab.embed(self.embed, tokens)
    rotation = attention.rotation(positions, self.config)
    if self.kernels.unrolled:
      caches = []
      for i, layer in enumerate(self.layer):
        own = (None, None) if cache is None else (cache[i], prefix[i])
        (x, new, _), _ = layer((x, own[0], 0), rotation, own[1], view)
        caches.append(new)
      cache = tuple(caches)
    else:
      (x, cache, _), _ = self.layers((x, cache, jnp.int32(0)), rotation, prefix, view)
    return self.final_norm(x), cache


@jax.custom_vjp
def _layers(stack):
  """[L, ...] -> a tuple of L arrays. Its gradient is one stack, not a sum of L padded ones."""
  return tuple(stack)


_layers.defvjp(lambda stack: (tuple(stack), None), lambda _, gradients: (jnp.stack(gradients),))


@jax.jit
def unroll(params):
  """Stacked parameters -> the same with one subtree per layer, for kernels that are `unrolled`."""
  rest = {name: x for name, x in params.items() if name != 'layers'}
  stacks, tree = jax.tree.flatten(params['layers'])
  layers = zip(*map(_layers, stacks), strict=True)
  return rest | {f'layer_{i}': tree.unflatten(layer) for i, layer in enumerate(layers)}


def fuse(params):
  """Stacked parameters -> the same with one weight for q, k and v, for kernels that are `fused`."""
  weights = dict(params['layers']['attention'])
  q, k, v = (weights.pop(name) for name in ('wq_DKGH', 'wk_DKH', 'wv_DKH'))
  weights['wqkv_DKCH'] = _join(q, k, v)
  names = 'bq_KGH', 'bk_KH', 'bv_KH'
  if {*names} & {*weights}:  # some of the three may have none
    weights['bqkv_KCH'] = _join(*(
        weights.pop(name) if name in weights else jnp.zeros(int8.output_shape(w), jnp.float32)
        for name, w in zip(names, (q, k, v), strict=True)))
  return params | {'layers': params['layers'] | {'attention': weights}}


@jax.jit
def _join(q, k, v):
  """[..., G, H] and twice [..., H] -> [..., C = G + 2, H]; arrays or `Int8`."""
  return jax.tree.map(
      lambda q, k, v: jnp.concatenate([q, k[..., None, :], v[..., None, :]], -2), q, k, v)


def abstract_params(config: Config):
  """The shapes of the parameters, without memory; a mesh must be set."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def init_params(config: Config, key):
  """Random float32 parameters; a mesh must be set."""
  batch = math.prod(jax.sharding.get_abstract_mesh().shape.values())  # one row per chip
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
  block += sum(dict(q=heads, k=kv, v=kv, o=c.D)[name] for name in c.biases)
  block += {'': 0, 'head': 2 * c.H, 'all': heads + kv}[c.qk_norm]
  return c.layers * block + c.D + c.V * c.D * (1 if c.tied else 2)
