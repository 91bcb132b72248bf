"""Adam's moments in bfloat16, rounded stochastically.

Rounded to the nearest bfloat16, a moment m stays where it is if a step changes it by less than
2**-9 m: with b2 = 0.999 the second moment then never decays, and grows only for gradients of twice
its root. Rounded up with a probability equal to the fraction that truncation removes, its mean is
that of float32 (Zamirai et al. 2020, Revisiting BFloat16 Training, section 3).
"""
import zlib

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, which computes in float32 and stores both moments in bfloat16.

  Its update takes a `key` for the rounding, another one in every step. The draws depend on the key
  and on the names of the parameters, and not on the mesh.
  """
  adam = optax.scale_by_adam(b1, b2)

  def init(params):
    return _cast(adam.init(params), jnp.bfloat16)

  def update(updates, state, params=None, *, key, **_):
    updates, state = adam.update(updates, _cast(state, jnp.float32), params)
    bits = jax.tree_util.tree_map_with_path(lambda path, x: _draw(key, path, x), state.mu)
    return updates, state._replace(
        mu=jax.tree.map(round_stochastically, state.mu, bits),
        nu=jax.tree.map(lambda x, b: round_stochastically(x, b >> 16), state.nu, bits))

  return optax.GradientTransformationExtraArgs(init, update)


def round_stochastically(x, bits):
  """x in float32 -> bfloat16, one of its two neighbours; its expectation is x.

  `bits`: random uint32 of the same shape, whose low 16 are used. Zero, infinity, NaN and values of
  bfloat16 stay as they are.
  """
  raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
  rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isnan(x), jnp.nan, rounded)  # the sum of a NaN and the bits may overflow


def _draw(key, path, x):
  """-> 32 random bits per element, 16 for each of the moments."""
  name = jax.tree_util.keystr(path, simple=True, separator='.')
  return jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape, jnp.uint32)


def _cast(state: optax.ScaleByAdamState, dtype) -> optax.ScaleByAdamState:
  return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))
