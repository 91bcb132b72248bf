"""Files in a bucket: the same bytes as on a disk, after kills and failing requests too."""
import asyncio
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import types

from buckets import Fault
from conftest import CHANGES, config_flags, init, main, run_main, server
from etils import epath
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import test_seeds
import tokenizers

from srlm_jax import (
  config as configs,
  InputError,
  metrics,
  model_files,
  records,
  schema,
  selection,
  stage,
  storage,
  study,
)
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import seeds, tokenizer
from srlm_jax.models.config import PRESETS
from srlm_jax.sandbox import data as sandbox


def uploads(method, path, body):
  return method in ('POST', 'PUT') and '/upload/' in path


@pytest.fixture
def at_once(monkeypatch):
  """A growing object saves every write at once."""
  monkeypatch.setattr(storage, 'SECONDS', 0)


@hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.lists(st.sampled_from(
    ['write', 'flush', 'close', 'kill', 'kill before parts are deleted', 'truncate'])))
def test_a_growing_object_holds_what_a_file_on_a_disk_would(bucket, at_once, tmp_path, actions):
  path, server = bucket
  path, disk = path / 'rows.jsonl', tmp_path / 'rows.jsonl'
  disk.write_bytes(b'')
  if path.exists():
    path.unlink()
  file, written = storage.growing(path), b''
  for i, action in enumerate(actions):
    if action == 'write':
      line = b'x' * i + b'\n'
      file.write(line)
      written += line
    elif action == 'flush':
      file.flush()
    elif action == 'truncate':
      written = b''.join(written.splitlines(keepends=True)[:1])
      file.flush()
      file.truncate(len(written))
    else:
      parts = {part: part.read_bytes() for part in path.parent.glob('*.part-*')}
      if action == 'close':
        file.close()
        assert path.read_bytes() == written and len(list(path.parent.iterdir())) == 1
      elif action == 'kill before parts are deleted':
        file.close()
        for part, data in parts.items():
          part.write_bytes(data)
      file = storage.growing(path)
      assert path.read_bytes() == written  # whoever opens it, all can read it
      assert b''.join(file.lines()) == written
  file.close()
  assert path.read_bytes() == written and len(list(path.parent.iterdir())) == 1


def test_a_growing_object_is_saved_after_some_seconds_and_before_the_program_ends(
    bucket, monkeypatch):
  path, _ = bucket
  out = records.Appender(path / 'rows.jsonl')
  out.append([dict(id='a')])
  assert not (path / 'rows.jsonl').read_bytes() and not list(path.glob('*.part-*'))
  storage.upload_pending()
  assert [part.read_bytes() for part in path.glob('*.part-*')] == [b'{"id": "a"}\n']
  out.append([dict(id='b')])
  assert len(list(path.glob('*.part-*'))) == 1
  monkeypatch.setattr(storage, 'SECONDS', 0)
  out.append([dict(id='c'), dict(id='d')])
  assert len(list(path.glob('*.part-*'))) == 2
  again = records.Appender(path / 'rows.jsonl')  # as if the run was killed
  assert again.count == 4
  again.close()
  assert [r['id'] for _, r in records.read_any(path / 'rows.jsonl')] == ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('kind', [503, 429, 'cut', 'lost', 'half', 'hang'])
def test_requests_that_fail_are_repeated(bucket, at_once, monkeypatch, kind):
  path, server = bucket
  monkeypatch.setattr('gcsfs.retry.asyncio', types.SimpleNamespace(  # waits for less time
      sleep=lambda seconds: asyncio.sleep(seconds / 50)))
  monkeypatch.setattr(storage, 'TIMEOUT', 0.5)
  storage._configure()
  (path / 'old').exists()  # makes the instance that epath uses
  for client in (storage._bucket(), *type(storage._bucket())._cache.values()):
    monkeypatch.setattr(client, 'requests_timeout', storage._SETTINGS['requests_timeout'])
  (path / 'old').write_text('old')
  data = bytes(range(256)) * 25_000  # 6.4 MB: a resumable upload
  with server.failing(Fault(kind), Fault(kind, 2, uploads)):
    with storage.replacing(path / 'old') as file:
      file.write('new')
    with storage.replacing(path / 'large', 'wb') as file:
      file.write(data)
  with server.failing(Fault(kind, 1, lambda method, url, body: 'alt=media' in url)):
    assert (path / 'old').read_text() == 'new' and (path / 'large').read_bytes() == data
  out = records.Appender(path / 'rows.jsonl')
  with server.failing(Fault(kind, 2, uploads)):
    for i in range(3):
      out.append([dict(id=str(i))])
  with server.failing(Fault(kind), Fault(kind, 1, lambda method, url, body: '/batch/' in url)):
    out.close()
  assert [r['id'] for _, r in records.read_any(path / 'rows.jsonl')] == ['0', '1', '2']
  assert len(list(path.iterdir())) == 3


