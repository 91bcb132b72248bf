"""Decode attention and cache append for CPUs: cpu_decode.cc, compiled on first use.

XLA runs decode attention on a CPU as thousands of tiny matrix products, at a fifth of the memory
bandwidth. This program reads each key once and has no other overhead. Without a C++ compiler the
sampler uses XLA, and the log names the kernels that it used.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.models.attention import Cache, Prefix
from srlm_jax.models.config import Config

SOURCE = pathlib.Path(__file__).with_name('cpu_decode.cc')
HANDLERS = dict(srlm_cpu_decode='SrlmCpuDecode', srlm_cpu_append='SrlmCpuAppend')
SECONDS = 600  # most that the compiler may take; it takes 5
FLAGS = ('-std=c++17', '-O3', '-march=native', '-shared', '-fPIC', '-w')
WIDTHS = 16, 32, 64, 128  # of a head


def supports(config: Config) -> bool:
  """Whether the kernel runs this model here: float32, a head width of WIDTHS, a C++ compiler."""
  return config.dtype == 'float32' and config.H in WIDTHS and _register()


def decode(q, cache: Cache, layer, length, prefix: Prefix, *, window: int | None):
  """As `attention.decode`, for a cache of one layer."""
  del layer  # the cache and the prefix have one layer
  call = jax.ffi.ffi_call('srlm_cpu_decode', jax.ShapeDtypeStruct(q.shape, jnp.float32))
  most = np.iinfo(np.int32).max if window is None else window
  return call(q, cache.k, cache.v, length, prefix.k[0], prefix.v[0], prefix.length,
              window=np.int64(most))


def append(cache: Cache, k, v, layer, position) -> Cache:
  """As `attention.append`, for a cache of one layer."""
  del layer
  shape = jax.ShapeDtypeStruct(cache.k.shape, jnp.float32)
  call = jax.ffi.ffi_call('srlm_cpu_append', (shape, shape), input_output_aliases={0: 0, 1: 1})
  return Cache(*call(cache.k, cache.v, k, v, position))


@functools.cache
def _register() -> bool:
  """Compiles and registers the program once per process.

  False if there is no compiler, or no folder from which a program may be loaded.
  """
  compiler = os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++')
  if not compiler:
    return False
  library = _library(compiler)
  if not library:
    return False
  for name, handler in HANDLERS.items():
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, handler)), platform='cpu')
  return True


def _library(compiler: str) -> ctypes.CDLL | None:
  """The compiled program, loaded; None if it does not compile, or loads from no folder.

  A cache folder that is full, of another user, or on a disk from which no program may be loaded
  changes nothing: the records must not depend on it.
  """
  # -march=native: another processor needs another program.
  parts = SOURCE.read_text(), compiler, *FLAGS, jax.__version__, platform.machine(), _processor()
  name = 'cpu_decode-' + _hash('\0'.join(parts).encode())
  try:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
      return ctypes.CDLL(str(_cached(compiler, name)))
    with tempfile.TemporaryDirectory(prefix='srlm_jax-') as folder:  # a loaded program stays loaded
      return ctypes.CDLL(str(_compile(compiler, pathlib.Path(folder), name)))
  except (OSError, subprocess.SubprocessError):
    return None


def _cached(compiler: str, name: str) -> pathlib.Path:
  """The compiled program in the user's cache folder, NAME-HASH.so.

  A damaged program, which would end the process, does not have its hash, and is compiled again.
  """
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  folder = cache / 'srlm_jax'
  for path in folder.glob(f'{name}-*.so'):
    if path.name == f'{name}-{_hash(path.read_bytes())}.so':
      return path
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    made = _compile(compiler, pathlib.Path(temporary), name)
    return made.replace(folder / made.name)  # another process may make the same file


def _compile(compiler: str, folder: pathlib.Path, name: str) -> pathlib.Path:
  """Compiles the program -> FOLDER/NAME-HASH.so."""
  made = folder / f'{name}.so'
  subprocess.run([compiler, *FLAGS, f'-I{jax.ffi.include_dir()}', str(SOURCE), '-o', str(made)],
                 check=True, capture_output=True, timeout=SECONDS)
  return made.replace(folder / f'{name}-{_hash(made.read_bytes())}.so')


def _hash(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
  """The instruction sets of this processor, as far as the system tells."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line for line in lines if line.startswith(('flags', 'Features'))), '')
