"""LoRA adapters exchanged with PEFT on torch, both ways. `make test-parity` runs this."""
import json

from conftest import full_logits
import jax
import numpy as np
import pytest

from srlm_jax import config as configs, model_files
from srlm_jax.checkpoint import convert, peft as ours, store
from srlm_jax.models import config as model_config, llama, lora

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

LAYERS = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
              num_key_value_heads=2, head_dim=8, vocab_size=96, max_position_embeddings=64)
CLASSES = {'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
           'qwen2': (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
TARGETS = [configs.LORA_TARGETS, ('q_proj', 'v_proj', 'down_proj')]
ROWS = np.random.default_rng(1).integers(0, 96, (2, 32), np.int32)


def drawn(model, seed: int):
  """Sets all parameters that training would change to random values -> the model."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if 'lora' in name or seed == 0:
        x.normal_(1.0 if 'norm' in name else 0.0, 0.1, generator=generator)
  return model.float().eval()


@pytest.fixture(params=CLASSES)
def base(request, tmp_path):
  """A random model of transformers, and the folder of the same model here."""
  config, model = CLASSES[request.param]
  made = drawn(model(config(**LAYERS, attn_implementation='eager')), 0)
  made.save_pretrained(str(tmp_path / 'hf'))
  convert.from_hf(tmp_path / 'hf', tmp_path / 'base')
  return made, tmp_path / 'base'


def theirs(model):
  with torch.no_grad():
    return model(torch.from_numpy(ROWS).long()).logits.log_softmax(-1).numpy()


def logps(folder, mesh, merge):
  params, _ = store.restore_params(folder, mesh, 'float32', merge=merge)
  model = llama.Llama(model_config.load(folder))
  return jax.nn.log_softmax(full_logits(model, params, ROWS))


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('is_rslora', [False, True])
def test_an_adapter_of_peft_gives_the_same_outputs_here(base, mesh, tmp_path, targets, is_rslora):
  model, folder = base
  before = theirs(model)
  adapted = drawn(peft.get_peft_model(model, peft.LoraConfig(
      r=4, lora_alpha=6, target_modules=[*targets], use_rslora=is_rslora, lora_dropout=0.1,
      task_type='CAUSAL_LM')), 2)
  adapted.save_pretrained(str(tmp_path / 'peft'))
  wanted = theirs(adapted)
  assert np.abs(wanted - before).max() > 0.05
  ours.from_peft(tmp_path / 'peft', folder, tmp_path / 'ours')
  adapter = model_files.read_adapter(tmp_path / 'ours')
  assert (adapter.rank, {*adapter.targets}) == (4, {*targets})
  for merge in (True, False):
    np.testing.assert_allclose(logps(tmp_path / 'ours', mesh, merge), wanted, rtol=0, atol=1e-5)
  convert.to_hf(tmp_path / 'ours', tmp_path / 'merged')
  np.testing.assert_allclose(
      jax.nn.log_softmax(full_logits(llama.Llama(model_config.load(folder)),
                                     convert.load_hf(tmp_path / 'merged', mesh, 'float32'), ROWS)),
      wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize('rounds', [1, 2])
def test_an_adapter_made_here_gives_the_same_outputs_in_peft(base, mesh, tmp_path, rounds):
  """With two rounds: of other ranks, scales and targets."""
  model, below = base
  config, rng = model_config.load(below), np.random.default_rng(3)
  for i in range(rounds):
    folder, rank = tmp_path / f'round{i}', 4 + i
    adapter = model_files.adapter(rank, 6.0 + i, TARGETS[i], below, folder)
    store.write_model_files(config, below, folder, adapter)
    saver = store.manager(folder, keep=1)
    store.save(saver, 0, jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.1,
        lora.shapes(config, rank, TARGETS[i])))
    saver.close()
    below = folder
  ours.to_peft(folder, tmp_path / 'peft')
  fields = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  assert fields['r'] == (4 if rounds == 1 else 9)
  adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / 'peft')).eval()
  np.testing.assert_allclose(theirs(adapted), logps(folder, mesh, True), rtol=0, atol=1e-5)
  # and back
  ours.from_peft(tmp_path / 'peft', base[1], tmp_path / 'back')
  np.testing.assert_allclose(logps(tmp_path / 'back', mesh, True), logps(folder, mesh, True),
                             rtol=0, atol=1e-5)
