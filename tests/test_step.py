import dataclasses
import math

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srlm_jax import sharding
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS
from srlm_jax.train import state as train_state, step as train_step

TINY = PRESETS['tiny-test']


def knobs(loss, **changes):
  config = base.dpo() if loss == 'dpo' else base.sft()
  config.update(batch=8, dropout=0.0, learning_rate=1e-3, learning_rate_end=1e-3, **changes)
  return config


def rows(loss):
  rng = np.random.default_rng(0)
  shape = (8, 2, 16) if loss == 'dpo' else (8, 16)
  lengths = rng.integers(6, 16, shape[:-1])
  mask = (np.arange(16) >= 4) & (np.arange(16) < lengths[..., None])
  tokens = rng.integers(1, TINY.V, shape) * (np.arange(16) < lengths[..., None])
  batch = dict(tokens=tokens.astype(np.int32), loss_mask=mask.astype(np.int32))
  return dict(batch, confidence=np.ones(8, np.float32)) if loss == 'dpo' else batch


def train(shape, config, steps=2, model_config=TINY):
  """Metrics of each step and the last parameters, from the same start on any mesh."""
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    params = jax.tree.map(np.asarray, init(TINY))
    place = sharding.shardings(params, mesh)
    tx = train_state.optimizer(config, 10)
    abstract = jax.eval_shape(lambda p: train_state.TrainState.create(p, tx), params)
    state = jax.jit(lambda p: train_state.TrainState.create(p, tx), out_shardings=sharding.shardings(abstract, mesh))(
        jax.tree.map(sharding.put, params, place))
    reference = jax.tree.map(sharding.put, params, place) if config.loss == 'dpo' else {}
    step = train_step.make(llama.Llama(model_config), tx, config, state)
    batch, history = sharding.put_batch(rows(config.loss), mesh), []
    for _ in range(steps):
      before = state
      state, metrics = step(state, reference, batch, jax.random.key(0))
      history.append({k: float(v) for k, v in metrics.items()})
    assert step._cache_size() == 1, 'compiled more than once'
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params)), 'the old state was not donated'
  return history, jax.tree.map(np.asarray, state.params)


def test_the_first_dpo_step_gives_ln_2_and_margin_0_and_the_second_is_better():
  history, _ = train((1, 1, 1), knobs('dpo'))
  assert history[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert history[0]['margin'] == 0 and history[0]['accuracy'] == 0
  assert history[1]['loss'] < history[0]['loss'] and history[1]['margin'] > 0


def test_the_first_dpo_step_gives_ln_2_in_bf16():
  history, _ = train((1, 1, 1), knobs('dpo'), 1, dataclasses.replace(TINY, dtype='bfloat16'))
  assert history[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize('loss', ['sft', 'dpo'])
def test_every_mesh_trains_the_same(loss):
  wanted, params = train((1, 1, 1), knobs(loss))
  for shape in [(2, 2, 2)]:  # every axis at once; logits on each axis alone: test_llama
    found, placed = train(shape, knobs(loss))
    for a, b in zip(wanted, found, strict=True):
      assert a == pytest.approx(b, abs=2e-5, rel=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, placed)


@pytest.mark.parametrize('loss', ['sft', 'dpo'])
def test_accumulation_equals_the_large_batch(loss):
  """Rows have different lengths, so a mean of micro-batch means would differ."""
  loss_fn, batch = {'sft': train_step._sft, 'dpo': train_step._dpo}[loss], jax.tree.map(jnp.asarray, rows(loss))
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, reference = init(TINY), init(TINY, seed=1)
    (grad, metrics), (accumulated, found) = (
        jax.jit(lambda p, parts=parts: train_step._gradient(
            loss_fn, llama.Llama(TINY), knobs(loss, accumulate=parts), p, reference, batch, jax.random.key(0)))(params)
        for parts in (1, 4))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
               (grad, metrics), (accumulated, found))


def test_the_prompt_and_the_padding_do_not_count():
  config = knobs('sft')
  model, batch = llama.Llama(TINY), rows('sft')
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = init(TINY)
    mask = jnp.asarray(batch['loss_mask'])

    @jax.jit
    def loss(tokens):
      return train_step._sft(model, config, params, {}, dict(tokens=tokens, loss_mask=mask), None)[0]
    tokens = jnp.asarray(batch['tokens'])
    after = tokens.at[:, 15].set(jnp.where(mask[:, 15] == 0, 7, tokens[:, 15]))  # padding
    np.testing.assert_allclose(loss(tokens), loss(after), rtol=1e-6)
    assert abs(float(loss(tokens) - loss(tokens.at[0, 5].set((tokens[0, 5] + 1) % TINY.V)))) > 1e-3  # response


def test_dropout_acts_on_the_policy_alone():
  changed = dataclasses.replace(TINY, dropout=0.3)
  history, _ = train((1, 1, 1), knobs('dpo'), 1, changed)
  assert history[0]['loss'] != pytest.approx(math.log(2), abs=1e-4)


def test_the_learning_rate_goes_by_a_cosine_from_one_value_to_the_other():
  rate = train_state.schedule(base.sft(), 101)
  assert float(rate(0)) == pytest.approx(5.5e-6)
  assert float(rate(50)) == pytest.approx((5.5e-6 + 1.1e-6) / 2, rel=0.02)
  assert float(rate(101)) == pytest.approx(1.1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = init(dataclasses.replace(TINY, attention_bias=True))
  decayed = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(params) if train_state._is_matrix(path, x)}
  assert decayed == {'wq_DKGH', 'wk_DKH', 'wv_DKH', 'wo_KGHD', 'gate_DF', 'up_DF', 'down_FD', 'embed_VD', 'lm_head_DV'}
