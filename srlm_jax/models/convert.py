"""Llamas between Hugging Face folders and checkpoint folders, tensor by tensor, bit for bit.

  python -m srlm_jax.models.convert --from_hf=DIR --out=DIR
  python -m srlm_jax.models.convert --checkpoint=DIR --to_hf=DIR [--step=N]

Every tensor keeps its dtype. Our arrays are stacked over layers and never whole in memory: the peak stays
under 2 x the largest Hugging Face tensor + 1 GiB. Folders are local ones.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
from typing import Any

from absl import flags
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from tqdm import tqdm

from srlm_jax import checkpoint, InputError
from srlm_jax.models import config as model_config, llama

# Our array -> the Hugging Face tensor and its dimensions; a space parts the axes, {} is the layer. Hugging Face
# numbers query heads k * G + g, so the same letters say both how an axis is split and how it is transposed.
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
CHUNK_BYTES = 2**24       # of a stored array: read and compressed as one
WRITE_BYTES = 2**26       # written at once: enough chunks to compress in parallel
HASH_ELEMENTS = 2**18     # hashed at once: what a core's cache holds
SHARD_BYTES = 5 * 10**9   # of a .safetensors file, as Hugging Face splits them


@dataclasses.dataclass(frozen=True)
class Converted:
  """What was converted."""
  parameters: int
  bytes: int
  hash: str


def from_hf(source, out) -> Converted:
  """Hugging Face folder -> checkpoint folder `out` with step 0; `out` appears when it is whole."""
  config = model_config.load(source)
  found = find(source, config)
  with _whole(out) as folder, tqdm(total=sum(map(len, found.values())), unit='tensor') as progress:
    checkpoint.copy_model_files(source, folder)
    tree = {leaf.name: Stream(leaf, found[leaf.name], progress) for leaf in leaves(config)}
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((Stream, StreamHandler())))
    with ocp.Checkpointer(handler) as saver:
      saver.save(folder / 'steps' / '0' / 'params',
                 args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(tree, sep='.')))
    hashes = _hashes({name: (stream.dtype, stream.shape, stream.sums) for name, stream in tree.items()})
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as saver:
      saver.save(folder / 'steps' / '0' / 'hash', args=ocp.args.JsonSave(hashes))
  return _converted(tree, hashes)


def to_hf(folder, out, step: int | None = None, shard_bytes: int = SHARD_BYTES) -> Converted:
  """A step of a checkpoint folder (by default the last) -> Hugging Face folder `out`, in the stored dtype."""
  config = model_config.load(folder)
  path = pathlib.Path(folder).resolve() / 'steps' / str(checkpoint.latest(folder) if step is None else step)
  arrays = {leaf.name: _open(path / 'params', leaf) for leaf in leaves(config)}
  order = sorted(  # the embedding, layer by layer, the head
      ((leaf, layer) for leaf in leaves(config) for layer in range(len(leaf.tensors))),
      key=lambda x: (x[0].name.startswith(('final', 'lm_head')), x[0].stacked, x[1]))
  sums = {name: {} for name in arrays}
  with _whole(out) as target, tqdm(total=len(order), unit='tensor') as progress:
    checkpoint.copy_model_files(folder, target)
    _say_dtype(target / 'config.json', str(arrays['embed_VD'].dtype.numpy_dtype))
    for file, part in _shards(order, arrays, shard_bytes, target):
      with file.open('wb') as f:
        f.write(_header(part, arrays))
        for leaf, layer in part:
          tensor = _read(arrays[leaf.name], leaf, layer)
          ours, offset = leaf.ours(tensor), layer * math.prod(leaf.slice_shape)
          for start, rows in _rows(ours, WRITE_BYTES):
            _add_sums(sums[leaf.name], rows, offset + start * math.prod(ours.shape[1:]))
          tensor.tofile(f)
          progress.update()
    hashes = _hashes({name: (a.dtype.numpy_dtype, a.shape, sums[name]) for name, a in arrays.items()})
    recorded = json.loads((path / 'hash' / 'metadata').read_text())
    if recorded['stored'] != hashes['stored']:
      raise InputError(f'{path}/params does not have the hash that it was saved with; the checkpoint is damaged')
  return _converted({name: _Shape(a.shape, a.dtype.numpy_dtype) for name, a in arrays.items()}, hashes)
