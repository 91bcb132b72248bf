"""The batches that the training step takes. `train/objectives.py` selects their type.

  Batch            single responses
  PairBatch        pairs; the step computes the reference's log-probs
  CachedPairBatch  pairs with the reference's log-probs, computed once before training

Rows are packed (`data/packing.py`). Padding is 0 unless stated otherwise.
"""
from collections.abc import Iterable, Mapping, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.data import packing
from srlm_jax.data.examples import Example
from srlm_jax.models.attention import PairSegments, Segments


@flax.struct.dataclass
class Batch:
  """Packed rows of single responses, and what the loss counts in them."""
  tokens: jax.Array            # [B, T]
  positions: jax.Array         # [B, T] within the example
  segment_ids: jax.Array       # [B, T] the response that a token belongs to, from 1; 0 = padding
  target_positions: jax.Array  # [B, N] the position in the row that predicts a target
  targets: jax.Array           # [B, N] the tokens of the responses
  response_ids: jax.Array      # [B, N] the response that a target belongs to, from 0; -1 = padding

  def segments(self) -> Segments:
    """What a token attends to."""
    return Segments(self.segment_ids, self.positions)

  def weight(self):
    """-> [], the number of targets; the loss is their mean."""
    return (self.response_ids >= 0).sum().astype(jnp.float32)


@flax.struct.dataclass
class PairBatch(Batch):
  """Packed rows of pairs; pair m of a row has the responses 2 m (chosen) and 2 m + 1 (rejected)."""
  second_segment: jax.Array  # [B, T] the second response that a pair's prompt belongs to; else 0
  pair_mask: jax.Array       # [B, M] 1 where there is a pair
  soft_labels: jax.Array     # [B, M] float32, the probability that chosen is better

  def segments(self) -> PairSegments:
    """What a token attends to."""
    return PairSegments(self.segment_ids, self.positions, self.second_segment)

  def weight(self):
    """-> [], the number of pairs; the loss is their mean."""
    return self.pair_mask.sum().astype(jnp.float32)


@flax.struct.dataclass
class CachedPairBatch(PairBatch):
  """Packed rows of pairs with the log-probs of DPO's reference."""
  reference_logps: jax.Array  # [B, M, 2] float32, of chosen and rejected, sums over their tokens


def pack(rows: Sequence[Sequence[Example]], shape: packing.Shape) -> Batch:
  """The examples of each row -> a batch of numpy arrays."""
  return Batch(**_arrays(rows, shape, ()))


def pack_pairs(rows: Sequence[Sequence[Example]], shape: packing.Shape) -> PairBatch:
  """The pairs of each row -> a batch of numpy arrays."""
  return PairBatch(**_arrays(rows, shape, ('second_segment',)), **_pairs(rows, shape))


def pack_cached_pairs(rows: Sequence[Sequence[Example]], shape: packing.Shape,
                      reference_logps: Mapping[str, Sequence[float]]) -> CachedPairBatch:
  """The pairs of each row -> a batch of numpy arrays.

  `reference_logps`: {id of a pair: log-probs of chosen and rejected}.
  """
  batch = pack_pairs(rows, shape)
  logps = np.zeros((shape.rows, shape.pairs, 2), np.float32)
  for padded, row in zip(logps, rows, strict=True):
    if row:
      padded[:len(row)] = [reference_logps[e.id] for e in row]
  return CachedPairBatch(**vars(batch), reference_logps=logps)


def _arrays(rows, shape: packing.Shape, more: Sequence[str]) -> dict[str, np.ndarray]:
  """Pads the fields shared with packing.Row, and those in `more`."""
  made = [packing.layout(row) for row in rows]
  def pad(name, width, value=0):
    return _pad((getattr(row, name) for row in made), (shape.rows, width), value)
  return {
      **{name: pad(name, shape.width) for name in ('tokens', 'positions', 'segment_ids', *more)},
      **{name: pad(name, shape.targets) for name in ('target_positions', 'targets')},
      'response_ids': pad('response_ids', shape.targets, -1)}


def _pairs(rows, shape: packing.Shape) -> dict[str, np.ndarray]:
  """The fields of PairBatch that hold one value per pair, padded."""
  size = shape.rows, shape.pairs
  return dict(pair_mask=_pad(([1] * len(row) for row in rows), size),
              soft_labels=_pad(([e.soft_label for e in row] for row in rows), size,
                               dtype=np.float32))


def _pad(rows: Iterable[Sequence], shape: tuple[int, int], value=0, dtype=np.int32) -> np.ndarray:
  out = np.full(shape, value, dtype)
  for padded, row in zip(out, rows, strict=True):
    padded[:len(row)] = row
  return out
