"""Converts text to token ids and back with the tokenizer of a model. Does not use the network."""
from collections.abc import Mapping, Sequence
import contextlib
import itertools
import json
import re
import reprlib
import secrets
import types

from etils import epath

from srlm_jax import InputError, model_files, records, storage
from srlm_jax.conversation import Message
from srlm_jax.data import rendering
from srlm_jax.data.rendering import Template

# The names of the tokens that open and close a model's thinking, in the families that have them.
THINKING = (('<think>', '</think>'), ('[THINK]', '[/THINK]'))
# The highest id in a tokenizer.json: its library takes 4 bytes for each missing id below it.
MOST_ID = 2**24
_LETTER, _SIGN = '\ua66e', '\u2e0e'  # characters that no added token contains
_NUMBER = 0x20000  # the first of 42,719 rare letters, which number the messages


class Tokenizer:
  """The interface of sentencepiece (`tokenizer.model`) and transformers (`tokenizer.json`) models.

  `size`: number of ids. `bos_id` starts every sequence; None: there is none. Any of `eos_ids` ends
  a sequence. `added`: {id: name} of the tokens that text must not become. `special`: the variables
  of a chat template (bos_token, ..). `template`: the tokenizer's own chat template. `adds_bos`:
  whether transformers begins a text with bos. `thinking`: the ids that open and close a model's
  thinking, None without them.
  """

  def __init__(self, size: int, bos_id: int | None, eos_ids: Sequence[int],
               added: Mapping[int, str] = types.MappingProxyType({}),
               special: Mapping[str, str] = types.MappingProxyType({}),
               template: Template | None = None, adds_bos: bool = True):
    self.size, self.bos_id, self.eos_ids = size, bos_id, tuple(eos_ids)
    self.added, self.special, self.template = added, special, template
    self.adds_bos = adds_bos and bos_id is not None
    ids = {name: i for i, name in added.items()}
    self.thinking = next(((ids[start], ids[end]) for start, end in THINKING
                          if start in ids and end in ids), None)
    self._end = self.thinking and added[self.thinking[1]]  # the name that closes thinking
    self._secret = secrets.token_hex(16)
    self._secret_names = {i: f'<{self._secret}:{i}>' for i in added}
    self._secret_pattern = re.compile(f'<{self._secret}:(\\d+)>')

  @property
  def start(self) -> list[int]:
    """What every sequence begins with: bos, or nothing."""
    return [] if self.bos_id is None else [self.bos_id]

  def encode(self, text: str) -> list[int]:
    """Token ids of the text, without bos. Only `chat` can put added tokens into a text."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the token ids, without special tokens. An id that does not exist becomes U+FFFD.

    Added tokens that are not special (`<tool_call>`) become their text. `encode` reads that text as
    plain text.
    """
    raise NotImplementedError

  def chat(self, messages: Sequence[Message], template: Template, prompt: bool = True) -> str:
    """The messages in a chat template, up to the next response if `prompt`. For `encode`.

    The added tokens of the template, including bos, appear under secret names that only this
    tokenizer can encode; the messages never become added tokens. A template may trim a message.
    Raises InputError if it leaves a message out, or reads or changes what a user or the system
    says. What an assistant says is inserted as it is, even if the template would read it, but
    without its thinking if the template leaves that out.
    """
    def rendered(some):
      return rendering.render(template, some, self.special, prompt)
    starts = self._hidden_thinking(messages, rendered)
    messages = [Message(m.role, m.content.rpartition(self._end)[2]) if start else m
                for m, start in zip(messages, starts, strict=True)]
    masks = [_mask(message.content, i) for i, message in enumerate(messages)]
    masked = [Message(m.role, start + m.content.replace(m.content.strip(), mask))
              for m, start, mask in zip(messages, starts, masks, strict=True)]
    text = rendered(masked)
    for message, mask in zip(messages, masks, strict=True):
      if mask not in text:
        raise InputError(f'{template.name} leaves out the {message.role}\'s message '
                         f'{message.content[:60]!r}; {rendering.ADVICE}')
    # With what users and the system say in place of its mask, the template must render the same.
    asked = [hidden if message.role == 'assistant' else message
             for message, hidden in zip(messages, masked, strict=True)]
    said = {mask: message.content.strip() for message, mask in zip(messages, masks, strict=True)}
    by_others = {mask: said[mask] for message, mask in zip(messages, masks, strict=True)
                 if message.role != 'assistant'}
    if rendered(asked) != _unmask(text, by_others):
      raise InputError(f'{template.name} changes or interprets the messages '
                       f'{messages[-1].content[:60]!r}; use a template that inserts them '
                       f'unchanged, or set config.chat to plain, llama2 or chatml')
    for i, start, end in reversed(self._added_in(text)):
      whole = text[start:end]  # includes the spaces that the added token absorbs
      renamed = whole.replace(whole.strip() or whole, self._secret_names[i])
      text = text[:start] + renamed + text[end:]
    return _unmask(text, said)

  def _hidden_thinking(self, messages: Sequence[Message], rendered) -> list[str]:
    """For each message, what the template gets in place of the thinking that it leaves out.

    '' for a message without thinking, and for all of them if the template repeats any thinking,
    which is then text. `rendered`: messages -> text.
    """
    masks = [_mask('a', len(messages) + i)
             if message.role == 'assistant' and self._end and self._end in message.content else ''
             for i, message in enumerate(messages)]
    starts = [mask and mask + self._end for mask in masks]
    if any(masks):
      text = rendered([Message(m.role, start + m.content.rpartition(self._end)[2]) if start else m
                       for m, start in zip(messages, starts, strict=True)])
      if any(mask and mask in text for mask in masks):
        return [''] * len(masks)
    return starts

  def first_added(self, text: str) -> int | None:
    """The first added token in a text from `chat`."""
    found = self._secret_pattern.search(text)
    return int(found[1]) if found else None

  def name_of(self, i: int) -> str:
    """The secret name of an added token, for `encode`."""
    return self._secret_names[i]

  def readable(self, text: str) -> str:
    """A text from `chat` with the added tokens' own names, for people and files."""
    return self._secret_pattern.sub(lambda found: self.added[int(found[1])], text)

  def _added_in(self, text: str) -> list[tuple[int, int, int]]:
    """(id, start, end) of the added tokens in a text."""
    raise NotImplementedError


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


