"""The sampler's jitted programs: prompts into the cache, some tokens for every row, log-probs of given responses."""
import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.models import cache as caches, vocab
from srlm_jax.sample import draw
from srlm_jax.sharding import AXES


@flax.struct.dataclass
class Rows:
  """What decodes together: the slots of a cache, and where each of them is."""
  token: jax.Array   # [B] the last one, not yet in the cache
  shared: jax.Array  # [B] tokens of the prefix that the row begins with
  length: jax.Array  # [B] tokens of its own in the cache
  count: jax.Array   # [B] generated
  limit: jax.Array   # [B] to generate, at most
  word: jax.Array    # [B] uint32, the row's randomness
  live: jax.Array    # [B] has more to generate
  ended: jax.Array   # [B] has generated an eos

  @classmethod
  def empty(cls, size: int):
    """On the host: where a row begins, numbers are written."""
    kinds = dict(word=np.uint32, live=bool, ended=bool)
    return cls(**{f.name: np.zeros(size, kinds.get(f.name, np.int32)) for f in dataclasses.fields(cls)})

  @property
  def size(self) -> int:
    return len(self.token)

  def begin(self, slots, token: int, shared: int, length: int, limits, words):
    """Makes slots live with one prompt: `shared` tokens of the prefix, `length` in the cache, and the last."""
    for name, value in dict(token=token, shared=shared, length=length, count=0, limit=limits, word=words, live=True,
                            ended=False).items():
      getattr(self, name)[slots] = value


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def prefill(model, params, cache, prefix, tokens, view: caches.Prefill):
  """tokens [R, T], right-padded, without the last one of each prompt, which `decode` begins with -> the cache."""
  positions = view.shared[:, None] + jnp.arange(tokens.shape[1])
  return model.apply({'params': params}, tokens, positions, cache, prefix, view)[1]


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'steps'), donate_argnames='cache')
def decode(model, params, cache, prefix, rows: Rows, key, eos, *, sampling: draw.Sampling, steps: int):
  """Up to `steps` tokens for every live row -> the cache, the rows, ids and log-probs [B, steps] of the tokens, and how
  many columns of them were written. Log-probs are of the model itself: before temperature and the cuts."""
  keys = jax.vmap(lambda word: jax.random.fold_in(key, word))(rows.word)
  whole = jax.sharding.PartitionSpec(AXES['B'], None)  # every chip draws from whole rows of the vocabulary

  def body(carry):
    cache, rows, ids, logps, t = carry
    view = caches.Decode(rows.shared, rows.length, rows.live)
    logits, cache = model.apply({'params': params}, rows.token[:, None], (rows.shared + rows.length)[:, None], cache,
                                prefix, view)
    uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, rows.count)
    token = draw.draw(jax.lax.with_sharding_constraint(logits[:, 0], whole), uniform, sampling)
    logp = vocab.token_logps(logits, token[:, None])[:, 0]
    ended = rows.live & jnp.isin(token, eos)
    count = rows.count + rows.live
    rows = rows.replace(token=jnp.where(rows.live, token, rows.token), length=rows.length + rows.live, count=count,
                        live=rows.live & ~ended & (count < rows.limit), ended=rows.ended | ended)
    return cache, rows, ids.at[:, t].set(token), logps.at[:, t].set(logp), t + 1

  shape = rows.size, steps
  start = cache, rows, jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros((), jnp.int32)
  return jax.lax.while_loop(lambda carry: carry[1].live.any() & (carry[4] < steps), body, start)


@functools.partial(jax.jit, static_argnames='model')
def response_logps(model, params, tokens, mask):
  """tokens [B, T], mask [B, T] 1 on the response -> the sum [B] of log p of the tokens that the mask shows."""
  logits, _ = model.apply({'params': params}, tokens)
  return (vocab.next_logps(logits, tokens) * mask).sum(-1)
