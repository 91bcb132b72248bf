"""Conversion between Hugging Face folders and checkpoints: bits, hashes, errors and memory."""
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

from conftest import make_mesh, tokenizer_bytes
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from srlm_jax import InputError, model_files
from srlm_jax.checkpoint import convert, hashes, hf, store
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import Config
from srlm_jax.models.families import FAMILIES

GROUPED = Config(D=32, F=48, K=2, G=3, H=8, V=64, layers=3, context=32, biases='qkvo')
TIED = Config(D=32, F=48, K=4, G=1, H=8, V=64, layers=2, context=32, tied=True)


def make(folder, config, dtype='float32', files=1):
  """Writes a Hugging Face folder of random weights with the safetensors library -> its tensors.

  The tensors are distributed over `files` files.
  """
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  tensors = {name: rng.normal(scale=0.02, size=leaf.hf_shape).astype(dtype)
             for leaf in hf.leaves(config) for name in leaf.tensors}
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(config, dtype)))
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  if files == 1:
    save_file(tensors, folder / 'model.safetensors')
  else:
    weight_map = {name: f'model-{i % files}.safetensors' for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
      save_file({name: x for name, x in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=weight_map)))
  return tensors


def load(folder):
  """All tensors of a folder, by name."""
  files = sorted(folder.glob('*.safetensors'))
  return {name: x for file in files for name, x in load_file(file).items()}


def assert_same_bits(a: dict, b: dict):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
    assert a[name].tobytes() == b[name].tobytes(), name


def change(folder, edit, file='model.safetensors'):
  """Applies `edit` to the tensors of a file."""
  tensors = load_file(folder / file)
  edit(tensors)
  save_file(tensors, folder / file)


def files_of(folder):
  return sorted(p.relative_to(folder) for p in folder.rglob('*'))


@pytest.mark.parametrize('config', [GROUPED, TIED], ids=['bias', 'tied'])
def test_the_table_has_exactly_the_parameters_of_the_model(mesh, config):
  params = traverse_util.flatten_dict(llama.abstract_params(config), sep='.')
  shapes = {name: x.shape for name, x in params.items()}
  assert {leaf.name: leaf.shape for leaf in hf.leaves(config)} == shapes


def test_query_heads_are_grouped_by_key_value_head():
  wq = next(leaf for leaf in hf.leaves(GROUPED) if leaf.name.endswith('wq_DKGH'))
  tensor = np.arange(np.prod(wq.hf_shape)).reshape(wq.hf_shape)  # [K * G * H, D]
  k, g, h, d, c = 1, 2, 5, 7, GROUPED
  assert wq.ours(tensor)[d, k, g, h] == tensor[(k * c.G + g) * c.H + h, d]


def test_a_real_model_survives_the_round_trip_bit_for_bit(stories, tmp_path):
  imported = convert.from_hf(stories, tmp_path / 'ours')
  exported = convert.to_hf(tmp_path / 'ours', tmp_path / 'theirs')
  assert_same_bits(load(tmp_path / 'theirs'), load_file(stories / 'model.safetensors'))
  for name in ('config.json', 'tokenizer.model', 'tokenizer_config.json', 'generation_config.json'):
    assert (tmp_path / 'theirs' / name).read_bytes() == (stories / name).read_bytes()
  assert str(imported) == str(exported) == (
      f'260,032 parameters, 1,040,128 bytes, hash {imported.hashes().stored}')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('config', [GROUPED, TIED], ids=['bias', 'tied'])
def test_random_models_survive_the_round_trip_bit_for_bit(tmp_path, monkeypatch, config, dtype):
  # Small enough for several writes per tensor and several chunks per write.
  monkeypatch.setattr(store, 'CHUNK_BYTES', 2**11)
  monkeypatch.setattr(convert, 'CHUNKS_AT_ONCE', 2)
  tensors = make(tmp_path / 'hf', config, dtype, files=2)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'one')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'many', shard_bytes=20_000)
  assert [p.name for p in (tmp_path / 'one').glob('*.safetensors')] == ['model.safetensors']
  assert_same_bits(load(tmp_path / 'one'), tensors)
  assert_same_bits(load(tmp_path / 'many'), tensors)
  index = json.loads((tmp_path / 'many' / 'model.safetensors.index.json').read_text())
  assert len(set(index['weight_map'].values())) > 1
  assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
  for name, file in index['weight_map'].items():
    assert name in load_file(tmp_path / 'many' / file)
  again = convert.from_hf(tmp_path / 'many', tmp_path / 'again')
  assert again.hashes().stored == model_files.recorded_hash(tmp_path / 'ours')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_conversion_records_the_hashes_of_the_restored_parameters(tmp_path, mesh, dtype):
  make(tmp_path / 'hf', GROUPED, dtype)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  params, name = store.restore_params(tmp_path / 'ours', mesh, dtype)
  recorded = model_files.read_hashes(tmp_path / 'ours')
  assert recorded.files == model_files.hashes(tmp_path / 'ours')
  assert recorded.files.items() > model_files.hashes(tmp_path / 'hf').items()
  assert recorded.params == hashes.hash_all_dtypes(params)
  assert name == recorded.params.stored == hashes.hash_params(params)
  path = tmp_path / 'ours' / 'steps' / '0' / 'hash' / 'metadata'
  assert json.loads(path.read_text()) == dict(
      format=3, stored=name, float32=hashes.hash_params(params, 'float32'),
      bfloat16=hashes.hash_params(params, 'bfloat16'), files=recorded.files)
  saver = store.manager(tmp_path / 'ours', keep=1)
  assert saver.all_steps() == [0]
  saver.close()


