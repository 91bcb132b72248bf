"""Saves and restores the arrays of a checkpoint with Orbax, sharded; see `model_files` for its folder."""
import json

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from srlm_jax import InputError, model_files, sharding
from srlm_jax.checkpoint import hashes
from srlm_jax.models import config as model_config, llama

CHUNK_BYTES = 2**24  # of a stored array, compressed as one


def manager(folder, keep: int | None) -> ocp.CheckpointManager:
  """Orbax's manager of `folder`/steps: saves in the background, keeps the last `keep` steps (None: all)."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
  return ocp.CheckpointManager(epath.Path(folder).resolve() / 'steps', options=options)


def save(saver: ocp.CheckpointManager, step: int, params, train=None):
  """Starts to save parameters and `train` (what only training needs: optimizer moments, step), with
  the hashes of both and of the model's files, which must be there before."""
  names = dict(hashes.hash_all_dtypes(params),
               files=model_files.hashes(epath.Path(saver.directory).parent))
  items = dict(params=ocp.args.PyTreeSave(params, save_args=_by_layer(params)))
  if train is not None:
    items['train'] = ocp.args.PyTreeSave(train)
    names['train'] = hashes.hash_params(train)
  items['hash'] = ocp.args.JsonSave(names)
  saver.save(step, args=ocp.args.Composite(**items))


def restore_params(folder, mesh, dtype: str, step: int | None = None):
  """Parameters alone, straight onto `mesh` in `dtype` -> (params, hash).

  Raises InputError if the parameters, config.json or the tokenizer's files are not those that were
  saved together.
  """
  config = model_config.load(folder)
  step = model_files.latest(folder) if step is None else step
  abstract = abstract_on(mesh, llama.abstract_params(config), dtype)
  path = epath.Path(folder).resolve() / 'steps' / str(step)
  params = _restore(path / 'params', abstract)
  recorded = model_files.read_hashes(folder, step)
  found = hashes.hash_params(params)
  if found not in (recorded.get(dtype), recorded['stored']):
    raise InputError(f'{path}/params does not have the hash that it was saved with; the checkpoint is damaged')
  return params, recorded['stored']


def restore_train(folder, step: int, abstract):
  """What `save` was given as `train`, onto the shardings of `abstract`; the hash is checked."""
  path = epath.Path(folder).resolve() / 'steps' / str(step) / 'train'
  train = _restore(path, abstract)
  if hashes.hash_params(train) != model_files.read_hashes(folder, step).get('train'):
    raise InputError(f'{path} does not have the hash that it was saved with; the checkpoint is damaged: delete '
                     f'{path.parent}, and training resumes from the checkpoint before it')
  return train


def write_model_files(config: model_config.Config, source, folder):
  """Copies the files from `source`; writes config.json where there is none, for a model trained from nothing."""
  model_files.copy(source, folder)
  if not (epath.Path(source) / 'config.json').exists():
    (epath.Path(folder) / 'config.json').write_text(json.dumps(model_config.to_hf(config), indent=1) + '\n')


def abstract_on(mesh, tree, dtype: str):
  """Shapes -> shapes with their place on the mesh, in `dtype`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
                      tree, sharding.shardings(tree, mesh))


def _by_layer(params):
  """How parameters are stored: no chunk is of more than one layer, so that a layer can be read alone."""
  def one(path, x):
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if path[0].key == 'layers' else ())
  return jax.tree_util.tree_map_with_path(one, params)


def _restore(path, abstract):
  if not path.exists():
    raise InputError(f'{path} does not exist; train or convert that model first')
  args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype),
                      abstract)
  hosts = {d.process_index for x in jax.tree.leaves(abstract) for d in x.sharding.device_set}
  options = ocp.options.MultiprocessingOptions()
  if len(hosts) < jax.process_count():  # a host that samples on its own waits for no other
    options = ocp.options.MultiprocessingOptions(
        primary_host=min(hosts), active_processes=hosts, barrier_sync_key_prefix=f'host{min(hosts)}')
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    try:
      return reader.restore(path, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args))
    except Exception as error:  # whatever Orbax and TensorStore raise
      raise InputError(f'{path} {_why(handler, path, abstract, error)}') from error


def _why(handler, path, abstract, error) -> str:
  """Why arrays could not be restored: other arrays than expected, or damaged ones."""
  wanted = {jax.tree_util.keystr(p, simple=True, separator='.'): x.shape
            for p, x in jax.tree_util.tree_leaves_with_path(abstract)}
  try:
    stored = jax.tree_util.tree_leaves_with_path(handler.metadata(path).tree)
    found = {jax.tree_util.keystr(p, simple=True, separator='.'): tuple(x.shape) for p, x in stored}
  except Exception:  # the description is damaged too
    found = wanted
  if found != wanted:
    return 'is a checkpoint of another model than its config.json says'
  return (f'cannot be read ({type(error).__name__}); the checkpoint is damaged, restore it from a '
          f'copy')
