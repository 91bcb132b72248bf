"""A peer of the benchmarks that computes everything with full forward passes; see bench/peers.py.

The peer `wrong` makes one mistake: the last token of the first sample, or 1 % of the value.
"""
import jax
import numpy as np
import peers

from srlm_jax import sharding
from srlm_jax.checkpoint import convert
from srlm_jax.models import config as configs, llama


def main():
  parent = peers.Parent()
  print('a library prints this')
  s, wrong = parent.settings, parent.settings['name'] == 'wrong'
  mesh = sharding.make_mesh(1, 1, 1)
  params = convert.load_hf(s['folder'], mesh, s['dtype'])
  model = llama.Llama(configs.load(s['folder']))

  @jax.jit
  def logps(tokens):
    return jax.nn.log_softmax(model.apply({'params': params}, tokens))

  def after(ids) -> np.ndarray:
    """-> the log-probs of the token that follows each of `ids`; the width is static."""
    padded = np.zeros((1, 256), np.int32)
    padded[0, :len(ids)] = ids
    return np.asarray(logps(padded))[0, :len(ids)]

  def sample(prompt, length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
      ids.append(int(after(ids)[-1].argmax()))
    return ids[len(prompt):]

  def sampled(task: dict) -> dict:
    found = [sample(r['ids'], length) for r in task['requests'] for length in r['lengths']]
    found[0][-1] += wrong
    return dict(ids=found)

  def value(_) -> dict:
    """The mean log-prob of the chosen responses, or minus the mean of all tokens."""
    sums = []
    for prompt, response, *_ in s['examples']:
      chances = after(prompt + response)[len(prompt) - 1:-1]
      sums.append(chances[np.arange(len(response)), response].sum())
    tokens = sum(len(e[1]) for e in s['examples'])
    found = np.mean(sums) if s['loss'] == 'dpo' else -np.sum(sums) / tokens
    return dict(value=float(found) * (1.01 if wrong else 1))
  with jax.set_mesh(mesh):
    parent.serve('1.0', value if 'loss' in s else sampled)


if __name__ == '__main__':
  main()
