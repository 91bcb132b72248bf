"""Weight-only int8 quantization for sampling: a weight is values * scale, one scale per output."""
import functools
import re

import flax
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

PRODUCT = 'product'  # the name of results of `product`, for policies of recomputation

# Other weights are lookup tables, or small.
DENSE = ('wq', 'wk', 'wv', 'wqkv', 'wo', 'gate', 'up', 'down', 'lm_head')


@flax.struct.dataclass
class Int8:
  """A quantized weight."""
  values: jax.Array  # [..., inputs, outputs], int8
  scale: jax.Array   # [..., outputs], float32


def quantize(params):
  """Parameters -> the same with dense weights as Int8; both are in memory until it returns."""
  def one(path, w):
    name, _, dims = path[-1].key.rpartition('_')
    return _quantize(w, dims, w.ndim - len(dims)) if name in DENSE else w
  return jax.tree_util.tree_map_with_path(one, params)


def inputs(dims: str) -> int:
  """The number of a weight's dimensions that are inputs: D alone, or all but D.

  >>> inputs('DKGH'), inputs('KGHD')
  (1, 3)
  """
  return 1 if dims[0] == 'D' else len(dims) - 1


def output_shape(w) -> tuple:
  """A stacked weight [L, D, outputs], an array or an Int8 -> [L, outputs]."""
  return w.scale.shape if isinstance(w, Int8) else (w.shape[0], *w.shape[2:])


def product(equation: str, x, w, dtype=None):
  """The einsum of x and a weight (an array or an Int8), whose output dimensions come last.

  `dtype`: of the result, by default that of x.
  """
  if not isinstance(w, Int8):
    return ad_checkpoint.checkpoint_name(_product(equation, dtype, x, w), PRODUCT)
  # A float32 result would double the bytes of the reduction over the mesh.
  y = jnp.einsum(equation, x, w.values.astype(x.dtype), preferred_element_type=dtype)
  return (y.astype(jnp.float32) * w.scale).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype, x, w):
  """`product` of an array."""
  return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _gradients(equation: str, dtype, inputs, gradient):
  """Like JAX's, which computes the gradient of w as a transpose: to do so, a CPU copies the
  gradient of the result in another order, which takes 5 % of a training step."""
  del dtype
  x, w = inputs
  dims_x, dims_w, out = re.split(',|->', equation)
  return (jnp.einsum(f'{out},{dims_w}->{dims_x}', gradient, w).astype(x.dtype),
          jnp.einsum(f'{dims_x},{out}->{dims_w}', x, gradient).astype(w.dtype))


_product.defvjp(lambda equation, dtype, x, w: (_product(equation, dtype, x, w), (x, w)), _gradients)


def _quantize(w, dims: str, layers: int):
  """w [layers.., dims] -> Int8, symmetric: the largest absolute value of an output becomes 127."""
  @jax.jit
  def run(w):
    axes = tuple(range(layers, layers + inputs(dims)))
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axes, keepdims=True), 1e-30) / 127
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale.squeeze(axes))
  return run(w)
