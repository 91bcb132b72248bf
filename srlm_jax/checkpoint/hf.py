"""A Llama as a Hugging Face folder holds it: names, layouts, .safetensors files."""
import dataclasses
import itertools
import json
import math
import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors

from srlm_jax import InputError

# Our array: the Hugging Face tensor and its dimensions, a space between axes; {} is the layer. Hugging Face
# numbers query heads k * G + g, so the letters say both how to split an axis and how to transpose.
TABLE = {
    'embed_VD': ('model.embed_tokens.weight', 'V D'),
    'layers.attention_norm.scale_D': ('model.layers.{}.input_layernorm.weight', 'D'),
    'layers.attention.wq_DKGH': ('model.layers.{}.self_attn.q_proj.weight', 'KGH D'),
    'layers.attention.wk_DKH': ('model.layers.{}.self_attn.k_proj.weight', 'KH D'),
    'layers.attention.wv_DKH': ('model.layers.{}.self_attn.v_proj.weight', 'KH D'),
    'layers.attention.wo_KGHD': ('model.layers.{}.self_attn.o_proj.weight', 'D KGH'),
    'layers.attention.bq_KGH': ('model.layers.{}.self_attn.q_proj.bias', 'KGH'),
    'layers.attention.bk_KH': ('model.layers.{}.self_attn.k_proj.bias', 'KH'),
    'layers.attention.bv_KH': ('model.layers.{}.self_attn.v_proj.bias', 'KH'),
    'layers.attention.bo_D': ('model.layers.{}.self_attn.o_proj.bias', 'D'),
    'layers.mlp_norm.scale_D': ('model.layers.{}.post_attention_layernorm.weight', 'D'),
    'layers.mlp.gate_DF': ('model.layers.{}.mlp.gate_proj.weight', 'F D'),
    'layers.mlp.up_DF': ('model.layers.{}.mlp.up_proj.weight', 'F D'),
    'layers.mlp.down_FD': ('model.layers.{}.mlp.down_proj.weight', 'D F'),
    'final_norm.scale_D': ('model.norm.weight', 'D'),
    'lm_head_DV': ('lm_head.weight', 'V D'),
}
DTYPES = {'F32': np.dtype('float32'), 'BF16': np.dtype(ml_dtypes.bfloat16), 'F16': np.dtype('float16')}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # of one .safetensors file
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our arrays, and the Hugging Face tensors that it is made of: one for each layer where stacked."""
  name: str        # layers.attention.wq_DKGH
  shape: tuple     # [L, D, K, G, H]
  tensors: tuple   # their names
  hf_shape: tuple  # [K * G * H, D]
  split: tuple     # [K, G, H, D]
  order: tuple     # our dimensions, by their place in `split`

  @property
  def stacked(self) -> int:
    """How many dimensions stand before those of a tensor: 1, the layer, or 0."""
    return len(self.shape) - len(self.split)

  def ours(self, tensor):
    """A tensor, or memory for one -> the same memory in our dimensions."""
    return tensor.reshape(self.split).transpose(self.order)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies in a file."""
  file: pathlib.Path
  dtype: np.dtype
  shape: tuple
  offset: int

  def read(self):
    return np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)

  def map(self):
    return np.memmap(self.file, self.dtype, 'r', self.offset, self.shape)


def leaves(config) -> list[Leaf]:
  """Every array of a Llama."""
  found = []
  for name, (hf, dims) in TABLE.items():
    if (hf.endswith('.bias') and not config.attention_bias) or (name == 'lm_head_DV' and config.tied):
      continue
    ours, split = name.rpartition('_')[2], dims.replace(' ', '')
    layers = (config.layers,) if '{}' in hf else ()
    found.append(Leaf(
        name=name, shape=(*layers, *(getattr(config, d) for d in ours)),
        tensors=tuple(hf.format(layer) for layer in range(*layers or (1,))),
        hf_shape=tuple(math.prod(getattr(config, d) for d in axis) for axis in dims.split()),
        split=tuple(getattr(config, d) for d in split), order=tuple(split.index(d) for d in ours)))
  return found


def find(folder, config) -> dict[str, list[Tensor]]:
  """The tensors of every Leaf, by its name; InputError where one is missing, too many or misshapen."""
  def passed_over(name):
    return name.endswith('rotary_emb.inv_freq') or (config.tied and name == 'lm_head.weight')

  top, tensors = _tensors(pathlib.Path(folder), passed_over)
  found = {}
  for leaf in leaves(config):
    for name in leaf.tensors:
      if name not in tensors:
        raise InputError(f'{top} has no tensor {name}, which its config.json asks for')
    found[leaf.name] = [tensors.pop(name) for name in leaf.tensors]
    dtype = found[leaf.name][0].dtype
    for name, tensor in zip(leaf.tensors, found[leaf.name], strict=True):
      if tensor.shape != leaf.hf_shape:
        raise InputError(f'{tensor.file}: tensor {name} has shape {list(tensor.shape)}, '
                         f'but its config.json asks for {list(leaf.hf_shape)}')
      if tensor.dtype not in NAMES or tensor.dtype != dtype:
        raise InputError(f'{tensor.file}: tensor {name} is {tensor.dtype}; save it in one of '
                         f'{", ".join(map(str, NAMES))}, the same for all layers')
  for name, tensor in tensors.items():
    if not passed_over(name):
      raise InputError(f'{tensor.file}: tensor {name} is no part of the Llama of its config.json')
  return found


