"""Early stopping: trains a model, compares its checkpoints in between, and uses the better one.

`python -m srlm_jax.stopping --config=iter2:tiny --workdir=runs/x --config.train.select=wins`

With `train.select=wins`, training pauses every `train.save_every` steps (200) and at its end. The
checkpoint answers the held-out validation prompts, and `train.judge` compares these answers with
those of the checkpoint before, in both orders; the first checkpoint is compared with the model that
training starts from (PAPER 3.1). Training ends at the first checkpoint that does not win, which is
one with at most as many wins as losses, or after `train.max_epochs`. Later stages use the last
checkpoint that won; if none did, that is the model that training started from, as step 0.

`train.judge` is one of:

  endpoint  the outside judge of the config section `endpoint`
  oracle    the program that grades the sandbox
  random    a control in the sandbox: a win, a tie and a loss are equally likely
"""
import json
import tempfile
import time
import zlib

from etils import epath

from srlm_jax import (
  catalog,
  cli,
  config as configs,
  hosts,
  InputError,
  metrics,
  model_files,
  records,
  schema,
  selection,
  stage,
  storage,
)
from srlm_jax.eval import endpoint, head_to_head
from srlm_jax.sample import engine as engines, respond
from srlm_jax.sandbox import world
from srlm_jax.train import run as train

WINS = 'wins.jsonl'


def run(config, workdir):
  """Trains; writes MODEL/model, MODEL/stopping/wins.jsonl and MODEL/model/selected.json."""
  if config.train.select != 'wins':
    raise InputError(f'config.train.select is {config.train.select!r}; early stopping needs wins, '
                     f'and without it python -m srlm_jax.train trains the model')
  folder = stage.model_folder(workdir, config.name)
  own = _spec(config).folder(workdir, config)
  if (folder / 'manifest.json').exists():
    _stage(config, workdir)  # raises InputError for the comparisons of another training
  elif (own / WINS).exists():
    raise InputError(f'{own} compares checkpoints of a training that is gone, {folder}; delete it')
  check_judge(config, workdir)
  spent = []  # seconds per comparison

  def wins(step: int) -> bool:
    begun = time.time()
    is_better = _is_better(config, workdir, step)
    spent.append(time.time() - begun)
    return is_better
  train.run(config, workdir, wins)
  s = _stage(config, workdir)
  if s.done:
    return
  s.add(seconds=sum(spent))
  found = compared(s.folder)
  step = best(found)
  if hosts.is_first_host():
    selection.select(folder, step)
  s.finish(step=step, compared=len(found))


def check_judge(config, workdir):
  """Raises InputError for an outside judge that is not complete; asks it nothing."""
  if config.train.judge == 'endpoint' and hosts.is_first_host():
    with tempfile.TemporaryDirectory() as folder, _open(config, workdir, folder):
      pass


def compared(folder) -> list[schema.StepWins]:
  """The comparisons of a stage's folder so far, in the order of the steps."""
  path = folder / WINS
  return list(records.read(path, schema.StepWins)) if path.exists() else []


def best(found: list[schema.StepWins]) -> int:
  """The better step of the last comparison: the last one that won, 0 if none did."""
  return found[-1].step if found[-1].is_better else found[-1].before


def _spec(config) -> catalog.Spec:
  return catalog.find('stopping', 'endpoint' if config.train.judge == 'endpoint' else '')


def _stage(config, workdir) -> stage.Stage:
  """The stage, which belongs to one training: its manifest covers that of the model."""
  training = stage.read_manifest(stage.model_folder(workdir, config.name) / 'manifest.json')
  made_with = {key: value for key, value in training.items() if key != 'environments'}
  spec, place = _spec(config), _judge_folder(config, workdir)
  return stage.Stage(spec, config, workdir, json.dumps([made_with, place], sort_keys=True))


def _open(config, workdir, folder) -> endpoint.Client:
  """The outside judge, which keeps its answers in `folder`."""
  judge = config.endpoint.copy_and_resolve_references()
  judge.url = _judge_folder(config, workdir) or judge.url
  return endpoint.open(judge, folder, title=f'{config.name}/stopping')


