"""One run per workdir, one conversion per output folder: a lock file and its heartbeat.

The lock is a JSON file that names its holder. The holder updates the modification time (mtime) of
the file every `BEAT` seconds. Any shared disk will do: creating a file that exists must fail, and
renaming must be atomic.
"""
import contextlib
import getpass
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import NamedTuple
import uuid

from etils import epath

from srlm_jax import InputError

BEAT = 10    # seconds between heartbeats
STALE = 120  # a heartbeat older than this many seconds, or in the future, is not trusted
PROC = pathlib.Path('/proc')


class Lock(NamedTuple):
  """A lock file as it was read."""
  holder: dict  # who holds it; {} if the file is not a JSON object
  mtime: int    # of the last heartbeat, in ns, by the clock of the host or server that wrote it
  size: int     # bytes


def held(workdir):
  """Holds the lock of a workdir, WORKDIR/lock.json, inside a `with` block.

  Of a run on several hosts, only the first calls it. Raises InputError as `_held` does.
  """
  return _held(epath.Path(workdir) / 'lock.json', workdir, '--workdir')


def held_output(out, flag: str):
  """Holds the lock of the output folder `out`, OUT.lock beside it, inside a `with` block.

  `flag` is the option that gave `out`, for the message. Raises InputError as `_held` does.
  """
  out = pathlib.Path(out).resolve()
  return _held(out.with_name(out.name + '.lock'), out, flag)


@contextlib.contextmanager
def _held(path, what, flag: str):
  """Holds the lock file `path` of the folder `what` inside a `with` block.

  Takes over the lock of a run that ended without releasing it, see `_holder`. Raises InputError if
  another run holds the lock, with who and since when, or if `path` is a file of something else.
  """
  new_folders = [folder for folder in path.parents if not folder.exists()]
  mine = dict(id=uuid.uuid4().hex, owner=_user(), **_place(), pid=os.getpid(),
              started=_started('self'), since=time.strftime('%Y-%m-%d %H:%M:%S %Z'))
  while not _create(path, mine):
    if other := _holder(path, what):
      raise InputError(f'{what} is in use by {_who(other)}; wait for that run, '
                       f'or use another {flag}')
  ended = threading.Event()
  heart = threading.Thread(target=_beat, args=(path, what, mine, ended), daemon=True)
  heart.start()
  try:
    yield
  finally:
    ended.set()
    heart.join()
    if (now := _read(path)) and now.holder.get('id') == mine['id']:
      path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the run wrote something
      for folder in new_folders:
        os.rmdir(folder)


def _create(path, mine: dict) -> bool:
  """Whether the lock was free, and is now ours."""
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
  except FileExistsError:
    return False
  with os.fdopen(file, 'w') as f:
    json.dump(mine, f)
  return True


def _holder(path, what) -> Lock | None:
  """The lock if another run holds it; None if there is none, or it was stale and is now removed.

  A lock is stale if its process is known to have ended. Otherwise the heartbeat decides: at most
  `STALE` seconds old, it is held; older or in the future, which the clocks of two hosts may cause,
  it is stale if it does not change while this run watches it. The same holds for an empty file: a
  run is about to write it, or a crash cut it. Raises InputError if the file is not a lock.
  """
  lock = _read(path)
  if lock is None:  # released in between
    return None
  if lock.size and 'id' not in lock.holder:
    raise InputError(f'{path} is not a lock that this program wrote; move or delete it')
  if not _has_ended(lock.holder):
    if lock.size and 0 <= _age(lock) <= STALE:
      return lock
    now = _watch(path, what, lock)
    if now != lock:
      return now
  _remove(path, lock)
  return None


def _read(path) -> Lock | None:
  """The lock file, None if there is none."""
  try:
    with open(path, 'rb') as f:  # opening a file makes NFS ask its server for the mtime
      mtime, text = os.fstat(f.fileno()).st_mtime_ns, f.read()  # so the text is never the older
  except FileNotFoundError:
    return None
  try:
    holder = json.loads(text)
  except ValueError:
    holder = {}
  return Lock(holder if isinstance(holder, dict) else {}, mtime, len(text))


