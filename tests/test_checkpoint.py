"""Checkpoints: save, restore, hashes, and errors for damaged or mismatched files."""
import json
import os
import pathlib

from conftest import init, make_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from srlm_jax import InputError, model_files, sharding, storage
from srlm_jax.checkpoint import convert, hashes, store
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


def test_parameters_restore_on_another_mesh_with_the_same_hash(saved):
  folder, params = saved
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    placed, name = store.restore_params(folder, mesh, 'float32')
    assert name == hashes.hash_params(placed)
  jax.tree.map(np.testing.assert_array_equal, placed, params)
  assert placed['embed_VD'].sharding == sharding.named(mesh, 'VD')
  assert name == hashes.hash_params(params) == model_files.recorded_hash(folder)


def test_restoring_in_bf16_returns_the_hash_of_the_stored_parameters(saved, mesh):
  folder, params = saved
  half, name = store.restore_params(folder, mesh, 'bfloat16')
  assert name == hashes.hash_params(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, params)


def test_a_changed_value_changes_the_hash(saved, mesh):
  folder, params = saved
  x, other = params['embed_VD'], jax.tree.map(lambda x: x, params)
  other['embed_VD'] = params['embed_VD'].at[3, 5].add(1e-7)
  assert hashes.hash_params(other) != hashes.hash_params(params)
  swapped = dict(params, embed_VD=params['embed_VD'][::-1])
  assert hashes.hash_params(swapped) != hashes.hash_params(params)
  assert hashes.hash_params({'bc': x}, more='a') != hashes.hash_params({'c': x}, more='ab')
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  path.write_text(path.read_text().replace(hashes.hash_params(params), '0' * 16))
  with pytest.raises(InputError, match='damaged'):
    store.restore_params(folder, mesh, 'float32')


def test_all_files_of_a_step_are_synced_with_their_last_content(tmp_path, tokenizer_folder, mesh,
                                                                monkeypatch):
  synced, sync = {}, storage._sync

  def record(path):
    path = pathlib.Path(path)
    synced[path.stat().st_ino] = path.read_bytes() if path.is_file() else sorted(os.listdir(path))
    sync(path)
  monkeypatch.setattr(storage, '_sync', record)
  store.write_model_files(TINY, tokenizer_folder, tmp_path)
  saver = store.manager(tmp_path, keep=2)
  store.save(saver, 7, init(TINY), dict(step=jnp.asarray(7)))
  saver.close()
  steps = tmp_path / 'steps'
  paths = [steps, *steps.rglob('*')]
  assert {'_CHECKPOINT_METADATA', 'commit_success.txt', 'metadata', '7'} <= {p.name for p in paths}
  for path in paths:
    content = path.read_bytes() if path.is_file() else sorted(os.listdir(path))
    assert synced[path.stat().st_ino] == content, path


def test_a_step_is_restored_without_what_orbax_writes_before_the_name_is_durable(saved, mesh):
  folder, params = saved
  for name in ('_CHECKPOINT_METADATA', 'commit_success.txt'):
    (folder / 'steps' / '7' / name).write_text('')
  jax.tree.map(np.testing.assert_array_equal, store.restore_params(folder, mesh, 'float32')[0],
               params)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.named(mesh, ''))
  assert store.restore_train(folder, 7, dict(step=step))['step'] == 7
  saver = store.manager(folder, keep=2)
  store.save(saver, 8, params)
  saver.close()
  assert model_files.steps(folder) == [7, 8]


def test_pruning_deletes_old_steps_and_parts_of_steps_and_nothing_else(tmp_path):
  others = '2.backup', '12.tar', 'notes.txt', 'best'
  for name in ('1', '2', '3', '4', '5.orbax-checkpoint-tmp', '5.orbax-checkpoint-tmp-1', *others):
    (tmp_path / 'steps' / name).mkdir(parents=True)
  store.prune(tmp_path, keep=2)
  assert sorted(p.name for p in (tmp_path / 'steps').iterdir()) == sorted(['3', '4', *others])


def test_structured_changes_do_not_cancel_in_the_hash():
  """A sum that is linear in a bit misses an even number of flips: in a whole matrix, or a few."""
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


def test_the_flat_index_exceeds_32_bits():
  """Uses the shape of an array with 2**33 elements, without allocating it."""
  shape = (4, 2**15, 2**16)
  for index in ((0, 0, 5), (1, 3, 7), (2, 2**15 - 1, 2**16 - 1), (3, 2**15 - 1, 2**16 - 1)):
    flat = np.ravel_multi_index(index, shape)
    x = np.ones(1, np.float32)
    sums = hashes.hash_sums(x, int(flat), np)
    low, high = (np.asarray(part) for part in hashes._flat_index((1,), int(flat), jnp))
    assert int(low[0]) + (int(high[0]) << 32) == flat
    assert (sums != hashes.hash_sums(x, int(flat) % 2**32, np)).any() == (flat >= 2**32)


def test_strides_may_exceed_32_bits():
  """Uses the shape of a large array, and the indices of a few of its elements."""
  for shape in ((3, 1, 2**33), (2, 3, 2**34)):
    for xp in (np, jnp):
      indices = [np.arange(2), np.arange(shape[1])[-1:], np.arange(5)]
      low, high = (np.asarray(part).astype(np.uint64)
                   for part in hashes._ravel_index(indices, shape, 7, xp))
      found = low + (high << np.uint64(32))
      expected = 7 + (np.arange(2)[:, None] * shape[1] + shape[1] - 1) * shape[2] + np.arange(5)
      np.testing.assert_array_equal(found.reshape(2, 5), expected.astype(np.uint64))


