"""The shape of a Llama, and its `config.json` in Hugging Face's words."""
import dataclasses
import itertools
import json

from etils import epath

from srlm_jax import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretch of the slow frequencies."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_context: int  # tokens


@dataclasses.dataclass(frozen=True)
class Config:
  D: int; F: int; K: int; G: int; H: int; V: int
  layers: int
  context: int                           # tokens a row may hold
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied: bool = False                     # lm_head is the embedding, transposed
  attention_bias: bool = False
  dtype: str = 'float32'                 # of activations; parameters keep their own
  dropout: float = 0.0                   # on the residual branches, only where a 'dropout' key is passed


PRESETS = {
    'llama2-7b': Config(D=4096, F=11008, K=32, G=1, H=128, V=32000, layers=32, context=4096),
    'llama2-13b': Config(D=5120, F=13824, K=40, G=1, H=128, V=32000, layers=40, context=4096),
    'llama2-70b': Config(D=8192, F=28672, K=8, G=8, H=128, V=32000, layers=80, context=4096),
    # D, depth and context of tinyllamas-260k, whose weights are published
    'stories-260k': Config(D=64, F=172, K=4, G=2, H=8, V=512, layers=5, context=512, tied=True),
    'sandbox': Config(D=128, F=384, K=2, G=2, H=32, V=1024, layers=4, context=256, rope_theta=1000.0, tied=True),
    'tiny-test': Config(D=32, F=64, K=2, G=2, H=8, V=64, layers=2, context=128),
}

# Fields of config.json that do not change what the model computes.
_IGNORED = frozenset("""
    _name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id dtype
    initializer_range pretraining_tp torch_dtype transformers_version use_cache model_type
    output_attentions output_hidden_states return_dict name_or_path""".split())
_REQUIRED = ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_hidden_layers', 'vocab_size')


def load(folder) -> Config:
  """Reads the config.json of a checkpoint or of a Hugging Face folder."""
  path = epath.Path(folder) / 'config.json'
  if not path.exists():
    raise InputError(f'{folder} holds no config.json; name a checkpoint or a Hugging Face folder')
  try:
    return from_hf(json.loads(path.read_text()))
  except (ValueError, InputError) as error:
    raise InputError(f'{path}: {error}') from error


def from_hf(fields: dict) -> Config:
  """Fields of a Llama config.json -> Config; a field that is not supported is refused by name."""
  f = dict(fields)
  if f.get('model_type') != 'llama':
    raise InputError(f'model_type is {f.get("model_type")!r}; only llama is supported')
  for name in _REQUIRED:
    if f.get(name) is None:
      raise InputError(f'no field {name}')
  for name, only in (('hidden_act', 'silu'), ('mlp_bias', False)):
    if f.pop(name, only) != only:
      raise InputError(f'{name} = {fields[name]!r} is not supported, only {only!r} is')
  heads = f.pop('num_attention_heads')
  kv_heads = f.pop('num_key_value_heads', None) or heads
  if heads % kv_heads:
    raise InputError(f'num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}')
  width = f.pop('hidden_size')
  scaling, theta = _rope(f)
  config = Config(
      D=width, F=f.pop('intermediate_size'), K=kv_heads, G=heads // kv_heads,
      H=f.pop('head_dim', None) or width // heads, V=f.pop('vocab_size'), layers=f.pop('num_hidden_layers'),
      context=f.pop('max_position_embeddings', 2048), rope_theta=theta, rope_scaling=scaling,
      norm_eps=f.pop('rms_norm_eps', 1e-6), tied=f.pop('tie_word_embeddings', False),
      attention_bias=f.pop('attention_bias', False))  # defaults: those of transformers' LlamaConfig
  if f.get('attention_dropout', 0):
    raise InputError(f'attention_dropout = {f["attention_dropout"]} is not supported, only 0 is')
  unknown = sorted(name for name in set(f) - _IGNORED if f[name] not in (None, False))
  if unknown:
    raise InputError(f'{unknown[0]} = {f[unknown[0]]!r} is not supported; remove it if the weights do without')
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


def _rope(f: dict):
  """Takes the rotary fields out of `f` -> (RopeScaling or None, theta), as transformers reads them.

  `rope_theta` stands at the top or in `rope_scaling` or `rope_parameters`, and is 10,000 where none
  states it (`RotaryEmbeddingConfigMixin` of modeling_rope_utils.py). transformers silently prefers
  the nested value, and `rope_scaling` to `rope_parameters`; here values that differ are refused.
  """
  top = f.pop('rope_theta', None)
  theta = 10_000.0 if top is None else float(top)
  stated, read = [] if top is None else [('rope_theta', theta)], []
  for name in ('rope_scaling', 'rope_parameters'):
    fields = f.pop(name, None) or {}
    if not isinstance(fields, dict):
      raise InputError(f'{name} = {fields!r} is not a set of fields; write {{"rope_type": ..}}')
    if not fields:
      continue
    fields = dict(fields)
    kind = fields.pop('type', 'default')
    kind = fields.pop('rope_type', kind)
    inner = fields.pop('rope_theta', None)
    inner = theta if inner is None else float(inner)
    stated.append((f'{name}.rope_theta', inner))
    read.append((inner, kind, fields))
  for (name, value), (other, another) in itertools.pairwise(stated):
    if value != another:
      raise InputError(f'{name} = {value} and {other} = {another} differ; keep the one that the '
                       f'model was trained with')
  if len(read) == 2 and read[0] != read[1]:
    raise InputError(f'rope_scaling = {read[0][1:]} and rope_parameters = {read[1][1:]} differ; '
                     f'keep the one that the model was trained with')
  theta, kind, scaling = read[0] if read else (theta, 'default', {})
  if kind == 'default' and not scaling:
    return None, theta
  if kind != 'llama3':
    raise InputError(f'rope_scaling of type {kind!r} is not supported, only llama3 is')
  try:
    result = RopeScaling(
        factor=float(scaling.pop('factor')), low_freq_factor=float(scaling.pop('low_freq_factor')),
        high_freq_factor=float(scaling.pop('high_freq_factor')),
        original_context=int(scaling.pop('original_max_position_embeddings')))
  except KeyError as error:
    raise InputError(f'rope_scaling lacks the field {error}') from error
  if scaling:
    raise InputError(f'rope_scaling field {sorted(scaling)[0]!r} is not supported')
  return result, theta
