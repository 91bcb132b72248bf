import json
import os
import subprocess
import sys

from conftest import ROOT
import pytest


def quick(name, tmp_path) -> dict:
  """What a bench finds with --quick."""
  path = tmp_path / 'numbers.json'
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu', XLA_FLAGS='')
  done = subprocess.run([sys.executable, ROOT / 'bench' / name, '--quick', f'--json={path}'], cwd=tmp_path,
                        env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(path.read_text())
  assert found == json.loads(done.stdout.splitlines()[-1])
  return found


@pytest.mark.slow
def test_the_training_bench_runs_every_part(tmp_path):
  pytest.importorskip('trl')
  found = quick('train.py', tmp_path)
  assert all(found[loss]['ratio'] > 0 and 0.5 < found[loss]['real'] <= 1 for loss in ('dpo', 'sft'))
  assert [(row['prompt'], row['response']) for row in found['shared']] == [(1, 4), (1, 1), (4, 1)]
  assert found['logits']['chunks'] <= found['logits']['at_once']


@pytest.mark.slow
def test_the_sampling_bench_runs_every_part(tmp_path):
  pytest.importorskip('torch')
  found = quick('sample.py', tmp_path)
  assert [row['work'] for row in found['rows']] == ['respond', 'judge']
  assert all(row['ratio'] > 0 and 0 < row['of_floor'] for row in found['rows'])
  assert found['refill']['occupancy']['refill'] > found['refill']['occupancy']['static']
