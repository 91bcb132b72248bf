"""The roofline of a machine: memory bandwidth, compute, and the least time that sampling takes."""
from collections.abc import Sequence
import itertools
import pathlib
import platform

import jax
import jax.numpy as jnp
from timing import seconds
import torch

from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines


def peaks(config: Config, device: str, quick: bool) -> tuple[float, float]:
  """-> bytes per second of a memory read, FLOP/s of a matrix product: the best of XLA and torch."""
  if quick:
    elements, width = 2**20, 256
  else:
    elements, width = (2**28, 2048) if device == 'cpu' else (2**30, 8192)

  def best(torch_op, jax_op, shape):
    jax_array = jnp.ones(shape, config.dtype)
    torch_array = torch.ones(shape, dtype=getattr(torch, config.dtype), device=device)
    compiled = jax.jit(jax_op)

    def by_torch():
      torch_op(torch_array)
      if device != 'cpu':
        torch.cuda.synchronize()
    sides = [lambda: compiled(jax_array).block_until_ready(), by_torch]
    return min(seconds(side) for side in sides * 6)
  read = best(torch.sum, jnp.sum, (elements,))
  multiply = best(lambda x: x @ x, lambda x: x @ x, (width, width))
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


def name(cores: int) -> str:
  """-> the name of the processor, and the number of cores."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return f'{(names or [platform.machine()])[0]}, {cores} cores'
