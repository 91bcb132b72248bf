"""What a run shows while it runs: TensorBoard, Weights & Biases, metrics.jsonl, progress lines."""
from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import json
import math
import os
import socket
import struct
import time
import types
import uuid

from etils import epath
import numpy as np

from srlm_jax import config as configs, InputError, records, storage

SECONDS = 10.0       # between two points of a stage
UPLOAD_SECONDS = 60  # between two copies of the events to a bucket
BINS = 30            # of a histogram
MOST_CHARACTERS = 1000  # of a sample text
# The x axis of the numbers of finished stages. 0 is the SFT baseline.
ITERATIONS = {model: i for i, model in enumerate(configs.MODELS[1:])}
# Quotients that are shown beside the numbers of done.json: STAGE/NAME, dividend, divisor.
RATES = {'prompts/prompts_per_attempt': ('prompts', 'attempts'),
         'pairs/pairs_per_prompt': ('pairs', 'prompts'),
         'meta_judge/parse_rate': ('parsed', 'comparisons'),
         **{f'{name}/parse_rate': ('parsed', 'judgements')
            for name in ('judge', 'judge_again', 'judge_older', 'judge_swapped', 'judge_eval')}}
_NONE = types.MappingProxyType({})


class Board:
  """Writes to TensorBoard, FOLDER/tensorboard/NAME, and to the run of `weights_and_biases`.

  `folder`: that of a stage. What a killed run wrote for steps after `step` is hidden. Other
  programs see a value at once, in a bucket within `UPLOAD_SECONDS`.
  """

  def __init__(self, folder, name: str = '', step: int = -1):
    from tensorboardX import proto
    self._events = storage.Mirror(epath.Path(folder) / 'tensorboard' / name)
    # tensorboardX writes in a thread, and waits for it forever after an error, as of a full disk.
    self._file = storage.growing(self._events.local / (
        f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}'))
    self._add(0, file_version='brain.Event:2')
    self._add(step + 1, session_log=proto.event_pb2.SessionLog(
        status=proto.event_pb2.SessionLog.START))
    self._title = '/'.join([*_place(folder), name]).rstrip('/')
    self._written = self._uploaded = time.monotonic()
    if _wandb:
      _wandb.define_metric(f'{self._title}/*', step_metric=f'{self._title}/step')

  def due(self) -> bool:
    """Whether `SECONDS` have passed since the last `write`."""
    return time.monotonic() - self._written >= SECONDS

  def write(self, step: int, scalars: Mapping[str, float],
            histograms: Mapping[str, Mapping[float, int]] = _NONE,
            texts: Mapping[str, str] = _NONE):
    """Adds a point at `step`.

    A histogram is {value: its number}, and its name has to differ from those of the scalars. Texts
    are Markdown.
    """
    from tensorboardX import summary
    bins = {name: _bins(counts) for name, counts in histograms.items()}
    for name, value in scalars.items():
      self._add(step, summary=summary.scalar(name, value))
    for name, (counts, edges) in bins.items():
      middles = (edges[:-1] + edges[1:]) / 2
      self._add(step, summary=summary.histogram_raw(
          name, edges[0], edges[-1], counts.sum(), counts @ middles, counts @ middles**2,
          edges[1:].tolist(), counts.tolist()))
    for name, text in texts.items():
      self._add(step, summary=summary.text(name, text))
    if _wandb:
      _log(self._title, step, scalars, bins)
    self._written = time.monotonic()
    if self._written - self._uploaded >= UPLOAD_SECONDS:
      self.flush()

  def flush(self):
    """Saves what was written."""
    self._file.flush()
    self._events.upload()
    self._uploaded = time.monotonic()

  def close(self):
    self._file.close()
    self._events.close()

  def _add(self, step: int, **fields):
    """Appends an event as a record: length, checksum, data, checksum."""
    from tensorboardX import proto, record_writer
    data = proto.event_pb2.Event(wall_time=time.time(), step=step, **fields).SerializeToString()
    length = struct.pack('<Q', len(data))
    checks = [struct.pack('<I', record_writer.masked_crc32c(x)) for x in (length, data)]
    self._file.write(b''.join((length, checks[0], data, checks[1])))


def _bins(counts: Mapping[float, int]) -> tuple[np.ndarray, np.ndarray]:
  """{value: its number} -> the numbers per bin and the edges of the bins, at most `BINS`.

  Whole numbers are in the middle of a bin of width 1, if there are few.
  """
  low, high = min(counts), max(counts)
  edges = np.linspace(low - 0.5, high + 0.5, min(int(high - low) + 1, BINS) + 1)
  return np.histogram([*counts], edges, weights=[*counts.values()])


def code(texts: list[str]) -> str:
  """Texts of a model as one block of code in Markdown, which shows them as they are.

  Each is cut to `MOST_CHARACTERS`.

  >>> code(['# <b>1</b>', '2'])
  '    # <b>1</b>\\n    --------\\n    2'
  """
  cut = [text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + ' ..'
         for text in texts]
  whole = '\n--------\n'.join(cut).encode('utf-8', 'replace').decode()  # unpaired surrogates
  return '\n'.join(f'    {line}' for line in whole.splitlines())


def show_finished(workdir, title: str):
  """Shows the numbers of finished stages in TensorBoard, WORKDIR/tensorboard/models.

  The x axis is the model's iteration (`ITERATIONS`). Writes the numbers of the model and of later
  ones again, in place of the earlier ones. `title`: MODEL/STAGE, the stage that has just finished.
  Shows nothing of a workdir that a stage made in its folder for a checkpoint
  (`selection.make_workdir`).
  """
  owner, _, stage = title.partition('/')
  if owner not in ITERATIONS or (epath.Path(workdir).parent / 'manifest.json').exists():
    return
  board = Board(workdir, 'models', step=ITERATIONS[owner] - 1)
  for model, iteration in ITERATIONS.items():
    scalars = {}
    for path in sorted((epath.Path(workdir) / model).glob('*/done.json')
                       if iteration >= ITERATIONS[owner] else ()):
      advice = f'delete {path.parent}, and run that stage again'
      summary = records.read_json(path, advice)
      if not isinstance(summary, dict):
        raise InputError(f'{path} is damaged: it is not a JSON object; {advice}')
      found = _numbers(path.parent.name, summary)
      scalars |= found
      if _wandb and (model, path.parent.name) == (owner, stage):
        _log('models', iteration, found, {})
    if scalars:
      board.write(iteration, scalars)
  board.close()


def _numbers(name: str, summary: dict) -> dict[str, float]:
  """The numbers of a done.json.

  >>> _numbers('judge', {'parsed': 1, 'judgements': 2, 'unparsed': {'cut off': 1}, 'files': {}})
  {'judge/parsed': 1, 'judge/judgements': 2, 'judge/unparsed/cut off': 1, 'judge/parse_rate': 0.5}
  """
  found = {}
  for key, value in summary.items():
    inner = {f'/{k}': v for k, v in value.items()} if isinstance(value, dict) else {'': value}
    found |= {f'{name}/{key}{k}': v for k, v in inner.items() if records.is_number(v)}
  for rate, (part, whole) in RATES.items():
    dividend, divisor = (found.get(f'{name}/{key}') for key in (part, whole))
    if rate.startswith(f'{name}/') and divisor and dividend is not None:
      found[rate] = dividend / divisor
  return found


_wandb = None    # the run of Weights & Biases
_workdir = None  # whose stages it shows


def _place(folder) -> tuple[str, ...]:
  """The parts of a folder's path in the workdir that is shown; the last two of another folder."""
  folder = storage.absolute(folder)
  if _workdir and folder.is_relative_to(_workdir):
    return folder.relative_to(_workdir).parts
  return folder.parts[-2:]


@contextlib.contextmanager
def weights_and_biases(workdir) -> Iterator[None]:
  """Inside the block, boards also write to Weights & Biases, if WANDB_PROJECT names a project.

  WORKDIR/wandb.txt has the id of the run, so that a killed run continues. Raises InputError if the
  package is missing, or if the run cannot begin.
  """
  global _wandb, _workdir
  if not (project := os.environ.get('WANDB_PROJECT')):
    yield
    return
  if importlib.util.find_spec('wandb') is None:
    raise InputError(f'WANDB_PROJECT is {project}, and the package wandb is not installed; '
                     f'pip install "srlm_jax[wandb]", or unset WANDB_PROJECT')
  import wandb
  workdir = epath.Path(workdir)
  path = workdir / 'wandb.txt'
  if not path.exists():
    with storage.replacing(path) as file:
      file.write(uuid.uuid4().hex)
  try:
    run = wandb.init(project=project, id=path.read_text(), resume='allow', name=workdir.name)
  except wandb.Error as error:
    raise InputError(f'WANDB_PROJECT is {project}, and Weights & Biases does not begin '
                     f'({" ".join(str(error).split())}); log in with wandb login, set '
                     f'WANDB_MODE=offline, or unset WANDB_PROJECT') from error
  with run:
    _wandb, _workdir = run, storage.absolute(workdir)
    try:
      yield
    finally:
      _wandb = _workdir = None


def _log(title: str, step: int, scalars: Mapping[str, float],
         bins: Mapping[str, tuple[np.ndarray, np.ndarray]]):
  """Writes a point to Weights & Biases."""
  import wandb
  values = dict(scalars) | {name: wandb.Histogram(np_histogram=b) for name, b in bins.items()}
  _wandb.log({f'{title}/{name}': value for name, value in values.items()} |
             {f'{title}/step': step})


class Writer:
  """Writes scalars to TensorBoard and to FOLDER/metrics.jsonl, one line per step.

  A run that was killed may have written steps after its last checkpoint; training repeats them, so
  lines of steps after `step` are dropped. `kept` holds the scalars of the other lines.
  """

  def __init__(self, folder, step: int):
    self._file = storage.growing(epath.Path(folder) / 'metrics.jsonl')
    self.kept, size = [], 0
    # Steps ascend, and a kill may have cut off the last line.
    for number, line in enumerate(self._file.lines(), 1):
      if not line.endswith(b'}\n'):
        break
      scalars = _line(line, f'{folder}/metrics.jsonl:{number}')
      if scalars['step'] > step:
        break
      self.kept.append(scalars)
      size += len(line)
    self._file.truncate(size)
    self._board = Board(folder, step=step)

  def write(self, step: int, scalars: dict):
    self._file.write((json.dumps(dict(step=step, **scalars)) + '\n').encode())
    self._board.write(step, scalars)

  def flush(self):
    """Saves all that was written; a checkpoint must not be saved before its metrics."""
    self._file.flush()
    self._board.flush()

  def close(self):
    self._file.close()
    self._board.close()


def finite(where: str, values: dict) -> dict:
  """{name: array []} -> {name: float}.

  Raises InputError for the first value that is NaN or infinite; `where` starts the message.
  """
  scalars = {name: float(value) for name, value in sorted(values.items())}
  for name, value in scalars.items():
    if not math.isfinite(value):
      raise InputError(f'{where}: {name} is {value}; lower config.train.learning_rate or check '
                       f'the data')
  return scalars


def last(folder) -> dict:
  """The last line of FOLDER/metrics.jsonl."""
  path = epath.Path(folder) / 'metrics.jsonl'
  with records.reading(path, f'delete {folder} to train again'):
    lines = path.read_bytes().splitlines()
  found = _line(lines[-1] if lines else b'', f'{path}:{len(lines)}')
  if 'loss' not in found:
    raise InputError(f'{path}:{len(lines)}: it has no "loss"; delete {folder} to train again')
  return found


def _line(line: bytes, where: str) -> dict:
  """A line of metrics.jsonl. Raises InputError if it is not one."""
  advice = 'delete the folder of that model to train it again'
  scalars = records.parse(line, where, dict[str, int | float], advice)
  if not isinstance(scalars.get('step'), int):
    raise InputError(f'{where}: its "step" is not a whole number; {advice}')
  return scalars


class Clock:
  """Measures training throughput."""

  def __init__(self):
    self._last, self._tokens = time.perf_counter(), 0

  def add(self, tokens: int):
    self._tokens += tokens

  def tokens_per_second(self) -> float:
    """The mean rate since the previous call."""
    now = time.perf_counter()
    rate = self._tokens / max(now - self._last, 1e-9)
    self._last, self._tokens = now, 0
    return rate


def progress(title: str, step: int, steps: int, scalars: dict) -> str:
  """The progress line of a training step.

  >>> progress('m2', 10, 20, dict(loss=0.69314, margin=0.0))
  'm2  10/20  loss 0.6931  margin 0'
  """
  return '  '.join([title, f'{step}/{steps}', *(f'{k} {v:.4g}' for k, v in scalars.items())])
