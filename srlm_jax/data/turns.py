"""The unit of seed data: one user turn of a conversation and the replies to it."""
import dataclasses

from srlm_jax import conversation


@dataclasses.dataclass
class Message:
  """A reply to a prompt. `dropped` is the reason to drop it, or ''."""
  id: str
  text: str
  rank: int  # 0 is best; negative if there is none
  dropped: str = ''


@dataclasses.dataclass
class Turn:
  """A prompt with the replies to it. `dropped` is the reason to drop all of it, or ''."""
  id: str
  turn: int  # index in the conversation; 0 is the first turn
  prompt: str
  dropped: str
  replies: list[Message]
  messages: conversation.Messages = ()  # with several turns; `prompt` is their text
