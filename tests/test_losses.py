import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data import batches
from srlm_jax.data.examples import Example
from srlm_jax.models import vocab
from srlm_jax.train import losses, step as train_step


def test_sft_by_hand_on_three_tokens(mesh):
  # Row: bos, prompt token 1, response tokens 2 and 0. Column t of the logits predicts token t + 1.
  logits = jnp.log(jnp.asarray([[[.2, .5, .3], [.1, .2, .7], [.6, .3, .1], [.9, .05, .05]]]))
  row = batches.layout([Example('', [0, 1], ([2, 0],))])
  logps = vocab.logps(logits[:, jnp.asarray(row['at'])], jnp.eye(3), jnp.asarray([row['label']]))
  np.testing.assert_allclose(logps, [[math.log(.7), math.log(.6)]], rtol=1e-5)  # shifted, without the prompt
  assert float(losses.sft_loss(logps)) == pytest.approx(-math.log(.7) - math.log(.6), rel=1e-5)


def test_dpo_by_hand():
  # sums of log-probs: chosen -1 over reference -2, rejected -3 over reference -2.5; margin 0.1 * (1 + 0.5)
  loss, margin = losses.dpo_loss(*(jnp.asarray([x]) for x in (-1., -3., -2., -2.5)), 0.1, 1.0)
  assert float(margin[0]) == pytest.approx(0.15)
  assert float(loss[0]) == pytest.approx(-math.log(1 / (1 + math.exp(-0.15))))


def test_equal_models_give_ln_2_and_margin_0():
  logps = jnp.asarray([-3., -40.])
  loss, margin = losses.dpo_loss(logps, logps - 5, logps, logps - 5, 0.1, 1.0)
  np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
  np.testing.assert_array_equal(margin, 0)


def test_swapping_chosen_and_rejected_flips_the_margin():
  a, b, c, d = jax.random.normal(jax.random.key(0), (4, 7))
  np.testing.assert_allclose(losses.dpo_loss(a, b, c, d, 0.1, 1.0)[1], -losses.dpo_loss(b, a, d, c, 0.1, 1.0)[1])


def test_dpo_takes_sums_not_means():
  """Two tokens of log-prob -1 each weigh twice one of -1."""
  one, two = (losses.dpo_loss(jnp.asarray([x]), *(jnp.zeros(1),) * 3, 1.0, 1.0)[1] for x in (-1., -2.))
  assert float(two[0]) == 2 * float(one[0])


def test_log_probs_are_summed_by_response_and_pair():
  batch = dict(response=jnp.asarray([[0, 0, 1, 2, 3, -1]]), pair=jnp.asarray([[1, 1, 0]]))
  sums = train_step.response_logps(jnp.asarray([[-1., -2., -4., -8., -16., 0.]]), batch)
  np.testing.assert_array_equal(sums, [[[-3, -4], [-8, -16], [0, 0]]])


def test_confidence_mixes_the_losses_of_both_orders():
  sums = [jnp.asarray([x]) for x in (-1., -3., -2., -2.5)]  # margin 0.15, as above
  right, wrong = math.log(1 + math.exp(-0.15)), math.log(1 + math.exp(0.15))
  for confidence in (1.0, 0.75, 0.5, 0.0):
    loss, margin = losses.dpo_loss(*sums, 0.1, jnp.asarray([confidence]))
    assert float(loss[0]) == pytest.approx(confidence * right + (1 - confidence) * wrong)
    assert float(margin[0]) == pytest.approx(0.15)
