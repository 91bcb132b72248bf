"""The architecture of a Llama, and its Hugging Face `config.json`."""
import dataclasses
import itertools
import json
from typing import NamedTuple

from etils import epath

from srlm_jax import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's scaling of the low RoPE frequencies."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_context: int  # tokens


@dataclasses.dataclass(frozen=True)
class Config:
  """The letters are the dimensions of `models/llama.py`."""
  D: int; F: int; K: int; G: int; H: int; V: int
  layers: int
  context: int                           # tokens per row that the model supports
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied: bool = False                     # lm_head is the transposed embedding
  attention_bias: bool = False
  dtype: str = 'float32'                 # of activations; parameters keep their own
  dropout: float = 0.0                   # on residual branches, where a 'dropout' key is passed

  @property
  def C(self) -> int:
    """Heads per key/value head in a joint weight of q, k and v."""
    return self.G + 2


PRESETS = {
    'llama2-7b': Config(D=4096, F=11008, K=32, G=1, H=128, V=32000, layers=32, context=4096),
    'llama2-13b': Config(D=5120, F=13824, K=40, G=1, H=128, V=32000, layers=40, context=4096),
    'llama2-70b': Config(D=8192, F=28672, K=8, G=8, H=128, V=32000, layers=80, context=4096),
    # D, depth and context of tinyllamas-260k, whose weights are published
    'stories-260k': Config(D=64, F=172, K=4, G=2, H=8, V=512, layers=5, context=512, tied=True),
    'sandbox': Config(D=128, F=384, K=2, G=2, H=32, V=1024, layers=4, context=256,
                      rope_theta=1000.0, tied=True),
    'tiny-test': Config(D=32, F=64, K=2, G=2, H=8, V=64, layers=2, context=128),
}

# Bounds far above those of any Llama; a file that exceeds them is damaged.
_SIZE = 2**24           # of a dimension, the context or the vocabulary
_LAYERS = 2**12
_NUMBER = 1e-30, 1e30   # float32 holds them and their inverses


def _is_id(x, least: int = 0) -> bool:
  return type(x) is int and least <= x < _SIZE


# What a field must be: a predicate, and its description for error messages.
_TEXT = (lambda x: isinstance(x, str), 'a string')
_TEXTS = (lambda x: isinstance(x, list) and all(isinstance(v, str) for v in x),
          'a list of strings')
_FLAG = (lambda x: type(x) is bool, 'true or false')
_COUNT = (lambda x: type(x) is int and 1 <= x <= _SIZE, f'an integer from 1 to {_SIZE}')
_ID = (_is_id, f'an integer from 0 to {_SIZE - 1}')
_ID_OR_NONE = (lambda x: _is_id(x, -1), f'an integer from -1 to {_SIZE - 1}')
_IDS = (lambda x: _is_id(x) or isinstance(x, list) and all(map(_is_id, x)),
        f'an integer from 0 to {_SIZE - 1} or a list of such integers')
_SPREAD = (lambda x: type(x) in (int, float) and 0 <= x <= _NUMBER[1],
           f'a number from 0 to {_NUMBER[1]:g}')
# The names that transformers writes; it does not read them with the prefix "torch.".
_DTYPE = (lambda x: x in ('float32', 'bfloat16', 'float16', 'float64'),
          'float32, bfloat16, float16 or float64')

# Fields of config.json that do not change what the model computes.
_IGNORED = dict(
    _name_or_path=_TEXT, name_or_path=_TEXT, transformers_version=_TEXT, architectures=_TEXTS,
    dtype=_DTYPE, torch_dtype=_DTYPE, bos_token_id=_ID, unk_token_id=_ID, pad_token_id=_ID_OR_NONE,
    eos_token_id=_IDS, initializer_range=_SPREAD, pretraining_tp=_COUNT, use_cache=_FLAG,
    output_attentions=_FLAG, output_hidden_states=_FLAG, return_dict=_FLAG)
# Fields in which null means the default, as in transformers.
_NULLABLE = ('num_key_value_heads', 'head_dim', 'rope_theta', 'rope_scaling', 'rope_parameters',
             *_IGNORED)
# Fields with a single supported value, which is also the default.
_ONLY = dict(hidden_act='silu', mlp_bias=False, attention_dropout=0.0)


