"""Memory of the 7B and 70B programs on H100 and H200 GPUs, compiled without a GPU.

  python bench/scale_gpu.py                     # all programs for GPUs of bench/aot.py
  python bench/scale_gpu.py --only='70b dpo'    # whose name or GPUs contain the text

`make aot-gpu` runs it in an environment with the CUDA plugin of JAX. Each line has the memory of
one GPU, by XLA and for cuDNN's workspace by formula, and the attention kernels that the program
calls. For decode, ptxas assembles the Triton kernel once more and reports it.

Exits with 1 if a program does not fit that docs/scale.md lists as fitting, if attention is not the
kernel that the model chooses on GPUs, or if the loop over the layers all-reduces a whole weight.
"""
import argparse
import pathlib
import sys
import tempfile

import aot
import gpu
import scale

DECODE = 'gpu_decode'
HEADER = '''
| program | GPUs | data, fsdp, tensor | rows | remat | arguments, GiB | temporaries | cuDNN \
| total | attention | collectives | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|'''


def measure(program: aot.Training | aot.Sampler) -> tuple[dict, gpu.Kernel | None]:
  """-> what `scale.measure` finds, with cuDNN's workspace, and of a decode the kernel by ptxas."""
  with tempfile.TemporaryDirectory() as folder:
    found = scale.measure(program, dict(xla_dump_to=folder))
    decodes = 'Triton' in found['attention']
    kernel = gpu.assemble(pathlib.Path(folder), DECODE) if decodes else None
  extra = workspace(program) / aot.GIB
  total = found['total'] + extra
  return dict(found, workspace=extra, total=total, fits=total < aot.PODS[program.pod][1]), kernel


def workspace(program: aot.Training | aot.Sampler) -> int:
  """-> bytes of one GPU that cuDNN takes and XLA does not count."""
  if isinstance(program, aot.Sampler):
    return 0
  c, tensor = program.model, program.mesh[2]
  return gpu.workspace(program.rows, program.width, c.K * c.G // tensor, c.K // tensor, c.H)


def problems(program: aot.Training | aot.Sampler, found: dict, fits: bool) -> list[str]:
  """-> one sentence for each thing that is wrong. `fits`: whether docs/scale.md says so."""
  name, gib = aot.title(program), aot.PODS[program.pod][1]
  wrong = []
  if fits != found['fits']:
    wrong.append(f'{name} needs {found["total"]:.1f} GiB of {gib}, but docs/scale.md says that it '
                 f'{"fits" if fits else "does not fit"}')
  kernel = 'Triton' if isinstance(program, aot.Sampler) and program.kind == 'decode' else 'cuDNN'
  if [*found['attention']] != [kernel]:
    wrong.append(f'{name} does not call the attention of {kernel} alone, but '
                 f'{found["attention"] or "none"}')
  return wrong + [f'{name}: {what}, {fraction:.1%} of a layer'
                  for what, fraction in found['whole'].items() if fraction > scale.SMALL]


def line(program: aot.Training | aot.Sampler, found: dict) -> str:
  """-> a line of the table."""
  remat = program.config.remat if isinstance(program, aot.Training) else ''
  gib = [f'{found[name]:.1f}' for name in ('arguments', 'temporaries', 'workspace', 'total')]
  calls = ', '.join(f'{count} x {name}' for name, count in found['attention'].items())
  return (f'| {aot.title(program)} | {remat} | {" | ".join(gib)} of {aot.PODS[program.pod][1]} | '
          f'{calls} | {scale.counted(found["kinds"])} | {found["seconds"]:.0f} |')


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='')
  flags = parser.parse_args()
  print(f'Compiled for GPUs, and not executed: {gpu.versions()}')
  errors, kernels = [], []
  for fits, programs in ((True, aot.GPU_TRAINING + aot.GPU_SAMPLING), (False, aot.GPU_TOO_LARGE)):
    programs = [p for p in programs if flags.only in f'{p.name} | {p.pod}']
    if programs:
      print(f'\nprograms that {"fit" if fits else "do not fit"}\n{HEADER}', flush=True)
    for program in programs:
      found, kernel = measure(program)
      print(line(program, found), flush=True)
      errors += problems(program, found, fits)
      if kernel:
        kernels.append(f'{aot.title(program)} | {DECODE}: {kernel.registers} registers per thread, '
                       f'{kernel.spilled} bytes spilled, {kernel.size:,} bytes of machine code')
  print(*['\nptxas:', *kernels] if kernels else [], sep='\n')
  for sentence in errors:
    print(f'error: {sentence}', file=sys.stderr)
  sys.exit(bool(errors))


if __name__ == '__main__':
  main()
