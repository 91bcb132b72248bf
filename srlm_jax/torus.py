"""The order of the chips of a TPU slice in a mesh.

Where a collective runs as one ring, chip i of a group sends to chip i + 1 and the last one to the
first. A hop is as long as the number of links between the two. The best order of mesh_utils that
fits fsdp=32, tensor=8 on a torus of 16 x 16 has hops of 9 links; the order chosen here has none of
more than 2.
"""
import functools
import itertools
import math

import numpy as np

# Kinds whose devices are whole chips on a grid of links. The first ones are made of cubes of 4 x 4
# x 4 chips, which optical switches close to rings; the others close an axis of 16 chips only.
CUBES = ('TPU v4', 'TPU v5', 'TPU v5p')
SQUARES = ('TPU v5 lite', 'TPU v5e', 'TPU v6 lite', 'TPU v6e')


def known(devices) -> bool:
  """-> whether `order` knows the links between these devices: whole chips of the kinds above."""
  return devices[0].device_kind in (*CUBES, *SQUARES) and not any(d.core_on_chip for d in devices)


def rings(kind: str, sides: tuple[int, ...]) -> tuple[bool, ...]:
  """-> for each side of a whole slice, whether its ends are linked; two chips are a ring as well.

  >>> rings('TPU v5', (4, 4, 8)), rings('TPU v5', (2, 4, 4)), rings('TPU v6 lite', (8, 16, 1))
  ((True, True, True), (True, False, False), (False, True, True))
  """
  cubes = kind in CUBES and all(side % 4 == 0 for side in sides)
  return tuple(side <= 2 or cubes or (kind in SQUARES and side == 16) for side in sides)


def order(shape, devices) -> np.ndarray:
  """The devices of one slice -> the same as an array of `shape`, by increasing traffic of an axis.

  Of the orders that `candidates` yields, the one with the shortest longest hop; among these, with
  the least time by `cost`, summed over the axes. The same on every process. The devices are a
  whole slice, or a box in one; ValueError otherwise.
  """
  at = {tuple(d.coords): d for d in devices}
  low, high = np.min(list(at), axis=0), np.max(list(at), axis=0)
  sides = tuple(int(n) for n in high - low + 1)
  if not len(at) == len(devices) == math.prod(sides) == math.prod(shape):
    raise ValueError(f'{len(devices)} TPU devices in a box of {sides} chips do not form a mesh of '
                     f'{tuple(shape)}')
  places = low + best(tuple(shape), sides, rings(devices[0].device_kind, sides))
  grid = np.empty(tuple(shape), object)
  for index in np.ndindex(*shape):
    grid[index] = at[tuple(int(n) for n in places[index])]
  return grid


@functools.cache
def best(shape: tuple[int, ...], sides: tuple[int, ...], closed: tuple[bool, ...]) -> np.ndarray:
  """-> the coordinates [*shape, len(sides)] of the chips in the order that `order` describes."""
  def key(candidate):
    longest, times = zip(*(value for value, _ in candidate[1]), strict=True)
    return max(longest), sum(times), times[::-1]
  grids, axes = min(candidates(shape, sides, closed), key=key)
  # Chip `index` is on walk[index[axis]] of each axis: one digit per axis and side.
  digits = [np.meshgrid(*(walk[:, side] for _, walk in axes), indexing='ij')
            for side in range(len(sides))]
  return np.stack([grid[tuple(d)] for grid, d in zip(grids, digits, strict=True)], axis=-1)


def candidates(shape, sides, closed):
  """Yields (coordinates along each side by digits, (cost, walk) of each axis of the mesh).

  Each side of the slice is divided among the axes, one within the other; the part of an axis on
  all sides is a box, through which it takes its best walk.
  """
  walked = functools.cache(functools.partial(walk, sides=sides, closed=closed))
  for parts in divisions(shape, sides):
    for grids in itertools.product(*map(nestings, parts, closed)):
      yield grids, [walked(tuple(steps(grid, axis) for grid in grids))
                    for axis in range(len(shape))]


