"""Early stopping: checkpoints are compared while a model is trained; the better one is used."""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

from boards import shown
from conftest import CHANGES, config_flags, init, main, make_mesh, ROOT, run_main
import jax
import pytest
from test_storage import Fault, in_upload, kill, until_done, upload

from srlm_jax import (
  base,
  catalog,
  config as configs,
  InputError,
  model_files,
  records,
  schema,
  stage,
  stopping,
)
from srlm_jax.checkpoint import store
from srlm_jax.eval import endpoint, head_to_head
from srlm_jax.models.config import PRESETS
from srlm_jax.sandbox import world
from srlm_jax.train import run as train

TINY = PRESETS['tiny-test']


def wins(step, before, wins, losses, ties=1):
  return schema.StepWins(step=step, before=before, wins=wins, ties=ties, losses=losses, left_out=0)


@pytest.mark.parametrize('wins_and_losses, step', [
    ([(5, 4)], 200), ([(4, 4)], 0), ([(3, 4)], 0), ([(0, 0)], 0), ([(1, 0)], 200),
    ([(5, 4), (7, 2)], 400), ([(5, 4), (2, 2)], 200), ([(5, 4), (5, 4), (0, 1)], 400),
    ([(5, 4), (5, 4), (9, 1)], 600)])
def test_the_better_checkpoint_of_the_last_comparison_is_used(wins_and_losses, step):
  found = [wins(200 * i, 200 * (i - 1), *both) for i, both in enumerate(wins_and_losses, 1)]
  assert stopping.best(found) == step
  assert [x.is_better for x in found] == [w > l for w, l in wins_and_losses]


# Config.


def config(name='m2', size='tiny', **changes):
  found = configs.get(name, size)
  found.update_from_flattened_dict({key.replace('__', '.'): x for key, x in changes.items()})
  return found


@pytest.mark.parametrize('size', ['auto', '7b', '13b', '70b'])
def test_at_published_sizes_a_judge_turns_it_on(size):
  for name in ('sft', 'm1', 'm2', 'm3'):
    without, judged = config(name, size), config(name, size, endpoint__url='http://judge/v1')
    assert base.with_selection(without).train.select == ''
    assert base.with_selection(judged).train.select == 'wins'
    off = config(name, size, endpoint__url='http://judge/v1', train__select='')
    assert base.with_selection(off).train.select == ''
  assert configs.epochs(base.with_selection(judged).train) == judged.train.max_epochs == 3
  assert configs.epochs(base.with_selection(without).train) == without.train.epochs == 1


@pytest.mark.parametrize('size', ['tiny', 'stories'])
def test_at_the_other_sizes_it_is_off_until_asked_for(size):
  found = config('m2', size, endpoint__url='http://judge/v1')
  assert base.with_selection(found).train.select == '' and not catalog.needs('stopping', found)