def _judge_folder(config, workdir) -> str:
  """The folder of an outside judge; '' for one behind a URL, and for a program."""
  url = config.endpoint.url
  if config.train.judge != 'endpoint' or configs.is_url(url):
    return ''
  return str(stage.model_folder(workdir, url))


def _is_better(config, workdir, step: int) -> bool:
  """Whether a checkpoint wins against the one before; compares them if that was not done yet.

  The first host judges. All read its decision from the file.
  """
  s = _stage(config, workdir)
  found = compared(s.folder)
  if step not in (wins.step for wins in found):
    s.begin(engines.choose(s.config, s.models))
    before = best(found) if found else 0
    with engines.kept():  # which frees the memory of every engine at its end
      folders = [_answers(s, workdir, n) for n in (step, before)]
      if hosts.is_first_host():
        new = _compare(s, workdir, step, before, head_to_head.Both(*folders))
        _show(s.folder, new)
        records.write(s.folder / WINS, [*found, new])
    hosts.sync(f'{s.title} {step}')
    found = compared(s.folder)
  wins = next(wins for wins in found if wins.step == step)
  against = f'step {wins.before}' if wins.before else 'the model that training starts from'
  left_out = f', {wins.left_out} prompts without verdicts' if wins.left_out else ''
  hosts.log(f'{s.title}: step {step} against {against}, judged by {_judge_name(config)}: '
            f'{wins.wins} wins, {wins.ties} ties, {wins.losses} losses{left_out}')
  return wins.is_better


def _show(folder, wins: schema.StepWins):
  """Shows a comparison in TensorBoard, before it is written: if a kill prevents that, it is hidden.
  """
  board = metrics.Board(folder, step=wins.before)
  board.write(wins.step, {name: getattr(wins, name)
                          for name in ('wins', 'ties', 'losses', 'left_out')})
  board.close()


def _judge_name(config) -> str:
  """Who judges, for the log."""
  by = config.train.judge
  return (config.endpoint.model or config.endpoint.url) if by == 'endpoint' else by


def _answers(s: stage.Stage, workdir, step: int) -> epath.Path:
  """Answers of a step to the validation prompts; step 0 is the model that training starts from.

  Returns their folder, MODEL/stopping/STEP/MODEL/answers. The random draws for a prompt are the
  same for every step.
  """
  config = catalog.unwrap(s.config).copy_and_resolve_references()
  config.eval.split = 'valid'
  folder = s.folder / str(step)
  answers = folder / config.name / 'answers'
  source = stage.model_folder(workdir, config.name if step else config.train.init)
  of = step or model_files.latest(source)
  if not (answers / 'done.json').exists():
    candidate = selection.make_workdir(workdir, folder, config.name, of, source)
    respond.run(config, candidate, 'heldout')
  if hosts.is_first_host():  # also if the answers are done: a kill may have come in between
    storage.unlink(folder / config.name / 'model' / 'steps' / str(of))
  return answers


def _compare(s: stage.Stage, workdir, step: int, before: int, both: head_to_head.Both
             ) -> schema.StepWins:
  """Judges the answers of `step` and of `before`.

  Raises InputError if no pair of answers has a verdict.
  """
  config = catalog.unwrap(s.config)
  by = config.train.judge
  if by == 'random':
    found = head_to_head.tally(
        ('win', 'tie', 'loss')[zlib.crc32(f'{config.seed}/{step}/{a.prompt_id}'.encode()) % 3]
        for a, _ in both)
  elif by == 'oracle':
    found = head_to_head.compare_scores(
        tuple(sum(world.grade(x.prompt, x.response)) for x in pair) for pair in both)
  else:
    with _open(config, workdir, s.folder) as client:
      replies = head_to_head.ask(client, head_to_head.requests(both), 2 * both.count)
    found = head_to_head.compare(head_to_head.verdicts(head_to_head.requests(both), replies))
  if not found['count']:
    raise InputError(f'{s.title}: the judge gave no verdict in both orders on any of {both.count} '
                     f'pairs of answers of step {step}; read its answers in '
                     f'{s.folder / endpoint.FILE}, delete that file, and name another judge, or '
                     f'set train.select to empty and train again')
  return schema.StepWins(step=step, before=before, left_out=both.count - found['count'],
                         **{name: found[name] for name in ('wins', 'ties', 'losses')})


if __name__ == '__main__':
  cli.main(run)
