"""tunix as a peer of bench/train.py; see peers.py.

tunix pads. Prompts and responses have the longest length of the run, so that the step compiles
once. Its Llama ignores `rope_theta`, which is corrected here.
"""
import functools
import json
import pathlib

import peers


def main():
  parent = peers.Parent()
  settings = parent.settings
  from importlib import metadata

  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from tunix.models.llama3 import model as llama, params
  from tunix.rl import common
  from tunix.sft import peft_trainer
  from tunix.sft.dpo import dpo_trainer

  f = json.loads(pathlib.Path(settings['folder'], 'config.json').read_text())
  config = llama.ModelConfig(
      num_layers=f['num_hidden_layers'], vocab_size=f['vocab_size'], embed_dim=f['hidden_size'],
      hidden_dim=f['intermediate_size'], num_heads=f['num_attention_heads'],
      head_dim=f['head_dim'], num_kv_heads=f['num_key_value_heads'], rope_theta=f['rope_theta'],
      norm_eps=f['rms_norm_eps'], weight_tying=f['tie_word_embeddings'])
  llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)

  def model():
    return params.create_model_from_safe_tensors(settings['folder'], config,
                                                 dtype=jnp.dtype(settings['dtype']))

  class Metrics:
    """Keeps what the trainer logs."""

    def __init__(self):
      self.found = {}

    def log(self, prefix, name, value, mode, step):
      self.found.setdefault(name, []).append(float(value))

    def close(self):
      pass

  def padded(rows, width: int, left: bool = False):
    """-> the ids [B, width], and the mask of tokens."""
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
      place = slice(width - len(row), width) if left else slice(len(row))
      ids[i, place], mask[i, place] = row, 1
    return ids, mask

  loss, batch, examples = settings['loss'], settings['batch'], settings['examples']
  steps = [examples[i:i + batch] for i in range(0, len(examples), batch)]
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.0))
  if loss == 'dpo':
    prompt = max(len(e[0]) for e in examples)
    response = max(len(r) for e in examples for r in e[1:])
    trainer = dpo_trainer.DPOTrainer(
        model(), model(), optimizer,
        dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1))
    batches = []
    for step in steps:
      prompts, chosen, rejected = zip(*step, strict=True)
      sides = [padded(prompts, prompt, left=True), padded(chosen, response),
               padded(rejected, response)]
      batches.append(dpo_trainer.TrainingInput(*(part for side in sides for part in side)))
    weights, name = list(map(len, steps)), 'log_probs/chosen'
  else:
    width = max(len(p) + len(r) for p, r in examples)
    trainer = peft_trainer.PeftTrainer(
        model(), optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))

    def inputs(x):
      present = x.input_tokens > 0  # 0 is padding
      return dict(input_tokens=x.input_tokens, input_mask=x.input_mask,
                  positions=common.build_positions_from_mask(present),
                  attention_mask=common.make_causal_attn_mask(present))
    trainer.with_gen_model_input_fn(inputs)
    batches = [peft_trainer.TrainingInput(
        padded([p + r for p, r in step], width)[0],
        np.stack([(np.arange(width) >= len(p)) & (np.arange(width) < len(p) + len(r))
                  for p, r in step])) for step in steps]
    weights, name = [sum(len(r) for _, r in step) for step in steps], 'loss'
  trainer.is_managed_externally = True  # repeated calls of `train` start at the first batch

  def answer(_) -> dict:
    trainer.metrics_logger = metrics = Metrics()
    trainer.train(batches)
    trainer._write_train_metrics()  # of the last step
    jax.block_until_ready(jax.live_arrays())
    return dict(value=float(np.average(metrics.found[name], weights=weights)))
  answer({})  # the step compiles twice: its first results have other types than its arguments
  parent.serve(metadata.version('google-tunix'), answer)


if __name__ == '__main__':
  main()
