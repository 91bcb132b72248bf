"""Chooses what a config leaves open: the mesh, micro-batches, recomputation and slots.

The keys that may be open are those of `config.OPEN`; a value that the config gives is kept. Memory
is estimated from the shape of the model, in bytes of one device.
"""
from collections.abc import Iterator
import dataclasses
import math

import jax
import jax.numpy as jnp

from srlm_jax import config as configs, hosts, InputError
from srlm_jax.models import llama
from srlm_jax.models.config import Config

# Share of a device's memory that a program may take. On a CPU, other programs run beside it.
USABLE = dict(cpu=0.5, gpu=0.85, tpu=0.9)
# Slots per copy of the weights. More rows share the cost of reading the weights, but at the end of
# a stage more of them are empty.
MOST_SLOTS = dict(cpu=128, gpu=256, tpu=256)
# Values of train.remat, from the fastest. On a TPU, keeping everything was slower by the compiler's
# estimate than recomputing what is cheap (docs/scale.md).
POLICIES = dict(cpu=('none', 'dots', 'full'), gpu=('dots', 'full'), tpu=('dots', 'full'))
MOST_FSDP = 64  # on 128 chips, XLA all-reduced whole gradients instead of reduce-scattering them
# Bytes that the tensor axis sends per token and model width, for each byte that the fsdp axis sends
# per weight of a layer: fitted to the programs of docs/scale.md.
TENSOR_COST = 5
# Bytes per second of a GPU over NVLink for each that its network card carries between hosts: 450
# and 50 GB/s on hosts of 8 H100 or H200 with one card of 400 Gb/s per GPU.
NVLINK = 9
WEIGHTS = 0.25  # share of a device's memory that a sampler's weights take, where the mesh allows it


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices of one program."""
  platform: str  # cpu, gpu or tpu
  count: int
  memory: int    # bytes of one device
  slices: int = 1  # of TPUs
  hosts: int = 1   # of GPUs

  @property
  def usable(self) -> float:
    """Bytes of one device that a program may take."""
    return self.memory * USABLE[self.platform]

  @property
  def near(self) -> int:
    """Devices that a tensor axis may join: the GPUs of a host, the TPUs of a slice, all CPUs."""
    return self.count // self.hosts // self.slices


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The sizes of the axes of a mesh."""
  data: int
  fsdp: int
  tensor: int

  @property
  def parts(self) -> int:
    """The shards of a batch."""
    return self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class Work:
  """What a training step computes."""
  rows: float           # rows per step, on average
  width: int            # tokens per row
  has_reference: bool   # whether the parameters of a reference are in memory
  is_exact: bool = False  # whether the number of rows is fixed


def devices(local: bool = False) -> Devices:
  """The devices of the run, or with `local` those of this host."""
  found = jax.local_devices() if local else jax.devices()
  platform = found[0].platform
  slices = len({getattr(d, 'slice_index', 0) for d in found})  # on a GPU it numbers the hosts
  return Devices(platform, len(found), hosts.memory() // jax.device_count(),
                 slices if platform == 'tpu' else 1, slices if platform == 'gpu' else 1)


def training(config, shape: Config, devices: Devices, work: Work) -> dict[str, int | str]:
  """Chooses how to train -> {key: value} of all keys of `config.OPEN` that training reads.

  The mesh: of those in which each shard of the batch has a row, the one whose collectives take the
  least time. Then the fewest micro-batches that fit, and with these the fastest recomputation. If
  by the estimate nothing fits, what takes the least memory.
  """
  c = config.train
  given = 1 if configs.is_open(c.accumulate) else c.accumulate  # micro-batches at least
  tokens = work.rows * work.width / devices.count
  def cost(mesh):
    multiple = mesh.parts * given
    wasted = work.rows % multiple if work.is_exact else max(multiple - work.rows, 0)
    # A tensor axis gathers and scatters the residual stream, an fsdp axis the weights. Between
    # hosts of GPUs, the cards of a host carry the weights once, however they are split in it.
    split = 1 / mesh.tensor
    if devices.hosts > 1:
      split = max(split, NVLINK / devices.near)
    collectives = (TENSOR_COST * tokens * shape.D * (mesh.tensor - 1)
                   + _layer_params(shape) * split)
    return wasted, max(mesh.fsdp - MOST_FSDP, 0), collectives, mesh.data
  mesh = min(_meshes(config.mesh, 'mesh', shape, devices), key=cost)
  rows = math.ceil(work.rows / mesh.parts)  # of one shard
  def needed(step):
    accumulate, remat = step
    tokens = math.ceil(rows / accumulate) * work.width
    return training_bytes(shape, mesh, tokens, work.has_reference, accumulate, remat, c.moments)
  steps = list(_steps(c, rows, work, mesh, devices.platform))
  accumulate, remat = next((step for step in steps if needed(step) < devices.usable),
                           min(steps, key=needed))
  return {**_axes('mesh', mesh), 'train.accumulate': accumulate, 'train.remat': remat}


