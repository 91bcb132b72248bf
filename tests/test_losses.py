import math
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import config as configs
from srlm_jax.data import packing
from srlm_jax.data.examples import Example
from srlm_jax.models import vocab
from srlm_jax.train import losses, step as train_step
from srlm_jax.train.batch import CachedPairBatch


def test_sft_by_hand_on_three_tokens(mesh):
  # Row: bos, prompt token 1, response tokens 2 and 0. Column t of the logits predicts token t + 1.
  logits = jnp.log(jnp.asarray([[[.2, .5, .3], [.1, .2, .7], [.6, .3, .1], [.9, .05, .05]]]))
  row = packing.layout([Example('', [0, 1], ([2, 0],))])
  logps = vocab.target_logps(logits[:, row.target_positions], jnp.eye(3), row.targets[None])
  np.testing.assert_allclose(logps, [[math.log(.7), math.log(.6)]], rtol=1e-5)
  assert float(losses.sft_loss(logps)) == pytest.approx(-math.log(.7) - math.log(.6), rel=1e-5)


def test_dpo_by_hand():
  # log-probs: chosen -1, reference -2; rejected -3, reference -2.5; margin 0.1 * (1 + 0.5)
  loss, margin = losses.dpo_loss(jnp.asarray([[1., -.5]]), 0.1, 1.0)
  assert float(margin[0]) == pytest.approx(0.15)
  assert float(loss[0]) == pytest.approx(-math.log(1 / (1 + math.exp(-0.15))))


def test_swapping_chosen_and_rejected_flips_the_margin():
  ratios = jax.random.normal(jax.random.key(0), (7, 2))
  np.testing.assert_allclose(losses.dpo_loss(ratios, 0.1, 1.0)[1],
                             -losses.dpo_loss(ratios[:, ::-1], 0.1, 1.0)[1])


def pair_batch(response_ids, pair_mask, reference_logps=None):
  """A batch of which only response ids, pairs and reference are used."""
  N, M = len(response_ids), len(pair_mask)
  tokens, targets = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, N), jnp.int32)
  reference_logps = jnp.zeros((1, M, 2)) if reference_logps is None else reference_logps
  return CachedPairBatch(
      tokens=tokens, positions=tokens, segment_ids=tokens, target_positions=targets,
      targets=targets, response_ids=jnp.asarray([response_ids]), second_segment=tokens,
      pair_mask=jnp.asarray([pair_mask]), soft_labels=jnp.ones((1, M)),
      reference_logps=reference_logps)


def dpo(**changes):
  """Loss and metrics of one pair.

  The log-probs are -1 and -2 of the two tokens of chosen and -4 of the one token of rejected. Under
  the reference, they are -2 and -5.
  """
  config = configs.dpo()
  config.update(dropout=0.0, **changes)
  batch = pair_batch([0, 0, 1], [1], jnp.asarray([[[-2., -5.]]]))
  with unittest.mock.patch.object(
      train_step, 'token_logps', lambda *_: jnp.asarray([[-1., -2., -4.]])):
    loss, metrics = train_step.sums(None, config, None, {}, batch, None)
  return float(loss), {name: float(value) for name, value in metrics.items()}


def test_the_loss_uses_sums_of_log_probs_and_the_cached_reference():
  loss, metrics = dpo(beta=0.5)
  # means over tokens would give a margin of 0.5 * (-0.5 - 1)
  assert metrics['margin'] == pytest.approx(0.5 * ((-3 + 2) - (-4 + 5)))
  assert loss == pytest.approx(math.log(1 + math.exp(1)))
  assert (metrics['chosen_logp'], metrics['rejected_logp'], metrics['accuracy']) == (-3, -4, 0)
  assert metrics['chosen_reward'] == pytest.approx(-0.5)
  assert metrics['rejected_reward'] == pytest.approx(0.5)


def test_a_demonstration_among_pairs_has_the_loss_of_sft():
  config = configs.dpo()
  config.update(beta=0.1, sft_weight=2.0, data=('pairs', 'eft'))
  policy, reference = jnp.array([[-3.0, -4.0], [-6.0, 0.0]]), jnp.array([[-3.5, -3.0], [-9., 0.]])
  loss, metrics = losses.dpo(config, policy, reference, jnp.array([[3.0, 2.0], [4.0, 0.0]]),
                             jnp.ones(2))
  config.data = ('pairs',)
  pair, alone = losses.dpo(config, policy[:1], reference[:1], jnp.array([[3.0, 2.0]]), jnp.ones(1))
  np.testing.assert_allclose(loss, [pair[0], 2.0 * 6.0 / 4.0], rtol=1e-6)
  assert metrics.keys() - alone.keys() == {'pair_share'}
  assert metrics['pair_share'].tolist() == [1, 0]
  for name, values in alone.items():
    assert metrics[name].tolist() == [values[0], 0]


def test_nll_of_chosen_by_hand():
  # 3 nats over 2 tokens, with weight 0.3
  assert dpo(beta=0.5, nll_weight=0.3)[0] - dpo(beta=0.5)[0] == pytest.approx(0.3 * 3 / 2)


def test_length_normalized_dpo_by_hand():
  loss, metrics = dpo(beta=0.5, length_normalize=True)
  assert metrics['margin'] == pytest.approx(0.5 * ((-3 + 2) / 2 - (-4 + 5) / 1))
  assert loss == pytest.approx(math.log(1 + math.exp(0.75)))


def test_log_probs_are_summed_by_response_and_pair():
  batch = pair_batch([0, 0, 1, 2, 3, -1], [1, 1, 0])
  sums = train_step.pair_logps(jnp.asarray([[-1., -2., -4., -8., -16., 0.]]), batch)
  np.testing.assert_array_equal(sums, [[[-3, -4], [-8, -16], [0, 0]]])


def test_a_soft_label_weights_the_losses_of_both_orders():
  right, wrong = math.log(1 + math.exp(-0.15)), math.log(1 + math.exp(0.15))
  for label in (1.0, 0.75, 0.5, 0.0):
    # the margin is 0.15, as above
    loss, margin = losses.dpo_loss(jnp.asarray([[1., -.5]]), 0.1, jnp.asarray([label]))
    assert float(loss[0]) == pytest.approx(label * right + (1 - label) * wrong)
    assert float(margin[0]) == pytest.approx(0.15)
