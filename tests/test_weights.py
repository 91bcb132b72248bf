"""Damaged weights: each is refused with the name of its file and leaves no output."""
import json

from hypothesis import given, strategies as st
import jax
import numpy as np
import pytest
from safetensors.numpy import load, load_file
from test_convert import change, make, TIED

from srlm_jax import InputError
from srlm_jax.checkpoint import convert, hf

GATE, UP = (f'model.layers.0.mlp.{name}_proj.weight' for name in ('gate', 'up'))
LAST = 'the last tensor in the file'


def split(file):
  """A .safetensors file -> (the fields of its header, its data)."""
  content = file.read_bytes()
  start = 8 + int.from_bytes(content[:8], 'little')
  return json.loads(content[8:start]), content[start:]


def join(header, data, length=None):
  """Header and data -> the content of a file; `length` replaces the true length of the header."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def field(name, key, value):
  """A damage that replaces header field `key` of a tensor by `value`, or by `value(old)`."""
  def damage(fields, data):
    target = name
    if name == LAST:
      target = max(fields, key=lambda n: fields[n]['data_offsets'][1])
    new = value(fields[target][key]) if callable(value) else value
    return join(fields | {target: fields[target] | {key: new}}, data)
  return damage


def duplicate_name(fields, data):
  """The header lists `up` twice, the second time with the range of `gate`."""
  again = json.dumps({UP: fields[GATE]}).encode()[1:]
  return join(json.dumps(fields).encode()[:-1] + b', ' + again, data)


def duplicate_entry(fields, data):
  return join(json.dumps(fields).encode()[:-1] + b', ' + json.dumps({UP: fields[UP]}).encode()[1:],
              data)


def overlap(fields, data):
  return join(fields | {UP: fields[GATE]}, data)


def gap(fields, data):
  """The first eight bytes of the data belong to no tensor."""
  moved = {name: t | dict(data_offsets=[x + 8 for x in t['data_offsets']])
           for name, t in fields.items()}
  return join(moved, bytes(8) + data)


def header_in_data(fields, data):
  """A tensor that starts in the header, before the data."""
  begin, end = fields[GATE]['data_offsets']
  return join(fields | {GATE: fields[GATE] | dict(data_offsets=[-8, end - begin - 8])}, data)


DAMAGES = dict(
    overlap=overlap, gap=gap, duplicate_name=duplicate_name, duplicate_entry=duplicate_entry,
    header_in_data=header_in_data,
    range_too_short=field(GATE, 'data_offsets', lambda x: [x[0], x[1] - 4]),
    range_shifted=field(GATE, 'data_offsets', lambda x: [x[0] + 4, x[1] + 4]),
    range_backward=field(GATE, 'data_offsets', lambda x: x[::-1]),
    range_beyond_the_data=field(LAST, 'data_offsets', lambda x: [x[0], x[1] + 4]),
    range_with_one_number=field(GATE, 'data_offsets', lambda x: x[:1]),
    range_with_three_numbers=field(GATE, 'data_offsets', lambda x: [*x, 0]),
    range_of_floats=field(GATE, 'data_offsets', lambda x: [float(v) for v in x]),
    range_of_text=field(GATE, 'data_offsets', lambda x: [str(v) for v in x]),
    range_huge=field(GATE, 'data_offsets', lambda x: [x[0], 10**400]),
    range_null=field(GATE, 'data_offsets', None),
    narrower_dtype=field('model.embed_tokens.weight', 'dtype', 'BF16'),
    wider_dtype=field('model.embed_tokens.weight', 'dtype', 'F64'),
    unknown_dtype=field(GATE, 'dtype', 'X9'), number_as_dtype=field(GATE, 'dtype', 32),
    list_as_dtype=field(GATE, 'dtype', ['F32']),
    negative_shape=field(GATE, 'shape', lambda x: [-v for v in x]),
    shape_of_floats=field(GATE, 'shape', lambda x: [float(v) for v in x]),
    huge_shape=field(GATE, 'shape', [2**63, 2**63]),
    overflowing_shape=field(GATE, 'shape', [2**32, 2**32, 2]),
    shape_of_text=field(GATE, 'shape', '48'), no_shape=field(GATE, 'shape', None),
    number_as_tensor=lambda fields, data: join(fields | {GATE: 3}, data),
    list_as_tensor=lambda fields, data: join(fields | {GATE: []}, data),
    list_as_header=lambda fields, data: join([fields], data),
    number_as_metadata=lambda fields, data: join(fields | dict(__metadata__=3), data),
    truncated_header=lambda fields, data: join(json.dumps(fields).encode()[:-9], data),
    nested_header=lambda fields, data: join(b'{"a":' * 100_000, data),
    not_utf8=lambda fields, data: join(b'{"\xff": 1}', data),
    header_beyond_the_end=lambda fields, data: join(fields, data, 10**6),
    header_of_2_to_64=lambda fields, data: join(fields, data, 2**64 - 1),
    no_tensors=lambda fields, data: join({}, b''),
    more_data=lambda fields, data: join(fields, data + bytes(4)),
    less_data=lambda fields, data: join(fields, data[:-4]),
    empty=lambda fields, data: b'', seven_bytes=lambda fields, data: b'1234567',
)


def refused(tmp_path, match):
  """Converts tmp_path/hf, which must raise and leave tmp_path unchanged -> the error message."""
  before = sorted(tmp_path.iterdir())
  with pytest.raises(InputError, match=match) as error:
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  assert sorted(tmp_path.iterdir()) == before
  message = str(error.value)
  assert '\n' not in message and len(message) < 1000
  return message


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, damage):
  make(tmp_path / 'hf', TIED)
  file = tmp_path / 'hf' / hf.SINGLE
  file.write_bytes(damage(*split(file)))
  assert str(file) in refused(tmp_path, 'not a complete safetensors file|has no tensor')


def test_a_header_above_100_mb_is_not_read(tmp_path):
  make(tmp_path / 'hf', TIED)
  with (tmp_path / 'hf' / hf.SINGLE).open('wb') as f:
    f.write((100_000_001).to_bytes(8, 'little'))
    f.truncate(2**27)  # sparse
  refused(tmp_path, 'model.safetensors is not a complete safetensors file')


def test_a_folder_instead_of_the_file_is_refused(tmp_path):
  make(tmp_path / 'hf', TIED)
  (tmp_path / 'hf' / hf.SINGLE).unlink()
  (tmp_path / 'hf' / hf.SINGLE).mkdir()
  refused(tmp_path, 'model.safetensors cannot be read')


@given(data=st.data())
def test_a_random_header_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, data):
  """Replaces bytes of a valid header at random."""
  folder = tmp_path_factory.getbasetemp() / 'mutated'
  if not folder.exists():
    make(folder, TIED)
    (folder / 'valid').write_bytes((folder / hf.SINGLE).read_bytes())
  valid = (folder / 'valid').read_bytes()
  size = 8 + int.from_bytes(valid[:8], 'little')
  content = bytearray(valid)
  for position, byte in data.draw(st.lists(st.tuples(
      st.integers(0, size - 1), st.sampled_from(b'0123456789,:"[]{}- FBe\x00')), max_size=3)):
    content[position] = byte
  (folder / hf.SINGLE).write_bytes(content)
  try:
    found = hf.find(folder, TIED)
  except InputError as error:
    assert str(folder) in str(error)
    return
  expected = load(bytes(content))
  for leaf in hf.leaves(TIED):
    for name, tensor in zip(leaf.tensors, found[leaf.name], strict=True):
      np.testing.assert_array_equal(tensor.read(), expected[name])
      assert tensor.dtype == expected[name].dtype


def weight_map(**changes):
  """An edit that updates the weight_map of an index."""
  return lambda fields: fields['weight_map'].update(changes)


def other(file):
  """The other file of two."""
  return {'model-0.safetensors': 'model-1.safetensors'}.get(file, 'model-0.safetensors')


INDICES = {
    'another file': (lambda fields: weight_map(**{GATE: other(fields['weight_map'][GATE])})(fields),
                     f'says that {GATE} is in model-..safetensors, but it is not'),
    'an unexpected tensor': (weight_map(extra='model-0.safetensors'),
                             'says that extra is in model-0.safetensors, but it is not'),
    'an absolute path': (weight_map(**{GATE: '/tmp/model.safetensors'}), 'file name'),
    'a sibling folder': (weight_map(**{GATE: '../other/model.safetensors'}), 'file name'),
    'a subfolder': (weight_map(**{GATE: 'sub/model.safetensors'}), 'file name'),
    'another suffix': (weight_map(**{GATE: 'config.json'}), 'file name'),
    'the parent folder': (weight_map(**{GATE: '..'}), 'file name'),
    'an empty name': (weight_map(**{GATE: ''}), 'file name'),
    'a zero byte': (weight_map(**{GATE: 'a\0.safetensors'}), 'file name'),
    'a long name': (weight_map(**{GATE: 'a' * 5000 + '.safetensors'}), 'file name'),
    'a number': (weight_map(**{GATE: 3}), 'file name'),
    'a list': (weight_map(**{GATE: ['model-0.safetensors']}), 'file name'),
    'null': (weight_map(**{GATE: None}), 'file name'),
    'a list as map': (lambda fields: fields.update(weight_map=[1]), 'index'),
    'null as map': (lambda fields: fields.update(weight_map=None), 'index'),
    'no map': (lambda fields: fields.clear(), 'index'),
    'an empty map': (lambda fields: fields.update(weight_map={}), 'index'),
}


@pytest.mark.parametrize('edit, message', INDICES.values(), ids=INDICES)
def test_a_damaged_index_is_refused(tmp_path, edit, message):
  make(tmp_path / 'hf', TIED, files=2)
  make(tmp_path / 'other', TIED)
  file = tmp_path / 'hf' / hf.INDEX
  fields = json.loads(file.read_text())
  edit(fields)
  file.write_text(json.dumps(fields))
  assert str(file) in refused(tmp_path, message)


@pytest.mark.parametrize('text', [
    b'', b'[1]', b'3', b'{"weight_map":', b'\xff', b'[' * 10**5,
    b'{"weight_map": {"a": "model-0.safetensors", "a": "model-1.safetensors"}}'],
    ids=['empty', 'list', 'number', 'truncated', 'not utf-8', 'nested', 'duplicate'])
def test_an_invalid_index_is_refused(tmp_path, text):
  make(tmp_path / 'hf', TIED, files=2)
  (tmp_path / 'hf' / hf.INDEX).write_bytes(text)
  refused(tmp_path, f'{hf.INDEX} is not a safetensors index')


def test_a_tensor_in_two_files_is_refused(tmp_path):
  tensors = make(tmp_path / 'hf', TIED, files=2)
  for file in ('model-0.safetensors', 'model-1.safetensors'):
    change(tmp_path / 'hf', lambda t: t.update({GATE: np.zeros_like(tensors[GATE])}), file)
  message = refused(tmp_path, f'tensor {GATE} is also in')
  assert 'model-0.safetensors' in message and 'model-1.safetensors' in message


def test_files_may_be_symbolic_links(tmp_path):
  make(tmp_path / 'blobs', TIED)  # the layout of the Hub's cache
  (tmp_path / 'hf').mkdir()
  for file in (tmp_path / 'blobs').iterdir():
    (tmp_path / 'hf' / file.name).symlink_to(file)
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')


def test_an_index_may_list_tensors_that_are_not_parameters(tmp_path):
  """The Hub's converter leaves the names of tied tensors in the index; no file contains them."""
  make(tmp_path / 'hf', TIED, files=2)
  file = tmp_path / 'hf' / hf.INDEX
  fields = json.loads(file.read_text())
  weight_map(**{'lm_head.weight': 'model-0.safetensors',
                'model.layers.0.self_attn.rotary_emb.inv_freq': 'model-1.safetensors'})(fields)
  file.write_text(json.dumps(fields))
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')


