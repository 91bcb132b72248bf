"""The numbers of a run: a row a model, compared prompt by prompt, as a table; and the seconds of its stages."""
from collections import Counter
import statistics

from etils import epath

from srlm_jax import catalog, InputError, records
from srlm_jax.config import MODELS
from srlm_jax.reward import scores

# Columns of the tables, by table: (heading, stage, key of its JSON, digits).
TABLES = dict(
    answers=(
        ('oracle 0-5', 'oracle/oracle.json', 'score', 2),
        ('+- prompts', 'oracle/oracle.json', 'standard_error', 2),
        ('greedy', 'oracle/oracle.json', 'greedy', 2),
        ('gain', '', 'gain', 2),
        ('of gain +- prompts', '', 'gain_error', 2),
        ('wins', '', 'wins', 2),
        ('losses', '', 'losses', 2),
        ('answer chars', 'oracle/oracle.json', 'characters', 1)),
    judge=(
        ('judge: pairwise', 'agreement/agreement.json', 'pairwise_accuracy', 3),
        ('of pairs', 'agreement/agreement.json', 'pairs', 0),
        ('of prompts', 'agreement/agreement.json', 'prompts', 0),
        ('unscored as errors', 'agreement/agreement.json', 'pairwise_accuracy_all', 3),
        ('of all pairs', 'agreement/agreement.json', 'pairs_all', 0),
        ('ties', 'agreement/agreement.json', 'ties', 3),
        ('exact', 'agreement/agreement.json', 'exact_match', 3),
        ('spearman', 'agreement/agreement.json', 'spearman', 3),
        ('kendall', 'agreement/agreement.json', 'kendall_tau', 3),
        ('parsed', 'agreement/agreement.json', 'parse_rate', 3),
        ('ceiling', 'oracle/oracle.json', 'ceiling', 3),
        ('oracle: pairwise', 'oracle/oracle.json', 'judge_pairwise', 3),
        ('of graded pairs', 'oracle/oracle.json', 'judge_pairs', 0),
        ('oracle: exact', 'oracle/oracle.json', 'judge_exact', 3),
        ('of replies', 'oracle/oracle.json', 'judge_replies', 0)),
    data=(
        ('EFT examples', 'eft/done.json', 'examples', 0),
        ('pairs', 'pairs/done.json', 'pairs', 0),
        ('right', 'audit/audit.json', 'right', 2),
        ('wrong', 'audit/audit.json', 'wrong', 2),
        ('judge mean', 'audit/audit.json', 'judge_mean', 2),
        ('oracle mean', 'audit/audit.json', 'oracle_mean', 2)))
COLUMNS = tuple(column for table in TABLES.values() for column in table)
DIGITS = {heading: digits for heading, _, _, digits in COLUMNS}
INTERVAL = ' 95 %'  # after a heading: the key of its interval in a row
ON_PAGE = ('exact', 'spearman', 'kendall')  # columns that the terminal's table is too narrow for
DATA = ('prompts', 'respond', 'judge', 'pairs')


def of_models(workdir) -> list[dict]:
  """One row a model that was trained: every column's number, None where the run has none."""
  rows, last, base = [], {}, {}
  for model in MODELS:
    folder = epath.Path(workdir) / model
    if (folder / 'model' / 'done.json').exists() or model == 'm0' and (folder / 'model' / 'config.json').exists():
      mine = graded(folder)
      paired = compared(mine, last, base)
      last, base = mine, mine if model == 'sft' else base
      found = {file: read(folder / file) if file else paired for _, file, _, _ in COLUMNS}
      numbers = {heading: found[file].get(key) for heading, file, key, _ in COLUMNS}
      intervals = {heading + INTERVAL: interval for heading, file, key, _ in COLUMNS
                   if (interval := found[file].get('intervals', {}).get(key))}
      rows.append(dict(model=model, **numbers, **intervals))
  return rows


def graded(folder) -> dict[str, float]:
  """MODEL/oracle -> {prompt id: score of the sampled answer}; {} where there is none."""
  return {r['prompt_id']: r['score'] for r in lines(folder / 'oracle' / 'graded.jsonl', 'prompt_id', 'score')}


def compared(mine: dict[str, float], last: dict[str, float], base: dict[str, float]) -> dict:
  """Graded answers of a model prompt by prompt: the mean gain over the model before it with its standard error, and the
  shares of prompts on which it wins and loses against the SFT baseline; {} where there is nothing to compare."""
  found = {}
  if mine and last:
    gains = [mine[p] - last[p] for p in mine]
    found |= dict(gain=statistics.fmean(gains), gain_error=scores.standard_error(gains))
  if mine and base:
    found |= dict(wins=statistics.fmean(mine[p] > base[p] for p in mine),
                  losses=statistics.fmean(mine[p] < base[p] for p in mine))
  return found


def seconds(workdir) -> dict[str, float]:
  """What every kind of stage took, of all models together."""
  spent = Counter()
  for owner in ('data', *MODELS):
    for name in catalog.NAMES:
      spent[name] += read(epath.Path(workdir) / owner / name / 'done.json').get('seconds', 0)
  return {name: taken for name, taken in spent.items() if taken >= 0.5}


def text_table(rows: list[dict], but=ON_PAGE) -> str:
  """The rows as aligned text, one table after another, without the columns `but`."""
  return '\n\n'.join(map(aligned, tables(rows, but)))


def aligned(table: list[list[str]]) -> str:
  """Rows of cells as lines of text, each column as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table)


def tables(rows: list[dict], but=()) -> list[list[list[str]]]:
  """The cells of each of TABLES that has a number: a line of headings, and one for each model with a number. Columns
  without a number and those of `but` are left out."""
  made = []
  for columns in TABLES.values():
    shown = [h for h, *_ in columns if h not in but and any(r[h] is not None for r in rows)]
    lines = [[row['model'], *(number(row[h], h, row.get(h + INTERVAL)) for h in shown)]
             for row in rows if any(row[h] is not None for h in shown)]
    made += [[['model', *shown], *lines]] if lines else []
  return made


def number(value: float | None, heading: str, interval=None) -> str:
  """A column's number with its digits, and its interval if it has one.

  >>> number(0.6969, 'judge: pairwise', [0.66, 0.7301])
  '0.697 [0.660, 0.730]'
  """
  if value is None:
    return '-'
  digits = DIGITS[heading]
  return f'{value:.{digits}f}' + (f' [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]' if interval else '')


def lines(path, *fields: str, optional=()) -> list[dict]:
  """The records of a file, checked as by `records.parse`; [] where there is no file.

  A last line that a kill cut, which has no newline, is left out.
  """
  with records.reading(path, 'delete it, and run the loop again'):
    data = path.read_bytes() if path.exists() else b''
  return [records.parse(line, f'{path}:{number}', fields, optional)
          for number, line in enumerate(data.split(b'\n')[:-1], 1) if line.strip()]


def read(path) -> dict:
  """The JSON object of a file; {} where there is no file."""
  advice = 'mend or delete it, and run the loop again'
  with records.reading(path, advice):
    if not path.exists():
      return {}
  found = records.read_json(path, advice)
  if not isinstance(found, dict):
    raise InputError(f'{path}: a {type(found).__name__} where a JSON object belongs; {advice}')
  return found
