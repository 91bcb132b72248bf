"""The sampling engine: continuous batching with a shared prefix.

`slots` rows decode together, a few tokens per call. Between calls, the slots of finished rows go to
waiting samples, of a stream (`Engine.generate`) or of a caller who adds them (`Engine.open`). A
request (one prompt, n samples) is prefilled once, and its K/V are copied to n slots. The common
prefix of a stream's first requests (the judge's rubric) is prefilled once, and every row reads it.
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from srlm_jax import (
  catalog,
  config as configs,
  hosts,
  InputError,
  model_files,
  preemption,
  sharding,
  stage as stages,
)
from srlm_jax.checkpoint import convert
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import cache as caches, config as model_config, int8, kernels, llama, sizing
from srlm_jax.sample import programs
from srlm_jax.sample.draw import PerRow, Sampling
from srlm_jax.sample.schedule import KeptSamples, Request, Result, Schedule

PREFIX_REQUESTS = 64  # first requests of a stream, whose common prefix is shared
MIN_PREFIX = 16       # tokens; a shorter prefix does not pay for its part of the attention
SCORE_PREFILLS = 16   # `Engine.score` computes as many tokens together as so many prefills
PROMPT_ROWS = 4       # rows that `Engine.prompt_logps` computes together
HIDDEN_ROWS = 16      # the same for `Engine.mean_hidden`, which computes no logits
MOST_TOP = 20         # most likely tokens whose log-probs a request may ask for
HELD_PER_SLOT = 16    # requests per slot whose results may wait for an earlier request


@dataclasses.dataclass
class Work:
  """Token counts for utilization statistics."""
  unshared_prompt_tokens: int = 0  # prompts, counted once per sample
  prefilled: int = 0   # computed by prefills, with padding
  slot_steps: int = 0  # slots x decode steps
  generated: int = 0
  scored: int = 0      # whose log-probs were computed, prompts included

  @property
  def slot_utilization(self) -> float:
    """Slot utilization: generated tokens per slot and decode step."""
    return self.generated / max(self.slot_steps, 1)


@dataclasses.dataclass
class Slots:
  """Rows that decode together, and the requests that they belong to."""
  schedule: Schedule
  rows: programs.Rows
  cache: Any
  prefix_ids: tuple[int, ...]
  prefix: Any                # the K/V of prefix_ids
  sampling: Sampling | None  # of all requests; None: each has its own
  per_row: PerRow | None     # then, that of each row


class Score(NamedTuple):
  """What `Engine.score` finds."""
  logp: float      # sum of log-probs of the continuation's tokens
  is_greedy: bool  # whether each of them is the most likely one


class Engine:
  """A model ready to sample: parameters on a mesh and a cache of `slots` slots of `size` tokens."""

  def __init__(self, model: llama.Llama, params, mesh, eos_ids: Sequence[int], seed: int,
               stage: str, *, slots: int, size: int, steps: int, share: bool = True,
               refill: bool = True):
    """`steps`: tokens per call. Without `share`, every sample is prefilled whole. Without `refill`,
    new rows start only when all have ended. Both exist for measurements; samples are the same."""
    self._kernels = kernels.choose(mesh.devices.flat[0].platform, model.config)
    self._model = model.clone(kernels=self._kernels)
    if self._kernels.fused:
      params = llama.fuse(params)
    if self._kernels.formats:
      params = jax.device_put(params, self._kernels.formats(params))
    self._params = llama.unroll(params) if self._kernels.unrolled else params
    self._mesh, self._share, self._refill = mesh, share, refill
    self._agreement = preemption.Agreement(mesh.devices)
    self._is_first_host = jax.process_index() == min(d.process_index for d in mesh.devices.flat)
    self._parts = mesh.shape['data'] * mesh.shape['fsdp']
    self.begin(eos_ids, seed, stage, slots=slots, size=size, steps=steps)

  def begin(self, eos_ids: Sequence[int], seed: int, stage: str, *, slots: int, size: int,
            steps: int):
    """Sets what belongs to a stage, as in `__init__`; keeps only the parameters of the one before.
    """
    config = self._model.config
    for eos in eos_ids:
      if not 0 <= eos < config.V:
        raise InputError(f'the eos id {eos} is not a token of the model, whose vocabulary has '
                         f'{config.V}; use the tokenizer of this model, or correct its eos id')
    self._steps = steps
    self.slots = _up(slots, self._parts)
    self.context = config.context
    self.size = min(size, config.context)  # tokens of a row, prompt and response
    self.title = stage
    self._eos = jnp.asarray(eos_ids, jnp.int32)
    self._key = jax.random.fold_in(jax.random.key(seed), _fold_data(stage))
    # Cache of the last call; prefix caches by token ids (the empty one and the latest).
    self._cache, self._prefixes = None, {}
    self.work = Work()

  def reset_work(self):
    """Sets the token counts to zero."""
    self.work = Work()

  @property
  def kernels(self) -> str:
    return self._kernels.name

  def stop_if_requested(self):
    """Raises preemption.Stopped at the same call on all hosts of the mesh."""
    preemption.stop_if_requested(self.title, self._agreement)

  def generate(self, requests: Iterable[Request], sampling: Sampling, done: int = 0,
               kept: KeptSamples = types.MappingProxyType({})) -> Iterator[
      tuple[Request, list[Result]]]:
    """Yields every request with its n results, in order.

    The caller already has the first `done` samples of the stream, and those of `kept` by the id of
    their request; a request with no other samples comes without results. If the requests have their
    own `sampling`, all of them have; `sampling` is then only their limit of max_tokens.
    """
    max_prompt_tokens = self.max_prompt_tokens(sampling)
    stream = iter(requests)
    first = list(itertools.islice(stream, PREFIX_REQUESTS))
    if not first:
      return
    ids = self._common([r.ids for r in first if len(r.ids) <= max_prompt_tokens])
    count = sum(r.n for r in first) if len(first) < PREFIX_REQUESTS else self.slots
    rows = programs.Rows.empty(self._rows(count))
    schedule = Schedule(itertools.chain(first, stream), rows.slot_count, max_prompt_tokens, done,
                        kept, HELD_PER_SLOT * self.slots, self._share, self._refill)
    slots = self._slots(schedule, rows, ids, None if first[0].sampling else sampling)
    while not schedule.done():
      self.stop_if_requested()
      self.advance(slots)
      for request, results in schedule.leave():
        if results and results[0].finish == 'too_long' and self._is_first_host:
          print(f'{self.title}: the prompt of {request.id} has {len(request.ids)} tokens, more '
                f'than the {max_prompt_tokens} that fit: skipped', flush=True)
        yield request, results
    self._cache = slots.cache

  def _common(self, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The prefix of prompts, token ids, that is worth computing once; () if none is."""
    ids = common([p[:-1] for p in prompts]) if self._share and len(prompts) > 1 else ()
    return ids if len(ids) >= MIN_PREFIX else ()

  def _slots(self, schedule: Schedule, rows, prefix_ids: tuple[int, ...],
             sampling: Sampling | None) -> Slots:
    """Idle slots, with the cache of the last call if it has their number."""
    prefix = self._prefix(prefix_ids)
    cache, self._cache = self._cache, None
    if cache is None or jax.tree.leaves(cache)[0].shape[1] != rows.slot_count:
      cache = None  # frees the old cache before the new one is allocated
      cache = self._empty(rows.slot_count, self.size)
    per_row = PerRow.empty(rows.slot_count) if sampling is None else None
    return Slots(schedule, rows, cache, prefix_ids, prefix, sampling, per_row)

  def open(self, prompts: Sequence[Sequence[int]] = ()) -> Slots:
    """-> all slots, for requests that come one by one: `put` adds one, `advance` decodes.

    The schedule's `stop` and `remove` end samples and requests between two calls. `prompts`: token
    ids of all that will come, if they are known: no more slots than that, and what they all begin
    with is prefilled once.
    """
    rows = programs.Rows.empty(self._rows(len(prompts)) if prompts else self.slots)
    schedule = Schedule((), rows.slot_count, self.size, 0, {}, 0, self._share, self._refill)
    return self._slots(schedule, rows, self._common(prompts), None)

  def put(self, slots: Slots, request: Request) -> list[Result]:
    """Adds a request with its own `sampling` -> its results, which `advance` extends."""
    self.check_fits(len(request.ids), request.sampling.max_tokens)
    return slots.schedule.put(request)

  def check_fits(self, prompt_tokens: int, max_tokens: int):
    """Raises InputError if a prompt and its response do not fit into a row."""
    if prompt_tokens + max_tokens > self.size:
      raise InputError(f'the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}; '
                       f'together they exceed the {self.size} tokens of a row; shorten the prompt '
                       f'or lower max_tokens')

  def advance(self, slots: Slots):
    """Gives free slots to waiting samples, and decodes `steps` tokens of all running ones."""
    if slots.per_row:  # the caller may have stopped some
      idle = np.ones(slots.rows.slot_count, bool)
      idle[list(slots.schedule.running)] = False
      slots.rows.live[idle] = False
    self._enter(slots.schedule.admit(), slots)
    if slots.schedule.running:
      self._decode(slots)

  def _enter(self, parts, slots: Slots):
    """Prefills the prompts of `parts` without their last tokens, and starts their slots."""
    groups = defaultdict(list)  # by width
    for part in parts:
      ids, sampling = part.request.ids, part.request.sampling or slots.sampling
      prefix_length = len(common([ids[:-1], slots.prefix_ids]))
      own = ids[prefix_length:-1]
      fold_data = [_fold_data(f'{part.request.id}/{number}') for number in part.numbers]
      lengths = part.request.lengths or [sampling.max_tokens] * part.request.n
      limits = [min(lengths[number], sampling.max_tokens) for number in part.numbers]
      slots.rows.begin(part.slots, ids[-1], prefix_length, len(own), limits, fold_data)
      if slots.per_row:
        slots.per_row.set(part.slots, sampling)
      self.work.unshared_prompt_tokens += len(part.slots) * len(ids)
      if len(own):
        groups[self._width(len(own))].append((own, prefix_length, part.slots))
    for width, group in sorted(groups.items()):
      prompts = self._parts * max(self._kernels.prefill_tokens // width // self._parts, 1)
      for i in range(0, len(group), prompts):
        slots.cache = self._prefill(group[i:i + prompts], prompts, width, slots.cache,
                                    slots.prefix)

  def _prefill(self, group, prompts: int, width: int, cache, prefix):
    """Prefills at most `prompts` prompts of at most `width` tokens: (ids, prefix length, slots)."""
    tokens = np.zeros((prompts, width), np.int32)
    prefix_lengths = np.zeros(prompts, np.int32)
    copies = []
    for i, (ids, prefix_length, slots) in enumerate(group):
      tokens[i, :len(ids)], prefix_lengths[i] = ids, prefix_length
      copies += [(i, slot) for slot in slots]
    pairs = np.zeros((2, jax.tree.leaves(cache)[0].shape[1]), np.int32)  # one per slot
    pairs[:, :len(copies)] = np.transpose(copies)
    self.work.prefilled += tokens.size
    with jax.set_mesh(self._mesh):
      tokens, prefix_lengths = sharding.put_batch((tokens, prefix_lengths), self._mesh)
      view = caches.Prefill(prefix_lengths, *pairs, np.int32(len(copies)))
      return programs.prefill(self._mesh)(self._model, self._params, cache, prefix, tokens, view)

  def _decode(self, slots: Slots):
    """Decodes `steps` tokens, and passes them to the schedule."""
    schedule, rows, static = slots.schedule, slots.rows, slots.sampling
    if static:
      static = dataclasses.replace(static, max_tokens=1)  # one compilation for all lengths
    is_asked = any(entry.request.top for entry, _ in schedule.running.values())
    with jax.set_mesh(self._mesh):
      placed, per_row = sharding.put_batch((rows, slots.per_row), self._mesh)
      slots.cache, *made = programs.decode(
          self._model, self._params, slots.cache, slots.prefix, placed, self._key, self._eos,
          per_row, sampling=static, steps=self._steps,
          top=min(MOST_TOP, self._model.config.V) if is_asked else 0)
    after, (ids, token_logps, *top), steps = jax.tree.map(np.array, jax.device_get(made))
    self.work.slot_steps += rows.slot_count * int(steps)
    for slot, (entry, _) in list(schedule.running.items()):
      new = int(after.count[slot] - rows.count[slot])
      if not np.isfinite(token_logps[slot, :new]).all():
        raise InputError(f'{self.title}: log-probs of {entry.request.id} are not finite; the '
                         f'model\'s parameters are damaged, train or convert it again')
      finish = '' if after.live[slot] else 'eos' if after.ended[slot] else 'length'
      most = entry.request.top
      likely = _by_id(*(x[slot, :new, :most] for x in top)) if most else ()
      schedule.add(slot, ids[slot, :new].tolist(), token_logps[slot, :new].tolist(), finish, likely)
      self.work.generated += new
    slots.rows = after

  def _prefix(self, ids: tuple[int, ...]):
    """The K/V of a prefix that all rows read."""
    if ids not in self._prefixes:
      if ids:
        width = self._width(len(ids))
        cache = self._prefill([(ids, 0, [0])], self._parts, width,
                              self._empty(self._parts, width), self._prefix(()))
      else:
        cache = self._empty(self._parts, 0)
      with jax.set_mesh(self._mesh):
        self._prefixes = {(): self._prefixes.get(()), ids: caches.as_prefix(cache)}
    return self._prefixes[ids]

  def _empty(self, rows: int, size: int):
    """An empty cache; its size is rounded up to a multiple that the kernels support."""
    with jax.set_mesh(self._mesh):
      return caches.empty(self._model.config, rows, _up(size, self._kernels.size_multiple),
                          self._kernels.unrolled)

  def _width(self, length: int) -> int:
    """The width that a prompt is padded to; few widths, so that there are few compilations."""
    return min(_up(bucket(length), self._kernels.width_multiple),
               _up(self.size, self._kernels.size_multiple))

  def _rows(self, count: int) -> int:
    """The number of slots for `count` samples: all, or halved while that is enough."""
    rows = self.slots
    while rows % (2 * self._parts) == 0 and rows // 2 >= count:
      rows //= 2
    return rows

  def max_prompt_tokens(self, sampling: Sampling) -> int:
    """The most tokens that a prompt may have."""
    found = self.size - sampling.max_tokens
    if found < 1:
      raise InputError(f'max_tokens is {sampling.max_tokens}, and a row may have {self.size} '
                       f'tokens in all (the smaller of the model\'s context and '
                       f'config.sample.size); lower it')
    return found

  def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]],
            share: bool = True) -> list[Score]:
    """(context ids, continuation ids) -> the score of each continuation, in one forward pass.

    Both together may have one token more than the model's context, because the last one is only
    predicted. A context that consecutive rows share is computed once; without `share`, the scores
    are batch-invariant. Raises InputError for an empty context or continuation, for one that is too
    long, and for ids that are not in the vocabulary.
    """
    for i, row in enumerate(rows):
      self._check_row(i, *row)
    groups = list(_groups(rows, self.size if share else 0))
    contexts = [rows[group[0]][0] for group in groups]
    texts = [[rows[i][1] for i in group] for group in groups]
    scored = [sum(map(len, some)) for some in texts]
    shapes = [(self._bucket(len(context) + count - len(some)), _target_bucket(count))
              for context, some, count in zip(contexts, texts, scored, strict=True)]
    found: list[Any] = [None] * len(rows)
    most = SCORE_PREFILLS * self._kernels.prefill_tokens
    for some, shape in self._by_shape(shapes, lambda width: most // width):
      batch = programs.Continuations.empty(*shape)
      for row, i in enumerate(some):
        batch.put(row, contexts[i], texts[i])
      with jax.set_mesh(self._mesh):
        made = programs.score(self._model, self._params, sharding.put_batch(batch, self._mesh))
      for i, logps, is_best in zip(some, *map(np.asarray, made), strict=False):  # the rest: padding
        ends = np.cumsum([len(ids) for ids in texts[i]])
        for j, end in zip(groups[i], ends.tolist(), strict=True):
          part = np.s_[end - len(rows[j][1]):end]
          found[j] = Score(float(logps[part].sum(dtype=np.float64)), bool(is_best[part].all()))
    if not np.isfinite([score.logp for score in found]).all():
      raise InputError(f'{self.title}: log-probs are not finite; the model\'s parameters are '
                       f'damaged, train or convert it again')
    return found

  def _check_row(self, i: int, context: Sequence[int], continuation: Sequence[int]):
    """Raises InputError if row number i of `score` cannot be scored."""
    for name, ids in (('context', context), ('continuation', continuation)):
      if not len(ids):
        raise InputError(f'row {i} to score has an empty {name}; give it at least one token')
      if min(ids) < 0 or max(ids) >= self._model.config.V:
        bad = next(x for x in ids if not 0 <= x < self._model.config.V)
        raise InputError(f'the {name} of row {i} to score has the id {bad}, and the model\'s '
                         f'vocabulary ends at {self._model.config.V - 1}; use its tokenizer')
    if (count := len(context) + len(continuation)) > self.context + 1:
      raise InputError(f'row {i} to score has {count} tokens, and the model\'s context allows '
                       f'{self.context + 1}; shorten its context')

  def prompt_logps(self, prompts: Sequence[Sequence[int]], top: int) -> list[
      tuple[list[float], list[dict[int, float]]]]:
    """Prompts -> of each: the log-probs of its tokens but the first, and {id: log-prob} of the
    `top` most likely tokens in the place of each."""
    found = [None] * len(prompts)
    for some, tokens in self._batches(prompts, PROMPT_ROWS):
      with jax.set_mesh(self._mesh):
        made = programs.prompt_logps(self._model, self._params,
                                     sharding.put_batch(tokens, self._mesh),
                                     top=min(MOST_TOP, self._model.config.V))
      logps, ids, likely = map(np.asarray, made)
      for row, i in enumerate(some):
        part = np.s_[row, 1:len(prompts[i])]
        found[i] = logps[part].tolist(), _by_id(ids[part][:, :top], likely[part][:, :top])
    return found

  def mean_hidden(self, rows: Sequence[Sequence[int]], skip: int) -> np.ndarray:
    """-> [rows, D], float32: of each row, the mean of the final hidden states (the input of the
    head) over its tokens but the first `skip`; batch-invariant."""
    found = np.zeros((len(rows), self._model.config.D), np.float32)
    for some, tokens in self._batches(rows, HIDDEN_ROWS):
      mask = np.zeros_like(tokens)
      for row, i in enumerate(some):
        mask[row, skip:len(rows[i])] = 1
      with jax.set_mesh(self._mesh):
        means = programs.mean_hidden(self._model, self._params,
                                     *sharding.put_batch((tokens, mask), self._mesh))
      found[some] = np.asarray(means)[:len(some)]  # the rest is padding
    return found

  def _batches(self, rows: Sequence[Sequence[int]], most: int) -> Iterator[
      tuple[list[int], np.ndarray]]:
    """Yields (indices of rows, their ids padded with zeros), about `most` rows at a time.

    Rows of a batch have the same padded width, which depends only on the row. There may be more
    rows of zeros at the end.
    """
    widths = [(self._bucket(len(ids)),) for ids in rows]
    for some, shape in self._by_shape(widths, lambda _: most):
      tokens = np.zeros(shape, np.int32)
      for row, i in enumerate(some):
        tokens[row, :len(rows[i])] = rows[i]
      yield some, tokens

  def _by_shape(self, shapes: Sequence[tuple[int, ...]], rows: Callable[[int], int]) -> Iterator[
      tuple[list[int], tuple[int, ...]]]:
    """Yields (indices of rows of one shape, the shape of their batch).

    `shapes`: of each row, its padded width first. `rows`: width -> about how many rows a batch has.
    It may have more at the end, of padding.
    """
    indices = defaultdict(list)
    for i, shape in enumerate(shapes):
      indices[shape].append(i)
    for shape, group in indices.items():
      size = _up(max(rows(shape[0]), 1), self._parts)
      for first in range(0, len(group), size):
        yield group[first:first + size], (size, *shape)

  def _bucket(self, length: int) -> int:
    """The width of a row without a cache that holds `length` tokens."""
    return min(bucket(length), self.context)


def _groups(rows, most: int) -> Iterator[list[int]]:
  """Indices of consecutive rows (context, continuation) that share a context.

  It has at least MIN_PREFIX tokens, and at most `most` with the continuations.

  >>> rows = [([7] * 20, [1, 2]), ([7] * 20, [3]), ([8] * 20, [4])]
  >>> list(_groups(rows, 64)), list(_groups(rows, 0))
  ([[0, 1], [2]], [[0], [1], [2]])
  """
  group, length = [], 0
  for i, (context, continuation) in enumerate(rows):
    length += len(continuation) - 1
    if not (group and length <= most and len(context) >= MIN_PREFIX
            and list(context) == list(rows[group[0]][0])):
      if group:
        yield group
      group, length = [], len(context) + len(continuation) - 1
    group.append(i)
  if group:
    yield group


def _by_id(ids, logps) -> list[dict[int, float]]:
  """ids [T, top], logps [T, top] -> {id: log-prob} of each token."""
  return [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), logps.tolist(), strict=True)]


