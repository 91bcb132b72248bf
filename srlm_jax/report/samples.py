"""Samples of a run's texts, chosen by a rule that does not look at them, and bounded in size."""
from collections.abc import Iterable
import dataclasses

from srlm_jax import schema
from srlm_jax.report import rounds
from srlm_jax.report.rounds import Data

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
  """A response with all its judgements."""
  id: str
  text: str
  thinking: str
  finish: schema.Finish
  n_tokens: int
  score: float | None      # mean of the judgements; None: too few have a score
  spread: float | None     # standard deviation of the judgements
  role: str                # 'chosen', 'rejected', or '' if it is in no pair
  judgements: tuple[Judged, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A prompt of a round with all its candidates."""
  id: str
  prompt: str
  candidates: tuple[Candidate, ...]
  paired: bool             # whether it gave a pair


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


def of_round(data: Data) -> Samples:
  """Prompts of a round with all their candidates and judgements."""
  responses, judgements = {}, {}
  for response in data.responses:
    responses.setdefault(response.prompt_id, []).append(response)
  for judgement in data.judgements:
    judgements.setdefault(judgement.response_id, []).append(judgement)
  roles = {pair.chosen_id: 'chosen' for pair in data.pairs}
  roles |= {pair.rejected_id: 'rejected' for pair in data.pairs}
  scores = data.scores

  def candidate(response: schema.Response) -> Candidate:
    score = scores.get(response.id)
    return Candidate(
        id=response.id, text=_cut(response.response), thinking=_cut(response.thinking),
        finish=response.finish, n_tokens=response.n_tokens, score=score and score.mean,
        spread=score and score.spread, role=roles.get(response.id, ''),
        judgements=tuple(
            Judged(text=_cut(j.text), score=j.score, reason=j.reason, finish=j.finish,
                   thinking=_cut(j.thinking)) for j in judgements.get(response.id, ())))

  def made(name: str) -> Prompt:
    candidates = tuple(map(candidate, responses[name]))
    return Prompt(id=name, prompt=_cut(responses[name][0].prompt), candidates=candidates,
                  paired=any(c.role for c in candidates))

  prompts = _bounded(map(made, rounds.first(responses)))
  return Samples(model=data.model, rule=_rule(len(prompts), len(responses), 'prompts'),
                 prompts=prompts, total=len(responses))


def held_out(answers: dict[str, dict[str, schema.Response]],
             graded: dict[str, dict[str, float]]) -> HeldOut:
  """{model: {prompt id: answer}} and oracle scores -> held-out prompts with all answers."""
  prompts = {name: answer.prompt for by_id in answers.values() for name, answer in by_id.items()}

  def made(name: str) -> HeldOutPrompt:
    found = {model: by_id[name] for model, by_id in answers.items() if name in by_id}
    return HeldOutPrompt(id=name, prompt=_cut(prompts[name]), answers={
        model: Answer(text=_cut(r.response), thinking=_cut(r.thinking), finish=r.finish,
                      n_tokens=r.n_tokens, oracle=graded.get(model, {}).get(name))
        for model, r in found.items()})

  shown = _bounded(map(made, rounds.first(prompts)))
  return HeldOut(rule=_rule(len(shown), len(prompts), 'held-out prompts'), prompts=shown,
                 total=len(prompts))


def _rule(shown: int, total: int, what: str) -> str:
  if shown == total:
    return f'All {total:,} {what}.'
  return (f'{shown:,} of {total:,} {what}: those whose id has the smallest SHA-256, so that the '
          f'choice does not depend on their texts or scores.')


def _bounded(prompts: Iterable) -> tuple:
  """The first prompts whose texts have at most CHARACTERS together, and at least one."""
  kept, size = [], 0
  for prompt in prompts:
    size += len(str(dataclasses.asdict(prompt)))
    if kept and size > CHARACTERS:
      break
    kept.append(prompt)
  return tuple(kept)


def _cut(text: str) -> str:
  """At most TEXT characters of a text, and a note of how many are left out.

  >>> _cut('x' * 6100)[-40:]
  'xxxxxxxxxxxxxxx [.. 100 more characters]'
  """
  if len(text) <= TEXT:
    return text
  return f'{text[:TEXT]} [.. {len(text) - TEXT:,} more characters]'
