import dataclasses
import json

from conftest import full_logits, init, make_mesh, MESHES
import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_export import byte_level
import transformers

from srlm_jax import InputError, sharding
from srlm_jax.checkpoint import convert
from srlm_jax.models import attention, config as model_config, llama, packed
from srlm_jax.models.config import Config, PRESETS, RopeScaling
from srlm_jax.sample import engine, generate

TINY = PRESETS['tiny-test']


@pytest.mark.parametrize('name, count', [
    ('llama2-7b', 6_738_415_616), ('llama2-13b', 13_015_864_320), ('llama2-70b', 68_976_648_192)])
def test_published_sizes_have_exactly_the_published_number_of_parameters(mesh, name, count):
  shapes = llama.abstract_params(PRESETS[name])
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count == llama.param_count(PRESETS[name])


@pytest.mark.parametrize('changes', [{}, dict(tied=True), dict(biases='qkvo')])
def test_biases_and_tied_embeddings_are_counted(mesh, changes):
  config = dataclasses.replace(TINY, **changes)
  shapes = llama.abstract_params(config)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == llama.param_count(config)


def golden(folder):
  return json.loads((folder / 'golden.json').read_text())['cases']


@pytest.mark.parametrize('case', range(4))
def test_a_trained_model_gives_its_golden_greedy_tokens(stories, mesh, case):
  case = golden(stories)[case]
  greedy = engine.Sampling(0.0, 1.0, len(case['greedy_ids']) - len(case['prompt_ids']))
  made = generate.generate(str(stories), case['text'], 'none', greedy, seed=0, dtype='float32',
                           mesh=mesh)
  assert made.prompt_ids == case['prompt_ids']
  assert made.prompt_ids + made.ids == case['greedy_ids']


def test_a_trained_model_gives_its_golden_log_probs(stories, mesh):
  config = model_config.load(stories)
  params = convert.load_hf(stories, mesh, 'float32')
  for case in golden(stories):
    ids = jnp.asarray([case['greedy_ids']])
    logits = full_logits(llama.Llama(config), params, ids)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), ids[0, 1:, None], 1).sum()
    assert float(logps) == pytest.approx(case['sum_logprob'], abs=2e-3)
    np.testing.assert_allclose(logits[0, len(case['prompt_ids']) - 1, :8],
                               case['next_token_logits_head'], atol=1e-3)


@pytest.mark.slow
def test_a_chat_ends_with_the_end_of_a_turn(tmp_path, mesh):
  """The model always says <|end|>, which the template writes after an answer; eos is another."""
  byte_level(tmp_path, eos_token='</s>')
  fields = json.loads((tmp_path / 'config.json').read_text())
  tensors = hf_folders.tensors(fields)
  end = 258  # of <|end|>
  for name, x in tensors.items():
    x[...] = 'norm' in name or 'embed' in name  # the others: 0
  tensors['lm_head.weight'][end] = 1
  save_file(tensors, tmp_path / 'model.safetensors', dict(format='pt'))
  greedy = engine.Sampling(0.0, 1.0, 4)
  made = generate.generate(str(tmp_path), 'Hi', 'tokenizer', greedy, seed=0, dtype='float32',
                           mesh=mesh)
  assert (made.ids, made.finish) == ([end], 'eos')


CHANGES = dict(
    D=dict(D=40), F=dict(F=72), K=dict(K=1, G=4), G=dict(G=1, K=4), H=dict(H=16), V=dict(V=72),
    layers=dict(layers=3), rope_theta=dict(rope_theta=100.0),
    rope_scaling=dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8)), norm_eps=dict(norm_eps=0.1),
    tied=dict(tied=True), biases=dict(biases='qkvo'), dtype=dict(dtype='bfloat16'),
    dropout=dict(dropout=0.5), qk_norm=dict(qk_norm='head'), norms=dict(norms='post'),
    window=dict(window=4))


def output(config: Config):
  """Logits [1, T, V] of a fixed row under parameters that depend on the config only."""
  model, params = llama.Llama(config), init(config)
  run = jax.jit(lambda p, key: model.apply(
      {'params': p}, jnp.arange(1, 13)[None], rngs={'dropout': key}))
  return np.asarray(run(params, jax.random.key(0)))


@pytest.mark.parametrize('field', [f.name for f in dataclasses.fields(Config)
                                   if f.name not in ('context', 'family')])
def test_changing_any_field_of_the_config_changes_the_output(mesh, field):
  before, after = output(TINY), output(dataclasses.replace(TINY, **CHANGES[field]))
  assert before.shape != after.shape or np.abs(before - after).max() > 1e-4


def test_rows_longer_than_the_context_are_refused(mesh):
  with pytest.raises(ValueError, match='a row has 12 tokens; the model supports 8'):
    output(dataclasses.replace(TINY, context=8))


