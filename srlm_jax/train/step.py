"""The jitted training step: loss, gradient accumulation over micro-batches, update."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from srlm_jax import compiler, sharding
from srlm_jax.models import llama, lora, packed
from srlm_jax.train import objectives
from srlm_jax.train.batch import Batch, CachedPairBatch, PairBatch
from srlm_jax.train.state import TrainState


def make(model, tx, config, state: TrainState):
  """-> step(state, frozen, batch, key) -> (state, metrics), compiled once.

  `config`: the `train` section. `state` (arrays, or shapes with shardings) gives the sharding of
  the result; the step donates its state. `frozen`: parameters that are not trained, in the dtype of
  activations: with LoRA the model that training starts from, else DPO's reference, or {} for a
  batch that does not need it. Metrics are means over the batch; those of pairs, over its pairs.
  """
  def step(state: TrainState, frozen, batch: Batch, key):
    with jax.named_scope('loss'):
      step_key = jax.random.fold_in(key, state.step)
      grad, metrics = gradient(model, config, state.params, frozen, batch, step_key)
    with jax.named_scope('update'):
      updates, opt_state = tx.update(grad, state.opt_state, state.params, key=step_key)
      params = optax.apply_updates(state.params, updates)
    if (share := metrics.get('pair_share')) is not None:
      metrics = {name: x if name in ('loss', 'pair_share') else x / jnp.maximum(share, 1e-9)
                 for name, x in metrics.items()}
    metrics = dict(metrics, grad_norm=optax.global_norm(grad))
    return TrainState(state.step + 1, params, opt_state), metrics

  out = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(out, None),
                 compiler_options=compiler.options(state.step.sharding.mesh))


def gradient(model, config, params, frozen, batch: Batch, key):
  """-> the gradient and the metrics of a batch.

  Every target or pair has the same weight, however micro-batches divide the batch.
  """
  weight = batch.weight()

  def mean(params, batch, key):
    loss, metrics = sums(model, config, params, frozen, batch, key)
    return loss / weight, jax.tree.map(lambda m: m / weight, dict(metrics, loss=loss))

  def one(batch, key):
    return jax.grad(mean, has_aux=True)(params, batch, key)

  if config.accumulate == 1:
    return one(batch, key)
  micro = jax.tree.map(lambda x: _split(x, config.accumulate), batch)
  keys = jax.random.split(key, config.accumulate)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                       jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), keys[0]))
  return jax.lax.scan(lambda total, inputs: (jax.tree.map(jnp.add, total, one(*inputs)), None),
                      zeros, (micro, keys))[0]


def _split(x, parts: int):
  """[B, ...] -> [parts, B / parts, ...], each part spread over the same chips as the whole."""
  x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  place = P(None, *sharding.spec('B'), *(None,) * (x.ndim - 2))
  return jax.lax.with_sharding_constraint(x, place)


def sums(model, config, params, frozen, batch: Batch, key):
  """-> the sum of losses over the targets or pairs of a batch, and the sums of metrics of pairs.

  The reference is the frozen model; with LoRA, that is the policy without this adapter.
  """
  loss_fn = objectives.find(config).loss
  if config.lora_rank:
    params = lora.join(frozen, params, config.lora_alpha / config.lora_rank)
  policy = token_logps(model, params, batch, key)
  if not isinstance(batch, PairBatch):
    return loss_fn(policy), {}
  policy = pair_logps(policy, batch)
  if isinstance(batch, CachedPairBatch):
    reference = batch.reference_logps
  else:
    reference = pair_logps(token_logps(model, frozen, batch, None), batch)
    reference = jax.lax.stop_gradient(reference)
  lengths = pair_logps(jnp.ones_like(batch.target_positions, jnp.float32), batch)
  loss, metrics = loss_fn(config, policy, reference, lengths, batch.soft_labels)
  found = jax.tree.map(lambda x: (x * batch.pair_mask).sum(), dict(metrics, loss=loss))
  return found.pop('loss'), found


def token_logps(model, params, batch: Batch, key):
  """-> [B, N] log-probs of the targets, 0 for padding; key None: without dropout."""
  params = {'params': llama.unroll(params) if model.kernels.unrolled else params}
  dropout = {'dropout': key} if key is not None and model.config.dropout > 0 else None
  hidden = model.apply(params, batch.tokens, batch.positions, packed.Packed(batch.segments()),
                       rngs=dropout, method='hidden')
  hidden = jnp.take_along_axis(hidden, batch.target_positions[..., None], 1)  # [B, N, D]
  found = model.apply(params, hidden, batch.targets, method='token_logps')
  return jnp.where(batch.response_ids >= 0, found, 0)


def pair_logps(token_logps, batch: PairBatch):
  """token_logps [B, N] -> [B, M, 2], their sums over chosen and rejected of every pair."""
  B, M = batch.pair_mask.shape
  own = jax.nn.one_hot(batch.response_ids, 2 * M, dtype=token_logps.dtype)
  return jnp.einsum('BN,BN...->B...', token_logps, own, precision='highest').reshape(B, M, 2)
