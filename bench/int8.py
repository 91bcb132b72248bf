"""What weights of 8 bits change: `python bench/int8.py --model=DIR`, a checkpoint or a Hugging Face model.

The model writes 64 texts at temperature 1; of every token of them, the log-probs and the greedy choice with and without
quantized weights. `--prompts`: a JSONL file whose `prompt`s it continues; without, its texts begin with nothing.
"""
import dataclasses
import itertools
import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import cli, model_files, records, sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import config as model_config, int8, llama
from srlm_jax.sample import engine as engines

flags.DEFINE_string('model', None, 'Folder of a checkpoint, or of a Hugging Face model.', required=True)
flags.DEFINE_string('prompts', '', 'A JSONL file of records with a prompt.')
flags.DEFINE_integer('tokens', 64, 'Of every text.')
flags.DEFINE_integer('tensor', 1, 'Devices that the model is split over.')
flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of activations, and of the weights without.')
ROWS = 64


def main(_):
  f = flags.FLAGS
  config = dataclasses.replace(model_config.load(f.model), dtype=f.dtype)
  tokenizer = tokenizers.load(f.model, config.V)
  mesh = sharding.make_mesh(1, 1, f.tensor, jax.devices()[:f.tensor])
  with jax.set_mesh(mesh):
    params = (store.restore_params(f.model, mesh, f.dtype)[0] if model_files.exists(f.model) else
              convert.load_hf(f.model, mesh, f.dtype))
    small = int8.quantize(params)
  texts = [r['prompt'] for r in itertools.islice(records.read(f.prompts, 'prompt'), ROWS)] if f.prompts else [''] * ROWS
  room = config.context - f.tokens
  prompts = [[tokenizer.bos_id, *tokenizer.encode(text)][:room] for text in texts]
  engine = engines.Engine(llama.Llama(config), params, mesh, (), 0, 'int8', slots=ROWS, size=config.context, steps=8)
  requests = [engines.Request(str(i), ids) for i, ids in enumerate(prompts)]
  rows = [[*request.ids, *result.ids] for request, (result,) in
          engine.generate(requests, engines.Sampling(1.0, 1.0, f.tokens))]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  made = np.zeros(tokens.shape, bool)  # by the model
  for i, (row, ids) in enumerate(zip(rows, prompts, strict=True)):
    tokens[i, :len(row)] = row
    made[i, len(ids):len(row)] = True
  model = llama.Llama(config)

  @jax.jit
  def read(params, row):
    """Log-probs of the tokens, and the most likely ones: [1, T - 1] each."""
    logps = jax.nn.log_softmax(model.apply({'params': params}, row)[0][:, :-1])
    return jnp.take_along_axis(logps, row[:, 1:, None], -1)[..., 0], logps.argmax(-1)
  with jax.set_mesh(mesh):
    (logps, best), (logps8, best8) = (
        (np.concatenate(x)[made[:, 1:]] for x in zip(*(read(p, row[None]) for row in tokens), strict=True))
        for p in (params, small))
  size, size8 = (sum(x.nbytes for x in jax.tree.leaves(p)) for p in (params, small))
  change = logps8 - logps
  result = dict(model=f.model, dtype=f.dtype, tokens=int(made.sum()), logp=float(logps.mean()),
                change=float(change.mean()), absolute_change=float(np.abs(change).mean()),
                greedy_agreement=float((best == best8).mean()), bytes_ratio=size8 / size)
  print(f'{result["tokens"]} tokens that the model wrote, of {len(rows)} texts; mean log-prob {result["logp"]:.4f}\n'
        f'with 8 bits: {result["change"]:+.4f} on average, {result["absolute_change"]:.4f} either way; '
        f'the greedy token is the same {result["greedy_agreement"]:.2%} of the time; '
        f'the weights take {result["bytes_ratio"]:.1%} of the bytes')
  print(json.dumps(result))


if __name__ == '__main__':
  cli.run_app(main)
