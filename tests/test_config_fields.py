"""Every field of config.json that a model reads: wrong values are refused by name."""
import json
import math

from hypothesis import example, given, strategies as st
import pytest
from test_config import LLAMA3
from test_convert import make, TIED
import transformers

from srlm_jax import InputError
from srlm_jax.checkpoint import convert
from srlm_jax.models import config as model_config

NAN, INF = math.nan, math.inf
NO_NUMBER = ['64', '', True, False, [64], [], {}, dict(a=1), NAN, INF, -INF, 10**400, -10**400]
NO_INTEGER = [*NO_NUMBER, 0, -1, 1.5, 64.0, 2**63, 2**40, -2**63]
NO_POSITIVE = [*NO_NUMBER, 0, 0.0, -0.0, -1, -1e-5, 1e300, 5e-324]
NO_BOOL = [None, 'true', '', 0, 1, 1.0, [], [True], {}, NAN]
NO_NAME = ['', 'SILU', 'gelu', None, 3, True, [], ['silu'], {}, NAN]
# transformers reads and writes names of torch without 'torch.': float32, bfloat16
NO_DTYPE = [3, True, [], ['float32'], {}, NAN, '', 'fl32', 'bf16', 'int8', 'Float32',
            'torch.float32', 'auto']
NO_ID = ['2', '', 1.0, 1.5, True, {}, NAN, INF, 2**40, -2**63, 10**400]
NO_TEXT = [3, 4.3, True, [], ['x'], {}, NAN]
NO_FLAG = NO_BOOL[1:]  # null is read

WRONG = dict(
    hidden_size=[None, *NO_INTEGER], intermediate_size=[None, *NO_INTEGER],
    num_hidden_layers=[None, *NO_INTEGER, 5000], num_attention_heads=[None, *NO_INTEGER],
    vocab_size=[None, *NO_INTEGER], num_key_value_heads=[*NO_INTEGER, 3, 16],
    head_dim=[*NO_INTEGER, 7], max_position_embeddings=[None, *NO_INTEGER],
    rms_norm_eps=[None, *NO_POSITIVE, 2], rope_theta=NO_POSITIVE,
    tie_word_embeddings=NO_BOOL, attention_bias=NO_BOOL, mlp_bias=[*NO_BOOL, True],
    hidden_act=NO_NAME, model_type=NO_NAME,
    attention_dropout=[None, *NO_NUMBER, 0.1, 1, -1], dtype=NO_DTYPE, torch_dtype=NO_DTYPE,
    architectures=['LlamaForCausalLM', [3], ['a', None], 3, True, {}, NAN],
    bos_token_id=[*NO_ID, -1, [1]], unk_token_id=[*NO_ID, -1, [0]], pad_token_id=[*NO_ID, -2, [0]],
    eos_token_id=[*NO_ID, -1, [2, '3'], [True], [2, -1], [[2]], [None]],
    initializer_range=[*NO_NUMBER, -1, 1e300], pretraining_tp=NO_INTEGER,
    _name_or_path=NO_TEXT, name_or_path=NO_TEXT, transformers_version=NO_TEXT,
    use_cache=NO_FLAG, output_attentions=NO_FLAG, output_hidden_states=NO_FLAG, return_dict=NO_FLAG,
    rope_scaling=['llama3', '', 0, 3, True, False, [], [LLAMA3['rope_scaling']], NAN],
    rope_parameters=['llama3', '', 0, 3, True, False, [], [LLAMA3['rope_scaling']], NAN])
WRONG_SCALING = dict(
    rope_type=[None, '', 'yarn', 'linear', 3, [], ['llama3'], {}, NAN],
    factor=[None, *NO_POSITIVE, 0.5], low_freq_factor=[None, *NO_POSITIVE, 4.0, 5],
    high_freq_factor=[None, *NO_POSITIVE, 1.0, 0.5],
    original_max_position_embeddings=[None, *NO_INTEGER], rope_theta=[*NO_POSITIVE])


def cases(table):
  return [pytest.param(name, value, id=f'{name}-{i}-{str(value)[:12]}')
          for name, values in table.items() for i, value in enumerate(values)]


