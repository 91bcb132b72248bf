"""The sampler's programs at 70B, compiled by the TPU's own compiler for chips that are not here: `make aot`."""
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
    v5p=dict(topology_name='v5:2x2x2', chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1), num_slices=1),
    v6e=dict(topology_name='v6e:2x4', chip_config_name='default'))
HERE = dict(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
            ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_LOG_DIR='disabled')  # there is no TPU to ask
ROWS, SIZE, PREFIX, GIB = 64, 4096, 512, 2**30


@pytest.fixture(params=CHIPS)
def program(request):
  """The config, the mesh, and a function that compiles one of the programs for tensor 8."""
  os.environ.update(HERE)
  topology = topologies.get_topology_desc(platform='tpu', **CHIPS[request.param])
  mesh = sharding.make_mesh(1, 1, 8, topology.devices)
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype='bfloat16')
  choice = kernels.choose('tpu', config)
  assert choice.decode is kernels.tpu_decode

  def compile(function, *given, bits=16, **static):
    with jax.set_mesh(mesh):
      (model, params, cache, prefix), state = sampler(config, choice, mesh, ROWS, SIZE, PREFIX)
      params = jax.tree_util.tree_map_with_path(functools.partial(small, mesh), params) if bits == 8 else params
      params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params,
                            choice.formats(params))
      given = (state, *given) if function is programs.decode else given
      compiled = function.lower(model, params, cache, prefix, *given, **static).compile()
    memory, size = compiled.memory_analysis(), 2 * cache.k.size * 2 / 8
    assert memory.alias_size_in_bytes == pytest.approx(size, rel=0.01)
    print(f'\n{request.param} {function.__name__}, {bits} bits: weights and cache '
          f'{memory.argument_size_in_bytes / GIB:.2f} GiB a chip, of it the cache {size / GIB:.2f}; temporaries '
          f'{memory.temp_size_in_bytes / GIB:.3f} GiB, {memory.temp_size_in_bytes / size:.2%} of the cache')
    return compiled, memory.temp_size_in_bytes / size
  return config, mesh, compile


def small(mesh, path, x):
  """The shape of a weight of 8 bits, as int8.quantize makes it."""
  name, _, dims = path[-1].key.rpartition('_')
  if name not in int8.DENSE:
    return x
  layers = x.ndim - len(dims)
  outputs = layers + int8.inputs(dims)
  return int8.Int8(jax.ShapeDtypeStruct(x.shape, jnp.int8, sharding=x.sharding), shape(
      mesh, 'L' * layers + dims[int8.inputs(dims):], *x.shape[:layers], *x.shape[outputs:], dtype=jnp.float32))


@pytest.mark.parametrize('bits', [16, 8])
def test_a_step_of_decoding_is_in_place_and_gathers_no_weights(program, bits):
  config, mesh, compile = program
  compiled, share = compile(programs.decode, jax.eval_shape(jax.random.key, 0), shape(mesh, 'L', 1), bits=bits,
                            sampling=Sampling(0.7, 0.9, 1), steps=8)
  assert share < 0.05
  assert max(gathered(compiled), default=0) <= ROWS * config.V  # logits, to draw from
  text = compiled.as_text()
  assert 'tpu_decode' in text and 'tpu_append' in text
  layer = rf'bf16\[(1,)?({config.layers},)?{ROWS},1,{SIZE},{config.H}\]'
  assert not re.search(rf'= {layer}\S* (copy|dynamic-slice|copy-start)\(', text)


@pytest.mark.parametrize('width', [128, 2048])
def test_a_prefill_copies_its_keys_in_place_and_gathers_no_weights(program, width):
  config, mesh, compile = program
  many = 256 // width or 1
  view = caches.Prefill(shape(mesh, 'B', many), *[jax.ShapeDtypeStruct((ROWS,), jnp.int32)] * 2,
                        jax.ShapeDtypeStruct((), jnp.int32))
  compiled, share = compile(programs.prefill, shape(mesh, 'BT', many, width), view)
  assert share < 0.05 and 'splash' in compiled.as_text()
  assert max(gathered(compiled), default=0) <= many * width * config.D
