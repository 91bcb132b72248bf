"""SIGTERM: a program saves its work, exits with a code that means try again, and continues."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

from conftest import init, make_mesh, ROOT
import jax
import pytest
import tqdm

from srlm_jax import (
  cli,
  config as configs,
  hosts,
  metrics,
  model_files,
  preemption,
  records,
  schema,
)
from srlm_jax.checkpoint import store
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import engine as engines, shards
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import run as train

TINY = PRESETS['tiny-test']


def test_a_sentence_does_not_share_a_line_with_a_progress_bar(capsys):
  with tqdm.tqdm(total=3, delay=0):
    cli.say('m2/judge: stopped by SIGTERM')
  shown = [line.rpartition('\r')[2] for line in capsys.readouterr().err.split('\n')]
  assert 'm2/judge: stopped by SIGTERM' in shown


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def default_handler():
  """Fails instead of ending pytest if SIGTERM is not deferred."""
  def fail(*_):
    raise AssertionError('SIGTERM outside of `deferred`')
  before = signal.signal(signal.SIGTERM, fail)
  preemption._received.clear()
  yield
  preemption._received.clear()
  assert signal.getsignal(signal.SIGTERM) is fail
  signal.signal(signal.SIGTERM, before)


def train_sft(workdir, tokenizer_folder):
  """Trains a tiny SFT baseline for 8 steps, with checkpoints at 3, 6 and 8 -> its folder."""
  config = configs.get('sft', 'tiny').copy_and_resolve_references().unlock()
  config.model = 'tiny-test'
  config.train.update(batch=3, epochs=4, max_length=64, log_every=2, save_every=3, keep=2)
  if not (workdir / 'm0').exists():
    store.write_model_files(TINY, tokenizer_folder, workdir / 'm0' / 'model')
    with jax.set_mesh(make_mesh(1, 1, 1)):
      saver = store.manager(workdir / 'm0' / 'model', 1)
      store.save(saver, 0, init(TINY))
      saver.close()
    fruits = itertools.permutations(['pear', 'fig', 'plum'])
    records.write(workdir / 'data' / 'seeds' / 'ift.jsonl', [
        schema.Demonstration(id=str(i), prompt='Name a fruit.', response=' '.join(f))
        for i, f in enumerate(fruits)])
  train.run(config, workdir)
  return workdir / 'sft' / 'model'


def outcome(folder):
  """What an interrupted training must end with like any other."""
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    del line['tokens_per_second']
  return lines, model_files.steps(folder), model_files.recorded_hash(folder)


def test_training_saves_at_the_next_step_and_ends_as_without_a_stop(
    tmp_path, tokenizer_folder, monkeypatch, default_handler):
  whole = train_sft(tmp_path / 'whole', tokenizer_folder)
  write = metrics.Writer.write

  def write_and_stop(writer, step, scalars):
    write(writer, step, scalars)
    if step == 2:
      terminate()
  with monkeypatch.context() as m:
    m.setattr(metrics.Writer, 'write', write_and_stop)
    with pytest.raises(preemption.Stopped, match='stopped by SIGTERM; step 4 of 8 is saved'):
      train_sft(tmp_path / 'stopped', tokenizer_folder)
  preemption._received.clear()  # as in a new process
  stopped = tmp_path / 'stopped' / 'sft' / 'model'
  assert model_files.steps(stopped) == [3, 4] and not (stopped / 'done.json').exists()
  train_sft(tmp_path / 'stopped', tokenizer_folder)
  assert outcome(stopped) == outcome(whole)
  assert model_files.steps(whole) == [6, 8]


def test_what_a_kill_left_of_older_checkpoints_is_deleted(tmp_path, tokenizer_folder):
  """After the last save, Orbax deletes an older step. A kill may come before, or within."""
  folder = train_sft(tmp_path, tokenizer_folder)
  whole = outcome(folder)
  steps = folder / 'steps'
  shutil.copytree(steps / '6', steps / '3')
  shutil.rmtree(steps / '3' / 'params')
  (steps / '9.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
  (folder / 'done.json').unlink()
  train_sft(tmp_path, tokenizer_folder)
  assert outcome(folder) == whole and sorted(p.name for p in steps.iterdir()) == ['6', '8']


def test_sampling_stops_after_the_call_and_continues(tmp_path, mesh, default_handler):
  requests = [engines.Request(str(i), [1, 5 + i], 2) for i in range(12)]

  def run(folder, after=None):
    engine = engines.Engine(llama.Llama(TINY), init(TINY), mesh, (), 0, 'test', slots=4, size=64,
                            steps=4)

    def record(request, i, result):
      if request.id == after:
        terminate()
      return dict(id=f'{request.id}/{i}', ids=result.ids)
    out = shards.Shard(folder, 'rows', hosts.Group(1))
    with preemption.together('test'):
      shards.run(engine, requests, 24, Sampling(1.0, 1.0, 16), out, record)
      out.close()
    return out.path.read_text()
  whole = run(tmp_path / 'whole')
  with pytest.raises(preemption.Stopped, match='test: stopped by SIGTERM'):
    run(tmp_path / 'stopped', '3')
  preemption._received.clear()
  left = (tmp_path / 'stopped' / 'rows-00000-of-00001.jsonl').read_text()
  assert 8 <= len(left.splitlines()) < 24
  assert run(tmp_path / 'stopped') == whole


PROGRAM = """
import os, signal
from srlm_jax import cli, preemption
def start(argv):
  with preemption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.stop_if_requested('m2/respond', preemption.Agreement())
