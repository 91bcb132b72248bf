"""What of the environment may change records: pins it, refuses it, or records it.

Pinned are JAX options that change which random numbers a key gives, and those that decide whether
the program runs at all: a record must depend on the config and the inputs, not on a variable in a
shell. Refused is 64-bit mode: it changes dtypes everywhere, so whoever sets it expects other
results, and to switch it off in silence would mislead them. Recorded, and never compared, is what
changes rounding alone: devices, library versions, compiler flags, matmul precision. A run must be
able to go on after an upgrade or on another machine.
"""
import importlib.metadata
import os
import platform

import jax

from srlm_jax import InputError

PINNED = dict(  # the defaults of jax 0.10
    jax_default_prng_impl='threefry2x32',  # rbg draws other numbers, by device kind
    jax_threefry_partitionable=True,       # the same numbers on every mesh; False draws other ones
    jax_random_seed_offset=0,              # is added to every seed
    jax_high_dynamic_range_gumbel=False,   # True draws other numbers in gumbel and categorical
    jax_numpy_dtype_promotion='standard',  # strict refuses what this program and Flax mix
    jax_numpy_rank_promotion='allow',      # raise refuses broadcasts of this program
)
PACKAGES = ('srlm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections',
            'numpy', 'sentencepiece', 'tokenizers', 'transformers')


def pin():
  """Sets the JAX options on which records depend; call it before the first array is made. Raises
  InputError in 64-bit mode."""
  if jax.config.jax_enable_x64:
    raise InputError('JAX runs in 64-bit mode, which changes the random numbers and the dtypes of '
                     'this program; unset JAX_ENABLE_X64')
  for option, value in PINNED.items():
    jax.config.update(option, value)


def record() -> dict:
  """What a manifest keeps of the environment, as JSON: for a reader, never to be compared. Starts
  the backend, so it comes after the hosts have joined. `devices` counts those of all hosts."""
  return dict(
      xla_flags=os.environ.get('XLA_FLAGS', ''),
      libtpu_init_args=os.environ.get('LIBTPU_INIT_ARGS', ''),
      matmul_precision=jax.config.jax_default_matmul_precision or 'default',
      platform=jax.default_backend(), device_kind=jax.devices()[0].device_kind,
      devices=jax.device_count(), hosts=jax.process_count(), versions=_versions())


def _versions() -> dict[str, str]:
  """Of Python and of those packages that are installed."""
  found = dict(python=platform.python_version())
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an optional one
      continue
  return found
