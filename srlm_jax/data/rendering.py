"""Renders chat templates: Jinja in a sandbox, with what transformers passes to a template.

One thing differs: the date (`strftime_now`) is fixed. A run then has the same prompts on every day,
so that it can be resumed and trained on the tokens that it sampled.

The template of a tokenizer is a program that somebody else wrote. Jinja's sandbox stops its access
to files and to Python, but not an endless loop or a text of 10 GB. It is therefore rendered in
another process, which has limited time and memory, and which only renders (`main`).
"""
import atexit
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import jinja2
from jinja2 import ext, nodes, sandbox

from srlm_jax import InputError
from srlm_jax.conversation import Message

DATE = datetime.datetime(2024, 7, 26)  # the default of Llama 3's own templates
# What a template may cost, far more than any needs.
SECONDS = 3         # of CPU time per rendering
MEMORY = 2**29      # bytes of the process
MOST_TEXT = 2**24   # characters of the result
ADVICE = 'correct the template, or set config.chat to plain, llama2 or chatml'


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template. `name` is for errors. `is_own`: of this package, so it needs no limits."""
  source: str
  name: str
  is_own: bool = False


def render(template: Template, messages: Sequence[Message], variables: Mapping[str, str],
           prompt: bool) -> str:
  """The text of messages in a template.

  variables: bos_token, eos_token and other special tokens. prompt: ask for the next response
  (add_generation_prompt). Raises InputError if the template is not valid, refuses the messages,
  tries what the sandbox forbids, or needs more time or memory than its limits.
  """
  said = [dict(role=m.role, content=m.content) for m in messages]
  request = template.source, said, dict(variables), prompt
  text, error = _rendered(*request) if template.is_own else _renderer(os.getpid()).ask(request)
  if error:
    raise InputError(f'{template.name} {error}')
  return text


class _Renderer:
  """The process that renders. It is started when it is needed, and again after its end."""

  def __init__(self):
    self._process, self._lock = None, threading.Lock()
    atexit.register(self.close)

  def ask(self, request: tuple) -> tuple[str, str]:
    """The arguments of `_rendered` -> its result. Any thread may call it."""
    with self._lock:
      if self._process is None:
        self._process = _start()
      try:
        with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code says why
          self._process.stdin.write(json.dumps(request).encode() + b'\n')
          self._process.stdin.flush()
        if line := self._process.stdout.readline():
          return json.loads(line)
        ended = self._process.wait()
      except BaseException:  # an interrupt: the answer, which comes later, must not be read
        self._process.kill()
        self._process.wait()
        self._process = None
        raise
      self._process = None
    if ended == -signal.SIGXCPU:
      return '', f'needs more than {SECONDS} s of CPU time; {ADVICE}'
    return '', f'was not rendered, because the process that renders it ended (exit code {ended})' \
               f'; start the program again, and if this repeats, {ADVICE}'

  def close(self):
    """Ends the process."""
    if self._process:
      with contextlib.suppress(BrokenPipeError):
        self._process.stdin.close()
      self._process.stdout.close()
      self._process.wait()
      self._process = None


@functools.cache
def _renderer(process: int) -> _Renderer:
  """The renderer of a process of this program: a fork must not use that of its parent."""
  del process
  return _Renderer()


def _start() -> subprocess.Popen:
  root = str(pathlib.Path(__file__).parents[2])
  paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
  # -P: no modules of the current folder. A session of its own: signals are for the parent only.
  return subprocess.Popen(
      [sys.executable, '-P', '-m', 'srlm_jax.data.rendering'], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, env=os.environ | dict(PYTHONPATH=os.pathsep.join(paths)),
      start_new_session=True)


def main():
  """Renders what comes as lines on stdin, under the limits, until stdin ends."""
  # A service manager sends them to all processes; the parent closes stdin.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  _limit(resource.RLIMIT_AS, MEMORY)
  _limit(resource.RLIMIT_CORE, 0)
  for line in sys.stdin.buffer:
    # SIGXCPU ends the process. The kernel counts whole seconds.
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 1)
    try:
      result = json.dumps(_rendered(*json.loads(line)))
    except MemoryError:
      result = json.dumps(_too_large())
    sys.stdout.write(result + '\n')
    sys.stdout.flush()


def _limit(kind: int, most: int):
  """Sets a soft limit of this process, unless it is lower already.

  That of CPU time grows with each rendering, so only the hard limit bounds it.
  """
  soft, hard = resource.getrlimit(kind)
  bound = hard if kind == resource.RLIMIT_CPU else soft
  resource.setrlimit(kind, (most if bound == resource.RLIM_INFINITY else min(most, bound), hard))


def _rendered(source: str, messages: list[dict], variables: dict, prompt: bool) -> tuple[str, str]:
  """-> the text, and ''; or '', and what the template does wrong."""
  try:
    template = _compile(source)
  except jinja2.TemplateSyntaxError as error:
    return '', f'is not valid Jinja (line {error.lineno}: {_line(error)}); {ADVICE}'
  except MemoryError:
    return _too_large()
  except (RecursionError, SyntaxError, TypeError, ValueError, OverflowError) as error:
    return '', f'cannot be compiled ({_line(error)}); {ADVICE}'
  try:
    text = template.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **variables)
  except jinja2.exceptions.SecurityError as error:
    return '', f'tries what the sandbox forbids ({_line(error)}); {ADVICE}'
  except MemoryError:
    return _too_large()
  except Exception as error:  # a template is a program: it may raise anything
    return '', f'refuses the conversation ({_line(error)}); change the roles, or {ADVICE}'
  return _too_large() if len(text) > MOST_TEXT else (text, '')


def _too_large() -> tuple[str, str]:
  return '', f'needs more than {MEMORY >> 20} MiB, or makes a text of more than {MOST_TEXT:,} ' \
             f'characters; {ADVICE}'


def _line(error: Exception) -> str:
  """The message of an error as one short line."""
  return ' '.join((str(error) or type(error).__name__).split())[:200]


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
  return _environment().from_string(source)


@functools.cache
def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  """The environment that transformers gives to chat templates."""
  found = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation])
  found.filters['tojson'] = _to_json
  found.globals.update(raise_exception=_raise, strftime_now=DATE.strftime)
  return found


class _Generation(ext.Extension):
  """{% generation %} marks what an assistant says; it renders its body."""
  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Jinja's own filter escapes HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _raise(message: str):
  raise jinja2.TemplateError(message)


if __name__ == '__main__':
  main()
