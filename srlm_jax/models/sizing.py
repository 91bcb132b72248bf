"""Chooses what a config leaves open: the mesh, micro-batches, recomputation and slots.

The keys that may be open are those of `config.OPEN`; a value that the config gives is kept. Memory
is estimated from the shape of the model, in bytes of one device.
"""
from collections.abc import Iterator, Mapping
import dataclasses
import math
import types

from flax import traverse_util
import jax
import jax.numpy as jnp

from srlm_jax import config as configs, hosts, InputError, sharding
from srlm_jax.models import llama, lora
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
# Of the memory of a training step, see `training_parts`: fitted to the programs of docs/scale.md.
LAYERS = 2     # gathered layers: the current one, and the next
TABLES = 3     # gathered embeddings or heads
STREAMS = 4.5  # whole residual streams of the current layer, on every chip of a tensor group
HIDDEN = 13    # activations of its heads and its feed-forward layer, and their gradients
UNUSED = dict(cpu=3.5, gpu=1.5, tpu=3.5)  # bytes per parameter: space between buffers
ADAPTER = dict(cpu=24, gpu=20, tpu=24)  # the same of a LoRA adapter, whole on every device
NONE = types.MappingProxyType({})
MOST_ABOVE = 1.15  # memory by formula / by the compiler, at most: tests/test_sizing.py
WEIGHTS = 0.25  # share of a device's memory that a sampler's weights take, where the mesh allows it
LEAST_SLOTS = 16  # per copy of the weights, for which a group of hosts must have memory


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
  """The devices of the run, or with `local` those of this host; all hosts make the first call."""
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
                   + layer_params(shape) * split)
    return wasted, max(mesh.fsdp - MOST_FSDP, 0), collectives, mesh.data
  mesh = min(_meshes(config.mesh, 'mesh', shape, devices), key=cost)
  rows = math.ceil(work.rows / mesh.parts)  # of one shard
  def needed(step):
    accumulate, remat = step
    tokens = math.ceil(rows / accumulate) * work.width
    return training_bytes(shape, mesh, tokens, work.has_reference, accumulate, remat, c.moments,
                          devices.platform, adapter(c, shape))
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
                   remat: str, moments: str, platform: str, adapter: Mapping = NONE) -> float:
  """-> bytes of one device that a training step takes: the sum of `training_parts`."""
  return sum(training_parts(shape, mesh, tokens, has_reference, accumulate, remat, moments,
                            platform, adapter).values())


def training_parts(shape: Config, mesh: Mesh, tokens: int, has_reference: bool, accumulate: int,
                   remat: str, moments: str, platform: str,
                   adapter: Mapping = NONE) -> dict[str, float]:
  """-> {what: bytes of one device} of a training step, with `tokens` per shard and micro-batch.

  Parameters and gradients are float32, Adam's moments have the dtype `moments`. `adapter`: of
  LoRA, see `adapter`; gradients and moments are then those of the adapter alone, and the parameters
  in the dtype of activations are the reference too.
  Never below and at most 15 % above what the compilers for TPU and GPU need for the programs of
  docs/scale.md. The TPU compiler's list of buffers has the parts below; the factors in capitals are
  fitted. Only the TPU compiler keeps a copy of all parameters in the dtype of activations.
  """
  c, item = shape, jnp.dtype(shape.dtype).itemsize
  heads, kv = c.K * c.G * c.H, c.K * c.H
  params, frozen = llama.param_count(c) / (mesh.fsdp * mesh.tensor), 0
  if adapter:
    params, frozen = sum(_share(name, x, mesh) for name, x in adapter.items()), params
  kept = c.D  # elements per token and layer: the input of a layer
  if remat != 'full':  # the results of the products, but for the one that is added to the stream
    kept += heads + 2 * kv + 2 * c.F + c.D
  if remat == 'none':  # those of norms, RoPE, attention, SwiGLU and dropout
    kept += 4 * heads + 2 * kv + 6 * c.F + 16 * c.D + 2 * bool(c.qk_norm) * (heads + kv)
  current = STREAMS * c.D + HIDDEN * (c.F + heads) / mesh.tensor
  return dict(
      parameters=4 * params + item * frozen,
      optimizer=2 * jnp.dtype(moments).itemsize * params,  # the two moments of Adam
      reference=item * params * (has_reference and not adapter),
      gradients=(4 + 4 * (accumulate > 1)) * params,  # of a micro-batch, and their sum
      # That copy; the current layers, gathered over fsdp; the embedding, the head and their
      # gradients, gathered too.
      copies=item * (params * (platform != 'gpu') + (
          LAYERS * layer_params(c) + TABLES * c.D * c.V) / mesh.tensor),
      activations=tokens * item * (c.layers * kept / mesh.tensor + current),
      unused=UNUSED[platform] * params + ADAPTER[platform] * _size(adapter))


