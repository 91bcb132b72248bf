"""Memory of the 7B and 70B training steps, compiled ahead of time with the TPU compiler.

  python bench/scale.py                     # all training steps of bench/aot.py
  python bench/scale.py --only=7b           # programs whose name contains the text
  python bench/scale.py --largest           # also doubles the rows until the program does not fit
  python bench/scale.py --remat=full        # instead of what training chooses

No TPU is needed. Exits with 1 if a program does not fit, or if it all-reduces a whole weight in its
loop over the layers, where each chip needs only its own part.
"""
import argparse
import collections
import dataclasses
import math
import re
import sys
import time

import aot
import gpu
import jax

from srlm_jax import config as configs
from srlm_jax.checkpoint import store
from srlm_jax.models import llama

# Fraction of a layer's weights. XLA prefers to all-reduce smaller weights; these are only reported.
SMALL = 0.02
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


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


def measure(program: aot.Training | aot.Sampler, options: dict | None = None) -> dict:
  """-> whether the program fits, its memory in GiB per chip, compile time, collectives, attention.

  `options`: of the compiler, besides those of the package.
  """
  started = time.perf_counter()
  compiled = aot.compile(program, options)
  if compiled is None:
    return dict(fits=False)
  seconds = time.perf_counter() - started
  used = compiled.memory_analysis()
  mesh = aot.make_mesh(program)
  with jax.set_mesh(mesh):
    params = store.abstract_on(mesh, llama.abstract_params(program.model), 'float32')
  text = compiled.as_text()
  kinds, whole = collectives(text, matrices(params))
  total = aot.total_bytes(compiled) / aot.GIB
  return dict(fits=total < aot.PODS[program.pod][1], total=total, seconds=seconds,
              arguments=used.argument_size_in_bytes / aot.GIB,
              temporaries=used.temp_size_in_bytes / aot.GIB, kinds=kinds, whole=whole,
              attention=gpu.attention(text))


def line(program: aot.Training, found: dict) -> str:
  """-> a line of the table."""
  gib = [f'{found[name]:.1f}' for name in ('arguments', 'temporaries', 'total')]
  return (f'| {title(program)} | {" | ".join(gib)} of {aot.PODS[program.pod][1]} | '
          f'{counted(found["kinds"])} | {found["seconds"]:.0f} |')


def counted(kinds: dict[str, int]) -> str:
  """
  >>> counted({'all-reduce': 2, 'all-gather': 26})
  '26 all-gather, 2 all-reduce'
  """
  return ', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))


def title(program: aot.Training) -> str:
  """-> the first columns of the table."""
  return f'{aot.title(program)} | {program.config.remat}'


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--largest', action='store_true')
  parser.add_argument('--remat', default='', choices=('', *configs.REMAT))
  flags = parser.parse_args()
  # Four times quicker, with nearly the same memory.
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  print('| program | pod | data, fsdp, tensor | rows | remat | state and reference, GiB | '
        'temporaries | total | collectives | seconds |\n' + '|---' * 10 + '|', flush=True)
  notes, errors = [], []
  for program in aot.TRAINING + aot.RECIPES:
    if flags.only not in f'{program.name} {program.pod}':
      continue
    program = dataclasses.replace(program, remat=flags.remat)
    while True:
      found = measure(program)
      if not found['fits']:
        print(f'| {title(program)} | does not fit | | | | |', flush=True)
        if program.rows == 1:
          errors.append(f'{title(program)} does not fit')
        break
      for what, fraction in found['whole'].items():
        sentence = f'{title(program)}: {what}, {fraction:.1%} of a layer'
        (errors if fraction > SMALL else notes).append(sentence)
      print(line(program, found), flush=True)
      if not flags.largest:
        break
      program = dataclasses.replace(program, rows=2 * program.rows)
  for sentence in notes:
    print(f'note: {sentence}')
  for sentence in errors:
    print(f'error: {sentence}', file=sys.stderr)
  sys.exit(bool(errors))


if __name__ == '__main__':
  main()
