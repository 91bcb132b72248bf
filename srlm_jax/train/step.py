"""One jitted step: SFT or DPO loss, the gradient over micro-batches, the update."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from srlm_jax import sharding
from srlm_jax.models import llama
from srlm_jax.train import losses
from srlm_jax.train.state import TrainState


def make(model, tx, config, state: TrainState):
  """-> step(state, reference, batch, key) -> (state, metrics), compiled once.

  `state` (arrays, or shapes with shardings) says where the result lives; it is donated. `reference`: DPO's
  parameters in the dtype of activations, {} for SFT. batch: tokens and loss_mask, [B, T] for SFT, [B, 2, T]
  (chosen, rejected) for DPO, which has confidence [B] too. Metrics are means over the whole batch.
  """
  loss_fn = {'sft': _sft, 'dpo': _dpo}[config.loss]

  def step(state: TrainState, reference, batch, key):
    with jax.named_scope('loss'):
      grad, metrics = _gradient(loss_fn, model, config, state.params, reference, batch,
                                jax.random.fold_in(key, state.step))
    with jax.named_scope('update'):
      updates, opt_state = tx.update(grad, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), dict(metrics, grad_norm=optax.global_norm(grad))

  places = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def _gradient(loss_fn, model, config, params, reference, batch, key):
  """The gradient and metrics of a batch; every example weighs the same, however micro-batches cut it."""
  weight = _weight(batch, config.loss)

  def mean(params, batch, key):
    loss, metrics = loss_fn(model, config, params, reference, batch, key)
    return loss / weight, jax.tree.map(lambda m: m / weight, dict(metrics, loss=loss))

  def one(batch, key):
    grad, metrics = jax.grad(mean, has_aux=True)(params, batch, key)
    return grad, metrics

  if config.accumulate == 1:
    return one(batch, key)
  micro = jax.tree.map(lambda x: _cut(x, config.accumulate), batch)
  keys = jax.random.split(key, config.accumulate)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                       jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), keys[0]))
  return jax.lax.scan(lambda total, inputs: (jax.tree.map(jnp.add, total, one(*inputs)), None),
                      zeros, (micro, keys))[0]


def _cut(x, parts: int):
  """[B, ...] -> [parts, B / parts, ...], each part spread over the same chips as the whole."""
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(x, P(None, *sharding.spec('B'), *(None,) * (x.ndim - 2)))


def _weight(batch, loss: str):
  """What the sums of a batch are divided by: response tokens (SFT) or pairs (DPO)."""
  mask = batch['loss_mask']
  return mask[:, 1:].sum().astype(jnp.float32) if loss == 'sft' else jnp.float32(mask.shape[0])


def _sft(model, config, params, reference, batch, key):
  """Sum of negative log-likelihoods over the response tokens of batch [B, T]."""
  logps = _logps(model, params, batch['tokens'], batch['loss_mask'], key)
  return losses.sft_loss(logps), {}


def _dpo(model, config, params, reference, batch, key):
  """Sum of DPO losses over pairs [B, 2, T], policy and reference in one program."""
  tokens, mask = (batch[k].reshape(-1, batch[k].shape[-1]) for k in ('tokens', 'loss_mask'))  # [2B, T]
  policy = _logps(model, params, tokens, mask, key).sum(-1).reshape(-1, 2)  # [B, 2]
  reference = jax.lax.stop_gradient(_logps(model, reference, tokens, mask, None)).sum(-1).reshape(-1, 2)
  loss, margin = losses.dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], config.beta,
                                 batch['confidence'])
  metrics = dict(margin=margin.sum(), accuracy=(margin > 0).sum().astype(jnp.float32),
                 chosen_logp=policy[:, 0].sum(), rejected_logp=policy[:, 1].sum(),
                 chosen_reward=config.beta * (policy[:, 0] - reference[:, 0]).sum(),
                 rejected_reward=config.beta * (policy[:, 1] - reference[:, 1]).sum())
  return loss.sum(), metrics


def _logps(model, params, tokens, mask, key):
  """Token log-probs [B, T]; dropout is on where there is a key."""
  dropout = key is not None and model.config.dropout > 0
  params = llama.unroll(params) if model.kernels.unrolled else params
  logits, _ = model.apply({'params': params}, tokens, rngs={'dropout': key} if dropout else None)
  return losses.token_logps(logits, tokens, mask)
