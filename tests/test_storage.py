"""Files in a bucket: the same bytes as on a disk, after kills and failing requests too."""
import asyncio
import importlib.util
import json
import os
import pathlib
import signal
import sys
import types

from buckets import Fault
from conftest import CHANGES, config_flags, main, run_main, server
from etils import epath
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from srlm_jax import InputError, metrics, model_files, records, storage


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
  timeout = storage._SETTINGS.get('requests_timeout')
  monkeypatch.setattr(storage, 'TIMEOUT', 0.5)
  storage._set_timeout()
  storage._bucket().requests_timeout = storage._SETTINGS['requests_timeout']
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
  storage._bucket().requests_timeout = timeout


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
  with pytest.raises(InputError, match=r's3:// is not supported; .*: gs://BUCKET/FOLDER'):
    storage.check('--workdir=s3://bucket/x')
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
  flags = '--config=sft:tiny', f'--workdir={path}'
  said = main('sandbox', '--config=sft:tiny', '--workdir=gs://absent/x', code=1)
  assert said.count('error:') == 1 and 'there is no bucket gs://absent' in said
  with server.failing(Fault(403, 99, uploads)):  # may read, but not write
    said = main('sandbox', *flags, code=1)
  assert 'lock.json cannot be used (' in said and 'Storage Object Admin' in said
  writes = lambda method, url, body: uploads(method, url, body) and b'ranked.jsonl' in body
  with server.failing(Fault(401, 99, writes)):
    said = main('sandbox', *flags, code=1)
  assert 'error: the bucket cannot be used (injected, 401); log in' in said
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
