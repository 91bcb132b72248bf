"""A lock file with a heartbeat: one run per workdir, one conversion per output folder.

The lock is a JSON file that names its holder. The holder updates the modification time (mtime) of
the file every `BEAT` seconds. This works on any shared file system in which creating an existing
file fails and renaming is atomic. In a bucket the lock is an object, which the holder writes again
every `BEAT` seconds; every write and deletion has the condition that nobody else wrote in between.
"""
import contextlib
import getpass
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
from typing import NamedTuple
import uuid

from etils import epath
import tensorstore as ts

from srlm_jax import InputError, storage

BEAT = 10    # seconds between heartbeats
STALE = 120  # seconds; an older heartbeat, or one in the future, is not trusted
UNSEEN = 60  # seconds for which a network file system may not show a file of another host
PROC = pathlib.Path('/proc')


class Lock(NamedTuple):
  """The content of a lock file at one time."""
  holder: dict  # the process that holds it; {} if the file is not a JSON object
  mtime: int    # last heartbeat in ns, by the clock of the host or server that wrote it
  size: int     # bytes
  generation: bytes = b''  # of an object in a bucket


def held(workdir, is_patient: bool = False):
  """Holds the lock of a workdir, WORKDIR/lock.json, inside a `with` block; yields its id.

  In a run on several hosts, only the first host calls it. `is_patient`: even after a recent
  heartbeat it waits for another one, because launchers start a run again at once, perhaps on
  another machine. Raises InputError as `_held` does.
  """
  return _held(epath.Path(workdir) / 'lock.json', workdir, '--workdir', is_patient)


def held_output(out, flag: str):
  """Holds the lock of the output folder `out`, OUT.lock beside it, inside a `with` block.

  `flag` is the flag that gave `out`, for the error message. Raises InputError as `_held` does.
  """
  out = storage.absolute(out)
  return _held(out.with_name(out.name + '.lock'), out, flag)


def is_seen(workdir, name: str) -> bool:
  """Whether this host sees the lock that the first host holds; `name` is its id.

  Waits up to `UNSEEN` seconds: a network file system may show a new file late.
  """
  file, deadline = _open(epath.Path(workdir) / 'lock.json'), time.monotonic() + UNSEEN
  while not (now := file.read()) or now.holder.get('id') != name:
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True


@contextlib.contextmanager
def _held(path, folder, flag: str, is_patient: bool = False):
  """Holds the lock file `path` of `folder` inside a `with` block; yields its id.

  Takes over the lock of a run that ended without releasing it, see `_current_holder`. Raises
  InputError if another run holds the lock (the message names it and its start time), or if `path`
  is not a lock file.
  """
  file = _open(path)
  mine = dict(id=uuid.uuid4().hex, owner=_user(), **_pid_scope(), pid=os.getpid(),
              started=_start_ticks('self'), since=time.strftime('%Y-%m-%d %H:%M:%S %Z'))
  while not file.create(mine):
    if other := _current_holder(file, folder, is_patient):
      raise InputError(f'{folder} is in use by {_describe(other)}; wait for that run, '
                       f'or use another {flag}')
  file.clean()
  ended = threading.Event()
  heartbeat = threading.Thread(target=_beat, args=(file, folder, mine, ended), daemon=True)
  heartbeat.start()
  _mine[path] = file, mine
  try:
    yield mine['id']
  finally:
    ended.set()
    heartbeat.join()
    _mine.pop(path, None)
    file.release(mine)


def _open(path) -> '_File | _Object':
  return (_Object if storage.is_remote(path) else _File)(path)


