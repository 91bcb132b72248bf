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
  order = sharding.put(_sources(whole), NamedSharding(whole, P(GROUP)))
  found, first = {}, 0
  # The largest array takes the most memory besides its own: it comes while memory is empty.
  for name in sorted(abstract, key=lambda name: (-math.prod(abstract[name].shape), name)):
    is_stacked = name.startswith('layers.')
    with jax.set_mesh(whole):
      found[name] = _one(whole, mesh, order, stored[name], abstract[name], is_stacked, first)
    first += abstract[name].shape[0] if is_stacked else 1  # the next host is the next to read
  return found


def all_groups(mesh) -> Mesh:
  """The meshes of all groups as one mesh, with `GROUP` as the first axis."""
  ids = hosts.gather([d.id for d in mesh.devices.flat])
  groups = [ids[0], *(there for here, there in itertools.pairwise(ids) if here != there)]
  devices = {d.id: d for d in jax.devices()}
  grid = np.array([devices[i] for group in groups for i in group])
  return _with_groups(grid.reshape(len(groups), *mesh.devices.shape), mesh.axis_names)


def _with_groups(grid, axes) -> Mesh:
  return Mesh(grid, (GROUP, *axes), axis_types=(AxisType.Auto,) * grid.ndim)


def _sources(whole) -> np.ndarray:
  """-> [groups, devices of a group]: the places of a group's devices, sorted by host."""
  groups = whole.devices.reshape(len(whole.devices), -1)
  return np.array([sorted(range(len(group)), key=lambda place: (group[place].process_index, place))
                   for group in groups], np.int32)


def _one(whole, mesh, order, stored, abstract, is_stacked: bool, first: int):
  """One array of the result; `first`: the host that reads its first layer."""
  shape = abstract.shape if is_stacked else (1, *abstract.shape)
  spec = abstract.sharding.spec[1:] if is_stacked else abstract.sharding.spec
  out = jax.jit(functools.partial(jnp.zeros, shape, abstract.dtype),
                out_shardings=NamedSharding(whole, P(None, *spec)))()
  exchange = program(whole, shape[1:], P(*spec))
  here, count = jax.process_index(), jax.process_count()
  for start in range(0, shape[0], count):
    layers = start + (np.arange(count, dtype=np.int32) - first) % count  # of every host
    layer = None
    if layers[here] < shape[0]:
      layer = arrays.read(stored[int(layers[here])] if is_stacked else stored)
      layer = layer.astype(abstract.dtype)
    out = exchange(out, _pieces(whole, mesh, layer, shape[1:], P(*spec), abstract.dtype), order,
                   layers)
  if not is_stacked:
    out = jax.jit(lambda x: x[0], out_shardings=NamedSharding(whole, P(*spec)))(out)
  return jax.make_array_from_single_device_arrays(
      abstract.shape, abstract.sharding, [s.data for s in out.addressable_shards])


def _pieces(whole, mesh, layer, shape, spec, dtype):
  """-> [all devices, devices of a group, piece], split over its first dimension.

  layer: what this host has read, [*shape]; None: nothing. It is cut into what each device of the
  group gets, and that into equal pieces, so that every device of this host sends one to each.
  """
  places = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
  block = math.prod(NamedSharding(mesh, spec).shard_shape(shape))
  size = -(-block // len(places))
  cut = np.zeros((mesh.size, len(places) * size), dtype)
  if layer is not None:
    indices = NamedSharding(mesh, spec).devices_indices_map(shape)
    for row, device in zip(cut, mesh.devices.flat, strict=True):
      row[:block] = layer[indices[device]].ravel()
  cut = cut.reshape(1, mesh.size, len(places), size)
  return jax.make_array_from_single_device_arrays(
      (whole.size, mesh.size, size), NamedSharding(whole, P(whole.axis_names)),
      [jax.device_put(cut[:, :, i], mesh.devices.flat[place]) for i, place in enumerate(places)])


@functools.cache
def program(whole, shape: tuple, spec):
  """-> the jitted exchange of one layer of every host.

  It takes the result [layers, *shape], the pieces of `_pieces`, `_sources`, and the layer of every
  host; it returns the result with these layers. A number that is no layer is ignored.
  """
  axes = whole.axis_names[1:]
  group_hosts = len({d.process_index for d in whole.devices[0].flat})
  block = NamedSharding(whole, spec).shard_shape(shape)

  def local(out, pieces, order, layers):
    own = jax.lax.all_to_all(pieces[0], axes, 0, 0, tiled=True)[order[0]]
    own = own.reshape(group_hosts, -1)[:, :math.prod(block)]
    every = jax.lax.all_gather(own, GROUP, tiled=True).reshape(-1, *block)
    return out.at[layers].set(every, mode='drop')
  result = P(None, *spec)
  return jax.jit(jax.shard_map(local, mesh=whole, out_specs=result, check_vma=False,
                               in_specs=(result, P(whole.axis_names), P(GROUP), P())),
                 donate_argnums=0)
