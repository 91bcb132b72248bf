import inspect
import json
import os
import subprocess
import sys

from conftest import ROOT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import environment


def draw():
  """Every kind of draw of the program: sampling, dropout, initial parameters, split and folded keys;
  and a sum and a product that mix dtypes and ranks."""
  key = jax.random.fold_in(jax.random.key(3), 1)
  mixed = jnp.ones((2, 3), jnp.bfloat16) * jnp.arange(3) + jnp.ones((), jnp.float32)
  drawn = [jax.random.bits(key, (4,)), jax.random.uniform(key, (3,)), jax.random.normal(key, (4,)),
           jax.random.categorical(key, jnp.zeros((8, 50))), jax.random.permutation(key, 9),
           jax.random.key_data(jax.random.split(key, 3)), mixed]
  return [np.asarray(x).tolist() for x in drawn]


PROGRAM = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from srlm_jax import environment, InputError
{inspect.getsource(draw)}
try:
  environment.pin()
except InputError as error:
  sys.exit(f'error: {{error}}')
print(draw())
"""


def pinned(**variables):
  """What another process draws after the pin."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
  return subprocess.run([sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True, text=True,
                        env=dict(kept, JAX_PLATFORMS='cpu', **variables))


@pytest.fixture
def options():
  """Restores the options after the test."""
  before = {name: getattr(jax.config, name) for name in environment.PINNED}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize('variables', [
    dict(JAX_DEFAULT_PRNG_IMPL='rbg'), dict(JAX_THREEFRY_PARTITIONABLE='0'),
    dict(JAX_THREEFRY_PARTITIONABLE='1', JAX_RANDOM_SEED_OFFSET='7', JAX_HIGH_DYNAMIC_RANGE_GUMBEL='1',
         JAX_NUMPY_DTYPE_PROMOTION='strict', JAX_NUMPY_RANK_PROMOTION='raise', JAX_ENABLE_X64='0')])
def test_no_variable_changes_a_random_number(variables):
  done = pinned(**variables)
  assert done.returncode == 0 and done.stdout == f'{draw()}\n', done.stderr  # here nothing is pinned


def test_64_bits_are_refused_in_one_sentence():
  done = pinned(JAX_ENABLE_X64='1')
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.count('\n') == 1 and 'unset JAX_ENABLE_X64' in done.stderr


@pytest.mark.parametrize('name, other', [
    ('jax_default_prng_impl', 'rbg'), ('jax_threefry_partitionable', False), ('jax_random_seed_offset', 7),
    ('jax_high_dynamic_range_gumbel', True), ('jax_numpy_dtype_promotion', 'strict'),
    ('jax_numpy_rank_promotion', 'raise')])
def test_every_pinned_option_changes_records_or_stops_the_program(name, other, options):
  expected = draw()
  jax.config.update(name, other)
  try:
    assert draw() != expected
  except (ValueError, jax.errors.JAXTypeError, TypeError) as error:  # of a promotion
    assert 'promotion' in str(error)
  environment.pin()
  assert draw() == expected


def test_the_pin_is_what_jax_does_by_default():
  assert {name: getattr(jax.config, name) for name in environment.PINNED} == environment.PINNED


def test_what_changes_rounding_alone_is_recorded(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
  found = environment.record()
  assert json.loads(json.dumps(found)) == found
  assert found['xla_flags'] == '--xla_cpu_enable_fast_math=false' and found['matmul_precision'] == 'default'
  assert (found['platform'], found['device_kind'], found['devices'], found['hosts']) == ('cpu', 'cpu', 8, 1)
  assert found['versions']['jax'] == jax.__version__ and {'python', 'jaxlib', 'numpy'} <= {*found['versions']}
  with jax.default_matmul_precision('float32'):
    assert environment.record()['matmul_precision'] == 'float32'


def test_a_package_that_is_absent_is_left_out(monkeypatch):
  monkeypatch.setattr(environment, 'PACKAGES', ('jax', 'no-such-package'))
  assert [*environment.record()['versions']] == ['python', 'jax']
