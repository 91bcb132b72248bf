"""Llamas from Hugging Face folders to checkpoint folders and back, tensor by tensor, bit for bit.

  python -m srlm_jax.checkpoint.convert --from_hf=DIR --out=DIR
  python -m srlm_jax.checkpoint.convert --checkpoint=DIR --to_hf=DIR [--step=N]

Every tensor keeps its dtype; one with NaN or infinity is refused. Our arrays are stacked over
layers, but never whole in memory: the peak stays under 2 x the largest Hugging Face tensor + 1 GiB.
"""
import collections
import contextlib
import itertools
import json
import math
import pathlib
import shutil

from absl import flags
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from srlm_jax import cli, hosts, InputError, lock, model_files, records
from srlm_jax.checkpoint import hashes, hf, store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama

CHUNKS_AT_ONCE = 4     # written together, so that several cores compress
HASH_ELEMENTS = 2**18  # hashed at once: what the cache of a core holds


def from_hf(source, out) -> 'Contents':
  """Hugging Face folder -> checkpoint folder `out`, step 0; `out` appears when it is whole."""
  config = model_config.load(source)
  found = hf.find(source, config)
  if any((pathlib.Path(source) / name).exists() for name in ('tokenizer.model', 'tokenizer.json')):
    tokenizers.load(source, config.V)  # refuses one that does not match, before hours of work
  contents = Contents()
  with _whole(out) as folder, _progress(found) as progress:
    model_files.copy(source, folder)
    tree = {leaf.name: Stream(leaf, found[leaf.name]) for leaf in hf.leaves(config)}
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stream, StreamHandler(contents, progress)),
        (jax.Array, ocp.type_handlers.ArrayHandler()))  # unused; Orbax warns where there is none
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    step = folder / 'steps' / '0'
    with ocp.Checkpointer(handler) as saver:
      saver.save(step / 'params', args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(tree, sep='.')))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as saver:
      saver.save(step / 'hash', args=ocp.args.JsonSave(
          dict(contents.hashes(), files=model_files.hashes(folder))))
    (folder / model_files.SOURCE).write_text(json.dumps(source_hashes(source), indent=1) + '\n')
  return contents


def source_hashes(source, before: dict | None = None) -> dict[str, list[str]]:
  """{file: [hash, stamp]} of a Hugging Face folder: config.json, the tokenizer's files and the weights. All are read,
  but for weights whose stamp (path, size, time of change) is that of `before`, an earlier result."""
  found = {name: [value, ''] for name, value in model_files.hashes(source).items()}
  for path in sorted(pathlib.Path(source).glob('*.safetensors')):
    stat = path.stat()
    stamp = f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}'
    known = (before or {}).get(path.name)
    found[path.name] = known if known and known[1] == stamp else [records.hash_file(path), stamp]
  return found


def check_source(source, folder):
  """Raises InputError if the checkpoint `folder` was converted from another Hugging Face folder than `source`."""
  if not (pathlib.Path(folder) / model_files.SOURCE).exists():  # trained here, or copied
    return
  before = model_files.read_source(folder)
  now = source_hashes(source, before)
  none = ['', '']
  if changed := sorted(name for name in {*before, *now} if before.get(name, none)[0] != now.get(name, none)[0]):
    raise InputError(f'{folder} was converted from a folder with another {", ".join(changed)} than {source}; use '
                     f'another --workdir, or delete {folder} to convert again')


def to_hf(folder, out, step: int | None = None, shard_bytes: int = hf.SHARD_BYTES) -> 'Contents':
  """A step of a checkpoint folder, by default the last -> Hugging Face folder `out`, in the stored dtype."""
  config = model_config.load(folder)
  step = model_files.latest(folder) if step is None else step
  params = pathlib.Path(folder).resolve() / 'steps' / str(step) / 'params'
  arrays = {leaf.name: _open(params, leaf) for leaf in hf.leaves(config)}
  dtypes = {name: array.dtype.numpy_dtype for name, array in arrays.items()}
  files = hf.shards(config, dtypes, shard_bytes)
  contents = Contents()
  with _whole(out) as target, _progress(files) as progress:
    model_files.copy(folder, target)
    _write_dtype(target / 'config.json', str(dtypes['embed_VD']))
    if len(files) > 1:
      (target / hf.INDEX).write_text(hf.index(files, dtypes))
    for file, part in files.items():
      with (target / file).open('wb') as f:
        f.write(hf.header(part, dtypes))
        for leaf, layer in part:
          tensor = np.empty(leaf.hf_shape, dtypes[leaf.name])
          _fill(leaf.ours(tensor), arrays[leaf.name][layer] if leaf.stacked else arrays[leaf.name])
          hf.finite(params, leaf.tensors[layer], tensor)
          tensor.tofile(f)
          for offset, _, rows in _rows(leaf, layer, tensor):
            contents.add(leaf, offset, rows)
          progress.update()
    if model_files.recorded_hash(folder, step) != contents.hashes()['stored']:
      raise InputError(f'{params} does not have the hash that it was saved with; the checkpoint is damaged')
  return contents


