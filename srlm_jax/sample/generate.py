"""Answers one prompt: `python -m srlm_jax.sample.generate --model=DIR --prompt="Once upon a time"`."""
import dataclasses
import json

from absl import flags
import jax

from srlm_jax import cli, InputError, model_files, sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine

STEPS = 16  # tokens a call


def define_flags():
  flags.DEFINE_string('model', None, 'Folder of a checkpoint, or of a Hugging Face model.', required=True)
  flags.DEFINE_string('prompt', None, 'The text to continue.', required=True)
  flags.DEFINE_enum('chat', 'none', ('none', *templates.CHATS), 'The form around the prompt; none: continue the text.')
  flags.DEFINE_float('temperature', 0.7, '0: greedy.')
  flags.DEFINE_float('top_p', 0.9, 'Sample from the smallest set of tokens with at least this mass.')
  flags.DEFINE_integer('top_k', 0, 'Sample from this many most likely tokens; 0: all.')
  flags.DEFINE_integer('max_tokens', 256, 'Generated, at most.')
  flags.DEFINE_integer('seed', 0, 'Of the randomness.', lower_bound=0, upper_bound=2**31 - 1)
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of parameters and activations.')
  flags.DEFINE_integer('tensor', 1, 'Devices that the model is split over.')
  flags.DEFINE_bool('json', False, 'Print one line with prompt_ids, ids, text, logps, finish.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if not 1 <= f.tensor <= jax.device_count():
    raise InputError(f'--tensor={f.tensor}: there are {jax.device_count()} devices here')
  mesh = sharding.make_mesh(1, 1, f.tensor, jax.devices()[:f.tensor])
  sampling = engine.Sampling(f.temperature, f.top_p, f.max_tokens, f.top_k)
  answer = generate(f.model, f.prompt, f.chat, sampling, f.seed, f.dtype, mesh)
  print(json.dumps(answer) if f.json else answer['text'])


def generate(folder: str, prompt: str, chat: str, sampling: engine.Sampling, seed: int, dtype: str,
             mesh) -> dict:
  """The prompt's ids, the generated ids, their text and log-probs, and why it ended."""
  shape = dataclasses.replace(model_config.load(folder), dtype=dtype)
  tokenizer = tokenizers.load(folder, shape.V)
  ids = ([tokenizer.bos_id, *tokenizer.encode(prompt)] if chat == 'none' else
         templates.encode_prompt(chat, prompt, tokenizer))
  if len(ids) + sampling.max_tokens > shape.context:
    raise InputError(f'the prompt has {len(ids)} tokens and --max_tokens is {sampling.max_tokens}; '
                     f'together they exceed the model\'s context of {shape.context}')
  with jax.set_mesh(mesh):
    params = (store.restore_params(folder, mesh, dtype)[0] if model_files.exists(folder) else
              convert.load_hf(folder, mesh, dtype))
  model = engine.Engine(llama.Llama(shape), params, mesh, tokenizer.eos_ids, seed, 'generate', slots=1,
                        size=len(ids) + sampling.max_tokens, steps=STEPS)
  (_, (result,)), = model.generate([engine.Request(prompt, ids)], sampling)
  text = tokenizer.decode([*ids, *result.ids])[len(tokenizer.decode(ids)):]
  return dict(prompt_ids=ids, ids=result.ids, text=text, logps=result.logps, finish=result.finish)


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
