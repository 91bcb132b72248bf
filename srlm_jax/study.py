"""Runs the loop for some seeds, whole or with one change, and prints the means over the seeds.

  python -m srlm_jax.study --workdir=runs/study --seeds=5
  python -m srlm_jax.study --workdir=runs/study --seeds=3 --ablation=oracle_judge

The runs are WORKDIR/loop-0, loop-1, .., or WORKDIR/ABLATION-0, ..; those that are done are only read. A change of M2
and later alone takes data, M0, SFT and M1 from the loop of the same seed, where that is there.
"""
import shutil
import statistics

from absl import flags
from etils import epath

from configs import ablations, base
from srlm_jax import InputError, loop, results, stage
from srlm_jax.data import records

SHARED = ('data', 'm0', 'sft', 'm1')
COLUMNS = {  # heading: (column of the loop's table, digits)
    'oracle 0-5': ('oracle 0-5', 2), 'greedy': ('greedy', 2), 'wins': ('wins', 2), 'losses': ('losses', 2),
    'chars': ('answer chars', 1), 'judge: pairwise': ('judge: pairwise', 3), 'pairs': ('pairs', 0),
    'right': ('right', 2), 'wrong': ('wrong', 2), 'judge mean': ('judge mean', 2), 'oracle mean': ('oracle mean', 2)}


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the runs.', required=True)
  flags.DEFINE_enum('size', 'tiny', base.SIZES, 'Of the model and of everything else.')
  flags.DEFINE_string('m0', '', 'Hugging Face folder of M0 (tiny has its own).')
  flags.DEFINE_string('data', '', 'OASST1 files (tiny makes its own).')
  flags.DEFINE_integer('seeds', 5, 'Runs, of the seeds 0, 1, ..', lower_bound=1)
  flags.DEFINE_enum('ablation', '', ['', *ablations.ABLATIONS], 'One change: configs/ablations.py.')
  flags.DEFINE_string('name', '', 'What the runs are called; by default the ablation, or loop.')
  flags.DEFINE_enum('last', 'm3', ['m1', 'm2', 'm3', 'm4'], 'The last model to train.')
  flags.DEFINE_multi_string('set', [], 'Changes a knob, as in the loop.')


def main(argv):
  stage.refuse_arguments(argv)
  f = flags.FLAGS
  changes = [*ablations.changes(f.ablation, f.size), *f.set]
  name = f.name or f.ablation or 'loop'
  if changes and name == 'loop':
    raise InputError('these runs differ from the loop; call them something else: --name=NAME')
  folder = epath.Path(f.workdir)
  stage.keep_compiled(folder)
  runs = [folder / f'{name}-{seed}' for seed in range(f.seeds)]
  for seed, run in enumerate(runs):
    stage.say(f'{run}:')
    if all(change.startswith('m2') for change in changes):
      take(folder / f'loop-{seed}', run)
    loop.run(f.size, run, f.m0, f.data, [*changes, f'seed={seed}'], f.last)
  rows = table([results.of_models(run, list(loop.MODELS)) for run in runs], gains(runs, list(loop.MODELS)))
  stage.write_json(folder / f'{name}.json', dict(name=name, seeds=f.seeds, changes=changes, models=rows))
  stage.say(f'\n{name}, {f.seeds} seeds\n{text(rows)}\n{folder / f"{name}.json"}')


def take(source, run):
  """Copies what does not depend on the change, unless it is there; the stages check that it fits."""
  for part in SHARED:
    if source != run and (source / part).exists() and not (run / part).exists():
      shutil.copytree(source / part, run / part)


def gains(runs, models: list[str]) -> dict[str, dict[str, list[float]]]:
  """{model: {prompt: by how much its answer is better than that of the model before, in each run}}."""
  graded = {m: [{r['prompt_id']: r['score'] for r in records.read(run / m / 'oracle' / 'graded.jsonl')} for run in runs]
            for m in models if all((run / m / 'oracle' / 'done.json').exists() for run in runs)}
  names = list(graded)
  return {m: {p: [after[p] - before[p] for before, after in zip(graded[last], graded[m], strict=True)]
              for p in graded[m][0]} for last, m in zip(names, names[1:], strict=False)}


def table(runs: list[list[dict]], gained) -> list[dict]:
  """One row a model that all runs have: means over the runs; the gain over the model before, its standard error over
  prompts (each the mean of its runs), and the least and greatest gain of a run."""
  rows = []
  for same in zip(*runs, strict=False):
    row = dict(model=same[0]['model'])
    for heading, (column, _) in COLUMNS.items():
      values = [r[column] for r in same if r[column] is not None]
      row[heading] = statistics.fmean(values) if values else None
    if by_prompt := gained.get(row['model']):
      means = [statistics.fmean(values) for values in by_prompt.values()]
      by_run = [statistics.fmean(values) for values in zip(*by_prompt.values(), strict=True)]
      row |= dict(gain=statistics.fmean(means), gain_error=statistics.stdev(means) / len(means) ** 0.5,
                  gain_least=min(by_run), gain_most=max(by_run))
    rows.append(row)
  return rows


def text(rows: list[dict]) -> str:
  """Aligned for reading."""
  lines = [['model', *COLUMNS, 'gain', '+-', 'runs']]
  for row in rows:
    gain = ([f'{row["gain"]:+.3f}', f'{row["gain_error"]:.3f}', f'{row["gain_least"]:+.2f} to {row["gain_most"]:+.2f}']
            if 'gain' in row else ['-'] * 3)
    cells = ['-' if row[h] is None else f'{row[h]:.{d}f}' for h, (_, d) in COLUMNS.items()]
    lines.append([row['model'], *cells, *gain])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


if __name__ == '__main__':
  define_flags()
  stage.run_app(main)
