import dataclasses

from conftest import forward, init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import attention, int8, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import engine as engines

TINY = dataclasses.replace(PRESETS['tiny-test'], K=2, G=2)


def test_every_channel_is_within_half_a_step_of_its_weight(mesh):
  params = init(TINY)
  for path, found in jax.tree_util.tree_leaves_with_path(
      int8.quantize(params), is_leaf=lambda x: isinstance(x, int8.Int8)):
    wanted, name = params, path[-1].key
    for key in path:
      wanted = wanted[key.key]
    if not isinstance(found, int8.Int8):
      assert name.startswith(('embed', 'scale')) and found is wanted
      continue
    dims = name.rpartition('_')[2]
    inputs = tuple(range(wanted.ndim - len(dims), wanted.ndim - len(dims) + int8.inputs(dims)))
    scale = jnp.expand_dims(found.scale, inputs)
    assert found.values.dtype == jnp.int8 and (jnp.abs(found.values).max(inputs) == 127).all()
    assert (jnp.abs(found.values * scale - wanted) <= scale * 0.5001).all()


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('config', [TINY, dataclasses.replace(TINY, tied=True, attention_bias=True)])
def test_a_model_of_8_bits_computes_with_the_weights_that_they_stand_for(shape, config):
  """And nearly what the model itself does; stacked and unrolled."""
  mesh, tokens = make_mesh(*shape), np.random.default_rng(0).integers(1, TINY.V, (8, 16), np.int32)
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x * 3, init(config))
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    small = int8.quantize(params)
    stood_for = jax.tree_util.tree_map_with_path(
        lambda path, x: x.values * jnp.expand_dims(x.scale, _inputs(path, x)) if isinstance(x, int8.Int8) else x,
        small, is_leaf=lambda x: isinstance(x, int8.Int8))
    model = llama.Llama(config)
    wanted, found = (forward(model, p, tokens)[0] for p in (stood_for, small))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    unrolled = forward(model.clone(kernels=attention.CPU), llama.unroll(small), tokens)[0]
    np.testing.assert_allclose(unrolled, wanted, atol=2e-4)
    logps, exact = (jax.nn.log_softmax(x) for x in (found, forward(model, params, tokens)[0]))
  assert 1e-4 < np.abs(logps - exact).mean() < 0.2


def _inputs(path, x):
  dims = path[-1].key.rpartition('_')[2]
  return tuple(range(x.values.ndim - len(dims), x.values.ndim - len(dims) + int8.inputs(dims)))


def test_the_engine_samples_with_them(mesh):
  params = jax.tree.map(lambda x: x * 4, init(TINY))
  sampling = engines.Sampling(0.0, 1.0, 12)
  made = []
  for p in (params, int8.quantize(params)):
    engine = engines.Engine(llama.Llama(TINY), p, mesh, (), 0, 'x', slots=4, size=64, steps=4)
    made.append([token for _, (x,) in engine.generate([engines.Request(str(i), [5, i]) for i in range(8)], sampling)
                 for token in x.ids])
  assert np.mean(np.equal(*made)) > 0.5
