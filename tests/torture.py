"""Kills every stage at random moments, and compares what it ends with with an undisturbed run.

  python tests/torture.py                                  # make torture
  python tests/torture.py --seed=1 '--only=m2 DPO;m2 respond' --processes=2 --kills=6

Each program runs in a copy of a finished loop without its own output. A signal ends it at a moment
that is drawn, and it is started again, until it has had its kills and has ended by itself. All
files, and the arrays of all checkpoints, must then be those of a run that nobody killed, and no
lock, part or temporary folder may be left. What may differ: `Tree` says it.

A moment is one of: a change of a file in the folder, counted inside of the program (moments.py),
which includes half of an appended line; a time, for what the libraries do in C++ and for the
start; in a bucket also a request. With two processes the signal ends one of them, or both.
"""
import argparse
from collections import Counter
from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import filecmp
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
import urllib.parse

import buckets
from conftest import bucket_server, CHANGES, config_flags, on, OTHERS, ROOT
import forks
import fsspec
import numpy as np
import stored

from srlm_jax import preemption, storage
from srlm_jax.sandbox import data as sandbox

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
CONTINUES = '; the same command continues'
# Lines of stderr that are not the program's own: of Gloo's connections, and of progress bars.
NOISE = re.compile(r'\[Gloo\]|_default.py|google_auth|it/s|(rows|unit|step|tensor)s?/s|%\|')
BAD = re.compile(r'Traceback|Exception ignored|Fatal Python|terminate called|Segmentation|'
                 r'Aborted|core dumped')
KILLS_OF_TWO = 2  # per program in two processes, at most
MOST_IGNORED = 5  # signals in a row after which a program ends with code 0: they came too late
SECONDS = 240  # for all processes to end after a kill; more is a hang
# Shorter waits for a lost host, and for one that never connects.
FAST = 'from srlm_jax import hosts, peers; peers.TIMEOUT, peers.BEAT, hosts.JOIN = 12, 1, 20\n'
TRAIN = '--config.train.save_every=1', '--config.train.keep=2', '--config.train.dropout=0.1'


@dataclasses.dataclass(frozen=True)
class Case:
  """A program that is killed. RUN in its flags is the workdir."""
  name: str
  program: str
  flags: tuple[str, ...]
  makes: tuple[str, ...]      # the folders that it makes, in the workdir
  is_alone: bool = False      # runs in one process only
  needs: tuple[str, ...] = () # parts of the finished loop that are there; (): all
  kills: int = 3              # of one process, unless --kills gives their number
  in_bucket: int = 0          # runs also in a bucket, in at most so many processes
  bucket_kills: int = 2       # 0: not in a bucket, unless --kills gives their number


def _stage(name: str, program: str, model: str, *more: str, flags=(), **options) -> Case:
  """A stage of a model, in MODEL/NAME."""
  file = dict(sft='sft', m1='iter1', m2='iter2')[model]
  return Case(f'{model} {more[0] if more else name}', program, (
      f'--config={file}:tiny', '--workdir=RUN', *config_flags(model), *flags),
      (f'{model}/{name}',), **options)


def _train(what: str, model: str, *flags: str, program: str = 'train', makes=('model',), **options
           ) -> Case:
  case = _stage('model', program, model, what, flags=(
      *TRAIN, f'--config.train.epochs={dict(m1=0.2, m2=1.0)[model]}', *flags), **options)
  return dataclasses.replace(case, makes=tuple(f'{model}/{name}' for name in makes))