@pytest.mark.parametrize('axes', [(1, 1, 1), (2, 2, 2)])
def test_load_hf_equals_conversion_and_restore(tmp_path, axes):
  make(tmp_path / 'hf', GROUPED, 'bfloat16', files=2)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  mesh = make_mesh(*axes)
  with jax.set_mesh(mesh):
    restored, _ = store.restore_params(tmp_path / 'ours', mesh, 'float32')
    loaded = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  jax.tree.map(np.testing.assert_array_equal, loaded, restored)
  assert jax.tree.map(lambda x: (x.dtype, x.sharding), loaded) == jax.tree.map(
      lambda x: (x.dtype, x.sharding), restored)


def test_an_exported_checkpoint_states_its_stored_dtype_and_keeps_its_bits(tmp_path):
  mesh = make_mesh(1, 2, 2)
  make(tmp_path / 'hf', TIED)
  params = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  (tmp_path / 'ours').mkdir()
  text = json.dumps(model_config.to_hf(TIED, 'bfloat16'))
  (tmp_path / 'ours' / 'config.json').write_text(text)
  saver = store.manager(tmp_path / 'ours', keep=2)
  for step in (3, 5):
    store.save(saver, step, params)
    params = jax.tree.map(lambda x: x + 1, params)
  saver.close()
  convert.to_hf(tmp_path / 'ours', tmp_path / 'last')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'first', step=3)
  fields = json.loads((tmp_path / 'last' / 'config.json').read_text())
  assert (fields['dtype'], fields['torch_dtype']) == ('float32', 'float32')
  first, last = load(tmp_path / 'first'), load(tmp_path / 'last')
  assert_same_bits(first, load(tmp_path / 'hf'))
  for name in first:
    np.testing.assert_array_equal(last[name], first[name] + 1)
  convert.from_hf(tmp_path / 'last', tmp_path / 'again')
  again = model_files.recorded_hash(tmp_path / 'again')
  assert again == model_files.recorded_hash(tmp_path / 'ours', 5)


@pytest.mark.parametrize('edit, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     'has no tensor model.layers.1.mlp.up_proj.weight'),
    (lambda t: t.update(extra=np.zeros(2, 'float32')), 'tensor extra is not part of'),
    (lambda t: t.update({'model.norm.weight': np.zeros(31, 'float32')}),
     r'norm.weight has shape \[31\]'),
    (lambda t: t.update({'model.norm.weight': np.zeros(32, 'int32')}), 'model.norm.weight is I32'),
    (lambda t: t.update({'model.layers.1.input_layernorm.weight': np.zeros(32, 'float16')}),
     'is float16'),
], ids=['missing', 'unexpected', 'shape', 'integers', 'mixed'])
def test_a_mismatched_tensor_is_named_with_its_file(tmp_path, edit, message):
  make(tmp_path / 'hf', TIED)
  change(tmp_path / 'hf', edit)
  with pytest.raises(InputError, match=message) as error:
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert str(tmp_path / 'hf' / 'model.safetensors') in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ['hf']


def test_tensors_that_are_not_parameters_are_ignored(tmp_path):
  tensors = make(tmp_path / 'hf', TIED)
  change(tmp_path / 'hf', lambda t: t.update({
      'lm_head.weight': t['model.embed_tokens.weight'].copy(),
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, 'float32')}))
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert_same_bits(load(tmp_path / 'back'), tensors)


