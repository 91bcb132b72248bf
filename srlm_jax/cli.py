"""What every program does first: flags, hosts, the workdir's lock; and errors as one sentence."""
import contextlib
import os
import re
import signal
import sys
import tempfile
import traceback

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags
import tqdm

from srlm_jax import (
  base,
  config as configs,
  environment,
  hosts,
  InputError,
  lock,
  metrics,
  peers,
  preemption,
  storage,
)

MOST_PARTS = 100  # folders in the path of a workdir


def main(run, **extra):
  """Runs `run(config, workdir, ..)` as a program with the flags --config and --workdir.

  `extra`: more flags, name=(default, help), which are passed on.
  """
  define_config('One model: iter2, iter2:tiny, or the path of a file.')
  flags.DEFINE_string('workdir', None, 'Folder of the whole run; default: runs/CONFIG-SIZE.')
  flags.mark_flag_as_required('config')
  for name, (default, text) in extra.items():
    flags.DEFINE_string(name, default, text)
  for name in ('config', 'workdir', *extra):  # so that --help shows them
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

  def start(argv):
    refuse_arguments(argv)
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    try:
      size = flags.FLAGS.config.size
    except OSError as error:
      raise InputError(f'--config={file} cannot be read; give the path of a file, or a name: '
                       f'{", ".join(configs.FILES)}') from error
    except AttributeError as error:
      raise InputError(f'--config={file} defines a get_config() that returns no config ({error}); '
                       f'{_CONFIGS}') from error
    given = flags.FLAGS.config
    configs.check(given)
    workdir = flags.FLAGS.workdir = flags.FLAGS.workdir or default_workdir(file, size)
    config = base.fit(given, workdir)
    if line := base.chosen({config.name: config}, {config.name: given}):
      hosts.log(line)
    cache_compilations(workdir)
    with locked(workdir):
      run(config, workdir, **{name: flags.FLAGS[name].value for name in extra})
  run_app(start)


_CONFIGS = f'give a file like those in configs/, or a name: {", ".join(configs.FILES)}'


def define_config(text: str):
  """Defines the flag --config; `text`: its help."""
  config_flags.DEFINE_config_file('config', None, text)
  parser = flags.FLAGS['config'].parser
  load = parser.parse

  def parse(path: str):
    try:
      return load(path)
    except InputError:
      raise
    except Exception as error:  # a config file is a program, which may raise any
      line = ''.join(traceback.format_exception_only(error)).strip().splitlines()[-1]
      kind, _, said = line.partition(': ')
      raise InputError(f'--config={configs.short(path)} raises {kind} ({configs.short(said)}); '
                       f'{_CONFIGS}') from error
  parser.parse = parse


def run_app(start):
  """Runs `start(argv)` as a program: joins the hosts.

  An InputError is printed, exit code 1. After SIGTERM, and if another host is lost, the exit code
  is preemption.EXIT_CODE, after Ctrl-C preemption.INTERRUPTED.
  """
  if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
    signal.signal(signal.SIGINT, _interrupted)  # under nohup, SIGINT stays ignored

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    logging.get_absl_handler().addFilter(_is_to_print)
    sys.unraisablehook = _print_unraisable
    try:
      preemption.listen()
      for argument in sys.argv[1:]:
        storage.check(argument)
      environment.pin()
      with peers.joined():
        start(argv)
    except InputError as error:
      say(f'error: {error}')
      sys.exit(1)
    except preemption.Stopped as stopped:
      say(f'{stopped}; the same command continues')
      sys.exit(preemption.EXIT_CODE)
    except Exception as error:  # Orbax and TensorStore raise many types for a full disk
      if isinstance(error, storage.errors()) or (
          isinstance(error, OSError) and storage.is_forbidden(error)):
        known = storage.no_access('the bucket', error)
      elif not (known := storage.failure(error, _places())):
        raise
      say(f'error: {known}')
      sys.exit(1)
  app.run(guarded, flags_parser=_parse_flags)


def say(text: str):
  """Prints a line to stderr that a progress bar does not share."""
  tqdm.tqdm.write(text, file=sys.stderr)


def _print_unraisable(found):
  """Prints an error that nobody gets, but not those after the first array that was not saved."""
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)


def _is_to_print(record) -> bool:
  """Whether a log record is printed: Orbax logs an error of the disk, and then raises it too."""
  error = record.exc_info and record.exc_info[1]
  is_of_orbax = f'{os.sep}orbax{os.sep}' in record.pathname
  return not (error and is_of_orbax and storage.failure(error))


def _places() -> list[str]:
  """The paths that this program may write: those in its flags, and the temporary folder."""
  given = []
  for name, value in flags.FLAGS.flag_values_dict().items():
    for path in value if isinstance(value, list) else [value]:
      if isinstance(path, str) and path and (name in ('workdir', 'out') or '/' in path):
        given.append(path)
  return [*(path for path in given if '://' not in path), tempfile.gettempdir()]


