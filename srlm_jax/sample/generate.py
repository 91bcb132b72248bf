"""Generates one response and prints it.

`python -m srlm_jax.sample.generate --model=DIR --prompt="Once upon a time"`
"""
import dataclasses
import json

from absl import flags
import jax

from srlm_jax import cli, InputError, sharding
from srlm_jax.checkpoint import convert
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine as engines

STEPS = 16  # tokens per decode call


@dataclasses.dataclass(frozen=True)
class Generated:
  """A response; `ids` and `logps` have one entry per sampled token."""
  prompt_ids: list[int]
  ids: list[int]
  text: str
  logps: list[float]
  finish: str


def define_flags():
  flags.DEFINE_string('model', None, 'Folder of a checkpoint or of a Hugging Face model.',
                      required=True)
  flags.DEFINE_string('prompt', None, 'The text to continue.', required=True)
  flags.DEFINE_enum('chat', 'none', ('none', *templates.CHATS),
                    'Chat format of the prompt; none: continue the text.')
  flags.DEFINE_float('temperature', 0.7, 'Sampling temperature; 0: greedy.')
  flags.DEFINE_float('top_p', 0.9,
                     'Sample from the smallest set of tokens with at least this mass.')
  flags.DEFINE_integer('top_k', 0, 'Sample from this many most likely tokens; 0: all.')
  flags.DEFINE_integer('max_tokens', 256, 'Maximum number of generated tokens.')
  flags.DEFINE_integer('seed', 0, 'Seed of the PRNG.', lower_bound=0, upper_bound=2**31 - 1)
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'),
                    'Type of parameters and activations.')
  flags.DEFINE_integer('tensor', 1, 'Number of devices for tensor parallelism.')
  flags.DEFINE_bool('json', False,
                    'Print one line of JSON with prompt_ids, ids, text, logps, finish.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if not 1 <= f.tensor <= jax.device_count():
    raise InputError(f'--tensor={f.tensor} must be at least 1 and at most {jax.device_count()}, '
                     f'the number of devices')
  mesh = sharding.make_mesh(1, 1, f.tensor, jax.devices()[:f.tensor])
  sampling = engines.Sampling(f.temperature, f.top_p, f.max_tokens, f.top_k)
  found = generate(f.model, f.prompt, f.chat, sampling, f.seed, f.dtype, mesh)
  print(json.dumps(dataclasses.asdict(found)) if f.json else found.text)


def generate(folder: str, prompt: str, chat: str, sampling: engines.Sampling, seed: int,
             dtype: str, mesh) -> Generated:
  """Samples one response.

  `folder`: a checkpoint or a Hugging Face model. Raises InputError if the prompt and max_tokens
  exceed the model's context.
  """
  config = dataclasses.replace(model_config.load(folder), dtype=dtype)
  tokenizer = tokenizers.load(folder, config.V)
  if chat == 'none':
    ids = [*tokenizer.start, *tokenizer.encode(prompt)]
  else:
    ids = templates.encode_prompt(chat, prompt, tokenizer)
  size = len(ids) + sampling.max_tokens
  if size > config.context:
    raise InputError(f'the prompt has {len(ids)} tokens and --max_tokens is '
                     f'{sampling.max_tokens}; together they exceed the model\'s context of '
                     f'{config.context}; shorten the prompt or lower --max_tokens')
  with jax.set_mesh(mesh):
    params = convert.load(folder, mesh, dtype)
  ends = templates.end_ids(chat, tokenizer)
  engine = engines.Engine(llama.Llama(config), params, mesh, ends, seed, 'generate', slots=1,
                          size=size, steps=STEPS)
  (_, (result,)), = engine.generate([engines.Request(prompt, ids)], sampling)
  # Some tokenizers drop the leading space of a text, so the response is not decoded alone.
  text = tokenizer.decode([*ids, *result.ids])[len(tokenizer.decode(ids)):]
  return Generated(ids, result.ids, text, result.token_logps, result.finish)


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
