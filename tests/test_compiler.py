"""Compiler options: only for the platform that they are written for, and only those it knows."""
from conftest import make_mesh
import jax
import jax.numpy as jnp
import pytest

from srlm_jax import compiler

KNOWN = {'xla_cpu_enable_fast_math': False, 'xla_embed_ir_in_executable': True}


@pytest.fixture
def options(monkeypatch):
  """Sets the options of the training step on a CPU."""
  compiler._known.cache_clear()
  return lambda found: monkeypatch.setitem(compiler.OPTIONS, 'cpu', found)


def test_a_cpu_has_no_options():
  assert compiler.options(make_mesh(2, 2, 2)) is None


def test_known_options_are_passed_on_in_silence(options, capsys):
  options(KNOWN)
  found = compiler.options(make_mesh(2, 2, 2))
  assert found == KNOWN and not capsys.readouterr().out
  assert jax.jit(lambda x: x + 1, compiler_options=found)(jnp.ones(())) == 2


def test_an_unknown_option_is_left_out_and_reported(options, capsys):
  options({'xla_of_another_version': True, **KNOWN, 'xla_of_a_third': 1})
  assert compiler.options(make_mesh(2, 2, 2)) == KNOWN
  out = capsys.readouterr().out
  assert out.count('\n') == 2 and 'xla_of_another_version' in out and 'xla_of_a_third' in out
  assert compiler.options(make_mesh(2, 2, 2)) == KNOWN
  assert not capsys.readouterr().out  # once


def test_a_value_that_the_compiler_refuses_is_an_error(options):
  options({'xla_cpu_enable_fast_math': 'perhaps'})
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_cpu_enable_fast_math'):
    compiler.options(make_mesh(1, 1, 1))
