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

GROUPED = Config(D=32, F=48, K=2, G=3, H=8, V=64, layers=3, context=32, attention_bias=True)
TIED = Config(D=32, F=48, K=4, G=1, H=8, V=64, layers=2, context=32, tied=True)


def make(folder, config, dtype='float32', files=1):
  """A Hugging Face folder of random numbers, its tensors dealt out to `files` by the safetensors library."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  tensors = {name: rng.normal(scale=0.02, size=leaf.hf_shape).astype(dtype)
             for leaf in hf.leaves(config) for name in leaf.tensors}
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(config, dtype)))
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  if files == 1:
    save_file(tensors, folder / 'model.safetensors')
  else:
    place = {name: f'model-{i % files}.safetensors' for i, name in enumerate(tensors)}
    for file in set(place.values()):
      save_file({name: x for name, x in tensors.items() if place[name] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=place)))
  return tensors


def load(folder):
  return {name: x for file in sorted(folder.glob('*.safetensors')) for name, x in load_file(file).items()}


def assert_same_bits(a: dict, b: dict):
  assert a.keys() == b.keys()
  for name in a:
    assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
    assert a[name].tobytes() == b[name].tobytes(), name


def change(folder, edit, file='model.safetensors'):
  """Rewrites a file after `edit` of its tensors."""
  tensors = load_file(folder / file)
  edit(tensors)
  save_file(tensors, folder / file)


def files_of(folder):
  return sorted(p.relative_to(folder) for p in folder.rglob('*'))


@pytest.mark.parametrize('config', [GROUPED, TIED], ids=['bias', 'tied'])
def test_the_table_makes_exactly_the_parameters_of_the_model(mesh, config):
  ours = traverse_util.flatten_dict(llama.abstract_params(config), sep='.')
  assert {leaf.name: leaf.shape for leaf in hf.leaves(config)} == {name: x.shape for name, x in ours.items()}


def test_a_query_head_lies_where_its_key_head_expects_it():
  wq = next(leaf for leaf in hf.leaves(GROUPED) if leaf.name.endswith('wq_DKGH'))
  tensor = np.arange(np.prod(wq.hf_shape)).reshape(wq.hf_shape)  # [K * G * H, D]
  k, g, h, d, c = 1, 2, 5, 7, GROUPED
  assert wq.ours(tensor)[d, k, g, h] == tensor[(k * c.G + g) * c.H + h, d]


def test_a_real_model_comes_back_bit_for_bit(stories, tmp_path):
  there = convert.from_hf(stories, tmp_path / 'ours')
  back = convert.to_hf(tmp_path / 'ours', tmp_path / 'theirs')
  assert_same_bits(load(tmp_path / 'theirs'), load_file(stories / 'model.safetensors'))
  for name in ('config.json', 'tokenizer.model', 'tokenizer_config.json', 'generation_config.json'):
    assert (tmp_path / 'theirs' / name).read_bytes() == (stories / name).read_bytes()
  assert str(there) == str(back) == f'260,032 parameters, 1,040,128 bytes, hash {there.hashes()["stored"]}'


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('config', [GROUPED, TIED], ids=['bias', 'tied'])
def test_made_up_models_come_back_bit_for_bit(tmp_path, monkeypatch, config, dtype):
  monkeypatch.setattr(store, 'CHUNK_BYTES', 2**11)  # a tensor is several writes, of several chunks
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
  assert again.hashes()['stored'] == model_files.recorded_hash(tmp_path / 'ours')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_hashes_are_those_of_the_restored_parameters(tmp_path, mesh, dtype):
  make(tmp_path / 'hf', GROUPED, dtype)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  params, name = store.restore_params(tmp_path / 'ours', mesh, dtype)
  recorded = json.loads((tmp_path / 'ours' / 'steps' / '0' / 'hash' / 'metadata').read_text())
  files = recorded.pop('files')
  assert files == model_files.hashes(tmp_path / 'hf')
  assert recorded == hashes.hash_all_dtypes(params)
  assert name == recorded['stored'] == hashes.hash_params(params)
  saver = store.manager(tmp_path / 'ours', keep=1)
  assert saver.all_steps() == [0]
  saver.close()


@pytest.mark.parametrize('axes', [(1, 1, 1), (2, 2, 2)])
def test_load_hf_is_restore_params(tmp_path, axes):
  make(tmp_path / 'hf', GROUPED, 'bfloat16', files=2)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  mesh = make_mesh(*axes)
  with jax.set_mesh(mesh):
    restored, _ = store.restore_params(tmp_path / 'ours', mesh, 'float32')
    loaded = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  jax.tree.map(np.testing.assert_array_equal, loaded, restored)
  assert jax.tree.map(lambda x: (x.dtype, x.sharding), loaded) == jax.tree.map(
      lambda x: (x.dtype, x.sharding), restored)


def test_a_trained_checkpoint_says_its_own_dtype_and_keeps_its_bits(tmp_path):
  mesh = make_mesh(1, 2, 2)
  make(tmp_path / 'hf', TIED)
  params = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  (tmp_path / 'ours').mkdir()
  (tmp_path / 'ours' / 'config.json').write_text(json.dumps(model_config.to_hf(TIED, 'bfloat16')))
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
  assert model_files.recorded_hash(tmp_path / 'again') == model_files.recorded_hash(tmp_path / 'ours', 5)


@pytest.mark.parametrize('edit, message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'), 'has no tensor model.layers.1.mlp.up_proj.weight'),
    (lambda t: t.update(extra=np.zeros(2, 'float32')), 'tensor extra is no part of'),
    (lambda t: t.update({'model.norm.weight': np.zeros(31, 'float32')}), r'norm.weight has shape \[31\]'),
    (lambda t: t.update({'model.norm.weight': np.zeros(32, 'int32')}), 'model.norm.weight is I32'),
    (lambda t: t.update({'model.layers.1.input_layernorm.weight': np.zeros(32, 'float16')}), 'is float16'),
], ids=['missing', 'unexpected', 'shape', 'integers', 'mixed'])
def test_a_tensor_that_does_not_fit_is_named_with_its_file(tmp_path, edit, message):
  make(tmp_path / 'hf', TIED)
  change(tmp_path / 'hf', edit)
  with pytest.raises(InputError, match=message) as error:
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert str(tmp_path / 'hf' / 'model.safetensors') in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ['hf']


def test_tensors_without_parameters_are_passed_over(tmp_path):
  tensors = make(tmp_path / 'hf', TIED)
  change(tmp_path / 'hf', lambda t: t.update({
      'lm_head.weight': t['model.embed_tokens.weight'].copy(),
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, 'float32')}))
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert_same_bits(load(tmp_path / 'back'), tensors)


def test_files_that_are_not_whole_are_refused(tmp_path):
  make(tmp_path / 'hf', TIED, files=2)
  file = tmp_path / 'hf' / 'model-1.safetensors'
  whole = file.read_bytes()
  for part in (whole[:-1], whole[:5], b'<html>no such model</html>'):
    file.write_bytes(part)
    with pytest.raises(InputError, match='model-1.safetensors is not a whole safetensors file'):
      convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  file.unlink()
  with pytest.raises(InputError, match='names model-1.safetensors, which is not there'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  (tmp_path / 'hf' / 'model.safetensors.index.json').unlink()
  with pytest.raises(InputError, match='holds neither model.safetensors nor'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')


def test_what_exists_is_not_overwritten(tmp_path):
  make(tmp_path / 'hf', TIED)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  before = files_of(tmp_path)
  with pytest.raises(InputError, match=f'{tmp_path}/ours already exists'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  with pytest.raises(InputError, match=f'{tmp_path}/hf already exists'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'hf')
  assert files_of(tmp_path) == before


def test_a_failure_leaves_nothing_and_the_next_run_is_clean(tmp_path, monkeypatch):
  make(tmp_path / 'hf', TIED)
  (tmp_path / 'ours.partial' / 'steps').mkdir(parents=True)  # of a run that was killed
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


def test_a_checkpoint_of_another_model_or_another_hash_is_refused(tmp_path):
  make(tmp_path / 'hf', TIED)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  fields = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  for name, value, message in (('tie_word_embeddings', False, 'has no array lm_head_DV'),
                               ('vocab_size', 65, r'array embed_VD has shape \[64, 32\]')):
    (tmp_path / 'ours' / 'config.json').write_text(json.dumps(fields | {name: value}))
    with pytest.raises(InputError, match=message):
      convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  (tmp_path / 'ours' / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError, match='steps/9/params does not exist'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'back', step=9)
  hashes = tmp_path / 'ours' / 'steps' / '0' / 'hash' / 'metadata'
  hashes.write_text(json.dumps(json.loads(hashes.read_text()) | dict(stored='0' * 16)))
  with pytest.raises(InputError, match='the checkpoint is damaged'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert {p.name for p in tmp_path.iterdir()} == {'hf', 'ours'}


def test_the_program_converts_and_says_what_is_wrong_in_one_line(tmp_path):
  make(tmp_path / 'hf', TIED)
  def run(*args):
    program = [sys.executable, '-m', 'srlm_jax.checkpoint.convert']
    return subprocess.run(program + list(args), capture_output=True, text=True)
  done = run(f'--from_hf={tmp_path}/hf', f'--out={tmp_path}/ours')
  assert done.returncode == 0 and f'hash {model_files.recorded_hash(tmp_path / "ours")}' in done.stdout
  wrong = run(f'--from_hf={tmp_path}/hf', f'--to_hf={tmp_path}/back')
  assert wrong.returncode == 1 and wrong.stderr.splitlines() == [
      'error: give --from_hf=DIR --out=DIR, or --checkpoint=DIR --to_hf=DIR']


SLOW = """
import sys
from srlm_jax import stage
from srlm_jax.models import convert, hf
convert.stage = stage
convert.define_flags()
whole = hf.Tensor.read
def read(tensor):
  print('reads', flush=True)
  sys.stdin.readline()
  return whole(tensor)