def test_the_steps_that_config_py_states():
  """A pass over the data of the paper in batches of 16; a checkpoint every 200 steps."""
  def steps(examples, epochs):
    return -(-examples * epochs // 16)
  assert [steps(n, 1) for n in (3964, 3200 + 1630, 6942)] == [248, 302, 434]
  most = configs.get('m2').train.max_epochs
  assert steps(3964, most) == 744
  assert len([*range(200, steps(3964, 1), 200)]) == 1  # beside the last step
  text = (ROOT / 'srlm_jax' / 'config.py').read_text()
  assert '200, 400, 600 and 744' in text and '3,964 / 16 = 248' in text


@pytest.mark.parametrize('changes, message', [
    (dict(train__init=''), 'starts from no model'),
    (dict(data__valid_prompts=0), 'data.valid_prompts is 0'),
    (dict(train__keep=1), 'train.keep is 1; set it to 2 or more'),
    (dict(train__judge='endpoint'), 'no judge is configured; give config.endpoint.url'),
    (dict(data__source='oasst', data__ranked_tune=0), "'oracle', which only the sandbox has")])
def test_what_makes_no_sense_is_refused_in_one_sentence(changes, message):
  configs.check(config(train__select='wins'))
  with pytest.raises(InputError, match=message) as error:
    configs.check(config(train__select='wins', **changes))
  assert '. ' not in str(error.value).replace('config.', '')
  configs.check(config(**changes | dict(train__judge='endpoint')))  # without early stopping


def test_an_error_names_what_turned_it_on():
  judged = dict(endpoint__url='http://judge/v1', data__valid_prompts=0)
  with pytest.raises(InputError, match='because config.endpoint.url is set') as error:
    configs.check(config('m2', '7b', **judged))
  assert 'is wins' not in str(error.value)
  configs.check(config('m2', '7b', data__valid_prompts=0))
  configs.check(config('m2', '7b', **judged, train__select=''))


def test_a_judge_that_no_one_asks_is_refused():
  judged = dict(endpoint__url='http://judge/v1', endpoint__model='x', train__select='wins')
  with pytest.raises(InputError, match='m2 asks no judge at config.endpoint.url: train.judge'):
    configs.check(config(**judged))
  for use in dict(train__judge='endpoint'), dict(judge__by='endpoint'), dict(train__select=''):
    configs.check(config(**judged | use))


def test_programs_name_the_one_to_run(tmp_path):
  c = config(train__select='wins')
  with pytest.raises(InputError, match='run python -m srlm_jax.stopping'):
    train.run(c, tmp_path)
  with pytest.raises(InputError, match="config.train.select is ''; early stopping needs wins"):
    stopping.run(config(), tmp_path)
  with pytest.raises(InputError, match='which leaves it to be chosen'):
    stage.Stage(catalog.find('train'), config(size='70b'), tmp_path)


# The training, with decisions that a test makes.


@pytest.fixture(scope='module')
def start(tmp_path_factory, tokenizer_folder):
  """A folder with M0 and the seeds of a tiny run."""
  folder = tmp_path_factory.mktemp('start')
  store.write_model_files(TINY, tokenizer_folder, folder / 'm0' / 'model')
  with jax.set_mesh(make_mesh(1, 1, 1)):
    saver = store.manager(folder / 'm0' / 'model', 1)
    store.save(saver, 0, init(TINY))
    saver.close()
  fruits = itertools.permutations(['pear', 'fig', 'plum'])
  records.write(folder / 'data' / 'seeds' / 'ift.jsonl', [
      schema.Demonstration(id=str(i), prompt='Name a fruit.', response=' '.join(f))
      for i, f in enumerate(fruits)])
  return folder


def sft_config(**keys):
  c = configs.get('sft', 'tiny').copy_and_resolve_references().unlock()
  c.model = 'tiny-test'
  c.train.update(dict(batch=3, epochs=4, max_epochs=4, max_length=64, log_every=2, save_every=3,
                      **keys))
  return c


def train_sft(start, workdir, decide=None, **keys):
  """Trains for at most 8 steps, with checkpoints at 3, 6 and 8 -> its folder and its metrics."""
  if not workdir.exists():
    shutil.copytree(start, workdir)
  train.run(sft_config(select='wins' if decide else '', **keys), workdir, decide)
  folder = workdir / 'sft' / 'model'
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    del line['tokens_per_second']
  return folder, lines


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory):
  """{step: hash} of an undisturbed run without comparisons that keeps all, and its metrics."""
  folder, lines = train_sft(start, tmp_path_factory.mktemp('whole') / 'run', keep=9)
  assert model_files.steps(folder) == [3, 6, 8]
  return {step: model_files.recorded_hash(folder, step) for step in (3, 6, 8)}, lines


@pytest.mark.parametrize('answers, steps, kept, stopped', [
    pytest.param([True, True, True], 8, [6, 8], '', marks=pytest.mark.slow),
    pytest.param([True, True, False], 8, [6, 8], 'step 8 does not win against step 6',
                 marks=pytest.mark.slow),
    ([True, False], 6, [3, 6], 'step 6 does not win against step 3'),
    ([False], 3, [0, 3], 'step 3 does not win against step 0')])
