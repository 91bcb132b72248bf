import json
import os
import subprocess
import sys

from conftest import ROOT
import pytest


@pytest.mark.slow
def test_the_sampling_bench_runs_every_part(tmp_path):
  pytest.importorskip('torch')
  path = tmp_path / 'numbers.json'
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu', XLA_FLAGS='')
  done = subprocess.run([sys.executable, ROOT / 'bench' / 'sample.py', '--quick', f'--json={path}'], cwd=tmp_path,
                        env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(path.read_text())
  assert found == json.loads(done.stdout.splitlines()[-1])
  assert [row['work'] for row in found['rows']] == ['respond', 'judge']
  assert all(row['ratio'] > 0 and 0 < row['of_floor'] for row in found['rows'])
  assert found['refill']['occupancy']['refill'] > found['refill']['occupancy']['static']
