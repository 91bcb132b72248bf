"""LoRA adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors."""
import json
import math

from etils import epath
from flax import traverse_util
import numpy as np
import safetensors.numpy

from srlm_jax import config as configs, InputError, model_files, records, storage
from srlm_jax.checkpoint import hf, store
from srlm_jax.models import config as model_config, lora

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX, A, B = 'base_model.model.', '.lora_A.weight', '.lora_B.weight'
BASE = 'srlm_jax.base_params'  # in the file's metadata: the hash of the model that is adapted
# Fields that do not change what an adapter computes. All others must have an empty value.
IGNORED = ('peft_type', 'task_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path',
           'revision', 'inference_mode', 'target_modules', 'lora_dropout', 'megatron_core',
           'qalora_group_size', 'r', 'lora_alpha', 'use_rslora', 'init_lora_weights',
           'runtime_config', 'eva_config', 'ensure_weight_tying')
EMPTY = (None, False, '', 'none', [], {})
# Ways to begin that leave the weights of the model as they are.
INITIAL = (True, False, None, 'gaussian', 'eva', 'orthogonal')
SUPPORTED = ('supported are LoRA adapters (also with use_rslora) of one rank, without bias, of '
             f'{", ".join(configs.LORA_TARGETS)} in every layer')
ADVICE = 'give a folder that save_pretrained of PEFT wrote'


def to_peft(folder, out, step: int | None = None, base_model: str = '') -> str:
  """Writes the adapter of a model as a new PEFT folder `out` -> a description.

  With adapters of earlier rounds it is all of them, joined, for the model below. `base_model`: the
  name of that model for PEFT. Raises InputError for a model without adapter.
  """
  step = model_files.find_step(folder, step)
  adapter = model_files.read_adapter(folder)
  if adapter is None:
    raise InputError(f'{folder} has no LoRA adapter; export it as a whole: --to_hf=DIR')
  root, root_step, arrays = store.read_adapters(folder, step)
  rank, alpha = adapter.rank, adapter.alpha
  if root == model_files.base_folder(folder, adapter):
    arrays = traverse_util.flatten_dict(store.read_adapter(folder, step), sep='.')
  else:  # the scales are part of the joined B
    rank = alpha = max(x.shape[-1] for name, x in arrays.items() if '_a_' in name)
  tensors, targets = {}, []
  for leaf, target in _leaves(model_config.load(folder)):
    if lora.paths(leaf.name)[0] not in arrays:
      continue
    targets.append(target)
    a, b = (arrays[name] for name in lora.paths(leaf.name))
    for layer, name in enumerate(leaf.tensors):
      module = PREFIX + name.removesuffix('.weight')
      outputs, inputs = leaf.hf_shape
      tensors[module + A] = _padded(a[layer].reshape(inputs, -1).T, rank, 0)
      tensors[module + B] = _padded(b[layer].reshape(-1, outputs).T, rank, 1)
  fields = dict(
      peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base_model or None,
      inference_mode=True, r=rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
      lora_dropout=0.0, bias='none', target_modules=targets, fan_in_fan_out=False)
  metadata = dict(format='pt', **{BASE: model_files.recorded_hash(root, root_step)})
  with storage.making_folder(out) as made:
    (made / TENSORS).write_bytes(safetensors.numpy.save(tensors, metadata))
    (made / CONFIG).write_text(json.dumps(fields, indent=2) + '\n')
  return _described(tensors)


def from_peft(source, base, out) -> str:
  """Makes a new model folder `out` of a PEFT folder and the checkpoint that it adapts.

  -> a description. Raises InputError for what is not supported, and for adapters of other models.
  """
  config = model_config.load(base)
  rank, alpha, targets, arrays = read(source, base)
  adapter = model_files.adapter(rank, alpha, targets, base, out)
  with storage.making_folder(out) as made:
    store.write_model_files(config, base, made, adapter)
    _save(made, traverse_util.unflatten_dict(arrays, sep='.'))
  return _described(arrays)


