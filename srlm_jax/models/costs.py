"""FLOPs, bytes and seconds of the training step and of the sampler's programs, by formula.

The *floor* is the time that the chips need at their published peak for what must be computed
(FLOPs, without recomputation) or read (bytes). The *estimate* adds recomputation, padding,
collectives and the shares of the peak below. These are calibrated on the middle estimates of
docs/scale.md, which come from the TPU compiler: nothing was measured on a TPU.
"""
from collections.abc import Mapping
import dataclasses
import math

import jax.numpy as jnp

from srlm_jax.models import llama, sizing
from srlm_jax.models.config import Config
from srlm_jax.models.sizing import Mesh
from srlm_jax.pods import NETWORK, Pod

BANDWIDTH = 0.85  # share of the HBM bandwidth that a good kernel reaches
LATENCY = 2e-6    # seconds of a collective without bytes
# Share of the peak that splash attention reaches. From the instruction bundles that libtpu wrote
# for revision bb8d527 on v5p, where the backward kernels run on one of two cores.
SHARE = {'fwd': 0.64, 'dkv': 0.42, 'dq': 0.42}
PRODUCTS = {'fwd': 2, 'dkv': 4, 'dq': 3}  # matrix products per block of queries and keys
BLOCK = 512       # queries, and keys, of a block of splash attention
# Shares of the peak that the products with weights reach, with the elementwise operations between
# them: of a training step and of a prefill. Nothing calibrates v4's prefill and the GPUs.
TRAINING = {'v4': 0.70, 'v5p': 0.73, 'v6e': 0.52, 'h100': 0.5, 'h200': 0.5}
PREFILL = {'v4': 0.8, 'v5p': 0.8, 'v6e': 0.67, 'h100': 0.5, 'h200': 0.5}
LAYER = 22e-6     # seconds per layer of a sampling program, besides what it reads or multiplies
# What a training step sends per layer: SENT[0] elements per token and model width over tensor, and
# SENT[1] per weight over fsdp (docs/scale.md, mesh by batch).
SENT = {True: (11.9, 1.9), False: (7.2, 2.0)}  # with and without a reference in the step


@dataclasses.dataclass(frozen=True)
class Seconds:
  """The time of a program, or of a stage."""
  floor: float
  estimate: float

  def __add__(self, other: 'Seconds') -> 'Seconds':
    return Seconds(self.floor + other.floor, self.estimate + other.estimate)

  def __mul__(self, times: float) -> 'Seconds':
    return Seconds(self.floor * times, self.estimate * times)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """What examples, or prompts, hold on average."""
  total: float    # tokens
  seen: float     # pairs of a query and a key that it sees
  targets: float  # tokens that the head predicts


def example(prompt: float, response: float, responses: int) -> Tokens:
  """-> the tokens of an example: a prompt and one response, or two."""
  seen = prompt**2 / 2 + responses * (response * prompt + response**2 / 2)
  return Tokens(prompt + responses * response, seen, responses * response)


def forward_flops(c: Config, tokens: Tokens) -> float:
  """-> FLOPs of a forward pass.

  It multiplies every token with the weights of the layers, every target with the head, and every
  query with the keys that it sees.
  """
  products = 2 * (sizing.layer_params(c) * c.layers * tokens.total + c.D * c.V * tokens.targets)
  return products + 4 * c.K * c.G * c.H * c.layers * tokens.seen


def decode_bytes(c: Config, int8: bool, slots: float, length: float, prefix: float) -> float:
  """-> bytes that a step of decode reads: the weights, the prefix once, `length` tokens per slot.

  Keys, values and weights that are not int8 have the dtype of activations.
  """
  item = jnp.dtype(c.dtype).itemsize
  weights = (llama.param_count(c) - c.D * c.V) * (1 if int8 else item)  # one row of the embedding
  return weights + 2 * c.layers * c.K * c.H * item * (slots * length + prefix)


