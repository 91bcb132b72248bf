"""The lock of a workdir or output folder: held, stale, damaged, and under clock skew."""
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import buckets
from conftest import ROOT
import pytest

from srlm_jax import InputError, lock

HOLD = """
import os, sys, time
from srlm_jax import lock
workdir, lock.BEAT, ahead = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
path, utime = os.path.join(workdir, 'lock.json'), os.utime
def skewed(path):  # like a host whose clock is `ahead` seconds ahead
  utime(path, (time.time() + ahead,) * 2)
if ahead:
  os.utime = skewed
  lock._pid_scope = lambda: dict(host='elsewhere', boot='b', namespace=1)
with lock.held(workdir):
  if ahead:
    os.utime(path)
  print('held', flush=True)
  time.sleep(60)
"""

needs_proc = pytest.mark.skipif(not pathlib.Path('/proc/self/ns/pid').exists(),
                                reason='needs the /proc of Linux')


def hold(workdir, beat=10.0, ahead=0.0):
  """Starts a process that holds the lock of `workdir`; its clock is `ahead` seconds ahead."""
  return subprocess.Popen([sys.executable, '-c', HOLD, workdir, str(beat), str(ahead)], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def start(tmp_path):
  """A function that starts a process that holds the lock of `tmp_path`."""
  processes = []
  def start(**kwargs):
    processes.append(hold(tmp_path, **kwargs))
    assert processes[-1].stdout.readline() == 'held\n'
    return processes[-1]
  yield start
  for process in processes:
    kill(process)


def kill(process):
  process.kill()
  process.communicate()


def write(workdir, age=0.0, **fields):
  """Changes fields of the lock, or writes one of another host; its heartbeat is `age` s old."""
  path = workdir / 'lock.json'
  if path.exists():
    content = json.loads(path.read_text())
  else:
    content = dict(id='x', owner='ann', host='elsewhere', pid=1, since='2026')
  path.write_text(json.dumps(content | fields))
  os.utime(path, (time.time() - age,) * 2)


def assert_refused(workdir, match='is in use by'):
  before = (workdir / 'lock.json').read_bytes()
  with pytest.raises(InputError, match=match):
    with lock.held(workdir):
      pass
  assert (workdir / 'lock.json').read_bytes() == before


def assert_taken_over(workdir):
  with lock.held(workdir):
    assert json.loads((workdir / 'lock.json').read_text())['pid'] == os.getpid()
  assert not list(workdir.iterdir())


def test_a_second_run_is_refused_and_the_message_names_the_holder(tmp_path, start):
  other = start()
  assert_refused(tmp_path, rf'is in use by \w+ on .*, process {other.pid}, since 20\d\d-.*'
                           'another --workdir')
  assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == other.pid


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, start, capsys):
  kill(start())
  assert_taken_over(tmp_path)
  assert not capsys.readouterr().err  # no message about waiting


def test_what_a_run_left_that_was_killed_while_it_took_over_is_removed(tmp_path, start):
  """It had renamed a stale lock, and not yet deleted it. That of a run that lives stays."""
  process = start()
  shutil.copy(tmp_path / 'lock.json', tmp_path / f'lock.json.{"a" * 32}')
  kill(process)
  other = dict(json.loads((tmp_path / 'lock.json').read_text()), **lock._pid_scope(),
               pid=os.getpid(), started=lock._start_ticks('self'))
  (tmp_path / f'lock.json.{"b" * 32}').write_text(json.dumps(other))
  (tmp_path / 'lock.json.mine').write_text('')
  with lock.held(tmp_path):
    pass
  assert {p.name for p in tmp_path.iterdir()} == {f'lock.json.{"b" * 32}', 'lock.json.mine'}


def test_a_lock_of_another_host_without_a_heartbeat_is_stale(tmp_path, monkeypatch):
  write(tmp_path)
  assert_refused(tmp_path, 'in use by ann on elsewhere')
  write(tmp_path, age=lock.STALE + 1)
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  assert_taken_over(tmp_path)


def test_a_patient_run_takes_over_a_recent_lock_without_a_heartbeat(tmp_path, start, monkeypatch):
  """A launcher starts a run again on other machines, while the lock of a killed one is recent."""
  write(tmp_path)
  monkeypatch.setattr(lock, 'BEAT', 0.1)
  with lock.held(tmp_path, is_patient=True):
    assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == os.getpid()
  start(beat=0.1, ahead=1.0)
  with pytest.raises(InputError, match='is in use by'):
    with lock.held(tmp_path, is_patient=True):
      pass


