"""Peak memory and time of the programs that read and write the records of a run.

  python bench/memory.py                # runs of 1,000, 10,000 and 100,000 prompts
  python bench/memory.py --quick        # of 20 and 100 prompts
  python bench/memory.py --only=pairs   # programs whose name contains the text
  python bench/memory.py --write=FOLDER --prompts=1000   # writes such a run, and does no more

A run has 4 candidates per prompt and 3 judgements per candidate, and as many held-out prompts with
an answer and ranked replies with their judgements. On average, a prompt has 300 characters, a
response 1,200 and a judgement 600. In programs that sample, a stand-in for the model answers at
once. The report reads the evaluation of m2 for four models, and the data of m2 for two.

Each program runs in a process of its own. Its peak is the resident memory that Linux reports, with
Python and all libraries. "over base" is the difference to a run of `BASE` prompts. Records are
those of the files that it reads. The last line is the same as JSON.
"""
import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple
import zlib

import timing

SIZES, QUICK, BASE = (1_000, 10_000, 100_000), (20, 100), 10  # prompts
CANDIDATES, JUDGEMENTS = 4, 3  # per prompt, per candidate
PROMPT, RESPONSE, JUDGEMENT, THINKING = 300, 1200, 600, 800  # mean characters
LIMIT = 500  # MB that a program may use


class Program(NamedTuple):
  """A program of the table."""
  name: str
  module: str                # python -m srlm_jax.MODULE
  reads: tuple[str, ...]     # folders, OWNER/STAGE
  writes: str                # the folder that it makes; it is deleted before a run
  flags: tuple[str, ...] = ()
  # '': it has no such flag; None: it has no --workdir either, and its flags name {workdir}.
  config: str | None = 'iter2:tiny'
  samples: bool = False       # it runs a model: that of `instant`

  def command(self, workdir: pathlib.Path) -> list[str]:
    start = [__file__, f'--instant={self.module}', '--'] if self.samples else [
        '-m', f'srlm_jax.{self.module}']
    config = [f'--config={self.config}'] if self.config else []
    place = [] if self.config is None else [f'--workdir={workdir}']
    flags = (flag.format(workdir=workdir) for flag in self.flags)
    return [sys.executable, *start, *config, *place, *flags]


def _pairs(strategy: str, *reads: str) -> Program:
  return Program(f'pairs, {strategy}', 'reward.pairs', ('m2/respond', 'm2/judge', *reads),
                 'm2/pairs', (f'--config.pairs.strategy={strategy}',))


def _head_to_head(name: str, stage: str, *flags: str) -> Program:
  folders = tuple(f'{model}/{stage}' for model in ('m2', 'm1'))
  a, b = (f'--{x}={{workdir}}/{folder}' for x, folder in zip('ab', folders, strict=True))
  return Program(f'head_to_head, {name}', 'eval.head_to_head', folders, f'eval/{name}',
                 (a, b, f'--out={{workdir}}/eval/{name}', *flags), None)


TRAINED = ('sft', 'm1', 'm2', 'm3')
_REPORT = ('data/seeds',
           *(f'{m}/{stage}' for m in TRAINED for stage in ('answers', 'oracle', 'judge_eval')),
           *(f'{m}/{stage}' for m in ('m2', 'm3') for stage in (
               'prompts', 'respond', 'judge', 'pairs')))
# In the order in which they run: later ones read what earlier ones wrote.
PROGRAMS = (
    _pairs('positives_only'), _pairs('margin'), _pairs('length_controlled'),
    _pairs('consistency', 'm2/judge_again'), _pairs('implicit_reward', 'm2/implicit'),
    _pairs('temporal', 'm2/respond_older', 'm2/judge_older'), _pairs('max_min'),
    Program('judge pairs, majority', 'reward.judge_pairs', ('m2/respond', 'm2/judge', 'm2/pairs'),
            'm2/majority', ('--on=majority',)),
    Program('swap', 'reward.swap', ('m2/respond',), 'm2/swap'),
    Program('health', 'reward.health', ('m2/prompts', 'm2/respond', 'm2/judge', 'm2/pairs'),
            'm2/health'),
    Program('audit', 'sandbox.audit', ('m2/respond', 'm2/judge', 'm2/pairs'), 'm2/audit'),
    Program('eft', 'reward.eft', ('data/seeds', 'm1/judge'), 'm1/eft', config='iter1:tiny'),
    Program('agreement', 'eval.agreement', ('data/seeds', 'm2/judge_eval'), 'm2/agreement'),
    Program('oracle', 'sandbox.oracle',
            ('data/seeds', 'm2/judge_eval', 'm2/answers', 'm2/answers_greedy'), 'm2/oracle'),
    Program('report', 'report', _REPORT, 'report.html', config=''),
    Program('report, two runs', 'report', 2 * _REPORT, 'both.html',
            ('--workdir={workdir}/again', '--out={workdir}/both.html'), ''),
    _head_to_head('requests', 'answers'),
    _head_to_head('verdicts', 'answers', '--verdicts={workdir}/eval/requests/requests.jsonl'),
    _head_to_head('graded', 'oracle', '--graded'),
    Program('meta-judge', 'sample.meta_judge', ('m2/respond', 'm2/judge', 'm2/pairs'),
            'm2/meta_judge', samples=True),
    Program('respond', 'sample.respond', ('m2/prompts',), 'm2/respond_older', ('--on=older',),
            samples=True),
    Program('judge', 'sample.judge', ('m2/respond',), 'm2/judge_again', ('--on=again',),
            samples=True),
    Program('implicit', 'sample.implicit', ('m2/respond',), 'm2/implicit', samples=True),
)