class _File:
  """A lock on a disk."""

  def __init__(self, path):
    self.path = path
    self._new_folders = [parent for parent in path.parents if not parent.exists()]

  def create(self, mine: dict) -> bool:
    """Creates the lock file with the content `mine` -> whether the lock was free."""
    storage.make_folder(self.path.parent)
    try:
      file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
      return False
    try:
      with os.fdopen(file, 'w') as f:
        json.dump(mine, f)
    except BaseException:  # half a lock would stop the next run
      self.path.unlink(missing_ok=True)
      raise
    return True

  def read(self, path=None) -> Lock | None:
    """The lock file; None if there is none."""
    try:
      with open(path or self.path, 'rb') as f:  # opening makes NFS ask its server for the mtime
        mtime, text = os.fstat(f.fileno()).st_mtime_ns, f.read()  # the text is never older
    except FileNotFoundError:
      return None
    except OSError as error:  # a folder, or not readable
      raise InputError(f'{path or self.path} is not a lock that this program wrote '
                       f'({error.strerror}); move or delete it') from error
    return Lock(_parse(text), mtime, len(text.strip(b'\0')))  # a power loss may leave NUL bytes

  def beat(self, mine: dict):
    """Updates the heartbeat; if another run has renamed the lock to check it, the next one will."""
    del mine
    os.utime(self.path)

  def remove(self, lock: Lock):
    """Removes a stale lock if it did not change. If several runs try, only one can rename it."""
    aside = self.path.parent / f'{self.path.name}.{uuid.uuid4().hex}'
    try:
      os.rename(self.path, aside)
    except FileNotFoundError:
      return
    if self.read(aside) != lock:  # another run has taken over: restore its lock
      with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(aside, self.path)
    aside.unlink(missing_ok=True)

  def clean(self):
    """Removes the stale locks that a run had renamed when it was killed."""
    for path in self.path.parent.iterdir():
      if re.fullmatch(rf'{re.escape(self.path.name)}\.[0-9a-f]{{32}}', path.name):
        lock = self.read(path)
        if lock and _state(lock.holder) == 'ended':
          path.unlink(missing_ok=True)

  def release(self, mine: dict):
    """Deletes the lock of this run, and the folders that it made and left empty."""
    if (now := self.read()) and now.holder.get('id') == mine['id']:
      self.path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder that the run wrote to is not empty and stays
      for parent in self._new_folders:
        os.rmdir(parent)


_mine: dict = {}  # the locks that this process holds, by path: (file, content)


def release():
  """Releases the locks of this process, which is about to exit without leaving their blocks."""
  for path in [*_mine]:
    file, mine = _mine.pop(path)
    with contextlib.suppress(OSError, InputError):
      file.release(mine)


class _Object:
  """A lock in a bucket. A write may succeed although its answer is lost; `read` tells."""

  def __init__(self, path):
    self.path = path
    self._store = ts.KvStore.open(storage.kvstore(path.parent)).result()

  def create(self, mine: dict) -> bool:
    now = self._find()
    if now.state != 'value':
      self._write(mine, now.stamp.generation)
      now = self._find()
    return _parse(now.value).get('id') == mine['id']

  def read(self) -> Lock | None:
    now = self._find()
    if now.state != 'value':
      return None
    holder = _parse(now.value)
    beat = holder.get('beat')
    return Lock(holder, beat if isinstance(beat, int) else 0, len(now.value), now.stamp.generation)

  def beat(self, mine: dict):
    if (now := self.read()) and now.holder.get('id') == mine['id']:
      self._write(mine, now.generation)

  def remove(self, lock: Lock):
    with self._access():
      self._store.write(self.path.name, None, if_equal=lock.generation).result()

  def clean(self):
    """A bucket holds nothing else."""

  def release(self, mine: dict):
    if (now := self.read()) and now.holder.get('id') == mine['id']:
      self.remove(now)

  def _find(self) -> ts.KvStore.ReadResult:
    with self._access():
      return self._store.read(self.path.name).result()

  def _write(self, mine: dict, generation: bytes):
    """Writes the lock if its generation is still `generation`."""
    text = json.dumps(dict(mine, beat=time.time_ns()))
    with self._access():
      self._store.write(self.path.name, text.encode(), if_equal=generation).result()

  @contextlib.contextmanager
  def _access(self):
    try:
      yield
    except (ValueError, OSError) as error:  # TensorStore has repeated the request for minutes
      raise storage.no_access(self.path, error) from error


def _current_holder(file: _File | _Object, folder, is_patient: bool) -> Lock | None:
  """The lock if another run holds it; None if there is none. Removes a stale lock.

  A lock is held if its process is known to be alive, even if stopped, and stale if it is known to
  have ended. Otherwise the heartbeat decides. If it is at most `STALE` seconds old, the lock is
  held. It may be older, or in the future if the clocks of two hosts differ: then the lock is stale
  if it does not change while this run watches it. The same applies if this run is patient, and to
  an empty file, which another run is about to write, or which a crash truncated.

  Raises InputError if the file is not a lock.
  """
  lock = file.read()
  if lock is None:  # released in the meantime
    return None
  if lock.size and 'id' not in lock.holder:
    raise InputError(f'{file.path} is not a lock that this program wrote; move or delete it')
  state = _state(lock.holder)
  if state != 'ended':
    is_recent = lock.size and 0 <= _age(lock) <= STALE
    if state == 'alive' or is_recent and not is_patient:
      return lock
    now = _watch(file, folder, lock)
    if now != lock:
      return now
  file.remove(lock)
  return None