def _steps(c, rows: int, work: Work, mesh: Mesh, platform: str) -> Iterator[tuple[int, str]]:
  """Yields (micro-batches, recomputation), the fastest first."""
  counts = [c.accumulate]
  if configs.is_open(c.accumulate):
    powers = [2**i for i in range(rows.bit_length()) if 2**i <= rows]
    counts = [n for n in powers if not work.is_exact or work.rows % (n * mesh.parts) == 0] or [1]
  policies = POLICIES[platform] if configs.is_open(c.remat) else [c.remat]
  for count in counts:
    for remat in policies:
      yield count, remat


def training_bytes(shape: Config, mesh: Mesh, tokens: int, has_reference: bool, accumulate: int,
                   remat: str, moments: str) -> float:
  """-> bytes of one device that a training step takes, within about a sixth at 7B and 70B.

  `tokens`: of one shard's micro-batch. Parameters and gradients are float32, the moments have the
  dtype `moments`, the reference has that of activations. The constants are fitted to the compiled
  programs of docs/scale.md.
  """
  c, item = shape, jnp.dtype(shape.dtype).itemsize
  heads, kv = c.K * c.G * c.H, c.K * c.H
  per_param = 4 + 2 * jnp.dtype(moments).itemsize + item * has_reference
  per_param += 10.4 if accumulate > 1 else 6.4
  total = llama.param_count(c) * per_param / (mesh.fsdp * mesh.tensor)
  # The weights of the current layers, gathered over fsdp, and the gradient of the head.
  total += (4 * _layer_params(c) * item + 16 * c.D * c.V) / mesh.tensor
  kept = c.D  # elements per token and layer: the input of a layer
  if remat != 'full':  # the results of the products
    kept += heads + 2 * kv + 2 * c.F + 2 * c.D
  if remat == 'none':  # those of norms, RoPE, attention, SwiGLU and dropout
    kept += 4 * heads + 2 * kv + 6 * c.F + 16 * c.D
  current = 0  # elements per token of the layer that is recomputed; whole residual streams
  if remat == 'full':
    current = 3.5 * c.D * mesh.tensor + 13 * (c.F + heads)
  return total + tokens * item * (c.layers * kept + current) / mesh.tensor


def sampling(config, shape: Config, devices: Devices) -> dict[str, int]:
  """Chooses how to sample -> {key: value} of all keys of `config.OPEN` that sampling reads.

  The mesh: the smallest tensor axis with which the weights take at most WEIGHTS of the memory, or
  the largest. Then the most slots, a power of two per copy of the weights, whose cache fits.
  """
  c = config.sample
  item = jnp.dtype(c.dtype).itemsize
  def weights(mesh):
    # int8 weights are made from a copy in the dtype of activations.
    return llama.param_count(shape) * (item + c.int8) / (mesh.fsdp * mesh.tensor)
  def cost(mesh):
    over = max(weights(mesh) - WEIGHTS * devices.memory, 0)
    return over, mesh.fsdp, mesh.tensor
  mesh = min(_meshes(config.sample_mesh, 'sample_mesh', shape, devices), key=cost)
  slots = c.slots
  if configs.is_open(slots):
    row = 2 * shape.layers * shape.K * min(c.size, shape.context) * shape.H * item / mesh.tensor
    fit = (devices.usable - weights(mesh)) / row * mesh.fsdp
    most = max(min(fit, MOST_SLOTS[devices.platform]), 1)
    slots = mesh.data * 2**int(math.log2(most))
  return {**_axes('sample_mesh', mesh), 'sample.slots': slots}


def _layer_params(c: Config) -> int:
  return 2 * c.D * c.K * (c.G + 1) * c.H + 3 * c.D * c.F


def _meshes(given, section: str, shape: Config, devices: Devices) -> list[Mesh]:
  """The meshes over all devices that have the sizes given and divide the model.

  With fewer than two open sizes there is one mesh, whatever it divides: `sharding` checks that.
  """
  sizes = given.data, given.fsdp, given.tensor
  known = math.prod(n for n in sizes if not configs.is_open(n))
  given_sizes = f'config.{section} is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}'
  if devices.count % known:
    raise InputError(f'{given_sizes}, whose product does not divide the {devices.count} available '
                     f'devices; -1 leaves a size to be chosen')
  if sum(map(configs.is_open, sizes)) < 2:
    return [Mesh(*(devices.count // known if configs.is_open(n) else n for n in sizes))]
  found = []
  for tensor in _divisors(devices.count):
    for fsdp in _divisors(devices.count // tensor):
      mesh = Mesh(devices.count // tensor // fsdp, fsdp, tensor)
      agrees = all(configs.is_open(n) or n == size
                   for n, size in zip(sizes, dataclasses.astuple(mesh), strict=True))
      divides = not any(n % tensor for n in (shape.K, shape.F, shape.V)) and not shape.D % fsdp
      divides &= not (configs.is_open(given.tensor) and devices.near % tensor)
      if agrees and divides and mesh.data % devices.slices == 0:
        found.append(mesh)
  if not found:
    raise InputError(f'{given_sizes}, and no such mesh over the {devices.count} devices divides '
                     f'the model; set all three sizes, or use another number of devices')
  return found


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def _axes(section: str, mesh: Mesh) -> dict[str, int]:
  return {f'{section}.{axis}': size for axis, size in dataclasses.asdict(mesh).items()}
