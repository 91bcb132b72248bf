"""Speed of the sampling engine, by itself and compared with other programs.

`python bench/sample.py` makes a random Llama (a larger one on a GPU) and runs two workloads on all
cores: `respond` (prompts of varied length, 4 samples each) and `judge` (a common rubric, 3 samples
per request). It measures:

  bound   the fraction of the tokens per second that memory bandwidth and compute allow; both are
          measured in the same run
  C++     the speed-up by the C++ kernels
  share   the speed-up of the judge by prefilling the rubric and each request's prompt once
  refill  the speed-up by slot refill, on 1,000 requests of varied length

`--peer=NAME` compares both workloads with another program instead: same weights, requests, lengths
and cores. Greedy tokens must be equal. CPU seconds are those of all threads and processes of a
side.

A random model does not emit eos, so every sample has a fixed length, log-normal with sigma 0.8.
Each side uses the best of several numbers of rows. Runs alternate. Numbers are medians of three
rounds; refill has one round. The output is a table and a line of JSON. `--json=PATH` also writes
the JSON to a file. `--quick` runs every path on tiny inputs.
"""
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import os
import tempfile
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a peer shares the GPU's memory

import jax
import peers
import roofline
import timing
from timing import Cost
from workloads import (
  CPU,
  CPU_JUDGE,
  CPU_RESPOND,
  export,
  judge,
  Kind,
  respond,
  run,
  TEMPERATURE,
  TOP_P,
)

from srlm_jax import sharding
from srlm_jax.models import cpu, llama
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
    cpu=Plan(CPU, (8, 16, 32), 4, 3, CPU_RESPOND, CPU_JUDGE, SMALL, Kind(1000, 0, 16, 41, 512)),
    gpu=Plan(Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22, context=2048,
                    dtype='bfloat16'),
             (64, 256), 8, 3, Kind(256, 0, 100, 200, 1024), Kind(32, 350, 250, 80, 256),
             SMALL, None),
    quick=Plan(TINY, (4, 8), 4, 1, Kind(3, 0, 20, 5, 12), Kind(1, 40, 20, 4, 8), TINY,
               Kind(24, 0, 8, 6, 24), 4))


class Work:
  """A workload, and the engines that run it."""

  def __init__(self, plan: Plan, config: Config, params, mesh, requests: Sequence[Request],
               cap: int):
    self.plan, self.requests = plan, requests
    self.sampling = Sampling(TEMPERATURE, TOP_P, cap)
    self.tokens = sum(sum(r.lengths) for r in requests)
    self.size = cap + max(len(r.ids) for r in requests)
    self.make = functools.partial(engines.Engine, llama.Llama(config), params, mesh, (), 0, 'bench',
                                  size=self.size, steps=plan.steps)

  def engine(self, slots: int, **how) -> engines.Engine:
    """-> an engine that has seen every prompt, so all its programs are compiled."""
    engine = self.make(slots=slots, **how)
    run(engine, [dataclasses.replace(r, lengths=[1] * r.n) for r in self.requests], self.sampling)
    engine.reset_work()
    return engine

  def cost(self, engine: engines.Engine) -> Cost:
    """-> the cost of running all requests."""
    return timing.cost(lambda: run(engine, self.requests, self.sampling))

  def best(self) -> engines.Engine:
    """-> the engine with the best number of slots."""
    made = {slots: self.engine(slots) for slots in self.plan.rows}
    engine = made[min(made, key=lambda slots: self.cost(made[slots]).seconds)]
    engine.reset_work()
    return engine


@contextlib.contextmanager
def without_cpp():
  """Engines that are made inside have no C++ kernels."""
  supports, cpu.supports = cpu.supports, lambda config: False
  try:
    yield
  finally:
    cpu.supports = supports


def generate(peer: peers.Peer, requests: Sequence[Request], sampling: Sampling) -> tuple[
    list[list[int]], Cost]:
  """-> the ids of every sample of a peer, and their cost."""
  answer, cost = peer.ask(requests=[dict(ids=list(r.ids), lengths=r.lengths) for r in requests],
                          temperature=sampling.temperature, top_p=sampling.top_p)
  assert list(map(len, answer['ids'])) == [n for r in requests for n in r.lengths], peer.name
  return answer['ids'], cost


