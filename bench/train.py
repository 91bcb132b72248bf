"""Training against TRL, against the machine, and without what makes it fast.

`python bench/train.py` makes a random Llama, the same in our step and in TRL's trainers, and takes steps on the same
tokens, all cores, dropout off:

  dpo, sft  pairs or examples a second of ours and of DPOTrainer and SFTTrainer; MFU: operations that the real tokens
            need, by the peak of a product of matrices, measured in the same run
  shared    DPO with the prompt of a pair in the row once, against twice, for prompt : response of 1:4, 1:1 and 4:1
  logits    the temporaries of a DPO step with log-probs in chunks, and with all logits at once

Sides take turns; numbers are medians of the rounds. It prints tables and a line of JSON; `--json=PATH` also writes it
there, `--quick` runs everything on next to nothing, `--only=shared` a part.
"""
import argparse
import dataclasses
import json
import os
import tempfile
import time
import warnings

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # on a GPU torch wants memory too

import datasets
import jax
import numpy as np
import roofline
from sample import Peer
import tokenizers
import torch
import transformers
import trl

from srlm_jax import config as configs, sharding
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Batches, layout
from srlm_jax.models import kernels, llama, vocab
from srlm_jax.models.config import Config
from srlm_jax.train import state as train_state, step as train_step

RATIOS = ((1, 4), (1, 1), (4, 1))


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that depends on the machine."""
  config: Config
  batch: int    # examples a step, of ours on average
  prompt: int   # tokens, median
  response: int
  steps: int    # of ours a round
  rounds: int
  width: int    # of a packed row, at most


PLANS = dict(
    cpu=Plan(Config(D=512, F=1376, K=8, G=1, H=64, V=32000, layers=8, context=2048), 8, 60, 60, 4, 3, 512),
    gpu=Plan(Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22, context=2048, dtype='bfloat16'), 16, 250, 250,
             8, 3, 2048),
    quick=Plan(Config(D=64, F=128, K=2, G=2, H=16, V=8192, layers=2, context=256), 4, 10, 10, 1, 1, 128))


def draw(plan: Plan, responses: int) -> list[Example]:
  """More than a round's examples; lengths are log-normal, as those of people's prompts and answers."""
  rng = np.random.default_rng(0)
  def tokens(median):
    size = int(np.clip(rng.lognormal(np.log(median), 0.6), 4, plan.width // 4))
    return rng.integers(1, plan.config.V, size).tolist()
  return [Example(f'e{i}', tokens(plan.prompt), tuple(tokens(plan.response) for _ in range(responses)))
          for i in range(4 * plan.batch * plan.steps)]


def knobs(loss: str, plan: Plan):
  c = configs.dpo() if loss == 'dpo' else configs.sft()
  c.update(batch=plan.batch, dropout=0.0, dtype=plan.config.dtype)
  c.update(learning_rate=0.0, learning_rate_end=0.0)  # every round computes the same, and so do both sides
  return c


class Ours:
  """Our step, and its batches on the device."""

  def __init__(self, loss: str, plan: Plan, params, mesh, batches: list[dict], remat: bool = False):
    c = knobs(loss, plan)
    model = llama.Llama(plan.config, kernels.to_train(jax.default_backend(), plan.config, remat), remat)
    tx = train_state.optimizer(c, 100)
    self.state = jax.jit(lambda p: train_state.TrainState.create(p, tx), out_shardings=jax.tree.map(
        lambda x: x.sharding, train_state.abstract(plan.config, tx, mesh)))(params)
    self.older = jax.tree.map(lambda x: x.astype(plan.config.dtype), params) if loss == 'dpo' else {}
    self.step = train_step.make(model, tx, c, self.state)
    self.batches = [sharding.put_batch(b, mesh) for b in batches]

  def steps(self) -> list[dict]:
    """Takes every batch once -> metrics."""
    metrics = []
    for batch in self.batches:
      self.state, found = self.step(self.state, self.older, batch, jax.random.key(0))
      metrics.append(found)
    return jax.device_get(metrics)

  def run(self) -> float:
    """Seconds of a round's steps."""
    return roofline.seconds(self.steps)

  def value(self, loss: str) -> float:
    """What the other side must find, too: the mean log-prob of a chosen response, or the loss of a token."""
    weights = [(b['response'] >= 0 if loss == 'sft' else b['pair']).sum() for b in self.batches]
    name = 'loss' if loss == 'sft' else 'chosen_logp'
    return float(np.average([m[name] for m in self.steps()], weights=weights))

  def temporaries(self) -> int:
    """Bytes, beside the state."""
    lowered = self.step.lower(self.state, self.older, self.batches[0], jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes


class Theirs:
  """TRL's trainer on the same tokens; its clock runs from the first step of a round to its last."""

  def __init__(self, loss: str, plan: Plan, params, examples: list[Example], device: str):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1}, '<pad>')),
        pad_token='<pad>', eos_token='<eos>')
    self.sizes = [len(examples[i:i + plan.batch]) for i in range(0, len(examples), plan.batch)]  # of its batches
    how = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=plan.batch, max_steps=len(self.sizes),
               learning_rate=0.0, logging_steps=1, save_strategy='no', report_to=[], disable_tqdm=True,
               gradient_checkpointing=False, bf16=plan.config.dtype == 'bfloat16', use_cpu=device == 'cpu',
               max_length=plan.config.context, dataloader_pin_memory=False)
    model = Peer(plan.config, params, device).model.train()
    if loss == 'dpo':
      rows = [dict(prompt_ids=e.prompt, chosen_ids=e.responses[0], rejected_ids=e.responses[1]) for e in examples]
      made, config, also = _Dpo, trl.DPOConfig(beta=0.1, **how), dict(ref_model=Peer(plan.config, params, device).model)
    else:
      rows = [dict(input_ids=e.prompt + e.responses[0],
                   completion_mask=[0] * len(e.prompt) + [1] * len(e.responses[0])) for e in examples]
      made, config, also = trl.SFTTrainer, trl.SFTConfig(completion_only_loss=True, **how), {}
    self.clock = _Clock()
    self.trainer = made(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
                        processing_class=tokenizer, callbacks=[self.clock], **also)
    self.trainer.remove_callback(transformers.PrinterCallback)

  def run(self) -> float:
    """Seconds of a round's steps."""
    self.clock.first = None
    self.trainer.train()
    return self.clock.last - self.clock.first

  def value(self, loss: str) -> float:
    """As `Ours.value`."""
    self.trainer.train()
    name = 'loss' if loss == 'sft' else 'logps/chosen'
    return float(np.average([r[name] for r in self.trainer.state.log_history if name in r], weights=self.sizes))


