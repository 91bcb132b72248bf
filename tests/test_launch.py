"""The launch scripts, and training in several processes."""
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

from conftest import make_mesh, ROOT
import jax
import numpy as np
import pytest
import yaml

from srlm_jax import config as configs, model_files, preemption, records, schema, storage
from srlm_jax.checkpoint import store
from srlm_jax.models import config as model_config, llama

LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
LOCAL = LAUNCH / 'local.sh'


def launch(hosts, *command, devices=1, **env):
  """Runs a command with launch/local.sh, with fake devices in every process."""
  fake = dict(JAX_PLATFORMS='cpu', XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}')
  return subprocess.run([LOCAL, str(hosts), *command], cwd=ROOT, env=os.environ | fake | env,
                        capture_output=True, text=True, timeout=240)


def bash(script, **env):
  """Runs a bash script in two processes."""
  return launch(2, 'bash', '-c', script, **env)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_state_their_usage(script):
  subprocess.run(['bash', '-n', script], check=True)
  lines = script.read_text().splitlines()
  assert lines[0] == '#!/usr/bin/env bash' and os.access(script, os.X_OK)
  assert any(re.match(r'set -.*u.*o pipefail', line) for line in lines)
  assert any(line.startswith('# ') and script.name in line for line in lines[:25]), 'no usage'
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', script], check=True)


def test_scripts_without_arguments_print_their_usage():
  for script in SCRIPTS:
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('usage: '), script


def test_modules_configs_and_flags_in_launchers_exist():
  texts = {path.name: path.read_text() for path in LAUNCH.iterdir()}
  assert set(texts) == {'local.sh', 'tpu.sh', 'slurm.sh', 'gke_jobset.yaml'}
  for name, text in texts.items():
    modules = re.findall(r'-m[\s-]+(srlm_jax[\w.]*)', text)
    assert modules, name
    assert all(importlib.util.find_spec(module) for module in modules)
    found = re.findall(r'--config=(\w+):(\w+)', text)
    assert len(found) == text.count('--config=') > 0
    for config, size in found:
      assert config in configs.FILES and size in configs.SIZES
    for line in re.findall(r'python -m srlm_jax.*', text):
      assert set(re.findall(r'--(\w+)', line)) <= {'config', 'workdir'}, line  # flags of cli.main


@pytest.mark.parametrize('name, words', [
    ('tpu.sh', ['TPU', 'ZONE', 'SHARED']), ('slurm.sh', ['PARTITION', 'SHARED']),
    ('gke_jobset.yaml', ['IMAGE', 'CLAIM'])])
def test_placeholders_are_used_and_explained(name, words):
  text = (LAUNCH / name).read_text()
  for word in words:
    assert len(re.findall(rf'\b{word}\b', text)) >= 2, word
    assert re.search(rf'^#.*\b{word}: ', text, re.M), word


