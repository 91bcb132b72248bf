"""Speed of training, compared with TRL, with the machine's peak, and without our optimizations.

`python bench/train.py` makes a random Llama and trains it with our step and with TRL's trainers, on
the same tokens, on all cores, without dropout. It measures:

  dpo, sft  pairs or examples per second of our step and of DPOTrainer and SFTTrainer; MFU: FLOP/s
            that the real tokens need, divided by the peak of a matrix product in the same run
  shared    DPO with the prompt of a pair once in the row, and twice; prompt : response is 1:4, 1:1
            and 4:1
  logits    temporaries of a DPO step with logits in chunks, and with all logits at once

Runs alternate; numbers are medians of the rounds. The output is a table and a line of JSON.
`--json=PATH` also writes the JSON to a file. `--quick` runs every path on tiny inputs.
`--only=shared` runs one part.
"""
import argparse
import dataclasses
import json
import os
import tempfile
import time
import warnings

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch shares the GPU's memory

import datasets
import jax
import numpy as np
import roofline
from sample import Peer
import timing
import tokenizers
import torch
import transformers
import trl

from srlm_jax import config as configs, sharding
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import layout, Packing, Shape
from srlm_jax.models import kernels, llama, vocab
from srlm_jax.models.config import Config
from srlm_jax.train import batch as batches, state as train_state, step as train_step
from srlm_jax.train.batch import Batch, PairBatch

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
    cpu=Plan(Config(D=512, F=1376, K=8, G=1, H=64, V=32000, layers=8, context=2048),
             8, 60, 60, 4, 3, 512),
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
               remat: str = 'none'):
    c = train_config(loss, plan)
    choice = kernels.for_training(jax.default_backend(), plan.config, remat)
    tx = train_state.optimizer(c, 100)
    out = jax.tree.map(lambda x: x.sharding, train_state.abstract(plan.config, tx, mesh))
    self.state = jax.jit(lambda p: train_state.TrainState.create(p, tx), out_shardings=out)(params)
    self.reference_params = {}
    if loss == 'dpo':
      self.reference_params = jax.tree.map(lambda x: x.astype(plan.config.dtype), params)
    self.step = train_step.make(llama.Llama(plan.config, choice, remat), tx, c, self.state)
    self.batches = [sharding.put_batch(batch, mesh) for batch in host_batches]

  def steps(self) -> list[dict]:
    """Takes a step on every batch -> the metrics of each."""
    metrics = []
    for batch in self.batches:
      self.state, found = self.step(self.state, self.reference_params, batch, jax.random.key(0))
      metrics.append(found)
    return jax.device_get(metrics)

  def run(self) -> float:
    """-> seconds of one round."""
    return timing.seconds(self.steps)

  def value(self, loss: str) -> float:
    """-> a value that both sides must agree on.

    The mean loss per token for SFT, the mean log-prob of the chosen responses for DPO.
    """
    weights = [batch.weight() for batch in self.batches]
    name = 'loss' if loss == 'sft' else 'chosen_logp'
    return float(np.average([m[name] for m in self.steps()], weights=weights))

  def temporaries(self) -> int:
    """-> bytes of temporaries of the compiled step."""
    lowered = self.step.lower(self.state, self.reference_params, self.batches[0],
                              jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes


class Theirs:
  """TRL's trainer on the same tokens; its clock runs from the first step of a round to the last."""

  def __init__(self, loss: str, plan: Plan, params, examples: list[Example], device: str):
    vocabulary = tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1}, '<pad>')
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token='<pad>', eos_token='<eos>')
    self.batch_sizes = [len(examples[i:i + plan.batch])
                        for i in range(0, len(examples), plan.batch)]
    arguments = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=plan.batch,
        max_steps=len(self.batch_sizes), learning_rate=0.0, logging_steps=1, save_strategy='no',
        report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        bf16=plan.config.dtype == 'bfloat16', use_cpu=device == 'cpu',
        max_length=plan.config.context, dataloader_pin_memory=False)
    model = Peer(plan.config, params, device).model.train()
    if loss == 'dpo':
      rows = [dict(prompt_ids=e.prompt, chosen_ids=e.responses[0], rejected_ids=e.responses[1])
              for e in examples]
      trainer, config = _Dpo, trl.DPOConfig(beta=0.1, **arguments)
      extra = dict(ref_model=Peer(plan.config, params, device).model)
    else:
      rows = [dict(input_ids=e.prompt + e.responses[0],
                   completion_mask=[0] * len(e.prompt) + [1] * len(e.responses[0]))
              for e in examples]
      trainer, config = trl.SFTTrainer, trl.SFTConfig(completion_only_loss=True, **arguments)
      extra = {}
    self.clock = _Clock()
    self.trainer = trainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[self.clock], **extra)
    self.trainer.remove_callback(transformers.PrinterCallback)

  def run(self) -> float:
    """-> seconds of one round."""
    self.clock.first = None
    self.trainer.train()
    return self.clock.last - self.clock.first

  def value(self, loss: str) -> float:
    """-> the same as `Ours.value`."""
    self.trainer.train()
    name = 'loss' if loss == 'sft' else 'logps/chosen'
    values = [r[name] for r in self.trainer.state.log_history if name in r]
    return float(np.average(values, weights=self.batch_sizes))


