"""The sampling engine: requests in, results out, and no row waits for another.

`slots` rows decode together, a few tokens a call; between calls the slots of rows that ended go to samples that wait.
A request, one prompt and n samples, is prefilled once, and its keys are copied to n rows. What the first requests of a
stream begin with alike (the judge's rubric) is prefilled once for all, and every row reads it.
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from srlm_jax import hosts, InputError, records, sharding
from srlm_jax.checkpoint import store
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import cache as caches, config as model_config, int8, kernels, llama
from srlm_jax.sample import programs
from srlm_jax.sample.draw import Sampling
from srlm_jax.sample.schedule import Request, Result, Schedule

# What every sampling stage reads: keys that change records, if by rounding alone, and others.
KEYS = ('seed', 'sample.slots', 'sample.size', 'sample.dtype', 'sample.int8')
FREE = ('sample.steps', 'sample_mesh.data', 'sample_mesh.fsdp', 'sample_mesh.tensor')
WINDOW = 64  # requests of a stream that are looked at for a common beginning
LEAST_PREFIX = 16  # tokens; less is not worth a part of its own in the attention
SCORED = 16  # rows whose log-probs are computed at once; their logits are whole
HELD = 16  # requests a slot whose results may wait for an earlier one


@dataclasses.dataclass
class Work:
  """What an engine has done, in tokens."""
  naive: int = 0      # all prompts, for every sample anew
  prefilled: int = 0  # computed in fact, padding included
  places: int = 0     # for generated tokens: slots x steps
  generated: int = 0

  @property
  def occupancy(self) -> float:
    """Generated tokens a place."""
    return self.generated / max(self.places, 1)


class Engine:
  """A model ready to sample: parameters on a mesh, and a cache of `slots` rows of `size` tokens."""

  def __init__(self, model: llama.Llama, params, mesh, eos_ids: Sequence[int], seed: int, stage: str, *, slots: int,
               size: int, steps: int, share: bool = True, refill: bool = True):
    """`steps`: tokens a call. Without `share` every sample is prefilled whole, and without `refill` none enters before
    all have ended: the same results, to measure what either is worth."""
    config = model.config
    for eos in eos_ids:
      if not 0 <= eos < config.V:
        raise InputError(f'the eos id {eos} is not a token of the model, whose vocabulary has {config.V}')
    self._kernels = kernels.choose(mesh.devices.flat[0].platform, config)
    self._model = model.clone(kernels=self._kernels)
    if self._kernels.formats:
      params = jax.device_put(params, self._kernels.formats(params))
    self._params = llama.unroll(params) if self._kernels.unrolled else params
    self._mesh, self._steps, self._share, self._refill = mesh, steps, share, refill
    self._parts = mesh.shape['data'] * mesh.shape['fsdp']
    self.slots = _up(slots, self._parts)
    self.context = config.context
    self.size = min(size, config.context)  # tokens of a row, prompt and response
    self.title = stage
    self._eos = jnp.asarray(eos_ids, jnp.int32)
    self._key = jax.random.fold_in(jax.random.key(seed), _word(stage))
    self._cache, self._prefixes = None, {}  # of the last call; by ids: that of none, and the last
    self.work = Work()

  @property
  def kernels(self) -> str:
    return self._kernels.name

  def generate(self, requests: Iterable[Request], sampling: Sampling, done: int = 0) -> Iterator[
      tuple[Request, list[Result]]]:
    """Yields every request with its n results, in order. The first `done` samples of the stream are known to the
    caller: a request that has no others comes with no results."""
    room = self.room(sampling)
    stream = iter(requests)
    first = list(itertools.islice(stream, WINDOW))
    if not first:
      return
    prompts = [r.ids[:-1] for r in first if len(r.ids) <= room]
    ids = common(prompts) if self._share and len(prompts) > 1 else ()
    ids = ids if len(ids) >= LEAST_PREFIX else ()
    count = sum(r.n for r in first) if len(first) < WINDOW else self.slots
    rows = programs.Rows.empty(self._rows(count))
    schedule = Schedule(itertools.chain(first, stream), rows.size, room, done, HELD * self.slots, self._share,
                        self._refill)
    prefix = self._prefix(ids)
    cache, self._cache = self._cache, None
    if cache is None or jax.tree.leaves(cache)[0].shape[1] != rows.size:
      cache = None  # the old one goes before the new one comes
      cache = self._empty(rows.size, self.size)
    while not schedule.done():
      cache = self._enter(schedule.admit(), rows, cache, prefix, ids, sampling)
      if schedule.running:
        cache, rows = self._decode(schedule, rows, cache, prefix, sampling)
      for request, results in schedule.leave():
        if results and results[0].finish == 'too_long':
          print(f'{self.title}: the prompt of {request.id} has {len(request.ids)} tokens, more than the {room} that '
                f'there is room for: skipped', flush=True)
        yield request, results
    self._cache = cache

  def _enter(self, parts, rows, cache, prefix, prefix_ids, sampling):
    """Prefills the prompts of `parts` but for their last tokens, and makes their slots live."""
    groups = defaultdict(list)  # by width
    for part in parts:
      ids = part.request.ids
      shared = len(common([ids[:-1], prefix_ids]))
      own = ids[shared:-1]
      words = [_word(f'{part.request.id}/{number}') for number in part.numbers]
      lengths = part.request.lengths or [sampling.max_tokens] * part.request.n
      limits = [min(lengths[number], sampling.max_tokens) for number in part.numbers]
      rows.begin(part.slots, ids[-1], shared, len(own), limits, words)
      self.work.naive += len(part.slots) * len(ids)
      if len(own):
        groups[self._width(len(own))].append((own, shared, part.slots))
    for width, group in sorted(groups.items()):
      size = self._parts * max(self._kernels.group // width // self._parts, 1)
      for i in range(0, len(group), size):
        cache = self._prefill(group[i:i + size], size, width, cache, prefix)
    return cache

  def _prefill(self, group, size: int, width: int, cache, prefix):
    """Runs at most `size` prompts (ids, tokens of the prefix before them, slots) of at most `width` tokens."""
    tokens = np.zeros((size, width), np.int32)
    shared = np.zeros(size, np.int32)
    copies = []
    for i, (ids, before, slots) in enumerate(group):
      tokens[i, :len(ids)], shared[i] = ids, before
      copies += [(i, slot) for slot in slots]
    pairs = np.zeros((2, jax.tree.leaves(cache)[0].shape[1]), np.int32)  # as many as there are slots
    pairs[:, :len(copies)] = np.transpose(copies)
    self.work.prefilled += tokens.size
    with jax.set_mesh(self._mesh):
      batch = sharding.put_batch(dict(tokens=tokens, shared=shared), self._mesh)
      view = caches.Prefill(batch['shared'], *pairs, np.int32(len(copies)))
      return programs.prefill(self._model, self._params, cache, prefix, batch['tokens'], view)

  def _decode(self, schedule: Schedule, rows, cache, prefix, sampling: Sampling):
    """A call of `steps` tokens; its tokens go to the schedule."""
    with jax.set_mesh(self._mesh):
      cache, *made = programs.decode(
          self._model, self._params, cache, prefix, jax.device_put(rows, sharding.named(self._mesh, 'B')), self._key,
          self._eos, steps=self._steps, sampling=dataclasses.replace(sampling, max_tokens=1))  # one for all lengths
    after, ids, logps, steps = jax.tree.map(np.array, jax.device_get(made))
    self.work.places += rows.size * int(steps)
    for slot in list(schedule.running):
      new = int(after.count[slot] - rows.count[slot])
      if not np.isfinite(logps[slot, :new]).all():
        raise InputError(f'{self.title}: log-probs of {schedule.name(slot)} are not finite numbers; the model\'s '
                         f'parameters are broken, train or convert it again')
      finish = '' if after.live[slot] else 'eos' if after.ended[slot] else 'length'
      schedule.add(slot, ids[slot, :new].tolist(), logps[slot, :new].tolist(), finish)
      self.work.generated += new
    return cache, after

  def _prefix(self, ids: tuple[int, ...]):
    """Keys and values of a beginning, for all rows to read."""
    if ids not in self._prefixes:
      if ids:
        width = self._width(len(ids))
        cache = self._prefill([(ids, 0, [0])], self._parts, width, self._empty(self._parts, width), self._prefix(()))
      else:
        cache = self._empty(self._parts, 0)
      with jax.set_mesh(self._mesh):
        self._prefixes = {(): self._prefixes.get(()), ids: caches.as_prefix(cache)}
    return self._prefixes[ids]

  def _empty(self, rows: int, size: int):
    """A cache; its size is rounded up to what the kernels read at a time."""
    with jax.set_mesh(self._mesh):
      return caches.empty(self._model.config, rows, _up(size, self._kernels.block), self._kernels.unrolled)

  def _width(self, length: int) -> int:
    """What a prompt of `length` tokens is padded to: few shapes, few compilations."""
    return min(_up(bucket(length), self._kernels.width), _up(self.size, self._kernels.block))

  def _rows(self, count: int) -> int:
    """Rows for `count` samples: all slots, but fewer, by halves, where that is enough."""
    rows = self.slots
    while rows % (2 * self._parts) == 0 and rows // 2 >= count:
      rows //= 2
    return rows

  def room(self, sampling: Sampling) -> int:
    """Tokens that a prompt may have."""
    room = self.size - sampling.max_tokens
    if room < 1:
      raise InputError(f'max_tokens is {sampling.max_tokens}, and a row may have {self.size} tokens in all (the '
                       f'model\'s context, or config.sample.size where that is less); lower it')
    return room

  def logps(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """(prompt ids, response ids) -> the sum of log-probs of each response, the same in any company."""
    places = defaultdict(list)  # by width, which a row's own length decides
    for i, (before, after) in enumerate(rows):
      places[min(bucket(len(before) + len(after)), self.context)].append(i)
    size, sums = _up(SCORED, self._parts), [0.0] * len(rows)
    for width, group in places.items():
      for some in (group[i:i + size] for i in range(0, len(group), size)):
        tokens, mask = np.zeros((2, size, width), np.int32)
        for row, i in enumerate(some):
          before, after = rows[i]
          end = len(before) + len(after)
          tokens[row, :end], mask[row, len(before):end] = [*before, *after], 1
        with jax.set_mesh(self._mesh):
          found = programs.response_logps(
              self._model, self._params, **sharding.put_batch(dict(tokens=tokens, mask=mask), self._mesh))
        for i, logp in zip(some, np.asarray(found).tolist(), strict=False):  # the rest are empty rows
          sums[i] = logp
    return sums


def load(config, folder, stage: str, stop: str = '') -> tuple[Engine, tokenizers.Tokenizer]:
  """A checkpoint onto this host's devices in the sampling dtype, ready; `stop`: a text that ends a row like eos."""
  c, mesh = config.sample, host_mesh(config)
  shape = dataclasses.replace(model_config.load(folder), dtype=c.dtype)
  tokenizer = tokenizers.load(folder, shape.V)
  size, width = min(c.size, shape.context), jnp.dtype(c.dtype).itemsize
  weights = llama.param_count(shape) * (width + 1 if c.int8 else width) * mesh.shape['data']
  cache = 2 * shape.layers * c.slots * shape.K * size * shape.H * width
  here = hosts.memory() // jax.process_count()
  if weights + cache > here:
    raise InputError(f'sampling from {folder} needs {weights:,} bytes for weights and {cache:,} for {c.slots} rows of '
                     f'{size} tokens, and this host has {here:,}; lower config.sample.slots or config.sample.size, or '
                     f'take a larger host')
  with jax.set_mesh(mesh):
    params, _ = store.restore_params(folder, mesh, c.dtype)
    params = int8.quantize(params) if c.int8 else params
  ends = (*tokenizer.eos_ids, *(tokenizer.encode(stop)[-1:] if stop else ()))
  return Engine(llama.Llama(shape), params, mesh, ends, config.seed, stage, slots=c.slots, size=c.size,
                steps=c.steps), tokenizer