def test_training_ends_at_the_first_checkpoint_that_does_not_win(
    start, whole, tmp_path, answers, steps, kept, stopped):
  """With the parameters of a run that never pauses: the learning rate is that of all steps."""
  asked, in_memory = [], sum(x.nbytes for x in jax.live_arrays())

  def decide(step):
    asked.append(step)
    assert sum(x.nbytes for x in jax.live_arrays()) - in_memory < 1000  # of 131,000 parameters
    return answers[len(asked) - 1]
  folder, lines = train_sft(start, tmp_path / 'run', decide)
  assert asked == [3, 6, 8][:len(answers)]
  assert model_files.steps(folder) == kept
  hashes = whole[0] | {0: model_files.recorded_hash(start / 'm0' / 'model')}
  assert {n: model_files.recorded_hash(folder, n) for n in kept} == {n: hashes[n] for n in kept}
  assert lines == [line for line in whole[1] if line['step'] < steps]
  done = stage.summary(folder)
  assert (done.steps, done.stopped, done.params) == (steps, stopped, hashes[steps])


def test_a_killed_training_asks_again_only_about_its_last_checkpoint(start, whole, tmp_path):
  class Killed(Exception):
    pass
  asked = []

  def until(count):
    def decide(step):
      asked.append(step)
      if len(asked) == count:
        raise Killed
      return step < 8
    return decide
  for count in (1, 3):  # at the first checkpoint, and at the second
    with pytest.raises(Killed):
      train_sft(start, tmp_path / 'run', until(count))
  folder, lines = train_sft(start, tmp_path / 'run', until(0))
  assert asked == [3, 3, 6, 6, 8]
  assert model_files.recorded_hash(folder, 8) == whole[0][8] and lines == whole[1]
  assert stage.summary(folder).stopped == 'step 8 does not win against step 6'
  train_sft(start, tmp_path / 'run', until(0))  # is done
  assert len(asked) == 5


def test_the_seconds_of_comparisons_are_not_those_of_training_and_each_is_shown_live(
    start, tmp_path, monkeypatch, capsys):
  """The judging takes 1,000 s by a clock that the test sets; the oracle then prefers step 3."""
  workdir, later, clock = tmp_path / 'run', [0], time.time
  shutil.copytree(start, workdir)
  records.write(workdir / 'data' / 'seeds' / 'heldout.jsonl', [])
  points = []

  def answer(s, workdir, step):
    later[0] += 500
    if step == 6:  # the first comparison can be seen while the second is made
      points.append(shown(s.folder / 'tensorboard')['wins'])
    good, bad = 'Sure, cows eat grass.', 'nuts'
    texts = {0: (bad, bad, bad), 3: (good, good, bad), 6: (good, bad, bad)}[step]
    records.write(s.folder / f'{step}' / 'responses-00000-of-00001.jsonl', answers(*texts))
    return s.folder / f'{step}'
  monkeypatch.setattr(stopping, '_answers', answer)
  monkeypatch.setattr(time, 'time', lambda: clock() + later[0])
  stopping.run(sft_config(select='wins'), workdir)
  trained, compared = (stage.finished(workdir / 'sft' / name) for name in ('model', 'stopping'))
  assert trained['seconds'] < 500 and 2000 <= compared['seconds'] < 2500
  assert points == [{3: 2}]
  found = shown(workdir / 'sft' / 'stopping' / 'tensorboard')
  assert found == dict(wins={3: 2, 6: 0}, ties={3: 1, 6: 2}, losses={3: 0, 6: 1},
                       left_out={3: 0, 6: 0})
  assert 'sft/stopping: step 6 against step 3, judged by oracle: 0 wins' in capsys.readouterr().out


# The comparison.


def answers(*texts):
  """Answers to a prompt of the sandbox."""
  return [schema.Response(
      id=f'p{i}/0', prompt_id=f'p{i}', index=0, prompt='What do cows eat?', response=text,
      finish='eos', n_tokens=1, logp=0.0) for i, text in enumerate(texts)]