def refused(folder, fields, *names):
  """Reads a config.json with `fields`; -> the sentence that refuses it, with all the names."""
  (folder / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError) as error:
    model_config.load(folder)
  message = str(error.value)
  assert message.startswith(f'{folder}/config.json: ') and '\n' not in message
  assert len(message) < len(str(folder)) + 300
  for name in names:
    assert name in message
  return message


@pytest.mark.parametrize('name, value', cases(WRONG))
def test_a_wrong_value_is_refused_with_its_field(tmp_path, name, value):
  message = refused(tmp_path, LLAMA3 | {name: value}, name)
  assert repr(value)[:12] in message


@pytest.mark.parametrize('where', ['rope_scaling', 'rope_parameters'])
@pytest.mark.parametrize('name, value', cases(WRONG_SCALING))
def test_a_wrong_value_of_the_rotary_scaling_is_refused(tmp_path, where, name, value):
  fields = LLAMA3 | dict(rope_scaling=None) | {where: LLAMA3['rope_scaling'] | {name: value}}
  refused(tmp_path, fields, where, 'type' if name == 'rope_type' else name)


def test_a_width_that_heads_do_not_divide_needs_a_head_dim(tmp_path):
  message = refused(tmp_path, LLAMA3 | dict(hidden_size=68), 'hidden_size = 68', 'head_dim')
  assert 'num_attention_heads = 8' in message
  assert model_config.from_hf(LLAMA3 | dict(hidden_size=68, head_dim=8)).H == 8
  refused(tmp_path, LLAMA3 | dict(hidden_size=72, num_key_value_heads=8), 'head_dim = 9', 'even')


@pytest.mark.parametrize('name', ['hidden_size', 'vocab_size', 'num_attention_heads'])
def test_a_missing_field_is_named(tmp_path, name):
  refused(tmp_path, {k: v for k, v in LLAMA3.items() if k != name}, name)


def test_a_message_stays_on_one_line(tmp_path):
  refused(tmp_path, LLAMA3 | {'a\nb' * 500: 'c\nd' * 500}, r'a\nb')
  refused(tmp_path, LLAMA3 | dict(hidden_act='silu\n' * 500), 'hidden_act')


@pytest.mark.parametrize('text', [
    b'', b'{', b'[]', b'[{}]', b'3', b'null', b'"llama"', b'\xff\xfe', b'[' * 10**5,
    b'{"vocab_size": ' + b'9' * 5000 + b'}'],
    ids=['empty', 'half', 'list', 'of one', 'number', 'null', 'text', 'bytes', 'nested', 'digits'])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text)
  with pytest.raises(InputError, match='config.json: ') as error:
    model_config.load(tmp_path)
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(InputError, match='config.json: '):
    model_config.load(tmp_path)


def test_what_the_hub_s_models_have_is_read():
  """null stands for a default where transformers writes it."""
  nulls = dict(num_key_value_heads=None, head_dim=None, rope_scaling=None, rope_theta=None,
               torch_dtype=None, attention_dropout=0.0)
  for more in ({}, dict.fromkeys(IGNORED)):
    found = model_config.from_hf(LLAMA3 | nulls | more)
    assert (found.K, found.G, found.H, found.rope_theta) == (8, 1, 8, 10_000.0)
  assert type(model_config.from_hf(LLAMA3 | dict(rope_theta=10_000)).rope_theta) is float


IGNORED = dict(  # what files of the hub hold in fields that we do not use
    architectures=(['LlamaForCausalLM'], ['LLaMAForCausalLM']), dtype=('float16', 'float64'),
    torch_dtype=('float32', 'bfloat16', 'float16'), bos_token_id=(1, 128000), unk_token_id=(0,),
    eos_token_id=(2, 128009, [128001, 128008, 128009]), pad_token_id=(0, -1, 128004),
    initializer_range=(0.02, 0, 0.0417), pretraining_tp=(1, 2), use_cache=(True, False),
    output_attentions=(False,), output_hidden_states=(False,), return_dict=(True,),
    transformers_version=('4.31.0.dev0',), _name_or_path=('', 'meta-llama/Llama-2-7b-hf'),
    name_or_path=('',))