cli.run_app(start)
"""


def test_a_stopped_program_says_so_and_exits_with_the_code_for_try_again():
  done = subprocess.run([sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True, text=True,
                        env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=''))
  assert done.stderr.splitlines()[-1] == (
      'm2/respond: stopped by SIGTERM; finished records are saved; the same command continues')
  assert done.returncode == preemption.EXIT_CODE


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
from srlm_jax import cli
def start(argv):
  with cli.locked(sys.argv[1]):
    print(os.listdir(sys.argv[1]))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGINT)
cli.run_app(start)
"""


def test_an_interrupted_program_releases_its_lock_and_prints_one_line(tmp_path):
  (tmp_path / 'kept').write_text('')
  sys_argv = [sys.executable, '-c', INTERRUPTED.replace('sys.argv[1]', repr(str(tmp_path)))]
  done = subprocess.run(sys_argv, cwd=ROOT, capture_output=True, text=True,
                        env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=''))
  assert (done.returncode, done.stderr) == (
      preemption.INTERRUPTED, '\ninterrupted; the same command continues\n')
  assert 'lock.json' in done.stdout and [p.name for p in tmp_path.iterdir()] == ['kept']


IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
os.execv(sys.executable, [sys.executable, *'-X importtime -m srlm_jax.reward.health'.split()])
"""


def test_a_program_that_still_imports_ends_without_a_traceback():
  process = subprocess.Popen([sys.executable, '-c', IMPORTS], cwd=ROOT, text=True,
                             stderr=subprocess.PIPE, env=dict(os.environ, JAX_PLATFORMS='cpu'))
  while ' numpy' not in (line := process.stderr.readline()):  # in the middle of the imports
    assert line
  process.send_signal(signal.SIGINT)
  assert 'Traceback' not in process.communicate()[1] and process.returncode == -signal.SIGINT


class Store(dict):
  """The key-value store of two hosts."""

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self and not allow_overwrite:
      raise jax.errors.JaxRuntimeError(f'ALREADY_EXISTS: {key}')
    self[key] = value

  def key_value_dir_get(self, prefix):
    return [pair for pair in [*self.items()] if pair[0].startswith(prefix)]


def test_all_hosts_or_none_stop_if_sigterm_arrives_when_a_stage_ends(monkeypatch):
  store, thread, blocks = Store(), threading.local(), threading.local()
  monkeypatch.setattr(hosts, 'store', lambda: store)
  monkeypatch.setattr(preemption, '_blocks', iter(lambda: next(blocks.count), None))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: thread.index)

  def host(index, delay, stopped):
    thread.index, blocks.count = index, itertools.count(len(done))
    time.sleep(delay)
    try:
      with preemption.together('a stage'):
        pass
    except preemption.Stopped:
      stopped.append(index)
  done = []
  try:
    for when in (0.0, 0.01, 0.05, 0.2):  # seconds after the start; both hosts get the signal
      for delay in (0.0, 0.05, 0.1):     # by which the second host ends later
        preemption._received.clear()
        store.pop('srlm/stop/now', None)
        stopped = []
        threads = [threading.Thread(target=host, args=(i, i * delay, stopped)) for i in range(2)]
        for one in threads:
          one.start()
        time.sleep(when)
        preemption._received.set()
        for one in threads:
          one.join(timeout=10)
          assert not one.is_alive()
        assert len(stopped) in (0, 2), (when, delay)
        done.append(sorted(stopped))
  finally:
    preemption._received.clear()
  assert [0, 1] in done and [] in done
