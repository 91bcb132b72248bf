"""Chat formats, the templates for few-shot prompt generation, and template files."""
from collections.abc import Sequence
import functools

from etils import epath

from srlm_jax import InputError, schema
from srlm_jax.config import CHATS
from srlm_jax.conversation import Message, Messages
from srlm_jax.data import rendering, thinking
from srlm_jax.data.rendering import Template

NO_TOKENS = dict(bos_token='', eos_token='')
CHATML = ('<|im_start|>', '<|im_end|>')  # the tokens that the format chatml needs
AUTHORS = 'data/author'  # path prefix of the author templates in the package


Prompt = str | Sequence[Message]  # what a user says, or a conversation that ends with it


def chat(kind: str, prompt: Prompt, tokenizer) -> str:
  """The prompt in a chat format, up to the response. Encode it with `tokenizer.encode`.

  Without a tokenizer there are no special tokens.

  >>> chat('plain', 'Name a fruit.', None)
  'User: Name a fruit.\\nAssistant:'
  """
  return _chat(kind, messages(prompt), tokenizer)


def messages(prompt: Prompt) -> Messages:
  """A prompt as a conversation."""
  return (Message('user', prompt),) if isinstance(prompt, str) else tuple(prompt)


def encode_prompt(kind: str, prompt: Prompt, tokenizer) -> list[int]:
  """Token ids of the prompt in its chat format: the input of the model.

  They are those of transformers' `apply_chat_template` with the same template.
  """
  return tokenizer.encode(chat(kind, prompt, tokenizer))


def with_response(kind: str, prompt: Prompt, response: str, tokenizer) -> str:
  """The prompt in a chat format and a response, or its beginning. For `tokenizer.encode`.

  """
  return chat(kind, prompt, tokenizer) + _answer_form(kind, tokenizer)[0] + response.strip()


def encode_pair(
    kind: str, prompt: Prompt, response: str, tokenizer) -> tuple[list[int], list[int]] | None:
  """(prompt ids, response ids); None if a token would cross the boundary between them.

  The ids of prompt and response must equal the ids of the whole text. Otherwise the model would be
  trained on token sequences that never occur in sampling.
  """
  before = encode_prompt(kind, prompt, tokenizer)
  whole = tokenizer.encode(with_response(kind, prompt, response, tokenizer))
  if whole[:len(before)] != before:
    return None
  return before, whole[len(before):]


def encode_response(kind: str, prompt: Prompt, response: str, finish: str, token_ids: Sequence[int],
                    tokenizer) -> tuple[list[int], list[int]] | str:
  """(prompt ids, response ids) to train on, or to score; or the reason why there are none.

  `token_ids`: as they were sampled, of a response with thinking; else the response is encoded. A
  finished one ends with the token that ends a turn. Raises InputError if `token_ids` do not say
  what the response says.
  """
  if not response.strip():
    return 'empty response'
  if token_ids:
    before = encode_prompt(kind, prompt, tokenizer)
    if thinking.read(tokenizer, before, token_ids).text != response:
      raise InputError(f'the token_ids of the response {response[:60]!r} are not its text; use the '
                       f'tokenizer and the chat format that sampled it, or delete the token_ids')
    return before, list(token_ids)
  pair = encode_pair(kind, prompt, response, tokenizer)
  if pair is None:
    return 'token crosses the prompt/response boundary'
  before, after = pair
  return before, [*after, end_of_turn(kind, tokenizer)] if finish == schema.EOS else after


def end_of_turn(kind: str, tokenizer) -> int:
  """The id that ends a response: the added token that the template writes after it, else eos."""
  return _answer_form(kind, tokenizer)[1]


def end_ids(kind: str, tokenizer) -> list[int]:
  """All ids that end a response: eos and, in a chat format, what ends a turn; 'none': no format."""
  found = list(tokenizer.eos_ids)
  if kind != 'none' and (end := end_of_turn(kind, tokenizer)) not in found:
    found.append(end)
  return found


@functools.lru_cache(maxsize=16)
def _answer_form(kind: str, tokenizer) -> tuple[str, int]:
  """(the text between the prompt and a response without thinking, the id that ends it).

  Both are as the template writes them in a conversation that goes on, if that begins like the
  prompt.
  """
  answer = '\ua66e\ua66e'
  before = chat(kind, 'a', tokenizer)
  try:
    whole = _chat(kind, (Message('user', 'a'), Message('assistant', answer)), tokenizer, False)
  except InputError:  # a template of one turn
    whole = ''
  form, _, after = whole.removeprefix(before).partition(answer)
  end = tokenizer.first_added(after)
  if not whole.startswith(before):
    form = ''
    if thinking.is_open(tokenizer, tokenizer.encode(before)):
      form = f'{tokenizer.name_of(tokenizer.thinking[1])}\n\n'
  return form, tokenizer.eos_ids[0] if end is None else end


def _chat(kind: str, said: Messages, tokenizer, prompt: bool = True) -> str:
  """As `chat`; without `prompt`, the last message is the assistant's."""
  if kind not in CHATS:
    raise InputError(f'config.chat is {kind!r}; choose one of {", ".join(CHATS)}')
  if kind == 'tokenizer':
    template = tokenizer.template
    if template is None:
      raise InputError('this tokenizer has no chat template (a text, or a list with one that is '
                       'named default); set config.chat to plain, llama2 or chatml')
  else:
    template = Template(source(kind), f'the chat template {kind}', is_own=True)
  if tokenizer is None:
    return rendering.render(template, said, NO_TOKENS, prompt)
  if kind == 'chatml' and (absent := {*CHATML} - {*tokenizer.added.values()}):
    raise InputError(f'config.chat is chatml, but the tokenizer has no token '
                     f'{" or ".join(sorted(absent))}; use a tokenizer with both, or set '
                     f'config.chat to plain or llama2')
  return tokenizer.chat(said, template, prompt)


@functools.cache
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
