"""The 70B programs, compiled for 8 fake devices without their memory."""
import dataclasses

from conftest import make_mesh
import jax
import jax.numpy as jnp
import pytest

from configs import base
from srlm_jax import checkpoint, sharding
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS
from srlm_jax.train import state as train_state, step as train_step


def test_the_70b_dpo_step_compiles_and_its_arguments_are_split_evenly():
  c = base.get('m2', '70b').train
  mesh = make_mesh(2, 2, 2)
  config = dataclasses.replace(PRESETS['llama2-70b'], dtype=c.dtype, dropout=c.dropout)
  with jax.set_mesh(mesh):
    params = llama.abstract_params(config)
    tx = train_state.optimizer(c, 100)
    state = jax.eval_shape(lambda p: train_state.TrainState.create(p, tx), params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                         sharding.shardings(state, mesh))
    reference = checkpoint.abstract_on(mesh, params, c.dtype)
    batch = {k: jax.ShapeDtypeStruct((16, 2, 512), jnp.int32, sharding=sharding.named(mesh, 'BTT'))
             for k in ('tokens', 'loss_mask')}
    batch['confidence'] = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding.named(mesh, 'B'))
    step = train_step.make(llama.Llama(config, remat=c.remat), tx, c, state)
    compiled = step.lower(state, reference, batch, jax.random.key(0)).compile()
  memory = compiled.memory_analysis()
  count = llama.param_count(config)
  split = 2 * 2  # over fsdp and tensor; the data axis holds copies
  wanted = count * (3 * 4 + 2) / split  # parameters and two moments in float32, the reference in bf16
  assert memory.argument_size_in_bytes == pytest.approx(wanted, rel=0.01)
  assert memory.alias_size_in_bytes == pytest.approx(count * 12 / split, rel=0.01)  # the state is updated in place
