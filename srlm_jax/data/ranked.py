r"""Any ranked replies as seed data, from JSONL (or .jsonl.gz) with a prompt and its replies a line.

  {"prompt": "Name a fruit.", "replies": [{"text": "Pear.", "rank": 0}, {"text": "No.", "rank": 1}]}

`rank` is 0 for the best, then 1, 2, ..; equal replies share a rank, and the next is as far down as if they did not
(0, 1, 1, 3). In its place every reply may have a `score`, higher for better. Record and reply may have an `id`, a text.
UltraFeedback in this format, without the replies that have no text or no score:

  jq -c '{prompt: .instruction, replies: [.completions[]
    | select((.response | test("\\S")) and (.overall_score | type) == "number")
    | {text: .response, score: .overall_score}]}' ultrafeedback.jsonl > ranked.jsonl
"""
import bisect
from collections.abc import Iterable, Iterator
import json
import math
import re

from srlm_jax import InputError, records

NAME = 'ranked'


def turns(rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
  """Yields (place, turn) of (place, record), in their order; nothing is dropped here."""
  for where, record in rows:
    prompt = _text(record, 'prompt', where, 'give every record a prompt')
    replies = record.get('replies')
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
      raise InputError(f'{where}: "replies" is {_show(replies)}; give a list of {{"text": .., "rank": ..}}')
    texts = [_text(reply, 'text', where, 'give every reply a text, or leave it out') for reply in replies]
    # Without a name: of all texts, for sources hold a prompt more than once, with other replies.
    name = _name(record, where) or records.digest(prompt, *texts)
    yield where, {'id': name, 'turn': 0, 'prompt': prompt, 'dropped': '', 'replies': [
        {'id': _name(reply, where) or records.digest(name, str(i)), 'text': text, 'rank': rank, 'dropped': ''}
        for i, (reply, text, rank) in enumerate(zip(replies, texts, _ranks(replies, where), strict=True))]}


def competition(values: list) -> list[int]:
  """How many are smaller than each: its rank among them.

  >>> competition([7, 2, 5, 5])
  [3, 0, 1, 1]
  """
  order = sorted(values)
  return [bisect.bisect_left(order, value) for value in values]


def _ranks(replies: list[dict], where: str) -> list[int]:
  """The ranks that were given, checked, or those of the scores."""
  given = {tuple(name for name in ('rank', 'score') if name in reply) for reply in replies}
  if not given <= {('rank',)} and given != {('score',)}:
    raise InputError(f'{where}: give every reply a "rank" (0 is best), or every one a "score", not both')
  values = [reply['rank'] if 'rank' in reply else reply['score'] for reply in replies]
  if given == {('score',)}:
    for value in values:
      if type(value) not in (int, float) or not -math.inf < value < math.inf:
        raise InputError(f'{where}: "score" is {_show(value)}, no finite number; leave out replies without a score')
    return competition([-value for value in values])
  if not all(type(value) is int for value in values) or values != competition(values):
    raise InputError(f'{where}: the ranks {_show(values)} are no ranking; number the replies 0, 1, 2, .. from the '
                     f'best, equal ones alike (0, 1, 1, 3)')
  return values


def _text(raw: dict, name: str, where: str, advice: str) -> str:
  value = raw.get(name)
  if not isinstance(value, str) or not value.strip():
    raise InputError(f'{where}: "{name}" is {_show(value)}, no text; {advice}')
  if re.search('[\ud800-\udfff]', value):
    raise InputError(f'{where}: "{name}" holds half a character (\\ud800 to \\udfff); mend or delete the line')
  return value


def _name(raw: dict, where: str) -> str:
  return _text(raw, 'id', where, 'write it as a string, or leave it out') if raw.get('id') is not None else ''


def _show(value) -> str:
  return 'absent' if value is None else json.dumps(value)[:40]
