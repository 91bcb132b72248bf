"""Readers of a run's files: damaged input gives success or InputError. `make fuzz` runs more."""
import gzip
import os

from conftest import main
import fuzz_run
import fuzzing
import pytest

from srlm_jax import InputError, metrics, records
from srlm_jax.data import oasst, prompt_files
from srlm_jax.eval import harness, mt_bench


@pytest.mark.parametrize('target', fuzz_run.TARGETS, ids=lambda target: target.name)
def test_damaged_input_is_read_or_refused(target):
  fuzzing.check(target, 2000)


def refusing_from(number: int, of: list):
  """A reader that appends to `of`, and refuses all from call `number` on."""
  def read(data):
    of.append(data)
    if len(of) >= number:
      raise InputError('a sentence')
  return read


def test_a_reader_that_refuses_all_damage_is_noticed():
  def read(data):
    if data != b'{"a": 1}':
      raise InputError('a sentence')
  result = fuzzing.run(fuzzing.Target('x', [b'{"a": 1}'], read), 500)
  assert not result.defects and result.same > 5 and result.accepted == 0
  assert 'damaged inputs were accepted' in fuzzing.one_sided(result)


def test_an_undamaged_input_must_be_accepted_also_after_others():
  for number in (1, 100):
    target = fuzzing.Target('x', [b'{"a": 1}'], refusing_from(number, []))
    assert 'an undamaged input was refused' in ''.join(fuzzing.run(target, 500).defects)
  target = fuzzing.Target('x', [b'1'], lambda _: None, refused=[b'2'])
  assert 'an undamaged input was accepted, but must be refused' in fuzzing.run(target, 5).defects[0]


def test_every_file_of_a_folder_is_damaged():
  names = []
  files = [(f'{i}.json', b'{"a": 1}') for i in range(50)]
  target = fuzzing.Target('x', files, lambda given: names.append(given[0]), is_folder=True,
                          share=0.01)
  assert fuzzing.run(target, 100).inputs == 51 and len({*names}) == 50


def test_what_a_reader_changes_is_undone():
  def make(folder):
    (folder / 'a').mkdir(parents=True)
    (folder / 'a' / 'x').write_bytes(b'1')
    for name in 'bc':
      (folder / name).write_bytes(b'2')

  def read(folder):
    assert (folder / 'a' / 'x').read_bytes() == b'1' and not (folder / 'new').exists()
    assert (folder / 'c').read_bytes() == b'2'
    (folder / 'a' / 'x').unlink()
    (folder / 'a').rmdir()
    (folder / 'a').symlink_to('nothing')
    (folder / 'c').write_bytes(b'changed')
    (folder / 'new').mkdir()
    (folder / 'new' / 'y').touch()
  files = fuzz_run.Files(make, read)
  for data in (b'3', b'3', *fuzz_run.PLACES):
    files(('b', data))


@pytest.mark.parametrize('size', [records.MOST_LINE - 1, records.MOST_LINE])
def test_a_longer_line_than_a_record_has_is_not_read(tmp_path, size):
  path = tmp_path / 'x.jsonl.gz'
  with gzip.open(path, 'wb', 1) as file:
    file.write(b'{}\n"' + b'x' * (size - 2) + b'"\n')  # with its end, size + 1 bytes
  reason = 'longer than 32 MB' if size == records.MOST_LINE else 'a str, not a JSON object'
  with pytest.raises(InputError, match=f'x.jsonl.gz:2: .*{reason}'):
    list(records.read_any(path))


def test_a_json_file_without_an_end_is_not_read(tmp_path):
  with open(tmp_path / 'x.json', 'wb') as file:
    file.truncate(10**12)  # takes no space
  with pytest.raises(InputError, match='x.json is larger than 128 MB; give another'):
    records.read_json(tmp_path / 'x.json', 'give another')


@pytest.mark.parametrize('read', [
    lambda path: list(records.read_any(path)), lambda path: records.read_json(path, 'delete it'),
    records.describe, records.Appender, metrics.last], ids=range(5))
def test_a_pipe_or_a_device_is_refused(tmp_path, read):
  path = tmp_path / 'metrics.jsonl'
  for make in (lambda: os.mkfifo(path), lambda: path.symlink_to('/dev/zero')):
    make()
    with pytest.raises(InputError, match='is a pipe, a socket or a device, not a file'):
      read(tmp_path if read is metrics.last else path)
    path.unlink()


def test_messages_whose_ids_form_a_cycle_are_refused():
  rows = [*fuzz_run.OASST[:2], fuzz_run.OASST[0] | dict(parent_id='b')]
  with pytest.raises(InputError, match="x:2: a second message with the id 'a'; delete one"):
    list(oasst.turns(((f'x:{i}', row) for i, row in enumerate(rows)), synthetic=False))


def test_a_slot_of_a_judge_prompt_has_no_width():
  prompt = mt_bench.JudgePrompt(name='single-v1', prompt_template='{question:>999999999999}')
  question = prompt_files.Turns(question_id=1, turns=('Why?',), category='writing')
  with pytest.raises(InputError, match='cannot be filled .*has a format'):
    mt_bench._fastchat({'single-v1': prompt}, question, ('So.',), (), 1)


def test_a_group_of_tasks_that_contains_itself_has_no_count():
  assert harness._count('a', {}, {'a': ['b'], 'b': ['a']}) is None
  assert harness._count('a', {'b': dict(effective=3)}, {'a': ['b']}) == 3


def test_a_damaged_line_of_metrics_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "loss": 1.0}\n{"step": "1"}\n')
  with pytest.raises(InputError, match='metrics.jsonl:2: '):
    metrics.Writer(tmp_path, 5)


def test_unpaired_surrogates_are_refused_escaped_and_encoded(tmp_path):
  for data in (b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}'):
    (tmp_path / 'x.json').write_bytes(data)
    with pytest.raises(InputError, match='unpaired surrogate'):
      records.read_json(tmp_path / 'x.json', 'correct it')


def test_a_long_message_is_cut():
  assert len(str(InputError('x' * 10_000))) <= InputError.MOST


@pytest.mark.parametrize('name', ['a-file', 'dangling', 'x' * 300, 'y/' * 600])
def test_a_workdir_that_is_no_folder_gives_one_sentence(tmp_path, name):
  (tmp_path / 'a-file').touch()
  (tmp_path / 'dangling').symlink_to('nothing')
  flags = '--config=iter2:tiny', f'--workdir={tmp_path / name}'
  error = main('reward.pairs', *flags, code=1)
  assert error.startswith('error: ') and error.count('\n') == 1
