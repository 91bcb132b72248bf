import json
import os
import subprocess
import sys
import time

from conftest import ROOT
import pytest

from srlm_jax import InputError, lock

HOLD = 'import sys, time\nfrom srlm_jax import lock\nwith lock.held(sys.argv[1]):\n  print("held", flush=True)\n  ' \
       'time.sleep(60)'


@pytest.fixture
def other(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  process = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()


def test_a_second_run_is_refused_with_who_holds_the_workdir_and_since_when(tmp_path, other):
  who = rf'is in use by \w+ on .*, process {other.pid}, since 20\d\d-.*another --workdir'
  with pytest.raises(InputError, match=who):
    with lock.held(tmp_path):
      pass
  assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == other.pid


def test_the_lock_of_a_killed_run_is_taken_over_and_a_free_one_is_removed(tmp_path, other):
  other.kill()
  other.wait()
  with lock.held(tmp_path):
    assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == os.getpid()
  assert not list(tmp_path.iterdir())


def test_a_lock_of_another_host_is_stale_without_a_heartbeat(tmp_path):
  path = tmp_path / 'lock.json'
  path.write_text(json.dumps(dict(id='x', owner='ann', host='elsewhere', pid=1, since='2026')))
  with pytest.raises(InputError, match='in use by ann on elsewhere'):
    with lock.held(tmp_path):
      pass
  before = time.time() - lock.STALE - 1
  os.utime(path, (before, before))
  with lock.held(tmp_path):
    pass


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
  with lock.held(tmp_path / 'new'):
    assert (tmp_path / 'new' / 'lock.json').exists()
  assert not (tmp_path / 'new').exists()


def test_the_heart_survives_a_file_system_that_fails_for_a_moment(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  fails = iter([OSError('stale file handle')] * 3)
  real = os.utime
  def utime(*args):
    if error := next(fails, None):
      raise error
    real(*args)
  with lock.held(tmp_path):
    real(tmp_path / 'lock.json', (0, 0))
    monkeypatch.setattr(os, 'utime', utime)
    ends = time.time() + 10
    while (tmp_path / 'lock.json').stat().st_mtime == 0 and time.time() < ends:
      time.sleep(0.02)
    assert (tmp_path / 'lock.json').stat().st_mtime > 0


def test_the_heart_beats(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  with lock.held(tmp_path):
    os.utime(tmp_path / 'lock.json', (0, 0))
    ends = time.time() + 10
    while (tmp_path / 'lock.json').stat().st_mtime == 0 and time.time() < ends:
      time.sleep(0.02)
    assert (tmp_path / 'lock.json').stat().st_mtime > 0


def test_a_stale_lock_that_another_run_took_is_given_back(tmp_path):
  path = tmp_path / 'lock.json'
  path.write_text(json.dumps(dict(id='new')))
  lock._remove_stale(path, dict(id='old'))
  assert json.loads(path.read_text()) == dict(id='new') and len(list(tmp_path.iterdir())) == 1


def test_of_many_runs_that_start_at_once_one_holds_the_lock(tmp_path):
  (tmp_path / 'lock.json').write_text(json.dumps(dict(id='x', host='elsewhere', pid=1)))
  os.utime(tmp_path / 'lock.json', (0, 0))  # stale
  runs = [subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True) for _ in range(4)]
  ends = time.time() + 50
  while sum(run.poll() is None for run in runs) > 1 and time.time() < ends:
    time.sleep(0.1)
  for run in runs:
    run.kill()
  said = [run.communicate() for run in runs]
  assert sum(out == 'held\n' for out, _ in said) == 1, said
  assert sum('in use by' in err for _, err in said) == 3, said
