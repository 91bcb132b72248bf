"""Saves and restores the sharded arrays of a checkpoint with Orbax.

`model_files` describes the checkpoint folder.
"""
from collections.abc import Callable
import dataclasses
import json

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from srlm_jax import hosts, InputError, model_files, sharding, storage
from srlm_jax.checkpoint import arrays, distribute, hashes
from srlm_jax.models import config as model_config, llama, lora

CHUNK_BYTES = 2**24  # bytes per chunk of a stored array, before compression


@dataclasses.dataclass
class _Kept:
  """Orbax's policy for which checkpoints to keep; see `manager`."""
  keep: int | None
  is_planned: Callable[[int], bool]

  def should_preserve(self, checkpoints, *, context):
    """-> whether to keep each of the checkpoints, which are in ascending order."""
    del context
    kept = self.kept([c.step for c in checkpoints])
    return [c.step in kept for c in checkpoints]

  def kept(self, steps: list[int]) -> set[int]:
    """Those of the steps, in ascending order, that are kept."""
    planned = list(filter(self.is_planned, steps))
    return {*(planned[-self.keep:] if self.keep else planned), *steps[-1:]}


class _DurableStep(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """A step whose files are durable before it gets its name, and whose name is before the next one.

  TensorStore syncs the arrays. Orbax alone syncs neither its own files nor the new name. It writes
  two of them, which no restore needs, right before it renames the step: they are synced after that,
  and before older steps are deleted.
  """

  async def finalize(self):
    is_step = self.get_final().name.isdigit()  # else it is a part of one, which is still to follow
    if is_step:
      storage.sync(self.get())
    await super().finalize()
    if is_step:
      storage.sync(self.get_final())


def manager(folder, keep: int | None, is_planned: Callable[[int], bool] = lambda step: True,
            ) -> ocp.CheckpointManager:
  """Orbax's manager of `folder`/steps: saves asynchronously, keeps the last `keep` steps or all.

  A step that is not planned, which a run saves before it stops, is kept until the next save: so an
  interrupted run ends with the same checkpoints as any other.
  """
  steps = storage.absolute(folder) / 'steps'
  storage.make_folder(steps)
  options = ocp.CheckpointManagerOptions(
      preservation_policy=_Kept(keep, is_planned), enable_async_checkpointing=True,
      temporary_path_class=None if storage.is_remote(steps) else _DurableStep)
  return ocp.CheckpointManager(steps, options=options)


def prune(folder, keep: int | None, is_planned: Callable[[int], bool] = lambda step: True):
  """Deletes what `manager` would not keep in `folder`/steps; arguments as there.

  A run that is killed after its last save may leave an older step, or a part of one.
  """
  kept = {str(step) for step in _Kept(keep, is_planned).kept(model_files.steps(folder))}
  for path in (storage.absolute(folder) / 'steps').iterdir():
    is_part = ocp.path.atomicity.TMP_DIR_SUFFIX in path.name
    if (is_part or path.name.isdigit()) and path.name not in kept:
      path.rmtree()


def save(saver: ocp.CheckpointManager, step: int, params, train=None, force: bool = False):
  """Starts an asynchronous save of the parameters, of `train` and of their hashes.

  Orbax ignores a step before the last one without `force`.
  `train` is what only training needs: optimizer state and step. The hashes also cover config.json,
  the tokenizer files and lora.json, so `write_model_files` must run first.
  """
  folder = epath.Path(saver.directory).parent
  recorded = model_files.StepHashes(
      params=hashes.hash_all_dtypes(params, identity(folder)),
      files=model_files.hashes(folder),
      train=None if train is None else hashes.hash_params(train))
  items = dict(params=ocp.args.PyTreeSave(params, save_args=_save_args(params)))
  if train is not None:
    items['train'] = ocp.args.PyTreeSave(train)
  items['hash'] = ocp.args.JsonSave(recorded.to_json())
  saver.save(step, args=ocp.args.Composite(**items), force=force)


def identity(folder) -> str:
  """What the hash of a model's parameters covers besides them: '' without an adapter."""
  adapter = model_files.read_adapter(folder)
  return adapter.identity if adapter else ''


def restore_params(folder, mesh, dtype: str, step: int | None = None, once: bool = False,
                   merge: bool = True):
  """Restores only the parameters onto `mesh`, in `dtype` -> (params, hash of the stored ones).

  Of a LoRA adapter: those of the model that it changes, with the adapter. With `merge` the adapters
  of all rounds are added to the weights in float32. The weights are rounded to `dtype` before, as
  in training, and the sum is rounded again. Without, the adapters lie beside the weights in
  float32, see models/lora.py.

  In a run on several hosts all of them must call it, each with the mesh of its group of hosts. With
  `once` they read every byte once, see `distribute`; else each reads what its devices need, which
  only a mesh of all hosts allows. Prints how many bytes were read.

  Raises InputError if there is no such step, or if the parameters, config.json or the tokenizer
  files differ from those that were saved.
  """
  step = model_files.find_step(folder, step)
  if adapter := model_files.read_adapter(folder):
    recorded = model_files.recorded_hash(folder, step)  # also checks the model that it changes
    base = model_files.base_folder(folder, adapter)
    params, _ = restore_params(base, mesh, dtype, adapter.step, once, merge=False)
    params = lora.join(params, restore_adapter(folder, mesh, step), adapter.alpha / adapter.rank)
    return lora.merge(params) if merge else params, recorded
  abstract = abstract_on(mesh, llama.abstract_params(model_config.load(folder)), dtype)
  path = storage.absolute(folder) / 'steps' / str(step)
  before = distribute.bytes_read()
  restore = _restore_once if once and jax.process_count() > 1 else _restore
  params = restore(path / 'params', abstract)
  read = hosts.gather(distribute.bytes_read() - before)
  each = f' by {len(read)} hosts, at most {max(read):,} by one' if len(read) > 1 else ''
  hosts.log(f'{path}: {sum(read):,} bytes of parameters read{each}')
  recorded = model_files.read_hashes(folder, step).params
  # A hash covers the dtype, so it can only match the recorded hash of the restored dtype.
  if hashes.hash_params(params) not in dataclasses.astuple(recorded):
    raise _unlike_hash(path / 'params')
  return params, recorded.stored


def restore_adapter(folder, mesh, step: int | None = None):
  """Restores a LoRA adapter alone onto `mesh`, in float32. Every host reads all of it."""
  tree = read_adapter(folder, step)
  return jax.tree.map(sharding.put, tree, sharding.shardings(tree, mesh))


def read_adapters(folder, step: int) -> tuple:
  """-> the folder and step of the model below all LoRA adapters, and {path: array} of these.

  The adapters of several rounds are joined, see `lora.join`; none: {}.
  """
  adapter = model_files.read_adapter(folder)
  if adapter is None:
    return folder, step, {}
  own = read_adapter(folder, step)
  root, root_step, older = read_adapters(model_files.base_folder(folder, adapter), adapter.step)
  joined = lora.join(traverse_util.unflatten_dict(older, sep='.'), own,
                     adapter.alpha / adapter.rank)
  flat = traverse_util.flatten_dict(joined, sep='.')
  return root, root_step, {name: np.asarray(x) for name, x in flat.items()}


def read_adapter(folder, step: int | None = None) -> dict:
  """Reads a LoRA adapter as numpy arrays. Raises InputError if it is missing or damaged."""
  step = model_files.find_step(folder, step)
  recorded = model_files.recorded_hash(folder, step)  # before a changed lora.json is used
  adapter = model_files.read_adapter(folder)
  path = storage.absolute(folder) / 'steps' / str(step) / 'params'
  shapes = traverse_util.flatten_dict(
      lora.shapes(model_config.load(folder), adapter.rank, adapter.targets), sep='.')
  stored = arrays.open_all(path, {name: x.shape for name, x in shapes.items()})
  tree = traverse_util.unflatten_dict({name: arrays.read(x) for name, x in stored.items()}, sep='.')
  if hashes.hash_params(tree, more=adapter.identity) != recorded:
    raise _unlike_hash(path)
  return tree


def _unlike_hash(path) -> InputError:
  return InputError(f'{path} does not match its recorded hash; the checkpoint is damaged, restore '
                    f'it from a copy')


def restore_train(folder, step: int, abstract):
  """Restores the `train` argument of `save` with the shapes and shardings of `abstract`.

  Raises InputError if it does not match its recorded hash.
  """
  path = storage.absolute(folder) / 'steps' / str(step) / 'train'
  train = _restore(path, abstract)
  if hashes.hash_params(train) != model_files.read_hashes(folder, step).train:
    raise InputError(f'{path} does not match its recorded hash; the checkpoint is damaged: delete '
                     f'{path.parent} to resume from the checkpoint before it')
  return train


def write_model_files(config: model_config.Config, source, folder,
                      adapter: model_files.Adapter | None = None):
  """Copies config.json and the tokenizer files from `source` to `folder`; writes lora.json.

  Writes config.json from `config` if `source` has none: a model trained from random weights.
  """
  model_files.copy(source, folder)
  if not (epath.Path(source) / 'config.json').exists():
    text = json.dumps(model_config.to_hf(config), indent=1)
    (epath.Path(folder) / 'config.json').write_text(text + '\n')
  if adapter:
    text = json.dumps(dataclasses.asdict(adapter), indent=1)
    (epath.Path(folder) / model_files.LORA).write_text(text + '\n')
  storage.sync(folder)  # a resumed run does not write them again


def abstract_on(mesh, tree, dtype: str):
  """A pytree of shapes -> the same with `dtype` and with shardings on `mesh`."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
      tree, sharding.shardings(tree, mesh))


def _save_args(params):
  """Orbax's arguments for parameters: no chunk spans layers, so that a layer can be read alone."""
  def one(path, x):
    shard_axes = (0,) if path[0].key == 'layers' else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=shard_axes)
  return jax.tree_util.tree_map_with_path(one, params)


