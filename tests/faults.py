"""Power loss, full disks and folders without permission, for every stage: `python tests/faults.py`.

Prints a table: stage, fault, number of times, outcome. A stage that met a fault runs again with the
same command and must then have the same files, or name the damaged file in one sentence.
"""
import atexit
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import forks
import power_loss

ROOT = pathlib.Path(__file__).parent.parent
# As in conftest.py, which this program does not import because it starts JAX.
CHANGES = ('data.ift=160', 'data.ranked_train=120', 'data.ranked_eval=24', 'data.ranked_tune=12',
           'data.test_prompts=24', 'data.valid_prompts=24', 'prompts.count=48', 'sample.slots=64',
           'm1:train.epochs=2', 'm2:train.save_every=2', 'train.batch=8')
SOON = 'import srlm_jax.lock as l; l.BEAT = 0.2; l.STALE = 0'  # does not wait for a stale lock


@dataclasses.dataclass(frozen=True)
class Stage:
  """A command, and the folder in the workdir that it makes."""
  name: str
  program: str
  folder: str
  flags: tuple[str, ...] = ()
  config: str = ''   # of --config, for the stages of a model

  def arguments(self, workdir) -> list[str]:
    flags = [flag.format(workdir=workdir) for flag in self.flags]
    if self.config:
      model = dict(baseline='sft', iter1='m1', iter2='m2')[self.config]
      changes = (change.rpartition(':') for change in CHANGES)
      flags += [f'--config={self.config}:tiny', f'--workdir={workdir}',
                *(f'--config.{rest}' for models, _, rest in changes if models in ('', model))]
    return flags


M0 = ROOT / 'srlm_jax' / 'sandbox' / 'm0'
STAGES = (
    Stage('conversion', 'checkpoint.convert', 'm0/model',
          (f'--from_hf={M0}', '--out={workdir}/m0/model')),
    Stage('seeds', 'sandbox', 'data/seeds', config='baseline'),
    Stage('eft', 'reward.eft', 'm1/eft', config='iter1'),
    Stage('prompts', 'sample.prompts', 'm2/prompts', config='iter2'),
    Stage('respond', 'sample.respond', 'm2/respond', config='iter2'),
    Stage('judge', 'sample.judge', 'm2/judge', config='iter2'),
    Stage('pairs', 'reward.pairs', 'm2/pairs', config='iter2'),
    Stage('training', 'train', 'm2/model', ('--config.train.dropout=0.1',), 'iter2'),
    Stage('agreement', 'eval.agreement', 'm2/agreement', config='iter2'),
    Stage('export', 'checkpoint.convert', 'hf',
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


def outcome(folder) -> dict[str, object]:
  """What must not depend on a fault: {path: content} of the files of a stage or a model.

  Of a checkpoint, the recorded hash: restoring it compares that with the arrays. The times in
  done.json and the speed in metrics.jsonl are left out, and TensorBoard's files.
  """
  found, folder = {}, pathlib.Path(folder)
  for path in sorted(folder.rglob('*')):
    name = str(path.relative_to(folder))
    if path.is_dir() or name.startswith('tensorboard/'):
      continue
    if re.match(r'steps/\d+/', name):
      if name.endswith('hash/metadata'):
        found[name] = path.read_text()
    elif name.endswith('metrics.jsonl'):
      found[name] = [{k: v for k, v in json.loads(line).items() if k != 'tokens_per_second'}
                     for line in path.read_text().splitlines()]
    elif name == 'done.json':
      done = json.loads(path.read_text())
      done['files'] = {k: v for k, v in done['files'].items() if k != 'metrics.jsonl'}
      found[name] = {k: v for k, v in done.items() if k not in ('seconds', 'generated')}
    elif name == 'README.md':  # of an export; it has times
      found[name] = None
    elif name != 'manifest.json':
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

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self.run, self.log = self.folder / 'run', self.folder / 'log'
    self.programs = server()
    self.logged = server(**power_loss.environment(self.run, self.log))
    whole = self.folder / 'whole'
    changes = (f'--set={change}' for change in CHANGES)
    ended = self.programs.run('loop', ['--size=tiny', f'--workdir={whole}', '--last=m2', *changes])
    if ended[0]:
      raise Wrong(f'the loop failed: {ended}')
    self.whole = whole

  def start(self, stage: Stage):
    """Makes the folder `run`: what the finished run has without the folder of the stage."""
    shutil.rmtree(self.run, ignore_errors=True)
    shutil.copytree(self.whole, self.run, symlinks=True)
    shutil.rmtree(self.run / stage.folder, ignore_errors=True)

  def result(self, stage: Stage):
    return outcome(self.run / stage.folder)

  def crashes(self, stage: Stage, count: int, rng: random.Random) -> collections.Counter:
    """Loses power `count` times while a stage runs -> the number of times of each result."""
    self.start(stage)
    disk = power_loss.Disk(self.run)
    self.log.unlink(missing_ok=True)
    arguments = stage.arguments(self.run)
    ended = self.logged.run(stage.program, arguments)
    if ended[0]:
      raise Wrong(f'{stage.name}: {ended}')
    wanted, total = self.result(stage), sum(1 for _ in power_loss.events(self.log))
    moments = sorted(rng.randrange(total) for _ in range(count))
    states = self.folder / 'states'
    shutil.rmtree(states, ignore_errors=True)
    for i, event in enumerate(power_loss.events(self.log)):
      disk.apply(event)
      for n in [n for n, moment in enumerate(moments) if moment == i]:
        disk.save(states / str(n), None if n % 2 else rng)
    disk.check()
    found = collections.Counter()
    for n in range(count):
      shutil.rmtree(self.run)
      (states / str(n)).rename(self.run)
      ended = self.programs.run(stage.program, arguments, SOON)
      if ended[0]:
        print(f'  {stage.name}, event {moments[n]} of {total}: {sentence(*ended)}')
        found['refused'] += 1
      elif (now := self.result(stage)) != wanted:
        differ = [k for k in {*now, *wanted} if now.get(k) != wanted.get(k)]
        raise Wrong(f'{stage.name}, event {moments[n]} of {total}: {differ} differ')
      else:
        found['resumed'] += 1
    return found


def main():
  begun, rng = time.time(), random.Random(0)
  with tempfile.TemporaryDirectory() as folder:
    place = Workplace(folder)
    print(f'the loop: {time.time() - begun:.0f} s', flush=True)
    for stage in STAGES:
      if sys.argv[1:] and stage.name not in sys.argv[1:]:
        continue
      at = time.time()
      try:
        print(stage.name, dict(place.crashes(stage, 8, rng)), f'{time.time() - at:.0f} s', flush=True)
      except Wrong as e:
        print('WRONG', stage.name, e, flush=True)


if __name__ == '__main__':
  main()
