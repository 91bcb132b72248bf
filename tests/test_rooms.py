"""Imports go down: a room knows only the rooms below it."""
import ast
import subprocess
import sys

from conftest import ROOT
import pytest

PACKAGE = ROOT / 'srlm_jax'
ALL = {'models', 'data', 'train', 'sample', 'eval', 'sandbox'}
MAY = dict(models={'models', 'data'}, data={'data'}, train={'train', 'models', 'data'},
           sample={'sample', 'models', 'data'},
           eval={'eval', 'data'}, sandbox={'sandbox', 'data', 'models'})
BASE = dict(sharding=set(), metrics=set(), checkpoint={'models', 'data'}, stage={'data'}, report={'data'})


def imports(path):
  """Rooms and modules of the package that a file imports, at any depth."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'srlm_jax':
      parts = node.module.split('.')[1:]
      yield from parts[:1] or (alias.name for alias in node.names)
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split('.')[0] in ('jax', 'flax', 'optax'))


@pytest.mark.parametrize('room', MAY)
def test_a_room_imports_only_itself_and_rooms_below(room):
  for path in (PACKAGE / room).glob('*.py'):
    assert set(imports(path)) & ALL <= MAY[room], path


@pytest.mark.parametrize('module', BASE)
def test_what_every_room_stands_on_imports_no_room_above(module):
  assert set(imports(PACKAGE / f'{module}.py')) & (ALL | {'loop'}) <= BASE[module]


def test_data_never_imports_jax():
  modules = ['srlm_jax.data.' + p.stem for p in (PACKAGE / 'data').glob('*.py') if p.stem != '__init__']
  code = f'import sys, {", ".join(modules)}; sys.exit("jax" in sys.modules)'
  assert len(modules) > 6 and subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_every_module_has_a_test_of_its_own():
  tested = {p.stem.removeprefix('test_') for p in (ROOT / 'tests').glob('test_*.py')}
  elsewhere = dict(attention='llama', hf='convert', scores='pairs', generate='llama', losses='losses', state='step',
                   world='sandbox', people='sandbox', facts='sandbox', corpus='sandbox', audit='sandbox',
                   control='sandbox', results='report', oracle='loop', respond='loop', judge='loop', metrics='loop',
                   implicit='strategies', declared='stage', programs='engine', packed='step')
  for path in PACKAGE.rglob('*.py'):
    if not path.stem.startswith('__'):
      assert path.stem in tested or elsewhere.get(path.stem) in tested, path
