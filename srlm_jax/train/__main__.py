"""Trains one model: `python -m srlm_jax.train --config=configs/iter2.py --workdir=runs/x`."""
import dataclasses
import functools
import json

from etils import epath
import jax

from srlm_jax import (
  catalog,
  cli,
  closest,
  config as configs,
  hosts,
  InputError,
  metrics,
  model_files,
  records,
  sharding,
  stage,
)
from srlm_jax.checkpoint import hashes, store
from srlm_jax.data import examples as training, packing, tokenizer as tokenizers
from srlm_jax.models import config as model_config, kernels, llama
from srlm_jax.train import batch as batches, reference, state as train_state, step as train_step
from srlm_jax.train.alarms import Alarms
from srlm_jax.train.state import TrainState

ROWS = 'rows.json'  # in the model's folder: the number and the width of the rows of a step


def run(config, workdir):
  """Reads the init model and this model's data; writes MODEL/model: checkpoints, metrics.jsonl."""
  config = catalog.find('train').view(config)
  refuse_too_large(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  with jax.set_mesh(mesh):
    _train(config, epath.Path(workdir), mesh)


def _train(config, workdir, mesh):
  c = config.train
  source = stage.finished_model(workdir, c.init) if c.init else workdir / 'data' / 'corpus'
  shape = _model_config(config, source, workdir)
  files = [catalog.training_file(workdir, config, name)
           for name in configs.training_data(config)]
  s = stage.Stage(catalog.find('train'), config, workdir,
                  more_inputs=files if c.init else [*files, source / 'tokenizer.model'])
  if s.done:
    return

  tokenizer = tokenizers.load(source, shape.V)
  try:
    data = _examples(c, config.chat, files, tokenizer)
  except training.NoExamples as error:
    raise InputError(f'{", ".join(map(str, files))}: {error}') from error
  choice = kernels.for_training(jax.default_backend(), shape, c.remat)
  model = llama.Llama(shape, choice, c.remat)
  kept = model_files.steps(s.folder)
  packed = _pack(config, data, mesh, choice.width_multiple, c.epochs, s.folder if kept else None)
  tx = train_state.optimizer(c, len(packed))
  abstract = train_state.abstract(shape, tx, mesh)
  if c.loss == 'sft':
    make_batch = batches.pack
  elif c.reference == 'step':
    make_batch = batches.pack_pairs
  else:
    once = _pack(config, data, mesh, choice.width_multiple, epochs=1)
    logps = reference.cached(config, workdir, files, source, model, once, mesh)
    make_batch = functools.partial(batches.pack_cached_pairs, reference_logps=logps)
  step = train_step.make(model, tx, c, abstract)
  if kept:
    state = _resume(s.folder, kept[-1], abstract, mesh)
  else:
    state = _start(config, source, shape, tx, abstract, mesh)
  in_step = c.loss == 'dpo' and c.reference == 'step'
  reference_params = store.restore_params(source, mesh, c.dtype)[0] if in_step else {}
  s.begin(mesh)  # after everything that can raise InputError
  rows, width = packed.shape.rows, packed.shape.width
  dropped = ''.join(f'; dropped {n} {why}' for why, n in data.dropped.items())
  hosts.say(f'{s.title}: {len(data.examples)} examples, {len(packed)} steps of {rows} rows of '
            f'{width} tokens, {packed.count / len(packed):.1f} examples per step, '
            f'{packed.padding_free:.0%} of the tokens are not padding, attention by {choice.name}'
            f'{dropped}')
  saver = store.manager(s.folder, None if c.select else c.keep)
  if kept:
    hosts.say(f'{s.title}: continues after step {int(state.step)}')
  elif hosts.is_first_host():
    store.write_model_files(shape, source, s.folder)
    stage.write_json(s.folder / ROWS, dict(shape=(rows, width)))
  state = _steps(config, s, step, state, reference_params, packed, make_batch, saver, mesh)
  saver.close()
  s.finish(steps=len(packed), loss=round(metrics.last(s.folder)['loss'], 4),
           params=hashes.hash_params(state.params), examples=len(data.examples),
           padding_free=round(packed.padding_free, 3), dropped=data.dropped)


def _steps(config, s, step, state, reference_params, packed, make_batch, saver, mesh) -> TrainState:
  """Runs the remaining steps; writes metrics, progress and checkpoints."""
  c = config.train
  key = jax.random.fold_in(jax.random.key(config.seed), 1)  # dropout
  writer = metrics.Writer(s.folder, int(state.step) - 1) if hosts.is_first_host() else None
  clock, alarms = metrics.Clock(), Alarms(writer.kept if writer else [])
  steps, unchecked = len(packed), {}
  for i in range(int(state.step), steps):
    batch = make_batch(packed.rows(i), packed.shape)
    state, unchecked[i] = step(state, reference_params, sharding.put_batch(batch, mesh), key)
    clock.add(int((batch.segment_ids > 0).sum()))
    save = (i + 1) % c.save_every == 0 or i + 1 == steps
    if i % c.log_every == 0 or save:
      # On every host: NaN or infinity aborts before a checkpoint is written.
      for number, values in unchecked.items():
        scalars = metrics.finite(f'step {number}, of {_some(packed.ids(number))}', values)
      unchecked = {}
      raised, sentences = alarms.look(scalars)
      scalars |= raised | dict(tokens_per_second=clock.tokens_per_second())
      for sentence in sentences:
        hosts.say(f'{s.title}  {i + 1}/{steps}  alarm: {sentence}')
      if writer:
        writer.write(i, scalars)
      shown = 'loss', 'margin', 'accuracy', 'tokens_per_second'
      hosts.say(metrics.progress(s.title, i + 1, steps,
                                 {name: scalars[name] for name in shown if name in scalars}))
    if save:
      store.save(saver, i + 1, state.params, dict(opt_state=state.opt_state, step=state.step))
  saver.wait_until_finished()
  if writer:
    writer.close()
  hosts.sync(f'{s.title} trained')
  return state


def _some(rows: list[list[str]], most: int = 20) -> str:
  names = [name for row in rows for name in row]
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def refuse_too_large(config):
  """InputError, before anything is allocated, if the devices cannot hold the training state."""
  if not config.model:
    return
  count = llama.param_count(_preset(config.model))
  with_reference = config.train.loss == 'dpo' and config.train.reference == 'step'
  needed = train_state.bytes_needed(count, with_reference)
  available = hosts.memory()
  if needed > available:
    parts = 'parameters, gradients, reference' if with_reference else 'parameters, gradients'
    raise InputError(
        f'training {config.name} at size {config.size} ({count:,} parameters) needs {needed:,} '
        f'bytes for {parts} and AdamW moments, and the {jax.device_count()} available devices have '
        f'{available:,}; run it on more devices (see launch/), or the whole loop at a size that '
        f'fits: python -m srlm_jax.loop --size=tiny --workdir=runs/demo')


def _preset(name: str):
  if name not in model_config.PRESETS:
    raise InputError(f'config.model is {name!r}{closest(name, model_config.PRESETS)}; '
                     f'use one of {", ".join(model_config.PRESETS)}, or empty for any model')
  return model_config.PRESETS[name]


def _model_config(config, source, workdir):
  """The model's config with this run's dtype and dropout; InputError for another model."""
  c = config.train
  shape = model_config.load(_existing(config, source, workdir)) if c.init else _preset(config.model)
  if config.model:
    for field in ('D', 'F', 'K', 'G', 'H', 'V', 'layers'):
      found, wanted = getattr(shape, field), getattr(_preset(config.model), field)
      if found != wanted:
        raise InputError(f'{source} has {field} = {found}, and config.model = {config.model} has '
                         f'{wanted}; name the right one, or --config.model= for any')
  if c.max_length > shape.context:
    raise InputError(f'config.train.max_length is {c.max_length}, more than the {shape.context} '
                     f'tokens that the model supports; lower it')
  return dataclasses.replace(shape, dtype=c.dtype, dropout=c.dropout)


def _existing(config, source, workdir):
  if not model_files.exists(source):
    inputs = '' if config.data.source == 'sandbox' else ' --m0=FOLDER --data=FILE'
    raise InputError(f'{config.name} starts from {config.train.init}, which has no checkpoint in '
                     f'{source}; train it first, or run all stages in order: '
                     f'python -m srlm_jax.loop --size={config.size} --workdir={workdir}{inputs}')
  return source


def _start(config, source, shape, tx, abstract, mesh) -> TrainState:
  """Step 0: the parameters of the init model, or random ones."""
  if config.train.init:
    params, _ = store.restore_params(source, mesh, 'float32')
  else:
    out = jax.tree.map(lambda x: x.sharding, abstract.params)
    init = jax.jit(lambda key: llama.init_params(shape, key), out_shardings=out)
    params = init(jax.random.key(config.seed))
  out = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(lambda p: TrainState.create(p, tx), donate_argnums=0, out_shardings=out)(params)


def _resume(folder, step: int, abstract: TrainState, mesh) -> TrainState:
  """Restores the state after `step` onto the mesh."""
  params, _ = store.restore_params(folder, mesh, 'float32', step)
  rest = store.restore_train(folder, step, dict(opt_state=abstract.opt_state, step=abstract.step))
  return TrainState(step=rest['step'], params=params, opt_state=rest['opt_state'])


def _examples(c, chat, files, tokenizer) -> training.Examples:
  if c.data == ('corpus',) and c.loss == 'sft':
    return training.corpus(_read(files, 'id', 'text'), tokenizer, c.max_length)
  if c.loss == 'dpo':
    fields = ('id', 'prompt', 'chosen', 'rejected', 'chosen_finish', 'rejected_finish')
    return training.dpo(_read(files, *fields), tokenizer, chat, c.max_length)
  return training.sft(_responses(files), tokenizer, chat, c.max_length)


def _responses(files):
  """The records that SFT trains on; of a pair, the chosen response and its finish."""
  for file in files:
    if file.name == 'pairs.jsonl':
      for pair in records.read(file, 'id', 'prompt', 'chosen', 'chosen_finish'):
        yield dict(id=pair['id'], prompt=pair['prompt'], response=pair['chosen'],
                   finish=pair['chosen_finish'])
    elif file.name == 'positives.jsonl':
      yield from records.read(file, 'id', 'prompt', 'response', 'finish')
    else:
      yield from records.read(file, 'id', 'prompt', 'response')


def _read(files, *fields):
  for file in files:
    yield from records.read(file, *fields)


def _pack(config, data: training.Examples, mesh, multiple: int, epochs: float,
          begun=None) -> packing.Packing:
  """`begun`: the folder of a run that is resumed with the same rows, on whatever mesh."""
  c = config.train
  if len(data.examples) < c.batch:
    dropped = ', '.join(f'{n} {why}' for why, n in data.dropped.items())
    raise InputError(f'{config.name} has {len(data.examples)} examples to train on (dropped: '
                     f'{dropped or "none"}), fewer than one batch of {c.batch}; make more data, or '
                     f'lower config.train.batch')
  if begun and not (begun / ROWS).exists():
    raise InputError(f'{begun} has checkpoints but no {ROWS}, so it cannot be resumed; delete it '
                     f'to train again')
  shape = json.loads((begun / ROWS).read_text())['shape'] if begun else None
  parts = c.accumulate * mesh.shape['data'] * mesh.shape['fsdp']
  return packing.Packing(data.examples, c.batch, epochs, config.seed,
                         c.max_length if c.pack else 0, parts, multiple, shape)


if __name__ == '__main__':
  cli.main(run)
