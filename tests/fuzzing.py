"""Feeds damaged input to readers: success or InputError, in bounded time and memory.

A `Target` is a reader with valid inputs. Input i of a target is one of them, damaged with random
numbers that depend only on the seed, the target's name and i. `make fuzz` runs 100,000 inputs per
target, `make fuzz TARGET=NAME` those of one; tests/test_fuzz*.py run 2,000. A slow target has a
`share` of these. Targets are declared in the modules of MODULES, in a list `TARGETS`.
"""
import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import hypothesis
from hypothesis import strategies as st

from srlm_jax import InputError

MODULES = ('fuzz_run', 'fuzz_models')
INPUTS = 100_000
EXAMPLES = 200   # valid inputs that are drawn of a strategy
SPARE = 512      # MB of addresses beside a target's bound: arenas of threads, which are not used
FOUND = 20       # different defects after which a target ends
SHRINKS = 5_000  # calls of the reader to shrink one input

# An input: bytes, or a name (of a file, of a flag) with bytes; only the bytes are damaged.
Input = bytes | tuple[str, bytes]


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader, and what is fed to it."""
  name: str
  valid: st.SearchStrategy | Sequence[Input]  # inputs that the reader accepts
  read: Callable[[Input], object]             # raises InputError for bad input
  refused: Sequence[Input] = ()   # inputs that it refuses, which are damaged too
  examples: Sequence[Input] = ()  # damaged inputs that are tried first, such as earlier findings
  is_folder: bool = False         # valid: files of one folder, which together are one valid input
  damage: Callable | None = None  # (rng, data, others) -> bytes, instead of `damaged`
  share: float = 1.0              # of the inputs, for a slow reader; at least one per valid input
  seconds: float = 10.0           # most per input; ample, because the machine may be loaded
  megabytes: int = 256            # most memory beside what the process had before


@dataclasses.dataclass
class Result:
  """What the inputs of a target led to."""
  name: str
  inputs: int = 0
  same: int = 0  # inputs that mean the same as undamaged ones, and count as neither of the next two
  accepted: int = 0
  refused: int = 0
  places: set = dataclasses.field(default_factory=set)  # lines that raised InputError
  seconds: float = 0.0
  megabytes: float = 0.0
  last: str = ''  # the last InputError
  defects: list[str] = dataclasses.field(default_factory=list)

  def line(self) -> str:
    return (f'{self.name:<26} {self.inputs:>8,} {self.same:>7,} {self.accepted:>9,} '
            f'{self.refused:>8,} {len(self.places):>7} {self.seconds:>8.1f} {self.megabytes:>6.0f}')


HEADER = f'{"target":<26} {"inputs":>8} {"same":>7} {"accepted":>9} {"refused":>8} ' \
         f'{"reasons":>7} {"s":>8} {"MB":>6}'


# Text that replaces a JSON value, or is put somewhere into other text.
DEEP = 100_000
VALUES = (
    'null', 'true', 'false', '0', '-1', '1', '2', '3', '-0.0', '1.5', '1e308', '1e999', '-1e999',
    'NaN', 'Infinity', '-Infinity', str(10 ** 30), str(-10 ** 30), '9' * 400, '9' * 5000,
    str(2 ** 31), str(2 ** 53), str(2 ** 63), str(2 ** 64), '""', '" "', '"a"', '"0"', '"1.5"',
    '"nan"', '"inf"', '"1e999"', '"\\ud800"', '"a\\udfffb"', '"\\u0000"', '"/etc/passwd"',
    '"../.."', '"a/b"', '"."', '"~"', '"%s{0}{x}"', '"\\n"', '"<b>&\\""', f'"{"x" * 5000}"',
    '[]', '{}', '[null]', '[[]]', '[{}]', '{"": null}', '["a"]', '[1, 2]', '[NaN]', '{"a": 1}',
    '{"id": "a"}', f'"{"é" * 300}"', '"\U0001f600\u2028\x85"', '[' * 50 + ']' * 50)
DEEP_VALUES = ('[' * DEEP, '[' * DEEP + ']' * DEEP, '{"a":' * DEEP,
               '{"a":' * DEEP + '1' + '}' * DEEP)
WORDS = (b'\0', b'\xff', b'\n', b'\r\n', b' ', b'{', b'}', b'[', b']', b'"', b',', b':', b'\\',
         b'0', b'-', b'.', b'e9', b'NaN', b'null', b'\\ud800', b'\xed\xa0\x80', b'\xef\xbb\xbf',
         b'\xe2\x80\xa8', b'9' * 5000)
# Whole inputs without any use.
NOISE = (b'', b'\0', b'\0' * 4096, b'\n', b'\n\n\n', b' ', b'null', b'[]', b'{}', b'""', b'0',
         b'NaN', b'-', b'{"', b'[{}]', b'[[]]', b'{"": {}}', b'\xef\xbb\xbf{}',
         '{}'.encode('utf-16'), b'\xff\xfe', b'\x1f\x8b', b'"\\ud800"', b'1e999', b'9' * 5000,
         b'x' * 100_000, *(value.encode() for value in DEEP_VALUES))
_HOLE = '\x01hole\x01'  # stands for text that is not the JSON of a Python value


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
  """`data` with one or a few changes, or unchanged, or noise; `others` are spliced into it.

  Unchanged data must be accepted: they show that the input before left nothing behind.
  """
  way = rng.random()
  if way < 0.03:
    return data
  if way < 0.11:
    return rng.choice(NOISE)
  if way < 0.13:
    return rng.randbytes(rng.randrange(200))
  if way < 0.65 and (changed := _changed_json(rng, data)) is not None:
    return changed
  for _ in range(rng.choice((1, 1, 2, 4))):
    data = _changed_bytes(rng, data, others)
  return data


def other_values(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
  """`data` with other numbers and texts of the same types, so that its reader may accept it."""
  lines = data.splitlines(keepends=True)
  is_lines = len(lines) > 1 and lines[0].rstrip().endswith(b'}')
  i = rng.randrange(len(lines)) if is_lines else 0
  try:
    root = [json.loads(lines[i] if is_lines else data)]
  except (ValueError, RecursionError):
    return damaged(rng, data, others)
  leaves = [(parent, key) for parent, key in _places(root)
            if not isinstance(parent[key], dict | list)]
  for parent, key in rng.sample(leaves, min(len(leaves), rng.choice((1, 1, 2, 5)))):
    parent[key] = _similar(rng, parent[key])
  changed = json.dumps(root[0]).encode()
  return b''.join([*lines[:i], changed + b'\n', *lines[i + 1:]]) if is_lines else changed


def _similar(rng, old):
  if isinstance(old, bool):
    return not old
  if isinstance(old, int):
    return rng.choice((0, 1, 2, 7, old + 1, max(0, old - 1), 10 ** 6, 10 ** 15))
  if isinstance(old, float):
    return rng.choice((0.0, -old, old / 3, old * 1e6, 1.0, -1.0, 1e-300, 1e15, -1e15, 3))
  if isinstance(old, str):
    return rng.choice(('', 'a', old + 'x', old[1:], old.upper(), 'm1', 'm3', 'p0', 'a/b', ' ',
                       '\0', 'x' * 2000, '\u2028'))
  return rng.choice((0, 1, 0.5, 'a'))


def _changed_bytes(rng, data: bytes, others) -> bytes:
  """Bytes are changed, removed, repeated, moved, or come from elsewhere."""
  start = rng.randrange(len(data) + 1)
  end = min(len(data), start + rng.choice((1, 1, 2, 4, 16, 64, 1 + len(data) // 2)))
  head, part, tail = data[:start], data[start:end], data[end:]
  match rng.randrange(8):
    case 0:
      return head + bytes(b ^ 1 << rng.randrange(8) for b in part) + tail
    case 1:
      return head + tail
    case 2:
      return head
    case 3:
      return head + part * rng.choice((2, 2, 3, 50)) + tail
    case 4:
      return head + rng.choice(WORDS) + (part + tail if rng.random() < 0.5 else tail)
    case 5 if others:
      other = rng.choice(others)
      return head + other[rng.randrange(len(other) + 1):]
    case 6:
      lines = data.splitlines(keepends=True)
      rng.shuffle(lines)
      return b''.join(lines)
    case _:
      return head + rng.randbytes(len(part)) + tail


def _changed_json(rng, data: bytes) -> bytes | None:
  """A change to the JSON value that `data` is, or to one of its lines; None if neither is JSON."""
  with contextlib.suppress(ValueError, RecursionError):
    return _changed_value(rng, json.loads(data)).encode('utf-8', 'surrogatepass')
  lines = data.splitlines(keepends=True)
  if len(lines) < 2:
    return None
  i = rng.randrange(len(lines))
  try:
    value = json.loads(lines[i])
  except (ValueError, RecursionError):
    return None
  lines[i] = _changed_value(rng, value).encode('utf-8', 'surrogatepass') + b'\n'
  return b''.join(lines)


def _changed_value(rng, value) -> str:
  """The JSON of `value` with one or two changes at random places."""
  root, text = [value], ''
  for _ in range(rng.choice((1, 1, 1, 2))):
    places = _places(root)
    parent, key = rng.choice(places)
    old = parent[key]
    match rng.randrange(9):
      case 0 | 1 | 2:
        text = rng.choice(VALUES if rng.random() < 0.98 else DEEP_VALUES)
        parent[key] = _HOLE
      case 3 if parent is not root:
        del parent[key]
      case 4 if isinstance(parent, dict):
        del parent[key]
        parent[rng.choice((*parent, key + 'x', '', 'id', key[:-1], 'a/b', '\ud800'))] = old
      case 5 if isinstance(parent, list) and parent is not root:
        parent[key:key] = [old] * rng.choice((1, 1, 20))
      case 6:
        other, where = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[where]))
      case 7:
        parent[key] = rng.choice(([old], {'a': old}, str(old), [old, old]))
      case _:
        parent[key] = _changed_leaf(rng, old)
  return json.dumps(root[0], ensure_ascii=rng.random() < 0.5).replace(json.dumps(_HOLE), text)


def _changed_leaf(rng, old):
  if isinstance(old, bool) or old is None:
    return rng.choice((not old, 0, 'true'))
  if isinstance(old, int | float):
    return rng.choice((-old, old + 1, old - 1, old * 1000, old / 3, float(old), str(old), 10 ** 18))
  if isinstance(old, str):
    at = rng.randrange(len(old) + 1)
    new = rng.choice(('', ' ', '\n', '\0', 'é', '\ud800', '/', '-', '.', '9', 'x' * 2000))
    return rng.choice((old[:at], old[:at] + new + old[at:], new, old * 2, old.upper(), old[1:]))
  return rng.choice((None, 0, '', [], {}))


def _places(root: list) -> list[tuple]:
  """(container, key) of every value inside `root`."""
  found, todo = [], [root]
  while todo:
    parent = todo.pop()
    for key in parent if isinstance(parent, dict) else range(len(parent)):
      found.append((parent, key))
      if isinstance(parent[key], dict | list) and parent[key]:
        todo.append(parent[key])
  return found


class TooLong(BaseException):
  """The reader took more than the target's seconds. Readers must not catch it as an Exception."""


