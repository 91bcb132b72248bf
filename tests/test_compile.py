"""The 70B programs, compiled for 8 fake devices without allocating memory."""
import dataclasses

from aot import sampler, shape
from conftest import gathered, make_mesh
import jax
import jax.numpy as jnp
import pytest

from srlm_jax import config as configs
from srlm_jax.checkpoint import store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.models import attention, cache as caches, kernels, llama, vocab
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import programs
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import batch as batches, state as train_state, step as train_step


def test_the_70b_dpo_step_compiles_and_its_arguments_are_sharded_evenly():
  c = configs.get('m2', '70b').train.copy_and_resolve_references()
  c.accumulate, c.remat = 1, 'dots'
  mesh = make_mesh(2, 2, 2)
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype=c.dtype, dropout=c.dropout)
  examples = [Example(f'e{i}', [1] * 128, ([2] * 96, [3] * 96)) for i in range(16)]
  packed = Packing(examples, 16, 1, 0, 640, parts=4)
  with jax.set_mesh(mesh):
    tx = train_state.optimizer(c, 100)
    state = train_state.abstract(config, c, tx, mesh)
    reference = store.abstract_on(mesh, state.params, c.dtype)
    batch = jax.tree.map(lambda x: shape(mesh, 'BT', *x.shape, dtype=x.dtype),
                         batches.pack_pairs(packed.rows(0), packed.shape))
    step = train_step.make(llama.Llama(config, remat=c.remat), tx, c, state)
    compiled = step.lower(state, reference, batch, jax.random.key(0)).compile()
  memory = compiled.memory_analysis()
  count = llama.param_count(config)
  shards = 2 * 2  # over fsdp and tensor; the data axis holds copies
  # parameters and two moments in float32, the reference in bfloat16
  wanted = count * (3 * 4 + 2) / shards
  assert memory.argument_size_in_bytes == pytest.approx(wanted, rel=0.01)
  # the state is updated in place
  assert memory.alias_size_in_bytes == pytest.approx(count * 12 / shards, rel=0.01)


def decode(config, choice, mesh, rows, size):
  """The compiled decode program, and the bytes of its cache per device."""
  with jax.set_mesh(mesh):
    given, state = sampler(config, choice, mesh, rows, size, 384)
    lowered = programs.decode.lower(*given, state, jax.eval_shape(jax.random.key, 0),
                                    shape(mesh, 'L', 1), sampling=Sampling(0.7, 0.9, 1), steps=8)
    compiled = lowered.compile()
  return compiled, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[2])) / mesh.size


@pytest.mark.parametrize('choice', [attention.CPU, attention.XLA])
def test_a_prefill_copies_into_the_cache_in_place(choice):
  config, mesh = dataclasses.replace(PRESETS['tiny-test'], context=2048), make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    given, _ = sampler(config, choice, mesh, 64, 2048, 384)
    view = caches.Prefill(shape(mesh, 'A', 2), *[jax.ShapeDtypeStruct((64,), jnp.int32)] * 2,
                          jax.ShapeDtypeStruct((), jnp.int32))
    lowered = programs.prefill(mesh).lower(*given, shape(mesh, 'AT', 2, 64), view)
    memory = lowered.compile().memory_analysis()
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[2]))
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  assert memory.temp_size_in_bytes < 0.1 * cache


@pytest.mark.parametrize('choice', [attention.CPU, attention.XLA])
def test_decoding_updates_the_cache_in_place(choice):
  """Without a copy of the cache or of a layer: temporaries are those of one token per row."""
  config = dataclasses.replace(PRESETS['tiny-test'], context=2048)
  compiled, cache = decode(config, choice, make_mesh(1, 1, 1), 64, 2048)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  assert memory.temp_size_in_bytes < 0.05 * cache


def test_70b_decode_compiles_with_a_sharded_cache_and_gathers_no_weights():
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype='bfloat16')
  compiled, cache = decode(config, attention.XLA, make_mesh(1, 1, 8), 64, 4096)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  weights = llama.param_count(config) * 2 / 8
  assert memory.argument_size_in_bytes == pytest.approx(weights + cache, rel=0.01)
  assert max(gathered(compiled), default=0) <= 64 * config.V  # logits, to sample from


@pytest.mark.slow
def test_more_remat_and_logits_in_parts_take_less_memory(monkeypatch):
  config = dataclasses.replace(PRESETS['tiny-test'], layers=4, V=8192, context=512)
  packed = Packing([Example(f'e{i}', [1] * 16, ([2] * 496,)) for i in range(4)], 4, 1, 0)
  batch = batches.pack(packed.rows(0), packed.shape)

  def temporaries(remat, most_logits):
    monkeypatch.setattr(vocab, 'MOST_LOGITS', most_logits)
    model = llama.Llama(config, kernels.for_training('cpu', config, remat), remat)
    with jax.set_mesh(make_mesh(1, 1, 1)):
      grad = jax.jit(jax.grad(
          lambda params: train_step.token_logps(model, params, batch, None).sum()))
      compiled = grad.lower(llama.abstract_params(config)).compile()
      return compiled.memory_analysis().temp_size_in_bytes
  none, dots, full = (temporaries(remat, 2**23) for remat in configs.REMAT)
  assert full < 0.9 * dots and dots < 0.9 * none and full < 0.5 * none
  assert full < 0.6 * temporaries('full', 2**30)


def test_dots_recomputes_no_product_with_a_weight():
  config = dataclasses.replace(PRESETS['tiny-test'], layers=1, context=512, D=128, F=512)
  packed = Packing([Example('e', [1] * 16, ([2] * 496,))], 1, 1, 0)
  batch = batches.pack(packed.rows(0), packed.shape)

  def operations(remat):
    model = llama.Llama(config, remat=remat)
    with jax.set_mesh(make_mesh(1, 1, 1)):
      grad = jax.jit(jax.grad(
          lambda params: train_step.token_logps(model, params, batch, None).sum()))
      return grad.lower(llama.abstract_params(config)).compile().cost_analysis()['flops']
  none, dots, full = map(operations, configs.REMAT)
  products = 2 * 512 * (llama.param_count(config) - 2 * config.V * config.D)
  assert dots < none + 0.1 * products and full > dots + 0.6 * products
