"""JSONL records: the files that stages exchange.

A file holds one JSON object per line, most with a string `id`; `schema` has their fields. Names end
in .jsonl or .jsonl.gz.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import operator
import os
import re
import stat
import sys
from typing import BinaryIO, TypeVar
import zlib

from etils import epath
import fsspec
import msgspec
import numpy as np

from srlm_jax import InputError, spill, storage

Record = TypeVar('Record')  # a dataclass of `schema`

# The field that says which request a record of a shard belongs to; of other shards it is `id`.
_REQUEST = dict(responses='prompt_id', responses_2='prompt_id', judgements='response_id')
HASHED = ('.json', '.jsonl', '.model')  # the files of a stage that done.json lists
ANSWERS = 'model_answer'  # a folder of FastChat, whose files it lists too
# Bytes that are read of one line: the ids of a million tokens take 8 MB, and their text 5 MB, or
# 24 MB if all of its characters are escaped. As Python objects it may take some 25 times as much.
MOST_LINE = 32 << 20
# Bytes that are read of a file with one JSON value; the largest known is a tokenizer.json of 33 MB.
MOST_JSON = 128 << 20


def read(path, kind: type[Record]) -> Iterator[Record]:
  """Yields the records of a file as objects of `kind`, a dataclass of `schema`.

  Raises InputError, with file and line, for a line that is not such a record.
  """
  for where, line in _lines(path):
    yield parse(line, where, kind)


def read_any(path) -> Iterator[tuple[str, dict]]:
  """Yields (FILE:LINE, JSON object) for the lines of a file of unknown format."""
  for where, line in _lines(path):
    yield where, _object(line, where)


def _lines(path) -> Iterator[tuple[str, bytes]]:
  """Yields (FILE:LINE, line) for every line that is not blank."""
  path = epath.Path(path)
  with reading(path, 'give a file of JSON lines'):
    if not path.exists():
      raise InputError(f'{path} does not exist; run the stage that writes it first')
    file = path.open('rb')
  with file as raw:
    lines = gzip.open(raw) if path.suffix == '.gz' else raw
    name, number = str(path), 0  # slow for paths of etils
    try:
      for number, line in numbered(lines, name):
        if line.strip():
          yield f'{name}:{number}', line
    except (EOFError, OSError, zlib.error) as error:
      raise InputError(f'{path}:{number + 1}: the file cannot be read further ({error}); fetch it '
                       f'again') from error


def numbered(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
  """Yields (number, line) for every line; raises InputError for one longer than MOST_LINE."""
  if isinstance(file, fsspec.spec.AbstractBufferedFile):  # of a bucket; it reads only whole lines
    file = io.BufferedReader(file)
  for number in itertools.count(1):
    if not (line := file.readline(MOST_LINE + 1)):
      return
    if len(line) > MOST_LINE:
      raise InputError(f'{name}:{number}: the line is longer than {MOST_LINE >> 20} MB; shorten or '
                       f'delete the record')
    yield number, line


def read_shards(folder, stem: str, kind: type[Record]) -> Iterator[Record]:
  """Yields the records of all shards `STEM-00000-of-00001.jsonl` of a stage, in request order.

  kind: as for `read`.

  Group g of G hosts writes the requests g, g + G, g + 2 G, .. (`hosts.Group.share`), each as one or
  more consecutive records. Reading one request from each shard in turn restores the order in which
  a single host would have written them.
  """
  paths = sorted(epath.Path(folder).glob(f'{stem}-*-of-*.jsonl'))
  if not paths:
    raise InputError(f'{folder} holds no {stem}-*.jsonl; run the stage that writes it first')
  for path in paths:
    if not re.fullmatch(r'-\d{5}-of-\d{5}\.jsonl', path.name.removeprefix(stem)):
      raise InputError(f'{path} is not a shard of {stem}; delete or move it')
  count = int(paths[0].stem.rpartition('-')[2])
  if [p.name for p in paths] != [shard_name(stem, i, count) for i in range(count)]:
    raise InputError(f'{folder} should hold {count} shards of {stem} but holds {len(paths)}; run '
                     f'the stage again')
  if count == 1:
    yield from read(paths[0], kind)
    return
  request = operator.attrgetter(_REQUEST.get(stem, 'id'))
  streams = [itertools.groupby(read(path, kind), key=request) for path in paths]
  while streams:
    left = []
    for stream in streams:
      if found := next(stream, None):
        yield from found[1]
        left.append(stream)
    streams = left


class Matched:
  """The records of a stream that belong to names, which are asked for in the order of the stream.

  It joins two files of the same order in one pass, with the records of one name in memory.

  >>> rows = [dict(to='a', n=1), dict(to='a', n=2), dict(to='c', n=3)]
  >>> found = Matched(rows, operator.itemgetter('to'), 'FILE')
  >>> [len(found.of(name)) for name in 'abc']
  [2, 0, 1]
  """

  def __init__(self, rows: Iterable[Record], key: Callable[[Record], str], source):
    """`key`: the name that a record belongs to; source: the path of the records, for errors."""
    self._groups, self._source = itertools.groupby(rows, key), source
    self._next = next(self._groups, None)

  def of(self, name: str) -> list[Record]:
    """The records of a name; [] if the next ones belong to another name."""
    if self._next is None or self._next[0] != name:
      return []
    found = list(self._next[1])
    self._next = next(self._groups, None)
    return found

  def finish(self, other):
    """Raises InputError if there are records of a name that was not asked for, or not in order.

    `other`: the path of the file that has the names.
    """
    if self._next is not None:
      raise InputError(f'{self._source} has records of {self._next[0]}, which {other} does not '
                       f'have in this place; restore {other}, or delete '
                       f'{epath.Path(self._source).parent} and run its stage again')


def shards(folder, stem: str) -> list:
  """The paths of a stage's shards; without any, a placeholder path for the error message."""
  folder = epath.Path(folder)
  return sorted(folder.glob(f'{stem}-*-of-*.jsonl')) or [folder / f'{stem}.jsonl']


