"""Files on a disk or in a Google Cloud Storage bucket: everything that differs between the two.

An object in a bucket is written whole or not at all. It cannot be appended to, renamed or linked.
All else is the same for both with `etils.epath`, which reaches a bucket with gcsfs.

A disk loses in a power loss what was not synced: the data of a file, and its entry in its folder.
So a new name, by `replacing`, `making_folder` or of a checkpoint, only ever refers to synced data.
"""
from collections.abc import Iterator, Sequence
import contextlib
import errno
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
import weakref

from etils import epath
import fsspec
import numpy as np

from srlm_jax import InputError

SECONDS = 10.0     # a growing file in a bucket, or after a power loss, lacks at most these
LITTLE = 2**26     # bytes; a disk that has less is the one that is full
TIMEOUT = 60       # seconds without an answer of the bucket, after which a request is repeated
NOT_SUPPORTED = ('s3', 'az', 'hf', 'gcs')  # schemes of other stores, and a common mistake
COMMITTED = 'commit_success.txt'  # Orbax writes it into a step in a bucket when it is complete
LAST = ('done.json', 'source.json', COMMITTED)  # files that a folder has only when it is complete

# Processes share a bucket, so a listing may be out of date at once.
_SETTINGS = dict(use_listings_cache=False)
fsspec.config.conf.update(gs=_SETTINGS, gcs=_SETTINGS)
for _name, _value in dict(
    # Otherwise gcsfs asks another service, which needs more permissions, for the kind of bucket.
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
    # Otherwise TensorStore waits without limit for an answer.
    TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=str(TIMEOUT),
    TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES='1').items():
  os.environ.setdefault(_name, _value)

_growing = weakref.WeakSet()  # the open objects that grow; see `upload_pending`


def is_remote(path) -> bool:
  """Whether the path is in a bucket.

  >>> is_remote('gs://bucket/run'), is_remote('runs/demo')
  (True, False)
  """
  return os.fspath(path).startswith('gs://')


def check(text: str):
  """Checks that the buckets in an argument, --FLAG=gs://BUCKET/FOLDER,.., can be read.

  Raises InputError if gcsfs is not installed, or if a bucket does not exist or refuses access.
  """
  found = [re.match(r'(\w+)://([^/]*)', path) for path in text.rpartition('=')[2].split(',')]
  for scheme, bucket in dict.fromkeys(match.groups() for match in found if match):
    if scheme in NOT_SUPPORTED or scheme == 'gs' and not bucket:
      raise InputError(f'{text}: {scheme}://{bucket} is not supported; give a folder on a disk, or '
                       f'one in a Google Cloud Storage bucket: gs://BUCKET/FOLDER')
    if scheme != 'gs':
      continue
    if importlib.util.find_spec('gcsfs') is None:
      raise InputError(f'{text}: a bucket needs the package gcsfs; pip install "srlm_jax[gcs]"')
    _configure()
    try:
      _bucket().ls(f'gs://{bucket}', max_results=1)
    except FileNotFoundError as error:
      raise InputError(f'{text}: there is no bucket gs://{bucket}; create it, or correct the name'
                       ) from error
    except (OSError, ValueError, *errors()) as error:
      raise no_access(f'gs://{bucket}', error) from error


