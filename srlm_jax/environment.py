"""Settings of the environment that can change records: pinned, rejected or recorded.

Pinned: JAX options that change the random numbers of a key, or that make the program fail. A record
must depend on the config and the inputs, not on a shell variable.

Rejected: 64-bit mode. It changes dtypes everywhere, so a user who sets it expects other results;
switching it off silently would be misleading.

Recorded, never compared: what changes only rounding, such as devices, library versions, compiler
flags and matmul precision. A run must be able to resume after an upgrade or on another machine.
"""
import ctypes
import importlib.metadata
import os
import platform

import jax

from srlm_jax import InputError

PINNED = dict(  # the defaults of JAX 0.10
    jax_default_prng_impl='threefry2x32',  # rbg gives other numbers, which depend on the device
    jax_threefry_partitionable=True,       # the same numbers on every mesh; False gives others
    jax_random_seed_offset=0,              # added to every seed
    jax_high_dynamic_range_gumbel=False,   # True gives other numbers in gumbel and categorical
    jax_numpy_dtype_promotion='standard',  # strict fails where this program and Flax mix dtypes
    jax_numpy_rank_promotion='allow',      # raise fails where this program broadcasts
)
PACKAGES = ('srlm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections',
            'msgspec', 'numpy', 'safetensors', 'scipy', 'sentencepiece', 'tensorflow-datasets',
            'tensorstore', 'tokenizers', 'transformers')
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def pin():
  """Sets the JAX options that records depend on; call it before creating any array.

  Raises InputError in 64-bit mode.
  """
  if jax.config.jax_enable_x64:
    raise InputError('JAX runs in 64-bit mode, which changes the random numbers and the dtypes of '
                     'this program; unset JAX_ENABLE_X64')
  for option, value in PINNED.items():
    jax.config.update(option, value)
  jax.config.update('jax_cpu_enable_async_dispatch', False)  # needed by `keep_freed_memory`
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')  # of a GPU; by default 0.75


def keep_freed_memory():
  """On a CPU, lets this process keep the memory that it frees; call it before training.

  XLA takes the temporaries of a step anew at every step. glibc would return such large blocks to
  the kernel each time, and clearing their pages again takes an eighth of a step. It keeps large
  blocks of the main thread only, so JAX must run programs there: without asynchronous dispatch.
  """
  if jax.default_backend() == 'cpu' and platform.libc_ver()[0] == 'glibc':
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)


def record() -> dict:
  """The environment as JSON for a manifest: for readers, not for comparison.

  `devices` counts the devices of all hosts. Starts the JAX backend, so call it after `hosts.join`.
  """
  return dict(
      xla_flags=os.environ.get('XLA_FLAGS', ''),
      libtpu_init_args=os.environ.get('LIBTPU_INIT_ARGS', ''),
      matmul_precision=jax.config.jax_default_matmul_precision or 'default',
      **devices(), versions=_versions())


def devices() -> dict:
  """The devices of all hosts, as in `record`."""
  return dict(platform=jax.default_backend(), device_kind=jax.devices()[0].device_kind,
              devices=jax.device_count(), hosts=jax.process_count())


def _versions() -> dict[str, str]:
  """{name: version} of Python and the installed packages among PACKAGES."""
  found = dict(python=platform.python_version())
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an optional dependency
      continue
  return found
