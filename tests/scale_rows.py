"""The rows of the tables of docs/scale.md: programs of bench/aot.py, and the compiler's figures."""
from collections.abc import Iterator
import dataclasses
import re

import aot
from conftest import ROOT

DOCS = (ROOT / 'docs/scale.md').read_text()
# A program in the text and in a table without columns for pod and rows; the recomputation is named.
OTHERS = aot.Training('70b', 'dpo', 'v5p-256', (1, 16, 8), 'step')


@dataclasses.dataclass(frozen=True)
class Row:
  """A program, and what the compiler says of it."""
  program: aot.Training | aot.Sampler
  gib: float | None    # per chip; None if the table has no such column
  middle: float | None  # ms
  formula: float | None = None  # GiB per chip by formula, as docs/scale.md has it

  @property
  def title(self):
    remat = f' {self.program.remat}' if isinstance(self.program, aot.Training) else ''
    return f'{aot.title(self.program)}{remat}'


def rows() -> list[Row]:
  """All programs of the page that have GiB or milliseconds."""
  lines = tables(DOCS)
  others = [(line['recomputed'], line['GiB']) for line in lines
            if line.get('residual stream') == 'split over the sequence']
  others += re.findall(r'\(`(none)`\)[^`]* and\s+([\d.]+) GiB', DOCS)
  return in_tables(DOCS) + [Row(dataclasses.replace(OTHERS, remat=remat), float(gib), None)
                            for remat, gib in others]


def in_tables(text: str) -> list[Row]:
  """All rows that name a program, a pod and rows, and have GiB or milliseconds."""
  found = []
  for line in tables(text):
    gib = line.get('total') or line.get('total, GiB') or line.get('GiB')
    middle = line.get('middle, ms')
    line['pod'] = line.get('pod') or line.get('GPUs')
    if line['pod'] and {'program', 'rows'} <= line.keys() and (gib or middle):
      found.append(Row(program(line), *map(_number, (gib, middle, line.get('by formula')))))
  return found


def on_gpus(fits: bool) -> list[Row]:
  """The rows of the table of what fits on GPUs, or of what does not."""
  fitting, rest = re.search(r'\nFit:\n(.*)\nDo not fit:\n(.*?)\n#', DOCS, re.DOTALL).groups()
  return in_tables(fitting if fits else rest)


def program(line: dict[str, str]) -> aot.Training | aot.Sampler:
  """A line of a table -> the program; ValueError for one that aot does not have, at any size."""
  name, size = line['program'], line['program'].split()[0]
  known = (*aot.TRAINING, *aot.RECIPES, *aot.SAMPLING, *aot.GPU_TRAINING, *aot.GPU_TOO_LARGE,
           *aot.GPU_SAMPLING)
  alike = [p for p in known if p.name.replace(p.size, size, 1) == name]
  known = min(alike, key=lambda p: (p.pod != line['pod'], p.size != size))
  mesh = known.mesh
  if 'data, fsdp, tensor' in line:
    mesh = tuple(map(int, line['data, fsdp, tensor'].split(',')))
  made = dataclasses.replace(known, size=size, pod=line['pod'], mesh=mesh)
  if isinstance(made, aot.Sampler):
    assert int(line['rows']) == made.rows
    return made
  # The table of the largest batches, which has no column for it, is about `full`.
  remat = line.get('remat') or ('full' if 'total before, GiB' in line else '')
  made = dataclasses.replace(made, rows=int(line['rows']), remat=remat)
  return dataclasses.replace(made, remat=made.config.remat)


def tables(text: str) -> Iterator[dict[str, str]]:
  """Yields {heading: cell} of every line of the tables of a Markdown text.

  >>> list(tables('| a | b |\\n|---|---|\\n| 1 | 2 |'))
  [{'a': '1', 'b': '2'}]
  """
  for table in re.findall(r'(?:^\|.*\n?)+', text, re.MULTILINE):
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    heading, _, *lines = cells
    for line in lines:
      yield dict(zip(heading, line, strict=True))


def _number(cell: str | None) -> float | None:
  """
  >>> _number('43.5 of 95'), _number('1,126'), _number(None)
  (43.5, 1126.0, None)
  """
  return float(cell.split()[0].replace(',', '')) if cell else None
