"""The launch scripts, and training in several processes."""
import gzip
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import make_mesh, ROOT
import jax
import jsonschema
import numpy as np
import processes
import pytest
import yaml

from srlm_jax import config as configs, model_files, preemption, records, schema, storage
from srlm_jax.checkpoint import store
from srlm_jax.models import config as model_config, llama

LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
JOBSETS = 'gke_jobset.yaml', 'gke_jobset_gpu.yaml'
LOCAL = LAUNCH / 'local.sh'


def launch(hosts, *command, devices=1, **env):
  """Runs a command with launch/local.sh, with fake devices in every process."""
  fake = dict(JAX_PLATFORMS='cpu', SRLM_RESTARTS='0',
              XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}')
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


def test_scripts_without_arguments_print_their_usage():
  for script in SCRIPTS:
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('usage: '), script


def test_the_evaluation_says_in_one_sentence_that_its_judge_did_not_start(tmp_path):
  python = tmp_path / 'python'  # all programs succeed at once, and so does the judge
  python.write_text('#!/usr/bin/env bash\n')
  python.chmod(0o755)
  done = subprocess.run([LAUNCH / 'evaluate_demo.sh', tmp_path], capture_output=True, text=True,
                        env=os.environ | dict(PYTHON=str(python)))
  assert (done.returncode, done.stderr) == (1, 'error: the judge did not start\n')


def test_modules_configs_and_flags_in_launchers_exist():
  texts = {path.name: path.read_text() for path in LAUNCH.iterdir()}
  for name, text in texts.items():
    modules = re.findall(r'-m[\s-]+(srlm_jax[\w.]*)', text)
    assert modules, name
    assert all(importlib.util.find_spec(module) for module in modules)
  del texts['evaluate_demo.sh']  # not a launcher
  assert set(texts) == {'local.sh', 'tpu.sh', 'slurm.sh', *JOBSETS}
  for text in texts.values():
    found = re.findall(r'--config=(\w+):(\w+)', text)
    assert len(found) == text.count('--config=') > 0
    for config, size in found:
      assert config in configs.FILES and size in configs.SIZES
    for line in re.findall(r'python -m srlm_jax.*', text):
      assert set(re.findall(r'--(\w+)', line)) <= {'config', 'workdir'}, line  # flags of cli.main


