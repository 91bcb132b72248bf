"""Speed of the sampling engine, compared with transformers and with the roofline.

`python bench/sample.py` makes a random Llama and runs it in our engine and in transformers'
`generate`, with the same weights, on all cores (or a larger one on a GPU). It measures:

  peer    tokens per second of both, on two workloads: `respond` (prompts of varied length, 4
          samples each) and `judge` (a common rubric, 3 samples per request); each side uses the
          best of several numbers of rows
  bound   the fraction of the tokens per second that memory bandwidth and compute allow; both are
          measured in the same run
  share   the speed-up of the judge by prefilling the rubric and each request's prompt once
  refill  the speed-up by slot refill, on 1,000 requests of varied length

A random model does not emit eos, so every sample has a fixed length, log-normal with sigma 0.8.
Only these tokens count; in transformers a stopping criterion ends the rows. Runs alternate. Numbers
are medians of three rounds; refill has one round. The output is a table and a line of JSON.
`--json=PATH` also writes the JSON to a file. `--quick` runs every path on tiny inputs.
"""
import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch shares the GPU's memory

import jax
import roofline
import timing
import torch
import transformers
from workloads import (
  CPU,
  CPU_JUDGE,
  CPU_RESPOND,
  hf_tensors,
  judge,
  Kind,
  respond,
  run,
  TEMPERATURE,
  TOP_P,
)

from srlm_jax import sharding
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Request, Sampling

SAME = 24  # greedy tokens on which both must agree


@dataclasses.dataclass(frozen=True)
class Plan:
  """The settings for one kind of machine."""
  config: Config
  rows: tuple[int, ...]  # numbers of rows to try
  steps: int             # tokens per call of the engine
  rounds: int
  respond: Kind
  judge: Kind
  small: Config          # model of the refill measurement
  trace: Kind | None     # workload of the refill measurement
  slots: int = 20        # of the trace; 50 requests per slot make the last few negligible
  trace_steps: int = 2


SMALL = Config(  # 8 query heads per key/value head, as 70B
    D=256, F=768, K=1, G=8, H=32, V=8000, layers=8, context=2048)
TINY = Config(D=64, F=128, K=2, G=2, H=16, V=512, layers=2, context=2048)
PLANS = dict(
    # The trace's cap is 2,048 / 4, and its mean a ninth of the cap.
    cpu=Plan(CPU, (8, 16, 32), 4, 3, CPU_RESPOND, CPU_JUDGE, SMALL, Kind(1000, 0, 0, 16, 41, 512)),
    gpu=Plan(Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22, context=2048,
                    dtype='bfloat16'),
             (64, 256), 8, 3, Kind(256, 128, 0, 100, 200, 1024), Kind(32, 128, 350, 250, 80, 256),
             SMALL, None),
    quick=Plan(TINY, (4, 8), 4, 1, Kind(3, 2, 0, 20, 5, 12), Kind(1, 2, 40, 20, 4, 8), TINY,
               Kind(24, 0, 0, 8, 6, 24), 4))


class Peer:
  """LlamaForCausalLM of transformers, with our weights."""

  def __init__(self, config: Config, params, device: str):
    tensors = {name: torch.from_numpy(tensor)
               for name, tensor in hf_tensors(config, params).items()}
    shape = transformers.LlamaConfig(**model_config.to_hf(config), attn_implementation='sdpa',
                                     bos_token_id=None, eos_token_id=None)
    self.model = transformers.LlamaForCausalLM(shape)
    self.model.load_state_dict(tensors)
    self.model.to(device, getattr(torch, config.dtype)).eval()

  def generate(self, requests: Sequence[Request], sampling: Sampling, rows: int) -> list[list[int]]:
    """-> the ids of every sample, in order; runs left-padded batches of at most `rows` samples."""
    size, made = max(rows // requests[0].n, 1), []
    for batch in (requests[i:i + size] for i in range(0, len(requests), size)):
      width = max(len(r.ids) for r in batch)
      ids = [[0] * (width - len(r.ids)) + list(r.ids) for r in batch]
      mask = [[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch]
      lengths = [length for r in batch for length in r.lengths]
      chance = dict(do_sample=False)
      if sampling.temperature:
        chance = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p,
                      top_k=0)
      with torch.inference_mode():
        out = self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            num_return_sequences=batch[0].n, max_new_tokens=max(lengths), pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([Ends(width, lengths)]), **chance)
      made += [row[:length] for row, length in zip(out[:, width:].tolist(), lengths, strict=True)]
    return made


