"""Reads a checkpoint once for all hosts of a run, and copies it to every group of hosts.

A host reads whole layers, each layer is read by one host, and the devices exchange them: an
all-to-all within a group gives each device its part of the layers that the group has read, and an
all-gather over the groups gives it that part of every layer.
"""
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import tensorstore as ts

from srlm_jax import hosts, sharding
from srlm_jax.checkpoint import arrays

GROUP = 'group'  # the first axis of a mesh of all groups


def bytes_read() -> int:
  """The bytes that this process has read with TensorStore, from files and buckets."""
  metrics = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/')
  return sum(m['values'][0]['value'] for m in metrics if m['name'].endswith('/bytes_read'))


def restore(stored: dict, abstract: dict, mesh) -> dict:
  """Distributes arrays -> {name: array} on `mesh`, the mesh of this host's group.

  stored: {name: array to read, a TensorStore}
  abstract: {name: shape, dtype and sharding on `mesh`}; the first dimension of an array whose name
    begins with 'layers.' is the layer

  All hosts must call it. The groups have equally many hosts, and meshes of the same shape.
  """
  whole = all_groups(mesh)
  sources = sharding.put(_sources(whole), NamedSharding(whole, P(GROUP)))
  found, first = {}, 0
  for name in order(abstract):
    with jax.set_mesh(whole):
      found[name] = _one(whole, mesh, sources, stored[name], abstract[name], first, name)
    first += _stacked(abstract[name].shape, name)[0]  # the next host is the next to read
  return found


def order(abstract: dict) -> list[str]:
  """The names, from the largest array: it takes the most memory besides its own."""
  return sorted(abstract, key=lambda name: (-math.prod(abstract[name].shape), name))