class _Dpo(trl.DPOTrainer):
  """DPOTrainer for examples that are tokenized already."""

  def _prepare_dataset(self, dataset, *_):
    return dataset


class _Clock(transformers.TrainerCallback):
  """The times of the first and the last step of a round."""
  first = last = None

  def on_step_begin(self, *_, **__):
    self.first = self.first or time.perf_counter()

  def on_step_end(self, *_, **__):
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    self.last = time.perf_counter()


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


def compare(loss: str, plan: Plan, params, mesh, device: str, peak: float) -> dict:
  """-> the result of our step and TRL's trainer for one loss."""
  packed = Packing(draw(plan, 2 if loss == 'dpo' else 1), plan.batch, 1, 0, plan.width)
  ids = {name for step in range(plan.steps) for row in packed.ids(step) for name in row}
  examples = [e for e in packed.all if e.id in ids]  # those of our first steps
  pack = batches.pack_pairs if loss == 'dpo' else batches.pack
  host_batches = [pack(packed.rows(step), packed.shape) for step in range(plan.steps)]
  ours = Ours(loss, plan, params, mesh, host_batches)
  theirs = Theirs(loss, plan, params, examples, device)
  values = ours.value(loss), theirs.value(loss)  # also compiles and warms up
  assert np.isclose(*values, rtol=0.002 if plan.config.dtype == 'float32' else 0.02), values
  found = timing.medians(dict(ours=ours.run, trl=theirs.run), plan.rounds)
  flops = operations(plan.config, examples, loss)
  return dict(loss=loss, values=values, examples=len(examples),
              real=sum(map(len, examples)) / sum(b.tokens.size for b in host_batches),
              **{f'{side}_per_second': len(examples) / s for side, s in found.items()},
              ratio=found['trl'] / found['ours'],
              **{f'{side}_mfu': flops / s / peak for side, s in found.items()})


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
    found.append(dict(prompt=prompt, response=response, ratio=taken['repeated'] / taken['shared'],
                      **{f'{name}_per_second': plan.batch / s for name, s in taken.items()}))
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
  packed, found, chunk = Packing(pairs, plan.batch, 1, 0), {}, vocab.CHUNK
  batch = batches.pack_pairs(packed.rows(0), packed.shape)
  for name, size in (('chunks', min(chunk, half // 2)), ('at_once', 10**9)):
    vocab.CHUNK = size
    found[name] = Ours('dpo', plan, params, mesh, [batch], remat='full').temporaries() / 2**30
  vocab.CHUNK = chunk
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--json')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--only', choices=['dpo', 'sft', 'shared', 'logits'])
  flags = parser.parse_args()
  device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
  plan = PLANS['quick' if flags.quick else 'gpu' if device == 'cuda' else 'cpu']
  torch.set_num_threads(os.cpu_count())
  transformers.logging.set_verbosity_error()
  datasets.disable_progress_bars()
  warnings.simplefilter('ignore')
  mesh = sharding.make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: llama.init_params(plan.config, key))(jax.random.key(0))
    _, peak = roofline.peaks(plan.config, device, flags.quick)
    print(f'{roofline.name(os.cpu_count())}; peak {peak / 1e9:,.0f} GFLOP/s; '
          f'{llama.param_count(plan.config):,} parameters')
    out = dict(peak=peak)
    for loss in ('dpo', 'sft'):
      if flags.only in (None, loss):
        row = out[loss] = compare(loss, plan, params, mesh, device, peak)
        print(f'{loss}: ours {row["ours_per_second"]:.2f} per second, TRL '
              f'{row["trl_per_second"]:.2f}: {row["ratio"]:.2f}x; MFU {row["ours_mfu"]:.0%} and '
              f'{row["trl_mfu"]:.0%}; padding-free fraction {row["real"]:.0%}', flush=True)
    if flags.only in (None, 'shared'):
      out['shared'] = sharing(plan, params, mesh)
      for row in out['shared']:
        print(f'prompt : response {row["prompt"]}:{row["response"]}: '
              f'{row["shared_per_second"]:.2f} pairs per second, '
              f'{row["repeated_per_second"]:.2f} with the prompt twice: {row["ratio"]:.2f}x',
              flush=True)
    if flags.only in (None, 'logits'):
      found = out['logits'] = logits(plan, params, mesh)
      print(f'temporaries: {found["chunks"]:.2f} GiB with logits in chunks, '
            f'{found["at_once"]:.2f} GiB with all logits at once')
  line = json.dumps(out)
  print(line)
  if flags.json:
    with open(flags.json, 'w') as file:
      file.write(line + '\n')


if __name__ == '__main__':
  main()
