"""The training step: equal on every mesh, packed or not, with shared prompts or repeated ones."""
import dataclasses
import functools
import math

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import config as configs, sharding
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.models import attention, llama, vocab
from srlm_jax.models.config import PRESETS
from srlm_jax.train import batch as batches, state as train_state, step as train_step

TINY = PRESETS['tiny-test']
WIDE = dataclasses.replace(TINY, K=8)  # a key/value head for each of eight devices
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def keys(loss, **changes):
  config = configs.dpo() if loss == 'dpo' else configs.sft()
  config.update(batch=16, accumulate=1, dropout=0.0, learning_rate=1e-3, learning_rate_end=1e-3)
  config.update(changes)
  return config


def draw(loss, count=16, seed=0):
  rng = np.random.default_rng(seed)
  def tokens():
    return rng.integers(1, TINY.V, int(rng.integers(2, 8))).tolist()
  return [Example(f'e{i}', tokens(), tuple(tokens() for _ in range(2 if loss == 'dpo' else 1)))
          for i in range(count)]


def pack(examples, width=0, parts=1):
  """All examples in one batch."""
  packed = Packing(examples, len(examples), 1, 0, width, parts, multiple=8)
  assert len(packed) == 1
  pairs = len(examples[0].responses) == 2
  return (batches.pack_pairs if pairs else batches.pack)(packed.rows(0), packed.shape)


def draw_batch(loss):
  """The examples of `draw` in packed rows."""
  batch = pack(draw(loss), 32, parts=8)
  assert (batch.segment_ids.max(1) > (2 if loss == 'dpo' else 1)).any()
  return batch


@functools.cache
def train(loss, model_config=TINY):
  """The metrics of two steps."""
  config, mesh = keys(loss), make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params = jax.tree.map(np.asarray, init(model_config))
    place = sharding.shardings(params, mesh)
    tx = train_state.optimizer(config, 10)
    create = functools.partial(train_state.TrainState.create, tx=tx)
    abstract = jax.eval_shape(create, params)
    state = jax.jit(create, out_shardings=sharding.shardings(abstract, mesh))(
        jax.tree.map(sharding.put, params, place))
    reference = jax.tree.map(sharding.put, params, place) if config.loss == 'dpo' else {}
    step = train_step.make(llama.Llama(model_config), tx, config, state)
    batch, history = sharding.put_batch(draw_batch(config.loss), mesh), []
    for _ in range(2):
      before = state
      state, metrics = step(state, reference, batch, jax.random.key(0))
      history.append({k: float(v) for k, v in metrics.items()})
    assert step._cache_size() == 1, 'compiled more than once'
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params)), 'state was not donated'
  return history


@functools.cache
def gradient(loss, shape, config=WIDE):
  """Gradient and metrics of one batch; the reference is another model. The key is the same."""
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    params, reference = (jax.tree.map(sharding.put, tree, sharding.shardings(tree, mesh))
                         for tree in (init(config), init(config, seed=1)))
    run = jax.jit(lambda p, r, batch: train_step.gradient(
        llama.Llama(config), keys(loss), p, r, batch, jax.random.key(0)))
    found = run(params, reference, sharding.put_batch(draw_batch(loss), mesh))
  return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize('shape', MESHES)
@pytest.mark.parametrize('loss', ['sft', 'dpo'])
def test_losses_and_gradients_are_the_same_on_every_mesh(loss, shape):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
               gradient(loss, (1, 1, 1)), gradient(loss, shape))


@pytest.mark.slow
@pytest.mark.parametrize('shape', [*MESHES[1:], (1, 1, 8)])
@pytest.mark.parametrize('changes', [
    dict(qk_norm='all', norms='post', window=5), dict(qk_norm='head', biases='qkv', window=3)],
    ids=['all', 'head'])
def test_gradients_of_other_families_are_the_same_on_every_mesh(changes, shape):
  """With norms over heads that the chips of a tensor group split."""
  config = dataclasses.replace(WIDE, **changes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
               gradient('dpo', (1, 1, 1), config), gradient('dpo', shape, config))


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 1, 8)])
def test_dropout_draws_the_same_mask_on_every_mesh(shape):
  """Also where chips split the positions of the residual stream."""
  config = dataclasses.replace(WIDE, dropout=0.3)
  wanted, found = gradient('dpo', (1, 1, 1), config), gradient('dpo', shape, config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), wanted, found)
  plain, _ = gradient('dpo', (1, 1, 1))
  assert not np.allclose(jax.tree.leaves(plain)[0], jax.tree.leaves(wanted[0])[0], rtol=1e-3)


