"""The benchmarks run, and `bench/scale.py` finds whole weights that are all-reduced in a loop."""
import json
import os
import pathlib
import re
import subprocess
import sys

from conftest import make_mesh, ROOT
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import peers
import pytest
import scale
import timing

from srlm_jax.checkpoint import store
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS

# Runs a benchmark with two more peers.
RUN = '''
import importlib, pathlib, sys
script, interpreter, *sys.argv[1:] = sys.argv[1:]
import peers
fake = pathlib.Path(interpreter), pathlib.Path(script)
for known in (peers.SAMPLERS, peers.TRAINERS):
  known |= dict(fake=fake, wrong=fake)
importlib.import_module(sys.argv.pop(1)).main()
'''


def quick(name, tmp_path, *flags, code=0) -> dict | str:
  """-> the result of a benchmark with --quick, or what it printed if it failed as expected."""
  path = tmp_path / 'numbers.json'
  environment = dict(os.environ, PYTHONPATH=f'{ROOT}:{ROOT / "bench"}', JAX_PLATFORMS='cpu',
                     XLA_FLAGS='')
  done = subprocess.run([sys.executable, '-c', RUN, ROOT / 'tests/fake_peer.py', sys.executable,
                         name, '--quick', f'--json={path}', *flags],
                        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == code, done.stdout + done.stderr
  if code:
    return done.stdout + done.stderr
  found = json.loads(path.read_text())
  assert found == json.loads(done.stdout.splitlines()[-1])
  return found


@pytest.mark.slow
def test_the_training_benchmark_runs_every_part(tmp_path):
  found = quick('train', tmp_path)
  assert all(found[loss]['per_second']['ours'] > 0 and 0.5 < found[loss]['real'] <= 1
             for loss in ('dpo', 'sft'))
  assert [(row['prompt'], row['response']) for row in found['shared']] == [(1, 4), (1, 1), (4, 1)]
  assert found['logits']['parts'] <= found['logits']['at_once']


@pytest.mark.slow
def test_the_scoring_benchmark_runs_every_side(tmp_path):
  found = quick('score', tmp_path)  # which compares the numbers of all sides
  assert list(found['seconds']) == ['score', 'unshared', 'sums', 'flags']
  assert found['one_to_two'] > 0 and found['shared_to_unshared'] > 0


@pytest.mark.slow
def test_the_sampling_benchmark_runs_every_part(tmp_path):
  found = quick('sample', tmp_path)
  assert [row['work'] for row in found['rows']] == ['respond', 'judge']
  assert all(0 < row['of_bound'] for row in found['rows'])
  assert 'unshared' in found['rows'][1]['speed_up'] and found['rows'][1]['computed'] < 1
  utilization = found['refill']['slot_utilization']
  assert utilization['refill'] > utilization['static']


@pytest.mark.slow
def test_the_benchmark_of_memory_runs_a_program_on_runs_of_both_sizes(tmp_path):
  rows = quick('memory', tmp_path, '--only=health')['rows']
  assert [(r['program'], r['prompts'], r['records']) for r in rows] == [
      ('writing', 20, 0), ('writing', 100, 0),
      ('health', 20, 20 * (1 + 2 + 4 + 12)), ('health', 100, 100 * (1 + 2 + 4 + 12))]
  assert all(100 < r['peak_mb'] < 500 and 0 < r['cpu_seconds'] for r in rows)


@pytest.mark.slow
def test_the_host_needs_less_than_half_of_the_time_of_a_call(tmp_path):
  found = quick('host', tmp_path)
  assert found['samples'] == 3 * found['requests'] and found['scores'] > 0
  assert found['calls'] > found['tokens'] / 64 / 8 - 2  # 64 slots generate 8 tokens each per call
  assert 0 < found['all_ms']['median'] < min(found['limits_ms'].values())
  assert found['all_ms']['median'] > found['records_ms']['median']


@pytest.mark.slow
def test_the_check_of_a_device_passes_on_fake_devices_and_fails_with_a_wrong_kernel(tmp_path):
  program = ('''
import sys
import check_device
from srlm_jax.models import cpu
if sys.argv.pop(1) == 'wrong':
  cpu.supports = lambda config: True
  cpu.decode = lambda q, cache, layer, length, prefix, *, window: q
  cpu.append = lambda cache, k, v, layer, position: cache
check_device.main()
''')
  environment = dict(os.environ, PYTHONPATH=f'{ROOT}:{ROOT / "bench"}', JAX_PLATFORMS='cpu',
                     XLA_FLAGS='--xla_force_host_platform_device_count=8')
  for name, code in (('right', 0), ('wrong', 1)):
    done = subprocess.run([sys.executable, '-c', program, name], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    failed = re.findall(r'\| ([\w ]+) \| FAILED', done.stdout)
    assert failed == ([
        'kernel decode', 'kernel decode window 300', 'kernel append', 'greedy'] if code else [])
    assert done.stdout.count('| ok |') == 14 - len(failed)


@pytest.mark.slow
def test_our_tokens_and_values_are_those_of_a_peer_that_runs_full_forward_passes(tmp_path):
  """A peer with other tokens or another value stops the benchmark."""
  found = quick('sample', tmp_path, '--peer=fake')
  assert all(row['peer'] == 'fake' and row['version'] == '1.0' for row in found['rows'])
  assert all(row[part][side] > 0 for row in found['rows'] for side in ('ours', 'peer')
             for part in ('seconds', 'cpu_seconds', 'tokens_per_second'))
  assert 'AssertionError: ours [[' in quick('sample', tmp_path, '--peer=wrong', code=1)

  found = quick('train', tmp_path, '--peer=fake')
  for loss in ('dpo', 'sft'):
    assert found[loss]['values']['ours'] == pytest.approx(found[loss]['values']['peer'], rel=1e-5)
    assert found[loss]['cpu_seconds']['peer'] > 0
  assert 'AssertionError' in quick('train', tmp_path, '--peer=wrong', '--only=sft', code=1)


def test_a_peer_that_ends_shows_its_last_messages(tmp_path, monkeypatch):
  script = tmp_path / 'broken.py'
  script.write_text('raise ImportError("no such library")')
  monkeypatch.setitem(peers.SAMPLERS, 'broken', (pathlib.Path(sys.executable), script))
  with pytest.raises(SystemExit, match='broken ended(.|\n)*ImportError: no such library'):
    peers.Peer('broken')
  monkeypatch.setitem(peers.SAMPLERS, 'absent', (tmp_path / '.venv-x/bin/python', script))
  with pytest.raises(SystemExit, match='run `make .venv-x/.installed`'):
    peers.Peer('absent')


def test_cpu_seconds_include_threads_and_child_processes():
  work = 'import time\nwhile time.process_time() < 0.3: pass\n'
  code = (f'import subprocess, sys, threading\n'
          f'child = subprocess.Popen([sys.executable, "-c", {work!r} + "input()"],'
          f' stdin=subprocess.PIPE)\n'  # alive, when its time is read
          f'subprocess.run([sys.executable, "-c", {work!r}])\n'
          f'thread = threading.Thread(target=exec, args=({work!r},)); thread.start()\n'
          f'thread.join(); print("done", flush=True); input(); child.communicate(b"\\n")')
  with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE) as process:
    process.stdout.readline()
    found = timing.tree_cpu_seconds(process.pid)
    process.stdin.write(b'\n')
  assert 0.85 <= found < 3


def test_a_whole_weight_that_is_all_reduced_in_a_loop_is_found():
  mesh = make_mesh(8, 1, 1)

  def compiled(reduce):
    """-> the text of a gradient program.

    It loops over 3 layers [16, 32] that are replicated on all chips; rows are split over `data`.
    """
    def local(weights, x):
      def layer(_, one):
        w, x = one
        return _, reduce(jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w))
      return jax.lax.scan(layer, 0, (weights, x))[1]
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, 'data')), out_specs=P(),
                        check_vma=False)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 16, 32), (3, 8, 16))]
    return jax.jit(run).lower(*shapes).compile().as_text()

  weights = {(16, 32): 0.5}
  text = compiled(lambda grad: jax.lax.psum(grad, 'data'))
  kinds, whole = scale.collectives(text, weights)
  assert kinds['all-reduce'] == 1 and list(whole.values()) == [0.5]
  assert '[16,32]' in next(iter(whole))
  text = compiled(lambda grad: jax.lax.psum(jnp.sum(grad), 'data') + 0 * grad)  # of a scalar
  kinds, whole = scale.collectives(text, weights)
  assert kinds['all-reduce'] == 1 and not whole

  with jax.set_mesh(mesh := make_mesh(1, 4, 2)):
    shapes = llama.abstract_params(PRESETS['tiny-test'])
    found = scale.matrices(store.abstract_on(mesh, shapes, 'float32'))
  c = PRESETS['tiny-test']
  layer = c.D * c.H * c.K * (2 * c.G + 2) + 3 * c.D * c.F
  assert found[tuple(sorted((c.D, c.F // 2)))] == pytest.approx(c.D * c.F / layer)
  assert tuple(sorted((c.D, c.F))) not in found
