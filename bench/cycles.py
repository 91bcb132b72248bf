"""Time of the 7B and 70B programs by the TPU compiler's estimates; nothing is executed.

  python bench/cycles.py                     # all programs of bench/aot.py
  python bench/cycles.py --only='70b dpo, reference step | v5p'   # whose name contains the text
  python bench/cycles.py --meshes            # two training steps with other meshes
  python bench/cycles.py --only='70b sft' --rows=4 --remat=none --plain

Of training steps: --rows multiplies their rows; --remat is what the backward pass
recomputes, instead of what training chooses; --plain leaves out the compiler options of
srlm_jax/compiler.py.

First a calibration: what the compiler expects of a plain matrix product and of a stream. Then for
each program its time by the three estimates of bench/estimate.py, by kind, and its most expensive
instructions. The share is the time that the chip needs at its peak as a fraction of the estimate:
for training and prefill the MFU, of the FLOPs that the program needs, without recomputation; for
decode, of the bytes of weights and of keys and values that a step reads.
"""
import argparse
import dataclasses
import functools
import pathlib
import tempfile
import time

import aot
import estimate
import hlo
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from srlm_jax import compiler, config as configs, pods
from srlm_jax.models import costs

TOP = 15
ORDER = 'cycles', 'middle', 'floor'
LENGTH = 2048  # tokens that each slot of a decode holds, behind the shared prefix
# A draw of a token is repeated until all slots accept one, each with a probability of at least 0.9:
# 64 slots rarely need more than three.
DRAWS = 3
HEADER = '''
| program | pod | data, fsdp, tensor | rows | remat | options | GiB | cycles, ms | middle, ms \
| floor, ms | share, % | of | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|'''
PARTS = (f'\nms of the middle estimate\n\n| program | pod | data, fsdp, tensor | rows | '
         f'{" | ".join(estimate.KINDS)} |\n{"|---" * (4 + len(estimate.KINDS))}|')


def chip_name(pod: str) -> str:
  """
  >>> chip_name('2 x v5p-128')
  'v5p'
  """
  return pod.split()[-1].partition('-')[0]


@functools.cache
def calibrate(chip: str) -> dict[str, float]:
  """-> the shares of the peak that the compiler expects of a matrix product and of a stream."""
  program = next(p for p in aot.TRAINING + aot.SAMPLING if chip_name(p.pod) == chip)
  place = SingleDeviceSharding(aot.make_mesh(program).devices.flat[0])

  def share(function, *shapes):
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    text = jax.jit(function).lower(*given).compile().as_text()
    seconds = estimate.estimate(hlo.parse(text), pods.CHIPS[chip], 1, {}).seconds
    return seconds['floor'] / seconds['cycles']
  size, stream = (8192, 8192), (2**28,)
  return dict(product=share(jnp.matmul, (size, jnp.bfloat16), (size, jnp.bfloat16)),
              stream=share(jnp.add, (stream, jnp.float32), (stream, jnp.float32)))


def needed_flops(program: aot.Training | aot.Sampler) -> float:
  """-> FLOPs that a training step or a prefill needs, without recomputation."""
  m = program.model
  if isinstance(program, aot.Sampler):
    T = program.width
    tokens = costs.Tokens(T, T * aot.PREFIX + T**2 / 2, 0)
    return costs.forward_flops(m, tokens) * program.rows
  half = program.config.max_length // 2  # tokens of the prompt, and of each response
  example = costs.example(half, half, 2 if program.loss == 'dpo' else 1)
  data, fsdp, _ = program.mesh
  passes = 4 if program.reference == 'step' else 3
  return costs.forward_flops(m, example) * program.rows * data * fsdp * passes


def needed_bytes(program: aot.Sampler) -> float:
  """-> bytes that a step of decode reads."""
  return costs.decode_bytes(program.model, program.bits == 8, program.rows, LENGTH, aot.PREFIX)


def least_seconds(program: aot.Training | aot.Sampler) -> float:
  """-> the seconds that the chips of a program need at their peak, per step of a decode."""
  chip, (data, fsdp, tensor) = pods.CHIPS[chip_name(program.pod)], program.mesh
  chips = data * fsdp * tensor
  if decodes(program):
    return needed_bytes(program) / chips / chip.bandwidth
  return needed_flops(program) / chips / chip.flops


def decodes(program: aot.Training | aot.Sampler) -> bool:
  return isinstance(program, aot.Sampler) and program.kind == 'decode'


