"""The texts around prompts and responses: chat forms, few-shot authoring; templates as files."""
from etils import epath

from srlm_jax import InputError

_FOLDER = epath.resource_path('srlm_jax') / 'data'
CHATS = ('plain', 'llama2', 'tokenizer')


def chat(kind: str, prompt: str, tokenizer) -> str:
  """The prompt up to where the response begins, for `tokenizer.encode`.

  >>> chat('plain', 'Name a fruit.', None)
  'User: Name a fruit.\\nAssistant:'
  """
  if kind == 'plain':
    return f'User: {prompt}\nAssistant:'
  if kind == 'llama2':
    return f'[INST] {prompt} [/INST]'
  if kind == 'tokenizer':
    return tokenizer.chat(prompt)
  raise InputError(f'config.chat is {kind!r}; it is one of {", ".join(CHATS)}')


def encode_prompt(kind: str, prompt: str, tokenizer) -> list[int]:
  """Ids of the prompt in its chat form, bos first: what the model answers."""
  return _encode(chat(kind, prompt, tokenizer), tokenizer)


def encode_pair(
    kind: str, prompt: str, response: str, tokenizer) -> tuple[list[int], list[int]] | None:
  """(prompt ids, response ids); None if the tokenizer merges a piece across the seam between them.

  The pieces of prompt + response must be those of the whole text, or training would show the model
  a seam that sampling never makes.
  """
  text = chat(kind, prompt, tokenizer)
  before = _encode(text, tokenizer)
  response = response.strip() if kind == 'tokenizer' else ' ' + response.strip()
  whole = _encode(text + response, tokenizer)
  if whole[:len(before)] != before:
    return None
  return before, whole[len(before):]


def _encode(text: str, tokenizer) -> list[int]:
  """Ids of a chat form, bos first: a tokenizer's own template may write bos itself."""
  ids = tokenizer.encode(text)
  return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def load_author(name: str) -> str:
  """The template that asks for new prompts; its slot {shots} is a numbered list."""
  path, text = read('author', name, 'config.prompts.template')
  if text.count('{shots}') != 1:
    raise InputError(f'{path} holds the slot {{shots}} {text.count("{shots}")} times; an author template holds it once')
  return text


def read(kind: str, name: str, key: str):
  """(path, text) of a template of the package by name, or of any file by path; `key` names it in the error."""
  path = epath.Path(name) if '/' in name or name.endswith('.txt') else _FOLDER / f'{kind}_{name}.txt'
  if not path.exists():
    known = sorted(p.stem.removeprefix(f'{kind}_') for p in _FOLDER.glob(f'{kind}_*.txt'))
    raise InputError(f'{key}: {path} does not exist; name a template of srlm_jax/data ({", ".join(known)}) or the path '
                     f'of a file')
  try:
    return path, path.read_text().replace('\r\n', '\n').rstrip('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{key}: {path} cannot be read as text ({error}); name a file of UTF-8 text') from error