def test_losses_and_gradients_do_not_depend_on_what_is_recomputed():
  """With dropout, whose mask the backward pass draws again."""
  config = dataclasses.replace(TINY, dropout=0.3)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, reference, batch = init(config), init(config, seed=1), draw_batch('dpo')
    wanted, *others = (
        jax.jit(lambda p, policy=policy: train_step.gradient(
            llama.Llama(config, remat=policy), keys('dpo'), p, reference, batch,
            jax.random.key(0)))(params)
        for policy in configs.REMAT)
  for found in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), wanted,
                 found)


def logps_and_gradient(batch, params, weights, model):
  """Token log-probs of the targets, and the gradient of their weighted sum."""
  def total(params):
    logps = train_step.token_logps(model, params, batch, None)
    return (logps * weights).sum(), logps
  with jax.set_mesh(make_mesh(1, 1, 1)):
    (_, logps), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return np.asarray(logps), grad


def by_response(batch, logps):
  """{tokens of a response: their log-probs}."""
  return {tuple(batch.targets[b][own]): logps[b][own] for b in range(len(logps))
          for n in range(batch.response_ids.max() + 1)
          if (own := batch.response_ids[b] == n).any()}


@pytest.mark.parametrize('unrolled', [False, True])
@pytest.mark.parametrize('loss', ['sft', 'dpo'])
def test_packed_rows_equal_rows_of_one_response_each(loss, unrolled, monkeypatch):
  """Log-probs and gradients: a response attends to its prompt, from position 0, and to itself."""
  monkeypatch.setattr(vocab, 'MOST_LOGITS', 2**12)  # several parts
  model = llama.Llama(TINY, attention.CPU if unrolled else attention.XLA)
  examples = draw(loss)
  separate = pack([Example(f'{e.id}/{n}', e.prompt, (r,))
                   for e in examples for n, r in enumerate(e.responses)])
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = init(TINY)
  weight = {tuple(r): 0.5 + i + n for i, e in enumerate(examples)
            for n, r in enumerate(e.responses)}
  found = []
  for batch in (draw_batch(loss), separate):
    weights = np.zeros(batch.targets.shape, np.float32)
    for b, n in {(b, n) for b, row in enumerate(batch.response_ids) for n in row if n >= 0}:
      own = batch.response_ids[b] == n
      weights[b][own] = weight[tuple(batch.targets[b][own])] / len(weight)
    logps, grad = logps_and_gradient(batch, params, weights, model)
    found.append((by_response(batch, logps), grad))
  (logps, grad), (wanted, wanted_grad) = found
  assert logps.keys() == wanted.keys() and len(logps) == len(weight)
  for response, values in logps.items():
    np.testing.assert_allclose(values, wanted[response], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
               grad, wanted_grad)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_demonstrations_among_pairs_have_the_gradient_of_sft(accumulate):
  examples, weight = draw('dpo', 8), 0.7
  demonstrations = [dataclasses.replace(e, responses=e.responses[:1]) for e in examples[::3]]
  pairs = [e for i, e in enumerate(examples) if i % 3]
  mixed = [e if i % 3 else dataclasses.replace(e, responses=(e.responses[0], []))
           for i, e in enumerate(examples)]
  config = keys('dpo', data=('pairs', 'eft'), sft_weight=weight, accumulate=accumulate)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, reference = init(TINY), init(TINY, seed=1)

    def gradient(config, examples, parts=1):
      batch = pack(examples, 32, parts)
      assert len(batch.tokens) < len(examples) or len(examples) == 1
      return jax.jit(lambda params, reference, batch: train_step.gradient(
          llama.Llama(TINY), config, params, reference, batch, jax.random.key(0)))(
              params, reference, batch)
    grad, metrics = gradient(config, mixed, parts=2)
    parts = [(gradient(keys('dpo'), pairs), len(pairs)),
             *((gradient(keys('sft'), [e]), weight) for e in demonstrations)]
  wanted = jax.tree.map(lambda *grads: sum(w * g for g, (_, w) in zip(grads, parts, strict=True))
                        / len(examples), *(grad for (grad, _), _ in parts))
  loss = sum(w * found['loss'] for (_, found), w in parts) / len(examples)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['pair_share'], len(pairs) / len(examples), rtol=1e-6)
  np.testing.assert_allclose(metrics['margin'] / metrics['pair_share'],
                             parts[0][0][1]['margin'], rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), grad, wanted)


