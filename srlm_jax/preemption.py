"""SIGTERM: how cloud machines, Kubernetes and Slurm ask a program to stop before they kill it.

A long loop runs in `deferred`, saves what it has when `requested`, and raises Stopped. The program
then exits with EXIT_CODE, and the same command continues. Elsewhere SIGTERM ends the program at
once, which loses nothing that the next run does not make again.
"""
import contextlib
import itertools
import os
import signal
import threading
import time

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from srlm_jax import hosts

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
KILLED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C
POLL = 0.5      # seconds between two looks into the key-value store

_received = threading.Event()
_blocks = itertools.count()  # of `together`; all hosts count the same ones
_looked = 0.0                # when `requested` last looked into the store


class Stopped(Exception):
  """The program was asked to stop and has saved its work; the message says what was saved."""


def listen():
  """Lets SIGTERM end the first process of a container, which otherwise ignores it."""
  if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(KILLED))


@contextlib.contextmanager
def deferred():
  """Inside the block, SIGTERM sets `requested` instead of ending the program.

  A request that nothing in the block has answered is answered when the next stage starts. Only the
  main thread can change what a signal does; in another thread, nothing changes.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, lambda *_: _received.set())
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def requested() -> bool:
  """Whether this process was asked to stop in a block of `deferred`."""
  return _received.is_set()


def stop_at_start(title: str):
  """Raises Stopped if any host was asked to stop since the last stage; all hosts must call it."""
  if any(hosts.gather(requested())):
    raise Stopped(f'stopped by SIGTERM before {title}')


def stop_if_requested(title: str, agreement: 'Agreement | None' = None):
  """Raises Stopped if any host was asked to stop; all that this host made must be in files.

  `agreement`: of the hosts that run the same programs, which stop at the same call; None: this
  host works by itself, in a block of `together` on several hosts.
  """
  _exchange(title)
  if agreement.reached() if agreement else requested():
    raise after_records(title)


def _exchange(title: str):
  """Tells the other hosts that this one was asked to stop, or looks whether another one was."""
  global _looked
  if jax.process_count() > 1:
    if requested():
      hosts.store().key_value_set('srlm/stop/now', title, allow_overwrite=True)
    elif time.monotonic() - _looked > POLL:
      _looked = time.monotonic()
      if hosts.store().key_value_dir_get('srlm/stop/'):
        _received.set()


def after_records(title: str) -> Stopped:
  """-> the exception of a loop that has written every record that it finished."""
  return Stopped(f'{title}: stopped by SIGTERM; finished records are saved')


@contextlib.contextmanager
def together(title: str):
  """A block of `deferred` in which every group of hosts works by itself, and a barrier after it.

  Either all hosts leave it, or all raise Stopped: the first one that sees that all have ended, or
  that it was asked to stop, decides.
  """
  block = f'srlm/block/{next(_blocks)}'
  with deferred():
    yield
    if jax.process_count() == 1:
      return
    hosts.store().key_value_set(f'{block}/ended/{jax.process_index()}', title)
    while not (decided := hosts.store().key_value_dir_get(f'{block}/decided/')):
      _exchange(title)
      ended = len(hosts.store().key_value_dir_get(f'{block}/ended/'))
      if requested() or ended == jax.process_count():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host has decided
          hosts.store().key_value_set(f'{block}/decided/stop', str(int(requested())))
      else:
        time.sleep(POLL / 10)
    if decided[0][1] == '1':
      raise after_records(title)


class Agreement:
  """Makes the hosts of some devices stop at the same step, if any of them was asked to.

  The hosts exchange one number per step. Its answer is read one step later, so a host is at most
  one step ahead of the devices.
  """

  def __init__(self, devices=None):
    """`devices`: those of a mesh; by default, all."""
    devices = np.array(jax.devices() if devices is None else devices).flatten()
    self._is_alone = len({d.process_index for d in devices}) == 1
    self._mesh = Mesh(devices, 'hosts')
    self._any = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(self._mesh, P()))
    self._last = None

  def reached(self) -> bool:
    """Whether to stop now: the same on all hosts, which must call it equally often."""
    if self._is_alone:
      return requested()
    mine = np.full(jax.local_device_count(), requested(), np.int32)
    with jax.set_mesh(self._mesh):  # its order of devices is not that of the training
      found = self._any(jax.make_array_from_process_local_data(
          NamedSharding(self._mesh, P('hosts')), mine))
    last, self._last = self._last, found
    return last is not None and bool(last.addressable_data(0))