def run(target: Target, inputs: int, seed: int = 0, progress: Callable[[int], None] = id) -> Result:
  """Feeds undamaged and `inputs` damaged inputs to the target; calls progress(i) before input i.

  The first inputs are the target's valid and refused ones, which must be, and its examples.
  """
  result, seen = Result(target.name), set()
  valid, refused = _valid(target), list(target.refused)
  wanted = dict.fromkeys(valid, 'accepted') | dict.fromkeys(refused, 'refused')
  same = {_meaning(given) for given in wanted}
  seeds = valid + refused
  datas = [_data(x) for x in seeds]
  own = [*(valid[:1] if target.is_folder else valid), *refused, *target.examples]
  count = len(own) + max(len(seeds), round(inputs * target.share))
  began = time.perf_counter()
  with contextlib.suppress(Exception):  # what is imported and kept for all inputs is not counted
    target.read(valid[0])
  with _bounded(target.megabytes) as peak:
    for i in range(count):
      progress(i)
      given = own[i] if i < len(own) else _input(target, seeds, datas, seed, i - len(own))
      outcome, defect = _feed(target, given, peak, result)
      if outcome and outcome != wanted.get(given, outcome):
        defect = 'undamaged', (f'an undamaged input was {outcome}, but must be {wanted[given]} '
                               f'{result.last}')
      result.inputs += 1
      if _meaning(given) in same:
        result.same += 1
      elif outcome:
        setattr(result, outcome, getattr(result, outcome) + 1)
      if defect and defect[0] not in seen:
        seen.add(defect[0])
        small = given if given in wanted else _shrunk(target, given, defect[0], peak)
        result.defects.append(
            f'{target.name}, input {i} of seed {seed}: {defect[1]}\nshrunk input: {_shown(small)}')
        if len(seen) == FOUND:
          break
    result.megabytes = peak()
  result.seconds = time.perf_counter() - began
  return result


