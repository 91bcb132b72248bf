"""JSONL records: the files in which stages meet.

Every record is one JSON object a line, with a string `id`. Files end in .jsonl or .jsonl.gz.
"""
from collections.abc import Iterable, Iterator
import gzip
import hashlib
import json
import os
import zlib

from etils import epath

from srlm_jax import InputError

_TEXTS = frozenset('id prompt_id response_id prompt response text chosen rejected split finish'.split())


def read(path, *fields: str) -> Iterator[dict]:
  """Yields the records of a file, each checked to hold `fields`; a bad line is named by file and number."""
  for _, record in numbered(path, *fields):
    yield record


def numbered(path, *fields: str) -> Iterator[tuple[str, dict]]:
  """Yields what `read` yields, each record with its place, file:line."""
  path = epath.Path(path)
  if not path.exists():
    raise InputError(f'{path} does not exist; run the stage that writes it first')
  with path.open('rb') as raw:
    lines = gzip.open(raw) if path.suffix == '.gz' else raw
    number = 0
    try:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield f'{path}:{number}', _parse(line, f'{path}:{number}', fields)
    except (EOFError, OSError, zlib.error) as error:
      raise InputError(f'{path}:{number + 1}: the file cannot be read further ({error}); fetch it again') from error


def read_shards(folder, stem: str, *fields: str) -> Iterator[dict]:
  """Yields the records of every shard `stem-00000-of-00001.jsonl` of a stage, in the order of the shards."""
  paths = sorted(epath.Path(folder).glob(f'{stem}-*-of-*.jsonl'))
  if not paths:
    raise InputError(f'{folder} holds no {stem}-*.jsonl; run the stage that writes it first')
  count = int(paths[0].stem.rpartition('-')[2])
  if [p.name for p in paths] != [shard_name(stem, i, count) for i in range(count)]:
    raise InputError(f'{folder} should hold {count} shards of {stem} and holds {len(paths)}; rerun the stage')
  for path in paths:
    yield from read(path, *fields)


def shards(folder, stem: str) -> list:
  """The shards of a stage; where there is none, the name of what is missing, for whoever asks to say so."""
  folder = epath.Path(folder)
  return sorted(folder.glob(f'{stem}-*-of-*.jsonl')) or [folder / f'{stem}.jsonl']


def shard_name(stem: str, index: int, count: int) -> str:
  """
  >>> shard_name('responses', 3, 16)
  'responses-00003-of-00016.jsonl'
  """
  return f'{stem}-{index:05d}-of-{count:05d}.jsonl'


def same_hosts(path):
  """Raises InputError if a killed run left shards of another number of hosts beside this one."""
  path = epath.Path(path)
  count = path.stem.rpartition('-')[2]
  for other in path.parent.glob('*-of-*.jsonl'):
    if other.stem.rpartition('-')[2] != count:
      raise InputError(f'{other} is of a run on {int(other.stem.rpartition("-")[2])} hosts, and this one is on '
                       f'{int(count)}; finish it on as many, or delete {path.parent}')


def write(path, records: Iterable[dict]) -> int:
  """Writes a whole file at once, or nothing; returns how many records."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f'{path.name}.partial'
  count = 0
  with partial.open('w') as f:
    for record in records:
      f.write(dump(record))
      count += 1
  partial.replace(path)
  return count


class Appender:
  """A file that grows record by record; after a kill it holds whole records only, and says how many."""

  def __init__(self, path):
    self.path = epath.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.open('ab').close()
    self.count, whole, size = 0, 0, 0  # lines; bytes of whole lines; bytes
    with self.path.open('rb') as file:
      for line in file:
        size += len(line)
        if line.endswith(b'\n'):
          self.count, whole = self.count + 1, size
    if whole < size:  # a line cut by the kill
      os.truncate(self.path, whole)
    self._file = self.path.open('a')

  def append(self, records: Iterable[dict]):
    """Adds records and hands them to the file system."""
    for record in records:
      self._file.write(dump(record))
      self.count += 1
    self._file.flush()

  def close(self):
    self._file.close()


def dump(record: dict) -> str:
  """The one way a record is written, so that equal records are equal bytes."""
  return json.dumps(record, ensure_ascii=False) + '\n'


def digest(*parts: str) -> str:
  """A short, stable name for texts: the id of a record that the source did not name."""
  return hashlib.sha256('\x1f'.join(parts).encode()).hexdigest()[:16]


def _parse(line: bytes, where: str, fields) -> dict:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise InputError(f'{where}: not a JSON object ({error}); mend or delete the line') from error
  if not isinstance(record, dict):
    raise InputError(f'{where}: a {type(record).__name__} where a JSON object belongs')
  for field in fields:
    if field not in record:
      raise InputError(f'{where}: no field "{field}"; it has {", ".join(sorted(record))}')
    if field in _TEXTS and not isinstance(record[field], str):
      raise InputError(f'{where}: "{field}" is {json.dumps(record[field])[:40]}, not a text; mend or delete the line')
  return record