POISON = dict(nan=[np.nan], infinity=[np.inf], negative=[-np.inf], both=[np.nan, -np.inf, np.nan])


def poison(folder, name, values):
  """Overwrites a few elements of a tensor with `values`."""
  change(folder, lambda t: np.put(t[name], [5 + 40 * i for i in range(len(values))], values))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('values', POISON.values(), ids=POISON)
def test_conversion_refuses_non_finite_values(tmp_path, dtype, values):
  make(tmp_path / 'hf', TIED, dtype)
  poison(tmp_path / 'hf', GATE.replace('0', '1'), values)
  count = f'{np.isnan(values).sum()} NaN and {np.isinf(values).sum()} infinite values among 1536'
  message = refused(tmp_path, f'tensor {GATE.replace("0", "1")} contains {count}')
  assert str(tmp_path / 'hf' / hf.SINGLE) in message


@pytest.mark.parametrize('name', [GATE, 'model.embed_tokens.weight'])
def test_load_hf_refuses_non_finite_values(tmp_path, mesh, name):
  make(tmp_path / 'hf', TIED)
  poison(tmp_path / 'hf', name, [np.inf])
  with pytest.raises(InputError, match=f'tensor {name} contains 0 NaN and 1 infinite'):
    convert.load_hf(tmp_path / 'hf', mesh, 'float32')


def test_export_refuses_a_checkpoint_with_nan(tmp_path, monkeypatch):
  make(tmp_path / 'hf', TIED)
  poison(tmp_path / 'hf', UP, [np.nan])
  with monkeypatch.context() as unchecked:
    unchecked.setattr(hf, 'finite', lambda file, name, values: values)
    convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  with pytest.raises(InputError, match=f'steps/0/params: tensor {UP} contains 1 NaN'):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert {p.name for p in tmp_path.iterdir()} == {'hf', 'ours'}


def test_the_largest_finite_values_are_accepted(tmp_path, mesh):
  make(tmp_path / 'hf', TIED)
  largest = np.finfo('float32').max
  change(tmp_path / 'hf', lambda t: np.put(t[GATE], [0, 1], [largest, -largest]))
  convert.from_hf(tmp_path / 'hf', tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  assert load_file(tmp_path / 'back' / hf.SINGLE)[GATE].max() == largest
  jax.block_until_ready(convert.load_hf(tmp_path / 'hf', mesh, 'float32'))
