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

# Fields of config.json that do not change what the model computes.
_IGNORED = dict(
    _name_or_path=TEXT, name_or_path=TEXT, transformers_version=TEXT, architectures=TEXTS,
    dtype=DTYPE, torch_dtype=DTYPE, bos_token_id=ID, unk_token_id=ID, pad_token_id=ID_OR_NONE,
    eos_token_id=IDS, initializer_range=SPREAD, pretraining_tp=COUNT, use_cache=FLAG,
    output_attentions=FLAG, output_hidden_states=FLAG, return_dict=FLAG)
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