def host_mesh(config):
  """The mesh on which this host samples: config.sample_mesh over its own devices."""
  m = config.sample_mesh
  return sharding.make_mesh(m.data, m.fsdp, m.tensor, jax.local_devices())


def run(engine: Engine, requests: Iterable[Request], samples: int, sampling: Sampling, path, record: Callable):
  """Appends `record(request, i, result)` of every sample to a file, in order; what a killed run left there is not made
  again. `samples`: how many there are in all."""
  records.same_hosts(path)
  out = records.Appender(path)
  known, row = out.count, 0
  progress = tqdm.tqdm(total=samples, initial=known, desc=engine.title, unit='rows', delay=2, leave=False,
                       mininterval=2 if sys.stderr.isatty() else 30, disable=jax.process_index() != 0)
  for request, results in engine.generate(requests, sampling, known):
    new = [record(request, i, result) for i, result in enumerate(results) if row + i >= known]
    out.append(new)
    progress.update(len(new))
    row += request.n
  progress.close()
  out.close()
  work = engine.work
  if work.generated:
    hosts.say(f'{engine.title}: {work.generated} tokens in {work.occupancy:.0%} of the places that were computed, '
               f'{work.prefilled} prefilled, {work.prefilled / work.naive:.0%} of all prompts\'; by {engine.kernels}')


def common(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
  """The longest beginning that all rows share.

  >>> common([[1, 2, 3, 4], [1, 2, 5]])
  (1, 2)
  """
  shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
  return tuple(column[0] for column in shared)


def bucket(length: int) -> int:
  """A few widths for all lengths: 16, 24, 32, 48, 64, 96, 128, ..

  >>> [bucket(n) for n in (5, 17, 65, 130, 300)]
  [16, 24, 96, 192, 384]
  """
  power = 16
  while power < length:
    power *= 2
  return power * 3 // 4 if power * 3 // 4 >= max(length, 16) else power


def _up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def _word(text: str) -> int:
  """32 bits of a text."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'big')
