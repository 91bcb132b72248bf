import collections
import dataclasses

from conftest import main, real_data
import numpy as np
import pytest

from srlm_jax import InputError, records, schema
from srlm_jax.data import examples as training, packing, tokenizer
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing


def draw(count, responses=1, seed=0, longest=40):
  """Examples of log-normal length; all tokens of example i are i + 1."""
  rng = np.random.default_rng(seed)
  def length():
    return int(np.clip(rng.lognormal(2, 0.8), 1, longest))
  return [Example(f'e{i}', [i + 1] * length(),
                  tuple([i + 1] * length() for _ in range(responses)), 0.5 + i / 100)
          for i in range(count)]


def names(packed, step):
  return [name for row in packed.ids(step) for name in row]


def lists(row):
  return {name: values.tolist() for name, values in dataclasses.asdict(row).items()}


def test_layout_of_two_pairs_by_hand():
  row = packing.layout([Example('a', [1, 2], ([3], [4, 5])), Example('b', [6], ([7], [8]))])
  assert lists(row) == dict(
      tokens=[1, 2, 3, 4, 5, 6, 7, 8],
      positions=[0, 1, 2, 2, 3, 0, 1, 1],  # rejected continues from the end of the prompt
      segment_ids=[1, 1, 1, 2, 2, 3, 3, 4],
      second_segment=[2, 2, 0, 0, 0, 4, 0, 0],
      target_positions=[1, 1, 3, 5, 5], targets=[3, 4, 5, 7, 8], response_ids=[0, 1, 1, 2, 3])


def test_layout_of_two_single_responses_by_hand():
  row = lists(packing.layout([Example('a', [1, 2], ([3, 4],)), Example('b', [5], ([6],))]))
  assert row['segment_ids'] == [1, 1, 1, 1, 2, 2] and row['second_segment'] == [0] * 6
  assert row['target_positions'] == [1, 2, 4] and row['targets'] == [3, 4, 6]
  assert row['response_ids'] == [0, 0, 1]


def test_an_empty_row_has_no_tokens():
  assert set(map(len, dataclasses.asdict(packing.layout([])).values())) == {0}


def test_every_row_fits_into_the_shape():
  packed = Packing(draw(20, responses=2), 4, 1, 0, 128)
  for step in range(len(packed)):
    assert len(packed.rows(step)) == packed.shape.rows
    for examples in packed.rows(step):
      row = packing.layout(examples)
      assert len(row.tokens) <= packed.shape.width and len(examples) <= packed.shape.pairs
      assert len(row.targets) <= packed.shape.targets


