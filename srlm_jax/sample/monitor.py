"""Shows a sampling stage in TensorBoard while it runs."""
from collections import Counter, deque
from collections.abc import Iterable
import dataclasses
import time

from srlm_jax import metrics, records, schema
from srlm_jax.sample import engine as engines

TEXTS = 3  # samples per point


class Monitor:
  """Points of one file of records, every `metrics.SECONDS`; the x axis is its number of records.

  A point has the means and histograms of `_values` over all records, the speed since the last point
  and the texts of some new records. The file has the first `known` of the records that `add` gets.
  `kind`: their dataclass; `work`: the engine's, if the model runs.
  """

  def __init__(self, folder, name: str, kind: type, known: int, work: engines.Work | None = None):
    self._board, self._shown = metrics.Board(folder, name, known), known
    self._kind, self._count = kind, 0
    self._counts, self._texts = {}, deque(maxlen=TEXTS)
    self._work = work or engines.Work()
    self._before, self._time = dataclasses.replace(self._work), time.monotonic()

  def add(self, new: Iterable[records.Record]):
    """Adds the records of a request, or of several; writes a point if one is due.

    Those that a run on another number of hosts left (`records.Kept`) are JSON objects.
    """
    record = None
    for record in new:
      if isinstance(record, dict):
        record = records.parse(records.dump(record).encode(), record['id'], self._kind)
      self._count += 1
      for name, value in _values(record).items():
        self._counts.setdefault(name, Counter())[value] += 1
    if record and self._count > self._shown:
      self._texts.append(record)
      if self._board.due():
        self._write()

  def close(self):
    """Writes the last point."""
    if self._count > self._shown:
      self._write()
    self._board.close()

  def _write(self):
    means = {name: sum(value * n for value, n in counts.items()) / counts.total()
             for name, counts in self._counts.items()}
    texts = [_text(record) for record in self._texts]
    self._board.write(
        self._count, means | self._speed(),
        {f'{name}_histogram': self._counts[name] for name in _HISTOGRAMS if name in self._counts},
        {'samples': metrics.code(texts)} if any(texts) else {})
    self._shown = self._count
    self._texts.clear()

  def _speed(self) -> dict[str, float]:
    """Tokens per second and slot utilization since the last call."""
    now, before = time.monotonic(), self._before
    seconds, self._time = now - self._time, now
    self._before = dataclasses.replace(self._work)
    new = engines.Work(**{name: value - getattr(before, name)
                          for name, value in dataclasses.asdict(self._work).items()})
    found = dict(tokens_per_second=new.generated + new.scored, prefilled_per_second=new.prefilled)
    found = {name: tokens / seconds for name, tokens in found.items() if tokens}
    return found | (dict(slot_utilization=new.slot_utilization) if new.slot_steps else {})


_HISTOGRAMS = ('score', 'tokens', 'logp', 'reward')


def _values(record: records.Record) -> dict[str, float]:
  """What is shown of a record; shares are means of 0 and 1."""
  match record:
    case schema.Attempt():
      return dict(accepted=not record.reason)
    case schema.Response():
      return dict(finished=record.finish == schema.EOS, tokens=record.n_tokens)
    case schema.Judgement():
      is_parsed = record.score is not None
      return dict(parse_rate=is_parsed) | (dict(score=record.score) if is_parsed else {})
    case schema.Comparison():
      return dict(parse_rate=record.winner is not None, first_wins=record.winner == 1,
                  second_wins=record.winner == -1)
    case schema.Logp(logp=float(logp)):
      return dict(logp=round(logp))
    case schema.ImplicitReward(reward=float(reward)):
      return dict(reward=round(reward, 1))
  return {}


def _text(record: records.Record) -> str:
  """A record as a sample text; '' if it has no text."""
  match record:
    case schema.Attempt():
      return f'attempt {record.id}: {record.reason or "accepted"}\n\n{record.text}'
    case schema.Response():
      return f'{record.id}: {record.finish}\n\n{record.prompt}\n\n{record.response}'
    case schema.Judgement():
      return f'{record.id}: {record.reason or f"score {record.score:g}"}\n\n{record.text}'
    case schema.Comparison():
      return f'{record.id}: {record.reason or f"winner {record.winner:g}"}\n\n{record.text}'
  return ''
