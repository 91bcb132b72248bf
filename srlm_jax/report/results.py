"""The numbers of a run: one row per model, as tables; and the seconds of its stages."""
from collections import Counter
from collections.abc import Collection, Iterator
import dataclasses
import statistics
from typing import Annotated

from etils import epath
import msgspec
import numpy as np

from srlm_jax import catalog, InputError, records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import keyed
from srlm_jax.reward import scores

_AGREEMENT, _AUDIT = 'agreement/agreement.json', 'audit/audit.json'
_JUDGE_PAIRS = 'audit_judge_pairs/audit_judge_pairs.json'
_AGAIN = 'delete it, and run the loop again'
_ORACLE, _PAIRED = 'oracle/oracle.json', ''


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table of models."""
  heading: str  # also the key of the number in a row
  file: str     # in the folder of the model; '' for the paired comparisons of `compare`
  key: str      # in the JSON object of the file
  digits: int

  @property
  def interval(self) -> str:
    """The key of the number's 95 % interval in a row."""
    return f'{self.heading} 95 %'


TABLES = dict(
    answers=(
        Column('oracle 0-5', _ORACLE, 'score', 2),
        Column('+- prompts', _ORACLE, 'standard_error', 2),
        Column('greedy', _ORACLE, 'greedy', 2),
        Column('gain', _PAIRED, 'gain', 2),
        Column('of gain +- prompts', _PAIRED, 'gain_error', 2),
        Column('wins', _PAIRED, 'wins', 2),
        Column('losses', _PAIRED, 'losses', 2),
        Column('answer chars', _ORACLE, 'characters', 1)),
    judge=(
        Column('judge: pairwise', _AGREEMENT, 'pairwise_accuracy', 3),
        Column('of pairs', _AGREEMENT, 'pairs', 0),
        Column('of prompts', _AGREEMENT, 'prompts', 0),
        Column('unscored as errors', _AGREEMENT, 'pairwise_accuracy_all', 3),
        Column('of all pairs', _AGREEMENT, 'pairs_all', 0),
        Column('ties', _AGREEMENT, 'ties', 3),
        Column('exact', _AGREEMENT, 'exact_match', 3),
        Column('spearman', _AGREEMENT, 'spearman', 3),
        Column('kendall', _AGREEMENT, 'kendall_tau', 3),
        Column('parsed', _AGREEMENT, 'parse_rate', 3),
        Column('ceiling', _ORACLE, 'ceiling', 3),
        Column('oracle: pairwise', _ORACLE, 'judge_pairwise', 3),
        Column('of graded pairs', _ORACLE, 'judge_pairs', 0),
        Column('oracle: all pairs', _ORACLE, 'judge_pairwise_all', 3),
        Column('oracle: ties', _ORACLE, 'judge_ties', 3),
        Column('oracle: exact', _ORACLE, 'judge_exact', 3),
        Column('of replies', _ORACLE, 'judge_replies', 0)),
    data=(
        Column('EFT examples', 'eft/done.json', 'examples', 0),
        Column('pairs', 'pairs/done.json', 'pairs', 0),
        Column('right', _AUDIT, 'right', 2),
        Column('wrong', _AUDIT, 'wrong', 2),
        Column('judge pairs', _JUDGE_PAIRS, 'judge_pairs', 0),
        Column('nearer', _JUDGE_PAIRS, 'nearer', 2),
        Column('farther', _JUDGE_PAIRS, 'farther', 2),
        Column('judge mean', _AUDIT, 'judge_mean', 2),
        Column('oracle mean', _AUDIT, 'oracle_mean', 2)))
