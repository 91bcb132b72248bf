"""Families of models: config.json files from the Hub, and what they say."""
import pytest

from srlm_jax import InputError
from srlm_jax.models import config as model_config
from srlm_jax.models.families import FAMILIES

QWEN = dict(
    model_type='qwen2', hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=80)


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
