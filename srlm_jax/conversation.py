"""Conversations: messages with a role, and their text, which judges and filters read.

A record of several turns has `messages`; its `prompt` is then `text(messages)`. A record of one
turn has no messages; its `prompt` is the user's message.
"""
from collections.abc import Iterable, Sequence
import dataclasses
import re
from typing import Literal

# No chat format and no judge template contains [user] or [assistant], so the text of a conversation
# passes through them unchanged.
_ROLES = ('system', 'user', 'assistant')
_MARK = re.compile(r'^([^\S\n]*)\[(?=(?:system|user|assistant)\])', re.MULTILINE | re.IGNORECASE)
_PART = re.compile(r'^([^\S\n]*)\[(?=(?:thinking|answer)\])', re.MULTILINE | re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
  """What one role said."""
  role: Literal['system', 'user', 'assistant']
  content: str


Messages = tuple[Message, ...]


def check(messages: Sequence[Message]):
  """Raises ValueError, with a sentence, unless messages are a conversation that asks for a reply.

  The roles are user, assistant, user, .., user; a system message may come first. No user or system
  message is blank.

  >>> check([Message('user', 'Name a fruit.'), Message('assistant', 'Pear.')])
  Traceback (most recent call last):
  ValueError: the last message must be of the user
  """
  first = 1 if messages and messages[0].role == 'system' else 0
  for i, message in enumerate(messages):
    wanted = 'system' if i < first else _ROLES[1 + (i - first) % 2]
    if message.role != wanted:
      raise ValueError(f'message {i + 1} has the role {message.role}, not {wanted}; write user and '
                       f'assistant in turns, after an optional system message')
    if not message.content.strip() and message.role != 'assistant':
      raise ValueError(f'message {i + 1} has no text')
  if not messages or messages[-1].role != 'user':
    raise ValueError('the last message must be of the user')


def check_record(prompt: str, messages: Messages):
  """Raises ValueError, with a sentence, if a record's messages are not what its prompt says."""
  if not messages:
    return
  check(messages)
  if len(messages) == 1:
    raise ValueError('messages has one message; leave it out, the prompt is enough')
  if prompt != text(messages):
    raise ValueError('the prompt is not the text of messages; write it as '
                     'srlm_jax.conversation.text does')


def of(record) -> Messages:
  """The conversation of a record: its messages, or its prompt alone."""
  return getattr(record, 'messages', ()) or (Message('user', record.prompt),)


def in_turns(texts: Iterable[str]) -> Messages:
  """Texts of the user and the assistant in turns -> messages; none for a single text."""
  found = tuple(Message(_ROLES[1 + i % 2], text) for i, text in enumerate(texts))
  return found if len(found) > 1 else ()


def text(messages: Sequence[Message]) -> str:
  """A conversation as text: a single message as it is, several each below a line with the role.

  `quoted` ensures that no message contains such a line.

  >>> text(in_turns(['Name a fruit.', 'Pear.', 'Why?']))
  '[user]\\nName a fruit.\\n\\n[assistant]\\nPear.\\n\\n[user]\\nWhy?'
  """
  if len(messages) == 1:
    return messages[0].content
  return '\n\n'.join(f'[{m.role}]\n{quoted(m.content).strip()}' for m in messages)


def user_messages(record) -> list[str]:
  """What the user says in the conversation of a record: at least one message."""
  return [m.content for m in of(record) if m.role == 'user']


def shown(record) -> str:
  """The prompt of a record as a judge sees it: no single message looks like a conversation."""
  return record.prompt if record.messages else quoted(record.prompt)


def quoted(text: str, mark: re.Pattern = _MARK) -> str:
  """Adds a space to a role's mark at the start of a line, so that it is no longer a mark.

  >>> quoted('Pear.\\n[user] Why?')
  'Pear.\\n[ user] Why?'
  """
  return mark.sub(r'\1[ ', re.sub('\r\n?|[\x85\u2028\u2029]', '\n', text))


def with_thinking(thinking: str, response: str) -> str:
  """A response as a judge sees it with `judge.show_thinking`. It contains no mark of its own.

  >>> with_thinking('It is sweet.', 'Pear.')
  '[thinking]\\nIt is sweet.\\n\\n[answer]\\nPear.'
  """
  response = quoted(response, _PART)
  if not thinking:
    return response
  return f'[thinking]\n{quoted(thinking, _PART)}\n\n[answer]\n{response}'
