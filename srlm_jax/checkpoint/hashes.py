"""Hashes that name parameters: equal on every mesh, different when any one value differs."""
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import model_files


def hash_all_dtypes(params) -> dict:
  """The hash of the parameters as stored (their name), and in every dtype in which they may be restored."""
  return dict(format=model_files.HASH_FORMAT, stored=hash_params(params),
              **{d: hash_params(params, d) for d in ('float32', 'bfloat16')})


def hash_params(params, dtype: str | None = None) -> str:
  """A name for parameters, cast to `dtype`: equal on every mesh, different when any one value differs."""
  sums = [np.asarray(s) for s in _sums(jax.tree.leaves(params), dtype)]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return combine({jax.tree_util.keystr(path, simple=True, separator='.'): (dtype or str(x.dtype), x.shape, s)
                  for (path, x), s in zip(leaves, sums, strict=True)})


def combine(leaves: dict) -> str:
  """{name: (dtype, shape, sums [2])} -> 16 hexadecimal digits."""
  text = '\n'.join(f'{name} {dtype} {tuple(shape)} {int(s[0])} {int(s[1])}'
                   for name, (dtype, shape, s) in sorted(leaves.items()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnames='dtype')
def _sums(leaves, dtype):
  return [weighted_sums(x if dtype is None else x.astype(dtype), 0, jnp) for x in leaves]


def weighted_sums(x, offset: int, xp):
  """Two sums, modulo 2**32, of a hash of every element of x and its flat index from `offset`; xp: numpy or jax.numpy.

  Sums over slices of an array, each from its own offset, add up to those of the whole. Bits and index go through the
  finalizer of MurmurHash3 (Appleby 2011), in which every bit of the input changes half of the bits of the output: so no
  pattern of changes, as a sign flipped in a whole matrix, cancels in the sum but by chance (2**-64). Works on any dtype
  of 1, 2 or 4 bytes, and on indices above 2**32.
  """
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, f'uint{width}') if xp is jnp else x.view(f'uint{width}')
  bits = bits.astype('uint32')
  low, high = _flat_index(x.shape, offset, xp)
  sums = []
  for salt in (0x9E3779B9, 0x85EBCA77):
    place = _mix(high ^ xp.asarray(salt, 'uint32'), xp) + low
    sums.append(_mix(bits ^ _mix(place, xp), xp).sum(dtype='uint32'))
  return xp.stack(sums)


def _flat_index(shape, offset: int, xp):
  """The flat index of every element, as its low and high 32 bits: JAX has no 64-bit integers here."""
  return _index([np.arange(size) for size in shape], shape, offset, xp)


def _index(places, shape, offset: int, xp):
  """`offset` plus the flat indices, in an array of `shape`, of the elements at `places` of each axis."""
  low, high = (xp.full((), part, 'uint32') for part in (offset % 2**32, offset >> 32))
  stride = 1
  for axis in reversed(range(len(shape))):
    steps = places[axis].astype('uint64') * np.uint64(stride)
    steps = steps.reshape(-1, *(1,) * (len(shape) - axis - 1))
    add_low, add_high = (xp.asarray(part.astype('uint32')) for part in (steps & 0xFFFFFFFF, steps >> np.uint64(32)))
    low = low + add_low
    high = high + add_high + (low < add_low).astype('uint32')  # the carry
    stride *= shape[axis]
  return low, high


def _mix(h, xp):
  """The finalizer of MurmurHash3: a bijection of 32 bits."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> xp.asarray(shift, 'uint32'))) * xp.asarray(factor, 'uint32')
  return h ^ (h >> xp.asarray(16, 'uint32'))