def compare(folder, a, b, **changes):
  c = config(train__select='wins', **changes)
  s = stage.Stage.__new__(stage.Stage)
  s.config, s.folder, s.title = c, folder, 'm2/stopping'
  for name, found in dict(a=a, b=b).items():
    records.write(folder / name / 'responses-00000-of-00001.jsonl', found)
  found = stopping._compare(s, folder, 400, 200, head_to_head.Both(folder / 'a', folder / 'b'))
  return found.wins, found.ties, found.losses, found.left_out


def test_the_oracle_counts_the_prompts_with_more_points(tmp_path):
  good, bad = 'Sure, cows eat grass.', 'nuts'
  assert compare(tmp_path, answers(good, good, bad, bad), answers(bad, good, good, bad)) == (
      1, 2, 1, 0)
  assert compare(tmp_path, answers(good, good), answers(bad, bad)) == (2, 0, 0, 0)


def test_the_random_judge_depends_on_nothing_but_seed_step_and_prompt(tmp_path):
  a, b = answers(*300 * ['x']), answers(*300 * ['y'])
  found = compare(tmp_path, a, b, train__judge='random')
  assert found == compare(tmp_path, b, a, train__judge='random')
  assert found != compare(tmp_path, a, b, train__judge='random', seed=1)
  assert min(found[:3]) > 70 and sum(found) == 300  # 100 each, standard deviation 8


def test_the_endpoint_judges_both_orders_and_a_judge_without_verdicts_is_an_error(
    tmp_path, monkeypatch):
  """It prefers the longer answer, or that in first place, or says nothing useful."""
  said = {}

  class Client:
    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def answers(self, requests, total=None):
      for request in requests:
        text = request.messages[-1].content
        first, second = (re.search(f'<answer_{x}>\n(.*)\n</answer_{x}>', text)[1] for x in 'ab')
        yield request.id, SimpleNamespace(text=said['verdict'](first, second), finish='eos')
  monkeypatch.setattr(endpoint, 'open', lambda c, folder, title: Client())
  keys = dict(train__judge='endpoint', endpoint__url='http://judge/v1')
  a, b = answers('long one', 'x', 'same'), answers('short', 'longer', 'same')
  def longer(first, second):
    return f'Winner: {"A" if len(first) > len(second) else "B" if first != second else "tie"}'
  said['verdict'] = longer
  assert compare(tmp_path, a, b, **keys) == (1, 1, 1, 0)
  said['verdict'] = lambda first, second: 'Winner: A'
  assert compare(tmp_path, a, b, **keys) == (0, 3, 0, 0)  # a judge of positions decides nothing
  said['verdict'] = lambda first, second: longer(first, second) if first != 'x' else 'who knows'
  assert compare(tmp_path, a, b, **keys) == (1, 1, 0, 1)
  said['verdict'] = lambda first, second: 'who knows'
  with pytest.raises(InputError, match='no verdict in both orders on any of 3 pairs of answers'):
    compare(tmp_path, a, b, **keys)


@pytest.mark.parametrize('changes, message', [
    (dict(url='http://judge/v1'), 'its model is not named'),
    (dict(url='http://judge/v1', model='x', key_env='SRLM_ABSENT'), 'SRLM_ABSENT.* is not set'),
    (dict(url='/absent'), 'neither a folder nor')])
def test_a_judge_that_cannot_be_asked_is_refused_before_training(start, changes, message):
  c = config('sft', train__select='wins', train__judge='endpoint',
             **{f'endpoint__{key}': value for key, value in changes.items()})
  with pytest.raises(InputError, match=message):
    stopping.run(c, start)
  assert not (start / 'sft').exists()


def test_comparisons_of_another_training_are_refused(start, tmp_path):
  shutil.copytree(start, tmp_path / 'run')
  (tmp_path / 'run' / 'sft' / 'stopping').mkdir(parents=True)
  (tmp_path / 'run' / 'sft' / 'stopping' / 'wins.jsonl').write_text('')
  with pytest.raises(InputError, match='compares checkpoints of a training that is gone'):
    stopping.run(config('sft', train__select='wins'), tmp_path / 'run')


