"""Assigns cache slots to the samples of requests and returns results in request order.

Plain Python: it handles token ids and counts, no arrays.
"""
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
import dataclasses
from typing import Any, Protocol

from srlm_jax import InputError
from srlm_jax.sample.draw import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt that is sampled n times.

  The PRNG key of sample i comes from the name `id/i`. Its tokens are therefore batch-invariant, and
  the same on every host and after a restart. Raises InputError if a field is out of range.
  """
  id: str
  ids: Sequence[int]  # token ids of the prompt, with bos if the tokenizer has one
  n: int = 1
  data: Any = None    # the caller's data; not used here
  lengths: Sequence[int] | None = None  # per sample, the maximum of generated tokens, if lower
  sampling: Sampling | None = None  # its own, where requests differ in it
  top: int = 0        # return the log-probs of this many most likely tokens; 0: none

  def __post_init__(self):
    if not len(self.ids):
      raise InputError(f'request {self.id} has an empty prompt')
    if self.n < 1:
      raise InputError(f'request {self.id} has n = {self.n} samples; n must be at least 1')
    if self.lengths is not None and (len(self.lengths) != self.n or min(self.lengths) < 1):
      raise InputError(f'request {self.id} has lengths = {self.lengths}; it must have n = {self.n} '
                       f'lengths of at least 1')


@dataclasses.dataclass
class Result:
  """The generated tokens of one sample."""
  ids: list[int]  # with the eos, if one was generated
  token_logps: list[float]  # under the model itself: before temperature, top-k and top-p
  # eos; length: max_tokens reached; too_long: prompt too long, not sampled; stopped: by the caller
  finish: str = ''
  # Per token: {id: log-prob} of the most likely ones.
  top: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Part:
  """Samples of one request that get slots at the same time."""
  request: Request
  numbers: Sequence[int]  # of the samples
  slots: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Entry:
  request: Request
  results: list[Result]
  unfinished: int  # number of results


class KeptSamples(Protocol):
  """Samples that the caller has, by the id of their request: a mapping, or `records.Kept`."""

  def get(self, request: str, default: Sized) -> Sized: ...


class Schedule:
  """Assigns free slots to waiting samples in request order, and returns results in that order."""

  def __init__(self, requests: Iterable[Request], slots: int, prompt_limit: int, known: int,
               kept: KeptSamples, max_held: int, together: bool, refill: bool):
    """
    prompt_limit: longer prompts, in tokens, are not sampled
    known: the number of samples at the start of the stream that the caller already has
    kept: more samples that it has, by the id of their request
    max_held: how many requests are read from the stream and not returned yet, at most
    together: all samples of a request get slots at the same time; otherwise each alone
    refill: free slots are reused at once; otherwise after all running samples have finished
    """
    self._requests = iter(requests)
    self._prompt_limit, self._known, self._kept = prompt_limit, known, kept
    self._max_held, self._refill = max_held, refill
    self._part_size = slots if together else 1
    self._free = list(range(slots))[::-1]
    self._entries = deque()  # requests that have not been returned, in order
    self._waiting = deque()  # (entry, part) without slots
    self.running: dict[int, tuple[_Entry, Result]] = {}  # by slot

  def put(self, request: Request) -> list[Result]:
    """Adds a request behind those that wait -> its results, which grow until each has a `finish`.
    """
    self._enter(request)
    return self._entries[-1].results

  def stop(self, result: Result):
    """Ends a running sample, whose slot is then free."""
    for slot, (_, running) in list(self.running.items()):
      if running is result:
        self.add(slot, [], [], 'stopped')

  def remove(self, results: list[Result]):
    """Forgets a request, finished or not, and frees its slots; `results`: from `put`."""
    for slot, (entry, _) in list(self.running.items()):
      if entry.results is results:
        self._free_slot(slot)
    self._waiting = deque(pair for pair in self._waiting if pair[0].results is not results)
    self._entries = deque(entry for entry in self._entries if entry.results is not results)

  def admit(self) -> list[Part]:
    """Assigns free slots -> the parts that start now."""
    parts = []
    if self.running and not self._refill:
      return parts
    while self._pull() and len(self._waiting[0][1].numbers) <= len(self._free):
      entry, part = self._waiting.popleft()
      for number in part.numbers:
        slot = self._free.pop()
        part.slots.append(slot)
        self.running[slot] = entry, entry.results[number]
      parts.append(part)
    return parts

  def add(self, slot: int, ids: list[int], token_logps: list[float], finish: str, top=()):
    """Adds generated tokens to a slot's result; `finish` (eos or length) frees the slot."""
    entry, result = self.running[slot]
    result.ids += ids
    result.token_logps += token_logps
    result.top += top
    if finish:
      result.finish = finish
      entry.unfinished -= 1
      self._free_slot(slot)

  def _free_slot(self, slot: int):
    """Frees a slot."""
    del self.running[slot]
    self._free.append(slot)

  def leave(self) -> Iterator[tuple[Request, list[Result]]]:
    """Yields and removes the finished requests that have no unfinished one before them."""
    while self._entries and not self._entries[0].unfinished:
      entry = self._entries.popleft()
      yield entry.request, entry.results

  def done(self) -> bool:
    """Whether every request has been returned; may read the next request from the stream."""
    return not self._pull() and not self._entries

  def _pull(self) -> bool:
    """Reads requests until a part waits for slots.

    Returns False if the stream has ended or `max_held` requests are held.
    """
    while not self._waiting and len(self._entries) < self._max_held:
      request = next(self._requests, None)
      if request is None:
        break
      self._enter(request)
    return bool(self._waiting)

  def _enter(self, request: Request):
    """Adds a request and, unless it is known or too long, its waiting parts."""
    is_known = max(self._known, len(self._kept.get(request.id, ()))) >= request.n
    self._known = max(self._known - request.n, 0)
    fits = len(request.ids) <= self._prompt_limit
    results = [] if is_known else [
        Result([], [], '' if fits else 'too_long') for _ in range(request.n)]
    entry = _Entry(request, results, unfinished=len(results) if fits else 0)
    self._entries.append(entry)
    for first in range(0, entry.unfinished, self._part_size):
      numbers = range(first, min(first + self._part_size, request.n))
      self._waiting.append((entry, Part(request, numbers)))
