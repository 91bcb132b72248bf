import pytest

from srlm_jax import InputError, schema
from srlm_jax.data import examples, tokenizer as tokenizers


@pytest.fixture(scope='module')
def tokenizer(tokenizer_folder):
  return tokenizers.load(tokenizer_folder)


def record(name, response='pear', **changes):
  return schema.Demonstration(id=name, prompt='Name a fruit.', response=response, **changes)


def pair(name, chosen='pear', rejected='fig plum', rejected_finish='eos', **changes):
  return schema.Preference(
      id=name, prompt='Name a fruit.', chosen=chosen, rejected=rejected, chosen_finish='eos',
      rejected_finish=rejected_finish, **changes)


def test_the_targets_are_the_response_and_its_eos(tokenizer):
  records = [record('a'), record('b', response='pear fig plum')]
  first, _ = examples.sft(records, tokenizer, 'plain', 64).examples
  (response,) = first.responses
  assert first.prompt[0] == tokenizer.bos_id and response[-1] == tokenizer.eos_ids[0]
  assert tokenizer.decode(response).strip() == 'pear'
  assert tokenizer.decode(first.prompt) == 'User: Name a fruit.\nAssistant:'


def test_a_truncated_response_of_a_pair_has_no_eos(tokenizer):
  (made,) = examples.dpo([pair('a', rejected_finish='length')], tokenizer, 'plain', 64).examples
  chosen, rejected = made.responses
  assert chosen[-1] == tokenizer.eos_ids[0] != rejected[-1]
  assert len(made) == len(made.prompt) + len(chosen) + len(rejected)  # the prompt counts once


@pytest.mark.parametrize('finish, ends', [
    (dict(), True), (dict(finish='eos'), True), (dict(finish='length'), False)])
def test_sft_adds_no_eos_to_a_truncated_response(tokenizer, finish, ends):
  (made,) = examples.sft([record('a', **finish)], tokenizer, 'plain', 64).examples
  assert (made.responses[0][-1] == tokenizer.eos_ids[0]) == ends


@pytest.mark.parametrize('max_length', [1, 4, 7, 31])
def test_a_corpus_is_the_tokens_of_its_documents_in_order(tokenizer, max_length):
  texts = ['pear', 'fig plum ' * 20, 'pear fig', 'plum ' * 50]
  tokens = [token for text in texts
            for token in (*tokenizer.start, *tokenizer.encode(text), tokenizer.eos_ids[0])]
  made = examples.corpus([schema.Document(id=text, text=text) for text in texts], tokenizer,
                         max_length).examples
  whole = len(tokens) // max_length * max_length
  assert [token for e in made for token in (*e.prompt, *e.responses[0])] == tokens[:whole]
  assert [e.id for e in made] == [f'row{i}' for i in range(whole // max_length)]
  assert {len(e) for e in made} == {max_length}


def test_a_corpus_fills_its_rows(tokenizer):
  documents = [schema.Document(id=str(i), text='pear fig plum') for i in range(30)]
  made = examples.corpus(documents, tokenizer, 32).examples
  assert {(len(e.prompt), len(e)) for e in made} == {(1, 32)}  # all but the first are targets
  assert tokenizer.decode(made[0].prompt + made[0].responses[0]).startswith('pear fig plum')
  with pytest.raises(InputError, match='fewer than one row'):
    examples.corpus([schema.Document(id='a', text='pear')], tokenizer, 32)


def test_too_long_and_empty_responses_are_dropped_and_counted(tokenizer):
  records = [record('a'), record('b', response='pear ' * 60), record('c', response=' ')]
  made = examples.sft(records, tokenizer, 'plain', 64)
  assert [e.id for e in made.examples] == ['a']
  assert made.dropped == {'longer than 64 tokens': 1, 'empty response': 1}


def test_invalid_records_are_refused(tokenizer):
  with pytest.raises(InputError, match='no example is left to train on: 1 empty response'):
    examples.sft([record('a', response='')], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='the files are empty'):
    examples.dpo([], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='pair a: chosen and rejected are the same text'):
    examples.dpo([pair('a', rejected='pear ')], tokenizer, 'plain', 64)
  with pytest.raises(InputError, match='pair a: soft_label is 1.5; it must be a number from 0 to'):
    examples.dpo([pair('a', soft_label=1.5)], tokenizer, 'plain', 64)
  same = pair('b', chosen='\u4e00', rejected='\u4e01')  # both unknown to the tokenizer
  made = examples.dpo([pair('a'), same], tokenizer, 'plain', 64)
  assert made.dropped == {'chosen and rejected the same tokens': 1}
  with pytest.raises(InputError, match='two training records have the id a'):
    examples.sft([record('a'), record('a')], tokenizer, 'plain', 64)


def test_a_file_that_takes_only_a_part_gets_the_rest_or_the_example_is_refused(monkeypatch):
  made, taken = examples.Stored(), []

  class Partly:
    """A file that takes 7 bytes at once."""
    def __init__(self, file):
      self._file, self.fileno = file, file.fileno

    def write(self, data):
      taken.append(len(data))
      return self._file.write(data[:7])
  monkeypatch.setattr(made, '_file', Partly(made._file))
  first = examples.Example('a', [5, 6], ([7, 8, 9, 10, 11],))
  made.append(first)
  made.append(first)
  assert len(taken) > 4 and [*made] == [first, first]
  with open('/dev/full', 'wb', buffering=0) as full:
    monkeypatch.setattr(made, '_file', full)
    with pytest.raises(OSError):
      made.append(first)
  assert len(made) == 2
