"""Parameter hashes: equal on every mesh, and different if any value differs."""
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import model_files


def hash_all_dtypes(params, more: str = '') -> model_files.ParamHashes:
  """The hashes of the parameters as stored, and cast to each dtype that they may be restored in."""
  return model_files.ParamHashes(stored=hash_params(params, more=more),
                                 float32=hash_params(params, 'float32', more),
                                 bfloat16=hash_params(params, 'bfloat16', more))


def hash_params(params, dtype: str | None = None, more: str = '') -> str:
  """The hash of a pytree of arrays, cast to `dtype`, as 16 hexadecimal digits.

  It covers the path, dtype, shape and values of every array, but not the sharding. Of a LoRA
  adapter it also covers `more`, its `model_files.Adapter.identity`.
  """
  sums = [np.asarray(s) for s in _sums(jax.tree.leaves(params), dtype)]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return combine({
      jax.tree_util.keystr(path, simple=True, separator='.'): (dtype or str(x.dtype), x.shape, s)
      for (path, x), s in zip(leaves, sums, strict=True)}, more)


def combine(leaves: dict, more: str = '') -> str:
  """{name: (dtype, shape, sums [2])} -> 16 hexadecimal digits."""
  lines = [f'{name} {dtype} {tuple(shape)} {int(s[0])} {int(s[1])}'
           for name, (dtype, shape, s) in sorted(leaves.items())]
  text = '\n'.join([more, *lines] if more else lines)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnames='dtype')
def _sums(leaves, dtype):
  return [hash_sums(x if dtype is None else x.astype(dtype), 0, jnp) for x in leaves]


def hash_sums(x, offset: int, xp):
  """x [...] -> two sums [2] of element hashes, modulo 2**32; `xp` is numpy or jax.numpy.

  The hash of an element depends on its bits and on its flat index, which starts at `offset`. Sums
  over slices, each with its own offset, add up to the sums over the whole array. Works for dtypes
  of 1, 2 or 4 bytes and for indices above 2**32.

  Bits and index pass through the finalizer of MurmurHash3 (Appleby 2011): each input bit flips each
  output bit with a probability near 1/2. Structured changes, such as the sign flip of a whole
  matrix, therefore cancel in both sums only by chance (2**-64).
  """
  width = x.dtype.itemsize * 8
  bits = (jax.lax.bitcast_convert_type(x, f'uint{width}') if xp is jnp else
          x.view(f'uint{width}'))
  bits = bits.astype('uint32')
  low, high = _flat_index(x.shape, offset, xp)
  sums = []
  for salt in (0x9E3779B9, 0x85EBCA77):
    position = _mix(high ^ xp.asarray(salt, 'uint32'), xp) + low
    sums.append(_mix(bits ^ _mix(position, xp), xp).sum(dtype='uint32'))
  return xp.stack(sums)


def _flat_index(shape, offset: int, xp):
  """`offset` plus the flat index of every element, as low and high 32 bits.

  Two halves, because JAX has no 64-bit integers unless jax_enable_x64 is set.
  """
  return _ravel_index([np.arange(size) for size in shape], shape, offset, xp)


def _ravel_index(indices, shape, offset: int, xp):
  """`offset` plus the flat indices of the open grid `indices` (one vector per axis) in `shape`.

  Returns their low and high 32 bits. Like np.ravel_multi_index on np.ix_(*indices).
  """
  low, high = (xp.full((), part, 'uint32') for part in (offset % 2**32, offset >> 32))
  stride = 1
  for axis in reversed(range(len(shape))):
    steps = indices[axis].astype('uint64') * np.uint64(stride)
    steps = steps.reshape(-1, *(1,) * (len(shape) - axis - 1))
    add_low, add_high = (xp.asarray(part.astype('uint32'))
                         for part in (steps & 0xFFFFFFFF, steps >> np.uint64(32)))
    low = low + add_low
    high = high + add_high + (low < add_low).astype('uint32')  # the carry
    stride *= shape[axis]
  return low, high


def _mix(h, xp):
  """The finalizer of MurmurHash3, a bijection on 32-bit integers."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> xp.asarray(shift, 'uint32'))) * xp.asarray(factor, 'uint32')
  return h ^ (h >> xp.asarray(16, 'uint32'))
