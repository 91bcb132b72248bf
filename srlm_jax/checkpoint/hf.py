"""Parameters in Hugging Face format: layouts and .safetensors files.

`models/families.py` has the names of the tensors.
"""
import dataclasses
import itertools
import json
import math
import re

from etils import epath
import ml_dtypes
import numpy as np
import safetensors

from srlm_jax import InputError, storage
from srlm_jax.models import families

DTYPES = {'F32': np.dtype('float32'), 'BF16': np.dtype(ml_dtypes.bfloat16),
          'F16': np.dtype('float16')}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # largest .safetensors file that we write
HEADER_BYTES = 8 + 10**7  # the longest header that we read: of about 100,000 tensors
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our arrays and its Hugging Face tensors: one per layer if the array is stacked."""
  name: str        # layers.attention.wq_DKGH
  shape: tuple     # [L, D, K, G, H]
  tensors: tuple   # names of the Hugging Face tensors
  hf_shape: tuple  # [K * G * H, D]
  split: tuple     # [K, G, H, D]
  order: tuple     # for each of our dimensions, its axis in `split`

  @property
  def stacked(self) -> bool:
    """Whether the first dimension is the layer."""
    return len(self.shape) > len(self.split)

  def ours(self, tensor):
    """A contiguous array [hf_shape] -> a view in our layout, without the layer dimension."""
    return tensor.reshape(self.split).transpose(self.order)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The location of a tensor in a file."""
  file: epath.Path
  dtype: np.dtype
  shape: tuple
  offset: int  # bytes

  def read(self):
    size = math.prod(self.shape) * self.dtype.itemsize
    data = storage.read_range(self.file, self.offset, size)
    return np.frombuffer(data, self.dtype).reshape(self.shape)

  def map(self):
    return storage.mapped(self.file, self.dtype, self.shape, self.offset)


def leaves(config) -> list[Leaf]:
  """Every array of a model with this config."""
  found = []
  for name, (hf, dims) in families.tensors(config).items():
    ours, split = name.rpartition('_')[2], dims.replace(' ', '')
    layers = (config.layers,) if '{}' in hf else ()
    found.append(Leaf(
        name=name, shape=(*layers, *(getattr(config, d) for d in ours)),
        tensors=tuple(hf.format(layer) for layer in range(*layers or (1,))),
        hf_shape=tuple(math.prod(getattr(config, d) for d in axis) for axis in dims.split()),
        split=tuple(getattr(config, d) for d in split), order=tuple(split.index(d) for d in ours)))
  return found


def find(folder, config) -> dict[str, list[Tensor]]:
  """The tensors of every Leaf in a Hugging Face folder: {leaf name: tensors}.

  Raises InputError if a tensor is missing or unexpected, or has a wrong shape or dtype.
  """
  def ignored(name):
    return name.endswith('rotary_emb.inv_freq') or (config.tied and name == 'lm_head.weight')

  source, tensors = _read_tensors(epath.Path(folder), ignored)
  found = {}
  for leaf in leaves(config):
    for name in leaf.tensors:
      if name not in tensors:
        raise InputError(f'{source} has no tensor {name}, which its config.json requires; '
                         f'download the weights and config.json of the same model')
    found[leaf.name] = [tensors.pop(name) for name in leaf.tensors]
    _check_layout(leaf, found[leaf.name])
  for name, tensor in tensors.items():
    if not ignored(name):
      raise InputError(f'{tensor.file}: tensor {name} is not part of the model that its '
                       f'config.json describes; download the weights and config.json of the same '
                       f'model')
  return found


def _check_layout(leaf: Leaf, tensors: list[Tensor]):
  """Raises InputError if a tensor has a wrong shape, or a dtype unlike that of the first layer."""
  for name, tensor in zip(leaf.tensors, tensors, strict=True):
    if tensor.shape != leaf.hf_shape:
      raise InputError(f'{tensor.file}: tensor {name} has shape {list(tensor.shape)}, '
                       f'but its config.json requires {list(leaf.hf_shape)}; '
                       f'download the weights and config.json of the same model')
    if tensor.dtype not in NAMES or tensor.dtype != tensors[0].dtype:
      raise InputError(f'{tensor.file}: tensor {name} is {tensor.dtype}; use one of '
                       f'{", ".join(map(str, NAMES))}, the same for all layers')


def finite(file, name: str, values):
  """Returns `values` [...] of a tensor; InputError if it contains NaN or infinity."""
  if not np.isfinite(values).all():
    raise InputError(f'{file}: tensor {name} contains {np.isnan(values).sum()} NaN and '
                     f'{np.isinf(values).sum()} infinite values among {values.size}; '
                     f'use weights that are all finite')
  return values


