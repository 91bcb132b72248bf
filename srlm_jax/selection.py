"""Chooses the checkpoint of a trained model that later stages use.

`python -m srlm_jax.selection --config=configs/iter2.py --workdir=runs/x --config.train.select=agreement`

Training with `train.select` keeps a checkpoint every `train.save_every` steps (200, PAPER 3.1). Here each is measured,
and the best, of equal ones the earliest, is written to MODEL/model/selected.json; of the others the folders go.

  agreement  pairwise accuracy of the model as a judge of the seeds' ranked replies to tune on (data.ranked_tune); where
             there are none, of the evaluation replies, whose agreement is then no longer clean
  a command  of yours: {checkpoint} in it becomes a checkpoint folder, and the last line that it prints is the measure,
             the higher the better. It runs beside this process, which holds the accelerators.
"""
import math
import os
import shlex
import subprocess

from srlm_jax import catalog, cli, hosts, InputError, model_files, records, stage
from srlm_jax.eval import agreement
from srlm_jax.sample import judge


def run(config, workdir):
  """MODEL/model/steps/* -> MODEL/selection/measures.jsonl {step, measure} and MODEL/model/selected.json."""
  all_of_it = config
  spec = catalog.find('selection')
  config = spec.view(config)
  by = config.train.select
  if not by:
    raise InputError('config.train.select is empty: the last checkpoint is used; name agreement, or a command')
  folder = stage.model_folder(workdir, config.name)
  if not (folder / 'done.json').exists():
    raise InputError(f'{folder} is not finished; run python -m srlm_jax.train first')
  if (trained := stage.selects_by(folder)) != by:
    raise InputError(f'{folder} was trained with config.train.select = {trained!r}, not {by!r}; only what is trained '
                     f'with it keeps every checkpoint')
  of = stage.finished(folder)['params'], model_files.hashes(folder)
  s = stage.Stage(spec, config, workdir, str(of))
  if s.done:
    return
  s.begin()
  path = s.folder / 'measures.jsonl'
  out = records.Appender(path) if hosts.is_first_host() else None
  hosts.sync(f'{s.title} was opened')
  have = {r['step'] for r in records.read(path)}
  hosts.sync(f'{s.title} was read')
  for step in model_files.steps(folder):
    if step in have:
      continue
    candidate = alone(workdir, s.folder / str(step), config.name, step)
    measure = _agreement(all_of_it, candidate) if by == 'agreement' else _command(by, candidate / config.name / 'model')
    hosts.say(f'{s.title}: step {step}, {measure:.4f}')
    if out:
      out.append([dict(step=step, measure=measure)])
    hosts.sync(f'{s.title} {step}')
  found = {r['step']: r['measure'] for r in records.read(path)}
  best = min(found, key=lambda step: (-found[step], step))
  if out:
    out.close()
    select(folder, best)
  s.finish(step=best, measure=round(found[best], 4), measured=len(found))


def select(folder, step: int):
  """Makes a step the one that is meant by the model in `folder`, and deletes the others."""
  stage.write_json(folder / model_files.SELECTED, dict(step=step))
  for other in model_files.steps(folder):
    if other != step:
      (folder / 'steps' / str(other)).rmtree()


def alone(workdir, folder, name: str, step: int):
  """A workdir in `folder` that holds the seeds, and of the model one step; the files themselves stay where they are."""
  source, model = stage.model_folder(workdir, name), folder / name / 'model'
  if hosts.is_first_host():
    (model / 'steps').mkdir(parents=True, exist_ok=True)
    model_files.copy(source, model)
    for link, place in ((folder / 'data', stage.seeds(workdir).parent), (model / 'steps' / str(step),
                                                                         source / 'steps' / str(step))):
      if not link.exists():
        os.symlink(place.resolve(), link)
  hosts.sync(f'{folder} is made')
  return folder


def _agreement(config, workdir) -> float:
  config = config.copy_and_resolve_references()
  config.eval.split = 'valid'  # what chooses a checkpoint is not what is reported, where there is another split
  judge.run(config, workdir, 'eval')
  agreement.run(config, workdir)
  measure = stage.finished(workdir / config.name / 'agreement')['pairwise_accuracy']
  if measure is None:
    raise InputError(f'config.train.select = agreement: no two judgements of one prompt have scores to compare, see '
                     f'{workdir}; choose by a command, or look at what the model was trained on')
  return measure


def _command(command: str, folder) -> float:
  """What the command prints last; on the first host, the others take it from the file."""
  if not hosts.is_first_host():
    return math.nan
  words = [word.replace('{checkpoint}', str(folder)) for word in shlex.split(command)]
  try:
    done = subprocess.run(words, capture_output=True, text=True)
    value = float(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else math.nan
  except (OSError, ValueError, IndexError) as error:
    raise InputError(f'config.train.select: {shlex.join(words)} gave no number ({error})') from error
  if not math.isfinite(value):
    raise InputError(f'config.train.select: {shlex.join(words)} ended with {done.returncode} and gave no number: '
                     f'{(done.stderr or done.stdout).strip()[-300:]}')
  return value


if __name__ == '__main__':
  cli.main(run)
