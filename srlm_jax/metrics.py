"""Scalars of a run: metrics.jsonl, TensorBoard, and one progress line."""
import json
import math
import time

from etils import epath
import tensorboardX

from srlm_jax import InputError


class Writer:
  """Appends a line a step to metrics.jsonl; lines of steps after `step`, left by a kill, are dropped first."""

  def __init__(self, folder, step: int):
    self._path = epath.Path(folder) / 'metrics.jsonl'
    kept = [line for line in (self._path.read_text().splitlines() if self._path.exists() else [])
            if line.endswith('}') and json.loads(line)['step'] <= step]
    self.kept = list(map(json.loads, kept))  # the scalars of the steps before
    self._path.write_text(''.join(line + '\n' for line in kept))
    self._file = self._path.open('a')
    self._board = tensorboardX.SummaryWriter(str(epath.Path(folder) / 'tensorboard'), purge_step=step + 1)

  def write(self, step: int, scalars: dict):
    """Writes the scalars of one step to both places."""
    self._file.write(json.dumps(dict(step=step, **scalars)) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self):
    self._file.close()
    self._board.close()


def finite(where: str, values: dict) -> dict:
  """Arrays [] -> floats, by name; raises InputError at the first that is not a number, saying where."""
  scalars = {name: float(value) for name, value in sorted(values.items())}
  for name, value in scalars.items():
    if not math.isfinite(value):
      raise InputError(f'{where}: {name} is {value}; lower config.train.learning_rate or look at the data')
  return scalars


def last(folder) -> dict:
  """The last line of a run's metrics.jsonl."""
  return json.loads((epath.Path(folder) / 'metrics.jsonl').read_text().splitlines()[-1])


class Clock:
  """Rates since the last look."""

  def __init__(self):
    self._last, self._tokens = time.perf_counter(), 0

  def add(self, tokens: int):
    self._tokens += tokens

  def tokens_per_second(self) -> float:
    now = time.perf_counter()
    rate = self._tokens / max(now - self._last, 1e-9)
    self._last, self._tokens = now, 0
    return rate


def progress(title: str, step: int, steps: int, scalars: dict) -> str:
  """
  >>> progress('m2', 10, 20, dict(loss=0.69314, margin=0.0))
  'm2  10/20  loss 0.6931  margin 0'
  """
  return '  '.join([title, f'{step}/{steps}', *(f'{k} {v:.4g}' for k, v in scalars.items())])
