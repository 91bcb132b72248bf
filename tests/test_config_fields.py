"""Fields of config.json: a wrong value is refused with the name of its field."""
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
BAD_NUMBER = ['64', '', True, False, [64], [], {}, dict(a=1), NAN, INF, -INF, 10**400, -10**400]
BAD_INTEGER = [*BAD_NUMBER, 0, -1, 1.5, 64.0, 2**63, 2**40, -2**63]
BAD_POSITIVE = [*BAD_NUMBER, 0, 0.0, -0.0, -1, -1e-5, 1e300, 5e-324]
BAD_BOOL = [None, 'true', '', 0, 1, 1.0, [], [True], {}, NAN]
BAD_NAME = ['', 'SILU', 'gelu', None, 3, True, [], ['silu'], {}, NAN]
# transformers reads and writes dtypes without the prefix 'torch.': float32, bfloat16
BAD_DTYPE = [3, True, [], ['float32'], {}, NAN, '', 'fl32', 'bf16', 'int8', 'Float32',
             'torch.float32', 'auto']
BAD_ID = ['2', '', 1.0, 1.5, True, {}, NAN, INF, 2**40, -2**63, 10**400]
BAD_TEXT = [3, 4.3, True, [], ['x'], {}, NAN]
BAD_FLAG = BAD_BOOL[1:]  # null is allowed

WRONG = dict(
    hidden_size=[None, *BAD_INTEGER], intermediate_size=[None, *BAD_INTEGER],
    num_hidden_layers=[None, *BAD_INTEGER, 5000], num_attention_heads=[None, *BAD_INTEGER],
    vocab_size=[None, *BAD_INTEGER], num_key_value_heads=[*BAD_INTEGER, 3, 16],
    head_dim=[*BAD_INTEGER, 7], max_position_embeddings=[None, *BAD_INTEGER],
    rms_norm_eps=[None, *BAD_POSITIVE, 2], rope_theta=BAD_POSITIVE,
    tie_word_embeddings=BAD_BOOL, attention_bias=BAD_BOOL, mlp_bias=[*BAD_BOOL, True],
    hidden_act=BAD_NAME, model_type=BAD_NAME,
    attention_dropout=[None, *BAD_NUMBER, 0.1, 1, -1], dtype=BAD_DTYPE, torch_dtype=BAD_DTYPE,
    architectures=['LlamaForCausalLM', [3], ['a', None], 3, True, {}, NAN],
    bos_token_id=[*BAD_ID, -1, [1]], unk_token_id=[*BAD_ID, -1, [0]],
    pad_token_id=[*BAD_ID, -2, [0]],
    eos_token_id=[*BAD_ID, -1, [2, '3'], [True], [2, -1], [[2]], [None]],
    initializer_range=[*BAD_NUMBER, -1, 1e300], pretraining_tp=BAD_INTEGER,
    _name_or_path=BAD_TEXT, name_or_path=BAD_TEXT, transformers_version=BAD_TEXT,
    use_cache=BAD_FLAG, output_attentions=BAD_FLAG, output_hidden_states=BAD_FLAG,
    return_dict=BAD_FLAG, _attn_implementation_autoset=BAD_FLAG,
    rope_scaling=['llama3', '', 0, 3, True, False, [], [LLAMA3['rope_scaling']], NAN],
    rope_parameters=['llama3', '', 0, 3, True, False, [], [LLAMA3['rope_scaling']], NAN])
WRONG_SCALING = dict(
    rope_type=[None, '', 'yarn', 'linear', 3, [], ['llama3'], {}, NAN],
    factor=[None, *BAD_POSITIVE, 0.5], low_freq_factor=[None, *BAD_POSITIVE, 4.0, 5],
    high_freq_factor=[None, *BAD_POSITIVE, 1.0, 0.5],
    original_max_position_embeddings=[None, *BAD_INTEGER], rope_theta=[*BAD_POSITIVE])


def cases(table):
  return [pytest.param(name, value, id=f'{name}-{i}-{str(value)[:12]}')
          for name, values in table.items() for i, value in enumerate(values)]


def refused(folder, fields, *names):
  """Loads a config.json with `fields`, which must raise -> the message, which has all `names`."""
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
def test_a_wrong_value_is_refused_by_field_name(tmp_path, name, value):
  message = refused(tmp_path, LLAMA3 | {name: value}, name)
  assert repr(value)[:12] in message


@pytest.mark.parametrize('where', ['rope_scaling', 'rope_parameters'])
@pytest.mark.parametrize('name, value', cases(WRONG_SCALING))
def test_a_wrong_value_in_the_rope_scaling_is_refused(tmp_path, where, name, value):
  fields = LLAMA3 | dict(rope_scaling=None) | {where: LLAMA3['rope_scaling'] | {name: value}}
  refused(tmp_path, fields, where, 'type' if name == 'rope_type' else name)


def test_a_hidden_size_that_heads_do_not_divide_needs_a_head_dim(tmp_path):
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


