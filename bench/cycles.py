"""Time of the 70B training steps by the TPU compiler's estimates; nothing is executed.

  python bench/cycles.py                     # all programs of bench/scale.py
  python bench/cycles.py --only='70b dpo, reference step | v5p'   # whose name contains the text
  python bench/cycles.py --remat=full --plain --rows=4

--remat: what the backward pass recomputes, instead of what the config says. --plain: without the
compiler options of srlm_jax/compiler.py. --rows: rows per shard of (data, fsdp).

First a calibration: what the compiler expects of a plain matrix product and of a stream. Then for
each program its time by the three estimates of bench/estimate.py, by kind, and its most expensive
instructions. MFU: FLOPs that the step needs, without recomputation, per chip and second, as a
fraction of the peak.
"""
import argparse
import dataclasses
import functools
import pathlib
import tempfile
import time

import estimate
import hlo
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import scale

from srlm_jax import compiler, config as configs
from srlm_jax.models.config import PRESETS

TOP = 15
HEADER = '''
| program | pod | data, fsdp, tensor | rows | remat | options | GiB | cycles, ms | middle, ms \
| floor, ms | MFU, % | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|'''


def chip_name(pod: str) -> str:
  """
  >>> chip_name('2 x v5p-128')
  'v5p'
  """
  return pod.split()[-1].partition('-')[0]


@functools.cache
def calibrate(pod: str) -> dict[str, float]:
  """-> the shares of the peak that the compiler expects of a matrix product and of a stream."""
  chip = estimate.CHIPS[chip_name(pod)]
  device = scale.make_mesh(next(p for p in scale.PROGRAMS if p.pod == pod)).devices.flat[0]
  place = SingleDeviceSharding(device)

  def share(function, *shapes):
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    text = jax.jit(function).lower(*given).compile().as_text()
    seconds = estimate.estimate(hlo.parse(text), chip, 1, {}).seconds
    return seconds['floor'] / seconds['cycles']
  size, stream = (8192, 8192), (2**28,)
  return dict(product=share(jnp.matmul, (size, jnp.bfloat16), (size, jnp.bfloat16)),
              stream=share(jnp.add, (stream, jnp.float32), (stream, jnp.float32)))


def needed_flops(program: scale.Program, rows: int) -> int:
  """-> FLOPs that a step needs, without recomputation.

  A forward pass multiplies every token with the weights of the layers, every target with the head,
  and every query with the keys that it sees. Training takes three times this, a reference once.
  """
  c, m = scale.train_config(program), PRESETS[f'llama2-{program.size}']
  data, fsdp, _ = program.mesh
  responses = 2 if program.loss == 'dpo' else 1
  half = c.max_length // 2  # tokens of the prompt, and of each response
  heads = m.K * m.G * m.H
  layer = 2 * m.D * heads + 2 * m.D * m.K * m.H + 3 * m.D * m.F
  seen = half**2 // 2 + responses * (half**2 + half**2 // 2)
  forward = 2 * (layer * m.layers * half * (1 + responses) + m.D * m.V * half * responses)
  forward += 4 * heads * m.layers * seen
  return forward * rows * data * fsdp * (4 if program.reference == 'step' else 3)


def measure(program: scale.Program, rows: int) -> tuple[estimate.Estimate, float, float] | None:
  """-> the estimate of a program, its GiB per chip and the seconds of its compilation.

  None if the program does not fit.
  """
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    found = scale.compile(program, scale.make_mesh(program), rows,
                          dict(xla_dump_to=folder, xla_dump_latency_hiding_schedule=True))
    if found is None:
      return None
    schedule = (pathlib.Path(folder) / 'jit_step.schedule.txt').read_text()
  seconds = time.perf_counter() - started
  compiled, _ = found
  done = estimate.estimate(
      hlo.parse(compiled.as_text()), estimate.CHIPS[chip_name(program.pod)],
      calibrate(program.pod)['stream'], hlo.collective_cycles(schedule))
  return done, scale.total_bytes(compiled) / scale.GIB, seconds


def line(program: scale.Program, rows: int, options: str, found) -> str:
  """-> a line of the table; MFU by cycles, middle and floor."""
  remat = scale.train_config(program).remat
  first = f'| {scale.title(program, rows)} | {remat} | {options} |'
  if found is None:
    return f'{first} does not fit | | | | | |'
  done, gib, seconds = found
  chips = scale.make_mesh(program).size
  peak = estimate.CHIPS[chip_name(program.pod)].flops
  flops = needed_flops(program, rows) / chips / peak
  order = ('cycles', 'middle', 'floor')
  times = ' | '.join(f'{done.seconds[way] * 1e3:,.0f}' for way in order)
  shares = ' / '.join(f'{flops / done.seconds[way]:.1%}'.rstrip('%') for way in order)
  return f'{first} {gib:.1f} | {times} | {shares} | {seconds:.0f} |'


def details(done: estimate.Estimate) -> str:
  """-> the time by kind, and the most expensive instructions."""
  def columns(row):
    return ' '.join(f'{row.seconds[way] * 1e3:8.1f}' for way in ('cycles', 'middle', 'floor'))
  lines = [f'{"kind":12} {"cycles":>8} {"middle":>8} {"floor":>8} ms   TFLOP per chip, GB of HBM']
  for kind, row in done.kinds().items():
    lines.append(f'{kind:12} {columns(row)}      {row.flops / 1e12:6.1f} {row.bytes / 1e9:8.1f}')
  lines.append(f'collectives without a figure of the scheduler: {done.guessed}')
  lines.append(f'the {TOP} most expensive instructions, and how often they run')
  for name, row in done.top(TOP):
    lines.append(f'{row.kind:12} {columns(row)} {row.times:6}  {name[:40]:40} {row.source[-60:]}')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  parser.add_argument('--remat', default='', choices=('', *configs.REMAT))
  parser.add_argument('--plain', action='store_true')
  parser.add_argument('--rows', type=int, default=1)
  flags = parser.parse_args()
  # At the effort of bench/scale.py some estimates are far too high.
  jax.config.update('jax_exec_time_optimization_effort', 0.0)
  if flags.plain:
    compiler.TRAINING.pop('tpu')
  programs = [dataclasses.replace(p, remat=flags.remat) for p in scale.PROGRAMS
              if flags.only in f'{p.name} | {p.pod}']
  for pod in dict.fromkeys(p.pod for p in programs):
    found = calibrate(pod)
    print(f'{chip_name(pod)}: the compiler expects {found["product"]:.0%} of the peak of a bf16 '
          f'product of 8192 x 8192 x 8192, {found["stream"]:.0%} of the bandwidth of a float32 sum')
  texts = []
  print(HEADER, flush=True)
  for program in programs:
    found = measure(program, flags.rows)
    print(line(program, flags.rows, 'no' if flags.plain else 'yes', found), flush=True)
    if found:
      texts.append(f'\n{scale.title(program, flags.rows)}\n{details(found[0])}')
  print('\n'.join(texts))


if __name__ == '__main__':
  main()