class Cost(NamedTuple):
  """What a process took."""
  peak: float     # MB of resident memory (2**20 bytes)
  seconds: float
  cpu: float      # CPU seconds of all its threads


def run(command: Sequence[str], log: pathlib.Path) -> Cost:
  """Runs a command; exits with what it printed if it fails."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='')
  started = time.perf_counter()
  with log.open('w') as out:
    child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    sys.exit(f'{" ".join(command)}\nended with {child.returncode}:\n{log.read_text()}')
  return Cost(usage.ru_maxrss / 1024, time.perf_counter() - started,
              usage.ru_utime + usage.ru_stime)


def measure(programs: Sequence[Program], prompts: int, folder: pathlib.Path
            ) -> Iterator[tuple[str, Cost, int]]:
  """Yields (name, cost, records read) of writing a run of so many prompts, and of the programs."""
  workdir, log = folder / 'run', folder / 'log'
  shutil.rmtree(workdir, ignore_errors=True)
  yield 'writing', run([sys.executable, __file__, f'--write={workdir}', f'--prompts={prompts}'],
                       log), 0
  for program in programs:
    shutil.rmtree(workdir / program.writes, ignore_errors=True)
    cost = run(program.command(workdir), log)
    yield program.name, cost, sum(_counted(workdir / p) for p in program.reads)
  shutil.rmtree(workdir)


def costs(programs: Sequence[Program], prompts: int, folder: pathlib.Path) -> dict:
  """-> {name: (cost, records read)}, as `measure`."""
  return {name: (cost, count) for name, cost, count in measure(programs, prompts, folder)}


def _counted(folder: pathlib.Path) -> int:
  """The number of records of a finished stage."""
  done = folder / 'done.json'
  files = json.loads(done.read_text())['files'] if done.exists() else {}
  return sum(count or 0 for count, _ in files.values())


def main():
  parser = timing.parser(__doc__)
  parser.add_argument('--only', default='', help='programs whose name contains the text')
  parser.add_argument('--write', help='writes a run into this folder, and does no more')
  parser.add_argument('--prompts', type=int, default=SIZES[0], help='of the run for --write')
  parser.add_argument('--instant', help='runs srlm_jax.INSTANT, with its flags after --, with a '
                      'model that answers at once')
  parser.add_argument('flags', nargs='*', help=argparse.SUPPRESS)
  f = parser.parse_args()
  if f.write:
    return write(pathlib.Path(f.write), f.prompts)
  if f.instant:
    return instant(f.instant, f.flags)
  programs, sizes = [p for p in PROGRAMS if f.only in p.name], QUICK if f.quick else SIZES
  machine, rows = platform.processor() or platform.machine(), []
  print(f'{machine}, {os.cpu_count()} cores; {CANDIDATES} candidates per prompt, {JUDGEMENTS} '
        f'judgements per candidate')
  print(f'{"program":26} {"prompts":>8} {"peak MB":>8} {"over base":>10} {"seconds":>8} '
        f'{"CPU s":>8} {"records":>10}', flush=True)
  with tempfile.TemporaryDirectory(prefix='srlm-memory-') as folder:
    base = {name: cost for name, cost, _ in measure(programs, BASE, pathlib.Path(folder))}
    for prompts in sizes:
      for name, cost, count in measure(programs, prompts, pathlib.Path(folder)):
        r = dict(program=name, prompts=prompts, peak_mb=round(cost.peak),
                 over_base_mb=round(cost.peak - base[name].peak), seconds=round(cost.seconds, 1),
                 cpu_seconds=round(cost.cpu, 1), records=count)
        rows.append(r)
        print(f'{name:26} {prompts:8,} {r["peak_mb"]:8,} {r["over_base_mb"]:10,} '
              f'{r["seconds"]:8,} {r["cpu_seconds"]:8,} {count:10,}', flush=True)
  over = sorted({r['program'] for r in rows if r['peak_mb'] > LIMIT})
  print(f'above {LIMIT} MB: {", ".join(over) or "none"}')
  timing.report(dict(machine=machine, limit_mb=LIMIT, rows=rows), f.json)


def write(workdir: pathlib.Path, prompts: int):
  """Writes a run whose stages have finished: seeds, and what m2 is trained on and evaluated with.

  Every stage has its manifest.json and done.json. The models are their tokenizers and config alone.
  """
  run = Run(workdir, prompts)
  for model in ('m0', *TRAINED):
    run.write_model(model)
  run.stage('data', 'seeds', {'ift.jsonl': run.demonstrations(), 'ranked.jsonl': run.ranked(),
                              'heldout.jsonl': run.held_out()})
  run.stage('m1', 'judge', {JUDGED: run.judgements(run.reply_ids('train'), '')},
            'sample.judge', 'ranked')
  run.stage('m2', 'judge_eval', {JUDGED: run.judgements(run.reply_ids('eval'), '')},
            'sample.judge', 'eval')
  for name, on in (('answers', 'heldout'), ('answers_greedy', 'greedy')):
    run.stage('m2', name, {ANSWERED: run.answers()}, 'sample.respond', on)
  run.stage('m2', 'prompts', {'prompts.jsonl': run.prompts(), 'attempts.jsonl': run.attempts()},
            'sample.prompts')
  run.stage('m2', 'respond', {ANSWERED: run.responses('')}, 'sample.respond', 'prompts')
  run.stage('m2', 'judge', {JUDGED: run.judgements(run.response_ids(''), '')},
            'sample.judge', 'responses')
  run.stage('m2', 'judge_again', {JUDGED: run.judgements(run.response_ids(''), 'again')},
            'sample.judge', 'again')
  run.stage('m2', 'respond_older', {ANSWERED: run.responses('older')}, 'sample.respond', 'older')
  run.stage('m2', 'judge_older', {JUDGED: run.judgements(run.response_ids('older'), '')},
            'sample.judge', 'older')
  run.stage('m2', 'oracle', {'graded.jsonl': run.graded()}, 'sandbox.oracle')
  for model in TRAINED:  # the report reads these files once per model
    for name in ('answers', 'oracle', 'judge_eval', 'agreement', *(
        ('prompts', 'respond', 'judge', 'pairs') if model == 'm3' else ())):
      if model != 'm2':
        (workdir / model / name).symlink_to(pathlib.Path('..') / 'm2' / name)
  (workdir / 'again').symlink_to('.')
  run.stage('m2', 'implicit', {'rewards-00000-of-00001.jsonl': run.rewards()}, 'sample.implicit')


ANSWERED, JUDGED = 'responses-00000-of-00001.jsonl', 'judgements-00000-of-00001.jsonl'
SEEDS = 500  # demonstrations


class Run:
  """The records of a run; its texts, lengths and scores depend only on their ids."""

  def __init__(self, workdir: pathlib.Path, prompts: int):
    import numpy as np

    from srlm_jax import catalog, config, model_files, records, stage
    from srlm_jax.data import tokenizer
    from srlm_jax.sandbox import data, world
    self._catalog, self._configs, self._records, self._stages = catalog, config, records, stage
    self._model_files, self._m0, self._world = model_files, data.M0, world
    self._tokenizer = tokenizer.load(data.M0)
    self._workdir, self._count, self._rng = workdir, prompts, np.random.default_rng
    words = sorted(world.WORDS)
    order = self._rng(0).integers(0, len(words), 40_000)
    self._text = ' '.join(words[i] for i in order)

  def write_model(self, name: str):
    """A model folder with the tokenizer and the shape of the packaged M0, without parameters."""
    folder = self._workdir / name / 'model'
    self._model_files.copy(self._m0, folder)
    hashes = {field.name: name for field in dataclasses.fields(self._model_files.ParamHashes)}
    path = folder / 'steps' / '1' / 'hash' / 'metadata'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(format=self._model_files.HASH_FORMAT, **hashes,
                                    files=self._model_files.hashes(folder))))
    if name != 'm0':
      self._stages.write_json(folder / 'manifest.json', dict(
          format=self._stages.FORMAT, stage=f'{name}/model', params='', inputs={}, config={}))
      self._stages.write_json(folder / 'done.json', dict(
          files={}, seconds=1.0, steps=1, loss=0.5, params=name, examples=8, padding_free=1.0,
          dropped={}))

  def stage(self, owner: str, name: str, files: dict[str, Iterator[dict]], program: str = 'sandbox',
            on: str = ''):
    """Writes the folder of a finished stage."""
    folder, spec = self._workdir / owner / name, self._catalog.find(program, on)
    model = 'm0' if owner == 'data' else owner
    config = spec.recorded(self._configs.get(model, 'tiny'))
    self._stages.write_json(folder / 'manifest.json', dict(
        format=self._stages.FORMAT, stage=f'{owner}/{name}', params='', model_files={}, inputs={},
        template='', config=config, environments=[]))
    for file, rows in files.items():
      self._records.write(folder / file, rows)
    summary, found = {}, self._records.contents(folder)
    if name.startswith('judge'):
      made, = (count for count, _ in found.values())
      summary = dict(judgements=made, parsed=self._parsed, lowest=0, highest=5,
                     unparsed={'no score': made - self._parsed})
    if name == 'prompts':
      summary = dict(prompts=self._count, wanted=self._count, attempts=2 * self._count,
                     near_held_out=0, shortened=0, dropped={'seen before': self._count})
    self._stages.write_json(folder / 'done.json', dict(summary, files=found, seconds=1.0))

  def demonstrations(self) -> Iterator[dict]:
    for i in range(SEEDS):
      yield dict(id=f'ift{i}', prompt=self._prompt(f'ift{i}'),
                 response=self._words(f'ift{i}', RESPONSE))

  def held_out(self) -> Iterator[dict]:
    for i in range(2 * self._count):
      name = f'held{i}'
      yield dict(id=name, prompt=self._instruction(name), split=('test', 'valid')[i % 2])

  def answers(self) -> Iterator[dict]:
    """Those to the held-out prompts of the split test."""
    for i in range(0, 2 * self._count, 2):
      text = self._words(f'held{i} answer', RESPONSE)
      yield dict(id=f'held{i}/0', prompt_id=f'held{i}', index=0, response=text, finish='eos',
                 prompt=self._instruction(f'held{i}'), n_tokens=len(text) // 4, logp=-9.0)

  def graded(self) -> Iterator[dict]:
    for answer in self.answers():
      yield dict(answer, score=float(int(6 * self._share(answer['id']))))

  def ranked(self) -> Iterator[dict]:
    for split in ('train', 'eval'):
      for name in self._ranked_ids(split):
        ranks = range(CANDIDATES)
        replies = [dict(id=str(i), text=self._words(f'{name}/{i}', RESPONSE), rank=i)
                   for i in ranks]
        yield dict(id=name, prompt=self._instruction(name), split=split, replies=replies)

  def prompts(self) -> Iterator[dict]:
    for name in self._prompt_ids():
      yield dict(id=name, prompt=self._prompt(name), author='m1')

  def attempts(self) -> Iterator[dict]:
    for i, name in enumerate(self._prompt_ids()):
      text = self._prompt(name)
      for j, reason in enumerate(('', 'seen before')):
        yield dict(id=str(2 * i + j), text=text, finish='eos', reason=reason)

  def responses(self, prefix: str) -> Iterator[dict]:
    """Every eighth prompt has thinking responses, with token ids; one in 20 responses is cut."""
    for i, prompt_id in enumerate(self._prompt_ids()):
      prompt = self._prompt(prompt_id)
      for j in range(CANDIDATES):
        name = f'{prompt_id}/{prefix}{j}'
        text = self._words(name, RESPONSE)
        more = dict(thinking=self._words(f'{name} thinking', THINKING), token_ids=[
            *self._tokenizer.encode(text), *self._tokenizer.eos_ids]) if i % 8 == 0 else {}
        cut = self._share(f'{name} cut') < 0.05
        yield dict(id=name, prompt_id=prompt_id, index=j, prompt=prompt, response=text,
                   finish='length' if cut else 'eos', n_tokens=len(text) // 4,
                   logp=round(-len(text) / 7, 4), **more)

  def judgements(self, responses: Iterator[tuple[str, str]], judge: str) -> Iterator[dict]:
    """Judgements of the responses (prompt id, response id): 19 of 20 have a score, 0 to 5."""
    self._parsed = 0
    for prompt_id, response_id in responses:
      quality = self._share(f'{response_id} quality')
      for j in range(JUDGEMENTS):
        name = f'{response_id}/{j}'
        parses = self._share(f'{name} parse {judge}') > 0.05
        noise = self._share(f'{name} score {judge}')
        score = float(int(3 * quality + 3 * noise))
        text = self._words(f'{name}{judge}', JUDGEMENT)
        self._parsed += parses
        yield dict(id=name, prompt_id=prompt_id, response_id=response_id, index=j,
                   text=f'{text}\nScore: {score:.0f}' if parses else text,
                   score=score if parses else None, reason='' if parses else 'no score',
                   finish='eos' if parses else 'length')

  def rewards(self) -> Iterator[dict]:
    for _, name in self.response_ids(''):
      logp, older = (round(-300 * self._share(f'{name} {m}'), 4) for m in ('new', 'old'))
      yield dict(id=name, reward=round(logp - older, 4), logp=logp, older_logp=older)

  def response_ids(self, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (prompt id, response id)."""
    for name in self._prompt_ids():
      for j in range(CANDIDATES):
        yield name, f'{name}/{prefix}{j}'

  def reply_ids(self, split: str) -> Iterator[tuple[str, str]]:
    """The same of the ranked replies of a split."""
    for name in self._ranked_ids(split):
      for j in range(CANDIDATES):
        yield name, f'{name}/{j}'

  def _prompt_ids(self) -> Iterator[str]:
    return (self._records.digest(str(i)) for i in range(self._count))

  def _ranked_ids(self, split: str) -> Iterator[str]:
    return (f'{split}{i}' for i in range(self._count))

  def _prompt(self, name: str) -> str:
    """Half of the prompts are instructions of the sandbox, of about 50 characters."""
    if zlib.crc32(name.encode()) % 2:
      return self._words(name, 2 * PROMPT - 50)
    return self._instruction(name)

  def _instruction(self, name: str) -> str:
    return self._world.instruction(self._rng(zlib.crc32(name.encode())))

  def _words(self, name: str, mean: int) -> str:
    return cut(self._text, name, mean)

  def _share(self, name: str) -> float:
    """A number in [0, 1)."""
    return zlib.crc32(name.encode()) / 2**32


