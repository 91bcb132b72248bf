"""The processes of a run, one per host."""
from collections.abc import Callable
import dataclasses
import functools
import json
import os

import jax
from jax._src import distributed  # the key-value store of the hosts has no public interface
from jax._src.lib import _jax  # jax.distributed has no argument for a callback
from jax.experimental import multihost_utils
import numpy as np

JOIN = 300  # seconds in which all hosts must connect


def join(timeout: int, lost: Callable):
  """Connects this process to the others of the run, as the launcher set SRLM_HOSTS; see launch/.

  `lost` is called, in a thread of XLA, when a host has sent no heartbeat for `timeout` seconds, or
  when host 0 cannot be reached. Raises RuntimeError if some host does not connect.
  """
  # JAX's preemption service would make programs ignore SIGTERM; see preemption.py.
  jax.config.update('jax_enable_preemption_service', False)
  make_client = _jax.get_distributed_runtime_client
  _jax.get_distributed_runtime_client = functools.partial(make_client,
                                                          missed_heartbeat_callback=lost)
  options = dict(initialization_timeout=JOIN, heartbeat_timeout_seconds=timeout)
  try:
    if os.environ['SRLM_HOSTS'] == 'auto':  # JAX detects Cloud TPU, GKE and Slurm
      jax.distributed.initialize(**options)
    else:
      jax.distributed.initialize(os.environ['SRLM_COORDINATOR'], int(os.environ['SRLM_HOSTS']),
                                 int(os.environ['SRLM_HOST']), **options)
  finally:
    _jax.get_distributed_runtime_client = make_client


def store():
  """The key-value store that the hosts of a run share."""
  return distributed.global_state.client


def is_first_host() -> bool:
  return jax.process_index() == 0


def sync(name: str):
  """Waits until all hosts reach the barrier `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(value) -> list:
  """A JSON value of every host, in the order of the hosts; all hosts must call it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[:len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Group:
  """`size` consecutive hosts that run one sampler; the groups of a run have the same size."""
  size: int

  @property
  def count(self) -> int:
    """The number of groups."""
    return jax.process_count() // self.size

  @property
  def index(self) -> int:
    """The number of the group that this host belongs to."""
    return jax.process_index() // self.size

  @property
  def is_first_host(self) -> bool:
    """Whether this host is the first of its group: the one that writes."""
    return jax.process_index() % self.size == 0

  @property
  def devices(self) -> list:
    """The devices of the hosts of this group."""
    return [d for d in jax.devices() if d.process_index // self.size == self.index]

  def share(self, total: int) -> tuple[int, int, int]:
    """(start, stop, step) of this group's share of `total` items, for range, slice or islice."""
    return self.index, total, self.count

  def gather(self, value) -> list:
    """`value` of the first host of every group, in their order; all hosts must call it."""
    return gather(value)[::self.size]


def log(text: str):
  """Prints `text` on the first host only."""
  if is_first_host():
    print(text, flush=True)


@functools.cache
def memory() -> int:
  """Bytes of memory on all devices of the run; on CPU, the RAM of all its hosts.

  All hosts must make the first call. They get the same number, that of the smallest host.
  """
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    here, count = stats['bytes_limit'], jax.device_count()
  else:
    here = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    count = jax.process_count()
  if jax.process_count() > 1:
    mib = multihost_utils.process_allgather(np.int32(here // 2**20))  # bytes exceed an int32
    here = int(mib.min()) * 2**20
  return here * count
