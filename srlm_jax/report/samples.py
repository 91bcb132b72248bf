"""Samples of a run: prompts with all candidates, all judgements and the chosen pair."""
from collections.abc import Iterable
import dataclasses

from srlm_jax import schema

PER_KIND = 12       # prompts of a model's data per kind, see `KINDS`
HELD_OUT = 24       # held-out prompts with the responses of all models
CHARACTERS = 6000   # shown of a text
PAIRED, UNPAIRED, UNPARSED = 'with a pair', 'without a pair', 'with an unparsed judgement'
KINDS = (UNPARSED, UNPAIRED, PAIRED)
RULE = (f'Of the data of each model: the first {PER_KIND} prompts {UNPARSED}, the first {PER_KIND} '
        f'others {UNPAIRED} and the first {PER_KIND} others {PAIRED}, in the order of the files, '
        f'with all candidates and all judgements. Of the held-out prompts: the first {HELD_OUT}, '
        f'with the response of every model. A text is cut after {CHARACTERS:,} characters.')
HELD_OUT_SOURCE = 'held-out prompts'


@dataclasses.dataclass(frozen=True)
class Text:
  """A text for the page. `left_out`: the number of its characters that are not shown."""
  shown: str
  left_out: int = 0
  finish: str = schema.EOS


@dataclasses.dataclass(frozen=True)
class Judged:
  """A judgement; `reason`: why it has no score, or ''."""
  text: Text
  score: float | None
  reason: str


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A response. `role`: chosen, rejected or ''; `score`: of all its judgements, or of an oracle."""
  name: str
  text: Text
  score: float | None
  role: str = ''
  judgements: tuple[Judged, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
  """A prompt with its candidates. `source`: the model trained on it, or HELD_OUT_SOURCE."""
  source: str
  prompt: Text
  candidates: tuple[Candidate, ...]

  @property
  def models(self) -> list[str]:
    """What the filter by model compares with: the source, and the models that respond."""
    names = [candidate.name for candidate in self.candidates]
    return [self.source, *names] if self.source == HELD_OUT_SOURCE else [self.source]

  @property
  def title(self) -> str:
    return 'held out' if self.source == HELD_OUT_SOURCE else f'data of {self.source}'

  @property
  def has_pair(self) -> bool:
    return any(candidate.role for candidate in self.candidates)

  @property
  def is_unparsed(self) -> bool:
    """Whether a judgement has no score."""
    return any(judged.score is None for c in self.candidates for judged in c.judgements)

  @property
  def scores(self) -> list[float]:
    return [c.score for c in self.candidates if c.score is not None]

  @property
  def kind(self) -> str:
    return UNPARSED if self.is_unparsed else PAIRED if self.has_pair else UNPAIRED


def of_data(model: str, responses: Iterable[schema.Response],
            judgements: Iterable[schema.Judgement], scores: dict[str, float | None],
            pairs: Iterable[schema.Pair]) -> list[Sample]:
  """The first prompts of each kind (`RULE`) in the data that `model` was trained on.

  `scores`: {response id: score}, as the pairs were made with.
  """
  roles = {id: role for pair in pairs
           for id, role in ((pair.chosen_id, 'chosen'), (pair.rejected_id, 'rejected'))}
  judged, groups = {}, {}
  for judgement in judgements:
    judged.setdefault(judgement.response_id, []).append(judgement)
  for response in responses:
    groups.setdefault(response.prompt_id, []).append(response)
  found = {kind: [] for kind in KINDS}
  for group in groups.values():
    candidates = tuple(
        Candidate(_name(r), _text(r.response, r.finish), scores.get(r.id),
                  roles.get(r.id, ''),
                  tuple(Judged(_text(j.text, j.finish), j.score, j.reason)
                        for j in judged.get(r.id, ())))
        for r in group)
    sample = Sample(model, _text(group[0].prompt), candidates)
    if len(found[sample.kind]) < PER_KIND:
      found[sample.kind].append(sample)
    if all(len(samples) == PER_KIND for samples in found.values()):
      break
  return [sample for samples in found.values() for sample in samples]


def held_out(answers: dict[str, dict[str, schema.Response]],
             graded: dict[str, dict[str, float]]) -> list[Sample]:
  """The first held-out prompts with the response of every model.

  `answers`: {model: {prompt id: response}}; `graded`: {model: {prompt id: score of the oracle}}.
  """
  by_prompt = {}
  for model, responses in answers.items():
    for id, response in responses.items():
      by_prompt.setdefault(id, {})[model] = response
  return [
      Sample(HELD_OUT_SOURCE, _text(next(iter(by_model.values())).prompt), tuple(
          Candidate(model, _text(r.response, r.finish), graded.get(model, {}).get(id))
          for model, r in by_model.items()))
      for id, by_model in list(by_prompt.items())[:HELD_OUT]]


def _name(response: schema.Response) -> str:
  is_older = response.id.rpartition('/')[2].startswith('older')
  return f'candidate {response.index + 1}' + (' of the older model' if is_older else '')


def _text(words: str, finish: str = schema.EOS) -> Text:
  words = words.replace('\0', '\ufffd')  # HTML has no NUL; the parser would drop it
  return Text(words[:CHARACTERS], max(0, len(words) - CHARACTERS), finish)
