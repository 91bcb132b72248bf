"""Trains one model of the table: `python -m srlm_jax.train --config=configs/iter2.py --workdir=runs/x`."""
import dataclasses
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
from srlm_jax.train import reference, state as train_state, step as train_step
from srlm_jax.train.alarms import Alarms
from srlm_jax.train.state import TrainState

ROWS = 'rows.json'  # in the model's folder: how many rows a step has, and how wide they are


def run(config, workdir):
  """Reads the init model and this model's data; writes MODEL/model: a checkpoint folder, metrics.jsonl."""
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
  except training.NothingLeft as error:
    raise InputError(f'{", ".join(map(str, files))}: {error}') from error
  choice = kernels.to_train(jax.default_backend(), shape, c.remat)
  model = llama.Llama(shape, choice, c.remat)
  rows = _batches(config, data, mesh, choice.width, c.epochs, s.folder if model_files.steps(s.folder) else None)
  tx = train_state.optimizer(c, len(rows))
  state = train_state.abstract(shape, tx, mesh)
  if c.loss == 'dpo' and c.reference == 'cached':
    once = _batches(config, data, mesh, choice.width, 1)
    rows.reference = reference.cached(config, workdir, files, source, model, once, mesh)
  step, kept = train_step.make(model, tx, c, state), model_files.steps(s.folder)
  state = _resume(s.folder, kept[-1], state, mesh) if kept else _start(config, source, shape, tx, state, mesh)
  # DPO's reference is parameters alone, in the dtype in which both are run
  in_step = c.loss == 'dpo' and c.reference == 'step'
  older = store.restore_params(source, mesh, c.dtype)[0] if in_step else {}
  s.begin(mesh)  # after all that can be refused
  hosts.say(f'{s.title}: {len(data.examples)} examples, {len(rows)} steps of {rows.rows} rows of {rows.width} tokens, '
            f'{rows.seen / len(rows):.1f} examples a step, {rows.real:.0%} of the places hold a token'
            f', attention by {choice.name}' + ''.join(f'; dropped {n} {why}' for why, n in data.dropped.items()))
  saver = store.manager(s.folder, None if c.select else c.keep)
  if kept:
    hosts.say(f'{s.title}: continues after step {int(state.step)}')
  elif hosts.is_first_host():
    store.write_model_files(shape, source, s.folder)
    stage.write_json(s.folder / ROWS, dict(shape=(rows.rows, rows.width)))
  state = _steps(config, s, step, state, older, rows, saver, mesh)
  saver.close()
  s.finish(steps=len(rows), loss=round(metrics.last(s.folder)['loss'], 4),
           params=hashes.hash_params(state.params),
           examples=len(data.examples), real=round(rows.real, 3), dropped=data.dropped)


def _steps(config, s, step, state, older, rows, saver, mesh) -> TrainState:
  """Takes the steps that are left, with metrics, progress and checkpoints on the way."""
  c = config.train
  key = jax.random.fold_in(jax.random.key(config.seed), 1)  # dropout
  writer = metrics.Writer(s.folder, int(state.step) - 1) if hosts.is_first_host() else None
  clock, alarms, steps, waiting = metrics.Clock(), Alarms(writer.kept if writer else []), len(rows), {}
  for i in range(int(state.step), steps):
    batch = rows.at(i)
    state, waiting[i] = step(state, older, sharding.put_batch(batch, mesh), key)
    clock.add(int((batch['segments'] > 0).sum()))
    save = (i + 1) % c.save_every == 0 or i + 1 == steps
    if i % c.log_every == 0 or save:
      for at, values in waiting.items():  # on every host, and before a checkpoint could hold it
        scalars = metrics.finite(f'step {at}, of {_few(rows.ids(at))}', values)
      waiting = {}
      raised, sentences = alarms.look(scalars)
      scalars |= raised | dict(tokens_per_second=clock.tokens_per_second())
      for sentence in sentences:
        hosts.say(f'{s.title}  {i + 1}/{steps}  alarm: {sentence}')
      if writer:
        writer.write(i, scalars)
      hosts.say(metrics.progress(s.title, i + 1, steps, {
          k: scalars[k] for k in ('loss', 'margin', 'accuracy', 'tokens_per_second') if k in scalars}))
    if save:
      store.save(saver, i + 1, state.params, dict(opt_state=state.opt_state, step=state.step))
  saver.wait_until_finished()
  if writer:
    writer.close()
  hosts.sync(f'{s.title} trained')
  return state


def _few(rows: list[list[str]], most: int = 20) -> str:
  names = [name for row in rows for name in row]
  return ', '.join(names[:most]) + f' and {len(names) - most} more' * (len(names) > most)