def test_release_frees_the_locks_of_this_process_alone(tmp_path):
  with lock.held(tmp_path / 'a'), lock.held(tmp_path / 'b'):
    write(tmp_path / 'b', id='new')
    lock.release()
    assert not (tmp_path / 'a' / 'lock.json').exists()
    assert json.loads((tmp_path / 'b' / 'lock.json').read_text())['id'] == 'new'


@pytest.mark.parametrize('ahead', [-3600.0, 3600.0])
def test_a_live_lock_is_respected_despite_clock_skew(tmp_path, start, capsys, ahead):
  start(beat=0.1, ahead=ahead)
  assert_refused(tmp_path)
  where = 'future' if ahead > 0 else 'past'
  assert re.search(rf'found the lock of .*3[56]\d\d s in the {where} by the clock of this host; '
                   'waiting up to 30 s', capsys.readouterr().err)


@pytest.mark.parametrize('age', [-3600.0, 3600.0])
def test_a_dead_lock_is_taken_over_despite_clock_skew(tmp_path, monkeypatch, capsys, age):
  monkeypatch.setattr(lock, 'BEAT', 0.2)
  write(tmp_path, age=age)
  before = time.monotonic()
  assert_taken_over(tmp_path)
  assert time.monotonic() - before >= 3 * 0.2
  assert 'the lock of ann on elsewhere' in capsys.readouterr().err


def test_a_suspended_run_that_continues_while_watched_keeps_its_lock(tmp_path, start):
  other = start(beat=0.1)
  other.send_signal(signal.SIGSTOP)
  write(tmp_path, age=lock.STALE + 1)
  subprocess.Popen(['sh', '-c', f'sleep 1; kill -CONT {other.pid}'])
  assert_refused(tmp_path)


def test_a_stopped_process_of_this_host_keeps_its_lock(tmp_path, start):
  """It would write again when it continues, until its next heartbeat."""
  other = start(beat=10)
  other.send_signal(signal.SIGSTOP)
  old = time.time() - lock.STALE - 1
  os.utime(tmp_path / 'lock.json', (old, old))
  before = time.monotonic()
  assert_refused(tmp_path)
  assert time.monotonic() - before < 5


def test_a_lock_released_while_watched_is_free(tmp_path):
  write(tmp_path, age=3600.0)
  subprocess.Popen(['sh', '-c', f'sleep 1; rm {tmp_path}/lock.json'])
  before = time.monotonic()
  assert_taken_over(tmp_path)
  assert time.monotonic() - before < 3 * lock.BEAT / 2


@needs_proc
@pytest.mark.parametrize('field, value', [('boot', 'another'), ('namespace', 1)])
def test_a_pid_of_another_boot_or_namespace_is_not_trusted(
    tmp_path, start, monkeypatch, field, value):
  kill(start())
  write(tmp_path, **{field: value})
  assert_refused(tmp_path)
  write(tmp_path, age=lock.STALE + 1)
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  assert_taken_over(tmp_path)


@needs_proc
def test_a_reused_pid_does_not_keep_the_lock(tmp_path, start, capsys):
  kill(start())
  write(tmp_path, pid=os.getpid())
  assert_taken_over(tmp_path)
  assert not capsys.readouterr().err  # no message about waiting


def test_without_proc_the_host_and_the_pid_identify_a_process(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'PROC', tmp_path / 'absent')
  with lock.held(tmp_path):
    content = json.loads((tmp_path / 'lock.json').read_text())
    assert_refused(tmp_path)
  assert content['boot'] is content['namespace'] is content['started'] is None
  ended = subprocess.Popen(['true'])
  ended.wait()
  (tmp_path / 'lock.json').write_text(json.dumps(content | dict(pid=ended.pid)))
  assert_taken_over(tmp_path)


