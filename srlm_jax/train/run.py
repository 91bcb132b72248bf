"""Trains one model: `python -m srlm_jax.train --config=configs/iter2.py --workdir=runs/x`."""
from collections.abc import Callable
import dataclasses
import functools
import itertools
import time

from etils import epath
import jax
import optax

from srlm_jax import (
  base,
  catalog,
  config as configs,
  environment,
  hosts,
  InputError,
  metrics,
  model_files,
  preemption,
  records,
  schema,
  sharding,
  stage,
)
from srlm_jax.checkpoint import store
from srlm_jax.data import examples as training, packing, tokenizer as tokenizers
from srlm_jax.models import config as model_config, kernels, llama, lora, sizing
from srlm_jax.train import objectives, reference, state as train_state, step as train_step
from srlm_jax.train.alarms import Alarms
from srlm_jax.train.state import TrainState

ROWS = 'rows.json'  # in the model's folder: the number and the width of the rows of a step


def run(config, workdir, wins: Callable[[int], bool] | None = None):
  """Reads the init model and this model's data; writes MODEL/model: checkpoints, metrics.jsonl.

  `wins`, which train.select=wins needs: (step) -> whether that checkpoint is better than the one
  before. It is called at every checkpoint, when no array of the training is in memory. Training
  ends at the first that is not better; if that is the first of all, step 0 is saved too.
  """
  config, workdir = catalog.find('train').view(config), epath.Path(workdir)
  if config.train.select == 'wins' and wins is None:
    raise InputError('early stopping is on (config.train.select is wins, or auto with '
                     'config.endpoint.url), and this program compares no checkpoints; run python '
                     '-m srlm_jax.stopping, which trains and compares in turn, or set train.select '
                     'to empty')
  if config.train.lora_rank and not config.train.init:
    raise InputError(f'config.train.lora_rank is {config.train.lora_rank}, and {config.name} '
                     f'starts from no model that adapters could change; set '
                     f'config.train.lora_rank=0')
  source = _source(config, workdir)
  shape = _model_config(config, source, workdir)
  refuse_too_large(config, shape)
  files = catalog.training_files(workdir, config)
  s = stage.Stage(catalog.find('train'), config, workdir,
                  more_inputs=() if config.train.init else [source / 'tokenizer.model'])
  if s.done:
    return
  data = _examples(config, source, shape, files)
  rows = _known_rows(config, s.folder, shape, data)
  config = _choose(s, shape, data, rows)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  with jax.set_mesh(mesh):
    setup = _prepare(config, workdir, s, source, shape, data, rows, mesh)
  last, stopped, is_begun = max(model_files.steps(s.folder), default=0), '', False
  for before, end in itertools.pairwise([0, *setup.ends]):
    if end > last:
      _train(config, s, setup, mesh, end, is_begun)
      is_begun = True
    if wins and end >= last and not _compared(s, wins, end):  # an earlier one has won
      stopped = f'step {end} does not win against step {before}'
      if before == 0:
        _save_start(config, s, setup, mesh)
      break
  if hosts.is_first_host():
    store.prune(s.folder, *_kept(config.train, setup.packed))
  _finish(s, setup, end, stopped)


