"""Checkpoints: a folder with config.json, the tokenizer's files, and steps/N/{params,train,hash} (Orbax).

Every model of a run is such a folder, a converted one (step 0, parameters alone) like a trained one.
"""
import functools
import hashlib
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from srlm_jax import InputError, sharding
from srlm_jax.data import records
from srlm_jax.models import config as model_config, llama

TOKENIZER_FILES = ('tokenizer.model', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
                   'generation_config.json', 'chat_template.jinja')
SELECTED = 'selected.json'  # in a folder, of whose steps one was chosen
SOURCE = 'source.json'  # of a converted model: hashes of the Hugging Face folder it came from
HASH_FORMAT = 3  # of a step's `hash`; format 1 missed changes that cancel, and 2 had no `files`
CHUNK_BYTES = 2**24  # of a stored array, compressed as one


def manager(folder, keep: int | None) -> ocp.CheckpointManager:
  """Orbax's manager of `folder`/steps: saves in the background, keeps the last `keep` steps (None: all)."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
  return ocp.CheckpointManager(epath.Path(folder).resolve() / 'steps', options=options)


def save(saver: ocp.CheckpointManager, step: int, params, train=None):
  """Starts to save parameters and `train` (what only training needs: optimizer moments, step), with
  the hashes of both and of the model's files, which must be there before."""
  names = dict(hashes(params), files=file_hashes(epath.Path(saver.directory).parent))
  items = dict(params=ocp.args.PyTreeSave(params, save_args=_by_layer(params)))
  if train is not None:
    items['train'] = ocp.args.PyTreeSave(train)
    names['train'] = hash_params(train)
  items['hash'] = ocp.args.JsonSave(names)
  saver.save(step, args=ocp.args.Composite(**items))


def restore_params(folder, mesh, dtype: str, step: int | None = None):
  """Parameters alone, straight onto `mesh` in `dtype` -> (params, hash).

  Raises InputError if the parameters, config.json or the tokenizer's files are not those that were
  saved together.
  """
  config = model_config.load(folder)
  step = latest(folder) if step is None else step
  abstract = abstract_on(mesh, llama.abstract_params(config), dtype)
  path = epath.Path(folder).resolve() / 'steps' / str(step)
  params = _restore(path / 'params', abstract)
  recorded = _recorded(folder, step)
  found = hash_params(params)
  if found not in (recorded.get(dtype), recorded['stored']):
    raise InputError(f'{path}/params does not have the hash that it was saved with; the checkpoint is damaged')
  return params, recorded['stored']


def recorded_hash(folder, step: int | None = None) -> str:
  """The name of a checkpoint's parameters, without reading them."""
  return recorded(folder, step)[0]


def recorded(folder, step: int | None = None) -> tuple[str, dict[str, str]]:
  """The name of a checkpoint's parameters and {file: hash} of the model's files, checked."""
  found = _recorded(folder, latest(folder) if step is None else step)
  return found['stored'], found['files']


def restore_train(folder, step: int, abstract):
  """What `save` was given as `train`, onto the shardings of `abstract`; the hash is checked."""
  path = epath.Path(folder).resolve() / 'steps' / str(step) / 'train'
  train = _restore(path, abstract)
  if hash_params(train) != _recorded(folder, step).get('train'):
    raise InputError(f'{path} does not have the hash that it was saved with; the checkpoint is damaged: delete '
                     f'{path.parent}, and training resumes from the checkpoint before it')
  return train


def steps(folder) -> list[int]:
  """The whole steps of a checkpoint folder, in order."""
  place = epath.Path(folder) / 'steps'
  return sorted(int(p.name) for p in place.iterdir() if p.name.isdigit()) if place.exists() else []


def latest(folder) -> int:
  """The step that stands for the model of a checkpoint folder: the selected one, or else the last."""
  if not (found := steps(folder)):
    raise InputError(f'no checkpoint in {folder}; train or convert that model first')
  selected = epath.Path(folder) / SELECTED
  return json.loads(selected.read_text())['step'] if selected.exists() else found[-1]


def exists(folder) -> bool:
  try:
    return latest(folder) >= 0
  except InputError:
    return False


def file_hashes(folder) -> dict[str, str]:
  """{name: hash} of config.json and the tokenizer's files of a model folder, without which parameters mean nothing."""
  paths = ((name, epath.Path(folder) / name) for name in ('config.json', *TOKENIZER_FILES))
  return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths if path.exists()}


def read_source(folder) -> dict[str, list[str]]:
  """The source.json of a converted model: {file: [hash, stamp]} of what it was converted from."""
  path, advice = epath.Path(folder) / SOURCE, f'delete {folder} and convert that model again'
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or not all(
      isinstance(entry, list) and len(entry) == 2 for entry in found.values()):
    raise InputError(f'{path} is damaged; {advice}')
  return found


