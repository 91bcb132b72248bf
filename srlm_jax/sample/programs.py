"""The sampler's jitted programs: prefill, decode, and what a model makes of given texts."""
import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax import compiler
from srlm_jax.models import attention, cache as caches, packed, vocab
from srlm_jax.sample import draw
from srlm_jax.sharding import AXES

LOGITS = 128  # positions of a row whose logits are computed together


@flax.struct.dataclass
class Rows:
  """The state of every slot of the cache."""
  token: jax.Array          # [B] the last token, whose K/V is not in the cache yet
  prefix_length: jax.Array  # [B] tokens of the shared prefix that the row begins with
  length: jax.Array         # [B] the row's own tokens in the cache
  count: jax.Array          # [B] generated tokens
  limit: jax.Array          # [B] the most tokens to generate
  fold_data: jax.Array      # [B] uint32, folded into the stage's PRNG key
  live: jax.Array           # [B] there is more to generate
  ended: jax.Array          # [B] an eos was generated

  @classmethod
  def empty(cls, slot_count: int):
    """Idle rows as numpy arrays, which `begin` writes to."""
    kinds = dict(fold_data=np.uint32, live=bool, ended=bool)
    return cls(**{f.name: np.zeros(slot_count, kinds.get(f.name, np.int32))
                  for f in dataclasses.fields(cls)})

  @property
  def slot_count(self) -> int:
    """The number of slots."""
    return len(self.token)

  def begin(self, slots, token: int, prefix_length: int, length: int, limits, fold_data):
    """Starts one prompt in `slots`.

    `token`: the last prompt token; `length`: prompt tokens in the slot, without the shared prefix.
    """
    values = dict(token=token, prefix_length=prefix_length, length=length, count=0, limit=limits,
                  fold_data=fold_data, live=True, ended=False)
    for name, value in values.items():
      getattr(self, name)[slots] = value


@functools.cache
def prefill(mesh):
  """-> the jitted `_prefill`, with the compiler options for a mesh."""
  return jax.jit(_prefill, static_argnames='model', donate_argnames='cache',
                 compiler_options=compiler.options(mesh))


def _prefill(model, params, cache, prefix, tokens, view: caches.Prefill):
  """tokens [A, T], right-padded prompts -> the cache with their K/V in the slots of `view`.

  Prefill omits the last prompt token; decode consumes it.
  """
  positions = view.prefix_length[:, None] + jnp.arange(tokens.shape[1])
  _, cache = model.apply({'params': params}, tokens, positions, cache, prefix, view,
                         method='hidden_and_cache')
  return cache


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'steps', 'top'),
                   donate_argnames='cache')
def decode(model, params, cache, prefix, rows: Rows, key, eos,
           per_row: draw.PerRow | None = None, *, sampling: draw.Sampling | None, steps: int,
           top: int = 0):
  """Generates up to `steps` tokens for every live row.

  `sampling`: of all rows; None: `per_row` has that of each. -> the cache, the rows, what was
  generated, and the number of columns that were written. Generated are token ids [B, steps] and
  their log-probs [B, steps]; with `top`, also the ids and log-probs of the `top` most likely tokens
  [B, steps, top]. Log-probs are those of the model, before temperature and truncation.
  """
  keys = jax.vmap(lambda data: jax.random.fold_in(key, data))(rows.fold_data)
  # Sampling needs the whole vocabulary of a row on one chip.
  whole = jax.sharding.PartitionSpec(AXES['B'], None)

  def body(carry):
    cache, rows, made, t = carry
    view = caches.Decode(rows.prefix_length, rows.length, rows.live)
    positions = (rows.prefix_length + rows.length)[:, None]
    hidden, cache = model.apply({'params': params}, rows.token[:, None], positions, cache, prefix,
                                view, method='hidden_and_cache')
    logits = model.apply({'params': params}, hidden, method='logits')
    last, row_keys = (jax.lax.with_sharding_constraint(logits[:, 0], whole),
                      jax.vmap(jax.random.fold_in)(keys, rows.count))
    if sampling is None:
      token = draw.draw_per_row(last, row_keys, per_row)
    else:
      token = draw.draw(last, row_keys, sampling)
    new = token, vocab.token_logps(logits, token[:, None])[:, 0]
    if top:
      new = *new, *most_likely(logits[:, 0], *new, top)
    ended = rows.live & jnp.isin(token, eos)
    count = rows.count + rows.live
    rows = rows.replace(
        token=jnp.where(rows.live, token, rows.token), length=rows.length + rows.live, count=count,
        live=rows.live & ~ended & (count < rows.limit), ended=rows.ended | ended)
    return cache, rows, jax.tree.map(lambda all, x: all.at[:, t].set(x), made, new), t + 1

  shape = rows.slot_count, steps
  made = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
  if top:
    made = *made, jnp.zeros((*shape, top), jnp.int32), jnp.zeros((*shape, top))
  start = cache, rows, made, jnp.zeros((), jnp.int32)
  cache, *found = jax.lax.while_loop(
      lambda carry: carry[1].live.any() & (carry[3] < steps), body, start)
  return cache, *_on_all_chips(found)