def _compared(s: stage.Stage, wins: Callable[[int], bool], step: int) -> bool:
  """`wins(step)`, whose seconds are not those of the training."""
  begun = time.time()
  is_better = wins(step)
  s.add(seconds=begun - time.time())
  return is_better


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run trains and with which programs, before its state exists."""
  source: epath.Path            # the init model, or the corpus with its tokenizer
  model: llama.Llama
  data: training.Examples
  packed: packing.Packing
  make_batch: Callable          # (rows, shape) -> batch of numpy arrays
  tx: optax.GradientTransformation
  abstract: TrainState          # shapes and shardings
  step: Callable                # the jitted step
  ends: list[int]               # steps at which training pauses for a comparison, or ends


def _examples(config, source, shape, files) -> training.Examples:
  """Reads the data; InputError if it has less than one batch."""
  c, objective = config.train, objectives.find(config.train)
  try:
    data = objective.examples(c, config.chat, files, tokenizers.load(source, shape.V))
  except training.NoExamples as error:
    raise InputError(f'{", ".join(map(str, files))}: {error}') from error
  if len(data.examples) < c.batch:
    dropped = ', '.join(f'{n} {why}' for why, n in data.dropped.items())
    raise InputError(f'{config.name} has {len(data.examples)} examples to train on (dropped: '
                     f'{dropped or "none"}), fewer than one batch of {c.batch}; make more data, or '
                     f'lower config.train.batch')
  return data


def _known_rows(config, folder, shape, data: training.Examples) -> tuple[int, int] | None:
  """The rows and their width, if they do not depend on the mesh, else None.

  Those of a run that is resumed, or the rows of the config and the smallest width for them.
  """
  c = config.train
  if (begun := _begun_rows(folder)) or configs.is_open(c.rows) or not c.pack:
    return begun
  multiple = kernels.for_training(jax.default_backend(), shape, c.remat).width_multiple
  return packing.fixed(c.rows, data.examples, c.batch, configs.epochs(c), config.seed,
                       c.max_length, multiple)


def _choose(s: stage.Stage, shape, data: training.Examples, rows: tuple[int, int] | None):
  """-> the config with values for its open keys; `rows`: of `_known_rows`."""
  c, lengths = s.config.train, [len(e) for e in data.examples]
  work = sizing.work(c, sum(lengths) / len(lengths), max(lengths),
                     objectives.find(c).needs_reference_params, rows)
  return catalog.replace(s.config, sizing.training(s.config, shape, sizing.devices(), work))


def _prepare(config, workdir, s, source, shape, data: training.Examples, rows, mesh) -> Setup:
  """Packs the data, computes cached log-probs of the reference, and builds the step."""
  c, objective = config.train, objectives.find(config.train)
  choice = kernels.for_training(jax.default_backend(), shape, c.remat)
  model = llama.Llama(shape, choice, c.remat)
  packed = _pack(config, data, mesh, choice.width_multiple, configs.epochs(c), rows)
  tx = train_state.optimizer(c, len(packed))
  abstract = train_state.abstract(shape, c, tx, mesh)
  make_batch = objective.pack
  if objective.needs_reference_logps:
    once = _pack(config, data, mesh, choice.width_multiple, 1, rows)
    logps = reference.cached(config, workdir, source, model, once, mesh)
    make_batch = functools.partial(make_batch, reference_logps=logps)
  step = train_step.make(model, tx, c, abstract)
  pauses = range(c.save_every, len(packed), c.save_every) if c.select == 'wins' else ()
  return Setup(source, model, data, packed, make_batch, tx, abstract, step, [*pauses, len(packed)])


def _train(config, s, setup: Setup, mesh, end: int, is_begun: bool):
  """Trains from the last checkpoint to the step `end`; no array stays in memory after it."""
  kept = model_files.steps(s.folder)
  with jax.set_mesh(mesh):
    state, frozen = _restore(config, s, setup, kept, mesh)
    if not is_begun:
      s.begin(config)  # after everything that can raise InputError
      environment.keep_freed_memory()
      _print_sizes(config, s, setup)
    saver = _open(config, s, setup, kept)
    with preemption.deferred():
      _loop(config, s, setup, state, frozen, saver, mesh, end)


def _restore(config, s, setup: Setup, kept: list[int], mesh) -> tuple[TrainState, dict]:
  """-> the state to continue from, and the parameters that are not trained, {} if there are none.

  `kept`: the steps with checkpoints.
  """
  if kept:
    state = _resume(s.folder, kept[-1], setup.abstract, mesh)
  else:
    state = _start(config, setup, mesh)
  c = config.train
  if not (c.lora_rank or objectives.find(c).needs_reference_params):
    return state, {}
  return state, store.restore_params(setup.source, mesh, c.dtype, merge=not c.lora_rank)[0]


def _print_sizes(config, s, setup: Setup):
  """Prints how large the run is, and when it ends."""
  data, packed, c = setup.data, setup.packed, config.train
  rows, width = packed.shape.rows, packed.shape.width
  dropped = ''.join(f'; dropped {n} {why}' for why, n in data.dropped.items())
  hosts.log(f'{s.title}: {len(data.examples)} examples, {len(packed)} steps of {rows} rows of '
            f'{width} tokens, {packed.count / len(packed):.1f} examples per step, '
            f'{packed.padding_free:.0%} of the tokens are not padding, attention by '
            f'{setup.model.kernels.name}{dropped}')
  m = config.mesh
  hosts.log(f'{s.title}: mesh {m.data} x {m.fsdp} x {m.tensor}, {c.accumulate} micro-batches, '
            f'recomputes {c.remat}')
  if c.select == 'wins':
    hosts.log(f'{s.title}: at most {configs.epochs(c):g} epochs; stops early at a checkpoint of '
              f'{", ".join(map(str, setup.ends))} that does not win')
  elif not c.select:
    hosts.log(f'{s.title}: no judge compares checkpoints (config.train.select), so the last one is '
              f'used')


def _open(config, s, setup: Setup, kept: list[int]):
  """Writes the files of a new run -> the manager of checkpoints."""
  c, packed = config.train, setup.packed
  saver = store.manager(s.folder, *_kept(c, packed))
  if kept:
    hosts.log(f'{s.title}: continues after step {kept[-1]}')
  elif hosts.is_first_host():
    adapter = model_files.adapter(c.lora_rank, c.lora_alpha, configs.lora_targets(c), setup.source,
                                  s.folder) if c.lora_rank else None
    store.write_model_files(setup.model.config, setup.source, s.folder, adapter)
    stage.write_json(s.folder / ROWS, dict(shape=(packed.shape.rows, packed.shape.width)))
  return saver


def _kept(c, packed: packing.Packing) -> tuple[int | None, Callable[[int], bool]]:
  """Which checkpoints of a run stay: the arguments of `store.manager`."""
  return (c.keep if c.select in ('', 'wins') else None,
          lambda step: step % c.save_every == 0 or step == len(packed))


def _loop(config, s, setup: Setup, state, frozen, saver, mesh, end: int):
  """Runs the steps before `end`; writes metrics, progress and checkpoints.

  Raises Stopped, after saving, if a host was asked to stop.
  """
  c, packed = config.train, setup.packed
  key = jax.random.fold_in(jax.random.key(config.seed), 1)  # dropout and rounding
  writer = metrics.Writer(s.folder, int(state.step) - 1) if hosts.is_first_host() else None
  clock, alarms = metrics.Clock(), Alarms(writer.kept if writer else [])
  steps, unchecked, stop, agreement = len(packed), {}, False, preemption.Agreement()
  for i in range(int(state.step), end):
    batch = setup.make_batch(packed.rows(i), packed.shape)
    state, unchecked[i] = setup.step(state, frozen, sharding.put_batch(batch, mesh), key)
    clock.add(int((batch.segment_ids > 0).sum()))
    save = (i + 1) % c.save_every == 0 or i + 1 == steps
    stop = agreement.reached() and i + 1 < end
    if stop or i % c.log_every == 0 or save:
      # On every host: NaN or infinity aborts before a checkpoint is written.
      for number, values in unchecked.items():
        scalars = metrics.finite(f'step {number}, of {_some(packed.ids(number))}', values)
      unchecked = {}
    if i % c.log_every == 0 or save:
      if scalars.get('pair_share') == 0:  # demonstrations only
        scalars = {name: scalars[name] for name in ('loss', 'pair_share', 'grad_norm')}
      raised, messages = alarms.check(scalars)
      scalars |= raised | dict(tokens_per_second=clock.tokens_per_second())
      for message in messages:
        hosts.log(f'{s.title}  {i + 1}/{steps}  alarm: {message}')
      if writer:
        writer.write(i, scalars)
      shown = 'loss', 'margin', 'accuracy', 'tokens_per_second'
      hosts.log(metrics.progress(s.title, i + 1, steps,
                                 {name: scalars[name] for name in shown if name in scalars}))
    if save or stop:
      if writer:
        writer.flush()
      store.save(saver, i + 1, state.params, dict(opt_state=state.opt_state, step=state.step))
    if stop:
      break
  saver.wait_until_finished()
  if writer:
    writer.close()
  hosts.sync(f'{s.title} trained')
  saver.close()
  if stop:
    raise preemption.Stopped(f'{s.title}: stopped by SIGTERM; step {i + 1} of {steps} is saved')


def _finish(s, setup: Setup, end: int, stopped: str):
  """Marks the stage done, with a summary of the run that trained `end` steps."""
  data, packed = setup.data, setup.packed
  s.finish(schema.TrainingSummary(
      steps=end, loss=round(metrics.last(s.folder)['loss'], 4),
      params=model_files.recorded_hash(s.folder, end), examples=len(data.examples),
      padding_free=round(packed.padding_free, 3), dropped=data.dropped, stopped=stopped))


def _some(rows: list[list[str]], most: int = 20) -> str:
  names = [name for row in rows for name in row]
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def refuse_too_large(config, shape):
  """InputError, before anything is allocated, if the devices cannot hold the training state."""
  c, count = config.train, llama.param_count(shape)
  is_frozen = bool(c.lora_rank) or objectives.find(c).needs_reference_params
  needed = train_state.bytes_needed(sizing.trained(c, shape), c.moments,
                                    count if is_frozen else 0)
  available = hosts.memory()
  if needed > available:
    parts = 'parameters, gradients'
    if is_frozen:
      parts += ', LoRA adapters' if c.lora_rank else ', reference'
    raise InputError(
        f'training {config.name} at size {config.size} ({count:,} parameters) needs {needed:,} '
        f'bytes for {parts} and AdamW moments, and the {jax.device_count()} available devices have '
        f'{available:,}; run it on more devices (see launch/), or the whole loop at a size that '
        f'fits: python -m srlm_jax.loop --size=tiny --workdir=runs/demo')


def _model_config(config, source, workdir):
  """The model's config with this run's dtype and dropout; InputError for another model."""
  c = config.train
  if c.init:
    shape = model_config.load(_existing(config, source, workdir))
    base.check(config, shape, source)
  else:
    shape = base.preset(config.model)
  if c.max_length > shape.context:
    raise InputError(f'config.train.max_length is {c.max_length}, more than the {shape.context} '
                     f'tokens that the model supports; lower it')
  return dataclasses.replace(shape, dtype=c.dtype, dropout=c.dropout)


def _source(config, workdir):
  """The folder of the init model, or that of the corpus, which has a tokenizer."""
  init = config.train.init
  return stage.finished_model(workdir, init) if init else workdir / 'data' / 'corpus'


def _existing(config, source, workdir):
  if not model_files.exists(source):
    inputs = '' if config.data.source == 'sandbox' else ' --m0=FOLDER --data=FILE'
    raise InputError(f'{config.name} starts from {config.train.init}, which has no checkpoint in '
                     f'{source}; train it first, or run all stages in order: '
                     f'python -m srlm_jax.loop --size={config.size} --workdir={workdir}{inputs}')
  return source


def _start(config, setup: Setup, mesh) -> TrainState:
  """The state at step 0."""
  out = jax.tree.map(lambda x: x.sharding, setup.abstract)
  create = jax.jit(lambda p: TrainState.create(p, setup.tx), donate_argnums=0, out_shardings=out)
  return create(_start_params(config, setup, mesh))


def _start_params(config, setup: Setup, mesh):
  """The parameters of the init model, or random ones; with LoRA a new adapter."""
  if config.train.init and not config.train.lora_rank:
    return store.restore_params(setup.source, mesh, 'float32')[0]
  out = jax.tree.map(lambda x: x.sharding, setup.abstract.params)
  if config.train.lora_rank:
    init = functools.partial(lora.init, setup.abstract.params)
  else:
    init = functools.partial(llama.init_params, setup.model.config)
  return jax.jit(init, out_shardings=out)(jax.random.key(config.seed))


def _save_start(config, s, setup: Setup, mesh):
  """Saves the model that training starts from as step 0, if that is not saved yet."""
  hosts.log(f'{s.title}: the first checkpoint does not win, so the model that training starts from '
            f'is used, as step 0')
  if 0 in model_files.steps(s.folder):
    return
  with jax.set_mesh(mesh):
    saver = store.manager(s.folder, None)
    store.save(saver, 0, _start_params(config, setup, mesh), force=True)
    saver.wait_until_finished()
    hosts.sync(f'{s.title} step 0')
    saver.close()


def _resume(folder, step: int, abstract: TrainState, mesh) -> TrainState:
  """Restores the state after `step` onto the mesh."""
  if model_files.read_adapter(folder):
    params = store.restore_adapter(folder, mesh, step)
  else:
    params, _ = store.restore_params(folder, mesh, 'float32', step)
  rest = store.restore_train(folder, step, dict(opt_state=abstract.opt_state, step=abstract.step))
  return TrainState(step=rest['step'], params=params, opt_state=rest['opt_state'])


def _begun_rows(folder) -> tuple[int, int] | None:
  """The rows and their width of the run that has checkpoints in this folder; None for a new run."""
  if not model_files.steps(folder):
    return None
  if not (folder / ROWS).exists():
    raise InputError(f'{folder} has checkpoints but no {ROWS}, so it cannot be resumed; delete it '
                     f'to train again')
  return records.read_object(folder / ROWS, schema.Rows, f'delete {folder} to train again').shape


def _pack(config, data: training.Examples, mesh, multiple: int, epochs: float,
          rows: tuple[int, int] | None) -> packing.Packing:
  """`rows`: of `_known_rows`."""
  c = config.train
  parts = c.accumulate * mesh.shape['data'] * mesh.shape['fsdp']
  return packing.Packing(data.examples, c.batch, epochs, config.seed,
                         c.max_length if c.pack else 0, parts, multiple, rows)