def no_access(place, error: Exception) -> InputError:
  """-> the InputError for a request to a bucket that failed."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return InputError(f'{place} cannot be used ({text[:200]}); log in with gcloud auth '
                    f'application-default login, and ask for the role Storage Object Admin')


def errors() -> tuple[type[Exception], ...]:
  """What gcsfs raises when a request fails for good; beside OSError, see `is_forbidden`."""
  if 'gcsfs' not in sys.modules:
    return ()
  import aiohttp
  import gcsfs.retry
  import google.auth.exceptions
  import requests
  return (gcsfs.retry.HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError,
          requests.RequestException)


def is_forbidden(error: OSError) -> bool:
  """Whether gcsfs raised this error because the account lacks a permission."""
  return str(error).startswith('Forbidden: ')


def failure(error: BaseException, places: Sequence[str] = ()) -> InputError | None:
  """-> the InputError for an error of the disk, a permission or a path; None for another one.

  The error of the file system may be the cause of `error`. Of an error with only a text, as those
  of TensorStore, the text must name a path in quotes. `places`: the paths that the user gave, of
  which one is meant if the error names none. An error such as a missing file is only that of a path
  if the path is one of `places`, or in or above one.
  """
  if isinstance(error, OSError) and error.errno in _OF_PATHS and _is_given(error.filename, places):
    return InputError(_OF_PATHS[error.errno](error.filename, places))
  while error is not None:
    if isinstance(error, OSError) and error.errno in _ADVICE:
      return InputError(_ADVICE[error.errno](error.filename, places))
    if isinstance(error, sqlite3.OperationalError) and getattr(  # only SQLite's own have a code
        error, 'sqlite_errorcode', 0) & 0xff in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
      return InputError(f'temporary files in {(at := _database_folder())} cannot be written '
                        f'({error}; {_space(at)}); free space there, or set TMPDIR to another '
                        f'folder')
    if named := re.search(r'"(/[^"]+)"', str(error)):
      for number, advice in _ADVICE.items():
        if os.strerror(number) in str(error):
          return InputError(advice(named[1], places))
    error = error.__cause__
  return None


def _is_given(path, places: Sequence[str]) -> bool:
  """Whether a path is one of `places`, or in or above one."""
  if not isinstance(path, str):
    return False
  path, given = os.path.abspath(path), map(os.path.abspath, places)
  return any(os.path.commonpath([path, at]) in (path, at) for at in given)


def _database_folder() -> str:
  """Where SQLite puts temporary files."""
  given = os.environ.get('SQLITE_TMPDIR'), os.environ.get('TMPDIR')
  return next((at for at in (*given, '/var/tmp', '/usr/tmp', '/tmp')
               if at and os.path.isdir(at) and os.access(at, os.W_OK | os.X_OK)), '.')


def _full(path: str | None, places: Sequence[str]) -> str:
  """The sentence about a full disk: that of the path, or one of those of `places`.

  Of several, those are named that have less than `LITTLE` space, if there are any. If none has, it
  may be the disk of the file to which the output goes.
  """
  folders = [next(p for p in (at, *at.parents) if p.is_dir()) for at in map(
      pathlib.Path.absolute, map(pathlib.Path, [path] if path else places or ['.']))]
  if path:  # its own folder may be a temporary one: name the place that it is in
    disk = folders[0].stat().st_dev
    folders += sorted({at for at in map(pathlib.Path, places) if at.is_dir()
                       and folders[0].is_relative_to(at) and at.stat().st_dev == disk})
    folders = folders[-1:]
  disks = {at.stat().st_dev: at for at in reversed(folders)}  # the first folder of each
  known = [(at, at) for at in reversed(disks.values())]
  output = [('the output', 1)] if not path and stat.S_ISREG(os.fstat(1).st_mode) else []
  found = _without_space(known) or _without_space(output) or known
  named = ' or '.join(f'the disk of {name} ({_space(at)})' for name, at in found)
  return f'{named} is full; free space, and run the same command again'


def _without_space(disks: list[tuple]) -> list[tuple]:
  """Those of the (name, place) whose disk has less than `LITTLE` space."""
  return [(name, at) for name, at in disks if shutil.disk_usage(at).free < LITTLE]


def _space(folder) -> str:
  """How much space a disk has, and that no file can be made if it has no inodes left."""
  disk = os.statvfs(folder)
  free, total = (blocks * disk.f_frsize >> 20 for blocks in (disk.f_bavail, disk.f_blocks))
  no_inodes = ', no inodes left' if disk.f_files and not disk.f_favail else ''
  return f'{free} MiB free of {total} MiB{no_inodes}'


def _refused(reason: str, advice: str):
  return lambda path, places: f'{path or " or ".join(places)} cannot be used ({reason}); {advice}'


_ADVICE = {  # of an error number: (path, places) -> the sentence
    errno.ENOSPC: _full,
    errno.EDQUOT: _refused('the disk quota is used up', 'free space, and run the same command '
                           'again'),
    errno.EFBIG: _refused('the file would exceed the limit of ulimit -f', 'raise the limit, and '
                          'run the same command again'),
    errno.EIO: _refused('the disk fails', 'check it, and run the same command again'),
    errno.EROFS: _refused('the disk is read-only', 'give another path'),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _refused(
        'permission denied', 'correct its owner and permissions, or give another path'))}
_OF_PATHS = {number: _refused(os.strerror(number), 'give another path, or mend what is there')
             for number in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
                            errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ESTALE, errno.ENODEV,
                            errno.ENXIO)}


def absolute(path):
  """The path from the root of the file system, or with the name of the bucket."""
  return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def obstacle(path):
  """The file that takes the place of a folder above `path`, None if there is none."""
  if is_remote(path):  # a bucket has no folders
    return None
  return next((p for p in epath.Path(path).parents if p.exists() and not p.is_dir()), None)


def sync(path):
  """Makes a file, or a folder with all that is in it, durable: a power loss does not change it.

  An object in a bucket always is.
  """
  if is_remote(path):
    return
  for folder, _, names in os.walk(path, topdown=False):
    for name in names:
      if not os.path.islink(file := os.path.join(folder, name)):
        with contextlib.suppress(FileNotFoundError):  # NFS hides and deletes files that are open
          _sync(file)
    _sync(folder)
  if not os.path.isdir(path):
    _sync(path)
  _sync(pathlib.Path(path).parent)


def sync_names(folder):
  """Makes the names in a folder durable."""
  if not is_remote(folder):
    _sync(folder)


def _sync(path):
  """Syncs the data of a file, or the names in a folder."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  except OSError as error:
    # Some network file systems cannot sync folders.
    if error.errno != errno.EINVAL or not os.path.isdir(path):
      error.filename = os.fspath(path)
      raise
  finally:
    os.close(file)


