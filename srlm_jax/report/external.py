"""Results of other programs and judges in WORKDIR/eval: what the report finds there."""
import dataclasses

from etils import epath

from srlm_jax import records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import results
from srlm_jax.report.estimates import Value

_NORMAL = 1.959963984540054  # half a 95 % interval, in standard errors


@dataclasses.dataclass(frozen=True)
class External:
  """The files of WORKDIR/eval, {path there: contents}; empty where there is none."""
  head_to_head: dict[str, schema.HeadToHead] = dataclasses.field(default_factory=dict)
  alpaca: dict[str, schema.AlpacaEval] = dataclasses.field(default_factory=dict)
  mt_bench: dict[str, dict[str, schema.MtBench]] = dataclasses.field(default_factory=dict)
  harness: dict[str, schema.Harness] = dataclasses.field(default_factory=dict)
  distributions: dict[str, schema.Distributions] = dataclasses.field(default_factory=dict)

  def of_model(self, model: str) -> dict[str, Value]:
    """{key of measures.MEASURES: value} of the benchmarks that judge one model alone."""
    made = {}
    for found in self.alpaca.values():
      if model_name(found.generator) == model:
        made['alpaca'] = _percent(found.win_rate, found.standard_error, found.count)
        made['alpaca_controlled'] = _percent(
            found.length_controlled, found.length_controlled_standard_error, found.count)
    for by_model in self.mt_bench.values():
      if (found := by_model.get(model)) and found.overall is not None:
        made['mt_bench'] = Value(value=found.overall, count=found.scored, of='scored turns')
    return {key: value for key, value in made.items() if value}


def read(workdir) -> External:
  """The results in WORKDIR/eval. Raises InputError, with the path, for a damaged file."""
  folder = epath.Path(workdir) / 'eval'

  def found(pattern: str, kind: type[records.Record]) -> dict:
    return {str(path.relative_to(folder)): results.read(path, kind)
            for path in sorted(folder.glob(pattern))} if folder.exists() else {}

  return External(
      head_to_head=found('*/head_to_head.json', schema.HeadToHead),
      alpaca=found('alpaca*.json', schema.AlpacaEval),
      mt_bench=found('mt_bench*.json', dict[str, schema.MtBench]),
      harness=found('harness*.json', schema.Harness),
      distributions=found('distributions.json', schema.Distributions))


def model_name(text: str) -> str:
  """The model of the run that a name or a folder of answers is about; the text, if it is another.

  >>> model_name('runs/x/m2/answers'), model_name('m3'), model_name('gpt-4')
  ('m2', 'm3', 'gpt-4')
  """
  return next((part for part in reversed(text.split('/')) if part in MODELS), text)


def judged_by(file: schema.HeadToHead) -> str:
  """The name of the judge of a comparison; '' if a program graded the answers."""
  return file.judge or ('outside judge' if file.first_wins or file.second_wins else '')


def _percent(value: float | None, error: float | None, count: int) -> Value | None:
  """A percentage of questions with its standard error -> its value and normal interval."""
  if value is None:
    return None
  if error is None:
    return Value(value=value, count=count, of='instructions')
  return Value(value=value, low=value - _NORMAL * error, high=value + _NORMAL * error, count=count,
               of='instructions')
