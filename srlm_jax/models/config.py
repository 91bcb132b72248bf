"""The architecture of a model, and its Hugging Face `config.json`."""
import dataclasses
import itertools
import json
from typing import NamedTuple

from etils import epath

from srlm_jax import InputError
from srlm_jax.models.families import FAMILIES
from srlm_jax.models.fields import (
  COUNT,
  DTYPE,
  FLAG,
  flag,
  ID,
  ID_OR_NONE,
  IDS,
  LAYERS,
  number,
  short,
  size,
  SPREAD,
  take,
  TEXT,
  TEXTS,
)


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
  biases: str = ''                       # the projections with a bias: letters of qkvo
  qk_norm: str = ''                      # of q and k before RoPE: per head (head), over all (all)
  norms: str = 'pre'                     # of the inputs of attention and MLP; post: of the outputs
  window: int | None = None              # tokens that a query attends to at most, its own included
  family: str = 'llama'                  # of models/families.py, for the format of Hugging Face
  dtype: str = 'float32'                 # of activations; parameters keep their own
  dropout: float = 0.0                   # on residual branches, where a 'dropout' key is passed

  @property
  def C(self) -> int:
    """Heads per key/value head in a joint weight of q, k and v."""
    return self.G + 2


def _llama3(*sizes, factor: float = 8.0, tied: bool = False) -> Config:
  """Llama 3.1 to 3.3."""
  return Config(*sizes, context=131072, rope_theta=5e5, tied=tied,
                rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192))


def _mistral(V: int, **more) -> Config:
  return Config(4096, 14336, 8, 4, 128, V, 32, context=32768, family='mistral', **more)


def _qwen2(*sizes, context: int = 131072, **more) -> Config:
  return Config(*sizes, context=context, rope_theta=1e6, biases='qkv', family='qwen2', **more)


def _qwen3(*sizes, tied: bool = False) -> Config:
  return Config(*sizes, context=40960, rope_theta=1e6, norm_eps=1e-6, tied=tied, qk_norm='head',
                family='qwen3')


def _olmo2(*sizes) -> Config:
  return Config(*sizes, context=4096, rope_theta=5e5, norm_eps=1e-6, qk_norm='all', norms='post',
                family='olmo2')


PRESETS = {  # D, F, K, G, H, V, layers of the published base models
    'llama2-7b': Config(4096, 11008, 32, 1, 128, 32000, 32, context=4096),
    'llama2-13b': Config(5120, 13824, 40, 1, 128, 32000, 40, context=4096),
    'llama2-70b': Config(8192, 28672, 8, 8, 128, 32000, 80, context=4096),
    'llama3.1-8b': _llama3(4096, 14336, 8, 4, 128, 128256, 32),
    'llama3.1-70b': _llama3(8192, 28672, 8, 8, 128, 128256, 80),
    'llama3.2-1b': _llama3(2048, 8192, 8, 4, 64, 128256, 16, factor=32.0, tied=True),
    'llama3.2-3b': _llama3(3072, 8192, 8, 3, 128, 128256, 28, factor=32.0, tied=True),
    'llama3.3-70b': _llama3(8192, 28672, 8, 8, 128, 128256, 80),
    'mistral-7b-v0.1': _mistral(32000, window=4096),
    'mistral-7b-v0.3': _mistral(32768, rope_theta=1e6),
    'qwen2.5-0.5b': _qwen2(896, 4864, 2, 7, 64, 151936, 24, context=32768, norm_eps=1e-6,
                           tied=True),
    'qwen2.5-1.5b': _qwen2(1536, 8960, 2, 6, 128, 151936, 28, norm_eps=1e-6, tied=True),
    'qwen2.5-3b': _qwen2(2048, 11008, 2, 8, 128, 151936, 36, context=32768, norm_eps=1e-6,
                         tied=True),
    'qwen2.5-7b': _qwen2(3584, 18944, 4, 7, 128, 152064, 28, norm_eps=1e-6),
    'qwen2.5-14b': _qwen2(5120, 13824, 8, 5, 128, 152064, 48),
    'qwen2.5-32b': _qwen2(5120, 27648, 8, 5, 128, 152064, 64),
    'qwen2.5-72b': _qwen2(8192, 29568, 8, 8, 128, 152064, 80),
    'qwen3-0.6b': _qwen3(1024, 3072, 8, 2, 128, 151936, 28, tied=True),
    'qwen3-1.7b': _qwen3(2048, 6144, 8, 2, 128, 151936, 28, tied=True),
    'qwen3-4b': _qwen3(2560, 9728, 8, 4, 128, 151936, 36, tied=True),
    'qwen3-8b': _qwen3(4096, 12288, 8, 4, 128, 151936, 36),
    'qwen3-14b': _qwen3(5120, 17408, 8, 5, 128, 151936, 40),
    'qwen3-32b': _qwen3(5120, 25600, 8, 8, 128, 151936, 64),
    'olmo2-1b': _olmo2(2048, 8192, 16, 1, 128, 100352, 16),
    'olmo2-7b': _olmo2(4096, 11008, 32, 1, 128, 100352, 32),
    'olmo2-13b': _olmo2(5120, 13824, 40, 1, 128, 100352, 40),
    'olmo2-32b': _olmo2(5120, 27648, 8, 5, 128, 100352, 64),
    # D, depth and context of tinyllamas-260k, whose weights are published
    'stories-260k': Config(64, 172, 4, 2, 8, 512, 5, context=512, tied=True),
    'sandbox': Config(128, 384, 2, 2, 32, 1024, 4, context=256, rope_theta=1000.0, tied=True),
    'tiny-test': Config(32, 64, 2, 2, 8, 64, 2, context=128),
}