def load(folder) -> Config:
  """Reads the config.json of a checkpoint or of a Hugging Face folder; InputError with its path."""
  path = epath.Path(folder) / 'config.json'
  if not path.exists():
    raise InputError(f'{folder} holds no config.json; name a checkpoint or a Hugging Face folder')
  try:
    return from_hf(json.loads(path.read_text()))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} is not valid JSON ({error}); download it again') from error
  except InputError as error:
    raise InputError(f'{path}: {error}') from error


def from_hf(fields: dict) -> Config:
  """Fields of a Llama config.json -> Config.

  InputError names an unsupported field, or one of a wrong type or out of range with its value and
  what it must be.
  """
  if not isinstance(fields, dict):
    raise InputError(f'{_short(fields)} is not a set of fields; '
                     f'write {{"model_type": "llama", ..}}')
  f = {name: x for name, x in fields.items() if x is not None or name not in _NULLABLE}
  kind = f.pop('model_type', None)
  if kind != 'llama':
    raise InputError(f'model_type = {_short(kind)} is not supported, only llama is; '
                     f'use the checkpoint of a Llama')
  for name, only in _ONLY.items():
    value = f.pop(name, only)
    if value != only or isinstance(value, bool) != isinstance(only, bool):  # 0 == False
      raise InputError(f'{name} = {_short(value)} is not supported, only {only!r} is; '
                       f'use a model with that value')
  for name in [name for name in _IGNORED if name in f]:
    _take(f, name, *_IGNORED[name])
  width, heads = _size(f, 'hidden_size'), _size(f, 'num_attention_heads')
  kv_heads = _size(f, 'num_key_value_heads', heads)
  if heads % kv_heads:
    raise InputError(f'num_attention_heads = {heads} is not a multiple of num_key_value_heads = '
                     f'{kv_heads}; the file is damaged, download it again')
  if 'head_dim' not in f and width % heads:
    raise InputError(f'hidden_size = {width} must be a multiple of num_attention_heads = {heads} '
                     f'where there is no head_dim; add the head_dim of the trained model')
  head = _size(f, 'head_dim', width // heads)
  if head % 2:
    raise InputError(f'head_dim = {head} must be even, for the rotary embedding; use a model '
                     f'with an even head_dim')
  scaling, theta = _rope(f)
  config = Config(
      D=width, F=_size(f, 'intermediate_size'), K=kv_heads, G=heads // kv_heads, H=head,
      V=_size(f, 'vocab_size'), layers=_size(f, 'num_hidden_layers', most=_LAYERS),
      context=_size(f, 'max_position_embeddings', 2048), rope_theta=theta, rope_scaling=scaling,
      norm_eps=_number(f, 'rms_norm_eps', 1e-6, high=1.0), tied=_flag(f, 'tie_word_embeddings'),
      attention_bias=_flag(f, 'attention_bias'))  # defaults: those of transformers' LlamaConfig
  unknown = sorted(name for name in f if f[name] is not None and f[name] is not False)
  if unknown:
    raise InputError(f'{_short(unknown[0])[1:-1]} = {_short(f[unknown[0]])} is not supported; '
                     f'remove it if the weights do not need it')
  return config


def to_hf(config: Config, dtype: str = 'float32') -> dict:
  """Config -> the fields of config.json; from_hf reads them back."""
  rope = dict(rope_theta=config.rope_theta)
  if config.rope_scaling:
    s = config.rope_scaling
    rope['rope_scaling'] = dict(
        rope_type='llama3', factor=s.factor, low_freq_factor=s.low_freq_factor,
        high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_context)
  return dict(
      architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=config.D,
      intermediate_size=config.F, num_hidden_layers=config.layers,
      num_attention_heads=config.K * config.G, num_key_value_heads=config.K, head_dim=config.H,
      vocab_size=config.V, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
      hidden_act='silu', tie_word_embeddings=config.tied, attention_bias=config.attention_bias,
      dtype=dtype, torch_dtype=dtype, **rope)


class _Rope(NamedTuple):
  """`rope_scaling` or `rope_parameters` of a config.json."""
  name: str
  theta: float
  kind: str
  scaling: dict  # the other fields


def _rope_fields(f: dict, name: str, theta: float) -> _Rope | None:
  """Removes the field `name` from `f`; None if it is absent or empty. `theta`: the default."""
  fields = f.pop(name, {})
  if not isinstance(fields, dict):
    raise InputError(f'{name} = {_short(fields)} is not a set of fields; '
                     f'write {{"rope_type": ..}}')
  if not fields:
    return None
  scaling = dict(fields)
  kind = scaling.pop('type', 'default')
  kind = scaling.pop('rope_type', kind)
  if scaling.get('rope_theta') is None:
    scaling['rope_theta'] = theta
  return _Rope(name, _number(scaling, 'rope_theta', where=f'{name}.'), kind, scaling)


def _rope(f: dict):
  """Removes the RoPE fields from `f` -> (RopeScaling or None, theta), as transformers reads them.

  `rope_theta` is at the top level, in `rope_scaling` or in `rope_parameters`, and defaults to
  10,000 (`RotaryEmbeddingConfigMixin` in modeling_rope_utils.py). transformers silently prefers the
  nested value, and `rope_scaling` to `rope_parameters`; here values that differ are an InputError.
  """
  theta = _number(f, 'rope_theta') if 'rope_theta' in f else None
  default = 10_000.0 if theta is None else theta
  read = [rope for name in ('rope_scaling', 'rope_parameters')
          if (rope := _rope_fields(f, name, default))]
  stated = [] if theta is None else [('rope_theta', theta)]
  stated += [(f'{rope.name}.rope_theta', rope.theta) for rope in read]
  for (name, value), (other, another) in itertools.pairwise(stated):
    if value != another:
      raise InputError(f'{name} = {value} and {other} = {another} differ; keep the one that the '
                       f'model was trained with')
  if len(read) == 2 and read[0][1:] != read[1][1:]:
    raise InputError(f'rope_scaling = {_short(read[0][2:])} and rope_parameters = '
                     f'{_short(read[1][2:])} differ; keep the one that the model was trained with')
  name, theta, kind, scaling = read[0] if read else _Rope('', default, 'default', {})
  if kind == 'default' and not scaling:
    return None, theta
  if kind != 'llama3':
    raise InputError(f'{name} of type {_short(kind)} with {_short(sorted(scaling))} is not '
                     f'supported, only llama3 is; use a model without RoPE scaling, or with llama3')
  where = f'{name}.'
  result = RopeScaling(
      factor=_number(scaling, 'factor', low=1.0, where=where),
      low_freq_factor=_number(scaling, 'low_freq_factor', where=where),
      high_freq_factor=_number(scaling, 'high_freq_factor', where=where),
      original_context=_size(scaling, 'original_max_position_embeddings', where=where))
  if result.low_freq_factor >= result.high_freq_factor:
    raise InputError(f'{where}low_freq_factor = {result.low_freq_factor} must be less than '
                     f'high_freq_factor = {result.high_freq_factor}')
  if scaling:
    raise InputError(f'{name} field {_short(sorted(scaling)[0])} is not supported; remove it if '
                     f'the weights do not need it')
  return result, theta


def _take(f: dict, name: str, allowed, must: str, *default, where: str = ''):
  """Removes a field from `f` -> its value, or the default; InputError if missing or not allowed."""
  if name not in f and not default:
    raise InputError(f'{where}{name} is missing; it must be {must}')
  value = f.pop(name, *default)
  if not allowed(value):
    raise InputError(f'{where}{name} = {_short(value)} must be {must}')
  return value


def _size(f, name, *default, most=_SIZE, where='') -> int:
  return _take(f, name, lambda x: type(x) is int and 1 <= x <= most,
               f'an integer from 1 to {most}', *default, where=where)


def _number(f, name, *default, low=_NUMBER[0], high=_NUMBER[1], where='') -> float:
  return float(_take(f, name, lambda x: type(x) in (int, float) and low <= x <= high,
                     f'a number from {low:g} to {high:g}', *default, where=where))


def _flag(f, name) -> bool:
  return _take(f, name, *_FLAG, False)


def _short(value) -> str:
  """The value's repr for an error message, shortened to one short line."""
  found = repr(value)
  return found if len(found) <= 60 else f'{found[:40]}...{found[-10:]}'
