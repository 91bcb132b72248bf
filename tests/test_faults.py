"""Power loss, full disks and folders without permission; `faults.py` is the long version."""
import contextlib
import errno
import logging
import os
import pathlib
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import types

from absl import flags
from conftest import init
from etils import epath
import faults
import orbax.checkpoint as ocp
import power_loss
import pytest

from srlm_jax import cli, InputError, metrics, model_files, records, spill, storage
from srlm_jax.checkpoint import store
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']

needs_cc = pytest.mark.skipif(not shutil.which('cc'), reason='the shim needs a C compiler, cc')
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='to mount a small disk needs root')


def logged(tmp_path, program: str, *arguments: str):
  """Runs a Python program in an empty folder -> the disk before it, and the events."""
  run, log = tmp_path / 'run', tmp_path / 'log'
  run.mkdir()
  disk = power_loss.Disk(run)
  subprocess.run([sys.executable, *arguments, '-c', program], check=True, cwd=run,
                 env=dict(os.environ, **power_loss.environment(run, log)))
  return disk, list(power_loss.events(log)) if log.exists() else []


def contents(folder) -> dict[str, object]:
  """{path: bytes of a file, target of a link, None of a folder}."""
  return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else
          None if path.is_dir() else path.read_bytes() for path in folder.rglob('*')}


SHORT = '''
import os
def sync(path):
  file = os.open(path, os.O_RDONLY)
  os.fsync(file)
  os.close(file)
def write(path, text, mode='w'):
  with open(path, mode) as file:
    file.write(text)
'''


@needs_cc
@pytest.mark.parametrize('program, left', [
    ('write("a", "1")', {}),
    ('write("a", "1"); sync("a")', {}),  # the name is lost
    ('write("a", "1"); sync(".")', dict(a=b'')),  # the data is lost
    ('write("a", "1"); sync("a"); sync(".")', dict(a=b'1')),
    ('write("a", "1"); sync("a"); sync("."); write("a", "2", "a")', dict(a=b'1')),
    ('write("a", "12"); sync("a"); sync("."); os.truncate("a", 1)', dict(a=b'12')),
    ('write("a", "1"); sync("a"); sync("."); write("b", "2"); os.rename("b", "a")', dict(a=b'1')),
    ('write("a", "1"); sync("a"); sync("."); write("b", "2"); os.rename("b", "a"); sync(".")',
     dict(a=b'')),
    ('write("a", "1"); sync("a"); os.rename("a", "b"); sync(".")', dict(b=b'1')),
    ('write("a", "1"); sync("a"); sync("."); os.unlink("a")', dict(a=b'1')),
    ('os.makedirs("a/b"); write("a/b/c", "1"); sync("a/b/c"); sync("a/b"); sync("a")', {}),
    ('os.makedirs("a/b"); sync("."); sync("a")', {'a': None, 'a/b': None}),
    ('os.symlink("x", "a"); write("b", "1"); sync("b"); os.link("b", "c"); sync(".")',
     dict(a='x', b=b'1', c=b'1')),
    ('os.fdatasync(os.open("a", os.O_CREAT | os.O_WRONLY)); sync(".")', dict(a=b'')),
    ('os.write(os.open("a", os.O_CREAT | os.O_WRONLY | os.O_SYNC), b"1"); sync(".")', dict(a=b'1')),
    ('write("a", "1"); os.mkdir("d"); os.sync(); os.rmdir("d")', dict(a=b'1', d=None)),
])
def test_after_a_crash_there_is_what_was_synced(tmp_path, program, left):
  disk, events = logged(tmp_path, SHORT + program, '-I', '-S')
  for event in events:
    disk.apply(event)
  disk.check()
  disk.save(tmp_path / 'after')
  assert contents(tmp_path / 'after') == left


