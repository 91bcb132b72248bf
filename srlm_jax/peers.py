"""The other hosts of a run: how this process ends if one of them is lost or ends with an error.

Each host sends heartbeats to JAX's coordination service, which is a part of host 0. A thread of XLA
sends them, so a host may compile, or be busy in Python, for any length of time. If a host has sent
none for `TIMEOUT` seconds, or if the service itself is gone, JAX aborts all processes with a stack
trace. Here each of them prints one sentence, and exits with the code that launchers take as a
request to start the command again.
"""
import atexit
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time

import jax
from jax._src import distributed  # jax.process_index() may wait for another thread
from jax._src.lib import utils

from srlm_jax import hosts, lock, preemption

TIMEOUT = 45  # seconds without a heartbeat after which a host is lost
BEAT = 5      # seconds between two notes of a host in the store, which say who was lost
FAREWELL = 5  # seconds that host 0 and its store wait for the others to read why the run ends
NO_HOST = 'none'  # failed: all have come to the end
FOREVER = 10**11  # milliseconds: three years
# How the message of an error begins that may come from the end of another host: a status of XLA.
STATUS = re.compile('(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE|'
                    'FAILED_PRECONDITION|DATA_LOSS): ')


@contextlib.contextmanager
def joined():
  """Connects this process to the other hosts; inside the block it ends if one of them does.

  At the end of the block it waits for the others.
  """
  watch = _Watch()
  if os.environ.get('SRLM_HOSTS'):
    watch.join()
  try:
    yield
    watch.leave(0)
  except preemption.Stopped:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to save
    watch.leave(preemption.EXIT_CODE)
    raise
  except BaseException as error:
    watch.fail(error)
    raise


