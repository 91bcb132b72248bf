import json

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import checkpoint, InputError, sharding
from srlm_jax.models import config as model_config
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']


@pytest.fixture
def saved(tmp_path, tokenizer_folder, mesh):
  params = init(TINY)
  saver = checkpoint.manager(tmp_path, keep=2)
  checkpoint.save(saver, 7, params, dict(step=jnp.asarray(7)))
  saver.close()
  checkpoint.write_model_files(TINY, tokenizer_folder, tmp_path)
  return tmp_path, params


def test_parameters_come_back_on_another_mesh_with_the_same_hash(saved):
  folder, params = saved
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    placed, name = checkpoint.restore_params(folder, mesh, 'float32')
    assert name == checkpoint.hash_params(placed)
  jax.tree.map(np.testing.assert_array_equal, placed, params)
  assert placed['embed_VD'].sharding == sharding.named(mesh, 'VD')
  assert name == checkpoint.hash_params(params) == checkpoint.recorded_hash(folder)


def test_bf16_parameters_keep_the_name_of_what_was_stored(saved, mesh):
  folder, params = saved
  half, name = checkpoint.restore_params(folder, mesh, 'bfloat16')
  assert name == checkpoint.hash_params(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, params)


def test_a_changed_value_is_noticed(saved, mesh):
  folder, params = saved
  other = jax.tree.map(lambda x: x, params)
  other['embed_VD'] = params['embed_VD'].at[3, 5].add(1e-7)
  assert checkpoint.hash_params(other) != checkpoint.hash_params(params)
  swapped = dict(params, embed_VD=params['embed_VD'][::-1])
  assert checkpoint.hash_params(swapped) != checkpoint.hash_params(params)
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  path.write_text(path.read_text().replace(checkpoint.hash_params(params), '0' * 16))
  with pytest.raises(InputError, match='damaged'):
    checkpoint.restore_params(folder, mesh, 'float32')


def test_hashes_of_slices_add_up():
  x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  parts = sum(checkpoint.weighted_sums(x[i], 20 * i, np) for i in range(3))
  np.testing.assert_array_equal(parts, checkpoint.weighted_sums(x, 0, np))
  np.testing.assert_array_equal(parts, checkpoint.weighted_sums(jnp.asarray(x), 0, jnp))


def test_a_missing_checkpoint_or_one_of_another_shape_is_named(saved, mesh, tmp_path_factory):
  with pytest.raises(InputError, match='no checkpoint in'):
    checkpoint.latest(tmp_path_factory.mktemp('empty'))
  folder, _ = saved
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(PRESETS['stories-260k'])))
  with pytest.raises(InputError, match='checkpoint of another model'):
    checkpoint.restore_params(folder, mesh, 'float32')
