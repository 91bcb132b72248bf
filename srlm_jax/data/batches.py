"""Examples to batches of fixed shape: which examples, in which order, in which row, and who sees whom.

A row holds one example after the other, each as [prompt | response] or, of a pair, [prompt | chosen | rejected].
Responses are numbered within their row from 1, and a token's segment is the number of its response. The prompt of a
pair belongs to two: `segments` has the first of them and `shared` the second. See `models/packed.py` for the mask.
"""
import bisect
from collections import deque
from collections.abc import Iterator
import itertools
import math

import numpy as np

from srlm_jax import InputError
from srlm_jax.data.examples import Example

AHEAD = 32  # examples that fit into no row and wait for the next step, before a step is called full
FULL = 0.96  # of a step's places hold a token, about, where rows are packed


class Batches:
  """The batches of a run: every example once a pass, each pass in an order of its own, passes chained without a gap.

  Packed, a step holds `batch` examples on average, or at most, where the longest example or the mesh ask for larger
  steps; else a row for each.
  """

  def __init__(self, examples: list[Example], batch: int, epochs: float, seed: int, width: int = 0, parts: int = 1,
               multiple: int = 16):
    """`width`: of a row that holds several examples, at most, or the longest example; 0: a row for every example.
    `parts`: rows are a multiple of it; `multiple`: a row's tokens are."""
    sizes = list(map(len, examples))
    if width:
      tokens = batch * sum(sizes) / len(sizes) / FULL
      self.rows = _round_up(tokens / max(width, *sizes), parts)
      self.width = _round_up(max(*sizes, tokens / self.rows), multiple)
      limit = batch if self.rows * self.width > 1.25 * tokens else None
    else:
      self.rows, self.width, limit = batch, _round_up(max(sizes), multiple), None
      sizes = [self.width] * len(sizes)
      if batch % parts:
        raise InputError(f'config.train.batch = {batch} rows do not divide by {parts}, config.train.accumulate times '
                         f'data x fsdp of config.mesh; choose a multiple, or move devices to config.mesh.tensor')
    self.examples = examples
    self.reference = None  # {id of a pair: log-probs of both under DPO's reference}, where they are known
    order = _order(len(examples), max(1, round(epochs * len(examples) / batch)) * batch, seed)
    self._steps = list(_fill(order, sizes, self.width, self.rows, limit))
    rows = [[examples[i] for i in row] for step in self._steps for row in step]
    self.seen = sum(map(len, rows))  # examples, of all steps
    self.real = sum(len(e) for row in rows for e in row) / (len(rows) * self.width)  # of the places: a token is there
    self._responses = max(sum(len(e.responses) for e in row) for row in rows)
    self._targets = _round_up(max(sum(len(r) for e in row for r in e.responses) for row in rows), 16)

  def __len__(self):
    """Steps."""
    return len(self._steps)

  def ids(self, step: int) -> list[list[str]]:
    """Of the examples of each row."""
    return [[self.examples[i].id for i in row] for row in self._steps[step]]

  def at(self, step: int) -> dict[str, np.ndarray]:
    """The batch of one step; absent examples, responses and tokens are 0 (`response`: -1).

    tokens, positions, segments and, of pairs, shared [B, T]. Of the R tokens that the loss counts [B, R]: `at`, the
    place of the token that predicts one, `label`, the token, and `response`, whose it is (0, 1, .. within the row). Of
    pairs [B, P]: `pair`, whether there is one, its `confidence`, and `reference` [B, P, 2], where it is known.
    """
    B, T, R, P = self.rows, self.width, self._targets, self._responses // 2
    of_pairs = len(self.examples[0].responses) == 2
    batch = {name: np.zeros((B, T), np.int32) for name in ('tokens', 'positions', 'segments', *['shared'] * of_pairs)}
    batch |= {name: np.full((B, R), fill, np.int32) for name, fill in (('at', 0), ('label', 0), ('response', -1))}
    if of_pairs:
      batch |= dict(pair=np.zeros((B, P), np.int32), confidence=np.zeros((B, P), np.float32))
    if self.reference:
      batch |= dict(reference=np.zeros((B, P, 2), np.float32))
    for b, row in enumerate(self._steps[step]):
      examples = [self.examples[i] for i in row]
      values = dict(layout(examples), pair=[1] * len(row), confidence=[e.confidence for e in examples])
      if self.reference:
        values['reference'] = [self.reference[e.id] for e in examples]
      for name in batch:
        if values[name]:  # else the row is empty
          batch[name][b, :len(values[name])] = values[name]
    return batch


def layout(examples: list[Example]) -> dict[str, list[int]]:
  """One row, without its padding: `Batches.at` says of what."""
  row = {name: [] for name in ('tokens', 'positions', 'segments', 'shared', 'at', 'label', 'response')}
  number = 0
  for example in examples:
    first, size = len(row['tokens']), len(example.prompt)
    _append(row, example.prompt, 0, number + 1, number + 2 if len(example.responses) == 2 else 0)
    for response in example.responses:
      number += 1
      start = len(row['tokens'])
      _append(row, response, size, number, 0)
      row['at'] += [first + size - 1, *range(start, start + len(response) - 1)]
      row['label'] += response
      row['response'] += [number - 1] * len(response)
  return row


def _append(row, tokens, position: int, segment: int, shared: int):
  row['tokens'] += tokens
  row['positions'] += range(position, position + len(tokens))
  row['segments'] += [segment] * len(tokens)
  row['shared'] += [shared] * len(tokens)


def _order(count: int, wanted: int, seed: int) -> Iterator[int]:
  """Indices of the examples of all passes."""
  passes = (np.random.default_rng((seed, epoch)).permutation(count) for epoch in itertools.count())
  return itertools.islice((int(i) for order in passes for i in order), wanted)


def _fill(order: Iterator[int], sizes, width: int, rows: int, limit: int | None) -> Iterator[list[list[int]]]:
  """Puts examples, in order, into the rows of step after step, at most `limit` a step, each into the fullest row that
  has room; what has no room begins the next step."""
  waiting = deque()
  while True:
    step = [[] for _ in range(rows)]
    free = [(width, row) for row in range(rows)]  # sorted
    skipped, placed = [], 0
    while len(skipped) < AHEAD and placed != limit:
      index = waiting.popleft() if waiting else next(order, None)
      if index is None:
        break
      at = bisect.bisect_left(free, (sizes[index], 0))
      if at == len(free):
        skipped.append(index)
        continue
      space, row = free.pop(at)
      bisect.insort(free, (space - sizes[index], row))
      step[row].append(index)
      placed += 1
    waiting.extendleft(reversed(skipped))
    if not placed:
      return
    yield step


def _round_up(value: float, multiple: int) -> int:
  return math.ceil(value / multiple) * multiple