class _Watch:
  """What this process knows of the others."""

  def __init__(self):
    self._is_over = threading.Event()  # the end of another host has no effect now
    self._code = 1                     # with which this process then exits
    self._exits = threading.Lock()
    self._notes = {}     # {host: (its last note, when it changed)}
    self._looked = 0.0   # when the notes were read

  def join(self):
    """Connects this process to the others of the run; exits if some do not connect."""
    _call_in_place_of_abort(self._lost)
    utils.absl_set_min_log_level(3)  # XLA logs the end of a host as an error, in several lines
    has_joined = False
    try:
      hosts.join(TIMEOUT, self._lost)
      has_joined = True
      self._note(0)
      hosts.store().wait_at_barrier('srlm/noted', hosts.JOIN * 1000)
      self._look()
    except RuntimeError as error:
      if has_joined:
        self._await_reason(error)
      if 'bad_cast' not in str(error):  # what is left of a status, see `_call_in_place_of_abort`
        self._exit(f'this process cannot join the others ({error}); see SRLM_HOSTS, SRLM_HOST and '
                   f'SRLM_COORDINATOR in launch/local.sh', 1)
      self._exit(f'the hosts of this run did not all connect within {hosts.JOIN} s; start the '
                 f'command on all of them', preemption.EXIT_CODE)
    if _count() > 1:
      self._threads = [threading.Thread(target=target, daemon=True)
                       for target in (self._keep_notes, self._heed_failure)]
      for thread in self._threads:
        thread.start()

  def leave(self, code: int):
    """Waits until all hosts have come to the end of their work; `code` is what this one exits with.
    """
    if _count() == 1:
      return
    try:
      hosts.store().wait_at_barrier('srlm/end', FOREVER)
      if _index() == 0:
        hosts.store().key_value_set('srlm/failed', NO_HOST)
    except jax.errors.JaxRuntimeError as error:
      self._await_reason(error)
      raise
    self._code = code
    self._is_over.set()
    for thread in self._threads:  # they use the store, which JAX closes at the exit
      thread.join()

  def fail(self, error: BaseException):
    """Tells the others that this host ends with an error, unless theirs is the reason of it.

    The process then exits without waiting for them.
    """
    if _count() > 1:
      self._await_reason(error)
      self._is_over.set()
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host failed before
        hosts.store().key_value_set('srlm/failed', str(_index()))
      atexit.register(self._depart, 1)

  def _await_reason(self, error: BaseException):
    """Waits while an error of the interconnect may turn out to be the loss of a host."""
    while error and not STATUS.match(str(error)):
      error = error.__cause__ or error.__context__
    if error:
      time.sleep(1.5 * TIMEOUT + BEAT)  # `_lost` or `_heed_failure` exits in the meantime

  def _keep_notes(self):
    for number in itertools.count(1):
      if self._is_over.wait(BEAT):
        return
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # XLA calls `_lost`
        self._note(number)
        self._look()

  def _note(self, number: int):
    """Changes the note of this host."""
    hosts.store().key_value_set(f'srlm/notes/{_index()}', f'{number} {socket.gethostname()}',
                                allow_overwrite=True)

  def _look(self):
    """Reads the notes of all hosts."""
    found = hosts.store().key_value_dir_get('srlm/notes/')
    self._looked = time.monotonic()
    for key, note in found:
      host = int(key.rpartition('/')[2])
      if self._notes.get(host, ('',))[0] != note:
        self._notes[host] = note, self._looked

  def _heed_failure(self):
    """Exits when another host has ended with an error."""
    try:
      failed = hosts.store().blocking_key_value_get('srlm/failed', FOREVER)
    except jax.errors.JaxRuntimeError:  # XLA calls `_lost`
      return
    if failed == NO_HOST:
      return
    host = int(failed)
    if not self._is_over.wait(1):  # this host may have the same error, and prints that
      self._exit(f'{self._name(host)} ended with an error; its output says which', 1)

  def _lost(self, *_):
    """Exits; XLA calls it when a host has sent no heartbeat, or when it cannot reach host 0."""
    if self._is_over.is_set():
      self._flush_and_exit(self._code)
    # The notes of a lost host are the oldest; without host 0, whose store has them, none is old.
    silent = {host: changed for host, (_, changed) in self._notes.items()
              if self._looked - changed > 2 * BEAT}
    others = [host for host in range(_count()) if host != _index()]
    if silent:
      who = self._name(min(silent, key=silent.get))
    elif len(others) == 1 or self._notes and _index():
      who = self._name(others[0])
    else:
      who = 'a host'  # which had not written its first note
    self._exit(f'{who} was lost; the same command continues from what is saved',
               preemption.EXIT_CODE)

  def _name(self, host: int) -> str:
    if host not in self._notes:  # it was lost before it had written its note
      return f'host {host} of {_count()}'
    return f'host {host} of {_count()} ({self._notes[host][0].partition(" ")[2]})'

  def _exit(self, text: str, code: int):
    with self._exits:  # of the first thread
      os.write(2, f'error: {text}\n'.encode())  # another thread may be inside of sys.stderr
      if code == preemption.EXIT_CODE:  # XLA holds a lock of the store
        self._flush_and_exit(code)
      self._depart(code)

  def _depart(self, code: int):
    """Exits without JAX's barrier of all hosts."""
    # In a thread, because XLA may hold a lock of the store until this process has ended.
    farewell = threading.Thread(target=self._say_farewell, daemon=True)
    try:
      farewell.start()
      farewell.join(2 * FAREWELL)
    except RuntimeError:  # from Python 3.12, no thread starts while the interpreter ends
      self._say_farewell()
    self._flush_and_exit(code)

  def _say_farewell(self):
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      hosts.store().key_value_set(f'srlm/departed/{_index()}', '')
      deadline = time.monotonic() + FAREWELL
      while (_index() == 0 and time.monotonic() < deadline and
             len(hosts.store().key_value_dir_get('srlm/departed/')) < _count()):
        time.sleep(0.1)

  def _flush_and_exit(self, code: int):
    lock.release()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _call_in_place_of_abort(lost):
  """Calls `lost` where XLA's thread could not.

  XLA would call a Python function with a status, which JAX 0.10 cannot convert. The exception
  std::bad_cast then ends the process, in the terminate handler of C++.
  """
  if sys.platform != 'linux':
    return  # elsewhere JAX aborts the process, with its own message
  cpp = ctypes.CDLL('libstdc++.so.6')
  cpp.__cxa_current_exception_type.restype = ctypes.c_void_p
  cpp._ZSt13set_terminatePFvvE.restype = ctypes.CFUNCTYPE(None)
  bad_cast = ctypes.addressof(ctypes.c_char.in_dll(cpp, '_ZTISt8bad_cast'))

  @ctypes.CFUNCTYPE(None)
  def terminate():
    if cpp.__cxa_current_exception_type() == bad_cast:
      lost()
    before()
  _kept.append(terminate)
  before = cpp._ZSt13set_terminatePFvvE(terminate)


_kept = []  # C++ calls them later


def _index() -> int:
  return distributed.global_state.process_id


def _count() -> int:
  return distributed.global_state.num_processes
