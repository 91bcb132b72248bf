import gzip
import os

from etils import epath
from hypothesis import given, strategies as st
import pytest

from srlm_jax import InputError, records


def test_records_round_trip_through_a_file(tmp_path):
  rows = [dict(id='a', text='é\n"x"'), dict(id='b', text='')]
  assert records.write(tmp_path / 'x.jsonl', rows) == 2
  assert list(records.read(tmp_path / 'x.jsonl', 'id', 'text')) == rows
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'x.jsonl').read_bytes()))
  assert list(records.read(tmp_path / 'x.jsonl.gz')) == rows
  (tmp_path / 'x.jsonl').write_text('\n{"id": "a"}\n\n{"id": "b"}\n')
  places = [where for where, _ in records.numbered(tmp_path / 'x.jsonl')]
  assert [where.rpartition(':')[2] for where in places] == ['2', '4']


@pytest.mark.parametrize('line, message', [
    ('{"id": "b", "text": 5}', r'x.jsonl:2: "text" is 5, which is not a string'),
    ('{"id": ', r'x.jsonl:2: not a JSON object'), ('[1]', r'x.jsonl:2: a list'),
    ('{"id": "b"}', r'x.jsonl:2: no field "text"')])
def test_the_error_names_the_malformed_line(tmp_path, line, message):
  (tmp_path / 'x.jsonl').write_text('{"id": "a", "text": ""}\n' + line + '\n')
  with pytest.raises(InputError, match=message):
    list(records.read(tmp_path / 'x.jsonl', 'id', 'text'))


