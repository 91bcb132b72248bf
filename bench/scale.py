"""Memory of the 7B and 70B training steps, compiled ahead of time with the TPU compiler.

  python bench/scale.py                     # all of PROGRAMS; about half an hour on 2 cores
  python bench/scale.py --only=7b           # programs whose name contains the text
  python bench/scale.py --largest           # also doubles the rows until the program does not fit
  python bench/scale.py --remat=full        # instead of what the config says

No TPU is needed. Exits with 1 if a program does not fit, or if it all-reduces a whole weight in its
loop over the layers, where each chip needs only its own part.
"""
import argparse
import collections
import dataclasses
import math
import os
import re
import sys
import time

os.environ.update(
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5p-8', ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_LOG_DIR='disabled',
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT='-1.0')

import jax
from jax.experimental import topologies

from srlm_jax import config as configs, sharding
from srlm_jax.checkpoint import store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.models import kernels, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.train import batch as batches, state as train_state, step as train_step

GIB = 2**30
# Fraction of a layer's weights. XLA prefers to all-reduce smaller weights; these are only reported.
SMALL = 0.02
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
CUBE = dict(chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1), wrap=(True, True, True))
PODS = {  # name: (topology, GiB per chip)
    'v5p-256': (dict(topology_name='v5:4x4x8', num_slices=1, **CUBE), 95),
    'v4-256': (dict(topology_name='v4:4x4x8', num_slices=1, **CUBE), 32),
    'v6e-256': (dict(topology_name='v6e:16x16', chip_config_name='default',
                     wrap=(True, True, False)), 31),
    '2 x v5p-128': (dict(topology_name='v5:4x4x4', num_slices=2, **CUBE), 95),
    'v5p-8': (dict(topology_name='v5:2x2x1', chip_config_name='megacore',
                   chips_per_host_bounds=(2, 2, 1), num_slices=1), 95)}


@dataclasses.dataclass(frozen=True)
class Program:
  """A training step of one size, with its loss and mesh, for one pod."""
  size: str
  loss: str
  pod: str
  mesh: tuple[int, int, int]  # data, fsdp, tensor
  reference: str = ''
  remat: str = ''  # empty: that of the config

  @property
  def name(self):
    reference = f', reference {self.reference}' if self.reference else ''
    return f'{self.size} {self.loss}{reference}'


PROGRAMS = (
    Program('7b', 'dpo', 'v5p-8', (1, 4, 1), 'step'),
    Program('70b', 'dpo', 'v5p-256', (1, 16, 8), 'step'),
    Program('70b', 'dpo', 'v5p-256', (1, 16, 8), 'cached'),
    Program('70b', 'dpo', 'v4-256', (1, 16, 8), 'step'),
    Program('70b', 'dpo', 'v4-256', (1, 16, 8), 'cached'),
    Program('70b', 'sft', 'v6e-256', (1, 32, 8)),
    Program('70b', 'dpo', '2 x v5p-128', (2, 8, 8), 'step'))


def train_config(program: Program):
  """-> the `train` section of a program's config."""
  c = configs.get('m2' if program.loss == 'dpo' else 'm1', program.size).train
  c = c.copy_and_resolve_references().unlock()
  c.reference = program.reference or 'step'
  c.remat = program.remat or c.remat
  return c


def make_mesh(program: Program):
  """-> the mesh of a program, over chips that need not exist."""
  topology = topologies.get_topology_desc(platform='tpu', **PODS[program.pod][0])
  return sharding.make_mesh(*program.mesh, topology.devices)


def compile(program: Program, mesh, rows: int, options=None):
  """-> the compiled step, and the shapes of its parameters; None if it does not fit.

  `rows`: rows per shard of (data, fsdp); each is one example of maximum length. `options`: of the
  compiler, besides those of the package.
  """
  c = train_config(program)
  config = dataclasses.replace(PRESETS[f'llama2-{program.size}'], dtype=c.dtype, dropout=c.dropout)
  half = c.max_length // 2  # tokens of the prompt, and of each response
  count = rows * mesh.size // mesh.shape['tensor']
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

  with jax.set_mesh(mesh):
    tx = train_state.optimizer(c, 100)
    state = train_state.abstract(config, tx, mesh)
    reference_params = {}
    if program.reference == 'step':
      reference_params = store.abstract_on(mesh, state.params, c.dtype)
    model = llama.Llama(config, kernels.for_training('tpu', config, c.remat), c.remat)
    step = train_step.make(model, tx, c, state)
    lowered = step.lower(state, reference_params, jax.tree.map(abstract, host_batch),
                         jax.eval_shape(jax.random.key, 0))
    try:
      return lowered.compile(compiler_options=options), state.params
    except jax.errors.JaxRuntimeError as error:
      # A program can also need too much memory of the core (vmem), whatever its batch.
      if 'RESOURCE_EXHAUSTED' in str(error) and 'memory space hbm' in str(error):
        return None
      raise