def adapter(c, shape: Config) -> Mapping:
  """-> {path: shape} of the LoRA adapter that is trained, empty without; `c`: section `train`."""
  if not c.lora_rank:
    return NONE
  return traverse_util.flatten_dict(
      lora.shapes(shape, c.lora_rank, configs.lora_targets(c)), sep='.')


def trained(c, shape: Config) -> int:
  """-> the number of parameters that are trained: all, or those of the LoRA adapter."""
  return _size(adapter(c, shape)) or llama.param_count(shape)


def _size(arrays: Mapping) -> int:
  return sum(math.prod(x.shape) for x in arrays.values())


def _share(name: str, x, mesh: Mesh) -> float:
  """-> the elements of an array that are on one device."""
  axes = sharding.spec(name.rpartition('_')[2])
  return math.prod(x.shape) / math.prod(getattr(mesh, a) for a in axes if a)


def work(c, mean: float, longest: int, has_reference: bool,
         known: tuple[int, int] | None = None) -> Work:
  """What a step computes with examples of these lengths in tokens; `c`: the section `train`.

  `known`: the rows and their width, if they do not depend on the mesh.
  """
  width = max(c.max_length if c.pack else 0, longest)
  if known:
    rows, width = known
  elif not c.pack:
    rows = c.batch
  else:
    rows = c.batch * mean / width if configs.is_open(c.rows) else c.rows
  is_exact = bool(known) or not c.pack or not configs.is_open(c.rows)
  return Work(rows, width, has_reference, is_exact)


def forward_parts(shape: Config, mesh: Mesh, tokens: int, platform: str) -> dict[str, float]:
  """-> {what: bytes of one device} of a forward pass of training with `tokens` per shard.

  The parameters have the dtype of activations. No compiled program calibrates it.
  """
  step = training_parts(shape, mesh, tokens, False, 1, 'full', 'float32', platform)
  item = jnp.dtype(shape.dtype).itemsize
  params = llama.param_count(shape) / (mesh.fsdp * mesh.tensor)
  kept = tokens * item * shape.layers * shape.D / mesh.tensor  # for a backward pass
  copy = item * params * (platform != 'gpu')
  return dict(parameters=item * params, copies=step['copies'] - copy,
              activations=step['activations'] - kept)


def sampling(config, shape: Config, host: Devices, hosts: int = 1) -> dict[str, int]:
  """Chooses how to sample -> {key: value} of all keys of `config.OPEN` that sampling reads.

  `host`: the devices of one of the `hosts`, which divide into groups; each group has a copy of the
  weights or several. The smallest group that holds the weights, and the cache of the slots or of
  LEAST_SLOTS; if none does, the one with most room. The mesh: the smallest tensor axis with which
  the weights take at most WEIGHTS of the memory, or the largest. Then the most slots, a power of
  two per copy of the weights, that fit by `sampler_parts` beside the longest prefill.
  """
  found, slots = [], config.sample.slots
  for devices in _groups(config.sample_mesh, host, hosts):
    mesh = min(_meshes(config.sample_mesh, 'sample_mesh', shape, devices),
               key=lambda mesh: _sampling_cost(config.sample, shape, devices, mesh))
    fit = _fitting_slots(config.sample, shape, devices, mesh)
    found.append((fit, mesh))
    if fit >= (LEAST_SLOTS if configs.is_open(slots) else slots / mesh.data):
      break
  else:
    fit, mesh = max(found, key=lambda pair: pair[0])
  if configs.is_open(slots):
    most = max(min(fit, MOST_SLOTS[host.platform]), 1)
    slots = mesh.data * 2**int(math.log2(most))
  return {**_axes('sample_mesh', mesh), 'sample.slots': slots}


