"""The order of the chips of TPU slices: how long the hops of every group are, in links.

The links are a graph here, and distances come from a breadth-first search.
"""
import functools
import itertools
import types

import aot
from jax.experimental import mesh_utils
import numpy as np
import pytest

from srlm_jax import InputError, sharding, torus

CUBE, SQUARE = (True, True, True), (True, True, False)
# name: (device kind, chips along x, y, z, which of the three are rings)
SLICES = {
    'v5p-256': ('TPU v5', (4, 4, 8), CUBE), 'v4-256': ('TPU v4', (4, 4, 8), CUBE),
    'v5p-128': ('TPU v5p', (4, 4, 4), CUBE), 'v5p-64': ('TPU v5', (2, 4, 4), ()),
    'v5p-16': ('TPU v5', (2, 2, 2), ()), 'v5p-8': ('TPU v5', (2, 2, 1), ()),
    'v6e-256': ('TPU v6 lite', (16, 16, 1), SQUARE),
    'v5e-256': ('TPU v5 lite', (16, 16, 1), SQUARE),
    'v6e-128': ('TPU v6 lite', (8, 16, 1), (False, True, False)),
    'v6e-16': ('TPU v6 lite', (4, 4, 1), ()), 'v6e-8': ('TPU v6 lite', (2, 4, 1), ())}
MESHES = {  # data, fsdp, tensor
    'v5p-256': [(1, 16, 8), (1, 32, 4), (1, 64, 2), (1, 128, 1), (1, 8, 16), (2, 8, 8), (4, 4, 8)],
    'v4-256': [(1, 16, 8), (1, 32, 4), (2, 16, 4)],
    'v5p-128': [(1, 8, 8), (1, 16, 4), (1, 32, 2), (1, 64, 1), (2, 4, 8)],
    'v5p-64': [(1, 4, 8), (1, 8, 4), (1, 32, 1)],
    'v5p-16': [(1, 1, 8), (1, 2, 4), (8, 1, 1)], 'v5p-8': [(1, 4, 1), (1, 1, 4), (1, 2, 2)],
    'v6e-256': [(1, 32, 8), (1, 64, 4), (1, 128, 2), (1, 256, 1), (1, 16, 16), (2, 16, 8),
                (4, 8, 8)],
    'v5e-256': [(1, 32, 8), (1, 64, 4)], 'v6e-128': [(1, 16, 8), (1, 32, 4), (1, 128, 1)],
    'v6e-16': [(1, 2, 8), (1, 4, 4), (2, 2, 4), (1, 16, 1)],
    'v6e-8': [(1, 1, 8), (1, 2, 4), (1, 4, 2), (8, 1, 1)]}
CASES = [(name, mesh) for name, meshes in MESHES.items() for mesh in meshes]


class Device(types.SimpleNamespace):
  """What JAX tells of a TPU chip."""
  __hash__ = object.__hash__


