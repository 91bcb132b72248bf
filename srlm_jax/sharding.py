"""Where every array lives.

One letter names one dimension, everywhere: in einsums, in the names of parameters, in this table.
"""
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from srlm_jax import InputError

NAMES = ('data', 'fsdp', 'tensor')
AXES = {
    'B': ('data', 'fsdp'),  # batch
    'T': (),                # query position
    'S': (),                # key position
    'L': (),                # layer
    'D': ('fsdp',),         # model width
    'K': ('tensor',),       # key/value heads
    'G': (),                # query heads per key/value head
    'H': (),                # head width
    'F': ('tensor',),       # feed-forward width
    'V': ('tensor',),       # vocabulary
}


def make_mesh(data: int, fsdp: int, tensor: int, devices=None):
  """A mesh with axes data, fsdp, tensor; one of the sizes may be -1: what is left of the devices. Of several slices,
  each holds its part of data."""
  devices = jax.devices() if devices is None else devices
  shape = [data, fsdp, tensor]
  given = math.prod(n for n in shape if n != -1)
  if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
    raise InputError(f'config.mesh is data={data}, fsdp={fsdp}, tensor={tensor}: sizes are positive, one may be -1')
  shape = [len(devices) // given if n == -1 else n for n in shape]
  if math.prod(shape) != len(devices):
    raise InputError(f'config.mesh is data={data}, fsdp={fsdp}, tensor={tensor}, which does not use exactly the '
                     f'{len(devices)} devices here; make the product {len(devices)}')
  # GPUs have a slice_index too, of their host
  slices = len({getattr(d, 'slice_index', 0) for d in devices}) if devices[0].platform == 'tpu' else 1
  if shape[0] % slices:  # what crosses slices is slow: gradients alone may, once a step
    raise InputError(f'config.mesh.data = {shape[0]} does not divide over the {slices} slices here; make it a multiple')
  split = dict(allow_split_physical_axes=True)  # a tensor axis of 8 on a torus of 16 x 16
  if slices == 1:
    placed = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    placed = mesh_utils.create_hybrid_device_mesh([shape[0] // slices, *shape[1:]], [slices, 1, 1], devices, **split)
  return Mesh(placed, NAMES, axis_types=(AxisType.Auto,) * 3)


def spec(dims: str) -> P:
  """The place of an array by its dimensions; a mesh axis is used once, and the first dimension wins.

  >>> tuple(spec('DKGH'))
  ('fsdp', 'tensor', None, None)
  """
  used, entries = set(), []
  for dim in dims:
    free = tuple(a for a in AXES[dim] if a not in used)
    used |= set(free)
    entries.append(None if not free else free[0] if len(free) == 1 else free)
  return P(*entries)


def constrain(x, dims: str):
  """Pins an activation to its place; raises if no mesh is set."""
  return jax.lax.with_sharding_constraint(x, spec(dims))


def named(mesh, dims: str) -> NamedSharding:
  return NamedSharding(mesh, spec(dims))


def shardings(tree, mesh):
  """The sharding of every array of a pytree of parameters or optimizer moments, from their names."""
  def one(path, x):
    if not x.shape:
      return NamedSharding(mesh, P())  # a count
    name = str(getattr(path[-1], 'key', path[-1]))
    dims = 'L' * (len(x.shape) - len(name.rpartition('_')[2])) + name.rpartition('_')[2]
    if len(dims) != len(x.shape) or not set(dims) <= set(AXES) or '_' not in name:
      raise ValueError(f'parameter {jax.tree_util.keystr(path)} {x.shape} is not named after its dimensions')
    return divisible(name, x.shape, dims, mesh)
  return jax.tree_util.tree_map_with_path(one, tree)


def divisible(name: str, shape, dims: str, mesh) -> NamedSharding:
  """The sharding of one array; refuses a dimension that the mesh does not divide."""
  for dim, size, axes in zip(dims, shape, spec(dims), strict=True):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[a] for a in axes)
    if size % parts:
      raise InputError(f'{name}: dimension {dim} = {size} does not divide over {" x ".join(axes)} = {parts}; '
                       f'choose another config.mesh')
  return named(mesh, dims)


def put(array, sharding):
  """A host's numpy array, whole and equal on every host -> one global array."""
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(batch: dict, mesh) -> dict:
  """numpy arrays [B, ...] -> global arrays split over the batch."""
  def one(name, x):
    return put(x, divisible(f'batch {name}', x.shape, 'B' + 'T' * (x.ndim - 1), mesh))
  return {name: one(name, x) for name, x in batch.items()}