@pytest.mark.parametrize('width', [0, 256])
@pytest.mark.parametrize('count', [96, 93, 23, 9, 5])
def test_every_epoch_has_every_example_once_in_another_order(count, width):
  examples = draw(count)
  packed = Packing(examples, 8, 2, 3, width)
  seen = [name for step in range(len(packed)) for name in names(packed, step)]
  assert collections.Counter(seen) == {e.id: 2 for e in examples} and packed.count == 2 * count
  if not width:
    assert set(seen[:count]) == set(seen[count:]) == {e.id for e in examples}
    assert seen[:count] != seen[count:]
    assert len(packed) == -(-2 * count // 8)
  again = Packing(examples, 8, 2, 3, width)
  assert [names(again, s) for s in range(len(again))] == [names(packed, s)
                                                          for s in range(len(packed))]
  assert Packing(examples, 8, 2, 4, width).ids(0) != packed.ids(0)
  assert Packing(examples, 8, 0.25, 3, width).count == round(count / 4)


def test_a_packed_step_holds_the_batch_on_average_with_little_padding():
  packed = Packing(draw(2000), 64, 1, 0, 256)
  assert packed.padding_free > 0.9
  assert packed.count / (len(packed) - 1) == pytest.approx(64, rel=0.1)
  assert packed.shape.width <= 256
  assert Packing(draw(2000), 64, 1, 0).padding_free < 0.5  # one example per row


@pytest.mark.parametrize('parts', [1, 8])
@pytest.mark.parametrize('length', [0, 256, 150, 130, 100])
def test_a_packed_step_holds_the_batch_for_all_lengths_and_meshes(length, parts):
  """Also for examples that leave half of a wide row empty."""
  examples = draw(200)
  if length:
    examples = [Example(e.id, [1], ([1] * (length - 1),)) for e in examples]
  packed = Packing(examples, 16, 2, 0, 256, parts)
  counts = [len(names(packed, step)) for step in range(len(packed))]
  assert 0.95 * 16 <= np.mean(counts[:-1]) <= 16
  assert max(np.cumsum(counts) - 16 * np.arange(1, len(counts) + 1)) <= 0
  assert packed.padding_free > 0.8 or parts == 8


def test_the_number_of_rows_is_a_multiple_of_parts():
  packed = Packing(draw(200), 16, 1, 0, 256, parts=8)
  assert packed.shape.rows == 8
  assert packed.count / (len(packed) - 1) == pytest.approx(16, rel=0.25)
  long = Packing([*draw(200), Example('long', [1], ([1] * 400,))], 16, 1, 0, 256, parts=8)
  assert long.shape.width >= 401 and max(len(names(long, s)) for s in range(len(long))) == 16
  with pytest.raises(InputError, match=r'config.train.batch = 12 is not a multiple of 8'):
    Packing(draw(200), 12, 1, 0, parts=8)


def test_a_resumed_run_keeps_its_rows_on_another_mesh():
  packed = Packing(draw(200), 16, 1, 0, 256, parts=8)
  shape = packed.shape.rows, packed.shape.width
  again = Packing(draw(200), 16, 1, 0, 256, parts=2, rows_and_width=shape)
  assert [again.ids(s) for s in range(len(again))] == [packed.ids(s) for s in range(len(packed))]
  with pytest.raises(InputError, match='step has 8 rows .* rows must be a multiple of 3'):
    Packing(draw(200), 16, 1, 0, 256, parts=3, rows_and_width=shape)


@pytest.mark.parametrize('responses', [1, 2])
def test_a_given_number_of_rows_makes_the_same_steps_on_every_mesh(responses):
  examples, parts = draw(200, responses), (1, 2, 4, 8)
  shape = packing.fixed(8, examples, 16, 2, 0, 256, 16)
  packed = [Packing(examples, 16, 2, 0, 256, n, rows_and_width=shape) for n in parts]
  wanted = packed[0]
  for one in packed:
    assert one.shape == wanted.shape and len(one) == len(wanted)
    assert all(one.rows(step) == wanted.rows(step) for step in range(len(wanted)))
  assert wanted.shape.rows == 8 and wanted.count == 400
  counts = [len(names(wanted, step)) for step in range(len(wanted))]
  assert 0.95 * 16 <= np.mean(counts[:-1]) <= 16
  # What the mesh of 8 shards would choose itself, which others would not.
  chosen = [Packing(examples, 16, 2, 0, 256, n) for n in parts]
  assert chosen[-1].shape == wanted.shape and chosen[0].shape != wanted.shape
  assert chosen[0].ids(0) != wanted.ids(0)


def test_the_width_for_a_given_number_of_rows_is_the_smallest_that_holds_the_batch():
  examples = [Example(f'e{i}', [1], ([1] * 59,)) for i in range(64)]  # 60 tokens each
  def width(rows):
    return packing.fixed(rows, examples, 16, 1, 0, 256, 16)[1]
  assert [width(rows) for rows in (4, 6, 8, 16)] == [240, 192, 128, 64]
  longer = [*examples, Example('long', [1], ([1] * 300,))]  # more than the width of the config
  assert packing.fixed(16, longer, 16, 1, 0, 256, 16) == (16, 304)


def test_more_rows_than_examples_per_step_are_those_that_so_many_shards_choose():
  examples = draw(200, 2)
  given = Packing(examples, 16, 2, 0, 256, 32,
                  rows_and_width=packing.fixed(32, examples, 16, 2, 0, 256, 16))
  chosen = Packing(examples, 16, 2, 0, 256, 32)
  assert given.shape == chosen.shape and given.shape.rows == 32
  assert [given.rows(i) for i in range(len(given))] == [chosen.rows(i) for i in range(len(chosen))]


def test_rows_that_cannot_hold_the_batch_are_refused_with_the_number_that_can():
  examples = [Example(f'e{i}', [1], ([1] * 59,)) for i in range(64)]
  message = (r'config.train.rows is 3, and so many rows of at most 256 tokens hold fewer examples '
             r'per step than config.train.batch = 16; 4 rows hold them')
  with pytest.raises(InputError, match=message):
    packing.fixed(3, examples, 16, 1, 0, 256, 16)
  assert packing.fixed(4, examples, 16, 1, 0, 256, 16)[0] == 4
  with pytest.raises(InputError, match='every step has 4 rows .* must be a multiple of 8'):
    Packing(examples, 16, 1, 0, 256, parts=8, rows_and_width=(4, 240))


def test_an_example_without_room_enters_a_later_step():
  examples = [Example(f'e{i}', [1], ([1] * 60,)) for i in range(7)]
  packed = Packing(examples, 2, 1, 0, 64)
  assert Packing(examples[:1], 1, 1, 0, 64).count == 1
  assert packed.shape.rows == 2
  assert [len(names(packed, s)) for s in range(len(packed))] == [2, 2, 2, 1]


def test_packed_rows_of_oasst_are_at_most_a_tenth_padding(stories, tmp_path):
  """At the paper's batch size."""
  main('data.seeds', '--config=configs/sft.py:stories', f'--workdir={tmp_path}',
       '--config.data.ift=400',
       f'--config.data.path={real_data("oasst1/validation.en.messages.jsonl.gz")}')
  rows = records.read(tmp_path / 'data' / 'seeds' / 'ift.jsonl', schema.Demonstration)
  found = training.sft(rows, tokenizer.load(stories, 512), 'plain', 2048).examples
  packed, alone = Packing(found, 16, 20, 0, 2048), Packing(found, 16, 20, 0)
  assert len(found) > 100 and packed.padding_free > 0.9 and alone.padding_free < 0.5
  assert packed.count / len(packed) == pytest.approx(16, rel=0.1)
