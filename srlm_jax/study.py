"""Runs the loop with several seeds, unchanged or with one change, and prints means over the seeds.

  python -m srlm_jax.study --workdir=runs/study --seeds=5
  python -m srlm_jax.study --workdir=runs/study --seeds=3 --ablation=oracle_judge

The runs are WORKDIR/loop-0, loop-1, .. or WORKDIR/ABLATION-0, ..; finished runs are only read. The
data and the models before the first that a change affects are copied from the loop with the same
seed, if that exists. A study without a change, such as one more model (--last=m4 --name=fourth),
copies all models. The last table has one line per study in the folder, compared with the loops of
the same seeds.

A difference has two standard errors. The one over prompts is the uncertainty for other prompts and
the same trained models. The one over seeds is the uncertainty for other trained models and the same
prompts. For other seeds and other prompts, the variances add up (`+- both`). The 95 % interval is
Student's t interval of the mean over seeds, for differences paired by seed.
"""
from collections.abc import Iterable
import dataclasses
import math
import statistics

from absl import flags
from etils import epath
import numpy as np

from srlm_jax import ablations, cli, config as configs, hosts, InputError, loop, stage, storage
from srlm_jax.report import estimates, keyed, results
from srlm_jax.reward import scores

LOOP = 'loop'  # the name of the runs without a change
# Columns of the tables in `results` whose means are reported.
COLUMNS = ('oracle 0-5', 'greedy', 'wins', 'losses', 'answer chars', 'judge: pairwise', 'of pairs',
           'of prompts', 'unscored as errors', 'ceiling', 'oracle: pairwise', 'of graded pairs',
           'oracle: all pairs', 'oracle: ties', 'oracle: exact', 'of replies', 'EFT examples',
           'pairs', 'right', 'wrong', 'judge pairs', 'nearer', 'farther', 'judge mean',
           'oracle mean')
# Compared with those of M1, and of the same model in the loops.
JUDGE = ('judge: pairwise', 'oracle: all pairs', 'oracle: exact')
_OVERVIEW = ('wins', 'losses', 'pairs', 'right', 'judge: pairwise', 'of pairs', 'oracle: all pairs',
             'oracle: exact')