def _interrupted(*_):
  """Ctrl-C ends the program as a kill does, but for the lock, and with a message.

  A KeyboardInterrupt would be lost if it came within one of JAX's callbacks from C++.
  """
  # On a line of its own, below a progress bar. Python may be inside of sys.stderr.
  os.write(2, b'\ninterrupted; the same command continues\n')
  lock.release()
  os._exit(preemption.INTERRUPTED)


@contextlib.contextmanager
def locked(workdir):
  """Holds the workdir's lock inside a `with` block, on the first host; see `lock.held`.

  Raises InputError, on all hosts, if another host does not see that lock.
  """
  held = shown = contextlib.nullcontext()
  if hosts.is_first_host():
    held = lock.held(workdir, is_patient=jax.process_count() > 1)
    shown = metrics.weights_and_biases(workdir)
  with held as mine, shown:
    name = hosts.gather(mine)[0]
    unseen = [i for i, seen in enumerate(hosts.gather(lock.is_seen(workdir, name))) if not seen]
    if unseen:
      raise InputError(f'--workdir={workdir}: host {unseen[0]} does not see what the first host '
                       f'wrote there; give a folder on a disk that all hosts share, or in a '
                       f'bucket: gs://BUCKET/FOLDER')
    try:
      yield
    finally:
      storage.upload_pending()


def cache_compilations(workdir):
  """Enables JAX's compilation cache in WORKDIR/compiled, unless one is configured.

  Raises InputError if the workdir is a file, or below one, or not a usable path.
  """
  folder = epath.Path(workdir)
  if len(folder.parts) > MOST_PARTS:
    raise InputError(f'--workdir={configs.short(str(workdir))} has {len(folder.parts)} parts; give '
                     f'a path of at most {MOST_PARTS}')
  if obstacle := storage.obstacle(folder / 'compiled'):
    raise InputError(f'--workdir={workdir}: {obstacle} is a file, not a folder; give another path')
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def refuse_arguments(argv):
  """Raises InputError for an argument that is not a flag."""
  if argv[1:]:
    raise InputError(f'{argv[1]!r} is not a flag; flags are written --name=value')


def default_workdir(config: str, size: str) -> str:
  """`config`: the value of --config, with the path of srlm_jax/config.py before a name.

  >>> default_workdir('configs/iter2.py', '70b'), default_workdir('/x/config.py:iter2:tiny', 'tiny')
  ('runs/iter2-70b', 'runs/iter2-tiny')
  """
  file, _, text = config.partition(':')
  name = text.partition(':')[0]
  return f'runs/{name if name in configs.FILES else epath.Path(file).stem}-{size}'


def _config_file(argument: str) -> str:
  """--config=NAME -> the path of srlm_jax/config.py with NAME; other arguments are unchanged."""
  if not (found := re.fullmatch(r'(--?config=)([^/.]+)', argument)):
    return argument
  return f'{found[1]}{configs.__file__}:{found[2]}'


def _parse_flags(argv):
  """Parses flags. Every error that absl and ml_collections raise is printed as one line."""
  try:
    _refuse_old_keys(argv)
    return flags.FLAGS([_config_file(argument) for argument in argv])
  except InputError as error:
    say(f'error: {error}')
    sys.exit(1)
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError,
          RecursionError) as error:
    say(f'error: {_flag_error(error)}')
    sys.exit(1)


def _refuse_old_keys(argv):
  for argument in argv:
    key = argument.partition('=')[0].lstrip('-').removeprefix('config.')
    if key in configs.RENAMED:
      raise InputError(f'--config.{key} is now {configs.RENAMED[key]}; write the new name')


def _flag_error(error: Exception) -> str:
  """One sentence of bounded length."""
  text = str(error.args[0] if error.args else error)
  if isinstance(error, RecursionError):  # absl searches for a flag with a similar name
    text = 'a flag has a name that is unknown and very long; flags are written --name=value'
  elif hint := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
    text = f'--config has no key "{hint[2]}" (did you mean "{hint[1]}"?)'
  elif isinstance(error, KeyError | AttributeError):
    text = f'--config has no key "{text.strip(chr(34) + chr(39))}"'
  elif missing := re.search(r'flag --(\w+)=None: .* must have a value', text):
    text = f'--{missing[1]} is missing'
  text = text.replace('ValueError: ', '').strip()
  lines = text.splitlines()
  text = lines[-1] if 'Traceback' in text else ' '.join(lines)
  # A long value is shortened by itself first, because the reason follows it.
  return configs.short(re.sub(r'\S{151,}', lambda word: configs.short(word[0], 150), text), 300)
