"""Imports go down: a module imports only parts listed before it in ORDER."""
import ast
import subprocess
import sys

from conftest import ROOT
import pytest

PACKAGE = ROOT / 'srlm_jax'
# Modules and packages, lowest layer first. Parts separated by `/` must not import each other. Other
# parts may also import the parts before them in the same line.
ORDER = '''
  storage config ablations pods torus sharding hosts preemption compiler conversation schema spill
  records
  lock peers environment model_files catalog metrics stage
  models
  base cli
  data
  reward
  report
  checkpoint
  sample
  eval / sandbox / train
  selection stopping loop study plan serve
'''
# Third-party packages that may be imported inside a function: slow, or optional.
LATE = {'sentencepiece', 'transformers', 'tokenizers', 'aiohttp', 'gcsfs', 'google', 'requests',
        'openai', 'httpx2', 'alpaca_eval', 'lm_eval', 'tensorboardX', 'wandb'}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
# Modules that only transform records: they work without JAX.
WITHOUT_JAX = ('storage', 'config', 'ablations', 'pods', 'conversation', 'schema', 'spill',
               'records',
               'lock', 'data.oasst', 'data.rendering', 'data.thinking', 'data.ranked',
               'data.similar',
               'data.splits', 'data.templates', 'data.tokenizer', 'data.turns', 'data.examples',
               'data.packing', 'data.prompt_files', 'reward.judges',
               'reward.scores', 'reward.strategies')


def parts() -> dict[str, set[str]]:
  """Reads ORDER -> {module or package: the parts that it may import}."""
  found, before = {}, set()
  for line in ORDER.split('\n'):
    names = line.split()
    for name in names:
      if name != '/':
        apart = set(names) if '/' in names else set(names[names.index(name):])
        found[name] = before - apart | {name}
        before = before | {name}
  return found


MAY = parts()
MODULES = {str(path.relative_to(PACKAGE).with_suffix('')).replace('/', '.'): path
           for path in sorted(PACKAGE.rglob('*.py'))}


def imports(path):
  """Modules of the package that a file imports, at any depth, as `data.records` or `stage`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'srlm_jax':
      package = node.module.split('.')[1:]
      for alias in node.names:
        name = '.'.join([*package, alias.name])
        if name in MODULES:
          yield name
        elif package:
          yield '.'.join(package)
    if isinstance(node, ast.Import):
      assert not any(alias.name.split('.')[0] == 'srlm_jax' for alias in node.names), path


@pytest.mark.parametrize('name', MODULES)
def test_modules_import_only_earlier_parts_of_the_order(name):
  part = name.split('.')[0]
  if part != '__init__':
    assert {found.split('.')[0] for found in imports(MODULES[name])} <= MAY[part]


def test_imports_have_no_cycle():
  graph = {name: set(imports(path)) for name, path in MODULES.items()}
  def visit(name, above):
    assert name not in above, ' -> '.join([*above, name])
    for found in graph.get(name, ()):
      visit(found, (*above, name))
  for name in graph:
    visit(name, ())


@pytest.mark.parametrize('name', MODULES)
def test_only_slow_or_optional_packages_are_imported_inside_functions(name):
  tree = ast.parse(MODULES[name].read_text())
  for function in (n for n in ast.walk(tree) if isinstance(n, FUNCTIONS)):
    for node in ast.walk(function):
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        assert {n.split('.')[0] for n in names} <= LATE, f'{name}, line {node.lineno}'


def test_modules_that_transform_records_do_not_import_jax():
  code = (f'import sys, {", ".join(f"srlm_jax.{name}" for name in WITHOUT_JAX)}; '
          'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_every_module_has_a_test_file():
  tested = {p.stem.removeprefix('test_') for p in (ROOT / 'tests').glob('test_*.py')}
  elsewhere = dict(
      attention='llama', hf='convert', scores='pairs', generate='llama', state='step',
      world='sandbox', people='sandbox', facts='sandbox', corpus='sandbox', audit='sandbox',
      control='sandbox', tasks='sandbox', results='report', charts='report',
      summaries='report', plots='report', splits='seeds', turns='seeds',
      oracle='loop', run='loop', data='sandbox',
      judge='loop', metrics='loop', schema='records', implicit='strategies', catalog='stage',
      shards='loop', programs='engine', packed='step', hosts='launch', cli='config',
      store='checkpoint', hashes='checkpoint',
      text='serve', worker='serve', api='serve', app='serve',
      model_files='checkpoint', spill='records', alarms='reference', pods='plan', costs='plan',
      arrays='distribute', card='loop', fields='config_fields', conversation='templates',
      rendering='templates', estimates='results', measures='results', differences='results',
      doubts='results', steps='results', rounds='results', samples='results', external='results',
      compare='results', contents='results', paper='results', keyed='tallies', swap='judge_pairs')
  for path in PACKAGE.rglob('*.py'):
    if not path.stem.startswith('__'):
      assert path.stem in tested or elsewhere.get(path.stem) in tested, path