def measure(program: aot.Training | aot.Sampler) -> tuple[estimate.Estimate, float, float] | None:
  """-> the estimate of a program, its GiB per chip and the seconds of its compilation.

  Of a decode, the estimate of one step. None if the program does not fit.
  """
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    compiled = aot.compile(program, dict(xla_dump_to=folder,
                                         xla_dump_latency_hiding_schedule=True))
    if compiled is None:
      return None
    schedule = ''.join(p.read_text() for p in pathlib.Path(folder).glob('*.schedule.txt'))
  seconds = time.perf_counter() - started
  chip = chip_name(program.pod)
  given = hlo.parse(compiled.as_text()), pods.CHIPS[chip], calibrate(chip)['stream']
  given += hlo.collective_cycles(schedule),
  if isinstance(program, aot.Sampler):
    runs = (aot.STEPS, DRAWS) if decodes(program) else (program.rows,)
    done = estimate.estimate(*given, estimate.Sampled(LENGTH, aot.PREFIX, runs))
    done = done.per(aot.STEPS) if decodes(program) else done
  else:
    done = estimate.estimate(*given)
  return done, aot.total_bytes(compiled) / aot.GIB, seconds


def line(program: aot.Training | aot.Sampler, options: str, found) -> str:
  """-> a line of the table; times and shares by cycles, middle and floor."""
  remat = program.config.remat if isinstance(program, aot.Training) else ''
  first = f'| {aot.title(program)} | {remat} | {options} |'
  if found is None:
    return f'{first} does not fit | | | | | | |'
  done, gib, seconds = found
  least = least_seconds(program)
  times = ' | '.join(milliseconds(done.seconds[way]) for way in ORDER)
  shares = ' / '.join(f'{least / done.seconds[way] * 100:.1f}' for way in ORDER)
  return (f'{first} {gib:.1f} | {times} | {shares} | '
          f'{"bandwidth" if decodes(program) else "FLOPs"} | {seconds:.0f} |')


def milliseconds(seconds: float) -> str:
  """
  >>> milliseconds(1.2345), milliseconds(0.0123)
  ('1,234', '12.3')
  """
  return f'{seconds * 1e3:,.0f}' if seconds >= 0.1 else f'{seconds * 1e3:.1f}'


def parts(program: aot.Training | aot.Sampler, done: estimate.Estimate) -> str:
  """-> a line of the table of middle estimates by kind, in ms."""
  kinds = done.kinds()
  found = [kinds[kind].seconds['middle'] if kind in kinds else 0 for kind in estimate.KINDS]
  return f'| {aot.title(program)} | ' + ' | '.join(map(milliseconds, found)) + ' |'


def details(done: estimate.Estimate) -> str:
  """-> the time by kind, and the most expensive instructions."""
  def columns(row):
    return ' '.join(f'{row.seconds[way] * 1e3:9.2f}' for way in ORDER)
  lines = [f'{"kind":12} {"cycles":>9} {"middle":>9} {"floor":>9} ms   TFLOP per chip, GB of HBM']
  for kind, row in done.kinds().items():
    lines.append(f'{kind:12} {columns(row)}      {row.flops / 1e12:6.1f} {row.bytes / 1e9:8.1f}')
  lines.append(f'collectives without a figure of the scheduler: {done.guessed}')
  if done.sent:
    lines.append(f'to other slices, not in the estimate: {done.sent / 1e9:.1f} GB per chip')
  lines.append(f'the {TOP} most expensive instructions, and how often they run')
  for name, row in done.top(TOP):
    lines.append(f'{row.kind:12} {columns(row)} {row.times:6g}  {name[:40]:40} {row.source[-60:]}')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--meshes', action='store_true')
  parser.add_argument('--rows', type=int, default=1)
  parser.add_argument('--remat', default='', choices=('', *configs.REMAT))
  parser.add_argument('--plain', action='store_true')
  flags = parser.parse_args()
  # At the effort of bench/scale.py some estimates are far too high.
  jax.config.update('jax_exec_time_optimization_effort', 0.0)
  if flags.plain:
    compiler.OPTIONS.pop('tpu')
  programs = aot.MESHES if flags.meshes else aot.TRAINING + aot.SAMPLING
  programs = [
      dataclasses.replace(p, rows=p.rows * flags.rows, remat=flags.remat)
      if isinstance(p, aot.Training) else p
      for p in programs if flags.only in f'{p.name} | {p.pod}']
  for chip in dict.fromkeys(chip_name(p.pod) for p in programs):
    found = calibrate(chip)
    print(f'{chip}: the compiler expects {found["product"]:.0%} of the peak of a bf16 product of '
          f'8192 x 8192 x 8192, {found["stream"]:.0%} of the bandwidth of a float32 sum')
  tables, texts = [], []
  print(HEADER, flush=True)
  for program in programs:
    found = measure(program)
    print(line(program, 'no' if flags.plain else 'yes', found), flush=True)
    if found:
      tables.append(parts(program, found[0]))
      texts.append(f'\n{aot.title(program)}\n{details(found[0])}')
  print(PARTS, *tables, *texts, sep='\n')


if __name__ == '__main__':
  main()