# Of a program that another case has killed already.
_SEEN = dict(is_alone=True, kills=1)
_LORA = '--config.train.lora_rank=4', '--config.train.learning_rate=1e-3'
CASES = (
    Case('convert from HF', 'checkpoint.convert', (f'--from_hf={sandbox.M0}', '--out=RUN/from_hf'),
         ('from_hf',), is_alone=True, in_bucket=1),
    Case('convert to HF', 'checkpoint.convert', ('--checkpoint=RUN/m2/model', '--to_hf=RUN/to_hf'),
         ('to_hf',), is_alone=True, in_bucket=1),
    Case('seeds', 'sandbox', ('--config=sft:tiny', '--workdir=RUN', *config_flags('sft')),
         ('data/seeds',)),
    _train('SFT', 'm1'),
    _train('DPO', 'm2', in_bucket=1),
    _train('DPO, cached', 'm2', '--config.train.reference=cached', makes=('model', 'reference')),
    _train('DPO, LoRA', 'm2', *_LORA, in_bucket=2),
    _train('stopping', 'm2', '--config.train.select=wins', '--config.train.save_every=3',
           '--config.train.max_epochs=1', program='stopping', makes=('model', 'stopping')),
    _stage('judge', 'sample.judge', 'm1'),
    _stage('eft', 'reward.eft', 'm1'),
    _stage('prompts', 'sample.prompts', 'm2', in_bucket=1),
    _stage('respond', 'sample.respond', 'm2', in_bucket=2),
    _stage('judge', 'sample.judge', 'm2'),
    *(_stage(spec.name, spec.program, 'm2', flags=on(spec), **(_SEEN if spec.on else {}))
      for spec in OTHERS.values()),
    _stage('pairs', 'reward.pairs', 'm2', in_bucket=1),
    _stage('majority', 'reward.judge_pairs', 'm2', flags=('--on=majority',)),
    _stage('swapped', 'reward.judge_pairs', 'm2', flags=('--on=swapped',), **_SEEN),
    _stage('health', 'reward.health', 'm2'),
    _stage('audit', 'sandbox.audit', 'm2'),
    _stage('judge_eval', 'sample.judge', 'm2', flags=('--on=eval',), **_SEEN),
    _stage('agreement', 'eval.agreement', 'm2'),
    _stage('answers', 'sample.respond', 'm2', flags=('--on=heldout',), **_SEEN),
    _stage('answers_greedy', 'sample.respond', 'm2', flags=('--on=greedy',), **_SEEN),
    _stage('oracle', 'sandbox.oracle', 'm2'),
    Case('head-to-head', 'eval.head_to_head', (
        '--graded', '--a=RUN/m2/oracle', '--b=RUN/sft/oracle', '--out=RUN/m2_sft'), ('m2_sft',),
         is_alone=True),
    Case('report', 'report', ('--workdir=RUN',), ('report.html',), is_alone=True),
    Case('selection', 'selection', (
        '--config=iter2:tiny', '--workdir=RUN', *config_flags('m2'),
        '--config.train.select=agreement'), ('m2/selection', 'm2/model')),
    Case('loop', 'loop', ('--size=tiny', '--workdir=RUN', '--last=m2',
                          *(f'--set={change}' for change in CHANGES),
                          '--set=m1,m2:train.dropout=0.1', '--set=m1:train.epochs=1'),
         ('.',), needs=('m0',), kills=5, in_bucket=1, bucket_kills=0),
    Case('loop to SFT', 'loop', ('--size=tiny', '--workdir=RUN', '--last=sft',
                                 *(f'--set={change}' for change in CHANGES)),
         ('.',), needs=('m0',), is_alone=True, in_bucket=1),
    Case('study', 'study', ('--workdir=RUN/study', '--seeds=1', '--last=m1',
                            *(f'--set={change}' for change in CHANGES), '--name=short',
                            '--set=sft,m1:train.epochs=0.5'),
         ('study',), is_alone=True),
)


class Failed(Exception):
  """A killed program did not end, or not as an undisturbed one."""


@dataclasses.dataclass
class End:
  """How a process ended."""
  code: int
  out: str
  err: str

  @property
  def lines(self) -> list[str]:
    return [line for line in self.err.splitlines() if line.strip() and not NOISE.search(line)]


@dataclasses.dataclass
class Moment:
  """When and whom a signal hits. change: of a file, or of a bucket; 0: after `seconds`."""
  number: int
  victims: list[int]
  change: int = 0
  seconds: float = 0.0


