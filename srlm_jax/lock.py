"""One run per workdir: WORKDIR/lock.json names who works there, and a heartbeat says that it still does.

Works on any shared disk: it needs nothing but that creating a file that exists fails, and that renaming is atomic.
"""
import contextlib
import getpass
import json
import os
import socket
import sys
import threading
import time
import uuid

from etils import epath

from srlm_jax import InputError

BEAT = 10    # seconds between heartbeats
STALE = 120  # seconds without a heartbeat after which another run takes over


@contextlib.contextmanager
def held(workdir):
  """Holds the lock of a workdir inside the `with` block; of a run on several hosts, call it on the first.

  Raises InputError if another run holds it, with who and since when. Takes over a lock whose run ended without
  releasing it: no heartbeat for `STALE` seconds, or a process of this host that no longer exists.
  """
  path = epath.Path(workdir) / 'lock.json'
  is_new = not path.parent.exists()
  path.parent.mkdir(parents=True, exist_ok=True)
  mine = dict(id=uuid.uuid4().hex, owner=_user(), host=socket.gethostname(), pid=os.getpid(),
              since=time.strftime('%Y-%m-%d %H:%M:%S %Z'))
  while not _create(path, mine):
    other = _read(path)
    if other is None:  # released in between
      continue
    if not other and not _is_stale(path, other):
      time.sleep(0.1)
      continue
    if not _is_stale(path, other):
      raise InputError(f'{path.parent} is in use by {other.get("owner")} on {other.get("host")}, process '
                       f'{other.get("pid")}, since {other.get("since")}; wait for that run, or use another --workdir')
    _remove_stale(path, other)
  ended = threading.Event()
  heart = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
  heart.start()
  try:
    yield
  finally:
    ended.set()
    heart.join()
    if (now := _read(path)) and now.get('id') == mine['id']:
      path.unlink(missing_ok=True)
    if is_new and not any(path.parent.iterdir()):  # a refused run leaves nothing behind
      path.parent.rmdir()


def _user() -> str:
  try:
    return getpass.getuser()
  except (KeyError, OSError):  # a uid without a name, as in some containers
    return f'uid {os.getuid()}'


def _create(path, mine: dict) -> bool:
  """Whether the lock was free, and is now ours."""
  try:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
  except FileExistsError:
    return False
  with os.fdopen(file, 'w') as f:
    json.dump(mine, f)
  return True


def _read(path) -> dict | None:
  """Who holds the lock; {} if its file is not whole, None if there is none."""
  try:
    found = json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError:  # being written, or cut by a crash
    return {}
  return found if isinstance(found, dict) else {}


def _is_stale(path, other: dict) -> bool:
  try:
    age = time.time() - os.stat(path).st_mtime
  except FileNotFoundError:
    return False
  return age > STALE or other.get('host') == socket.gethostname() and not _is_alive(other.get('pid'))


def _is_alive(pid) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ProcessLookupError, TypeError, ValueError, OverflowError):
    return False
  except PermissionError:  # of another user
    return True
  return True


def _remove_stale(path, other: dict):
  """Removes the lock if it is still `other`'s: of several runs that want to, one renames it."""
  aside = path.parent / f'lock.{uuid.uuid4().hex}'
  try:
    os.rename(path, aside)
  except FileNotFoundError:
    return
  if _read(aside) != other:  # another run took over in between: give it back
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)
  aside.unlink(missing_ok=True)


def _beat(path, mine: dict, ended: threading.Event):
  """Touches the lock every `BEAT` seconds; ends the process if another run holds it, for two would write the same
  files. A file system that fails for a moment, or a lock that another run has moved to look at it, is tried again."""
  while not ended.wait(BEAT):
    try:
      now = _read(path)
      if now and now.get('id') != mine['id']:
        print(f'error: another run took over {path.parent} while this one did not respond; this one ends',
              file=sys.stderr, flush=True)
        os._exit(1)
      os.utime(path)
    except OSError:
      continue
