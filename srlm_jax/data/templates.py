"""Chat formats, the templates for few-shot prompt generation, and template files."""
from etils import epath

from srlm_jax import InputError
from srlm_jax.config import CHATS

AUTHORS = 'data/author'  # path prefix of the author templates in the package


def chat(kind: str, prompt: str, tokenizer) -> str:
  """The prompt in a chat format, up to the response. Encode it with `tokenizer.encode`.

  >>> chat('plain', 'Name a fruit.', None)
  'User: Name a fruit.\\nAssistant:'
  """
  if kind == 'plain':
    return f'User: {prompt}\nAssistant:'
  if kind == 'llama2':
    return f'[INST] {prompt} [/INST]'
  if kind == 'tokenizer':
    return tokenizer.chat(prompt)
  raise InputError(f'config.chat is {kind!r}; choose one of {", ".join(CHATS)}')


def encode_prompt(kind: str, prompt: str, tokenizer) -> list[int]:
  """Token ids of the prompt in its chat format, starting with bos: the input of the model."""
  return _encode(chat(kind, prompt, tokenizer), tokenizer)


def encode_pair(
    kind: str, prompt: str, response: str, tokenizer) -> tuple[list[int], list[int]] | None:
  """(prompt ids, response ids); None if a token would cross the boundary between them.

  The ids of prompt and response must equal the ids of the whole text. Otherwise the model would be
  trained on token sequences that never occur in sampling.
  """
  text = chat(kind, prompt, tokenizer)
  before = _encode(text, tokenizer)
  response = response.strip() if kind == 'tokenizer' else ' ' + response.strip()
  whole = _encode(text + response, tokenizer)
  if whole[:len(before)] != before:
    return None
  return before, whole[len(before):]


def _encode(text: str, tokenizer) -> list[int]:
  """Token ids starting with one bos; the chat template of a tokenizer may already contain bos."""
  ids = tokenizer.encode(text)
  return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def source(kind: str) -> str:
  """The Jinja template of a chat format of the package: plain, llama2 or chatml.

  It takes what transformers passes: messages, add_generation_prompt, bos_token, eos_token. An
  exported model can therefore have it as its own template.
  """
  if kind not in CHATS or kind == 'tokenizer':
    raise InputError(f'there is no chat template {kind!r} in the package; choose one of '
                     f'{", ".join(name for name in CHATS if name != "tokenizer")}')
  return (epath.resource_path('srlm_jax') / 'data' / f'chat_{kind}.jinja').read_text()


def load_author(name: str) -> str:
  """The template that asks a model for new prompts. Its slot {shots} takes a numbered list.

  Raises InputError if the template does not exist or does not have the slot exactly once.
  """
  path, text = read(AUTHORS, name, 'config.prompts.template')
  if text.count('{shots}') != 1:
    raise InputError(f'{path} contains the slot {{shots}} {text.count("{shots}")} times; '
                     f'an author template must contain it once')
  return text


def read(kind: str, name: str, key: str) -> tuple[epath.Path, str]:
  """(path, text) of a template file.

  `name` is the name of a template in the package, srlm_jax/{kind}_{name}.txt, or the path of a
  file. `key` is the config key that an InputError names.
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
    raise InputError(f'{key}: {path} cannot be read as text ({error}); '
                     f'give a UTF-8 text file') from error
