"""Open Assistant (OASST1) as seed data: the prompts of all conversations, with the replies to each.

Reads both published formats, one tree per line or one message per line, the messages in any order.
Keeps English text of trees that are ready for export; keeps model-written text on request. The
prompt of a first turn is its message. The prompt of a later turn is the conversation so far as
text (`render`), and the turn is dropped where a message of that conversation is.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import json
import re
import sqlite3
from types import NoneType

from srlm_jax import InputError

NAME = 'oasst1'
# No chat form and no judge template uses these marks, so `judges` shows them unchanged.
_SPEAKERS = ('user', 'assistant')
_MARK = re.compile(r'^([^\S\n]*)\[(?=(?:user|assistant)\])', re.MULTILINE | re.IGNORECASE)


def turns(rows: Iterable[tuple[str, dict]], synthetic: bool) -> Iterator[tuple[str, dict]]:
  """Yields (place, turn) of (place, record): trees as they come, then flat messages."""
  with contextlib.closing(sqlite3.connect('')) as flat:  # '': in a temporary file, for a reply may come first
    flat.execute('create table message (id text, parent text, place text, record text)')
    for where, record in rows:
      if 'prompt' in record:
        root = _field(record, 'prompt', where, dict)
        yield from _walk(where, root, _state(record, where), _replies, synthetic)
      elif 'message_id' in record:
        names = [_field(record, 'message_id', where, str), _field(record, 'parent_id', where, str, NoneType)]
        flat.execute('insert into message values (?, ?, ?, ?)', (*names, where, json.dumps(record)))
      else:
        raise InputError(f'{where}: neither a tree ("prompt") nor a message ("message_id") of OASST1')
    flat.execute('create index by_parent on message (parent)')

    def select(which: str, *values) -> Iterator[tuple[str, dict]]:
      query = f'select place, record from message where {which} order by rowid'
      for place, text in flat.execute(query, values):
        yield place, json.loads(text)

    def replies(where: str, raw: dict) -> list[tuple[str, dict]]:
      return list(select('parent is ?', raw['message_id']))

    for where, raw in select('parent is null'):
      yield from _walk(where, raw, _state(raw, where), replies, synthetic)
    # Messages whose parent is not in the files, for example because the files were filtered.
    for where, raw in select('parent is not null and parent not in (select id from message)'):
      for place, prompt in [(where, raw)] if raw.get('role') == 'prompter' else replies(where, raw):
        yield from _walk(place, prompt, 'after a missing message', replies, synthetic, ('', ''))


def render(messages: Sequence[str]) -> str:
  """A conversation as a prompt: one message as it is, several each below a line with its speaker.

  No message can contain such a line, see `quoted`.

  >>> render(['Name a fruit.', 'Pear.', 'Why?'])
  '[user]\\nName a fruit.\\n\\n[assistant]\\nPear.\\n\\n[user]\\nWhy?'
  """
  if len(messages) == 1:
    return messages[0]
  return '\n\n'.join(
      f'[{_SPEAKERS[i % 2]}]\n{quoted(text).strip()}' for i, text in enumerate(messages))


def user_messages(prompt: str) -> list[str]:
  """The user's messages in a rendered conversation; the prompt itself where it is not one.

  >>> user_messages(render(['Name a fruit.', 'Pear.', 'Why?']))
  ['Name a fruit.', 'Why?']
  """
  if not prompt.startswith('[user]\n'):
    return [prompt]
  return re.split(r'(?:\A|\n\n)\[(?:user|assistant)\]\n', prompt)[1::2]


def quoted(text: str) -> str:
  """Adds a space to a speaker's mark at the start of a line.

  >>> quoted('Pear.\\n[user] Why?')
  'Pear.\\n[ user] Why?'
  """
  return _MARK.sub(r'\1[ ', re.sub('\r\n?|[\x85\u2028\u2029]', '\n', text))


def _walk(where: str, root: dict, flaw: str, replies: Callable, synthetic: bool,
          before: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
  """Yields (place, turn) of a prompt and of all prompts below it; `flaw` drops all of them.

  `replies(place, message)` returns the (place, message) of its children; `before` is what was said.
  """
  stack = [(where, root, before, flaw)]
  while stack:
    where, raw, before, flaw = stack.pop()
    asked, answers = _message(where, raw, 'prompter', synthetic), []
    said = (*before, asked['text'])
    for place, reply in replies(where, raw):
      answer = _message(place, reply, 'assistant', synthetic)
      broken = flaw or ('after a dropped message' if asked['dropped'] or answer['dropped'] else '')
      stack += [(below, prompt, (*said, answer['text']), broken)
                for below, prompt in replies(place, reply)]
      if not answer['dropped'] and answer['rank'] < 0:
        answer['dropped'] = 'unranked'
      answers.append(answer)
    ranks = [answer['rank'] for answer in answers if not answer['dropped']]
    dropped = flaw or asked['dropped'] or ('ranks repeat' if len(set(ranks)) < len(ranks) else '')
    yield where, {'id': asked['id'], 'turn': len(before) // 2, 'prompt': render(said),
                  'dropped': dropped, 'replies': answers}


def _replies(where: str, raw: dict) -> list[tuple[str, dict]]:
  """The (place, reply) of a message in the tree format."""
  return [(where, reply) for reply in _field(raw, 'replies', where, list, NoneType) or []]


def _state(record: dict, where: str) -> str:
  """Why the whole tree is dropped, or ''."""
  if _field(record, 'tree_state', where, str) == 'ready_for_export':
    return ''
  return 'tree not ready for export'  # spam, given up, or still growing


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