def shard_name(stem: str, index: int, count: int) -> str:
  """
  >>> shard_name('responses', 3, 16)
  'responses-00003-of-00016.jsonl'
  """
  return f'{stem}-{index:05d}-of-{count:05d}.jsonl'


def keep_shards(folder, stem: str, count: int):
  """Moves the records of shards that a killed run on another number of hosts left to STEM.kept.

  `count`: the number of shards now. One host calls it before any appends to a shard. If it is
  killed, the next call gives the same: a shard is deleted after its records are in STEM.kept, and
  no id is kept twice.
  """
  path = _kept_file(folder, stem)
  others = [other for other in sorted(path.parent.glob(f'{stem}-*-of-*.jsonl'))
            if other.stem.rpartition('-')[2] != f'{count:05d}']
  for other in others:
    Appender(other).close()  # removes a line that the kill cut off
  if others:
    found = spill.Spill()
    for shard in [*([path] if path.exists() else []), *others]:
      for where, record in read_any(shard):
        if (name := _text(record, 'id', where)) not in found:
          found.add(name, dump(record))
    with replacing(path) as file:
      file.writelines(found)
  for other in others:
    other.unlink()


class Kept:
  """{id of a request: its records}, which `keep_shards` has kept; not in memory."""

  def __init__(self, folder, stem: str):
    path, self._lines = _kept_file(folder, stem), None
    if path.exists():
      self._lines = spill.Spill()
      for where, record in read_any(path):
        self._lines.add(_text(record, _REQUEST.get(stem, 'id'), where), dump(record))

  def get(self, request: str, default=()) -> Sequence[dict]:
    """The records of a request; `default` if there are none."""
    return [*map(json.loads, self._lines.get(request))] or default if self._lines else default


def _text(record: dict, field: str, where: str) -> str:
  """The value of a field, which must be a string."""
  if not isinstance(value := record.get(field), str):
    raise InputError(f'{where}: "{field}" is {str(value)[:40]}, not a string; delete the folder of '
                     f'that stage and run it again')
  return value


def drop_kept(folder, stem: str):
  """Deletes what `keep_shards` has kept, after all shards are complete."""
  _kept_file(folder, stem).unlink(missing_ok=True)


def _kept_file(folder, stem: str):
  return epath.Path(folder) / f'{stem}.kept'


def read_json(path, advice: str):
  """The value of a JSON file. Raises InputError, which ends with `advice`."""
  try:
    return _json(_whole(path, advice))
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: not JSON ({error}); {advice}') from error


def read_object(path, kind: type[Record], advice: str) -> Record:
  """The JSON object of a file as an object of `kind`; errors as `read_json`."""
  return parse(_whole(path, advice), str(path), kind, advice)


def _whole(path, advice: str) -> bytes:
  path = epath.Path(path)
  with reading(path, advice), path.open('rb') as file:
    data = file.read(MOST_JSON + 1)
  if len(data) > MOST_JSON:
    raise InputError(f'{path} is larger than {MOST_JSON >> 20} MB; {advice}')
  return data