COLUMNS = tuple(column for table in TABLES.values() for column in table)
# Columns for which a terminal is too narrow.
PAGE_ONLY = ('exact', 'spearman', 'kendall', 'oracle: ties')
# A count stays an int.
_NUMBER = Annotated[int, msgspec.Meta(ge=-10**15, le=10**15)] | schema.Number
_DIGITS = {column.heading: column.digits for column in COLUMNS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
  """done.json of any stage; both of its last start."""
  seconds: schema.Number
  generated: schema.Count | None = None  # tokens that a model sampled


def _numbers(file: str) -> type:
  """A dataclass of the numbers of COLUMNS in a JSON file, with their intervals."""
  keys = [column.key for column in COLUMNS if column.file == file]
  intervals = dict[str, tuple[schema.Number, schema.Number] | None]
  return dataclasses.make_dataclass('Numbers', [
      *((key, _NUMBER | None, None) for key in keys),
      ('intervals', intervals, dataclasses.field(default_factory=dict))])


_NUMBERS = {file: _numbers(file) for file in dict.fromkeys(column.file for column in COLUMNS)}


def of_models(workdir) -> list[dict]:
  """One row per trained model: {heading: number, or None if the run does not have it}.

  A row also has `model` and the intervals (`Column.interval`) that exist.
  """
  rows, previous, baseline = [], *2 * [keyed.table((), 'score')]
  for model in trained(workdir):
    folder = epath.Path(workdir) / model
    grades = graded(folder)
    for other in (previous, baseline):
      if len(grades) and len(other) and not keyed.same(grades, other):
        raise InputError(f'{folder}/oracle/graded.jsonl and that of an earlier model grade answers '
                         f'to different prompts; restore the files of this run')
    paired = compare(grades, previous, baseline)
    previous = grades
    if model == 'sft':
      baseline = grades
    found = {file: read(folder / file, kind) if file else kind(**paired)
             for file, kind in _NUMBERS.items()}
    row = dict(model=model)
    row |= {column.heading: getattr(found[column.file], column.key, None) for column in COLUMNS}
    row |= {column.interval: interval for column in COLUMNS if found[column.file]
            and (interval := found[column.file].intervals.get(column.key))}
    rows.append(row)
  return rows


def trained(workdir) -> list[str]:
  """The models of a workdir that are trained."""
  return [model for model in MODELS if _is_trained(epath.Path(workdir) / model)]


def graded(folder) -> np.ndarray:
  """MODEL/oracle -> a distinct table: prompt id, score of the sampled response.

  It is empty if there is no such file.
  """
  path = folder / 'oracle' / 'graded.jsonl'
  return keyed.distinct(keyed.table(
      ((hash(r.prompt_id), r.score) for r in each(path, schema.GradedResponse)), 'score'))


def compare(grades: np.ndarray, previous: np.ndarray, baseline: np.ndarray) -> dict:
  """Compares the scores of a model, a table of `graded`, with those of two other models.

  gain, gain_error: the mean difference from the previous model, paired by prompt, and its standard
  error. wins, losses: the shares of prompts on which the score is above or below that of the SFT
  baseline. Without scores to compare, the keys are absent.
  """
  found, gains, margins = {}, gained(grades, previous), gained(grades, baseline)
  if len(gains):
    found |= dict(gain=statistics.fmean(gains), gain_error=scores.standard_error(gains))
  if len(margins):
    found |= dict(wins=float((margins > 0).mean()), losses=float((margins < 0).mean()))
  return found


def gained(grades: np.ndarray, others: np.ndarray) -> np.ndarray:
  """The difference of two tables of `graded` on every prompt that both have [prompts]."""
  ours, theirs = keyed.both(grades, others)
  return ours['score'] - theirs['score']


def seconds(workdir) -> dict[str, float]:
  """{stage: seconds summed over all models}, of the stages that took at least half a second."""
  total = Counter()
  for owner in ('data', *MODELS):
    for name in catalog.NAMES:
      done = read(epath.Path(workdir) / owner / name / 'done.json', Done)
      total[name] += done.seconds if done else 0
  return {name: taken for name, taken in total.items() if taken >= 0.5}


def text_table(rows: list[dict], exclude: Collection[str] = PAGE_ONLY) -> str:
  """The rows as text: aligned tables without the columns `exclude`, with empty lines between."""
  return '\n\n'.join(map(aligned, tables(rows, exclude)))


def aligned(table: list[list[str]]) -> str:
  """Rows of cells as lines of text; each column is as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
                   for row in table)


def tables(rows: list[dict], exclude: Collection[str] = ()) -> list[list[list[str]]]:
  """The cells of each table: a row of headings, then one row per model.

  Leaves out the columns `exclude`, and all tables, columns and models without a number.
  """
  made = []
  for columns in TABLES.values():
    shown = [c for c in columns if c.heading not in exclude
             and any(row[c.heading] is not None for row in rows)]
    cells = [
        [row['model'], *(number(row[c.heading], c.heading, row.get(c.interval)) for c in shown)]
        for row in rows if any(row[c.heading] is not None for c in shown)]
    if cells:
      made.append([['model', *(c.heading for c in shown)], *cells])
  return made


def number(value: float | None, heading: str, interval=None) -> str:
  """A number with the digits of its column, and its interval if there is one.

  >>> number(0.6969, 'judge: pairwise', [0.66, 0.7301])
  '0.697 [0.660, 0.730]'
  """
  if value is None:
    return '-'
  digits = _DIGITS[heading]
  text = f'{value:.{digits}f}'
  if interval:
    text += f' [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]'
  return text


def lines(path, kind: type[records.Record]) -> list[records.Record]:
  """The records of a file; [] if there is no file.

  Ignores a last line without a newline, which a killed stage may leave.
  """
  return [*each(path, kind)]


def shards(folder, stem: str, kind: type[records.Record]) -> Iterator[records.Record]:
  """The records of all shards STEM-*-of-*.jsonl of a stage, finished or not, in turn."""
  for path in sorted(folder.glob(f'{stem}-*-of-*.jsonl')):
    yield from each(path, kind)


def each(path, kind: type[records.Record]) -> Iterator[records.Record]:
  """`lines` of which only one is in memory."""
  name = str(path)  # slow for paths of etils
  with records.reading(path, _AGAIN):
    if not path.exists():
      return
    with path.open('rb') as file:
      for number, line in records.numbered(file, name):
        if line.endswith(b'\n') and line.strip():
          yield records.parse(line, f'{name}:{number}', kind)


def read(path, kind: type[records.Record]) -> records.Record | None:
  """The JSON object of a file; None if there is no file. Raises InputError if it is damaged."""
  data = _bytes(path)
  return None if data is None else records.parse(data, str(path), kind)


def _bytes(path) -> bytes | None:
  with records.reading(path, _AGAIN):
    return path.read_bytes() if path.exists() else None


def _is_trained(folder) -> bool:
  """Whether the folder of a model has a finished model; M0 may be a converted one."""
  if (folder / 'model' / 'done.json').exists():
    return True
  return folder.name == 'm0' and (folder / 'model' / 'config.json').exists()