class Hosts:
  """Runs programs in `count` processes, each of which forks from a server of its own."""

  def __init__(self, count: int, env: dict):
    self.servers = [forks.Server(env, ROOT) for _ in range(count)]
    self._pool = concurrent.futures.ThreadPoolExecutor(count)

  def run(self, program: str, flags, folder, before: str = '', moment: Moment | None = None,
          is_counted: bool = False, armed=None) -> tuple[list[End], int, str]:
    """-> how the processes ended, the changes that the first made, and where it was killed.

    armed: (moment, server) -> a block in which a request to a bucket kills, not a change of a file.
    """
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      run = dict(SRLM_HOSTS=str(len(self.servers)),
                 SRLM_COORDINATOR=f'127.0.0.1:{free.getsockname()[1]}')
      free.close()
      report = [pathlib.Path(temporary, str(i)) for i in range(len(self.servers))]
      waits = []
      for i, server in enumerate(self.servers):
        hit = moment and moment.change and not armed and i == moment.victims[0]
        at, number = (moment.change, int(moment.number)) if hit else (0, 0)
        text = f'import os, sys\n{before}\n'
        if len(self.servers) > 1:
          text += f'os.environ.update({dict(run, SRLM_HOST=str(i))!r})\n{FAST}'
        if not armed:
          text += (f'sys.path.insert(0, {str(ROOT / "tests")!r}); import moments\n'
                   f'moments.install({str(folder)!r}, {at}, {number}, {str(report[i])!r}, '
                   f'{is_counted})\n')
        waits.append(self._pool.submit(server.run, program, flags, text, True))
      where = ''
      if moment:
        where = self._kill(moment, waits, report, armed)
      _, alive = concurrent.futures.wait(waits, SECONDS if moment else 1200)
      if alive:
        for server in self.servers:
          _send(server, signal.SIGKILL)
        found = [End(*wait.result()) for wait in waits]
        raise Failed(f'{len(alive)} processes did not end; stderr: '
                     f'{[end.err[-2000:] for end in found]}')
      counted = int(report[0].read_text()) if is_counted and not armed else 0
      return [End(*wait.result()) for wait in waits], counted, where

  def _kill(self, moment: Moment, waits, report, armed) -> str:
    """Sends the signal -> where, '' if the program has ended before."""
    started = time.monotonic()
    first, *others = moment.victims
    while any(server.pid is None for server in self.servers):
      if all(wait.done() for wait in waits):
        return ''
      time.sleep(0.002)
    at_request = armed if armed and moment.change else lambda *_: contextlib.nullcontext()
    with at_request(moment, self.servers[first]) as request:
      while True:
        is_over, where = waits[first].done(), ''
        if request:
          where = request.where
        elif moment.change:
          where = report[first].read_text() if report[first].exists() else ''
        elif not is_over and time.monotonic() - started >= moment.seconds:
          where = f'after {moment.seconds:.2f} s'
          _send(self.servers[first], moment.number)
        if where:
          for other in others:
            _send(self.servers[other], moment.number)
        if where or is_over:
          return where.strip()
        time.sleep(0.002)

  def close(self):
    for server in self.servers:
      server._process.stdin.close()
      server._process.wait()
    self._pool.shutdown()


def _send(server, number):
  if pid := server.pid:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)


def unexpected(ends: list[End], moment: Moment | None) -> str:
  """What the documents do not promise of how the processes ended; '' if nothing."""
  for i, end in enumerate(ends):
    last = end.lines[-1] if end.lines else ''
    if bad := BAD.search(end.err):
      return f'process {i} printed {bad[0]}: {end.err[-3000:]}'
    continues = end.code == preemption.EXIT_CODE and CONTINUES in last
    if moment is None:
      fine = end.code == 0
    elif i in moment.victims:
      fine = {signal.SIGKILL: end.code == -signal.SIGKILL,
              signal.SIGTERM: continues or end.code == -signal.SIGTERM,
              signal.SIGINT: end.code == preemption.INTERRUPTED and CONTINUES in last or
              end.code == -signal.SIGINT}[moment.number]
      # The last moments of a program, in which it answers no signal any more.
      fine = fine or end.code == 0
      # Another victim may have noticed the end of the first one before its own signal came.
      fine = fine or len(ends) > 1 and (continues or _names_another(end))
    else:
      fine = continues or end.code == 0 or (
          end.code == preemption.EXIT_CODE and 'did not all connect' in last) or (
              moment.number == signal.SIGINT and _names_another(end))
    if not fine:
      return f'process {i} of {len(ends)} ended with code {end.code}: {end.err[-3000:]}'
  return ''


def _names_another(end: End) -> bool:
  return end.code == 1 and bool(end.lines) and 'ended with an error; its output says which' in (
      end.lines[-1])


