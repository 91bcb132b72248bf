"""Examples to batches of fixed shape: which examples, in which order, in which row, and who sees whom.

A row holds one example after the other, each as [prompt | response] or, of a pair, [prompt | chosen | rejected].
Responses are numbered within their row from 1, and a token's segment is the number of its response. The prompt of a
pair belongs to two: `segments` has the first of them and `shared` the second. See `models/packed.py` for the mask.
"""
import bisect
from collections import deque
from collections.abc import Iterator
import functools
import itertools
import math

import numpy as np

from srlm_jax import InputError
from srlm_jax.data.examples import Example

AHEAD = 32  # examples that fit into no row and wait for the next step, before a step is called full
NEAR = 0.97  # of `batch`, the examples that a packed step holds on average, at least
TRIAL = 50  # steps that say whether it does


class Batches:
  """The batches of a run: every example once a pass, each pass in an order of its own, passes chained without a gap.

  A step holds `batch` examples, packed on average; the last one what is left.
  """

  def __init__(self, examples: list[Example], batch: int, epochs: float, seed: int, width: int = 0, parts: int = 1,
               multiple: int = 16, shape: tuple[int, int] | None = None):
    """`width`: of a row that holds several examples, at most, or the longest example; 0: a row for every example.
    `parts`: rows are a multiple of it; `multiple`: a row's tokens are. `shape`: rows and their width, where a run that
    began with them goes on; InputError where they are no such multiples."""
    sizes = list(map(len, examples))
    longest = max(sizes)
    if not width:
      sizes = [_round_up(longest, multiple)] * len(sizes)
    total = max(1, round(epochs * len(examples)))
    fill = functools.partial(_fill, sizes, batch, total, seed)
    if shape:
      self.rows, self.width = shape
      if self.rows % parts or self.width % multiple:
        raise InputError(
            f'the run began with steps of {self.rows} rows of {self.width} tokens; here rows must divide by {parts}, '
            f'config.train.accumulate times data x fsdp of config.mesh, and tokens by {multiple}; choose another mesh')
    elif not width:
      self.rows, self.width = batch, sizes[0]
      if batch % parts:
        raise InputError(f'config.train.batch = {batch} rows do not divide by {parts}, config.train.accumulate times '
                         f'data x fsdp of config.mesh; choose a multiple, or move devices to config.mesh.tensor')
    else:
      self.rows, self.width = _shape(fill, sizes, min(batch, total), max(width, longest), parts, multiple)
    self.examples = examples
    self.reference = None  # {id of a pair: log-probs of both under DPO's reference}, where they are known
    self._steps = list(fill(self.width, self.rows))
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


def _shape(fill, sizes, batch: int, width: int, parts: int, multiple: int) -> tuple[int, int]:
  """As few rows, and then as narrow ones, as hold `batch` examples a step, by a trial of some steps."""
  def holds(rows, width):
    steps = [sum(map(len, step)) for step in itertools.islice(fill(width, rows), TRIAL)]
    whole = steps[:-1] or steps  # the last of all may hold less
    return sum(whole) >= NEAR * batch * len(whole)
  tokens, most = batch * sum(sizes) / len(sizes), _round_up(width, multiple)
  rows = next(n for n in itertools.count(_round_up(tokens / most, parts), parts) if holds(n, most))
  narrow = _round_up(max(max(sizes), tokens / rows), multiple)
  return rows, next(n for n in range(narrow, most + 1, multiple) if holds(rows, n))


def _fill(sizes, batch: int, total: int, seed: int, width: int, rows: int) -> Iterator[list[list[int]]]:
  """Puts `total` examples, pass after pass, into the rows of step after step, each into the fullest row that has room;
  what has no room begins the next step. After k steps there are at most k times `batch`."""
  passes = (np.random.default_rng((seed, epoch)).permutation(len(sizes)) for epoch in itertools.count())
  order = itertools.islice((int(i) for order in passes for i in order), total)
  waiting, limit = deque(), 0
  while True:
    step = [[] for _ in range(rows)]
    free = [(width, row) for row in range(rows)]  # sorted
    skipped, placed = [], 0
    limit += batch
    while len(skipped) < AHEAD and placed < limit:
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
    limit -= placed
    yield step


def _round_up(value: float, multiple: int) -> int:
  return math.ceil(value / multiple) * multiple
