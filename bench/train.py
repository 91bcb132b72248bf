"""Speed of training, by itself and compared with other programs.

`python bench/train.py` makes a random Llama (a larger one on a GPU) and trains it on all cores,
without dropout. It measures:

  dpo, sft  pairs or examples per second; MFU: FLOP/s that the real tokens need, divided by the peak
            of a matrix product in the same run
  shared    DPO with the prompt of a pair once in the row, and twice; prompt : response is 1:4, 1:1
            and 4:1
  logits    temporaries of a DPO step with logits in parts, and with all logits at once

`--peer=NAME` compares dpo and sft with the trainers of another program instead: same weights,
tokens and cores. The mean log-prob of the chosen responses, or the loss, must be equal. CPU seconds
are those of all threads and processes of a side.

Runs alternate; numbers are medians of the rounds. The output is a table and a line of JSON.
`--json=PATH` also writes the JSON to a file. `--quick` runs every path on tiny inputs.
`--only=shared` runs one part.
"""
import argparse
import contextlib
import dataclasses
import os
import tempfile

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a peer shares the GPU's memory

import jax
import numpy as np
import peers
import roofline
import timing
from timing import Cost
from workloads import CPU, export

from srlm_jax import config as configs, environment, sharding
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import layout, Packing, Shape
from srlm_jax.models import kernels, llama, sizing, vocab
from srlm_jax.models.config import Config
from srlm_jax.train import batch as batches, state as train_state, step as train_step
from srlm_jax.train.batch import Batch, PairBatch

PARTS = ('dpo', 'sft', 'shared', 'logits')
RATIOS = ((1, 4), (1, 1), (4, 1))  # prompt : response


@dataclasses.dataclass(frozen=True)
class Plan:
  """The settings for one kind of machine."""
  config: Config
  batch: int     # examples per step; of ours, which packs, on average
  prompt: int    # median length in tokens
  response: int  # median length in tokens
  steps: int     # of ours, per round
  rounds: int
  width: int     # of a packed row, at most


PLANS = dict(
    cpu=Plan(CPU, 8, 60, 60, 4, 3, 512),
    gpu=Plan(Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22, context=2048,
                    dtype='bfloat16'), 16, 250, 250, 8, 3, 2048),
    quick=Plan(Config(D=64, F=128, K=2, G=2, H=16, V=8192, layers=2, context=256),
               4, 10, 10, 1, 1, 128))


