"""Converts text to token ids and back with the tokenizer of a model. Does not use the network."""
from collections.abc import Sequence
import itertools
import json
import re
import reprlib
import secrets

from etils import epath

from srlm_jax import InputError, model_files, storage

_LETTER, _SIGN = '\ua66e', '\u2e0e'  # characters that no added token contains


class Tokenizer:
  """The interface of sentencepiece (`tokenizer.model`) and transformers (`tokenizer.json`) models.

  `size`: number of ids. `bos_id` starts every sequence. Any of `eos_ids` ends a sequence; training
  uses the first.
  """

  def __init__(self, size: int, bos_id: int, eos_ids: Sequence[int]):
    self.size, self.bos_id, self.eos_ids = size, bos_id, tuple(eos_ids)

  def encode(self, text: str) -> list[int]:
    """Token ids of the text, without bos. Only `chat` can put added tokens into a text."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the token ids, without special tokens. An id that does not exist becomes U+FFFD.

    Added tokens that are not special (`<think>`) become their text. `encode` reads that text as
    plain text, so responses that contain it are trained on and judged as plain text.
    """
    raise NotImplementedError

  def chat(self, prompt: str) -> str:
    """The prompt in the tokenizer's chat template, up to the response. Encode it with `encode`.

    The added tokens of the template, including bos, appear under secret names that only this
    tokenizer can encode. Raises InputError if there is no template or it alters the prompt.
    """
    raise InputError('this tokenizer has no chat template; set config.chat to plain or llama2')


def load(folder, vocab: int | None = None) -> Tokenizer:
  """The tokenizer in a checkpoint or Hugging Face folder.

  Raises InputError if there is none, or if it has more ids than `vocab`, the size of the model.
  """
  folder = epath.Path(folder)
  if (folder / 'tokenizer.json').exists():
    tokenizer = _Transformers(folder)
  elif (folder / 'tokenizer.model').exists():
    tokenizer = _SentencePiece(folder)
  else:
    raise InputError(f'{folder} contains neither tokenizer.json nor tokenizer.model; '
                     f'copy the tokenizer of the model there')
  if vocab is not None and tokenizer.size > vocab:
    raise InputError(f'the tokenizer in {folder} has {tokenizer.size} ids but the model has only '
                     f'{vocab}; use the tokenizer of the model')
  return tokenizer


class _SentencePiece(Tokenizer):

  def __init__(self, folder):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    path = folder / 'tokenizer.model'
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
      raise InputError(f'{path} is not a SentencePiece model; download it again') from error
    if self._model.bos_id() < 0 or self._model.eos_id() < 0:
      raise InputError(f'{path} has no bos or no eos piece; train it with both')
    proto = sentencepiece_model_pb2.ModelProto.FromString(self._model.serialized_model_proto())
    if marks := [p.piece for p in proto.pieces
                 if p.type == p.USER_DEFINED and re.search(r'[<\[|].*[>\]|]', p.piece)]:
      raise InputError(f'{path} encodes {", ".join(marks[:3])} in any text as one control piece, '
                       f'so a prompt or response could forge it; '
                       f'add the tokenizer.json of the model to the folder')
    super().__init__(self._model.vocab_size(), self._model.bos_id(),
                     _eos_ids(folder, self._model.eos_id(), self._model.vocab_size()))

  def encode(self, text):  # sentencepiece never produces control pieces from text
    return self._model.encode(text)

  def decode(self, ids):
    return ''.join(self._model.decode(group) if known else '\ufffd' * len(group)
                   for known, group in _runs(ids, self.size))


