"""Fuzzing targets: what a run reads. See tests/fuzzing.py."""
import contextlib
import functools
import io
import pathlib
import shutil

import fuzzing
from fuzzing import Target
import samples
import tiny_run

from srlm_jax import records, schema
from srlm_jax.report import page

ROWS = [samples.response('p/0'), samples.response('p/1', thinking='hm', token_ids=(1, 2)),
        samples.judgement('p/0', 0, 3.0), samples.pair('p'), samples.ranked('q', [0, 1, 1])]
# Instead of a file's bytes: it is a folder, a link to nothing, a link to itself, absent.
PLACES = (b'//folder', b'//dangling', b'//loop', b'//absent')


def place(path: pathlib.Path, data: bytes):
  """Makes the file what `data` says, one of PLACES or its bytes."""
  remove(path)
  if data == PLACES[0]:
    path.mkdir()
  elif data == PLACES[1]:
    path.symlink_to('nothing')
  elif data == PLACES[2]:
    path.symlink_to(path.name)
  elif data != PLACES[3]:
    path.write_bytes(data)


def remove(path: pathlib.Path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def damaged_file(rng, data, others):
  """Damages a file's bytes, or what is in its place."""
  way = rng.random()
  if way < 0.04:
    return rng.choice(PLACES)
  return (fuzzing.other_values if way < 0.6 else fuzzing.damaged)(rng, data, others)


@contextlib.contextmanager
def quiet():
  """Takes what programs print, as strictly as a terminal does."""
  with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding='utf-8')) as out:
    yield
    out.flush()


class Files:
  """A folder of which one file at a time is damaged, and then restored."""

  def __init__(self, make, read, keep=(), is_consistent=False):
    """make(folder) writes it; read(folder, relative path) reads it."""
    self._make, self._read, self._is_consistent = make, read, is_consistent

  @functools.cached_property
  def _folder(self) -> pathlib.Path:
    folder = fuzzing.folders() / 'run'
    self._make(folder)
    return folder

  @functools.cached_property
  def valid(self) -> list[fuzzing.Input]:
    return [(str(path.relative_to(self._folder)), path.read_bytes())
            for path in sorted(self._folder.rglob('*')) if path.is_file()]

  def __len__(self):
    return len(self.valid)

  def __iter__(self):
    return iter(self.valid)

  def __call__(self, given: fuzzing.Input):
    """Reads the folder with one file as given."""
    name, data = given
    path = self._folder / name
    before = {path: path.read_bytes()}
    try:
      place(path, data)
      if self._is_consistent:
        done = path.parent / 'done.json'
        before.setdefault(done, done.read_bytes())
        tiny_run.consistent(path.parent)
      with quiet():
        self._read(self._folder)
    finally:
      for other, was in before.items():
        place(other, was)


def finished_run(folder):
  tiny_run.make(folder)
  tiny_run.finish(folder)


report = Files(finished_run, lambda folder: page.remake([folder], folder.parent / 'report.html'))


def parse(kind):
  return lambda data: records.parse(data, 'x.jsonl:1', kind)


TARGETS = [
    Target('parse', [(type(row).__name__, records.dump(row).encode()) for row in ROWS],
           lambda given: records.parse(given[1], 'x.jsonl:1', getattr(schema, given[0]))),
    Target('read_any', [records.dump(row).encode() for row in ROWS],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl')),
    Target('report', report, report, damage=damaged_file, share=0.05),
]
