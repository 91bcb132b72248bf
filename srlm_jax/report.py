"""What a run found: the table of all models, and one HTML page of tables, plots and samples."""
import json

from etils import epath

# Column of the table: (heading, stage, key of its JSON, digits).
COLUMNS = (
    ('oracle 0-5', 'oracle/oracle.json', 'score', 2),
    ('+-', 'oracle/oracle.json', 'standard_error', 2),
    ('answer chars', 'oracle/oracle.json', 'characters', 1),
    ('judge: pairwise', 'agreement/agreement.json', 'pairwise_accuracy', 3),
    ('ties', 'agreement/agreement.json', 'ties', 3),
    ('exact', 'agreement/agreement.json', 'exact_match', 3),
    ('spearman', 'agreement/agreement.json', 'spearman', 3),
    ('kendall', 'agreement/agreement.json', 'kendall_tau', 3),
    ('parsed', 'agreement/agreement.json', 'parse_rate', 3),
    ('pairs', 'pairs/done.json', 'pairs', 0),
)


def results(workdir, models: list[str]) -> list[dict]:
  """One row a model that was trained: every column's number, None where the run has none."""
  rows = []
  for model in models:
    folder = epath.Path(workdir) / model
    if (folder / 'model' / 'config.json').exists():
      rows.append(dict(model=model, **{heading: _read(folder / file).get(key) for heading, file, key, _ in COLUMNS}))
  return rows


def text_table(rows: list[dict]) -> str:
  """The rows as aligned text, columns without any number left out."""
  shown = [(heading, digits) for heading, _, _, digits in COLUMNS if any(r[heading] is not None for r in rows)]
  lines = [['model', *(heading for heading, _ in shown)]]
  for row in rows:
    lines.append([row['model'], *('-' if row[h] is None else f'{row[h]:.{d}f}' for h, d in shown)])
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def counts(dropped: dict) -> str:
  return ', '.join(f'{n} {why}' for why, n in dropped.items()) or 'nothing dropped'


def write(workdir, rows, stopped: str):
  pass


def _read(path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}
