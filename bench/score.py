"""Cost of `Engine.score` on multiple-choice questions: one pass against two, and shared contexts.

`python bench/score.py` scores the choices of random questions with a random Llama. Sides: *score*
as it is; *unshared*, with the context once per choice; *sums* and *flags*, two programs that
compute all logits of a row, one for the sums of log-probs and one for the greedy flags. All give
the same numbers. Runs alternate; the ratios are of medians.
"""
import functools

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import timing

from srlm_jax import cli, InputError, sharding
from srlm_jax.models import llama, vocab
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines

flags.DEFINE_integer('questions', 16, 'Questions.')
flags.DEFINE_integer('choices', 4, 'Choices per question.')
flags.DEFINE_integer('context', 100, 'Tokens of a question.')
flags.DEFINE_integer('choice', 24, 'Tokens of a choice.')
flags.DEFINE_integer('width', 512, 'Model width.')
flags.DEFINE_integer('layers', 8, 'Layers of the model.')
flags.DEFINE_integer('vocabulary', 32000, 'Tokens of the vocabulary.')
flags.DEFINE_integer('rounds', 3, 'Rounds, after one to compile.')
flags.DEFINE_string('out', None, 'JSON file to write.')
ROWS = 16  # that the two programs compute together


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  config = Config(f.width, 3 * f.width, f.width // 64, 1, 64, f.vocabulary, f.layers, context=1024)
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = llama.init_params(config, jax.random.key(0))
  engine = engines.Engine(llama.Llama(config), params, mesh, (), 0, 'score', slots=1, size=1024,
                          steps=1)
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(f.questions):
    context = rng.integers(f.vocabulary, size=f.context).tolist()
    rows += [(context, rng.integers(f.vocabulary, size=f.choice).tolist())
             for _ in range(f.choices)]
  tokens = np.array([before + after for before, after in rows])
  both = functools.partial(by_two_programs, llama.Llama(config), params, tokens, f.context)
  sides = dict(score=lambda: engine.score(rows), unshared=lambda: engine.score(rows, share=False),
               sums=lambda: both(sums), flags=lambda: both(greedy))
  with jax.set_mesh(mesh):
    found = {name: side() for name, side in sides.items()}  # compiles
    for name in ('score', 'unshared'):
      np.testing.assert_allclose([s.logp for s in found[name]], found['sums'], rtol=1e-4)
      if [s.is_greedy for s in found[name]] != found['flags'].tolist():
        raise InputError(f'{name} and the program of its own give different greedy flags')
    cost = timing.medians({name: functools.partial(timing.cost, side)
                           for name, side in sides.items()}, f.rounds)
  seconds = {name: one.seconds for name, one in cost.items()}
  two = seconds['sums'] + seconds['flags']
  print(f'{jax.devices()[0].device_kind}; {llama.param_count(config) / 1e6:.1f}M parameters; '
        f'{len(rows)} choices of {f.choice} tokens, {f.questions} contexts of {f.context}\n'
        + ', '.join(f'{name} {s:.2f} s' for name, s in seconds.items())
        + f'\none pass / two passes: {seconds["unshared"] / two:.2f}; '
        f'shared / unshared: {seconds["score"] / seconds["unshared"]:.2f}')
  timing.report(dict(seconds=seconds, one_to_two=seconds['unshared'] / two,
                     shared_to_unshared=seconds['score'] / seconds['unshared']), f.out)


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
  cli.run_app(main)
