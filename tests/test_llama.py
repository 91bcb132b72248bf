import dataclasses
import json

from conftest import forward, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from srlm_jax import InputError, sharding
from srlm_jax.checkpoint import convert
from srlm_jax.models import attention, config as model_config, llama
from srlm_jax.models.config import Config, PRESETS, RopeScaling
from srlm_jax.sample import engine, generate

TINY = PRESETS['tiny-test']


@pytest.mark.parametrize('name, count', [
    ('llama2-7b', 6_738_415_616), ('llama2-13b', 13_015_864_320), ('llama2-70b', 68_976_648_192)])
def test_published_sizes_have_exactly_the_published_number_of_parameters(mesh, name, count):
  shapes = llama.abstract_params(PRESETS[name])
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count == llama.param_count(PRESETS[name])


def test_biases_and_tying_are_counted(mesh):
  for config in (TINY, dataclasses.replace(TINY, tied=True), dataclasses.replace(TINY, attention_bias=True)):
    assert sum(x.size for x in jax.tree.leaves(llama.abstract_params(config))) == llama.param_count(config)


def golden(folder):
  return json.loads((folder / 'golden.json').read_text())['cases']


@pytest.mark.parametrize('case', range(4))
def test_a_real_model_tells_its_golden_story(stories, mesh, case):
  case = golden(stories)[case]
  told = generate.generate(str(stories), case['text'], 'none', engine.Sampling(
      0.0, 1.0, len(case['greedy_ids']) - len(case['prompt_ids'])), seed=0, dtype='float32', mesh=mesh)
  assert told['prompt_ids'] == case['prompt_ids']
  assert told['prompt_ids'] + told['ids'] == case['greedy_ids']


def test_a_real_model_gives_its_golden_log_probs(stories, mesh):
  config = model_config.load(stories)
  params = convert.load_hf(stories, mesh, 'float32')
  for case in golden(stories):
    ids = jnp.asarray([case['greedy_ids']])
    logits, _ = forward(llama.Llama(config), params, ids)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), ids[0, 1:, None], 1).sum()
    assert float(logps) == pytest.approx(case['sum_logprob'], abs=2e-3)
    np.testing.assert_allclose(logits[0, len(case['prompt_ids']) - 1, :8], case['next_token_logits_head'], atol=1e-3)


CHANGES = dict(
    D=dict(D=40), F=dict(F=72), K=dict(K=1, G=4), G=dict(G=1, K=4), H=dict(H=16), V=dict(V=72), layers=dict(layers=3),
    rope_theta=dict(rope_theta=100.0), rope_scaling=dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8)),
    norm_eps=dict(norm_eps=0.1), tied=dict(tied=True), attention_bias=dict(attention_bias=True),
    dtype=dict(dtype='bfloat16'), dropout=dict(dropout=0.5))


def output(config: Config):
  """Logits of one fixed row under parameters that only the config decides."""
  model, params = llama.Llama(config), init(config)
  return np.asarray(jax.jit(lambda p, key: model.apply(
      {'params': p}, jnp.arange(1, 13)[None], rngs={'dropout': key})[0])(params, jax.random.key(0)))


@pytest.mark.parametrize('field', [f.name for f in dataclasses.fields(Config) if f.name != 'context'])
def test_changing_any_field_of_the_config_changes_the_output(mesh, field):
  before, after = output(TINY), output(dataclasses.replace(TINY, **CHANGES[field]))
  assert before.shape != after.shape or np.abs(before - after).max() > 1e-4


def test_the_context_is_a_limit(mesh):
  with pytest.raises(ValueError, match='made for 8'):
    output(dataclasses.replace(TINY, context=8))


def test_the_rope_of_llama_3_keeps_fast_turns_and_slows_slow_ones():
  freq = 500000.0 ** (-np.arange(64) / 64)
  slow = np.asarray(attention.stretch(jnp.asarray(freq, jnp.float32), RopeScaling(8.0, 1.0, 4.0, 8192)))
  wavelength = 2 * np.pi / freq
  np.testing.assert_allclose(slow[wavelength < 8192 / 4], freq[wavelength < 8192 / 4], rtol=1e-6)
  np.testing.assert_allclose(slow[wavelength > 8192], freq[wavelength > 8192] / 8, rtol=1e-6)
  between = (wavelength > 8192 / 4) & (wavelength < 8192)
  share = (8192 / wavelength[between] - 1) / (4 - 1)
  np.testing.assert_allclose(slow[between], (1 - share) * freq[between] / 8 + share * freq[between], rtol=1e-5)


@pytest.mark.parametrize('shape', MESHES)
def test_logits_are_the_same_on_every_mesh(shape):
  one, mesh = make_mesh(1, 1, 1), make_mesh(*shape)
  tokens = np.random.default_rng(0).integers(1, TINY.V, (8, 16), np.int32)
  with jax.set_mesh(one):
    params = jax.tree.map(np.asarray, init(TINY))
    wanted = np.asarray(forward(llama.Llama(TINY), params, tokens)[0])
  with jax.set_mesh(mesh):
    placed = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    batch = sharding.put_batch(dict(tokens=tokens), mesh)
    found = jax.jit(lambda p, t: llama.Llama(TINY).apply({'params': p}, t)[0])(placed, batch['tokens'])
  np.testing.assert_allclose(found, wanted, atol=1e-5)


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
  if len(nested) == 2:  # transformers drops one of them without a word
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
