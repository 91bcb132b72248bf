"""Samples of a run's texts, chosen by a rule that does not look at them, and bounded in size."""
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses

from srlm_jax import records, schema
from srlm_jax.reward import scores as scoring

PROMPTS = 40          # per round, and of the held-out ones
TEXT = 6_000          # characters of one text
CHARACTERS = 400_000  # of all texts of a round, or of the held-out prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """A judgement of a candidate."""
  text: str
  score: float | None
  reason: str           # why there is no score
  finish: schema.Finish
  thinking: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A response with its judgements."""
  id: str
  text: str
  thinking: str
  finish: schema.Finish
  n_tokens: int
  score: float | None      # mean of all judgements; None: too few have a score
  spread: float | None     # standard deviation of all judgements
  role: str                # 'chosen', 'rejected', or '' if it is in no pair
  judgements: tuple[Judged, ...]
  left_out: int = 0        # more judgements, for which there is no room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A prompt of a round with its candidates."""
  id: str
  prompt: str
  candidates: tuple[Candidate, ...]
  paired: bool             # whether it gave a pair
  left_out: int = 0        # more candidates, for which there is no room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """Samples of the data that `model` was trained on."""
  model: str
  rule: str                # a sentence: how the prompts were chosen
  prompts: tuple[Prompt, ...]
  total: int               # prompts of the round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """An answer to a held-out prompt."""
  text: str
  thinking: str
  finish: schema.Finish
  n_tokens: int
  oracle: float | None     # its oracle score, 0 to 5 (sandbox)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutPrompt:
  """A held-out prompt with the answers of the models that have one."""
  id: str
  prompt: str
  answers: dict[str, Answer]   # by model


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Samples of the held-out prompts."""
  rule: str
  prompts: tuple[HeldOutPrompt, ...]
  total: int


class _Smallest:
  """The PROMPTS ids with the smallest SHA-256 of all that were seen, with what is kept of each."""

  def __init__(self, make: Callable):
    """`make`: gives what is kept of a new id."""
    self._make, self._kept, self._largest, self._passed = make, {}, '', None

  def of(self, name: str):
    """What is kept of an id; None if it is not among the smallest."""
    if name in self._kept:
      return self._kept[name][1]
    if name == self._passed:  # the records of a prompt stand together: it is hashed once
      return None
    digest = records.digest(name)
    if len(self._kept) == PROMPTS:
      if digest > self._largest:
        self._passed = name
        return None
      del self._kept[max(self._kept, key=lambda other: self._kept[other][0])]
    made = self._make()
    self._kept[name] = digest, made
    self._largest = max(digest for digest, _ in self._kept.values())
    return made

  def items(self) -> list[tuple[str, object]]:
    """(id, what is kept of it), the smallest SHA-256 first."""
    ordered = sorted(self._kept, key=lambda name: self._kept[name][0])
    return [(name, self._kept[name][1]) for name in ordered]


@dataclasses.dataclass
class _Texts:
  """What is kept of a prompt of a round: records while there is room for their texts."""
  prompt: str = ''
  ids: list[str] = dataclasses.field(default_factory=list)  # of all candidates
  candidates: list[schema.Response] = dataclasses.field(default_factory=list)
  judgements: dict[str, list[schema.Judgement]] = dataclasses.field(default_factory=dict)
  texts: dict[str, int] = dataclasses.field(default_factory=dict)  # judgements that have theirs
  roles: dict[str, str] = dataclasses.field(default_factory=dict)
  room_for_responses: int = CHARACTERS
  room_for_judgements: int = CHARACTERS


class OfRound:
  """Keeps the texts of the samples while the records of a round pass, in the order of the methods.
  """

  def __init__(self):
    self._prompts = _Smallest(_Texts)
    self._owners = {}  # {id of a response: its prompt}, of the prompts that are kept

  def responses(self, found: Iterable[schema.Response]) -> Iterator[schema.Response]:
    """Passes the responses on."""
    for r in found:
      if (kept := self._prompts.of(r.prompt_id)) is not None:
        kept.prompt = kept.prompt or _cut(r.prompt)
        kept.ids.append(r.id)
        if kept.room_for_responses > 0:
          short = dataclasses.replace(r, prompt='', messages=(), token_ids=(),
                                      response=_cut(r.response), thinking=_cut(r.thinking))
          kept.candidates.append(short)
          kept.room_for_responses -= _size(short)
      yield r
    for _, kept in self._prompts.items():
      self._owners |= dict.fromkeys(kept.ids, kept)
      kept.judgements = {r.id: [] for r in kept.candidates}
      kept.texts = dict.fromkeys(kept.judgements, 0)

  def judgements(self, found: Iterable[schema.Judgement]) -> Iterator[schema.Judgement]:
    """Passes the judgements on."""
    for j in found:
      kept = self._owners.get(j.response_id)
      if kept and j.response_id in kept.judgements:
        short = dataclasses.replace(j, token_ids=(), text=_cut(j.text), thinking=_cut(j.thinking))
        if kept.room_for_judgements > 0:
          kept.room_for_judgements -= _size(short)
          kept.texts[j.response_id] += 1
        else:
          short = dataclasses.replace(short, text='', thinking='')
        kept.judgements[j.response_id].append(short)
      yield j

  def pairs(self, found: Iterable[schema.Pair]) -> Iterator[schema.Pair]:
    """Passes the pairs on."""
    for pair in found:
      for name, role in ((pair.chosen_id, 'chosen'), (pair.rejected_id, 'rejected')):
        if name in self._owners:
          self._owners[name].roles[name] = role
      yield pair

  def made(self, model: str, total: int, quorum: int | None) -> Samples:
    """The samples of the data that `model` is trained on, which have `total` prompts."""
    found = [_prompt(name, kept, quorum) for name, kept in self._prompts.items()]
    shown = _bounded(found, CHARACTERS, _with_fewer_candidates)
    return Samples(model=model, rule=_rule(len(shown), total, 'prompts'), prompts=shown,
                   total=total)


def _prompt(name: str, kept: _Texts, quorum: int | None) -> Prompt:
  scores = scoring.by_response(
      (j for group in kept.judgements.values() for j in group), quorum) if quorum else {}

  def candidate(r: schema.Response) -> Candidate:
    score, judged = scores.get(r.id), kept.judgements.get(r.id, ())
    shown = judged[:kept.texts.get(r.id, 0)]
    return Candidate(
        id=r.id, text=r.response, thinking=r.thinking, finish=r.finish, n_tokens=r.n_tokens,
        score=score and score.mean, spread=score and score.spread, role=kept.roles.get(r.id, ''),
        left_out=len(judged) - len(shown), judgements=tuple(
            Judged(text=j.text, score=j.score, reason=j.reason, finish=j.finish,
                   thinking=j.thinking) for j in shown))
  return Prompt(id=name, prompt=kept.prompt, candidates=tuple(map(candidate, kept.candidates)),
                paired=bool(kept.roles), left_out=len(kept.ids) - len(kept.candidates))


class OfAnswers:
  """Keeps the texts of the samples while the held-out answers of a model pass."""

  def __init__(self):
    self._prompts = _Smallest(list)

  def answers(self, found: Iterable[schema.Response]) -> Iterator[schema.Response]:
    """Passes the answers on. The last one to a prompt counts."""
    for r in found:
      if (kept := self._prompts.of(r.prompt_id)) is not None:
        kept[:] = [dataclasses.replace(
            r, messages=(), token_ids=(), prompt=_cut(r.prompt), response=_cut(r.response),
            thinking=_cut(r.thinking))]
      yield r

  def items(self) -> dict[str, schema.Response]:
    """{prompt id: its answer}."""
    return {name: kept[0] for name, kept in self._prompts.items()}


def held_out(answers: dict[str, OfAnswers], oracle: Callable[[str, str], float | None],
             total: int) -> HeldOut:
  """{model: its answers} -> held-out prompts, `total` in the run, with the answers of all models.

  oracle: (model, prompt id) -> the score of its answer.
  """
  texts = {model: kept.items() for model, kept in answers.items()}
  # A prompt with one of the smallest hashes of all is among the smallest ones of each model.
  names = sorted({name for by_id in texts.values() for name in by_id}, key=records.digest)

  def made(name: str) -> HeldOutPrompt:
    found = {model: by_id[name] for model, by_id in texts.items() if name in by_id}
    return HeldOutPrompt(id=name, prompt=[*found.values()][-1].prompt, answers={
        model: Answer(text=r.response, thinking=r.thinking, finish=r.finish, n_tokens=r.n_tokens,
                      oracle=oracle(model, name)) for model, r in found.items()})
  shown = _bounded(map(made, names[:PROMPTS]), CHARACTERS)
  return HeldOut(rule=_rule(len(shown), total, 'held-out prompts'), prompts=shown, total=total)


def _rule(shown: int, total: int, what: str) -> str:
  if shown == total:
    return f'All {total:,} {what}.'
  return (f'{shown:,} of {total:,} {what}: those whose id has the smallest SHA-256, so that the '
          f'choice does not depend on their texts or scores.')


def _bounded(items: Iterable, room: int, shortened: Callable | None = None) -> tuple:
  """The first items whose texts have at most `room` characters together, and at least one.

  shortened: (item, room) -> the first item with fewer texts, if it alone has too many.
  """
  kept = []
  for item in items:
    left = room - _size(item)
    if left < 0 and kept:
      break
    if left < 0 and shortened:
      item = shortened(item, room)
    kept.append(item)
    room = left
  return tuple(kept)


def _with_fewer_candidates(prompt: Prompt, room: int) -> Prompt:
  room -= _size(dataclasses.replace(prompt, candidates=()))
  return _cut_short(prompt, 'candidates', _bounded(prompt.candidates, room, _with_fewer_judgements))


def _with_fewer_judgements(candidate: Candidate, room: int) -> Candidate:
  room -= _size(dataclasses.replace(candidate, judgements=()))
  return _cut_short(candidate, 'judgements', _bounded(candidate.judgements, room))


def _cut_short(item, field: str, shown: Sequence):
  """An item with a part of a field, and the count of what is left out."""
  left_out = item.left_out + len(getattr(item, field)) - len(shown)
  return dataclasses.replace(item, left_out=left_out, **{field: shown})


def _size(item) -> int:
  return len(str(dataclasses.asdict(item)))


def _cut(text: str) -> str:
  """At most TEXT characters of a text, and a note of how many are left out.

  >>> _cut('x' * 6100)[-40:]
  'xxxxxxxxxxxxxxx [.. 100 more characters]'
  """
  if len(text) <= TEXT:
    return text
  return f'{text[:TEXT]} [.. {len(text) - TEXT:,} more characters]'
