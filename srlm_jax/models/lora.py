"""LoRA: a low-rank update beside a weight, x W + (x A) B * alpha / rank.

Hu et al. 2021, arXiv 2106.09685. An adapter is a pytree like the parameters, with two float32
arrays in place of each adapted weight, e.g. wq_a_DR and wq_b_RKGH for wq_DKGH; R is the rank. In
parameters, adapters lie beside their weights, and `llama.Module.dense` adds their products. There
the scale alpha / rank is part of B, so the adapters of several rounds are one of a larger rank.
"""
from collections.abc import Iterable
import math
import re

from flax import traverse_util
import jax
import jax.numpy as jnp

from srlm_jax import config as configs
from srlm_jax.models import int8
from srlm_jax.models.config import Config

# The names of PEFT and Hugging Face, and our weights of a layer.
WEIGHTS = dict(zip(configs.LORA_TARGETS, (
    'attention.wq_DKGH', 'attention.wk_DKH', 'attention.wv_DKH', 'attention.wo_KGHD',
    'mlp.gate_DF', 'mlp.up_DF', 'mlp.down_FD'), strict=True))


def names(name: str, dims: str) -> tuple[str, str]:
  """The names of A and B of a weight.

  >>> names('wq', 'DKGH')
  ('wq_a_DR', 'wq_b_RKGH')
  """
  inputs = int8.inputs(dims)
  return f'{name}_a_{dims[:inputs]}R', f'{name}_b_R{dims[inputs:]}'


def product(equation: str, x, a, b):
  """The einsum of x and the product of A and B; `equation`: that of x and the adapted weight."""
  dims_x, dims_w, out = re.split(',|->', equation)
  inputs, outputs = dims_w[:int8.inputs(dims_w)], dims_w[int8.inputs(dims_w):]
  inner = ''.join(d for d in dims_x if d not in inputs) + 'R'
  return jnp.einsum(f'{inner},R{outputs}->{out}',
                    jnp.einsum(f'{dims_x},{inputs}R->{inner}', x, a), b)


def shapes(config: Config, rank: int, targets: Iterable[str]) -> dict:
  """The shapes of an adapter for the weights that `targets` name."""
  found = {}
  for path in (f'layers.{WEIGHTS[target]}' for target in targets):
    for name in paths(path):
      sizes = [rank if d == 'R' else getattr(config, d) for d in name.rpartition('_')[2]]
      found[name] = jax.ShapeDtypeStruct((config.layers, *sizes), jnp.float32)
  return traverse_util.unflatten_dict(found, sep='.')


def paths(path: str) -> tuple[str, str]:
  """The paths of A and B of a weight.

  >>> paths('layers.mlp.up_DF')
  ('layers.mlp.up_a_DR', 'layers.mlp.up_b_RF')
  """
  folder, _, last = path.rpartition('.')
  a, b = names(*last.rsplit('_', 1))
  return f'{folder}.{a}', f'{folder}.{b}'


def init(shapes, key):
  """Shapes of an adapter -> a new one, which changes nothing: B is 0, A uniform as in PEFT."""
  flat = dict(sorted(_flat(shapes).items()))
  keys = dict(zip(flat, jax.random.split(key, len(flat)), strict=True))

  def one(name, x):
    if '_b_R' in name:
      return jnp.zeros(x.shape, x.dtype)
    dims = name.rpartition('_')[2]
    bound = math.prod(x.shape[-len(dims):-1]) ** -0.5  # of the number of inputs
    return jax.random.uniform(keys[name], x.shape, x.dtype, -bound, bound)
  return traverse_util.unflatten_dict({name: one(name, x) for name, x in flat.items()}, sep='.')


def join(params, adapter, scale: float):
  """Parameters, which may have adapters, and one more -> both in one tree.

  The new one is multiplied by `scale` and then joined with those of earlier rounds along R.
  """
  flat = _flat(params)
  for name, x in _flat(adapter).items():
    is_b = '_b_R' in name
    x = x * scale if is_b else x
    axis = x.ndim - len(name.rpartition('_')[2]) if is_b else -1
    flat[name] = jnp.concatenate([flat[name], x], axis) if name in flat else x
  return traverse_util.unflatten_dict(flat, sep='.')


def merge(params):
  """Adds all adapters to their weights -> parameters without adapters.

  In float32, rounded once to the dtype of the weight. Frees the memory of the weights.
  """
  flat = _flat(params)
  for path in (f'layers.{weight}' for weight in WEIGHTS.values()):
    if {*paths(path)} <= flat.keys():
      w, (a, b) = flat[path], (flat.pop(name) for name in paths(path))
      flat[path] = jax.jit(_merged, donate_argnums=0, out_shardings=w.sharding)(w, a, b)
  return traverse_util.unflatten_dict(flat, sep='.')


def fuse(weights: dict, C: int) -> dict:
  """The weights of attention -> the same with one adapter for the joint weight of q, k and v.

  Each of the three adapters fills its own of the C heads of the joint B; the rest of it is 0.
  """
  weights, joint = dict(weights), []
  for a, b, first in (('wq_a_DR', 'wq_b_RKGH', 0), ('wk_a_DR', 'wk_b_RKH', C - 2),
                      ('wv_a_DR', 'wv_b_RKH', C - 1)):
    if a in weights:
      a, b = weights.pop(a), weights.pop(b)
      b = b if first == 0 else b[..., None, :]
      rest = C - first - b.shape[-2]
      joint.append((a, jnp.pad(b, (*[(0, 0)] * (b.ndim - 2), (first, rest), (0, 0)))))
  if joint:
    a, b = zip(*joint, strict=True)
    weights |= dict(wqkv_a_DR=jnp.concatenate(a, -1), wqkv_b_RKCH=jnp.concatenate(b, -4))
  return weights


def _merged(w, a, b):
  """w [L, inputs, outputs] + A B, one layer at a time."""
  def one(layer):
    w, a, b = layer
    update = jnp.tensordot(a, b, 1, precision='highest')
    return (w.astype(jnp.float32) + update).astype(w.dtype)
  return jax.lax.map(one, (w, a, b))


def _flat(tree) -> dict:
  return traverse_util.flatten_dict(tree, sep='.')
