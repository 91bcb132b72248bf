"""The 70B programs, compiled for 8 fake devices without their memory."""
import dataclasses

from conftest import gathered, make_mesh, sampler, shape
import jax
import jax.numpy as jnp
import pytest

from srlm_jax import config as configs
from srlm_jax.checkpoint import store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Batches
from srlm_jax.models import attention, cache as caches, kernels, llama, vocab
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import programs
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import state as train_state, step as train_step


def test_the_70b_dpo_step_compiles_and_its_arguments_are_split_evenly():
  c = configs.get('m2', '70b').train
  mesh = make_mesh(2, 2, 2)
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype=c.dtype, dropout=c.dropout)
  made = Batches([Example(f'e{i}', [1] * 128, ([2] * 96, [3] * 96)) for i in range(16)], 16, 1, 0, 640, parts=4)
  with jax.set_mesh(mesh):
    tx = train_state.optimizer(c, 100)
    state = train_state.abstract(config, tx, mesh)
    reference = store.abstract_on(mesh, state.params, c.dtype)
    batch = {k: shape(mesh, 'BT', *x.shape, dtype=x.dtype) for k, x in made.at(0).items()}
    step = train_step.make(llama.Llama(config, remat=c.remat), tx, c, state)
    compiled = step.lower(state, reference, batch, jax.random.key(0)).compile()
  memory = compiled.memory_analysis()
  count = llama.param_count(config)
  split = 2 * 2  # over fsdp and tensor; the data axis holds copies
  wanted = count * (3 * 4 + 2) / split  # parameters and two moments in float32, the reference in bf16
  assert memory.argument_size_in_bytes == pytest.approx(wanted, rel=0.01)
  assert memory.alias_size_in_bytes == pytest.approx(count * 12 / split, rel=0.01)  # the state is updated in place


def decode(config, choice, mesh, rows, size):
  """The compiled decoding program, and the bytes of its cache on one device."""
  with jax.set_mesh(mesh):
    given, state = sampler(config, choice, mesh, rows, size, 384)
    compiled = programs.decode.lower(*given, state, jax.eval_shape(jax.random.key, 0), shape(mesh, 'L', 1),
                                     sampling=Sampling(0.7, 0.9, 1), steps=8).compile()
  return compiled, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[2])) / mesh.size


@pytest.mark.parametrize('choice', [attention.CPU, attention.XLA])
def test_a_prefill_copies_into_the_cache_in_place(choice):
  config, mesh, number = dataclasses.replace(PRESETS['tiny-test'], context=2048), make_mesh(1, 1, 1), jnp.int32
  with jax.set_mesh(mesh):
    given, _ = sampler(config, choice, mesh, 64, 2048, 384)
    view = caches.Prefill(shape(mesh, 'B', 2), *[jax.ShapeDtypeStruct((64,), number)] * 2,
                          jax.ShapeDtypeStruct((), number))
    memory = programs.prefill.lower(*given, shape(mesh, 'BT', 2, 64), view).compile().memory_analysis()
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given[2]))
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  assert memory.temp_size_in_bytes < 0.1 * cache


@pytest.mark.parametrize('choice', [attention.CPU, attention.XLA])
def test_decoding_updates_the_cache_in_place(choice):
  """No second copy of it, nor of a layer: the temporaries are what one token of every row needs."""
  config = dataclasses.replace(PRESETS['tiny-test'], context=2048)
  compiled, cache = decode(config, choice, make_mesh(1, 1, 1), 64, 2048)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  assert memory.temp_size_in_bytes < 0.05 * cache


def test_the_70b_decoding_compiles_with_its_cache_split_and_no_weights_gathered():
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype='bfloat16')
  compiled, cache = decode(config, attention.XLA, make_mesh(1, 1, 8), 64, 4096)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  weights = llama.param_count(config) * 2 / 8
  assert memory.argument_size_in_bytes == pytest.approx(weights + cache, rel=0.01)
  assert max(gathered(compiled), default=0) <= 64 * config.V  # logits, to draw from


def test_layers_that_are_recomputed_and_log_probs_in_chunks_take_less_memory(monkeypatch):
  config = dataclasses.replace(PRESETS['tiny-test'], layers=8, V=8192, context=512)
  batch = Batches([Example(f'e{i}', [1] * 16, ([2] * 496,)) for i in range(4)], 4, 1, 0).at(0)

  def temporaries(remat, chunk=vocab.CHUNK):
    monkeypatch.setattr(vocab, 'CHUNK', chunk)
    model = llama.Llama(config, kernels.to_train('cpu', config, remat), remat)
    with jax.set_mesh(make_mesh(1, 1, 1)):
      grad = jax.jit(jax.grad(lambda params: train_step.logps(model, params, batch).sum()))
      return grad.lower(llama.abstract_params(config)).compile().memory_analysis().temp_size_in_bytes
  chunks = temporaries(True, 64)
  assert chunks < 0.5 * temporaries(False, 64)
  assert chunks < 0.6 * temporaries(True, 512)
