"""DPO with cached reference log-probs equals DPO with the reference in the step; its alarms."""
import dataclasses
import json
import shutil

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from srlm_jax import config as configs, InputError, model_files, records, schema, stage
from srlm_jax.checkpoint import store
from srlm_jax.models import config as model_config
from srlm_jax.train import reference, run as train
from srlm_jax.train.alarms import Alarms

WORDS = ('pear', 'fig', 'plum', 'fruit', 'Name', 'pear fig', 'fig plum pear', 'a fruit')


def pairs(count=21):  # no multiple of the batch
  for i in range(count):
    yield schema.Preference(
        id=f'p{i}', prompt=f'Name {WORDS[i % 3]} {i}.', chosen=f'{WORDS[i % 8]} {i}',
        rejected=WORDS[-1 - i % 7], chosen_finish='eos', rejected_finish='eos')


@pytest.fixture
def run(tmp_path, tokenizer_folder):
  """A function that trains M2 of a small run -> its folder and its metrics."""
  def start(name, changed=lambda rows: rows, mesh=(2, 2, 2), **keys):
    workdir = tmp_path / name
    config = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
    config.model = ''
    config.train.update(dict(batch=4, epochs=1, max_length=64, log_every=1) | keys)
    config.mesh.update(**dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True)))
    if not (workdir / 'm1').exists():
      shape = model_config.PRESETS['tiny-test']
      with jax.set_mesh(make_mesh(1, 1, 1)):
        store.write_model_files(shape, tokenizer_folder, workdir / 'm1' / 'model')
        saver = store.manager(workdir / 'm1' / 'model', 1)
        store.save(saver, 0, init(shape))
        saver.close()
    records.write(workdir / 'm2' / 'pairs' / 'pairs.jsonl', changed(list(pairs())))
    train.run(config, workdir)
    lines = (workdir / 'm2' / 'model' / 'metrics.jsonl').read_text().splitlines()
    return workdir, list(map(json.loads, lines))
  return start


