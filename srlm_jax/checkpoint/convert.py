"""Converts models between Hugging Face folders and checkpoint folders, bit for bit.

  python -m srlm_jax.checkpoint.convert --from_hf=DIR --out=DIR
  python -m srlm_jax.checkpoint.convert --checkpoint=DIR --to_hf=DIR [--step=N] [--chat=FORMAT]
  python -m srlm_jax.checkpoint.convert --from_peft=DIR --base=CHECKPOINT --out=DIR
  python -m srlm_jax.checkpoint.convert --checkpoint=DIR --to_peft=DIR [--step=N]

`export.py` and `docs/export.md` say what else is written with --to_hf.
Every tensor keeps its dtype. A tensor with NaN or infinity is an InputError. Our arrays are stacked
over layers, but the conversion holds one tensor at a time: peak memory stays below 2 x the largest
Hugging Face tensor + 1 GiB.
"""
import collections
import hashlib
import json
import math

from absl import flags
from etils import epath
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from srlm_jax import cli, hosts, InputError, lock, model_files, records, storage
from srlm_jax.checkpoint import arrays, export, hashes, hf, peft, store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama, lora
from srlm_jax.report import card

CHUNKS_AT_ONCE = 4     # chunks per write, so that several cores compress
WRITE_BYTES = 2**26    # bytes per write into a .safetensors file
HASH_ELEMENTS = 2**18  # elements hashed at once; they fit into a core's cache


def from_hf(source, out) -> 'Summary':
  """Converts a Hugging Face folder to step 0 of a new checkpoint folder `out`.

  `out` appears only when it is complete. Raises InputError if `out` is not empty, or if the config,
  the tokenizer and the tensors of `source` do not fit together.
  """
  config = model_config.load(source)
  tensors = hf.find(source, config)
  if any((epath.Path(source) / name).exists() for name in ('tokenizer.model', 'tokenizer.json')):
    tokenizers.load(source, config.V)  # a mismatch is reported before hours of work
  summary = Summary()
  with storage.making_folder(out) as folder, _progress(tensors) as progress:
    model_files.copy(source, folder)
    _save_params(folder, hf.leaves(config), tensors, summary, progress)
    text = json.dumps(source_hashes(source), indent=1)
    (folder / model_files.SOURCE).write_text(text + '\n')
    recorded = model_files.StepHashes(summary.hashes(), model_files.hashes(folder))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as saver:
      saver.save(folder / 'steps' / '0' / 'hash', args=ocp.args.JsonSave(recorded.to_json()))
    storage.commit(folder / 'steps' / '0')
  return summary


def _save_params(folder, leaves, tensors: dict, summary: 'Summary', progress):
  """Writes step 0 of a checkpoint with Orbax, which reads each tensor when it writes it."""
  tree = {leaf.name: LazyArray(leaf, tensors[leaf.name]) for leaf in leaves}
  registry = ocp.type_handlers.create_type_handler_registry(
      (LazyArray, LazyArrayHandler(summary, progress)),
      (jax.Array, ocp.type_handlers.ArrayHandler()))  # unused; without it Orbax warns
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  with ocp.Checkpointer(handler) as saver:
    saver.save(folder / 'steps' / '0' / 'params',
               args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(tree, sep='.')))


def source_hashes(source, before: dict | None = None) -> dict[str, list[str]]:
  """{file: [hash, stamp]} of the config.json, tokenizer files and weights in a Hugging Face folder.

  A weight file has a stamp, see `storage.stamp`. It is not read again if `before`, an earlier
  result, has the same stamp.
  """
  found = {name: [value, ''] for name, value in model_files.hashes(source).items()}
  for path in sorted(epath.Path(source).glob('*.safetensors')):
    stamp = storage.stamp(path)
    known = (before or {}).get(path.name)
    if not known or known[1] != stamp:
      known = [records.hash_file(path), stamp]
    found[path.name] = known
  return found


def check_source(source, folder):
  """Raises InputError if the files in `source` are not those that `folder` was converted from."""
  if not (epath.Path(folder) / model_files.SOURCE).exists():  # not a conversion
    return
  before = model_files.read_source(folder)
  now = source_hashes(source, before)
  absent = ['', '']
  changed = sorted(name for name in {*before, *now}
                   if before.get(name, absent)[0] != now.get(name, absent)[0])
  if changed:
    raise InputError(f'{folder} was converted from other files than those in {source}, which '
                     f'differ in {", ".join(changed)}; use another --workdir, or delete {folder} '
                     f'to convert again')


