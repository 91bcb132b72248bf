"""The sharding of every array.

One letter names one dimension everywhere: in einsums, in parameter names, in this table.
"""
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from srlm_jax import InputError, torus

NAMES = ('data', 'fsdp', 'tensor')
AXES = {
    'B': ('data', 'fsdp'),  # batch
    'A': ('data', 'fsdp'),  # rows of a prefill
    'T': (),                # query position
    'S': (),                # key position
    'W': (),                # position in a prefix that all rows share
    'N': (),                # targets of a row
    'M': (),                # pairs of a row
    'L': (),                # layer
    'D': ('fsdp',),         # model width
    'K': ('tensor',),       # key/value heads
    'G': (),                # query heads per key/value head
    'C': (),                # query heads, key and value per key/value head
    'H': (),                # head width
    'F': ('tensor',),       # feed-forward width
    'V': ('tensor',),       # vocabulary
    'R': (),                # rank of an adapter
}


def make_mesh(data: int, fsdp: int, tensor: int, devices=None):
  """A mesh with axes data, fsdp and tensor; one size may be -1: all remaining devices.

  With several TPU slices, each slice holds a part of the data axis. In a slice, the neighbours of a
  group are close on the torus (srlm_jax/torus.py).
  """
  devices = jax.devices() if devices is None else devices
  shape = [data, fsdp, tensor]
  given = f'config.mesh is data={data}, fsdp={fsdp}, tensor={tensor}'
  if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
    raise InputError(f'{given}; use positive sizes, at most one of them -1')
  known = math.prod(n for n in shape if n != -1)
  shape = [len(devices) // known if n == -1 else n for n in shape]
  if math.prod(shape) != len(devices):
    raise InputError(f'{given}, which does not use exactly the {len(devices)} available devices; '
                     f'make the product {len(devices)}')
  # GPUs have a slice_index too, but it numbers hosts.
  tpu = devices[0].platform == 'tpu'
  slices = {}
  for device in devices:
    slices.setdefault(getattr(device, 'slice_index', 0) if tpu else 0, []).append(device)
  if shape[0] % len(slices):  # the network between slices is slow: only gradients cross it
    raise InputError(f'config.mesh.data = {shape[0]} does not divide over the {len(slices)} '
                     'slices; make it a multiple')
  part = [shape[0] // len(slices), *shape[1:]]
  if tpu and torus.known(devices):
    try:
      grids = [torus.order(part, slices[n]) for n in sorted(slices)]
    except ValueError as error:
      raise InputError(f'{given}: {error}; choose another size, for sampling in '
                       f'config.sample_mesh') from error
  else:
    grids = [mesh_utils.create_device_mesh(part, slices[n], allow_split_physical_axes=True)
             for n in sorted(slices)]
  grid = np.concatenate(grids)
  return Mesh(grid, NAMES, axis_types=(AxisType.Auto,) * 3)


def spec(dims: str) -> P:
  """The sharding of an array by its dimensions; the first dimension takes a mesh axis.

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
  """Constrains the sharding of an activation; raises if no mesh is set."""
  return jax.lax.with_sharding_constraint(x, spec(dims))


def constrain_residual(x):
  """Constrains the residual stream x [B, T, D] of a forward pass without a cache.

  Chips of a tensor group split the positions, so that none computes or keeps what another one has
  (Korthikanti et al. 2022, arXiv 2205.05198). Whole where their number does not divide T.
  """
  if x.shape[1] % jax.sharding.get_abstract_mesh().shape['tensor']:
    return constrain(x, 'BTD')
  return jax.lax.with_sharding_constraint(x, P(AXES['B'], 'tensor', None))


def named(mesh, dims: str) -> NamedSharding:
  """The sharding on `mesh` of an array with dimensions `dims`."""
  return NamedSharding(mesh, spec(dims))


def shardings(tree, mesh):
  """The sharding of every parameter or optimizer moment in a pytree, from their names."""
  def one(path, x):
    if not x.shape:
      return NamedSharding(mesh, P())  # a step count
    name = str(getattr(path[-1], 'key', path[-1]))
    dims = name.rpartition('_')[2]
    dims = 'L' * (len(x.shape) - len(dims)) + dims
    if len(dims) != len(x.shape) or not set(dims) <= set(AXES) or '_' not in name:
      where = jax.tree_util.keystr(path)
      raise ValueError(f'parameter {where} {x.shape} is not named after its dimensions')
    return divisible(name, x.shape, dims, mesh)
  return jax.tree_util.tree_map_with_path(one, tree)


def divisible(name: str, shape, dims: str, mesh) -> NamedSharding:
  """The sharding of one array; InputError if the mesh does not divide a dimension."""
  for dim, size, axes in zip(dims, shape, spec(dims), strict=True):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[a] for a in axes)
    if size % parts:
      raise InputError(f'{name}: dimension {dim} = {size} does not divide over '
                       f'{" x ".join(axes)} = {parts}; choose another config.mesh')
  return named(mesh, dims)


def put(array, sharding):
  """A numpy array that is whole and equal on every host -> one global array."""
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(batch, mesh):
  """A pytree of numpy arrays [B, ...] -> the same of global arrays, split over the batch."""
  def one(path, x):
    name = f'batch {jax.tree_util.keystr(path, simple=True)}'
    return put(x, divisible(name, x.shape[:1], 'B', mesh))
  return jax.tree_util.tree_map_with_path(one, batch)