EVERY_CALL = '''
import os, shutil, subprocess, threading
with open('a', 'wb', buffering=0) as file:
  file.write(b'x' * 10)
  os.ftruncate(file.fileno(), 12)
  copy = os.dup(file.fileno())
  os.write(copy, b'yy')
os.mkdir('d')
folder = os.open('d', os.O_RDONLY)
file = os.open('b', os.O_RDWR | os.O_CREAT, dir_fd=folder)
os.pwrite(file, b'123', 100)
os.pwritev(file, [b'ab', b'cd'], 3)
os.writev(file, [b'e', b'f'])
os.posix_fallocate(file, 0, 200)
if not os.fork():
  os.write(file, b'child')
  os._exit(0)
os.wait()
shutil.copyfile('d/b', 'c')  # sendfile or copy_file_range
os.copy_file_range(os.open('a', os.O_RDONLY), file, 5, offset_dst=50)
os.link('c', 'e'), os.rename('c', 'd/c'), os.symlink('e', 's'), os.truncate('e', 20)
os.rename('s', 't', src_dir_fd=os.open('.', os.O_RDONLY), dst_dir_fd=folder)
def write(i):
  with open(f't{i}', 'wb', buffering=0) as file:
    for k in range(20):
      file.write(b'%d' % k)
threads = [threading.Thread(target=write, args=[i]) for i in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
subprocess.run('echo 1 > sh; cat sh >> a; mv sh sh2; rm t1; mkdir -p q/w; cp -a d q; rm -r q/w',
               shell=True, check=True)
shutil.rmtree('q')
'''


@needs_cc
def test_the_log_explains_everything_in_the_folder_and_the_disk_may_keep_a_part(tmp_path):
  disk, events = logged(tmp_path, EVERY_CALL, '-I', '-S')
  for event in events:
    disk.apply(event)
  disk.check()
  disk.save(tmp_path / 'after')
  assert not contents(tmp_path / 'after')
  states = []
  for seed in range(30):
    disk.save(tmp_path / 'after', random.Random(seed))
    states.append(contents(tmp_path / 'after'))
  assert len({str(state) for state in states}) > 20
  whole, found = contents(tmp_path / 'run'), [state['a'] for state in states if 'a' in state]
  assert {name for state in states for name in state} >= whole.keys()
  assert b'' in found and whole['a'] in found  # empty and whole
  assert any(data.startswith(b'\0\0') for data in found)  # the later part without the earlier one


@needs_cc
def test_what_the_shim_cannot_see_is_an_error(tmp_path):
  disk, events = logged(tmp_path, '''
import mmap
with open('a', 'w+b') as file:
  file.write(b'12'), file.flush()
  mmap.mmap(file.fileno(), 2)[:1] = b'x'
''', '-I', '-S')
  with pytest.raises(power_loss.Escaped, match='a shared writable mapping'):
    for event in events:
      disk.apply(event)


# Marks are folders: their creation tells the replay how far the program was.
WRITERS = '''
import os, sys
from srlm_jax import storage, records, metrics
storage.SECONDS = {seconds}
if {is_broken}:
  os.fsync = lambda file: None
for i in range(3):
  with storage.replacing('new/replaced.json') as file:
    file.write(str(i) * 9000)
  os.mkdir(f'replaced {{i}}')
out = records.Appender('rows/rows.jsonl')
for i in range(6):
  out.append([dict(id=i, text='x' * 5000)])
  os.mkdir(f'row {{i}}')
out.close()
os.mkdir('closed')
with storage.making_folder('made/out') as folder:
  (folder / 'in').mkdir()
  (folder / 'in' / 'a').write_text('a' * 9000)
  (folder / 'config.json').write_text('b' * 9000)
os.mkdir('made it')
writer = metrics.Writer('model', -1)
writer.write(0, dict(loss=1.0))
writer.flush()
os.mkdir('flushed')
'''