def test_an_error_leaves_the_old_object(bucket):
  path, server = bucket
  (path / 'x').write_text('old')
  for size in (3, 6_000_000):
    with pytest.raises(RuntimeError), storage.replacing(path / 'x') as file:
      file.write('n' * size)
      raise RuntimeError
    with server.failing(Fault(403, 9, uploads)):
      with pytest.raises(InputError, match=r'x cannot be written \(Forbidden'):
        with records.replacing(path / 'x') as file:
          file.write('n' * size)
    assert (path / 'x').read_text() == 'old' and len(list(path.iterdir())) == 1


def test_folders_are_made_whole_or_begun_again(bucket):
  path, _ = bucket
  with pytest.raises(RuntimeError), storage.making_folder(path / 'new') as folder:
    (folder / 'x').write_text('1')
    raise RuntimeError
  assert not path.exists()
  making = storage.making_folder(path / 'new')
  with making as folder:
    (folder / 'x').write_text('1')
    assert (path / 'new.partial').exists()
    with storage.making_folder(path / 'new') as again:  # as after a kill
      assert not again.exists()
      (again / 'y').write_text('2')
  assert [p.name for p in path.iterdir()] == ['new']
  assert [p.name for p in (path / 'new').iterdir()] == ['y']
  with pytest.raises(InputError, match='new already exists and is not an empty folder'):
    with storage.making_folder(path / 'new'):
      pass


def test_copies_of_folders_and_links_in_a_bucket(bucket, tmp_path):
  path, _ = bucket
  for name in ('done.json', 'z/x', 'train/x', 'params/x'):
    (path / 'a' / name).write_text(name)
  server = bucket[1]
  start = len(server.requests)
  storage.copy_tree(path / 'a', path / 'b')
  assert 'done.json' in [url for method, url in server.requests[start:] if method == 'POST'][-1]
  assert (path / 'b' / 'z' / 'x').read_text() == 'z/x'
  storage.link(path / 'a', path / 'c', without='train')
  assert sorted(p.name for p in (path / 'c').iterdir()) == ['done.json', 'params', 'z']
  storage.unlink(path / 'c')
  assert not (path / 'c').exists() and (path / 'a' / 'z' / 'x').exists()


def test_parts_of_objects_and_stamps(bucket):
  path, _ = bucket
  array = np.arange(24, dtype='float32').reshape(4, 6)
  (path / 'x').write_bytes(b'12345678' + array.tobytes())
  assert storage.read_range(path / 'x', 2, 3) == b'345'
  np.testing.assert_array_equal(storage.mapped(path / 'x', np.float32, (4, 6), 8), array)
  with storage.local_start(path / 'x', b'123') as local:
    assert pathlib.Path(local).read_bytes() == b'123' + bytes(8 + 96 - 3)
  before = storage.stamp(path / 'x')
  assert storage.stamp(path / 'x') == before
  (path / 'x').write_bytes(b'12345678' + array.tobytes())
  assert storage.stamp(path / 'x') != before
  assert storage.absolute(path) == path and storage.obstacle(path / 'x' / 'y') is None


def test_a_bucket_that_cannot_be_used_gives_one_sentence(bucket, monkeypatch):
  path, server = bucket
  storage.check(f'--data={path}/a.jsonl,{path}/b.jsonl')
  with pytest.raises(InputError, match=r'--m0=gs://absent/x: there is no bucket gs://absent; crea'):
    storage.check('--m0=gs://absent/x')
  for wrong in ('s3://bucket', 'gs://'):
    with pytest.raises(InputError, match=rf'{wrong} is not supported; .*: gs://BUCKET/FOLDER'):
      storage.check(f'--workdir={wrong}')
  storage.check('--prompt=What is s3://bucket and gs://absent?')
  for code in (401, 403):
    with server.failing(Fault(code, 99)):
      with pytest.raises(InputError, match=r'gs://runs cannot be used \(.*injected.*; log in'):
        storage.check(f'--workdir={path}')
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None if n == 'gcsfs' else find_spec(n))
  with pytest.raises(InputError, match=r'needs the package gcsfs; pip install "srlm_jax\[gcs\]"'):
    storage.check(f'--workdir={path}')


