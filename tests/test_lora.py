"""LoRA: adapters beside their weights, trained and saved alone."""
import dataclasses
import functools
import json
import math

from conftest import full_logits, init, make_mesh
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import draw, draw_batch, keys

from srlm_jax import config as configs, InputError, model_files, sharding
from srlm_jax.checkpoint import hashes, store
from srlm_jax.models import attention, int8, llama, lora, vocab
from srlm_jax.models.config import PRESETS
from srlm_jax.train import batch as batches, state as train_state, step as train_step

TINY = PRESETS['tiny-test']
RANK, ALPHA = 4, 8.0


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='.')


def adapter(config=TINY, rank=RANK, targets=configs.LORA_TARGETS, seed=5):
  """A random adapter whose B is not 0."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32),
                      lora.shapes(config, rank, targets))


def by_hand(params, adapters):
  """Parameters plus alpha / rank A B of every adapter, with numpy and without our names' tables."""
  out = {name: np.asarray(x, np.float64) for name, x in flat(params).items()}
  for a_name, a in ((n, x) for tree in adapters for n, x in flat(tree).items() if '_a_' in n):
    b = next(x for tree in adapters for n, x in flat(tree).items()
             if '_b_' in n and n.split('_b_')[0] == a_name.split('_a_')[0] and
             any(y is a for y in flat(tree).values()))
    for name in out:
      if name.rpartition('_')[0] == a_name.split('_a_')[0]:
        for layer in range(len(a)):
          update = np.tensordot(np.asarray(a[layer], np.float64), np.asarray(b[layer], np.float64), 1)
          out[name][layer] += ALPHA / RANK * update
  return traverse_util.unflatten_dict({n: jnp.asarray(x, jnp.float32) for n, x in out.items()},
                                      sep='.')


def tokens(config=TINY):
  return jnp.asarray(np.random.default_rng(1).integers(0, config.V, (2, 24)))


@pytest.mark.parametrize('targets', [configs.LORA_TARGETS, ('k_proj', 'o_proj')])
def test_merged_unmerged_and_fused_adapters_of_two_rounds_are_the_same_model(mesh, targets):
  params, first, second = init(TINY), adapter(targets=targets), adapter(targets=targets, seed=6)
  wanted = full_logits(llama.Llama(TINY), by_hand(params, [first, second]), tokens())
  assert np.abs(wanted - full_logits(llama.Llama(TINY), params, tokens())).max() > 0.1
  joined = lora.join(lora.join(params, first, ALPHA / RANK), second, ALPHA / RANK)
  def close(model, params):
    np.testing.assert_allclose(full_logits(model, params, tokens()), wanted, atol=2e-5)
  close(llama.Llama(TINY), joined)
  close(llama.Llama(TINY, attention.CPU), llama.unroll(joined))
  fused = dataclasses.replace(attention.XLA, fused=True)
  close(llama.Llama(TINY, fused), llama.fuse(joined))
  merged = lora.merge(jax.tree.map(jnp.copy, joined))
  assert flat(merged).keys() == flat(params).keys()
  close(llama.Llama(TINY), merged)
