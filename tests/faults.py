"""Power loss, full disks and folders without permission, for every stage: `python tests/faults.py`.

Prints a table: stage, fault, number of times, outcome. A stage that met a fault ends with one
sentence. The same command, once the fault is gone, must give the same files and arrays as without
it. Outcomes:
  resumed       the same files after a power loss
  was done      a conversion refuses to replace its output, which is complete, after a power loss
  refused       one sentence; then the same files
  had enough    the stage needed less than there was
  did its work  the fault does not matter
"""
import argparse
import atexit
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import tempfile
import time

import forks
import power_loss
import stored

ROOT = pathlib.Path(__file__).parent.parent
# As in conftest.py, which this program does not import because it starts JAX.
CHANGES = ('data.ift=160', 'data.ranked_train=120', 'data.ranked_eval=24', 'data.ranked_tune=12',
           'data.test_prompts=24', 'data.valid_prompts=24', 'prompts.count=48', 'sample.slots=64',
           'm1:train.epochs=2', 'm2:train.save_every=2', 'train.batch=8')
NOBODY = 65534
AS_NOBODY = f'import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})'
LEAST = 2**17  # bytes that a stage needs; a selection deletes checkpoints, and so needs fewer
SOON = 'import srlm_jax.lock as l; l.BEAT = 0.2; l.STALE = 0'  # does not wait for a stale lock


@dataclasses.dataclass(frozen=True)
class Stage:
  """A command, and the folders in the workdir that it makes."""
  name: str
  program: str
  folders: tuple[str, ...]
  flags: tuple[str, ...] = ()
  config: str = ''   # of --config, for the stages of a model

  def arguments(self, workdir) -> list[str]:
    flags = [flag.format(workdir=workdir) for flag in self.flags]
    if not self.config:
      return flags
    model = dict(sft='sft', iter1='m1', iter2='m2')[self.config]
    changes = (change.rpartition(':') for change in CHANGES)
    return [f'--config={self.config}:tiny', f'--workdir={workdir}',
            *(f'--config.{rest}' for models, _, rest in changes if models in ('', model)), *flags]


SELECT = '--config.train.select=agreement'
M0 = ROOT / 'srlm_jax' / 'sandbox' / 'm0'
STAGES = (
    Stage('conversion', 'checkpoint.convert', ('m0/model',),
          (f'--from_hf={M0}', '--out={workdir}/m0/model')),
    Stage('seeds', 'sandbox', ('data/seeds',), config='sft'),
    Stage('eft', 'reward.eft', ('m1/eft',), config='iter1'),
    Stage('prompts', 'sample.prompts', ('m2/prompts',), config='iter2'),
    Stage('respond', 'sample.respond', ('m2/respond',), config='iter2'),
    Stage('judge', 'sample.judge', ('m2/judge',), config='iter2'),
    Stage('pairs', 'reward.pairs', ('m2/pairs',), config='iter2'),
    Stage('training', 'train', ('m2/model',), ('--config.train.dropout=0.1',), 'iter2'),
    Stage('selection', 'selection', ('m2/selection', 'm2/model'), (SELECT,), 'iter2'),
    Stage('stopping', 'stopping', ('m2/stopping', 'm2/model'),
          ('--config.train.select=wins', '--config.train.save_every=3',
           '--config.train.max_epochs=1'), 'iter2'),
    Stage('agreement', 'eval.agreement', ('m2/agreement',), config='iter2'),
    Stage('export', 'checkpoint.convert', ('hf',),
          ('--checkpoint={workdir}/m2/model', '--to_hf={workdir}/hf')),
)


def server(**more) -> forks.Server:
  """Runs the programs, with the compiled programs of one folder."""
  compiled = os.environ.get('SRLM_COMPILED')
  if not compiled:
    compiled = os.environ['SRLM_COMPILED'] = tempfile.mkdtemp(prefix='srlm-compiled-')
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
  found = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='', PYTHONPATH=str(ROOT),
               JAX_COMPILATION_CACHE_DIR=compiled, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1')
  return forks.Server({**found, **more}, ROOT)