class Greedy:
  """The greedy tokens of some prompts, which must be equal on both sides."""

  def __init__(self, work: Work):
    self.sampling = Sampling(0.0, 1.0, min(SAME, work.sampling.max_tokens))
    self.requests = [dataclasses.replace(r, n=1, lengths=[self.sampling.max_tokens])
                     for r in work.requests[:4]]
    self.ours = run(work.make(slots=4), self.requests, self.sampling)

  def check(self, peer: peers.Peer, dtype: str):
    """Asserts that those of a peer are equal.

    bfloat16 logits tie often, so there 3 of 4 first tokens must be equal.
    """
    theirs, _ = generate(peer, self.requests, self.sampling)
    if dtype == 'float32':
      assert self.ours == theirs, f'ours {self.ours}, {peer.name} {theirs}'
    else:
      same = sum(a[0] == b[0] for a, b in zip(self.ours, theirs, strict=True))
      assert same >= 3, f'{same} of {len(theirs)} first tokens are the same'


def works(plan: Plan, params, mesh) -> dict[str, Work]:
  """-> both workloads."""
  requests = dict(respond=respond(plan.respond, plan.config.V),
                  judge=judge(plan.judge, plan.config.V))
  return {name: Work(plan, plan.config, params, mesh, rows, getattr(plan, name).cap)
          for name, rows in requests.items()}


def summary(name: str, work: Work, engine: engines.Engine, taken: dict[str, Cost]) -> dict:
  """-> the part of a workload's result that is common to both tables."""
  return dict(work=name, samples=sum(r.n for r in work.requests), tokens=work.tokens,
              slots=engine.slots, slot_utilization=engine.work.slot_utilization,
              seconds={side: cost.seconds for side, cost in taken.items()},
              cpu_seconds={side: cost.cpu for side, cost in taken.items()},
              tokens_per_second={side: work.tokens / cost.seconds for side, cost in taken.items()})


def against(title: str, work: Work, plan: Plan, name: str, folder: str) -> dict:
  """-> the result of a workload, ours and a peer's."""
  engine, greedy, tried = work.best(), Greedy(work), {}
  with contextlib.ExitStack() as stack:
    for rows in plan.rows:
      peer = stack.enter_context(peers.Peer(name, folder=folder, dtype=plan.config.dtype,
                                            rows=rows, size=work.size))
      greedy.check(peer, plan.config.dtype)
      tried[rows] = generate(peer, work.requests, work.sampling)[1].seconds, peer
    rows = min(tried, key=lambda rows: tried[rows][0])
    peer = tried[rows][1]
    taken = timing.medians(dict(
        ours=lambda: work.cost(engine),
        peer=lambda: generate(peer, work.requests, work.sampling)[1]), plan.rounds)
  return summary(title, work, engine, taken) | dict(
      peer=name, version=peer.version, peer_rows=rows,
      tried={rows: seconds for rows, (seconds, _) in tried.items()},
      ratio=taken['peer'].seconds / taken['ours'].seconds)


def compare(plan: Plan, params, mesh, name: str) -> dict:
  """Compares both workloads with a peer, and prints the table."""
  print(f'{"":8} {"samples":>8} {"tokens":>8} {"ours/s":>8} {"slots":>6} {"CPU s":>7} '
        f'{"peer/s":>8} {"rows":>5} {"CPU s":>7} {"ratio":>6}', flush=True)
  found = []
  with tempfile.TemporaryDirectory() as folder:
    export(plan.config, params, folder)
    for title, work in works(plan, params, mesh).items():
      r = against(title, work, plan, name, folder)
      rate, used = r['tokens_per_second'], r['cpu_seconds']
      print(f'{title:8} {r["samples"]:8,} {r["tokens"]:8,} {rate["ours"]:8,.0f} {r["slots"]:6} '
            f'{used["ours"]:7.1f} {rate["peer"]:8,.0f} {r["peer_rows"]:5} {used["peer"]:7.1f} '
            f'{r["ratio"]:5.2f}x', flush=True)
      found.append(r)
  print(f'peer: {name} {found[0]["version"]}')
  return dict(rows=found)


