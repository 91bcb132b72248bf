import json

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import InputError, model_files, sharding
from srlm_jax.checkpoint import hashes, store
from srlm_jax.models import config as model_config
from srlm_jax.models.config import PRESETS

TINY = PRESETS['tiny-test']


@pytest.fixture
def saved(tmp_path, tokenizer_folder, mesh):
  params = init(TINY)
  store.write_model_files(TINY, tokenizer_folder, tmp_path)
  saver = store.manager(tmp_path, keep=2)
  store.save(saver, 7, params, dict(step=jnp.asarray(7)))
  saver.close()
  return tmp_path, params


def test_parameters_come_back_on_another_mesh_with_the_same_hash(saved):
  folder, params = saved
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    placed, name = store.restore_params(folder, mesh, 'float32')
    assert name == hashes.hash_params(placed)
  jax.tree.map(np.testing.assert_array_equal, placed, params)
  assert placed['embed_VD'].sharding == sharding.named(mesh, 'VD')
  assert name == hashes.hash_params(params) == model_files.recorded_hash(folder)


def test_bf16_parameters_keep_the_name_of_what_was_stored(saved, mesh):
  folder, params = saved
  half, name = store.restore_params(folder, mesh, 'bfloat16')
  assert name == hashes.hash_params(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, params)


def test_a_changed_value_is_noticed(saved, mesh):
  folder, params = saved
  other = jax.tree.map(lambda x: x, params)
  other['embed_VD'] = params['embed_VD'].at[3, 5].add(1e-7)
  assert hashes.hash_params(other) != hashes.hash_params(params)
  swapped = dict(params, embed_VD=params['embed_VD'][::-1])
  assert hashes.hash_params(swapped) != hashes.hash_params(params)
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  path.write_text(path.read_text().replace(hashes.hash_params(params), '0' * 16))
  with pytest.raises(InputError, match='damaged'):
    store.restore_params(folder, mesh, 'float32')


def test_no_pattern_of_changes_has_the_same_hash():
  """A sum that is linear in a bit misses an even number of its flips: all of a matrix, or a few at random."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 48)).astype(np.float32)
  name = hashes.hash_params(dict(x=x))
  changed = [-x, x[::-1], x[:, ::-1], x.T.reshape(x.shape), np.roll(x, 1)]
  bits = x.view(np.uint32)
  for bit in (31, 30, 23, 0):
    for count in (2, 4, 16):
      for _ in range(50):
        flips = np.zeros(x.size, np.uint32)
        flips[rng.choice(x.size, count, replace=False)] = np.uint32(1 << bit)
        changed.append((bits ^ flips.reshape(x.shape)).view(np.float32))
  found = {hashes.hash_params(dict(x=y)) for y in changed}
  assert len(found) == len(changed) and name not in found


def test_the_index_of_a_large_array_has_more_than_32_bits():
  """Of arrays with 2**33 elements; only their shape and index are made, not their elements."""
  shape = (4, 2**15, 2**16)
  for where in ((0, 0, 5), (1, 3, 7), (2, 2**15 - 1, 2**16 - 1), (3, 2**15 - 1, 2**16 - 1)):
    flat = np.ravel_multi_index(where, shape)
    x = np.ones(1, np.float32)
    alone = hashes.weighted_sums(x, int(flat), np)
    low, high = (np.asarray(part) for part in hashes._flat_index((1,), int(flat), jnp))
    assert int(low[0]) + (int(high[0]) << 32) == flat
    assert (alone != hashes.weighted_sums(x, int(flat) % 2**32, np)).any() == (flat >= 2**32)


def test_strides_above_32_bits_count():
  """The shape (3, 2**17, 2**17) without its elements: only one row of one layer is indexed."""
  for shape in ((3, 1, 2**33), (2, 3, 2**34)):
    for xp in (np, jnp):
      low, high = hashes._index([np.arange(2), np.arange(shape[1])[-1:], np.arange(5)], shape, 7, xp)
      wanted = 7 + (np.arange(2)[:, None] * shape[1] + shape[1] - 1) * shape[2] + np.arange(5)
      found = np.asarray(low).astype(np.uint64) + (np.asarray(high).astype(np.uint64) << np.uint64(32))
      np.testing.assert_array_equal(found.reshape(2, 5), wanted.astype(np.uint64))


def test_the_optimizer_state_is_hashed_too(saved):
  folder, _ = saved
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = dict(step=jax.ShapeDtypeStruct((), jnp.int32, sharding=place))
  assert int(store.restore_train(folder, 7, abstract)['step']) == 7
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | dict(train=hashes.hash_params(dict(step=jnp.asarray(8))))))
  with pytest.raises(InputError, match='train does not have the hash that it was saved with'):
    store.restore_train(folder, 7, abstract)


def test_a_checkpoint_of_the_older_hash_is_refused_in_one_sentence(saved, mesh):
  folder, _ = saved
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  del found['format']
  path.write_text(json.dumps(found))
  with pytest.raises(InputError, match='an older version wrote this checkpoint'):
    store.restore_params(folder, mesh, 'float32')


def test_hashes_of_slices_add_up():
  x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  parts = sum(hashes.weighted_sums(x[i], 20 * i, np) for i in range(3))
  np.testing.assert_array_equal(parts, hashes.weighted_sums(x, 0, np))
  np.testing.assert_array_equal(parts, hashes.weighted_sums(jnp.asarray(x), 0, jnp))


def test_a_missing_checkpoint_or_one_of_another_shape_is_named(saved, mesh, tmp_path_factory):
  with pytest.raises(InputError, match='no checkpoint in'):
    model_files.latest(tmp_path_factory.mktemp('empty'))
  folder, _ = saved
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(PRESETS['stories-260k'])))
  rename_files(folder)
  with pytest.raises(InputError, match='checkpoint of another model'):
    store.restore_params(folder, mesh, 'float32')


def rename_files(folder):
  """Records the files of a model as they are now, as if they had been there when it was saved."""
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | dict(files=model_files.hashes(folder))))


@pytest.mark.parametrize('name, change', [
    ('config.json', lambda text: text.replace(b'10000.0', b'50000.0')),
    ('tokenizer.model', lambda text: text + b'x'), ('generation_config.json', lambda _: b'{}')])
def test_no_reader_takes_parameters_with_other_files_than_they_were_saved_with(
    saved, mesh, name, change):
  """Whoever reads them: a stage, generate, the export, a benchmark."""
  folder, _ = saved
  path = folder / name
  before = path.read_bytes() if path.exists() else b''
  assert change(before) != before
  path.write_bytes(change(before))
  for read in (lambda: store.restore_params(folder, mesh, 'float32'),
               lambda: model_files.recorded_hash(folder), lambda: model_files.read_hashes(folder)):
    with pytest.raises(InputError, match=f'{name} changed after the model was made; restore'):
      read()


@pytest.mark.parametrize('where, size', [('params', 0), ('params', 100)])
def test_damaged_arrays_are_called_damaged_and_not_another_model(saved, mesh, where, size):
  folder, _ = saved
  files = [p for p in (folder / 'steps' / '7' / where).rglob('d/*') if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(InputError, match=f'{where} cannot be read.*the checkpoint is damaged'):
    store.restore_params(folder, mesh, 'float32')
