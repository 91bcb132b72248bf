"""A model's folder is data: Python in it never runs, whatever the user answers."""
import ast
import json
import subprocess
import sys

from conftest import ROOT
import pytest
from test_convert import make, TIED
from test_tokenizer import byte_level, save

MINE = 'open({!r}, "w").write("ran")\nclass Mine:\n  pass\n'
AUTO_MAP = dict(AutoConfig='mine.Mine', AutoTokenizer=['mine.Mine', 'mine.Mine'],
                AutoModelForCausalLM='mine.Mine')
PROGRAM = """
import sys
from srlm_jax import InputError
from srlm_jax.data import tokenizer
from srlm_jax.models import config, convert
for read in (tokenizer.load, config.load, lambda folder: convert.from_hf(folder, folder + '.out')):
  try:
    read(sys.argv[1])
    print('read')
  except InputError as error:
    print('refused')
"""


@pytest.mark.parametrize('file, named, absent', [
    ('config.json', dict(model_type='mine'), 'tokenizer_class'),
    ('tokenizer_config.json', dict(tokenizer_class='Mine'), None)])
def test_code_of_a_model_s_folder_never_runs(tmp_path, file, named, absent):
  """transformers has no class of these names, so it would ask on the terminal, and take a y."""
  folder = tmp_path / 'hf'
  make(folder, TIED)
  (folder / 'tokenizer.model').unlink()
  save(folder, byte_level())
  (folder / 'mine.py').write_text(MINE.format(str(tmp_path / 'ran')))
  for name, more in (('tokenizer_config.json', {}), (file, named | dict(auto_map=AUTO_MAP))):
    fields = json.loads((folder / name).read_text())
    fields.pop(absent, None)
    (folder / name).write_text(json.dumps(fields | more))
  done = subprocess.run([sys.executable, '-c', PROGRAM, folder], input='y\n' * 9, text=True,
                        capture_output=True, cwd=ROOT)
  assert not (tmp_path / 'ran').exists(), done.stdout
  assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stdout + done.stderr


def loads_of(path):
  """Every call by which transformers reads a folder."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
        'from_pretrained', 'pipeline', 'get_class_from_dynamic_module'):
      yield node


def test_every_call_says_that_it_trusts_no_code():
  found = 0
  for place in ('srlm_jax', 'bench', 'configs', 'launch'):
    for path in (ROOT / place).rglob('*.py'):
      for call in loads_of(path):
        found += 1
        said = {k.arg: getattr(k.value, 'value', None) for k in call.keywords}
        assert said.get('trust_remote_code') is False, f'{path}:{call.lineno}'
  assert found