class _Dpo(trl.DPOTrainer):
  def _prepare_dataset(self, dataset, *_):
    return dataset  # tokens already


class _Clock(transformers.TrainerCallback):
  first = last = None

  def on_step_begin(self, *_, **__):
    self.first = self.first or time.perf_counter()

  def on_step_end(self, *_, **__):
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    self.last = time.perf_counter()


def operations(config: Config, examples: list[Example], loss: str) -> float:
  """Of the forward and backward pass over the real tokens, and of DPO's reference: 2 for each weight and token, for the
  head of response tokens alone, and 4 H for each query head, layer, token and key that it sees; thrice that with the
  backward pass. Nothing is counted that a step computes twice."""
  c = config
  layers = c.layers * (2 * c.D * c.K * (c.G + 1) * c.H + 3 * c.D * c.F)
  total = 0
  for e in examples:
    sizes = [len(r) for r in e.responses]
    keys = len(e.prompt) * (len(e.prompt) + 1) / 2 + sum(n * len(e.prompt) + n * (n + 1) / 2 for n in sizes)
    total += 2 * layers * len(e) + 2 * c.D * c.V * sum(sizes) + 4 * c.layers * c.K * c.G * c.H * keys
  return total * (4 if loss == 'dpo' else 3)


def compare(loss: str, plan: Plan, params, mesh, device: str, peak: float) -> dict:
  rows = Batches(draw(plan, 1 + (loss == 'dpo')), plan.batch, 1, 0, plan.width)
  ids = {name for step in range(plan.steps) for row in rows.ids(step) for name in row}
  examples = [e for e in rows.examples if e.id in ids]  # those of our first steps
  batches = [rows.at(step) for step in range(plan.steps)]
  ours, theirs = Ours(loss, plan, params, mesh, batches), Theirs(loss, plan, params, examples, device)
  values = ours.value(loss), theirs.value(loss)  # this compiles and warms up, too
  assert np.isclose(*values, rtol=0.002 if plan.config.dtype == 'float32' else 0.02), values
  found = roofline.medians(dict(ours=ours.run, trl=theirs.run), plan.rounds)
  flops = operations(plan.config, examples, loss)
  return dict(loss=loss, values=values, examples=len(examples),
              real=sum(map(len, examples)) / sum(b['tokens'].size for b in batches),
              **{f'{side}_per_second': len(examples) / s for side, s in found.items()},
              ratio=found['trl'] / found['ours'], **{f'{side}_mfu': flops / s / peak for side, s in found.items()})


