"""The engine against transformers, against the machine, and without what makes it fast.

`python bench/sample.py` makes a random Llama, the same in our engine and in transformers' `generate`, and measures on
all cores (or on a GPU, a larger one):

  peer    tokens a second of both on two kinds of work, `respond` (ragged prompts, 4 samples each) and `judge` (a rubric
          before all, 3 samples each), every side with the best of some numbers of rows
  floor   the tokens a second that the memory and the arithmetic of this machine allow, both measured in the same run
  share   the judge with the rubric and a request's prompt computed for every sample anew
  refill  1,000 requests of ragged lengths, with new rows only when all have ended

A random model never ends by itself, so every sample has a length, log-normal with sigma 0.8; only those tokens count,
and transformers' rows end there by a stopping criterion. Sides take turns; numbers are medians of three rounds, but of
one for refill. It prints a table and a line of JSON; `--json=PATH` also writes it there, `--quick` runs everything on
next to nothing.
"""
import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # on a GPU torch wants memory too

from flax import traverse_util
import jax
import numpy as np
import roofline
import torch
import transformers

from srlm_jax import sharding
from srlm_jax.checkpoint import hf
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Request, Sampling

SIGMA = 0.8  # of the log of a length
TEMPERATURE, TOP_P = 0.7, 0.9
SAME = 24  # greedy tokens that both must agree on


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of work: how much of it, and in tokens the medians of its lengths."""
  count: int  # prompts
  part: int   # requests on which numbers of rows are tried
  rubric: int
  prompt: int
  median: int  # of what is generated
  cap: int     # of what is generated


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that depends on the machine."""
  config: Config
  rows: tuple[int, ...]  # to try
  steps: int  # tokens a call of the engine
  rounds: int
  respond: Kind
  judge: Kind
  small: Config
  trace: Kind | None
  slots: int = 20  # of the trace: 1,000 requests are 50 for each, so that the last ones to end matter little
  trace_steps: int = 2


SMALL = Config(D=256, F=768, K=1, G=8, H=32, V=8000, layers=8, context=2048)  # heads grouped as those of 70B
TINY = Config(D=64, F=128, K=2, G=2, H=16, V=512, layers=2, context=2048)
PLANS = dict(
    # Of 60M parameters; lengths are a quarter of a real run's. The trace's cap is 2,048 by 4, its mean a ninth of that.
    cpu=Plan(Config(D=512, F=1376, K=8, G=1, H=64, V=32000, layers=8, context=2048), (8, 16, 32), 4, 3,
             Kind(16, 12, 0, 100, 50, 256), Kind(4, 8, 350, 250, 40, 128), SMALL, Kind(1000, 0, 0, 16, 41, 512)),
    gpu=Plan(Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22, context=2048, dtype='bfloat16'), (64, 256), 8,
             3, Kind(256, 128, 0, 100, 200, 1024), Kind(32, 128, 350, 250, 80, 256), SMALL, None),
    quick=Plan(TINY, (4, 8), 4, 1, Kind(3, 2, 0, 20, 5, 12), Kind(1, 2, 40, 20, 4, 8), TINY, Kind(24, 0, 0, 8, 6, 24),
               4))