def matrices(params) -> dict[tuple, float]:
  """-> {dimensions of a matrix: its fraction of a layer's weights}.

  Matrices are split over `tensor` only, like gradients before reduce-scatter. Dimensions are sorted
  and those of size 1 omitted, because the compiler transposes and reshapes.
  """
  sizes, total = {}, 0
  for x in jax.tree.leaves(params['layers']):
    tensor = [x.sharding.mesh.shape['tensor'] if axes == 'tensor' else 1
              for axes in x.sharding.spec]
    dims = [size // parts for size, parts in zip(x.shape, tensor, strict=True)][1:]
    if len(dims) > 1:
      sizes[tuple(sorted(n for n in dims if n > 1))] = math.prod(dims)
      total += math.prod(dims)
  return {dims: size / total for dims, size in sizes.items()}


def collectives(text: str, weights: dict[tuple, float]) -> tuple[dict[str, int], dict[str, float]]:
  """-> {kind: count} of the collectives, {name: fraction} of whole weights all-reduced in a loop.

  `text`: a compiled program; `weights`: see `matrices`. A fusion named all-reduce-scatter is the
  TPU's reduce-scatter.
  """
  kinds, whole = collections.Counter(), {}
  loops = set(re.findall(r'body=%?([\w.-]+)', text))
  for block in re.split(r'\n(?=%|ENTRY)', text):
    name = re.match(r'%?([\w.-]+)', block)[1]
    for made, kind in re.findall(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(', block):
      scattered = name.startswith('all-reduce-scatter')
      kinds['reduce-scatter' if scattered else kind] += 1
      if kind == 'all-reduce' and name in loops:
        for shape in re.findall(r'\w\[([\d,]+)\]', made):
          dims = tuple(sorted(n for n in map(int, shape.split(',')) if n > 1))
          if dims in weights:
            whole[f'all-reduce of [{shape}] in the loop {name}'] = weights[dims]
  return dict(kinds), whole


def measure(program: Program, rows: int) -> dict:
  """-> whether the program fits, its memory in GiB per chip, compile time and collectives."""
  mesh = make_mesh(program)
  started = time.perf_counter()
  found = compile(program, mesh, rows)
  if found is None:
    return dict(fits=False)
  compiled, params = found
  seconds = time.perf_counter() - started
  used = compiled.memory_analysis()
  kinds, whole = collectives(compiled.as_text(), matrices(params))
  total = total_bytes(compiled)
  return dict(fits=total < PODS[program.pod][1] * GIB,
              arguments=used.argument_size_in_bytes / GIB,
              temporaries=used.temp_size_in_bytes / GIB, total=total / GIB, seconds=seconds,
              kinds=kinds, whole=whole)


def total_bytes(compiled) -> int:
  """-> bytes of memory of one chip that a program needs."""
  used = compiled.memory_analysis()
  return (used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
          + used.temp_size_in_bytes)


def line(program: Program, rows: int, found: dict) -> str:
  """-> a line of the table."""
  kinds = ', '.join(f'{n} {kind}' for kind, n in sorted(found['kinds'].items()))
  return (f'| {title(program, rows)} | {found["arguments"]:.1f} | {found["temporaries"]:.1f} | '
          f'{found["total"]:.1f} of {PODS[program.pod][1]} | {kinds} | {found["seconds"]:.0f} |')


def title(program: Program, rows: int) -> str:
  """-> the first columns of the table."""
  mesh = ', '.join(map(str, program.mesh))
  return f'{program.name} | {program.pod} | {mesh} | {rows}'


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--largest', action='store_true')
  parser.add_argument('--remat', default='', choices=('', *configs.REMAT))
  flags = parser.parse_args()
  print('| program | pod | data, fsdp, tensor | rows | state and reference, GiB | temporaries | '
        'total | collectives | seconds |\n|---|---|---|---|---|---|---|---|---|', flush=True)
  notes, errors = [], []
  for program in PROGRAMS:
    if flags.only not in f'{program.name} {program.pod}':
      continue
    program = dataclasses.replace(program, remat=flags.remat)
    rows = 1
    while True:
      found = measure(program, rows)
      if not found['fits']:
        print(f'| {title(program, rows)} | does not fit | | | | |', flush=True)
        if rows == 1:
          errors.append(f'{title(program, rows)} does not fit')
        break
      for what, fraction in found['whole'].items():
        sentence = f'{title(program, rows)}: {what}, {fraction:.1%} of a layer'
        (errors if fraction > SMALL else notes).append(sentence)
      print(line(program, rows, found), flush=True)
      if not flags.largest:
        break
      rows *= 2
  for sentence in notes:
    print(f'note: {sentence}')
  for sentence in errors:
    print(f'error: {sentence}', file=sys.stderr)
  sys.exit(bool(errors))


if __name__ == '__main__':
  main()
