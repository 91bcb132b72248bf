"""The tables of the paper (Yuan et al. 2024, arXiv:2401.10020), to show beside those of a run."""
import dataclasses
import functools

from etils import epath
import msgspec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table of the paper. `rows`: {name: a cell per column}; a cell is None where there is none."""
  title: str
  label: str                  # whose numbers these are, and by which judge
  unit: str
  columns: tuple[str, ...]
  rows: dict[str, tuple[float | None, ...]]
  measures: tuple[str, ...]   # keys of measures.MEASURES that the table is about
  note: str = ''

  def __post_init__(self):
    if bad := [name for name, cells in self.rows.items() if len(cells) != len(self.columns)]:
      raise ValueError(f'{self.title}: {bad} have another number of cells than columns')


@functools.cache
def tables() -> tuple[Table, ...]:
  """All tables, from paper.json."""
  path = epath.resource_path('srlm_jax') / 'report' / 'paper.json'
  return tuple(msgspec.json.decode(path.read_bytes(), type=list[Table]))
