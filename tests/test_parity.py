"""Random Llamas in float32 against transformers on torch: `make test-parity`.

The weights, biases and norms of every model are random, so an omitted, swapped or transposed tensor
changes the logits. test_golden.py compares the packaged M0 without torch; here its values are
recomputed.
"""
import dataclasses
import json
import shutil

from conftest import full_logits, init, ROOT
import jax
import make_golden
import numpy as np
import pytest

from srlm_jax.checkpoint import convert, store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.eval import distributions
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import Config, RopeScaling

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# The wavelengths of a head of 16 are 6, 20, 63, 199, 628, .. tokens. Llama 3's scaling keeps those
# below 64 / 4, divides the frequency of those above 64 / 1, and interpolates between.
STRETCH = RopeScaling(8.0, 1.0, 4.0, 64)
PLAIN = Config(D=48, F=80, K=4, G=1, H=12, V=96, layers=3, context=256)
GROUPED = dict(K=2, G=3, H=8)
CONFIGS = dict(
    plain=PLAIN,
    tied=dataclasses.replace(PLAIN, tied=True),
    bias=dataclasses.replace(PLAIN, biases='qkvo'),
    grouped=dataclasses.replace(PLAIN, **GROUPED),
    one_key_head=dataclasses.replace(PLAIN, K=1, G=4),
    head_dim=dataclasses.replace(PLAIN, H=20),  # 4 heads of 20 and a width of 48
    theta=dataclasses.replace(PLAIN, rope_theta=500.0, norm_eps=1e-2),
    stretch=dataclasses.replace(PLAIN, H=16, rope_scaling=STRETCH),
    all=dataclasses.replace(PLAIN, K=2, G=3, H=16, tied=True, biases='qkvo', rope_theta=5e5,
                            rope_scaling=STRETCH))
ROWS, LENGTH = 2, 192
# Logits are up to 7, and both sides sum float32 products in another order. The largest difference
# measured is 8e-5, from one unit in the last place of a rotary frequency at position 191 or so. The
# wrong models of test_the_tolerance_would_show_an_error are 5 or more away.
ATOL = 3e-4


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL)


def tokens(config) -> np.ndarray:
  return np.random.default_rng(1).integers(0, config.V, (ROWS, LENGTH), np.int32)


def fields(config: Config) -> dict:
  """The arguments of transformers.LlamaConfig, written without srlm_jax.models.config."""
  rope = dict(rope_type='default', rope_theta=config.rope_theta)
  if s := config.rope_scaling:
    rope = dict(rope_type='llama3', rope_theta=config.rope_theta, factor=s.factor,
                low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor,
                original_max_position_embeddings=s.original_context)
  return dict(
      hidden_size=config.D, intermediate_size=config.F, num_hidden_layers=config.layers,
      num_attention_heads=config.K * config.G, num_key_value_heads=config.K, head_dim=config.H,
      vocab_size=config.V, max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
      tie_word_embeddings=config.tied, attention_bias=config.biases == 'qkvo', rope_parameters=rope)


def theirs(config: Config):
  """A random transformers.LlamaForCausalLM; its biases and norms, which it sets to 0 and 1, too."""
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      **fields(config), attn_implementation='eager')).float().eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      scale, mean = (0.3, 1.0) if 'norm' in name else (0.2, 0.0)
      x.normal_(mean, scale, generator=generator)
  return model


def load(folder):
  return transformers.LlamaForCausalLM.from_pretrained(
      str(folder), local_files_only=True, dtype=torch.float32, attn_implementation='eager').eval()


def logits_of(model, rows) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(rows).long()).logits.numpy()


