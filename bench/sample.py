"""What the cache is worth: greedy decoding by the engine against the full forward pass for every token.

`python bench/sample.py` prints tokens a second of both, interleaved, medians of five, and their ratio, as a table and
as one line of JSON. The model is random, float32, of about 9M parameters.
"""
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import sharding
from srlm_jax.models import llama
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines

CONFIG = Config(D=256, F=768, K=4, G=2, H=32, V=8000, layers=8, context=512)
ROWS, PROMPT, NEW, ROUNDS = 8, 64, 64, 5


def main():
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: llama.init_params(CONFIG, key))(jax.random.key(0))
    model = llama.Llama(CONFIG)
    engine = engines.Engine(model, params, mesh, ROWS, (CONFIG.V,), 0, 'bench')  # an eos that never comes
    prompts = np.random.default_rng(0).integers(1, CONFIG.V, (ROWS, PROMPT))
    requests = [engines.Request(str(i), row.tolist()) for i, row in enumerate(prompts)]
    sampling = engines.Sampling(0.0, 1.0, NEW)
    forward = jax.jit(lambda tokens, at: model.apply({'params': params}, tokens, at=at)[0][:, 0].argmax(-1))

    def cached():
      return [r.ids for results in engine.generate(requests, sampling) for r in results]

    def uncached():
      tokens = jnp.pad(jnp.asarray(prompts, jnp.int32), ((0, 0), (0, NEW)))
      for t in range(PROMPT, PROMPT + NEW):
        tokens = tokens.at[:, t].set(forward(tokens, jnp.full(ROWS, t - 1)))
      return np.asarray(tokens[:, PROMPT:]).tolist()

    assert cached() == uncached(), 'the two do not give the same tokens'
    seconds = {f: [] for f in (cached, uncached)}
    for _ in range(ROUNDS):
      for f in seconds:
        start = time.perf_counter()
        f()
        seconds[f].append(time.perf_counter() - start)
  rate = {f.__name__: ROWS * NEW / statistics.median(s) for f, s in seconds.items()}
  result = dict(machine=f'{platform.machine()} {jax.devices()[0].device_kind}', tokens_per_second=rate,
                cached_over_uncached=rate['cached'] / rate['uncached'])
  for name, value in rate.items():
    print(f'{name:>9}  {value:9.0f} tokens/s')
  print(f'    ratio  {result["cached_over_uncached"]:9.2f}')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
