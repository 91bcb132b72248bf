"""The sampler: requests in, results out, batch by batch in one jitted prefill-and-decode program."""
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from srlm_jax import checkpoint, InputError, sharding
from srlm_jax.data import records, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama, vocab


@dataclasses.dataclass(frozen=True)
class Request:
  """One row to continue. Its `id` is also its randomness: the same in any batch, on any host, after a restart."""
  id: str
  ids: Sequence[int]  # the prompt, bos first


@dataclasses.dataclass(frozen=True)
class Result:
  id: str
  ids: list[int]      # generated, with the eos if there was one
  logps: list[float]  # log p of each under the model itself: before temperature and top-p
  finish: str         # eos, length (cut at max_tokens), or too_long (the prompt leaves no room: not sampled)


@dataclasses.dataclass(frozen=True)
class Sampling:
  temperature: float  # 0: greedy
  top_p: float        # sample from the smallest set of tokens with at least this mass
  max_tokens: int     # generated, at most

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise InputError(f'temperature is {self.temperature}; it is 0 (greedy) or more')
    if not 0 < self.top_p <= 1:
      raise InputError(f'top_p is {self.top_p}; it is above 0 and at most 1')
    if self.max_tokens < 1:
      raise InputError(f'max_tokens is {self.max_tokens}; it is 1 or more')


class Engine:
  """A model ready to sample: parameters on a mesh, and how many rows decode together."""

  def __init__(self, model: llama.Llama, params, mesh, slots: int, eos_ids: Sequence[int], seed: int, stage: str):
    self._model, self._params, self._mesh = model, params, mesh
    self._parts = mesh.shape['data'] * mesh.shape['fsdp']
    self.slots = -(-slots // self._parts) * self._parts
    self._eos = jnp.asarray(eos_ids, jnp.int32)
    self._key = jax.random.fold_in(jax.random.key(seed), _word(stage))

  def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Result]]:
    """Yields the results of `slots` requests at a time, in their order.

    A batch is always the same requests in the same places, so a rerun from any batch gives the same bytes.
    """
    requests = iter(requests)
    while batch := list(itertools.islice(requests, self.slots)):
      for request in batch:
        if not request.ids:
          raise InputError(f'request {request.id} has an empty prompt')
      room = self.room(sampling)
      fits = [r for r in batch if len(r.ids) <= room]
      sampled = iter(self._sample(fits, sampling) if fits else ())
      yield [next(sampled) if len(r.ids) <= room else Result(r.id, [], [], 'too_long') for r in batch]

  def logps(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """(prompt ids, response ids) of at most `slots` rows -> the sum of log-probs of each response."""
    full = rows + [rows[-1]] * (self._rows(len(rows)) - len(rows))
    width = min(_bucket(max(len(a) + len(b) for a, b in full)), self.context)
    pad = [[0] * (width - len(a) - len(b)) for a, b in full]
    arrays = dict(
        tokens=np.asarray([[*a, *b, *p] for (a, b), p in zip(full, pad, strict=True)], np.int32),
        mask=np.asarray([[0] * len(a) + [1] * len(b) + p for (a, b), p in zip(full, pad, strict=True)], np.int32))
    with jax.set_mesh(self._mesh):
      sums = response_logps(self._model, self._params, **sharding.put_batch(arrays, self._mesh))
    return np.asarray(sums)[:len(rows)].tolist()

  @property
  def context(self) -> int:
    """Tokens that the model was made for."""
    return self._model.config.context

  def room(self, sampling: Sampling) -> int:
    """Tokens that a prompt may have."""
    room = self.context - sampling.max_tokens
    if room < 1:
      raise InputError(f'max_tokens is {sampling.max_tokens}, and the model was made for '
                       f'{self.context} in all; lower it')
    return room

  def _rows(self, count: int) -> int:
    """Rows that are decoded for `count` requests: all slots, but fewer, by halves, for a small last batch."""
    rows = self.slots
    while rows % (2 * self._parts) == 0 and rows // 2 >= count:
      rows //= 2
    return rows

  def _sample(self, batch, sampling) -> list[Result]:
    width = min(_bucket(max(len(r.ids) for r in batch)), self._model.config.context - sampling.max_tokens)
    rows = batch + [batch[-1]] * (self._rows(len(batch)) - len(batch))
    arrays = dict(
        prompts=np.asarray([[*r.ids, *[0] * (width - len(r.ids))] for r in rows], np.int32),
        lengths=np.asarray([len(r.ids) for r in rows], np.int32),
        words=np.asarray([_word(r.id) for r in rows], np.uint32))
    arrays = sharding.put_batch(arrays, self._mesh)
    with jax.set_mesh(self._mesh):
      state = sample(self._model, self._params, **arrays, key=self._key, eos=self._eos,
                     temperature=sampling.temperature, p=sampling.top_p, greedy=sampling.temperature == 0,
                     max_tokens=sampling.max_tokens)
    ids, logps, count, ended = (np.asarray(x) for x in (state.ids, state.logps, state.count, state.ended))
    return [Result(r.id, ids[i, :count[i]].tolist(), logps[i, :count[i]].tolist(), 'eos' if ended[i] else 'length')
            for i, r in enumerate(batch)]


def load(config, folder, stage: str, stop: str = '') -> tuple[Engine, tokenizers.Tokenizer]:
  """A checkpoint onto this host's devices in the sampling dtype, ready; `stop`: a text that ends a row like eos."""
  shape = dataclasses.replace(model_config.load(folder), dtype=config.sample.dtype)
  tokenizer = tokenizers.load(folder, shape.V)
  m = config.sample_mesh
  mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor, jax.local_devices())
  with jax.set_mesh(mesh):
    params, _ = checkpoint.restore_params(folder, mesh, config.sample.dtype)
  ends = (*tokenizer.eos_ids, *(tokenizer.encode(stop)[-1:] if stop else ()))
  return Engine(llama.Llama(shape), params, mesh, config.sample.slots, ends, config.seed, stage), tokenizer


