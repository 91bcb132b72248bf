"""Runs the loop for several seeds, whole or with one change, and prints the means over the seeds.

  python -m srlm_jax.study --workdir=runs/study --seeds=5
  python -m srlm_jax.study --workdir=runs/study --seeds=3 --ablation=oracle_judge

The runs are WORKDIR/loop-0, loop-1, .., or WORKDIR/ABLATION-0, ..; those that are done are only read. A change of M2
and later alone takes data, M0, SFT and M1 from the loop of the same seed, where that is there; one more model
(--last=m4 --name=fourth) takes all. Ends with a line for every study of the folder, each compared with the loops of the
same seeds.

A difference has two standard errors. The one over prompts says how far it would move with other prompts and the same
trained models; the one over seeds, with other trained models and the same prompts. With other seeds and other prompts
at once the variances add up (`+- both`). The 95 % interval is Student's t interval of the mean over seeds, of
differences paired by seed.
"""
import math
import shutil
import statistics

from absl import flags
from etils import epath
from scipy import stats

from srlm_jax import ablations, cli, config as configs, hosts, InputError, loop, stage
from srlm_jax.report import results
from srlm_jax.reward import scores

LOOP = 'loop'  # the name of the runs without a change
SHARED = ('data', 'm0', 'sft', 'm1')
COLUMNS = ('oracle 0-5', 'greedy', 'wins', 'losses', 'answer chars', 'judge: pairwise', 'of pairs', 'of prompts',
           'unscored as errors', 'ceiling', 'oracle: pairwise', 'of graded pairs', 'oracle: exact', 'of replies',
           'EFT examples', 'pairs', 'right', 'wrong', 'judge mean', 'oracle mean')  # of the loop's tables
