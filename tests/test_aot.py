"""The sampler's 70B programs, compiled ahead of time with the TPU compiler, without hardware.

`make aot` runs these tests.
"""
import dataclasses
import functools
import os
import re

from conftest import gathered, sampler, shape
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

from srlm_jax import sharding
from srlm_jax.models import cache as caches, int8, kernels
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import programs
from srlm_jax.sample.draw import Sampling

pytestmark = pytest.mark.aot
CHIPS = dict(  # eight of each
    v5p=dict(topology_name='v5:2x2x2', chip_config_name='megacore',
             chips_per_host_bounds=(2, 2, 1), num_slices=1),
    v6e=dict(topology_name='v6e:2x4', chip_config_name='default'))
# libtpu cannot query these from hardware.
ENVIRONMENT = dict(
    TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
    ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_LOG_DIR='disabled')
ROWS, SIZE, PREFIX, GIB = 64, 4096, 512, 2**30


@pytest.fixture(params=CHIPS)
def program(request):
  """The config, the mesh, and a function that compiles a program for tensor = 8."""
  os.environ.update(ENVIRONMENT)
  topology = topologies.get_topology_desc(platform='tpu', **CHIPS[request.param])
  mesh = sharding.make_mesh(1, 1, 8, topology.devices)
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype='bfloat16')
  choice = kernels.choose('tpu', config)
  assert choice.decode is kernels.tpu_decode

  def compile(function, *given, bits=16, **static):
    with jax.set_mesh(mesh):
      (model, params, cache, prefix), state = sampler(config, choice, mesh, ROWS, SIZE, PREFIX)
      if bits == 8:
        params = jax.tree_util.tree_map_with_path(functools.partial(quantized, mesh), params)
      params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                            params, choice.formats(params))
      given = (state, *given) if function is programs.decode else given
      compiled = function.lower(model, params, cache, prefix, *given, **static).compile()
    memory, size = compiled.memory_analysis(), 2 * cache.k.size * 2 / 8
    assert memory.alias_size_in_bytes == pytest.approx(size, rel=0.01)
    print(f'\n{request.param} {function.__name__.strip("_")}, {bits} bits: weights and cache '
          f'{memory.argument_size_in_bytes / GIB:.2f} GiB per chip, the cache {size / GIB:.2f}; '
          f'temporaries {memory.temp_size_in_bytes / GIB:.3f} GiB, '
          f'{memory.temp_size_in_bytes / size:.2%} of the cache')
    return compiled, memory.temp_size_in_bytes / size
  return config, mesh, compile


def quantized(mesh, path, x):
  """The shape of an int8 weight, as `int8.quantize` makes it."""
  name, _, dims = path[-1].key.rpartition('_')
  if name not in int8.DENSE:
    return x
  layers = x.ndim - len(dims)
  outputs = layers + int8.inputs(dims)
  scale = shape(mesh, 'L' * layers + dims[int8.inputs(dims):], *x.shape[:layers],
                *x.shape[outputs:], dtype=jnp.float32)
  return int8.Int8(jax.ShapeDtypeStruct(x.shape, jnp.int8, sharding=x.sharding), scale)


@pytest.mark.parametrize('bits', [16, 8])
def test_decode_is_in_place_and_gathers_no_weights(program, bits):
  config, mesh, compile = program
  compiled, fraction = compile(
      programs.decode, jax.eval_shape(jax.random.key, 0), shape(mesh, 'L', 1), bits=bits,
      sampling=Sampling(0.7, 0.9, 1), steps=8)
  assert fraction < 0.05
  assert max(gathered(compiled), default=0) <= ROWS * config.V  # logits, to sample from
  text = compiled.as_text()
  assert 'tpu_decode' in text and 'tpu_append' in text
  layer = rf'bf16\[(1,)?({config.layers},)?{ROWS},1,{SIZE},{config.H}\]'
  prefix = rf'bf16\[(1,)?({config.layers},)?1,{PREFIX},{config.H}\]'
  assert not re.search(rf'= ({layer}|{prefix})\S* (copy|dynamic-slice|copy-start)\(', text)


@pytest.mark.parametrize('width', [128, 2048])
def test_prefill_is_in_place_and_gathers_no_weights(program, width):
  config, mesh, compile = program
  rows = 256 // width or 1
  view = caches.Prefill(shape(mesh, 'A', rows), *[jax.ShapeDtypeStruct((ROWS,), jnp.int32)] * 2,
                        jax.ShapeDtypeStruct((), jnp.int32))
  compiled, fraction = compile(programs.prefill(mesh), shape(mesh, 'AT', rows, width), view)
  assert fraction < 0.05 and 'splash' in compiled.as_text()
  assert max(gathered(compiled), default=0) <= rows * width * config.D
