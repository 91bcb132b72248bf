"""Divides prompts into the IFT, test, validation and ranked sets.

The sets IFT, test and validation need a first turn with a best reply and are filled first. Then
ranked_eval and ranked_train take the first and later turns of the remaining conversations.
ranked_train also takes the later turns of IFT conversations, because the paper limits only IFT to
first turns.

No turn of a conversation in test, validation or ranked_eval is in another set, nor is a later turn
in which a user repeats the first message of such a conversation.

Two rules keep the ranked sets from being empty if first turns are scarce. ranked_eval gets at
least the size that it has when all first turns are divided in the requested proportions. The same
holds for ranked_train if the source cannot fill IFT, test and validation or has no later turns.
"""
from collections.abc import Iterable
from fractions import Fraction
import math
from typing import NamedTuple

# The sets, by the name of their requested size in config.data.
BEST_SETS = ('ift', 'test_prompts', 'valid_prompts')  # need a first turn with the best reply
HELD_OUT_SETS = BEST_SETS[1:]
RANKED_SETS = ('ranked_train', 'ranked_eval')  # need two replies of different rank


class SeedPrompt(NamedTuple):
  """What the division needs to know about a turn. Sorts by first or later turn, then by `order`."""
  later: bool  # not the first turn of its conversation
  order: str  # hash of the seed and the id
  id: str
  index: int  # index of the turn in the source
  text: str  # digest of the normalized prompt
  messages: tuple[str, ...]  # digests of the user messages; the first names the conversation
  replies: int  # number of replies that are not dropped
  best: bool  # is a first turn with the best reply
  ordered: bool  # has two replies of different rank


class Conversation(NamedTuple):
  """The usable prompts of the conversations that begin with the same user message."""
  best: SeedPrompt | None  # for IFT, test or validation
  ranked: list[SeedPrompt]  # for the ranked sets; contains `best` if its replies are ordered


def divide(prompts: list[SeedPrompt], requested: dict[str, int]) -> dict[str, list[SeedPrompt]]:
  """Sorted prompts and requested sizes -> the prompts of each set; a prompt is in at most one."""
  n_best = sum(requested[name] for name in BEST_SETS)
  minimum = minimum_sizes(prompts, requested)
  rest = conversations(prompts)
  for_eval = reserve_long(rest, spare(rest, n_best), requested['ranked_eval'],
                          minimum['ranked_eval'])
  rest = without(rest, for_eval)
  # ranked_train also gets the later turns of IFT conversations: an estimate of their number.
  later = sum(p.later for c in rest if c.best for p in c.ranked)
  later = later * requested['ift'] // max(1, n_best)
  for_train = reserve(rest, spare(rest, n_best), requested['ranked_train'],
                      minimum['ranked_train'] - later)
  best = [c.best for c in without(rest, for_train) if c.best][:n_best]
  sets = _consecutive(best, {name: requested[name] for name in BEST_SETS})
  used = set(best)
  for name, pool in (('ranked_eval', for_eval), ('ranked_train', rest)):
    held_out = held_out_messages(sets)
    usable = (p for c in pool for p in c.ranked
              if p not in used and held_out.isdisjoint(p.messages))
    sets[name] = sorted(usable)[:requested[name]]
  return {name: sets[name] for name in requested}


def conversations(prompts: Iterable[SeedPrompt]) -> list[Conversation]:
  """Groups prompts by the first message of their conversation, in order of first appearance."""
  groups = {}
  for p in prompts:
    groups.setdefault(p.messages[0], []).append(p)
  return [Conversation(next((p for p in group if p.best), None), [p for p in group if p.ordered])
          for group in groups.values()]