REAL = dict(  # config.json of the hub's models, whole
    llama2=dict(
        _name_or_path='meta-llama/Llama-2-7b-hf', architectures=['LlamaForCausalLM'],
        bos_token_id=1, eos_token_id=2, hidden_act='silu', hidden_size=4096, initializer_range=0.02,
        intermediate_size=11008, max_position_embeddings=4096, model_type='llama',
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, torch_dtype='float16',
        transformers_version='4.31.0.dev0', use_cache=True, vocab_size=32000),
    llama31=dict(
        architectures=['LlamaForCausalLM'], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_act='silu',
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=131072, mlp_bias=False, model_type='llama', num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_scaling=LLAMA3['rope_scaling'], rope_theta=500000.0, tie_word_embeddings=False,
        torch_dtype='bfloat16', transformers_version='4.43.0.dev0', use_cache=True,
        vocab_size=128256),
    tinyllama=dict(
        architectures=['LlamaForCausalLM'], attention_bias=False, bos_token_id=1, eos_token_id=2,
        hidden_act='silu', hidden_size=2048, initializer_range=0.02, intermediate_size=5632,
        max_position_embeddings=2048, model_type='llama', num_attention_heads=32,
        num_hidden_layers=22, num_key_value_heads=4, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype='bfloat16',
        transformers_version='4.35.0', use_cache=True, vocab_size=32000),
    tiny_random=dict(
        _name_or_path='HuggingFaceM4/tiny-random-LlamaForCausalLM',
        architectures=['LlamaForCausalLM'], bos_token_id=0, eos_token_id=1, hidden_act='silu',
        hidden_size=16, initializer_range=0.02,
        intermediate_size=64, model_type='llama', num_attention_heads=4, num_hidden_layers=2,
        pad_token_id=-1, rms_norm_eps=1e-6, tie_word_embeddings=False, torch_dtype='float32',
        transformers_version='4.28.0.dev0', use_cache=True, vocab_size=32000))


@pytest.mark.parametrize('name', REAL)
def test_whole_files_of_the_hub_are_read(name):
  found = model_config.from_hf(REAL[name])
  assert (found.D, found.V) == (REAL[name]['hidden_size'], REAL[name]['vocab_size'])


def test_what_transformers_writes_is_read(stories, tmp_path):
  for made in (transformers.LlamaConfig.from_pretrained(str(stories)),
               transformers.LlamaConfig(dtype='bfloat16')):
    made.save_pretrained(str(tmp_path))
    assert model_config.load(tmp_path).D == made.hidden_size
  assert model_config.load(stories).D == 64


@pytest.mark.parametrize('name, value', cases(IGNORED))
def test_a_field_without_effect_is_read_where_it_has_its_type(name, value):
  assert model_config.from_hf(LLAMA3 | {name: value}) == model_config.from_hf(LLAMA3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) |
    st.integers(1, 4096) | st.sampled_from(['llama', 'silu', 'llama3', 'default', 10**400]),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(
        st.sampled_from([*WRONG_SCALING, 'type', 'other']), x, max_size=3), max_leaves=5)


@given(fields=st.dictionaries(st.sampled_from(list(WRONG)), JSON, min_size=1, max_size=3))
@example(fields=dict(rope_scaling=dict(type='default'), rope_theta=1))
def test_whatever_is_read_is_a_model_with_numbers_in_range(fields):
  try:
    found = model_config.from_hf(LLAMA3 | fields)
  except InputError as error:
    assert len(str(error)) < 300
    return
  for name in ('D', 'F', 'K', 'G', 'H', 'V', 'layers', 'context'):
    value = getattr(found, name)
    assert type(value) is int and 0 < value < 2**25
  assert found.H % 2 == 0 and type(found.tied) is type(found.attention_bias) is bool
  numbers = [found.rope_theta, found.norm_eps]
  if found.rope_scaling:
    s = found.rope_scaling
    assert s.factor >= 1 and s.low_freq_factor < s.high_freq_factor
    assert type(s.original_context) is int
    numbers += [s.factor, s.low_freq_factor, s.high_freq_factor]
  assert all(type(x) is float and 1e-30 <= x <= 1e30 for x in numbers)
  assert model_config.from_hf(json.loads(json.dumps(model_config.to_hf(found)))) == found


def test_a_refused_config_leaves_no_folder(tmp_path):
  make(tmp_path / 'hf', TIED)
  fields = model_config.to_hf(TIED) | dict(rms_norm_eps=NAN)
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError, match='rms_norm_eps = nan must be a number'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert [p.name for p in tmp_path.iterdir()] == ['hf']
