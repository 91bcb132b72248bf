from conftest import make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import sharding
from srlm_jax.models import vocab


@pytest.mark.parametrize('shape', [*MESHES, (1, 1, 8)])
def test_a_split_vocabulary_gives_the_same_embeddings_log_probs_and_gradients(shape):
  mesh = make_mesh(*shape)
  rng = np.random.default_rng(0)
  table = rng.normal(size=(64, 16)).astype(np.float32)
  logits = rng.normal(size=(8, 5, 64)).astype(np.float32) * 5
  tokens = rng.integers(0, 64, (8, 5), np.int32)

  def split(table, logits):
    return vocab.embed(table, tokens), vocab.token_logps(logits, tokens)

  def plain(table, logits):
    logps = jax.nn.log_softmax(logits)
    return table[tokens], jnp.take_along_axis(logps, tokens[..., None], -1)[..., 0]

  def loss(f):
    return lambda *args: sum((x ** 2).sum() for x in f(*args))
  with jax.set_mesh(mesh):
    args = (sharding.put(table, sharding.named(mesh, 'VD')),
            sharding.put(logits, sharding.named(mesh, 'BTV')))
    found, grads = jax.jit(split)(*args), jax.jit(jax.grad(loss(split), (0, 1)))(*args)
  wanted = (*plain(table, logits), *jax.grad(loss(plain), (0, 1))(table, logits))
  for a, b in zip((*found, *grads), wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