def load_hf(folder, mesh, dtype: str):
  """Hugging Face folder -> parameters on `mesh` in `dtype`; for each device its own part is read."""
  config = model_config.load(folder)
  found = hf.find(folder, config)
  with jax.set_mesh(mesh):
    abstract = store.abstract_on(mesh, llama.abstract_params(config), dtype)
  abstract = traverse_util.flatten_dict(abstract, sep='.')

  def array(leaf):
    def read(index):
      part = np.empty([len(range(size)[i]) for size, i in zip(leaf.shape, index, strict=True)], dtype)
      layers = index[0] if leaf.stacked else slice(None)
      for slot, name, tensor in zip(part if leaf.stacked else [part], leaf.tensors[layers],
                                    found[leaf.name][layers], strict=True):
        slot[...] = leaf.ours(tensor.map())[index[leaf.stacked:]]
        hf.finite(tensor.file, name, slot)
      return part
    return jax.make_array_from_callback(leaf.shape, abstract[leaf.name].sharding, read)

  return traverse_util.unflatten_dict({leaf.name: array(leaf) for leaf in hf.leaves(config)}, sep='.')


class Contents:
  """What was converted: counts, and the hashes that store.save would write."""

  def __init__(self):
    self.leaves = {}  # name: (dtype, shape)
    self.sums = collections.defaultdict(lambda: np.zeros(2, 'uint32'))  # of (name, dtype)

  def add(self, leaf, offset: int, rows):
    """Counts in a part of an array, contiguous from the flat index `offset`."""
    self.leaves[leaf.name] = (rows.dtype, leaf.shape)
    flat = rows.reshape(-1)
    for start in range(0, flat.size, HASH_ELEMENTS):
      part = flat[start:start + HASH_ELEMENTS]
      for dtype in {str(flat.dtype), 'float32', 'bfloat16'}:
        cast = part.astype(dtype, copy=False)
        self.sums[leaf.name, dtype] += hashes.weighted_sums(cast, offset + start, np)

  def hashes(self) -> dict:
    def combine(dtype):
      return hashes.combine({
          name: (dtype or str(stored), shape, self.sums[name, dtype or str(stored)])
          for name, (stored, shape) in self.leaves.items()})
    return dict(format=model_files.HASH_FORMAT, stored=combine(None), float32=combine('float32'),
                bfloat16=combine('bfloat16'))

  def __str__(self):
    sizes = [(math.prod(shape), dtype.itemsize) for dtype, shape in self.leaves.values()]
    return (f'{sum(n for n, _ in sizes):,} parameters, {sum(n * width for n, width in sizes):,} bytes, '
            f'hash {self.hashes()["stored"]}')


class Stream:
  """One of our arrays as Orbax sees it, shape, dtype and size; its tensors are read when they are written."""

  def __init__(self, leaf: hf.Leaf, tensors: list[hf.Tensor]):
    self.leaf, self.tensors = leaf, tensors
    self.shape, self.dtype, self.size = leaf.shape, tensors[0].dtype, math.prod(leaf.shape)


class StreamHandler(ocp.type_handlers.NumpyHandler):
  """Saves a Stream as an ordinary array, in the layout of Orbax's own handlers."""

  def __init__(self, contents: Contents, progress):
    super().__init__()
    self.contents, self.progress = contents, progress

  async def serialize(self, values, infos, args=None):
    for stream, info in zip(values, infos, strict=True):
      layer = stream.shape[stream.leaf.stacked:]
      chunk = (*(1,) * stream.leaf.stacked, _chunk_rows(layer, stream.dtype), *layer[1:])
      spec = _spec(info.parent_dir / 'ocdbt.process_0', info.name)  # Orbax merges the folders of processes
      spec.update(metadata=dict(chunks=chunk, compressor=dict(id='zstd', level=1)),
                  store_data_equal_to_fill_value=True)
      array = await ts.open(spec, create=True, dtype=stream.dtype, shape=stream.shape)
      for layer, tensor in enumerate(stream.tensors):
        name = stream.leaf.tensors[layer]
        for offset, index, rows in _rows(
            stream.leaf, layer, hf.finite(tensor.file, name, tensor.read())):
          await array[index].write(rows)  # each before the next, or all would wait in memory
          self.contents.add(stream.leaf, offset, rows)
        self.progress.update()
    return []


