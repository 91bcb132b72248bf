import contextlib
import dataclasses
import gzip
import json
import os

from etils import epath
from hypothesis import given, strategies as st
import pytest
import samples
import schemas

from srlm_jax import InputError, records, schema


def prompts(*names):
  return [schema.Prompt(id=name, prompt=f'Prompt {name}?') for name in names]


LINE = b'{"id": "a", "prompt": ""}\n'


def test_records_round_trip_through_a_file(tmp_path):
  rows = [schema.Prompt(id='a', prompt='é\n"x"', author='m1'), schema.Prompt(id='b', prompt='')]
  assert records.write(tmp_path / 'x.jsonl', rows) == 2
  assert list(records.read(tmp_path / 'x.jsonl', schema.Prompt)) == rows
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'x.jsonl').read_bytes()))
  assert list(records.read(tmp_path / 'x.jsonl.gz', schema.Prompt)) == rows
  assert list(records.read_any(tmp_path / 'x.jsonl')) == [
      (f'{tmp_path}/x.jsonl:1', dict(id='a', prompt='é\n"x"', author='m1')),
      (f'{tmp_path}/x.jsonl:2', dict(id='b', prompt=''))]


@pytest.mark.parametrize('kind', schemas.KINDS, ids=lambda kind: kind.__name__)
def test_a_line_leaves_out_defaults_and_gives_an_equal_record(kind):
  @given(schemas.any_record(kind))
  def check(record):
    line = records.dump(record)
    assert line.count('\n') == 1 and records.parse(line.encode(), '', kind) == record
    assert list(json.loads(line)) == [f.name for f in dataclasses.fields(kind)
                                      if getattr(record, f.name) != f.default]
  check()


