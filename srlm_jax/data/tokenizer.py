"""Text to ids and back, by the tokenizer that came with the model; no network."""
from collections.abc import Sequence
import itertools
import json
import re
import reprlib
import secrets

from etils import epath

from srlm_jax import InputError

_LETTER, _SIGN = '\ua66e', '\u2e0e'  # no tokenizer adds tokens of these


class Tokenizer:
  """One face for sentencepiece (`tokenizer.model`) and transformers (`tokenizer.json`) tokenizers.

  `bos_id` starts every row, `eos_ids` are the ids that end one (the first of them is what we train on).
  """

  def __init__(self, size: int, bos_id: int, eos_ids: Sequence[int]):
    self.size, self.bos_id, self.eos_ids = size, bos_id, tuple(eos_ids)

  def encode(self, text: str) -> list[int]:
    """Ids of the text, without bos. No text becomes an added token, except where `chat` put one."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the ids, special tokens left out; an id beyond the tokenizer's is U+FFFD.

    Added tokens that are not special (`<think>`) are decoded to their text, and `encode` reads that
    text as plain text: a response that holds them is trained on and judged as text.
    """
    raise NotImplementedError

  def chat(self, prompt: str) -> str:
    """The prompt in the tokenizer's own chat template, up to the response, for `encode`.

    The added tokens that the template itself writes stand in it under names that only this
    tokenizer knows; bos is among them if the template writes it.
    """
    raise InputError('this tokenizer has no chat template of its own; set config.chat to plain or llama2')


def load(folder, vocab: int | None = None) -> Tokenizer:
  """The tokenizer in a checkpoint or Hugging Face folder; refused if it has more ids than the model, `vocab`."""
  folder = epath.Path(folder)
  if (folder / 'tokenizer.json').exists():
    tokenizer = _Transformers(folder)
  elif (folder / 'tokenizer.model').exists():
    tokenizer = _SentencePiece(folder)
  else:
    raise InputError(f'{folder} holds no tokenizer.json and no tokenizer.model; copy the model\'s tokenizer there')
  if vocab is not None and tokenizer.size > vocab:
    raise InputError(f'the tokenizer in {folder} has {tokenizer.size} ids and the model only {vocab}; '
                     f'they do not belong together')
  return tokenizer


class _SentencePiece(Tokenizer):

  def __init__(self, folder):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=(folder / 'tokenizer.model').read_bytes())
    except RuntimeError as error:
      raise InputError(f'{folder / "tokenizer.model"} is no SentencePiece model; fetch it again') from error
    if self._model.bos_id() < 0 or self._model.eos_id() < 0:
      raise InputError(f'{folder / "tokenizer.model"} has no bos or no eos piece; train it with both')
    pieces = sentencepiece_model_pb2.ModelProto.FromString(self._model.serialized_model_proto()).pieces
    if marks := [p.piece for p in pieces if p.type == p.USER_DEFINED and re.search(r'[<\[|].*[>\]|]', p.piece)]:
      raise InputError(f'{folder / "tokenizer.model"} reads {", ".join(marks[:3])} in any text as one piece, so that a '
                       f'prompt or response could imitate it; put the tokenizer.json of that model beside it')
    super().__init__(self._model.vocab_size(), self._model.bos_id(),
                     _eos_ids(folder, self._model.eos_id(), self._model.vocab_size()))

  def encode(self, text):  # sentencepiece never reads control pieces from text
    return self._model.encode(text)

  def decode(self, ids):
    return ''.join(self._model.decode(group) if known else '\ufffd' * len(group)
                   for known, group in _runs(ids, self.size))