def _restore_once(path, abstract):
  """Restores parameters so that no two hosts read the same; errors as `_restore`."""
  mesh = jax.tree.leaves(abstract)[0].sharding.mesh
  abstract = traverse_util.flatten_dict(abstract, sep='.')
  stored = arrays.open_all(path, {name: x.shape for name, x in abstract.items()})
  return traverse_util.unflatten_dict(distribute.restore(stored, abstract, mesh), sep='.')


def _restore(path, abstract):
  """Restores a pytree of arrays; InputError if it is missing, damaged or of another model."""
  if not path.exists():
    raise InputError(f'{path} does not exist; train or convert that model first')
  arrays.check(path)
  args = jax.tree.map(
      lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype),
      abstract)
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.Checkpointer(handler) as reader:
    try:
      return reader.restore(path, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args))
    except Exception as error:  # Orbax and TensorStore raise many types
      raise InputError(f'{path} {_failure(handler, path, abstract, error)}') from error


def _failure(handler, path, abstract, error) -> str:
  """The reason why a restore failed: arrays of another model, or damaged ones."""
  expected = {jax.tree_util.keystr(p, simple=True, separator='.'): x.shape
              for p, x in jax.tree_util.tree_leaves_with_path(abstract)}
  try:
    stored = jax.tree_util.tree_leaves_with_path(handler.metadata(path).tree)
    found = {jax.tree_util.keystr(p, simple=True, separator='.'): tuple(x.shape)
             for p, x in stored}
  except Exception:  # the metadata is damaged too
    found = expected
  if found != expected:
    return ('is the checkpoint of another model than config.json describes; restore the '
            'config.json that was saved with it')
  return (f'cannot be read ({type(error).__name__}); the checkpoint is damaged, restore it from a '
          f'copy')
