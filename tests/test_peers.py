"""How the processes of a run end when one of them is lost or ends with an error."""
import re
import signal
import socket
import sys
import time

from processes import ends, lost, start
import pytest

from srlm_jax import preemption

PROGRAM = """
import os, sys, time
import jax
from srlm_jax import cli, hosts, InputError, peers
peers.TIMEOUT, peers.BEAT = 4, 0.5
def start(argv):
  hosts.gather('joined')
  print('joined', flush=True)
  if jax.process_index() == {victim}:
    time.sleep(1.5)  # the others wait already
    {end}
  {wait}
cli.run_app(start)
"""
KILL = 'os.kill(os.getpid(), 9)'


def run(victim, end, wait='hosts.gather("again")', count=2):
  return ends(start(count, sys.executable, '-c',
                    PROGRAM.format(victim=victim, end=end, wait=wait)))


def failed(victim, count=2):
  return [f'error: host {victim} of {count} ({socket.gethostname()}) ended with an error; its '
          f'output says which']


# In Python, the end of a peer is seen as a broken connection, or not at all.
WAITS = dict(collective='hosts.gather("again")', python='time.sleep(60)',
             barrier='', busy='[pow(3, 5_000_000) for _ in range(600)]')


@pytest.mark.parametrize('victim, wait', [(1, 'collective'), (0, 'python')])
def test_a_lost_host_ends_the_others_with_one_sentence_and_the_code_for_try_again(victim, wait):
  found = run(victim, KILL, WAITS[wait])
  assert found[victim] == (-signal.SIGKILL, [])
  assert found[1 - victim] == (preemption.EXIT_CODE, lost(victim))


@pytest.mark.parametrize('victim', [0, 1])
def test_an_error_of_one_host_ends_the_others_with_a_sentence_that_names_it(victim):
  found = run(victim, 'raise InputError("no such file")')
  assert found[victim] == (1, ['error: no such file'])
  assert found[1 - victim] == (1, failed(victim))


def test_hosts_with_the_same_error_print_that_error():
  assert run(None, '', 'raise InputError("no such file")') == [(1, ['error: no such file'])] * 2


@pytest.mark.slow
def test_hosts_that_end_at_different_times_or_are_busy_for_long_end_normally():
  """Longer than the time-out; the one that is busy does not release Python's lock."""
  hold = 'import ctypes; ctypes.PyDLL(None).usleep(6_000_000)'
  assert run(0, f'{hold}; time.sleep(1)', '') == [(0, [])] * 2


def test_hosts_that_do_not_all_connect_end_with_one_sentence():
  process, other = start(2, sys.executable, '-c', 'from srlm_jax import cli, hosts; '
                         'hosts.JOIN = 3; cli.run_app(lambda argv: None)')
  other.kill()
  assert ends([process, other])[0] == (preemption.EXIT_CODE, [
      'error: the hosts of this run did not all connect within 3 s; start the command on all of '
      'them'])


@pytest.mark.parametrize('victim', [0, 1])
def test_a_host_that_is_lost_right_after_it_connected_is_named(victim):
  found = ends(start(2, sys.executable, '-c', f"""
import os
from srlm_jax import cli, hosts, peers
peers.TIMEOUT, peers.BEAT = 4, 0.5
def join(*args, own=hosts.join):
  own(*args)
  if os.environ['SRLM_HOST'] == '{victim}':
    {KILL}
hosts.join = join
cli.run_app(lambda argv: None)
"""))
  assert found[victim] == (-signal.SIGKILL, [])
  code, lines = found[1 - victim]
  assert code == preemption.EXIT_CODE and len(lines) == 1
  assert re.match(rf'error: host {victim} of 2 .*was lost; the same command continues', lines[0])


@pytest.mark.slow
@pytest.mark.parametrize('victim, wait', [(1, 'collective'), (3, 'busy'), (2, 'python'),
                                          (1, 'barrier'), (0, 'collective'), (0, 'barrier')])
def test_three_of_four_hosts_name_the_lost_one_within_a_minute(victim, wait):
  """With the real time-outs."""
  processes = start(4, sys.executable, '-c', PROGRAM.format(
      victim=victim, end=KILL, wait=WAITS[wait]).replace('peers.TIMEOUT, peers.BEAT', '_, _'))
  processes[victim].wait()
  killed = time.monotonic()
  found = ends(processes)
  assert time.monotonic() - killed < 60
  found.pop(victim)
  assert found == [(preemption.EXIT_CODE, lost(victim, 4))] * 3
