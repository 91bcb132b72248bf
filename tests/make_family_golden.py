"""Writes tests/golden/FAMILY.json: what transformers computes with a small model of each family.

  make test-parity  # makes .venv-parity, with torch; TORCH in the Makefile chooses the build
  .venv-parity/bin/python tests/make_family_golden.py

Run it when MODELS changes. It imports nothing of srlm_jax, so the values are an independent
computation. It runs on the CPU. The weights, biases and norms are random but depend only on the
names and shapes of the tensors, so the files hold none of them: a file holds config.json, the names
and shapes, and for each prompt the greedy continuation and the log-probs of all tokens after the
first.
"""
import json
import pathlib
import platform
import zlib

import numpy as np
import transformers

OUT = pathlib.Path(__file__).parent / 'golden'
LENGTHS = 5, 13, 15  # of the prompts; the windows are shorter than the longer two
MAX_TOKENS = 16
MIN_GAP = 2e-3  # nats between the two most likely tokens; above the tolerance, so ids are stable

# Heads are wider than hidden_size / num_attention_heads, and every size can be split by 2.
SMALL = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=20, vocab_size=96, max_position_embeddings=128,
    rms_norm_eps=1e-5, hidden_act='silu', tie_word_embeddings=False, bos_token_id=None,
    eos_token_id=None, pad_token_id=None)
# The wavelengths of a head of 20 are 6, 23, 87, 324, .. tokens. Llama 3's scaling keeps those below
# 64 / 4, divides the frequency of those above 64 / 1, and interpolates between.
LLAMA3 = dict(rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
THETA = dict(rope_type='default', rope_theta=1e6)
MODELS = {
    'llama': SMALL | dict(model_type='llama', rope_parameters=LLAMA3, tie_word_embeddings=True),
    'mistral': SMALL | dict(model_type='mistral', sliding_window=7),
    'qwen2': SMALL | dict(model_type='qwen2', rope_parameters=THETA, use_sliding_window=True,
                          sliding_window=9, max_window_layers=0),
    'qwen3': SMALL | dict(model_type='qwen3', rope_parameters=THETA, tie_word_embeddings=True),
    'olmo2': SMALL | dict(model_type='olmo2', rope_parameters=dict(THETA, rope_theta=5e5)),
}


def values(name: str, shape) -> np.ndarray:
  """The float32 values of a tensor; numpy never changes what RandomState draws."""
  drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
  scale, mean = (0.3, 1.0) if 'norm' in name else (0.2, 0.0)
  return (mean + scale * drawn).astype(np.float32)


def build(fields: dict):
  """The fields of a config.json -> a model of transformers with the `values` of each tensor."""
  import torch  # here and below: pytest also reads this file, where torch may be absent
  torch.set_num_threads(1)  # the models are too small for more
  fields = dict(fields)
  config = transformers.AutoConfig.for_model(fields.pop('model_type'), **fields)
  model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation='eager').float().eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(torch.from_numpy(values(name, tuple(x.shape))))
  return model


def prompts(vocab_size: int) -> list[list[int]]:
  """Random ids of LENGTHS."""
  rng = np.random.RandomState(1)
  return [rng.randint(0, vocab_size, n).tolist() for n in LENGTHS]


def logps(model, ids) -> np.ndarray:
  """ids [T] -> the log-probs of every next token [T - 1, V]."""
  import torch
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()


def greedy(model, ids, count: int) -> list[int]:
  """The ids of a prompt and of its greedy continuation by `count` tokens.

  Without transformers' cache, which keeps all keys where the window is one token.
  """
  import torch
  return model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                        do_sample=False, use_cache=False, max_new_tokens=count,
                        eos_token_id=None, pad_token_id=0)[0].tolist()


def compute(fields: dict) -> dict:
  """The contents of a file for one model."""
  model, cases = build(fields), []
  for ids in prompts(fields['vocab_size']):
    row = greedy(model, ids, MAX_TOKENS)
    table = logps(model, row)
    made = table[len(ids) - 1:]
    assert made.argmax(-1).tolist() == row[len(ids):], 'generate is not greedy'
    second, best = np.sort(made)[:, -2:].T
    assert (best - second).min() > MIN_GAP, f'two tokens are nearly as likely: {ids}'
    found = table[np.arange(len(row) - 1), row[1:]]
    cases.append(dict(prompt_ids=ids, ids=row[len(ids):],
                      logps=[float(f'{x:.7g}') for x in found]))
  written = json.loads(model.config.to_json_string())
  tensors = {name: list(x.shape) for name, x in model.named_parameters()}
  return dict(fields=fields, config=written, tensors=tensors, cases=cases)


def main():
  import torch
  OUT.mkdir(exist_ok=True)
  about = dict(made_by='python tests/make_family_golden.py', python=platform.python_version(),
               torch=torch.__version__, transformers=transformers.__version__, dtype='float32')
  for family, fields in MODELS.items():
    found = about | compute(fields)
    lines = [f' {json.dumps(name)}: {json.dumps(x)}' for name, x in found.items()]
    (OUT / f'{family}.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')
    print(family, sum(map(len, lines)), 'bytes', [case['ids'][:4] for case in found['cases']])


if __name__ == '__main__':
  main()
