"""Cost of `Engine.score` on multiple-choice questions: one pass against two, and shared contexts.

  python bench/score.py            # some minutes on 2 cores
  python bench/score.py --quick    # every path on tiny inputs

Scores the choices of random questions with a random Llama in float32. Sides:

  score      as it is: a context is computed once for all its choices
  unshared   with the context once per choice
  sums       a program that computes all logits of a row, for the sums of log-probs
  flags      the same for the greedy flags

All give the same numbers. Runs alternate; the ratios are of medians. `--json=PATH` also writes the
JSON to a file.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing

from srlm_jax import sharding
from srlm_jax.models import llama, vocab
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines

ROWS = 16  # that the two programs compute together


@dataclasses.dataclass(frozen=True)
class Plan:
  """The model, and questions with choices; lengths in tokens."""
  config: Config
  questions: int
  rounds: int  # after one to compile
  choices: int = 4
  context: int = 100
  choice: int = 24


PLANS = dict(
    full=Plan(Config(D=512, F=1536, K=8, G=1, H=64, V=32000, layers=8, context=1024), 16, 3),
    quick=Plan(Config(D=64, F=128, K=2, G=2, H=16, V=1024, layers=2, context=256), 2, 1))


def main():
  f = timing.parser(__doc__).parse_args()
  plan = PLANS['quick' if f.quick else 'full']
  config, mesh = plan.config, sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = llama.init_params(config, jax.random.key(0))
  engine = engines.Engine(llama.Llama(config), params, mesh, (), 0, 'score', slots=1,
                          size=config.context, steps=1)
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(plan.questions):
    context = rng.integers(config.V, size=plan.context).tolist()
    rows += [(context, rng.integers(config.V, size=plan.choice).tolist())
             for _ in range(plan.choices)]
  tokens = np.array([before + after for before, after in rows])
  both = functools.partial(by_two_programs, llama.Llama(config), params, tokens, plan.context)
  sides = dict(score=lambda: engine.score(rows), unshared=lambda: engine.score(rows, share=False),
               sums=lambda: both(sums), flags=lambda: both(greedy))
  with jax.set_mesh(mesh):
    made = {name: side() for name, side in sides.items()}  # compiles
    for name in ('score', 'unshared'):
      np.testing.assert_allclose([s.logp for s in made[name]], made['sums'], rtol=1e-4)
      np.testing.assert_array_equal([s.is_greedy for s in made[name]], made['flags'])
    cost = timing.medians({name: functools.partial(timing.cost, side)
                           for name, side in sides.items()}, plan.rounds)
  seconds = {name: one.seconds for name, one in cost.items()}
  found = dict(machine=roofline.name(), parameters=llama.param_count(config), seconds=seconds,
               one_to_two=seconds['unshared'] / (seconds['sums'] + seconds['flags']),
               shared_to_unshared=seconds['score'] / seconds['unshared'])
  print(f'{found["machine"]}; a Llama with {found["parameters"] / 1e6:.1f}M parameters, float32\n'
        f'{len(rows)} choices of {plan.choice} tokens, {plan.questions} contexts of {plan.context}')
  print(', '.join(f'{name} {s:.2f} s' for name, s in seconds.items()))
  print(f'one pass / two passes: {found["one_to_two"]:.2f}; '
        f'shared / unshared: {found["shared_to_unshared"]:.2f}')
  timing.report(found, f.json)


def by_two_programs(model, params, tokens, start: int, program) -> np.ndarray:
  """`program` on all rows, ROWS at a time."""
  return np.concatenate([program(model, params, tokens[i:i + ROWS], start=start)
                         for i in range(0, len(tokens), ROWS)])


@functools.partial(jax.jit, static_argnames=('model', 'start'))
def sums(model, params, tokens, *, start: int):
  """tokens [B, T] -> the sum of log-probs of those from `start` on [B], from all logits."""
  return vocab.next_token_logps(model.apply({'params': params}, tokens), tokens)[:, start:].sum(-1)


@functools.partial(jax.jit, static_argnames=('model', 'start'))
def greedy(model, params, tokens, *, start: int):
  """tokens [B, T] -> whether those from `start` on are the most likely ones [B]."""
  best = jnp.argmax(model.apply({'params': params}, tokens), -1)
  return (best[:, start - 1:-1] == tokens[:, start:]).all(-1)


if __name__ == '__main__':
  main()
