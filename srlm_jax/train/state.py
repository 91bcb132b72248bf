"""The training state, and its optimizer."""
import flax
import jax
import jax.numpy as jnp
import optax

from srlm_jax import config as configs, sharding
from srlm_jax.models import llama, lora
from srlm_jax.train import moments


@flax.struct.dataclass
class TrainState:
  """What training carries from step to step, and a checkpoint stores."""
  step: jax.Array  # [] steps taken
  params: dict     # float32; with LoRA the adapter alone
  opt_state: optax.OptState

  @classmethod
  def create(cls, params, tx):
    """The state at step 0."""
    return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract(shape, config, tx, mesh) -> TrainState:
  """The shapes and shardings of a model's state on `mesh`, which must be set; without memory.

  `shape`: the model's config; `config`: the `train` section.
  """
  params = (lora.shapes(shape, config.lora_rank, configs.lora_targets(config))
            if config.lora_rank else llama.abstract_params(shape))
  state = jax.eval_shape(lambda p: TrainState.create(p, tx), params)
  def one(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(one, state, sharding.shardings(state, mesh))


def schedule(config, steps: int):
  """Learning rate by step: linear warmup, then a cosine to learning_rate_end (paper, 3.1)."""
  peak, end = config.learning_rate, config.learning_rate_end
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if config.warmup else peak, peak_value=peak, warmup_steps=config.warmup,
      decay_steps=max(steps, config.warmup + 1), end_value=end)


def optimizer(config, steps: int) -> optax.GradientTransformation:
  """AdamW with gradient clipping; weight decay on matrices only. Its update takes a `key`."""
  def matrices(params):
    return jax.tree_util.tree_map_with_path(_is_matrix, params)
  adam = dict(float32=optax.scale_by_adam, bfloat16=moments.scale_by_adam)[config.moments]
  return optax.chain(
      optax.clip_by_global_norm(config.max_grad_norm),
      optax.chain(adam(config.b1, config.b2),
                  optax.add_decayed_weights(config.weight_decay, matrices),
                  optax.scale_by_learning_rate(schedule(config, steps))))


def bytes_needed(trained: int, moments: str, frozen: int) -> int:
  """Bytes of parameters and gradients in float32, two moments, and frozen ones in bfloat16."""
  return trained * (8 + 2 * jnp.dtype(moments).itemsize) + 2 * frozen


def _is_matrix(path, _):
  return not path[-1].key.startswith(('scale_', 'b'))
