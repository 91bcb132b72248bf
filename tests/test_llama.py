import dataclasses
import json

from conftest import forward, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import attention, config as model_config, convert, llama
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