def _rows(leaf, layer: int, tensor):
  """Yields a Hugging Face tensor in our order by some whole chunks: flat offset, index in our array, rows."""
  ours = leaf.ours(tensor)
  step = CHUNKS_AT_ONCE * _chunk_rows(ours.shape, ours.dtype)
  for first in range(0, len(ours), step):
    rows = np.ascontiguousarray(ours[first:first + step])
    index = (*(layer,) * leaf.stacked, slice(first, first + len(rows)))
    yield layer * ours.size + first * math.prod(ours.shape[1:]), index, rows


def _chunk_rows(shape, dtype) -> int:
  """The rows of a tensor in one chunk: chunks are nearly equal, and of CHUNK_BYTES at most if a row is."""
  chunks = -(-math.prod(shape) * dtype.itemsize // store.CHUNK_BYTES)
  return -(-shape[0] // chunks)


def _spec(folder, name: str) -> dict:
  """Where Orbax keeps an array, in TensorStore's words."""
  return dict(driver='zarr', kvstore=dict(
      driver='ocdbt', base=dict(driver='file', path=f'{folder}/'), path=f'{name}/'))


def _open(params, leaf):
  """An array of a checkpoint, to be read by parts."""
  if not params.exists():
    raise InputError(f'{params} does not exist; train or convert that model first')
  try:
    array = ts.open(_spec(params, leaf.name), read=True).result()
  except ValueError as error:
    raise InputError(f'{params} has no array {leaf.name}, which its config.json asks for') from error
  if array.shape != leaf.shape:
    raise InputError(f'{params}: array {leaf.name} has shape {list(array.shape)}, '
                     f'but its config.json asks for {list(leaf.shape)}')
  return array


def _fill(ours, array):
  """Reads a stored array into memory of its shape, chunk by chunk."""
  axes = [[slice(i, min(i + step, size)) for i in range(0, size, step)]
          for size, step in zip(array.shape, array.chunk_layout.read_chunk.shape, strict=True)]
  for box in itertools.product(*axes):
    ours[box] = array[box].read().result()


def _write_dtype(path, dtype: str):
  """Says in config.json what the tensors are, where it says otherwise: training stores float32."""
  fields = json.loads(path.read_text())
  if {fields.get('dtype'), fields.get('torch_dtype')} != {dtype}:
    path.write_text(json.dumps(fields | dict(dtype=dtype, torch_dtype=dtype), indent=2) + '\n')


def _progress(tensors: dict):
  return tqdm(total=sum(map(len, tensors.values())), unit='tensor', disable=None)  # off where it is not seen


@contextlib.contextmanager
def _whole(out):
  """A folder to write in, which becomes `out` when all went well and vanishes when not."""
  out = pathlib.Path(out).resolve()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise InputError(f'{out} already exists and is not an empty folder; name another, or delete it first')
  partial = out.with_name(out.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def define_flags():
  flags.DEFINE_string('from_hf', None, 'Hugging Face folder to read.')
  flags.DEFINE_string('out', None, 'Checkpoint folder to write; with --from_hf.')
  flags.DEFINE_string('checkpoint', None, 'Checkpoint folder to read.')
  flags.DEFINE_string('to_hf', None, 'Hugging Face folder to write; with --checkpoint.')
  flags.DEFINE_integer('step', None, 'Step of --checkpoint; by default the last.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  given = {name: f[name].value for name in ('from_hf', 'out', 'checkpoint', 'to_hf') if f[name].value}
  if set(given) not in ({'from_hf', 'out'}, {'checkpoint', 'to_hf'}):
    raise InputError('give --from_hf=DIR --out=DIR, or --checkpoint=DIR --to_hf=DIR')
  for name, folder in given.items():
    if '://' in folder:
      raise InputError(f'--{name}={folder} is not a local folder; convert here, then copy')
  with lock.held_output(f.out or f.to_hf, '--out' if f.out else '--to_hf'):
    done = from_hf(f.from_hf, f.out) if f.from_hf else to_hf(f.checkpoint, f.to_hf, f.step)
  hosts.say(f'{f.out or f.to_hf}: {done}')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
