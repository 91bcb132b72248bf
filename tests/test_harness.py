import dataclasses
import doctest
import functools
import json
import shutil

from conftest import run_main
import pytest

from srlm_jax import InputError, records, schema
from srlm_jax.eval import harness, lm

METRICS = dict(
    arc_easy='acc_norm,none', arc_challenge='acc_norm,none', hellaswag='acc_norm,none',
    piqa='acc_norm,none', openbookqa='acc_norm,none', social_iqa='acc,none', mmlu='acc,none',
    gsm8k='exact_match,strict-match', nq_open='exact_match,remove_whitespace')


def results(path, shift=0.0, without=(), shots=0, fields=None, **more):
  """Writes an lm-eval results file, which also has other metrics, standard errors and subtasks.

  `fields`: more of the file; `more`: more tasks.
  """
  tasks = {
      name: {'alias': name, 'acc,none': 0.01, metric: 0.5 + i / 100 + shift,
             metric.replace(',', '_stderr,'): 0.02 if name == 'piqa' else 'N/A'}
      for i, (name, metric) in enumerate(METRICS.items()) if name not in without}
  tasks['mmlu_anatomy'] = {'alias': '  - anatomy', 'acc,none': 0.9}
  path.write_text(json.dumps({
      'results': tasks | more, 'n-shot': dict.fromkeys(METRICS, shots), 'config': {}}
      | (fields or {})))
  return path


run = functools.partial(run_main, 'eval.harness')


def test_docstrings():
  assert doctest.testmod(harness).failed == 0


def test_nine_tasks_two_models_and_their_differences(tmp_path):
  one = results(tmp_path / '1.json')
  two = results(tmp_path / '2.json', shift=-0.058, without=['gsm8k', 'nq_open'])
  code, out, err = run(
      f'--results=m1={one}', f'--results=m3={two}', f'--out={tmp_path / "nlp.json"}')
  assert code == 0, err
  result = json.loads((tmp_path / 'nlp.json').read_text())
  order = 'arc_easy arc_challenge hellaswag siqa piqa gsm8k mmlu obqa nq'  # PAPER table 3
  assert list(result['scores']['m1']) == order.split()
  assert result['scores']['m1'] == pytest.approx(dict(
      arc_easy=50, arc_challenge=51, hellaswag=52, piqa=53, obqa=54, siqa=55, mmlu=56, gsm8k=57,
      nq=58))
  assert result['differences'] == {'m3': dict.fromkeys(
      ('arc_easy', 'arc_challenge', 'hellaswag', 'siqa', 'piqa', 'mmlu', 'obqa'), -5.8)}
  assert result['missing'] == dict(m1=[], m3=['gsm8k', 'nq'])
  assert result['standard_errors'] == dict(m1=dict(piqa=2.0), m3=dict(piqa=2.0))
  assert '53.00 ± 2.00  47.20 ± 2.00 (-5.80)' in out
  assert result['metrics']['gsm8k'] == 'exact_match,strict-match'
  assert 'm3 has no results for gsm8k, nq' in out and '44.20 (-5.80)' in out


def test_other_tasks_are_in_the_table_if_they_are_named(tmp_path):
  file = results(tmp_path / '1.json', toy={'acc,none': 0.25, 'acc_norm,none': 0.5,
                                           'acc_norm_stderr,none': 0.125},
                 words={'exact_match,strip': 0.75})
  found = harness.read_results(file, ['toy', 'words', 'obqa'])
  assert found == dict(toy=harness.Result('acc_norm,none', 50.0, 12.5),
                       words=harness.Result('exact_match,strip', 75.0),
                       obqa=harness.Result('acc_norm,none', 54.0, shots=0))
  assert harness.table(dict(m=found), ['toy', 'words', 'obqa', 'nq']).missing == dict(m=['nq'])
  code, _, err = run(f'--out={tmp_path / "none.json"}')
  assert code == 1 and '--model=NAME=DIR or --results=NAME=FILE' in err


def test_a_model_may_have_several_files(tmp_path):
  one = results(tmp_path / '1.json', without=['mmlu'])
  two = results(tmp_path / '2.json', without=[name for name in METRICS if name != 'mmlu'])
  assert len(harness.read_models([f'm={one}', f'm={two}'])['m']) == 9
  with pytest.raises(InputError, match='m already has results for arc_easy'):
    harness.read_models([f'm={one}', f'm={one}'])


def test_models_need_the_same_shots_and_metrics(tmp_path):
  one, two = results(tmp_path / '1.json', shots=0), results(tmp_path / '2.json', shots=5)
  with pytest.raises(InputError, match='5 shots here and 0 shots before'):
    harness.read_models([f'a={one}', f'b={two}'])
  old = results(
      tmp_path / 'old.json', without=['gsm8k'], gsm8k={'exact_match,get-answer': 0.5})
  with pytest.raises(InputError, match='gsm8k was measured by'):
    harness.table(harness.read_models([f'a={one}', f'b={old}']))


def limited(count: int, **config) -> dict:
  """What lm-eval writes about the documents; mmlu is a group of two tasks."""
  tasks = [*METRICS, 'mmlu_anatomy', 'mmlu_law']
  return {'n-samples': {task: dict(original=99, effective=count) for task in tasks
                        if task != 'mmlu'},
          'group_subtasks': {'mmlu': ['mmlu_anatomy', 'mmlu_law'], 'piqa': []}, 'config': config}


