"""Open Assistant (OASST1) as seed data: the first turn of every conversation, as the published files hold it.

Both formats are read, one tree a line or one message a line, the messages in any order. Only English is kept, of
trees that are ready for export; what a model wrote is kept on request.
"""
from collections.abc import Iterable, Iterator
import contextlib
import json
import sqlite3
from types import NoneType

from srlm_jax import InputError

NAME = 'oasst1'


def turns(rows: Iterable[tuple[str, dict]], synthetic: bool) -> Iterator[tuple[str, dict]]:
  """Yields (place, turn) of (place, record): trees as they come, flat messages after all, grouped on disk."""
  with contextlib.closing(sqlite3.connect('')) as flat:  # '': in a temporary file, for a reply may come first
    flat.execute('create table message (id text, parent text, place text, record text)')
    for where, record in rows:
      if 'prompt' in record:
        prompt = _field(record, 'prompt', where, dict)
        replies = _field(prompt, 'replies', where, list, NoneType) or []
        yield where, _turn(where, record, prompt, [(where, reply) for reply in replies], synthetic)
      elif 'message_id' in record:
        names = [_field(record, 'message_id', where, str), _field(record, 'parent_id', where, str, NoneType)]
        flat.execute('insert into message values (?, ?, ?, ?)', (*names, where, json.dumps(record)))
      else:
        raise InputError(f'{where}: neither a tree ("prompt") nor a message ("message_id") of OASST1')
    flat.execute('create index by_parent on message (parent)')
    of = 'from message where parent is ? order by rowid'
    for name, where, text in flat.execute(f'select id, place, record {of}', (None,)):
      replies = [(place, json.loads(reply)) for place, reply in flat.execute(f'select place, record {of}', (name,))]
      record = json.loads(text)
      yield where, _turn(where, record, record, replies, synthetic)


def _turn(where: str, record: dict, prompt: dict, replies: list[tuple[str, dict]], synthetic: bool) -> dict:
  """The turn of a tree, with why it and its replies are dropped; '' is not."""
  asked = _message(where, prompt, 'prompter', synthetic)
  answers = [_message(place, reply, 'assistant', synthetic) for place, reply in replies]
  for answer in answers:
    if not answer['dropped'] and answer['rank'] < 0:
      answer['dropped'] = 'unranked'
  ranks = [answer['rank'] for answer in answers if not answer['dropped']]
  dropped = asked['dropped'] or ('ranks repeat' if len(set(ranks)) < len(ranks) else '')
  if _field(record, 'tree_state', where, str) != 'ready_for_export':
    dropped = 'tree not ready for export'  # spam, given up, or still growing
  return {'id': asked['id'], 'prompt': asked['text'], 'dropped': dropped, 'replies': answers}


def _message(where: str, raw: dict, role: str, synthetic: bool) -> dict:
  """Checks a published message; absent is null, as one format leaves out what the other writes as null."""
  if not isinstance(raw, dict) or raw.get('role') != role:
    raise InputError(f'{where}: no message with role "{role}" where one belongs; this is not OASST1')
  rank, text = _field(raw, 'rank', where, int, NoneType), _field(raw, 'text', where, str)
  flaws = {'deleted': _field(raw, 'deleted', where, bool, NoneType),
           'synthetic': _field(raw, 'synthetic', where, bool, NoneType) and not synthetic,
           'not English': _field(raw, 'lang', where, str) != 'en', 'empty': not text.strip()}
  return {'id': _field(raw, 'message_id', where, str), 'text': text, 'rank': -1 if rank is None else rank,
          'dropped': next((name for name, found in flaws.items() if found), '')}


def _field(raw: dict, name: str, where: str, *types):
  value = raw.get(name)
  if type(value) not in types or (name == 'rank' and value is not None and value < 0):
    raise InputError(f'{where}: "{name}" is {str(value)[:40]!r}, which OASST1 never has; mend the line')
  return value