def to_hf(folder, out, step: int | None = None, shard_bytes: int = hf.SHARD_BYTES, chat: str = '',
          **published: str) -> 'Summary':
  """Converts a step of a checkpoint folder to a new Hugging Face folder `out`, in the stored dtype.

  A LoRA adapter is added to the weights that it changes, and all tensors are then float32. The
  default step is that of `model_files.latest`, and the default chat format that of the run.
  `shard_bytes` limits the size of a file. `published`: base_model and license of the model card.
  Raises InputError if `out` is not empty, the checkpoint is damaged, or `export.plan` does.
  """
  config = model_config.load(folder)
  step = model_files.find_step(folder, step)
  root, root_step, adapters = store.read_adapters(folder, step)
  params = storage.absolute(root) / 'steps' / str(root_step) / 'params'
  stored = arrays.open_all(params, {leaf.name: leaf.shape for leaf in hf.leaves(config)})
  dtypes = {name: np.dtype('float32') if adapters else array.dtype.numpy_dtype
            for name, array in stored.items()}
  if foreign := sorted(name for name, found in dtypes.items() if found not in hf.NAMES):
    raise InputError(f'{params}: array {foreign[0]} is {dtypes[foreign[0]]}, which no parameter '
                     f'is; the checkpoint is damaged, restore it from a copy')
  files = hf.shards(config, dtypes, shard_bytes)
  dtype = str(dtypes['embed_VD'])
  model_files.read_hashes(folder, step)  # before a changed tokenizer is read
  small, summary, sums = export.plan(folder, config.V, dtype, chat), Summary(), {}
  read = Summary() if adapters else summary  # of what is stored
  with storage.making_folder(out) as target, _progress(files) as progress:
    if len(files) > 1:
      (target / hf.INDEX).write_text(hf.index(files, dtypes))
    for file, part in files.items():
      with (target / file).open('wb') as f:
        sum_ = sums[file] = hashlib.sha256()
        _write(f, np.frombuffer(hf.header(part, dtypes), np.uint8), sum_)
        for leaf, layer in part:
          array = stored[leaf.name]
          tensor = np.empty(leaf.hf_shape, array.dtype.numpy_dtype)
          arrays.read_into(leaf.ours(tensor), array[layer] if leaf.stacked else array)
          if adapters:
            read.add_tensor(leaf, layer, tensor)
            tensor = _adapted(leaf, layer, tensor, adapters)
          hf.finite(params, leaf.tensors[layer], tensor)
          _write(f, tensor, sum_)
          summary.add_tensor(leaf, layer, tensor)
          progress.update()
    if model_files.recorded_hash(root, root_step) != read.hashes().stored:
      raise InputError(f'{params} does not match its recorded hash; the checkpoint is damaged, '
                       f'restore it from a copy')
    sums |= {name: hashlib.sha256(data) for name, data in small.files.items()}
    about = card.Export(epath.Path(folder), step, summary.parameters, dtype, summary.hashes(),
                        {name: found.hexdigest() for name, found in sums.items()}, small.chat,
                        small.compared, small.differences, **published)
    for name, data in ((card.NAME, card.text(about).encode()), *reversed(small.files.items())):
      (target / name).parent.mkdir(exist_ok=True)
      (target / name).write_bytes(data)  # config.json last
  return summary


def _adapted(leaf: hf.Leaf, layer: int, tensor, adapters: dict):
  """A Hugging Face tensor in float32, with the product of its adapters, if it has any."""
  tensor = tensor.astype(np.float32)
  if leaf.stacked and {*lora.paths(leaf.name)} <= adapters.keys():
    a, b = (adapters[name][layer] for name in lora.paths(leaf.name))
    ours = leaf.ours(tensor)
    ours += np.tensordot(a, b, 1)
  return tensor


def load(folder, mesh, dtype: str, once: bool = False, merge: bool = True):
  """The parameters of a checkpoint (`store.restore_params`) or of a Hugging Face folder."""
  if model_files.exists(folder):
    return store.restore_params(folder, mesh, dtype, once=once, merge=merge)[0]
  return load_hf(folder, mesh, dtype)