def test_a_truncated_gzip_file_is_refused(tmp_path):
  whole = gzip.compress(b'{"id": "a"}\n' * 5000)
  (tmp_path / 'x.jsonl.gz').write_bytes(whole[:len(whole) // 2])
  with pytest.raises(InputError, match='fetch it again'):
    list(records.read(tmp_path / 'x.jsonl.gz'))


def test_a_failed_write_leaves_no_file(tmp_path):
  def rows():
    yield dict(id='a')
    raise RuntimeError
  with pytest.raises(RuntimeError):
    records.write(tmp_path / 'x.jsonl', rows())
  assert not list(tmp_path.iterdir())


def test_the_appender_drops_a_truncated_last_line_and_keeps_the_rest(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c')
  out = records.Appender(path)
  assert out.count == 2
  out.append([dict(id='c')])
  out.close()
  assert [r['id'] for r in records.read(path)] == ['a', 'b', 'c']


def test_shards_are_read_in_order_and_a_missing_shard_is_refused(tmp_path):
  for i in (1, 0):
    records.write(tmp_path / records.shard_name('r', i, 2), [dict(id=str(i))])
  assert [r['id'] for r in records.read_shards(tmp_path, 'r')] == ['0', '1']
  (tmp_path / records.shard_name('r', 0, 2)).unlink()
  with pytest.raises(InputError, match='should hold 2 shards'):
    list(records.read_shards(tmp_path, 'r'))


@pytest.mark.parametrize('stem, field, per_request', [
    ('responses', 'prompt_id', 4), ('judgements', 'response_id', 3),
    ('comparisons', 'response_id', 2),
    ('rewards', 'id', 1)])
@pytest.mark.parametrize('hosts', [1, 2, 3, 8])
def test_read_shards_restores_the_request_order_for_any_number_of_hosts(
    tmp_path, stem, field, per_request, hosts):
  requests = [[{'id': f'{i}/{j}', field: f'{i}'} for j in range(per_request)] for i in range(11)]
  for host in range(hosts):
    records.write(tmp_path / records.shard_name(stem, host, hosts), sum(requests[host::hosts], []))
  assert list(records.read_shards(tmp_path, stem)) == sum(requests, [])


def test_a_stray_file_among_the_shards_is_refused(tmp_path):
  records.write(tmp_path / records.shard_name('r', 0, 1), [dict(id='a')])
  (tmp_path / 'r-00000-of-00001 (copy).jsonl').write_text('')
  with pytest.raises(InputError, match=r'\(copy\).jsonl is not a shard of r; delete or move it'):
    list(records.read_shards(tmp_path, 'r'))


@given(st.lists(st.tuples(st.text('ab/%2F', max_size=5), st.text('ab/%2F', max_size=5)),
                unique=True))
def test_join_maps_different_parts_to_different_names(parts):
  assert len({records.join(*pair) for pair in parts}) == len(parts)


def test_shards_from_a_different_number_of_hosts_are_refused(tmp_path):
  records.write(tmp_path / records.shard_name('r', 0, 2), [dict(id='a')])
  records.same_hosts(tmp_path / records.shard_name('r', 1, 2))
  with pytest.raises(InputError, match='was written by a run on 2 hosts, and this run has 1'):
    records.same_hosts(tmp_path / records.shard_name('r', 0, 1))


ROW = b'{"id": "a"}\n'


def put_unreadable(path, kind):
  """Creates an unreadable file or a folder at `path` -> the path to read."""
  if kind == 'folder':
    path.mkdir()
  elif kind == 'below a file':
    path.write_bytes(ROW)
    return path / 'x.jsonl'
  else:
    utf8, deep = ROW + b'{"id": "\xff"}\n', b'[' * 100_000 + b'\n'
    path.write_bytes(dict(utf8=utf8, zip=ROW, deep=deep)[kind])
  return path


@pytest.mark.parametrize('name, kind, message', [
    ('x.jsonl', 'folder', r'x.jsonl is a folder; give a file'),
    ('x.jsonl.gz', 'folder', r'x.jsonl.gz is a folder; give a file'),
    ('x.jsonl', 'below a file', r'x.jsonl/x.jsonl does not exist'),
    ('x.jsonl', 'utf8', r'x.jsonl:2: not a JSON object'),
    ('x.jsonl', 'deep', r'x.jsonl:1: not a JSON object'),
    ('x.jsonl.gz', 'zip', r'x.jsonl.gz:1: the file cannot be read further \(Not a gzipped file')])
def test_unreadable_record_files_are_refused(tmp_path, name, kind, message):
  with pytest.raises(InputError, match=message):
    list(records.read(put_unreadable(tmp_path / name, kind)))


@pytest.mark.parametrize('kind, message', [
    ('folder', r'x.json is a folder; give a score'), ('utf8', r'x.json: not JSON .*; give a score'),
    ('below a file', r'x.json/x.jsonl cannot be read \(Not a directory\); give a score'),
    ('deep', r'x.json: not JSON .*; give a score')])
def test_unreadable_json_files_are_refused(tmp_path, kind, message):
  with pytest.raises(InputError, match=message):
    records.read_json(put_unreadable(tmp_path / 'x.json', kind), 'give a score')


def denied(*args, **kwargs):
  raise PermissionError(13, 'Permission denied', 'x')


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
  path = epath.Path(tmp_path / 'x.jsonl')
  path.write_bytes(ROW)  # patched below, because root ignores file modes
  for method in ('exists', 'open', 'read_bytes'):
    monkeypatch.setattr(type(path), method, denied)
    with pytest.raises(InputError, match=r'x.jsonl cannot be read \(Permission denied\)'):
      records.read_json(path, '') if method == 'read_bytes' else list(records.read(path))
    monkeypatch.undo()
  monkeypatch.setattr(type(path), 'open', denied)
  with pytest.raises(InputError, match=r'y.jsonl cannot be written \(Permission denied\); give'):
    records.write(tmp_path / 'y.jsonl', [])
  assert os.listdir(tmp_path) == ['x.jsonl']


@pytest.mark.parametrize('out, message', [
    ('folder', r'folder is a folder; give the name of a file'),
    ('', r' is a folder; give the name of a file'),
    ('file/x.jsonl', r'x.jsonl cannot be written: .*file is a file, not a folder; give another'),
    ('file/new/x.jsonl', r'x.jsonl cannot be written: .*file is a file, not a folder; give'),
    ('x' * 300, r' cannot be written \(File name too long\); give another')])
def test_writing_to_an_invalid_path_changes_nothing(tmp_path, monkeypatch, out, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').write_text('kept')
  with pytest.raises(InputError, match=message):
    records.write(tmp_path / out if out else '', [dict(id='a')])
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder'] and not os.listdir(tmp_path / 'folder')
  assert (tmp_path / 'file').read_text() == 'kept'


@pytest.mark.parametrize('value, shown', [
    ('"4"', '"4"'), ('NaN', 'NaN'), ('true', 'true'), ('[4]', r'\[4\]'),
    ('-Infinity', '-Infinity')])
def test_a_score_is_a_finite_number_or_null(tmp_path, value, shown):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"score": null}\n{"score": 4}\n{"score": 2.5}\n{"score": 1' + '0' * 400 + '}\n')
  assert len(list(records.read(path, 'score'))) == 4
  path.write_text('{"score": 1}\n{"score": ' + value + '}\n')
  message = f'x.jsonl:2: "score" is {shown}, which is not a number; correct'
  with pytest.raises(InputError, match=message):
    list(records.read(path, 'score'))
