"""The programs of 7B and 70B that are compiled ahead of time with the compilers for TPU and GPU.

No TPU or GPU is needed: nothing is allocated or executed. `bench/scale.py` reports the memory of
the training steps on TPUs, `bench/cycles.py` the estimated time of all their programs,
`tests/test_aot.py` tests the sampling programs. `bench/scale_gpu.py` reports what is compiled for
GPUs.
"""
import dataclasses
import functools
import math
import os
import re

from flax import traverse_util
import gpu
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from srlm_jax import config as configs, pods, sharding
from srlm_jax.checkpoint import distribute, store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.models import cache as caches, int8, kernels, llama, sizing
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import programs
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import batch as batches, state as train_state, step as train_step

GIB = 2**30
# libtpu cannot query these from hardware.
ENVIRONMENT = dict(
    TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
    ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_LOG_DIR='disabled')
MEGACORE = dict(chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1))
CUBE = dict(wrap=(True, True, True), **MEGACORE)
TPUS = {  # name: topology; v4 and v5p are named after their cores, two per chip
    'v5p-256': dict(topology_name='v5:4x4x8', num_slices=1, **CUBE),
    'v4-256': dict(topology_name='v4:4x4x8', num_slices=1, **CUBE),
    'v6e-256': dict(topology_name='v6e:16x16', chip_config_name='default',
                    wrap=(True, True, False)),
    '2 x v5p-128': dict(topology_name='v5:4x4x4', num_slices=2, **CUBE),
    'v5p-8': dict(topology_name='v5:2x2x1', num_slices=1, **MEGACORE),
    'v5p-16': dict(topology_name='v5:2x2x2', num_slices=1, **MEGACORE),
    'v6e-8': dict(topology_name='v6e:2x4', chip_config_name='default')}
PODS = {  # name: (topology, GiB per chip)
    **{name: (topology, pods.find(name).chip.gib) for name, topology in TPUS.items()},
    **gpu.PODS}
# Two hosts of a v6e slice of 16 x 16, as a slice of their own: without hardware, libtpu refuses to
# compile for a part of that slice.
V6E_HOSTS = dict(topology_name='v6e:4x2', chip_config_name='default',
                 chips_per_host_bounds=(2, 2, 1))
# Of the sampling programs: slots, tokens per slot, tokens of the shared prefix, tokens per call of
# decode, the fewest tokens of a prefill.
SLOTS, SIZE, PREFIX, STEPS, PREFILL = 64, 4096, 512, 8, 256