def run(engine: Engine, requests: Sequence[Request], sampling: Sampling, path, record: Callable, title: str):
  """Appends `record(i, result)` of every request to a file; what a killed run left there is not made again."""
  records.same_hosts(path)
  out = records.Appender(path)
  start = out.count // engine.slots * engine.slots
  progress = tqdm.tqdm(total=len(requests), initial=start, desc=title, unit='rows', delay=2, leave=False,
                       mininterval=2 if sys.stderr.isatty() else 30, disable=jax.process_index() != 0)
  for results in engine.generate(requests[start:], sampling):
    new = [record(start + i, result) for i, result in enumerate(results)]
    out.append(new[max(out.count - start, 0):])
    start += len(results)
    progress.update(len(results))
  progress.close()
  out.close()


@flax.struct.dataclass
class DecodeState:
  ids: jax.Array     # [B, M] generated
  logps: jax.Array   # [B, M] of the generated
  count: jax.Array   # [B] how many
  ended: jax.Array   # [B] has generated an eos
  logits: jax.Array  # [B, V] for the next token
  cache: llama.Cache
  t: jax.Array       # [] columns of `ids` written


@functools.partial(jax.jit, static_argnames=('model', 'greedy', 'max_tokens'))
def sample(model, params, prompts, lengths, words, key, eos, temperature, p, *, greedy: bool, max_tokens: int):
  """prompts [B, T] right-padded, lengths [B], words [B]: each row's randomness -> DecodeState."""
  batch, width = prompts.shape
  cache = llama.Cache.empty(model.config, batch, width + max_tokens)
  logits, cache = model.apply({'params': params}, prompts, cache=cache, at=lengths - 1)
  keys = jax.vmap(lambda w: jax.random.fold_in(key, w))(words)  # [B]
  state = DecodeState(
      ids=jnp.zeros((batch, max_tokens), jnp.int32), logps=jnp.zeros((batch, max_tokens)),
      count=jnp.zeros(batch, jnp.int32), ended=jnp.zeros(batch, bool), logits=logits[:, 0], cache=cache,
      t=jnp.zeros((), jnp.int32))

  def body(s: DecodeState):
    if greedy:
      token = s.logits.argmax(-1)
    else:
      scaled = top_p(s.logits / temperature, p)
      token = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, s.t), scaled)
    token = token.astype(jnp.int32)
    logp = vocab.token_logps(s.logits[:, None], token[:, None])[:, 0]
    logits, cache = model.apply({'params': params}, token[:, None], (lengths + s.t)[:, None], s.cache)
    return DecodeState(
        ids=s.ids.at[:, s.t].set(token), logps=s.logps.at[:, s.t].set(logp),
        count=s.count + ~s.ended, ended=s.ended | jnp.isin(token, eos), logits=logits[:, 0], cache=cache, t=s.t + 1)

  return jax.lax.while_loop(lambda s: ~s.ended.all() & (s.t < max_tokens), body, state)


@functools.partial(jax.jit, static_argnames='model')
def response_logps(model, params, tokens, mask):
  """tokens [B, T], mask [B, T] 1 on the response -> the sum [B] of log p of the tokens that the mask shows."""
  logits, _ = model.apply({'params': params}, tokens)
  return (vocab.next_logps(logits, tokens) * mask).sum(-1)


def top_p(logits, p):
  """Masks logits [B, V] outside the smallest set of most likely tokens with mass >= p; ties are kept together.

  The probability of the last token that is let in is found bit by bit, without sorting: the bits of positive
  floats order as the floats do.
  """
  probs = jax.nn.softmax(logits, -1)
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def refine(i, cut):  # the largest cut [B, 1] such that tokens at or above it have the mass
    tried = cut | (1 << (30 - i))
    mass = jnp.where(bits >= tried, probs, 0).sum(-1, keepdims=True)
    return jnp.where(mass >= p, tried, cut)

  cut = jax.lax.fori_loop(0, 31, refine, jnp.zeros((*logits.shape[:-1], 1), jnp.int32))
  return jnp.where(bits >= cut, logits, -jnp.inf)


def _bucket(length: int) -> int:
  """The width that a prompt is padded to: 32, 48, 64, 96, 128, 192, .. so that few shapes are compiled.

  >>> [_bucket(n) for n in (5, 33, 65, 130, 300)]
  [32, 48, 96, 192, 384]
  """
  power = 32
  while power < length:
    power *= 2
  return power * 3 // 4 if power * 3 // 4 >= max(length, 32) else power


def _word(text: str) -> int:
  """32 bits of a text."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'big')