def divisions(shape, sides):
  """Yields for each side the tuple of its parts, one for each axis; products are the sizes.

  >>> list(divisions((2, 4), (4, 2)))
  [((1, 4), (2, 1)), ((2, 2), (1, 2))]
  """
  if not sides:
    if set(shape) <= {1}:
      yield ()
    return
  options = [[n for n in range(1, size + 1) if size % n == 0] for size in shape]
  for parts in itertools.product(*options):
    if math.prod(parts) == sides[0]:
      left = [size // n for size, n in zip(shape, parts, strict=True)]
      yield from ((parts, *rest) for rest in divisions(left, sides[1:]))


def nestings(parts, closed: bool):
  """Yields arrays of shape `parts` with the coordinates along one side, one for each nesting."""
  used = [axis for axis, n in enumerate(parts) if n > 1]
  if closed and math.prod(parts) == 4 and len(used) == 2:
    yield np.array([0, 1, 3, 2]).reshape(parts)  # a ring of 4 is a square: all steps are links
    return
  for nest in itertools.permutations(used):
    grid = np.arange(math.prod(parts)).reshape([parts[axis] for axis in nest])
    yield grid.transpose(np.argsort(nest).astype(int)).reshape(parts)


def steps(grid, axis: int) -> tuple[int, ...]:
  """-> the coordinates on which an axis of the mesh lies; the other ones only move them."""
  return tuple(int(n) for n in np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0])


def walk(places, sides, closed):
  """The coordinates of one axis of the mesh along each side -> (cost, digits [size, sides]).

  A group of whole rings stays in the order of its coordinates: then the TPU compiler runs a
  collective along all of its sides at once, and all hops are 1 link long (seen with libtpu
  0.0.42.1). Other groups are one ring.
  """
  counts = [len(p) for p in places]
  used = [side for side, n in enumerate(counts) if n > 1]
  whole = all(closed[side] and counts[side] == sides[side] for side in used)
  if whole and used:
    digits = np.indices(counts).reshape(len(counts), -1).T
    return (1, 1 / len(used)), digits
  def measured(digits):
    points = np.stack([np.array(p)[d] for p, d in zip(places, digits.T, strict=True)], axis=1)
    length = hops(points, np.roll(points, -1, axis=0), sides, closed)
    return (int(length.max()), float(length.mean())), digits
  found = []
  for turn in itertools.permutations(used):
    for way in closed_walks([counts[side] for side in turn]):
      digits = np.zeros((len(way), len(counts)), int)
      digits[:, turn] = way
      found.append(measured(digits))
  return min(found, key=lambda item: item[0])


def hops(here, there, sides, closed):
  """Coordinates [..., sides] of two chips -> the number of links between them [...]."""
  apart = abs(here - there)
  return np.where(closed, np.minimum(apart, np.array(sides) - apart), apart).sum(-1)


def closed_walks(counts):
  """Yields walks [size, len(counts)] through all points of a box that try to end at their start."""
  path = back_and_forth(counts)
  yield path
  yield np.concatenate([path[::2], path[1::2][::-1]])  # every other point, then the rest back
  if len(counts) > 1:  # leaves a lane free for the way back
    others = back_and_forth(counts[1:])
    lanes = back_and_forth([len(others), counts[0] - 1])
    forth = np.column_stack([lanes[:, 1] + 1, others[lanes[:, 0]]])
    back = np.column_stack([np.zeros(len(others), int), others[::-1]])
    yield np.concatenate([forth, back])


def back_and_forth(counts):
  """A walk through all points of a box in steps of 1, the last side first.

  >>> back_and_forth([2, 2]).tolist()
  [[0, 0], [0, 1], [1, 1], [1, 0]]
  """
  path = np.zeros((1, 0), int)
  for n in reversed(counts):
    path = np.concatenate([np.insert(path[::-1] if i % 2 else path, 0, i, axis=1)
                           for i in range(n)])
  return path
