"""Model families: what differs from Llama. docs/models.md says how to add one.

A family is a declaration in FAMILIES. `models/config.py` reads and writes config.json by it,
`checkpoint/hf.py` the tensors. The model itself knows only the fields of `config.Config`.
"""
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from srlm_jax import InputError
from srlm_jax.models.fields import flag, short, SIZE, size, take

# Our parameter: the Hugging Face tensor and its dimensions. {} is the layer, a space separates
# axes. Hugging Face numbers query heads k * G + g, so the letters of an axis give its reshape, and
# their order relative to our name gives the transpose.
TENSORS = {
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
    'layers.attention.q_norm.scale_H': ('model.layers.{}.self_attn.q_norm.weight', 'H'),
    'layers.attention.k_norm.scale_H': ('model.layers.{}.self_attn.k_norm.weight', 'H'),
    'layers.attention.q_norm.scale_KGH': ('model.layers.{}.self_attn.q_norm.weight', 'KGH'),
    'layers.attention.k_norm.scale_KH': ('model.layers.{}.self_attn.k_norm.weight', 'KH'),
    'layers.mlp_norm.scale_D': ('model.layers.{}.post_attention_layernorm.weight', 'D'),
    'layers.mlp.gate_DF': ('model.layers.{}.mlp.gate_proj.weight', 'F D'),
    'layers.mlp.up_DF': ('model.layers.{}.mlp.up_proj.weight', 'F D'),
    'layers.mlp.down_FD': ('model.layers.{}.mlp.down_proj.weight', 'D F'),
    'final_norm.scale_D': ('model.norm.weight', 'D'),
    'lm_head_DV': ('lm_head.weight', 'V D'),
}


class Fields(NamedTuple):
  """Fields of config.json that only some families have, in both directions."""
  read: Callable[[dict, int], dict]  # removes them from the fields, given the number of layers ->
                                     # fields of Config
  write: Callable[[Any], dict]       # Config -> the fields


@dataclasses.dataclass(frozen=True)
class Family:
  """What differs from Llama."""
  architecture: str                    # of config.json: transformers' class
  fields: tuple[Fields, ...] = ()
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of Config
  # Values of fields that are absent in config.json, from transformers' config class.
  absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  renamed: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)  # of TENSORS

  @property
  def defaults(self) -> dict:
    """The values of all fields that may be absent in config.json."""
    return dict(max_position_embeddings=2048, rms_norm_eps=1e-6) | dict(self.absent)


def tensors(config) -> dict[str, tuple[str, str]]:
  """The part of TENSORS that a model with this config has, with the names of its family."""
  absent = {f'b{name}' for name in 'qkvo' if name not in config.biases}
  if config.tied:
    absent.add('lm_head')
  scales = dict(head=('scale_H',), all=('scale_KGH', 'scale_KH'))
  absent |= {scale for kind, names in scales.items() if kind != config.qk_norm for scale in names}

  def has(name):
    last = name.rpartition('.')[2]
    return last not in absent and last.rpartition('_')[0] not in absent
  found = TENSORS | dict(FAMILIES[config.family].renamed)
  return {name: tensor for name, tensor in found.items() if has(name)}


def _read_bias(f: dict, layers: int) -> dict:
  return dict(biases='qkvo' if flag(f, 'attention_bias') else '')


def _read_window(f: dict, layers: int) -> dict:
  return dict(window=_window(f))


def _read_layer_windows(f: dict, layers: int) -> dict:
  """The window that all layers have, or none; InputError if only some layers have it."""
  is_used, window = flag(f, 'use_sliding_window'), _window(f)
  first = take(f, 'max_window_layers', lambda x: type(x) is int and 0 <= x <= SIZE,
               f'an integer from 0 to {SIZE}', 28)  # the first layer with a window
  kinds = ['full_attention', 'sliding_attention']
  made = [kinds[is_used and window is not None and layer >= first] for layer in range(layers)]
  if f.get('layer_types') is None:
    f.pop('layer_types', None)
  found = take(f, 'layer_types', lambda x: isinstance(x, list) and len(x) == layers and
               all(kind in kinds for kind in x), f'a list of {layers} of {" and ".join(kinds)}',
               made)
  if found == kinds[:1] * layers:
    return dict(window=None)
  if found != kinds[1:] * layers:
    raise InputError(f'layer_types = {short(found)} (or max_window_layers = {first}) gives a '
                     f'sliding window to some layers only; use a model in which all layers or no '
                     f'layer has one')
  if not is_used or window is None:
    raise InputError(f'layer_types = {short(found)} needs use_sliding_window = true and a '
                     f'sliding_window; correct config.json')
  return dict(window=window)


def _write_layer_windows(config) -> dict:
  is_used = config.window is not None
  return dict(use_sliding_window=is_used, sliding_window=config.window,
              max_window_layers=0 if is_used else config.layers)


def _window(f: dict) -> int | None:
  """Removes sliding_window from the fields; null means none, and absent 4096."""
  if f.get('sliding_window', 0) is None:
    return f.pop('sliding_window')
  return size(f, 'sliding_window', 4096)


ATTENTION_BIAS = Fields(_read_bias, lambda config: dict(attention_bias=config.biases == 'qkvo'))
SLIDING_WINDOW = Fields(_read_window, lambda config: dict(sliding_window=config.window))
LAYER_WINDOWS = Fields(_read_layer_windows, _write_layer_windows)

FAMILIES = {  # by model_type of config.json
    # Llama 2, 3 and 3.1 to 3.3
    'llama': Family('LlamaForCausalLM', fields=(ATTENTION_BIAS,)),
    'mistral': Family(
        'MistralForCausalLM', fields=(SLIDING_WINDOW,),
        absent=dict(num_key_value_heads=8, max_position_embeddings=131072)),
    # Qwen2 and Qwen2.5
    'qwen2': Family(
        'Qwen2ForCausalLM', fields=(LAYER_WINDOWS,), constants=dict(biases='qkv'),
        absent=dict(num_key_value_heads=32, max_position_embeddings=32768)),
    'qwen3': Family(
        'Qwen3ForCausalLM', fields=(ATTENTION_BIAS, LAYER_WINDOWS),
        constants=dict(qk_norm='head'),
        absent=dict(num_key_value_heads=32, max_position_embeddings=32768, head_dim=128)),
    'olmo2': Family(
        'Olmo2ForCausalLM', fields=(ATTENTION_BIAS,),
        constants=dict(qk_norm='all', norms='post'), absent=dict(rms_norm_eps=1e-5),
        renamed={
            'layers.attention_norm.scale_D':
                ('model.layers.{}.post_attention_layernorm.weight', 'D'),
            'layers.mlp_norm.scale_D': ('model.layers.{}.post_feedforward_layernorm.weight', 'D')}),
}