def load_transformers(folder: str):
  """The tokenizer that transformers loads from a folder on a disk, without remote code.

  It chooses the class by two fields of config.json, and would refuse a model for the other fields.
  """
  import transformers
  path, config = epath.Path(folder) / 'config.json', None
  fields = json.loads(path.read_text()) if path.exists() else {}
  if 'model_type' in fields:
    config = transformers.AutoConfig.for_model(
        fields['model_type'], tokenizer_class=fields.get('tokenizer_class'))
  return transformers.AutoTokenizer.from_pretrained(
      folder, config=config, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _refusing(what: str):
  """Turns what a library of tokenizers raises into InputError; `what`: a file, and its fault."""
  try:
    yield
  except InputError:
    raise
  except BaseException as error:  # the libraries raise Exception itself, and on a panic of Rust
    # a class that is no Exception and cannot be imported.
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise InputError(f'{what} ({" ".join(str(error).split())}); download it again or use another '
                     f'tokenizer') from error


class _SentencePiece(Tokenizer):

  def __init__(self, folder):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    path = self._path = folder / 'tokenizer.model'
    with records.reading(path, 'copy the tokenizer of the model there'):
      data = path.read_bytes()
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
      raise InputError(f'{path} is not a SentencePiece model; download it again') from error
    if self._model.eos_id() < 0:
      raise InputError(f'{path} has no eos piece; train it with one')
    with _refusing(f'{path} is not a SentencePiece model'):
      proto = sentencepiece_model_pb2.ModelProto.FromString(self._model.serialized_model_proto())
      pieces = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
    if marks := [p.piece for p in proto.pieces
                 if p.type == p.USER_DEFINED and re.search(r'[<\[|].*[>\]|]', p.piece)]:
      raise InputError(f'{path} encodes {", ".join(marks[:3])} in any text as one control piece, '
                       f'so a prompt or response could forge it; '
                       f'add the tokenizer.json of the model to the folder')
    size, bos, eos = self._model.vocab_size(), self._model.bos_id(), self._model.eos_id()
    added = {i: piece for i, piece in enumerate(pieces) if self._model.is_control(i)}
    special = dict(bos_token=added[bos]) if bos >= 0 else {}
    super().__init__(size, bos if bos >= 0 else None, _eos_ids(folder, eos, size), added,
                     special | dict(eos_token=added[eos]),
                     adds_bos=_settings(folder).get('add_bos_token') is not False)

  def encode(self, text):  # sentencepiece never produces control pieces from text
    texts = self._secret_pattern.split(text)  # with ids of control pieces between them
    with _refusing(f'{self._path} cannot encode {text[:60]!r}'):
      return [i for even, part in enumerate(texts) if part
              for i in ([int(part)] if even % 2 else self._model.encode(part))]

  def decode(self, ids):
    with _refusing(f'{self._path} cannot decode token ids'):
      return ''.join(self._model.decode(group) if known else '\ufffd' * len(group)
                     for known, group in _runs(ids, self.size))

  def _added_in(self, text):
    ids = {name: i for i, name in self.added.items()}
    names = '|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))
    return [(ids[m[0]], *m.span()) for m in re.finditer(names, text)]


class _Transformers(Tokenizer):
  """Encodes with a copy of the tokenizer in which the added tokens have secret random names.

  No prompt or response can contain such a name. `chat` writes the secret names in place of the
  added tokens of the template. Text without the names of added tokens gets the same ids as in
  transformers.
  """

  def __init__(self, folder):
    path = self._path = folder / 'tokenizer.json'
    with _refusing(f'transformers cannot load {path} without remote code'):
      with storage.local_folder(folder, model_files.names(folder)) as local:
        if _highest_id(json.loads((epath.Path(local) / path.name).read_bytes())) > MOST_ID:
          raise _with_gaps(path)
        self._model = load_transformers(local)
      backend = json.loads(self._model.backend_tokenizer.to_str())
      adds_bos = self._model('a')['input_ids'][:1] == [self._model.bos_token_id]
      ids = self._model.get_vocab().values()
    if self._model.eos_token_id is None:
      raise InputError(f'the tokenizer in {folder} has no eos token; add one to '
                       f'tokenizer_config.json')
    if {*ids} != {*range(len(self._model))}:
      raise _with_gaps(path)
    # Added tokens of spaces only (GPT-NeoX, Gemma) control nothing, so text may contain them.
    added = {t['id']: t['content'] for t in backend['added_tokens']
             if t['special'] or t['content'].replace('▁', ' ').strip()}
    super().__init__(len(self._model), self._model.bos_token_id,
                     _eos_ids(folder, self._model.eos_token_id, len(self._model)), added,
                     self._model.special_tokens_map, _default_template(self._model, folder),
                     adds_bos)
    self._separator = f'<{self._secret}>'
    with _refusing(f'{path} cannot be used with renamed added tokens'):
      self._copy, self._ids = _renamed(backend, self._secret_names, self._separator, path)

  def encode(self, text):
    while True:
      with _refusing(f'{self._path} cannot encode {text[:60]!r}'):
        found = self._copy.encode(text, add_special_tokens=False)
      forged = [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True)
                if i not in self._ids and self._is_added(i, text[slice(*span)])]
      if not forged:
        return [self._ids.get(i, i) for i in found.ids if i != self._ids[self._separator]]
      # These vocabulary pieces are also added tokens: break each of them apart and encode again.
      for i, start, end in reversed(forged):
        part, name = text[start:end], self.added[i]
        name = name if name in part else part
        if len(name) < 2:
          raise InputError(f'the character {name!r} is an added token of {self._path}, and its '
                           f'vocabulary has no other id for it; remove it from added_tokens')
        part = part.replace(name, name[0] + self._separator + name[1:])
        text = text[:start] + part + text[end:]

  def decode(self, ids):
    with _refusing(f'{self._path} cannot decode token ids'):
      return ''.join(
          self._model.decode(group, skip_special_tokens=True, clean_up_tokenization_spaces=False)
          if known else '\ufffd' * len(group) for known, group in _runs(ids, self.size))

  def _added_in(self, text):
    with _refusing(f'{self._path} cannot encode {text[:60]!r}'):
      found = self._model(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(i, start, end)
            for i, (start, end) in zip(found['input_ids'], found['offset_mapping'], strict=True)
            if self._is_added(i, text[start:end])]

  def _is_added(self, i: int, text: str) -> bool:
    """Whether the id is an added token. The unk id counts only if `text` contains its name."""
    return i in self.added and (i != self._model.unk_token_id or self.added[i] in text)


