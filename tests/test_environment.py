"""The environment: pinned JAX options, 64-bit mode, and the record in manifests."""
import inspect
import json
import os
import platform
import resource
import subprocess
import sys

from conftest import ROOT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import environment


def draw():
  """One sample of every random function that the program uses, and of mixed dtypes and ranks."""
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


def draw_pinned(**variables):
  """Runs `draw` after `environment.pin` in a process with these environment variables."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
  return subprocess.run([sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True, text=True,
                        env=dict(kept, JAX_PLATFORMS='cpu', **variables))


@pytest.fixture
def options():
  """Restores the JAX options after the test."""
  before = {name: getattr(jax.config, name) for name in environment.PINNED}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize('variables', [
    dict(JAX_DEFAULT_PRNG_IMPL='rbg'), dict(JAX_THREEFRY_PARTITIONABLE='0'),
    dict(JAX_THREEFRY_PARTITIONABLE='1', JAX_RANDOM_SEED_OFFSET='7',
         JAX_HIGH_DYNAMIC_RANGE_GUMBEL='1', JAX_NUMPY_DTYPE_PROMOTION='strict',
         JAX_NUMPY_RANK_PROMOTION='raise', JAX_ENABLE_X64='0')])
def test_environment_variables_do_not_change_random_numbers(variables):
  done = draw_pinned(**variables)
  # This process has the defaults of JAX: it has not called `pin`.
  assert done.returncode == 0 and done.stdout == f'{draw()}\n', done.stderr


def test_64_bit_mode_is_refused_in_one_line():
  done = draw_pinned(JAX_ENABLE_X64='1')
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.count('\n') == 1 and 'unset JAX_ENABLE_X64' in done.stderr


@pytest.mark.parametrize('name, other', [
    ('jax_default_prng_impl', 'rbg'), ('jax_threefry_partitionable', False),
    ('jax_random_seed_offset', 7), ('jax_high_dynamic_range_gumbel', True),
    ('jax_numpy_dtype_promotion', 'strict'), ('jax_numpy_rank_promotion', 'raise')])
def test_every_pinned_option_changes_results_or_raises(name, other, options):
  expected = draw()
  jax.config.update(name, other)
  try:
    assert draw() != expected
  except (ValueError, jax.errors.JAXTypeError, TypeError) as error:
    assert 'promotion' in str(error)
  environment.pin()
  assert draw() == expected


def test_the_pinned_values_are_the_defaults_of_jax():
  assert {name: getattr(jax.config, name) for name in environment.PINNED} == environment.PINNED


def test_settings_that_change_only_rounding_are_recorded(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
  found = environment.record()
  assert json.loads(json.dumps(found)) == found
  assert found['xla_flags'] == '--xla_cpu_enable_fast_math=false'
  assert found['matmul_precision'] == 'default'
  devices = [found[key] for key in ('platform', 'device_kind', 'devices', 'hosts')]
  assert devices == ['cpu', 'cpu', 8, 1]
  assert found['versions']['jax'] == jax.__version__
  assert {'python', 'jaxlib', 'numpy'} <= {*found['versions']}
  with jax.default_matmul_precision('float32'):
    assert environment.record()['matmul_precision'] == 'float32'


def test_a_package_that_is_not_installed_is_omitted(monkeypatch):
  monkeypatch.setattr(environment, 'PACKAGES', ('jax', 'no-such-package'))
  assert [*environment.record()['versions']] == ['python', 'jax']


REPEATED_STEPS = """
import resource
import jax, jax.numpy as jnp
from srlm_jax import environment
environment.pin()
if {keep}:
  environment.keep_freed_memory()
step = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), 0)[-1])  # at least 64 MiB of temporaries
x = step(jnp.full(4096, 1 / 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
  x = jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only for the allocator of glibc')
def test_repeated_steps_on_a_cpu_take_no_new_memory():
  def new_pages(keep: bool) -> int:
    done = subprocess.run([sys.executable, '-c', REPEATED_STEPS.format(keep=keep)], cwd=ROOT,
                          capture_output=True, text=True,
                          env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=''))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
  anew = new_pages(False)
  assert anew > 32 * 64 * 2**20 / resource.getpagesize() * 0.9
  assert new_pages(True) < anew / 4  # not 0: small blocks may split the kept memory in a few steps