# Headings of the cells of `_difference` after the mean.
DIFFERENCE = ('+- prompts', '+- seeds', '+- both', '95 % over seeds', 'range of seeds')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """WORKDIR/NAME.json: the rows of `table`, and of which runs."""
  name: str
  seeds: int
  changes: list[str]
  models: list[dict]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """A point of the rubric in oracle.json; a share is None without such replies."""
  point: str
  kept: float | None
  caught: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of instructions in oracle.json; the share is None without pairs."""
  pairwise: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """What `parts` reads from oracle.json."""
  judge_points: list[Point] = dataclasses.field(default_factory=list)
  judge_families: dict[str, Family] = dataclasses.field(default_factory=dict)


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the runs.', required=True)
  flags.DEFINE_enum('size', 'tiny', configs.SIZES, 'Size of the model, the data and the training.')
  flags.DEFINE_string('m0', '', 'Hugging Face folder of M0 (tiny and hard have their own).')
  flags.DEFINE_string('data', '', 'OASST1 files (tiny and hard make their own data).')
  flags.DEFINE_integer('seeds', 5, 'Number of runs; the seeds are 0, 1, ..', lower_bound=1)
  flags.DEFINE_enum('ablation', '', ['', *ablations.ABLATIONS],
                    'A change from srlm_jax/ablations.py.')
  flags.DEFINE_string('name', '', 'Name of the runs; by default the ablation, or loop.')
  flags.DEFINE_enum('last', 'm3', configs.MODELS[2:], 'The last model to train.')
  flags.DEFINE_multi_string('set', [], 'Changes a config value, as in the loop.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  changes = [*ablations.changes(f.ablation, f.size), *f.set]
  name = f.name or f.ablation or LOOP
  if changes and name == LOOP:
    raise InputError('these runs differ from the loop; give them another name: --name=NAME')
  folder = epath.Path(f.workdir)
  cli.cache_compilations(folder)
  runs = [folder / f'{name}-{seed}' for seed in range(f.seeds)]
  loops = [folder / f'{LOOP}-{seed}' for seed in range(f.seeds)]
  shared = unchanged_parts(changes) if name != LOOP else ()
  for seed, (run, unchanged) in enumerate(zip(runs, loops, strict=True)):
    hosts.log(f'{run}:')
    take(unchanged, run, shared)
    loop.run(f.size, run, f.m0, f.data, [*changes, f'seed={seed}'], f.last)
  rows = table(runs, loops)
  path = folder / f'{name}.json'
  stage.write_json(path, dataclasses.asdict(
      Study(name=name, seeds=f.seeds, changes=changes, models=rows)))
  hosts.log(f'\n{name}, {f.seeds} seeds\n{text(rows)}\n\n{overview(folder)}\n{path}')


def unchanged_parts(changes) -> tuple[str, ...]:
  """The data and the models before the first that a change affects; () if that is M0.

  >>> unchanged_parts(['m3:sampler=m1', 'm2,m3:judge.n=1'])
  ('data', 'm0', 'sft', 'm1')
  """
  affected = {model for change in changes for model in loop.affected(change)}
  count = next((i for i, model in enumerate(configs.MODELS) if model in affected),
               len(configs.MODELS))
  return ('data', *configs.MODELS[:count]) if count else ()


def take(source, run, parts):
  """Copies the `parts` of a run that exist in `source` and not, or not completely, in `run`.

  The stages of the run check that the copies fit its config.
  """
  for part in parts:
    is_cut_off = storage.is_remote(run) and (run / f'{part}.partial').exists()
    is_there = (run / part).exists() and not is_cut_off
    if (source / part).exists() and not is_there:
      with storage.making_folder(run / part) as folder:
        storage.copy_tree(source / part, folder)


def table(runs, loops) -> list[dict]:
  """The folders of the runs and of the loops with the same seeds -> one row per model.

  A row has the means over the runs (`means`) and three comparisons. gain: oracle score minus that
  of the previous model. against: oracle score minus that of the same model in the loops; None for
  the loops themselves. judge: for each column of JUDGE, the value minus that of M1 in the same run.
  judge_against: the same, minus that of the same model in the loop with the same seed. Models up to
  M1 have no `judge`. points, families: see `parts`.
  """
  found, unchanged = ([{row['model']: row for row in results.of_models(run)} for run in folders]
                      for folders in (runs, loops))
  made = [model for model in configs.MODELS if any(model in by_model for by_model in found)]
  rows = []
  for previous, model in zip(['', *made[:-1]], made, strict=True):
    rows.append(dict(
        model=model, **means(model, found), **parts([run / model for run in runs]),
        gain=paired(runs, model, runs, previous),
        against=paired(runs, model, loops, model) if runs != loops else None,
        judge={heading: over_seeds(_differences(heading, found, model, found, 'm1'))
               for heading in JUDGE} if model in configs.MODELS[3:] else {},
        judge_against={heading: over_seeds(_differences(heading, found, model, unchanged, model))
                       for heading in JUDGE} if runs != loops else {}))
  return rows


def means(model: str, found: list[dict[str, dict]]) -> dict:
  """The means over the runs that have a model, and their standard errors over seeds (`errors`).

  `found`: {model: row of results.of_models} of each run. The mean of a column without values is
  None.
  """
  rows = [by_model[model] for by_model in found if model in by_model]
  values = {heading: [row[heading] for row in rows if row[heading] is not None]
            for heading in COLUMNS}
  return dict(
      runs=len(rows),
      **{heading: statistics.fmean(v) if v else None for heading, v in values.items()},
      errors={heading: scores.standard_error(v) for heading, v in values.items() if len(v) > 1})


def parts(folders) -> dict[str, dict[str, float]]:
  """The judge by point of the rubric and by family: means over the folders of a model.

  -> points, {POINT: kept or POINT: caught: share}, and families, {pairs: FAMILY: share}. The shares
  are those of `sandbox/oracle.py`.
  """
  judged = [results.read(folder / 'oracle' / 'oracle.json', Judged) or Judged()
            for folder in folders]
  return dict(
      points=_share_means({f'{point.point}: {key}': getattr(point, key)
                           for key in ('kept', 'caught') for point in found.judge_points}
                          for found in judged),
      families=_share_means({f'pairs: {name}': family.pairwise
                             for name, family in found.judge_families.items()}
                            for found in judged))


def paired(runs, model: str, others, other: str) -> dict | None:
  """The oracle score of `model` in `runs` minus that of `other` in `others`, paired by prompt.

  Adds to the fields of `over_seeds`: over_prompts, the standard error over prompts of the mean of
  the runs; least and most, the range of the means of single runs. Uses the runs that have both
  models; None if there is none.
  """
  found, gains = [], []  # of each run: its table of grades, and the differences [prompts]
  for run, against in zip(runs, others, strict=True) if other else ():
    mine, theirs = results.graded(run / model), results.graded(against / other)
    if len(mine) and len(theirs):
      if not keyed.same(mine, theirs):
        raise InputError(f'{run / model} and {against / other} have graded answers to different '
                         f'prompts; compare runs with the same data')
      found.append(mine)
      gains.append(results.gained(mine, theirs))
  if not gains:
    return None
  if not all(keyed.same(mine, found[0]) for mine in found):
    raise InputError(f'{runs[0]} and the runs with other seeds have graded answers to different '
                     f'prompts; restore the data of these runs')
  sums, counts = keyed.totals(np.concatenate([mine['id'] for mine in found]),
                              np.concatenate(gains))
  by_run = [statistics.fmean(gain) for gain in gains]
  return dict(over_seeds(by_run), over_prompts=scores.standard_error((sums / counts).tolist()),
              least=min(by_run), most=max(by_run))


def over_seeds(values: list[float]) -> dict | None:
  """One difference per seed -> mean, standard error (over_seeds) and Student's 95 % interval.

  The last two are None for a single seed. The result is None for no seed.
  """
  if not values:
    return None
  found, several = estimates.mean(([value] for value in values), 'seeds'), len(values) > 1
  return dict(mean=found.value, over_seeds=scores.standard_error(values) if several else None,
              interval=[found.low, found.high] if several else None)


def text(rows: list[dict]) -> str:
  """The rows of `table` as text: means with standard errors, gains, and the judge."""
  tables = []
  for columns in results.TABLES.values():
    shown = [c.heading for c in columns
             if c.heading in COLUMNS and any(row[c.heading] is not None for row in rows)]
    cells = [[row['model'], str(row['runs']), *(_mean(row, heading) for heading in shown)]
             for row in rows if any(row[heading] is not None for heading in shown)]
    tables.append([['model', 'runs', *shown], *cells])
  tables.append([['model', 'gain', *DIFFERENCE],
                 *([row['model'], *_difference(row['gain'])] for row in rows if row['gain'])])
  for key in ('points', 'families'):
    shown = list(dict.fromkeys(heading for row in rows for heading in row[key]))
    tables.append([['model', *shown], *(
        [row['model'], *(f'{row[key][h]:.2f}' if h in row[key] else '-' for h in shown)]
        for row in rows if row[key])])
  for key, other in (('judge', 'm1'), ('judge_against', 'the loop')):
    judge = [['model']]
    for heading in JUDGE:
      judge[0] += [f'{heading}, against {other}', '+- seeds', '95 % over seeds']
    judge += [[row['model'], *(cell for heading in JUDGE for cell in _over_seeds(
        row[key][heading]))] for row in rows if _differs(row[key])]
    tables.append(judge)
  return '\n\n'.join(results.aligned(table) for table in tables if len(table) > 1)


def overview(folder) -> str:
  """One line per study in the folder as text, the loop first.

  Shows the score of each model and, for the last model, the difference from the loops of the same
  seeds and other means.
  """
  found = {path: study for path in folder.glob('*.json') if (study := results.read(path, Study))}
  known = [row.get('model') for study in found.values() for row in study.models]
  models = [model for model in configs.MODELS[2:] if model in known]
  lines = [['study', 'seeds', *models, 'above the loop', *DIFFERENCE, *_OVERVIEW]]
  for path, study in sorted(found.items(), key=lambda item: (item[1].name != LOOP, item[1].name)):
    try:
      rows = {row['model']: row for row in study.models}
      last = study.models[-1]
      scored = [results.number(rows.get(m, {}).get('oracle 0-5'), 'oracle 0-5') for m in models]
      lines.append([study.name, str(study.seeds), *scored, *_difference(last['against']),
                    *(_mean(last, heading) for heading in _OVERVIEW)])
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
      raise InputError(f'{path}: not the rows of a study ({type(error).__name__}: {error}); delete '
                       f'it, and run that study again') from error
  return results.aligned(lines)


def _differences(heading: str, found: list[dict[str, dict]], model: str,
                 others: list[dict[str, dict]], other: str) -> list[float]:
  """The value of `model` minus that of `other` in the run with the same seed, where both exist."""
  pairs = [(ours[model][heading], theirs[other][heading])
           for ours, theirs in zip(found, others, strict=True)
           if model in ours and other in theirs]
  return [a - b for a, b in pairs if a is not None and b is not None]


def _share_means(runs: Iterable[dict[str, float | None]]) -> dict[str, float]:
  """The shares of each run -> the mean of each share over the runs that have it."""
  values = {}
  for shares in runs:
    for heading, share in shares.items():
      values.setdefault(heading, []).extend([] if share is None else [share])
  return {heading: statistics.fmean(found) for heading, found in values.items() if found}


def _differs(found: dict[str, dict | None]) -> bool:
  """Whether there is a difference in one run; a model that was copied from the loop has none."""
  return any(x and (x['mean'] or x['over_seeds']) for x in found.values())


def _mean(row: dict, heading: str) -> str:
  """The cell of a mean, with its standard error if there is one."""
  value = results.number(row.get(heading), heading)  # older studies lack some columns
  if heading not in row['errors']:
    return value
  return f'{value} +-{results.number(row["errors"][heading], heading)}'


def _over_seeds(found: dict | None) -> list[str]:
  """The cells of a difference over seeds: mean, standard error and interval."""
  if not found:
    return ['-', '-', '-']
  mean = f'{found["mean"]:+.3f}'
  if found['interval'] is None:
    return [mean, '-', '-']
  low, high = found['interval']
  return [mean, f'{found["over_seeds"]:.3f}', f'{low:+.3f} to {high:+.3f}']


def _difference(found: dict | None) -> list[str]:
  """The cells of a result of `paired`: the mean, then those of DIFFERENCE."""
  if not found:
    return ['-'] * (1 + len(DIFFERENCE))
  mean, seeds, interval = _over_seeds(found)
  both = '-'
  if found['over_seeds'] is not None:
    both = f'{math.hypot(found["over_prompts"], found["over_seeds"]):.3f}'
  return [mean, f'{found["over_prompts"]:.3f}', seeds, both, interval,
          f'{found["least"]:+.2f} to {found["most"]:+.2f}']


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