def alone(plan: Plan, params, mesh, quick: bool) -> dict:
  """Measures both workloads without a peer, and prints the table."""
  config = plan.config
  peak = roofline.peaks(config, quick)
  has_cpp = jax.default_backend() == 'cpu' and cpu.supports(config)
  print(f'{peak[0] / 1e9:.0f} GB/s, {peak[1] / 1e9:,.0f} GFLOP/s')
  print(f'{"":8} {"samples":>8} {"tokens":>8} {"ours/s":>8} {"slots":>6} {"CPU s":>7} '
        f'{"of bound":>9} {"C++":>6} {"share":>6}')
  found = []
  for name, work in works(plan, params, mesh).items():
    engine = work.best()
    sides = dict(ours=engine)
    if has_cpp:
      with without_cpp():
        sides['xla'] = work.engine(engine.slots)
    if name == 'judge':
      sides['unshared'] = work.engine(engine.slots, share=False)
    taken = timing.medians({side: functools.partial(work.cost, made)
                            for side, made in sides.items()}, plan.rounds)
    ours = taken['ours']
    least = roofline.bound(config, work.requests, engine.slots, *peak)
    r = summary(name, work, engine, taken) | dict(
        of_bound=least / ours.seconds,
        computed=engine.work.prefilled / engine.work.unshared_prompt_tokens,
        speed_up={side: cost.seconds / ours.seconds for side, cost in taken.items()
                  if side != 'ours'})
    shown = [f'{r["speed_up"][side]:5.2f}x' if side in sides else f'{"":6}'
             for side in ('xla', 'unshared')]
    print(f'{name:8} {r["samples"]:8,} {r["tokens"]:8,} {r["tokens_per_second"]["ours"]:8,.0f} '
          f'{r["slots"]:6} {ours.cpu:7.1f} {r["of_bound"]:9.0%} {" ".join(shown)}', flush=True)
    found.append(r)
  print(f'share: the judge prefills {r["computed"]:.2f} of its prompt tokens')
  return dict(bytes_per_second=peak[0], flops_per_second=peak[1], rows=found)


def refill(plan: Plan, mesh) -> dict:
  """-> the result on the trace, with and without slot refill."""
  config, kind = plan.small, plan.trace
  params = make(config, mesh)
  work = Work(dataclasses.replace(plan, steps=plan.trace_steps), config, params, mesh,
              respond(kind, config.V, 1), kind.cap)
  pair = {name: work.engine(plan.slots, refill=name == 'refill') for name in ('refill', 'static')}
  taken = {name: work.cost(engine).seconds for name, engine in pair.items()}
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
  parser = timing.parser(__doc__)
  parser.add_argument('--peer', choices=peers.SAMPLERS, help='compares with this program')
  f = parser.parse_args()
  began = time.perf_counter()
  on = jax.devices()[0]
  plan = PLANS['quick' if f.quick else on.platform]
  mesh = sharding.make_mesh(1, 1, 1, [on])
  params = make(plan.config, mesh)
  found = dict(machine=roofline.name(), parameters=llama.param_count(plan.config))
  print(f'{found["machine"]}; a Llama with {found["parameters"] / 1e6:,.1f}M parameters, '
        f'{plan.config.dtype}', flush=True)
  if f.peer:
    found |= compare(plan, params, mesh, f.peer)
  else:
    found |= alone(plan, params, mesh, f.quick)
    if plan.trace:
      r = found['refill'] = refill(plan, mesh)
      utilization = r['slot_utilization']
      print(f'refill: {r["requests"]:,} requests, {r["slots"]} slots: slot utilization '
            f'{utilization["refill"]:.2f} ({utilization["static"]:.2f} without refill), '
            f'{r["ratio"]:.2f}x as fast')
  found['minutes'] = (time.perf_counter() - began) / 60
  timing.report(found, f.json)


if __name__ == '__main__':
  main()