def _parse(text: bytes) -> dict:
  """The holder; {} if the text is not a JSON object."""
  try:
    holder = json.loads(text)
  except (ValueError, RecursionError):
    return {}
  return holder if isinstance(holder, dict) else {}


def _age(lock: Lock) -> float:
  """Seconds since the last heartbeat, by the clock of this host."""
  return time.time() - lock.mtime / 1e9


def _watch(file: _File | _Object, folder, lock: Lock) -> Lock | None:
  """Waits until the lock changes, for at most 3 heartbeats -> the lock; None if it was released."""
  age = _age(lock)
  print(f'{folder}: found the lock of {_describe(lock)}; its last heartbeat is {abs(age):.0f} s in '
        f'the {"future" if age < 0 else "past"} by the clock of this host; waiting up to '
        f'{3 * BEAT} s for another heartbeat before taking over', file=sys.stderr, flush=True)
  deadline = time.monotonic() + 3 * BEAT
  while (now := file.read()) == lock and time.monotonic() < deadline:
    time.sleep(BEAT / 20)
  return now


def _beat(file: _File | _Object, folder, mine: dict, ended: threading.Event):
  """Updates the heartbeat of the lock every `BEAT` seconds.

  Exits the process if another run holds the lock, because both would write the same files. Retries
  if the file system or the bucket fails.
  """
  while not ended.wait(BEAT):
    try:
      now = file.read()
      if now and now.holder and now.holder.get('id') != mine['id']:
        print(f'error: another run took over {folder} while this run did not respond; this run '
              f'exits', file=sys.stderr, flush=True)
        os._exit(1)
      file.beat(mine)
    except (OSError, InputError):
      continue


def _user() -> str:
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # some containers have a uid without a name
    return f'uid {os.getuid()}'


def _describe(lock: Lock) -> str:
  if not (holder := lock.holder):
    return 'an unknown run'
  return (f'{holder.get("owner")} on {holder.get("host")}, process {holder.get("pid")}, '
          f'since {holder.get("since")}')


def _pid_scope() -> dict:
  """The scope in which a pid is unique: host, boot and pid namespace; None if /proc lacks them."""
  scope = dict(host=socket.gethostname(), boot=None, namespace=None)
  with contextlib.suppress(OSError):
    if os.readlink(PROC / 'self') == str(os.getpid()):  # otherwise /proc is of another namespace
      scope['boot'] = (PROC / 'sys/kernel/random/boot_id').read_text().strip()
      scope['namespace'] = os.stat(PROC / 'self/ns/pid').st_ino
  return scope


def _start_ticks(pid) -> int | None:
  """Start time of a process in clock ticks after boot; None if /proc does not have it.

  It is field 22 of /proc/PID/stat, see proc(5). Field 2 is the command name in parentheses, which
  may itself contain spaces and parentheses.
  """
  try:
    stat = (PROC / str(pid) / 'stat').read_text(errors='replace')
  except OSError:
    return None
  return int(stat.rpartition(')')[2].split()[22 - 3])


def _state(holder: dict) -> str:
  """The state of the process: ended, alive, or unknown if this host cannot know.

  A pid alone does not identify a process: containers may share a host name, and the system reuses
  pids. Without /proc, as on macOS, the host name and the pid must suffice.
  """
  here = _pid_scope()
  if any(holder.get(key) != value for key, value in here.items()):
    return 'unknown'
  if PROC.exists() and None in here.values():
    return 'unknown'
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return 'ended'
  except PermissionError:  # the process belongs to another user
    pass
  except (KeyError, TypeError, OverflowError):  # not a pid
    return 'unknown'
  started = _start_ticks(holder['pid'])
  if None in (started, holder.get('started')):
    return 'unknown'
  return 'alive' if started == holder['started'] else 'ended'