def lower(whole, abstract, name: str):
  """The lowered exchange of one array, for a look at its memory; arguments as in `restore`."""
  shape, spec = _stacked(abstract.shape, name), _inner(abstract, name)
  def on(dims, shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(whole, dims))
  group, senders = whole.devices[0], _senders(whole)
  _, piece = _cut(NamedSharding(whole, spec).shard_shape(shape[1:]), senders)
  with jax.set_mesh(whole):
    return program(whole, shape[1:], spec).lower(
        on(P(None, *spec), shape, abstract.dtype),
        on(P(whole.axis_names), (whole.size, group.size, *piece), abstract.dtype),
        on(P(GROUP), (len(whole.devices), group.size)), on(P(), (whole.size // senders,)))


def all_groups(mesh) -> Mesh:
  """The meshes of all groups as one mesh, with `GROUP` as the first axis."""
  ids = hosts.gather([d.id for d in mesh.devices.flat])
  groups = [ids[0], *(there for here, there in itertools.pairwise(ids) if here != there)]
  devices = {d.id: d for d in jax.devices()}
  grid = np.array([devices[i] for group in groups for i in group])
  return mesh_of(grid.reshape(len(groups), *mesh.devices.shape), mesh.axis_names)


def mesh_of(grid, axes) -> Mesh:
  """Devices [groups, *axes] -> a mesh."""
  return Mesh(grid, (GROUP, *axes), axis_types=(AxisType.Auto,) * grid.ndim)


def _sources(whole) -> np.ndarray:
  """-> [groups, devices of a group]: the places of a group's devices, sorted by host."""
  groups = whole.devices.reshape(len(whole.devices), -1)
  return np.array([sorted(range(len(group)), key=lambda place: (group[place].process_index, place))
                   for group in groups], np.int32)


def _stacked(shape: tuple, name: str) -> tuple:
  """The shape of an array with the layer as its first dimension: one, if it has none."""
  return shape if name.startswith('layers.') else (1, *shape)


def _inner(abstract, name: str):
  """How one layer of an array is sharded."""
  spec = abstract.sharding.spec
  return P(*(spec[1:] if name.startswith('layers.') else spec))


def _one(whole, mesh, sources, stored, abstract, first: int, name: str):
  """One array of the result; `first`: the host that reads its first layer."""
  shape, spec = _stacked(abstract.shape, name), _inner(abstract, name)
  is_stacked = shape == abstract.shape
  out = jax.jit(functools.partial(jnp.zeros, shape, abstract.dtype),
                out_shardings=NamedSharding(whole, P(None, *spec)))()
  exchange = program(whole, shape[1:], spec)
  here, count = jax.process_index(), jax.process_count()
  for start in range(0, shape[0], count):
    layers = start + (np.arange(count, dtype=np.int32) - first) % count  # of every host
    layer = None
    if layers[here] < shape[0]:
      layer = arrays.read(stored[int(layers[here])] if is_stacked else stored)
      layer = layer.astype(abstract.dtype)
    pieces = _pieces(whole, mesh, layer, shape[1:], spec, abstract.dtype)
    out = exchange(out, pieces, sources, layers)
  if not is_stacked:
    out = jax.jit(lambda x: x[0], out_shardings=NamedSharding(whole, spec))(out)
  return jax.make_array_from_single_device_arrays(
      abstract.shape, abstract.sharding, [s.data for s in out.addressable_shards])


def _senders(whole) -> int:
  """The devices of one host."""
  return whole.size // len({d.process_index for d in whole.devices.flat})


def _cut(block: tuple, senders: int) -> tuple[int, tuple]:
  """How a block is cut into a piece for every sender -> (dimension, shape of a piece).

  Along its largest dimension; the last piece is padded.
  """
  axis = block.index(max(block))
  return axis, (*block[:axis], -(-block[axis] // senders), *block[axis + 1:])


def _pieces(whole, mesh, layer, shape, spec, dtype):
  """-> [all devices, devices of a group, *piece], split over its first dimension.

  layer: what this host has read, [*shape]; None: nothing. It is cut into the blocks of the devices
  of the group, and these into pieces, so that every device of this host sends one to each.
  """
  places = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
  axis, piece = _cut(NamedSharding(mesh, spec).shard_shape(shape), len(places))
  cut = np.zeros((len(places), 1, mesh.size, *piece), dtype)
  if layer is not None:
    indices = NamedSharding(mesh, spec).devices_indices_map(shape)
    for place, device in enumerate(mesh.devices.flat):
      block = layer[indices[device]]
      for i, target in enumerate(cut[:, 0, place]):
        first = i * piece[axis]
        part = block[(slice(None),) * axis + (slice(first, first + piece[axis]),)]
        target[tuple(map(slice, part.shape))] = part
  return jax.make_array_from_single_device_arrays(
      (whole.size, mesh.size, *piece), NamedSharding(whole, P(whole.axis_names)),
      [jax.device_put(cut[i], mesh.devices.flat[place]) for i, place in enumerate(places)])


@functools.cache
def program(whole, shape: tuple, spec):
  """-> the jitted exchange of one layer of every host.

  It takes the result [layers, *shape], the pieces of `_pieces`, `_sources`, and the layer of every
  host; it returns the result with these layers. A number that is no layer is ignored.
  """
  axes = whole.axis_names[1:]
  senders = _senders(whole)
  block = NamedSharding(whole, spec).shard_shape(shape)
  axis, piece = _cut(block, senders)

  def local(out, pieces, sources, layers):
    own = jax.lax.all_to_all(pieces[0], axes, 0, 0, tiled=True)[sources[0]]
    own = jnp.moveaxis(own.reshape(-1, senders, *piece), 1, 1 + axis)  # [hosts, .., senders, ..]
    own = own.reshape(-1, *piece[:axis], senders * piece[axis], *piece[axis + 1:])
    own = jax.lax.slice_in_dim(own, 0, block[axis], axis=1 + axis)
    every = jax.lax.all_gather(own, GROUP, tiled=True)
    return out.at[layers].set(every, mode='drop')
  result = P(None, *spec)
  return jax.jit(jax.shard_map(local, mesh=whole, out_specs=result, check_vma=False,
                               in_specs=(result, P(whole.axis_names), P(GROUP), P())),
                 donate_argnums=0)
