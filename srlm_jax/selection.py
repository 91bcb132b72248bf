"""Checkpoint selection: chooses the step of a trained model that later stages use.

`python -m srlm_jax.selection --config=iter2 --workdir=runs/x --config.train.select=agreement`

With `train.select`, training keeps a checkpoint every `train.save_every` steps (200, PAPER 3.1).
This stage measures each of them and writes the best to MODEL/model/selected.json; ties go to the
earliest. It deletes the other checkpoints. `train.select` is `wins`, which is early stopping
(`srlm_jax.stopping`), or one of:

  agreement  pairwise accuracy of the model as a judge of the ranked replies for tuning
             (data.ranked_tune). Without those it uses the ranked replies for evaluation, and the
             agreement reported on them is then biased by the selection.
  a command  {checkpoint} in it is replaced by a checkpoint folder. The last line of its output is
             the measure, and higher is better. The command runs while this process still holds the
             accelerators.
"""
import math
import shlex
import subprocess

from srlm_jax import (
  catalog,
  cli,
  hosts,
  InputError,
  model_files,
  records,
  schema,
  stage,
  storage,
)
from srlm_jax.eval import agreement
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, judge


def run(config, workdir):
  """Writes MODEL/selection/measures.jsonl and MODEL/model/selected.json."""
  by_agreement = config.train.select == 'agreement'
  spec = catalog.find('selection', 'agreement' if by_agreement else '')
  config = spec.view(config)
  folder = _trained_folder(workdir, config)
  params = stage.summary(folder).params
  files = model_files.hashes(folder)
  template = str(judges.load(config.judge.template)) if by_agreement else ''
  s = stage.Stage(spec, config, workdir, f'{params} {files} {template}')
  if s.done:
    return
  config = engines.choose(s.config, [folder]) if by_agreement else s.config
  s.begin(config)
  # The stages that measure agreement have views of their own.
  measures = _measure_steps(s, catalog.unwrap(config), workdir, folder)
  best = min(measures, key=lambda step: (-measures[step], step))
  if hosts.is_first_host():
    select(folder, best)
  s.finish(step=best, measure=round(measures[best], 4), measured=len(measures))


def _trained_folder(workdir, config):
  """The model's folder; raises InputError unless it was trained with this train.select."""
  by = config.train.select
  if by == 'wins':
    raise InputError('early stopping (config.train.select is wins, or auto with '
                     'config.endpoint.url) selects a checkpoint while the model is trained; run '
                     'python -m srlm_jax.stopping')
  if not by:
    raise InputError('config.train.select is empty, so the last checkpoint is used and there is '
                     'nothing to select; set it to agreement or to a command')
  folder = stage.model_folder(workdir, config.name)
  if not (folder / 'done.json').exists():
    raise InputError(f'{folder} is not finished; run python -m srlm_jax.train first')
  if (trained := stage.trained_with(folder, 'train.select')) != by:
    raise InputError(f'{folder} was trained with config.train.select = {trained!r}, not {by!r}; '
                     f'use the value of the training, or train the model again with this one')
  return folder


def _measure_steps(s: stage.Stage, config, workdir, folder) -> dict[int, float]:
  """Measures every step of the model in `folder` that measures.jsonl lacks -> {step: measure}."""
  path, by = s.folder / 'measures.jsonl', config.train.select
  out = records.Appender(path) if hosts.is_first_host() else None
  hosts.sync(f'{s.title} opened')  # the first host may remove a line that a kill cut off
  measured = {r.step for r in records.read(path, schema.Measure)}
  hosts.sync(f'{s.title} read')    # before the first host appends a line
  for step in model_files.steps(folder):
    candidate = s.folder / str(step)
    if step not in measured:
      make_workdir(workdir, candidate, config.name, step)
      if by == 'agreement':
        measure = _agreement(config, candidate)
      else:
        measure = _command(by, candidate / config.name / 'model')
      hosts.log(f'{s.title}: step {step}, {measure:.4f}')
      if out:
        out.append([schema.Measure(step=step, measure=measure)])
      hosts.sync(f'{s.title} {step}')
    if out:  # also of a measured step: a kill may have come in between
      storage.unlink(candidate / config.name / 'model' / 'steps' / str(step))
  if out:
    out.close()
  return {r.step: r.measure for r in records.read(path, schema.Measure)}


def select(folder, step: int):
  """Marks the selected checkpoint of the model in `folder` and deletes the others."""
  stage.write_json(folder / model_files.SELECTED, dict(step=step))
  for other in model_files.steps(folder):
    if other != step:
      (folder / 'steps' / str(other)).rmtree()
  storage.sync_names(folder / 'steps')


def make_workdir(workdir, folder, name: str, step: int, source=None):
  """Makes `folder` a workdir with the seed data and one step of the model -> `folder`.

  `source`: the model's folder; by default that of the model `name`. The seed data, the step and the
  models below an adapter are symbolic links, so nothing large is copied.
  """
  source = source or stage.model_folder(workdir, name)
  model = folder / name / 'model'
  if hosts.is_first_host():
    storage.make_folder(model / 'steps')
    model_files.copy(source, model)
    for file in (model_files.LORA, model_files.SOURCE):
      if (source / file).exists():
        (source / file).copy(model / file, overwrite=True)
    for base, there in model_files.bases(source):
      storage.make_folder((folder / base).parent)
      storage.link(there, folder / base)
    storage.link(stage.seeds(workdir).parent, folder / 'data')
    storage.link(source / 'steps' / str(step), model / 'steps' / str(step),
                 without='train')
    storage.sync(model)  # a stage in `folder` that is done does not need it again
  hosts.sync(f'{folder} made')
  return folder


def _agreement(config, workdir) -> float:
  """Pairwise accuracy of the model in `workdir` as a judge."""
  config = config.copy_and_resolve_references()
  config.eval.split = 'valid'  # selects on data.ranked_tune, not on the data that is reported
  judge.run(config, workdir, 'eval')
  agreement.run(config, workdir)
  measure = stage.summary(workdir / config.name / 'agreement').pairwise_accuracy
  if measure is None:
    raise InputError(f'config.train.select = agreement: no prompt has two replies with scores to '
                     f'compare, see {workdir}; select by a command, or check the training data of '
                     f'the model')
  return measure


def _command(command: str, folder) -> float:
  """The number in the last line that the command prints.

  It runs on the first host only. The other hosts get NaN here and read measures.jsonl later.
  Raises InputError if it fails or prints no finite number.
  """
  if not hosts.is_first_host():
    return math.nan
  words = [word.replace('{checkpoint}', str(folder)) for word in shlex.split(command)]
  try:
    ended = subprocess.run(words, capture_output=True, text=True)
    value = math.nan if ended.returncode else float(ended.stdout.strip().splitlines()[-1])
  except (OSError, ValueError, IndexError) as error:
    raise InputError(
        f'config.train.select: {shlex.join(words)} gave no number ({error})') from error
  if not math.isfinite(value):
    raise InputError(f'config.train.select: {shlex.join(words)} ended with exit code '
                     f'{ended.returncode} and gave no number: '
                     f'{(ended.stderr or ended.stdout).strip()[-300:]}')
  return value


if __name__ == '__main__':
  cli.main(run)