def check(target: Target, inputs: int, seed: int = 0):
  """Raises AssertionError for a defect, or if nearly all damaged inputs had the same outcome."""
  result = run(target, inputs, seed)
  assert not result.defects, '\n\n'.join(result.defects)
  assert (problem := one_sided(result)) is None, problem
  return result


def one_sided(result: Result) -> str | None:
  """Why a target tests little: nearly all damaged inputs were accepted, or nearly all refused."""
  damaged_count = result.inputs - result.same
  for name, count in (('accepted', result.accepted), ('refused', result.refused)):
    if count < 0.002 * damaged_count:
      return (f'{result.name}: {count} of {damaged_count} damaged inputs were {name}; damage them '
              f'otherwise')
  return None


def in_file(read: Callable, name: str = 'input.json') -> Callable[[bytes], object]:
  """A reader of paths as a reader of bytes: `read(path)` of a file with them."""
  folder = folders()
  def given(data: bytes):
    path = folder / name
    path.write_bytes(data)
    return read(path)
  return given


def folders() -> pathlib.Path:
  """A new folder, in memory if possible. It is deleted when the process ends."""
  memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
  kept = tempfile.TemporaryDirectory(prefix='srlm-fuzz-', dir=memory)
  _kept.append(kept)
  return pathlib.Path(kept.name)