def test_programs_report_a_bucket_that_cannot_be_used(bucket):
  path, server = bucket
  flags = '--config=sft:tiny', f'--workdir={path}', *config_flags('sft')
  said = main('sandbox', '--config=sft:tiny', '--workdir=gs://absent/x', code=1)
  assert said.count('error:') == 1 and 'there is no bucket gs://absent' in said
  with server.failing(Fault(403, 99, uploads)):  # may read, but not write
    said = main('sandbox', *flags, code=1)
  assert 'lock.json cannot be used (' in said and 'Storage Object Admin' in said
  for code, message in ((401, 'injected, 401'), (403, 'Forbidden: .* injected')):
    with server.failing(Fault(code, 99, in_upload('data/seeds/manifest.json'))):
      said = main('sandbox', *flags, code=1)
    assert re.search(rf'error: the bucket cannot be used \({message}\); log in', said)
  main('sandbox', *flags)


def test_metrics_are_saved_before_a_checkpoint(bucket, tmp_path):
  path, _ = bucket
  writer = metrics.Writer(path, -1)
  writer.write(0, dict(loss=1.0))
  writer.flush()
  writer.write(1, dict(loss=2.0))
  again = metrics.Writer(path, 0)  # as after a kill
  assert again.kept == [dict(step=0, loss=1.0)]
  again.write(1, dict(loss=3.0))
  again.close()
  assert metrics.last(path) == dict(step=1, loss=3.0)
  assert (path / 'metrics.jsonl').read_text().count('\n') == 2
  assert list((path / 'tensorboard').glob('events.*'))


def kill():
  """Kills the program that `main` runs."""
  os.kill(server().pid, signal.SIGKILL)


def until_done(program, *flags, before='from srlm_jax import storage; storage.SECONDS = 0'):
  """Runs a program again as long as it is killed -> the number of kills."""
  kills, ended = 0, (-signal.SIGKILL, '', '')
  while ended[0] == -signal.SIGKILL:
    ended = run_main(program, *flags, before=before)
    kills += ended[0] == -signal.SIGKILL
  assert ended[0] == 0, ended[2][-5000:]
  return kills


def upload(workdir, path, *without):
  """Copies a workdir from a disk to a bucket, as one that was made there."""
  for file in workdir.rglob('*'):
    name = file.relative_to(workdir)
    if file.is_file() and name.parts[0] != 'compiled' and not str(name).startswith(without):
      (path / name).write_bytes(file.read_bytes())
  for step in workdir.glob('*/model/steps/*'):
    if not str(step.relative_to(workdir)).startswith(without):
      for folder in (step, *step.iterdir()):
        if folder.is_dir():
          storage.commit(path / folder.relative_to(workdir))


def contents(workdir, folders) -> dict:
  """{file: content} of stages, without times and the places where they ran."""
  found = {}
  for folder in folders:
    for file in (epath.Path(workdir) / folder).iterdir():
      if file.suffix in records.HASHED:
        text = file.read_bytes()
        if file.name in ('done.json', 'manifest.json'):
          text = json.loads(text)
          text.pop('environments', text.pop('seconds', None))
          text.get('files', {}).pop('metrics.jsonl', None)
        elif file.name == 'metrics.jsonl':
          text = [json.loads(line) for line in text.splitlines()]
          for line in text:
            del line['tokens_per_second']
        found[f'{folder}/{file.name}'] = text
  return found


def in_upload(name):
  """Whether a request uploads an object with this in its name."""
  quoted = name.replace('/', '%2F')
  return lambda method, path, body: uploads(method, path, body) and (
      quoted in path or name.encode() in body[:300])


@pytest.mark.slow
def test_a_training_in_a_bucket_that_is_killed_ends_like_one_on_a_disk(bucket, demo, mesh):
  path, requests = bucket
  upload(demo[0], path, 'm2/model', 'm3')
  faults = [Fault(kill, 1, in_upload(name)) for name in (
      'm2/model/steps/2/params', 'm2/model/steps/4/commit_success.txt')]
  flags = '--config=iter2:tiny', f'--workdir={path}', *config_flags('m2')
  with requests.failing(*faults):
    assert until_done('train', *flags) == 2
  assert contents(path, ['m2/model']) == contents(demo[0], ['m2/model'])
  assert model_files.steps(path / 'm2' / 'model') == model_files.steps(demo[0] / 'm2' / 'model')
  store.restore_params(path / 'm2' / 'model', mesh, 'float32')  # which checks the hash
  assert model_files.recorded_hash(path / 'm2' / 'model') == model_files.recorded_hash(
      demo[0] / 'm2' / 'model')