def _groups(given, host: Devices, hosts: int) -> list[Devices]:
  """The devices of a group of hosts, for every size of a group that a mesh can have."""
  sizes = given.data, given.fsdp, given.tensor
  known = math.prod(n for n in sizes if not configs.is_open(n))
  is_whole = not any(map(configs.is_open, sizes))
  found = [dataclasses.replace(host, count=n * host.count) for n in _divisors(hosts)]
  fitting = [d for d in found if (d.count == known if is_whole else d.count % known == 0)]
  if not fitting:
    counts = ', '.join(str(d.count) for d in found)
    raise InputError(
        f'config.sample_mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}, and its '
        f'product does not divide over groups of the {hosts} hosts, which have {counts} devices; '
        f'make the product one of them, or leave a size to be chosen (-1)')
  return fitting


def _sampling_cost(c, shape: Config, devices: Devices, mesh: Mesh):
  over = max(loading_bytes(c, shape, mesh) - WEIGHTS * devices.memory, 0)
  return over, mesh.fsdp, mesh.tensor


def loading_bytes(c, shape: Config, mesh: Mesh) -> float:
  """-> bytes of one device that a sampler's weights take when they are loaded.

  int8 weights are made from a copy in the dtype of activations, which is freed before there is a
  cache.
  """
  bytes_per_weight = jnp.dtype(c.dtype).itemsize + c.int8
  return llama.param_count(shape) * bytes_per_weight / (mesh.fsdp * mesh.tensor)


def _fitting_slots(c, shape: Config, devices: Devices, mesh: Mesh) -> float:
  """-> the slots per copy of the weights that fit beside the longest prefill."""
  if loading_bytes(c, shape, mesh) > devices.usable:
    return 0
  none, one = (sum(sampler_parts(c, shape, mesh, slots, min(c.size, shape.context),
                                 devices.platform).values()) for slots in (0, mesh.parts))
  return (devices.usable - none) / (one - none) * mesh.fsdp


def sampler_parts(c, shape: Config, mesh: Mesh, slots: int, tokens: int,
                  platform: str) -> dict[str, float]:
  """-> {what: bytes of one device} of the sampler's programs; `c`: the section `sample`.

  `tokens`: of a prefill per shard, 0 for a decode. Never below and at most 15 % above what the
  compilers for TPU and GPU need for the programs of docs/scale.md.
  """
  item, chips = jnp.dtype(c.dtype).itemsize, mesh.fsdp * mesh.tensor
  size = min(c.size, shape.context)
  table = shape.D * shape.V  # the embedding stays in the dtype of activations
  rest = llama.param_count(shape) - table
  kv = 2 * shape.K * shape.H * item  # bytes of a layer's keys and values of a token
  # Of a layer. Every shard of the slots gets all new keys and values; on a GPU, whose layers are
  # not in a loop, those of all layers are in memory at once.
  current = item * (4 * shape.D + 3 * (shape.F + shape.K * shape.G * shape.H) / mesh.tensor)
  gathered = kv * mesh.parts * (shape.layers if platform == 'gpu' else 1) / mesh.tensor
  return dict(
      weights=(table * item + rest * (1 if c.int8 else item)) / chips,
      # The shared prefix is at most as long as one more slot.
      cache=shape.layers * kv * size * (slots / mesh.parts + 1) / mesh.tensor,
      activations=tokens * (current + gathered))


def layer_params(c: Config) -> int:
  """-> the number of weights in the products of a layer."""
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