def outcome(run, stage: Stage) -> dict[str, object]:
  """What must not depend on a fault: {path: content} of the files and arrays that a stage makes.

  The times in done.json and the speed in metrics.jsonl are left out, and TensorBoard's files.
  """
  found, run = {}, pathlib.Path(run)
  for path in sorted(path for folder in stage.folders for path in (run / folder).rglob('*')):
    name = str(path.relative_to(run))
    if 'tensorboard' in path.parts or path.suffix == '.damaged':
      continue
    if path.is_symlink():
      found[name] = os.readlink(path)
    elif in_step := re.search(r'/steps/\d+/(.+)', name):
      if in_step[1] in ('params', 'train'):
        for key, x in stored.arrays(path).items():
          found[f'{name} {key}'] = x.dtype, x.shape, x.tobytes()
      elif in_step[1] == 'hash/metadata':
        found[name] = path.read_text()
    elif path.is_dir():
      continue
    elif path.name == 'metrics.jsonl':
      found[name] = [{k: v for k, v in json.loads(line).items() if k != 'tokens_per_second'}
                     for line in path.read_text().splitlines()]
    elif path.name == 'done.json':
      done = json.loads(path.read_text())
      done['files'] = {k: v for k, v in done['files'].items() if k != 'metrics.jsonl'}
      found[name] = {k: v for k, v in done.items() if k not in ('seconds', 'generated')}
    elif path.name == 'README.md':  # of an export; it has times
      found[name] = None
    elif path.name != 'manifest.json':
      found[name] = path.read_bytes()
  return found


class Wrong(Exception):
  """A fault had a result that it must not have."""


def sentence(code: int, out: str, err: str) -> str:
  """The one sentence with which a program ended. Raises Wrong if it ended otherwise."""
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  if code != 1 or len(lines) != 1 or 'Traceback' in err:
    raise Wrong(f'exit code {code}: {(out + err)[-3000:]}')
  return lines[0]


