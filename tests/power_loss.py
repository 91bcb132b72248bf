"""Simulates power loss: rebuilds a folder as a disk may hold it after a crash at any moment.

`power_loss.c` logs what programs do below a folder. `Disk` replays the log. A file's data is
durable after a sync of the file, and its name after a sync of its folder; all else may be lost, see
`save`.

A library that is preloaded needs no rights. FUSE and a block device that logs its writes need root
and a kernel that has them, and see only what their own file system does: ext4 syncs more than it is
asked to, so a sync of a folder that is missing here would not be found.
"""
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import struct
import subprocess
import tempfile

RECORD = struct.Struct('6Q')


class Escaped(Exception):
  """The log does not explain what is in the folder."""


@functools.cache
def library() -> pathlib.Path:
  """The compiled power_loss.c. Raises FileNotFoundError without a C compiler."""
  path = pathlib.Path(tempfile.mkdtemp(prefix='power-loss-'), 'power_loss.so')
  source = pathlib.Path(__file__).with_suffix('.c')
  subprocess.run(['cc', '-shared', '-fPIC', '-O1', '-Wall', '-Werror', '-o', str(path),
                  str(source)], check=True)
  return path


def environment(folder, log) -> dict[str, str]:
  """The variables with which a program logs what it does below `folder` into `log`."""
  return dict(LD_PRELOAD=str(library()), POWER_LOSS_FOLDER=os.path.realpath(folder),
              POWER_LOSS_LOG=str(log))


@dataclasses.dataclass(eq=False)
class File:
  """A file: what programs see, what is durable, and the writes since the last sync."""
  data: bytearray
  durable: bytes = b''
  pending: list[tuple[int, bytes | None]] = dataclasses.field(default_factory=list)

  def write(self, offset: int, data: bytes | None):
    """Writes `data` at `offset`; None sets the size to `offset`."""
    self.pending.append((offset, data))
    _write(self.data, offset, data)

  def sync(self):
    self.durable, self.pending = bytes(self.data), []

  def after(self, keep) -> bytes:
    """The data after a crash; `keep` says of a write whether it reached the disk.

    The size of a file may be on the disk without the data: NUL bytes.
    """
    data = bytearray(self.durable)
    for offset, part in self.pending:
      if keep():
        _write(data, offset, part)
      elif part is not None and keep():
        _write(data, max(len(data), offset + len(part)), None)
    return bytes(data)


def _write(data: bytearray, offset: int, part: bytes | None):
  end = offset if part is None else offset + len(part)
  data.extend(bytes(max(0, end - len(data))))
  if part is None:
    del data[offset:]
  else:
    data[offset:end] = part


@dataclasses.dataclass(eq=False)
class Folder:
  """A folder: {name: File, Folder or the target of a link}, now and durable."""
  names: dict = dataclasses.field(default_factory=dict)
  durable: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Event:
  """A line of the log, see power_loss.c."""
  kind: str
  inode: int
  offset: int
  path: str
  other: str
  data: bytes


def events(log):
  """Yields the events of a log; the last one may be cut off."""
  with open(log, 'rb') as file:
    while len(head := file.read(RECORD.size)) == RECORD.size:
      kind, inode, offset, *sizes = RECORD.unpack(head)
      parts = [file.read(size) for size in sizes]
      if list(map(len, parts)) != sizes:
        return
      yield Event(chr(kind), inode, offset, os.fsdecode(parts[0]), os.fsdecode(parts[1]), parts[2])


