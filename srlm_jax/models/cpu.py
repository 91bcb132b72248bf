"""Decode attention and cache append for CPUs: cpu_decode.cc, compiled on first use.

XLA runs decode attention on a CPU as thousands of tiny matrix products, at a fifth of the memory
bandwidth. This program reads each key once and has no other overhead. Without a C++ compiler the
sampler uses XLA, and the log names the kernels that it used.
"""
import atexit
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
  """Compiles and registers the program once per process; False if there is no compiler."""
  compiler = os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++')
  if not compiler:
    return False
  library = _library(compiler)
  if not library:
    return False
  found = ctypes.cdll.LoadLibrary(str(library))
  for name, handler in HANDLERS.items():
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, handler)), platform='cpu')
  return True


def _library(compiler: str) -> pathlib.Path | None:
  """The compiled program in the user's cache folder; None if it does not compile.

  A cache folder that is full or of another user changes nothing: the records must not depend on it.
  """
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  # -march=native: another processor needs another program.
  parts = SOURCE.read_text(), compiler, *FLAGS, jax.__version__, platform.machine(), _processor()
  name = hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
  path = cache / 'srlm_jax' / f'cpu_decode-{name}.so'
  try:
    if path.exists():
      return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      made = pathlib.Path(folder) / path.name
      _compile(compiler, made)
      made.replace(path)  # another process may make the same file
    return path
  except (OSError, subprocess.CalledProcessError):
    pass
  own = pathlib.Path(tempfile.mkdtemp(prefix='srlm_jax-'))
  atexit.register(shutil.rmtree, own, ignore_errors=True)
  try:
    _compile(compiler, own / path.name)
  except (OSError, subprocess.CalledProcessError):
    return None
  return own / path.name


def _compile(compiler: str, path):
  subprocess.run([compiler, *FLAGS, f'-I{jax.ffi.include_dir()}', str(SOURCE), '-o', str(path)],
                 check=True, capture_output=True)


def _processor() -> str:
  """The instruction sets of this processor, as far as the system tells."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line for line in lines if line.startswith(('flags', 'Features'))), '')