hf.Tensor.read = read
cli.run_app(convert.main)
"""


def test_a_second_conversion_into_the_same_folder_is_refused_and_leaves_nothing(tmp_path):
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
from srlm_jax.models import convert
def peak():  # ru_maxrss would count the parent, too
  return 1024 * int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])
start = peak()
getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3])
print('peak', start, peak())
"""


def write_large(folder, config):
  """A Hugging Face folder in bfloat16, written tensor by tensor."""
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
  """Peak bytes in memory of both directions, (at the start, at the end), and those of the largest tensor."""
  if not pathlib.Path('/proc/self/status').exists():
    pytest.skip('/proc/self/status, which tells the peak, is absent')
  write_large(tmp_path / 'hf', config)
  found = []
  for way, source, out in (('from_hf', 'hf', 'ours'), ('to_hf', 'ours', 'back')):
    done = subprocess.run([sys.executable, '-c', MEASURE, way, tmp_path / source, tmp_path / out],
                          capture_output=True, text=True, check=True)
    found.append(tuple(map(int, done.stdout.split()[-2:])))
  with (tmp_path / 'hf' / hf.SINGLE).open('rb') as a, (tmp_path / 'back' / hf.SINGLE).open('rb') as b:
    while block := a.read(2**24):
      assert block == b.read(2**24)
    assert not b.read(1)
  shutil.rmtree(tmp_path)
  return found, max(2 * int(np.prod(leaf.hf_shape)) for leaf in hf.leaves(config))


