"""Effect of int8 weights on the log-probs and greedy tokens of a model.

`python bench/int8.py --model=DIR` takes a checkpoint or a Hugging Face folder. The model generates
64 texts at temperature 1. For every generated token, the program compares the log-prob and the
greedy token with and without quantized weights. The texts continue the prompts of `--prompts`, a
JSONL file; without it they start after bos.
"""
import dataclasses
import itertools
import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import cli, model_files, records, schema, sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import config as model_config, int8, llama
from srlm_jax.sample import engine as engines

flags.DEFINE_string('model', None, 'Folder of a checkpoint, or of a Hugging Face model.',
                    required=True)
flags.DEFINE_string('prompts', '', 'JSONL file of records with id and prompt.')
flags.DEFINE_integer('tokens', 64, 'Tokens to generate per text.')
flags.DEFINE_integer('tensor', 1, 'Devices that the model is split over.')
flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'),
                  'dtype of activations and of the weights that are not quantized.')
ROWS = 64  # texts


def main(_):
  f = flags.FLAGS
  config = dataclasses.replace(model_config.load(f.model), dtype=f.dtype)
  tokenizer = tokenizers.load(f.model, config.V)
  mesh = sharding.make_mesh(1, 1, f.tensor, jax.devices()[:f.tensor])
  with jax.set_mesh(mesh):
    params = (store.restore_params(f.model, mesh, f.dtype)[0] if model_files.exists(f.model) else
              convert.load_hf(f.model, mesh, f.dtype))
    quantized = int8.quantize(params)
  texts = [''] * ROWS
  if f.prompts:
    texts = [r.prompt for r in itertools.islice(records.read(f.prompts, schema.Prompt), ROWS)]
  room = config.context - f.tokens
  prompts = [[*tokenizer.start, *tokenizer.encode(text)][:room] for text in texts]
  tokens, generated = generate(config, params, mesh, prompts, f.tokens)
  with jax.set_mesh(mesh):
    (logps, greedy), (logps8, greedy8) = (
        [x[generated[:, 1:]] for x in evaluate(config, p, tokens)] for p in (params, quantized))
  size, size8 = (sum(x.nbytes for x in jax.tree.leaves(p)) for p in (params, quantized))
  change = logps8 - logps
  result = dict(model=f.model, dtype=f.dtype, tokens=int(generated.sum()),
                logp=float(logps.mean()), change=float(change.mean()),
                absolute_change=float(np.abs(change).mean()),
                greedy_agreement=float((greedy == greedy8).mean()), bytes_ratio=size8 / size)
  print(f'{result["tokens"]} generated tokens in {len(tokens)} texts; mean log-prob '
        f'{result["logp"]:.4f}\n'
        f'int8: mean change {result["change"]:+.4f}, mean absolute change '
        f'{result["absolute_change"]:.4f}; same greedy token for '
        f'{result["greedy_agreement"]:.2%}; {result["bytes_ratio"]:.1%} of the bytes')
  print(json.dumps(result))


def generate(config, params, mesh, prompts: list[list[int]], count: int):
  """-> tokens [B, T], prompts and `count` sampled tokens each; [B, T], True where sampled."""
  engine = engines.Engine(llama.Llama(config), params, mesh, (), 0, 'int8', slots=ROWS,
                          size=config.context, steps=8)
  requests = [engines.Request(str(i), ids) for i, ids in enumerate(prompts)]
  rows = [[*request.ids, *result.ids] for request, (result,) in
          engine.generate(requests, engines.Sampling(1.0, 1.0, count))]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  generated = np.zeros(tokens.shape, bool)
  for i, (row, ids) in enumerate(zip(rows, prompts, strict=True)):
    tokens[i, :len(row)] = row
    generated[i, len(ids):len(row)] = True
  return tokens, generated


def evaluate(config, params, tokens):
  """tokens [B, T] -> their log-probs and the greedy tokens, [B, T - 1] each."""
  model = llama.Llama(config)

  @jax.jit
  def one(params, row):
    logps = jax.nn.log_softmax(model.apply({'params': params}, row)[:, :-1])
    return jnp.take_along_axis(logps, row[:, 1:, None], -1)[..., 0], logps.argmax(-1)
  # Row by row, because the logits of all rows may not fit into memory.
  return [np.concatenate(x) for x in zip(*(one(params, row[None]) for row in tokens), strict=True)]


if __name__ == '__main__':
  cli.run_app(main)
