"""One jitted step: SFT or DPO loss, the gradient over micro-batches, the update."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from srlm_jax import sharding
from srlm_jax.models import llama, packed
from srlm_jax.train import losses
from srlm_jax.train.state import TrainState


def make(model, tx, config, state: TrainState):
  """-> step(state, reference, batch, key) -> (state, metrics), compiled once.

  `state` (arrays, or shapes with shardings) says where the result lives; it is donated. `reference`: DPO's
  parameters in the dtype of activations; {} for SFT, and where the batch holds its log-probs. `batch`: as
  `data.batches` makes it. Metrics are means over the whole batch.
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
  return (batch['response'] >= 0 if loss == 'sft' else batch['pair']).sum().astype(jnp.float32)


def _sft(model, config, params, reference, batch, key):
  """Sum of negative log-likelihoods over the response tokens."""
  return losses.sft_loss(logps(model, params, batch, key)), {}


def _dpo(model, config, params, reference, batch, key):
  """Sum of DPO losses over pairs; the reference's log-probs are in the batch, or computed in the same program."""
  policy = response_logps(logps(model, params, batch, key), batch)  # [B, pairs, 2]
  if 'reference' in batch:
    reference = batch['reference']
  else:
    reference = jax.lax.stop_gradient(response_logps(logps(model, reference, batch, None), batch))
  lengths = jnp.maximum(response_logps(jnp.ones_like(batch['at'], jnp.float32), batch), 1)
  ratios = (policy - reference) / (lengths if config.by_length else 1)
  reward = config.beta * ratios
  loss, margin = losses.dpo_loss(ratios, config.beta, batch['confidence'])
  if config.nll:
    loss += config.nll * losses.nll(policy[..., 0], lengths[..., 0])
  each = dict(loss=loss, margin=margin, accuracy=(margin > 0).astype(jnp.float32),
              chosen_logp=policy[..., 0], rejected_logp=policy[..., 1],
              chosen_reward=reward[..., 0], rejected_reward=reward[..., 1])
  sums = {name: (values * batch['pair']).sum() for name, values in each.items()}
  return sums.pop('loss'), sums


def logps(model, params, batch, key=None):
  """log p [B, R] of the tokens that the loss counts, 0 where there is none; dropout is on where there is a key."""
  dropout = key is not None and model.config.dropout > 0
  params = llama.unroll(params) if model.kernels.unrolled else params
  found, _ = model.apply({'params': params}, batch['tokens'], batch['positions'],
                         view=packed.Packed(batch['segments'], batch.get('shared')),
                         targets=(batch['at'], batch['label']), rngs={'dropout': key} if dropout else None)
  return jnp.where(batch['response'] >= 0, found, 0)


def response_logps(logps, batch):
  """log p of the tokens [B, R] -> their sums over the responses of every pair, [B, pairs, 2]."""
  B, pairs = batch['pair'].shape
  own = jax.nn.one_hot(batch['response'], 2 * pairs, dtype=logps.dtype)
  return jnp.einsum('BR,BRN->BN', logps, own, precision='highest').reshape(B, pairs, 2)
