"""Scalars of a run: metrics.jsonl, TensorBoard, and one progress line."""
from collections.abc import Sequence
import json
import math
import time

from etils import epath
import numpy as np
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


class Alarms:
  """What the curves of DPO show and their reader may not: each alarm is a scalar, 0 or 1, and a sentence when it rises.

  `chosen_falling`: over the last WINDOW looks, the chosen responses are less likely than over the first WINDOW of the
  run, by more than ERRORS standard errors. (Not than under the reference: dropout is on in the policy alone, and makes
  every response less likely.) `margin_without_accuracy`: the mean margin is above MARGIN, and less than ACCURACY of the
  pairs have one above 0: a few pairs make it.
  """
  WINDOW, ERRORS, MARGIN, ACCURACY = 5, 3, 0.1, 0.55

  def __init__(self, before: Sequence[dict] = ()):
    """`before`: the scalars of earlier looks."""
    self._seen, self._on = [scalars for scalars in before if 'margin' in scalars], {}

  def look(self, scalars: dict) -> tuple[dict[str, int], list[str]]:
    """Metrics of a step -> the alarms, and the sentences of those that have just gone off; none for SFT."""
    if 'margin' not in scalars:
      return {}, []
    self._seen = [*self._seen, scalars]
    full = len(self._seen) >= 2 * self.WINDOW
    def values(part, name):
      return np.array([s[name] for s in part])
    last = self._seen[-self.WINDOW:]
    first, now = (values(part, 'chosen_reward') for part in (self._seen[:self.WINDOW], last))
    fall = first.mean() - now.mean()
    error = np.sqrt((first.var(ddof=1) + now.var(ddof=1)) / self.WINDOW) if full else 0
    margin, accuracy = (values(last, name).mean() for name in ('margin', 'accuracy'))
    found = dict(
        chosen_falling=bool(full and fall > self.ERRORS * error),
        margin_without_accuracy=bool(full and margin > self.MARGIN and accuracy < self.ACCURACY))
    sentences = dict(
        chosen_falling=f'the chosen responses become less likely, too (chosen_reward {now.mean():.3g}, at first '
                       f'{first.mean():.3g}); lower the learning rate, or add train.nll',
        margin_without_accuracy=f'the mean margin is {margin:.3g}, and {accuracy:.0%} of the pairs have one above 0; a '
                                f'few pairs make it')
    new = [sentences[name] for name, on in found.items() if on and not self._on.get(name)]
    self._on = found
    return {f'alarm_{name}': int(on) for name, on in found.items()}, new


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