@needs_proc
def test_the_start_time_is_parsed_for_any_process_name(tmp_path):
  program = tmp_path / ') R 1 (2 3'
  program.symlink_to('/bin/sleep')
  before = time.clock_gettime(time.CLOCK_BOOTTIME)
  process = subprocess.Popen([program, '60'])
  after = time.clock_gettime(time.CLOCK_BOOTTIME)
  try:
    while pathlib.Path(f'/proc/{process.pid}/comm').read_text() != ') R 1 (2 3\n':  # still starting
      assert time.clock_gettime(time.CLOCK_BOOTTIME) < after + 30
      time.sleep(0.01)
    started = lock._start_ticks(process.pid) / os.sysconf('SC_CLK_TCK')
    assert before - 0.1 <= started <= after + 0.1
  finally:
    process.kill()
    process.wait()
  assert lock._start_ticks(process.pid) is None


def test_an_empty_lock_is_watched_before_it_is_taken_over(tmp_path, monkeypatch):
  path = tmp_path / 'lock.json'
  path.touch()
  (tmp_path / 'full').write_text(json.dumps(dict(id='x', owner='ann', host='elsewhere')))
  subprocess.Popen(['sh', '-c', f'sleep 0.5; cat {tmp_path}/full >> {path}'])
  with pytest.raises(InputError, match='is in use by ann on elsewhere'):
    with lock.held(tmp_path):
      pass
  (tmp_path / 'full').unlink()
  path.write_text('')
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  assert_taken_over(tmp_path)


@pytest.mark.parametrize('text', ['version = 1', '{"nodes": {}}', '[]'])
def test_a_file_that_is_not_a_lock_is_not_removed(tmp_path, text):
  (tmp_path / 'lock.json').write_text(text)
  os.utime(tmp_path / 'lock.json', (0, 0))
  assert_refused(tmp_path, 'lock.json is not a lock that this program wrote; move or delete it')


def test_a_lock_that_could_not_be_written_is_removed(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'x')
  with monkeypatch.context() as changed:
    changed.setattr(json, 'dump', full)
    with pytest.raises(OSError), lock.held(tmp_path):
      pass
  assert not (tmp_path / 'lock.json').exists()
  with lock.held(tmp_path):
    assert (tmp_path / 'lock.json').exists()


def test_a_run_that_writes_no_files_leaves_no_folder(tmp_path):
  with lock.held(tmp_path / 'runs' / 'new'):
    assert (tmp_path / 'runs' / 'new' / 'lock.json').exists()
  assert not list(tmp_path.iterdir())


def test_the_lock_of_an_output_folder_is_beside_it(tmp_path):
  with lock.held_output(f'{tmp_path}/new/out/', '--out'):
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['out.lock']
    with pytest.raises(InputError, match=f'{tmp_path}/new/out is in use by .* use another --to_hf'):
      with lock.held_output(tmp_path / 'new' / 'out', '--to_hf'):
        pass
    with lock.held_output(tmp_path / 'new' / 'other', '--out'):
      (tmp_path / 'new' / 'out').mkdir()
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['out']


