"""Records to examples to train on: tokens of a prompt and of one response (SFT) or two (DPO)."""
from collections.abc import Iterable
import dataclasses

from srlm_jax import InputError
from srlm_jax.data import templates


class NothingLeft(InputError):
  """Every example was dropped, or there was none."""


@dataclasses.dataclass(frozen=True)
class Example:
  """What the loss counts are the tokens of the responses: of each, its first is predicted by the prompt's last."""
  id: str
  prompt: list[int]
  responses: tuple[list[int], ...]  # one (SFT), or chosen and rejected (DPO)
  confidence: float = 1.0  # of a pair: the probability that chosen is the better one

  def __len__(self):
    """Tokens; of a pair the prompt's once."""
    return len(self.prompt) + sum(map(len, self.responses))


@dataclasses.dataclass(frozen=True)
class Examples:
  examples: list[Example]
  dropped: dict[str, int]  # why others were left out


def sft(records: Iterable[dict], tokenizer, chat: str, max_length: int) -> Examples:
  """Records with prompt and response -> examples with the loss on the response and the eos after it.

  A record whose `finish` is not eos was cut at the length limit: its response gets no eos. A record
  without `finish` was written by a person, and is whole.
  """
  kept = _Kept()
  for record in records:
    finished = record.get('finish', 'eos') == 'eos'
    kept.add(record['id'], [_encode(record['prompt'], record['response'], finished, tokenizer, chat, max_length)])
  return kept.examples('no example is left to train on')


def corpus(documents: Iterable[dict], tokenizer, max_length: int) -> Examples:
  """Records with text -> examples of `max_length` tokens, filled end to end with documents, loss on every token but the
  first."""
  stream = []
  for document in documents:
    stream += [tokenizer.bos_id, *tokenizer.encode(document['text']), tokenizer.eos_ids[0]]
  count = len(stream) // max_length
  if not count:
    raise InputError(f'the corpus has {len(stream)} tokens, fewer than one row of {max_length}')
  rows = (stream[i * max_length:(i + 1) * max_length] for i in range(count))
  return Examples([Example(f'row{i}', row[:1], (row[1:],)) for i, row in enumerate(rows)], {})


def dpo(pairs: Iterable[dict], tokenizer, chat: str, max_length: int) -> Examples:
  """Records with prompt, chosen and rejected -> examples of two responses; one cut by length gets no eos.

  A record may say how sure it is that chosen is the better one (`confidence`, 0 to 1; without it 1).
  """
  kept = _Kept()
  for pair in pairs:
    if pair['chosen'].strip() == pair['rejected'].strip():
      raise InputError(f'pair {pair["id"]}: chosen and rejected are the same text; there is nothing to prefer')
    confidence = pair.get('confidence', 1.0)
    if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
      raise InputError(f'pair {pair["id"]}: its confidence is {confidence!r}; it is a number from 0 to 1')
    kept.add(pair['id'], [_encode(pair['prompt'], pair[side], pair[f'{side}_finish'] == 'eos', tokenizer, chat,
                                  max_length) for side in ('chosen', 'rejected')], confidence)
  return kept.examples('no pair is left to train on')


def _encode(prompt, response, finished, tokenizer, chat, max_length):
  """(prompt, response) as tokens, or the reason why there are none."""
  if not response.strip():
    return 'empty response'
  seam = templates.encode_pair(chat, prompt, response, tokenizer)
  if seam is None:
    return 'tokenizer merges across the seam'
  before, after = seam
  after = after + [tokenizer.eos_ids[0]] * finished
  return (before, after) if len(before) + len(after) <= max_length else f'longer than {max_length} tokens'


class _Kept:
  """The examples whose every side could be encoded; counts the reasons of the others."""

  def __init__(self):
    self._examples, self._dropped = {}, {}

  def add(self, name, sides, confidence=1.0):
    reason = next((side for side in sides if isinstance(side, str)), None)
    if not reason and len(sides) == 2 and sides[0] == sides[1]:
      reason = 'chosen and rejected the same tokens'
    if reason:
      self._dropped[reason] = self._dropped.get(reason, 0) + 1
    elif name in self._examples:
      raise InputError(f'two training records have the id {name}; ids name records')
    else:
      self._examples[name] = Example(name, sides[0][0], tuple(response for _, response in sides), float(confidence))

  def examples(self, nothing: str) -> Examples:
    if not self._examples:
      why = ', '.join(f'{n} {reason}' for reason, n in self._dropped.items()) or 'the files are empty'
      raise NothingLeft(f'{nothing}: {why}')
    return Examples(list(self._examples.values()), self._dropped)
