import json

import pytest

from srlm_jax import InputError
from srlm_jax.models import config as model_config
from srlm_jax.models.config import Config, PRESETS, RopeScaling

LLAMA3 = dict(
    architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, vocab_size=96, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_theta=500000.0, hidden_act='silu', tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    bos_token_id=1, eos_token_id=[2, 3], torch_dtype='bfloat16', use_cache=True, pretraining_tp=1,
    rope_scaling=dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192))


def test_a_llama_3_config_is_read():
  assert model_config.from_hf(LLAMA3) == Config(
      D=64, F=128, K=2, G=4, H=8, V=96, layers=2, context=131072, rope_theta=500000.0,
      rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5, tied=True)


def test_the_rotary_fields_of_new_transformers_are_read():
  new = dict(LLAMA3, rope_parameters=dict(LLAMA3['rope_scaling'], rope_theta=500000.0))
  del new['rope_scaling'], new['rope_theta']
  assert model_config.from_hf(new) == model_config.from_hf(LLAMA3)
  plain = dict(new, rope_parameters=dict(rope_type='default', rope_theta=1234.0))
  assert model_config.from_hf(plain).rope_theta == 1234.0 and model_config.from_hf(plain).rope_scaling is None


@pytest.mark.parametrize('name', PRESETS)
def test_configs_survive_the_way_to_hugging_face_and_back(name):
  assert model_config.from_hf(json.loads(json.dumps(model_config.to_hf(PRESETS[name])))) == PRESETS[name]
  llama3 = model_config.from_hf(LLAMA3)
  assert model_config.from_hf(model_config.to_hf(llama3)) == llama3


@pytest.mark.parametrize('change, message', [
    (dict(model_type='mistral'), 'model_type'), (dict(hidden_act='gelu'), 'hidden_act'),
    (dict(mlp_bias=True), 'mlp_bias'),
    (dict(sliding_window=4096), 'sliding_window'), (dict(quantization_config=dict(bits=4)), 'quantization_config'),
    (dict(attention_dropout=0.1), 'attention_dropout'), (dict(vocab_size=None), 'vocab_size'),
    (dict(rope_scaling=dict(type='yarn', factor=4.0)), 'yarn'),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.0)), 'low_freq_factor'),
    (dict(num_key_value_heads=3), 'num_key_value_heads')])
def test_a_field_that_is_not_supported_is_refused_by_name(change, message):
  with pytest.raises(InputError, match=message):
    model_config.from_hf(LLAMA3 | change)


def test_the_file_is_named(tmp_path):
  with pytest.raises(InputError, match='holds no config.json'):
    model_config.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(LLAMA3 | dict(sliding_window=1)))
  with pytest.raises(InputError, match='config.json: sliding_window'):
    model_config.load(tmp_path)
