"""What a machine allows: how fast it reads and computes, and the least time that sampling takes at those speeds."""
from collections.abc import Callable, Sequence
import itertools
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import torch

from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines


def peaks(config: Config, device: str, quick: bool) -> tuple[float, float]:
  """Bytes a second that are read from memory, and operations a second of a product of matrices: the best of XLA and
  torch."""
  many, wide = (2**20, 256) if quick else (2**28, 2048) if device == 'cpu' else (2**30, 8192)
  def best(torch_op, jax_op, shape):
    ours, theirs = jnp.ones(shape, config.dtype), torch.ones(shape, dtype=getattr(torch, config.dtype), device=device)
    op = jax.jit(jax_op)
    def torch_side():
      torch_op(theirs)
      if device != 'cpu':
        torch.cuda.synchronize()
    sides = [lambda: op(ours).block_until_ready(), torch_side]
    return min(seconds(side) for side in sides * 6)
  read = best(torch.sum, jnp.sum, (many,))
  multiply = best(lambda x: x @ x, lambda x: x @ x, (wide, wide))
  return many * jnp.dtype(config.dtype).itemsize / read, 2 * wide**3 / multiply


def floor(config: Config, requests: Sequence[engines.Request], slots: int, bandwidth: float, flops: float) -> float:
  """Seconds that no sampler of `slots` rows can beat: of prefill and of decode, whichever takes longer, to read what
  must be read or to compute what must be computed.

  Prefill: every distinct prompt token once (a tree: rubric, prompt, candidate), without the head; weights are read
  once. Decode: tokens / slots steps, all rows busy; a step reads the weights once, the keys and values of what all
  prompts begin with once, and those of each row's own. An operation is 2 for each weight and token, and 4 H for each
  query head, layer, token and key.
  """
  c, bytes_each = config, jnp.dtype(config.dtype).itemsize
  layers = c.layers * (2 * c.D * c.K * (c.G + 1) * c.H + 3 * c.D * c.F)
  weights = layers + c.D * c.V
  per_key = 4 * c.layers * c.K * c.G * c.H  # operations
  key_bytes = 2 * c.layers * c.K * c.H * bytes_each

  prompts = sorted(tuple(r.ids[:-1]) for r in requests)  # those with a common beginning side by side
  places = [range(len(engines.common([before, ids])), len(ids)) for before, ids in itertools.pairwise([(), *prompts])]
  fresh, seen = sum(map(len, places)), sum(sum(place) + len(place) for place in places)
  prefill = max(layers * bytes_each / bandwidth, (2 * layers * fresh + per_key * seen) / flops)

  shared = len(engines.common(prompts))
  tokens = sum(sum(r.lengths) for r in requests)
  own = sum(n * (len(r.ids) - shared) + n * (n - 1) // 2 for r in requests for n in r.lengths)  # keys, over all tokens
  steps = tokens / slots
  read = steps * (weights * bytes_each + shared * key_bytes) + own * key_bytes
  computed = 2 * weights * tokens + per_key * (own + shared * tokens)
  return prefill + max(read / bandwidth, computed / flops)


def seconds(side: Callable) -> float:
  start = time.perf_counter()
  side()
  return time.perf_counter() - start


def medians(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
  """Of the seconds that each side returns. A round has all of them, so that the machine's slow minutes are
  everyone's."""
  taken = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
  return {name: statistics.median(one[name] for one in taken) for name in sides}


def name(cores: int) -> str:
  """What the processor calls itself."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return f'{(names or [platform.machine()])[0]}, {cores} cores'
