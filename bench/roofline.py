"""The roofline of a machine: memory bandwidth, compute, and the least time that sampling takes."""
from collections.abc import Sequence
import itertools
import os
import pathlib
import platform

import jax
import jax.numpy as jnp
from timing import seconds

from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines


def peaks(config: Config, quick: bool) -> tuple[float, float]:
  """-> bytes per second of a memory read, FLOP/s of a matrix product: the best of 6 runs by XLA."""
  if quick:
    elements, width = 2**20, 256
  else:
    elements, width = (2**28, 2048) if jax.default_backend() == 'cpu' else (2**30, 8192)

  def best(function, shape):
    array, compiled = jnp.ones(shape, config.dtype), jax.jit(function)
    compiled(array).block_until_ready()  # compiles
    return min(seconds(lambda: compiled(array).block_until_ready()) for _ in range(6))
  read, multiply = best(jnp.sum, (elements,)), best(lambda x: x @ x, (width, width))
  return elements * jnp.dtype(config.dtype).itemsize / read, 2 * width**3 / multiply


def bound(config: Config, requests: Sequence[engines.Request], slots: int, bandwidth: float,
          flops: float) -> float:
  """-> seconds, a lower bound for any sampler with `slots` rows.

  The sum of prefill and decode. Each is the larger of the time to read its bytes and the time of
  its operations.

  Prefill: every distinct prompt token once (the tree of rubric, prompt and candidate), without the
  output head; weights are read once. Decode: tokens / slots steps with all rows busy. A step reads
  the weights once, the keys and values of the common prefix once, and those of each row. One weight
  takes 2 operations per token. Attention takes 4 H operations per query head, layer, token and key.
  """
  c, itemsize = config, jnp.dtype(config.dtype).itemsize
  layers = c.layers * (2 * c.D * c.K * (c.G + 1) * c.H + 3 * c.D * c.F)
  weights = layers + c.D * c.V
  key_flops = 4 * c.layers * c.K * c.G * c.H
  key_bytes = 2 * c.layers * c.K * c.H * itemsize

  prompts = sorted(tuple(r.ids[:-1]) for r in requests)  # puts common prefixes next to each other
  positions = [range(len(engines.common([before, ids])), len(ids))
               for before, ids in itertools.pairwise([(), *prompts])]
  distinct = sum(map(len, positions))
  keys = sum(sum(p) + len(p) for p in positions)
  prefill = max(layers * itemsize / bandwidth, (2 * layers * distinct + key_flops * keys) / flops)

  prefix_length = len(engines.common(prompts))
  tokens = sum(sum(r.lengths) for r in requests)
  own_keys = sum(n * (len(r.ids) - prefix_length) + n * (n - 1) // 2
                 for r in requests for n in r.lengths)
  steps = tokens / slots
  read = steps * (weights * itemsize + prefix_length * key_bytes) + own_keys * key_bytes
  computed = 2 * weights * tokens + key_flops * (own_keys + prefix_length * tokens)
  return prefill + max(read / bandwidth, computed / flops)


def name() -> str:
  """-> the name of the accelerator, or of the processor and its number of cores."""
  on = jax.devices()[0]
  if on.platform != 'cpu':
    return on.device_kind
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return f'{(names or [platform.machine()])[0]}, {cores} cores'
