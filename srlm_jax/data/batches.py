"""Records to batches of fixed shape: which rows, in which order, tokens and masks."""
from collections.abc import Iterable
import dataclasses

import numpy as np

from srlm_jax import InputError
from srlm_jax.data import templates


class NothingLeft(InputError):
  """Every example was dropped, or there was none."""


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of one dataset, right-padded with 0: what every step draws from."""
  ids: list[str]
  tokens: np.ndarray     # [N, T] (SFT) or [N, 2, T] (DPO: chosen, rejected)
  loss_mask: np.ndarray  # the same shape; 1 = this token is predicted and counts
  dropped: dict[str, int]  # why examples were left out
  confidence: np.ndarray | None = None  # [N] of DPO's pairs: the probability that chosen is the better one

  def __len__(self):
    return len(self.ids)

  def at(self, step: int, batch: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of one step: passes over the data, each in an order of its own, chained without a gap."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(wanted // len(self)):
      order = np.random.default_rng((seed, int(epoch))).permutation(len(self))
      here = wanted // len(self) == epoch
      rows[here] = order[wanted[here] % len(self)]
    batch = dict(tokens=self.tokens[rows], loss_mask=self.loss_mask[rows])
    return batch if self.confidence is None else dict(batch, confidence=self.confidence[rows])


def sft(examples: Iterable[dict], tokenizer, chat: str, max_length: int) -> Rows:
  """Records with prompt and response -> rows [N, T] whose loss is on the response and the eos after it."""
  encoded, dropped = {}, {}
  for example in examples:
    row = _row(example['prompt'], example['response'], True, tokenizer, chat, max_length)
    _keep(encoded, dropped, example['id'], [row])
  rows = _rows(encoded, dropped, max_length, 'no example is left to train on')
  return dataclasses.replace(rows, tokens=rows.tokens[:, 0], loss_mask=rows.loss_mask[:, 0])


def corpus(documents: Iterable[dict], tokenizer, max_length: int) -> Rows:
  """Records with text -> rows [N, T = max_length] filled end to end with documents, loss on every token."""
  stream = []
  for document in documents:
    stream += [tokenizer.bos_id, *tokenizer.encode(document['text']), tokenizer.eos_ids[0]]
  count = len(stream) // max_length
  if not count:
    raise InputError(f'the corpus has {len(stream)} tokens, fewer than one row of {max_length}')
  tokens = np.asarray(stream[:count * max_length], np.int32).reshape(count, max_length)
  return Rows([f'row{i}' for i in range(count)], tokens, np.ones_like(tokens), {})


def dpo(pairs: Iterable[dict], tokenizer, chat: str, max_length: int) -> Rows:
  """Records with prompt, chosen and rejected -> rows [N, 2, T]; a response cut by length gets no eos.

  A record may say how sure it is that chosen is the better one (`confidence`, 0 to 1; without it 1).
  """
  encoded, dropped, confidence = {}, {}, {}
  for pair in pairs:
    if pair['chosen'].strip() == pair['rejected'].strip():
      raise InputError(f'pair {pair["id"]}: chosen and rejected are the same text; there is nothing to prefer')
    both = [_row(pair['prompt'], pair[side], pair[f'{side}_finish'] == 'eos', tokenizer, chat, max_length)
            for side in ('chosen', 'rejected')]
    _keep(encoded, dropped, pair['id'], both)
    confidence[pair['id']] = pair.get('confidence', 1.0)
    if not isinstance(confidence[pair['id']], int | float) or not 0 <= confidence[pair['id']] <= 1:
      raise InputError(f'pair {pair["id"]}: its confidence is {confidence[pair["id"]]!r}; it is a number from 0 to 1')
  rows = _rows(encoded, dropped, max_length, 'no pair is left to train on')
  return dataclasses.replace(rows, confidence=np.asarray([confidence[name] for name in rows.ids], np.float32))


def _row(prompt, response, finished, tokenizer, chat, max_length):
  """(ids, loss mask), or the reason why there is none."""
  if not response.strip():
    return 'empty response'
  seam = templates.encode_pair(chat, prompt, response, tokenizer)
  if seam is None:
    return 'tokenizer merges across the seam'
  before, after = seam
  after = after + [tokenizer.eos_ids[0]] * finished
  if len(before) + len(after) > max_length:
    return f'longer than {max_length} tokens'
  return before + after, [0] * len(before) + [1] * len(after)


def _keep(encoded, dropped, name, sides):
  """Keeps an example whose every side could be encoded; counts the reason otherwise."""
  reason = next((side for side in sides if isinstance(side, str)), None)
  if reason:
    dropped[reason] = dropped.get(reason, 0) + 1
  elif name in encoded:
    raise InputError(f'two training records have the id {name}; ids name records')
  else:
    encoded[name] = sides


def _rows(encoded, dropped, max_length, nothing) -> Rows:
  """Pads to the longest row of all, rounded up to 32 so that compiled shapes repeat between runs."""
  if not encoded:
    why = ', '.join(f'{n} {reason}' for reason, n in dropped.items()) or 'the files are empty'
    raise NothingLeft(f'{nothing}: {why}')
  longest = max(len(ids) for sides in encoded.values() for ids, _ in sides)
  width = min(-(-longest // 32) * 32, max_length)
  tokens, mask = (np.asarray([[side[part] + [0] * (width - len(side[part])) for side in sides]
                              for sides in encoded.values()], np.int32) for part in (0, 1))  # [N, sides, T]
  return Rows(list(encoded), tokens, mask, dropped)
