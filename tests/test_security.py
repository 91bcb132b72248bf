"""No program of the package unpickles a file, evaluates text or passes text to a shell."""
import ast
import pickle
import subprocess
import sys

from conftest import ROOT
import forks
import pytest

UNPICKLING = {'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'jsonpickle',
              'marshal', 'shelve'}
EVALUATING = {'eval', 'exec', 'compile', '__import__', '__builtins__'}
# Functions of other packages that read a pickle, make objects from YAML, evaluate text, or start a
# shell.
FUNCTIONS = {
    'torch.load', 'torch.serialization.load', 'torch.hub.load', 'pandas.read_pickle', 'pandas.eval',
    *(f'yaml.{kind}load{which}' for kind in ('', 'unsafe_', 'full_') for which in ('', '_all')),
    'os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput',
    'asyncio.create_subprocess_shell', 'asyncio.subprocess.create_subprocess_shell',
    'runpy.run_path', 'timeit.timeit', 'timeit.repeat', 'logging.config.fileConfig'}
FLAGS = {'allow_pickle', 'shell', 'trust_remote_code'}  # of which none may be anything but False


def found(code: str) -> list[str]:
  """The forbidden names in a Python file, however they were imported."""
  names, imported, tree = [], {}, ast.parse(code)  # imported: {a name in the file: its full name}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        package = alias.name.partition('.')[0]
        imported[alias.asname or package] = alias.name if alias.asname else package
        names += UNPICKLING & {package}
    elif isinstance(node, ast.ImportFrom):
      names += UNPICKLING & {(node.module or '').partition('.')[0]}
      imported |= {alias.asname or alias.name: f'{node.module}.{alias.name}'
                   for alias in node.names}
  for node in ast.walk(tree):
    if isinstance(node, ast.Name | ast.Attribute):
      first, dot, rest = ast.unparse(node).partition('.')
      name = imported.get(first, first) + dot + rest
      names += (EVALUATING | FUNCTIONS) & {name.removeprefix('builtins.')}
    elif isinstance(node, ast.Call):
      names += [flag.arg for flag in node.keywords if flag.arg in FLAGS
                and not (isinstance(flag.value, ast.Constant) and flag.value.value is False)]
  return names


def test_the_code_reads_no_pickle_evaluates_no_text_and_starts_no_shell():
  files = [file for folder in ('srlm_jax', 'bench', 'configs', 'launch')
           for file in (ROOT / folder).rglob('*.py')]
  assert len(files) > 100
  assert not {file.name: names for file in files if (names := found(file.read_text()))}


@pytest.mark.parametrize('code', [
    'import pickle', 'from joblib import load', 'import dill as d', 'eval(x)', 'f(exec(x))',
    'np.load(f, allow_pickle=True)', 'np.load(f, allow_pickle=p)', 'subprocess.run(a, shell=True)',
    'import os\nos.system(x)', 'AutoTokenizer.from_pretrained(f, trust_remote_code=yes)',
    'from os import system\nsystem(x)', 'from os import popen as p\np(x)',
    'import os as o\no.system(x)', 'import os.path\nrun = os.system', 'import torch\ntorch.load(f)',
    'from torch import load\nload(f)', 'import pandas as pd\npd.read_pickle(f)',
    'import builtins\nbuiltins.eval(x)', 'from builtins import exec as e\ne(x)',
    'import yaml\nyaml.full_load_all(f)',
    'import asyncio\nasyncio.create_subprocess_shell(x)',
    'from asyncio import subprocess as s\ns.create_subprocess_shell(x)'])
def test_the_check_finds_what_it_looks_for(code):
  assert len(found(code)) == 1


@pytest.mark.parametrize('code', [
    'import re\nre.compile(x)', 'model.eval()', 'from json import load\nload(f)', 'load(f)',
    'import yaml\nyaml.safe_load(f)', 'np.load(f, allow_pickle=False)',
    'import os\nos.path.join(a)'])
def test_the_check_finds_nothing_else(code):
  assert not found(code)


def test_the_programs_of_the_tests_refuse_a_pickle_that_names_a_class():
  """The hook of forks.py, under which the other tests run the loop and every stage."""
  program = (f'import pickle, sys; sys.path.insert(0, {str(ROOT / "tests")!r}); import forks; '
             f'sys.addaudithook(forks.refuse_pickles); assert pickle.loads({pickle.dumps([1])!r}); '
             f'pickle.loads({pickle.dumps(forks.Server)!r})')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert done.returncode and '__main__ reads a pickle that names forks.Server' in done.stderr
