"""Runs the package's programs in forks of a process that has imported them.

A program then starts in a tenth of a second instead of three. It runs the same `__main__` code with
the same flags and environment as `python -m srlm_jax.PROGRAM`. tests/conftest.py starts the server.
"""
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings


class Server:
  """The process that forks. `env` and `cwd` are those of every program. Used by one thread."""

  def __init__(self, env: dict[str, str], cwd):
    self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True, env=env, cwd=cwd)
    self._process.stdout.readline()
    self.pid = None

  def run(self, program: str, flags, before: str = '', is_ended_whole: bool = False
          ) -> tuple[int, str, str]:
    """-> exit code, stdout and stderr of a program; `before`: statements that run first.

    While it runs, `pid` is its process. is_ended_whole: it ends as Python does, which waits for
    threads and calls the functions of `atexit`; otherwise at once, which is faster.
    """
    with tempfile.TemporaryDirectory() as folder:
      out, err = (pathlib.Path(folder) / name for name in ('out', 'err'))
      out.touch()  # it may be killed before it opens them
      err.touch()
      request = dict(program=program, flags=list(flags), out=str(out), err=str(err), before=before,
                     is_ended_whole=is_ended_whole)
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      self.pid = int(self._process.stdout.readline())
      code = int(self._process.stdout.readline())
      self.pid = None
      return code, out.read_text(), err.read_text()


def serve():
  """Imports the programs, then runs one per line of stdin and prints its exit code."""
  import tensorboardX  # noqa: F401  (otherwise every program imports it)

  import srlm_jax.loop
  import srlm_jax.study  # noqa: F401
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `python -m srlm_jax.PROGRAM` sets it
  warnings.filterwarnings('ignore', message='os.fork', category=RuntimeWarning)  # of JAX
  print('ready', flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
      _run(**request)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def refuse_pickles(event: str, args: tuple):
  """An audit hook: a pickle that names a class or a function could run code of whoever wrote it.

  multiprocessing pickles what it passes between the threads and processes of one program.
  """
  if event == 'pickle.find_class':
    caller = sys._getframe(1).f_globals['__name__']
    if not caller.startswith('multiprocessing.'):
      raise RuntimeError(f'{caller} reads a pickle that names {".".join(args)}')


def _run(program: str, flags: list[str], out: str, err: str, before: str, is_ended_whole: bool):
  for stream, path in ((0, os.devnull), (1, out), (2, err)):
    os.dup2(os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY), stream)
  code = 0
  module = f'srlm_jax.{program}'
  is_package = hasattr(sys.modules.get(module), '__path__')
  sys.modules.pop(f'{module}.__main__' if is_package else module, None)  # it runs as __main__
  sys.argv = [program, *flags]
  sys.addaudithook(refuse_pickles)
  try:
    exec(before)
    runpy.run_module(module, run_name='__main__', alter_sys=True)
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:
    traceback.print_exc()
    code = 1
  if is_ended_whole:
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


if __name__ == '__main__':
  serve()