@pytest.mark.parametrize('name', CONFIGS)
def test_a_model_of_transformers_has_the_same_logits_here_and_back(mesh, tmp_path, name):
  """transformers writes, we read both ways; what we write back is bit for bit the same to it."""
  config = CONFIGS[name]
  model, rows = theirs(config), tokens(config)
  shard = '40KB' if name == 'all' else '5GB'  # one of them in several files, by transformers' index
  model.save_pretrained(str(tmp_path / 'hf'), max_shard_size=shard)
  assert (len(list((tmp_path / 'hf').glob('*.safetensors'))) > 1) == (name == 'all')
  assert model_config.load(tmp_path / 'hf') == config
  wanted = logits_of(model, rows)

  loaded = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  close(full_logits(llama.Llama(config), loaded, rows), wanted)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  restored, _ = store.restore_params(tmp_path / 'ours', mesh, 'float32')
  jax.tree.map(np.testing.assert_array_equal, restored, loaded)

  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  np.testing.assert_array_equal(logits_of(load(tmp_path / 'back'), rows), wanted)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_model_made_here_has_the_same_logits_in_transformers(mesh, tmp_path, name):
  """Parameters and config.json of our own, as training writes them, converted and read there."""
  config = CONFIGS[name]
  rng, rows = np.random.default_rng(2), tokens(config)
  params = jax.tree.map(
      lambda x: x + rng.normal(scale=0.2, size=x.shape).astype(x.dtype), init(config))
  (tmp_path / 'ours').mkdir()
  (tmp_path / 'ours' / 'config.json').write_text(json.dumps(model_config.to_hf(config)))
  saver = store.manager(tmp_path / 'ours', keep=1)
  store.save(saver, 0, params)
  saver.close()
  convert.to_hf(tmp_path / 'ours', tmp_path / 'hf')
  close(logits_of(load(tmp_path / 'hf'), rows), full_logits(llama.Llama(config), params, rows))


@pytest.mark.parametrize('name', ['stories', 'all'])
def test_mean_hidden_states_are_those_of_transformers(tmp_path, name, request):
  """Through the program that compares prompts, from a Hugging Face folder."""
  folder = request.getfixturevalue('stories')
  texts = [distributions.Text(str(i), ' '.join(['Why is the sky blue, and who is she?'] * i))
           for i in (1, 2, 9, 1)]
  tokenizer = tokenizers.load(folder)
  rows = [[*tokenizer.start, *tokenizer.encode(t.text)] for t in texts]
  if name == 'all':  # random weights, biases and norms, with the tokenizer of stories
    config = dataclasses.replace(CONFIGS['all'], V=512)
    theirs(config).save_pretrained(str(tmp_path))
    shutil.copy(folder / 'tokenizer.model', tmp_path)
    folder = tmp_path
  found, cut = distributions.hidden_states(folder, 'float32', {'a': texts[:3], 'b': texts[3:]})
  assert cut == dict(a=0, b=0) and found['b'].shape[0] == 1
  model = load(folder)
  for ids, mean in zip(rows, np.concatenate([found['a'], found['b']]), strict=True):
    with torch.no_grad():
      hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    close(mean, hidden[len(tokenizer.start):].mean(0).numpy())


def without(name: str):
  """The model `all` of transformers with one property changed, its weights otherwise the same."""
  config = CONFIGS['all']
  model = theirs(config)
  changes = dict(stretch=dict(rope_scaling=None), theta=dict(rope_theta=1e4),
                 norm_eps=dict(norm_eps=1e-2))
  if name in changes:
    other = theirs(dataclasses.replace(config, **changes[name]))
    other.load_state_dict(model.state_dict())
    return other
  with torch.no_grad():
    for layer in model.model.layers:
      a = layer.self_attn
      if name == 'bias':
        a.v_proj.bias.zero_()
      if name == 'heads':  # query heads numbered g * K + k instead of k * G + g
        w = a.q_proj.weight.view(config.K, config.G, config.H, config.D).transpose(0, 1)
        a.q_proj.weight.copy_(w.reshape(-1, config.D))
      if name == 'halves':  # the rotary pairs (2i, 2i + 1) instead of (i, i + H / 2)
        for proj in (a.q_proj, a.k_proj):
          w = proj.weight.view(-1, config.H // 2, 2, config.D).transpose(1, 2)
          proj.weight.copy_(w.reshape(-1, config.D))
  return model


@pytest.mark.parametrize('name', ['stretch', 'theta', 'norm_eps', 'bias', 'heads', 'halves'])
def test_the_tolerance_would_show_an_error(name):
  rows = tokens(CONFIGS['all'])
  difference = np.abs(logits_of(without(name), rows) - logits_of(theirs(CONFIGS['all']), rows))
  assert difference.max() > 1000 * ATOL


def test_the_golden_values_are_those_of_transformers():
  """The file that test_golden.py reads, recomputed with the torch and transformers of this run."""
  golden = json.loads((ROOT / 'tests' / 'golden_m0.json').read_text())['cases']
  for found, wanted in zip(make_golden.cases(), golden, strict=True):
    for key in ('prompt', 'prompt_ids', 'ids', 'finish'):
      assert found[key] == wanted[key]
    for key in ('prompt_logps', 'logps'):
      np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=2e-5)