def config_alone(dtype: str = '', tensor: int = -1, seed: int = 0, **sample) -> ConfigDict:
  """The config with which an engine is loaded outside of a run.

  dtype: '' is float32 on a CPU, else bfloat16; tensor: -1 is chosen; sample: keys of the section.
  """
  found = configs.get('m0', '7b')
  dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  found.sample.update(sample, dtype=dtype)
  found.sample_mesh.tensor, found.seed = tensor, seed
  return found


def choose(config, folders: Sequence):
  """-> a config whose open keys for sampling have values: for these hosts and the largest model."""
  shapes = [model_config.load(folder) for folder in folders]
  largest = max(shapes, key=llama.param_count)
  here, slices = sizing.devices(local=True), sizing.devices().slices
  found = sizing.sampling(config, largest, here, jax.process_count() // slices)
  return catalog.replace(config, found)


def load(config, folder, stage: str, chat: str = 'none',
         stop: str = '') -> tuple[Engine, tokenizers.Tokenizer]:
  """Restores a checkpoint onto every group of hosts in the sampling dtype -> engine and tokenizer.

  `folder` may also be a Hugging Face model. All hosts must call it. Rows end with eos, with the end
  of a turn in the chat format `chat`, and with the last token of the text `stop`. In a block of
  `kept`, the engine of the stage before is used again if it has the same parameters.
  """
  config = choose(config, [folder])
  c, mesh = config.sample, group_mesh(config)
  refuse_too_large(config, folder)
  shape = dataclasses.replace(model_config.load(folder), dtype=c.dtype)
  tokenizer = tokenizers.load(folder, shape.V)
  ends = [*templates.end_ids(chat, tokenizer), *(tokenizer.encode(stop)[-1:] if stop else ())]
  for_stage = dict(slots=c.slots, size=c.size, steps=c.steps)
  identity = model_files.recorded_hash(folder) if model_files.exists(folder) else str(folder)
  made_of = identity, shape, mesh, c.int8, c.lora_merge
  if _kept and _kept.made_of == made_of:
    _kept.engine.begin(ends, config.seed, stage, **for_stage)
    return _kept.engine, tokenizer
  if _kept:
    _kept.drop()  # before the memory of the next one is taken
    _kept.restores += 1
  with jax.set_mesh(mesh):
    params = convert.load(folder, mesh, c.dtype, once=True, merge=c.lora_merge)
    params = int8.quantize(params) if c.int8 else params
  engine = Engine(llama.Llama(shape), params, mesh, ends, config.seed, stage, **for_stage)
  if _kept:
    _kept.engine, _kept.made_of = engine, made_of
  return engine, tokenizer


def chat_of(folder: str) -> str:
  """The chat format of a model: that of its training here, or its tokenizer's; or none."""
  if model_files.exists(folder) and (chat := stages.trained_with(folder, 'chat')):
    return chat
  return 'tokenizer' if tokenizers.load(folder).template else 'none'


class Kept:
  """The engine of the last stage, and the number of `restores` from a checkpoint."""

  def __init__(self):
    self.restores, self.engine, self.made_of = 0, None, None

  def drop(self):
    """Frees the memory of the engine."""
    self.engine = self.made_of = None


_kept: Kept | None = None


@contextlib.contextmanager
def kept() -> Iterator[Kept]:
  """Inside the block, consecutive stages that sample from the same model share one engine."""
  global _kept
  before, _kept = _kept, Kept()
  try:
    yield _kept
  finally:
    _kept = before


def refuse_too_large(config, folder):
  """Raises InputError if a group of hosts cannot hold the model in `folder` and the cache.

  `config`: from `choose`.
  """
  c, shape, count = config.sample, model_config.load(folder), group(config).size
  size, itemsize = min(c.size, shape.context), jnp.dtype(c.dtype).itemsize
  weight_bytes = itemsize + 1 if c.int8 else itemsize
  weights = llama.param_count(shape) * weight_bytes * config.sample_mesh.data
  cache = 2 * shape.layers * c.slots * shape.K * size * shape.H * itemsize
  here = hosts.memory() * count // jax.process_count()
  if max(weights, (weights // weight_bytes if c.int8 else weights) + cache) > here:
    where = 'this host has' if count == 1 else f'a group of {count} hosts has'
    raise InputError(f'sampling from {folder} needs {weights:,} bytes for weights and {cache:,} '
                     f'for {c.slots} rows of {size} tokens, and {where} {here:,}; lower '
                     f'config.sample.slots or config.sample.size, set config.sample.int8=True or a '
                     f'larger config.sample_mesh.fsdp, or use larger hosts')


def group(config) -> hosts.Group:
  """The group of hosts that runs one engine, of a config from `choose`."""
  m = config.sample_mesh
  return hosts.Group(m.data * m.fsdp * m.tensor // jax.local_device_count())


def group_mesh(config):
  """The mesh on which this host's group samples, of a config from `choose`."""
  m = config.sample_mesh
  return sharding.make_mesh(m.data, m.fsdp, m.tensor, group(config).devices)


def common(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
  """The longest common prefix of all rows.

  >>> common([[1, 2, 3, 4], [1, 2, 5]])
  (1, 2)
  """
  columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
  return tuple(column[0] for column in columns)


def bucket(length: int) -> int:
  """The smallest width of 16, 24, 32, 48, 64, 96, 128, .. that holds `length` tokens.

  >>> [bucket(n) for n in (5, 17, 65, 130, 300)]
  [16, 24, 96, 192, 384]
  """
  power = 16
  while power < length:
    power *= 2
  return power * 3 // 4 if power * 3 // 4 >= max(length, 16) else power


def _target_bucket(count: int) -> int:
  """The smallest width of 32, 64, 128, .. that holds `count` targets.

  It is coarser than `bucket`, because there is a program for every pair of both widths.

  >>> [_target_bucket(n) for n in (1, 33, 64, 130)]
  [32, 64, 64, 256]
  """
  return max(32, 1 << (count - 1).bit_length())


def _up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def _fold_data(name: str) -> int:
  """32 bits of a name's hash, for jax.random.fold_in."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big')