def chips(kind, sides, slice_index=0):
  """The devices of a slice, in JAX's order: x first."""
  every = itertools.product(*map(range, sides[::-1]))
  return [Device(platform='tpu', device_kind=kind, coords=list(zyx[::-1]), core_on_chip=0, id=i,
                 slice_index=slice_index, process_index=i // 4) for i, zyx in enumerate(every)]


def links(sides, closed) -> dict[tuple, set]:
  """The chips that each chip has a link to."""
  found = {}
  for chip in itertools.product(*map(range, sides)):
    found[chip] = set()
    for side, step in itertools.product(range(3), (-1, 1)):
      to = list(chip)
      to[side] += step
      if closed and closed[side]:
        to[side] %= sides[side]
      if 0 <= to[side] < sides[side] and tuple(to) != chip:
        found[chip].add(tuple(to))
  return found


@functools.cache
def slice_graph(sides, closed):
  """-> the links of a slice, and {chip: {chip: number of links between them}}."""
  graph = links(sides, closed)
  apart = {}
  for start in graph:
    found, queue = {start: 0}, [start]
    for chip in queue:
      for to in graph[chip]:
        if to not in found:
          found[to] = found[chip] + 1
          queue.append(to)
    apart[start] = found
  return graph, apart


def whole_rings(group, graph, sides) -> bool:
  """Whether a group is a box of whole rings in the order of its coordinates.

  The TPU compiler runs its collectives along each side, so that all hops are 1 link long.
  """
  extents = [sorted({chip[side] for chip in group}) for side in range(3)]
  if list(itertools.product(*extents)) != group:
    return False
  for side, extent in enumerate(extents):
    if len(extent) == 1:
      continue
    ends = [tuple(c if i != side else n for i, c in enumerate(group[0]))
            for n in (0, sides[side] - 1)]
    if extent != list(range(sides[side])) or ends[1] not in graph[ends[0]]:
      return False
  return True


def longest(devices, axis, sides, closed) -> int:
  """The longest hop in the groups of one axis of a mesh."""
  graph, apart = slice_graph(sides, closed)
  found = 0
  for rest in np.ndindex(*np.delete(devices.shape, axis)):
    group = [tuple(devices[tuple(np.insert(rest, axis, i))].coords)
             for i in range(devices.shape[axis])]
    rings = whole_rings(group, graph, sides)
    found = max(found, 1 if rings else max(apart[a][b] for a, b in itertools.pairwise(
        [*group, group[0]])))
  return found


def impossible(mesh, sides, closed) -> bool:
  """Whether it is proved that some group has a hop of more than 1 link.

  Without one, the mesh as a product of rings is part of the graph of the links.
  """
  graph, apart = slice_graph(sides, closed)
  needed = sum(min(n - 1, 2) for n in mesh)
  degrees = {len(to) for to in graph.values()}
  if needed > min(degrees):
    return True
  if degrees == {needed}:  # then it is the whole graph
    return sum(n // 2 for n in mesh) != max(apart[0, 0, 0].values())
  if sorted(mesh)[:2] == [1, 2]:  # a ring of pairs, one of which has this chip
    origin = (0, 0, 0)
    return all(pairs_reached(graph, origin, b) < max(mesh) for b in graph[origin])
  return False


def pairs_reached(graph, a, b) -> int:
  """The number of linked pairs on the way from one pair, where both chips step by one link."""
  found, queue = {(a, b)}, [(a, b)]
  for a, b in queue:
    for pair in itertools.product(graph[a] - {b}, graph[b] - {a}):
      if pair[1] in graph[pair[0]] and pair not in found:
        found.add(pair)
        queue.append(pair)
  return len(found)


def check(devices, sides, closed):
  """The longest hop of the mesh is as short as possible: 1, or 2 where 1 is proved impossible."""
  found = max(longest(devices, axis, sides, closed) for axis in range(3))
  assert found == 1 or found == 2 and impossible(devices.shape, sides, closed), found


@pytest.mark.parametrize('name, mesh', CASES)
def test_no_hop_is_longer_than_needed(name, mesh):
  kind, sides, closed = SLICES[name]
  devices = chips(kind, sides)
  grid = sharding.make_mesh(*mesh, devices).devices
  assert grid.shape == mesh and sorted(d.id for d in grid.flat) == list(range(len(devices)))
  check(grid, sides, closed)


def test_on_v6e_256_the_hops_were_9_links_long():
  kind, sides, closed = SLICES['v6e-256']
  old = mesh_utils.create_device_mesh((1, 32, 8), chips(kind, sides),
                                      allow_split_physical_axes=True)
  assert [longest(old, axis, sides, closed) for axis in (1, 2)] == [9, 7]
  new = sharding.make_mesh(1, 32, 8, chips(kind, sides)).devices
  assert [longest(new, axis, sides, closed) for axis in (1, 2)] == [1, 2]


@pytest.mark.parametrize('name, mesh', [('v5p-256', (1, 16, 8)), ('v5p-256', (1, 128, 1)),
                                        ('v6e-256', (1, 256, 1)), ('v5p-8', (1, 4, 1))])
def test_groups_of_whole_rings_keep_the_order_that_the_compiler_recognizes(name, mesh):
  kind, sides, _ = SLICES[name]
  devices = chips(kind, sides)
  expected = mesh_utils.create_device_mesh(mesh, devices, allow_split_physical_axes=True)
  assert np.array_equal(sharding.make_mesh(*mesh, devices).devices, expected)


def test_every_process_has_the_same_order():
  kind, sides, _ = SLICES['v6e-256']
  devices = chips(kind, sides)
  mixed = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
  torus.best.cache_clear()
  first = torus.order((4, 8, 8), devices)
  torus.best.cache_clear()
  assert np.array_equal(first, torus.order((4, 8, 8), mixed))


@pytest.mark.parametrize('data, fsdp', [(2, 8), (4, 4)])
def test_each_slice_holds_a_part_of_the_data_axis(data, fsdp):
  kind, sides, closed = SLICES['v5p-128']
  devices = [d for n in (1, 0) for d in chips(kind, sides, n)]
  grid = sharding.make_mesh(data, fsdp, 8, devices).devices
  assert grid.shape == (data, fsdp, 8) and len(set(grid.flat)) == 128
  for n, part in enumerate(np.split(grid, 2)):
    assert {d.slice_index for d in part.flat} == {n}
    check(part, sides, closed)


def test_the_chips_of_one_host_need_not_lie_at_the_origin():
  devices = [d for d in chips('TPU v5', (4, 4, 8)) if d.coords[0] < 2 <= d.coords[1] < 4
             and d.coords[2] == 5]
  grid = sharding.make_mesh(1, 2, 2, devices).devices
  assert sorted(d.id for d in grid.flat) == sorted(d.id for d in devices)
  with pytest.raises(InputError, match='do not form a mesh'):
    sharding.make_mesh(1, 1, 3, devices[:3])


def test_kinds_without_known_links_are_left_to_jax():
  devices = chips('TPU v4 lite', (2, 2, 1))
  assert [d.id for d in sharding.make_mesh(1, 1, 4, devices).devices.flat] == [0, 1, 3, 2]


@pytest.mark.aot
def test_no_hop_is_longer_than_needed_in_the_topologies_of_libtpu():
  for program in aot.TRAINING:
    slices = {'2 x v5p-128': 2}.get(program.pod, 1)
    _, sides, closed = SLICES[program.pod.split()[-1]]
    grid = aot.make_mesh(program).devices
    assert grid.shape == program.mesh and len(set(grid.flat)) == grid.size
    for part in np.split(grid, slices):
      assert len({getattr(d, 'slice_index', 0) for d in part.flat}) == 1
      check(part, sides, closed)