def test_the_metrics_of_a_step_are_means_over_its_pairs():
  examples = draw('dpo', 8)
  mixed, alone = ([e if is_pair(i) else dataclasses.replace(e, responses=(e.responses[0], []))
                   for i, e in enumerate(examples)] for is_pair in (lambda i: i % 3, lambda i: 0))
  config = keys('dpo', data=('pairs', 'eft'))
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params, reference = (jax.tree.map(sharding.put, tree, sharding.shardings(tree, mesh))
                         for tree in (init(TINY), init(TINY, seed=1)))
    tx = train_state.optimizer(config, 10)
    state = train_state.TrainState.create(params, tx)

    def metrics(config, examples):
      step = train_step.make(llama.Llama(TINY), tx, config, state)
      batch = sharding.put_batch(pack(examples, 32), mesh)
      return step(jax.tree.map(jnp.copy, state), reference, batch, jax.random.key(0))[1]
    found, demonstrations = metrics(config, mixed), metrics(config, alone)
    wanted = metrics(keys('dpo'), [e for i, e in enumerate(examples) if i % 3])
  assert found['pair_share'] == pytest.approx(5 / 8) and demonstrations['pair_share'] == 0
  names = wanted.keys() - {'loss', 'grad_norm'}
  assert {'margin', 'accuracy', 'chosen_logp', 'rejected_reward'} <= names
  for name in names:
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert demonstrations[name] == 0


def test_the_first_dpo_step_gives_ln_2_and_margin_0_and_the_second_is_better():
  history = train('dpo')
  assert history[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert history[0]['margin'] == 0 and history[0]['accuracy'] == 0
  assert history[1]['loss'] < history[0]['loss'] and history[1]['margin'] > 0


def test_the_first_dpo_step_gives_ln_2_in_bf16():
  history = train('dpo', dataclasses.replace(TINY, dtype='bfloat16'))
  assert history[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)


def test_cached_reference_logps_give_the_gradient_of_a_reference_in_the_step():
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, reference, batch = init(TINY), init(TINY, seed=1), draw_batch('dpo')
    model = llama.Llama(TINY)
    logps = jax.jit(lambda p: train_step.pair_logps(
        train_step.token_logps(model, p, batch, None), batch))(reference)
    cached = batches.CachedPairBatch(**vars(batch), reference_logps=np.asarray(logps))
    wanted, found = (jax.jit(lambda p, r, batch=batch: train_step.gradient(
        model, keys('dpo'), p, r, batch, jax.random.key(0)))(params, older)
                     for batch, older in ((batch, reference), (cached, {})))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), found, wanted)


@pytest.mark.parametrize('loss', ['sft', 'dpo'])
def test_accumulation_equals_the_large_batch(loss):
  """Rows have different lengths, so a mean of micro-batch means would differ."""
  batch = jax.tree.map(jnp.asarray, draw_batch(loss))
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, reference = init(TINY), init(TINY, seed=1)
    large, accumulated = (
        jax.jit(lambda p, parts=parts: train_step.gradient(
            llama.Llama(TINY), keys(loss, accumulate=parts), p, reference, batch,
            jax.random.key(0)))(params)
        for parts in (1, 4))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
               large, accumulated)


def test_prompt_and_padding_are_not_targets():
  config, batch = keys('sft'), draw_batch('sft')
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = init(TINY)

    @jax.jit
    def sft(batch):
      return train_step.sums(llama.Llama(TINY), config, params, {}, batch, None)[0]

    def loss(**changed):
      return float(sft(batch.replace(**changed)))
    plain = loss()
    tokens = np.where(batch.segment_ids == 0, 7, batch.tokens)
    assert loss(tokens=tokens) == pytest.approx(plain)
    targets = np.where(batch.response_ids < 0, 7, batch.targets)
    assert loss(targets=targets) == pytest.approx(plain)
    changed = batch.targets.copy()
    changed[0, 0] = (changed[0, 0] + 1) % TINY.V
    assert abs(loss(targets=changed) - plain) > 1e-3


def test_dropout_acts_on_the_policy_alone():
  plain, _ = train('dpo')
  dropped, _ = train('dpo', dataclasses.replace(TINY, dropout=0.3))
  assert dropped['loss'] != pytest.approx(math.log(2), abs=1e-4)
  for side in ('chosen', 'rejected'):
    assert abs(dropped[f'{side}_logp'] - plain[f'{side}_logp']) > 1e-3
    reference = dropped[f'{side}_logp'] - dropped[f'{side}_reward'] / keys('dpo').beta
    assert reference == pytest.approx(plain[f'{side}_logp'], rel=1e-4)


def test_the_learning_rate_follows_a_cosine():
  rate = train_state.schedule(configs.sft(), 101)
  assert float(rate(0)) == pytest.approx(5.5e-6)
  assert float(rate(50)) == pytest.approx((5.5e-6 + 1.1e-6) / 2, rel=0.02)
  assert float(rate(101)) == pytest.approx(1.1e-6)


def test_weight_decay_excludes_norms_and_biases():
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = init(dataclasses.replace(TINY, biases='qkvo'))
  decayed = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(params)
             if train_state._is_matrix(path, x)}
  assert decayed == {'wq_DKGH', 'wk_DKH', 'wv_DKH', 'wo_KGHD', 'gate_DF', 'up_DF', 'down_FD',
                     'embed_VD', 'lm_head_DV'}
