"""Checks that vLLM reads an export: the same ids of prompts, and the same greedy strings.

`python bench/check_export.py` exports the sandbox's M0, whose head width of 32 vLLM supports on a
CPU, loads the folder in vLLM (`make .venv-vllm/.installed`), and gives both 100 prompts as chat
messages. `--checkpoint=DIR --chat=FORMAT` takes another checkpoint. It exits with an error if the
ids of a prompt or more than one greedy string differ.
"""
import argparse
import pathlib
import tempfile

import jax
import numpy as np
import peers

from srlm_jax import sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine as engines
from srlm_jax.sandbox import data, world

COUNT, MAX_TOKENS = 100, 32


def greedy(checkpoint, chat: str, prompts: list[str]) -> tuple[list[list[int]], list[str]]:
  """-> the ids of the prompts, and the greedy responses of the engine."""
  config = model_config.load(checkpoint)
  tokenizer = tokenizers.load(checkpoint, config.V)
  ids = [templates.encode_prompt(chat, prompt, tokenizer) for prompt in prompts]
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params, _ = store.restore_params(checkpoint, mesh, 'float32')
    ends = templates.end_ids(chat, tokenizer)
    engine = engines.Engine(llama.Llama(config), params, mesh, ends, 0, 'check',
                            slots=16, size=max(map(len, ids)) + MAX_TOKENS, steps=8)
    requests = [engines.Request(str(i), x) for i, x in enumerate(ids)]
    made = engine.generate(requests, engines.Sampling(0.0, 1.0, MAX_TOKENS))
    return ids, [tokenizer.decode(result.ids) for _, (result,) in made]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', help='folder of a checkpoint instead of the M0')
  parser.add_argument('--chat', default='plain', help='chat format')
  f = parser.parse_args()
  rng = np.random.default_rng(0)
  prompts = [world.instruction(rng) for _ in range(COUNT)]
  with tempfile.TemporaryDirectory() as folder:
    checkpoint, out = f.checkpoint or f'{folder}/m0', pathlib.Path(folder, 'hf')
    if not f.checkpoint:
      convert.from_hf(data.M0, checkpoint)
    convert.to_hf(checkpoint, out, chat=f.chat)
    ids, texts = greedy(checkpoint, f.chat, prompts)
    with peers.Peer('export', folder=str(out)) as peer:
      found, _ = peer.ask(prompts=prompts, max_tokens=MAX_TOKENS)
  same_ids = sum(a == b for a, b in zip(ids, found['prompt_ids'], strict=True))
  same = sum(a.strip() == b.strip() for a, b in zip(texts, found['texts'], strict=True))
  print(f'vllm {peer.version}: the ids of {same_ids} of {COUNT} prompts and {same} greedy strings '
        f'are equal')
  if same_ids < COUNT or same < COUNT - 1:
    raise SystemExit('the export is read otherwise')


if __name__ == '__main__':
  main()