def test_memory_does_not_grow_with_the_model(tmp_path):
  config = Config(D=512, F=1024, K=1, G=1, H=64, V=512, layers=32, context=32)
  size = 2 * llama.param_count(config)
  found, largest = peaks(tmp_path, config)
  for start, end in found:
    assert end - start < size / 2 and end < 2 * largest + 2**30, (start, end, size)


@pytest.mark.slow
def test_four_gigabytes_convert_under_the_bound(tmp_path):
  config = Config(D=1024, F=8192, K=1, G=4, H=64, V=512, layers=80, context=32)
  stacked = 2 * config.layers * config.D * config.F
  found, largest = peaks(tmp_path, config)
  bound = 2 * largest + 2**30
  print(f'largest tensor {largest:,}, stacked array {stacked:,}, bound {bound:,}, peaks {found}')
  assert stacked > bound and all(end < bound for _, end in found)


def test_a_tokenizer_that_does_not_match_is_refused_before_the_work(tmp_path):
  make(tmp_path / 'hf', dataclasses.replace(TIED, V=40))
  with pytest.raises(InputError, match='ids and the model only 40'):
    convert.from_hf(tmp_path / 'hf', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name, change', [
    ('config.json', lambda data: data.replace(b'10000.0', b'50000.0')),
    ('tokenizer.model', lambda data: data + b'x'), ('generation_config.json', lambda data: data + b' '),
    ('model.safetensors', lambda data: data[:-1] + bytes([data[-1] ^ 1]))])
def test_another_m0_for_a_workdir_and_a_changed_model_folder_are_noticed(stories, tmp_path, name, change):
  source, folder = tmp_path / 'hf', tmp_path / 'run' / 'm0' / 'model'
  shutil.copytree(stories, source)
  convert.from_hf(source, folder)
  convert.check_source(stories, folder)  # the same files in another place
  model_files.read_hashes(folder)
  for place in (source / name, folder / name):
    if place.exists():
      data = place.read_bytes()
      assert change(data) != data
      place.chmod(0o644)
      place.write_bytes(change(data))
  with pytest.raises(InputError, match=f'was converted from a folder with another {name}'):
    convert.check_source(source, folder)
  if (folder / name).exists():
    with pytest.raises(InputError, match=f'{name} changed after the model was made'):
      model_files.read_hashes(folder)
    with pytest.raises(InputError, match=f'{name} changed after the model was made'):
      convert.to_hf(folder, tmp_path / 'back')