class Tree:
  """The files of a workdir, for a comparison.

  Left out: TensorBoard's events, which hold times, and compiled programs. done.json without
  `seconds` and `generated`, which are of the last start, and without the hash of metrics.jsonl;
  metrics.jsonl without tokens_per_second; the report without seconds and tokens. The arrays of a
  checkpoint are compared by value, because Orbax draws the names of their files.
  """

  def __init__(self, folder, has_folders: bool = True):
    """has_folders: whether empty folders count; a bucket has none, and files that commit a step."""
    self.folder = pathlib.Path(folder)
    found = sorted(p for p in self.folder.rglob('*') if not {'compiled', 'tensorboard'} & {
        *p.relative_to(self.folder).parts})
    self.arrays = {str(p.relative_to(folder)): p for p in found if p.is_dir() and not p.is_symlink()
                   and p.name in ('params', 'train') and p.parent.parent.name == 'steps'}
    self.files = {str(p.relative_to(folder)): p for p in found
                  if not {*p.parents, p} & {*self.arrays.values()}
                  and (has_folders or not p.is_dir() and p.name != storage.COMMITTED)}

  def difference(self, other: 'Tree') -> str:
    """The first difference, '' if there is none."""
    for mine, theirs in ((self.files, other.files), (self.arrays, other.arrays)):
      if only := sorted(mine.keys() ^ theirs.keys()):
        return f'only in one of them: {", ".join(only[:6])}'
    for name, path in self.files.items():
      if text := _differs(name, path, other.files[name]):
        return text
    for name, path in self.arrays.items():
      a, b = map(stored.arrays, (path, other.arrays[name]))
      if differs := a.keys() ^ b.keys():
        return f'{name}: {differs}'
      for key, x in a.items():
        if x.dtype != b[key].dtype or x.tobytes() != b[key].tobytes():
          return f'{name}: {key} differs'
    return ''


def _differs(name: str, a, b) -> str:
  if a.is_symlink() or b.is_symlink():
    return '' if a.is_symlink() and b.is_symlink() and os.readlink(a) == os.readlink(b) else name
  if a.is_dir() or b.is_dir():
    return '' if a.is_dir() and b.is_dir() else name
  if a.name in ('_CHECKPOINT_METADATA', storage.COMMITTED) or filecmp.cmp(a, b, shallow=False):
    return ''
  if a.name not in ('done.json', 'metrics.jsonl', 'report.html'):
    return f'{name} differs: {_first(a.read_bytes(), b.read_bytes())}'
  x, y = (_comparable(path) for path in (a, b))
  return '' if x == y else f'{name} differs: {_first(x, y)}'


def _comparable(path):
  """The content of a file, without times."""
  text = path.read_text()
  if path.name == 'done.json':
    found = json.loads(text)
    found.pop('seconds', None)
    found.pop('generated', None)
    found.get('files', {}).pop('metrics.jsonl', None)
    return found
  if path.name == 'metrics.jsonl':
    return [{k: v for k, v in json.loads(line).items() if k != 'tokens_per_second'}
            for line in text.splitlines()]
  # Of the report, in which the stages of a chart are sorted by their seconds.
  text = re.sub(r'<svg[^>]*aria-label="seconds per stage.*?</svg>', '', text, flags=re.DOTALL)
  text = re.sub(r'\b[\d.,]+ (?:s|min|h|tokens)\b', '', text)
  return text.replace('<small></small>', '')  # of the tokens per second, where there are any


def _first(x, y) -> str:
  x, y = str(x), str(y)
  i = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
  return f'{x[max(i - 40, 0):i + 60]!r}, {y[max(i - 40, 0):i + 60]!r}'


