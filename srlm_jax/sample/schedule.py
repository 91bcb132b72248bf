"""Requests, the slots in which their samples are made, and the order in which they leave. No arrays: ids and counts."""
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

from srlm_jax import InputError


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt to continue n times. Sample i draws its randomness from its name, `id/i`: the same in any company, on
  any host, after a restart."""
  id: str
  ids: Sequence[int]  # the prompt, bos first
  n: int = 1
  about: Any = None  # the caller's own
  lengths: Sequence[int] | None = None  # of each sample, to generate at most, where that is less than for all

  def __post_init__(self):
    if not len(self.ids):
      raise InputError(f'request {self.id} has an empty prompt')
    if self.n < 1:
      raise InputError(f'request {self.id} asks for n = {self.n} samples; it is 1 or more')
    if self.lengths is not None and (len(self.lengths) != self.n or min(self.lengths) < 1):
      raise InputError(f'request {self.id} has lengths = {self.lengths}; they are n = {self.n} numbers, 1 or more')


@dataclasses.dataclass
class Result:
  ids: list[int]      # generated, with the eos if there was one
  logps: list[float]  # log p of each under the model itself: before temperature and the cuts
  finish: str = ''    # eos, length (cut at max_tokens), or too_long (the prompt leaves no room: not sampled)


@dataclasses.dataclass
class Part:
  """Samples of one request that enter together, and their slots."""
  request: Request
  numbers: Sequence[int]
  slots: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Entry:
  request: Request
  results: list[Result]
  missing: int  # results that are not finished


class Schedule:
  """Gives free slots to the samples that wait, first come, first served, and lets results leave in that order."""

  def __init__(self, requests: Iterable[Request], slots: int, room: int, done: int, held: int, together: bool,
               refill: bool):
    """Prompts of more than `room` tokens are too long; the first `done` samples are known to the caller; at most `held`
    requests are here at a time. Not `together`: a request's samples enter one by one; not `refill`: none enters before
    all have ended."""
    self._requests = iter(requests)
    self._room, self._done, self._held, self._refill = room, done, held, refill
    self._most = slots if together else 1  # samples of a part
    self._free = list(range(slots))[::-1]
    self._entries = deque()  # in order, from the first that has not left
    self._waiting = deque()  # (entry, part) that have no slots yet
    self.running: dict[int, tuple[_Entry, Result]] = {}  # by slot

  def admit(self) -> list[Part]:
    """The parts that enter now."""
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

  def add(self, slot: int, ids: list[int], logps: list[float], finish: str):
    """What a slot has generated; with a `finish` (eos or length) it is free again."""
    entry, result = self.running[slot]
    result.ids += ids
    result.logps += logps
    if finish:
      result.finish = finish
      entry.missing -= 1
      del self.running[slot]
      self._free.append(slot)

  def name(self, slot: int) -> str:
    """Whose tokens a slot makes."""
    return self.running[slot][0].request.id

  def leave(self) -> Iterator[tuple[Request, list[Result]]]:
    """The requests that are finished and have no unfinished one before them."""
    while self._entries and not self._entries[0].missing:
      entry = self._entries.popleft()
      yield entry.request, entry.results

  def done(self) -> bool:
    """Nothing is here and nothing comes; looks for the next request."""
    return not self._pull() and not self._entries

  def _pull(self) -> bool:
    """Takes requests in until some part waits for slots; False where there is none, or no place to hold it."""
    while not self._waiting and len(self._entries) < self._held:
      request = next(self._requests, None)
      if request is None:
        break
      self._enter(request)
    return bool(self._waiting)

  def _enter(self, request: Request):
    known, self._done = self._done >= request.n, max(self._done - request.n, 0)
    fits = len(request.ids) <= self._room
    results = [] if known else [Result([], [], '' if fits else 'too_long') for _ in range(request.n)]
    entry = _Entry(request, results, len(results) if fits else 0)
    self._entries.append(entry)
    for first in range(0, entry.missing, self._most):
      numbers = range(first, min(first + self._most, request.n))
      self._waiting.append((entry, Part(request, numbers)))