# The whole path, in the sandbox.


FLAGS = '--config.train.select=wins', '--config.train.save_every=5'
MADE = 'model', 'agreement', 'answers', 'answers_greedy', 'judge_eval', 'oracle'  # of a model


@pytest.fixture
def sandbox(demo, tmp_path):
  """A function that copies the demo without its M2 -> the copy; the data of M2 stay."""
  def copy(name='run', model='m2'):
    workdir = tmp_path / name
    shutil.copytree(demo[0], workdir, ignore=shutil.ignore_patterns('m3', 'compiled'))
    for part in MADE:
      shutil.rmtree(workdir / model / part)
    return workdir
  return copy


def run(workdir, *flags, before='', file='iter2'):
  return run_main('stopping', f'--config={file}:tiny', f'--workdir={workdir}',
                  *config_flags(dict(iter2='m2', iter1='m1')[file]), *FLAGS, *flags,
                  before=before or 'pass')


def found(workdir, model='m2'):
  """All that a run with early stopping must end with, whatever happened to it."""
  folder, own = workdir / model / 'model', workdir / model / 'stopping'
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    del line['tokens_per_second']
  files = {str(path.relative_to(own)): path.read_bytes() for path in own.rglob('*.jsonl')
           if 'data' not in path.parts and path.name != endpoint.FILE}
  done = json.loads((folder / 'done.json').read_text())
  return (lines, files, model_files.steps(folder), model_files.recorded_hash(folder),
          {key: done[key] for key in ('steps', 'stopped', 'params', 'loss')})


def compared(workdir, model='m2'):
  return stopping.compared(workdir / model / 'stopping')


def grades(workdir, step, model='m2'):
  """{prompt id: points} of the answers of a step, by the oracle."""
  path = workdir / model / 'stopping' / str(step) / model / 'answers'
  return {r.prompt_id: sum(world.grade(r.prompt, r.response))
          for r in records.read_shards(path, 'responses', schema.Response)}


def check_comparisons(workdir, model='m2'):
  """Counts wins and losses again, from the answers."""
  for x in compared(workdir, model):
    a, b = (grades(workdir, step, model) for step in (x.step, x.before))
    assert len(a) == 24 and a.keys() == b.keys()
    assert x.wins == sum(a[name] > b[name] for name in a)
    assert x.losses == sum(a[name] < b[name] for name in a)
    assert x.wins + x.ties + x.losses == 24


@pytest.mark.slow
def test_a_learning_rate_that_ruins_the_model_stops_at_the_first_checkpoint(sandbox):
  """The loop then continues with the model from which training started."""
  workdir = sandbox()
  rates = '--config.train.learning_rate=1', '--config.train.learning_rate_end=1'
  code, out, err = run(workdir, *rates)
  assert not code, err
  check_comparisons(workdir)
  first, = compared(workdir)
  assert (first.step, first.before) == (5, 0) and first.losses > first.wins, out
  folder = workdir / 'm2' / 'model'
  assert model_files.steps(folder) == [0] == [model_files.latest(folder)]
  assert stage.summary(folder).stopped == 'step 5 does not win against step 0'
  assert model_files.recorded_hash(folder) == model_files.recorded_hash(workdir / 'm1' / 'model')
  assert stage.finished_model(workdir, 'm2') == folder
  main('loop', '--size=tiny', f'--workdir={workdir}', '--last=m2',
       *(f'--set={c}' for c in CHANGES), *(flag.replace('--config.', '--set=m2:')
                                           for flag in (*FLAGS, *rates)))
  rows = {row['model']: row for row in json.loads((workdir / 'results.json').read_text())['models']}
  assert rows['m2']['greedy'] == rows['m1']['greedy']