def test_the_heartbeat_survives_a_temporary_file_system_failure(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  failures = iter([OSError('stale file handle')] * 3)
  real = os.utime
  def utime(*args):
    if error := next(failures, None):
      raise error
    real(*args)
  with lock.held(tmp_path):
    real(tmp_path / 'lock.json', (0, 0))
    monkeypatch.setattr(os, 'utime', utime)
    deadline = time.time() + 10
    while (tmp_path / 'lock.json').stat().st_mtime == 0 and time.time() < deadline:
      time.sleep(0.02)
    assert (tmp_path / 'lock.json').stat().st_mtime > 0


def test_the_heartbeat_updates_the_mtime(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  with lock.held(tmp_path):
    os.utime(tmp_path / 'lock.json', (0, 0))
    deadline = time.time() + 10
    while (tmp_path / 'lock.json').stat().st_mtime == 0 and time.time() < deadline:
      time.sleep(0.02)
    assert (tmp_path / 'lock.json').stat().st_mtime > 0


def test_a_run_exits_if_another_run_took_its_lock(tmp_path, start):
  other = start(beat=0.1)
  write(tmp_path, id='new')
  assert other.wait(timeout=30) == 1
  assert f'error: another run took over {tmp_path}' in other.stderr.read()


def test_a_lock_that_another_run_took_over_is_restored(tmp_path):
  path = tmp_path / 'lock.json'
  write(tmp_path)
  file = lock._File(path)
  old = file.read()
  write(tmp_path, id='new')
  file.remove(old)
  assert json.loads(path.read_text())['id'] == 'new' and len(list(tmp_path.iterdir())) == 1


def test_only_one_of_several_concurrent_runs_takes_a_stale_lock(tmp_path):
  write(tmp_path, age=3600.0)  # stale
  runs = [hold(tmp_path, beat=1.0) for _ in range(4)]
  deadline = time.time() + 50
  while sum(run.poll() is None for run in runs) > 1 and time.time() < deadline:
    time.sleep(0.1)
  for run in runs:
    run.kill()
  printed = [run.communicate() for run in runs]
  assert sum(out == 'held\n' for out, _ in printed) == 1, printed
  assert sum('in use by' in err for _, err in printed) == 3, printed


def put(path, age=0.0, **fields):
  """Writes the lock of another host into a bucket; its heartbeat is `age` s old."""
  holder = dict(id='x', owner='ann', host='elsewhere', pid=1, since='2026',
                beat=time.time_ns() - int(age * 1e9))
  (path / 'lock.json').write_text(json.dumps(holder | fields))


def test_a_lock_in_a_bucket_is_held_and_released(bucket):
  path, server = bucket
  other = hold(path)
  assert other.stdout.readline() == 'held\n'
  with pytest.raises(InputError, match=rf'is in use by \w+ on .*, process {other.pid}, since 20'):
    with lock.held(path):
      pass
  kill(other)
  with lock.held(path) as name:  # at once
    assert lock.is_seen(path, name) and json.loads((path / 'lock.json').read_text())['id'] == name
    with pytest.raises(InputError, match='is in use by'):
      with lock.held(path):
        pass
  assert not (path / 'lock.json').exists()
  with lock.held_output(path / 'out', '--out'):
    assert (path / 'out.lock').exists()
  assert not path.exists()


def test_a_lock_in_a_bucket_goes_stale(bucket, monkeypatch):
  path, server = bucket
  put(path)
  with pytest.raises(InputError, match='in use by ann on elsewhere'):
    with lock.held(path):
      pass
  for age in (lock.STALE + 1, -3600):
    put(path, age)
    monkeypatch.setattr(lock, 'BEAT', 0.05)
    with lock.held(path):
      assert json.loads((path / 'lock.json').read_text())['pid'] == os.getpid()
  (path / 'lock.json').write_text('[]')
  with pytest.raises(InputError, match='is not a lock that this program wrote'):
    with lock.held(path):
      pass


def test_only_one_of_two_takers_removes_a_stale_lock_in_a_bucket(bucket):
  path, _ = bucket
  put(path, lock.STALE + 1)
  one, two = (lock._open(path / 'lock.json') for _ in range(2))
  stale, seen = one.read(), two.read()
  one.remove(stale)
  assert one.create(dict(id='one'))
  two.remove(seen)  # it saw the stale lock too, but now another one is there
  assert not two.create(dict(id='two')) and two.read().holder['id'] == 'one'
  two.beat(dict(id='two'))
  assert two.read().holder['id'] == 'one'


def test_the_heartbeat_in_a_bucket_survives_failures_and_ends_a_run_that_lost_its_lock(
    bucket, monkeypatch):
  path, server = bucket
  other = hold(path, beat=0.1)
  assert other.stdout.readline() == 'held\n'
  file = lock._open(path / 'lock.json')
  before = file.read()
  with server.failing(buckets.Fault(503, 2), buckets.Fault('cut', 1), buckets.Fault('lost', 1)):
    deadline = time.monotonic() + 30
    while file.read().generation == before.generation and time.monotonic() < deadline:
      time.sleep(0.1)
  assert file.read().holder['beat'] > before.holder['beat'] and other.poll() is None
  put(path, id='new')
  assert other.wait(timeout=30) == 1
  assert f'error: another run took over {path}' in other.stderr.read()


def test_a_lock_whose_answer_is_lost_is_still_held(bucket):
  path, server = bucket
  with server.failing(buckets.Fault(
      'lost', 1, lambda method, url, body: method == 'POST' and 'lock.json' in url)):
    with lock.held(path):
      assert json.loads((path / 'lock.json').read_text())['pid'] == os.getpid()
  assert not (path / 'lock.json').exists()