def test_llama_3_rope_keeps_high_frequencies_and_divides_low_ones():
  freq = 500000.0 ** (-np.arange(64) / 64)
  scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
  slow = np.asarray(attention.stretch(jnp.asarray(freq, jnp.float32), scaling))
  wavelength = 2 * np.pi / freq
  high, low = wavelength < 8192 / 4, wavelength > 8192
  np.testing.assert_allclose(slow[high], freq[high], rtol=1e-6)
  np.testing.assert_allclose(slow[low], freq[low] / 8, rtol=1e-6)
  between = ~high & ~low
  weight = (8192 / wavelength[between] - 1) / (4 - 1)
  np.testing.assert_allclose(
      slow[between], (1 - weight) * freq[between] / 8 + weight * freq[between], rtol=1e-5)


@pytest.mark.parametrize('shape', MESHES)
def test_logits_are_the_same_on_every_mesh(shape):
  one, mesh = make_mesh(1, 1, 1), make_mesh(*shape)
  tokens = np.random.default_rng(0).integers(1, TINY.V, (8, 16), np.int32)
  with jax.set_mesh(one):
    params = jax.tree.map(np.asarray, init(TINY))
    wanted = np.asarray(full_logits(llama.Llama(TINY), params, tokens))
  with jax.set_mesh(mesh):
    placed = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    found = full_logits(llama.Llama(TINY), placed, sharding.put_batch(tokens, mesh))
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize('tied', [False, True])
def test_the_log_probs_of_targets_are_those_of_the_logits(mesh, tied):
  config = dataclasses.replace(TINY, tied=tied)
  model, params = llama.Llama(config), {'params': init(config)}
  tokens, targets = np.random.default_rng(0).integers(1, TINY.V, (2, 3, 16), np.int32)
  positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
  hidden = model.apply(params, tokens, positions, packed.Causal(), method='hidden')
  logps = model.apply(params, hidden, targets, method='token_logps')
  wanted = jax.nn.log_softmax(model.apply(params, hidden, method='logits'))
  wanted = jnp.take_along_axis(wanted, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(logps, wanted, atol=1e-5)


ROPE = Config(D=32, F=48, K=4, G=1, H=8, V=64, layers=2, context=32)
STRETCH = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
NESTED = dict(absent=None, empty={}, default=dict(type='default'), stretch=STRETCH,
              theta=dict(rope_theta=7.0), stretch_theta=STRETCH | dict(rope_theta=7.0),
              other_theta=STRETCH | dict(rope_theta=500_000))


@pytest.mark.parametrize('parameters', NESTED.values(), ids=NESTED)
@pytest.mark.parametrize('scaling', NESTED.values(), ids=NESTED)
@pytest.mark.parametrize('theta', [None, 7, 500_000.0])
def test_rotary_fields_are_read_as_transformers_reads_them(tmp_path, theta, scaling, parameters):
  def theirs(**rope):
    plain = {k: v for k, v in model_config.to_hf(ROPE).items() if not k.startswith('rope')}
    fields = plain | {k: v for k, v in rope.items() if v is not None}
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    found = dict(transformers.LlamaConfig.from_pretrained(
        str(tmp_path), trust_remote_code=False).rope_parameters)
    found.pop('type', None)
    return found

  nested = [x for x in (scaling, parameters) if x]
  differ = any(theta is not None and x.get('rope_theta', theta) != theta for x in nested)
  if len(nested) == 2:  # transformers silently drops one of them
    differ |= (theirs(rope_theta=theta, rope_scaling=scaling) !=
               theirs(rope_theta=theta, rope_parameters=parameters))
  expected = theirs(rope_theta=theta, rope_scaling=scaling, rope_parameters=parameters)
  if differ:
    with pytest.raises(InputError, match='config.json: .* and .* differ; keep the one'):
      model_config.load(tmp_path)
    return
  found = model_config.load(tmp_path)
  assert found.rope_theta == expected.pop('rope_theta')
  assert (found.rope_scaling is None) == (expected == dict(rope_type='default'))
  if found.rope_scaling:
    assert dataclasses.astuple(found.rope_scaling) == tuple(expected[k] for k in list(STRETCH)[1:])


def test_two_values_of_rope_theta_are_named(tmp_path):
  fields = model_config.to_hf(ROPE)
  for given, message in ((dict(rope_scaling=STRETCH | dict(rope_theta=7.0)),
                          r'rope_theta = 10000.0 and rope_scaling.rope_theta = 7.0 differ'),
                         (dict(rope_parameters=dict(rope_theta=5)),
                          r'rope_theta = 10000.0 and rope_parameters.rope_theta = 5.0 differ'),
                         (dict(rope_theta=None, rope_scaling=dict(rope_theta=7.0),
                               rope_parameters=dict(rope_theta=5)),
                          r'rope_scaling.rope_theta = 7.0 and rope_parameters.rope_theta = 5.0'),
                         (dict(rope_scaling=3), 'rope_scaling = 3 is not a set of fields')):
    with pytest.raises(InputError, match=message):
      model_config.from_hf(fields | given)


@pytest.mark.parametrize('name', ['rope_scaling', 'rope_parameters'])
def test_a_nested_rope_theta_changes_the_config(name):
  fields = model_config.to_hf(ROPE)
  del fields['rope_theta']
  read = [model_config.from_hf(fields | {name: STRETCH | dict(rope_theta=x)}) for x in (7.0, 8.0)]
  assert [x.rope_theta for x in read] == [7.0, 8.0]