class Workplace:
  """A finished run at a small size, and a folder in which its stages run again."""

  def __init__(self, folder, whole=None):
    self.folder = pathlib.Path(folder)
    self.run, self.log = self.folder / 'run', self.folder / 'log'
    self.programs = server()
    self.logged = server(**power_loss.environment(self.run, self.log))
    self.whole = pathlib.Path(whole or self.folder / 'whole')
    if not whole:
      changes = (f'--set={change}' for change in CHANGES)
      self.succeed('loop', ['--size=tiny', f'--workdir={self.whole}', '--last=m2', *changes])

  def succeed(self, program: str, arguments, before: str = '', by=None):
    code, out, err = (by or self.programs).run(program, arguments, before)
    if code:
      raise Wrong(f'{program}: exit code {code}: {(out + err)[-3000:]}')

  def start(self, stage: Stage, run):
    """Makes the folder `run`: what the finished run has without the folders of the stage.

    A selection begins with a model that was trained for it.
    """
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(self.whole, run, symlinks=True)
    for folder in stage.folders:
      shutil.rmtree(run / folder, ignore_errors=True)
    if stage.name == 'selection':
      trained = self.folder / 'trained to select'
      if not trained.exists():
        self.succeed('train', stage.arguments(run))
        shutil.move(run / 'm2/model', trained)
      shutil.copytree(trained, run / 'm2/model')

  def crashes(self, stage: Stage, count: int, rng: random.Random,
              before: str = '') -> collections.Counter:
    """Loses power `count` times while a stage runs -> the number of times of each result.

    `before`: statements that run before the stage that loses power.
    """
    self.start(stage, self.run)
    disk = power_loss.Disk(self.run)
    self.log.unlink(missing_ok=True)
    arguments = stage.arguments(self.run)
    self.succeed(stage.program, arguments, before, self.logged)
    wanted, total = outcome(self.run, stage), sum(1 for _ in power_loss.events(self.log))
    moments = [rng.randrange(total) for _ in range(count)]
    states = self.folder / 'states'
    for i, event in enumerate(power_loss.events(self.log)):
      disk.apply(event)
      for n, moment in enumerate(moments):
        if moment == i:
          disk.save(states / str(n), rng if n % 2 else None)
    disk.check()
    found = collections.Counter()
    for n, moment in enumerate(moments):
      shutil.rmtree(self.run)
      (states / str(n)).rename(self.run)
      code, *printed = self.programs.run(stage.program, arguments, SOON)
      where = f'{stage.name}, event {moment} of {total}, {"random" if n % 2 else "strict"}'
      was_done = code and 'already exists' in (said := sentence(code, *printed))
      if code and not (was_done and stage.program == 'checkpoint.convert'):
        raise Wrong(f'{where}: {said}')
      same(where, outcome(self.run, stage), wanted)
      found['was done' if code else 'resumed'] += 1
    return found

  @contextlib.contextmanager
  def disk(self):
    """Yields a small disk of its own, in memory."""
    at = self.folder / 'disk'
    at.mkdir(exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=512m', 'disk', str(at)], check=True)
    try:
      yield at
    finally:
      subprocess.run(['umount', '-l', str(at)], check=True)

  def full_disk(self, stage: Stage, count: int, rng: random.Random) -> collections.Counter:
    """Runs a stage `count` times on a disk with less space than it needs."""
    found = collections.Counter()
    with self.disk() as disk:
      run, filler = disk / 'run', disk / 'filler'
      arguments = stage.arguments(run)
      self.start(stage, run)
      before = shutil.disk_usage(disk).free
      self.succeed(stage.program, arguments)
      wanted, needed = outcome(run, stage), before - shutil.disk_usage(disk).free
      for _ in range(count):
        self.start(stage, run)
        left = rng.randrange(max(needed, LEAST))
        with filler.open('wb') as file:
          os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
        ended = self.programs.run(stage.program, arguments)
        where = f'{stage.name} with {left >> 10} KB of {needed >> 10}'
        filler.unlink()
        found[self.corrected(where, stage, run, ended, f'the disk of {disk}', wanted)] += 1
    return found

  def corrected(self, where: str, stage: Stage, run, ended, reason: str, wanted) -> str:
    """Runs a refused stage again, and compares its output with `wanted` -> how it had ended."""
    if ended[0]:  # a conversion that had enough would refuse to write its model again
      if reason not in sentence(*ended):
        raise Wrong(f'{where}: {ended}')
      self.succeed(stage.program, stage.arguments(run))
    same(where, outcome(run, stage), wanted)
    return 'refused' if ended[0] else 'had enough'

  def size_limit(self, stage: Stage, count: int, rng: random.Random) -> collections.Counter:
    """Runs a stage `count` times with a limit on the size of a file."""
    found, arguments = collections.Counter(), stage.arguments(self.run)
    self.start(stage, self.run)
    self.succeed(stage.program, arguments)
    wanted = outcome(self.run, stage)
    for _ in range(count):
      self.start(stage, self.run)
      limit = int(10 ** rng.uniform(2, 6.5))
      ended = self.programs.run(stage.program, arguments, (
          f'import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, r.RLIM_INFINITY))'))
      found[self.corrected(f'{stage.name} with files of {limit} bytes', stage, self.run, ended,
                           'ulimit -f', wanted)] += 1
    return found

  def full_folder(self, stage: Stage, fault: str, use: str, sentences: str) -> collections.Counter:
    """Runs a stage while another folder that it uses is full, `disk` in the statement `use`.

    `sentences`: what it then says, '' if it must do its work.
    """
    self.start(stage, self.run)
    arguments = stage.arguments(self.run)
    with self.disk() as disk:
      with (disk / 'filler').open('wb') as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
      ended = self.programs.run(stage.program, arguments, f'disk = {str(disk)!r}; {use}')
      if sentences and not re.search(sentences.format(disk=disk), sentence(*ended)):
        raise Wrong(f'{stage.name}, {fault}: {ended}')
      if not sentences and ended[0]:
        raise Wrong(f'{stage.name}, {fault}: {ended}')
    self.succeed(stage.program, arguments)
    now = outcome(self.run, stage)
    self.start(stage, self.run)
    self.succeed(stage.program, arguments)
    same(f'{stage.name}, {fault}', now, outcome(self.run, stage))
    return collections.Counter({'refused' if sentences else 'did its work': 1})

  def forbidden(self, stage: Stage) -> dict[str, collections.Counter]:
    """Runs a stage as a user without rights, in several ways."""
    found, parent = {}, (self.run / stage.folders[0]).parent
    self.folder.chmod(0o755)

    def check(fault: str, change, before: str, wanted: str = 'permission denied'):
      self.start(stage, self.run)
      for path in (self.run, *self.run.rglob('*')):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
      change()
      seen = listing(self.folder)
      said = sentence(*self.programs.run(stage.program, stage.arguments(self.run), before))
      if wanted not in said or str(self.run) not in said or listing(self.folder) != seen:
        raise Wrong(f'{stage.name}, {fault}: {said}; {listing(self.folder) ^ seen} differ')
      found[fault] = collections.Counter(refused=1)

    def give_to_root():
      for path in (self.run, *self.run.rglob('*')):
        os.chown(path, 0, 0, follow_symlinks=False)
    check('run of another user', give_to_root, AS_NOBODY)
    if stage.config:  # others do not write into the workdir itself
      check('read-only workdir', lambda: self.run.chmod(0o555), AS_NOBODY)
    check('read-only folder above', lambda: parent.chmod(0o555), AS_NOBODY)
    check('workdir without x', lambda: self.run.chmod(0o644), AS_NOBODY)
    return found


def listing(folder) -> set[tuple]:
  """Everything below a folder: paths, modes and, of files, the time of the last change."""
  return {(str(path), path.lstat().st_mode, not path.is_dir() and path.lstat().st_mtime_ns)
          for path in folder.rglob('*')}


def same(where: str, now: dict, wanted: dict):
  """Raises Wrong if two results of `outcome` differ."""
  if differ := sorted(k for k in {*now, *wanted} if now.get(k, 0) != wanted.get(k, 0)):
    raise Wrong(f'{where}: {", ".join(differ)} differ')


def rounds(place: Workplace, rng: random.Random, is_root: bool, has_cc: bool):
  """Yields (stage, fault, times of each result), without end; the quick faults once."""
  find = {stage.name: stage for stage in STAGES}
  for number in itertools.count():
    for stage in STAGES:
      if has_cc:
        yield stage.name, 'power loss', place.crashes(stage, 4, rng)
      if is_root:
        yield stage.name, 'full disk', place.full_disk(stage, 2, rng)
      yield stage.name, 'limit of a file\'s size', place.size_limit(stage, 1, rng)
    if is_root and not number:
      for name, fault, use, said in FULL_FOLDERS:
        yield name, fault, place.full_folder(find[name], fault, use, said)
      for stage in STAGES:
        for fault, times in place.forbidden(stage).items():
          yield stage.name, fault, times


FULL_FOLDERS = (  # stage, fault, a statement that uses `disk`, what the stage says
    ('respond', 'full compilation cache',
     "import jax; jax.config.update('jax_compilation_cache_dir', disk + '/compiled'); "
     "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)", ''),
    ('export', 'full temporary folder', 'import tempfile; tempfile.tempdir = disk',
     r'^error: the disk of {disk} \(.* is full'),
    ('eft', 'full folder of temporary databases',
     "import sqlite3; sqlite3.connect('').execute(f'pragma temp_store_directory = \"{disk}\"'); "
     'from srlm_jax import spill; spill.MEMORY = 0',
     '^error: temporary files in .* cannot be written'),
    ('pairs', 'full disk of the log',
     "import os; os.dup2(os.open(disk + '/log', os.O_WRONLY | os.O_CREAT), 1)",
     r'^error: the disk of the output \(.* is full; '))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--minutes', type=float, default=20, help='ends after a fault at this time')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--skip', action='store_true', help='leaves out what needs root or cc')
  given, begun = parser.parse_args(), time.time()
  is_root, has_cc = os.geteuid() == 0, bool(shutil.which('cc'))
  for is_there, text in (
      (is_root, 'full disks and folders without permission, which need root'),
      (has_cc, 'power loss, which needs a C compiler, cc')):
    if not is_there and not given.skip:
      raise SystemExit(f'cannot test {text}; --skip leaves out what cannot be tested')
    if not is_there:
      print(f'skipped: {text}')
  table = collections.defaultdict(collections.Counter)
  with tempfile.TemporaryDirectory(prefix='faults-') as folder:
    place = Workplace(folder)
    print(f'the loop that the stages are of: {time.time() - begun:.0f} s', flush=True)
    for stage, fault, times in rounds(place, random.Random(given.seed), is_root, has_cc):
      table[stage, fault] += times
      print(f'{time.time() - begun:5.0f} s  {stage}, {fault}: '
            + ', '.join(f'{result} {n}' for result, n in sorted(times.items())), flush=True)
      if time.time() - begun > 60 * given.minutes:
        break
  print(f'{"stage":12} {"fault":24} {"times":>5}  outcome')
  for (stage, fault), times in sorted(table.items()):
    print(f'{stage:12} {fault:24} {times.total():5}  '
          + ', '.join(f'{result} {n}' for result, n in sorted(times.items())))
  total = sum(table.values(), collections.Counter())
  print(f'{total.total()} faults in {time.time() - begun:.0f} s: '
        + ', '.join(f'{result} {n}' for result, n in sorted(total.items())))


if __name__ == '__main__':
  main()
