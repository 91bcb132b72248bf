"""The whole loop on several hosts, one CPU device each, against one host; and with a lost host.

With `-s` it prints a table: the largest difference of a parameter of each model, its last loss, and
the records that differ.
"""
import collections
import json
import re
import shutil
import sys
import time

from conftest import CHANGES, config_flags, main, make_mesh
import jax
import numpy as np
import processes
import pytest

from srlm_jax import catalog, model_files, preemption, records, schema
from srlm_jax.checkpoint import convert, store

pytestmark = pytest.mark.slow
MODELS = 'sft', 'm1', 'm2', 'm3'
ROWS = 'train.rows=4'  # the same on 1, 2 and 4 hosts
EXACT = 1e-5           # the difference of a parameter after the same steps on another mesh, and
SHARE = 1e-4           # the share of the parameters of which it may be more:
MOST = 1e-4            # AdamW moves a weight whose gradient is all rounding by up to its rate


def loop(workdir, changes=(*CHANGES, ROWS)):
  """The command of the whole loop."""
  return [sys.executable, '-m', 'srlm_jax.loop', '--size=tiny', f'--workdir={workdir}',
          *(f'--set={change}' for change in changes)]


def finish(runs):
  for code, errors in processes.ends(runs, seconds=900):
    assert code == 0, errors


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The folder of a finished loop on one host."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  main('loop', *loop(workdir)[3:])
  return workdir


def parameters(folder):
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    return jax.tree.leaves(jax.device_get(store.restore_params(folder, mesh, 'float32')[0]))


def differences(a, b) -> np.ndarray:
  """The difference of every parameter of two models."""
  return np.concatenate([abs(x - y).flatten()
                         for x, y in zip(parameters(a), parameters(b), strict=True)])


def made_by(folder) -> dict[str, list[str]]:
  """{file: its records as JSON} of a stage; the shards of a file are one, in request order."""
  found = {}
  for path in sorted(folder.glob('*.jsonl')):
    file = re.sub(r'-\d{5}-of-\d{5}\.', '-*.', path.name)
    if file not in catalog.KINDS or file in found:
      continue  # metrics.jsonl, or another shard
    kind = catalog.KINDS[file]
    rows = (records.read_shards(folder, catalog.stem(file), kind) if file.endswith(catalog.SHARDS)
            else records.read(path, kind))
    found[file] = [records.dump(row) for row in rows]
  return found


def differing(a: list[str], b: list[str]) -> int:
  """The records of one list that the other one lacks, whichever are more."""
  a, b = collections.Counter(a), collections.Counter(b)
  return max((a - b).total(), (b - a).total())


def compared(one, other) -> list[dict]:
  """For every model: what differs between two runs of the loop.

  data: the records of its training data that differ
  records: those of all of its stages, of `total`
  moved: the largest difference of a parameter
  apart: the share of the parameters that differ by more than EXACT
  loss: the last of both
  reports: files of numbers that differ
  """
  rows = []
  for model in MODELS:
    row = dict(model=model, data=0, records=0, total=0, reports=[])
    for done in sorted(one.glob(f'{model}/*/done.json')):
      here, there = done.parent, other / model / done.parent.name
      a, b = made_by(here), made_by(there)
      assert a.keys() == b.keys(), here
      row['records'] += sum(differing(a[file], b[file]) for file in a)
      row['total'] += sum(map(len, a.values()))
      if here.name in ('eft', 'pairs'):
        row['data'] += differing(*(x[f'{here.name}.jsonl'] for x in (a, b)))
      for name in ('agreement.json', 'oracle.json', 'health.json', 'audit.json'):
        if (here / name).exists() and (here / name).read_text() != (there / name).read_text():
          row['reports'].append(name)
    folders = one / model / 'model', other / model / 'model'
    row['loss'] = [json.loads((f / 'done.json').read_text())['loss'] for f in folders]
    row['rows'] = [json.loads((f / 'rows.json').read_text())['shape'] for f in folders]
    found = differences(*folders)
    row |= dict(moved=float(found.max()), apart=float((found > EXACT).mean()))
    rows.append(row)
  return rows


