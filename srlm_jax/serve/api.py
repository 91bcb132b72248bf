"""The requests and answers of OpenAI's API, as JSON."""
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from srlm_jax import closest, InputError
from srlm_jax.serve.text import Delta, Names, Token

MOST_SAMPLES = 128  # of one prompt
COMPLETION_TOKENS = 16  # max_tokens of a completion that does not say it, as in OpenAI's API
# Fields that are not supported, and the values with which they ask for nothing.
NEUTRAL = dict(
    presence_penalty=(0,), frequency_penalty=(0,), logit_bias=({},), suffix=('',), tools=([],),
    tool_choice=('none', 'auto'), parallel_tool_calls=(False, True), functions=([],),
    function_call=('none', 'auto'), response_format=({'type': 'text'},), modalities=(['text'],),
    store=(False,), service_tier=('auto', 'default'))
NEUTRAL_IN_MESSAGES = dict(refusal=('',), tool_calls=([],), annotations=([],))
ROLES = dict(system='system', developer='system', user='user', assistant='assistant')

Stop = Annotated[str, Meta(max_length=1000)]
Ids = Annotated[list[int], Meta(min_length=1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
  include_usage: bool = False


class Asked(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """The fields of both kinds of requests; `user` and `metadata` are ignored."""
  model: str
  temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
  top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
  top_k: Annotated[int, Meta(ge=0, le=10**9)] = 0  # 0: all
  n: Annotated[int, Meta(ge=1, le=MOST_SAMPLES)] = 1
  seed: Annotated[int, Meta(ge=-2**63, le=2**63 - 1)] | None = None
  stop: Stop | Annotated[list[Stop], Meta(max_length=32)] = []
  stream: bool = False
  stream_options: StreamOptions = StreamOptions()
  user: str = ''
  metadata: dict = {}

  @property
  def stops(self) -> list[str]:
    """The stop strings; an empty one asks for nothing."""
    return [x for x in ([self.stop] if isinstance(self.stop, str) else self.stop) if x]


class Completion(Asked):
  prompt: str | list[Any]
  max_tokens: Annotated[int, Meta(ge=0, le=10**9)] = COMPLETION_TOKENS
  logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
  echo: bool = False

  @property
  def top(self) -> int | None:
    """The number of likely tokens; None: no log-probs."""
    return self.logprobs

  @property
  def prompts(self) -> list[str | list[int]]:
    """The prompts; InputError for anything but a text, token ids, or a list of these."""
    for kind in (str, Ids, Annotated[list[str], Meta(min_length=1)],
                 Annotated[list[Ids], Meta(min_length=1)]):
      try:
        found = msgspec.convert(self.prompt, kind)
      except msgspec.ValidationError:
        continue
      return [found] if kind in (str, Ids) else found
    raise InputError('prompt must be a text, a list of token ids, or a list of texts or of lists '
                     'of token ids, no list of them empty')


class Message(msgspec.Struct, forbid_unknown_fields=True):
  """A message of a chat; its thinking is ignored."""
  role: str
  content: str | list[dict] = ''
  name: str = ''
  reasoning_content: str = ''

  @property
  def speaker(self) -> Literal['system', 'user', 'assistant']:
    """The role in a conversation; InputError if there is no such role."""
    if self.role not in ROLES:
      raise InputError(f'the role {self.role[:60]!r} is not supported; roles: {", ".join(ROLES)}')
    return ROLES[self.role]

  @property
  def text(self) -> str:
    """The content; InputError if a part of it is no text."""
    parts = [dict(type='text', text=self.content)] if isinstance(self.content, str) else (
        self.content)
    if not all(part.get('type') == 'text' and isinstance(part.get('text'), str) for part in parts):
      raise InputError('a part of a message\'s content is no text; only texts are supported: '
                       '{"type": "text", "text": ..}')
    return ''.join(part['text'] for part in parts)


class Chat(Asked):
  messages: Annotated[list[Message], Meta(min_length=1)]
  max_tokens: Annotated[int, Meta(ge=1, le=10**9)] | None = None  # None: what fits
  max_completion_tokens: Annotated[int, Meta(ge=1, le=10**9)] | None = None  # its new name
  logprobs: bool = False
  top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
  echo = False

  @property
  def top(self) -> int | None:
    """The number of likely tokens; None: no log-probs."""
    if self.top_logprobs and not self.logprobs:
      raise InputError('top_logprobs needs "logprobs": true')
    return self.top_logprobs if self.logprobs else None


def read(body: bytes, kind: type[Asked]) -> Asked:
  """The JSON of a request -> what it asks for; InputError if it is not understood.

  A field that is null counts as absent, also in a message.
  """
  try:
    fields = msgspec.json.decode(body)
  except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
    raise InputError(f'the request is not JSON ({error}); send a JSON object') from error
  if not isinstance(fields, dict):
    raise InputError('the request is no JSON object; send one')
  fields = {name: x for name, x in fields.items() if x is not None}
  if isinstance(fields.get('messages'), list):
    fields['messages'] = [_asking(message) for message in fields['messages']]
  known = sorted(field.name for field in msgspec.structs.fields(kind))
  neutral = NEUTRAL | dict(best_of=(fields.get('n', 1),))
  for name in sorted(fields.keys() - known):
    if fields.pop(name) not in neutral.get(name, ()):
      raise InputError(f'{name[:60]!r} is not supported{closest(name, known)}; supported: '
                       f'{", ".join(known)}')
  try:
    return msgspec.convert(fields, kind)
  except (msgspec.ValidationError, RecursionError) as error:
    raise InputError(f'the request is invalid: {error}') from error


def _asking(message: Any) -> Any:
  """A message of a request without the fields that ask for nothing."""
  if not isinstance(message, dict):
    return message
  return {name: x for name, x in message.items()
          if x is not None and x not in NEUTRAL_IN_MESSAGES.get(name, ())}


def usage(prompt: int, completion: int) -> dict:
  """Counts of tokens."""
  return dict(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Format:
  """The JSON of one endpoint's answers."""
  prefix = whole = part = ''

  def __init__(self, name: str, created: int, model: str, names: Names):
    self.common = dict(id=f'{self.prefix}-{name}', created=created, model=model)
    self._names = names

  def choice(self, index: int, made: Delta, has_logps: bool) -> dict:
    """One sample."""
    return self._choice(index, made, has_logps, **self._said(made))

  def delta(self, index: int, made: Delta, has_logps: bool) -> dict:
    """What a stream adds to a sample."""
    return self._choice(index, made, has_logps, **self._added(made))

  def first(self, index: int) -> dict | None:
    """What a stream begins with."""
    return None

  def _choice(self, index: int, made: Delta, has_logps: bool, **content) -> dict:
    return dict(index=index, **content, finish_reason=made.finish or None,
                logprobs=self._logprobs(made.tokens) if has_logps else None)


class CompletionFormat(Format):
  prefix, whole, part = 'cmpl', 'text_completion', 'text_completion'

  def _said(self, made: Delta) -> dict:
    return dict(text=made.text)

  _added = _said

  def _logprobs(self, tokens: Sequence[Token]) -> dict:
    def top(token):
      if token.logp is None:
        return None
      own, found = self._names[token.id], {}
      # The token itself is always in it, as in OpenAI's API. Other tokens may have the same text.
      for i, logp in (token.top | {token.id: token.logp}).items():
        name = self._names[i]
        is_taken = i != token.id and (name == own or name in found)
        found[f'token_id:{i}' if is_taken else name] = logp
      return found
    return dict(tokens=[self._names[token.id] for token in tokens],
                token_logprobs=[token.logp for token in tokens],
                top_logprobs=[top(token) for token in tokens],
                text_offset=[token.offset for token in tokens])


class ChatFormat(Format):
  prefix, whole, part = 'chatcmpl', 'chat.completion', 'chat.completion.chunk'

  def first(self, index: int) -> dict:
    return self._choice(index, Delta(), False, delta=dict(role='assistant', content=''))

  def _said(self, made: Delta) -> dict:
    return dict(message=dict(role='assistant', content=made.text, refusal=None) | _thinking(made))

  def _added(self, made: Delta) -> dict:
    return dict(delta=(dict(content=made.text) if made.text else {}) | _thinking(made))

  def _logprobs(self, tokens: Sequence[Token]) -> dict:
    def entry(i, logp):
      text = self._names[i]
      found = None if text.startswith('token_id:') else list(text.encode())
      return dict(token=text, logprob=logp, bytes=found)
    return dict(content=[
        entry(token.id, token.logp) | dict(
            top_logprobs=[entry(*pair) for pair in token.top.items()])
        for token in tokens], refusal=None)


def _thinking(made: Delta) -> dict:
  """The field of a message that has thinking; not in OpenAI's API, but in that of other servers."""
  return dict(reasoning_content=made.thinking) if made.thinking else {}


TYPES = {401: 'authentication_error', 404: 'not_found_error', 413: 'invalid_request_error',
         429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}


def error(message: str, status: int) -> dict:
  """The JSON of an error."""
  return dict(error=dict(message=message, type=TYPES.get(status, 'invalid_request_error'),
                         param=None, code=None))
