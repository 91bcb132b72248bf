"""The training steps of 7B and 70B, compiled by the TPU's own compiler for pods that are not here: their memory.

  python bench/scale.py                     # all of PROGRAMS; about half an hour on 2 cores
  python bench/scale.py --only=7b           # those whose name holds it
  python bench/scale.py --largest           # more rows, twice and twice again, until they do not fit

Exits with 1 if a program does not fit any more, or all-reduces a whole weight in its loop over the layers, where each
chip wants its part alone.
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
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
    ALLOW_MULTIPLE_LIBTPU_LOAD='true', TPU_LOG_DIR='disabled', JAX_EXEC_TIME_OPTIMIZATION_EFFORT='-1.0')

import jax
from jax.experimental import topologies

from srlm_jax import config as configs, sharding
from srlm_jax.checkpoint import store
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Batches
from srlm_jax.models import kernels, llama
from srlm_jax.models.config import PRESETS
from srlm_jax.train import state as train_state, step as train_step

GIB = 2**30
SMALL = 0.02  # of a layer's weights: what XLA would rather all-reduce than scatter is named, and no error
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
CUBE = dict(chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1), wrap=(True, True, True))
PODS = {  # name: (topology, slices, GiB of a chip)
    'v5p-256': (dict(topology_name='v5:4x4x8', num_slices=1, **CUBE), 95),
    'v4-256': (dict(topology_name='v4:4x4x8', num_slices=1, **CUBE), 32),
    'v6e-256': (dict(topology_name='v6e:16x16', chip_config_name='default', wrap=(True, True, False)), 31),
    '2 x v5p-128': (dict(topology_name='v5:4x4x4', num_slices=2, **CUBE), 95),
    'v5p-8': (dict(topology_name='v5:2x2x1', chip_config_name='megacore', chips_per_host_bounds=(2, 2, 1),
                   num_slices=1), 95)}


@dataclasses.dataclass(frozen=True)
class Program:
  size: str
  loss: str
  pod: str
  mesh: tuple[int, int, int]  # data, fsdp, tensor
  reference: str = ''

  @property
  def name(self):
    return f'{self.size} {self.loss}' + f', reference {self.reference}' * bool(self.reference)


PROGRAMS = (
    Program('7b', 'dpo', 'v5p-8', (1, 4, 1), 'step'),
    Program('70b', 'dpo', 'v5p-256', (1, 16, 8), 'step'),
    Program('70b', 'dpo', 'v5p-256', (1, 16, 8), 'cached'),
    Program('70b', 'dpo', 'v4-256', (1, 16, 8), 'step'),
    Program('70b', 'dpo', 'v4-256', (1, 16, 8), 'cached'),
    Program('70b', 'sft', 'v6e-256', (1, 32, 8)),
    Program('70b', 'dpo', '2 x v5p-128', (2, 8, 8), 'step'))


def compile(program: Program, mesh, rows: int):
  """The step with `rows` rows in each part of (data, fsdp), each of one example of the greatest length, compiled."""
  c = configs.get('m2' if program.loss == 'dpo' else 'm1', program.size).train
  c = c.copy_and_resolve_references().unlock()
  c.reference = program.reference or 'step'
  config = dataclasses.replace(PRESETS[f'llama2-{program.size}'], dtype=c.dtype, dropout=c.dropout)
  half = c.max_length // 2  # of the tokens, prompt; the rest is response
  count = rows * mesh.size // mesh.shape['tensor']
  responses = ([1] * half,) * (1 + (program.loss == 'dpo'))
  examples = [Example(f'e{i}', [1] * half, responses) for i in range(count)]
  made = Batches(examples, count, 1, 0)
  if program.reference == 'cached':
    made.reference = {e.id: [0.0, 0.0] for e in examples}
  with jax.set_mesh(mesh):
    tx = train_state.optimizer(c, 100)
    state = train_state.abstract(config, tx, mesh)
    older = store.abstract_on(mesh, state.params, c.dtype) if program.reference == 'step' else {}
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, 'B' + 'T' * (x.ndim - 1)))
             for name, x in made.at(0).items()}
    model = llama.Llama(config, kernels.to_train('tpu', config, c.remat), c.remat)
    step = train_step.make(model, tx, c, state)
    lowered = step.lower(state, older, batch, jax.eval_shape(jax.random.key, 0))
    return lowered.compile(), state.params


def matrices(params) -> dict[tuple, float]:
  """{dimensions: share of a layer's weights} of its matrices, split over tensor alone: as gradients are before they are
  scattered. Dimensions are sorted, those of 1 left out, for the compiler turns and folds them."""
  sizes, total = {}, 0
  for x in jax.tree.leaves(params['layers']):
    tensor = [x.sharding.mesh.shape['tensor'] if axes == 'tensor' else 1 for axes in x.sharding.spec]
    dims = [size // parts for size, parts in zip(x.shape, tensor, strict=True)][1:]
    if len(dims) > 1:
      sizes[tuple(sorted(n for n in dims if n > 1))] = math.prod(dims)
      total += math.prod(dims)
  return {dims: size / total for dims, size in sizes.items()}


def collectives(text: str, weights: dict[tuple, float]) -> tuple[dict[str, int], dict[str, float]]:
  """How many of each kind a program has; and which of the weights it all-reduces whole inside a loop, with its share.

  A fusion named all-reduce-scatter is the TPU's reduce-scatter: its all-reduce never leaves the chip whole.
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
  how, memory = PODS[program.pod]
  topology = topologies.get_topology_desc(platform='tpu', **how)
  mesh = sharding.make_mesh(*program.mesh, topology.devices)
  started = time.perf_counter()
  try:
    compiled, params = compile(program, mesh, rows)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return dict(fits=False)
  seconds = time.perf_counter() - started
  used = compiled.memory_analysis()
  kinds, whole = collectives(compiled.as_text(), matrices(params))
  total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
  return dict(fits=total < memory * GIB, arguments=used.argument_size_in_bytes / GIB,
              temporaries=used.temp_size_in_bytes / GIB, total=total / GIB, seconds=seconds, kinds=kinds, whole=whole)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--largest', action='store_true')
  flags = parser.parse_args()
  print('| program | pod | data, fsdp, tensor | rows | state and reference, GiB | temporaries | total of | '
        'collectives | seconds |\n|---|---|---|---|---|---|---|---|---|', flush=True)
  bad, small = [], []
  for program in PROGRAMS:
    if flags.only not in f'{program.name} {program.pod}':
      continue
    rows = 1
    while True:
      found = measure(program, rows)
      where = f'{program.name} | {program.pod} | {", ".join(map(str, program.mesh))} | {rows}'
      if not found['fits']:
        print(f'| {where} | does not fit | | | | |', flush=True)
        bad += [f'{where} does not fit'] * (rows == 1)
        break
      for what, share in found['whole'].items():
        what = f'{where}: {what}, {share:.1%} of a layer'
        (bad if share > SMALL else small).append(what)
      kinds = ', '.join(f'{n} {kind}' for kind, n in sorted(found['kinds'].items()))
      print(f'| {where} | {found["arguments"]:.1f} | {found["temporaries"]:.1f} | {found["total"]:.1f} of '
            f'{PODS[program.pod][1]} | {kinds} | {found["seconds"]:.0f} |', flush=True)
      if not flags.largest:
        break
      rows *= 2
  for line in small:
    print(f'note: {line}')
  for line in bad:
    print(f'error: {line}', file=sys.stderr)
  sys.exit(bool(bad))


if __name__ == '__main__':
  main()
