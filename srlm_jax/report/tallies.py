"""Responses and judgements as numbers: what the report keeps of records that may not fit in memory.
"""
import array
from collections.abc import Iterable
import dataclasses
import itertools
import math
import operator
import statistics
import typing

import numpy as np

from srlm_jax import schema
from srlm_jax.report import keyed
from srlm_jax.reward import health, scores as scoring

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
    for group in scoring.by_prompt(found):
      counted.add(group)
      for r in group:
        yield (hash(getattr(r, name)), hash(r.prompt_id), hash((r.prompt_id, r.prompt)),
               len(r.response), r.n_tokens, _FINISHES.index(r.finish))
  return Responses(keyed.table(
      rows(), 'prompt_id', 'asked_id', 'characters', 'tokens', 'finish'), counted)


@dataclasses.dataclass(frozen=True)
class Judgements:
  """rows: a table with a row per group of consecutive judgements of one response, the id. Fields:

  prompt_id
  judgements
  end         place in `scores` where the scores of the group end
  """
  rows: np.ndarray
  scores: np.ndarray   # in the order of the rows
  health: health.Judgements

  def __len__(self) -> int:
    return self.health.count

  def by_response(self, quorum: int | None) -> np.ndarray:
    """A distinct table of the judged responses with their mean score, as `scores.by_response`.

    It is NaN for fewer scores than the quorum, and if that is not known.
    """
    ids, ends = self.rows['id'], self.rows['end'].astype(int)
    starts, scores = np.concatenate([[0], ends[:-1]]), memoryview(self.scores)
    enough = max(quorum or math.inf, 1)

    def means():
      for name, groups in itertools.groupby(np.argsort(ids, kind='stable'), ids.__getitem__):
        found = [*itertools.chain.from_iterable(scores[starts[i]:ends[i]] for i in groups)]
        yield name, statistics.fmean(found) if len(found) >= enough else math.nan
    return keyed.table(means(), 'score')

  def by_prompt(self) -> np.ndarray:
    """A distinct table: prompt id, judgements, and how many of them have a score."""
    ids, row = np.unique(self.rows['prompt_id'], return_inverse=True)
    parsed = np.diff(self.rows['end'], prepend=0)
    return keyed.table(zip(ids, np.bincount(row, self.rows['judgements']),
                           np.bincount(row, parsed), strict=True), 'judgements', 'parsed')


def judgements(found: Iterable[schema.Judgement]) -> Judgements:
  """Reads judgements, in any order."""
  counted, scores = health.Judgements(), array.array('d')

  def rows():
    names = operator.attrgetter('response_id', 'prompt_id')
    for (response, prompt), group in itertools.groupby(counted.passing(found), names):
      count = 0
      for j in group:
        count += 1
        if j.score is not None:
          scores.append(j.score)
      yield hash(response), hash(prompt), count, len(scores)
  rows = keyed.table(rows(), 'prompt_id', 'judgements', 'end')
  return Judgements(rows, np.array(scores), counted)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """rows: a table with the characters of the fields chosen and rejected."""
  rows: np.ndarray
  health: health.Pairs


def pairs(found: Iterable[schema.Pair]) -> Pairs:
  counted = health.Pairs()

  def rows():
    for pair in found:
      counted.add(pair)
      yield hash(pair.id), len(pair.chosen), len(pair.rejected)
  return Pairs(keyed.table(rows(), 'chosen', 'rejected'), counted)