def load_hf(folder, mesh, dtype: str):
  """Loads a Hugging Face folder -> parameters on `mesh` in `dtype`.

  Each device reads only its own part. Raises InputError if the tensors do not fit the config, or
  contain NaN or infinity.
  """
  config = model_config.load(folder)
  tensors = hf.find(folder, config)
  with jax.set_mesh(mesh):
    abstract = store.abstract_on(mesh, llama.abstract_params(config), dtype)
  abstract = traverse_util.flatten_dict(abstract, sep='.')

  def array(leaf):
    return jax.make_array_from_callback(
        leaf.shape, abstract[leaf.name].sharding,
        lambda index: _read_slice(leaf, tensors[leaf.name], index, dtype))

  params = {leaf.name: array(leaf) for leaf in hf.leaves(config)}
  return traverse_util.unflatten_dict(params, sep='.')


def _read_slice(leaf: hf.Leaf, tensors: list[hf.Tensor], index, dtype: str):
  """Reads the part `index`, one slice per dimension, of one of our arrays, in `dtype`."""
  shape = [len(range(size)[i]) for size, i in zip(leaf.shape, index, strict=True)]
  found = np.empty(shape, dtype)
  if leaf.stacked:
    layers, index, slots = index[0], index[1:], found
  else:
    layers, slots = slice(None), [found]
  for slot, name, tensor in zip(slots, leaf.tensors[layers], tensors[layers], strict=True):
    slot[...] = leaf.ours(tensor.map())[index]
    hf.finite(tensor.file, name, slot)
  return found


class Summary:
  """The number of converted parameters, and the hashes that `store.save` would record."""

  def __init__(self):
    self._leaves = {}  # {name: (dtype, shape)}
    self._sums = collections.defaultdict(lambda: np.zeros(2, 'uint32'))  # {(name, dtype): sums}

  def add(self, leaf: hf.Leaf, offset: int, rows):
    """Adds a contiguous part of an array that starts at flat index `offset`."""
    self._leaves[leaf.name] = (rows.dtype, leaf.shape)
    flat = rows.reshape(-1)
    for start in range(0, flat.size, HASH_ELEMENTS):
      part = flat[start:start + HASH_ELEMENTS]
      for dtype in {str(flat.dtype), 'float32', 'bfloat16'}:
        cast = part.astype(dtype, copy=False)
        self._sums[leaf.name, dtype] += hashes.hash_sums(cast, offset + start, np)

  def add_tensor(self, leaf: hf.Leaf, layer: int, tensor):
    """Adds a whole Hugging Face tensor."""
    for offset, _, rows in _rows(leaf, layer, tensor):
      self.add(leaf, offset, rows)

  def hashes(self) -> model_files.ParamHashes:
    return model_files.ParamHashes(
        stored=self._hash(), float32=self._hash('float32'), bfloat16=self._hash('bfloat16'))

  def _hash(self, dtype: str | None = None) -> str:
    leaves = {}
    for name, (stored, shape) in self._leaves.items():
      cast = dtype or str(stored)
      leaves[name] = (cast, shape, self._sums[name, cast])
    return hashes.combine(leaves)

  @property
  def parameters(self) -> int:
    return sum(math.prod(shape) for _, shape in self._leaves.values())

  def __str__(self):
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._leaves.values())
    return f'{self.parameters:,} parameters, {size:,} bytes, hash {self.hashes().stored}'


class LazyArray:
  """One of our arrays for Orbax: shape, dtype and size. Its tensors are read when written."""

  def __init__(self, leaf: hf.Leaf, tensors: list[hf.Tensor]):
    self.leaf, self.tensors = leaf, tensors
    self.shape, self.dtype, self.size = leaf.shape, tensors[0].dtype, math.prod(leaf.shape)

  def read(self, layer: int):
    """Reads the Hugging Face tensor of a layer; InputError if it contains NaN or infinity."""
    tensor = self.tensors[layer]
    return hf.finite(tensor.file, self.leaf.tensors[layer], tensor.read())


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
  """Saves a LazyArray as an ordinary array, in the layout of Orbax's own handlers."""

  def __init__(self, summary: Summary, progress):
    super().__init__()
    self._summary, self._progress = summary, progress

  async def serialize(self, values, infos, args=None):
    for value, info in zip(values, infos, strict=True):
      array = await self._create(value, info)
      for layer in range(len(value.tensors)):
        # No variable holds the tensor, so it is freed before the next one is read.
        for offset, index, rows in _rows(value.leaf, layer, value.read(layer)):
          await array[index].write(rows)  # one at a time: pending writes stay in memory
          self._summary.add(value.leaf, offset, rows)
        self._progress.update()
    return []

  async def _create(self, value: LazyArray, info):
    """Creates the array with chunks that `_rows` fills whole, and that span no two layers."""
    layer_shape = value.shape[1:] if value.leaf.stacked else value.shape
    chunk = (_chunk_rows(layer_shape, value.dtype), *layer_shape[1:])
    if value.leaf.stacked:
      chunk = (1, *chunk)
    # Orbax writes one folder per process and merges them at the end.
    spec = arrays.spec(info.parent_dir / 'ocdbt.process_0', info.name)
    spec.update(metadata=dict(chunks=chunk, compressor=dict(id='zstd', level=1)),
                store_data_equal_to_fill_value=True)
    # open: in a bucket, a request that is repeated because its answer was lost may find the array.
    return await ts.open(spec, create=True, open=True, dtype=value.dtype, shape=value.shape)


