"""The numbers of a run: a row a model, compared prompt by prompt, as a table; and the seconds of its stages."""
from collections import Counter
import json
import statistics

from etils import epath

from srlm_jax.data import scores

# Column of the table: (heading, stage, key of its JSON, digits).
COLUMNS = (
    ('oracle 0-5', 'oracle/oracle.json', 'score', 2),
    ('+-', 'oracle/oracle.json', 'standard_error', 2),
    ('greedy', 'oracle/oracle.json', 'greedy', 2),
    ('gain', '', 'gain', 2),
    ('of gain +-', '', 'gain_error', 2),
    ('wins', '', 'wins', 2),
    ('losses', '', 'losses', 2),
    ('answer chars', 'oracle/oracle.json', 'characters', 1),
    ('judge: pairwise', 'agreement/agreement.json', 'pairwise_accuracy', 3),
    ('ties', 'agreement/agreement.json', 'ties', 3),
    ('exact', 'agreement/agreement.json', 'exact_match', 3),
    ('spearman', 'agreement/agreement.json', 'spearman', 3),
    ('kendall', 'agreement/agreement.json', 'kendall_tau', 3),
    ('parsed', 'agreement/agreement.json', 'parse_rate', 3),
    ('pairs', 'pairs/done.json', 'pairs', 0),
    ('right', 'audit/audit.json', 'right', 2),
    ('wrong', 'audit/audit.json', 'wrong', 2),
    ('judge mean', 'audit/audit.json', 'judge_mean', 2),
    ('oracle mean', 'audit/audit.json', 'oracle_mean', 2),
)
DIGITS = {heading: digits for heading, _, _, digits in COLUMNS}
ON_PAGE = ('exact', 'spearman', 'kendall')  # columns that the terminal's table is too narrow for
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3', 'm4')  # in the order of their training
DATA = ('prompts', 'respond', 'judge', 'pairs')
STAGES = ('seeds', *DATA, 'judge_again', 'respond_older', 'judge_older', 'implicit', 'meta_judge', 'health', 'audit',
          'eft', 'reference', 'model', 'selection', 'judge_eval', 'agreement', 'answers', 'answers_greedy', 'oracle')


def of_models(workdir) -> list[dict]:
  """One row a model that was trained: every column's number, None where the run has none."""
  rows, last, base = [], {}, {}
  for model in MODELS:
    folder = epath.Path(workdir) / model
    if (folder / 'model' / 'done.json').exists() or model == 'm0' and (folder / 'model' / 'config.json').exists():
      mine = graded(folder)
      paired = compared(mine, last, base)
      last, base = mine, mine if model == 'sft' else base
      numbers = {heading: (read(folder / file) if file else paired).get(key) for heading, file, key, _ in COLUMNS}
      rows.append(dict(model=model, **numbers))
  return rows


def graded(folder) -> dict[str, float]:
  """MODEL/oracle -> {prompt id: score of the sampled answer}; {} where there is none."""
  return {r['prompt_id']: r['score'] for r in lines(folder / 'oracle' / 'graded.jsonl')}


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
    for name in STAGES:
      spent[name] += read(epath.Path(workdir) / owner / name / 'done.json').get('seconds', 0)
  return {name: taken for name, taken in spent.items() if taken >= 0.5}


def text_table(rows: list[dict], but=ON_PAGE) -> str:
  """The rows as aligned text; without the columns `but`, and those that have no number."""
  return aligned(cells(rows, but))


def aligned(table: list[list[str]]) -> str:
  """Rows of cells as lines of text, each column as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table)


def cells(rows: list[dict], but=()) -> list[list[str]]:
  """The same as a heading and a row a model."""
  shown = [h for h in DIGITS if h not in but and any(r[h] is not None for r in rows)]
  return [['model', *shown], *([row['model'], *(number(row[h], h) for h in shown)] for row in rows)]


def number(value: float | None, heading: str) -> str:
  """A column's number with its digits."""
  return '-' if value is None else f'{value:.{DIGITS[heading]}f}'


def lines(path) -> list[dict]:
  """The whole lines of a file, without the one at which a kill cut it; none where there is no file."""
  data = path.read_bytes() if path.exists() else b''
  return [json.loads(line) for line in data.split(b'\n')[:-1] if line.strip()]


def read(path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}
