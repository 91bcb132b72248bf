"""The numbers of a run: a row a model, compared prompt by prompt, as a table; and the seconds of its stages."""
from collections import Counter
import json
import statistics

from etils import epath

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
ON_PAGE = ('exact', 'spearman', 'kendall')  # columns that the terminal's table is too narrow for
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3', 'm4')  # in the order of their training
DATA = ('prompts', 'respond', 'judge', 'pairs')
STAGES = ('seeds', *DATA, 'judge_again', 'respond_older', 'judge_older', 'implicit', 'meta_judge', 'health', 'audit',
          'eft', 'model', 'judge_eval', 'agreement', 'answers', 'answers_greedy', 'oracle')


def of_models(workdir, models: list[str]) -> list[dict]:
  """One row a model that was trained: every column's number, None where the run has none."""
  rows = []
  for model in models:
    folder = epath.Path(workdir) / model
    if (folder / 'model' / 'done.json').exists() or model == 'm0' and (folder / 'model' / 'config.json').exists():
      paired = compared(workdir, model, [r['model'] for r in rows])
      numbers = {heading: (read(folder / file) if file else paired).get(key) for heading, file, key, _ in COLUMNS}
      rows.append(dict(model=model, **numbers))
  return rows


def compared(workdir, model: str, before: list[str]) -> dict:
  """Graded answers of a model prompt by prompt: the mean gain over the model before it with its standard error, and the
  shares of prompts on which it wins and loses against the SFT baseline; {} where there is nothing to compare."""
  graded = {m: {r['prompt_id']: r['score'] for r in lines(epath.Path(workdir) / m / 'oracle' / 'graded.jsonl')}
            for m in (*before, model)}
  mine, found = graded.pop(model), {}
  if mine and before and (last := graded[before[-1]]):
    gains = [mine[p] - last[p] for p in mine if p in last]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    found = dict(gain=statistics.fmean(gains), gain_error=error)
  if mine and (base := graded.get('sft')):
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
  lines = cells(rows, but)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def cells(rows: list[dict], but=()) -> list[list[str]]:
  shown = [(h, digits) for h, _, _, digits in COLUMNS if h not in but and any(r[h] is not None for r in rows)]
  return [['model', *(heading for heading, _ in shown)], *(
      [row['model'], *('-' if row[h] is None else f'{row[h]:.{d}f}' for h, d in shown)] for row in rows)]


def lines(path) -> list[dict]:
  """The whole lines of a file, without the one at which a kill cut it; none where there is no file."""
  data = path.read_bytes() if path.exists() else b''
  return [json.loads(line) for line in data.split(b'\n')[:-1] if line.strip()]


def read(path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}