def make_folder(path):
  """Makes a folder, and those above it, durably, if they do not exist."""
  path = epath.Path(path)
  new = [] if is_remote(path) else [p for p in (path, *path.parents) if not p.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for folder in new:
    _sync(folder.parent)


@contextlib.contextmanager
def _naming(path):
  """Adds the path to an error of the file system that has none, as errors of `write` do."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno is not None:
      error.filename = os.fspath(path)
    raise


@contextlib.contextmanager
def replacing(path, mode: str = 'w') -> Iterator:
  """Yields an open file that replaces `path` when the block ends. Text is UTF-8.

  An error leaves `path` unchanged, except one of the last sync, when it is already replaced.
  """
  path = epath.Path(path)
  encoding = None if 'b' in mode else 'utf-8'
  if is_remote(path):
    with tempfile.NamedTemporaryFile(mode, encoding=encoding) as file:
      yield file
      file.flush()
      _bucket().put_file(file.name, str(path))
    return
  make_folder(path.parent)
  partial = path.parent / f'{path.name}.partial'
  try:
    with _naming(path), partial.open(mode, encoding=encoding) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


def growing(path) -> 'GrowingFile':
  """Opens a file that grows; creates it and its folder if they do not exist."""
  return (GrowingObject if is_remote(path) else GrowingFile)(epath.Path(path))


class GrowingFile:
  """A file on a disk to which lines are appended."""

  def __init__(self, path):
    make_folder(path.parent)
    is_new = not path.exists()
    self._file = open(path, 'ab', buffering=0)
    if is_new:
      _sync(path.parent)
    self._saved, self._is_saved = time.monotonic(), True

  def lines(self) -> Iterator[bytes]:
    """Yields the lines up to the first damaged one.

    A kill or a full disk may have cut off the last line. After a power loss, data that had not
    reached the disk may be missing or read as NUL bytes.
    """
    with open(self._file.name, 'rb') as file:
      for line in file:
        if not line.endswith(b'\n') or b'\0' in line:
          return
        yield line

  def after(self, size: int) -> bytes:
    """What follows the first `size` bytes."""
    with open(self._file.name, 'rb') as file:
      file.seek(size)
      return file.read()

  def truncate(self, size: int):
    """Keeps the first `size` bytes."""
    if size < os.fstat(self._file.fileno()).st_size:
      self._file.truncate(size)
      self._is_saved = False
      self.flush()  # before other data takes the place

  def write(self, lines: bytes):
    """Appends whole lines. A kill does not lose them, a power loss those of the last `SECONDS`."""
    self._append(lines)
    self._is_saved = False
    if time.monotonic() - self._saved >= SECONDS:
      self.flush()

  def flush(self):
    """Saves what was written: a power loss does not lose it."""
    if not self._is_saved:
      with _naming(self._file.name):
        os.fsync(self._file.fileno())
    self._saved, self._is_saved = time.monotonic(), True

  def close(self):
    try:
      self.flush()
    finally:
      self._file.close()

  def _append(self, data: bytes):
    with _naming(self._file.name):
      while data:
        data = data[self._file.write(data):]


class GrowingObject(GrowingFile):
  """The same in a bucket: PATH, which holds everything up to when it was opened or closed.

  In between, what was written goes into objects PATH.part-OFFSET, at most every `SECONDS`. OFFSET
  is where the part begins. Whoever opens the file adds the parts to it. A part that begins before
  its end was added by a run that was killed before it deleted the part.
  """

  def __init__(self, path):
    self._path, self._parts, self._pending, self._size = path, [], b'', 0
    self._file = tempfile.NamedTemporaryFile(buffering=0)  # a copy
    is_new = not path.exists()
    if not is_new:
      self._append(path.read_bytes())
    self._parts = sorted(str(part) for part in path.parent.glob(f'{path.name}.part-*'))
    found = _bucket().cat(self._parts) if self._parts else {}
    for part, data in zip(self._parts, map(found.get, map(_key, self._parts)), strict=True):
      if int(part.rpartition('-')[2]) == self._size:
        self._append(data)
    if is_new or self._parts:
      self._upload()
    self._saved = time.monotonic()
    _growing.add(self)

  def truncate(self, size):
    if size < self._size:
      self._file.truncate(size)
      self._size = size
      self._upload()

  def write(self, lines):
    self._pending += lines
    if time.monotonic() - self._saved >= SECONDS:
      self.flush()

  def flush(self):
    if self._pending:
      part = f'{self._path}.part-{self._size:015}'
      _bucket().pipe_file(part, self._pending)
      self._parts.append(part)
      self._append(self._pending)
      self._pending = b''
    self._saved = time.monotonic()

  def close(self):
    _growing.discard(self)
    self._append(self._pending)
    if self._parts or self._pending:
      self._upload()
    self._file.close()

  def _append(self, data: bytes):
    """Appends to the copy."""
    self._file.seek(0, os.SEEK_END)
    super()._append(data)
    self._size += len(data)

  def _upload(self):
    """Writes the copy to PATH, and then deletes the parts, which it holds."""
    _bucket().put_file(self._file.name, str(self._path))
    if self._parts:
      _bucket().rm(self._parts)
    self._parts = []


def upload_pending():
  """Saves what growing objects hold back, when a program ends before it closes them."""
  for file in list(_growing):
    file.flush()


class Mirror:
  """A folder for a library that writes to disks only. `upload` copies its files to `path`."""

  def __init__(self, path):
    self._path = epath.Path(path)
    self._temporary = tempfile.TemporaryDirectory() if is_remote(path) else None
    self.local = pathlib.Path(self._temporary.name if self._temporary else path)

  def upload(self):
    if self._temporary:
      for file in self.local.iterdir():
        _bucket().put_file(str(file), str(self._path / file.name))

  def close(self):
    self.upload()
    if self._temporary:
      self._temporary.cleanup()


@contextlib.contextmanager
def local_folder(folder, names: Sequence[str] = ()) -> Iterator[str]:
  """Yields `folder`, in a bucket a temporary one with its files `names`, for a library."""
  if not is_remote(folder):
    yield os.fspath(folder)
    return
  with tempfile.TemporaryDirectory() as local:
    for name in names:
      target = pathlib.Path(local, name)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes((epath.Path(folder) / name).read_bytes())
    yield local


@contextlib.contextmanager
def local_start(path, start: bytes) -> Iterator[str]:
  """Yields a file on a disk that begins with `start`, as `path` does, and is as long as `path`."""
  if not is_remote(path):
    yield os.fspath(path)
    return
  with tempfile.NamedTemporaryFile() as local:
    local.write(start)
    local.truncate(path.stat().length)  # the rest takes no space
    local.flush()
    yield local.name


def read_range(path, offset: int, size: int) -> bytes:
  """Reads at most `size` bytes from `offset` on."""
  if is_remote(path):
    return _bucket().cat_file(str(path), start=offset, end=offset + size)
  with open(path, 'rb') as file:
    file.seek(offset)
    return file.read(size)


def mapped(path, dtype, shape: tuple, offset: int):
  """An array [shape] in a file, on a disk without reading it yet."""
  if not is_remote(path):
    return np.memmap(path, dtype, 'r', offset, shape)
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  return np.frombuffer(read_range(path, offset, size), dtype).reshape(shape)


def stamp(path) -> str:
  """A text that changes when the file is written again."""
  if is_remote(path):
    info = _bucket().info(str(path))
    return f'{path} {info["size"]} {info["generation"]}'
  stat = os.stat(path)
  return f'{absolute(path)} {stat.st_size} {stat.st_mtime_ns}'


def link(target, path, without: str = ''):
  """Makes `path` the folder `target`, if it does not exist: a symbolic link, in a bucket a copy.

  The copy lacks the folder `without`.
  """
  if is_remote(path):
    copy_tree(target, path, without)
  elif not path.exists():
    pathlib.Path(path).unlink(missing_ok=True)  # a link whose target is gone
    os.symlink(absolute(target), path)
    _sync(path.parent)


def unlink(path):
  """Removes what `link` made, durably."""
  if is_remote(path):
    path.rmtree(missing_ok=True)
  elif os.path.lexists(path):
    pathlib.Path(path).unlink()
    _sync(path.parent)


def copy_tree(source, target, without: str = ''):
  """Copies a folder, but not the folder `without` in it.

  In a bucket, files that say that a folder is complete come last.
  """
  if not is_remote(source):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(without) if without else None,
                    dirs_exist_ok=True)
    return
  found = [pathlib.Path(name).relative_to(_key(source)) for name in _bucket().find(str(source))]
  for file in sorted(found, key=lambda file: (file.name in LAST, file)):
    if file.parts[0] != without:
      _bucket().cp_file(str(source / file), str(target / file))


@contextlib.contextmanager
def making_folder(out) -> Iterator:
  """Yields a folder that becomes `out`, a new or empty one, on success; it is deleted on failure.

  In a bucket it is `out` itself, and an object OUT.partial exists until it is complete: a killed
  run leaves that, and the next one begins again. What makes the folder useful, in LAST or a
  config.json, must be written last. Raises InputError if `out` is not empty.
  """
  out = absolute(out)
  partial = out.parent / f'{out.name}.partial'
  remote = is_remote(out)
  if not (remote and partial.exists()) and out.exists() and (
      not out.is_dir() or any(out.iterdir())):
    raise InputError(f'{out} already exists and is not an empty folder; give another path, '
                     f'or delete it first')
  folder = out if remote else partial
  folder.rmtree(missing_ok=True)  # a killed run leaves it
  if remote:
    partial.write_text('')
  else:
    make_folder(folder)
  try:
    with _naming(out):
      yield folder
    if not remote:
      sync(folder)
      os.rename(partial, out)
      _sync(out.parent)
  except BaseException:
    folder.rmtree(missing_ok=True)
    raise
  finally:
    if remote:
      partial.unlink(missing_ok=True)


def commit(step):
  """Marks a step of a checkpoint that Orbax did not write as complete."""
  if is_remote(step):
    (step / COMMITTED).write_text('')


def is_committed(step) -> bool:
  """Whether a step of a checkpoint is complete; on a disk, Orbax renames it when it is."""
  return not is_remote(step) or (step / COMMITTED).exists()


def kvstore(folder) -> dict:
  """TensorStore's spec of a folder; it repeats a failed request for about a minute."""
  if not is_remote(folder):
    return dict(driver='file', path=f'{folder}/')
  bucket, _, path = os.fspath(folder).removeprefix('gs://').partition('/')
  return dict(driver='gcs', bucket=bucket, path=f'{path}/' if path else '',
              gcs_request_retries=dict(max_retries=6))


def _bucket() -> fsspec.AbstractFileSystem:
  return fsspec.filesystem('gs')


def _key(path) -> str:
  """The name that fsspec uses in results."""
  return os.fspath(path).removeprefix('gs://')


def _configure():
  """Lets gcsfs repeat requests that get no answer, without logs of every failure.

  It would give up after 5 minutes.
  """
  import aiohttp
  for name in ('gcsfs', 'asyncio'):  # asyncio: of files that are open when the program ends
    logging.getLogger(name).setLevel(logging.CRITICAL)
  timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
  _SETTINGS.update(requests_timeout=timeout)
