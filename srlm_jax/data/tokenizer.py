"""Text to ids and back, by the tokenizer that came with the model; no network."""
from collections.abc import Sequence
import itertools
import json

from etils import epath

from srlm_jax import InputError


class Tokenizer:
  """One face for sentencepiece (`tokenizer.model`) and transformers (`tokenizer.json`) tokenizers.

  `bos_id` starts every row, `eos_ids` are the ids that end one (the first of them is what we train on).
  """

  def __init__(self, size: int, bos_id: int, eos_ids: Sequence[int]):
    self.size, self.bos_id, self.eos_ids = size, bos_id, tuple(eos_ids)

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Ids of the text, without bos; names of special tokens in it are plain text unless `special`."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the ids, special tokens left out; an id that the model has and the tokenizer has not is U+FFFD."""
    raise NotImplementedError

  def plain(self, text: str) -> str:
    """The text with the names of special tokens broken by a space, so that they are text in any chat form."""
    return text

  def chat(self, prompt: str) -> str:
    """The prompt in the tokenizer's own chat template, up to where the response begins."""
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
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=(folder / 'tokenizer.model').read_bytes())
    except RuntimeError as error:
      raise InputError(f'{folder / "tokenizer.model"} is no SentencePiece model; fetch it again') from error
    if self._model.bos_id() < 0 or self._model.eos_id() < 0:
      raise InputError(f'{folder / "tokenizer.model"} has no bos or no eos piece; train it with both')
    super().__init__(self._model.vocab_size(), self._model.bos_id(),
                     _eos_ids(folder, self._model.eos_id()))

  def encode(self, text, special=False):
    return self._model.encode(text)  # sentencepiece never reads control pieces from text

  def decode(self, ids):
    return ''.join(self._model.decode(group) if known else '\ufffd' * len(group)
                   for known, group in _runs(ids, self.size))


class _Transformers(Tokenizer):

  def __init__(self, folder):
    import transformers
    self._model = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if self._model.bos_token_id is None or self._model.eos_token_id is None:
      raise InputError(f'the tokenizer in {folder} names no bos or no eos token; add them to tokenizer_config.json')
    super().__init__(len(self._model), self._model.bos_token_id, _eos_ids(folder, self._model.eos_token_id))

  def encode(self, text, special=False):
    return self._model.encode(text, add_special_tokens=False, split_special_tokens=not special)

  def decode(self, ids):
    return ''.join(self._model.decode(group, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                   if known else '\ufffd' * len(group) for known, group in _runs(ids, self.size))

  def plain(self, text):
    for token in self._model.all_special_tokens:
      text = text.replace(token, f'{token[0]} {token[1:]}')
    return text

  def chat(self, prompt):
    if not self._model.chat_template:
      return super().chat(prompt)
    text = self._model.apply_chat_template(
        [{'role': 'user', 'content': self.plain(prompt)}], tokenize=False, add_generation_prompt=True)
    return text.removeprefix(self._model.bos_token)


def _runs(ids, size: int):
  """Yields (known, ids) for each run of ids that the tokenizer knows, or does not."""
  for known, group in itertools.groupby((int(i) for i in ids), lambda i: i < size):
    yield known, list(group)


def _eos_ids(folder, own: int) -> list[int]:
  """The tokenizer's eos first, then those that generation_config.json adds (Llama 3 has several)."""
  path = folder / 'generation_config.json'
  try:
    named = json.loads(path.read_text()).get('eos_token_id', []) if path.exists() else []
  except ValueError as error:
    raise InputError(f'{path} is not JSON ({error}); mend or delete it') from error
  named = [named] if isinstance(named, int) else named or []
  return [own, *(i for i in named if i != own)]
