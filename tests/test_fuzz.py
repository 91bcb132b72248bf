"""Readers of a run's files: damaged input gives success or InputError. `make fuzz` runs more."""
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