def test_jobset_has_one_pod_per_host_of_the_slice():
  job = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  assert (job['apiVersion'], job['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  spec = job['spec']['replicatedJobs'][0]['template']['spec']
  pod = spec['template']['spec']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = np.prod([int(n) for n in topology.split('x')])
  container = pod['containers'][0]
  hosts = chips / container['resources']['limits']['google.com/tpu']
  assert spec['parallelism'] == spec['completions'] == hosts
  assert spec['backoffLimit'] == 0  # JobSet restarts all pods together
  assert {e['name']: e['value'] for e in container['env']} == dict(SRLM_HOSTS='auto')
  assert container['command'][:3] == ['python', '-m', 'srlm_jax.train']
  assert [flag.partition('=')[0] for flag in container['command'][3:]] == ['--config', '--workdir']


def test_tpu_command_reaches_the_hosts_unchanged(tmp_path):
  """A fake gcloud runs --command locally, as each host would."""
  fake = tmp_path / 'bin' / 'gcloud'
  fake.parent.mkdir()
  fake.write_text('#!/usr/bin/env bash\necho "${@:1:$# - 1}"\nlast=${@: -1}\n'
                  'cd "$HOME" && bash -c "${last#--command=}"\n')
  fake.chmod(0o755)
  (tmp_path / 'srlm_jax').mkdir()
  env = os.environ | dict(PATH=f'{fake.parent}:{os.environ["PATH"]}', HOME=str(tmp_path))
  words = ['a b', "it's", '$HOME', '--set=m2,m3:x=1']
  done = subprocess.run([LAUNCH / 'tpu.sh', 'my-tpu', 'us-east5-a', 'printenv', 'SRLM_HOSTS'],
                        env=env, check=True, capture_output=True, text=True)
  assert done.stdout.splitlines() == [
      'compute tpus tpu-vm ssh my-tpu --zone=us-east5-a --worker=all', 'auto']
  done = subprocess.run([LAUNCH / 'tpu.sh', 'my-tpu', 'z', 'printf', '%s\\n', *words], env=env,
                        check=True, capture_output=True, text=True)
  assert done.stdout.splitlines()[1:] == words


def test_slurm_process_uses_all_gpus_of_its_node(tmp_path):
  fake = tmp_path / 'srun'
  fake.write_text('#!/usr/bin/env bash\nshift 2\n'
                  'echo "$SRLM_HOSTS $JAX_LOCAL_DEVICE_IDS $PWD"\nexec "$@"\n')
  fake.chmod(0o755)
  env = os.environ | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(tmp_path),
                          SLURM_GPUS_ON_NODE='4')
  done = subprocess.run([LAUNCH / 'slurm.sh', 'echo', 'a b'], env=env, check=True,
                        capture_output=True, text=True)
  assert done.stdout.splitlines() == [f'auto 0,1,2,3 {tmp_path}', 'a b']


def test_slurm_queues_a_job_again_that_was_asked_to_stop(tmp_path):
  for name, text in (('srun', 'shift 2; exec "$@"'), ('scontrol', 'echo scontrol "$@"')):
    (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
    (tmp_path / name).chmod(0o755)
  env = os.environ | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(tmp_path),
                          SLURM_GPUS_ON_NODE='4', SLURM_JOB_ID='12')
  for code, printed in ((preemption.EXIT_CODE, 'scontrol requeue 12\n'), (1, ''), (0, '')):
    done = subprocess.run([LAUNCH / 'slurm.sh', 'bash', '-c', f'exit {code}'], env=env,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, printed)


def test_local_gives_every_process_its_index_and_gpus():
  done = bash('echo "$SRLM_HOST of $SRLM_HOSTS at $SRLM_COORDINATOR, GPUs $CUDA_VISIBLE_DEVICES"',
              CUDA_VISIBLE_DEVICES='4,5,6,7', SRLM_PORT='1234')
  assert done.returncode == 0
  assert sorted(done.stdout.splitlines()) == [
      '0 of 2 at 127.0.0.1:1234, GPUs 4,5', '1 of 2 at 127.0.0.1:1234, GPUs 6,7']
  assert bash('true', CUDA_VISIBLE_DEVICES='0,1,2').returncode == 2


@pytest.mark.parametrize('trap', ['', 'trap "" TERM; '], ids=['default', 'ignores SIGTERM'])
def test_local_stops_all_processes_if_one_fails(trap):
  started = time.monotonic()
  done = bash(f'echo $$; {trap}((SRLM_HOST == 0)) && exit 7; while :; do sleep 0.2; done')
  assert done.returncode == 7 and time.monotonic() - started < 20
  assert 'process 0 of 2 exited with code 7' in done.stderr
  for pid in done.stdout.split():
    with pytest.raises(ProcessLookupError):
      os.kill(int(pid), 0)


def test_processes_of_local_connect_and_exchange_values():
  program = ('import jax; from srlm_jax import hosts; hosts.join(); '
             'hosts.log(f"{jax.process_count()} {jax.local_device_count()} {jax.device_count()}"); '
             'found = hosts.gather(["é" * jax.process_index(), jax.process_index()]); '
             'hosts.log(found)')
  done = launch(2, sys.executable, '-c', program, devices=3)
  assert done.returncode == 0, done.stderr
  assert {'2 3 6', "[['', 0], ['é', 1]]"} <= set(done.stdout.splitlines())


APART = """
import os, sys
from srlm_jax import cli, lock
lock.UNSEEN = {seconds}
def start(argv):
  with cli.locked(os.path.join(sys.argv[1], os.environ['SRLM_HOST'] if {apart} else 'run')):
    print('locked')
cli.run_app(start)
"""


@pytest.mark.parametrize('apart', [True, False])
def test_hosts_must_see_the_same_workdir(tmp_path, apart):
  done = launch(2, sys.executable, '-c', APART.format(seconds=1, apart=apart), str(tmp_path))
  assert (done.returncode, done.stdout.count('locked')) == ((1, 0) if apart else (0, 2)), done
  if apart:
    assert re.search(r'error: --workdir=.*: host 1 does not see what the first host wrote there; '
                     r'give a folder on a disk that all hosts share, or in a bucket', done.stderr)
    assert 'Traceback' not in done.stderr


INDEPENDENT = """
import os, signal, time
import jax
from srlm_jax import cli, preemption
def start(argv):
  with preemption.together('m2/respond'):
    if jax.process_index() == {sender}:
      os.kill(os.getpid(), signal.SIGTERM)
    while jax.process_index() == 1:  # the other one has ended its share
      preemption.stop_if_requested('m2/respond')
      time.sleep(0.1)
cli.run_app(start)
"""


@pytest.mark.parametrize('sender', [0, 1])
def test_all_processes_stop_if_one_of_them_is_asked_to(sender):
  done = launch(2, sys.executable, '-c', INDEPENDENT.format(sender=sender))
  assert done.returncode == preemption.EXIT_CODE, done.stderr
  assert done.stderr.count('m2/respond: stopped by SIGTERM') == 2


def test_local_waits_for_processes_that_save_when_they_are_asked_to_stop():
  text = 'echo ready; trap "sleep 3; echo saved; exit 75" TERM; while :; do sleep 0.1; done'
  process = subprocess.Popen([LAUNCH / 'local.sh', '2', 'bash', '-c', text], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert [process.stdout.readline() for _ in range(2)] == ['ready\n'] * 2
  time.sleep(0.5)  # until both have set the trap
  process.terminate()
  assert process.communicate()[0] == 'saved\n' * 2
  assert process.returncode == preemption.EXIT_CODE


def test_sigterm_ends_a_process_that_has_nothing_to_save():
  program = ('import os, time; from srlm_jax import hosts; hosts.join(); '
             'os.kill(os.getpid(), 15); time.sleep(60)')
  started = time.monotonic()
  assert launch(2, sys.executable, '-c', program).returncode == 143
  assert time.monotonic() - started < 40


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, tokenizer_folder):
  """A workdir with a random M0 and IFT data, from which the SFT baseline is trained."""
  workdir = tmp_path_factory.mktemp('run')
  shape = model_config.PRESETS['tiny-test']
  store.write_model_files(shape, tokenizer_folder, workdir / 'm0' / 'model')
  saver = store.manager(workdir / 'm0' / 'model', 1)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = jax.jit(llama.init_params, static_argnums=0)(shape, jax.random.key(0))
    store.save(saver, 0, params)
  saver.wait_until_finished()
  saver.close()
  fruits = itertools.permutations(['pear', 'fig', 'plum'])
  records.write(workdir / 'data' / 'seeds' / 'ift.jsonl', [
      schema.Demonstration(id=str(i), prompt='Name a fruit.', response=' '.join(f))
      for i, f in enumerate(fruits)])
  return workdir


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_as_on_a_disk(workdir, bucket):
  path, server = bucket
  disk = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-disk')
  for file in workdir.rglob('*'):
    if file.is_file():
      (path / file.relative_to(workdir)).write_bytes(file.read_bytes())
  for folder in ('', 'params', 'hash'):
    storage.commit(path / 'm0' / 'model' / 'steps' / '0' / folder)
  for place in (disk, path):
    done = launch(2, sys.executable, '-m', 'srlm_jax.train', '--config=sft:tiny',
                  f'--workdir={place}', '--config.model=tiny-test', '--config.mesh.fsdp=-1',
                  '--config.train.batch=4', '--config.train.max_length=96', devices=2, **server.env)
    assert done.returncode == 0, done.stderr[-3000:]
  found = [model_files.recorded_hash(place / 'sft' / 'model') for place in (disk, path)]
  assert found[0] == found[1]
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    store.restore_params(path / 'sft' / 'model', mesh, 'float32')  # which checks the hash


@pytest.mark.slow
def test_two_processes_train_as_one(workdir):
  """Two processes with two devices each give the losses and parameters of one with four."""
  losses, params = {}, {}
  for hosts in (1, 2):
    copy = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-{hosts}')
    done = launch(hosts, sys.executable, '-m', 'srlm_jax.train', '--config=sft:tiny',
                  f'--workdir={copy}', '--config.model=tiny-test', '--config.mesh.fsdp=-1',
                  '--config.train.batch=4', '--config.train.epochs=2',
                  '--config.train.max_length=96', '--config.train.learning_rate=1e-2',
                  '--config.train.log_every=1', devices=4 // hosts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('sft/model: done') == 1  # only the first host prints
    lines = (copy / 'sft' / 'model' / 'metrics.jsonl').read_text().splitlines()
    losses[hosts] = [json.loads(line)['loss'] for line in lines]
    mesh = make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
      params[hosts] = store.restore_params(copy / 'sft' / 'model', mesh, 'float32')[0]
      before = store.restore_params(copy / 'm0' / 'model', mesh, 'float32')[0]
  assert len(losses[1]) == 3
  np.testing.assert_allclose(losses[2], losses[1], atol=1e-5)
  change = 0.0
  for one, two, start in zip(*map(jax.tree.leaves, (params[1], params[2], before)), strict=True):
    np.testing.assert_allclose(two, one, atol=1e-5)
    change = max(change, float(abs(one - start).max()))
  assert change > 1e-3


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_continue(workdir):
  """SIGTERM reaches one of two processes."""
  def command(folder):
    return [LOCAL, '2', sys.executable, '-m', 'srlm_jax.train', '--config=sft:tiny',
            f'--workdir={folder}', '--config.model=tiny-test', '--config.mesh.fsdp=-1',
            '--config.train.batch=4', '--config.train.epochs=200', '--config.train.max_length=96',
            '--config.train.log_every=1', '--config.train.save_every=1000']
  env = os.environ | dict(JAX_PLATFORMS='cpu',
                          XLA_FLAGS='--xla_force_host_platform_device_count=2')
  whole, stopped = (shutil.copytree(workdir, workdir.parent / f'{workdir.name}-{name}')
                    for name in ('whole', 'stopped'))
  subprocess.run(command(whole), cwd=ROOT, env=env, check=True, capture_output=True)
  process = subprocess.Popen(command(stopped), cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  lines = stopped / 'sft' / 'model' / 'metrics.jsonl'
  while not lines.exists() or len(lines.read_text().splitlines()) < 5:
    time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
  found = subprocess.run(['pgrep', '-P', str(process.pid), '-f', 'srlm_jax'], check=True,
                         capture_output=True, text=True)
  os.kill(int(found.stdout.split()[-1]), 15)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == preemption.EXIT_CODE, errors
  reached = set(re.findall(r'stopped by SIGTERM; step (\d+) of', errors))
  assert len(reached) == 1 and errors.count('stopped by SIGTERM') == 2
  assert model_files.steps(stopped / 'sft' / 'model') == [int(*reached)]
  subprocess.run(command(stopped), cwd=ROOT, env=env, check=True, capture_output=True)
  ends = [model_files.recorded_hash(folder / 'sft' / 'model') for folder in (whole, stopped)]
  assert ends[0] == ends[1]