@pytest.mark.slow
def test_sampling_in_a_bucket_that_is_killed_ends_with_the_same_bytes(bucket, demo):
  path, requests = bucket
  upload(demo[0], path, 'm2/respond', 'm2/model', 'm3')
  faults = [Fault(kill, 1, in_upload(name)) for name in (
      'responses-00000-of-00001.jsonl.part-000000000000000', 'm2/respond/done.json')]
  flags = '--config=iter2:tiny', f'--workdir={path}', *config_flags('m2')
  with requests.failing(*faults):
    assert until_done('sample.respond', *flags) == 2
  assert contents(path, ['m2/respond']) == contents(demo[0], ['m2/respond'])
  assert not list((path / 'm2' / 'respond').glob('*.part-*'))


@pytest.mark.slow
def test_models_are_converted_from_and_to_a_bucket(bucket, tmp_path):
  path, requests = bucket
  disk = tmp_path / 'disk'
  convert.from_hf(sandbox.M0, disk)
  convert.to_hf(disk, tmp_path / 'hf')
  for file in sandbox.M0.iterdir():
    (path / 'source' / file.name).write_bytes(file.read_bytes())
  flags = f'--from_hf={path}/source', f'--out={path}/ours'
  with requests.failing(Fault(kill, 1, in_upload('ours/source.json'))):  # one of the last files
    assert until_done('checkpoint.convert', *flags) == 1
  assert model_files.recorded_hash(path / 'ours') == model_files.recorded_hash(disk)
  assert not (path / 'ours.partial').exists() and not (path / 'ours.lock').exists()
  assert 'not an empty folder' in main('checkpoint.convert', *flags, code=1)
  convert.check_source(path / 'source', path / 'ours')
  (path / 'source' / 'config.json').write_text('{}')
  with pytest.raises(InputError, match='was converted from other files .* config.json'):
    convert.check_source(path / 'source', path / 'ours')
  main('checkpoint.convert', f'--checkpoint={path}/ours', f'--to_hf={path}/hf')
  for file in (tmp_path / 'hf').iterdir():
    assert (path / 'hf' / file.name).read_bytes() == file.read_bytes(), file
  said = {main('sample.generate', f'--model={model}', '--prompt=a', '--temperature=0',
               '--max_tokens=4').splitlines()[-1] for model in (disk, path / 'hf')}
  assert len(said) == 1


def test_a_step_in_a_bucket_counts_when_it_is_complete(bucket):
  path, _ = bucket
  for name in ('1/params/x', '1/commit_success.txt', '2/params/x', '2/params/commit_success.txt'):
    (path / 'steps' / name).write_text('')
  assert model_files.steps(path) == [1]