def test_launchers_and_verbs_in_the_documentation_exist():
  verbs = set(re.findall(r'^  (\w+)\) ', (LAUNCH / 'tpu.sh').read_text(), re.M))
  assert verbs == {'install', 'run', 'logs', 'stop', 'delete'}
  text = ''.join(path.read_text() for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')])
  assert {'launch/' + path.name for path in LAUNCH.iterdir()} == set(
      re.findall(r'launch/[\w.]+', text))
  assert verbs <= set(re.findall(r'`(\w+)[ `]', re.search(r'\| `launch/tpu.sh (.*)', text)[0]
                                 .replace('launch/tpu.sh ', '')))


@pytest.mark.parametrize('name, words', [
    ('tpu.sh', ['TPU', 'SLICES', 'PYTHON', 'SHARED']),
    ('slurm.sh', ['PARTITION', 'SHARED', 'JOB']),
    ('gke_jobset.yaml', ['IMAGE', 'CLAIM'])])
def test_placeholders_are_used_and_explained(name, words):
  text = (LAUNCH / name).read_text()
  for word in words:
    assert len(re.findall(rf'\b{word}\b', text)) >= 2, word
    assert re.search(rf'^#.*\b{word}: ', text, re.M), word


def load_jobset(name):
  return yaml.safe_load((LAUNCH / name).read_text())


def closed(schema):
  """The schema, with unknown fields refused, as `kubectl --validate=strict` does."""
  if isinstance(schema, list):
    return [closed(item) for item in schema]
  if not isinstance(schema, dict):
    return schema
  found = {key: {name: closed(item) for name, item in value.items()} if key == 'properties' else
           closed(value) for key, value in schema.items()}
  return {'additionalProperties': False, **found} if 'properties' in found else found


def test_jobsets_are_valid_by_the_schema_of_jobset():
  """The file of the schema says where it is from."""
  with gzip.open(ROOT / 'tests' / 'jobset_schema.json.gz') as file:
    validator = jsonschema.Draft202012Validator(closed(json.load(file)))

  def refused(job):
    return [error.message for error in validator.iter_errors(job)]
  for name in JOBSETS:
    job = load_jobset(name)
    assert (job['apiVersion'], job['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert not refused(job)
    pods = job['spec']['replicatedJobs'][0]['template']['spec']
    pods['paralelism'] = 1
    pods['template']['spec']['containers'][0]['env'][0]['value'] = 4
    assert sorted(refused(job)) == [
        "4 is not of type 'string'",
        "Additional properties are not allowed ('paralelism' was unexpected)"]


@pytest.mark.parametrize('name', JOBSETS)
def test_jobsets_restart_all_pods_unless_the_program_ends_with_an_error_of_its_own(name):
  job = load_jobset(name)['spec']
  pods = job['replicatedJobs'][0]['template']['spec']
  assert pods['backoffLimit'] == 0  # JobSet restarts all pods together
  assert 0 < job['failurePolicy']['maxRestarts'] <= 100
  assert job['failurePolicy']['rules'] == [
      dict(name='error', action='FailJobSet', onJobFailureReasons=['PodFailurePolicy'])]
  rule, = pods['podFailurePolicy']['rules']
  container, = pods['template']['spec']['containers']
  assert rule == dict(action='FailJob', onExitCodes=dict(
      containerName=container['name'], operator='In', values=[1]))
  assert container['command'][:3] == ['python', '-m', 'srlm_jax.train']
  assert [flag.partition('=')[0] for flag in container['command'][3:]] == ['--config', '--workdir']


def test_the_jobset_for_tpus_has_one_pod_per_host_of_the_slice():
  pods = load_jobset('gke_jobset.yaml')['spec']['replicatedJobs'][0]['template']['spec']
  pod = pods['template']['spec']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = np.prod([int(n) for n in topology.split('x')])
  container = pod['containers'][0]
  hosts = chips / container['resources']['limits']['google.com/tpu']
  assert pods['parallelism'] == pods['completions'] == hosts
  assert {e['name']: e['value'] for e in container['env']} == dict(SRLM_HOSTS='auto')


def test_the_jobset_for_gpus_numbers_its_pods_and_names_the_first():
  job = load_jobset('gke_jobset_gpu.yaml')
  group, = job['spec']['replicatedJobs']
  pods = group['template']['spec']
  env = {e['name']: e for e in pods['template']['spec']['containers'][0]['env']}
  assert pods['parallelism'] == pods['completions'] == int(env['SRLM_HOSTS']['value'])
  assert pods['completionMode'] == 'Indexed' and group['replicas'] == 1
  host, _ = env['SRLM_COORDINATOR']['value'].split(':')
  # JobSet names pods JOBSET-GROUP-REPLICA-INDEX.SUBDOMAIN.
  network = job['spec']['network']
  assert network['enableDNSHostnames']
  assert host == f'{job["metadata"]["name"]}-{group["name"]}-0-0.{network["subdomain"]}'
  assert env['SRLM_HOST']['valueFrom']['fieldRef']['fieldPath'] == (
      "metadata.annotations['batch.kubernetes.io/job-completion-index']")


# A Cloud TPU of two hosts in folder $FAKE: state of the queued resource, hosts/N as their homes.
GCLOUD = r"""
echo "$*" >>"$FAKE/calls"
last=${@: -1}
case "$*" in
  *'queued-resources create my-tpu'*)
    [[ ! -e $FAKE/state ]] || exit 1
    echo WAITING_FOR_RESOURCES >"$FAKE/state"
    mkdir -p "$FAKE"/hosts/{0,1} ;;
  *'queued-resources describe my-tpu'*)
    [[ ! -e $FAKE/broken ]] || { rm "$FAKE/broken"; echo 'cannot connect'; exit 1; }
    cat "$FAKE/state" || { echo NOT_FOUND >&2; exit 1; }
    sed -i s/WAITING_FOR_RESOURCES/ACTIVE/ "$FAKE/state" ;;
  *'queued-resources delete my-tpu'*--force*) rm -r "$FAKE/state" "$FAKE/hosts" ;;
  *'tpu-vm list'*) [[ $(<"$FAKE/state") != ACTIVE ]] || echo "${NODE:-READY}" ;;
  *'queued-resources scp'*) for host in "$FAKE"/hosts/*; do cp "$5" "$host"; done ;;
  *'queued-resources ssh my-tpu'*)
    hosts=("$FAKE"/hosts/*)
    [[ $* == *--worker=all* ]] || hosts=("$FAKE/hosts/0")
    for host in "${hosts[@]}"; do (cd "$host" && HOME=$host bash -c "${last#--command=}"); done ;;
  *) exit 2 ;;
esac
"""
# A Python whose environments need no network.
PYTHON = """
mkdir -p .venv/bin
echo 'echo pip $* >>pip.log' >.venv/bin/pip
chmod +x .venv/bin/pip
"""


@pytest.fixture
def tpu(tmp_path):
  """A function that runs launch/tpu.sh with a fake gcloud, and the folder of the fake."""
  for name, text in (('gcloud', GCLOUD), ('python', PYTHON)):
    program(tmp_path / 'bin' / name, text)
  env = os.environ | dict(
      FAKE=str(tmp_path), PATH=f'{tmp_path}/bin:{os.environ["PATH"]}', TPU='my-tpu', ZONE='z',
      TYPE='v5p-16', VERSION='v2-alpha-tpuv5', SPOT='1', PYTHON=f'{tmp_path}/bin/python',
      SRLM_POLL='0.5', SRLM_RESTARTS='2')

  def start(*arguments, **more):
    return subprocess.Popen([LAUNCH / 'tpu.sh', *arguments], env=env | more, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  return start, tmp_path


def program(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)


def finish(process, code=0):
  out, errors = process.communicate(timeout=120)
  assert process.returncode == code, out + errors
  return out, errors


def wait_for(path, text):
  deadline = time.monotonic() + 60
  while not path.exists() or text not in path.read_text():
    assert time.monotonic() < deadline, path
    time.sleep(0.1)


def calls(folder):
  """The verbs of the calls of gcloud that change something."""
  found = re.findall(r'queued-resources (\w+)', (folder / 'calls').read_text())
  return [verb for verb in found if verb not in ('describe', 'ssh')]


# Counts to 6 in a file of each host in $SHARED, and continues an earlier count.
COUNT = r"""
file=$SHARED/$(basename "$HOME")
for ((i = $(wc -l <"$file" 2>/dev/null || echo 0) + 1; i <= 6; i++)); do
  echo "$i $SRLM_HOSTS $1" >>"$file"
  sleep 0.7
done
"""


def test_tpu_installs_runs_and_continues_after_a_preemption(tpu, tmp_path):
  start, folder = tpu
  program(folder / 'count', COUNT)
  words = "a b'$HOME --set=m2,m3:x=1"
  _, errors = finish(start('install'))
  assert 'WAITING_FOR_RESOURCES' in errors and calls(folder) == ['create', 'scp']
  created = (folder / 'calls').read_text()
  assert '--node-id=my-tpu --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot' in (
      created)
  for host in '01':
    home = folder / 'hosts' / host / 'srlm_jax'
    assert (home / 'srlm_jax' / 'cli.py').exists()
    assert (home / 'pip.log').read_text() == 'pip install --quiet -e .[tpu]\n'
  running = start('run', folder / 'count', words, SHARED=str(folder))
  wait_for(folder / '1', '1 ')
  (folder / 'broken').touch()  # gcloud fails once
  wait_for(folder / '1', '3 ')
  assert not (folder / 'broken').exists()
  (folder / 'state').write_text('SUSPENDED\n')  # and its machines are gone
  for host in '01':
    os.killpg(int((folder / 'hosts' / host / 'srlm_jax' / 'run.pid').read_text()), 9)
  _, errors = finish(running)
  assert 'preempted' in errors and 'my-tpu is SUSPENDED' in errors
  assert calls(folder) == ['create', 'scp', 'delete', 'create', 'scp']
  for host in '01':
    assert (folder / host).read_text().splitlines() == [f'{i} auto {words}' for i in range(1, 7)]
  finish(start('run', folder / 'count', words, SHARED=str(folder)))  # nothing to do
  assert len((folder / '0').read_text().splitlines()) == 6
  finish(start('delete'))
  assert calls(folder)[-1] == 'delete' and not (folder / 'hosts').exists()


def test_tpu_continues_when_a_host_is_lost_and_stops_at_an_error(tpu):
  start, folder = tpu
  finish(start('install', SLICES='2', SPOT=''))
  assert '--node-count=2 --node-prefix=my-tpu' in (folder / 'calls').read_text()
  # The first time, one host saves and exits with 75; the other one is restarted by Cloud TPU.
  program(folder / 'work', r"""
      echo "$*"; echo >>"$FAKE/times-$(basename "$HOME")"
      (($(wc -l <"$FAKE/times-$(basename "$HOME")") == 1)) || exit 0
      [[ $HOME != *1 ]] || kill -9 -- -"$(<run.pid)"
      exit 75""")
  _, errors = finish(start('run', folder / 'work', 'done'))
  assert 'ended with 75 lost ; continues' in errors
  for host in '01':
    assert len((folder / f'times-{host}').read_text()) == 2
  logs = start('logs')
  assert [logs.stdout.readline() for _ in range(2)] == ['done\n'] * 2
  logs.kill()
  assert 'ended with 1 ;' in finish(start('run', 'false'), code=1)[1]
  assert 'ended with 127 ;' in finish(start('run', 'no-such-command'), code=1)[1]
  assert 'did not end after 1 restarts' in finish(
      start('run', 'bash', '-c', 'exit 75', SRLM_RESTARTS='1'), code=75)[1]


def test_tpu_run_waits_for_a_command_that_runs_already_and_stop_lets_it_save(tpu):
  start, folder = tpu
  finish(start('install'))
  work = 'echo ready >"$HOME/ready"; trap "echo saved >\\"$HOME/saved\\"; exit 75" TERM; ' \
         'while :; do sleep 0.1; done'
  first = start('run', 'bash', '-c', work)
  for host in '01':
    wait_for(folder / 'hosts' / host / 'ready', 'ready')
  first.kill()  # the machine of the user
  second = start('run', 'bash', '-c', work)
  time.sleep(2)
  assert second.poll() is None
  finish(start('stop'))
  assert 'my-tpu: stopped; the same command continues' in finish(second, code=75)[1]
  for host in '01':
    assert (folder / 'hosts' / host / 'saved').exists()


# Starts two tasks on this machine, and exits with the highest of their codes, as Slurm does.
SRUN = r"""
[[ $1 == --* && $2 == --wait=* ]] || exit 2
shift 2
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2
for i in 0 1; do SLURM_PROCID=$i "$@" & tasks[i]=$!; done
for i in 0 1; do
  wait "${tasks[i]}"; code=$?
  ((code <= ${most:=0})) || most=$code
done
exit "$most"
"""
# Queues a job again: the next job starts at once.
SCONTROL = r"""
[[ $1 == requeue && $2 == "$SLURM_JOB_ID" ]] || exit 2
echo "$*" >>"$FAKE/calls"
export SLURM_RESTART_COUNT=$((${SLURM_RESTART_COUNT:-0} + 1))
(exec "$LAUNCH/slurm.sh" $FAKE_COMMAND >"$FAKE/log-$SLURM_RESTART_COUNT" 2>&1)
"""


@pytest.fixture
def slurm(tmp_path):
  """A function that runs launch/slurm.sh with a fake Slurm, and the folder of the fake."""
  for name, text in (('srun', SRUN), ('scontrol', SCONTROL), ('squeue', 'echo "$STATE"'),
                     ('work', f'exec {sys.executable} "$@"')):
    program(tmp_path / 'bin' / name, text)
  env = os.environ | dict(
      FAKE=str(tmp_path), PATH=f'{tmp_path}/bin:{os.environ["PATH"]}', LAUNCH=str(LAUNCH),
      SLURM_SUBMIT_DIR=str(ROOT), SLURM_GPUS_ON_NODE='4', STATE='RUNNING',
      SLURM_JOB_ID=str(np.random.default_rng().integers(4096)), JAX_PLATFORMS='cpu', XLA_FLAGS='')

  def run(*command, **more):
    return subprocess.run([LAUNCH / 'slurm.sh', *map(str, command)], capture_output=True, text=True,
                          env=env | dict(FAKE_COMMAND=' '.join(map(str, command))) | more)
  return run, tmp_path


def test_slurm_process_uses_all_gpus_of_its_node(slurm):
  run, _ = slurm
  done = run('bash', '-c', 'echo "$SRLM_HOSTS $JAX_LOCAL_DEVICE_IDS $PWD"')
  assert done.stdout.splitlines() == [f'auto 0,1,2,3 {ROOT}'] * 2 and done.returncode == 0


@pytest.mark.parametrize('code, state, restarts, again', [
    (75, 'RUNNING', 0, True), (137, 'RUNNING', 0, True), (143, 'RUNNING', 19, True),
    (75, 'RUNNING', 20, False), (143, 'CANCELLED', 0, False), (1, 'RUNNING', 0, False),
    (0, 'RUNNING', 0, False), (130, 'RUNNING', 0, False)])
def test_slurm_queues_a_job_again_that_saved_or_lost_a_process(slurm, code, state, restarts, again):
  run, folder = slurm
  program(folder / 'bin' / 'scontrol', 'echo scontrol "$@"')
  done = run('bash', '-c', f'exit {code}', STATE=state, SLURM_JOB_ID='12',
             SLURM_RESTART_COUNT=str(restarts))
  assert (done.returncode, done.stdout) == (code, 'scontrol requeue 12\n' if again else '')


LOSES_A_PROCESS = """
import os, pathlib
import jax
from srlm_jax import cli, hosts, peers
peers.TIMEOUT, peers.BEAT = 4, 0.5
def start(argv):
  times = pathlib.Path(os.environ['FAKE'], 'times')
  first = hosts.gather(times.exists())[1] is False
  if jax.process_index() == 1:
    times.touch()
    if first:
      os.kill(os.getpid(), 9)
  hosts.log(f'finished on {len(hosts.gather(0))} hosts')
cli.run_app(start)
"""


def test_slurm_continues_after_a_process_was_lost(slurm):
  """JAX detects two processes of a Slurm job."""
  run, folder = slurm
  (folder / 'job.py').write_text(LOSES_A_PROCESS)
  done = run('work', folder / 'job.py', PYTHONPATH=str(ROOT))
  assert done.returncode == 137 and 'host 1 of 2' in done.stderr and 'Traceback' not in done.stderr
  assert (folder / 'calls').read_text().count('requeue') == 1
  assert 'finished on 2 hosts' in (folder / 'log-1').read_text()


def test_local_starts_all_processes_again_if_one_is_lost(tmp_path):
  (tmp_path / 'job.py').write_text(LOSES_A_PROCESS)
  done = launch(2, sys.executable, tmp_path / 'job.py', FAKE=str(tmp_path), PYTHONPATH=str(ROOT),
                SRLM_RESTARTS='1')
  assert done.returncode == 0 and 'finished on 2 hosts' in done.stdout, done.stderr
  assert 'starting all 2 processes again' in done.stderr and 'Traceback' not in done.stderr


def test_local_starts_again_at_most_a_number_of_times(tmp_path):
  work = f'echo "$SRLM_COORDINATOR" >>{tmp_path}/starts; exit 75'
  assert launch(1, 'bash', '-c', work, SRLM_RESTARTS='2').returncode == 75
  assert len(set((tmp_path / 'starts').read_text().split())) == 3  # each at another port


def test_local_does_not_start_a_program_again_that_ctrl_c_ended(tmp_path):
  done = launch(1, 'bash', '-c', f'echo x >>{tmp_path}/starts; exit 130', SRLM_RESTARTS='2')
  assert done.returncode == 130 and (tmp_path / 'starts').read_text() == 'x\n'


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
  program = ('import jax; from srlm_jax import hosts; hosts.join(60, print); '
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
      preemption.stop_if_requested('m2/respond', preemption.Agreement(jax.local_devices()))
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
  program = ('import os, time; from srlm_jax import hosts; hosts.join(60, print); '
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


def training(folder, epochs=200, save_every=1000):
  """The command that trains the SFT baseline in a workdir."""
  return [sys.executable, '-m', 'srlm_jax.train', '--config=sft:tiny', f'--workdir={folder}',
          '--config.model=tiny-test', '--config.mesh.fsdp=-1', '--config.train.batch=4',
          f'--config.train.epochs={epochs}', '--config.train.max_length=96',
          '--config.train.log_every=1', f'--config.train.save_every={save_every}']


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_continue(workdir):
  """SIGTERM reaches one of two processes."""
  def command(folder):
    return [LOCAL, '2', *training(folder)]
  env = os.environ | dict(JAX_PLATFORMS='cpu', SRLM_RESTARTS='0',
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


def lines_of(path):
  return path.read_text().splitlines() if path.exists() else []


def wait_for_lines(path, count, runs):
  """Waits until a file has `count` lines, while all processes run."""
  while len(lines_of(path)) < count:
    time.sleep(0.05)
    for run in runs:
      assert run.poll() is None, run.communicate()


def kill_and_check(runs, victim):
  """Kills a process; the others must end with one sentence and 75, within a minute."""
  before = time.monotonic()
  runs[victim].kill()
  found = processes.ends(runs)
  assert time.monotonic() - before < 60
  for i, (code, errors) in enumerate(found):
    if i != victim:
      assert (code, errors) == (preemption.EXIT_CODE, processes.lost(victim, len(runs)))


def finish_all(runs):
  for code, errors in processes.ends(runs):
    assert code == 0, errors


def few_steps(folder):
  return training(folder, epochs=60, save_every=10)


@pytest.fixture(scope='module')
def expected(workdir):
  """The hash of the checkpoint of a training on two hosts, of which none is lost."""
  folder = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-expected')
  finish_all(processes.start(2, *few_steps(folder)))
  return model_files.recorded_hash(folder / 'sft' / 'model')


@pytest.mark.slow
def test_training_continues_after_the_first_host_was_killed(workdir, expected):
  """Another one: tests/test_hosts_loop.py."""
  folder = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-lost')
  model = folder / 'sft' / 'model'
  runs = processes.start(2, *few_steps(folder))
  wait_for_lines(model / 'metrics.jsonl', 24, runs)
  kill_and_check(runs, 0)
  assert not (model / 'done.json').exists() and model_files.steps(model)
  finish_all(processes.start(2, *few_steps(folder)))
  assert model_files.recorded_hash(model) == expected


@pytest.mark.slow
def test_slurm_queues_a_training_again_of_which_a_process_was_killed(workdir, expected, slurm):
  folder = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-slurm')
  model, (run, fake) = folder / 'sft' / 'model', slurm
  program(fake / 'bin' / 'victim', f"""
      until [[ $(wc -l <{model}/metrics.jsonl) -ge 24 ]]; do sleep 0.1; done 2>/dev/null
      kill -9 "$(<$FAKE/pid)" """)
  # The second process of the first job is killed.
  program(fake / 'bin' / 'work', """
      if [[ $SLURM_PROCID == 1 && -z ${SLURM_RESTART_COUNT:-} ]]; then
        echo $$ >"$FAKE/pid"
        victim &
      fi
      exec "$@" """)
  done = run('work', *few_steps(folder), PYTHONPATH=str(ROOT))
  assert done.returncode == 137 and 'host 1 of 2' in done.stderr and 'Traceback' not in done.stderr
  assert (fake / 'calls').read_text().count('requeue') == 1
  assert model_files.recorded_hash(model) == expected, (fake / 'log-1').read_text()


def sampling(folder):
  """The command that answers the held-out prompts in a workdir, a few tokens at a time."""
  return [sys.executable, '-m', 'srlm_jax.sample.respond', '--config=sft:tiny', '--on=heldout',
          f'--workdir={folder}', '--config.model=tiny-test', '--config.sample.slots=2',
          '--config.sample.steps=1', '--config.sample.size=96', '--config.respond.max_tokens=32']


def answers(folder):
  return list(records.read_shards(folder / 'sft' / 'answers', 'responses', schema.Response))


@pytest.fixture(scope='module')
def trained(workdir):
  """A workdir with an SFT baseline and held-out prompts."""
  folder = shutil.copytree(workdir, workdir.parent / f'{workdir.name}-trained')
  done = launch(1, *training(folder, epochs=2))
  assert done.returncode == 0, done.stderr
  records.write(folder / 'data' / 'seeds' / 'heldout.jsonl', [
      schema.HeldOutPrompt(id=f'h{i}', prompt=f'Name {i} fruits.', split='test')
      for i in range(120)])
  return folder


@pytest.mark.slow
def test_sampling_continues_on_other_numbers_of_hosts_after_kills(trained):
  """Two hosts, of which one is lost; one host, which is killed; four hosts."""
  copies = {name: shutil.copytree(trained, trained.parent / f'{trained.name}-{name}')
            for name in (1, 2, 'killed')}
  for count in (1, 2):
    finish_all(processes.start(count, *sampling(copies[count])))
  whole = answers(copies[2])
  assert len(whole) == 120 and answers(copies[1]) == whole
  command, folder = sampling(copies['killed']), copies['killed'] / 'sft' / 'answers'
  runs = processes.start(2, *command)
  wait_for_lines(folder / records.shard_name('responses', 1, 2), 20, runs)
  kill_and_check(runs, 1)
  made = [line for path in folder.glob('*.jsonl') for line in path.read_bytes().splitlines(True)]
  run, = processes.start(1, *command)
  wait_for_lines(folder / records.shard_name('responses', 0, 1), 60, [run])
  assert set(lines_of(folder / 'responses.kept')) == {
      line.decode().rstrip() for line in made if line.endswith(b'\n')}
  run.kill()
  run.communicate()
  finish_all(processes.start(4, *command))
  assert answers(copies['killed']) == whole
  assert sorted(p.name for p in folder.iterdir()) == ['done.json', 'manifest.json', *(
      records.shard_name('responses', i, 4) for i in range(4)), 'tensorboard']


@pytest.mark.slow
def test_a_host_that_waits_at_the_end_of_a_stage_notices_that_another_is_lost(trained):
  """The other one is suspended in the middle of its share until the first has written its own."""
  folder = shutil.copytree(trained, trained.parent / f'{trained.name}-barrier')
  first, second = (folder / 'sft' / 'answers' / records.shard_name('responses', i, 2)
                   for i in range(2))
  runs = processes.start(2, *sampling(folder))
  wait_for_lines(second, 3, runs)
  runs[1].send_signal(signal.SIGSTOP)
  wait_for_lines(first, 60, runs)
  kill_and_check(runs, 1)
  finish_all(processes.start(2, *sampling(folder)))
  assert len(answers(folder)) == 120
