"""What TensorBoard and Weights & Biases show of a stage while it runs."""
import contextlib
import json
import os
import subprocess
import sys
import types

from boards import shown
from conftest import ROOT
import pytest

from srlm_jax import InputError, metrics, records, schema
from srlm_jax.sample import engine as engines, monitor


def judgements(*scores):
  return [schema.Judgement(
      id=str(i), prompt_id='p', response_id='r', index=i, text=f'</code><b>{i}\n# é', score=s,
      reason='' if s is not None else 'no score', finish='eos') for i, s in enumerate(scores)]


def watched(folder, made, known=0, work=None, kill=False):
  """Adds the records one by one, each after 50 tokens in 100 steps of slots."""
  work = work or engines.Work()
  found = monitor.Monitor(folder, 'judgements', type(made[-1]), known, work)
  found.add(made[:known])
  for record in made[known:]:
    work.generated, work.slot_steps = work.generated + 50, work.slot_steps + 100
    found.add([record])
  if not kill:
    found.close()
  else:
    found._board.close()
  return shown(folder / 'tensorboard' / 'judgements')


def test_points_have_the_means_the_histogram_and_escaped_samples(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, 'SECONDS', 0)
  found = watched(tmp_path, judgements(3, None, 4, 4))
  assert found['parse_rate'] == pytest.approx({1: 1, 2: 1 / 2, 3: 2 / 3, 4: 3 / 4})
  assert found['score'] == pytest.approx({1: 3, 2: 3, 3: 3.5, 4: 11 / 3})
  assert set(found['slot_utilization'].values()) == {0.5}
  assert all(speed > 0 for speed in found['tokens_per_second'].values())
  last = found['score_histogram'][4]
  assert [*last.bucket] == [1, 2] and [*last.bucket_limit] == [3.5, 4.5]
  assert (last.min, last.max, last.num, last.sum) == (2.5, 4.5, 3, 11)
  text = found['samples/text_summary'][4]
  assert text == '    3: score 4\n    \n    </code><b>3\n    # é'  # a block of code


def test_a_point_comes_after_some_seconds_and_at_the_end(tmp_path, monkeypatch):
  assert [*watched(tmp_path / 'a', judgements(1, 2, 3))['score']] == [3]
  assert not watched(tmp_path / 'b', judgements(1, 2, 3), kill=True)
  made = [schema.Logp(id=str(i), logp=-float(i) or None) for i in range(100)]
  found = watched(tmp_path / 'c', made)
  assert found['logp'] == {100: -50} and len(found['logp_histogram'][100].bucket) <= metrics.BINS
  assert 'samples/text_summary' not in found


def test_a_resumed_stage_shows_what_an_undisturbed_one_shows(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, 'SECONDS', 0)
  made = judgements(5, 1, None, 2, 2, 3)
  whole = watched(tmp_path / 'whole', made)
  watched(tmp_path / 'killed', made[:4], kill=True)
  found = watched(tmp_path / 'killed', made, known=3)  # the kill lost the fourth record
  kept = [json.loads(records.dump(record)) for record in made[:2]]  # of other hosts
  moved = watched(tmp_path / 'moved', [*kept, *made[2:]])
  for other in (whole, found, moved):
    del other['tokens_per_second']
  assert found == whole == moved


def test_long_samples_are_cut():
  text = metrics.code(['x' * 5000])
  assert len(text) < metrics.MOST_CHARACTERS + 20 and text.endswith(' ..')
  assert metrics.code(['a\ud800']) == '    a?'


def test_a_finished_stage_is_one_point_per_model(tmp_path):
  for i, model in enumerate(('sft', 'm1', 'm2')):
    folder = tmp_path / model / 'judge'
    folder.mkdir(parents=True)
    (folder / 'done.json').write_text(f'{{"parsed": {i}, "judgements": 4, "unparsed": {{"x": 1}}}}')
    metrics.show_finished(tmp_path, f'{model}/judge')
  found = shown(tmp_path / 'tensorboard' / 'models')
  assert found['judge/parse_rate'] == {0: 0, 1: 0.25, 2: 0.5}
  assert found['judge/unparsed/x'] == {0: 1, 1: 1, 2: 1}
  (tmp_path / 'm1' / 'judge' / 'done.json').write_text('{"parsed": 3, "judgements": 4}')
  metrics.show_finished(tmp_path, 'm1/judge')  # the stage was deleted and has run again
  found = shown(tmp_path / 'tensorboard' / 'models')
  assert found['judge/parse_rate'] == {0: 0, 1: 0.75, 2: 0.5}
  assert found['judge/unparsed/x'] == {0: 1, 2: 1}