@dataclasses.dataclass(frozen=True)
class Training:
  """A training step; a row of the batch is one example of maximum length."""
  size: str        # of Llama 2, or a name of PRESETS
  loss: str
  pod: str
  mesh: tuple[int, int, int]  # data, fsdp, tensor
  reference: str = ''
  remat: str = ''  # empty: what training chooses
  rows: int = 1    # per shard of (data, fsdp)
  moments: str = 'float32'
  lora: int = 0    # rank of the adapters; 0: trains all parameters

  @property
  def name(self):
    reference = f', reference {self.reference}' if self.reference else ''
    moments = ', bf16 moments' if self.moments == 'bfloat16' else ''
    adapters = f', LoRA {self.lora}' if self.lora else ''
    return f'{self.size} {self.loss}{reference}{moments}{adapters}'

  @property
  def width(self):
    """Tokens per row: a prompt, and one or two responses of the same length."""
    return self._published.train.max_length * (3 if self.loss == 'dpo' else 2) // 2

  @property
  def config(self):
    """The section `train` of the config, with the recomputation that training chooses."""
    config = self._published.copy_and_resolve_references().unlock()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = self.mesh
    c = config.train
    c.reference = self.reference or 'step'
    c.moments = self.moments
    c.lora_rank = self.lora
    c.remat, c.accumulate = self.remat or c.remat, 1
    topology, gib = PODS[self.pod]
    data, fsdp, tensor = self.mesh
    devices = sizing.Devices(platform(self), data * fsdp * tensor, int(gib * GIB),
                             topology.get('num_slices', 1))
    has_reference = self.reference == 'step'
    work = sizing.Work(self.rows * data * fsdp, self.width, has_reference)
    c.remat = sizing.training(config, self._shape(c), devices, work)['train.remat']
    return c

  @property
  def _published(self):
    """The config of a published size; they differ in the model only."""
    size = self.size if self.size in configs.SIZES else '7b'
    return configs.get('m2' if self.loss == 'dpo' else 'm1', size)

  def _shape(self, c):
    name = self.size if self.size in PRESETS else f'llama2-{self.size}'
    return dataclasses.replace(PRESETS[name], dtype=c.dtype, dropout=c.dropout)

  @property
  def model(self):
    """The config of the model."""
    return self._shape(self.config)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A program of the sampler: STEPS tokens for every slot, or a prefill of rows of one width."""
  kind: str  # decode or prefill
  pod: str
  bits: int = 16  # of the weights
  width: int = 0  # of a prefill: tokens per row
  size: str = '70b'
  mesh: tuple[int, int, int] = (1, 1, 8)

  @property
  def name(self):
    tokens = f' of {self.width:,} tokens' if self.width else ''
    return f'{self.size} {self.kind}{tokens}, {"bf16" if self.bits == 16 else "int8"}'

  @property
  def rows(self):
    """Slots of a decode, rows of a prefill."""
    parts = self.mesh[0] * self.mesh[1]
    return parts * max(1, PREFILL // self.width // parts) if self.width else SLOTS

  @property
  def model(self):
    """The config of the model."""
    return dataclasses.replace(PRESETS[f'llama2-{self.size}'], dtype='bfloat16')


TRAINING = (
    Training('7b', 'dpo', 'v5p-8', (1, 4, 1), 'step'),
    Training('70b', 'dpo', 'v5p-256', (1, 16, 8), 'step'),
    Training('70b', 'dpo', 'v5p-256', (1, 16, 8), 'cached'),
    Training('70b', 'dpo', 'v4-256', (1, 16, 8), 'step'),
    Training('70b', 'dpo', 'v4-256', (1, 16, 8), 'cached'),
    Training('70b', 'sft', 'v6e-256', (1, 32, 8)),
    Training('70b', 'dpo', '2 x v5p-128', (2, 8, 8), 'step'),
    Training('70b', 'dpo', 'v5p-256', (1, 16, 8), 'step', moments='bfloat16'),
    Training('70b', 'dpo', 'v5p-8', (1, 4, 1), 'step', rows=4, lora=16))
# The steps of M2 that docs/recipes.md plans, where packing makes fewer rows than examples.
RECIPES = tuple(Training(name, 'dpo', 'v5p-8', (1, 2, 2), 'step', rows=3)
                for name in ('llama3.1-8b', 'qwen3-8b'))
# Two of them with other meshes, at equal numbers of examples per step.
MESHES = tuple(
    Training('70b', loss, pod, (1, fsdp, tensor), reference, rows=examples // fsdp)
    for loss, pod, reference, meshes, counts in (
        ('dpo', 'v5p-256', 'step', ((16, 8), (32, 4), (64, 2)), (16, 32, 64)),
        ('sft', 'v6e-256', '', ((32, 8), (64, 4), (128, 2)), (32, 64, 128)))
    for examples in counts for fsdp, tensor in meshes if examples >= fsdp)


def group_mesh(pod: str) -> tuple[int, int, int]:
  """-> the mesh of the smallest group of hosts that holds 70B in bf16; a host has 4 chips."""
  chips = math.prod(map(int, re.findall(r'\d+', PODS[pod][0]['topology_name'].partition(':')[2])))
  found = sizing.sampling(configs.get('m2', '70b'), PRESETS['llama2-70b'],
                          sizing.Devices('tpu', 4, int(PODS[pod][1] * GIB)), chips // 4)
  return tuple(found[f'sample_mesh.{axis}'] for axis in sharding.NAMES)


# On 8 chips, and on the chips of the groups of hosts that sample on a pod.
GROUPS = ('v5p-256', 'v4-256', 'v6e-256')
SAMPLING = tuple(
    Sampler(kind, pod, bits, width)
    for pod in ('v5p-16', 'v6e-8')
    for kind, width in (('decode', 0), ('prefill', 128), ('prefill', 2048))
    for bits in (16, 8)) + tuple(
        Sampler(kind, pod, 16, width, mesh=group_mesh(pod))
        for pod in GROUPS for kind, width in (('decode', 0), ('prefill', 2048)))

# On GPUs, with the mesh that training chooses for 16 examples per step, the batch of the paper.
# docs/scale.md has what fits in one table, with some programs of fewer examples, and the rest in
# another.
GPU_TRAINING = (
    Training('7b', 'dpo', '8 x h100', (1, 8, 1), 'step', rows=2),
    Training('7b', 'dpo', '16 x h100', (1, 16, 1), 'step'),
    Training('7b', 'dpo', '8 x h200', (1, 8, 1), 'step', rows=2),
    Training('7b', 'dpo', '16 x h200', (1, 16, 1), 'step'),
    Training('70b', 'dpo', '16 x h200', (1, 16, 1), 'step'),
    Training('70b', 'dpo', '16 x h200', (1, 16, 1), 'cached'),
    Training('70b', 'sft', '16 x h200', (1, 16, 1)),
    Training('70b', 'sft', '16 x h100', (1, 16, 1)),
    Training('70b', 'dpo', '16 x h100', (1, 8, 2), 'cached'),
    Training('70b', 'dpo', '8 x h200', (1, 1, 8), 'cached'),
    Training('70b', 'dpo', '16 x h100', (1, 16, 1), 'step', moments='bfloat16'),
    Training('70b', 'dpo', '16 x h100', (1, 16, 1), 'cached', moments='bfloat16'),
    Training('70b', 'dpo', '8 x h200', (1, 4, 2), 'cached', rows=4, moments='bfloat16'),
    Training('70b', 'dpo', '8 x h200', (1, 8, 1), 'step', moments='bfloat16'),
    Training('70b', 'sft', '8 x h200', (1, 4, 2), rows=4, moments='bfloat16'),
    Training('70b', 'dpo', '8 x h100', (1, 4, 2), 'step', rows=4, lora=16))
GPU_TOO_LARGE = (
    Training('70b', 'dpo', '16 x h100', (1, 16, 1), 'step'),
    Training('70b', 'dpo', '16 x h100', (1, 16, 1), 'cached'),
    Training('70b', 'dpo', '8 x h200', (1, 4, 2), 'step', rows=4),
    Training('70b', 'dpo', '8 x h200', (1, 4, 2), 'cached', rows=4),
    Training('70b', 'sft', '8 x h200', (1, 4, 2), rows=4),
    Training('70b', 'dpo', '8 x h200', (1, 4, 2), 'step', rows=4, moments='bfloat16'),
    Training('70b', 'dpo', '8 x h100', (1, 4, 2), 'cached', rows=4, moments='bfloat16'))
GPU_SAMPLING = tuple(
    Sampler(kind, pod, 16, width, size, mesh)
    for size, pod, mesh in (('7b', '8 x h100', (8, 1, 1)), ('70b', '8 x h100', (1, 1, 8)),
                            ('70b', '8 x h200', (2, 1, 4)))
    for kind, width in (('decode', 0), ('prefill', 2048)))


def platform(program: Training | Sampler) -> str:
  """-> tpu or gpu."""
  return 'gpu' if program.pod in gpu.PODS else 'tpu'


def make_mesh(program: Training | Sampler):
  """-> the mesh of a program, over chips that need not exist; of a sampler, a part of the pod."""
  if platform(program) == 'gpu':
    jax.config.update('jax_platforms', 'cpu')
    return sharding.make_mesh(*program.mesh, gpu.devices(program.pod))
  is_group = isinstance(program, Sampler) and program.pod == 'v6e-256'
  found = chips(V6E_HOSTS if is_group else PODS[program.pod][0])
  return sharding.make_mesh(*program.mesh, found[:math.prod(program.mesh)])


def chips(topology: dict) -> list:
  """-> the chips of a topology, which need not exist, in the order of their hosts."""
  os.environ.update(ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')
  found = topologies.get_topology_desc(platform='tpu', **topology).devices
  return sorted(found, key=lambda chip: chip.process_index)


def distribution_bytes(pod: str) -> list[tuple[str, int, int]]:
  """Compiles the programs that distribute 70B in bf16 to the groups of a pod, as `distribute` does.

  -> (name, bytes of one chip that the arrays before it take, bytes that its program needs) of every
  array.
  """
  shape = group_mesh(pod)
  every, size = chips(PODS[pod][0]), math.prod(shape)
  groups = [sharding.make_mesh(*shape, every[i:i + size]) for i in range(0, len(every), size)]
  whole = distribute.mesh_of(np.stack([g.devices for g in groups]), sharding.NAMES)
  with jax.set_mesh(groups[0]):
    params = llama.abstract_params(PRESETS['llama2-70b'])
    params = traverse_util.flatten_dict(store.abstract_on(groups[0], params, 'bfloat16'), sep='.')
  found, before = [], 0
  for name in distribute.order(params):
    lowered = distribute.lower(whole, params[name], name)
    found.append((name, before, total_bytes(lowered.compile())))
    before += math.prod(params[name].sharding.shard_shape(params[name].shape)) * 2
  return found


def compile(program: Training | Sampler, options: dict | None = None):
  """-> the compiled program; None if it does not fit.

  `options`: of the compiler, besides those of the package.
  """
  mesh = make_mesh(program)
  with jax.set_mesh(mesh):
    lower = _lower_training if isinstance(program, Training) else _lower_sampler
    if platform(program) == 'gpu':
      options = gpu.OPTIONS | (options or {})
    try:
      return lower(program, mesh).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      # A program can also need too much memory of the core (vmem), whatever its batch.
      if re.search('RESOURCE_EXHAUSTED.*(memory space hbm|on HBM)', str(error), re.DOTALL):
        return None
      raise


def total_bytes(compiled) -> int:
  """-> bytes of memory of one chip that a program needs."""
  used = compiled.memory_analysis()
  return (used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
          + used.temp_size_in_bytes)


def title(program: Training | Sampler) -> str:
  """-> the first columns of a table."""
  mesh = ', '.join(map(str, program.mesh))
  return f'{program.name} | {program.pod} | {mesh} | {program.rows}'


def shape(mesh, dims, *sizes, dtype=jnp.int32):
  """The shape, dtype and sharding of an array, without memory."""
  return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding.named(mesh, dims))


def sampler(config, kernels, mesh, rows, size, prefix):
  """The arguments of the sampler's programs as shapes, under a mesh.

  -> (model, parameters, cache, prefix), and the state of the rows.
  """
  params = store.abstract_on(mesh, llama.abstract_params(config), config.dtype)
  if kernels.fused:
    params = store.abstract_on(mesh, jax.eval_shape(llama.fuse, params), config.dtype)
  layers, K, H = config.layers, config.K, config.H
  cache = caches.Cache(
      *[shape(mesh, 'LBKSH', layers, rows, K, size, H, dtype=config.dtype)] * 2)
  prefix = caches.PrefixCache(
      *[shape(mesh, 'LKWH', layers, K, prefix, H, dtype=config.dtype)] * 2)
  if kernels.unrolled:
    def one_layer(x):
      return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=x.sharding)
    params = jax.eval_shape(llama.unroll, params)
    cache, prefix = ((jax.tree.map(one_layer, x),) * layers for x in (cache, prefix))
  kinds = dict(fold_data=jnp.uint32, live=jnp.bool, ended=jnp.bool)
  state = programs.Rows(**{f.name: shape(mesh, 'B', rows, dtype=kinds.get(f.name, jnp.int32))
                           for f in dataclasses.fields(programs.Rows)})
  return (llama.Llama(config, kernels=kernels), params, cache, prefix), state


def _lower_training(program: Training, mesh):
  c, config = program.config, program.model
  half = c.max_length // 2  # tokens of the prompt, and of each response
  count = program.rows * mesh.size // mesh.shape['tensor']
  responses = ([1] * half,) * (2 if program.loss == 'dpo' else 1)
  examples = [Example(f'e{i}', [1] * half, responses) for i in range(count)]
  packed = Packing(examples, count, 1, 0)
  host_rows, batch_shape = packed.rows(0), packed.shape
  if program.loss == 'sft':
    host_batch = batches.pack(host_rows, batch_shape)
  elif program.reference == 'cached':
    logps = {e.id: [0.0, 0.0] for e in examples}
    host_batch = batches.pack_cached_pairs(host_rows, batch_shape, logps)
  else:
    host_batch = batches.pack_pairs(host_rows, batch_shape)

  def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, 'B'))
  tx = train_state.optimizer(c, 100)
  state = train_state.abstract(config, c, tx, mesh)
  frozen = {}
  if program.reference == 'step' or program.lora:
    frozen = store.abstract_on(mesh, llama.abstract_params(config), c.dtype)
  model = llama.Llama(config, kernels.for_training(platform(program), config, c.remat), c.remat)
  step = train_step.make(model, tx, c, state)
  return step.lower(state, frozen, jax.tree.map(abstract, host_batch),
                    jax.eval_shape(jax.random.key, 0))


def _lower_sampler(program: Sampler, mesh):
  config = program.model
  choice = kernels.choose(platform(program), config)
  (model, params, cache, prefix), state = sampler(config, choice, mesh, SLOTS, SIZE, PREFIX)
  if program.bits == 8:
    params = jax.tree_util.tree_map_with_path(functools.partial(_quantized, mesh), params)
  if choice.formats:
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                          params, choice.formats(params))
  given = model, params, cache, prefix
  if program.kind == 'decode':
    key, eos = jax.eval_shape(jax.random.key, 0), shape(mesh, 'L', 1)
    return programs.decode.lower(*given, state, key, eos, sampling=Sampling(0.7, 0.9, 1),
                                 steps=STEPS)
  view = caches.Prefill(shape(mesh, 'A', program.rows),
                        *[jax.ShapeDtypeStruct((SLOTS,), jnp.int32)] * 2,
                        jax.ShapeDtypeStruct((), jnp.int32))
  return programs.prefill(mesh).lower(*given, shape(mesh, 'AT', program.rows, program.width), view)


def _quantized(mesh, path, x):
  """The shape of an int8 weight, as `int8.quantize` makes it."""
  name, _, dims = path[-1].key.rpartition('_')
  if name not in int8.DENSE:
    return x
  layers = x.ndim - len(dims)
  outputs = layers + int8.inputs(dims)
  scale = shape(mesh, 'L' * layers + dims[int8.inputs(dims):], *x.shape[:layers],
                *x.shape[outputs:], dtype=jnp.float32)
  return int8.Int8(jax.ShapeDtypeStruct(x.shape, jnp.int8, sharding=x.sharding), scale)
