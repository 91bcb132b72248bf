"""Packs examples into rows of fixed width: which examples, in which order, in which row.

A row holds examples one after the other, each as [prompt | response] or, of a pair,
[prompt | chosen | rejected]. Responses are numbered within their row from 1, and the number of a
token's response is its segment. The prompt of a pair belongs to two segments: `segment_ids` holds
the first and `second_segment` the second. `models/attention.py` makes the mask from them, and
`train/batch.py` makes padded batches.
"""
import bisect
from collections import deque
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math

import numpy as np

from srlm_jax import InputError
from srlm_jax.data.examples import Example

LOOKAHEAD = 32    # examples that fit into no row before a step counts as full; they come next
MIN_FILL = 0.97   # a packed step holds on average at least this fraction of `batch`
TRIAL_STEPS = 50  # steps that estimate this average
TARGETS = 16      # the number of targets per row is a multiple of it


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of every batch of a run."""
  rows: int     # B
  width: int    # T, tokens per row
  targets: int  # N, targets per row
  pairs: int    # M, pairs per row; 0 for examples of one response


@dataclasses.dataclass(frozen=True)
class Row:
  """One packed row without padding: int32 arrays [tokens of the row] and [targets of the row]."""
  tokens: np.ndarray
  positions: np.ndarray         # within the example; chosen and rejected both continue the prompt
  segment_ids: np.ndarray       # the response that a token belongs to, from 1
  second_segment: np.ndarray    # the second response that a pair's prompt belongs to; else 0
  target_positions: np.ndarray  # where in the row the token is that predicts a target
  targets: np.ndarray           # the tokens that the loss counts: those of the responses
  response_ids: np.ndarray      # the response that a target belongs to, from 0


class Packing:
  """The packed rows of a run. Every epoch contains every example once, in its own random order.

  Epochs follow each other without a gap. A step holds `batch` examples: with packing on average,
  without packing exactly; the last step holds the remainder.
  """

  def __init__(self, examples: Sequence[Example], batch: int, epochs: float, seed: int,
               width: int = 0, parts: int = 1, multiple: int = 16,
               rows_and_width: tuple[int, int] | None = None):
    """`width`: maximum row width (at least the longest example); 0 disables packing.

    The number of rows is a multiple of `parts` and the width of `multiple`. `rows_and_width`: those
    of `fixed`, or of a run that is resumed; InputError if they are not such multiples.
    """
    lengths = list(map(len, examples))
    longest = max(lengths)
    if not width:
      lengths = [_round_up(longest, multiple)] * len(lengths)
    total = _total(examples, epochs)
    pack = functools.partial(_pack, lengths, batch, total, seed)
    if rows_and_width:
      rows, width = rows_and_width
      refuse_rows(rows, parts)
      if width % multiple:
        raise InputError(
            f'the run began with rows of {width} tokens; here they must be a multiple of '
            f'{multiple}; continue on the kind of device on which it began')
    elif not width:
      rows, width = batch, lengths[0]
      if batch % parts:
        raise InputError(
            f'config.train.batch = {batch} is not a multiple of {parts}, config.train.accumulate '
            f'times data x fsdp of config.mesh; choose a multiple, or move devices to '
            f'config.mesh.tensor')
    else:
      rows = _fewest(pack, lengths, min(batch, total), max(width, longest), parts, multiple)
      width = _narrowest(pack, lengths, min(batch, total), max(width, longest), rows, multiple)
    self.all = examples
    self._steps = list(pack(width, rows))
    packed = [row for step in self._steps for row in step]
    self.count = sum(map(len, packed))  # examples of all steps
    # [examples, 3]: tokens, those of them that are targets, responses
    sizes = np.array([(len(e), sum(map(len, e.responses)), len(e.responses)) for e in examples])
    tokens, targets, responses = np.array([sizes[row].sum(0) for row in packed], int).T
    self.padding_free = int(tokens.sum()) / (len(packed) * width)  # fraction of the tokens
    self.shape = Shape(rows, width, _round_up(int(targets.max()), TARGETS),
                       int(responses.max()) // 2)

  def __len__(self):
    """The number of steps."""
    return len(self._steps)

  def rows(self, step: int) -> list[list[Example]]:
    """The examples of each row of a step; a row may be empty."""
    return [[self.all[i] for i in row] for row in self._steps[step]]

  def ids(self, step: int) -> list[list[str]]:
    """The ids of the examples of each row of a step."""
    return [[e.id for e in row] for row in self.rows(step)]


def layout(examples: Sequence[Example]) -> Row:
  """The examples of one row -> the row."""
  row = {field.name: [] for field in dataclasses.fields(Row)}

  def add(tokens, position, segment, second):
    row['tokens'] += tokens
    row['positions'] += range(position, position + len(tokens))
    row['segment_ids'] += [segment] * len(tokens)
    row['second_segment'] += [second] * len(tokens)

  segment = 0
  for example in examples:
    last = len(row['tokens']) + len(example.prompt) - 1  # of the prompt, in the row
    is_pair = len(example.responses) == 2
    add(example.prompt, 0, segment + 1, segment + 2 if is_pair else 0)
    for response in example.responses:
      segment += 1
      start = len(row['tokens'])
      add(response, len(example.prompt), segment, 0)
      row['target_positions'] += [last, *range(start, start + len(response) - 1)][:len(response)]
      row['targets'] += response
      row['response_ids'] += [segment - 1] * len(response)
  return Row(**{name: np.asarray(values, np.int32) for name, values in row.items()})


def fixed(rows: int, examples: Sequence[Example], batch: int, epochs: float, seed: int, width: int,
          multiple: int) -> tuple[int, int]:
  """-> `rows` and the smallest width with which they hold `batch` examples per step on average.

  The width depends on no mesh. It is at most `width` or the longest example; InputError if rows of
  that width hold fewer.
  """
  lengths, total = list(map(len, examples)), _total(examples, epochs)
  pack, count = functools.partial(_pack, lengths, batch, total, seed), min(batch, total)
  widest = _round_up(max(width, *lengths), multiple)
  if not _holds(pack, count, rows, widest):
    least = _fewest(pack, lengths, count, widest, 1, multiple)
    raise InputError(f'config.train.rows is {rows}, and so many rows of at most {widest} tokens '
                     f'hold fewer examples per step than config.train.batch = {batch}; {least} '
                     f'rows hold them')
  return rows, _narrowest(pack, lengths, count, widest, rows, multiple)


def refuse_rows(rows: int, parts: int):
  """InputError if the rows of a step do not divide over the shards and micro-batches of a mesh."""
  if rows % parts:
    raise InputError(
        f'every step has {rows} rows (config.train.rows, or rows.json of a run that is resumed); '
        f'here rows must be a multiple of {parts}, config.train.accumulate times data x fsdp of '
        f'config.mesh; choose another mesh, or for a new run other rows')


def _total(examples: Sequence[Example], epochs: float) -> int:
  return max(1, round(epochs * len(examples)))


def _fewest(pack, lengths, batch: int, width: int, parts: int, multiple: int) -> int:
  """The fewest rows, a multiple of `parts`, that hold `batch` examples per step on average."""
  tokens, widest = batch * sum(lengths) / len(lengths), _round_up(width, multiple)
  return next(n for n in itertools.count(_round_up(tokens / widest, parts), parts)
              if _holds(pack, batch, n, widest))


def _narrowest(pack, lengths, batch: int, width: int, rows: int, multiple: int) -> int:
  """The smallest width with which `rows` hold `batch` examples per step on average."""
  tokens = batch * sum(lengths) / len(lengths)
  least = _round_up(max(max(lengths), tokens / rows), multiple)
  return next(n for n in range(least, _round_up(width, multiple) + 1, multiple)
              if _holds(pack, batch, rows, n))


def _holds(pack, batch: int, rows: int, width: int) -> bool:
  """Whether the first TRIAL_STEPS steps hold `batch` examples on average."""
  counts = [sum(map(len, step)) for step in itertools.islice(pack(width, rows), TRIAL_STEPS)]
  full = counts[:-1] or counts  # the last step of a run may hold fewer
  return sum(full) >= MIN_FILL * batch * len(full)


def _pack(lengths, batch: int, total: int, seed: int, width: int,
          rows: int) -> Iterator[list[list[int]]]:
  """Best-fit packing: yields the indices of the examples in each row, step by step.

  Takes `total` examples, epoch after epoch, and puts each into the fullest row with room for it.
  Examples that fit into no row begin the next step. k steps hold at most k times `batch` examples.
  """
  epochs = (np.random.default_rng((seed, epoch)).permutation(len(lengths))
            for epoch in itertools.count())
  order = itertools.islice((int(i) for epoch in epochs for i in epoch), total)
  waiting, limit = deque(), 0
  while True:
    step = [[] for _ in range(rows)]
    free = [(width, row) for row in range(rows)]  # sorted by free tokens
    skipped, placed = [], 0
    limit += batch
    while len(skipped) < LOOKAHEAD and placed < limit:
      index = waiting.popleft() if waiting else next(order, None)
      if index is None:
        break
      best = bisect.bisect_left(free, (lengths[index], 0))
      if best == len(free):
        skipped.append(index)
        continue
      space, row = free.pop(best)
      bisect.insort(free, (space - lengths[index], row))
      step[row].append(index)
      placed += 1
    waiting.extendleft(reversed(skipped))
    if not placed:
      return
    limit -= placed
    yield step


def _round_up(value: float, multiple: int) -> int:
  return math.ceil(value / multiple) * multiple
