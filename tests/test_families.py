"""Families of models: config.json files from the Hub, and what they say."""
import json

import pytest

from srlm_jax import InputError
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.models.families import FAMILIES

COUNTS = {  # of models of transformers 5.24 with the published shapes, made without memory
    'llama3.1-8b': 8_030_261_248,
    'llama3.1-70b': 70_553_706_496,
    'llama3.2-1b': 1_235_814_400,
    'llama3.2-3b': 3_212_749_824,
    'llama3.3-70b': 70_553_706_496,
    'mistral-7b-v0.1': 7_241_732_096,
    'mistral-7b-v0.3': 7_248_023_552,
    'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-1.5b': 1_543_714_304,
    'qwen2.5-3b': 3_085_938_688,
    'qwen2.5-7b': 7_615_616_512,
    'qwen2.5-14b': 14_770_033_664,
    'qwen2.5-32b': 32_763_876_352,
    'qwen2.5-72b': 72_706_203_648,
    'qwen3-0.6b': 596_049_920,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-4b': 4_022_468_096,
    'qwen3-8b': 8_190_735_360,
    'qwen3-14b': 14_768_307_200,
    'qwen3-32b': 32_762_123_264,
    'olmo2-1b': 1_484_916_736,
    'olmo2-7b': 7_298_617_344,
    'olmo2-13b': 13_716_198_400,
    'olmo2-32b': 32_234_279_936,
}
QWEN = dict(
    model_type='qwen2', hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=80)

# Complete config.json files from the Hub.
REAL = {
    'llama3.2-3b': """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 24, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling":
        {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version":
        "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
    'mistral-7b-v0.1': """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    'mistral-7b-v0.3': """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window":
        null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.42.0.dev0", "use_cache": true, "vocab_size": 32768}""",
    'qwen2.5-0.5b': """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta":
        1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936}""",
    'qwen2.5-14b': """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 13824, "max_position_embeddings": 131072,
        "max_window_layers": 48, "model_type": "qwen2", "num_attention_heads": 40,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta":
        1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype":
        "bfloat16", "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window":
        false, "vocab_size": 152064}""",
    'qwen3-4b': """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size":
        9728, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 0.000001, "rope_scaling": null, "rope_theta": 1000000, "sliding_window":
        null, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version":
        "4.51.2", "use_cache": false, "use_sliding_window": false, "vocab_size": 151936}""",
    'qwen3-8b': """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size":
        12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    'olmo2-1b': """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "model_type": "olmo2", "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling":
        null, "rope_theta": 500000, "tie_word_embeddings": false, "torch_dtype": "float32",
        "transformers_version": "4.47.0", "use_cache": true, "vocab_size": 100352}"""}


@pytest.mark.parametrize('name', COUNTS)
def test_presets_have_exactly_the_number_of_parameters_that_transformers_makes(name):
  assert llama.param_count(PRESETS[name]) == COUNTS[name]


@pytest.mark.parametrize('name', REAL)
def test_a_published_config_is_the_preset(name):
  fields = json.loads(REAL[name])
  assert model_config.from_hf(fields) == PRESETS[name]
  assert model_config.from_hf(json.loads(json.dumps(model_config.to_hf(PRESETS[name])))) == (
      PRESETS[name])


@pytest.mark.parametrize('changes, window', [
    ({}, None), (dict(sliding_window=7), None),
    (dict(use_sliding_window=True, sliding_window=7, max_window_layers=0), 7),
    (dict(use_sliding_window=True, sliding_window=7, max_window_layers=3), None),
    (dict(use_sliding_window=True, max_window_layers=0), 4096),
    (dict(use_sliding_window=True, sliding_window=7, layer_types=['sliding_attention'] * 3), 7),
    (dict(layer_types=['full_attention'] * 3, max_window_layers=0), None)])
def test_all_layers_of_a_qwen_have_the_window_or_none(changes, window):
  assert model_config.from_hf(QWEN | changes).window == window


@pytest.mark.parametrize('changes, message', [
    (dict(use_sliding_window=True, max_window_layers=1), 'to some layers only'),
    (dict(layer_types=['full_attention', 'sliding_attention', 'full_attention']), 'some layers'),
    (dict(layer_types=['sliding_attention'] * 3), 'needs use_sliding_window = true'),
    (dict(layer_types=['full_attention'] * 2), 'a list of 3 of'),
    (dict(use_sliding_window=True, max_window_layers=0, sliding_window=0), 'sliding_window = 0')])
def test_a_window_that_is_not_supported_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    model_config.from_hf(QWEN | changes)


def test_the_error_names_the_supported_families():
  with pytest.raises(InputError, match="model_type = 'gpt2' is .* llama, mistral, olmo2, qwen2, q"):
    model_config.from_hf(dict(model_type='gpt2'))
  assert set(FAMILIES) == {'llama', 'mistral', 'olmo2', 'qwen2', 'qwen3'}
