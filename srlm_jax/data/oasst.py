"""Open Assistant (OASST1) as seed data: every user turn with the replies to it.

Reads both published formats: one tree per line, or one message per line in any order. Keeps
English messages of trees that are ready for export. Keeps model-written (synthetic) messages on
request. The prompt of a first turn is its message. A later turn has the messages up to it, and its
prompt is their text. A later turn is dropped if any message before it is dropped.
"""
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import json
import sqlite3
from types import NoneType

from srlm_jax import conversation, InputError
from srlm_jax.data.turns import Message, Turn

NAME = 'oasst1'

# (place, message) -> (place, reply) of each reply; place: file:line, for errors.
_Replies = Callable[[str, dict], list[tuple[str, dict]]]


def turns(rows: Iterable[tuple[str, dict]], synthetic: bool) -> Iterator[tuple[str, Turn]]:
  """(place, record) -> (place, turn); place is file:line, for errors.

  Trees come first, in their order, then flat messages. `synthetic`: keep model-written messages.
  Raises InputError for a record that is not OASST1.
  """
  with _MessageTable() as table:
    for where, record in rows:
      if 'prompt' in record:
        root = _field(record, 'prompt', where, dict)
        yield from _walk(where, root, _tree_flaw(record, where), _nested_replies, synthetic)
      elif 'message_id' in record:
        table.insert(where, record)
      else:
        raise InputError(f'{where}: neither a tree ("prompt") nor a message ("message_id") of '
                         f'OASST1; give OASST1 files')
    table.index()
    for where, raw in table.roots():
      yield from _walk(where, raw, _tree_flaw(raw, where), table.replies, synthetic)
    for where, raw in table.orphans():
      is_prompt = raw.get('role') == 'prompter'
      for place, prompt in [(where, raw)] if is_prompt else table.replies(where, raw):
        yield from _walk(place, prompt, 'after a missing message', table.replies, synthetic,
                         before=('', ''))


class _MessageTable:
  """Flat messages in a temporary file, because a reply may come before its parent."""

  def __enter__(self):
    self._database = sqlite3.connect('')  # '': a temporary file
    self._database.execute(
        'create table message (id text primary key, parent text, place text, record text)')
    return self

  def __exit__(self, *_):
    self._database.close()

  def insert(self, where: str, record: dict):
    names = (_field(record, 'message_id', where, str),
             _field(record, 'parent_id', where, str, NoneType))
    try:
      self._database.execute('insert into message values (?, ?, ?, ?)',
                             (*names, where, json.dumps(record)))
    except sqlite3.IntegrityError as error:  # then the tree might be endless
      raise InputError(f'{where}: a second message with the id {names[0]!r}; delete one') from error

  def index(self):
    """Indexes the messages by parent; call it after the last `insert`."""
    self._database.execute('create index by_parent on message (parent)')

  def roots(self) -> Iterator[tuple[str, dict]]:
    return self._select('parent is null')

  def orphans(self) -> Iterator[tuple[str, dict]]:
    """Messages whose parent is not in the files, for example because the files were filtered."""
    return self._select('parent is not null and parent not in (select id from message)')

  def replies(self, where: str, raw: dict) -> list[tuple[str, dict]]:
    del where  # each reply has its own place
    return list(self._select('parent is ?', raw['message_id']))

  def _select(self, condition: str, *values) -> Iterator[tuple[str, dict]]:
    query = f'select place, record from message where {condition} order by rowid'
    for place, text in self._database.execute(query, values):
      yield place, json.loads(text)


def _walk(where: str, root: dict, flaw: str, replies: _Replies, synthetic: bool,
          before: tuple[str, ...] = ()) -> Iterator[tuple[str, Turn]]:
  """Yields (place, turn) of a user message and of all user messages below it.

  `flaw`: the reason to drop all of them, or ''; `before`: the messages before `root`.
  """
  stack = [(where, root, before, flaw)]
  while stack:
    where, raw, before, flaw = stack.pop()
    prompt, answers = _message(where, raw, 'prompter', synthetic), []
    said = (*before, prompt.text)
    for place, reply in replies(where, raw):
      answer = _message(place, reply, 'assistant', synthetic)
      is_broken = prompt.dropped or answer.dropped
      below = flaw or ('after a dropped message' if is_broken else '')
      stack += [(later_place, later, (*said, answer.text), below)
                for later_place, later in replies(place, reply)]
      if not answer.dropped and answer.rank < 0:
        answer = dataclasses.replace(answer, dropped='unranked')
      answers.append(answer)
    ranks = [answer.rank for answer in answers if not answer.dropped]
    repeated = 'ranks repeat' if len(set(ranks)) < len(ranks) else ''
    messages = conversation.in_turns(said)
    text = conversation.text(messages) if messages else prompt.text
    yield where, Turn(prompt.id, len(before) // 2, text, flaw or prompt.dropped or repeated,
                      answers, messages)


def _nested_replies(where: str, raw: dict) -> list[tuple[str, dict]]:
  """The replies to a message in the tree format."""
  return [(where, reply) for reply in _field(raw, 'replies', where, list, NoneType) or []]


def _tree_flaw(record: dict, where: str) -> str:
  """The reason to drop a whole tree, or ''."""
  if _field(record, 'tree_state', where, str) == 'ready_for_export':
    return ''
  return 'tree not ready for export'  # spam, abandoned or still growing


def _message(where: str, raw: dict, role: str, synthetic: bool) -> Message:
  """Checks a message. An absent field is null: one format omits what the other writes as null."""
  if not isinstance(raw, dict) or raw.get('role') != role:
    raise InputError(f'{where}: expected a message with role "{role}"; give OASST1 files')
  rank, text = _field(raw, 'rank', where, int, NoneType), _field(raw, 'text', where, str)
  flaws = {'deleted': _field(raw, 'deleted', where, bool, NoneType),
           'synthetic': _field(raw, 'synthetic', where, bool, NoneType) and not synthetic,
           'not English': _field(raw, 'lang', where, str) != 'en', 'empty': not text.strip()}
  return Message(_field(raw, 'message_id', where, str), text, -1 if rank is None else rank,
                 next((name for name, found in flaws.items() if found), ''))


def _field(raw: dict, name: str, where: str, *types):
  """The value of a field, checked to have one of the types; ranks must not be negative."""
  value = raw.get(name)
  if type(value) not in types or (name == 'rank' and value is not None and value < 0):
    raise InputError(f'{where}: "{name}" is {str(value)[:40]!r}, which is not valid in OASST1; '
                     f'correct or delete the line')
  return value
