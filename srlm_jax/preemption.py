"""SIGTERM: how cloud machines, Kubernetes and Slurm ask a program to stop before they kill it.

A long loop runs in `deferred`, saves what it has when `requested`, and raises Stopped. The program
then exits with EXIT_CODE, and the same command continues. Elsewhere SIGTERM ends the program at
once, which loses nothing that the next run does not make again.
"""
import contextlib
import signal
import threading

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from srlm_jax import hosts

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

_received = threading.Event()


class Stopped(Exception):
  """The program was asked to stop and has saved its work; the message says what was saved."""


@contextlib.contextmanager
def deferred():
  """Inside the block, SIGTERM sets `requested` instead of ending the program.

  A request that nothing in the block has answered is answered by the next block, of a later stage.
  Only the main thread can change what a signal does; in another thread, nothing changes.
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


def stop_if_requested(title: str):
  """Raises Stopped if this process was asked to stop; all that it made must be in files."""
  if requested():
    raise _stopped(title)


def _stopped(title: str) -> Stopped:
  return Stopped(f'{title}: stopped by SIGTERM; finished records are saved')


@contextlib.contextmanager
def together(title: str):
  """A block of `deferred` in which every host works by itself, and a barrier after it.

  Raises Stopped on all hosts if one of them stopped; no host waits for one that has gone.
  """
  stopped = False
  try:
    with deferred():
      yield
  except Stopped:
    stopped = True
  if any(hosts.gather(stopped)):
    raise _stopped(title)


class Agreement:
  """Makes all hosts stop at the same step, if any of them was asked to.

  The hosts exchange one number per step. No host waits for the devices: the answer of a step is
  read in the next one.
  """

  def __init__(self):
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, 'hosts')
    self._split = NamedSharding(mesh, P('hosts'))
    self._any = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
    self._last = None

  def reached(self) -> bool:
    """Whether to stop now: the same on all hosts, which must call it equally often."""
    if jax.process_count() == 1:
      return requested()
    mine = np.full(jax.local_device_count(), requested(), np.int32)
    found = self._any(jax.make_array_from_process_local_data(self._split, mine))
    last, self._last = self._last, found
    return last is not None and bool(last.addressable_data(0))
