"""The order of the chips of a TPU slice in a mesh.

A collective that runs as one ring sends from chip i of a group to chip i + 1, and from the last one
to the first. The length of such a hop is the number of links between the two chips. For fsdp=32,
tensor=8 on a torus of 16 x 16, jax's mesh_utils has hops of 9 links; here the longest has 2.
"""
import functools
import itertools
import math

import numpy as np

# Kinds of devices. Slices of the first ones are boxes of cubes of 4 x 4 x 4 chips, linked at their
# ends by optical switches; those of the others have links between the ends of sides of 16 chips.
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
  """The devices of one slice -> the same devices as an array of `shape`, the sizes of the mesh.

  Of the orders that `candidates` yields, the one whose longest hop is shortest; among these, the
  one with the smallest sum of the times of its axes (see `walk`), then the smallest time of the
  last axis. It depends on the coordinates of the devices alone, so it is the same on every process.
  ValueError unless the devices are a whole slice or a box in one.
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
  """-> the coordinates [*shape, len(sides)] of the chips in the best order; see `order`.

  `sides`: chips along each side of the slice; `closed`: for each side, whether it is a ring.
  """
  def key(candidate):
    longest, times = zip(*(value for value, _ in candidate[1]), strict=True)
    return max(longest), sum(times), times[::-1]
  grids, axes = min(candidates(shape, sides, closed), key=key)
  # Along each side, an axis of the mesh has one digit of the coordinate.
  digits = [np.meshgrid(*(way[:, side] for _, way in axes), indexing='ij')
            for side in range(len(sides))]
  return np.stack([grid[tuple(d)] for grid, d in zip(grids, digits, strict=True)], axis=-1)


def candidates(shape, sides, closed):
  """Yields (grids, [(cost, digits) of each axis]) for every way to divide the sides among the axes.

  `grids`: for each side the coordinate, indexed by the digits of all axes; digits: see `walk`.
  """
  walked = functools.cache(functools.partial(walk, sides=sides, closed=closed))
  for parts in divisions(shape, sides):
    for grids in itertools.product(*map(nestings, parts, closed)):
      yield grids, [walked(tuple(steps(grid, axis) for grid in grids))
                    for axis in range(len(shape))]


def divisions(shape, sides):
  """Yields the parts of every side, one for each axis; over the sides, they multiply to `shape`.

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
  """Yields arrays of shape `parts`: the coordinate along one side, indexed by the axes' digits.

  One array for each order of the axes, from the largest steps to steps of 1.
  """
  used = [axis for axis, n in enumerate(parts) if n > 1]
  if closed and math.prod(parts) == 4 and len(used) == 2:
    yield np.array([0, 1, 3, 2]).reshape(parts)  # a ring of 4 is a 2 x 2 square
    return
  for nest in itertools.permutations(used):
    grid = np.arange(math.prod(parts)).reshape([parts[axis] for axis in nest])
    yield grid.transpose(np.argsort(nest).astype(int)).reshape(parts)


def steps(grid, axis: int) -> tuple[int, ...]:
  """-> the coordinates for the digits of one axis; those of the others are 0, and only shift it."""
  return tuple(int(n) for n in np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0])


def walk(places, sides, closed):
  """The coordinates of an axis along each side -> ((longest hop, time), digits [size, sides]).

  A group of whole rings stays in the order of its coordinates: the TPU compiler then runs its
  collectives along all of its sides at once, by hops of 1 link, and falls back to a single ring for
  other orders (libtpu 0.0.42.1). All other groups are one ring. Time: the mean hop, divided by the
  number of sides in use at once.
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
