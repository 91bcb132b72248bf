"""Runs every stage of every model in order, M0 to M3 (or --last), and skips those that are done.

  python -m srlm_jax.loop --size=tiny --workdir=runs/demo
  python -m srlm_jax.loop --m0=FOLDER --data=FILE --workdir=runs/x    # docs/recipes.md

Ends with a table of all models.
"""
import time

from absl import flags
from etils import epath
import jax
from ml_collections import ConfigDict

from srlm_jax import (
  ablations,
  base,
  catalog,
  cli,
  closest,
  config as configs,
  hosts,
  InputError,
  lock,
  model_files,
  schema,
  selection,
  stage,
  stopping,
)
from srlm_jax.checkpoint import convert
from srlm_jax.data import seeds, templates
from srlm_jax.eval import agreement, endpoint
from srlm_jax.report import page, results
from srlm_jax.reward import eft, health, judge_pairs, judges, pairs, strategies, swap
from srlm_jax.sample import engine as engines, implicit, judge, meta_judge, prompts, respond
from srlm_jax.sandbox import audit, control, data as sandbox, oracle
from srlm_jax.train import run as train


class NothingToTrainOn(Exception):
  """The data of a model came out empty or too small; the message says why and what to do."""


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_enum('size', 'auto', configs.SIZES, 'Preset of model, data and training; auto: what '
                    'suits M0.')
  flags.DEFINE_string('m0', '', 'Hugging Face folder of M0 (tiny and hard have their own).')
  flags.DEFINE_enum('last', 'm3', configs.MODELS[1:], 'The last model to train.')
  flags.DEFINE_string('data', '', 'OASST1 files (tiny and hard make their own data).')
  flags.DEFINE_enum('ablation', '', ['', *ablations.ABLATIONS],
                    'One change of the paper; see srlm_jax/ablations.py.')
  flags.DEFINE_multi_string('set', [], 'Changes a config key: --set=judge.n=1 for every model, '
                            '--set=m2,m3:train.epochs=2 for some.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  run(f.size, f.workdir, f.m0, f.data, [*ablations.changes(f.ablation, f.size), *f.set], f.last)


def run(size: str, workdir, m0: str, data: str, changes: list[str], last: str = 'm3'):
  """All stages; prints the table, and writes results.json and report.html into the workdir."""
  names = configs.MODELS[:configs.MODELS.index(last) + 1]
  given = {name: load_config(name, size, m0, data, changes) for name in names}
  every = {name: base.fit(config, workdir) for name, config in given.items()}
  if line := base.chosen(every, given):
    hosts.log(line)
  shape = base.shape_of(every[last], workdir)
  for config in every.values():
    refuse_mistakes(config)
    refuse_too_long(config, shape)
  train.refuse_too_large(every[last], shape)
  cli.cache_compilations(workdir)
  with cli.locked(workdir):
    _run(size, epath.Path(workdir), every)


def _run(size: str, workdir, every: dict[str, ConfigDict]):
  started, before = time.time(), _finished(workdir)
  convert_m0(every['m0'], workdir)
  make_seeds(every['sft'], workdir)
  stopped = ''
  with engines.kept() as engine:
    for name in [*every][1:]:
      try:
        one_model(every[name], workdir, engine)
      except NothingToTrainOn as reason:
        stopped = str(reason)
        break
  rows = results.of_models(workdir)
  hosts.log('\n' + results.text_table(rows))
  if stopped:
    hosts.log(f'\n{name} was not trained: {stopped}')
  if hosts.is_first_host():
    stage.write_json(workdir / 'results.json', dict(size=size, models=rows, stopped=stopped))
    page.write(workdir, rows, stopped)
  if _finished(workdir) == before:
    hosts.log(f'nothing to do: every stage of {workdir} is already done')
  hosts.log(f'models restored for sampling: {engine.restores}')
  spent = results.seconds(workdir)
  slowest_first = sorted(spent, key=spent.get, reverse=True)
  hosts.log('seconds: ' + ', '.join(f'{name} {spent[name]:.0f}' for name in slowest_first))
  hosts.log(f'{workdir / "results.json"}, {workdir / "report.html"}: {time.time() - started:.0f} s')


def _finished(workdir) -> dict[str, bytes]:
  """{path: content} of the files that a stage or a conversion writes last."""
  paths = (*workdir.glob('*/*/done.json'), *workdir.glob(f'*/model/{model_files.SOURCE}'))
  return {str(path): path.read_bytes() for path in paths if not path.is_dir()}


def refuse_mistakes(config):
  """Raises InputError for mistakes in the config that a stage would only find hours later."""
  judges.load(config.judge.template)
  judges.load(config.meta_judge.template, meta_judge.SLOTS, 'config.meta_judge.template')
  templates.load_author(config.prompts.template)
  strategies.check(config.pairs.strategy)
  if catalog.needs('stopping', config) and configs.is_url(config.endpoint.url):
    stopping.check_judge(config, '')
  if config.judge.by == 'endpoint' and config.pairs.strategy in ('temporal', 'consistency'):
    raise InputError(f'config.pairs.strategy = {config.pairs.strategy} also needs judgements by a '
                     f'model of the run, which do not compare with those of config.judge.by = '
                     f'endpoint; use another strategy, or judge.by=model')
  judge_pairs.refuse_mistakes(config, configs.training_data(config))
  if config.name in ('m0', 'sft', 'm1'):
    return
  kind = 'positives' if config.pairs.strategy == strategies.POSITIVES else 'pairs'
  losses = ('sft',) if kind == 'positives' else configs.LOSSES
  data = configs.training_data(config)
  if kind not in data or config.train.loss not in losses:
    raise InputError(
        f'config.pairs.strategy = {config.pairs.strategy} makes {kind} for {config.name}, which '
        f'trains on {", ".join(data)} with the loss {config.train.loss}; set train.data to hold '
        f'{kind} and train.loss={" or ".join(losses)} (--ablation=positives_only sets all that '
        f'positives need)')


def refuse_too_long(config, shape):
  """Raises InputError if a stage may sample more tokens than a row of the cache has."""
  size = min(config.sample.size, shape.context)
  for section in ('prompts', 'respond', 'judge', 'meta_judge'):
    if (most := config[section].max_tokens) >= size:
      raise InputError(f'config.{section}.max_tokens is {most}, and a row of the cache has {size} '
                       f'tokens in all (config.sample.size, at most the context of the model); '
                       f'lower it')


def convert_m0(config, workdir):
  """M0 as a checkpoint, from a Hugging Face folder."""
  folder = stage.model_folder(workdir, 'm0')
  source = config.m0 or (sandbox.M0S.get(config.size, '') if config.model == 'sandbox' else '')
  if config.data.source != 'sandbox' and not config.data.path:
    raise InputError('--data is missing: the OASST1 file to make seeds from, '
                     '2023-04-12_oasst_ready.trees.jsonl.gz')
  if model_files.exists(folder):
    if source:
      convert.check_source(source, folder)
    hosts.log('m0/model: already done')
  elif not source:
    raise InputError(f'--m0 is missing: the Hugging Face folder of {config.model or "M0"}; or '
                     f'convert it to {folder}')
  elif jax.process_count() > 1:
    raise InputError(f'convert M0 on one host first: '
                     f'python -m srlm_jax.checkpoint.convert --from_hf={source} --out={folder}')
  else:
    with lock.held_output(folder, '--workdir'):
      convert.from_hf(source, folder)


def make_seeds(config, workdir):
  """Makes the seed data; `config` is that of the SFT baseline."""
  (sandbox.make_seeds if config.data.source == 'sandbox' else seeds.run)(config, workdir)


def one_model(config, workdir, engine: engines.Kept):
  """Every stage of one model, from its data to its evaluation. Raises NothingToTrainOn.

  `engine`: the kept one, whose memory the training needs.
  """
  if catalog.needs('eft', config):
    make_eft(config, workdir)
  if catalog.needs('prompts', config):
    make_prompts(config, workdir)
    make_pairs(config, workdir)
  engine.drop()
  (stopping if catalog.needs('stopping', config) else train).run(config, workdir)
  if catalog.needs('selection', config):
    selection.run(config, workdir)
  judge.run(config, workdir, 'eval')
  agreement.run(config, workdir)
  respond.run(config, workdir, 'heldout')
  if catalog.needs('oracle', config):
    respond.run(config, workdir, 'greedy')
    oracle.run(config, workdir)


def make_eft(config, workdir):
  """The examples that teach M1 to judge."""
  if catalog.needs('judge', config):
    judge.run(config, workdir)
    health.run(config, workdir)
  eft.run(config, workdir)
  made = stage.summary(workdir / 'm1' / 'eft')
  if not made.examples:
    raise NothingToTrainOn(
        f'none of {made.replies} judged replies gave EFT ({page.counts(made.dropped)}); '
        f'start from a stronger model, or take human ranks as scores (--set=eft.targets=ranks)')


def make_prompts(config, workdir):
  """New prompts."""
  prompts.run(config, workdir)
  made = stage.summary(workdir / config.name / 'prompts')
  if not made.prompts:
    raise NothingToTrainOn(
        f'none of {made.attempts} attempts is a usable prompt ({page.counts(made.dropped)}); '
        f'name another author (--set=prompts.author=FOLDER), or allow more tokens '
        f'(--set=prompts.max_tokens=N)')


def make_pairs(config, workdir):
  """Candidates, judgements, and the pairs or positives that `pairs.strategy` makes of them."""
  respond.run(config, workdir)
  judges_by = dict(model=judge, endpoint=endpoint)
  judges_by.get(config.judge.by, control).run(config, workdir)
  if catalog.needs('judge_again', config):
    judge.run(config, workdir, 'again')
  if catalog.needs('implicit', config):
    implicit.run(config, workdir)
  if catalog.needs('respond_older', config):
    respond.run(config, workdir, 'older')
    judge.run(config, workdir, 'older')
  pairs.run(config, workdir)
  health.run(config, workdir)
  if catalog.needs('audit', config):
    audit.run(config, workdir)
  refuse_too_few(config, stage.summary(workdir / config.name / 'pairs'))
  make_judge_pairs(config, workdir)


def make_judge_pairs(config, workdir):
  """The pairs of judgements that `train.data` names."""
  if catalog.needs('meta_judge', config):
    meta_judge.run(config, workdir)
  if catalog.needs('swap', config):
    swap.run(config, workdir)
    judge.run(config, workdir, 'swapped')
  for name in ('majority', 'swapped'):
    if catalog.needs(name, config):
      judge_pairs.run(config, workdir, name)
  if catalog.needs('audit_judge_pairs', config):
    audit.run(config, workdir, 'judge_pairs')


def refuse_too_few(config, made: schema.PairsSummary):
  """Raises NothingToTrainOn where the pairs stage, whose summary is `made`, gave too little."""
  if 'pairs' in configs.training_data(config):
    left, enough = f'{made.pairs} pairs', made.pairs >= config.train.batch
    limit = f'fewer than one batch of {config.train.batch}'
  else:
    left, enough = f'{made.positives} positives', made.positives > 0
    limit = f'and positives are responses that score {config.pairs.positive:g} or more'
  if not enough:
    raise NothingToTrainOn(
        f'{made.parsed} of {made.judgements} judgements parsed and {left} are left '
        f'({page.counts(made.dropped)}), {limit}; start from a stronger model, judge with a '
        f'template that it can follow (--set=judge.template=FILE), or make more prompts '
        f'(--set=prompts.count=N)')


def load_config(name: str, size: str, m0: str, data: str, changes: list[str]) -> ConfigDict:
  """The config of one model, with this run's paths and its --set changes."""
  config = configs.get(name, size)
  config.m0, config.data.path = m0, data
  for change in changes:
    models, text = _split(change)
    if name in models:
      _set(config, text, change)
  configs.check(config)
  return config


def affected(change: str) -> list[str]:
  """The models that a --set change affects."""
  return _split(change)[0]


def _split(change: str) -> tuple[list[str], str]:
  """'m2,m3:KEY=VALUE' or 'KEY=VALUE' -> the models that it changes, and KEY=VALUE."""
  before, colon, text = change.partition(':')
  if not colon or '=' in before:
    return list(configs.MODELS), change
  for model in before.split(','):
    if model not in configs.MODELS:
      raise InputError(f'--set={configs.short(change)}: there is no model {configs.show(model)}'
                       f'{closest(model, configs.MODELS)}')
  return before.split(','), text


def _set(config: ConfigDict, text: str, change: str):
  """Applies KEY=VALUE, with VALUE converted to the type of the present value.

  Raises InputError, of bounded length, for an unknown key or a value that cannot be converted.
  """
  path, _, value = text.partition('=')
  start = f'--set={configs.short(change)}'
  if path in ('name', 'size'):
    raise InputError(f'{start}: {path} says which config this is; it cannot be changed')
  if path in configs.RENAMED:
    raise InputError(f'{start}: {path} is now {configs.RENAMED[path]}; write the new name')
  place, old = None, config
  for part in path.split('.'):
    known = old if isinstance(old, ConfigDict) else ()
    if part not in known:
      raise InputError(f'{start}: the config has no key "{configs.short(part)}"'
                       f'{closest(part, known)}')
    place, old = old, old[part]
  if isinstance(old, ConfigDict):
    raise InputError(f'{start}: {path} is a section; set one of its keys: {", ".join(old)}')
  try:
    place[part] = _like(old, value)
  except (ValueError, KeyError) as error:
    kind = {int: 'an int', float: 'a float', bool: 'a bool'}[type(old)]
    wanted = configs.SETTINGS[path].wanted(value).replace('it', path, 1)
    raise InputError(f'{start}: {configs.show(value)} is not {kind}; {wanted}') from error


def _like(old, value: str):
  """The text as a value of the type of `old`. Raises ValueError or KeyError where it is not one."""
  if isinstance(old, bool):
    return {'true': True, 'false': False}[value.lower()]
  if isinstance(old, tuple):
    return tuple(value.split(','))
  return type(old)(value)


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
