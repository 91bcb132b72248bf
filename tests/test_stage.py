import json
import subprocess
import sys

from conftest import ROOT
from ml_collections import ConfigDict
import pytest

from configs import base
from srlm_jax import InputError, loop, stage


def config(**pairs):
  return ConfigDict(dict(name='m2', seed=0, pairs=dict(a=1, b='x') | pairs, other=dict(c=1)))


def test_the_manifest_comes_first_and_done_last(tmp_path):
  (tmp_path / 'in.jsonl').write_text('{}\n')
  s = stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [tmp_path / 'in.jsonl'], 'abc')
  assert not s.done and not s.folder.exists()
  s.begin()
  manifest = json.loads((s.folder / 'manifest.json').read_text())
  assert manifest['params'] == 'abc' and manifest['config'] == dict(seed=0, pairs=dict(a=1, b='x'))
  assert list(manifest['inputs']) == ['in.jsonl'] and manifest['versions']['jax']
  assert not (s.folder / 'done.json').exists()
  s.finish(pairs=3)
  again = stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [tmp_path / 'in.jsonl'], 'abc')
  assert again.done and stage.summary(s.folder)['pairs'] == 3


def test_a_stage_made_with_something_else_is_refused_by_name(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_text('{}\n')
  stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [source], 'abc').begin()
  with pytest.raises(InputError, match=r'config.pairs.a \(1, now 2\)'):
    stage.Stage(config(a=2), tmp_path, 'pairs', ('pairs',), [source], 'abc')
  with pytest.raises(InputError, match=r'params \(abc, now abd\)'):
    stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [source], 'abd')
  source.write_text('{"id": 1}\n')
  with pytest.raises(InputError, match='inputs.in.jsonl'):
    stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [source], 'abc')
  with pytest.raises(InputError, match='does not exist'):
    stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [tmp_path / 'nothing'], 'abc')


@pytest.mark.parametrize('flags, message', [
    (['--config=configs/iter2.py:tiny', '--config.train.lerning_rate=1'],
     'no key "lerning_rate" (did you mean "learning_rate"?)'),
    (['--config=configs/iter2.py:tiny', '--config.zzz=1'], 'no key "zzz"'),
    (['--config=configs/iter2.py:tiny', '--config.train.batch=many'], 'invalid literal'),
    (['--config=configs/iter2.py:huge'], "size 'huge' is unknown"),
    (['--config=configs/none.py'], 'configs/none.py cannot be read'),
    ([], '--config'), (['--config=configs/iter2.py:tiny', 'train'], "'train' is not a flag"),
    (['--config=configs/iter2.py', '--wrkdir=x'], 'wrkdir'),
    (['--config=configs/iter2.py'], 'needs 1,241,579,667,456 bytes'),
    (['--config=configs/iter2.py:tiny', '--workdir=/tmp/srlm-nothing-here'],
     'm2 starts from m1, which has no checkpoint')])
def test_bad_flags_give_one_sentence_and_exit_code_1(flags, message):
  ran = subprocess.run([sys.executable, '-m', 'srlm_jax.train', *flags], cwd=ROOT, capture_output=True, text=True)
  lines = [line for line in ran.stderr.splitlines() if line.startswith('error: ')]
  assert ran.returncode == 1 and len(lines) == 1 and message in lines[0], ran.stderr
  assert 'Traceback' not in ran.stderr and not (ROOT / 'runs' / 'iter2-70b').exists()


def test_a_file_in_place_of_the_workdir_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in ('file', 'file/run'):
    with pytest.raises(InputError, match='file is a file, not a folder; give another path'):
      stage.keep_compiled(tmp_path / workdir)
  with pytest.raises(InputError, match='is a folder; give a file'):
    stage.hash_file(tmp_path)


def test_a_stage_that_reads_from_an_unfinished_one_is_refused(tmp_path):
  before = stage.Stage(config(), tmp_path, 'judge', ())
  before.begin()
  (before.folder / 'judgements.jsonl').write_text('{}\n')
  with pytest.raises(InputError, match='m2/judge is not finished; run that stage again'):
    stage.Stage(config(), tmp_path, 'pairs', ('pairs',), [before.folder / 'judgements.jsonl'])
  (tmp_path / 'm1' / 'model').mkdir(parents=True)
  (tmp_path / 'm1' / 'model' / 'manifest.json').write_text('{}')
  with pytest.raises(InputError, match='m1/model is not finished'):
    stage.finished_model(tmp_path, 'm1')


def test_another_template_is_noticed(tmp_path):
  s = stage.Stage(config(), tmp_path, 'judge', (), template='Judge {prompt}')
  s.begin()
  with pytest.raises(InputError, match='template'):
    stage.Stage(config(), tmp_path, 'judge', (), template='Grade {prompt}')


@pytest.mark.parametrize('key, value, message', [
    ('train.batch', 0, 'train.batch is 0; it must be above 0'), ('train.dtype', 'fl32', "train.dtype is 'fl32'"),
    ('train.loss', 'ppo', "train.loss is 'ppo'"), ('train.select', 'agreemnt', "select is 'agreemnt'; it is empty"),
    ('train.select', "grade '{checkpoint}", 'or a command with {checkpoint}'),
    ('train.dropout', -0.1, 'dropout is -0.1; it must be 0 or more'), ('train.beta', 0.0, 'beta is 0.0; it must be'),
    ('train.clip', 0.0, 'clip is 0.0'), ('train.learning_rate', float('nan'), 'learning_rate is nan'),
    ('judge.quorum', 4, 'quorum is 4, more than the 3'),
    ('train.learning_rate', -1.0, 'learning_rate'), ('judge.n', 0, 'judge.n is 0')])
def test_a_value_that_no_stage_can_work_with_is_refused_by_name(key, value, message):
  c = base.get('m2', 'tiny')
  base.check(c)
  c.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    base.check(c)


def test_a_change_for_some_models_of_the_loop():
  def load(name, *changes):
    return loop.load_config(name, 'tiny', '', '', list(changes))
  assert load('m2', 'train.batch=4').train.batch == load('m0', 'train.batch=4').train.batch == 4
  assert load('m2', 'm2,m3:train.epochs=7').train.epochs == 7.0 != load('m1', 'm3:train.epochs=7').train.epochs
  assert load('m2', 'train.data=a,b').train.data == ('a', 'b')
  assert load('m2', 'data.synthetic=true').data.synthetic is True
  assert load('m2', 'judge.template=/a:b.txt').judge.template == '/a:b.txt'
  for change, message in (('train.bach=4', 'no key "bach" .did you mean "batch"'),
                          ('m9:train.batch=4', "no model 'm9'"),
                          ('train.batch=x', "'x' is no int for train.batch"), ('train=4', 'is no ConfigDict'),
                          ('train.batch', "'' is no int"), ('seed.x=1', 'no key "x"')):
    with pytest.raises(InputError, match=message):
      load('m2', change)