def _age(lock: Lock) -> float:
  """Seconds since the last heartbeat, by the clock of this host."""
  return time.time() - lock.mtime / 1e9


def _watch(path, what, lock: Lock) -> Lock | None:
  """The lock as it is when it changes, or after 3 heartbeats; None if it was released."""
  age = _age(lock)
  print(f'{what}: found the lock of {_who(lock)}; its last heartbeat is {abs(age):.0f} s in the '
        f'{"future" if age < 0 else "past"} by the clock of this host; waits up to {3 * BEAT} s '
        f'for another heartbeat before it takes over', file=sys.stderr, flush=True)
  ends = time.monotonic() + 3 * BEAT
  while (now := _read(path)) == lock and time.monotonic() < ends:
    time.sleep(BEAT / 20)
  return now


def _remove(path, lock: Lock):
  """Removes a stale lock if it is still as it was read: of several runs, one renames it."""
  aside = path.parent / f'{path.name}.{uuid.uuid4().hex}'
  try:
    os.rename(path, aside)
  except FileNotFoundError:
    return
  if _read(aside) != lock:  # another run took over in between: give it back
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)
  aside.unlink(missing_ok=True)


def _beat(path, what, mine: dict, ended: threading.Event):
  """Updates the mtime of the lock every `BEAT` seconds.

  Ends the process if another run holds the lock, because two would write the same files. Tries
  again after a failure of the file system, or if another run has renamed the lock to check it.
  """
  while not ended.wait(BEAT):
    try:
      now = _read(path)
      if now and now.holder and now.holder.get('id') != mine['id']:
        print(f'error: another run took over {what} while this one did not respond; this one ends',
              file=sys.stderr, flush=True)
        os._exit(1)
      os.utime(path)
    except OSError:
      continue


def _user() -> str:
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # a uid without a name, as in some containers
    return f'uid {os.getuid()}'


def _who(lock: Lock) -> str:
  if not (holder := lock.holder):
    return 'an unknown run'
  return (f'{holder.get("owner")} on {holder.get("host")}, process {holder.get("pid")}, '
          f'since {holder.get("since")}')


def _place() -> dict:
  """Where a pid has its meaning: host, boot and pid namespace; None where /proc does not tell."""
  place = dict(host=socket.gethostname(), boot=None, namespace=None)
  with contextlib.suppress(OSError):
    if os.readlink(PROC / 'self') == str(os.getpid()):  # else /proc is that of another namespace
      place['boot'] = (PROC / 'sys/kernel/random/boot_id').read_text().strip()
      place['namespace'] = os.stat(PROC / 'self/ns/pid').st_ino
  return place


def _started(pid) -> int | None:
  """Start time of a process in clock ticks after boot; None if /proc does not tell.

  It is field 22 of /proc/PID/stat, see proc(5). Field 2 is the command name in parentheses, which
  may itself hold spaces and parentheses.
  """
  try:
    stat = (PROC / str(pid) / 'stat').read_text(errors='replace')
  except OSError:
    return None
  return int(stat.rpartition(')')[2].split()[22 - 3])


def _has_ended(holder: dict) -> bool:
  """Whether the process is known to have ended; False if this host cannot know.

  A pid alone does not identify a process: containers may share a host name, and the system reuses
  pids. Without /proc, as on macOS, the host name and the pid have to do.
  """
  here = _place()
  if any(holder.get(key) != value for key, value in here.items()):
    return False
  if PROC.exists() and None in here.values():
    return False
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return True
  except PermissionError:  # a process of another user
    pass
  except (KeyError, TypeError, OverflowError):  # not a pid
    return False
  started = _started(holder['pid'])
  return None not in (started, holder.get('started')) and started != holder['started']