def show(title: str, rows: list[dict]):
  """Prints what `compared` found as a table."""
  print(f'\n{title}\nmodel  largest difference  last loss        training data  records')
  for row in rows:
    losses = ', '.join(f'{loss:.4f}' for loss in row['loss'])
    print(f'{row["model"]:5}  {row["moved"]:18.2g}  {losses:15}  {row["data"]:13}  '
          f'{row["records"]} of {row["total"]} {" ".join(row["reports"])}')


@pytest.mark.parametrize('hosts', [2, 4])
def test_the_loop_on_several_hosts_gives_the_models_and_records_of_one(one, tmp_path, hosts):
  """Until a sampled token differs: parameters that differ by rounding may move a draw.

  After that the next model is trained on other data, and what differs is counted and printed.
  """
  other = tmp_path / 'run'
  shutil.copytree(one / 'm0', other / 'm0')  # a run on several hosts does not convert it
  finish(processes.start(hosts, *loop(other)))
  rows = compared(one, other)
  show(f'{hosts} hosts and one', rows)
  is_same = True
  for row in rows:
    assert row['rows'][0] == row['rows'][1] and row['rows'][0][0] == 4
    is_same = is_same and not row['data']
    if is_same:
      assert row['moved'] <= MOST and row['apart'] <= SHARE
      assert row['loss'][0] == pytest.approx(row['loss'][1], abs=1e-4)
      assert row['records'] <= 0.02 * row['total'] and (row['records'] or not row['reports'])
  assert rows[0]['moved'] > 0  # the mesh was another one
  assert not rows[0]['data'] and not rows[1]['data']  # at least these two are compared


def kill_and_continue(hosts, command, victim, has_begun):
  """Runs a command, kills a host once it `has_begun`, and runs it again."""
  runs = processes.start(hosts, *command)
  while not has_begun():
    time.sleep(0.02)
    assert all(run.poll() is None for run in runs), processes.ends(runs)
  runs[victim].kill()
  found = processes.ends(runs)
  found.pop(victim)
  assert found == [(preemption.EXIT_CODE, processes.lost(victim, hosts))] * (hosts - 1)
  finish(processes.start(hosts, *command))


