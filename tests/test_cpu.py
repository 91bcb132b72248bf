import ctypes
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import attend_decode, decode_inputs

from srlm_jax.models import attention, cpu, kernels
from srlm_jax.models.config import PRESETS

decode = functools.partial(cpu.decode, window=None)
CONFIG = dataclasses.replace(PRESETS['tiny-test'], H=16)
needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='there is no C++ compiler')


@needs_compiler
@pytest.mark.parametrize('K, G, H, S, W', [
    (2, 1, 64, 192, 33), (1, 8, 32, 70, 0), (8, 2, 128, 64, 1), (3, 4, 16, 100, 64)])
def test_decode_equals_attention_in_numpy(K, G, H, S, W):
  assert cpu.supports(CONFIG)
  length = jnp.array([1, 32, S, 33, S // 2, 0, 63, 64, 7])  # block boundaries; an idle row
  prefix_length = jnp.minimum(jnp.array([0, W, W // 3, 32, 31, W, W // 2, 1, W]), W)
  q, cache, prefix = decode_inputs(K, G, H, S, W, prefix_length, L=1)
  out = np.asarray(jax.jit(decode)(q, cache, jnp.int32(0), length, prefix))
  assert np.isfinite(out).all() and not out[5].any()
  busy = np.asarray(length) > 0
  wanted = attend_decode(q, cache, 0, length, prefix)
  np.testing.assert_allclose(out[busy], wanted[busy], atol=2e-6)


@needs_compiler
def test_large_scores_do_not_overflow():
  q, cache, prefix = decode_inputs(2, 2, 16, 64, 40, [40, 0, 20], L=1)
  q, length = 100 * q, jnp.array([1, 64, 40])
  out = jax.jit(decode)(q, cache, jnp.int32(0), length, prefix)
  np.testing.assert_allclose(out, attend_decode(q, cache, 0, length, prefix), atol=1e-4)


@needs_compiler
def test_a_row_does_not_depend_on_the_other_rows():
  """Bit by bit, whatever the rows of a task and the number of threads."""
  length = jnp.arange(3, 3 + 7 * 20, 7)
  q, cache, prefix = decode_inputs(2, 2, 16, 160, 40, jnp.arange(20) * 2, L=1)
  whole = np.asarray(decode(q, cache, 0, length, prefix))
  for rows in ([4], [17, 3, 11], list(range(19, -1, -1))):
    at = np.array(rows)
    some = attention.Cache(cache.k[:, at], cache.v[:, at])
    own = attention.Prefix(prefix.k, prefix.v, prefix.length[at])
    np.testing.assert_array_equal(decode(q[at], some, 0, length[at], own), whole[at])


@needs_compiler
def test_append_writes_one_key_per_row_in_place():
  _, cache, _ = decode_inputs(2, 1, 16, 40, 0, [0] * 4, L=1)
  k, v = jnp.full((4, 2, 16), 7.0), jnp.full((4, 2, 16), 8.0)
  position = jnp.array([0, 39, 40, 5])  # 40: an idle row
  wanted = attention.append(cache, k, v, 0, position)
  before = cache.k.unsafe_buffer_pointer()
  run = jax.jit(cpu.append, donate_argnums=0)
  made = run(cache, k, v, jnp.int32(0), position)
  np.testing.assert_array_equal(made.k, wanted.k)
  np.testing.assert_array_equal(made.v, wanted.v)
  assert made.k.unsafe_buffer_pointer() == before


@pytest.fixture
def flags(monkeypatch):
  """Flags with which the kernel compiles faster."""
  monkeypatch.setattr(cpu, 'FLAGS', ('-std=c++17', '-shared', '-fPIC', '-w', '-O0'))


def library(compiler='c++'):
  """The file of the loaded kernel."""
  return pathlib.Path(cpu._library(compiler)._name)


@needs_compiler
def test_the_kernel_is_compiled_once_into_the_cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  compiler = shutil.which('c++')
  made = library(compiler)
  before = made.stat().st_mtime_ns
  assert library(compiler) == made and made.stat().st_mtime_ns == before
  assert os.listdir(made.parent) == [made.name]


@needs_compiler
@pytest.mark.parametrize('damage', [b'', b'\x7fELF', None])
def test_a_damaged_library_is_compiled_again(tmp_path, monkeypatch, flags, damage):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  made = library()
  before = made.read_bytes()
  made.unlink()  # this process has loaded that file
  made.write_bytes(before[:len(before) // 2] if damage is None else damage)
  assert library() == made and made.read_bytes() == before


@needs_compiler
@pytest.mark.parametrize('fault', ['a file', 'no home', 'no programs'])
def test_without_a_cache_folder_the_library_is_compiled_elsewhere(tmp_path, monkeypatch, flags,
                                                                  fault):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'elsewhere'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file' if fault == 'a file' else
                                           tmp_path / 'cache'))
  if fault == 'no home':
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(cpu.pathlib.Path, 'home', mock.Mock(side_effect=RuntimeError('no home')))
  if fault == 'no programs':
    _refuse_programs_of(tmp_path / 'cache', monkeypatch)
  found = cpu._library('c++')
  assert all(hasattr(found, handler) for handler in cpu.HANDLERS.values())
  assert pathlib.Path(found._name).is_relative_to(tmp_path / 'elsewhere')
  assert not os.listdir(tmp_path / 'elsewhere')  # it was removed after it was loaded


def _refuse_programs_of(folder, monkeypatch):
  """Refuses to load programs from a folder, as a disk that is mounted with noexec does."""
  load = ctypes.CDLL

  def loaded(path):
    if pathlib.Path(path).is_relative_to(folder):
      raise OSError('failed to map segment from shared object')
    return load(path)
  monkeypatch.setattr(ctypes, 'CDLL', loaded)


@needs_compiler
def test_a_library_that_loads_from_no_folder_leaves_xla(tmp_path, monkeypatch, flags):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  _refuse_programs_of('/', monkeypatch)
  cpu._register.cache_clear()
  try:
    assert kernels.choose('cpu', CONFIG) is attention.CPU
  finally:
    cpu._register.cache_clear()


def test_a_compiler_that_fails_is_run_once(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  compiler, log = tmp_path / 'c++', tmp_path / 'log'
  compiler.write_text(f'#!/bin/sh\necho run >> {log}\nexit 1\n')
  compiler.chmod(0o755)
  assert cpu._library(str(compiler)) is None and log.read_text() == 'run\n'


@pytest.mark.parametrize('compiler', ['false', '/no/compiler', 'true'])
def test_without_a_compiler_the_sampler_uses_xla(tmp_path, monkeypatch, compiler):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('CXX', compiler)
  cpu._register.cache_clear()
  try:
    assert kernels.choose('cpu', CONFIG) is attention.CPU
    assert not list(tmp_path.rglob('*.so'))
  finally:
    cpu._register.cache_clear()


@pytest.mark.parametrize('changes', [dict(H=24), dict(dtype='bfloat16')])
def test_other_models_use_xla(changes):
  assert kernels.choose('cpu', dataclasses.replace(CONFIG, **changes)) is attention.CPU