class Disk:
  """A folder on a disk, all of it durable when this is made, before any program is logged."""

  def __init__(self, folder):
    self.path = os.path.realpath(folder)
    self._files = {}     # {inode: File}
    self._pending = []   # changes of names that are not durable: lists of (Folder, name, node)
    self._root = self._read(self.path)

  def _read(self, path) -> Folder:
    folder = Folder()
    for entry in os.scandir(path):
      if entry.is_symlink():
        folder.names[entry.name] = os.readlink(entry.path)
      elif entry.is_dir():
        folder.names[entry.name] = self._read(entry.path)
      else:
        data = pathlib.Path(entry.path).read_bytes()
        folder.names[entry.name] = self._files[entry.inode()] = File(bytearray(data), data)
    folder.durable = dict(folder.names)
    return folder

  def apply(self, event: Event) -> bool:
    """Applies an event of the log -> whether it made something durable."""
    kind = event.kind
    if kind == 'C':
      if event.inode in self._files:  # the number of a file that was deleted is used again
        del self._files[event.inode]
      self._files[event.inode] = File(bytearray())
      self._change([(event.path, self._files[event.inode])])
    elif kind in 'WTVS':
      if event.inode not in self._files:
        raise Escaped(f'a file that the log did not create: inode {event.inode}')
      file = self._files[event.inode]
      if kind == 'W':
        file.write(event.offset, event.data)
      elif kind == 'T':
        file.write(event.offset, None)
      elif file.data != event.data:
        file.write(0, event.data)
        file.write(len(event.data), None)
      if kind == 'S':
        file.sync()
    elif kind == 'M':
      self._change([(event.path, Folder())])
    elif kind == 'Y':
      self._change([(event.path, event.other)])
    elif kind == 'U':
      self._change([(event.path, None)])
    elif kind == 'L':
      self._change([(event.other, self._node(event.path))])
    elif kind == 'R':
      self._change([(event.path, None), (event.other, self._node(event.path))])
    elif kind == 'D':
      folder = self._node(event.path)
      self._make_durable(lambda change: change[-1][0] is folder)
    elif kind == 'A':
      self._make_durable(lambda change: True)
      for file in self._files.values():
        file.sync()
    else:
      raise Escaped(f'{event.path}, which the replay does not support')
    return kind in 'SDA'

  def _node(self, path: str):
    node = self._root
    for name in pathlib.PurePath(path).relative_to(self.path).parts:
      node = node.names[name]
    return node

  def _change(self, changes: list[tuple]):
    """Changes names together; durable when the folder of the last one is synced."""
    pending = []
    for path, node in changes:
      folder, name = self._node(os.path.dirname(path)), os.path.basename(path)
      pending.append((folder, name, node))
      _set(folder.names, name, node)
    self._pending.append(pending)

  def _make_durable(self, is_synced):
    for change in filter(is_synced, self._pending):
      for folder, name, node in change:
        _set(folder.durable, name, node)
    self._pending = [change for change in self._pending if not is_synced(change)]

  def save(self, out, rng: random.Random | None = None):
    """Writes the folder `out` as it is after a crash now.

    Without `rng`, all that was not synced is lost. With it, a random part of that is kept: half of
    the time any changes of names, else those up to a moment, as file systems with a journal do.
    """
    shutil.rmtree(out, ignore_errors=True)
    if rng is None:
      self._save(self._root, out, {}, lambda: False)
      return
    kept, share = {}, rng.choice([0.1, 0.5, 0.9])
    last = rng.randrange(len(self._pending) + 1) if rng.random() < 0.5 else None
    for i, change in enumerate(self._pending):
      if i < last if last is not None else rng.random() < share:
        for folder, name, node in change:
          _set(kept.setdefault(id(folder), dict(folder.durable)), name, node)
    self._save(self._root, out, kept, lambda: rng.random() < share)

  def _save(self, folder: Folder, out, kept: dict, keep):
    os.makedirs(out)
    for name, node in kept.get(id(folder), folder.durable).items():
      path = os.path.join(out, name)
      if isinstance(node, str):
        os.symlink(node, path)
      elif isinstance(node, Folder):
        self._save(node, path, kept, keep)
      else:
        pathlib.Path(path).write_bytes(node.after(keep))

  def check(self):
    """Raises Escaped if the folder differs from what the log says that programs see."""
    self._check(self._root, self.path)

  def _check(self, folder: Folder, path: str):
    if (found := {*os.listdir(path)}) != folder.names.keys():
      raise Escaped(f'{path}: {found ^ folder.names.keys()}')
    for name, node in folder.names.items():
      here = os.path.join(path, name)
      if isinstance(node, Folder):
        self._check(node, here)
      elif isinstance(node, File) and pathlib.Path(here).read_bytes() != node.data:
        raise Escaped(f'{here} has other data')
      elif isinstance(node, str) and os.readlink(here) != node:
        raise Escaped(f'{here} is another link')


def _set(names: dict, name: str, node):
  if node is None:
    names.pop(name, None)
  else:
    names[name] = node
