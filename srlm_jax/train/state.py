"""The training state, and its optimizer."""
import flax
import jax
import jax.numpy as jnp
import optax

from srlm_jax import sharding
from srlm_jax.models import llama


@flax.struct.dataclass
class TrainState:
  """What training carries from step to step, and a checkpoint stores."""
  step: jax.Array  # [] steps taken
  params: dict     # float32
  opt_state: optax.OptState

  @classmethod
  def create(cls, params, tx):
    """The state at step 0."""
    return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract(config, tx, mesh) -> TrainState:
  """The shapes and shardings of a model's state on `mesh`, which must be set; without memory."""
  state = jax.eval_shape(lambda p: TrainState.create(p, tx), llama.abstract_params(config))
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
  """AdamW with gradient clipping; weight decay on matrices only."""
  def matrices(params):
    return jax.tree_util.tree_map_with_path(_is_matrix, params)
  return optax.chain(
      optax.clip_by_global_norm(config.max_grad_norm),
      optax.adamw(schedule(config, steps), b1=config.b1, b2=config.b2,
                  weight_decay=config.weight_decay, mask=matrices))


def bytes_needed(params: int, reference: bool) -> int:
  """Bytes of parameters, gradients and two moments in float32, and of a reference in bfloat16."""
  return params * (18 if reference else 16)


def _is_matrix(path, _):
  return not path[-1].key.startswith(('scale_', 'b'))