def test_one_of_four_hosts_is_lost_in_sampling_and_in_training_and_a_restart_changes_nothing(
    one, tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for folder in (whole, killed):
    for part in ('data', 'm1', 'm2/respond', 'm2/pairs'):
      shutil.copytree(one / part, folder / part)

  def command(program, folder):
    return [sys.executable, '-m', f'srlm_jax.{program}', '--config=iter2:tiny',
            f'--workdir={folder}', *config_flags('m2'), f'--config.{ROWS}']
  for program in ('sample.judge', 'train'):
    finish(processes.start(4, *command(program, whole)))
  shards = [killed / 'm2' / 'judge' / records.shard_name('judgements', i, 4) for i in range(4)]
  kill_and_continue(4, command('sample.judge', killed), 0,
                    lambda: shards[3].exists() and shards[3].stat().st_size)
  model = killed / 'm2' / 'model'
  kill_and_continue(4, command('train', killed), 3, lambda: len(model_files.steps(model)) > 1)
  for shard in shards:
    assert shard.read_bytes() == (whole / 'm2' / 'judge' / shard.name).read_bytes()
  assert model_files.read_hashes(model) == model_files.read_hashes(whole / 'm2' / 'model')


def train(hosts, one, folder, model='m2', changes=(ROWS,)):
  """Trains a model anew, in a copy of a finished run -> the copy."""
  shutil.copytree(one, folder)
  shutil.rmtree(folder / model / 'model')
  config = {'sft': 'sft', 'm1': 'iter1', 'm2': 'iter2', 'm3': 'iter3'}[model]
  flags = *config_flags(model), *(f'--config.{change}' for change in changes)
  finish(processes.start(hosts, sys.executable, '-m', 'srlm_jax.train', f'--config={config}:tiny',
                         f'--workdir={folder}', *flags))
  return folder


LORA = ('train.rows=4', 'train.lora_rank=4', 'train.learning_rate=2e-4',
        'train.learning_rate_end=2e-5')
CACHED = 'train.rows=8', 'train.accumulate=2', 'train.reference=cached', 'train.dropout=0.1'


@pytest.mark.parametrize('model, changes', [
    *((model, (ROWS,)) for model in MODELS), ('m2', CACHED), ('m2', LORA)],
    ids=[*MODELS, 'm2 with a cached reference, micro-batches and dropout', 'm2 with LoRA'])
def test_training_on_two_and_on_four_hosts_ends_with_the_parameters_of_one(
    one, tmp_path, model, changes):
  """On the same data, those of one host."""
  alone = one if changes == (ROWS,) else train(1, one, tmp_path / '1', model, changes)
  folders = [alone / model / 'model', *(
      train(hosts, one, tmp_path / str(hosts), model, changes) / model / 'model'
      for hosts in (2, 4))]
  losses = [json.loads((folder / 'done.json').read_text())['loss'] for folder in folders]
  moved = [differences(folders[0], folder) for folder in folders[1:]]
  for hosts, found in zip((2, 4), moved, strict=True):
    print(f'\n{model} {" ".join(changes)}: on {hosts} hosts the largest difference of a parameter '
          f'is {found.max():.2g}, {(found > EXACT).sum()} of {found.size} are above {EXACT:g}')
    assert 0 < found.max() <= MOST and (found > EXACT).mean() <= SHARE
  print('last loss on 1, 2 and 4 hosts', *losses)
  assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
  logps = [folder.parent / 'reference' / 'logps.jsonl' for folder in folders]
  if changes == CACHED:  # the same pairs in the same order
    ids = [[json.loads(line)['id'] for line in path.read_text().splitlines()] for path in logps]
    assert ids[0] and ids[0] == ids[1] == ids[2]


def test_an_adapter_trained_on_two_hosts_is_sampled_and_exported_by_any_number(one, tmp_path):
  two = train(2, one, tmp_path / 'two', changes=LORA)
  assert (two / 'm2' / 'model' / 'lora.json').exists()
  command = [sys.executable, '-m', 'srlm_jax.sample.respond', '--config=iter2:tiny', '--on=heldout',
             *config_flags('m2')]
  group = '--config.sample_mesh.data=1', '--config.sample_mesh.tensor=2'
  found = {}
  for name, hosts, flags in (('one', 1, ()), ('two', 2, ()), ('group of two', 2, group)):
    folder = two / 'm2' / 'answers'
    shutil.rmtree(folder, ignore_errors=True)
    finish(processes.start(hosts, *command, f'--workdir={two}', *flags))
    found[name] = list(records.read_shards(folder, 'responses', schema.Response))
    assert len(list(folder.glob('*.jsonl'))) == (1 if flags else hosts)
  assert found['one'] and found['one'] == found['two']
  differ = sum(a != b for a, b in zip(found['one'], found['group of two'], strict=True))
  print(f'\nadapter, group of two hosts: {differ} of {len(found["one"])} answers differ')
  assert differ <= 0.05 * len(found['one'])
  # The export is the model that training and sampling compute.
  convert.to_hf(two / 'm2' / 'model', tmp_path / 'hf')
  convert.from_hf(tmp_path / 'hf', tmp_path / 'back')
  assert differences(two / 'm2' / 'model', tmp_path / 'back').max() < 1e-6
  assert differences(one / 'm1' / 'model', tmp_path / 'back').max() > MOST