def minimum_sizes(prompts: list[SeedPrompt], requested: dict[str, int]) -> dict[str, int]:
  """The sizes that the ranked sets get even if the other sets then stay short.

  They are the sizes when all first turns are divided in the requested proportions. For
  ranked_train it is 0 if there are first turns enough for the other sets and any later turn.
  """
  n_best = sum(requested[name] for name in BEST_SETS)
  n_ranked = sum(requested[name] for name in RANKED_SETS)
  has_best = sum(p.best for p in prompts)
  available = {  # prompts available and requested
      'best': (has_best, n_best),
      'ranked': (sum(p.ordered for p in prompts), n_ranked),
      'first turns': (sum(not p.later for p in prompts), n_best + n_ranked)}
  share = min(Fraction(have, max(1, want)) for have, want in available.values())
  total = min(n_ranked, int(share * n_ranked))
  sizes = apportion(total, [requested[name] for name in RANKED_SETS])
  minimum = dict(zip(RANKED_SETS, sizes, strict=True))
  if has_best >= n_best and any(p.later for p in prompts):
    minimum['ranked_train'] = 0
  return minimum


def spare(rest: list[Conversation], n_best: int) -> int:
  """How many conversations with a best reply are left after `n_best` of them are used."""
  return max(0, sum(c.best is not None for c in rest) - n_best)


def reserve(rest: list[Conversation], max_best: float, goal: int,
            minimum: int) -> list[Conversation]:
  """Takes conversations in order until they hold `goal` ranked prompts.

  At most `max_best` of them have a best reply. If they hold fewer than `minimum` ranked prompts,
  takes `minimum` regardless of `max_best`, first from conversations without a best reply.
  """
  taken, size, n_best = [], 0, 0
  for c in rest:
    if size >= goal:
      break
    if not c.ranked or (c.best and n_best >= max_best):
      continue
    taken.append(c)
    size += len(c.ranked)
    n_best += c.best is not None
  if size >= minimum:
    return taken
  without_best_first = sorted(rest, key=lambda c: c.best is not None)
  return reserve(without_best_first, max_best=math.inf, goal=minimum, minimum=0)


def reserve_long(rest: list[Conversation], max_best: int, goal: int,
                 minimum: int) -> list[Conversation]:
  """Like `reserve`, but skips short conversations if `max_best` conversations are too few.

  Requires at least 1, 2, .. ranked prompts of each conversation with a best reply, until the taken
  ones hold `goal` ranked prompts. Returns the selection that holds the most.
  """
  longest = max((len(c.ranked) for c in rest), default=0)
  taken = []
  for length in range(1, longest + 1):
    candidates = [c for c in rest if not c.best or len(c.ranked) >= length]
    taken = max(taken, reserve(candidates, max_best, goal, minimum=0), key=count_ranked)
    if count_ranked(taken) >= goal:
      break
  return taken if count_ranked(taken) >= minimum else reserve(rest, max_best, goal, minimum)


def count_ranked(taken: list[Conversation]) -> int:
  return sum(len(c.ranked) for c in taken)


def without(rest: list[Conversation], taken: list[Conversation]) -> list[Conversation]:
  """The conversations of `rest` that are not in `taken`, in order."""
  ids = {id(c) for c in taken}
  return [c for c in rest if id(c) not in ids]


def held_out_messages(sets: dict[str, list[SeedPrompt]]) -> set[str]:
  """First messages of the conversations that may be in one set only."""
  return {p.messages[0] for name in (*HELD_OUT_SETS, 'ranked_eval') for p in sets.get(name, ())}


def apportion(total: int, requested: list[int]) -> list[int]:
  """Divides `total` <= sum(requested) in the requested proportions, by the largest remainder.

  >>> apportion(22, [3200, 256, 253])
  [19, 2, 1]
  """
  whole = max(1, sum(requested))
  sizes = [total * size // whole for size in requested]
  by_remainder = sorted(range(len(requested)), key=lambda i: -(total * requested[i] % whole))
  for i in by_remainder[:total - sum(sizes)]:
    sizes[i] += 1
  return sizes


def _consecutive(
    prompts: list[SeedPrompt], requested: dict[str, int]) -> dict[str, list[SeedPrompt]]:
  """Cuts the prompts into consecutive sets in the requested proportions."""
  sets, start = {}, 0
  for name, size in zip(requested, apportion(len(prompts), [*requested.values()]), strict=True):
    sets[name] = prompts[start:start + size]
    start += size
  return sets