@pytest.mark.parametrize('text, message', [
    pytest.param(b'', 'is not valid JSON', id='empty'),
    pytest.param(b'{', 'is not valid JSON', id='truncated'),
    pytest.param(b'\xff\xfe', 'is not valid JSON', id='not utf-8'),
    pytest.param(b'[' * 10**5, 'is not valid JSON', id='nested'),
    pytest.param(b'{"vocab_size": ' + b'9' * 5000 + b'}', 'is not valid JSON', id='digits'),
    pytest.param(b'[]', ': ', id='empty list'), pytest.param(b'[{}]', ': ', id='list'),
    pytest.param(b'3', ': ', id='number'), pytest.param(b'null', ': ', id='null'),
    pytest.param(b'"llama"', ': ', id='string')])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, text, message):
  (tmp_path / 'config.json').write_bytes(text)
  with pytest.raises(InputError, match=f'config.json ?{message}') as error:
    model_config.load(tmp_path)
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_instead_of_the_file_is_refused(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(InputError, match='config.json .*Is a directory'):
    model_config.load(tmp_path)


def test_null_means_the_default():
  """For the fields in which transformers writes null."""
  nulls = dict(num_key_value_heads=None, head_dim=None, rope_scaling=None, rope_theta=None,
               torch_dtype=None, attention_dropout=0.0)
  for more in ({}, dict.fromkeys(IGNORED)):
    found = model_config.from_hf(LLAMA3 | nulls | more)
    assert (found.K, found.G, found.H, found.rope_theta) == (8, 1, 8, 10_000.0)
  assert type(model_config.from_hf(LLAMA3 | dict(rope_theta=10_000)).rope_theta) is float


IGNORED = dict(  # values on the Hub of fields that we do not use
    architectures=(['LlamaForCausalLM'], ['LLaMAForCausalLM']), dtype=('float16', 'float64'),
    torch_dtype=('float32', 'bfloat16', 'float16'), bos_token_id=(1, 128000), unk_token_id=(0,),
    eos_token_id=(2, 128009, [128001, 128008, 128009]), pad_token_id=(0, -1, 128004),
    initializer_range=(0.02, 0, 0.0417), pretraining_tp=(1, 2), use_cache=(True, False),
    output_attentions=(False,), output_hidden_states=(False,), return_dict=(True,),
    transformers_version=('4.31.0.dev0',), _name_or_path=('', 'meta-llama/Llama-2-7b-hf'),
    name_or_path=('',), _attn_implementation_autoset=(True, False))
REAL = dict(  # complete config.json files from the Hub
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
def test_real_files_from_the_hub_are_read(name):
  found = model_config.from_hf(REAL[name])
  assert (found.D, found.V) == (REAL[name]['hidden_size'], REAL[name]['vocab_size'])


def test_files_written_by_transformers_are_read(stories, tmp_path):
  for made in (transformers.LlamaConfig.from_pretrained(str(stories)),
               transformers.LlamaConfig(dtype='bfloat16')):
    made.save_pretrained(str(tmp_path))
    assert model_config.load(tmp_path).D == made.hidden_size
  assert model_config.load(stories).D == 64


@pytest.mark.parametrize('name, value', cases(IGNORED))
def test_an_unused_field_of_the_right_type_is_ignored(name, value):
  assert model_config.from_hf(LLAMA3 | {name: value}) == model_config.from_hf(LLAMA3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) |
    st.integers(1, 4096) | st.sampled_from(['llama', 'silu', 'llama3', 'default', 10**400]),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(
        st.sampled_from([*WRONG_SCALING, 'type', 'other']), x, max_size=3), max_leaves=5)


@given(fields=st.dictionaries(st.sampled_from(list(WRONG)), JSON, min_size=1, max_size=3))
@example(fields=dict(rope_scaling=dict(type='default'), rope_theta=1))
def test_random_fields_are_refused_or_give_values_in_range(fields):
  try:
    found = model_config.from_hf(LLAMA3 | fields)
  except InputError as error:
    assert len(str(error)) < 300
    return
  for name in ('D', 'F', 'K', 'G', 'H', 'V', 'layers', 'context'):
    value = getattr(found, name)
    assert type(value) is int and 0 < value < 2**25
  assert found.H % 2 == 0 and type(found.tied) is bool and found.biases in ('', 'qkvo')
  numbers = [found.rope_theta, found.norm_eps]
  if found.rope_scaling:
    s = found.rope_scaling
    assert s.factor >= 1 and s.low_freq_factor < s.high_freq_factor
    assert type(s.original_context) is int
    numbers += [s.factor, s.low_freq_factor, s.high_freq_factor]
  assert all(type(x) is float and 1e-30 <= x <= 1e30 for x in numbers)
  assert model_config.from_hf(json.loads(json.dumps(model_config.to_hf(found)))) == found


def test_a_refused_config_leaves_no_output_folder(tmp_path):
  make(tmp_path / 'hf', TIED)
  fields = model_config.to_hf(TIED) | dict(rms_norm_eps=NAN)
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError, match='rms_norm_eps = nan must be a number'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert [p.name for p in tmp_path.iterdir()] == ['hf']