class Ends(transformers.StoppingCriteria):
  """Ends every row at its own length."""

  def __init__(self, width: int, lengths: Sequence[int]):
    self.ends = width + torch.tensor(lengths)

  def __call__(self, input_ids, scores, **kwargs):
    return (input_ids.shape[1] >= self.ends).to(input_ids.device)


class Work:
  """Requests, and the engines that run them."""

  def __init__(self, plan: Plan, config: Config, params, mesh, requests: Sequence[Request],
               cap: int):
    self.requests, self.sampling = requests, Sampling(TEMPERATURE, TOP_P, cap)
    self.tokens = sum(sum(r.lengths) for r in requests)
    size = cap + max(len(r.ids) for r in requests)
    self.make = functools.partial(engines.Engine, llama.Llama(config), params, mesh, (), 0, 'bench',
                                  size=size, steps=plan.steps)

  def engine(self, slots: int, requests: Sequence[Request], **how) -> engines.Engine:
    """-> an engine that has seen every prompt, so all its programs are compiled."""
    engine = self.make(slots=slots, **how)
    run(engine, [dataclasses.replace(r, lengths=[1] * r.n) for r in requests], self.sampling)
    engine.reset_work()
    return engine


def timed(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
  """-> the median seconds of each side."""
  return timing.medians({name: functools.partial(timing.seconds, side)
                           for name, side in sides.items()}, rounds)


def check(work: Work, peer: Peer, config: Config):
  """Asserts that both generate the same greedy tokens for some prompts.

  bfloat16 logits tie often, so there 3 of 4 first tokens must be equal.
  """
  greedy = Sampling(0.0, 1.0, min(SAME, work.sampling.max_tokens))
  some = [dataclasses.replace(r, n=1, lengths=[greedy.max_tokens]) for r in work.requests[:4]]
  ours, theirs = run(work.make(slots=4), some, greedy), peer.generate(some, greedy, 4)
  if config.dtype == 'float32':
    assert ours == theirs, f'ours {ours}, transformers {theirs}'
  else:
    same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    assert same >= 3, f'{same} of {len(some)} first tokens are the same'


def compare(name: str, kind: Kind, work: Work, plan: Plan, peer: Peer, peak) -> dict:
  """-> the result for one workload: ours, transformers and, for the judge, ours without sharing."""
  part = work.requests[:kind.part]
  ours, theirs = {}, {}
  for rows in plan.rows:
    engine = work.engine(rows, part)
    ours[rows] = timing.seconds(lambda engine=engine: run(engine, part, work.sampling))
    theirs[rows] = timing.seconds(lambda rows=rows: peer.generate(part, work.sampling, rows))
  slots, rows = (min(found, key=found.get) for found in (ours, theirs))
  engine = work.engine(slots, work.requests)
  sides = dict(ours=lambda: run(engine, work.requests, work.sampling),
               transformers=lambda: peer.generate(work.requests, work.sampling, rows))
  if kind.rubric:
    alone = work.engine(slots, work.requests, share=False)
    sides['unshared'] = lambda: run(alone, work.requests, work.sampling)
  taken = timed(sides, plan.rounds)
  least = roofline.bound(plan.config, work.requests, slots, *peak)
  found = dict(work=name, samples=sum(r.n for r in work.requests), tokens=work.tokens, slots=slots,
               peer_rows=rows, seconds=taken, tried=dict(ours=ours, transformers=theirs),
               tokens_per_second={side: work.tokens / s for side, s in taken.items()},
               ratio=taken['transformers'] / taken['ours'], of_bound=least / taken['ours'],
               slot_utilization=engine.work.slot_utilization)
  if kind.rubric:
    found |= dict(share_speed=taken['unshared'] / taken['ours'],
                  computed=engine.work.prefilled / engine.work.unshared_prompt_tokens)
  return found


def peers(plan: Plan, mesh, device: str, quick: bool) -> dict:
  """Compares both workloads with transformers and the roofline, and prints the table."""
  config = plan.config
  params = make(config, mesh)
  peer = Peer(config, params, device)
  peak = roofline.peaks(config, device, quick)
  print(f'{peak[0] / 1e9:.0f} GB/s, {peak[1] / 1e9:,.0f} GFLOP/s; a Llama with '
        f'{llama.param_count(config) / 1e6:,.1f}M parameters, {config.dtype}', flush=True)
  print(f'{"":8} {"samples":>8} {"tokens":>8} {"ours/s":>8} {"slots":>6} {"peer/s":>9} {"rows":>5} '
        f'{"ratio":>6} {"of bound":>9}')
  rows = []
  for kind, requests in ((plan.respond, respond(plan.respond, config.V)),
                         (plan.judge, judge(plan.judge, config.V))):
    work = Work(plan, config, params, mesh, requests, kind.cap)
    check(work, peer, config)
    r = compare('judge' if kind.rubric else 'respond', kind, work, plan, peer, peak)
    rate = r['tokens_per_second']
    print(f'{r["work"]:8} {r["samples"]:8,} {r["tokens"]:8,} {rate["ours"]:8,.0f} {r["slots"]:6} '
          f'{rate["transformers"]:9,.0f} {r["peer_rows"]:5} {r["ratio"]:5.2f}x '
          f'{r["of_bound"]:8.0%}', flush=True)
    rows.append(r)
  print(f'share: the judge prefills {r["computed"]:.2f} of its prompt tokens, and is '
        f'{r["share_speed"]:.2f}x as fast')
  return dict(bytes_per_second=peak[0], flops_per_second=peak[1],
              parameters=llama.param_count(config), rows=rows)


def refill(plan: Plan, mesh) -> dict:
  """-> the result on the trace, with and without slot refill."""
  config, kind = plan.small, plan.trace
  params = make(config, mesh)
  work = Work(dataclasses.replace(plan, steps=plan.trace_steps), config, params, mesh,
              respond(kind, config.V, 1), kind.cap)
  pair = {name: work.engine(plan.slots, work.requests, refill=name == 'refill')
          for name in ('refill', 'static')}
  taken = timed({name: functools.partial(run, engine, work.requests, work.sampling)
                 for name, engine in pair.items()}, 1)
  return dict(requests=kind.count, tokens=work.tokens, cap=kind.cap, slots=plan.slots,
              seconds=taken,
              slot_utilization={name: engine.work.slot_utilization for name,
                                engine in pair.items()},
              ratio=taken['static'] / taken['refill'])


def make(config: Config, mesh):
  """-> random parameters in the config's dtype."""
  def init(key):
    return jax.tree.map(lambda x: x.astype(config.dtype), llama.init_params(config, key))
  with jax.set_mesh(mesh):
    return jax.jit(init)(jax.random.key(0))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', help='also writes the JSON to this file')
  parser.add_argument('--refill', action='store_true', help='runs only the refill measurement')
  parser.add_argument('--quick', action='store_true', help='runs every path on tiny inputs')
  f = parser.parse_args()
  began = time.perf_counter()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  torch.set_num_threads(cores)
  transformers.logging.set_verbosity_error()
  on = jax.devices()[0]
  device = 'cuda' if on.platform == 'gpu' else 'cpu'
  plan = PLANS['quick' if f.quick else on.platform]
  mesh = sharding.make_mesh(1, 1, 1, [on])
  found = dict(machine=roofline.name(cores) if device == 'cpu' else on.device_kind)
  print(found['machine'], flush=True)
  if not f.refill:
    found |= peers(plan, mesh, device, f.quick)
  if plan.trace:
    r = found['refill'] = refill(plan, mesh)
    utilization = r['slot_utilization']
    print(f'refill: {r["requests"]:,} requests, {r["slots"]} slots: slot utilization '
          f'{utilization["refill"]:.2f} ({utilization["static"]:.2f} without refill), '
          f'{r["ratio"]:.2f}x as fast')
  found['minutes'] = (time.perf_counter() - began) / 60
  line = json.dumps(found)
  if f.json:
    pathlib.Path(f.json).write_text(line + '\n')
  print(line)


if __name__ == '__main__':
  main()
