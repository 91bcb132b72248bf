import collections

from conftest import DATA, main
import numpy as np
import pytest

from srlm_jax import InputError, records
from srlm_jax.data import examples as training, packing, tokenizer
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Batches


def draw(count, responses=1, seed=0, longest=40):
  """Examples of varied length, most of them short, all tokens of each its number and 1."""
  rng = np.random.default_rng(seed)
  def size():
    return int(np.clip(rng.lognormal(2, 0.8), 1, longest))
  return [Example(f'e{i}', [i + 1] * size(), tuple([i + 1] * size() for _ in range(responses)), 0.5 + i / 100)
          for i in range(count)]


def names(made, step):
  return [name for row in made.ids(step) for name in row]


def test_a_row_of_a_prompt_and_a_pair_and_another_by_hand():
  row = packing.layout([Example('a', [1, 2], ([3], [4, 5])), Example('b', [6], ([7], [8]))])
  assert row == dict(
      tokens=[1, 2, 3, 4, 5, 6, 7, 8],
      positions=[0, 1, 2, 2, 3, 0, 1, 1],  # rejected goes on where the prompt ends
      segments=[1, 1, 1, 2, 2, 3, 3, 4],
      shared=[2, 2, 0, 0, 0, 4, 0, 0],
      at=[1, 1, 3, 5, 5], label=[3, 4, 5, 7, 8], response=[0, 1, 1, 2, 3])


def test_rows_of_single_responses_by_hand():
  row = packing.layout([Example('a', [1, 2], ([3, 4],)), Example('b', [5], ([6],))])
  assert row['segments'] == [1, 1, 1, 1, 2, 2] and row['shared'] == [0] * 6
  assert row['at'] == [1, 2, 4] and row['label'] == [3, 4, 6] and row['response'] == [0, 0, 1]


def test_a_batch_holds_the_rows_and_nothing_else():
  examples = draw(20, responses=2)
  made = Batches(examples, 4, 1, 0, 128)
  for step in range(len(made)):
    batch, ids = made.at(step), names(made, step)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        name: (x.shape, x.dtype.name) for name, x in made.at(0).items()}  # so it compiles once
    mine = [e for e in examples if e.id in ids]
    assert (batch['segments'] > 0).sum() == sum(map(len, mine))
    assert (batch['response'] >= 0).sum() == sum(len(r) for e in mine for r in e.responses)
    assert batch['pair'].sum() == len(ids)
    assert sorted(batch['confidence'][batch['pair'] == 1]) == pytest.approx(sorted(e.confidence for e in mine))
    assert not batch['tokens'][batch['segments'] == 0].any()
    for b, n in zip(*np.nonzero(batch['pair']), strict=True):  # a pair's responses are its own
      own = batch['label'][b][np.isin(batch['response'][b], (2 * n, 2 * n + 1))]
      (number,) = set(own.tolist())
      assert len(own) == sum(map(len, examples[number - 1].responses))


@pytest.mark.parametrize('pack', [0, 256])
@pytest.mark.parametrize('count', [96, 93, 23, 9, 5])
def test_every_pass_sees_every_example_once_in_another_order(count, pack):
  examples = draw(count)
  made = Batches(examples, 8, 2, 3, pack)
  seen = [name for step in range(len(made)) for name in names(made, step)]
  assert collections.Counter(seen) == {e.id: 2 for e in examples} and made.seen == 2 * count
  if not pack:
    assert set(seen[:count]) == set(seen[count:]) == {e.id for e in examples} and seen[:count] != seen[count:]
    assert len(made) == -(-2 * count // 8)
  again = Batches(examples, 8, 2, 3, pack)
  assert [names(again, s) for s in range(len(again))] == [names(made, s) for s in range(len(made))]
  assert Batches(examples, 8, 2, 4, pack).ids(0) != made.ids(0)
  assert Batches(examples, 8, 0.25, 3, pack).seen == round(count / 4)


def test_a_packed_step_holds_the_batch_on_average_and_little_else():
  made = Batches(draw(2000), 64, 1, 0, 256)
  assert made.real > 0.9
  assert made.seen / (len(made) - 1) == pytest.approx(64, rel=0.1)
  assert made.width <= 256 and Batches(draw(2000), 64, 1, 0).real < 0.5  # a row for each


@pytest.mark.parametrize('parts', [1, 8])
@pytest.mark.parametrize('size', [0, 256, 150, 130, 100])
def test_whatever_the_lengths_and_the_mesh_a_packed_step_holds_the_batch_on_average(size, parts):
  """Short and long, and such as leave half of a row empty, if it is a wide one."""
  examples = [Example(e.id, [1], ([1] * (size - 1),)) for e in draw(200)] if size else draw(200)
  made = Batches(examples, 16, 2, 0, 256, parts)
  steps = [len(names(made, step)) for step in range(len(made))]
  assert 0.95 * 16 <= np.mean(steps[:-1]) <= 16
  assert max(np.cumsum(steps) - 16 * np.arange(1, len(steps) + 1)) <= 0
  assert made.real > 0.8 or parts == 8


def test_rows_are_a_multiple_of_what_divides_them_and_a_step_is_no_larger_for_it():
  made = Batches(draw(200), 16, 1, 0, 256, parts=8)
  assert made.rows == 8 and made.seen / (len(made) - 1) == pytest.approx(16, rel=0.25)
  long = Batches([*draw(200), Example('long', [1], ([1] * 400,))], 16, 1, 0, 256, parts=8)
  assert long.width >= 401 and max(len(names(long, s)) for s in range(len(long))) == 16
  again = Batches(draw(200), 16, 1, 0, 256, parts=2, shape=(made.rows, made.width))  # begun on another mesh
  assert [again.ids(s) for s in range(len(again))] == [made.ids(s) for s in range(len(made))]
  with pytest.raises(InputError, match='began with steps of 8 rows .* here rows must divide by 3'):
    Batches(draw(200), 16, 1, 0, 256, parts=3, shape=(made.rows, made.width))
  with pytest.raises(InputError, match=r'config.train.batch = 12 rows do not divide by 8'):
    Batches(draw(200), 12, 1, 0, parts=8)


def test_what_has_no_room_is_not_forgotten_at_the_end():
  examples = [Example(f'e{i}', [1], ([1] * 60,)) for i in range(7)]
  made = Batches(examples, 2, 1, 0, 64)
  assert Batches(examples[:1], 1, 1, 0, 64).seen == 1
  assert made.rows == 2 and [len(names(made, s)) for s in range(len(made))] == [2, 2, 2, 1]


def test_people_s_prompts_and_answers_fill_their_rows(stories, tmp_path):
  """OASST1: at least nine places in ten hold a token, at the paper's batch."""
  main('data.seeds', '--config=configs/sft.py:stories', f'--workdir={tmp_path}', '--config.data.ift=400',
       f'--config.data.path={DATA}/oasst1/validation.en.messages.jsonl.gz')
  rows = records.read(tmp_path / 'data' / 'seeds' / 'ift.jsonl')
  found = training.sft(rows, tokenizer.load(stories, 512), 'plain', 2048).examples
  packed, alone = Batches(found, 16, 20, 0, 2048), Batches(found, 16, 20, 0)
  assert len(found) > 100 and packed.real > 0.9 and alone.real < 0.5
  assert packed.seen / len(packed) == pytest.approx(16, rel=0.1)
