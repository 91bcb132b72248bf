"""Adam's moments in bfloat16: unbiased, never stuck, and the same on every mesh."""
import functools
import math

from conftest import make_mesh
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from srlm_jax.train import moments

B1, B2 = 0.9, 0.999
COUNT = 2**16  # parameters
CLOSE = 4.5    # standard errors; a normal variable is further from its mean once in 150,000


def float32(x):
  return np.asarray(x, np.float32)


@pytest.mark.parametrize('x', [1 / 3, -1 / 3, 1.0, 1.9999, 3e-39, 3e-20, 7e30, -2.0000002])
def test_the_expectation_of_a_rounded_value_is_the_value(x):
  """Over all draws that are possible, so without a statistical error."""
  values = jnp.full(2**16, x, jnp.float32)
  found = moments.round_stochastically(values, jnp.arange(2**16, dtype=jnp.uint32))
  found = np.asarray(found).astype(np.float64)
  assert found.mean() == np.float32(x)
  low, high = found.min(), found.max()
  ulp = 2.0**(max(math.frexp(abs(np.float32(x)))[1], -125) - 8)
  assert high - low in (0, ulp) and low <= np.float32(x) <= high


def test_zero_infinity_nan_and_values_of_bfloat16_stay_as_they_are():
  values = jnp.asarray([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 2.0**-126])
  nans = jnp.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], jnp.uint32)  # the last one is signalling
  values = jnp.concatenate([values, jax.lax.bitcast_convert_type(nans, jnp.float32)])
  for bits in (0, 1, 2**15, 2**16 - 1, 2**32 - 1):
    found = moments.round_stochastically(values, jnp.full(values.shape, bits, jnp.uint32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(float32(found), values)


def second_moments(tx, gradient: float, dtype=jnp.float32):
  """-> the second moments of COUNT parameters, 1 at first, after 1,000 steps with `gradient`."""
  tx = optax.with_extra_args_support(tx)
  grads = jnp.full(COUNT, gradient)
  state = tx.init(grads.astype(dtype))
  state = state._replace(nu=jnp.ones_like(state.nu))

  def one(i, state):
    return tx.update(grads, state, key=jax.random.fold_in(jax.random.key(0), i))[1]
  return float32(jax.jit(lambda state: jax.lax.fori_loop(0, 1000, one, state))(state).nu)


# With equal gradients g, after n steps nu is b2**n + (1 - b2**n) g**2.
@pytest.mark.parametrize('gradient', [0.0, 1.3])
def test_a_second_moment_decays_and_grows_where_nearest_rounding_is_stuck(gradient):
  wanted = B2**1000 + (1 - B2**1000) * gradient**2
  exact = second_moments(optax.scale_by_adam(B1, B2), gradient)
  np.testing.assert_allclose(exact, wanted, rtol=1e-4)
  plain = optax.scale_by_adam(B1, B2, mu_dtype=jnp.bfloat16)
  np.testing.assert_array_equal(second_moments(plain, gradient, jnp.bfloat16), 1.0)  # stuck
  found = second_moments(moments.scale_by_adam(B1, B2), gradient)
  error = found.std() / math.sqrt(COUNT)
  assert abs(found.mean() - wanted) < CLOSE * error
  assert found.std() < 0.1 * wanted  # the noise of one parameter


@functools.cache
def draws(steps=20):
  """Gradients of several steps, {name: [steps, 64, 1024]}, normal with another scale per row."""
  keys = jax.random.split(jax.random.key(1), 2)
  scale = jnp.logspace(-6, 2, 64)[:, None]
  return {name: scale * jax.random.normal(key, (steps, 64, 1024))
          for name, key in zip(('a', 'b'), keys, strict=True)}


def states(make, sharding=None):
  """-> mu and nu after `draws`, as arrays by name."""
  tx = optax.with_extra_args_support(make(B1, 0.95))

  def all_steps(grads):
    def one(state, inputs):
      i, grads = inputs
      return tx.update(grads, state, grads, key=jax.random.fold_in(jax.random.key(5), i))[1], None
    first = jax.tree.map(lambda g: g[0], grads)
    steps = jnp.arange(len(grads['a']))
    return jax.lax.scan(one, tx.init(first), (steps, grads))[0]
  grads = draws()
  if sharding:
    grads = jax.device_put(grads, sharding)
  state = jax.jit(all_steps)(grads)
  return {f'{kind} {name}': np.asarray(x) for kind, tree in (('mu', state.mu), ('nu', state.nu))
          for name, x in tree.items()}


def test_the_mean_of_both_moments_is_that_of_float32_and_their_errors_are_independent():
  exact, found = states(optax.scale_by_adam), states(moments.scale_by_adam)
  errors = {name: float32(found[name]) / exact[name] - 1 for name in exact}
  # An ulp is at most 2**-7 of a value, and errors of earlier steps decay.
  for name, error in errors.items():
    assert found[name].dtype == jnp.bfloat16 and np.abs(error[exact[name] != 0]).max() > 1e-3
    weight = np.abs(exact[name]) / np.abs(exact[name]).mean(1, keepdims=True)
    weighted = (error * weight).reshape(-1)
    assert abs(weighted.mean()) < CLOSE * weighted.std() / math.sqrt(weighted.size), name
  names = list(errors)
  signs = np.corrcoef([np.sign(errors[name]).reshape(-1) for name in names])
  others = signs[~np.eye(len(names), dtype=bool)]
  assert np.abs(others).max() < CLOSE / math.sqrt(64 * 1024)


@pytest.mark.parametrize('shape, dims', [
    ((8, 1, 1), P(None, None, 'data')), ((2, 2, 2), P(None, ('data', 'fsdp'), 'tensor'))])
def test_the_rounded_moments_are_the_same_on_every_mesh(shape, dims):
  mesh = make_mesh(*shape)
  wanted, found = states(moments.scale_by_adam), states(moments.scale_by_adam,
                                                        NamedSharding(mesh, dims))
  for name, x in wanted.items():
    np.testing.assert_array_equal(float32(x), float32(found[name]))
