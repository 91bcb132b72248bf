"""Numbers of many records as tables without texts: numpy arrays of rows with named fields.

The field `id` has hashes of ids, 64 bits, which are the same only within a process. Where a table
is said to be distinct, every id has one row.
"""
from collections.abc import Iterable

import numpy as np


def table(rows: Iterable[tuple], *fields: str) -> np.ndarray:
  """Rows -> a table [rows] with the field `id` and `fields`; those named NAME_id are hashes too.

  >>> table([(hash('a'), 1), (hash('b'), 2)], 'score')['score'].tolist()
  [1.0, 2.0]
  """
  return np.fromiter(rows, np.dtype([
      ('id', np.int64), *((f, np.int64 if f.endswith('_id') else np.float64) for f in fields)]))


def distinct(found: np.ndarray) -> np.ndarray:
  """Keeps one row per id, at the place of its first one and with the numbers of its last one.

  >>> distinct(table([(1, 1), (2, 2), (1, 3)], 'score'))['score'].tolist()
  [3.0, 2.0]
  """
  _, first, row = np.unique(found['id'], return_index=True, return_inverse=True)
  if len(first) == len(found):
    return found
  last = np.empty_like(first)
  last[row] = np.arange(len(found))  # of equal indices, the last one counts
  return found[last[np.argsort(first)]]


def find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """The place of each wanted id in `ids`, which are distinct; -1 if it is absent."""
  if not len(ids):
    return np.full(len(wanted), -1)
  order = np.argsort(ids)
  place = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
  return np.where(ids[place] == wanted, place, -1)


def same(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two tables of distinct ids have the same ones."""
  return len(a) == len(b) and bool((find(a['id'], b['id']) >= 0).all())


def both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The rows of two distinct tables that have the same ids, in the order of a."""
  place = find(b['id'], a['id'])
  return a[place >= 0], b[place[place >= 0]]


def totals(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The sum and the number of the values of each id, in no stated order."""
  _, row = np.unique(ids, return_inverse=True)
  return np.bincount(row, values), np.bincount(row)


def groups(ids: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
  """The values of each id, in no stated order of the ids."""
  order = np.argsort(ids, kind='stable')
  return np.split(values[order], np.flatnonzero(np.diff(ids[order])) + 1)