@pytest.mark.slow
def test_cached_log_probs_train_the_same_and_are_resumed_after_a_kill(run, capsys):
  _, wanted = run('step')
  workdir, found = run('cached', reference='cached')
  assert len(wanted) == len(found) >= 4 and wanted[0]['margin'] == 0
  for a, b in zip(wanted, found, strict=True):
    a.pop('tokens_per_second'), b.pop('tokens_per_second')
    assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
  folder = workdir / 'm2' / 'reference'
  whole = (folder / reference.FILE).read_text()
  assert {json.loads(line)['id'] for line in whole.splitlines()} == {f'p{i}' for i in range(21)}

  (folder / 'done.json').unlink()  # as if killed while it wrote a line
  (folder / reference.FILE).write_text(whole[:len(whole) // 2])
  (workdir / 'm2' / 'model').rename(workdir / 'm2' / 'before')
  capsys.readouterr()
  run('cached', reference='cached')
  assert 'm2/reference: starts' in capsys.readouterr().out
  assert sorted((folder / reference.FILE).read_text().splitlines()) == sorted(whole.splitlines())


def test_cached_log_probs_of_other_pairs_or_another_model_are_refused(run):
  workdir, _ = run('x', reference='cached')
  (workdir / 'm2' / 'model').rename(workdir / 'm2' / 'before')
  def reworded(rows):
    return [dataclasses.replace(row, chosen=row.chosen + ' fig') for row in rows]
  message = 'm2/reference was made with another inputs.m2/pairs/pairs.jsonl'
  with pytest.raises(InputError, match=message):
    run('x', reworded, reference='cached')
  with pytest.raises(InputError, match='m2/reference was made with another config.train.dtype'):
    run('x', reference='cached', dtype='bfloat16')
  lines = (workdir / 'm2' / 'reference' / reference.FILE).read_text().splitlines()
  (workdir / 'm2' / 'reference' / reference.FILE).write_text('\n'.join(lines[1:]) + '\n')
  message = r'logps.jsonl has changed since its stage finished \(21 records then\)'
  with pytest.raises(InputError, match=message):
    run('x', reference='cached')
  assert not (workdir / 'm2' / 'model').exists()
  path = workdir / 'm2' / 'reference' / 'manifest.json'
  stage.write_json(path, dict(json.loads(path.read_text()), params='of another model'))
  with pytest.raises(InputError, match='made with another params'):
    run('x', reference='cached')


def kill(workdir):
  """Restores the folder of M2 to its state after two steps -> the folder."""
  folder = workdir / 'm2' / 'model'
  (folder / 'done.json').unlink()
  for step in model_files.steps(folder):
    if step > 2:
      shutil.rmtree(folder / 'steps' / str(step))
  return folder


def end(workdir):
  """-> the hashes and the parameters of M2's last checkpoint."""
  folder, mesh = workdir / 'm2' / 'model', make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params, _ = store.restore_params(folder, mesh, 'float32')
  return model_files.read_hashes(folder, model_files.latest(folder)), jax.device_get(params)


@pytest.mark.slow
def test_a_run_resumes_bit_identically_and_with_its_rows_on_another_mesh_or_is_refused(run):
  """With moments in bfloat16, whose rounding draws random bits."""
  keys = dict(save_every=2, keep=99, moments='bfloat16')
  workdir, wanted = run('wide', mesh=(8, 1, 1), **keys)
  hashes, params = end(workdir)
  stored = ocp.PyTreeCheckpointHandler().metadata(kill(workdir) / 'steps' / '2' / 'train').tree
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(stored) if leaf.shape]
  assert len(dtypes) == 2 * len(jax.tree.leaves(params)) and {*dtypes} == {jnp.dtype('bfloat16')}
  with pytest.raises(InputError, match=r'config.train.moments \(bfloat16, now float32\)'):
    run('wide', mesh=(8, 1, 1), **keys | dict(moments='float32'))
  run('wide', mesh=(8, 1, 1), **keys)
  assert end(workdir)[0] == hashes

  kill(workdir)
  _, found = run('wide', mesh=(2, 2, 2), **keys)  # where a new run would have half the rows
  assert len(wanted) == len(found) > 4
  for a, b in zip(wanted, found, strict=True):
    a.pop('tokens_per_second'), b.pop('tokens_per_second')
    assert a == pytest.approx(b, abs=1e-4, rel=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, end(workdir)[1])

  workdir, _ = run('narrow', mesh=(2, 2, 2), **keys)
  kill(workdir)
  with pytest.raises(InputError, match='step has 4 rows .* rows must be a multiple of 8'):
    run('narrow', mesh=(8, 1, 1), **keys)


def test_a_mesh_that_does_not_divide_the_model_is_refused_and_nothing_written(run, tmp_path):
  with pytest.raises(InputError, match='dimension K = 2 does not divide over tensor = 8'):
    run('x', mesh=(1, 1, 8), reference='cached')
  assert sorted(path.name for path in (tmp_path / 'x' / 'm2').iterdir()) == ['pairs']


def damage(workdir):
  """Truncates every stored array of the init model."""
  for path in (workdir / 'm1' / 'model' / 'steps').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize('keys, before, message', [
    (dict(max_length=4096), None, 'max_length is 4096, more than the 128 tokens'),
    (dict(max_length=3), None, 'no pair is left to train on'),
    (dict(batch=99), None, 'fewer than one batch of 99'),
    (dict(), damage, 'the checkpoint is damaged')])
def test_a_refused_training_writes_nothing(run, tmp_path, keys, before, message):
  run('x')
  shutil.rmtree(tmp_path / 'x' / 'm2' / 'model')
  if before:
    before(tmp_path / 'x')
  with pytest.raises(InputError, match=message):
    run('x', **keys)
  assert sorted(path.name for path in (tmp_path / 'x' / 'm2').iterdir()) == ['pairs']


def test_nan_aborts_with_the_step_and_its_pairs(run):
  message = r'step 1, of p\d+, p\d+.*: \w+ is nan; lower config.train.learning_rate'
  with pytest.raises(InputError, match=message):
    run('nan', learning_rate=float('nan'))


def looked(alarms, count, **scalars):
  scalars = dict(dict(chosen_reward=0.0, margin=0.0, accuracy=0.9), **scalars)
  return [alarms.check(scalars) for _ in range(count)][-1]


def test_alarms_are_raised_once_and_cleared_again():
  alarms = Alarms()
  assert looked(alarms, 9) == (dict(alarm_chosen_falling=0, alarm_margin_without_accuracy=0), [])
  looks = [looked(alarms, 1, chosen_reward=-1.0) for _ in range(9)]
  sentences = [line for _, lines in looks for line in lines]
  assert len(sentences) == 1 and 'become less likely' in sentences[0]
  assert looks[-1][0]['alarm_chosen_falling'] == 1 and looks[-1][1] == []
  raised, sentences = looked(alarms, 10, margin=0.5, accuracy=0.5)
  assert raised == dict(alarm_chosen_falling=0, alarm_margin_without_accuracy=1)
  early = looked(Alarms(), 9, margin=0.5, accuracy=0.5)
  assert early[0]['alarm_margin_without_accuracy'] == 0
  assert Alarms().check(dict(loss=1.0)) == ({}, [])  # SFT


def test_dropout_noise_raises_no_alarm_and_a_resumed_run_keeps_its_alarms():
  rng = np.random.default_rng(0)
  noise = [dict(chosen_reward=float(x), margin=0.0, accuracy=0.5)
           for x in rng.normal(-0.7, 0.2, 40)]
  alarms = Alarms()
  assert sum(alarms.check(scalars)[0]['alarm_chosen_falling'] for scalars in noise) == 0
  fallen = [dict(chosen_reward=-2 - i / 10, margin=0.0, accuracy=0.5) for i in range(5)]
  found = [alarms.check(scalars)[0] for scalars in fallen]
  assert found[-1]['alarm_chosen_falling'] == 1
  resumed = Alarms([*noise, *fallen[:3]])
  assert [resumed.check(scalars)[0] for scalars in fallen[3:]] == found[3:]