def test_a_compared_checkpoint_has_its_own_curves_and_none_of_the_models(tmp_path, monkeypatch):
  """Its answers are a stage in a workdir in the folder of a stage (`selection.make_workdir`)."""
  logged = []
  monkeypatch.setattr(metrics, '_wandb', types.SimpleNamespace(
      define_metric=lambda name, **_: logged.append(name)))
  monkeypatch.setattr(metrics, '_log', lambda title, *_: logged.append(title))
  monkeypatch.setattr(metrics, '_workdir', tmp_path)
  inner = tmp_path / 'm2' / 'stopping' / '0'
  for workdir in tmp_path, inner:
    metrics.Board(workdir / 'm2' / 'answers', 'responses').close()
  metrics.Board(tmp_path.parent / 'other' / 'm2' / 'answers').close()
  assert logged == ['m2/answers/responses/*', 'm2/stopping/0/m2/answers/responses/*',
                    'm2/answers/*']
  (tmp_path / 'm2' / 'stopping' / 'manifest.json').write_text('{}')
  for workdir in tmp_path, inner:
    del logged[:]
    (workdir / 'm2' / 'answers' / 'done.json').write_text('{"responses": 4}')
    metrics.show_finished(workdir, 'm2/answers')
    assert bool(logged) == (workdir / 'tensorboard').exists() == (workdir == tmp_path)


def test_weights_and_biases_are_not_imported_unless_asked_for_and_named_if_missing(
    tmp_path, monkeypatch):
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  with metrics.weights_and_biases(tmp_path):
    assert 'wandb' not in sys.modules
  monkeypatch.setenv('WANDB_PROJECT', 'x')
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match='WANDB_PROJECT is x, and the package wandb is not inst'):
    with metrics.weights_and_biases(tmp_path):
      raise AssertionError
  assert not [*tmp_path.iterdir()]


def test_a_kill_leaves_no_empty_id_of_weights_and_biases(tmp_path, monkeypatch):
  """A kill is an error here: `wandb.txt` must not exist before its content is written."""
  class Killed(BaseException):
    pass

  def kill():
    assert not (tmp_path / 'run' / 'wandb.txt').exists()
    raise Killed
  ids, wandb = [], types.ModuleType('wandb')
  wandb.Error = OSError
  wandb.init = lambda **options: contextlib.nullcontext(ids.append(options['id']))
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  monkeypatch.setenv('WANDB_PROJECT', 'x')
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: name)
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(os, 'fsync', lambda file: kill())
    with metrics.weights_and_biases(tmp_path / 'run'):
      raise AssertionError
  for _ in range(2):
    with metrics.weights_and_biases(tmp_path / 'run'):
      pass
  assert len(ids) == 2 and ids[0] == ids[1] == (tmp_path / 'run' / 'wandb.txt').read_text() != ''


RUN = '''
import sys
from srlm_jax import metrics
for known in (-1, 0):
  with metrics.weights_and_biases(sys.argv[1]):
    board = metrics.Board(f'{sys.argv[1]}/m2/judge', step=known)
    board.write(known + 1, dict(score=3 + known), dict(scores={3: 2, 5: 1}))
    board.close()
'''


def logged(path):
  """The records of a file of Weights & Biases: 7 bytes, and then the log format of LevelDB."""
  from wandb.proto import wandb_internal_pb2 as pb
  data, at, parts = path.read_bytes(), 7, b''
  while at < len(data):
    if 2**15 - at % 2**15 < 7:  # the end of a block
      at += 2**15 - at % 2**15
    size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
    parts, at = parts + data[at + 7:at + 7 + size], at + 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield pb.Record.FromString(parts)
      parts = b''


@pytest.mark.slow
def test_weights_and_biases_get_the_points(tmp_path):
  """Offline, with the real package. The second run continues the first."""
  pytest.importorskip('wandb', reason='pip install -e ".[wandb]"')
  env = os.environ | dict(WANDB_PROJECT='x', WANDB_MODE='offline', WANDB_DIR=str(tmp_path))
  subprocess.run([sys.executable, '-c', RUN, str(tmp_path / 'run')], check=True, env=env, cwd=ROOT)
  rows, names = [], set()
  for path in tmp_path.glob('wandb/offline-run-*/*.wandb'):
    for record in logged(path):
      if record.WhichOneof('record_type') == 'run':
        names.add((record.run.run_id, record.run.project, record.run.display_name))
      if record.WhichOneof('record_type') == 'history':
        rows.append({item.key or '/'.join(item.nested_key): item.value_json
                     for item in record.history.item})
  assert names == {((tmp_path / 'run' / 'wandb.txt').read_text(), 'x', 'run')}
  assert sorted((row['m2/judge/step'], row['m2/judge/score']) for row in rows) == [
      ('0', '2'), ('1', '3')]
  assert all(any(key.startswith('m2/judge/scores') for key in row) for row in rows)