# Where a run is killed: statements that run before it. Each wraps a function of the program.
KILLS = {
    'training': """
import os
from srlm_jax import metrics
def killed(*args, write=metrics.Writer.write):
  write(*args)
  os._exit(9)
metrics.Writer.write = killed
""",
    'sampling': """
import os
from srlm_jax.sample import shards
def killed(self, new, append=shards.Shard.append):
  append(self, new[:3])
  os._exit(9)
shards.Shard.append = killed
""",
    'before the decision is written': """
import os
from srlm_jax.eval import head_to_head
head_to_head.tally = lambda *_: os._exit(9)
""",
    'after the decision': """
import os
from srlm_jax import records
def killed(path, new, write=records.write):
  write(path, new)
  if path.name == 'wins.jsonl':
    os._exit(9)
records.write = killed
""",
    'before the selection': """
import os
from srlm_jax import selection
selection.select = lambda *_: os._exit(9)
""",
    'while other steps are deleted': """
import os
from srlm_jax import selection, stage
def killed(path, value, write=stage.write_json):
  write(path, value)
  if path.name == 'selected.json':
    os._exit(9)
stage.write_json = killed
"""}


@pytest.mark.slow
@pytest.mark.parametrize('judge', ['oracle', 'random'])
def test_a_run_that_is_killed_everywhere_ends_with_the_same_bytes(demo, sandbox, judge):
  whole, workdir = sandbox('whole'), sandbox()
  flag = f'--config.train.judge={judge}'
  code, out, err = run(whole, flag)
  assert not code, err
  if judge == 'oracle':
    check_comparisons(whole)
  wanted = found(whole)
  stopped = bool(wanted[-1]['stopped'])
  if not stopped:  # the parameters of the demo, which never paused
    assert wanted[3] == model_files.recorded_hash(demo[0] / 'm2' / 'model')
  kills = 0
  for _ in compared(whole):
    for where in ('training', 'sampling', 'sampling', 'before the decision is written',
                  'after the decision'):
      code, out, err = run(workdir, flag, before=KILLS[where])
      kills += code == 9
      assert code in (0, 9), out + err
  for where in ('before the selection', 'while other steps are deleted'):
    code, out, err = run(workdir, flag, before=KILLS[where])
    kills += code == 9
  code, out, err = run(workdir, flag)
  assert not code, err
  assert kills >= 3 * len(compared(whole)) and found(workdir) == wanted
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}
  assert not run(workdir, flag)[0]  # is done, so it changes nothing
  assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}


def kill_and_finish(workdir, *flags, file='iter2'):
  """Runs with a kill in training, one after the first decision, and to the end."""
  for where in ('training', 'sampling', 'after the decision', ''):
    code, out, err = run(workdir, *flags, before=KILLS.get(where, ''), file=file)
    assert code == (9 if where else 0), out + err


@pytest.mark.slow
@pytest.mark.parametrize('file, flags', [
    ('iter1', ()), ('iter2', ('--config.train.lora_rank=4', '--config.train.learning_rate=1e-3')),
    ('iter2', ('--config.train.lora_rank=4', '--config.train.learning_rate=3')),
    ('iter2', ('--config.train.reference=cached',))], ids=['sft', 'lora', 'bad lora', 'cached'])
def test_sft_lora_and_a_cached_reference(sandbox, mesh, file, flags):
  model = dict(iter1='m1', iter2='m2')[file]
  whole, workdir = (sandbox(name, model) for name in ('whole', 'run'))
  code, out, err = run(whole, *flags, file=file)
  assert not code, err
  check_comparisons(whole, model)
  kill_and_finish(workdir, *flags, file=file)
  assert found(workdir, model) == found(whole, model)
  folder = whole / model / 'model'
  assert model_files.steps(folder) == [stopping.best(compared(whole, model))]
  params, _ = store.restore_params(folder, mesh, 'float32')  # with the adapter
  if model_files.steps(folder) == [0]:
    wanted, _ = store.restore_params(whole / 'm1' / 'model', mesh, 'float32')
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, wanted))


@pytest.fixture
def server(tmp_path):
  """The URL of the sandbox's oracle, of whose requests one in five fails, and its log."""
  log = tmp_path / 'requests.jsonl'
  process = subprocess.Popen(
      [sys.executable, '-m', 'srlm_jax.sandbox.endpoint', '--port=0', '--fail=5', f'--log={log}'],
      cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ, JAX_PLATFORMS='cpu'))
  yield process.stdout.readline().split()[-1], log
  process.terminate()
  process.wait()