class Place:
  """Where a case runs: a folder on the disk."""
  name, before, armed = 'disk', '', None

  def __init__(self, root: pathlib.Path, base: pathlib.Path):
    self.root, self.base = root, base
    self.run = root / 'run' / 'w'
    self.url = str(self.run)  # for the flags

  def begin(self, case: Case):
    """Makes the workdir of a case: the base without what the case makes."""
    shutil.rmtree(self.run.parent, ignore_errors=True)
    parts = [p.name for p in self.base.iterdir() if not case.needs or p.name in case.needs]
    self.run.mkdir(parents=True)
    for part in parts:
      source = self.base / part
      (shutil.copytree if source.is_dir() else shutil.copy)(source, self.run / part)
    for made in case.makes:
      if made != '.' and (case.name, made) != ('selection', 'm2/model'):
        path = self.run / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if case.name == 'selection':  # a model of whose checkpoints none is selected
      shutil.rmtree(self.run / 'm2' / 'model')
      shutil.copytree(self.base / 'selectable', self.run / 'm2' / 'model')

  def state(self, case: Case) -> str:
    """How far the case is: before it wrote, while it works, or after done.json."""
    made = self.run / case.makes[0]
    if not made.exists():
      return 'before'
    return 'after' if (made / 'done.json').exists() else 'during'

  def tree(self) -> Tree:
    return Tree(self.run.parent, self.name == 'disk')

  def keep(self, name: str) -> pathlib.Path:
    """Moves the workdir -> its new place."""
    to = self.root / name
    shutil.rmtree(to, ignore_errors=True)
    shutil.move(self.run.parent, to)
    return to

  def failing(self):
    """A block in which requests fail."""
    return contextlib.nullcontext()

  def changes(self) -> int:
    """The requests so far that change a bucket."""
    return 0


class Bucket(Place):
  """Where a case runs: a folder in a bucket, whose requests fail now and then."""
  name = 'bucket'
  before = 'from srlm_jax import storage; storage.SECONDS, storage.TIMEOUT = 0, 5'

  def __init__(self, root, base, rng):
    super().__init__(root, base)
    self.url = f'gs://{buckets.BUCKET}/torture/w'
    self._server, self._files, self._inputs = bucket_server(), fsspec.filesystem('gs'), set()

    def some(method, url, body):
      return rng.random() < 0.01

    def repeatable(method, url, body):  # not Orbax's renames, a copy and a deletion
      return some(method, url, body) and (method == 'GET' or '/upload/' in url)
    self.faults = [*(buckets.Fault(kind, 10**6, some) for kind in (503, 429, 'cut')),
                   *(buckets.Fault(kind, 10**6, repeatable) for kind in ('lost', 'half')),
                   buckets.Fault('hang', 3, repeatable)]

  def begin(self, case):
    self._case = case
    super().begin(case)
    there = self._there()
    for name in [name for name in there if name not in self._inputs or name.startswith(case.makes)]:
      self._files.rm_file(f'{self.url}/{name}')
    wanted = {str(p.relative_to(self.run)): p for p in self.run.rglob('*') if p.is_file()
              and not {'compiled', 'tensorboard', 'train', 'selectable'} & {*p.parts}}
    self._inputs = {*wanted} | {f'{folder.relative_to(self.run)}/{storage.COMMITTED}'
                                for step in self.run.glob('*/model/steps/*')
                                for folder in (step, step / 'params', step / 'hash')}
    for name in self._inputs - {*self._there()}:
      self._files.pipe_file(f'{self.url}/{name}',
                            wanted[name].read_bytes() if name in wanted else b'')

  def _there(self) -> list[str]:
    """The names of all objects in the workdir."""
    start = f'{buckets.BUCKET}/torture/w/'
    return [name.removeprefix(start) for name in self._files.find(self.url)]

  def state(self, case):
    made = f'{self.url}/{case.makes[0]}'
    if not self._files.exists(made):
      return 'before'
    return 'after' if self._files.exists(f'{made}/done.json') else 'during'

  def tree(self):
    """Downloads all but the inputs."""
    super().begin(self._case)
    for name in self._there():
      if name not in self._inputs and not {'compiled', 'tensorboard'} & {*name.split('/')}:
        (self.run / name).parent.mkdir(parents=True, exist_ok=True)
        (self.run / name).write_bytes(self._files.cat_file(f'{self.url}/{name}'))
    return super().tree()

  @contextlib.contextmanager
  def armed(self, moment: Moment, server):
    """A block in which the change number `moment.change` to the bucket sends the signal."""
    found, count = types.SimpleNamespace(where=''), itertools.count(1)

    def kill():
      _send(server, moment.number)

    def matches(method, url, body):
      if method == 'GET' or next(count) != moment.change:
        return False
      found.where = f'{method} {urllib.parse.unquote(url)[-80:]}'
      return True
    with self._server.failing(buckets.Fault(kill, 1, matches)):
      yield found

  def failing(self):
    return self._server.failing(*self.faults)

  def changes(self):
    return sum(method != 'GET' for method, _ in self._server.requests)


