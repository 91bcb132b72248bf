"""The same number of rows on every mesh: the same steps, losses and parameters."""
import functools
import json

from conftest import init, make_mesh
import jax
import numpy as np
import pytest
from test_reference import pairs
from test_step import draw, keys as keys_of, TINY

from srlm_jax import config as configs, InputError, records, schema, sharding
from srlm_jax.checkpoint import store
from srlm_jax.data import packing
from srlm_jax.models import llama
from srlm_jax.train import batch as batches, run as train, step as train_step

MESHES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2)]
DEVICES = jax.devices()


@pytest.fixture
def run(tmp_path, tokenizer_folder, monkeypatch):
  """A function that trains SFT or M2 on as many devices as a mesh has -> its workdir."""
  def start(mesh, name='m2', **keys):
    devices = DEVICES[:int(np.prod(mesh))]
    monkeypatch.setattr(jax, 'devices', lambda: devices)
    monkeypatch.setattr(jax, 'device_count', lambda: len(devices))
    workdir = tmp_path / 'x'.join(map(str, mesh))
    config = configs.get(name, 'tiny').copy_and_resolve_references().unlock()
    config.model = ''
    config.train.update(dict(batch=8, epochs=2, max_length=64, log_every=1, rows=8) | keys)
    config.mesh.update(**dict(zip(sharding.NAMES, mesh, strict=True)))
    source = workdir / config.train.init / 'model'
    if not source.exists():
      with jax.set_mesh(make_mesh(1, 1, 1)):
        store.write_model_files(TINY, tokenizer_folder, source)
        saver = store.manager(source, 1)
        store.save(saver, 0, init(TINY))
        saver.close()
    made = list(pairs())
    if name == 'm2':
      records.write(workdir / 'm2' / 'pairs' / 'pairs.jsonl', made)
    else:
      records.write(workdir / 'data' / 'seeds' / 'ift.jsonl', [
          schema.Demonstration(id=p.id, prompt=p.prompt, response=p.chosen) for p in made])
    train.run(config, workdir)
    return workdir / name / 'model'
  return start


def end(folder):
  """-> rows and width, the metrics, and the parameters of the last step."""
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, _ = store.restore_params(folder, make_mesh(1, 1, 1), 'float32')
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    line.pop('tokens_per_second')
  return json.loads((folder / train.ROWS).read_text()), lines, jax.device_get(params)


@functools.cache
def steps(shape):
  """The parameters after three steps of gradient descent, with the rows of `packing.fixed`."""
  mesh, examples = make_mesh(*shape), draw('sft', 40)
  rows = packing.fixed(8, examples, 8, 1, 0, 32, 8)
  packed = packing.Packing(examples, 8, 1, 0, 32, shape[0] * shape[1], 8, rows)
  with jax.set_mesh(mesh):
    params = init(TINY)
    places = sharding.shardings(params, mesh)
    params = jax.tree.map(sharding.put, params, places)

    @functools.partial(jax.jit, out_shardings=places)
    def step(params, batch):
      model = llama.Llama(TINY)
      gradient, _ = train_step.gradient(model, keys_of('sft'), params, {}, batch, None)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    for i in range(3):
      params = step(params, sharding.put_batch(batches.pack(packed.rows(i), packed.shape), mesh))
  return jax.device_get(params)


@pytest.mark.parametrize('shape', [
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[1:-1]), MESHES[-1]], ids=str)
def test_steps_of_the_same_rows_give_the_same_parameters_on_every_mesh(shape):
  wanted = steps(MESHES[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wanted, steps(shape))
  with jax.set_mesh(make_mesh(1, 1, 1)):
    before = init(TINY)
  assert max(abs(a - b).max() for a, b in
             zip(*map(jax.tree.leaves, (wanted, before)), strict=True)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('name, keys', [
    ('sft', {}), ('m2', dict(dropout=0.3)), ('m2', dict(reference='cached')),
    ('m2', dict(accumulate=2, rows=16, batch=16, epochs=4.0)),
    ('m2', dict(lora_rank=4, learning_rate=2e-4))], ids=str)
def test_the_same_rows_train_the_same_parameters_on_every_mesh(run, name, keys):
  folders = [run(mesh, name, **keys) for mesh in MESHES]
  wanted, *others = map(end, folders)
  rows, lines, params = wanted
  assert rows['shape'][0] == keys.get('rows', 8) and len(lines) > 3
  changes = []
  with jax.set_mesh(make_mesh(1, 1, 1)):
    before = init(TINY)
  for shape, found_lines, found in others:
    assert shape == rows and len(found_lines) == len(lines)
    for a, b in zip(lines, found_lines, strict=True):
      assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, found)
    changes += [abs(a - b).max() for a, b in
                zip(*map(jax.tree.leaves, (found, before)), strict=True)]
  assert max(changes) > 1e-4  # ten times what meshes may differ

  (folders[-1] / 'done.json').unlink()
  message = rf'made with another config.train.rows \({rows["shape"][0]}, now 2\)'
  with pytest.raises(InputError, match=message):
    run(MESHES[-1], name, **keys | dict(rows=2))


def test_rows_that_suit_neither_mesh_nor_batch_are_refused_and_write_nothing(run, tmp_path):
  cases = [
      (dict(rows=6), 'every step has 6 rows .*; here rows must be a multiple of 4, config'),
      (dict(rows=4, accumulate=2), 'every step has 4 rows .* a multiple of 8, config.train.accum'),
      (dict(rows=1, accumulate=1, max_length=40), 'config.train.rows is 1, and so many rows of at '
       r'most \d+ tokens hold fewer examples per step than config.train.batch = 8; \d+ rows hold')]
  for keys, message in cases:
    with pytest.raises(InputError, match=message):
      run((1, 4, 1), **keys)
    assert [p.name for p in (tmp_path / '1x4x1' / 'm2').iterdir()] == ['pairs']


def test_the_config_refuses_rows_that_no_data_could_have():
  config = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
  for keys, message in (
      (dict(rows=0), r'config.train.rows is 0; it must be -1, or above 0'),
      (dict(rows=4, pack=False), r'config.train.rows is 4, and without packing .* leave it')):
    changed = config.copy_and_resolve_references()
    changed.train.update(keys)
    with pytest.raises(InputError, match=message):
      configs.check(changed)
  for keys in dict(rows=32), dict(rows=16, pack=False):  # 32: what 32 shards choose
    config.train.update(keys)
    configs.check(config)
