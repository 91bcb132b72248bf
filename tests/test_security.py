"""No program of the package unpickles a file, evaluates text or passes text to a shell."""
import ast
import pickle
import subprocess
import sys

from conftest import ROOT
import forks
import pytest

UNPICKLING = {'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}
EVALUATING = {'eval', 'exec', 'compile', '__import__'}
# Functions of other packages that read a pickle, make objects from YAML, or start a shell.
CALLS = {'torch.load', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'os.system', 'os.popen',
         'subprocess.getoutput', 'subprocess.getstatusoutput', 'runpy.run_path'}
FLAGS = {'allow_pickle', 'shell', 'trust_remote_code'}  # of which none may be anything but False


def found(code: str) -> list[str]:
  """The forbidden names in a Python file."""
  names = []
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      names += UNPICKLING & {alias.name.partition('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names += UNPICKLING & {(node.module or '').partition('.')[0]}
    elif isinstance(node, ast.Call):
      names += (EVALUATING | CALLS) & {ast.unparse(node.func)}
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
    'import os\nos.system(x)', 'AutoTokenizer.from_pretrained(f, trust_remote_code=yes)'])
def test_the_check_finds_what_it_looks_for(code):
  assert len(found(code)) == 1


def test_the_programs_of_the_tests_refuse_a_pickle_that_names_a_class():
  """The hook of forks.py, under which the other tests run the loop and every stage."""
  program = (f'import pickle, sys; sys.path.insert(0, {str(ROOT / "tests")!r}); import forks; '
             f'sys.addaudithook(forks.refuse_pickles); assert pickle.loads({pickle.dumps([1])!r}); '
             f'pickle.loads({pickle.dumps(forks.Server)!r})')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert done.returncode and '__main__ reads a pickle that names forks.Server' in done.stderr
