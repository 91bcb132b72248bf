"""Random models of every family in float32 against transformers on torch: `make test-parity`.

The weights are those of make_family_golden.py: all norms and biases are random. Greedy ids are
equal and log-probs agree within ATOL in the forward pass, in packed rows of single responses and of
pairs, and decoded by the engine with a shared prefix; on one device and on meshes.
"""
import json

from conftest import full_logits, make_mesh
import jax
import make_family_golden as golden
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_families import ATOL, check_round_trip, GOLDEN

from srlm_jax import sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Shape
from srlm_jax.models import config as model_config, kernels, llama, packed
from srlm_jax.sample.draw import Sampling
from srlm_jax.sample.engine import Engine, Request
from srlm_jax.train import batch as batches

torch = pytest.importorskip('torch')

# Sizes that no mesh divides, and one query head per key/value head.
ODD = dict(hidden_size=42, intermediate_size=71, num_attention_heads=6, num_key_value_heads=3,
           head_dim=10, vocab_size=101)
ONE_HEAD = dict(num_key_value_heads=1, num_attention_heads=3, num_hidden_layers=1, head_dim=32)
SINGLE = dict(num_key_value_heads=3, num_attention_heads=3, head_dim=16)
MODELS = {
    **golden.MODELS,
    'llama odd': golden.MODELS['llama'] | ODD | dict(tie_word_embeddings=False,
                                                     attention_bias=True),
    'mistral odd': golden.MODELS['mistral'] | ODD | dict(tie_word_embeddings=True,
                                                         sliding_window=1),
    'mistral without a window': golden.MODELS['mistral'] | SINGLE | dict(
        sliding_window=None, rope_parameters=golden.THETA),
    'mistral with a window of the row': golden.MODELS['mistral'] | dict(sliding_window=48),
    'qwen2 odd': golden.MODELS['qwen2'] | ODD | dict(tie_word_embeddings=True,
                                                     use_sliding_window=False),
    'qwen2 with one head': golden.MODELS['qwen2'] | ONE_HEAD,
    'qwen3 odd': golden.MODELS['qwen3'] | ODD | dict(
        attention_bias=True, tie_word_embeddings=False, use_sliding_window=True, sliding_window=5,
        max_window_layers=0),
    'qwen3 with one head': golden.MODELS['qwen3'] | ONE_HEAD,
    'olmo2 odd': golden.MODELS['olmo2'] | ODD | dict(tie_word_embeddings=True, attention_bias=True,
                                                     rope_parameters=golden.LLAMA3),
    'olmo2 with single heads': golden.MODELS['olmo2'] | SINGLE,
}
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
CASES = [(name, (1, 1, 1)) for name in MODELS]
CASES += [(name, mesh) for name in golden.MODELS for mesh in MESHES[1:]]
RUBRIC = np.random.RandomState(2).randint(0, 90, 20).tolist()  # a prefix longer than the windows
MAX_TOKENS = 12


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """-> a function: the name of a model -> transformers' model and its folder."""
  known = {}

  def make(name):
    if name not in known:
      folder = tmp_path_factory.mktemp('model') / 'hf'
      known[name] = golden.build(MODELS[name]), folder
      known[name][0].save_pretrained(str(folder))
    return known[name]
  return make


@pytest.fixture(params=CASES, ids=lambda case: f'{case[0]}, {"x".join(map(str, case[1]))}')
def case(request, made):
  """-> transformers' model, and our config, mesh and parameters."""
  name, sizes = request.param
  theirs, folder = made(name)
  mesh = make_mesh(*sizes)
  with jax.set_mesh(mesh):
    yield theirs, model_config.load(folder), mesh, convert.load_hf(folder, mesh, 'float32')


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL)


def response_logps(theirs, prompt, response) -> np.ndarray:
  """-> the log-probs of a response's tokens, of the prompt and this response alone."""
  table = golden.logps(theirs, prompt + response)[len(prompt) - 1:]
  return table[np.arange(len(response)), response]


@pytest.mark.parametrize('name', MODELS)
def test_conversion_is_bit_identical_in_both_directions(made, tmp_path, mesh, name):
  theirs, folder = made(name)
  tensors = load_file(folder / 'model.safetensors')
  config = model_config.load(folder)
  assert sum(p.numel() for p in theirs.parameters()) == llama.param_count(config)
  check_round_trip(folder, tensors, tmp_path)
  loaded = convert.load_hf(folder, mesh, 'float32')
  restored, _ = store.restore_params(tmp_path / 'ours', mesh, 'float32')
  jax.tree.map(np.testing.assert_array_equal, restored, loaded)
  # transformers reads what we write, by our config.json too.
  (tmp_path / 'back' / 'config.json').write_text(json.dumps(model_config.to_hf(config)))
  again = type(theirs).from_pretrained(str(tmp_path / 'back'), local_files_only=True,
                                       dtype=torch.float32, attn_implementation='eager').eval()
  ids = golden.prompts(config.V)[-1]
  np.testing.assert_array_equal(golden.logps(again, ids), golden.logps(theirs, ids))