def wrong_states(tmp_path, seconds: float, is_broken: bool) -> list[str]:
  """What a power loss damages in the files of WRITERS, of what it must not."""
  disk, events = logged(tmp_path, WRITERS.format(seconds=seconds, is_broken=is_broken))
  after, marks, found, rng = tmp_path / 'after', [], [], random.Random(0)

  def check(state):
    count = sum(mark.startswith('replaced') for mark in marks)
    now = after / 'new' / 'replaced.json'
    have = now.read_text() if now.exists() else None
    if have not in (str(count) * 9000, str(count - 1) * 9000 if count else None):  # new or old
      found.append(f'{state}: replaced.json')
    rows = after / 'rows' / 'rows.jsonl'
    lines = []
    if rows.exists():
      records.Appender(rows).close()  # as a resumed stage opens it
      lines = [row['id'] for _, row in records.read_any(rows)]
    is_durable = not seconds or 'closed' in marks
    wanted = sum(mark.startswith('row ') for mark in marks) if is_durable else 0
    if lines != list(range(len(lines))) or len(lines) < wanted:
      found.append(f'{state}: {lines} of {wanted} rows')
    made = after / 'made' / 'out'
    if (made.exists() or 'made it' in marks) and contents(made) != {
        'in': None, 'in/a': b'a' * 9000, 'config.json': b'b' * 9000}:
      found.append(f'{state}: made/out')
    lines = after / 'model' / 'metrics.jsonl'
    if 'flushed' in marks and (not lines.exists() or b'"loss": 1.0' not in lines.read_bytes()):
      found.append(f'{state}: metrics')

  for i, event in enumerate(events):
    is_synced = disk.apply(event)
    if event.kind == 'M' and os.path.dirname(event.path) == disk.path:
      marks.append(os.path.basename(event.path))
    if is_synced or event.kind in 'MR' or i % 5 == 0:
      for rng_or_none in (None, rng):
        disk.save(after, rng_or_none)
        check(f'event {i}, {event.kind}, {"random" if rng_or_none else "strict"}')
  disk.check()
  return found


@needs_cc
@pytest.mark.parametrize('seconds', [0, 1000])
def test_a_power_loss_does_not_damage_what_storage_has_written(tmp_path, seconds):
  assert not wrong_states(tmp_path, seconds, is_broken=False)


@needs_cc
def test_without_a_sync_the_same_check_fails(tmp_path):
  found = wrong_states(tmp_path, 0, is_broken=True)
  assert all(any(name in text for text in found)
             for name in ('replaced.json', 'rows', 'made/out', 'metrics'))


@pytest.mark.parametrize('tail', [b'', b'{"id": "b', b'{"id": "b\0\0\0\0', b'\0\0\0', b'\0\0\n',
                                  b'{"id": \0\0}\n{"id": "c"}\n'])
def test_what_a_power_loss_left_of_a_line_is_removed(tmp_path, tail):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"id": "a"}\n' + tail)
  out = records.Appender(path)
  assert out.count == 1 and path.read_bytes() == b'{"id": "a"}\n'
  out.append([dict(id='b')])
  out.close()
  assert [row['id'] for _, row in records.read_any(path)] == ['a', 'b']


def test_metrics_continue_after_what_a_power_loss_left(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 0, "loss": 1.0}\n{"step": 1, \0\0}\n')
  writer = metrics.Writer(tmp_path, 5)
  assert writer.kept == [dict(step=0, loss=1.0)]
  writer.write(1, dict(loss=0.5))
  writer.close()
  assert metrics.last(tmp_path) == dict(step=1, loss=0.5)


@pytest.mark.parametrize('error, text', [
    (OSError(errno.ENOSPC, 'x', '{at}/new/a'),
     r'^the disk of {at} \(\d+ MiB free of \d+ MiB\) is full; free space, and run'),
    (ValueError('RESOURCE_EXHAUSTED: Failed writing: "{at}/a": Failed to write 9 bytes to file 3: '
                "No space left on device [os_error_code='28']"), r'^the disk of {at} \(.*is full'),
    (OSError(errno.ENOSPC, 'x'), r'^the disk of {at} \(.*\) is full'),
    (OSError(errno.EDQUOT, 'x', '{at}/a'), r'^{at}/a cannot be used \(the disk quota is used up\)'),
    (OSError(errno.EFBIG, 'x', '{at}/a'), r'^{at}/a cannot be used \(the file would exceed'),
    (PermissionError(errno.EACCES, 'x', '{at}/a'), r'^{at}/a cannot be used \(permission denied\)'),
    (OSError(errno.EROFS, 'x', '{at}/a'), r'^{at}/a cannot be used \(the disk is read-only\)'),
    (OSError(errno.EIO, 'x'), r'^{at} cannot be used \(the disk fails\)')])
