"""Sends a signal to the own process at a chosen change of a folder; runs inside of a program.

tests/torture.py calls `install` before the program starts. A change is a file that is opened to be
written, a folder that is made, a renaming, a deletion, or half of what is appended to a file.
"""
import os
import pathlib
import sys

CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.symlink', 'os.link', 'os.truncate')
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Counter:
  """Counts the changes under a folder, but for caches and events of TensorBoard."""

  def __init__(self, folder: str, at: int, number: int, report: str):
    """at: the change before which the signal `number` is sent, 0: none; report: a file."""
    self.folder, self.at, self.number = os.path.realpath(folder), at, number
    self.report, self.count, self.last = report, 0, ''

  def hook(self, event: str, args: tuple):
    if event == 'open':
      path, _, flags = args
      if flags & WRITES and not isinstance(path, int):
        self.changed(event, path)
    elif event in CHANGES:
      path = args[1] if event in ('os.rename', 'os.link', 'os.symlink') else args[0]
      place = args[-1] if event in ('os.remove', 'os.rmdir', 'os.mkdir') else -1
      self.changed(event, path, place)

  def changed(self, event: str, path, place: int = -1):
    """`place`: the open folder that a relative path begins in; -1: none."""
    try:
      path = os.fsdecode(path)
      if isinstance(place, int) and place >= 0:
        path = os.path.join(os.readlink(f'/proc/self/fd/{place}'), path)
    except (OSError, TypeError):
      return
    path = os.path.abspath(path)
    if not path.startswith(self.folder) or '/compiled' in path or '/tensorboard' in path:
      return
    self.count += 1
    self.last = f'{event} {path[len(self.folder):]}'
    if self.count == self.at:
      pathlib.Path(self.report).write_text(f'{self.last}\n')
      os.kill(os.getpid(), self.number)


def install(folder: str, at: int, number: int, report: str, is_counted: bool = False):
  """Sends signal `number` before change `at` of the folder, and writes into `report` which it is.

  is_counted: at the exit, `report` gets the number of changes.
  """
  import atexit

  from srlm_jax import storage
  counter = Counter(folder, at, number, report)

  def write(self, lines, whole=storage.GrowingFile.write):
    half = len(lines) // 2
    if half:
      whole(self, lines[:half])
      self.flush()
      counter.changed('half of a write', getattr(self, 'path', None) or self._file.name)
    whole(self, lines[half:])
  storage.GrowingFile.write = write
  if is_counted:
    atexit.register(lambda: pathlib.Path(report).write_text(f'{counter.count}\n'))
  sys.addaudithook(counter.hook)