class _Transformers(Tokenizer):
  """Encodes with a copy of the tokenizer in which the added tokens are renamed.

  A new name is random, so no prompt and no response can contain it. `chat` writes the new names
  where the template writes added tokens. The copy is otherwise the same tokenizer: text without the
  names of added tokens has the ids that transformers gives.
  """

  def __init__(self, folder):
    import transformers
    try:
      self._model = transformers.AutoTokenizer.from_pretrained(
          str(folder), local_files_only=True, trust_remote_code=False)
      backend = json.loads(self._model.backend_tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises no narrower class
      raise InputError(f'{folder / "tokenizer.json"} cannot be loaded by transformers without code '
                       f'of its own ({error}); fetch it again, or another tokenizer') from error
    if self._model.bos_token_id is None or self._model.eos_token_id is None:
      raise InputError(f'the tokenizer in {folder} names no bos or no eos token; add them to '
                       f'tokenizer_config.json')
    super().__init__(len(self._model), self._model.bos_token_id,
                     _eos_ids(folder, self._model.eos_token_id, len(self._model)))
    self._folder = folder
    # Runs of spaces (GPT-NeoX, Gemma) control nothing: they stay part of the vocabulary of text.
    self._marks = {t['id']: t['content'] for t in backend['added_tokens']
                   if t['special'] or t['content'].replace('▁', ' ').strip()}
    secret = secrets.token_hex(16)
    self._names = {i: f'<{secret}:{i}>' for i in self._marks}
    self._break = f'<{secret}>'
    self._copy, self._ids = _renamed(backend, self._names, self._break,
                                     folder / 'tokenizer.json')

  def encode(self, text):
    while True:
      found = self._copy.encode(text, add_special_tokens=False)
      made = [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True)
              if i not in self._ids and self._is_mark(i, text[slice(*span)])]
      if not made:
        return [self._ids.get(i, i) for i in found.ids if i != self._ids[self._break]]
      for i, start, end in reversed(made):  # pieces of the vocabulary that are added tokens, too
        part, name = text[start:end], self._marks[i]
        name = name if name in part else part
        if len(name) < 2:
          raise InputError(f'the character {name!r} is an added token of {self._folder}, and its '
                           f'vocabulary has no other id for it; remove it from added_tokens in '
                           f'tokenizer.json')
        part = part.replace(name, name[0] + self._break + name[1:])
        text = text[:start] + part + text[end:]

  def decode(self, ids):
    return ''.join(
        self._model.decode(group, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if known else '\ufffd' * len(group) for known, group in _runs(ids, self.size))

  def chat(self, prompt):
    if not self._model.chat_template:
      return super().chat(prompt)
    text, blank = self._render(prompt), self._render(_blank(prompt))
    if len(text) != len(blank) or any(
        a not in (b, c) for a, b, c in zip(blank, text, _blank(text), strict=True)):
      raise InputError(f'the chat template in {self._folder} changes or interprets the prompt '
                       f'{prompt[:60]!r}; take a template that inserts the prompt as it is, or '
                       f'set config.chat to plain or llama2')
    found = self._model(blank, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(found['input_ids'], found['offset_mapping'], strict=True)
    for i, (start, end) in reversed(list(spans)):
      if self._is_mark(i, blank[start:end]):
        whole = text[start:end]  # with the spaces that the mark takes in
        text = text[:start] + whole.replace(whole.strip() or whole, self._names[i]) + text[end:]
    return text

  def _render(self, prompt):
    return self._model.apply_chat_template([{'role': 'user', 'content': prompt}], tokenize=False,
                                           add_generation_prompt=True)

  def _is_mark(self, i: int, text: str) -> bool:
    """Whether the id is an added token; that of unknown text is one only where its name stands."""
    return i in self._marks and (i != self._model.unk_token_id or self._marks[i] in text)


def _renamed(backend: dict, names: dict[int, str], pause: str, path):
  """A tokenizers.Tokenizer with added tokens under new names, and its ids: {id or `pause`: id}.

  `pause` is one more added token: the mapping gives the copy's id of it, and for every other added
  token of the copy the id that it has in the model.
  """
  import tokenizers
  tokens = [t | dict(content=names.get(t['id'], t['content']), single_word=False)
            for t in backend['added_tokens']]
  copy = tokenizers.Tokenizer.from_str(json.dumps(backend | dict(
      added_tokens=tokens, post_processor=None, truncation=None, padding=None)))
  copy.add_special_tokens([tokenizers.AddedToken(pause, normalized=False)])
  new = [copy.token_to_id(name) for name in (*names.values(), pause)]
  if not set(new).isdisjoint(copy.get_vocab(with_added_tokens=False).values()):
    raise InputError(f'{path} has a vocabulary with gaps in its ids, so that text and added tokens '
                     f'cannot be told apart; number its pieces from 0 without gaps')
  return copy, {copy.token_to_id(t['content']): t['id'] for t in tokens} | {pause: new[-1]}


def _blank(text: str) -> str:
  """The text with a rare letter for each letter or digit and a rare sign for the rest; spaces stay.

  >>> _blank('a <b>') == '\ua66e \u2e0e\ua66e\u2e0e'
  True
  """
  return ''.join(c if c.isspace() else _LETTER if c.isalnum() or c == '_' else _SIGN for c in text)


def _runs(ids, size: int):
  """Yields (known, ids) for each run of ids that the tokenizer knows, or does not."""
  for known, group in itertools.groupby((int(i) for i in ids), lambda i: i < size):
    yield known, list(group)


def _eos_ids(folder, own: int, size: int) -> list[int]:
  """The tokenizer's eos first, then those that generation_config.json adds (Llama 3 has several).

  `size`: how many ids the tokenizer has. Raises InputError for a file that is not a JSON object,
  and for an eos_token_id that is not an id of the tokenizer or a list of its ids.
  """
  path = folder / 'generation_config.json'
  if not path.exists():
    return [own]
  try:
    fields = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read as JSON ({error}); correct or delete it') from error
  if not isinstance(fields, dict):
    raise InputError(f'{path} holds {reprlib.repr(fields)} where a JSON object must be; correct or '
                     f'delete it')
  named = fields.get('eos_token_id')
  ids = named if isinstance(named, list) else [] if named is None else [named]
  if not all(type(i) is int and 0 <= i < size for i in ids):
    raise InputError(f'{path}: eos_token_id is {reprlib.repr(named)}; it must be one or a list of '
                     f'the tokenizer\'s ids from 0 to {size - 1}; correct or delete it')
  return list(dict.fromkeys([own, *ids]))