def test_incomplete_and_missing_files_are_refused(tmp_path):
  make(tmp_path / 'hf', TIED, files=2)
  file = tmp_path / 'hf' / 'model-1.safetensors'
  whole = file.read_bytes()
  for part in (whole[:-1], whole[:5], b'<html>no such model</html>'):
    file.write_bytes(part)
    with pytest.raises(InputError, match='model-1.safetensors is not a complete safetensors file'):
      convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  file.unlink()
  with pytest.raises(InputError, match='lists model-1.safetensors, which does not exist'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  (tmp_path / 'hf' / 'model.safetensors.index.json').unlink()
  with pytest.raises(InputError, match='contains neither model.safetensors nor'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')


def test_existing_folders_are_not_overwritten(tmp_path):
  make(tmp_path / 'hf', TIED)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  before = files_of(tmp_path)
  with pytest.raises(InputError, match=f'{tmp_path}/ours already exists'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  with pytest.raises(InputError, match=f'{tmp_path}/hf already exists'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'hf')
  assert files_of(tmp_path) == before


def test_a_failed_conversion_leaves_no_files_and_can_be_repeated(tmp_path, monkeypatch):
  make(tmp_path / 'hf', TIED)
  (tmp_path / 'ours.partial' / 'steps').mkdir(parents=True)  # left by a killed run
  whole = hf.Tensor.read
  def read(tensor):
    if tensor.shape == (TIED.D, TIED.F):
      raise OSError('the disk is gone')
    return whole(tensor)
  monkeypatch.setattr(hf.Tensor, 'read', read)
  with pytest.raises(OSError, match='the disk is gone'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert [p.name for p in tmp_path.iterdir()] == ['hf']
  monkeypatch.undo()
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert {p.name for p in tmp_path.iterdir()} == {'hf', 'ours'}


def test_export_refuses_a_mismatched_config_a_missing_step_and_a_wrong_hash(tmp_path):
  make(tmp_path / 'hf', TIED)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  fields = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  for name, value, message in (('tie_word_embeddings', False, 'has no array lm_head_DV'),
                               ('vocab_size', 65, r'array embed_VD has shape \[64, 32\]')):
    (tmp_path / 'ours' / 'config.json').write_text(json.dumps(fields | {name: value}))
    with pytest.raises(InputError, match=message):
      convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  (tmp_path / 'ours' / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError, match='has the steps 0, not step 9'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'back', step=9)
  path = tmp_path / 'ours' / 'steps' / '0' / 'hash' / 'metadata'
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(stored='0' * 16)))
  with pytest.raises(InputError, match='the checkpoint is damaged'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert {p.name for p in tmp_path.iterdir()} == {'hf', 'ours'}


def test_the_program_converts_and_reports_errors_in_one_line(tmp_path):
  make(tmp_path / 'hf', TIED)
  def run(*args):
    program = [sys.executable, '-m', 'srlm_jax.checkpoint.convert']
    return subprocess.run(program + list(args), capture_output=True, text=True)
  done = run(f'--from_hf={tmp_path}/hf', f'--out={tmp_path}/ours')
  name = model_files.recorded_hash(tmp_path / 'ours')
  assert done.returncode == 0 and f'hash {name}' in done.stdout
  wrong = run(f'--from_hf={tmp_path}/hf', f'--to_hf={tmp_path}/back')
  assert wrong.returncode == 1 and wrong.stderr.splitlines() == [
      'error: give --from_hf=DIR --out=DIR, or --checkpoint=DIR --to_hf=DIR, or --from_peft=DIR '
      '--base=DIR --out=DIR, or --checkpoint=DIR --to_peft=DIR']


SLOW = """
import sys
from srlm_jax import cli
from srlm_jax.checkpoint import convert, hf
convert.define_flags()
whole = hf.Tensor.read
def read(tensor):
  print('reads', flush=True)
  sys.stdin.readline()
  return whole(tensor)
hf.Tensor.read = read
cli.run_app(convert.main)
"""


def test_a_concurrent_conversion_into_the_same_folder_is_refused(tmp_path):
  make(tmp_path / 'hf', TIED)
  out = tmp_path / 'new' / 'ours'
  args = [f'--from_hf={tmp_path}/hf', f'--out={out}']
  program = [sys.executable, '-m', 'srlm_jax.checkpoint.convert']
  before = files_of(tmp_path)
  missing = subprocess.run(program + [f'--from_hf={tmp_path}/none', f'--out={out}'],
                           capture_output=True, text=True)
  assert missing.returncode == 1 and files_of(tmp_path) == before
  first = subprocess.Popen([sys.executable, '-c', SLOW] + args, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == 'reads\n'
  before = files_of(tmp_path / 'new')
  second = subprocess.run(program + args, capture_output=True, text=True)
  assert second.returncode == 1 and files_of(tmp_path / 'new') == before
  refusal, = second.stderr.splitlines()
  assert refusal.startswith(f'error: {out} is in use by ') and f'process {first.pid}, ' in refusal
  assert refusal.endswith('; wait for that run, or use another --out')
  first.communicate('\n' * 1000)
  assert first.returncode == 0 and [p.name for p in (tmp_path / 'new').iterdir()] == ['ours']
  model_files.recorded_hash(out)


MEASURE = """
import sys
from srlm_jax.checkpoint import convert
def peak():  # ru_maxrss would include the parent process
  return 1024 * int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])
start = peak()
getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3])
print('peak', start, peak())
"""


def write_large(folder, config):
  """Writes a Hugging Face folder in bfloat16, tensor by tensor."""
  folder.mkdir()
  dtypes = {leaf.name: np.dtype(ml_dtypes.bfloat16) for leaf in hf.leaves(config)}
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(config, 'bfloat16')))
  noise = np.random.default_rng(0).normal(scale=0.02, size=2**20 + 7).astype(ml_dtypes.bfloat16)
  (file, part), = hf.shards(config, dtypes, 2**40).items()
  with (folder / file).open('wb') as f:
    f.write(hf.header(part, dtypes))
    for i, (leaf, _) in enumerate(part):
      np.resize(np.roll(noise, i * 7919), leaf.hf_shape).tofile(f)


def peaks(tmp_path, config):
  """Converts in both directions -> [(peak bytes at the start, at the end)], largest tensor's bytes.

  Checks that the round trip keeps every byte.
  """
  if not pathlib.Path('/proc/self/status').exists():
    pytest.skip('/proc/self/status, which has the peak memory, is absent')
  write_large(tmp_path / 'hf', config)
  found = []
  for name, source, out in (('from_hf', 'hf', 'ours'), ('to_hf', 'ours', 'back')):
    done = subprocess.run([sys.executable, '-c', MEASURE, name, tmp_path / source, tmp_path / out],
                          capture_output=True, text=True, check=True)
    found.append(tuple(map(int, done.stdout.split()[-2:])))
  before, after = (tmp_path / folder / hf.SINGLE for folder in ('hf', 'back'))
  with before.open('rb') as a, after.open('rb') as b:
    while block := a.read(2**24):
      assert block == b.read(2**24)
    assert not b.read(1)
  shutil.rmtree(tmp_path)
  return found, max(2 * int(np.prod(leaf.hf_shape)) for leaf in hf.leaves(config))


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_peak_memory_does_not_grow_with_the_model(tmp_path, family):
  config = Config(D=512, F=1024, K=1, G=1, H=64, V=512, layers=32, context=32, family=family,
                  **FAMILIES[family].constants)
  size = 2 * llama.param_count(config)
  found, largest = peaks(tmp_path, config)
  for start, end in found:
    assert end - start < size / 2 and end < 2 * largest + 2**30, (start, end, size)


@pytest.mark.slow
def test_four_gigabytes_convert_below_the_memory_bound(tmp_path):
  config = Config(D=1024, F=8192, K=1, G=4, H=64, V=512, layers=80, context=32)
  stacked = 2 * config.layers * config.D * config.F
  found, largest = peaks(tmp_path, config)
  bound = 2 * largest + 2**30
  print(f'largest tensor {largest:,}, stacked array {stacked:,}, bound {bound:,}, '
        f'peaks {found}')
  assert stacked > bound and all(end < bound for _, end in found)


def test_a_mismatched_tokenizer_is_refused_before_the_conversion(tmp_path):
  make(tmp_path / 'hf', dataclasses.replace(TIED, V=40))
  with pytest.raises(InputError, match='ids but the model has only 40'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name, change', [
    ('config.json', lambda data: data.replace(b'10000.0', b'50000.0')),
    ('tokenizer.model', lambda data: data + b'x'),
    ('generation_config.json', lambda data: data + b' '),
    ('model.safetensors', lambda data: data[:-1] + bytes([data[-1] ^ 1]))])
def test_a_changed_source_and_a_changed_model_folder_are_refused(stories, tmp_path, name, change):
  source, folder = tmp_path / 'hf', tmp_path / 'run' / 'm0' / 'model'
  shutil.copytree(stories, source)
  convert.from_hf(source, folder)
  convert.check_source(stories, folder)  # the same files at another path
  model_files.read_hashes(folder)
  for path in (source / name, folder / name):
    if path.exists():
      data = path.read_bytes()
      assert change(data) != data
      path.chmod(0o644)
      path.write_bytes(change(data))
  with pytest.raises(InputError, match=f'was converted from other files .* differ in {name}; '):
    convert.check_source(source, folder)
  if (folder / name).exists():
    with pytest.raises(InputError, match=f'{name} changed after the model was made'):
      model_files.read_hashes(folder)
    with pytest.raises(InputError, match=f'{name} changed after the model was made'):
      convert.to_hf(folder, tmp_path / 'back')
