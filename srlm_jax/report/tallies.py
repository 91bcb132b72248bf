"""Responses and judgements as numbers: what the report keeps of records that may not fit in memory.
"""
from collections import Counter
from collections.abc import Iterable
import dataclasses
import math
import typing

import numpy as np

from srlm_jax import schema
from srlm_jax.report import keyed
from srlm_jax.reward import health

_FINISHES = typing.get_args(schema.Finish)


@dataclasses.dataclass(frozen=True)
class Responses:
  """rows: a table of the responses with the fields

  prompt_id
  asked_id    hash of the id and the text of the prompt
  characters, tokens
  finish      index in `schema.Finish`
  """
  rows: np.ndarray
  health: health.Responses

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def finish(self) -> Counter:
    """{why it ends: responses}."""
    return Counter({name: int((self.rows['finish'] == i).sum())
                    for i, name in enumerate(_FINISHES)})

  @property
  def finished(self) -> np.ndarray:
    """Whether each ends by itself."""
    return self.rows['finish'] == _FINISHES.index(schema.EOS)


def responses(found: Iterable[schema.Response]) -> Responses:
  """Reads the responses to prompts."""
  return _responses(found, 'id')


def answers(found: Iterable[schema.Response]) -> Responses:
  """Reads answers, of which the last one to a prompt counts; the ids are those of the prompts."""
  made = _responses(found, 'prompt_id')
  return dataclasses.replace(made, rows=keyed.distinct(made.rows))


def _responses(found: Iterable[schema.Response], name: str) -> Responses:
  """`name`: the field whose hash is the id."""
  counted = health.Responses()

  def rows():
    for group in health.by_prompt(found):
      counted.add(group)
      for r in group:
        yield (hash(getattr(r, name)), hash(r.prompt_id), hash((r.prompt_id, r.prompt)),
               len(r.response), r.n_tokens, _FINISHES.index(r.finish))
  return Responses(keyed.table(
      rows(), 'prompt_id', 'asked_id', 'characters', 'tokens', 'finish'), counted)


@dataclasses.dataclass(frozen=True)
class Judgements:
  """rows: a table with the fields prompt_id and score, NaN without one; ids are of responses."""
  rows: np.ndarray
  health: health.Judgements

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def parsed(self) -> np.ndarray:
    """Whether each has a score."""
    return ~np.isnan(self.rows['score'])

  def by_response(self, quorum: int | None) -> np.ndarray:
    """A distinct table of the judged responses with their mean score, as `scores.by_response`.

    It is NaN for fewer scores than the quorum, and if that is not known.
    """
    ids, row = np.unique(self.rows['id'], return_inverse=True)
    parsed = self.parsed
    counts = np.bincount(row[parsed], minlength=len(ids))
    order = np.argsort(row[parsed], kind='stable')
    scores = memoryview(self.rows['score'][parsed][order])
    enough = max(quorum or math.inf, 1)
    return keyed.table((
        (name, math.fsum(scores[end - n:end]) / n if n >= enough else math.nan)
        for name, n, end in zip(ids, counts, counts.cumsum(), strict=True)), 'score')


  def by_prompt(self) -> np.ndarray:
    """A distinct table: prompt id, judgements, and how many of them have a score."""
    ids, row = np.unique(self.rows['prompt_id'], return_inverse=True)
    return keyed.table(zip(ids, np.bincount(row), np.bincount(row, self.parsed), strict=True),
                       'judgements', 'parsed')


def judgements(found: Iterable[schema.Judgement]) -> Judgements:
  """Reads judgements, in any order."""
  counted = health.Judgements()
  return Judgements(keyed.table((
      (hash(j.response_id), hash(j.prompt_id), math.nan if j.score is None else j.score)
      for j in counted.passing(found)), 'prompt_id', 'score'), counted)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """rows: a table with the characters of the fields chosen and rejected."""
  rows: np.ndarray
  health: health.Pairs


def pairs(found: Iterable[schema.Pair]) -> Pairs:
  rows = []  # at most one per prompt

  def passing():
    for pair in found:
      rows.append((hash(pair.id), len(pair.chosen), len(pair.rejected)))
      yield pair
  counted = health.Pairs(passing())
  return Pairs(keyed.table(rows, 'chosen', 'rejected'), counted)
