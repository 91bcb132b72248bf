"""The programs that the benchmarks compare with, each a process in an environment of its own.

The benchmark and a peer exchange one JSON object per line, on the peer's standard input and output.
The first line has the settings, and the peer answers {version} when it is ready. Every other line
is a task, and the answer has the result and its cost: {.., seconds, cpu}.

A script `peer_*.py` is the peer's side: it makes a `Parent` and serves its tasks. This module needs
only the standard library, because peers import it. `make bench-peers` makes the environments.
"""
from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import timing
from timing import Cost

BENCH = pathlib.Path(__file__).resolve().parent


def _program(environment: str, script: str) -> tuple[pathlib.Path, pathlib.Path]:
  """-> the interpreter of a peer and its script."""
  return BENCH.parent / f'.venv-{environment}/bin/python', BENCH / f'peer_{script}.py'


SAMPLERS = dict(transformers=_program('torch', 'transformers'),
                continuous=_program('torch', 'continuous'),
                ctranslate2=_program('ctranslate2', 'ctranslate2'), vllm=_program('vllm', 'vllm'))
TRAINERS = dict(trl=_program('torch', 'trl'), tunix=_program('tunix', 'tunix'))
READERS = dict(export=_program('vllm', 'export'))
LOG_LINES = 20  # of a peer that ended, in the error message


class Peer:
  """A peer, stopped while it has no task. A context manager: its processes end with the block."""

  def __init__(self, name: str, **settings):
    python, script = (SAMPLERS | TRAINERS | READERS)[name]
    if not python.exists():
      raise SystemExit(f'there is no {python}; run `make {python.parents[1].name}/.installed`')
    self.name = name
    self._log = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen([python, script], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, stderr=self._log, text=True,
                                     start_new_session=True)
    self.version = self._exchange(settings | dict(name=name))['version']

  def ask(self, **task) -> tuple[dict, Cost]:
    """-> the answer to a task, and what the peer's process tree took for it."""
    answer = self._exchange(task)
    return answer, Cost(answer.pop('seconds'), answer.pop('cpu'))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._send(signal.SIGCONT)
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()

  def _exchange(self, sent: dict) -> dict:
    self._send(signal.SIGCONT)
    try:
      self._process.stdin.write(json.dumps(sent) + '\n')
      self._process.stdin.flush()
      found = json.loads(self._process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
      self._send(signal.SIGKILL)
      self._log.seek(0)
      tail = ''.join(self._log.readlines()[-LOG_LINES:])
      raise SystemExit(f'{self.name} ended. Its last messages:\n{tail}') from None
    self._send(signal.SIGSTOP)  # some peers poll, at the cost of the other side
    return found

  def _send(self, number: int):
    """Sends a signal to all processes of the peer."""
    os.killpg(self._process.pid, number)


class Parent:
  """The benchmark, as a peer sees it. What a library prints goes to standard error."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    self.settings = json.loads(sys.stdin.readline())

  def serve(self, version: str, answer: Callable[[dict], dict]):
    """Answers tasks until standard input ends.

    `answer` returns the result. It may include a cost of its own, for a part of the call.
    """
    self._write(dict(version=version))
    for line in sys.stdin:
      found = {}
      taken = timing.cost(lambda line=line, found=found: found.update(answer(json.loads(line))),
                          timing.tree_cpu_seconds)
      self._write(taken._asdict() | found)

  def _write(self, found: dict):
    print(json.dumps(found), file=self._out, flush=True)
