"""Options of the XLA compiler for the training step and for prefills, by platform.

They change the schedule and the rounding of a program, not what it computes.
"""
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from srlm_jax import hosts

# docs/scale.md has the estimated times with and without them. They do not change a decode.
OPTIONS = {'tpu': {
    # Whole matrix products. A windowed product is a loop of smaller ones, which are slower and
    # carry their partial sums in bfloat16.
    'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000,
    # Collectives that run beside the matrix products.
    'xla_enable_async_all_gather': True,
    'xla_tpu_enable_async_collective_fusion': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
    'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
    'xla_tpu_overlap_compute_collective_tc': True,
    # Layouts in which the result of a tensor-parallel product is reduce-scattered over the sequence
    # instead of all-reduced and then cut.
    'xla_tpu_assign_all_reduce_scatter_layout': True,
    'xla_tpu_relayout_group_size_threshold_for_reduce_scatter': 1,
    'xla_tpu_use_minor_sharding_for_major_trivial_input': True,
}}


def options(mesh) -> dict | None:
  """-> the options for the devices of a mesh, None on other platforms.

  Options differ between versions of libtpu. One that the installed version does not know is left
  out, and a line says so: the program computes the same without it, in more time.
  """
  return _known(mesh, tuple(OPTIONS.get(_platform(mesh), {}).items())) or None


@functools.cache
def _known(mesh, options: tuple[tuple[str, object], ...]) -> dict:
  """-> the options that the compiler of a mesh knows; tries them on a program of one addition.

  An option with a value that the compiler refuses raises the compiler's error.
  """
  found = dict(options)
  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = jax.jit(lambda x: x + 1).lower(x)
  while found:
    try:
      lowered.compile(compiler_options=found)
      break
    except jax.errors.JaxRuntimeError as error:
      unknown = re.search(r"No such compile option: '(\w+)'", str(error))
      if not unknown or unknown[1] not in found:
        raise
      del found[unknown[1]]
      hosts.log(f'this version of the compiler for {_platform(mesh)} does not know '
                f'{unknown[1]}; programs are compiled without this option, and may be slower and '
                'need more memory')
  return found


def _platform(mesh) -> str:
  return mesh.devices.flat[0].platform
