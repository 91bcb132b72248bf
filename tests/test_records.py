import gzip

import pytest

from srlm_jax import InputError
from srlm_jax.data import records


def test_records_survive_the_way_to_disk_and_back(tmp_path):
  rows = [dict(id='a', text='é\n"x"'), dict(id='b', text='')]
  assert records.write(tmp_path / 'x.jsonl', rows) == 2
  assert list(records.read(tmp_path / 'x.jsonl', 'id', 'text')) == rows
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'x.jsonl').read_bytes()))
  assert list(records.read(tmp_path / 'x.jsonl.gz')) == rows
  (tmp_path / 'x.jsonl').write_text('\n{"id": "a"}\n\n{"id": "b"}\n')
  assert [where.rpartition(':')[2] for where, _ in records.numbered(tmp_path / 'x.jsonl')] == ['2', '4']


@pytest.mark.parametrize('line, message', [
    ('{"id": "b", "text": 5}', r'x.jsonl:2: "text" is 5, not a text'),
    ('{"id": ', r'x.jsonl:2: not a JSON object'), ('[1]', r'x.jsonl:2: a list'),
    ('{"id": "b"}', r'x.jsonl:2: no field "text"')])
def test_a_malformed_line_is_named(tmp_path, line, message):
  (tmp_path / 'x.jsonl').write_text('{"id": "a", "text": ""}\n' + line + '\n')
  with pytest.raises(InputError, match=message):
    list(records.read(tmp_path / 'x.jsonl', 'id', 'text'))


def test_a_damaged_archive_is_named(tmp_path):
  whole = gzip.compress(b'{"id": "a"}\n' * 5000)
  (tmp_path / 'x.jsonl.gz').write_bytes(whole[:len(whole) // 2])
  with pytest.raises(InputError, match='fetch it again'):
    list(records.read(tmp_path / 'x.jsonl.gz'))


def test_nothing_is_half_written(tmp_path):
  def rows():
    yield dict(id='a')
    raise RuntimeError
  with pytest.raises(RuntimeError):
    records.write(tmp_path / 'x.jsonl', rows())
  assert not (tmp_path / 'x.jsonl').exists()


def test_a_line_cut_by_a_kill_is_dropped_and_the_rest_kept(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c')
  out = records.Appender(path)
  assert out.count == 2
  out.append([dict(id='c')])
  out.close()
  assert [r['id'] for r in records.read(path)] == ['a', 'b', 'c']


def test_shards_are_read_in_order_and_a_missing_one_is_noticed(tmp_path):
  for i in (1, 0):
    records.write(tmp_path / records.shard_name('r', i, 2), [dict(id=str(i))])
  assert [r['id'] for r in records.read_shards(tmp_path, 'r')] == ['0', '1']
  (tmp_path / records.shard_name('r', 0, 2)).unlink()
  with pytest.raises(InputError, match='should hold 2 shards'):
    list(records.read_shards(tmp_path, 'r'))


def test_shards_of_another_number_of_hosts_are_refused(tmp_path):
  records.write(tmp_path / records.shard_name('r', 0, 2), [dict(id='a')])
  records.same_hosts(tmp_path / records.shard_name('r', 1, 2))
  with pytest.raises(InputError, match='is of a run on 2 hosts, and this one is on 1'):
    records.same_hosts(tmp_path / records.shard_name('r', 0, 1))
