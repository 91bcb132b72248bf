import dataclasses

from conftest import full_logits, init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import attention, int8, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import engine as engines

TINY = dataclasses.replace(PRESETS['tiny-test'], K=2, G=2)


def test_quantized_weights_are_within_half_a_quantization_step(mesh):
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
@pytest.mark.parametrize('config', [
    TINY, dataclasses.replace(TINY, tied=True, biases='qkvo')])
def test_an_int8_model_equals_the_model_with_dequantized_weights(shape, config):
  """It is also close to the original model; with stacked and with unrolled layers."""
  mesh, tokens = make_mesh(*shape), np.random.default_rng(0).integers(1, TINY.V, (8, 16), np.int32)
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x * 3, init(config))
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
    quantized = int8.quantize(params)
    dequantized = jax.tree_util.tree_map_with_path(
        dequantize, quantized, is_leaf=lambda x: isinstance(x, int8.Int8))
    model = llama.Llama(config)
    wanted, found = (full_logits(model, p, tokens) for p in (dequantized, quantized))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    unrolled = full_logits(model.clone(kernels=attention.CPU), llama.unroll(quantized), tokens)
    np.testing.assert_allclose(unrolled, wanted, atol=2e-4)
    logps, exact = (jax.nn.log_softmax(x) for x in (found, full_logits(model, params, tokens)))
  assert 1e-4 < np.abs(logps - exact).mean() < 0.2


def dequantize(path, x):
  if not isinstance(x, int8.Int8):
    return x
  dims = path[-1].key.rpartition('_')[2]
  first = x.values.ndim - len(dims)
  inputs = tuple(range(first, first + int8.inputs(dims)))
  return x.values * jnp.expand_dims(x.scale, inputs)


def test_the_engine_samples_with_int8_weights(mesh):
  params = jax.tree.map(lambda x: x * 4, init(TINY))
  sampling = engines.Sampling(0.0, 1.0, 12)
  made = []
  for p in (params, int8.quantize(params)):
    engine = engines.Engine(llama.Llama(TINY), p, mesh, (), 0, 'x', slots=4, size=64, steps=4)
    requests = [engines.Request(str(i), [5, i]) for i in range(8)]
    made.append([token for _, (x,) in engine.generate(requests, sampling) for token in x.ids])
  assert np.mean(np.equal(*made)) > 0.5


@pytest.mark.parametrize('bits', [16, 8])
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize('changes', [
    dict(), dict(biases='k', qk_norm='all', norms='post'),
    pytest.param(dict(biases='qkvo', qk_norm='head'), marks=pytest.mark.slow)])
def test_one_weight_for_q_k_and_v_changes_no_logit(shape, changes, bits):
  """And every chip keeps the part that it had."""
  config = dataclasses.replace(TINY, G=3, **changes)
  mesh, tokens = make_mesh(*shape), np.random.default_rng(0).integers(1, TINY.V, (8, 16), np.int32)
  with jax.set_mesh(mesh):
    params = jax.tree.map(sharding.put, init(config), sharding.shardings(init(config), mesh))
    params = params if bits == 16 else int8.quantize(params)
    fused, model = llama.fuse(params), llama.Llama(config)
    joint = model.clone(kernels=dataclasses.replace(attention.XLA, fused=True))
    np.testing.assert_allclose(full_logits(joint, fused, tokens),
                               full_logits(model, params, tokens), atol=1e-6)
  before, after = params['layers']['attention'], fused['layers']['attention']
  values = [x.values if bits == 8 else x for x in (after['wqkv_DKCH'], before['wq_DKGH'])]
  assert values[0].sharding.is_equivalent_to(values[1].sharding, values[0].ndim)
  assert not {'wq_DKGH', 'wk_DKH', 'wv_DKH', 'bq_KGH'} & set(after)


def test_partial_sums_have_the_dtype_of_activations():
  """Float32 would double the bytes that the mesh reduces. Logits are float32."""
  def dots(dtype):
    w = int8.Int8(jnp.ones((8, 4), jnp.int8), jnp.ones(4))
    made = jax.make_jaxpr(lambda x: int8.product('BF,FD->BD', x, w, dtype))(
        jnp.ones((2, 8), jnp.bfloat16))
    return [e.outvars[0].aval.dtype for e in made.eqns if e.primitive.name == 'dot_general']
  assert dots(None) == [jnp.bfloat16] and dots(jnp.float32) == [jnp.float32]


@pytest.mark.parametrize('equation, x, w', [
    ('BTF,FD->BTD', (2, 3, 6), (6, 4)), ('BTD,DKGH->BTKGH', (2, 3, 4), (4, 2, 3, 5)),
    ('BTKGH,KGHD->BTD', (2, 3, 2, 3, 5), (2, 3, 5, 4))])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_of_a_product_are_those_of_an_einsum(equation, x, w, dtype):
  x, w = (jax.random.normal(jax.random.key(len(shape)), shape, dtype) for shape in (x, w))
  found, wanted = (jax.grad(lambda x, w, product=product: jnp.sin(product(equation, x, w)).sum(),
                            (0, 1))(x, w) for product in (int8.product, jnp.einsum))
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(a.astype('float32'), b.astype('float32'),
                               rtol=1e-5 if dtype == 'float32' else 0.02, atol=1e-5)