def sharing(plan: Plan, params, mesh) -> list[dict]:
  """Pairs a second with the prompt once and twice, two pairs a row; every place holds a token."""
  found, rng = [], np.random.default_rng(0)
  for prompt, response in RATIOS:
    unit = plan.width // (4 * (prompt + response))
    def tokens(n, unit=unit):
      return rng.integers(1, plan.config.V, n * unit).tolist()
    pairs = [Example(f'e{i}', tokens(prompt), (tokens(response), tokens(response))) for i in range(plan.batch)]
    twice = [[Example('', e.prompt, (r,)) for r in e.responses] for e in pairs]
    sides = dict(shared=Ours('dpo', plan, params, mesh, [two_a_row([[e] for e in pairs])]),
                 repeated=Ours('dpo', plan, params, mesh, [two_a_row(twice)]))
    values = [side.value('dpo') for side in sides.values()]
    assert np.isclose(*values, rtol=1e-3), values
    taken = roofline.medians({name: side.run for name, side in sides.items()}, plan.rounds)
    found.append(dict(prompt=prompt, response=response, ratio=taken['repeated'] / taken['shared'],
                      **{f'{name}_per_second': plan.batch / s for name, s in taken.items()}))
  return found


def two_a_row(pairs: list[list[Example]]) -> dict:
  """The batch of pairs of equal lengths, each of them one example or, with the prompt for either response, two."""
  rows = [layout(pairs[i] + pairs[i + 1]) for i in range(0, len(pairs), 2)]
  batch = {name: np.asarray([row[name] for row in rows], np.int32) for name in rows[0]}
  if not batch['shared'].any():
    del batch['shared']  # as in a batch of which no prompt is in two
  ones = np.ones((len(rows), 2))
  return dict(batch, pair=ones.astype(np.int32), confidence=ones.astype(np.float32))


def logits(plan: Plan, params, mesh) -> dict:
  """GiB of temporaries of one step with long responses, layers recomputed in the backward pass."""
  half = plan.width // 3
  pairs = [Example(f'e{i}', [1] * half, ([2] * half, [3] * half)) for i in range(plan.batch)]
  made, found, chunk = Batches(pairs, plan.batch, 1, 0), {}, vocab.CHUNK
  for name, size in (('chunks', min(chunk, half // 2)), ('at_once', 10**9)):
    vocab.CHUNK = size
    found[name] = Ours('dpo', plan, params, mesh, [made.at(0)], remat=True).temporaries() / 2**30
  vocab.CHUNK = chunk
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print(f'{loss}: ours {row["ours_per_second"]:.2f} a second, TRL {row["trl_per_second"]:.2f}: '
              f'{row["ratio"]:.2f}x; MFU {row["ours_mfu"]:.0%} and {row["trl_mfu"]:.0%}; {row["real"]:.0%} of our '
              f'places hold a token', flush=True)
    if flags.only in (None, 'shared'):
      out['shared'] = sharing(plan, params, mesh)
      for row in out['shared']:
        print(f'prompt : response {row["prompt"]}:{row["response"]}: {row["shared_per_second"]:.2f} pairs a second, '
              f'{row["repeated_per_second"]:.2f} with the prompt twice: {row["ratio"]:.2f}x', flush=True)
    if flags.only in (None, 'logits'):
      found = out['logits'] = logits(plan, params, mesh)
      print(f'temporaries: {found["chunks"]:.2f} GiB in chunks, {found["at_once"]:.2f} GiB with all logits at once')
  line = json.dumps(out)
  print(line)
  if flags.json:
    with open(flags.json, 'w') as file:
      file.write(line + '\n')


if __name__ == '__main__':
  main()