def _json(data: bytes):
  """The value of a JSON text. Raises ValueError or RecursionError if it is not JSON.

  A text with an unpaired surrogate is refused too: it could not be written as UTF-8.
  """
  value = json.loads(data)
  if b'\\u' in data or b'\xed' in data:  # an escape, or the first byte of an encoded surrogate
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      raise ValueError('it contains an unpaired surrogate such as \\ud800') from error
  return value


@contextlib.contextmanager
def reading(path, advice: str):
  """Turns an error of the file system while reading `path` into an InputError with `advice`.

  Raises InputError too if `path` is a pipe or a device, which may never end.
  """
  _refuse_endless(path, advice)
  try:
    yield
  except IsADirectoryError as error:
    raise InputError(f'{path} is a folder; {advice}') from error
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror or error}); {advice}') from error


def _refuse_endless(path, advice: str):
  """Raises InputError for what is no file or folder; a path that cannot be looked at passes."""
  if storage.is_remote(path):
    return
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):  # whoever opens it gets the same error; ValueError: a NUL in it
    return
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise InputError(f'{path} is a pipe, a socket or a device, not a file; {advice}')


@contextlib.contextmanager
def replacing(path, mode: str = 'w'):
  """Yields an open file that replaces `path` when the block ends; an error leaves `path` unchanged.

  Raises InputError for an error of the file system.
  """
  path = epath.Path(path)
  if path.is_dir():
    raise InputError(f'{path} is a folder; give the name of a file')
  try:
    with storage.replacing(path, mode) as file:
      yield file
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
      raise storage.failure(error) from error
    obstacle = storage.obstacle(path)
    why = f': {obstacle} is a file, not a folder' if obstacle else f' ({error.strerror or error})'
    raise InputError(f'{path} cannot be written{why}; give another path') from error


def write(path, records: Iterable) -> int:
  """Writes a whole file of records (`dump`) or nothing; returns the number of records."""
  count = 0
  with replacing(path) as file:
    for record in records:
      file.write(dump(record))
      count += 1
  return count


class Appender:
  """A file that grows record by record. `count`: the whole records that are in it.

  When the file is opened again, a damaged line (`GrowingFile.lines`) is removed, and what follows,
  which is printed. If more than one line is removed, FILE.damaged keeps them: after a power loss
  they are the last ones, but a disk that fails may damage an early line.
  """

  def __init__(self, path):
    self.path = epath.Path(path)
    _refuse_endless(path, 'delete it')
    self._file = storage.growing(path)
    self.count, size = 0, 0
    for line in self._file.lines():
      if not line.strip():
        raise InputError(f'{self.path} has an empty line, which no stage writes; delete '
                         f'{self.path.parent} and run its stage again')
      self.count, size = self.count + 1, size + len(line)
    if removed := self._file.after(size):
      self._keep(removed)
      self._file.truncate(size)

  def _keep(self, removed: bytes):
    """Says what is removed, and saves it if it is more than one line."""
    where = ''
    if removed.strip(b'\0').count(b'\n') > 1:
      kept = self.path.parent / f'{self.path.name}.damaged'
      before = kept.read_bytes() if kept.exists() else b''
      with replacing(kept, 'wb') as file:
        file.write(before + removed)
      where = f'; {kept} keeps them'
    print(f'{self.path}: line {self.count + 1} is damaged, as by a kill or a power loss; the '
          f'{len(removed)} bytes from there on are removed and made again{where}',
          file=sys.stderr, flush=True)

  def append(self, records: Iterable):
    """Appends records.

    A kill loses none of them. In a bucket it loses those of the last `storage.SECONDS`, as a power
    loss does on a disk.
    """
    lines = [dump(record) for record in records]
    self._file.write(''.join(lines).encode())
    self.count += len(lines)

  def close(self):
    self._file.close()


def dump(record) -> str:
  """A record of `schema`, or a JSON object, as a line; equal records give equal bytes.

  >>> from srlm_jax import schema
  >>> dump(schema.Prompt(id='a', prompt='Name a fruit.'))
  '{"id": "a", "prompt": "Name a fruit."}\\n'
  """
  if dataclasses.is_dataclass(record):
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
    record = {name: value for name, default in defaults.items()
              if (value := getattr(record, name)) != default}
  try:
    return json.dumps(record, ensure_ascii=False, allow_nan=False,
                      default=dataclasses.asdict) + '\n'
  except ValueError as error:
    raise InputError(f'the record {str(record)[:80]} has a number that is NaN or infinite; check '
                     f'the model that made it') from error