def _rows(leaf: hf.Leaf, layer: int, tensor):
  """Yields a Hugging Face tensor in our layout, a few whole chunks at a time.

  Each item is (flat offset in our array, index in our array, rows).
  """
  ours = leaf.ours(tensor)
  step = CHUNKS_AT_ONCE * _chunk_rows(ours.shape, ours.dtype)
  for first in range(0, len(ours), step):
    rows = np.ascontiguousarray(ours[first:first + step])
    index = (slice(first, first + len(rows)),)
    if leaf.stacked:
      index = (layer, *index)
    yield layer * ours.size + first * math.prod(ours.shape[1:]), index, rows


def _chunk_rows(shape, dtype) -> int:
  """Rows per chunk: nearly equal chunks of at most CHUNK_BYTES, but of at least one row."""
  chunks = -(-math.prod(shape) * dtype.itemsize // store.CHUNK_BYTES)
  return -(-shape[0] // chunks)


def _write(file, tensor, sha256):
  """Writes and hashes the bytes of a tensor; a file in a bucket keeps in memory what a call writes.
  """
  data = tensor.reshape(-1).view(np.uint8)
  for start in range(0, data.size, WRITE_BYTES):
    part = data[start:start + WRITE_BYTES].data
    file.write(part)
    sha256.update(part)


def _progress(parts: dict):
  """A progress bar over all tensors; hidden if stderr is not a terminal."""
  return tqdm(total=sum(map(len, parts.values())), unit='tensor', disable=None)


def define_flags():
  flags.DEFINE_string('from_hf', None, 'Hugging Face folder to read.')
  flags.DEFINE_string('out', None, 'Checkpoint folder to write; with --from_hf or --from_peft.')
  flags.DEFINE_string('from_peft', None, 'PEFT folder with a LoRA adapter to read.')
  flags.DEFINE_string('base', None, 'Checkpoint folder that the adapter changes; with --from_peft.')
  flags.DEFINE_string('checkpoint', None, 'Checkpoint folder to read.')
  flags.DEFINE_string('to_hf', None, 'Hugging Face folder to write; with --checkpoint.')
  flags.DEFINE_string('to_peft', None, 'PEFT folder to write the LoRA adapter of --checkpoint to.')
  flags.DEFINE_integer('step', None,
                       'Step of --checkpoint; by default the selected step, or else the last.')
  flags.DEFINE_string('chat', '', 'Chat format of the chat template, with --to_hf; by default that '
                      'of the run. tokenizer: that of the model.')
  flags.DEFINE_string('base_model', '', 'Name on the Hub of the model that the run started from, '
                      'for the model card.')
  flags.DEFINE_string('license', '', 'Identifier of the license, for the model card.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  uses = (('from_hf', 'out'), ('checkpoint', 'to_hf'), ('from_peft', 'base', 'out'),
          ('checkpoint', 'to_peft'))
  given = {name for use in uses for name in use if f[name].value}
  use = next((use for use in uses if {*use} == given), None)
  if use is None:
    raise InputError('give ' + ', or '.join(
        ' '.join(f'--{name}=DIR' for name in use) for use in uses))
  written = f[use[-1]].value
  with lock.held_output(written, f'--{use[-1]}'):
    if f.from_hf:
      summary = from_hf(f.from_hf, f.out)
    elif f.from_peft:
      summary = peft.from_peft(f.from_peft, f.base, f.out)
    elif f.to_peft:
      summary = peft.to_peft(f.checkpoint, f.to_peft, f.step, f.base_model)
    else:
      summary = to_hf(f.checkpoint, f.to_hf, f.step, chat=f.chat, base_model=f.base_model,
                      license=f.license)
  hosts.log(f'{written}: {summary}')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
