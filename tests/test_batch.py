"""Batches: shapes, padding, and the types that select the loss."""
import jax
import numpy as np
import pytest

from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.train import batch as batches
from srlm_jax.train.batch import Batch, CachedPairBatch, PairBatch


def draw(count, responses):
  """All tokens of example i are i + 1."""
  rng = np.random.default_rng(0)
  def tokens(i):
    return [i + 1] * int(rng.integers(1, 20))
  return [Example(f'e{i}', tokens(i), tuple(tokens(i) for _ in range(responses)), 0.5 + i / 100)
          for i in range(count)]


@pytest.mark.parametrize('responses, pack, kind', [
    (1, batches.pack, Batch), (2, batches.pack_pairs, PairBatch)])
def test_a_batch_holds_the_tokens_and_targets_of_its_examples(responses, pack, kind):
  packed = Packing(draw(20, responses), 4, 1, 0, 128)
  first = jax.tree.map(lambda x: (x.shape, x.dtype.name), pack(packed.rows(0), packed.shape))
  for step in range(len(packed)):
    batch = pack(packed.rows(step), packed.shape)
    assert type(batch) is kind
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), batch) == first  # one compilation
    examples = [e for row in packed.rows(step) for e in row]
    assert (batch.segment_ids > 0).sum() == sum(map(len, examples))
    assert (batch.response_ids >= 0).sum() == sum(len(r) for e in examples for r in e.responses)
    assert not batch.tokens[batch.segment_ids == 0].any()
    assert not batch.targets[batch.response_ids < 0].any()


def test_each_pair_has_its_own_responses_and_soft_label():
  examples = draw(20, responses=2)
  packed = Packing(examples, 4, 1, 0, 128)
  for step in range(len(packed)):
    batch = batches.pack_pairs(packed.rows(step), packed.shape)
    assert batch.pair_mask.sum() == sum(map(len, packed.ids(step)))
    for b, m in zip(*np.nonzero(batch.pair_mask), strict=True):
      own = np.isin(batch.response_ids[b], (2 * m, 2 * m + 1))
      (token,) = set(batch.targets[b][own].tolist())
      example = examples[token - 1]
      assert own.sum() == sum(map(len, example.responses))
      assert batch.soft_labels[b, m] == np.float32(example.soft_label)


def test_the_reference_logps_of_a_pair_stand_where_the_pair_does():
  packed = Packing(draw(9, responses=2), 4, 1, 0, 128)
  logps = {f'e{i}': (-i, -i - 0.5) for i in range(9)}
  batch = batches.pack_cached_pairs(packed.rows(0), packed.shape, logps)
  assert type(batch) is CachedPairBatch
  for b, row in enumerate(packed.ids(0)):
    for m, name in enumerate(row):
      assert tuple(batch.reference_logps[b, m]) == logps[name]
  assert not batch.reference_logps[batch.pair_mask == 0].any()
  del logps[packed.ids(0)[0][0]]
  with pytest.raises(KeyError):
    batches.pack_cached_pairs(packed.rows(0), packed.shape, logps)


def test_the_weight_of_a_batch_is_its_number_of_targets_or_pairs():
  single, pairs = draw(7, 1), draw(7, 2)
  packed = Packing(single, 7, 1, 0, 64)
  assert float(batches.pack(packed.rows(0), packed.shape).weight()) == sum(
      len(e.responses[0]) for e in single)
  packed = Packing(pairs, 7, 1, 0, 64)
  assert float(batches.pack_pairs(packed.rows(0), packed.shape).weight()) == 7