def test_an_error_of_the_disk_is_one_sentence(tmp_path, error, text):
  at = str(tmp_path)
  if isinstance(error, OSError):
    error.filename = error.filename and error.filename.format(at=at)
  else:
    error = ValueError(str(error).format(at=at))
  for e in (error, outer(error)):
    with pytest.raises(InputError, match=text.format(at=at).replace('{', '{{')):
      raise storage.failure(e, [at])


def outer(error: Exception) -> Exception:
  """Another error that `error` caused."""
  found = RuntimeError('the checkpoint was not saved')
  found.__cause__ = error
  return found


@pytest.mark.parametrize('error', [
    FileNotFoundError(errno.ENOENT, 'x', '/elsewhere/a'), ValueError('x'),
    OSError('a request failed'), RuntimeError('TPU driver: open(/dev/vfio/0): Permission denied')])
def test_other_errors_are_not_errors_of_the_disk(error):
  assert storage.failure(error, ['/run']) is None
  assert storage.failure(outer(error), ['/run']) is None


def test_an_error_of_a_path_is_one_of_a_path_that_the_user_gave():
  for path in ('/run/a', '/run', '/'):
    error = FileNotFoundError(errno.ENOENT, 'x', path)
    assert str(storage.failure(error, ['/run'])).startswith(f'{path} cannot be used (No such file')
    assert storage.failure(outer(error), ['/run']) is None


def test_a_bug_while_an_error_is_handled_is_not_that_error():
  try:
    try:
      raise PermissionError(errno.EACCES, 'x', '/run/a')
    except OSError:
      raise AttributeError('x')  # noqa: B904
  except AttributeError as error:
    assert storage.failure(error, ['/run']) is None


@pytest.mark.parametrize('free, named', [
    ((2**30, 2**30), 'the disk of {} (space) or the disk of /proc (space) is full; '),
    ((2**30, 2**20), 'the disk of /proc (space) is full; '),
    ((2**20, 2**30), 'the disk of {} (space) is full; ')])
def test_a_full_disk_without_a_name_is_one_of_the_disks_that_are_used(
    tmp_path, monkeypatch, free, named):
  monkeypatch.setattr(storage, '_space', lambda folder: 'space')
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(
      free=free[str(folder) == '/proc']))
  said = str(storage.failure(OSError(errno.ENOSPC, 'x'), [f'{tmp_path}/new/run', '/proc', '/proc']))
  assert said.startswith(named.format(tmp_path))


def test_a_disk_without_inodes_says_so(monkeypatch):
  disk = types.SimpleNamespace(f_frsize=4096, f_bavail=512, f_blocks=1024, f_files=9, f_favail=0)
  monkeypatch.setattr(os, 'statvfs', lambda _: disk)
  assert storage._space('/') == '2 MiB free of 4 MiB, no inodes left'


def test_a_full_disk_of_a_temporary_database_is_one_sentence(monkeypatch):
  found = spill.Spill()
  found._rows.execute('pragma max_page_count = 20')  # as on a full disk
  with pytest.raises(sqlite3.OperationalError) as caught:
    for i in range(100):
      found.add(str(i), 'x' * 1000)
  assert re.match(r'temporary files in /\S+ cannot be written \(database or disk is full; \d+ MiB',
                  str(storage.failure(outer(caught.value))))
  with pytest.raises(sqlite3.OperationalError) as caught:
    found._rows.execute('select x')
  assert storage.failure(caught.value, ['/']) is None


def test_a_file_that_disappears_does_not_end_a_sync(tmp_path, monkeypatch):
  (tmp_path / 'a').write_text('')
  monkeypatch.setattr(os, 'walk', lambda *_, **__: [(str(tmp_path), [], ['a', 'gone'])])
  storage.sync(tmp_path)