def test_other_fields_and_blank_lines_are_ignored(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('\n{"id": "a", "prompt": "", "split": [1]}\n \n\t\n{"prompt": "", "id": "b"}')
  assert [r.id for r in records.read(path, schema.Prompt)] == ['a', 'b']
  places = [where for where, _ in records.read_any(path)]
  assert [where.rpartition(':')[2] for where in places] == ['2', '5']


SCORE = '{"id": "a", "spread": 0, "score": '
REPLY = '{"id": "a", "prompt": "", "split": "eval", "replies": [{"id": "r", "text": "", "rank": '


@pytest.mark.parametrize('kind, good, bad, message', [
    (schema.Prompt, '', '{"id": "b"}', 'Object missing required field prompt;'),
    (schema.Prompt, '', '{"id": "b", "prompt": 5}', 'Expected str, got int for "prompt";'),
    (schema.Prompt, '', '{"id": "b", "prompt": null}', 'Expected str, got null for "prompt";'),
    (schema.Prompt, '', '{"id": "b", "prompt": "", "author": null}',
     'Expected str, got null for "author";'),
    (schema.Prompt, '', '{"id": ', 'not a JSON object'),
    (schema.Prompt, '', '{"id": "b", "prompt": ""} {}', r'not a JSON object \(Extra data'),
    (schema.Prompt, '', r'{"prompt": "\ud83d", "id": "b"}', 'an unpaired surrogate'),
    (schema.Prompt, '', '[1]', 'Expected object, got array;'),
    (schema.Prompt, '', 'null', 'Expected object, got null;'),
    (schema.CandidateScore, SCORE + 'null}', SCORE + '"4"}',
     r'Expected float \| null, got str for "score";'),
    (schema.CandidateScore, SCORE + '4}', SCORE + 'true}', r'Expected .* got bool for "score";'),
    (schema.CandidateScore, SCORE + '2.5}', SCORE + '[4]}', r'Expected .* got array for "score";'),
    (schema.CandidateScore, SCORE + '-1e9}', SCORE + 'NaN}', 'it contains NaN, Infinity'),
    (schema.CandidateScore, '', SCORE + '-Infinity}', 'it contains NaN, Infinity'),
    (schema.CandidateScore, '', SCORE + '1' + '0' * 400 + '}', 'Number out of range for "score";'),
    (schema.RankedPrompt, REPLY + '0}]}', REPLY + '0.5}]}',
     r'Expected int, got float for "replies\[0\].rank";'),
    (schema.RankedPrompt, '', REPLY + '0}, "x"]}',
     r'Expected object, got str for "replies\[1\]";'),
    (schema.RankedPrompt, '', REPLY.rpartition(',')[0] + '}]}', 'missing required field rank for'),
    (schema.RankedPrompt, '', REPLY.partition('[')[0] + '"x"}',
     'Expected array, got str for "replies";')])
def test_a_line_that_is_no_record_is_refused_with_its_place(tmp_path, kind, good, bad, message):
  path = tmp_path / 'x.jsonl'
  path.write_text(f'{good}\n{bad}\n')
  with pytest.raises(InputError, match=rf'x\.jsonl:2: .*{message}.*') as error:
    list(records.read(path, kind))
  assert str(error.value).endswith('; correct or delete it') and '\n' not in str(error.value)


@pytest.mark.parametrize('line, message', [
    ('{"id": ', 'not a JSON object'), ('[1]', 'a list, not a JSON object'),
    ('null', 'a NoneType, not a JSON object')])
def test_a_line_of_unknown_format_is_an_object(tmp_path, line, message):
  (tmp_path / 'x.jsonl').write_text(f'{{"text": NaN}}\n{line}\n')
  with pytest.raises(InputError, match=f'x.jsonl:2: {message}.*; correct or delete the line'):
    list(records.read_any(tmp_path / 'x.jsonl'))


def test_a_truncated_gzip_file_is_refused(tmp_path):
  whole = gzip.compress(LINE * 5000)
  (tmp_path / 'x.jsonl.gz').write_bytes(whole[:len(whole) // 2])
  with pytest.raises(InputError, match='fetch it again'):
    list(records.read(tmp_path / 'x.jsonl.gz', schema.Prompt))


def test_a_failed_write_leaves_no_file(tmp_path):
  def rows():
    yield from prompts('a')
    raise RuntimeError
  with pytest.raises(RuntimeError):
    records.write(tmp_path / 'x.jsonl', rows())
  assert not list(tmp_path.iterdir())


def test_the_appender_drops_a_truncated_last_line_and_keeps_the_rest(tmp_path):
  path = tmp_path / 'x.jsonl'
  whole = ''.join(map(records.dump, prompts('a', 'b', 'c')))
  path.write_text(whole[:-4])
  out = records.Appender(path)
  assert out.count == 2
  out.append(prompts('c'))
  out.close()
  assert path.read_text() == whole


def test_shards_are_read_in_order_and_a_missing_shard_is_refused(tmp_path):
  for i in (1, 0):
    records.write(tmp_path / records.shard_name('r', i, 2), prompts(str(i)))
  assert [r.id for r in records.read_shards(tmp_path, 'r', schema.Prompt)] == ['0', '1']
  (tmp_path / records.shard_name('r', 0, 2)).unlink()
  with pytest.raises(InputError, match='should hold 2 shards'):
    list(records.read_shards(tmp_path, 'r', schema.Prompt))


def response(i, j):
  return samples.response(f'{i}/{j}')


def judgement(i, j):
  return samples.judgement(f'{i}', j, None)


def comparison(i, j):
  return schema.Comparison(id=f'{i}/{j}', response_id=f'{i}', first='', second='', text='',
                           winner=None, reason='', finish='eos')


def reward(i, j):
  return schema.ImplicitReward(id=f'{i}/{j}', reward=None, logp=None, older_logp=None)


@pytest.mark.parametrize('stem, make, per_request', [
    ('responses', response, 4), ('judgements', judgement, 3), ('comparisons', comparison, 1),
    ('rewards', reward, 1)])
@pytest.mark.parametrize('hosts', [1, 2, 3, 8])
def test_read_shards_restores_the_request_order_for_any_number_of_hosts(
    tmp_path, stem, make, per_request, hosts):
  requests = [[make(i, j) for j in range(per_request)] for i in range(11)]
  for host in range(hosts):
    records.write(tmp_path / records.shard_name(stem, host, hosts), sum(requests[host::hosts], []))
  found = list(records.read_shards(tmp_path, stem, type(make(0, 0))))
  assert found == sum(requests, [])


def test_a_stray_file_among_the_shards_is_refused(tmp_path):
  records.write(tmp_path / records.shard_name('r', 0, 1), prompts('a'))
  (tmp_path / 'r-00000-of-00001 (copy).jsonl').write_text('')
  with pytest.raises(InputError, match=r'\(copy\).jsonl is not a shard of r; delete or move it'):
    list(records.read_shards(tmp_path, 'r', schema.Prompt))


@given(st.lists(st.tuples(st.text('ab/%2F', max_size=5), st.text('ab/%2F', max_size=5)),
                unique=True))
def test_join_maps_different_parts_to_different_names(parts):
  assert len({records.join(*pair) for pair in parts}) == len(parts)


REQUESTS = [[response(i, j) for j in range(3)] for i in range(11)]


def write_some(folder, counts):
  """What a killed run leaves: of shard h, the first counts[h] records and a part of the next."""
  for host, count in enumerate(counts):
    path = folder / records.shard_name('responses', host, len(counts))
    lines = [records.dump(r) for r in sum(REQUESTS[host::len(counts)], [])]
    path.write_text(''.join(lines[:count]) + ''.join(lines[count:count + 1])[:20])


class Killed(Exception):
  """A kill at a write or a deletion."""


@pytest.mark.parametrize('kill_at', range(6))
def test_records_of_another_number_of_hosts_are_kept_once_and_by_request(
    tmp_path, monkeypatch, kill_at):
  """Three runs on 2, 4 and 1 hosts; the move is killed at each of its writes and deletions."""
  def keep(count):
    steps = 0

    def killed(call):
      def run(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps > kill_at:
          raise Killed
        return call(*args, **kwargs)
      return run
    with monkeypatch.context() as m:
      path = type(epath.Path(tmp_path))
      m.setattr(path, 'unlink', killed(path.unlink))
      m.setattr(path, 'replace', killed(path.replace))
      with contextlib.suppress(Killed):
        records.keep_shards(tmp_path, 'responses', count)
    records.keep_shards(tmp_path, 'responses', count)

  def found():
    kept = records.Kept(tmp_path, 'responses')
    return {name: [x['id'] for x in some] for name in map(str, range(10))
            if (some := kept.get(name))}
  write_some(tmp_path, [7, 3])  # requests 0 and 2, a record of 4; request 1
  keep(2)
  assert len(list(tmp_path.glob('*.jsonl'))) == 2 and not found()
  keep(4)
  assert not list(tmp_path.glob('*.jsonl'))
  expected = {str(i): [f'{i}/{j}' for j in range(3)] for i in (0, 1, 2)} | {'4': ['4/0']}
  assert found() == expected
  write_some(tmp_path, [6, 3, 1, 0])  # requests 0, 4 and 1; a record of 2
  keep(1)
  assert found() == expected | {'4': ['4/0', '4/1', '4/2']}
  assert [p.name for p in tmp_path.iterdir()] == ['responses.kept']
  lines = (tmp_path / 'responses.kept').read_text().splitlines(keepends=True)
  assert set(lines) < {records.dump(r) for some in REQUESTS for r in some}
  records.drop_kept(tmp_path, 'responses')
  assert not list(tmp_path.iterdir())


def put_unreadable(path, kind):
  """Creates an unreadable file or a folder at `path` -> the path to read."""
  if kind == 'folder':
    path.mkdir()
  elif kind == 'below a file':
    path.write_bytes(LINE)
    return path / 'x.jsonl'
  else:
    utf8, deep = LINE + b'{"id": "\xff"}\n', b'{"x": ' + b'[' * 100_000 + b'\n'
    path.write_bytes(dict(utf8=utf8, zip=LINE, deep=deep)[kind])
  return path


@pytest.mark.parametrize('name, kind, message', [
    ('x.jsonl', 'folder', r'x.jsonl is a folder; give a file'),
    ('x.jsonl.gz', 'folder', r'x.jsonl.gz is a folder; give a file'),
    ('x.jsonl', 'below a file', r'x.jsonl/x.jsonl does not exist'),
    ('x.jsonl', 'utf8', r'x.jsonl:2: not a (JSON object|valid record)'),
    ('x.jsonl', 'deep', r'x.jsonl:1: not a (JSON object|valid record).*recursion'),
    ('x.jsonl.gz', 'zip', r'x.jsonl.gz:1: the file cannot be read further \(Not a gzipped file')])
def test_unreadable_record_files_are_refused(tmp_path, name, kind, message):
  path = put_unreadable(tmp_path / name, kind)
  for rows in (records.read(path, schema.Prompt), records.read_any(path)):
    with pytest.raises(InputError, match=message):
      list(rows)


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
  path.write_bytes(LINE)  # patched below, because root ignores file modes
  for method, read in (('exists', lambda: list(records.read_any(path))),
                       ('open', lambda: list(records.read_any(path))),
                       ('open', lambda: records.read_json(path, ''))):
    monkeypatch.setattr(type(path), method, denied)
    with pytest.raises(InputError, match=r'x.jsonl cannot be read \(Permission denied\)'):
      read()
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
    records.write(tmp_path / out if out else '', prompts('a'))
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder'] and not os.listdir(tmp_path / 'folder')
  assert (tmp_path / 'file').read_text() == 'kept'