JUDGE = ('judge: pairwise', 'oracle: exact')  # compared with M1's
DIFFERENCE = ('+- prompts', '+- seeds', '+- both', '95 % over seeds', 'in a seed')  # headings of `_difference`


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the runs.', required=True)
  flags.DEFINE_enum('size', 'tiny', configs.SIZES, 'Of the model and of everything else.')
  flags.DEFINE_string('m0', '', 'Hugging Face folder of M0 (tiny has its own).')
  flags.DEFINE_string('data', '', 'OASST1 files (tiny makes its own).')
  flags.DEFINE_integer('seeds', 5, 'Runs, of the seeds 0, 1, ..', lower_bound=1)
  flags.DEFINE_enum('ablation', '', ['', *ablations.ABLATIONS], 'One change: srlm_jax/ablations.py.')
  flags.DEFINE_string('name', '', 'What the runs are called; by default the ablation, or loop.')
  flags.DEFINE_enum('last', 'm3', ['m1', 'm2', 'm3', 'm4'], 'The last model to train.')
  flags.DEFINE_multi_string('set', [], 'Changes a knob, as in the loop.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  changes = [*ablations.changes(f.ablation, f.size), *f.set]
  name = f.name or f.ablation or LOOP
  if changes and name == LOOP:
    raise InputError('these runs differ from the loop; call them something else: --name=NAME')
  folder = epath.Path(f.workdir)
  cli.keep_compiled(folder)
  runs = [folder / f'{name}-{seed}' for seed in range(f.seeds)]
  for seed, run in enumerate(runs):
    hosts.say(f'{run}:')
    if name != LOOP and all(change.startswith('m2') for change in changes):
      take(folder / f'{LOOP}-{seed}', run, SHARED if changes else ('data', *results.MODELS))
    loop.run(f.size, run, f.m0, f.data, [*changes, f'seed={seed}'], f.last)
  rows = table(runs, [folder / f'{LOOP}-{seed}' for seed in range(f.seeds)])
  stage.write_json(folder / f'{name}.json', dict(name=name, seeds=f.seeds, changes=changes, models=rows))
  hosts.say(f'\n{name}, {f.seeds} seeds\n{text(rows)}\n\n{overview(folder)}\n{folder / f"{name}.json"}')


def take(source, run, parts):
  """Copies what does not depend on the change, unless it is there; the stages check that it fits."""
  for part in parts:
    if (source / part).exists() and not (run / part).exists():
      shutil.copytree(source / part, run / part)


def table(runs, loops) -> list[dict]:
  """One row for each model: means over the runs that trained it with their standard error over seeds (`errors`), the
  number of runs, and how its answers differ from those of the model before it (`gain`) and from those of the same model
  of the loops of the same seeds (`against`); and how its judging differs from that of M1 of the same seed (`judge`)."""
  found = [{row['model']: row for row in results.of_models(run)} for run in runs]
  made = [model for model in results.MODELS if any(model in rows for rows in found)]
  return [dict(model=model, **means(model, found), gain=paired(runs, model, runs, last),
               against=paired(runs, model, loops, model) if runs != loops else None,
               judge={h: over_seeds([of_run[model][h] - of_run['m1'][h] for of_run in found if _has(of_run, model, h)])
                      for h in JUDGE})
          for last, model in zip(['', *made], made, strict=False)]


def _has(of_run: dict[str, dict], model: str, heading: str) -> bool:
  return all(name in of_run and of_run[name][heading] is not None for name in (model, 'm1'))


def over_seeds(values: list[float]) -> dict | None:
  """Differences, one per seed -> their mean, its standard error and Student's 95 % interval; the last two are None of a
  single seed. None of none."""
  if not values:
    return None
  mean, error, interval = statistics.fmean(values), None, None
  if len(values) > 1:
    error = scores.standard_error(values)
    width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    interval = [mean - width, mean + width]
  return dict(mean=mean, over_seeds=error, interval=interval)


def means(model: str, found: list[dict[str, dict]]) -> dict:
  rows = [of_run[model] for of_run in found if model in of_run]
  values = {heading: [r[heading] for r in rows if r[heading] is not None] for heading in COLUMNS}
  return dict(runs=len(rows), **{h: statistics.fmean(v) if v else None for h, v in values.items()},
              errors={h: scores.standard_error(v) for h, v in values.items() if len(v) > 1})


def paired(runs, model: str, others, other: str) -> dict | None:
  """By how much the oracle's score of a model's answers is above that of another's, over the runs that have both.

  mean; over_prompts: its standard error over prompts, each the mean of its runs; over_seeds: over runs; interval:
  Student's 95 % t interval over runs; the last two are None of a single run. least, most: means of a run. None where no
  run has both.
  """
  differences = []  # {prompt: difference} of each run
  for run, against in zip(runs, others, strict=True):
    mine, theirs = results.graded(run / model), results.graded(against / other) if other else {}
    if mine and theirs:
      differences.append({prompt: mine[prompt] - theirs[prompt] for prompt in mine})
  if not differences:
    return None
  by_prompt = [statistics.fmean(run[prompt] for run in differences) for prompt in differences[0]]
  by_run = [statistics.fmean(run.values()) for run in differences]
  return dict(over_seeds(by_run), over_prompts=scores.standard_error(by_prompt), least=min(by_run), most=max(by_run))


def text(rows: list[dict]) -> str:
  """Tables with a line for each model: means over seeds with their standard errors over seeds; and the gains."""
  made = []
  for columns in results.TABLES.values():
    shown = [h for h, *_ in columns if h in COLUMNS and any(row[h] is not None for row in rows)]
    lines = [[row['model'], str(row['runs']), *(_mean(row, h) for h in shown)]
             for row in rows if any(row[h] is not None for h in shown)]
    made += [[['model', 'runs', *shown], *lines]] if lines else []
  made.append([['model', 'gain', *DIFFERENCE], *(
      [row['model'], *_difference(row['gain'])] for row in rows if row['gain'])])
  made.append([['model', *(cell for h in JUDGE for cell in (f'{h}, against m1', '+- seeds', '95 % over seeds'))], *(
      [row['model'], *(cell for h in JUDGE for cell in _over_seeds(row['judge'][h]))]
      for row in rows if row['model'] > 'm1' and any(row['judge'].values()))])
  return '\n\n'.join(results.aligned(table) for table in made if len(table) > 1)


def overview(folder) -> str:
  """A line for every study of the folder, the loop's first: the score of each model; of the last one how it differs
  from that of the loops of the same seeds, and other means."""
  studies = sorted((results.read(path) for path in folder.glob('*.json')),
                   key=lambda made: (made['name'] != LOOP, made['name']))
  models = results.MODELS[2:]
  lines = [['study', 'seeds', *models, 'above the loop', *DIFFERENCE, 'wins', 'losses', 'pairs', 'right',
            'judge: pairwise', 'of pairs', 'oracle: pairwise', 'oracle: exact']]
  for made in studies:
    rows = {row['model']: row for row in made['models']}
    last = made['models'][-1]
    lines.append([made['name'], str(made['seeds']),
                  *(results.number(rows.get(m, {}).get('oracle 0-5'), 'oracle 0-5') for m in models),
                  *_difference(last['against']),
                  *(_mean(last, h) for h in lines[0][-8:])])
  return results.aligned(lines)


def _mean(row: dict, heading: str) -> str:
  value = results.number(row[heading], heading)
  return f'{value} +-{results.number(row["errors"][heading], heading)}' if heading in row['errors'] else value


def _over_seeds(found: dict | None) -> list[str]:
  if not found or found['interval'] is None:
    return [f'{found["mean"]:+.3f}' if found else '-', '-', '-']
  return [f'{found["mean"]:+.3f}', f'{found["over_seeds"]:.3f}', '{:+.3f} to {:+.3f}'.format(*found['interval'])]


def _difference(found: dict | None) -> list[str]:
  """The cells of DIFFERENCE, after the mean."""
  if not found:
    return ['-'] * (1 + len(DIFFERENCE))
  mean, seeds, interval = _over_seeds(found)
  both = f'{math.hypot(found["over_prompts"], found["over_seeds"]):.3f}' if found['over_seeds'] is not None else '-'
  return [mean, f'{found["over_prompts"]:.3f}', seeds, both, interval, f'{found["least"]:+.2f} to {found["most"]:+.2f}']


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
