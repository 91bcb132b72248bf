"""What training carries from step to step, and the optimizer that moves it."""
import flax
import jax
import jax.numpy as jnp
import optax

from srlm_jax import sharding
from srlm_jax.models import llama


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # [] steps taken
  params: dict     # float32
  opt_state: optax.OptState

  @classmethod
  def create(cls, params, tx):
    return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract(config, tx, mesh) -> TrainState:
  """The state of a model of this shape as shapes with their places on `mesh`, which must be set; without memory."""
  state = jax.eval_shape(lambda p: TrainState.create(p, tx), llama.abstract_params(config))
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state,
                      sharding.shardings(state, mesh))


def schedule(config, steps: int):
  """Learning rate by step: linear warm-up, then cosine from learning_rate to learning_rate_end (PAPER 3.1)."""
  peak, end = config.learning_rate, config.learning_rate_end
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if config.warmup else peak, peak_value=peak, warmup_steps=config.warmup,
      decay_steps=max(steps, config.warmup + 1), end_value=end)


def optimizer(config, steps: int) -> optax.GradientTransformation:
  """AdamW on the clipped gradient; weight decay on matrices alone."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip),
      optax.adamw(schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay,
                  mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params)))


def bytes_needed(params: int, reference: bool) -> int:
  """Parameters, gradients and two moments in float32; of a reference the parameters in bf16."""
  return params * (16 + 2 * reference)


def _is_matrix(path, _):
  return not path[-1].key.startswith(('scale_', 'b'))