def read(source, base) -> tuple[int, float, list[str], dict]:
  """-> rank, alpha, targets and {path: array} of a PEFT folder that adapts the checkpoint `base`.

  Raises InputError as `from_peft`.
  """
  source = epath.Path(source)
  config, fields = model_config.load(base), _read_fields(source / CONFIG)
  rank, alpha = fields['r'], fields['lora_alpha']
  if fields.get('use_rslora'):
    alpha *= math.sqrt(rank)  # scaled by alpha / sqrt(rank)
  tensors, metadata = hf.read_header(source / TENSORS)
  now = model_files.recorded_hash(base)
  if metadata.get(BASE, now) != now:
    raise InputError(f'{source / TENSORS} adapts the parameters {metadata[BASE]}, and {base} has '
                     f'{now}; name the model that the adapter was trained on')
  arrays, targets = {}, []
  for leaf, target in _leaves(config):
    modules = [PREFIX + name.removesuffix('.weight') for name in leaf.tensors]
    if not any(module + kind in tensors for module in modules for kind in (A, B)):
      continue
    targets.append(target)
    outputs, inputs = leaf.hf_shape
    a, b = ([_take(tensors, source, module + kind, shape, base) for module in modules]
            for kind, shape in ((A, (rank, inputs)), (B, (outputs, rank))))
    a_name, b_name = lora.paths(leaf.name)
    shapes = traverse_util.flatten_dict(lora.shapes(config, rank, [target]), sep='.')
    arrays[a_name] = np.stack([x.T for x in a]).reshape(shapes[a_name].shape)
    arrays[b_name] = np.stack([x.T for x in b]).reshape(shapes[b_name].shape)
  if tensors or not targets:
    found = f'tensor {min(tensors)}' if tensors else 'no adapter'
    raise InputError(f'{source / TENSORS}: {found} is not supported; {SUPPORTED}')
  named = fields.get('target_modules')
  if isinstance(named, list) and {str(name).rpartition('.')[2] for name in named} != {*targets}:
    raise InputError(f'{source / CONFIG}: target_modules is {configs.show(named)}, and {TENSORS} '
                     f'has tensors of {", ".join(targets)}; {ADVICE}')
  return rank, alpha, targets, arrays


def _save(folder, arrays):
  saver = store.manager(folder, keep=None)
  store.save(saver, 0, arrays)
  saver.close()


def _described(arrays: dict) -> str:
  return (f'{sum(x.size for x in arrays.values()):,} parameters, '
          f'{sum(x.nbytes for x in arrays.values()):,} bytes')


def _leaves(config):
  """Yields the arrays that may have adapters, and their names in PEFT."""
  ours = {f'layers.{name}': target for target, name in lora.WEIGHTS.items()}
  for leaf in hf.leaves(config):
    if leaf.name in ours:
      yield leaf, ours[leaf.name]


def _padded(x, rank: int, axis: int):
  """x with zeros up to this rank."""
  widths = [(0, 0), (0, 0)]
  widths[axis] = (0, rank - x.shape[axis])
  return np.ascontiguousarray(np.pad(x, widths))


def _take(tensors: dict, source, name: str, shape: tuple, base):
  """Removes a tensor of the file from `tensors` -> its values in float32."""
  if name not in tensors:
    raise InputError(f'{source / TENSORS} has no tensor {name}; {SUPPORTED}')
  tensor = tensors.pop(name)
  if tensor.shape != shape:
    raise InputError(f'{tensor.file}: tensor {name} has shape {list(tensor.shape)}, and {base} '
                     f'with the r of {CONFIG} requires {list(shape)}; name the model that the '
                     f'adapter was trained on')
  if tensor.dtype not in hf.NAMES:
    raise InputError(f'{tensor.file}: tensor {name} is {tensor.dtype}; use one of '
                     f'{", ".join(map(str, hf.NAMES))}')
  return hf.finite(tensor.file, name, tensor.read().astype(np.float32))


def _read_fields(path) -> dict:
  """Reads adapter_config.json; InputError for what would change what an adapter computes."""
  fields = records.read_json(path, ADVICE)
  if not isinstance(fields, dict) or 'peft_type' not in fields:
    raise InputError(f'{path} is not a configuration of PEFT; {ADVICE}')

  def refuse(name):
    raise InputError(f'{path}: {name} = {configs.show(fields.get(name))} is not supported; '
                     f'{SUPPORTED}')
  if fields['peft_type'] != 'LORA':
    refuse('peft_type')
  if fields.get('init_lora_weights', True) not in INITIAL:
    refuse('init_lora_weights')
  if type(fields.get('use_rslora', False)) is not bool:
    refuse('use_rslora')
  for name, least in (('r', 1), ('lora_alpha', 0)):
    value = fields.get(name)
    if type(value) not in (int, float) or not least <= value < 2**24 or name == 'r' and (
        type(value) is not int):
      refuse(name)
  for name, value in fields.items():
    if name not in IGNORED and value not in EMPTY:
      refuse(name)
  return fields