def shards(config, dtypes: dict, limit: int) -> dict[str, list]:
  """Plans .safetensors files of at most `limit` bytes -> {file name: [(leaf, layer)]}.

  The order is embedding, layer by layer, head. A larger tensor gets a file of its own.
  """
  parts, size = [[]], 0
  for _, group in itertools.groupby(leaves(config), key=lambda leaf: leaf.stacked):
    group = list(group)
    for layer, leaf in itertools.product(range(len(group[0].tensors)), group):
      size += _bytes(leaf, dtypes)
      if parts[-1] and size > limit:
        parts.append([])
        size = _bytes(leaf, dtypes)
      parts[-1].append((leaf, layer))
  if len(parts) == 1:
    return {SINGLE: parts[0]}
  return {f'model-{i:05}-of-{len(parts):05}.safetensors': part for i, part in enumerate(parts, 1)}


def header(part, dtypes: dict) -> bytes:
  """The header of a .safetensors file: 8 bytes with the length of the JSON, then the JSON."""
  fields, end = dict(__metadata__=dict(format='pt')), 0
  for leaf, layer in part:
    start, end = end, end + _bytes(leaf, dtypes)
    fields[leaf.tensors[layer]] = dict(
        dtype=NAMES[dtypes[leaf.name]], shape=leaf.hf_shape, data_offsets=(start, end))
  text = json.dumps(fields).encode()
  text += b' ' * (-len(text) % 8)  # aligns the data
  return len(text).to_bytes(8, 'little') + text


def index(files: dict, dtypes: dict) -> str:
  """The text of model.safetensors.index.json for the files that `shards` planned."""
  size = sum(_bytes(leaf, dtypes) for part in files.values() for leaf, _ in part)
  names = {leaf.tensors[layer]: file for file, part in files.items() for leaf, layer in part}
  return json.dumps(dict(metadata=dict(total_size=size), weight_map=names), indent=2) + '\n'


def _bytes(leaf, dtypes) -> int:
  return math.prod(leaf.hf_shape) * dtypes[leaf.name].itemsize


def _read_tensors(folder, ignored) -> tuple[epath.Path, dict[str, Tensor]]:
  """The single .safetensors file of a folder, or its index, and the tensors by name.

  Raises InputError if the index and its files disagree. The index may list `ignored` tensors that
  no file contains: the Hub's converter to safetensors leaves the names of tied tensors in it.
  """
  if (folder / SINGLE).exists():
    return folder / SINGLE, read_header(folder / SINGLE)[0]
  path = folder / INDEX
  if not path.exists():
    raise InputError(f'{folder} contains neither {SINGLE} nor {INDEX}; '
                     f'give a folder with safetensors files')
  tensors, files = {}, _read_index(path)
  for file in sorted(set(files.values())):
    if not (folder / file).exists():
      raise InputError(f'{path} lists {file}, which does not exist; download it too')
    for name, tensor in read_header(folder / file)[0].items():
      if name in tensors:
        raise InputError(f'{tensor.file}: tensor {name} is also in {tensors[name].file}; '
                         f'keep one of them')
      tensors[name] = tensor
  for name, file in files.items():
    if not ignored(name) and (name not in tensors or tensors[name].file != folder / file):
      raise InputError(f'{path} says that {name} is in {file}, but it is not; download both again')
  return path, tensors


def _read_index(path) -> dict[str, str]:
  """Reads model.safetensors.index.json -> {tensor name: file name}, files in the same folder."""
  try:
    files = json.loads(path.read_text(), object_pairs_hook=_unique)['weight_map']
    if not isinstance(files, dict) or not files:
      raise ValueError('weight_map must give the file of every tensor')
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(
        f'{path} is not a safetensors index ({error!r}); download it again') from error
  for name, file in files.items():
    if not isinstance(file, str) or not re.fullmatch(r'[\w.-]{1,200}\.safetensors', file, re.ASCII):
      raise InputError(f'{path}: the file of {name} is {str(file)[:60]!r}; it must be a file name '
                       f'without a folder, such as model-00001-of-00002.safetensors')
  return files


def read_header(file) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors of a .safetensors file by name, and its metadata; InputError if it is damaged.

  The safetensors library checks the header: known dtypes, and ranges that agree with shape x dtype
  and cover the data without overlap or gap. It accepts duplicate names, so `_unique` rejects them,
  and headers of 100 MB, which take gigabytes of memory.
  """
  try:
    start = 8 + int.from_bytes(storage.read_range(file, 0, 8), 'little')
    if start > HEADER_BYTES:
      raise ValueError(f'its header claims {start - 8:,} bytes')
    header = storage.read_range(file, 0, start)
    with storage.local_start(file, header) as local, safetensors.safe_open(local, 'numpy'):
      fields = json.loads(header[8:], object_pairs_hook=_unique)
  except OSError as error:
    raise InputError(
        f'{file} cannot be read ({error}); give a folder with safetensors files') from error
  except (safetensors.SafetensorError, ValueError, RecursionError) as error:
    raise InputError(
        f'{file} is not a complete safetensors file ({error}); download it again') from error
  metadata = fields.pop('__metadata__', None) or {}
  return {name: Tensor(file, DTYPES.get(t['dtype'], t['dtype']), tuple(t['shape']),
                       start + t['data_offsets'][0]) for name, t in fields.items()}, metadata


def _unique(pairs) -> dict:
  """The pairs of a JSON object; ValueError for a duplicate name (json would keep the last)."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('an object has two fields of the same name')
  return found
