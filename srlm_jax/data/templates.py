"""The texts around prompts and responses: chat forms, few-shot authoring; templates as files."""
from etils import epath

from srlm_jax import InputError
from srlm_jax.config import CHATS

AUTHORS = 'data/author'  # templates in the package: the beginning of their path


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
  path, text = read(AUTHORS, name, 'config.prompts.template')
  if text.count('{shots}') != 1:
    raise InputError(f'{path} holds the slot {{shots}} {text.count("{shots}")} times; an author template holds it once')
  return text


def read(kind: str, name: str, key: str):
  """A template: of the package by its name, srlm_jax/{kind}_{name}.txt, or any file by its path.

  Returns its path and its text. Raises InputError, which names the config key `key`.
  """
  package = epath.resource_path('srlm_jax')
  is_path = '/' in name or name.endswith('.txt')
  path = epath.Path(name) if is_path else package / f'{kind}_{name}.txt'
  if not path.exists():
    stem = kind.rpartition('/')[2]
    known = sorted(p.stem.removeprefix(f'{stem}_') for p in package.glob(f'{kind}_*.txt'))
    raise InputError(f'{key}: {path} does not exist; name a template of the package '
                     f'({", ".join(known)}) or the path of a file')
  try:
    return path, path.read_text().replace('\r\n', '\n').rstrip('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{key}: {path} cannot be read as text ({error}); name a file of UTF-8 text') from error