# Fields of config.json that do not change what the model computes.
_IGNORED = dict(
    _name_or_path=TEXT, name_or_path=TEXT, transformers_version=TEXT, architectures=TEXTS,
    dtype=DTYPE, torch_dtype=DTYPE, bos_token_id=ID, unk_token_id=ID, pad_token_id=ID_OR_NONE,
    eos_token_id=IDS, initializer_range=SPREAD, pretraining_tp=COUNT, use_cache=FLAG,
    output_attentions=FLAG, output_hidden_states=FLAG, return_dict=FLAG,
    _attn_implementation_autoset=FLAG)
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
  """Fields of a config.json -> Config; `models/families.py` says what differs between families.

  InputError names an unsupported field, or one of a wrong type or out of range with its value and
  what it must be.
  """
  if not isinstance(fields, dict):
    raise InputError(f'{short(fields)} is not a set of fields; '
                     f'write {{"model_type": "llama", ..}}')
  kind = fields.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(f'model_type = {short(kind)} is not supported; use a model of one of the '
                     f'families {", ".join(sorted(FAMILIES))}')
  family = FAMILIES[kind]
  f = {name: x for name, x in (family.defaults | fields).items()
       if x is not None or name not in _NULLABLE}
  del f['model_type']
  for name, only in _ONLY.items():
    value = f.pop(name, only)
    if value != only or isinstance(value, bool) != isinstance(only, bool):  # 0 == False
      raise InputError(f'{name} = {short(value)} is not supported, only {only!r} is; '
                       f'use a model with that value')
  for name in [name for name in _IGNORED if name in f]:
    take(f, name, *_IGNORED[name])
  width, heads = size(f, 'hidden_size'), size(f, 'num_attention_heads')
  kv_heads = size(f, 'num_key_value_heads', heads)
  if heads % kv_heads:
    raise InputError(f'num_attention_heads = {heads} is not a multiple of num_key_value_heads = '
                     f'{kv_heads}; the file is damaged, download it again')
  if 'head_dim' not in f and width % heads:
    raise InputError(f'hidden_size = {width} must be a multiple of num_attention_heads = {heads} '
                     f'where there is no head_dim; add the head_dim of the trained model')
  head = size(f, 'head_dim', width // heads)
  if head % 2:
    raise InputError(f'head_dim = {head} must be even, for the rotary embedding; use a model '
                     f'with an even head_dim')
  layers, (scaling, theta) = size(f, 'num_hidden_layers', most=LAYERS), _rope(f)
  own = {name: x for part in family.fields for name, x in part.read(f, layers).items()}
  config = Config(
      D=width, F=size(f, 'intermediate_size'), K=kv_heads, G=heads // kv_heads, H=head,
      V=size(f, 'vocab_size'), layers=layers, context=size(f, 'max_position_embeddings'),
      rope_theta=theta, rope_scaling=scaling, norm_eps=number(f, 'rms_norm_eps', high=1.0),
      tied=flag(f, 'tie_word_embeddings'), family=kind, **family.constants, **own)
  unknown = sorted(name for name in f if f[name] is not None and f[name] is not False)
  if unknown:
    raise InputError(f'{short(unknown[0])[1:-1]} = {short(f[unknown[0]])} is not supported; '
                     f'remove it if the weights do not need it')
  return config


def to_hf(config: Config, dtype: str = 'float32') -> dict:
  """Config -> the fields of config.json, which `from_hf` reads back.

  ValueError if the config's family has no such model.
  """
  rope = dict(rope_theta=config.rope_theta)
  if config.rope_scaling:
    s = config.rope_scaling
    rope['rope_scaling'] = dict(
        rope_type='llama3', factor=s.factor, low_freq_factor=s.low_freq_factor,
        high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_context)
  family = FAMILIES[config.family]
  fields = dict(
      architectures=[family.architecture], model_type=config.family, hidden_size=config.D,
      intermediate_size=config.F, num_hidden_layers=config.layers,
      num_attention_heads=config.K * config.G, num_key_value_heads=config.K, head_dim=config.H,
      vocab_size=config.V, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
      hidden_act='silu', tie_word_embeddings=config.tied, dtype=dtype, torch_dtype=dtype, **rope)
  for part in family.fields:
    fields |= part.write(config)
  if dataclasses.replace(config, dtype=Config.dtype, dropout=Config.dropout) != from_hf(fields):
    raise ValueError(f'no config.json of the family {config.family} describes {config}')
  return fields


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
    raise InputError(f'{name} = {short(fields)} is not a set of fields; '
                     f'write {{"rope_type": ..}}')
  if not fields:
    return None
  scaling = dict(fields)
  kind = scaling.pop('type', 'default')
  kind = scaling.pop('rope_type', kind)
  if scaling.get('rope_theta') is None:
    scaling['rope_theta'] = theta
  return _Rope(name, number(scaling, 'rope_theta', where=f'{name}.'), kind, scaling)


def _rope(f: dict):
  """Removes the RoPE fields from `f` -> (RopeScaling or None, theta), as transformers reads them.

  `rope_theta` is at the top level, in `rope_scaling` or in `rope_parameters`, and defaults to
  10,000 (`RotaryEmbeddingConfigMixin` in modeling_rope_utils.py). transformers silently prefers the
  nested value, and `rope_scaling` to `rope_parameters`; here values that differ are an InputError.
  """
  theta = number(f, 'rope_theta') if 'rope_theta' in f else None
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
    raise InputError(f'rope_scaling = {short(read[0][2:])} and rope_parameters = '
                     f'{short(read[1][2:])} differ; keep the one that the model was trained with')
  name, theta, kind, scaling = read[0] if read else _Rope('', default, 'default', {})
  if kind == 'default' and not scaling:
    return None, theta
  if kind != 'llama3':
    raise InputError(f'{name} of type {short(kind)} with {short(sorted(scaling))} is not '
                     f'supported, only llama3 is; use a model without RoPE scaling, or with llama3')
  where = f'{name}.'
  result = RopeScaling(
      factor=number(scaling, 'factor', low=1.0, where=where),
      low_freq_factor=number(scaling, 'low_freq_factor', where=where),
      high_freq_factor=number(scaling, 'high_freq_factor', where=where),
      original_context=size(scaling, 'original_max_position_embeddings', where=where))
  if result.low_freq_factor >= result.high_freq_factor:
    raise InputError(f'{where}low_freq_factor = {result.low_freq_factor} must be less than '
                     f'high_freq_factor = {result.high_freq_factor}')
  if scaling:
    raise InputError(f'{name} field {short(sorted(scaling)[0])} is not supported; remove it if '
                     f'the weights do not need it')
  return result, theta