class Peer:
  """transformers' LlamaForCausalLM with our weights."""

  def __init__(self, config: Config, params, device: str):
    ours, tensors = traverse_util.flatten_dict(params, sep='.'), {}
    for leaf in hf.leaves(config):
      array = np.asarray(ours[leaf.name])
      for layer, name in enumerate(leaf.tensors):
        tensor = np.empty(leaf.hf_shape, np.float32)
        leaf.ours(tensor)[...] = array[layer] if leaf.stacked else array
        tensors[name] = torch.from_numpy(tensor)
    shape = transformers.LlamaConfig(**model_config.to_hf(config), attn_implementation='sdpa', bos_token_id=None,
                                     eos_token_id=None)
    self.model = transformers.LlamaForCausalLM(shape)
    self.model.load_state_dict(tensors)
    self.model.to(device, getattr(torch, config.dtype)).eval()

  def generate(self, requests: Sequence[Request], sampling: Sampling, rows: int) -> list[list[int]]:
    """Left-padded batches of at most `rows` samples, in order -> the ids of every sample."""
    size, made = max(rows // requests[0].n, 1), []
    for batch in (requests[i:i + size] for i in range(0, len(requests), size)):
      width = max(len(r.ids) for r in batch)
      ids = [[0] * (width - len(r.ids)) + list(r.ids) for r in batch]
      mask = [[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch]
      lengths = [length for r in batch for length in r.lengths]
      chance = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
      with torch.inference_mode():
        out = self.model.generate(
            torch.tensor(ids, device=self.model.device), attention_mask=torch.tensor(mask, device=self.model.device),
            num_return_sequences=batch[0].n, max_new_tokens=max(lengths), pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([Ends(width, lengths)]),
            **(chance if sampling.temperature else dict(do_sample=False)))
      made += [row[:length] for row, length in zip(out[:, width:].tolist(), lengths, strict=True)]
    return made


class Ends(transformers.StoppingCriteria):
  """Every row at its own length."""

  def __init__(self, width: int, lengths: Sequence[int]):
    self.ends = width + torch.tensor(lengths)

  def __call__(self, input_ids, scores, **kwargs):
    return (input_ids.shape[1] >= self.ends).to(input_ids.device)


class Work:
  """Requests, and our engines for them."""

  def __init__(self, plan: Plan, config: Config, params, mesh, requests: Sequence[Request], cap: int):
    self.requests, self.sampling = requests, Sampling(TEMPERATURE, TOP_P, cap)
    self.tokens = sum(sum(r.lengths) for r in requests)
    size = cap + max(len(r.ids) for r in requests)
    self.make = functools.partial(engines.Engine, llama.Llama(config), params, mesh, (), 0, 'bench', size=size,
                                   steps=plan.steps)

  def engine(self, slots: int, requests: Sequence[Request], **how) -> engines.Engine:
    """One that has compiled its programs for the requests: it has seen every prompt."""
    engine = self.make(slots=slots, **how)
    run(engine, [dataclasses.replace(r, lengths=[1] * r.n) for r in requests], self.sampling)
    engine.work = engines.Work()
    return engine


def lengths(rng, kind: Kind, n: int) -> list[int]:
  return np.clip(rng.lognormal(np.log(kind.median), SIGMA, n), 1, kind.cap).astype(int).tolist()


def respond(kind: Kind, V: int, n: int = 4) -> list[Request]:
  """Prompts of log-normal lengths."""
  rng = np.random.default_rng(0)
  sizes = np.clip(rng.lognormal(np.log(kind.prompt), 0.5, kind.count), 4, 4 * kind.prompt).astype(int)
  return [Request(f'respond{i}', rng.integers(1, V, size).tolist(), n, lengths=lengths(rng, kind, n))
          for i, size in enumerate(sizes)]


def judge(kind: Kind, V: int) -> list[Request]:
  """A rubric, and a prompt with one of its 4 candidates, `kind.prompt` tokens together: to be judged 3 times."""
  rng = np.random.default_rng(1)
  rubric, made = rng.integers(1, V, kind.rubric).tolist(), []
  for i in range(kind.count):
    sizes = [rng.integers(size // 2, size * 3 // 2) for size in (kind.prompt * 2 // 5, *[kind.prompt * 3 // 5] * 4)]
    prompt, *candidates = (rng.integers(1, V, size).tolist() for size in sizes)
    made += [Request(f'judge{i}/{j}', rubric + prompt + candidate, 3, lengths=lengths(rng, kind, 3))
             for j, candidate in enumerate(candidates)]
  return made


def run(engine: engines.Engine, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
  """The ids of every sample."""
  return [result.ids for _, results in engine.generate(requests, sampling) for result in results]


def timed(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
  """The median seconds of each."""
  return roofline.medians({name: functools.partial(roofline.seconds, side) for name, side in sides.items()}, rounds)


def check(work: Work, peer: Peer, config: Config):
  """Greedy tokens of some prompts are the same; in bfloat16 the first one, mostly, for its ties are many."""
  greedy = Sampling(0.0, 1.0, min(SAME, work.sampling.max_tokens))
  some = [dataclasses.replace(r, n=1, lengths=[greedy.max_tokens]) for r in work.requests[:4]]
  ours, theirs = run(work.make(slots=4), some, greedy), peer.generate(some, greedy, 4)
  if config.dtype == 'float32':
    assert ours == theirs, f'ours {ours}, transformers {theirs}'
  else:
    same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    assert same >= 3, f'{same} of {len(some)} first tokens are the same'


def compare(name: str, kind: Kind, work: Work, plan: Plan, peer: Peer, peak) -> dict:
  """Ours, transformers and, for the judge, ours without sharing, on one kind of work."""
  part = work.requests[:kind.part]
  ours, theirs = {}, {}
  for rows in plan.rows:
    engine = work.engine(rows, part)
    ours[rows] = roofline.seconds(lambda engine=engine: run(engine, part, work.sampling))
    theirs[rows] = roofline.seconds(lambda rows=rows: peer.generate(part, work.sampling, rows))
  slots, rows = (min(found, key=found.get) for found in (ours, theirs))
  engine = work.engine(slots, work.requests)
  sides = dict(ours=lambda: run(engine, work.requests, work.sampling),
               transformers=lambda: peer.generate(work.requests, work.sampling, rows))
  if kind.rubric:
    alone = work.engine(slots, work.requests, share=False)
    sides['unshared'] = lambda: run(alone, work.requests, work.sampling)
  taken = timed(sides, plan.rounds)
  least = roofline.floor(plan.config, work.requests, slots, *peak)
  found = dict(work=name, samples=sum(r.n for r in work.requests), tokens=work.tokens, slots=slots, peer_rows=rows,
               seconds=taken, tried=dict(ours=ours, transformers=theirs),
               tokens_per_second={side: work.tokens / s for side, s in taken.items()},
               ratio=taken['transformers'] / taken['ours'], of_floor=least / taken['ours'],
               occupancy=engine.work.occupancy)
  if kind.rubric:
    found |= dict(share_speed=taken['unshared'] / taken['ours'], computed=engine.work.prefilled / engine.work.naive)
  return found


def peers(plan: Plan, mesh, device: str, quick: bool) -> dict:
  """Both kinds of work, against transformers and the machine; prints as it goes."""
  config = plan.config
  params = make(config, mesh)
  peer = Peer(config, params, device)
  peak = roofline.peaks(config, device, quick)
  print(f'{peak[0] / 1e9:.0f} GB/s, {peak[1] / 1e9:,.0f} Gflop/s; a Llama of '
        f'{llama.param_count(config) / 1e6:,.1f}M parameters, {config.dtype}', flush=True)
  print(f'{"":8} {"samples":>8} {"tokens":>8} {"ours/s":>8} {"slots":>6} {"theirs/s":>9} {"rows":>5} {"ratio":>6} '
        f'{"of floor":>9}')
  rows = []
  for kind, requests in ((plan.respond, respond(plan.respond, config.V)), (plan.judge, judge(plan.judge, config.V))):
    work = Work(plan, config, params, mesh, requests, kind.cap)
    check(work, peer, config)
    r = compare('judge' if kind.rubric else 'respond', kind, work, plan, peer, peak)
    rate = r['tokens_per_second']
    print(f'{r["work"]:8} {r["samples"]:8,} {r["tokens"]:8,} {rate["ours"]:8,.0f} {r["slots"]:6} '
          f'{rate["transformers"]:9,.0f} {r["peer_rows"]:5} {r["ratio"]:5.2f}x {r["of_floor"]:8.0%}', flush=True)
    rows.append(r)
  print(f'share: the judge computes {r["computed"]:.2f} of its prompt tokens, and is {r["share_speed"]:.2f}x as fast')
  return dict(bytes_per_second=peak[0], flops_per_second=peak[1], parameters=llama.param_count(config), rows=rows)


def refill(plan: Plan, mesh) -> dict:
  """The trace, with and without refill."""
  config, kind = plan.small, plan.trace
  params = make(config, mesh)
  work = Work(dataclasses.replace(plan, steps=plan.trace_steps), config, params, mesh, respond(kind, config.V, 1),
              kind.cap)
  pair = {name: work.engine(plan.slots, work.requests, refill=name == 'refill') for name in ('refill', 'static')}
  taken = timed({name: functools.partial(run, engine, work.requests, work.sampling)
                 for name, engine in pair.items()}, 1)
  return dict(requests=kind.count, tokens=work.tokens, cap=kind.cap, slots=plan.slots, seconds=taken,
              occupancy={name: engine.work.occupancy for name, engine in pair.items()},
              ratio=taken['static'] / taken['refill'])


def make(config: Config, mesh):
  with jax.set_mesh(mesh):
    return jax.jit(lambda key: jax.tree.map(lambda x: x.astype(config.dtype), llama.init_params(config, key)))(
        jax.random.key(0))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', help='file to write the numbers to')
  parser.add_argument('--refill', action='store_true', help='that part alone')
  parser.add_argument('--quick', action='store_true', help='every path, no numbers worth reading')
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
    print(f'refill: {r["requests"]:,} requests, {r["slots"]} slots: {r["occupancy"]["refill"]:.2f} of the places make '
          f'tokens ({r["occupancy"]["static"]:.2f} without), {r["ratio"]:.2f}x as fast')
  found['minutes'] = (time.perf_counter() - began) / 60
  line = json.dumps(found)
  if f.json:
    pathlib.Path(f.json).write_text(line + '\n')
  print(line)


if __name__ == '__main__':
  main()