def training_step(c: Config, pod: Pod, mesh: Mesh, rows: int, width: int, examples: Tokens,
                  is_pair: bool, has_reference: bool, accumulate: int, remat: str,
                  moments: str, adapter: Mapping = sizing.NONE) -> Seconds:
  """-> the seconds of a step of `rows` rows of `width` tokens, which hold the `examples`.

  `adapter`: see `sizing.adapter`. Its own products, and those of attention's backward pass that
  LoRA needs as well, are small; no compiled program calibrates a step with LoRA.
  """
  chip, share = pod.chip, TRAINING[pod.kind]
  # Of a forward pass; the backward pass is two, for the gradients of activations and of weights.
  passes = 3 - bool(adapter) + has_reference
  floor = forward_flops(c, examples) * passes / (pod.chips * chip.flops)
  padded = Tokens(rows * width, 0, examples.targets)
  products = forward_flops(c, padded) * (passes + (remat == 'full'))
  forwards = 1 + has_reference + (remat != 'none')
  heads = c.K * c.G * c.H
  copies = 1 + is_pair  # of every key in the rows of pairs
  visited = copies * (width**2 + width * min(BLOCK, width)) / 2
  work = forwards * PRODUCTS['fwd'] / SHARE['fwd'] + sum(
      PRODUCTS[part] / SHARE[part] for part in ('dkv', 'dq'))
  attention = 2 * work * heads * c.layers * rows * visited
  seconds = (products / share + attention) / (pod.chips * chip.flops)
  # The optimizer reads parameters, gradients and moments, and writes all but the gradients.
  trained = sum(math.prod(x.shape) for x in adapter.values()) or llama.param_count(c)
  moved = (3 * 4 + 4 * jnp.dtype(moments).itemsize) * trained
  seconds += moved / (mesh.fsdp * mesh.tensor) / (chip.bandwidth * BANDWIDTH)
  over_tensor, over_fsdp = SENT[has_reference]
  elements = over_tensor * rows * width / pod.chips * c.D * (mesh.tensor - 1)
  elements += accumulate * over_fsdp * sizing.layer_params(c) / mesh.tensor * (
      (mesh.fsdp - 1) / mesh.fsdp)
  sent = elements * c.layers * jnp.dtype(c.dtype).itemsize
  return Seconds(floor, seconds + sent / links(pod, mesh.fsdp * mesh.tensor))


def forward(c: Config, pod: Pod, mesh: Mesh, rows: int, width: int, examples: Tokens,
            is_pair: bool) -> Seconds:
  """-> the seconds of a forward pass of a batch: a third of a step without recomputation."""
  step = training_step(c, pod, mesh, rows, width, examples, is_pair, False, 1, 'none',
                       'float32')
  return step * (1 / 3)


def decode_step(c: Config, pod: Pod, mesh: Mesh, int8: bool, slots: float,
                length: float, prefix: float) -> Seconds:
  """-> the seconds of one token for every slot of an engine."""
  copies = mesh.data * mesh.fsdp
  share = slots / copies  # of one copy of the weights
  read = decode_bytes(c, int8, share, length, prefix) / mesh.tensor
  flops = forward_flops(c, Tokens(share, share * (length + prefix), share)) / mesh.tensor
  floor = max(read / pod.chip.bandwidth, flops / pod.chip.flops)
  seconds = max(read / (pod.chip.bandwidth * BANDWIDTH),
                flops / (pod.chip.flops * PREFILL[pod.kind]))
  seconds += c.layers * (LAYER + 2 * _all_reduce(c, pod, mesh, share))
  return Seconds(floor, seconds)


def prefill(c: Config, pod: Pod, mesh: Mesh, int8: bool, rows: int, width: int,
            prefix: float) -> Seconds:
  """-> the seconds of a prefill of `rows` rows of `width` tokens behind a shared prefix."""
  tokens = Tokens(rows * width, rows * (width * prefix + width**2 / 2), 0)
  copies = mesh.data * mesh.fsdp
  flops = forward_flops(c, tokens) / (copies * mesh.tensor)
  read = decode_bytes(c, int8, 0, 0, prefix) / mesh.tensor
  floor = max(flops / pod.chip.flops, read / pod.chip.bandwidth)
  seconds = max(flops / (pod.chip.flops * PREFILL[pod.kind]),
                read / (pod.chip.bandwidth * BANDWIDTH))
  seconds += c.layers * (LAYER + 2 * _all_reduce(c, pod, mesh, rows * width / copies))
  return Seconds(floor, seconds)


def links(pod: Pod, group: int) -> float:
  """-> bytes per second that a chip sends to a group of so many chips."""
  if pod.platform == 'gpu' and group > pod.size:
    return NETWORK
  return 2 * pod.chip.link


def _all_reduce(c: Config, pod: Pod, mesh: Mesh, tokens: float) -> float:
  """-> the seconds of an all-reduce of the residual stream over tensor, 0 without."""
  if mesh.tensor == 1:
    return 0
  sent = 2 * (mesh.tensor - 1) / mesh.tensor * tokens * c.D * jnp.dtype(c.dtype).itemsize
  return LATENCY + sent / links(pod, mesh.tensor)