@dataclasses.dataclass
class Row:
  """A line of the table."""
  case: str
  processes: int
  place: str
  kills: Counter = dataclasses.field(default_factory=Counter)
  states: Counter = dataclasses.field(default_factory=Counter)
  starts: int = 0
  seconds: float = 0.0
  result: str = ''


def torture(case: Case, hosts: Hosts, disk: Place, bucket: Bucket | None, kills: int, rng,
            is_loud: bool) -> Row:
  """Kills a case, and compares it with an undisturbed run, which is on the disk.
  """
  place = bucket or disk
  row, begun, trail = Row(case.name, len(hosts.servers), place.name), time.monotonic(), []

  def start(place, moment=None):
    flags = [flag.replace('RUN', place.url) for flag in case.flags]
    with place.failing() if moment else contextlib.nullcontext():
      return hosts.run(case.program, flags, place.run.parent, place.before, moment, not moment,
                       place.armed)

  def undisturbed(place) -> tuple[int, float]:
    """-> the number of changes, and the seconds."""
    place.begin(case)
    started, before = time.monotonic(), place.changes()
    ends, changes, _ = start(place)
    if text := unexpected(ends, None):
      raise Failed(f'an undisturbed run fails: {text}')
    return place.changes() - before or changes, time.monotonic() - started
  try:
    changes, duration = undisturbed(disk)
    whole = disk.keep('whole')
    if bucket:
      changes, duration = undisturbed(bucket)
      if text := Tree(whole, False).difference(bucket.tree()):
        raise Failed(f'without kills: {text}')
    place.begin(case)
    left = [*rng.permutation(SIGNALS), *rng.choice(SIGNALS, kills)][:kills]
    is_done, ignored = False, 0
    while left or not is_done:
      if is_done:
        place.begin(case)
      moment = _moment(left, changes, duration, len(hosts.servers), rng) if left else None
      row.starts += 1
      ends, _, where = start(place, moment)
      trail.append(f'{moment and (signal.Signals(moment.number).name, moment.victims)} {where} -> '
                   f'{[end.code for end in ends]}')
      if is_loud:
        print(f'  {case.name}: {trail[-1]}', flush=True)
      if case.program == 'checkpoint.convert' and row.kills and ends[0].code == 1 and (
          'already exists and is not an empty folder' in ends[0].err):
        ends[0].code = 0  # the last kill came after its end, and a conversion overwrites no model
      if text := unexpected(ends, moment if where else None):
        raise Failed(text)
      is_done = all(end.code == 0 for end in ends)
      if where and any(ends[i].code for i in moment.victims):
        row.kills[signal.Signals(moment.number).name] += 1
        row.states[place.state(case)] += 1
        left.pop(0)
        ignored = 0
      elif where and (ignored := ignored + 1) > MOST_IGNORED:
        raise Failed(f'it ignored {ignored} signals in a row')
      if is_done and (text := Tree(whole, not bucket).difference(place.tree())):
        raise Failed(text)
    row.result = 'equal'
  except Failed as error:
    row.result = f'FAILED: {error}; {trail}'
    place.keep(f'failed {case.name} {place.name} {row.processes}')
  except Exception:  # a mistake in this program must not end the others
    row.result = f'FAILED: {traceback.format_exc()}; {trail}'
  row.seconds = time.monotonic() - begun
  return row


def _moment(left: list[int], changes: int, duration: float, count: int, rng) -> Moment:
  """Draws the next moment; with several kills to come, an earlier one."""
  share = rng.random() * min(1.0, 2 / (len(left) + 1))
  victims = [[int(rng.integers(count))], [0, 1]][int(count > 1 and rng.random() < 0.34)]
  if rng.random() < (0.6 if victims[0] == 0 else 0.2):  # the others change little
    return Moment(left[0], victims, change=1 + int(share * changes))
  return Moment(left[0], victims, seconds=share * duration)