_kept: list = []  # folders that live as long as the process


def _valid(target: Target) -> list[Input]:
  if not isinstance(target.valid, st.SearchStrategy):
    return list(target.valid)
  found = []

  @hypothesis.seed(0)
  @hypothesis.settings(max_examples=EXAMPLES, database=None, deadline=None, derandomize=False,
                       phases=[hypothesis.Phase.generate],
                       suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(target.valid)
  def draw(example):
    found.append(example)

  draw()
  return found


def _input(target: Target, seeds, datas, seed: int, i: int) -> Input:
  """Damaged input i; each of the undamaged `seeds` is damaged at least once."""
  rng = random.Random(f'{seed} {target.name} {i}')
  given = seeds[i] if i < len(seeds) else rng.choice(seeds)
  return _with(given, (target.damage or damaged)(rng, _data(given), datas))


def _data(given: Input) -> bytes:
  return given[1] if isinstance(given, tuple) else given


def _with(given: Input, data: bytes) -> Input:
  return (given[0], data) if isinstance(given, tuple) else data


def _meaning(given: Input) -> Input:
  """The input with its JSON, or the JSON of its lines, written in one way; otherwise as it is."""
  data = _data(given)
  with contextlib.suppress(ValueError, RecursionError):
    try:
      data = json.dumps(json.loads(data)).encode()
    except ValueError:
      data = b'\n'.join(json.dumps(json.loads(line)).encode()
                        for line in data.splitlines() if line.strip())
  return _with(given, data)


def _feed(target: Target, given: Input, peak, result: Result | None = None):
  """Feeds one input -> (outcome, None) or (None, (kind of defect, its text))."""
  begin, before = time.monotonic(), peak()
  signal.setitimer(signal.ITIMER_REAL, target.seconds)
  outcome, defect = None, None
  try:
    target.read(given)
    outcome = 'accepted'
  except InputError as error:
    outcome = 'refused'
    if result:
      result.places.add(_place(error))
      result.last = str(error)
    if len(str(error)) > 2000 or not str(error).strip():
      defect = 'message', f'an InputError of {len(str(error))} characters'
  except TooLong as error:
    defect = ('time', *_place(error)), f'more than {target.seconds} s\n{_frames(error)}'
  except (Exception, SystemExit, KeyboardInterrupt) as error:  # every one is a defect
    defect = (type(error).__name__, *_place(error)), f'{error!r:.500}\n{_frames(error)}'
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  if not defect and time.monotonic() - begin > target.seconds:
    defect = 'time', f'{time.monotonic() - begin:.1f} s, more than {target.seconds}'
  if not defect and peak() > target.megabytes:
    defect = 'memory', f'{peak():.0f} MB, {before:.0f} before, allowed {target.megabytes}'
  return (None, defect) if defect else (outcome, None)


def _place(error: BaseException) -> tuple[str, int]:
  """The file and line that raised the error; of a RecursionError, the first of the cycle."""
  frames = traceback.extract_tb(error.__traceback__)
  if isinstance(error, RecursionError):
    frames = frames[:4]
  return (frames[-1].filename, frames[-1].lineno) if frames else ('', 0)


def _frames(error: BaseException) -> str:
  return ''.join(traceback.format_tb(error.__traceback__)[-6:])


def _shrunk(target: Target, given: Input, kind, peak) -> Input:
  """A shorter input with the same kind of defect."""
  if 'memory' in kind or 'time' in kind:  # it would take as much again, many times
    return given
  left = SHRINKS

  def fails(data: bytes) -> bool:
    nonlocal left
    left -= 1
    _, found = _feed(target, _with(given, data), peak)
    return bool(found) and found[0] == kind

  data, before = _data(given), None
  while data != before and left > 0:  # until no part can be left out
    before, size = data, max(1, len(data) // 2)
    while size and left > 0:
      start = 0
      while start < len(data) and left > 0:
        if fails(shorter := data[:start] + data[start + size:]):
          data = shorter
        else:
          start += max(1, size // 2) if size > 16 else 1
      size = size // 2 if size > 32 else size - 1
  return _with(given, data)


def _shown(given: Input) -> str:
  text = repr(_data(given))
  if len(text) > 2000:
    text = f'{text[:1500]} .. {text[-400:]} ({len(_data(given)):,} bytes)'
  return f'{given[0]}: {text}' if isinstance(given, tuple) else text


@contextlib.contextmanager
def _bounded(megabytes: int):
  """Yields a function: MB at the peak since now, beside what the process had.

  The peak of the resident memory is what an input costs, native code included. The limit on
  addresses stops an allocation that would take all memory before it is counted.
  """
  def too_long(*_):
    raise TooLong

  gc.collect()
  with contextlib.suppress(OSError):  # otherwise the peak is that of the process until now
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  start = _peak()
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  wanted = _addresses() + (megabytes + SPARE << 20)
  resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
  before = signal.signal(signal.SIGALRM, too_long)
  try:
    yield lambda: _peak() - start
  finally:
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> float:
  unit = 1 << 20 if sys.platform == 'darwin' else 1 << 10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _addresses() -> int:
  """Bytes of addresses that the process has."""
  try:
    return int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  except OSError:
    return 1 << 40  # no /proc: in effect, no limit


def targets(module: str) -> dict[str, Target]:
  """{name: target} of a module; none if there is no such module."""
  found = importlib.import_module(module).TARGETS
  assert len({target.name for target in found}) == len(found), f'{module} has equal names'
  return {target.name: target for target in found}


def _modules() -> list[str]:
  here = pathlib.Path(__file__).parent
  return [name for name in MODULES if (here / f'{name}.py').exists()]


def _one(name: str, inputs: int, seed: int, progress_file: str):
  """Runs one target in this process, and prints its Result as JSON."""
  target = next(found[name] for module in _modules() if name in (found := targets(module)))
  file = os.open(progress_file, os.O_WRONLY | os.O_CREAT)

  def progress(i):
    if i % 1000 == 0:  # a hang in native code, which no signal ends
      faulthandler.dump_traceback_later(1000 * target.seconds if i else 600, exit=True)
    os.pwrite(file, b'%12d' % i, 0)

  result = run(target, inputs, seed, progress)
  faulthandler.cancel_dump_traceback_later()
  print(json.dumps(dataclasses.asdict(result) | dict(places=len(result.places))))


def _in_process(name: str, inputs: int, seed: int) -> Result:
  """Runs one target in a process of its own."""
  with tempfile.NamedTemporaryFile() as progress:
    command = [sys.executable, __file__, name, '--one', f'--inputs={inputs}', f'--seed={seed}',
               f'--progress={progress.name}']
    environment = dict(os.environ, JAX_PLATFORMS='cpu', OMP_NUM_THREADS='1')
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
      at = progress.read().decode().strip()
      return Result(name, defects=[f'{name}, input {at or 0} of seed {seed}: the process ended '
                                   f'with {ended.returncode}\n{ended.stderr[-3000:]}'])
  found = json.loads(ended.stdout.splitlines()[-1])
  return Result(**found | dict(places=set(range(found['places']))))


def main():
  """Runs all targets, or those that are named, two at a time; exits with 1 if one has a defect."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('names', nargs='*', help='of targets, or the beginnings of names')
  parser.add_argument('--inputs', type=int, default=INPUTS, help='per target')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--progress', default=os.devnull, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.one:
    return _one(flags.names[0], flags.inputs, flags.seed, flags.progress)
  known = [name for module in _modules() for name in targets(module)]
  names = [name for name in known
           if not flags.names or any(name.startswith(given) for given in flags.names)]
  if not names:
    sys.exit(f'no target is named {flags.names}; there are: {" ".join(known)}')
  print(HEADER, flush=True)
  began, results = time.perf_counter(), []
  with concurrent.futures.ThreadPoolExecutor(flags.processes) as pool:
    for done in concurrent.futures.as_completed(
        [pool.submit(_in_process, name, flags.inputs, flags.seed) for name in names]):
      result = done.result()
      results.append(result)
      print(result.line(), *result.defects, sep='\n', flush=True)
      if not result.defects and (problem := one_sided(result)):
        result.defects.append(problem)
        print(problem, flush=True)
  print(f'{len(names)} targets, {sum(r.inputs for r in results):,} inputs, '
        f'{sum(len(r.defects) for r in results)} defects, {time.perf_counter() - began:.0f} s')
  sys.exit(any(result.defects for result in results))


if __name__ == '__main__':
  importlib.import_module('fuzzing').main()  # under the name by which the targets import it
