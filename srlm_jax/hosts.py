"""The processes of one run, one per host."""
import os

import jax
from jax.experimental import multihost_utils


def join():
  """Joins the processes of one run, where the launcher set SRLM_HOSTS; see launch/."""
  if os.environ.get('SRLM_HOSTS') == 'auto':  # Cloud TPU, GKE and Slurm tell JAX themselves
    jax.distributed.initialize()
  elif os.environ.get('SRLM_HOSTS'):
    jax.distributed.initialize(os.environ['SRLM_COORDINATOR'], int(os.environ['SRLM_HOSTS']),
                               int(os.environ['SRLM_HOST']))


def is_first_host() -> bool:
  return jax.process_index() == 0


def sync(where: str):
  """Waits for the other hosts."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


def share(total: int) -> tuple[int, int, int]:
  """First, end and step of this host's share of `total` things; as arguments of range and islice."""
  return jax.process_index(), total, jax.process_count()


def say(text: str):
  """Prints once, however many hosts there are."""
  if is_first_host():
    print(text, flush=True)


def memory() -> int:
  """Bytes on all devices of the run; on CPU those of this machine, which its devices share."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] * jax.device_count()
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * jax.process_count()