def test_the_table_says_what_was_measured(tmp_path):
  one = results(tmp_path / '1.json', shots=3, fields=limited(10, limit=10.0, chat='plain'))
  two = results(tmp_path / '2.json', shots=3,
                fields=limited(10, limit=10.0) | dict(chat_template='{{ messages }}'))
  code, out, err = run(f'--results=a={one}', f'--results=b={two}', f'--out={tmp_path / "n.json"}')
  assert code == 0 and 'a: with --limit=10, so not on all documents' in out, err
  found, = records.read(tmp_path / 'n.json', schema.Harness)
  assert found.counts == dict.fromkeys(harness.TASKS, 10) | dict(mmlu=20)
  assert found.shots == dict.fromkeys(harness.TASKS, 3)
  assert found.limits == dict(a=10, b=10) and found.chats == dict(a='plain', b='tokenizer')
  all_documents = results(tmp_path / '3.json', shots=3, fields=limited(99, limit=None))
  with pytest.raises(InputError, match='on 99 documents here and on 10 before'):
    harness.read_models([f'a={one}', f'b={all_documents}'])
  assert not harness.table(harness.read_models([f'a={all_documents}'])).limits


@pytest.fixture
def evaluated(monkeypatch, tmp_path, stories):
  """A folder for results, a model, and the models that are evaluated in place of `lm.evaluate`."""
  asked = []

  def evaluate(folder, what, options):
    asked.append(folder)
    config = dict(made_of=lm.made_of(folder, what, options))
    return results(tmp_path / 'made.json', fields=dict(config=config)).read_text()
  monkeypatch.setattr(lm, 'evaluate', evaluate)
  monkeypatch.setattr(lm, 'check_tasks', lambda what: None)
  monkeypatch.setattr(lm.metadata, 'version', lambda name: '1')
  return tmp_path / 'lm_eval', shutil.copytree(stories, tmp_path / 'model'), asked


def test_a_model_is_not_evaluated_again_unless_something_changed(evaluated, tmp_path, capsys):
  folder, model, asked = evaluated
  (tmp_path / 'tasks').mkdir()
  (tmp_path / 'tasks' / 'docs.jsonl').write_text('{}')
  what, options = lm.Run(['piqa'], include_path=str(tmp_path / 'tasks')), lm.Options()

  def count(**changes) -> int:
    """How many models are evaluated, of two that are the same."""
    asked.clear()
    made = harness.run([f'a={model}', f'b={model}'], folder,
                       dataclasses.replace(what, **changes), options)
    assert made == [f'{name}={folder / name}.json' for name in 'ab']
    return len(asked)
  assert (count(), count()) == (2, 0) and 'b.json: already there' in capsys.readouterr().out
  assert (count(limit=3), count(limit=3), count()) == (2, 0, 2)
  (tmp_path / 'tasks' / 'docs.jsonl').write_text('{"a": 1}')
  assert (count(), count()) == (2, 0)
  weights = model / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1] + b'.')
  assert (count(), count()) == (2, 0)


def test_mistakes_are_found_before_a_model_is_evaluated(evaluated, tmp_path):
  folder, model, asked = evaluated
  what, options = lm.Run(['piqa']), lm.Options()
  for other, message in (f'a={model}', '--model=a=DIR is given 2 times'), (
      f'b={tmp_path}', 'neither a checkpoint nor .safetensors files'), ('b', 'NAME=DIR'):
    with pytest.raises(InputError, match=message):
      harness.run([f'a={model}', other], folder, what, options)
  one, out = results(tmp_path / '1.json'), f'--out={tmp_path / "out.json"}'
  for flags, message in (
      ([f'--model=a={model}', f'--results=a={one}'], '--model and --results both name a'),
      ([f'--model=a={model}', f'--results=b={tmp_path / "2.json"}'], '2.json cannot be read')):
    code, _, err = run(*flags, out)
    assert code == 1 and message in err
  assert not asked


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path):
  (tmp_path / 'bad.json').write_text('{')
  code, _, err = run('--results=m1', f'--out={tmp_path / "out.json"}')
  assert code == 1 and 'NAME=FILE' in err and err.startswith('error: ') and err.count('\n') == 1
  assert not (tmp_path / 'out.json').exists()
  (tmp_path / 'latin.json').write_bytes(b'["\xe9"]')
  for name, message in [
      ('no.json', 'cannot be read'), ('bad.json', 'not JSON'), ('latin.json', 'not JSON'),
      ('', 'is a folder; give a results file of lm-eval')]:
    with pytest.raises(InputError, match=message):
      harness.read_models([f'm1={tmp_path / name}'])


@pytest.mark.parametrize('content, message', [
    ([], 'no "results"'), ({'results': []}, 'no "results"'),
    ({'results': {'winogrande': {}}}, 'none of the tasks'),
    ({'results': {'piqa': {'acc,none': 0.5}}}, 'piqa has no acc_norm,none; it has acc,none'),
    ({'results': {'piqa': 0.5}}, 'it has no metrics'),
    ({'results': {'piqa': {'acc_norm,none': 'N/A'}}}, "'N/A'"),
    ({'results': {'piqa': {'acc_norm,none': 82.0}}}, '82.0')])
def test_invalid_results_are_refused(tmp_path, content, message):
  (tmp_path / 'r.json').write_text(json.dumps(content))
  with pytest.raises(InputError, match=message):
    harness.read_results(tmp_path / 'r.json')
