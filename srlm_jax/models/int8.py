"""Weights of 8 bits for sampling: a weight is values * scale, with one scale for each output channel."""
import flax
import jax
import jax.numpy as jnp

DENSE = ('wq', 'wk', 'wv', 'wo', 'gate', 'up', 'down', 'lm_head')  # the rest is looked up, or small


@flax.struct.dataclass
class Int8:
  values: jax.Array  # [..., inputs, outputs], int8
  scale: jax.Array   # [..., outputs], float32


def quantize(params):
  """Parameters with every dense weight as an Int8; until it returns, both are in memory."""
  def one(path, w):
    name, _, dims = path[-1].key.rpartition('_')
    return _quantize(w, dims, w.ndim - len(dims)) if name in DENSE else w
  return jax.tree_util.tree_map_with_path(one, params)


def inputs(dims: str) -> int:
  """How many of a weight's dimensions are its inputs: it leads from D to the others, or from the others to D.

  >>> inputs('DKGH'), inputs('KGHD')
  (1, 3)
  """
  return 1 if dims[0] == 'D' else len(dims) - 1


def product(equation: str, x, w, dtype=None):
  """The einsum of x and a weight, array or Int8, whose outputs are the last dimensions; `dtype` of the result, if it is
  not x's."""
  if not isinstance(w, Int8):
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)
  y = jnp.einsum(equation, x, w.values.astype(x.dtype), preferred_element_type=jnp.float32)
  return (y * w.scale).astype(dtype or x.dtype)


def _quantize(w, dims: str, layers: int):
  """w [layers.., dims] -> Int8, symmetric: the largest of a channel is 127."""
  @jax.jit
  def run(w):
    axes = tuple(range(layers, layers + inputs(dims)))
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axes, keepdims=True), 1e-30) / 127
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale.squeeze(axes))
  return run(w)