def contents(folder) -> dict[str, list]:
  """{name: [records, hash]} of a folder's files; records is None for all but .jsonl files.

  Leaves out manifest.json and done.json, and folders but for ANSWERS. Raises InputError if two
  records have the same id, in one file or in two shards of a stage.
  """
  found, files, folder = {}, {}, epath.Path(folder)
  for path in sorted([*folder.iterdir(), *folder.glob(f'{ANSWERS}/*.jsonl')]):
    if path.name in ('manifest.json', 'done.json') or path.suffix not in HASHED:
      continue
    found[str(path.relative_to(folder))] = describe(path)
    if path.suffix == '.jsonl':
      files.setdefault(path.name.partition('-')[0], []).append(path)
  for paths in files.values():
    _refuse_repeated(paths, folder)
  return found


def _refuse_repeated(paths: list, folder):
  """Raises InputError if two records of some files have the same id."""
  def ids():
    for path in paths:
      for where, record in read_any(path):
        if record.get('id') is not None:
          yield where, _text(record, 'id', where)
  # Hashes take less memory than the ids. Only ids whose hash occurs twice are compared.
  hashes = np.fromiter((hash(name) for _, name in ids()), np.int64)
  hashes.sort()
  twice, seen = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}, set()
  for where, name in ids() if twice else ():
    if name in seen:
      raise InputError(f'{where}: a second record with the id {name!r}; delete {folder} and '
                       f'run its stage again')
    if hash(name) in twice:
      seen.add(name)


def hash_file(path) -> str:
  """The hash of a file's contents, 16 hexadecimal digits."""
  return describe(path)[1]


def describe(path) -> list:
  """[records, hash] of a file, in one read; records is None for all but .jsonl files.

  Raises InputError if it does not exist.
  """
  path = epath.Path(path)
  if not path.exists():
    raise InputError(f'{path} does not exist; run the stage that writes it first')
  if path.is_dir():
    raise InputError(f'{path} is a folder; give a file')
  digest, count = hashlib.sha256(), 0
  with reading(path, 'make it readable'), path.open('rb') as f:
    while block := f.read(1 << 20):
      digest.update(block)
      count += block.count(b'\n')
  return [count if path.suffix == '.jsonl' else None, digest.hexdigest()[:16]]


def join(name: str, last: str) -> str:
  """An id of two parts. A slash in the last part is escaped, so that different parts differ.

  >>> join('a', 'b/c'), join('a/b', 'c')
  ('a/b%2Fc', 'a/b/c')
  """
  return f'{name}/{last.replace("%", "%25").replace("/", "%2F")}'


def digest(*parts: str) -> str:
  """A short, stable id made from texts, for records whose source gives none."""
  return hashlib.sha256('\x1f'.join(parts).encode()).hexdigest()[:16]


def is_number(value) -> bool:
  """Whether a JSON value is a finite number.

  >>> is_number(2.5), is_number(True), is_number(float('nan'))
  (True, False, False)
  """
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  return abs(value) <= sys.float_info.max  # False for NaN, and an int may be larger than any float


def parse(line: bytes, where: str, kind: type[Record],
          advice: str = 'correct or delete it') -> Record:
  """A JSON object as an object of `kind`. `where`: FILE:LINE, for errors, which end in `advice`.

  Raises InputError if it is not JSON, lacks a field without a default, or has a value of a wrong
  type.
  """
  try:
    return _decoder(kind).decode(line)
  except msgspec.ValidationError as error:
    raise InputError(f'{where}: not a valid record: {sentence(error)}; {advice}') from error
  except (ValueError, RecursionError) as error:
    try:
      json.loads(line)
    except (ValueError, RecursionError) as plain:
      raise InputError(f'{where}: not a JSON object ({plain}); {advice}') from error
    raise InputError(f'{where}: it contains NaN, Infinity or an unpaired surrogate such as '
                     f'\\ud800, which are not valid JSON; {advice}') from error


def sentence(error: msgspec.ValidationError) -> str:
  """The error of msgspec with names as in the file: $.score -> "score"."""
  text = re.sub(r' - at `\$\.?([^`]*)`', r' for "\1"', str(error)).replace(' for ""', '')
  return text.replace('`', '')


@functools.cache
def _decoder(kind: type) -> msgspec.json.Decoder:
  return msgspec.json.Decoder(kind)


def _object(line: bytes, where: str) -> dict:
  try:
    record = _json(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not a JSON object ({error}); correct or delete the line') from error
  if not isinstance(record, dict):
    raise InputError(f'{where}: a {type(record).__name__}, not a JSON object; '
                     f'correct or delete the line')
  return record