def print_table(rows: list[Row]):
  """Prints the table of all rows."""
  states = 'before', 'during', 'after'
  heads = ('program', 'place', 'processes', *(s.name for s in SIGNALS), *states, 'starts',
           'seconds', 'result')
  cells = [heads] + [(
      row.case, row.place, row.processes, *(row.kills[s.name] for s in SIGNALS),
      *(row.states[s] for s in states), row.starts, f'{row.seconds:.0f}', row.result[:60])
      for row in rows]
  for place, processes in sorted({(row.place, row.processes) for row in rows}):
    mine = [row for row in rows if (row.place, row.processes) == (place, processes)]
    cells.append(('all', place, processes, *(sum(r.kills[s.name] for r in mine) for s in SIGNALS),
                  *(sum(r.states[s] for r in mine) for s in states), sum(r.starts for r in mine),
                  f'{sum(r.seconds for r in mine):.0f}',
                  'equal' if all(r.result == 'equal' for r in mine) else 'FAILED'))
  widths = [max(len(str(row[i])) for row in cells) for i in range(len(heads))]
  for row in cells:
    print('  '.join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)))


def make_base(hosts: Hosts, base: pathlib.Path):
  """Runs the loop and the stages that only some configs need, and a model to select from."""
  def run(program, *flags):
    ends, _, _ = hosts.run(program, flags, base)
    if text := unexpected(ends, None):
      raise SystemExit(f'{program}: {text}')
  run('loop', '--size=tiny', f'--workdir={base}', '--last=m2', '--set=m1:train.epochs=1',
      *(f'--set={change}' for change in CHANGES))
  for spec in OTHERS.values():
    run(spec.program, '--config=iter2:tiny', f'--workdir={base}', *on(spec), *config_flags('m2'))
  model = base / 'm2' / 'model'
  model.rename(base / 'kept')
  run('train', '--config=iter2:tiny', f'--workdir={base}', *config_flags('m2'),
      '--config.train.select=agreement', '--config.train.save_every=6')
  model.rename(base / 'selectable')
  (base / 'kept').rename(model)


def environment(root) -> dict[str, str]:
  """The environment of the programs, beside that of this one."""
  return dict(bucket_server().env, JAX_PLATFORMS='cpu', XLA_FLAGS='',
              TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS='5',
              JAX_COMPILATION_CACHE_DIR=str(root / 'compiled'),
              JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.3')


def torture_all(place: str, root: pathlib.Path, base: pathlib.Path, env: dict, args
                ) -> Iterator[Row]:
  """Yields the rows of all cases of a place, and prints each of them."""
  only, work = {name.strip() for name in args.only.split(';')} - {''}, root / place
  for count in [args.processes] if args.processes else [1, 2]:
    with contextlib.closing(Hosts(count, env)) as hosts:
      for case in CASES:
        if (only and case.name not in only or case.is_alone and count > 1
            or place == 'bucket' and case.in_bucket < count):
          continue
        kills = args.kills or (case.bucket_kills if place == 'bucket' else
                               case.kills if count == 1 else min(case.kills, KILLS_OF_TWO))
        if not kills:
          continue
        rng = np.random.default_rng([args.seed, count, *f'{place} {case.name}'.encode()])
        bucket = Bucket(work, base, rng) if place == 'bucket' else None
        row = torture(case, hosts, Place(work, base), bucket, kills, rng, args.loud)
        print(f'{row.case}, {row.place}, {count} processes: {row.kills.total()} kills, '
              f'{row.starts} starts, {row.seconds:.0f} s, {row.result}', flush=True)
        yield row


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kills', type=int, default=0, help='per program; 0: those of `CASES`')
  parser.add_argument('--only', default='', help='names of programs, divided by ;')
  parser.add_argument('--processes', type=int, default=0, help='1 or 2; 0: both')
  parser.add_argument('--place', default='', choices=('', 'disk', 'bucket'), help='empty: both')
  parser.add_argument('--work', default='', help='a folder for all files; by default a new one')
  parser.add_argument('--loud', action='store_true', help='prints every start')
  args = parser.parse_args()
  root = pathlib.Path(args.work or tempfile.mkdtemp(prefix='torture-'))
  root.mkdir(parents=True, exist_ok=True)
  env = dict(os.environ, **environment(root))
  base = root / 'base'
  if not (base / 'selectable').exists():
    shutil.rmtree(base, ignore_errors=True)
    with contextlib.closing(Hosts(1, env)) as hosts:
      make_base(hosts, base)
  places = [args.place] if args.place else ['disk', 'bucket']
  with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:  # in a bucket, most is waiting
    found = pool.map(lambda place: [*torture_all(place, root, base, env, args)], places)
    rows = [row for made in found for row in made]
  print_table(rows)
  sys.exit(any(row.result != 'equal' for row in rows))


if __name__ == '__main__':
  main()
