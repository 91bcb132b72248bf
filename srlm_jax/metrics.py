"""Training metrics: metrics.jsonl, TensorBoard, and the progress line."""
import json
import math
import time

from etils import epath
import tensorboardX

from srlm_jax import InputError, storage


class Writer:
  """Writes scalars to TensorBoard and to FOLDER/metrics.jsonl, one line per step.

  A run that was killed may have written steps after its last checkpoint; training repeats them, so
  lines of steps after `step` are dropped. `kept` holds the scalars of the other lines.
  """

  def __init__(self, folder, step: int):
    self._file = storage.growing(epath.Path(folder) / 'metrics.jsonl')
    self.kept, size = [], 0
    for line in self._file.lines():  # steps ascend, and a kill may have cut off the last line
      scalars = json.loads(line) if line.endswith(b'}\n') else None
      if scalars is None or scalars['step'] > step:
        break
      self.kept.append(scalars)
      size += len(line)
    self._file.truncate(size)
    self._events = storage.Mirror(epath.Path(folder) / 'tensorboard')
    self._board = tensorboardX.SummaryWriter(str(self._events.local), purge_step=step + 1)

  def write(self, step: int, scalars: dict):
    self._file.write((json.dumps(dict(step=step, **scalars)) + '\n').encode())
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def flush(self):
    """Saves all that was written; a checkpoint must not be saved before its metrics."""
    self._file.flush()
    self._board.flush()
    self._events.upload()

  def close(self):
    self._file.close()
    self._board.close()
    self._events.close()


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
  return json.loads((epath.Path(folder) / 'metrics.jsonl').read_text().splitlines()[-1])


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