def test_the_forward_pass(case):
  theirs, config, mesh, params = case
  tokens = np.random.RandomState(3).randint(0, config.V, (8, 48)).astype(np.int32)
  logits = full_logits(llama.Llama(config), params, sharding.put_batch(tokens, mesh))
  found = np.asarray(jax.nn.log_softmax(logits))
  wanted = np.stack([golden.logps(theirs, row.tolist()) for row in tokens])
  close(found[:, :-1], wanted)


def test_greedy_ids_decoded_with_the_cache(case):
  """Three requests share a prefix, two do not; one has several samples."""
  theirs, config, mesh, params = case
  own = golden.prompts(config.V)
  prompts = [[*(RUBRIC if i < 3 else []), *ids] for i, ids in enumerate([*own, own[1], own[2]])]
  engine = Engine(llama.Llama(config), params, mesh, (), 0, 'parity', slots=8, size=96, steps=5)
  requests = [Request(str(i), ids, n=1 + (i == 1)) for i, ids in enumerate(prompts)]
  for request, results in engine.generate(requests, Sampling(0.0, 1.0, MAX_TOKENS)):
    wanted = golden.greedy(theirs, request.ids, MAX_TOKENS)[len(request.ids):]
    logps = response_logps(theirs, request.ids, wanted)
    assert len(results) == request.n
    for result in results:
      assert result.ids == wanted
      close(result.token_logps, logps)


def packed_logps(config, mesh, params, batch) -> np.ndarray:
  """-> the log-probs [B, N] of the targets of a batch, by the training kernels."""
  choice = kernels.for_training('cpu', config, 'none')
  model = llama.Llama(config, choice)

  @jax.jit
  def run(params, batch):
    params = llama.unroll(params) if choice.unrolled else params
    hidden = model.apply({'params': params}, batch.tokens, batch.positions,
                         packed.Packed(batch.segments()), method='hidden')
    picked = jax.numpy.take_along_axis(hidden, batch.target_positions[..., None], 1)
    return model.apply({'params': params}, picked, batch.targets, method='token_logps')
  return np.asarray(run(params, sharding.put_batch(batch, mesh)))


def draw(config, responses: int) -> list[list[Example]]:
  """Eight rows of examples; the prompts of some are longer than the windows, of others not."""
  rng = np.random.RandomState(4)

  def tokens(low, high):
    return rng.randint(0, config.V, rng.randint(low, high)).tolist()
  return [[Example(f'{row}/{i}', tokens(2, 14), tuple(tokens(2, 12) for _ in range(responses)))
           for i in range(2)] for row in range(8)]


@pytest.mark.parametrize('responses', [1, 2])
def test_packed_rows(case, responses):
  """Rows of single responses, and of pairs whose responses share their prompt."""
  theirs, config, mesh, params = case
  rows = draw(config, responses)
  shape = Shape(rows=8, width=80, targets=48, pairs=2)
  pack = batches.pack if responses == 1 else batches.pack_pairs
  batch = pack(rows, shape)
  found = packed_logps(config, mesh, params, batch)
  for row, logps, ids in zip(rows, found, batch.response_ids, strict=True):
    wanted = [response_logps(theirs, e.prompt, r) for e in row for r in e.responses]
    close(logps[ids >= 0], np.concatenate(wanted))


def altered(name: str, theirs):
  """A model of transformers with one property changed, its weights otherwise the same."""
  changes = dict(mistral=dict(sliding_window=8), qwen2=dict(max_window_layers=1))
  if name in changes:
    other = golden.build(MODELS[name] | changes[name])
    other.load_state_dict(theirs.state_dict())
    return other
  other = golden.build(MODELS[name])
  with torch.no_grad():
    norms = [x for n, x in other.named_parameters() if 'k_norm' in n or (
        name == 'llama' and 'post_attention_layernorm' in n)]
    for x in norms:
      x.copy_(x.flip(0))
  return other


@pytest.mark.parametrize('name', golden.MODELS)
def test_the_tolerance_would_show_an_error(made, name):
  """A window of one token more or of fewer layers, and norms in another order."""
  theirs, _ = made(name)
  ids = golden.prompts(96)[-1]
  difference = np.abs(golden.logps(altered(name, theirs), ids) - golden.logps(theirs, ids))
  assert difference.max() > 1000 * ATOL


@pytest.mark.parametrize('name', GOLDEN)
def test_the_golden_values_are_those_of_transformers(name):
  """The files that test_families.py reads, recomputed with the transformers of this run."""
  found = golden.compute(golden.MODELS[name])
  assert found['tensors'] == GOLDEN[name]['tensors']
  for new, old in zip(found['cases'], GOLDEN[name]['cases'], strict=True):
    assert (new['prompt_ids'], new['ids']) == (old['prompt_ids'], old['ids'])
    np.testing.assert_allclose(new['logps'], old['logps'], rtol=0, atol=2e-5)
