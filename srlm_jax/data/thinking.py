"""The thinking of reasoning models: what a response says, and what stays hidden.

A model thinks between two added tokens of its tokenizer (`Tokenizer.thinking`). The chat template
may write the first one, at the end of the prompt. What follows the last closing token is the
response; without a closing token, thinking that began has no end, and the response is empty.
"""
from collections.abc import Sequence
import dataclasses

from srlm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Said:
  """A generated text. `token_ids` are all of its ids if it has thinking, else none."""
  text: str      # without thinking
  thinking: str
  token_ids: tuple[int, ...]


def read(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> Said:
  """The ids of a prompt and of the text generated after it -> what it says."""
  was_open = is_open(tokenizer, prompt_ids)
  if not was_open and not {*ids} & {*(tokenizer.thinking or ())}:
    return Said(tokenizer.decode(ids).strip(), '', ())
  start, end = tokenizer.thinking
  last = max((i for i, token in enumerate(ids) if token == end), default=-1)
  is_complete = last >= 0 and start not in ids[last:]
  hidden, shown = (ids[:last], ids[last + 1:]) if is_complete else (ids, ())
  hidden = [token for token in hidden if token not in (start, end)]
  return Said(tokenizer.decode(shown).strip(), tokenizer.decode(hidden).strip(), tuple(ids))


def is_open(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
  """Whether a prompt ends inside thinking."""
  if tokenizer.thinking is None:
    return False
  marks = [i for i in prompt_ids if i in tokenizer.thinking]
  return marks[-1:] == [tokenizer.thinking[0]]