def test_a_link_whose_target_is_gone_is_made_again(tmp_path):
  link = epath.Path(tmp_path / 'link')
  os.symlink(tmp_path / 'gone', link)
  (tmp_path / 'new').mkdir()
  storage.link(tmp_path / 'new', link)
  assert os.readlink(link) == str(tmp_path / 'new')
  storage.unlink(link)
  storage.unlink(link)
  assert not os.path.lexists(link)


def test_what_is_cut_off_is_printed_and_more_than_one_line_is_kept(tmp_path, capsys):
  path, kept = tmp_path / 'rows.jsonl', tmp_path / 'rows.jsonl.damaged'
  for tail, is_kept in ((b'{"id": "b', False), (b'{"id": \0}\n{"id": "c"}\n', True),
                        (b'\0\n{"id": "d"}\n', True)):
    path.write_bytes(b'{"id": "a"}\n' + tail)
    before = kept.read_bytes() if kept.exists() else b''
    records.Appender(path).close()
    said = capsys.readouterr().err
    assert f'{path}: line 2 is damaged' in said and f'the {len(tail)} bytes from there on' in said
    assert (f'{kept} keeps them' in said) == is_kept
    assert (kept.read_bytes() if kept.exists() else b'') == before + tail * is_kept
  records.Appender(path).close()
  assert not capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 256 KB."""
  at = tmp_path / 'disk'
  at.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'disk', str(at)], check=True)
  yield at
  subprocess.run(['umount', '-l', str(at)], check=True)


def replace(folder):
  with storage.replacing(folder / 'a.json') as file:
    file.write('x' * 200_000)


def append(folder):
  out = records.Appender(folder / 'a.jsonl')
  try:
    for i in range(out.count, 20):
      out.append([dict(id=str(i), text='x' * 10_000)])
  finally:
    out.close()


def write_metrics(folder):
  writer = metrics.Writer(folder, -1)
  for i in range(20):
    writer.write(i, {'x' * 2000: 1.0})
  writer.close()


def make(folder):
  with storage.making_folder(folder / 'out') as made:
    for i in range(5):
      (made / str(i)).write_bytes(b'x' * 40_000)


@needs_root
@pytest.mark.parametrize('work', [replace, append, write_metrics, make])
def test_a_full_disk_leaves_nothing_that_misleads(small_disk, work):
  filler = small_disk / 'filler'
  filler.write_bytes(b'x' * 200_000)
  with pytest.raises(OSError) as caught:
    work(small_disk)
  assert caught.value.errno == errno.ENOSPC
  assert str(storage.failure(caught.value)).startswith(f'the disk of {small_disk}')
  if work in (replace, make):
    assert os.listdir(small_disk) == ['filler']
  filler.unlink()
  work(small_disk)
  whole = pathlib.Path(small_disk.parent, 'whole')
  whole.mkdir()
  work(whole)

  def kept(folder):
    return {name: data for name, data in contents(folder).items() if 'tensorboard' not in name}
  assert kept(small_disk) == kept(whole)


def log_record(error, path: str) -> logging.LogRecord:
  return logging.LogRecord('absl', logging.ERROR, path, 1, 'x', (), (type(error), error, None))


def test_only_orbax_logs_errors_that_it_also_raises():
  full, orbax = OSError(errno.ENOSPC, 'x'), '/lib/orbax/checkpoint/a.py'
  assert not cli._is_to_print(log_record(full, orbax))
  assert cli._is_to_print(log_record(full, '/lib/srlm_jax/loop.py'))
  assert cli._is_to_print(log_record(ValueError('x'), orbax))


def test_an_error_that_nobody_gets_is_printed_but_not_that_of_a_closed_loop(monkeypatch):
  seen = []
  monkeypatch.setattr(sys, '__unraisablehook__', seen.append)
  found = [types.SimpleNamespace(exc_value=RuntimeError(text))
           for text in ('Event loop is closed', 'x')]
  for one in found:
    cli._print_unraisable(one)
  assert seen == found[1:]


def test_the_places_of_a_program_are_the_paths_in_its_flags(monkeypatch):
  values = flags.FlagValues()
  for name in ('workdir', 'out', 'data', 'name', 'bucket', 'empty'):
    flags.DEFINE_string(name, None, '', values)
  flags.DEFINE_multi_string('set', None, '', values)
  values(['program', '--workdir', 'run', '--out=a.json', '--data=x/y', '--name=z', '--bucket=gs://b',
          '--set=p/q', '--set=r'])
  monkeypatch.setattr(flags, 'FLAGS', values)
  assert sorted(cli._places()[:-1]) == ['a.json', 'p/q', 'run', 'x/y']
  assert cli._places()[-1] == tempfile.gettempdir()


@needs_root
def test_records_name_the_full_disk(small_disk):
  with pytest.raises(InputError, match=f'the disk of {small_disk} .* is full'):
    records.write(small_disk / 'a.jsonl', [dict(id='x' * 1000)] * 1000)


@pytest.fixture(scope='module')
def place(demo, tmp_path_factory):
  folder = tmp_path_factory.mktemp('faults')
  for path in (folder, *folder.parents[:2]):
    path.chmod(0o755)
  return faults.Workplace(folder, demo[0])


@pytest.mark.parametrize('user, path, missing', [
    (1000, '/bin:/usr/bin', 'need root'), (0, '', 'needs a C compiler, cc')])
def test_what_cannot_be_tested_is_an_error_unless_it_is_left_out(
    user, path, missing, monkeypatch, capsys):
  class Begun(Exception):
    pass

  def begin(folder):
    raise Begun
  monkeypatch.setattr(os, 'geteuid', lambda: user)
  monkeypatch.setenv('PATH', path)
  monkeypatch.setattr(faults, 'Workplace', begin)
  monkeypatch.setattr(sys, 'argv', ['faults.py'])
  with pytest.raises(SystemExit, match=f'cannot test .*{missing}; --skip'):
    faults.main()
  monkeypatch.setattr(sys, 'argv', ['faults.py', '--skip'])
  with pytest.raises(Begun):
    faults.main()
  assert 'skipped: ' in capsys.readouterr().out


def test_make_torture_runs_both_programs_and_fails_if_one_does(tmp_path):
  (tmp_path / 'python').write_text('#!/bin/sh\necho "ran $@"\n[ "$1" != "$FAILS" ]\n')
  (tmp_path / 'python').chmod(0o755)
  programs = 'tests/torture.py', 'tests/faults.py'
  for fails in ('', *programs):
    done = subprocess.run(
        ['make', '-o', '.venv/.installed', 'torture', f'BIN={tmp_path}', 'FAULTS=--skip'],
        cwd=faults.ROOT, env=dict(os.environ, FAILS=fails), capture_output=True, text=True)
    assert bool(done.returncode) == bool(fails), done.stderr
    ran = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith('ran ')]
    assert [line[0] for line in ran] == [*programs] and ran[1][-1] == '--skip'
def test_the_outcome_of_a_stage_covers_files_links_and_arrays(tmp_path, tokenizer_folder, mesh):
  stage = next(s for s in faults.STAGES if s.name == 'training')
  folder = tmp_path / 'run' / 'm2' / 'model'
  store.write_model_files(TINY, tokenizer_folder, folder)
  saver = store.manager(folder, None)
  store.save(saver, 1, init(TINY))
  saver.close()
  (folder / 'data').symlink_to('/')
  run = folder.parents[1]
  whole = faults.outcome(run, stage)
  step = folder / 'steps' / '1'
  # Orbax writes these last; `_DurableStep` syncs them after the step has its name.
  for name in ('_CHECKPOINT_METADATA', 'commit_success.txt'):
    (step / name).write_text('')
  faults.same('', faults.outcome(run, stage), whole)
  assert model_files.steps(folder) == [1] and store.restore_params(folder, mesh, 'float32', 1)
  store.manager(folder, None).close()

  def empty():
    largest = max((step / 'params').rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
    largest.write_bytes(b'')

  def link():
    (folder / 'data').unlink()
    (folder / 'data').symlink_to('/tmp')
  for change in (link, lambda: (folder / 'config.json').unlink(), empty):
    change()
    with pytest.raises(Exception):  # noqa: B017  (Wrong, or Orbax cannot read the array)
      faults.same('', faults.outcome(run, stage), whole)


def test_what_orbax_writes_last_into_a_step_is_synced_too(tmp_path, mesh, monkeypatch):
  synced, sync = [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda file: (
      synced.append(os.readlink(f'/proc/self/fd/{file}')), sync(file)))
  saver = store.manager(tmp_path, None)
  saver.save(1, args=ocp.args.Composite(hash=ocp.args.JsonSave({})))
  saver.close()
  step = tmp_path / 'steps' / '1'
  made = {str(step), str(step.parent), *(str(p) for p in step.rglob('*'))}
  assert str(step / '_CHECKPOINT_METADATA') in made and made <= {*synced}


def test_a_refusal_after_power_loss_is_wrong_but_for_a_conversion_that_is_done(
    tmp_path, monkeypatch):
  event = power_loss.Event('A', 0, 0, '', '', b'')
  monkeypatch.setattr(power_loss, 'events', lambda log: [event])
  monkeypatch.setattr(power_loss, 'environment', lambda *_: {})
  monkeypatch.setattr(power_loss.Disk, 'check', lambda _: None)
  (whole := tmp_path / 'whole' / 'hf').mkdir(parents=True)
  (whole / 'a').write_text('1')

  class Programs:
    """A program that ends well, and ends with `said` when it is run again."""
    def __init__(self, **_):
      self.count = 0

    def run(self, *_):
      self.count += 1
      (place.run / 'hf').mkdir(exist_ok=True)
      (place.run / 'hf' / 'a').write_text('1')
      return (1, '', f'error: {said}') if self.count > 1 else (0, '', '')
  monkeypatch.setattr(faults, 'server', Programs)
  damaged, exists = 'x is damaged', 'x already exists'
  for name, said, is_fine in (('pairs', damaged, False), ('pairs', exists, False),
                              ('export', damaged, False), ('export', exists, True)):
    place = faults.Workplace(tmp_path, tmp_path / 'whole')
    place.logged = place.programs
    stage = next(s for s in faults.STAGES if s.name == name)
    with contextlib.nullcontext() if is_fine else pytest.raises(faults.Wrong, match=said):
      assert place.crashes(stage, 1, random.Random(0)) == {'was done': 1}


by_name = pytest.mark.parametrize('stage', faults.STAGES, ids=lambda stage: stage.name)


@pytest.mark.slow
@needs_cc
@by_name
def test_a_stage_resumes_after_power_loss(place, stage):
  assert place.crashes(stage, 4, random.Random(0)).total() == 4


@pytest.mark.slow
@needs_cc
def test_without_a_sync_a_stage_does_not_resume(place):
  pairs = next(stage for stage in faults.STAGES if stage.name == 'pairs')
  broken = 'import os; os.fsync = lambda file: None'
  with pytest.raises(faults.Wrong):
    place.crashes(pairs, 20, random.Random(0), broken)


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize('name, fault, use, said', faults.FULL_FOLDERS)
def test_another_folder_that_a_stage_uses_is_full(place, name, fault, use, said):
  stage = next(s for s in faults.STAGES if s.name == name)
  assert place.full_folder(stage, fault, use, said).total() == 1


@pytest.mark.slow
@needs_root
@by_name
def test_a_stage_says_that_the_disk_is_full_and_resumes(place, stage):
  assert place.full_disk(stage, 3, random.Random(0)).total() == 3
  assert place.size_limit(stage, 2, random.Random(0)).total() == 2


@pytest.mark.slow
@needs_root
@by_name
def test_a_stage_says_what_it_may_not_write(place, stage):
  assert len(place.forbidden(stage)) >= 3