@pytest.mark.slow
def test_the_oracle_behind_an_endpoint_decides_as_the_oracle_and_is_asked_once(sandbox, server):
  """Killed in the middle of the judging, too."""
  url, log = server
  workdir, whole = sandbox(), sandbox('whole')
  assert not run(whole)[0]
  flags = ('--config.train.judge=endpoint', f'--config.endpoint.url={url}',
           '--config.endpoint.model=oracle', '--config.endpoint.timeout=5')
  code, out, err = run(workdir, *flags, before="""
import os
from srlm_jax.eval import endpoint
def killed(*args, put=endpoint.Cache.put, calls=[]):
  put(*args)
  calls.append(args)
  if len(calls) == 10:
    os._exit(9)
endpoint.Cache.put = killed
""")
  assert code == 9, out + err
  code, out, err = run(workdir, *flags)
  assert not code, err
  assert found(workdir) == found(whole)
  sent = [json.loads(line) for line in log.read_text().splitlines()]
  answered = [line['request'] for line in sent if line['outcome'] == 'answered']
  assert len(answered) <= len({*answered}) + 8  # those under way when it was killed
  assert len(sent) > len(answered)


@pytest.mark.slow
def test_in_a_bucket_it_ends_as_on_a_disk(sandbox, demo, bucket):
  path, requests = bucket
  whole = sandbox()
  assert not run(whole)[0]
  upload(demo[0], path, 'm3', *(f'm2/{part}' for part in MADE))
  kills = [Fault(kill, 1, in_upload(name)) for name in (
      'm2/model/steps/5/params', 'm2/stopping/5/m2/answers/done.json', 'm2/stopping/wins.jsonl',
      'm2/model/selected.json')]
  with requests.failing(*kills):
    assert until_done('stopping', '--config=iter2:tiny', f'--workdir={path}', *config_flags('m2'),
                      *FLAGS) == 4
  lines, files, steps, params, done = found(whole)
  assert (path / 'm2' / 'stopping' / 'wins.jsonl').read_bytes() == files['wins.jsonl']
  folder = path / 'm2' / 'model'
  assert (model_files.steps(folder), model_files.recorded_hash(folder)) == (steps, params)
  assert not list(path.glob('m2/stopping/*/m2/model/steps/*'))  # the copies


@pytest.mark.slow
def test_two_hosts_share_the_decisions(sandbox):
  workdir = sandbox()
  command = [ROOT / 'launch' / 'local.sh', '2', sys.executable, '-m', 'srlm_jax.stopping',
             '--config=iter2:tiny', f'--workdir={workdir}', *config_flags('m2'), *FLAGS]
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True,
                 env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='', SRLM_RESTARTS='0'))
  check_comparisons(workdir)
  folder = workdir / 'm2' / 'model'
  assert model_files.steps(folder) == [stopping.best(compared(workdir))]
  assert len(list(workdir.glob('m2/stopping/5/m2/answers/responses-*.jsonl'))) == 2


@pytest.mark.slow
def test_the_loop_stops_early_where_it_is_asked_to(sandbox):
  """The report and the table then show what the selected checkpoints answer."""
  workdir = sandbox()
  printed = main('loop', '--size=tiny', f'--workdir={workdir}', '--last=m3',
                 *(f'--set={c}' for c in CHANGES), '--set=m2,m3:train.select=wins',
                 '--set=m2,m3:train.save_every=5')
  for model in ('m2', 'm3'):
    check_comparisons(workdir, model)
    step = stopping.best(compared(workdir, model))
    assert model_files.steps(workdir / model / 'model') == [step]
    assert f'{model}/stopping: step ' in printed
  m3 = json.loads((workdir / 'm3' / 'model' / 'manifest.json').read_text())
  assert m3['params'] == model_files.recorded_hash(workdir / 'm2' / 'model')
