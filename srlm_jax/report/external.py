"""Results of other programs and judges in WORKDIR/eval: what the report finds there."""
import dataclasses
import pathlib

from etils import epath

from srlm_jax import records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import estimates, results
from srlm_jax.report.estimates import Value

_NAMELESS = 'outside judge'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Results of one judge or task: a row of the table of models."""
  title: str
  unit: str
  by: str
  digits: int
  values: dict[str, Value]   # by model of the run


@dataclasses.dataclass(frozen=True)
class External:
  """The files of WORKDIR/eval, {path there: contents}; empty where there is none.

  Models have the names of `model_name`.
  """
  head_to_head: dict[str, schema.HeadToHead] = dataclasses.field(default_factory=dict)
  alpaca: dict[str, schema.AlpacaEval] = dataclasses.field(default_factory=dict)
  mt_bench: dict[str, dict[str, schema.MtBench]] = dataclasses.field(default_factory=dict)
  harness: dict[str, schema.Harness] = dataclasses.field(default_factory=dict)
  distributions: dict[str, schema.Distributions] = dataclasses.field(default_factory=dict)

  @property
  def win_rates(self) -> list[Measured]:
    """The win rates of the models against SFT, by judge."""
    made = []
    for file in self.head_to_head.values():
      by = outside(judged_by(file))
      for model in MODELS if by else ():
        if model != 'sft' and (value := rate_of(file, model, 'sft')):
          row = next((row for row in made if row.by == by and model not in row.values), None)
          if not row:
            row = Measured(title='win rate against sft, head to head', unit='share', by=by,
                           digits=3, values={})
            made.append(row)
          row.values[model] = value
    return made

  @property
  def tasks(self) -> list[Measured]:
    """The scores of the models in the tasks of lm-evaluation-harness."""
    made = []
    for file in self.harness.values():
      for task in dict.fromkeys(task for scores in file.scores.values() for task in scores):
        values = {model: _interval(scores[task], file.standard_errors.get(model, {}).get(task))
                  for model, scores in file.scores.items() if model in MODELS and task in scores}
        made.append(Measured(title=task, unit='percent', by='lm-evaluation-harness', digits=2,
                             values=values))
    return made

  def of_model(self, model: str) -> dict[str, Value]:
    """{key of measures.MEASURES: value} of the benchmarks that judge one model alone."""
    made = {}
    for found in self.alpaca.values():
      if found.generator == model:
        made['alpaca'] = _percent(found.win_rate, found.standard_error, found.count)
        made['alpaca_controlled'] = _percent(
            found.length_controlled, found.length_controlled_standard_error, found.count)
    for by_model in self.mt_bench.values():
      if (found := by_model.get(model)) and found.overall is not None:
        made['mt_bench'] = Value(value=found.overall, count=found.scored, of='scored turns')
    return {key: value for key, value in made.items() if value}


def read(workdir) -> External:
  """The results in WORKDIR/eval. Raises InputError, with the path, for a damaged file."""
  folder, run = epath.Path(workdir) / 'eval', pathlib.Path(workdir).resolve().name

  def found(pattern: str, kind: type[records.Record]) -> dict:
    files = {str(path.relative_to(folder)): results.read(path, kind)
             for path in sorted(folder.glob(pattern))} if folder.exists() else {}
    return {path: file for path, file in files.items() if file is not None}  # not of broken links

  def named(file, *fields: str):
    return dataclasses.replace(file, **{x: model_name(getattr(file, x), run) for x in fields})

  def by_name(rows: dict) -> dict:
    names = [model_name(name, run) for name in rows]
    return dict(zip(names if len({*names}) == len(names) else rows, rows.values(), strict=True))

  return External(
      head_to_head={path: named(file, 'a', 'b') for path, file in found(
          '*/head_to_head.json', schema.HeadToHead).items()},
      alpaca={path: named(file, 'generator') for path, file in found(
          'alpaca*.json', schema.AlpacaEval).items()},
      mt_bench={path: by_name(rows) for path, rows in found(
          'mt_bench*.json', dict[str, schema.MtBench]).items()},
      harness={path: dataclasses.replace(
          file, scores=by_name(file.scores), standard_errors=by_name(file.standard_errors))
               for path, file in found('harness*.json', schema.Harness).items()},
      distributions=found('distributions.json', schema.Distributions))


def model_name(text: str, run: str) -> str:
  """What a model is called, from its name or a folder in a file.

  That is m1, m2, .. for the bare name, and for a folder in a run that has the name `run`: the run
  may have been moved. Another model keeps two parts of its path, which name its run.

  >>> [model_name(x, 'demo') for x in ('m3', 'runs/demo/m3/answers', 'runs/old/m3/x', 'gpt-4')]
  ['m3', 'm3', 'old/m3', 'gpt-4']
  """
  parts = [part for part in text.split('/') if part]
  at = max((i for i, part in enumerate(parts) if part in MODELS), default=None)
  if at is None:
    return '/'.join(parts[-2:])
  return parts[at] if parts[at - 1:at] in ([], [run]) else '/'.join(parts[at - 1:at + 1])


def rate(file: schema.HeadToHead) -> Value:
  """The win rate of a against b, 0 to 1; the file has a prompt with an outcome."""
  return Value(value=(file.wins + file.ties / 2) / file.count, low=file.win_rate_low,
               high=file.win_rate_high, count=file.count)


def rate_of(file: schema.HeadToHead, model: str, against: str) -> Value | None:
  """The win rate of a model against another one; None if the file does not compare them."""
  if not file.count or (model, against) not in ((file.a, file.b), (file.b, file.a)):
    return None
  found = rate(file)
  if model == file.a:
    return found
  low, high = (None if x is None else 1 - x for x in (found.high, found.low))
  return dataclasses.replace(found, value=1 - found.value, low=low, high=high)


def judged_by(file: schema.HeadToHead) -> str:
  """The name of the judge of a comparison; '' if a program graded the answers."""
  return file.judge or (_NAMELESS if file.first_wins or file.second_wins else '')


def outside(judge: str) -> str:
  """What an outside judge is called in a title."""
  return judge if judge in ('', _NAMELESS) else f'{_NAMELESS} {judge}'


def _percent(value: float | None, error: float | None, count: int) -> Value | None:
  """A percentage of instructions with its standard error."""
  if value is None:
    return None
  return dataclasses.replace(_interval(value, error), count=count, of='instructions')


def _interval(value: float, error: float | None) -> Value:
  """A value with its standard error, if known -> with its normal interval."""
  if error is None:
    return Value(value=value)
  return Value(value=value, low=value - estimates.NORMAL * error,
               high=value + estimates.NORMAL * error)
