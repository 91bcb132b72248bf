"""Of the checkpoints of a training the best is chosen, and the others go."""
import json
import shlex
import sys

from conftest import CHANGES, init, main
import pytest

from srlm_jax import config as configs, InputError, model_files, records, selection, stage
from srlm_jax.checkpoint import store
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']
# by the step in the path: 2 is the best, and so is 4, later
GRADE = f'{shlex.quote(sys.executable)} -c "import os, sys; s = int(*os.listdir(sys.argv[1] + \'/steps\')); ' \
        f'print(\'measured\', s); print({{1: 0.5, 2: 0.75, 3: 0.6, 4: 0.75}}[s])" {{checkpoint}}'


@pytest.fixture
def trained(tmp_path, tokenizer_folder, mesh):
  """A workdir with M2 trained, and a function that makes its config."""
  folder, params = tmp_path / 'm2' / 'model', init(TINY)
  store.write_model_files(TINY, tokenizer_folder, folder)
  saver = store.manager(folder, None)
  for step in (1, 2, 3, 4):
    store.save(saver, step, params)
  saver.close()
  stage.write_json(folder / 'done.json', dict(params='abc', files={}, seconds=1))
  (tmp_path / 'data' / 'seeds').mkdir(parents=True)

  def config(select):
    c = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
    c.train.select = select
    stage.write_json(folder / 'manifest.json', dict(format=stage.FORMAT, config={'train.select': select}))
    return c
  return tmp_path, folder, config


def test_the_best_by_a_command_is_chosen_and_the_others_go(trained):
  workdir, folder, config = trained
  assert model_files.latest(folder) == 4
  with pytest.raises(InputError, match="trained with config.train.select = 'agreement', not"):
    c = config(GRADE)
    config('agreement')
    selection.run(c, workdir)
  c = config(GRADE)
  with pytest.raises(InputError, match='nothing is selected'):
    stage.finished_model(workdir, 'm2')
  selection.run(c, workdir)
  assert model_files.latest(folder) == 2 and model_files.steps(folder) == [2]
  assert stage.finished_model(workdir, 'm2') == folder
  measures = list(records.read(workdir / 'm2' / 'selection' / 'measures.jsonl'))
  assert measures == [dict(step=s, measure=m) for s, m in ((1, 0.5), (2, 0.75), (3, 0.6), (4, 0.75))]
  selection.run(c, workdir)  # done before


def test_what_a_kill_left_is_gone_on_with(trained):
  workdir, folder, config = trained
  with pytest.raises(InputError, match='gave no number'):
    selection.run(config(GRADE.replace('3: 0.6, ', '')), workdir)
  path = workdir / 'm2' / 'selection' / 'measures.jsonl'
  assert [r['step'] for r in records.read(path)] == [1, 2] and model_files.steps(folder) == [1, 2, 3, 4]
  path.write_text(path.read_text().replace('0.75', '0.95'))  # so it is not measured again
  (workdir / 'm2' / 'selection' / 'manifest.json').unlink()  # as if with the same command
  (workdir / 'm2' / 'selection' / '3' / 'data').unlink()  # as if the kill had come before this link was made
  selection.run(config(GRADE), workdir)
  assert next(r for r in records.read(path) if r['step'] == 2)['measure'] == 0.95


@pytest.mark.parametrize('command', ['/absent {checkpoint}', f'{sys.executable} -c "print(\'good\')"',
                                     f'{sys.executable} -c "import sys; sys.exit(3)"', ''])
def test_a_command_that_gives_no_number_is_named(trained, command):
  workdir, folder, config = trained
  with pytest.raises(InputError, match='config.train.select'):
    selection.run(config(command), workdir)
  assert model_files.steps(folder) == [1, 2, 3, 4]


def test_a_model_that_cannot_judge_has_no_measure(trained, monkeypatch):
  workdir, folder, config = trained
  monkeypatch.setattr(selection.judge, 'run', lambda *_: None)
  monkeypatch.setattr(selection.agreement, 'run', lambda config, workdir: stage.write_json(
      (workdir / 'm2' / 'agreement').mkdir() or workdir / 'm2' / 'agreement' / 'done.json',
      dict(pairwise_accuracy=None, files={}, seconds=0)))
  with pytest.raises(InputError, match='no two judgements of one prompt have scores'):
    selection.run(config('agreement'), workdir)
  assert model_files.steps(folder) == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_loop_goes_on_from_the_checkpoint_that_judges_best(tmp_path):
  main('loop', '--size=tiny', f'--workdir={tmp_path}', '--last=m2', *(f'--set={c}' for c in CHANGES),
       '--set=m1:train.select=agreement', '--set=m1:train.save_every=12', '--set=train.reference=cached')
  measures = {r['step']: r['measure'] for r in records.read(tmp_path / 'm1' / 'selection' / 'measures.jsonl')}
  best = model_files.latest(tmp_path / 'm1' / 'model')
  assert len(measures) > 1 and measures[best] == max(measures.values())
  agreed = json.loads((tmp_path / 'm1' / 'agreement' / 'agreement.json').read_text())['pairwise_accuracy']
  assert agreed == pytest.approx(measures[best], abs=1e-4)
  manifest = json.loads((tmp_path / 'm2' / 'model' / 'manifest.json').read_text())
  assert manifest['params'] == model_files.recorded_hash(tmp_path / 'm1' / 'model')
  assert (tmp_path / 'm2' / 'reference' / 'done.json').exists() and not (tmp_path / 'm1' / 'reference').exists()
