"""Selection keeps the best checkpoint of a training run and deletes the others."""
import dataclasses
import json
import os
import pathlib
import shlex
import sys

from conftest import CHANGES, init, main
import pytest

from srlm_jax import config as configs, InputError, model_files, records, schema, selection, stage
from srlm_jax.checkpoint import store
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']
# A command that measures a checkpoint by its step. Steps 2 and 4 are equally good.
MEASURE = (
    f'{shlex.quote(sys.executable)} -c "import os, sys; '
    f's = int(*os.listdir(sys.argv[1] + \'/steps\')); print(\'measured\', s); '
    f'print({{1: 0.5, 2: 0.75, 3: 0.6, 4: 0.75}}[s])" {{checkpoint}}')


def measures(folder):
  """{step: measure} of a selection's folder."""
  return {m.step: m.measure for m in records.read(folder / 'measures.jsonl', schema.Measure)}


@pytest.fixture
def trained(tmp_path, tokenizer_folder, mesh):
  """A workdir with a trained M2, its folder, and a function that makes its config."""
  folder, params = tmp_path / 'm2' / 'model', init(TINY)
  store.write_model_files(TINY, tokenizer_folder, folder)
  saver = store.manager(folder, None)
  for step in (1, 2, 3, 4):
    store.save(saver, step, params)
  saver.close()
  summary = schema.TrainingSummary(
      steps=4, loss=1.0, params='abc', examples=32, padding_free=1.0, dropped={})
  stage.write_json(folder / 'done.json',
                   dict(dataclasses.asdict(summary), files={}, seconds=1))
  (tmp_path / 'data' / 'seeds').mkdir(parents=True)
  (tmp_path / 'data' / 'seeds' / 'ranked.jsonl').write_text('')

  def config(select):
    c = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
    c.train.select = select
    stage.write_json(folder / 'manifest.json',
                     dict(format=stage.FORMAT, config={'train.select': select}))
    return c
  return tmp_path, folder, config


def test_a_command_selects_the_earliest_best_step_and_the_others_are_deleted(trained):
  workdir, folder, config = trained
  assert model_files.latest(folder) == 4
  c = config(MEASURE)
  config('agreement')  # the manifest now has another train.select
  with pytest.raises(InputError, match="trained with config.train.select = 'agreement', not"):
    selection.run(c, workdir)
  c = config(MEASURE)
  with pytest.raises(InputError, match='no checkpoint is selected yet'):
    stage.finished_model(workdir, 'm2')
  selection.run(c, workdir)
  assert model_files.latest(folder) == 2 and model_files.steps(folder) == [2]
  assert stage.finished_model(workdir, 'm2') == folder
  path = workdir / 'm2' / 'selection' / 'measures.jsonl'
  before = path.read_bytes()
  assert measures(path.parent) == {1: 0.5, 2: 0.75, 3: 0.6, 4: 0.75}
  assert before.count(b'\n') == 4
  selection.run(c, workdir)  # is done, so it changes nothing
  assert path.read_bytes() == before


def test_a_candidate_is_durable_before_its_stages_run(trained, monkeypatch):
  workdir, _, _ = trained
  synced, sync = [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda file: (
      synced.append(os.readlink(f'/proc/self/fd/{file}')), sync(file)))
  candidate = selection.make_workdir(workdir, workdir / 'm2' / 'selection' / '4', 'm2', 4)
  made = {str(candidate), str(candidate.parent), str(candidate.parent.parent)}
  for path in pathlib.Path(candidate).rglob('*'):
    if not path.is_symlink():
      made.add(str(path))
  assert len(made) > 6 and made <= {*synced}


