"""Python code in a model folder never runs, even if the user would confirm it."""
import ast
import json
import subprocess
import sys

from conftest import ROOT
import pytest
from test_convert import make, TIED
from test_tokenizer import byte_level, save

CODE = 'open({!r}, "w").write("ran")\nclass Custom:\n  pass\n'
AUTO_MAP = dict(AutoConfig='custom.Custom', AutoTokenizer=['custom.Custom', 'custom.Custom'],
                AutoModelForCausalLM='custom.Custom')
PROGRAM = """
import sys
from srlm_jax import InputError
from srlm_jax.checkpoint import convert
from srlm_jax.data import tokenizer
from srlm_jax.models import config
for read in (tokenizer.load, config.load, lambda folder: convert.from_hf(folder, folder + '.out')):
  try:
    read(sys.argv[1])
    print('read')
  except InputError as error:
    print('refused')
"""


@pytest.mark.parametrize('file, added, removed', [
    ('config.json', dict(model_type='custom'), 'tokenizer_class'),
    ('tokenizer_config.json', dict(tokenizer_class='Custom'), None)])
def test_code_in_a_model_folder_never_runs(tmp_path, file, added, removed):
  """transformers has no classes of these names, so it would ask whether to run the code."""
  folder = tmp_path / 'hf'
  make(folder, TIED)
  (folder / 'tokenizer.model').unlink()
  save(folder, byte_level())
  (folder / 'custom.py').write_text(CODE.format(str(tmp_path / 'ran')))
  for name, more in (('tokenizer_config.json', {}), (file, added | dict(auto_map=AUTO_MAP))):
    fields = json.loads((folder / name).read_text())
    fields.pop(removed, None)
    (folder / name).write_text(json.dumps(fields | more))
  done = subprocess.run([sys.executable, '-c', PROGRAM, folder], input='y\n' * 9, text=True,
                        capture_output=True, cwd=ROOT)
  assert not (tmp_path / 'ran').exists(), done.stdout
  assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stdout + done.stderr


def loading_calls(path):
  """Yields every call in a Python file with which transformers loads a folder."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
        'from_pretrained', 'pipeline', 'get_class_from_dynamic_module'):
      yield node


def test_every_loading_call_sets_trust_remote_code_to_false():
  found = 0
  for folder in ('srlm_jax', 'bench', 'configs', 'launch'):
    for path in (ROOT / folder).rglob('*.py'):
      for call in loading_calls(path):
        found += 1
        arguments = {k.arg: getattr(k.value, 'value', None) for k in call.keywords}
        assert arguments.get('trust_remote_code') is False, f'{path}:{call.lineno}'
  assert found
