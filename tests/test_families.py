"""Families of models: config.json files as on the Hub, golden values, and adding a family.

test_family_parity.py compares with transformers itself, and recomputes the golden values.
"""
import json
import re

from conftest import full_logits, ROOT
import jax
import make_family_golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from srlm_jax import InputError
from srlm_jax.checkpoint import convert, hf
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.models.families import FAMILIES, Family, SLIDING_WINDOW

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

# config.json files with the fields of those on the Hub. Llama and Qwen are copied from public
# repositories; Mistral and OLMo 2 are written after them.
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


def test_the_table_of_presets_in_the_docs():
  text = (ROOT / 'docs' / 'models.md').read_text()
  rows = [line for line in text.splitlines() if re.match(r'\| `[a-z0-9.-]+` \| [\d,]+ \|', line)]
  assert rows == [f'| `{name}` | {llama.param_count(c):,} | {c.context:,} |'
                  for name, c in PRESETS.items() if name.startswith('llama2') or name in COUNTS]


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


GOLDEN = {path.stem: json.loads(path.read_text())
          for path in sorted((ROOT / 'tests' / 'golden').glob('*.json'))}
ATOL = 1e-4  # nats; the largest difference measured is 1.1e-5


def write(folder, fields: dict, shapes: dict) -> dict:
  """Writes a Hugging Face folder with the values of the golden files -> its tensors."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(fields))
  tensors = {name: make_family_golden.values(name, tuple(shape)) for name, shape in shapes.items()}
  save_file(tensors, folder / 'model.safetensors')
  return tensors


def check_round_trip(folder, tensors: dict, tmp_path):
  """Converts a folder to a checkpoint and back: the same tensors, bit for bit."""
  convert.from_hf(folder, tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  found = load_file(tmp_path / 'back' / 'model.safetensors')
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes(), name
  assert model_config.load(tmp_path / 'back') == model_config.load(folder)


def test_there_are_golden_values_of_every_family():
  assert GOLDEN.keys() == FAMILIES.keys() == make_family_golden.MODELS.keys()
  for name, golden in GOLDEN.items():
    assert golden['fields'] == make_family_golden.MODELS[name]
    window = model_config.from_hf(golden['config']).window
    assert (window is not None) == (name in ('mistral', 'qwen2'))
    assert window is None or window < min(len(c['prompt_ids']) for c in golden['cases'][1:])


@pytest.mark.parametrize('name', GOLDEN)
def test_a_family_has_the_log_probs_of_transformers(mesh, tmp_path, name):
  golden = GOLDEN[name]
  tensors = write(tmp_path / 'hf', golden['config'], golden['tensors'])
  config = model_config.load(tmp_path / 'hf')
  assert config.family == name and sum(x.size for x in tensors.values()) == (
      llama.param_count(config))
  rows = [case['prompt_ids'] + case['ids'] for case in golden['cases']]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # causal: padding changes nothing
  for padded, row in zip(tokens, rows, strict=True):
    padded[:len(row)] = row
  params = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  table = np.asarray(jax.nn.log_softmax(full_logits(llama.Llama(config), params, tokens)))
  for logps, row, case in zip(table, rows, golden['cases'], strict=True):
    found = logps[np.arange(len(row) - 1), row[1:]]
    np.testing.assert_allclose(found, case['logps'], rtol=0, atol=ATOL)
    first = len(case['prompt_ids']) - 1
    assert logps[first:len(row) - 1].argmax(-1).tolist() == case['ids']


def invented_logits(fields: dict, w: dict, tokens) -> np.ndarray:
  """tokens [T] -> logits [T, V] of the family below, in numpy."""
  K, H, T = fields['num_key_value_heads'], fields['head_dim'], len(tokens)
  G, window = fields['num_attention_heads'] // K, fields['sliding_window']

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + fields['rms_norm_eps']) * scale

  def rope(x):  # [T, heads, H]
    angle = np.arange(T)[:, None, None] * 10_000.0 ** (-np.arange(H // 2) / (H // 2))
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)], -1)

  age = np.arange(T)[:, None] - np.arange(T)
  visible = (age >= 0) & (age < window)
  x = w['wte.weight'][tokens]
  for layer in range(fields['num_hidden_layers']):
    def own(name, layer=layer):
      return w[f'h.{layer}.{name}.weight']
    q = rope(norm((x @ own('attn.query').T).reshape(T, K * G, H), own('attn.norm_query')))
    k = x @ own('attn.key').T + w[f'h.{layer}.attn.key.bias']
    k = rope(norm(k.reshape(T, K, H), own('attn.norm_key')))
    v = (x @ own('attn.value').T).reshape(T, K, H)
    out = []
    for head in range(K * G):
      scores = np.where(visible, q[:, head] @ k[:, head // G].T / np.sqrt(H), -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // G])
    y = np.concatenate(out, -1) @ own('attn.out').T + w[f'h.{layer}.attn.out.bias']
    x = x + norm(y, own('norm_1'))
    gate = x @ own('mlp.w1').T
    y = (gate / (1 + np.exp(-gate)) * (x @ own('mlp.w3').T)) @ own('mlp.w2').T
    x = x + norm(y, own('norm_2'))
  return norm(x, w['norm.weight']) @ w['wte.weight'].T


def test_a_new_family_is_a_declaration(mesh, tmp_path, monkeypatch):
  """The steps of docs/models.md, for a family that differs from every other one."""
  # 1. What differs: biases on k and o only, norms of outputs, q and k norms per head, a window.
  # 2. The names of its tensors.
  block, attention = 'h.{}.', 'h.{}.attn.'
  renamed = {
      'embed_VD': ('wte.weight', 'V D'),
      'layers.attention_norm.scale_D': (block + 'norm_1.weight', 'D'),
      'layers.attention.wq_DKGH': (attention + 'query.weight', 'KGH D'),
      'layers.attention.wk_DKH': (attention + 'key.weight', 'KH D'),
      'layers.attention.wv_DKH': (attention + 'value.weight', 'KH D'),
      'layers.attention.wo_KGHD': (attention + 'out.weight', 'D KGH'),
      'layers.attention.bk_KH': (attention + 'key.bias', 'KH'),
      'layers.attention.bo_D': (attention + 'out.bias', 'D'),
      'layers.attention.q_norm.scale_H': (attention + 'norm_query.weight', 'H'),
      'layers.attention.k_norm.scale_H': (attention + 'norm_key.weight', 'H'),
      'layers.mlp_norm.scale_D': (block + 'norm_2.weight', 'D'),
      'layers.mlp.gate_DF': (block + 'mlp.w1.weight', 'F D'),
      'layers.mlp.up_DF': (block + 'mlp.w3.weight', 'F D'),
      'layers.mlp.down_FD': (block + 'mlp.w2.weight', 'D F'),
      'final_norm.scale_D': ('norm.weight', 'D')}
  # 3. The declaration.
  monkeypatch.setitem(FAMILIES, 'invented', Family(
      'InventedForCausalLM', fields=(SLIDING_WINDOW,),
      constants=dict(biases='ko', qk_norm='head', norms='post'), absent=dict(rms_norm_eps=1e-3),
      renamed=renamed))
  # 4. A preset, with the number of parameters that the published model has.
  fields = dict(
      model_type='invented', hidden_size=18, intermediate_size=22, num_hidden_layers=2,
      num_attention_heads=6, num_key_value_heads=3, head_dim=10, vocab_size=31,
      max_position_embeddings=64, sliding_window=5, tie_word_embeddings=True)
  config = model_config.from_hf(fields)
  monkeypatch.setitem(PRESETS, 'invented-10k', config)
  assert model_config.from_hf(model_config.to_hf(config)) == config
  assert (config.norm_eps, config.window, config.biases) == (1e-3, 5, 'ko')
  # 5. The same numbers as another implementation, and conversion in both directions.
  shapes = {name: leaf.hf_shape for leaf in hf.leaves(config) for name in leaf.tensors}
  tensors = write(tmp_path / 'hf', fields, shapes)
  assert len(tensors) == 2 + 2 * 13
  assert sum(x.size for x in tensors.values()) == llama.param_count(config) == 9640
  tokens = np.random.RandomState(0).randint(0, 31, (2, 24))
  params = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  found = np.asarray(full_logits(llama.Llama(config), params, tokens))
  exact = {name: x.astype(np.float64) for name, x in tensors.items()}
  for row, logits in zip(tokens, found, strict=True):
    wanted = invented_logits(fields | dict(rms_norm_eps=1e-3), exact, row)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=ATOL)
  check_round_trip(tmp_path / 'hf', tensors, tmp_path)