def test_a_killed_selection_resumes(trained):
  workdir, folder, config = trained
  with pytest.raises(InputError, match='gave no number'):
    selection.run(config(MEASURE.replace('3: 0.6, ', '')), workdir)
  path = workdir / 'm2' / 'selection' / 'measures.jsonl'
  assert list(measures(path.parent)) == [1, 2]
  assert model_files.steps(folder) == [1, 2, 3, 4]
  path.write_text(path.read_text().replace('0.75', '0.95'))  # shows if step 2 is measured again
  (path.parent / 'manifest.json').unlink()  # it has the other command
  (path.parent / '3' / 'data').unlink()  # as if killed before this link was made
  left = path.parent / '2' / 'm2' / 'model' / 'steps' / '2'  # as if before this one was removed
  left.symlink_to(folder / 'steps' / '2')
  selection.run(config(MEASURE), workdir)
  assert not left.is_symlink()
  assert measures(path.parent) == {1: 0.5, 2: 0.95, 3: 0.6, 4: 0.75}


@pytest.mark.parametrize('command', [
    '/absent {checkpoint}', f'{sys.executable} -c "print(\'good\')"',
    f'{sys.executable} -c "import sys; sys.exit(3)"', ''])
def test_an_empty_command_or_one_without_a_number_is_an_error(trained, command):
  workdir, folder, config = trained
  with pytest.raises(InputError, match='config.train.select'):
    selection.run(config(command), workdir)
  assert model_files.steps(folder) == [1, 2, 3, 4]


def test_a_model_without_comparable_scores_is_an_error(trained, monkeypatch):
  workdir, folder, config = trained
  monkeypatch.setattr(selection.judge, 'run', lambda *_: None)

  def write_undefined(config, workdir):
    folder = workdir / 'm2' / 'agreement'
    folder.mkdir()
    stage.write_json(folder / 'done.json', dict(pairwise_accuracy=None, files={}, seconds=0))
  monkeypatch.setattr(selection.agreement, 'run', write_undefined)
  with pytest.raises(InputError, match='no prompt has two replies with scores to compare'):
    selection.run(config('agreement'), workdir)
  assert model_files.steps(folder) == [1, 2, 3, 4]


def test_a_candidate_links_the_models_below_its_adapter_but_not_those_of_another_run(
    trained, tokenizer_folder):
  """Here: m2 on m1 of this run, on m1 of another run, on sft of that run."""
  workdir, folder, _ = trained
  this, other = workdir / 'm1' / 'model', workdir / 'other' / 'm1' / 'model'
  for model, base in ((folder, 'm1/model'), (this, str(other)), (other, 'sft/model')):
    store.write_model_files(TINY, tokenizer_folder, model, model_files.Adapter(
        rank=4, alpha=8.0, targets=('q_proj',), base=base, step=0, params=''))
  sft = workdir / 'other' / 'sft' / 'model'
  store.write_model_files(TINY, tokenizer_folder, sft)
  candidate = selection.make_workdir(workdir, workdir / 'candidate', 'm2', 4)
  below = [candidate / 'm2' / 'model']
  while adapter := model_files.read_adapter(below[-1]):
    below.append(model_files.base_folder(below[-1], adapter))
  assert [os.path.realpath(path) for path in below[1:]] == [*map(str, (this, other, sft))]
  assert not (candidate / 'sft').exists()


@pytest.mark.slow
def test_the_loop_continues_from_the_checkpoint_with_the_best_agreement(tmp_path):
  main('loop', '--size=tiny', f'--workdir={tmp_path}', '--last=m2',
       *(f'--set={c}' for c in CHANGES), '--set=m1:train.select=agreement',
       '--set=m1:train.save_every=12', '--set=train.reference=cached',
       '--set=data.ranked_tune=0')  # then both measure on the split eval
  found = measures(tmp_path / 'm1' / 'selection')
  best = model_files.latest(tmp_path / 'm1' / 'model')
  assert len(found) > 1 and found[best] == max(found.values())
  agreement = json.loads((tmp_path / 'm1' / 'agreement' / 'agreement.json').read_text())
  assert agreement['pairwise_accuracy'] == pytest.approx(found[best], abs=1e-4)
  manifest = json.loads((tmp_path / 'm2' / 'model' / 'manifest.json').read_text())
  assert manifest['params'] == model_files.recorded_hash(tmp_path / 'm1' / 'model')
  assert (tmp_path / 'm2' / 'reference' / 'done.json').exists()
  assert not (tmp_path / 'm1' / 'reference').exists()