class _Transformers(Tokenizer):
  """Encodes with a copy of the tokenizer in which the added tokens have secret random names.

  No prompt or response can contain such a name. `chat` writes the secret names in place of the
  added tokens of the template. Text without the names of added tokens gets the same ids as in
  transformers.
  """

  def __init__(self, folder):
    import transformers
    try:
      with storage.local_folder(folder, model_files.names(folder)) as local:
        self._model = transformers.AutoTokenizer.from_pretrained(
            local, local_files_only=True, trust_remote_code=False)
      backend = json.loads(self._model.backend_tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises no narrower class
      raise InputError(f'transformers cannot load {folder / "tokenizer.json"} without remote code '
                       f'({error}); download it again or use another tokenizer') from error
    if self._model.bos_token_id is None or self._model.eos_token_id is None:
      raise InputError(f'the tokenizer in {folder} has no bos or no eos token; add them to '
                       f'tokenizer_config.json')
    super().__init__(len(self._model), self._model.bos_token_id,
                     _eos_ids(folder, self._model.eos_token_id, len(self._model)))
    self._folder = folder
    # Added tokens of spaces only (GPT-NeoX, Gemma) control nothing, so text may contain them.
    self._added = {t['id']: t['content'] for t in backend['added_tokens']
                   if t['special'] or t['content'].replace('▁', ' ').strip()}
    secret = secrets.token_hex(16)
    self._secret_names = {i: f'<{secret}:{i}>' for i in self._added}
    self._separator = f'<{secret}>'
    self._copy, self._ids = _renamed(backend, self._secret_names, self._separator,
                                     folder / 'tokenizer.json')

  def encode(self, text):
    while True:
      found = self._copy.encode(text, add_special_tokens=False)
      forged = [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True)
                if i not in self._ids and self._is_added(i, text[slice(*span)])]
      if not forged:
        return [self._ids.get(i, i) for i in found.ids if i != self._ids[self._separator]]
      # These vocabulary pieces are also added tokens: break each of them apart and encode again.
      for i, start, end in reversed(forged):
        part, name = text[start:end], self._added[i]
        name = name if name in part else part
        if len(name) < 2:
          raise InputError(f'the character {name!r} is an added token of {self._folder}, and its '
                           f'vocabulary has no other id for it; remove it from added_tokens in '
                           f'tokenizer.json')
        part = part.replace(name, name[0] + self._separator + name[1:])
        text = text[:start] + part + text[end:]

  def decode(self, ids):
    return ''.join(
        self._model.decode(group, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if known else '\ufffd' * len(group) for known, group in _runs(ids, self.size))

  def chat(self, prompt):
    if not self._model.chat_template:
      return super().chat(prompt)
    # Added tokens in the masked rendering come from the template, never from the prompt. Each
    # character must equal the plain rendering (template) or its mask (prompt).
    text, masked = self._render(prompt), self._render(_masked(prompt))
    if len(text) != len(masked) or any(
        a not in (b, c) for a, b, c in zip(masked, text, _masked(text), strict=True)):
      raise InputError(f'the chat template in {self._folder} changes or interprets the prompt '
                       f'{prompt[:60]!r}; use a template that inserts the prompt unchanged, or '
                       f'set config.chat to plain or llama2')
    found = self._model(masked, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(found['input_ids'], found['offset_mapping'], strict=True)
    for i, (start, end) in reversed(list(spans)):
      if self._is_added(i, masked[start:end]):
        whole = text[start:end]  # includes the spaces that the added token absorbs
        renamed = whole.replace(whole.strip() or whole, self._secret_names[i])
        text = text[:start] + renamed + text[end:]
    return text

  def _render(self, prompt):
    return self._model.apply_chat_template([{'role': 'user', 'content': prompt}], tokenize=False,
                                           add_generation_prompt=True)

  def _is_added(self, i: int, text: str) -> bool:
    """Whether the id is an added token. The unk id counts only if `text` contains its name."""
    return i in self._added and (i != self._model.unk_token_id or self._added[i] in text)


def _renamed(backend: dict, names: dict[int, str], separator: str, path):
  """(a copy of the tokenizer with renamed added tokens, mapping of its ids).

  `names`: id -> new name. `separator` is the name of one more added token. The mapping gives the id
  of the model for each added token of the copy, and the id of the copy for `separator`.
  """
  import tokenizers
  tokens = [t | dict(content=names.get(t['id'], t['content']), single_word=False)
            for t in backend['added_tokens']]
  copy = tokenizers.Tokenizer.from_str(json.dumps(backend | dict(
      added_tokens=tokens, post_processor=None, truncation=None, padding=None)))
  copy.add_special_tokens([tokenizers.AddedToken(separator, normalized=False)])
  new = [copy.token_to_id(name) for name in (*names.values(), separator)]
  if not set(new).isdisjoint(copy.get_vocab(with_added_tokens=False).values()):
    raise InputError(f'{path} has a vocabulary with gaps in its ids, so text and added tokens '
                     f'cannot be distinguished; number its pieces from 0 without gaps')
  return copy, {copy.token_to_id(t['content']): t['id'] for t in tokens} | {
      separator: new[-1]}


def _masked(text: str) -> str:
  """Replaces each letter or digit by a rare letter and other characters by a rare sign.

  White space stays.

  >>> _masked('a <b>') == '\ua66e \u2e0e\ua66e\u2e0e'
  True
  """
  return ''.join(c if c.isspace() else _LETTER if c.isalnum() or c == '_' else _SIGN for c in text)


def _runs(ids, size: int):
  """Yields (whether the ids exist, ids) for each run of existing or of non-existing ids."""
  for known, group in itertools.groupby((int(i) for i in ids), lambda i: i < size):
    yield known, list(group)


def _eos_ids(folder, own: int, size: int) -> list[int]:
  """The tokenizer's eos id, then those of generation_config.json (Llama 3 has several).

  `own`: the tokenizer's eos id; `size`: its number of ids. Raises InputError if the file is not a
  JSON object, or if eos_token_id is not an id of the tokenizer or a list of its ids.
  """
  path = folder / 'generation_config.json'
  if not path.exists():
    return [own]
  try:
    fields = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read as JSON ({error}); correct or delete it') from error
  if not isinstance(fields, dict):
    raise InputError(f'{path} contains {reprlib.repr(fields)} instead of a JSON object; correct or '
                     f'delete it')
  named = fields.get('eos_token_id')
  ids = named if isinstance(named, list) else [] if named is None else [named]
  if not all(type(i) is int and 0 <= i < size for i in ids):
    raise InputError(f'{path}: eos_token_id is {reprlib.repr(named)}; it must be one or a list of '
                     f'the tokenizer\'s ids from 0 to {size - 1}; correct or delete it')
  return list(dict.fromkeys([own, *ids]))