def draw(plan: Plan, responses: int) -> list[Example]:
  """-> more examples than a round uses; lengths are log-normal, like those of human texts."""
  rng = np.random.default_rng(0)
  def tokens(median):
    size = int(np.clip(rng.lognormal(np.log(median), 0.6), 4, plan.width // 4))
    return rng.integers(1, plan.config.V, size).tolist()
  return [Example(f'e{i}', tokens(plan.prompt),
                  tuple(tokens(plan.response) for _ in range(responses)))
          for i in range(4 * plan.batch * plan.steps)]


def train_config(loss: str, plan: Plan):
  """-> the `train` section of a config, with a learning rate of 0."""
  c = configs.dpo() if loss == 'dpo' else configs.sft()
  c.update(batch=plan.batch, accumulate=1, dropout=0.0, dtype=plan.config.dtype)
  c.update(learning_rate=0.0, learning_rate_end=0.0)  # so every round computes the same values
  return c


class Ours:
  """Our training step, with its batches on the device."""

  def __init__(self, loss: str, plan: Plan, params, mesh, host_batches: list[Batch],
               remat: str = 'auto'):
    c = train_config(loss, plan)
    c.remat = remat
    remat = self._remat(c, plan, host_batches[0])
    platform = mesh.devices.flat[0].platform
    choice = kernels.for_training(platform, plan.config, remat)
    self.kernels = choice.name
    tx = train_state.optimizer(c, 100)
    out = jax.tree.map(lambda x: x.sharding, train_state.abstract(plan.config, c, tx, mesh))
    self.state = jax.jit(lambda p: train_state.TrainState.create(p, tx), out_shardings=out)(params)
    self.reference_params = {}
    if loss == 'dpo':
      self.reference_params = jax.tree.map(lambda x: x.astype(plan.config.dtype), params)
    self.step = train_step.make(llama.Llama(plan.config, choice, remat), tx, c, self.state)
    self.batches = [sharding.put_batch(batch, mesh) for batch in host_batches]

  def _remat(self, c, plan: Plan, batch: Batch) -> str:
    """The recomputation that training chooses, if the config leaves it open."""
    config = configs.get('m2').copy_and_resolve_references()
    config.train = c
    work = sizing.Work(*batch.tokens.shape, has_reference=c.loss == 'dpo')
    return sizing.training(config, plan.config, sizing.devices(), work)['train.remat']

  def steps(self) -> list[dict]:
    """Takes a step on every batch -> the metrics of each."""
    metrics = []
    for batch in self.batches:
      self.state, found = self.step(self.state, self.reference_params, batch, jax.random.key(0))
      metrics.append(found)
    return jax.device_get(metrics)

  def run(self) -> Cost:
    """-> the cost of one round."""
    return timing.cost(self.steps)

  def value(self, loss: str) -> float:
    """-> a value that both sides must agree on.

    The mean loss per token for SFT, the mean log-prob of the chosen responses for DPO.
    """
    weights = [batch.weight() for batch in self.batches]
    name = 'loss' if loss == 'sft' else 'chosen_logp'
    return float(np.average([m[name] for m in self.steps()], weights=weights))

  def temporaries(self) -> int:
    """-> bytes of temporaries of the compiled step."""
    return self._analysis().temp_size_in_bytes

  def memory(self) -> int:
    """-> bytes of one device that the compiled step takes, with its arguments."""
    found = self._analysis()
    return (found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
            - found.alias_size_in_bytes)

  def _analysis(self):
    lowered = self.step.lower(self.state, self.reference_params, self.batches[0],
                              jax.random.key(0))
    return lowered.compile().memory_analysis()


def operations(config: Config, examples: list[Example], loss: str) -> float:
  """-> FLOPs of the forward and backward pass over the real tokens, and of DPO's reference.

  2 per weight and token, with the output head for response tokens only, and 4 H per query head,
  layer, token and attended key. The backward pass takes twice the forward pass. Recomputation is
  not counted.
  """
  c = config
  layers = c.layers * (2 * c.D * c.K * (c.G + 1) * c.H + 3 * c.D * c.F)
  total = 0
  for e in examples:
    sizes = [len(r) for r in e.responses]
    keys = len(e.prompt) * (len(e.prompt) + 1) / 2
    keys += sum(n * len(e.prompt) + n * (n + 1) / 2 for n in sizes)
    total += 2 * layers * len(e) + 2 * c.D * c.V * sum(sizes)
    total += 4 * c.layers * c.K * c.G * c.H * keys
  return total * (4 if loss == 'dpo' else 3)


def measure(loss: str, plan: Plan, params, mesh, peak: float, name: str | None) -> dict:
  """-> the result of our step for one loss, and of the trainer of a peer."""
  packed = Packing(draw(plan, 2 if loss == 'dpo' else 1), plan.batch, 1, 0, plan.width)
  ids = {name for step in range(plan.steps) for row in packed.ids(step) for name in row}
  examples = [e for e in packed.all if e.id in ids]  # those of our first steps
  pack = batches.pack_pairs if loss == 'dpo' else batches.pack
  host_batches = [pack(packed.rows(step), packed.shape) for step in range(plan.steps)]
  ours = Ours(loss, plan, params, mesh, host_batches)
  values, sides = dict(ours=ours.value(loss)), dict(ours=ours.run)  # also compiles and warms up
  result = dict(loss=loss, examples=len(examples), values=values,
                real=sum(map(len, examples)) / sum(b.tokens.size for b in host_batches))
  with contextlib.ExitStack() as stack:
    if name:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      export(plan.config, params, folder)
      peer = stack.enter_context(peers.Peer(
          name, folder=folder, dtype=plan.config.dtype, loss=loss, batch=plan.batch,
          context=plan.config.context, examples=[[e.prompt, *e.responses] for e in examples]))
      result |= dict(peer=name, version=peer.version)
      values['peer'], sides['peer'] = peer.ask()[0]['value'], lambda: peer.ask()[1]
      close = np.isclose(*values.values(), rtol=0.002 if plan.config.dtype == 'float32' else 0.02)
      assert close, values
    taken = timing.medians(sides, plan.rounds)
  flops = operations(plan.config, examples, loss)
  result |= dict(per_second={side: len(examples) / cost.seconds for side, cost in taken.items()},
                 cpu_seconds={side: cost.cpu for side, cost in taken.items()},
                 mfu={side: flops / cost.seconds / peak for side, cost in taken.items()})
  if name:
    result['ratio'] = taken['peer'].seconds / taken['ours'].seconds
  return result


def show(row: dict) -> str:
  """-> the result of a loss in words."""
  def side(name):
    return (f'{row["per_second"][name]:.2f} per second, MFU {row["mfu"][name]:.0%}, '
            f'{row["cpu_seconds"][name]:.1f} CPU s')
  text = f'{row["loss"]}: ours {side("ours")}; padding-free fraction {row["real"]:.0%}'
  if 'peer' in row:
    text += (f'\n     {row["peer"]} {row["version"]} {side("peer")}: {row["ratio"]:.2f}x; '
             f'values {row["values"]["ours"]:.6f} and {row["values"]["peer"]:.6f}')
  return text


def sharing(plan: Plan, params, mesh) -> list[dict]:
  """-> pairs per second with the prompt once and twice; two pairs per row, without padding."""
  found, rng = [], np.random.default_rng(0)
  for prompt, response in RATIOS:
    unit = plan.width // (4 * (prompt + response))
    def tokens(n, unit=unit):
      return rng.integers(1, plan.config.V, n * unit).tolist()
    pairs = [Example(f'e{i}', tokens(prompt), (tokens(response), tokens(response)))
             for i in range(plan.batch)]
    twice = [[Example('', e.prompt, (r,)) for r in e.responses] for e in pairs]
    sides = dict(shared=Ours('dpo', plan, params, mesh, [two_per_row([[e] for e in pairs])]),
                 repeated=Ours('dpo', plan, params, mesh, [two_per_row(twice)]))
    values = [side.value('dpo') for side in sides.values()]
    assert np.isclose(*values, rtol=1e-3), values
    taken = timing.medians({name: side.run for name, side in sides.items()}, plan.rounds)
    found.append(dict(prompt=prompt, response=response,
                      ratio=taken['repeated'].seconds / taken['shared'].seconds,
                      **{f'{name}_per_second': plan.batch / cost.seconds
                         for name, cost in taken.items()}))
  return found


def two_per_row(pairs: list[list[Example]]) -> PairBatch:
  """-> the batch of pairs of equal lengths, two per row.

  Each pair is one example, or two: one for each response, with the prompt repeated.
  """
  rows = [pairs[i] + pairs[i + 1] for i in range(0, len(pairs), 2)]
  made = [layout(row) for row in rows]
  shape = Shape(len(rows), len(made[0].tokens), len(made[0].targets), pairs=2)
  return PairBatch(**vars(batches.pack(rows, shape)),
                   second_segment=np.stack([row.second_segment for row in made]),
                   pair_mask=np.ones((len(rows), 2), np.int32),
                   soft_labels=np.ones((len(rows), 2), np.float32))


def logits(plan: Plan, params, mesh) -> dict:
  """-> GiB of temporaries of a step with long responses and recomputed layers."""
  half = plan.width // 3
  pairs = [Example(f'e{i}', [1] * half, ([2] * half, [3] * half)) for i in range(plan.batch)]
  packed, found, most = Packing(pairs, plan.batch, 1, 0), {}, vocab.MOST_LOGITS
  batch = batches.pack_pairs(packed.rows(0), packed.shape)
  for name, size in (('parts', most // 16), ('at_once', 10**12)):
    vocab.MOST_LOGITS = size
    found[name] = Ours('dpo', plan, params, mesh, [batch], remat='full').temporaries() / 2**30
  vocab.MOST_LOGITS = most
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', choices=peers.TRAINERS, help='compares with this program')
  parser.add_argument('--json')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--only', choices=PARTS)
  f = parser.parse_args()
  environment.pin()
  environment.keep_freed_memory()
  plan = PLANS['quick' if f.quick else jax.default_backend()]
  parts = (f.only,) if f.only else PARTS[:2] if f.peer else PARTS
  mesh = sharding.make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: llama.init_params(plan.config, key))(jax.random.key(0))
    _, peak = roofline.peaks(plan.config, f.quick)
    out = dict(machine=roofline.name(), peak=peak)
    print(f'{out["machine"]}; peak {peak / 1e9:,.0f} GFLOP/s; '
          f'{llama.param_count(plan.config):,} parameters', flush=True)
    for loss in ('dpo', 'sft'):
      if loss in parts:
        out[loss] = measure(loss, plan, params, mesh, peak, f.peer)
        print(show(out[loss]), flush=True)
    if 'shared' in parts:
      out['shared'] = sharing(plan, params, mesh)
      for row in out['shared']:
        print(f'prompt : response {row["prompt"]}:{row["response"]}: '
              f'{row["shared_per_second"]:.2f} pairs per second, '
              f'{row["repeated_per_second"]:.2f} with the prompt twice: {row["ratio"]:.2f}x',
              flush=True)
    if 'logits' in parts:
      found = out['logits'] = logits(plan, params, mesh)
      print(f'temporaries: {found["parts"]:.2f} GiB with logits in parts, '
            f'{found["at_once"]:.2f} GiB with all logits at once')
  timing.report(out, f.json)


if __name__ == '__main__':
  main()
