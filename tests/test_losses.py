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


def test_sft_by_hand_on_three_tokens(mesh):
  # Row: bos, prompt token 1, response tokens 2 and 0. Column t of the logits predicts token t + 1.
  logits = jnp.log(jnp.asarray([[[.2, .5, .3], [.1, .2, .7], [.6, .3, .1], [.9, .05, .05]]]))
  row = packing.layout([Example('', [0, 1], ([2, 0],))])
  logps = vocab.logps(logits[:, jnp.asarray(row['at'])], jnp.eye(3), jnp.asarray([row['label']]))
  np.testing.assert_allclose(logps, [[math.log(.7), math.log(.6)]], rtol=1e-5)  # shifted, without the prompt
  assert float(losses.sft_loss(logps)) == pytest.approx(-math.log(.7) - math.log(.6), rel=1e-5)


def test_dpo_by_hand():
  # sums of log-probs: chosen -1 over reference -2, rejected -3 over reference -2.5; margin 0.1 * (1 + 0.5)
  loss, margin = losses.dpo_loss(jnp.asarray([[1., -.5]]), 0.1, 1.0)
  assert float(margin[0]) == pytest.approx(0.15)
  assert float(loss[0]) == pytest.approx(-math.log(1 / (1 + math.exp(-0.15))))


def test_swapping_chosen_and_rejected_flips_the_margin():
  ratios = jax.random.normal(jax.random.key(0), (7, 2))
  np.testing.assert_allclose(losses.dpo_loss(ratios, 0.1, 1.0)[1], -losses.dpo_loss(ratios[:, ::-1], 0.1, 1.0)[1])


def dpo(**changes):
  """The loss and metrics of one pair: log-probs -1 and -2 of the two tokens of the chosen response, -4 of the rejected
  one's; under the reference -2 and -5."""
  config = configs.dpo()
  config.update(dropout=0.0, **changes)
  batch = dict(response=jnp.asarray([[0, 0, 1]]), at=jnp.zeros((1, 3), jnp.int32), pair=jnp.asarray([[1]]),
               confidence=jnp.ones((1, 1)), reference=jnp.asarray([[[-2., -5.]]]))
  with unittest.mock.patch.object(train_step, 'logps', lambda *_: jnp.asarray([[-1., -2., -4.]])):
    loss, metrics = train_step._dpo(None, config, None, None, batch, None)
  return float(loss), {name: float(value) for name, value in metrics.items()}


def test_the_step_takes_sums_of_log_probs_and_the_reference_of_the_batch():
  loss, metrics = dpo(beta=0.5)
  assert metrics['margin'] == pytest.approx(0.5 * ((-3 + 2) - (-4 + 5)))  # a mean by token would give 0.5 * (-0.5 - 1)
  assert loss == pytest.approx(math.log(1 + math.exp(1)))
  assert (metrics['chosen_logp'], metrics['rejected_logp'], metrics['accuracy']) == (-3, -4, 0)
  assert metrics['chosen_reward'] == pytest.approx(-0.5) and metrics['rejected_reward'] == pytest.approx(0.5)


def test_nll_on_the_chosen_by_hand():
  # three nats over two tokens, weighed by 0.3
  assert dpo(beta=0.5, nll=0.3)[0] - dpo(beta=0.5)[0] == pytest.approx(0.3 * 3 / 2)


def test_length_normalised_by_hand():
  loss, metrics = dpo(beta=0.5, by_length=True)
  assert metrics['margin'] == pytest.approx(0.5 * ((-3 + 2) / 2 - (-4 + 5) / 1))
  assert loss == pytest.approx(math.log(1 + math.exp(0.75)))


def test_log_probs_are_summed_by_response_and_pair():
  batch = dict(response=jnp.asarray([[0, 0, 1, 2, 3, -1]]), pair=jnp.asarray([[1, 1, 0]]))
  sums = train_step.response_logps(jnp.asarray([[-1., -2., -4., -8., -16., 0.]]), batch)
  np.testing.assert_array_equal(sums, [[[-3, -4], [-8, -16], [0, 0]]])


def test_confidence_mixes_the_losses_of_both_orders():
  right, wrong = math.log(1 + math.exp(-0.15)), math.log(1 + math.exp(0.15))
  for confidence in (1.0, 0.75, 0.5, 0.0):
    loss, margin = losses.dpo_loss(jnp.asarray([[1., -.5]]), 0.1, jnp.asarray([confidence]))  # margin 0.15, as above
    assert float(loss[0]) == pytest.approx(confidence * right + (1 - confidence) * wrong)
    assert float(margin[0]) == pytest.approx(0.15)
