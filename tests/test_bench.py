"""The benchmarks run, and `bench/scale.py` finds whole weights that are all-reduced in a loop."""
import json
import os
import subprocess
import sys

from conftest import make_mesh, ROOT
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest
import scale

from srlm_jax.checkpoint import store
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS


def quick(name, tmp_path) -> dict:
  """-> the result of a benchmark with --quick."""
  path = tmp_path / 'numbers.json'
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu', XLA_FLAGS='')
  done = subprocess.run([sys.executable, ROOT / 'bench' / name, '--quick', f'--json={path}'],
                        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(path.read_text())
  assert found == json.loads(done.stdout.splitlines()[-1])
  return found


@pytest.mark.slow
def test_the_training_benchmark_runs_every_part(tmp_path):
  pytest.importorskip('trl')
  found = quick('train.py', tmp_path)
  assert all(found[loss]['ratio'] > 0 and 0.5 < found[loss]['real'] <= 1 for loss in ('dpo', 'sft'))
  assert [(row['prompt'], row['response']) for row in found['shared']] == [(1, 4), (1, 1), (4, 1)]
  assert found['logits']['chunks'] <= found['logits']['at_once']


@pytest.mark.slow
def test_the_sampling_benchmark_runs_every_part(tmp_path):
  pytest.importorskip('torch')
  found = quick('sample.py', tmp_path)
  assert [row['work'] for row in found['rows']] == ['respond', 'judge']
  assert all(row['ratio'] > 0 and 0 < row['of_bound'] for row in found['rows'])
  utilization = found['refill']['slot_utilization']
  assert utilization['refill'] > utilization['static']


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