def _highest_id(backend) -> int:
  """The highest id in the vocabulary of a tokenizer.json; -1 if it has no list of ids."""
  vocab = backend['model'].get('vocab')
  ids = vocab.values() if isinstance(vocab, dict) else ()
  return max((i for i in ids if isinstance(i, int)), default=-1)


def _settings(folder) -> dict:
  """The fields of tokenizer_config.json; none without that file."""
  path = folder / 'tokenizer_config.json'
  found = records.read_json(path, 'correct or delete it') if path.exists() else {}
  return found if isinstance(found, dict) else {}


def _default_template(model, folder) -> Template | None:
  """The chat template of a tokenizer; of several, the one named default. None without one."""
  found = model.chat_template
  source = found.get('default') if isinstance(found, dict) else found
  if not source or not isinstance(source, str):
    return None
  return Template(source, f'the chat template in {folder}')


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
    raise _with_gaps(path)
  return copy, {copy.token_to_id(t['content']): t['id'] for t in tokens} | {
      separator: new[-1]}


def _with_gaps(path) -> InputError:
  return InputError(f'{path} has a vocabulary with gaps in its ids, so text and added tokens '
                    f'cannot be distinguished; number its pieces from 0 without gaps')


def _mask(text: str, number: int) -> str:
  """A text that is unique for the number, and begins and ends like the text without outer spaces.

  >>> _mask(' a <b>', 0) == '\ua66e\U00020000\u2e0e'
  True
  """
  if not (text := text.strip()):
    return ''
  first, last = (_LETTER if c.isalnum() or c == '_' else _SIGN for c in (text[0], text[-1]))
  return first + chr(_NUMBER + number) + last


def _unmask(text: str, said: Mapping[str, str]) -> str:
  """Replaces each mask by the text that `said` has for it."""
  return re.sub('.[\U00020000-\U0002a6df].', lambda m: said.get(m[0], m[0]), text)


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