def most_likely(logits, tokens, token_logps, count: int):
  """logits [.., V] -> the ids [.., count] of the most likely tokens, and their log-probs.

  `tokens` and `token_logps` [..]: a token of each row and its log-prob, which is not rounded twice.
  """
  largest, ids = jax.lax.top_k(logits, count)
  logps = largest - jax.nn.logsumexp(logits, -1, keepdims=True)
  return ids, jnp.where(ids == tokens[..., None], token_logps[..., None], logps)


@functools.partial(jax.jit, static_argnames=('model', 'top'))
def prompt_logps(model, params, tokens, *, top: int):
  """tokens [B, T] -> the log-prob of each token given those before it [B, T], and the ids and
  log-probs of the `top` most likely tokens in its place [B, T, top].

  Column 0 means nothing.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = model.apply({'params': params}, tokens, positions, packed.Causal(), method='hidden')

  def one(logits, targets):
    logps = vocab.token_logps(logits, targets)
    return logps, *most_likely(logits, targets, logps, top)
  # Column t of the logits predicts token t + 1.
  found = _in_parts(model, params, hidden, jnp.roll(tokens, -1, 1), one)
  return _on_all_chips(jax.tree.map(lambda x: jnp.roll(x, 1, 1), found))


@flax.struct.dataclass
class Continuations:
  """Rows of a context and its continuations, [context | a | b ..], and the tokens to score."""
  tokens: jax.Array            # [B, T]
  positions: jax.Array         # [B, T] within the context and one continuation
  continuation: jax.Array      # [B, T] the continuation of a token, from 1; 0 = context or padding
  target_positions: jax.Array  # [B, N] places in the row that predict the targets
  targets: jax.Array           # [B, N]

  @classmethod
  def empty(cls, rows: int, width: int, targets: int):
    """Rows of padding as numpy arrays, which `put` writes to."""
    shapes = [(rows, width)] * 3 + [(rows, targets)] * 2
    return cls(*(np.zeros(shape, np.int32) for shape in shapes))

  def put(self, row: int, context, continuations):
    """Writes a context and its continuations, token ids, into a row. No last token is an input."""
    start, filled, scored = len(context), len(context), 0
    self.tokens[row, :start], self.positions[row, :start] = context, np.arange(start)
    for number, ids in enumerate(continuations, 1):
      end, scored_end = filled + len(ids) - 1, scored + len(ids)
      self.tokens[row, filled:end] = ids[:-1]
      self.positions[row, filled:end] = start + np.arange(len(ids) - 1)
      self.continuation[row, filled:end] = number
      self.target_positions[row, scored:scored_end] = [start - 1, *range(filled, end)]
      self.targets[row, scored:scored_end] = ids
      filled, scored = end, scored_end


@functools.partial(jax.jit, static_argnames='model')
def score(model, params, rows: Continuations):
  """-> the log-prob of every target [B, N], and whether it is the most likely token [B, N]."""
  view = packed.Shared(attention.SharedSegments(rows.continuation, rows.positions))
  hidden = model.apply({'params': params}, rows.tokens, rows.positions, view, method='hidden')
  hidden = jnp.take_along_axis(hidden, rows.target_positions[..., None], 1)

  def one(logits, targets):
    return vocab.token_logps(logits, targets), draw.argmax(logits) == targets
  return _on_all_chips(_in_parts(model, params, hidden, rows.targets, one))


def _in_parts(model, params, hidden, targets, one):
  """hidden [B, N, D], targets [B, N] -> the arrays [B, N, ..] of `one(logits, targets)`.

  The logits of LOGITS positions of every row are in memory at the same time.
  """
  B, N = targets.shape
  size = min(N, LOGITS)
  parts = -(-N // size)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, parts * size - N), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, parts, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, parts * size, *x.shape[3:])[:, :N]

  def with_logits(part):
    hidden, targets = part
    return one(model.apply({'params': params}, hidden, method='logits'), targets)
  return jax.tree.map(join, jax.lax.map(with_logits, (cut(hidden), cut(targets))))


@functools.partial(jax.jit, static_argnames='model')
def mean_hidden(model, params, tokens, mask):
  """tokens [B, T], mask [B, T] -> [B, D], the mean of the final hidden states where mask is 1.

  float32; 0 for a row whose mask is 0.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = model.apply({'params': params}, tokens, positions, packed.Causal(), method='hidden')
  total = (hidden.astype(jnp.float32) * mask[..., None]).sum(1)
  return _on_all_chips(total / jnp.maximum(mask.sum(1, keepdims=True), 1))


def _on_all_chips(x):
  """Copies what the host reads to all chips, so that every host of a mesh has the whole of it."""
  return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())