def copy_model_files(source, folder):
  """Copies config.json and the tokenizer's files, without which parameters mean nothing."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('config.json', *TOKENIZER_FILES):
    if (epath.Path(source) / name).exists():
      (epath.Path(source) / name).copy(folder / name, overwrite=True)


def write_model_files(config: model_config.Config, source, folder):
  """Copies the files from `source`; writes config.json where there is none, for a model trained from nothing."""
  copy_model_files(source, folder)
  if not (epath.Path(source) / 'config.json').exists():
    (epath.Path(folder) / 'config.json').write_text(json.dumps(model_config.to_hf(config), indent=1) + '\n')


def abstract_on(mesh, tree, dtype: str):
  """Shapes -> shapes with their place on the mesh, in `dtype`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
                      tree, sharding.shardings(tree, mesh))


def hashes(params) -> dict:
  """The hash of the parameters as stored (their name), and in every dtype in which they may be restored."""
  return dict(format=HASH_FORMAT, stored=hash_params(params),
              **{d: hash_params(params, d) for d in ('float32', 'bfloat16')})


def hash_params(params, dtype: str | None = None) -> str:
  """A name for parameters, cast to `dtype`: equal on every mesh, different when any one value differs."""
  sums = [np.asarray(s) for s in _sums(jax.tree.leaves(params), dtype)]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return combine({jax.tree_util.keystr(path, simple=True, separator='.'): (dtype or str(x.dtype), x.shape, s)
                  for (path, x), s in zip(leaves, sums, strict=True)})


def combine(leaves: dict) -> str:
  """{name: (dtype, shape, sums [2])} -> 16 hexadecimal digits."""
  text = '\n'.join(f'{name} {dtype} {tuple(shape)} {int(s[0])} {int(s[1])}'
                   for name, (dtype, shape, s) in sorted(leaves.items()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnames='dtype')
def _sums(leaves, dtype):
  return [weighted_sums(x if dtype is None else x.astype(dtype), 0, jnp) for x in leaves]


def weighted_sums(x, offset: int, xp):
  """Two sums, modulo 2**32, of a hash of every element of x and its flat index from `offset`; xp: numpy or jax.numpy.

  Sums over slices of an array, each from its own offset, add up to those of the whole. Bits and index go through the
  finalizer of MurmurHash3 (Appleby 2011), in which every bit of the input changes half of the bits of the output: so no
  pattern of changes, as a sign flipped in a whole matrix, cancels in the sum but by chance (2**-64). Works on any dtype
  of 1, 2 or 4 bytes, and on indices above 2**32.
  """
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, f'uint{width}') if xp is jnp else x.view(f'uint{width}')
  bits = bits.astype('uint32')
  low, high = _flat_index(x.shape, offset, xp)
  sums = []
  for salt in (0x9E3779B9, 0x85EBCA77):
    place = _mix(high ^ xp.asarray(salt, 'uint32'), xp) + low
    sums.append(_mix(bits ^ _mix(place, xp), xp).sum(dtype='uint32'))
  return xp.stack(sums)


def _flat_index(shape, offset: int, xp):
  """The flat index of every element, as its low and high 32 bits: JAX has no 64-bit integers here."""
  return _index([np.arange(size) for size in shape], shape, offset, xp)


def _index(places, shape, offset: int, xp):
  """`offset` plus the flat indices, in an array of `shape`, of the elements at `places` of each axis."""
  low, high = (xp.full((), part, 'uint32') for part in (offset % 2**32, offset >> 32))
  stride = 1
  for axis in reversed(range(len(shape))):
    steps = places[axis].astype('uint64') * np.uint64(stride)
    steps = steps.reshape(-1, *(1,) * (len(shape) - axis - 1))
    add_low, add_high = (xp.asarray(part.astype('uint32')) for part in (steps & 0xFFFFFFFF, steps >> np.uint64(32)))
    low = low + add_low
    high = high + add_high + (low < add_low).astype('uint32')  # the carry
    stride *= shape[axis]
  return low, high


def _mix(h, xp):
  """The finalizer of MurmurHash3: a bijection of 32 bits."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> xp.asarray(shift, 'uint32'))) * xp.asarray(factor, 'uint32')
  return h ^ (h >> xp.asarray(16, 'uint32'))


def _by_layer(params):
  """How parameters are stored: no chunk is of more than one layer, so that a layer can be read alone."""
  def one(path, x):
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if path[0].key == 'layers' else ())
  return jax.tree_util.tree_map_with_path(one, params)


def _recorded(folder, step: int) -> dict:
  """What `save` wrote into a step's `hash`; InputError if the model's files changed since then."""
  path = epath.Path(folder) / 'steps' / str(step) / 'hash' / 'metadata'
  advice = 'the checkpoint is damaged, restore it from a copy'
  if not path.exists():
    raise InputError(f'{path} does not exist; {advice}')
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or found.get('format') != HASH_FORMAT:
    raise InputError(f'{path} has another hash format than {HASH_FORMAT}: an older version wrote this '
                     f'checkpoint; convert or train that model again')
  if not isinstance(found.get('stored'), str) or not isinstance(found.get('files'), dict):
    raise InputError(f'{path} lacks "stored" or "files"; {advice}')
  before, now = found['files'], file_hashes(folder)
  if changed := sorted(n for n in {*before, *now} if before.get(n) != now.get(n)):
    raise InputError(f'{folder}: {", ".join(changed)} changed after the model was made; restore '
                     f'what was there, or delete {folder} and make that model again')
  return found


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