def test_a_changed_optimizer_state_is_refused(saved):
  folder, _ = saved
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = dict(step=jax.ShapeDtypeStruct((), jnp.int32, sharding=device))
  assert int(store.restore_train(folder, 7, abstract)['step']) == 7
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | dict(train=hashes.hash_params(dict(step=jnp.asarray(8))))))
  with pytest.raises(InputError, match='train does not match its recorded hash'):
    store.restore_train(folder, 7, abstract)


def test_a_checkpoint_with_an_older_hash_format_is_refused(saved, mesh):
  folder, _ = saved
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  del found['format']
  path.write_text(json.dumps(found))
  with pytest.raises(InputError, match='an older version wrote this checkpoint'):
    store.restore_params(folder, mesh, 'float32')


def test_sums_over_slices_add_up_to_the_sums_over_the_array():
  x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  parts = sum(hashes.hash_sums(x[i], 20 * i, np) for i in range(3))
  np.testing.assert_array_equal(parts, hashes.hash_sums(x, 0, np))
  np.testing.assert_array_equal(parts, hashes.hash_sums(jnp.asarray(x), 0, jnp))


def test_a_missing_checkpoint_and_one_of_another_model_are_named(saved, mesh, tmp_path_factory):
  with pytest.raises(InputError, match='no checkpoint in'):
    model_files.latest(tmp_path_factory.mktemp('empty'))
  folder, _ = saved
  for read in (lambda: store.restore_params(folder, mesh, 'float32', 9),
               lambda: model_files.recorded_hash(folder, 9),
               lambda: convert.to_hf(folder, folder / 'hf', 9)):
    with pytest.raises(InputError, match='has the steps 7, not step 9; name one that exists'):
      read()
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(PRESETS['stories-260k'])))
  record_files(folder)
  with pytest.raises(InputError, match='checkpoint of another model'):
    store.restore_params(folder, mesh, 'float32')


def record_files(folder):
  """Replaces the recorded hashes of the model files by those of the current files."""
  path = folder / 'steps' / '7' / 'hash' / 'metadata'
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | dict(files=model_files.hashes(folder))))


@pytest.mark.parametrize('name, change', [
    ('config.json', lambda text: text.replace(b'10000.0', b'50000.0')),
    ('tokenizer.model', lambda text: text + b'x'), ('generation_config.json', lambda _: b'{}')])
def test_every_reader_refuses_parameters_whose_model_files_changed(saved, mesh, name, change):
  """The readers are stages, generate, the conversion and benchmarks."""
  folder, _ = saved
  path = folder / name
  before = path.read_bytes() if path.exists() else b''
  assert change(before) != before
  path.write_bytes(change(before))
  for read in (lambda: store.restore_params(folder, mesh, 'float32'),
               lambda: model_files.recorded_hash(folder), lambda: model_files.read_hashes(folder)):
    with pytest.raises(InputError, match=f'{name} changed after the model was made; restore'):
      read()


@pytest.mark.parametrize('size', [0, 100])
def test_damaged_arrays_are_reported_as_damage_not_as_another_model(saved, mesh, size):
  folder, _ = saved
  files = [p for p in (folder / 'steps' / '7' / 'params').rglob('d/*') if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(InputError, match='params cannot be read.*the checkpoint is damaged'):
    store.restore_params(folder, mesh, 'float32')


def test_a_deep_description_of_an_array_is_refused_before_tensorstore_parses_it(saved, mesh):
  folder, _ = saved
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  step = dict(step=jax.ShapeDtypeStruct((), jnp.int32, sharding=device))
  for part, array, read in (
      ('params', 'layers.mlp.gate_DF', lambda: store.restore_params(folder, mesh, 'float32')),
      ('train', 'step', lambda: store.restore_train(folder, 7, step))):
    path = folder / 'steps' / '7' / part
    stored = ts.KvStore.open(dict(driver='ocdbt', base=f'file://{path}/')).result()
    assert b'"zarr_format"' in stored.read(f'{array}/.zarray').result().value
    read()
    stored.write(f'{array}/.zarray', b'[' * 10**5 + b']' * 10**5).result()
    with pytest.raises(InputError, match=f'{array}/.zarray is too long.*the checkpoint is damaged'):
      read()


@pytest.mark.parametrize('name', [
    'added_tokens.json', 'tokenizer.4.0.0.json', 'additional_chat_templates/default.jinja'])
def test_every_file_that_a_tokenizer_reads_is_hashed_and_copied(saved, tmp_path_factory, name):
  folder, _ = saved
  (folder / name).parent.mkdir(exist_ok=True)
  (folder / name).write_text('{}')
  with pytest.raises(InputError, match=f'{name} changed after the model was made'):
    model_files.read_hashes(folder)
  target = tmp_path_factory.mktemp('copy')
  model_files.copy(folder, target)
  assert (target / name).read_text() == '{}'


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"step": 8}', '{"step": "7"}'])
def test_a_damaged_selection_is_refused(saved, text):
  folder, _ = saved
  (folder / model_files.SELECTED).write_text(text)
  with pytest.raises(InputError, match='selected.json.*run the selection again'):
    model_files.latest(folder)