def cut(text: str, name: str, mean: int) -> str:
  """A part of mean / 2 to 3 mean / 2 characters, which depends on the name."""
  seed = zlib.crc32(name.encode())
  start = seed % (len(text) - 2 * mean)
  return text[start:start + mean // 2 + seed // 7 % mean].strip()


def instant(module: str, flags: Sequence[str]):
  """Runs a program that samples, with a model that answers at once."""
  from srlm_jax.data import tokenizer
  from srlm_jax.sample import engine

  class Instant:
    """The interface of `engine.Engine`; what it says depends on the request alone."""

    def __init__(self, folder, title: str):
      self.title, self.kernels, self.context, self.work = title, 'none', 10**9, engine.Work()
      self._tokenizer = tokenizer.load(folder)
      ends = ([f'Winner: {x}' for x in ('A', 'B', 'tie', '?')] if 'meta' in title else
              [f'Score: {x}' for x in (0, 1, 2, 3, 4, 5, '?')])
      words = 'Sure, pear and fig. ' * 200
      texts = [f'{cut(words, str(i), JUDGEMENT)}\n{ends[i % len(ends)]}' for i in range(100)]
      self._texts = [[*self._tokenizer.encode(text), self._tokenizer.eos_ids[0]] for text in texts]

    def max_prompt_tokens(self, sampling) -> int:
      return 10**9

    def stop_if_requested(self):
      pass

    def generate(self, requests, sampling, done=0, kept=()):
      for request in requests:
        known, done = done >= request.n, max(done - request.n, 0)
        results = [] if known else [self._result(f'{request.id}/{i}') for i in range(request.n)]
        yield request, results

    def _result(self, name: str) -> engine.Result:
      ids = self._texts[zlib.crc32(name.encode()) % len(self._texts)]
      return engine.Result(ids, [-1.0] * len(ids), 'eos')

    def score(self, rows, share=True) -> list[engine.Score]:
      return [engine.Score(-float(len(text)), False) for _, text in rows]
  engine.load = lambda config, folder, stage, *_: (
      Instant(folder, stage), tokenizer.load(folder))
  sys.argv[1:] = flags
  runpy.run_module(f'srlm_jax.{module}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
