"""Training examples from records: tokens of a prompt and of one response (SFT) or two (DPO)."""
import array
from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import os
import tempfile

import numpy as np

from srlm_jax import conversation, InputError, schema
from srlm_jax.data import templates


class NoExamples(InputError):
  """There was no record, or every example was dropped."""


@dataclasses.dataclass(frozen=True)
class Example:
  """The targets of the loss are the tokens of the responses.

  The last token of the prompt predicts the first token of each response.
  """
  id: str
  prompt: list[int]
  responses: tuple[list[int], ...]  # one (SFT), or chosen and rejected (DPO)
  soft_label: float = 1.0  # of a pair: the probability that chosen is better

  def __len__(self):
    """The number of tokens; a pair's prompt counts once."""
    return len(self.prompt) + sum(map(len, self.responses))


class Stored(Sequence[Example]):
  """Examples, read again from a temporary file: their tokens may take more than the memory.

  >>> stored = Stored()
  >>> stored.append(Example('a', [1, 2], ([3], [])))
  >>> len(stored), stored[0]
  (1, Example(id='a', prompt=[1, 2], responses=([3], []), soft_label=1.0))
  """

  def __init__(self):
    self._file, self._ends = tempfile.TemporaryFile(buffering=0), array.array('q', [0])
    self._ids, self._soft_labels = [], array.array('d')

  def append(self, example: Example):
    parts = [example.prompt, *example.responses]
    data = np.asarray([len(parts), *map(len, parts), *itertools.chain(*parts)], np.int32).tobytes()
    end = self._ends[-1] + len(data)
    while data:  # a disk that is nearly full takes a part, and then raises OSError
      data = data[self._file.write(data):]
    self._ends.append(end)
    self._ids.append(example.id)
    self._soft_labels.append(example.soft_label)

  def __len__(self) -> int:
    return len(self._ids)

  def __getitem__(self, i: int) -> Example:
    name, start, end = self._ids[i], *self._ends[i:i + 2]
    count, *rest = np.frombuffer(os.pread(self._file.fileno(), end - start, start),
                                 np.int32).tolist()
    tokens = iter(rest[count:])
    prompt, *responses = (list(itertools.islice(tokens, size)) for size in rest[:count])
    return Example(name, prompt, tuple(responses), self._soft_labels[i])


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of a training set."""
  examples: Sequence[Example]
  dropped: dict[str, int]  # reason: how many records were dropped for it


def sft(records: Iterable[schema.Demonstration | schema.EftExample | schema.Positive], tokenizer,
        chat: str, max_length: int) -> Examples:
  """Prompts with a response -> examples of one response, followed by eos.

  A response whose `finish` is not eos was truncated and gets no eos.
  """
  kept = _Kept()
  for record in records:
    encoded = _encode(record, record.response, record.finish, record.token_ids, tokenizer, chat,
                      max_length)
    kept.add(record.id, [encoded])
  return kept.examples('no example is left to train on')


def corpus(documents: Iterable[schema.Document], tokenizer, max_length: int) -> Examples:
  """-> examples of `max_length` tokens, cut from the concatenated documents.

  Every token but the first of each example is a target.
  """
  made, rest = Stored(), []
  for document in documents:
    rest += [*tokenizer.start, *tokenizer.encode(document.text), tokenizer.eos_ids[0]]
    whole = len(rest) // max_length * max_length
    for start in range(0, whole, max_length):
      made.append(Example(f'row{len(made)}', rest[start:start + 1],
                          (rest[start + 1:start + max_length],)))
    rest = rest[whole:]
  if not made:
    raise InputError(f'the corpus has {len(rest)} tokens, fewer than one row of {max_length}; '
                     f'add text, or lower config.train.max_length')
  return Examples(made, {})


def dpo(pairs: Iterable[schema.Preference | schema.Demonstration | schema.EftExample], tokenizer,
        chat: str, max_length: int) -> Examples:
  """-> examples of two responses, chosen and rejected; eos as in `sft`.

  Of a record with one response, the second is empty: the loss is then that of SFT.
  """
  kept = _Kept()
  for pair in pairs:
    if not isinstance(pair, schema.Preference):
      encoded = _encode(pair, pair.response, pair.finish, pair.token_ids, tokenizer, chat,
                        max_length)
      kept.add(pair.id, [encoded, encoded if isinstance(encoded, str) else (encoded[0], [])])
      continue
    if pair.chosen.strip() == pair.rejected.strip():
      raise InputError(f'pair {pair.id}: chosen and rejected are the same text; remove the pair')
    if not 0 <= pair.soft_label <= 1:
      raise InputError(f'pair {pair.id}: soft_label is {pair.soft_label}; it must be a number from '
                       f'0 to 1')
    encoded = [_encode(pair, *response, tokenizer, chat, max_length) for response in (
        (pair.chosen, pair.chosen_finish, pair.chosen_token_ids),
        (pair.rejected, pair.rejected_finish, pair.rejected_token_ids))]
    kept.add(pair.id, encoded, pair.soft_label)
  return kept.examples('no pair is left to train on')


def _encode(record, response, finish, token_ids, tokenizer, chat, max_length):
  """-> (prompt, response) as tokens, or the reason to drop the record."""
  encoded = templates.encode_response(
      chat, conversation.of(record), response, finish, token_ids, tokenizer)
  if isinstance(encoded, str):
    return encoded
  if sum(map(len, encoded)) > max_length:
    return f'longer than {max_length} tokens'
  return encoded


class _Kept:
  """Collects the examples whose responses could all be encoded; counts reasons for the others."""

  def __init__(self):
    self._examples, self._names, self._dropped = Stored(), set(), {}

  def add(self, name, encoded, soft_label=1.0):
    """`encoded`: the result of `_encode` for each response."""
    reason = next((one for one in encoded if isinstance(one, str)), None)
    if not reason and len(encoded) == 2 and encoded[0] == encoded[1]:
      reason = 'chosen and rejected the same tokens'
    if reason:
      self._dropped[reason] = self._dropped.get(reason, 0) + 1
    elif name in self._names:
      raise InputError(f'two training records have the id {name}; make the ids unique')
    else:
      responses = tuple(response for _, response in encoded)
      self._names.add(name)
      self._examples.append(Example(name, encoded[0][0], responses, float(soft_label)))

  def examples(self, nothing: str) -> Examples:
    if not self._examples:
      why = ', '.join(f'{n} {reason}' for reason, n in self._dropped.items())
      raise NoExamples(f'{nothing}: {why or "the files are empty"}')
    return Examples(self._examples, self._dropped)
