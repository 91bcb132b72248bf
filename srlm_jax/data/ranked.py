r"""Ranked replies in a simple format as seed data: JSONL (or .jsonl.gz), one prompt per line.

  {"prompt": "Name a fruit.", "replies": [{"text": "Pear.", "rank": 0}, {"text": "No.", "rank": 1}]}

A prompt of several turns has `messages` instead, a list of `{"role": .., "content": ..}` with the
roles user, assistant, user, .., user, and perhaps a system message first. The replies answer the
last message.

`rank` is 0 for the best reply. Equal replies share a rank, and the next rank counts all replies
before it: 0, 1, 1, 3. Instead of `rank`, every reply may have a `score`; higher is better. Records
and replies may have an `id`, a string. This converts UltraFeedback to the format, without the
replies that have no text or no score:

  jq -c '{prompt: .instruction, replies: [.completions[]
    | select((.response | test("\\S")) and (.overall_score | type) == "number")
    | {text: .response, score: .overall_score}]}' ultrafeedback.jsonl > ranked.jsonl
"""
import bisect
from collections.abc import Iterable, Iterator
import json
import math
import re

import msgspec

from srlm_jax import conversation, InputError, records, schema
from srlm_jax.data.turns import Message, Turn

NAME = 'ranked'
SEEDS = 'seeds/ranked.jsonl'  # in the catalog


def turns(rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, Turn]]:
  """(place, record) -> (place, turn) in the same order; place is file:line, for errors.

  Raises InputError for a record in another format. Drops nothing.
  """
  for where, record in rows:
    messages = _messages(record, where)
    prompt = conversation.text(messages) if messages else _text(
        record, 'prompt', where, 'give every record a prompt or messages')
    replies = record.get('replies')
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
      raise InputError(f'{where}: "replies" is {_show(replies)}; '
                       f'give a list of {{"text": .., "rank": ..}}')
    texts = [_text(reply, 'text', where, 'give every reply a text, or leave the reply out')
             for reply in replies]
    # The default id covers all texts, because a source may repeat a prompt with other replies.
    name = _id(record, where) or records.digest(prompt, *texts)
    names = [_id(reply, where) or records.digest(name, str(i)) for i, reply in enumerate(replies)]
    answers = list(map(Message, names, texts, _ranks(replies, where)))
    yield where, Turn(name, 0, prompt, '', answers, messages if len(messages) > 1 else ())


def _messages(record: dict, where: str) -> conversation.Messages:
  """The checked messages of a record; none if it has a prompt."""
  if 'messages' not in record:
    return ()
  if 'prompt' in record:
    raise InputError(f'{where}: it has a prompt and messages; leave one of them out')
  try:
    messages = msgspec.convert(record['messages'], conversation.Messages)
    conversation.check(messages)
  except ValueError as error:
    raise InputError(f'{where}: "messages" is not a conversation ({error}); give a list of '
                     f'{{"role": .., "content": ..}}') from error
  for message in messages:
    _text(dict(content=message.content), 'content', where, 'leave the record out')
  return messages


def competition(values: list) -> list[int]:
  """Standard competition ranking: for each value, how many values are smaller.

  >>> competition([7, 2, 5, 5])
  [3, 0, 1, 1]
  """
  order = sorted(values)
  return [bisect.bisect_left(order, value) for value in values]


def _ranks(replies: list[dict], where: str) -> list[int]:
  """The given ranks, checked, or the ranks of the given scores."""
  given = {tuple(name for name in ('rank', 'score') if name in reply) for reply in replies}
  if given == {('score',)}:
    scores = [reply['score'] for reply in replies]
    for score in scores:
      if type(score) not in (int, float) or not -math.inf < score < math.inf:
        raise InputError(f'{where}: "score" must be a finite number but is {_show(score)}; '
                         f'leave out replies without a score')
    return competition([-score for score in scores])
  if not given <= {('rank',)}:
    raise InputError(f'{where}: give every reply a "rank" (0 is best), '
                     f'or every reply a "score", not both')
  ranks = [reply['rank'] for reply in replies]
  if not all(type(rank) is int for rank in ranks) or ranks != competition(ranks):
    raise InputError(f'{where}: the ranks {_show(ranks)} are not a valid ranking; number the '
                     f'replies 0, 1, 2, .. from the best; equal replies share a rank (0, 1, 1, 3)')
  return ranks


def _text(raw: dict, name: str, where: str, advice: str) -> str:
  value = raw.get(name)
  if not isinstance(value, str) or not value.strip():
    raise InputError(f'{where}: "{name}" must be a non-empty string but is {_show(value)}; '
                     f'{advice}')
  if re.search('[\ud800-\udfff]', value):
    raise InputError(f'{where}: "{name}" contains an unpaired surrogate (\\ud800 to \\udfff); '
                     f'correct or delete the line')
  return value


def _id(raw: dict, where: str) -> str:
  """The id of a record or reply; '' if it has none."""
  if raw.get('id') is None:
    return ''
  return _text(raw, 'id', where, 'write it as a string, or leave it out')


def _show(value) -> str:
  return 'absent' if value is None else json.dumps(value)[:40]


def of_split(s, split: str) -> Iterator[schema.RankedPrompt]:
  """Yields the ranked prompts of a split of the seed data, checked; s: a stage that reads them."""
  for r in s.read(SEEDS):
    if r.split == split:
      check([r], s.path(SEEDS))
      yield r


def check(ranked: Iterable[schema.RankedPrompt], source):
  """Raises InputError if an id or a text is blank or if the ranks of a prompt are not a ranking.

  A ranking gives 0 to the best reply and equal ranks to ties, as in 0, 1, 1, 3.
  """
  for r in ranked:
    ranks = [reply.rank for reply in r.replies]
    if len(ranks) < 2 or ranks != competition(ranks):
      raise InputError(f'{source}: the ranks {ranks} of the replies of {r.id} are not a ranking '
                       f'(0 is best, then 1, 2, ..; ties share a rank); correct or delete that '
                       f'record')
    for reply in r.replies:
      for field in ('id', 'text'):
        if not getattr(reply, field).strip():
          raise InputError(f'{source}: a reply of {r.id} has no {field}; correct or delete that '
                           f'record')
