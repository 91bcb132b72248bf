"""Samples of a run's texts, chosen by a rule that does not look at them, and bounded in bytes."""
import dataclasses

from srlm_jax import schema

PROMPTS = 40          # per round, and of the held-out ones
TEXT = 6_000          # characters of one text
CHARACTERS = 400_000  # of all texts of a round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """A judgement of a candidate."""
  text: str
  score: float | None
  reason: str           # why there is no score
  finish: schema.Finish
  thinking: str = ''


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
  """A held-out prompt with the answers of all models."""
  id: str
  prompt: str
  answers: dict[str, Answer]   # by model


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Samples of the held-out prompts."""
  rule: str
  prompts: tuple[HeldOutPrompt, ...]
  total: int
