"""Writes tests/golden_m0.json: what transformers computes with the packaged M0.

  make test-parity  # makes .venv-parity, with torch; TORCH in the Makefile chooses the build
  .venv-parity/bin/python tests/make_golden.py

Run it when M0 changes (`make sandbox-m0`; it lies in srlm_jax/sandbox/m0). It imports nothing of
srlm_jax, so the values are an independent computation. It runs on the CPU. For each prompt the file
holds the ids, the log-prob of every prompt token after the first, the greedy continuation, and the
log-prob of each of its tokens at temperature 1.
"""
import hashlib
import json
import pathlib
import platform

import numpy as np
import sentencepiece
import transformers

M0 = pathlib.Path(__file__).parent.parent / 'srlm_jax' / 'sandbox' / 'm0'
OUT = pathlib.Path(__file__).parent / 'golden_m0.json'
MAX_TOKENS = 24
EOS = 2  # of tokenizer.model, which `encode` checks
MIN_GAP = 0.02  # nats between the two most likely tokens; far above rounding, so ids are stable
JUDGE = """\
Judge the answer by five points: on topic, an answer, right, kind, clean.
Task: Name two nice fruits.
<response> Gladly, pear and fig. </response>
Write a short review, then "Score: <points>"."""
PROMPTS = (
    'Name two nice fruits.',
    'I have a quiz. What do cows and cats eat?',
    'We have a bet. Tell me what I can do with a broom.',
    'Here we have glove, apple, cat, pig, cow, dog, hen, owl, fox, and horse. Name the animals.',
    JUDGE,  # a long prompt, and an answer that the limit of tokens cuts
    'Write  this: x\n\n 2 < 3 \nthen stop.',  # runs of whitespace, and letters on their own
    'Say é 漢字 or </s> now.',  # unknown letters, and the name of a control token
)


def encode(prompt: str) -> list[int]:
  """Ids of the plain chat form by sentencepiece, bos first; transformers must agree on them.

  Two exceptions, both on text that the sandbox never has: transformers drops letters that the
  vocabulary lacks (it assumes byte pieces), and reads '</s>' as the control token.
  """
  text = f'User: {prompt}\nAssistant:'
  spm = sentencepiece.SentencePieceProcessor(model_file=str(M0 / 'tokenizer.model'))
  ids = [spm.bos_id(), *spm.encode(text)]
  made = transformers.LlamaTokenizer.from_pretrained(str(M0), local_files_only=True)
  if spm.unk_id() not in ids and '</s>' not in text:
    assert made.encode(text, add_special_tokens=False) == ids[1:], text
  assert made.bos_token_id == spm.bos_id() and made.eos_token_id == spm.eos_id() == EOS
  return ids


def load(dtype: str):
  """M0 as transformers reads it."""
  return transformers.LlamaForCausalLM.from_pretrained(
      str(M0), local_files_only=True, dtype=dtype, attn_implementation='eager').eval()


def logps(model, ids: list[int]) -> np.ndarray:
  """ids [T] -> the log-probs of every next token [T - 1, V]."""
  import torch  # here and below: pytest also reads this file, where torch may be absent
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()


def compute(model, exact, prompt: str) -> dict:
  """The values of one prompt by `model`, float32, and how far `exact`, float64, is from them."""
  import torch
  prompt_ids = encode(prompt)
  row = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=MAX_TOKENS,
                       eos_token_id=EOS, pad_token_id=EOS)[0].tolist()
  first = len(prompt_ids) - 1
  table = logps(model, row)
  second, best = np.sort(table[first:])[:, -2:].T
  gap = (best - second).min()
  assert table[first:].argmax(-1).tolist() == row[first + 1:], 'generate is not greedy'
  assert gap > MIN_GAP, f'{prompt!r}: two tokens are only {gap} nats apart; take another prompt'
  at = np.arange(len(row) - 1), row[1:]
  error = np.abs(table[at] - logps(exact, row)[at]).max()
  values = [float(f'{x:.7g}') for x in table[at]]
  return dict(prompt=prompt, prompt_ids=prompt_ids, prompt_logps=values[:first],
              ids=row[first + 1:], logps=values[first:],
              finish='eos' if row[-1] == EOS else 'length',
              gap=float(f'{gap:.2g}'), rounding=float(f'{error:.1g}'))


def cases() -> list[dict]:
  """The values of every prompt."""
  model, exact = load('float32'), load('float64')
  return [compute(model, exact, prompt) for prompt in PROMPTS]


def main():
  import torch
  found = cases()
  about = dict(
      made_by='python tests/make_golden.py', python=platform.python_version(),
      torch=torch.__version__, transformers=transformers.__version__,
      sentencepiece=sentencepiece.__version__, dtype='float32',
      files={name: hashlib.sha256((M0 / name).read_bytes()).hexdigest()
             for name in ('config.json', 'model.safetensors', 'tokenizer.model')})
  lines = [f' "{name}": {json.dumps(value)}' for name, value in about.items()]
  lines.append(' "cases": [\n  ' + ',\n  '.join(map(json.dumps, found)) + '\n ]')
  OUT.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  for c in found:
    print(f'{c["prompt"]!r}: {len(c["prompt_ids"])} + {len(c["ids"])} tokens, {c["finish"]}, '
          f'gap {c["gap"]}, rounding {c["rounding"]}')


if __name__ == '__main__':
  main()