def test_a_tokenizer_of_transformers_is_read_from_a_bucket(bucket, tmp_path):
  path, _ = bucket
  model = tokenizers.Tokenizer(tokenizers.models.BPE({'<s>': 0, '</s>': 1, 'a': 2, 'b': 3}, []))
  model.add_special_tokens(['<s>', '</s>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  (path / 'tokenizer.json').write_bytes((tmp_path / 'tokenizer.json').read_bytes())
  (path / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>', eos_token='</s>')))
  assert tokenizer.load(path).encode('abba') == [2, 3, 3, 2]


def test_a_selection_in_a_bucket_measures_copies_and_deletes_them(
    bucket, tmp_path, tokenizer_folder, mesh, monkeypatch):
  path, _ = bucket
  folder, shape = path / 'm2' / 'model', PRESETS['tiny-test']
  store.write_model_files(shape, tokenizer_folder, folder)
  saver, params = store.manager(folder, None), init(shape)
  for step in (1, 2):
    store.save(saver, step, params, dict(x=np.zeros(3)))
  saver.close()
  summary = schema.TrainingSummary(
      steps=2, loss=1.0, params='abc', examples=32, padding_free=1.0, dropped={})
  stage.write_json(folder / 'done.json', dict(dataclasses.asdict(summary), files={}, seconds=1))
  stage.write_json(folder / 'manifest.json',
                   dict(format=stage.FORMAT, config={'train.select': 'measure'}))
  (path / 'data' / 'seeds' / 'ranked.jsonl').write_text('')
  seen = []

  def measure(command, candidate):
    seen.append(sorted(p.name for p in candidate.glob('steps/*/*')))
    store.restore_params(candidate, mesh, 'float32')
    return 0.5
  monkeypatch.setattr(selection, '_command', measure)
  config = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
  config.train.select = 'measure'
  selection.run(config, path)
  assert seen == 2 * [['_CHECKPOINT_METADATA', storage.COMMITTED, 'hash', 'params']]
  assert model_files.latest(folder) == 1 and model_files.steps(folder) == [1]
  assert not list(path.glob('m2/selection/*/m2/model/steps/*'))


def test_a_study_in_a_bucket_copies_what_its_runs_share(bucket):
  path, _ = bucket
  for name in ('m1/model/x', 'm2/x', 'm0/model/x'):
    (path / 'loop-0' / name).write_text(name)
  (path / 'blind-0' / 'm0' / 'model' / 'own').write_text('')
  (path / 'blind-0' / 'm1.partial').write_text('')  # a kill cut off an earlier copy
  (path / 'blind-0' / 'm1' / 'model' / 'x').write_text('m1')
  study.take(path / 'loop-0', path / 'blind-0', ('data', 'm0', 'sft', 'm1'))
  assert (path / 'blind-0' / 'm1' / 'model' / 'x').read_text() == 'm1/model/x'
  assert not (path / 'blind-0' / 'm0' / 'model' / 'x').exists()
  assert not (path / 'blind-0' / 'm2').exists()
  assert not (path / 'blind-0' / 'm1.partial').exists()
  stage.write_json(path / 'loop.json', dict(
      name='loop', seeds=5, changes=[],
      models=[dict(dict.fromkeys(study.COLUMNS), gain=None, errors={}, judge={}, against=None,
                   model='m2')]))
  assert study.overview(path).splitlines()[1].split()[:2] == ['loop', '5']


@pytest.mark.slow
def test_a_report_of_a_run_in_a_bucket_equals_that_on_a_disk(bucket, demo):
  path, _ = bucket
  upload(demo[0], path / demo[0].name, 'm0/model/steps', 'm1/model/steps', 'm2/model/steps',
         'm3/model/steps', 'sft/model/steps')
  (path / demo[0].name / 'report.html').unlink()
  main('report', f'--workdir={path / demo[0].name}')
  assert (path / demo[0].name / 'report.html').read_text() == (demo[0] / 'report.html').read_text()


def test_seeds_are_made_from_files_in_a_bucket(bucket, tmp_path):
  path, _ = bucket
  for name in ('a', 'b'):
    rows = test_seeds.write(tmp_path / f'{name}.jsonl', [
        test_seeds.record(f'{name}{i}', 0, 1, 2) for i in range(8)])
    (path / f'{name}.jsonl').write_bytes(rows.read_bytes())
  flags = '--config=sft:stories', '--config.data.source=ranked'
  main('data.seeds', *flags, f'--workdir={path}', f'--config.data.path={path}/*.jsonl')
  main('data.seeds', *flags, f'--workdir={tmp_path}', f'--config.data.path={tmp_path}/?.jsonl')
  assert contents(path, ['data/seeds']) == contents(tmp_path, ['data/seeds'])
  with pytest.raises(InputError, match='c.jsonl" is not a file'):
    seeds.find_files(f'{path}/c.jsonl')


@pytest.mark.slow
def test_the_loop_in_a_bucket_that_fails_and_kills_ends_like_one_on_a_disk(bucket, demo):
  path, requests = bucket
  rng = np.random.default_rng(0)
  faults = [Fault(kind, 40, lambda method, url, body: rng.random() < 0.01)
            for kind in (503, 429, 'cut')]
  # Orbax renames small files, with a copy and a deletion, which gcsfs cannot repeat.
  faults += [Fault(kind, 40, lambda method, url, body: rng.random() < 0.01 and (
      method == 'GET' or uploads(method, url, body))) for kind in ('lost', 'half')]
  kills = Fault(kill, 12, lambda method, url, body: uploads(method, url, body)
                and rng.random() < 0.01)
  flags = [f'--workdir={path}', '--size=tiny', *(f'--set={change}' for change in CHANGES)]
  with requests.failing(*faults, kills):
    assert until_done('loop', *flags) == kills.happened > 3
  assert all(fault.happened > 5 for fault in faults)
  folders = sorted(str(file.parent.relative_to(demo[0])) for file in demo[0].glob('*/*/done.json'))
  assert len(folders) > 30 and contents(path, folders) == contents(demo[0], folders)
  for model in ('m0', 'sft', 'm1', 'm2', 'm3'):
    folders = [folder / model / 'model' for folder in (path, demo[0])]
    assert len(set(map(model_files.recorded_hash, folders))) == 1
    assert model_files.steps(folders[0]) == model_files.steps(folders[1])
  assert not list(path.glob('*/*/*.part-*')) and not (path / 'lock.json').exists()