def finite(place, name: str, values):
  """A tensor of `place`, of any shape -> the same; InputError where it holds NaN or infinity."""
  if not np.isfinite(values).all():
    raise InputError(f'{place}: tensor {name} holds {np.isnan(values).sum()} NaN and '
                     f'{np.isinf(values).sum()} infinite values of {values.size}; '
                     f'use weights that are all finite')
  return values


def shards(config, dtypes: dict, limit: int) -> dict[str, list]:
  """The files to write, of `limit` bytes, with (leaf, layer) in each: embedding, layer by layer, head."""
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
  """What stands in a file before the tensors: 8 bytes of length, and JSON of that length."""
  fields, end = dict(__metadata__=dict(format='pt')), 0
  for leaf, layer in part:
    start, end = end, end + _bytes(leaf, dtypes)
    fields[leaf.tensors[layer]] = dict(
        dtype=NAMES[dtypes[leaf.name]], shape=leaf.hf_shape, data_offsets=(start, end))
  text = json.dumps(fields).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def index(files: dict, dtypes: dict) -> str:
  """What INDEX says of several files."""
  size = sum(_bytes(leaf, dtypes) for part in files.values() for leaf, _ in part)
  names = {leaf.tensors[layer]: file for file, part in files.items() for leaf, layer in part}
  return json.dumps(dict(metadata=dict(total_size=size), weight_map=names), indent=2) + '\n'


def _bytes(leaf, dtypes) -> int:
  return math.prod(leaf.hf_shape) * dtypes[leaf.name].itemsize


def _tensors(folder, passed_over):
  """The file that stands for the folder, and its tensors by name; an index must fit its files.

  The index may name tensors that no file holds where they are `passed_over`: the Hub's own
  converter to safetensors leaves the names of tied tensors in it.
  """
  if (folder / SINGLE).exists():
    return folder / SINGLE, _read_header(folder / SINGLE)
  top = folder / INDEX
  if not top.exists():
    raise InputError(f'{folder} holds neither {SINGLE} nor {INDEX}; name a folder with safetensors')
  tensors, place = {}, _read_index(top)
  for file in sorted(set(place.values())):
    if not (folder / file).exists():
      raise InputError(f'{top} names {file}, which is not there; fetch it too')
    for name, tensor in _read_header(folder / file).items():
      if name in tensors:
        raise InputError(f'{tensor.file}: tensor {name} is also in {tensors[name].file}; '
                         f'keep one of them')
      tensors[name] = tensor
  for name, file in place.items():
    if not passed_over(name) and (name not in tensors or tensors[name].file != folder / file):
      raise InputError(f'{top} says that {name} is in {file}, but it is not; fetch both again')
  return top, tensors


def _read_index(top) -> dict[str, str]:
  """The name of the file of every tensor, as INDEX says; a file lies in the same folder."""
  try:
    place = json.loads(top.read_text(), object_pairs_hook=_unique)['weight_map']
    if not isinstance(place, dict) or not place:
      raise ValueError('weight_map must give the file of every tensor')
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(f'{top} is not an index of safetensors ({error!r}); fetch it again') from error
  for name, file in place.items():
    if not isinstance(file, str) or not re.fullmatch(r'[\w.-]{1,200}\.safetensors', file, re.ASCII):
      raise InputError(f'{top}: the file of {name} is {str(file)[:60]!r}; it must be the file name '
                       f'of safetensors in the same folder, as model-00001-of-00002.safetensors')
  return place


def _read_header(file) -> dict[str, Tensor]:
  """The tensors of a file.

  The safetensors library checks the header: at most 100 MB, known dtypes, and ranges that agree
  with shape x dtype and cover the data exactly, without overlap or gap. It lets a name stand twice.
  """
  try:
    with safetensors.safe_open(file, 'numpy'), file.open('rb') as f:
      start = 8 + int.from_bytes(f.read(8), 'little')
      fields = json.loads(f.read(start - 8), object_pairs_hook=_unique)
  except OSError as error:
    raise InputError(f'{file} cannot be read ({error}); name a folder with safetensors') from error
  except (safetensors.SafetensorError, ValueError, RecursionError) as error:
    raise InputError(f'{file} is not a whole safetensors file ({error}); fetch it again') from error
  fields.pop('__metadata__', None)
  return {name: Tensor(file, DTYPES.get(t['dtype'], t['dtype']), tuple(t['shape']),
                       start + t['data_offsets'][0]) for name, t in fields.items()}


def _unique(pairs) -> dict:
  """The pairs of a JSON object; ValueError where a name stands twice (json keeps the last)."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('a name stands in it twice')
  return found
