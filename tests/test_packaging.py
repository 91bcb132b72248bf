"""The wheel in an empty folder, and the files that describe the package."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

from conftest import CHANGES, config_flags, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import yaml

from srlm_jax import config

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
LOCKS = sorted((ROOT / 'requirements').glob('py*.txt'))
NOT_IN_SOURCE = ('.git', '.venv*', 'runs', 'build', '*.egg-info', '__pycache__', '.*_cache',
                 '.hypothesis')
WHERE = """
import importlib.util, srlm_jax
print(srlm_jax.__file__, importlib.util.find_spec('configs'))
"""


def pins(lock) -> dict[str, str]:
  """A lock file -> the version of each package; every package must have a hash."""
  entries = re.split(r'\n(?=[A-Za-z0-9])', re.sub(r'(?m)^\s*#.*\n', '', lock.read_text()))
  found = {}
  for entry in entries:
    name, version = re.match(r'([\w.-]+)==([^\s;]+)', entry).groups()
    assert '--hash=sha256:' in entry, f'{lock}: {name} has no hash'
    found[canonicalize_name(name)] = version
  return found


def make(target, python) -> str:
  """The commands of a target, with another Python."""
  done = subprocess.run(['make', '-n', '-B', target, f'PYTHON={python}'], cwd=ROOT,
                        capture_output=True, text=True, check=True)
  return done.stdout


def test_the_version_is_the_same_everywhere():
  version = PYPROJECT['project']['version']
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == version
  assert citation['license'] == PYPROJECT['project']['license'] == 'Apache-2.0'
  assert re.search(r'^## \[(.*?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1] == version
  assert f'version = {{{version}}}' in (ROOT / 'README.md').read_text()


def test_make_trains_the_model_of_the_sandbox():
  configured = re.findall(r'--config=(\S+)', make('sandbox-m0', sys.executable))
  assert len(configured) == 2
  for text in configured:
    c = config.get_config(text)
    assert (c.name, c.model) == ('m0', 'sandbox') and c.data.documents


def test_lock_files_pin_every_dependency_within_its_range():
  project = PYPROJECT['project']
  wanted = [*project['dependencies'], *project['optional-dependencies']['test']]
  assert [lock.name for lock in LOCKS] == ['py311-linux-x86_64.txt', 'py312-linux-x86_64.txt']
  lint = ROOT / 'requirements' / 'lint.txt', PYPROJECT['dependency-groups']['lint']
  for lock, texts in [*((lock, wanted) for lock in LOCKS), lint]:
    pinned = pins(lock)
    for wish in map(Requirement, texts):
      version = pinned[canonicalize_name(wish.name)]
      assert version in wish.specifier, f'{lock}: {wish}; run make lock'
    assert '://' not in lock.read_text() and 'index-url' not in lock.read_text(), lock


def test_make_installs_the_lock_file_of_the_python_or_says_that_there_is_none(tmp_path):
  locked = tmp_path / 'locked'
  locked.write_text('#!/bin/sh\necho py312-linux-x86_64\n')
  other = tmp_path / 'other'
  other.write_text('#!/bin/sh\necho py314-macosx-14.0-arm64\n')
  for python in (locked, other):
    python.chmod(0o755)
  said = make('setup', locked)
  assert '--require-hashes -r requirements/py312-linux-x86_64.txt' in said
  assert '--no-deps -e .' in said and 'No lock file' not in said
  said = make('setup', other)
  assert '--require-hashes' not in said and "-e '.[test]'" in said
  assert said.count('No lock file in requirements/ is for this Python and this platform') == 1


def pip(*words):
  subprocess.run([sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check',
                  *map(str, words), '--no-deps'], check=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The wheel, built from a copy of the checkout."""
  place = tmp_path_factory.mktemp('wheel')
  shutil.copytree(ROOT, place / 'source', ignore=shutil.ignore_patterns(*NOT_IN_SOURCE))
  pip('wheel', f'--wheel-dir={place}', place / 'source')
  file, = place.glob('*.whl')
  return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_data_and_the_license(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.split('/')[0].split('-')[0] for name in names} == {'srlm_jax'}  # and so no `configs`
  assert any(re.fullmatch(r'srlm_jax-[^/]*\.dist-info/(licenses/)?LICENSE', name) for name in names)
  for path in (ROOT / 'srlm_jax').rglob('*'):
    if path.is_file() and '__pycache__' not in path.parts:
      assert str(path.relative_to(ROOT)) in names


@pytest.mark.slow
def test_the_installed_wheel_runs_the_loop_in_an_empty_folder(wheel, tmp_path):
  """Dependencies come from the environment of the tests, by a .pth file; the package does not."""
  place, empty = tmp_path / 'venv', tmp_path / 'empty'
  empty.mkdir()
  venv.create(place, with_pip=False)
  python = place / 'bin' / 'python'
  pip(f'--python={python}', 'install', wheel)
  site, = place.glob('lib/python*/site-packages')
  (site / 'dependencies.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  environment |= dict(JAX_PLATFORMS='cpu', XLA_FLAGS='')

  def run(*words):
    done = subprocess.run([python, *words], cwd=empty, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  file, configs = run('-c', WHERE).split()
  assert pathlib.Path(file).is_relative_to(site) and configs == 'None'
  run('-m', 'srlm_jax.loop', '--size=tiny', '--workdir=run', *(f'--set={c}' for c in CHANGES))
  assert (empty / 'run' / 'report.html').exists()
  said = run('-m', 'srlm_jax.train', '--config=iter2:tiny', '--workdir=run', *config_flags('m2'))
  assert 'already done' in said
  assert [path.name for path in empty.iterdir()] == ['run']
