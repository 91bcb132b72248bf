import numpy as np
import pytest

from srlm_jax import InputError
from srlm_jax.data import batches, tokenizer as tokenizers


@pytest.fixture(scope='module')
def tokenizer(tokenizer_folder):
  return tokenizers.load(tokenizer_folder)


def example(name, prompt='Name a fruit.', response='pear'):
  return dict(id=name, prompt=prompt, response=response)


def pair(name, chosen='pear', rejected='fig plum', **finish):
  return dict(id=name, prompt='Name a fruit.', chosen=chosen, rejected=rejected, **dict(
      dict(chosen_finish='eos', rejected_finish='eos'), **finish))


def counted(rows, tokenizer, *where):
  """The tokens that the loss counts."""
  return rows.tokens[where][rows.loss_mask[where] == 1].tolist()


def test_the_loss_is_on_the_response_and_its_eos_alone(tokenizer):
  rows = batches.sft([example('a'), example('b', response='pear fig plum')], tokenizer, 'plain', 64)
  assert rows.tokens.shape == (2, 32) and rows.tokens[0, 0] == tokenizer.bos_id
  assert counted(rows, tokenizer, 0)[-1] == tokenizer.eos_ids[0]
  assert tokenizer.decode(counted(rows, tokenizer, 0)).strip() == 'pear'
  start = rows.loss_mask[0].argmax()
  assert tokenizer.decode(rows.tokens[0, :start].tolist()) == 'User: Name a fruit.\nAssistant:'


def test_a_response_cut_by_length_has_no_eos(tokenizer):
  rows = batches.dpo([pair('a', rejected_finish='length')], tokenizer, 'plain', 64)
  assert rows.tokens.shape[:2] == (1, 2)
  assert counted(rows, tokenizer, 0, 0)[-1] == tokenizer.eos_ids[0] != counted(rows, tokenizer, 0, 1)[-1]


def test_a_corpus_fills_its_rows(tokenizer):
  rows = batches.corpus([dict(id=str(i), text='pear fig plum') for i in range(30)], tokenizer, 32)
  assert rows.loss_mask.all() and rows.tokens.shape[1] == 32
  assert tokenizer.decode(rows.tokens[0].tolist()).startswith('pear fig plum')
  with pytest.raises(InputError, match='fewer than one row'):
    batches.corpus([dict(id='a', text='pear')], tokenizer, 32)


def test_what_is_too_long_or_empty_is_dropped_and_counted(tokenizer):
  examples = [example('a'), example('b', response='pear ' * 60), example('c', response=' ')]
  rows = batches.sft(examples, tokenizer, 'plain', 64)
  assert rows.ids == ['a'] and rows.dropped == {'longer than 64 tokens': 1, 'empty response': 1}


def test_rows_that_cannot_be_are_refused(tokenizer):
  with pytest.raises(InputError, match='no example is left to train on: 1 empty response'):
    batches.sft([example('a', response='')], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='the files are empty'):
    batches.dpo([], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='pair a: chosen and rejected are the same text'):
    batches.dpo([pair('a', rejected='pear ')], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='two training records have the id a'):
    batches.sft([example('a'), example('a')], tokenizer, 'plain', 64)


def test_every_pass_sees_every_row_once_in_another_order_and_any_step_can_be_asked_for(tokenizer):
  rows = batches.sft([example(str(i), response=f'{i // 4} {i % 4}') for i in range(10)], tokenizer, 'plain', 64)
  def seen(step):
    return [int(np.flatnonzero((rows.tokens == t).all(-1))[0]) for t in rows.at(step, 5, seed=3)['tokens']]
  first, second = seen(0) + seen(1), seen(2) + seen(3)
  assert sorted(first) == sorted(second) == list(range(10)) and first != second
  assert seen(2) == seen(2)
  across = batches.Rows(rows.ids[:7], rows.tokens[:7], rows.loss_mask[:7], {}).at(1, 5, seed=3)
  assert across['tokens'].shape == (5, 32)  # a batch across the seam of two passes