def refuse_too_large(config):
  """Raises InputError, before anything is allocated, if this machine cannot hold the training state."""
  if not config.model:
    return
  count = llama.param_count(_preset(config.model))
  with_reference = config.train.loss == 'dpo' and config.train.reference == 'step'
  needed = train_state.bytes_needed(count, with_reference)
  here = hosts.memory()
  if needed > here:
    raise InputError(
        f'training {config.name} at size {config.size} ({count:,} parameters) needs {needed:,} bytes for parameters, '
        f'gradients{", reference" * with_reference} and AdamW moments, and the devices here '
        f'({jax.device_count()}) have {here:,}; run it on more devices (see launch/), or the whole loop at a size that '
        f'fits: python -m srlm_jax.loop --size=tiny --workdir=runs/demo')


def _preset(name: str):
  if name not in model_config.PRESETS:
    raise InputError(f'config.model is {name!r}{closest(name, model_config.PRESETS)}; '
                     f'it is one of {", ".join(model_config.PRESETS)}, or empty for any')
  return model_config.PRESETS[name]


def _model_config(config, source, workdir):
  """The shape of the model, with this run's dtype and dropout; refuses a checkpoint of another model."""
  c = config.train
  shape = model_config.load(_existing(config, source, workdir)) if c.init else _preset(config.model)
  if config.model:
    for field in ('D', 'F', 'K', 'G', 'H', 'V', 'layers'):
      found, wanted = getattr(shape, field), getattr(_preset(config.model), field)
      if found != wanted:
        raise InputError(f'{source} has {field} = {found}, and config.model = {config.model} has {wanted}; '
                         f'name the right one, or --config.model= for any')
  if c.max_length > shape.context:
    raise InputError(f'config.train.max_length is {c.max_length}, more than the {shape.context} tokens that the model '
                     f'was made for; lower it')
  return dataclasses.replace(shape, dtype=c.dtype, dropout=c.dropout)


def _existing(config, source, workdir):
  if not model_files.exists(source):
    inputs = '' if config.data.source == 'sandbox' else ' --m0=FOLDER --data=FILE'
    raise InputError(f'{config.name} starts from {config.train.init}, which has no checkpoint in {source}; make it '
                     f'first, or all in order: '
                     f'python -m srlm_jax.loop --size={config.size} --workdir={workdir}{inputs}')
  return source


def _start(config, source, shape, tx, abstract, mesh) -> TrainState:
  """Step 0: the parameters of the init model, or random ones."""
  if config.train.init:
    params, _ = store.restore_params(source, mesh, 'float32')
  else:
    places = jax.tree.map(lambda x: x.sharding, abstract.params)
    params = jax.jit(lambda key: llama.init_params(shape, key), out_shardings=places)(jax.random.key(config.seed))
  places = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(lambda p: TrainState.create(p, tx), donate_argnums=0, out_shardings=places)(params)


def _resume(folder, step: int, abstract: TrainState, mesh) -> TrainState:
  """The state as it was after `step`, straight onto its places."""
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
  """The records that SFT trains on; of pairs the chosen response, and whether it was finished."""
  for file in files:
    if file.name == 'pairs.jsonl':
      for pair in records.read(file, 'id', 'prompt', 'chosen', 'chosen_finish'):
        yield dict(id=pair['id'], prompt=pair['prompt'], response=pair['chosen'], finish=pair['chosen_finish'])
    elif file.name == 'positives.jsonl':
      yield from records.read(file, 'id', 'prompt', 'response', 'finish')
    else:
      yield from records.read(file, 'id', 'prompt', 'response')


def _read(files, *fields):
  for file in files:
    yield from records.read(file, *fields)


def _batches(config, data: training.Examples, mesh, multiple: int, epochs: float, begun=None) -> packing.Batches:
  """`begun`: the folder of a model that goes on with the rows that it began with, on whatever mesh."""
  c = config.train
  if len(data.examples) < c.batch:
    left = ''.join(f', {n} {why}' for why, n in data.dropped.items())
    raise InputError(f'{config.name} has {len(data.examples)} examples to train on (dropped{left or " none"}), fewer '
                     f'than one batch of {c.batch}; make more data, or lower config.train.batch')
  if begun and not (begun / ROWS).exists():
    raise InputError(f'{begun} has checkpoints and no {ROWS}, so it cannot go on; delete it to train anew')
  shape = json.loads((begun / ROWS).read_text())['shape'] if begun else None
  return packing.Batches(data.examples, c.batch, epochs, config.seed, c.max_length if c.pack else 0,
                         c.accumulate * mesh.shape['data'] * mesh.shape['fsdp'], multiple, shape)


if __name__ == '__main__':
  cli.main(run)
