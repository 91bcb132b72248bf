"""Everything that the report shows, as plain data: `read` makes it, `page` renders it."""
from collections.abc import Sequence
import dataclasses

from etils import epath

from srlm_jax import InputError
from srlm_jax.report import compare, paper, results, rounds, run as runs, summaries
from srlm_jax.report.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
  """What the report shows: one run, several runs side by side, or the arms of studies.

  `runs` are in the order of the workdirs; a study gives `arms` and no runs.
  """
  title: str
  runs: tuple[Run, ...]
  arms: tuple[compare.Arm, ...]            # a study's runs with several seeds, as one
  across: tuple[compare.Across, ...]       # from the first run, or between two arms
  refused: tuple[str, ...]                 # why runs cannot be compared: one sentence each
  paper: tuple[paper.Table, ...]           # see paper.tables


def read(workdirs: Sequence) -> Contents:
  """Reads one or several workdirs of runs, or one folder of studies.

  Raises InputError for a folder without a model, a folder that is given twice and a damaged file.
  """
  folders = [epath.Path(workdir) for workdir in workdirs]
  if len(folders) == 1 and (found := compare.study(folders[0])):
    return _study(folders[0], found)
  for folder in folders:
    if compare.study(folder):
      raise InputError(f'--workdir={folder} is the folder of a study; give it alone')
  named = _names(folders)
  has_control = any(rounds.is_control(folder) for folder in folders)
  made, across, refused = [], [], []
  for name, folder in named.items():
    run = _run(folder, name, has_control)
    if made:
      found, why = compare.from_first(made[0], run)
      across += found
      refused += [why] if why else []
      run = dataclasses.replace(run, evaluated={})  # the tables are large
    made.append(dataclasses.replace(run, ranked=None))
  return Contents(title=', '.join(named), runs=tuple(made), arms=(), across=tuple(across),
                  refused=tuple(refused), paper=paper.tables())


def of_run(workdir, rows: list[dict], stopped: str) -> Contents:
  """The contents of one run, whose rows (`results.of_models`) the loop has just made.

  stopped: why the loop stopped early, or ''.
  """
  folder = epath.Path(workdir)
  run = runs.read(folder, folder.name, rows, stopped, has_control=False)
  return Contents(title=run.name, runs=(run,), arms=(), across=(), refused=(),
                  paper=paper.tables())


def _study(folder, found: dict[str, dict[int, epath.Path]]) -> Contents:
  every = [run for by_seed in found.values() for run in by_seed.values()]
  has_control = any(map(rounds.is_control, every))
  made = {name: {seed: _run(run, run.name, has_control) for seed, run in by_seed.items()}
          for name, by_seed in found.items()}
  across, refused = compare.between_arms(made)
  arms = compare.arms(folder, made, has_control)
  return Contents(title=folder.name, runs=(), arms=tuple(arms), across=tuple(across),
                  refused=tuple(refused), paper=paper.tables())


def _run(folder, name: str, has_control: bool) -> Run:
  """Raises InputError if the folder has no model."""
  rows, before = results.of_models(folder), summaries.run_results(folder)
  if not rows:
    raise InputError(f'{folder} contains no model; make one with the loop: '
                     f'python -m srlm_jax.loop --help')
  is_current = [row.model for row in before.models] == [row['model'] for row in rows]
  return runs.read(folder, name, rows, before.stopped if is_current else '', has_control)


def _names(folders: list[epath.Path]) -> dict[str, epath.Path]:
  """Folders by their names; by their paths, if two have the same name."""
  paths = [str(folder) for folder in folders]
  for path in paths:
    if paths.count(path) > 1:
      raise InputError(f'--workdir={path} is given twice; give every run once')
  names = [folder.name for folder in folders]
  return dict(zip(names if len({*names}) == len(names) else paths, folders, strict=True))
