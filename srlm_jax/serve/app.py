"""The routes of the server: OpenAI's completions, chat completions and models, and /health."""
import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import hmac
import time
import uuid

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from srlm_jax import conversation, InputError
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.sample import engine as engines
from srlm_jax.serve import api, text
from srlm_jax.serve.worker import Busy, Failed, Job, PromptLogps, Worker

MOST_BODY = 2**22     # bytes of a request
MOST_PROMPTS = 1024   # of a request


class NoSuchModel(Exception):
  """The request names another model."""


class TooLarge(Exception):
  """The request has too many bytes."""


class Unauthorized(Exception):
  """The request lacks the token."""


STATUS = {InputError: 400, Unauthorized: 401, NoSuchModel: 404, TooLarge: 413, Busy: 429,
          Failed: 500}


@dataclasses.dataclass(frozen=True)
class Service:
  """What the server offers."""
  worker: Worker
  tokenizer: tokenizers.Tokenizer
  names: text.Names
  model: str    # its name
  chat: str     # chat format, or none
  key: str      # token that a request must have; '': none
  started: int  # seconds since 1970


@dataclasses.dataclass
class Prompt:
  """A prompt of a request, as text and as token ids."""
  text: str
  ids: list[int]


class Call:
  """One request for samples: its prompts, its jobs, and the answers that grow."""

  def __init__(self, service: Service, asked: api.Asked, prompts: Sequence[Prompt]):
    """Raises InputError if a prompt does not fit, Busy if the queue is full."""
    service.worker.check_room(len(prompts) * asked.n)
    self.asked, self._service = asked, service
    self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    name, engine = uuid.uuid4().hex, service.worker.engine
    self.news = asyncio.Queue()
    self.jobs, self.echoes, self.answers = [], [], []
    top = asked.top
    for i, prompt in enumerate(prompts):
      limit = _max_tokens(asked, len(prompt.ids), engine)
      engine.check_fits(len(prompt.ids), limit)
      sampling = engines.Sampling(asked.temperature, asked.top_p, max(limit, 1), asked.top_k)
      # The name decides the random numbers. Samples of equal prompts with the same seed are equal.
      request = engines.Request(name + f'/{i}' if asked.seed is None else f'seed {asked.seed}',
                                prompt.ids, asked.n, sampling=sampling, top=top or 0)
      prompt_top = top if asked.echo and top is not None else None
      self.jobs.append(Job(request, prompt_top, limit > 0, self._teller(i)))
      self.echoes.append(prompt.text if asked.echo else '')
      for _ in range(asked.n):
        answer = text.Answer(service.tokenizer, prompt.ids, asked.stops, len(self.echoes[i]),
                             isinstance(asked, api.Chat))
        self.answers.append(answer)

  @property
  def usage(self) -> dict:
    return api.usage(self.prompt_tokens, sum(answer.count for answer in self.answers))

  def _teller(self, job: int):
    return lambda news: self.news.put_nowait((job, news))

  async def deltas(self) -> AsyncIterator[tuple[int, text.Delta]]:
    """Yields (index of the sample, what it adds) until all have ended."""
    asked, n, unfinished = self.asked, self.asked.n, len(self.answers)
    if asked.echo and asked.top is None:
      for index in range(len(self.answers)):
        yield index, text.Delta(self.echoes[index // n], finish=self._end_without_sampling(index))
        unfinished -= bool(self.answers[index].finish)
    while unfinished:
      i, news = await self.news.get()
      if isinstance(news, Failed):
        raise news
      if isinstance(news, PromptLogps):
        tokens = self._prompt_tokens(i, news)
        for index in range(i * n, (i + 1) * n):
          yield index, text.Delta(self.echoes[i], tokens, self._end_without_sampling(index))
          unfinished -= bool(self.answers[index].finish)
        continue
      answer = self.answers[i * n + news.number]
      if not answer.finish:
        delta = answer.add(news.ids, news.logps, news.top, news.finish)
        if answer.finish:
          unfinished -= 1
          if not news.finish:
            self._service.worker.stop_sample(self.jobs[i], news.number)
        if delta.text or delta.thinking or delta.tokens or delta.finish:
          yield i * n + news.number, delta

  def _end_without_sampling(self, index: int) -> str:
    """The finish of a sample of which only the prompt is wanted; '' of others."""
    answer = self.answers[index]
    if not self.jobs[index // self.asked.n].is_sampled:
      answer.finish = 'length'
    return answer.finish

  def _prompt_tokens(self, i: int, found: PromptLogps) -> list[text.Token]:
    """The tokens of a prompt with their log-probs."""
    ids, offset, tokens = self.jobs[i].request.ids, 0, []
    detokenizer = text.Detokenizer(self._service.tokenizer, ())
    for token, logp, top in zip(ids, [None, *found.logps], [{}, *found.top], strict=True):
      tokens.append(text.Token(token, logp, top, offset))
      offset += len(detokenizer.add(token))
    return tokens


def _max_tokens(asked: api.Asked, prompt_tokens: int, engine: engines.Engine) -> int:
  """The most tokens to generate; 0: only the prompt is wanted. InputError if that is no use."""
  if isinstance(asked, api.Completion):
    if asked.max_tokens == 0 and not asked.echo:
      raise InputError('max_tokens is 0, which needs "echo": true; ask for at least 1 token')
    return asked.max_tokens
  if asked.max_tokens and asked.max_completion_tokens:
    raise InputError('the request has max_tokens and max_completion_tokens; give one of them')
  if found := asked.max_tokens or asked.max_completion_tokens:
    return found
  if prompt_tokens >= engine.size:
    raise InputError(f'the prompt has {prompt_tokens} tokens, and a row of this server has '
                     f'{engine.size} for prompt and response; shorten the prompt')
  return engine.size - prompt_tokens


def _completion_prompt(prompt: str | list[int], tokenizer, echo: bool) -> Prompt:
  """A prompt with its token ids; InputError for ids that do not exist."""
  if isinstance(prompt, str):
    ids = [*tokenizer.start, *tokenizer.encode(prompt)]
    if not ids:
      raise InputError('the prompt is empty, and this model has no token that begins a text; write '
                       'a prompt')
    return Prompt(prompt, ids)
  if bad := [i for i in prompt if not 0 <= i < tokenizer.size]:
    raise InputError(f'the prompt has the token id {bad[0]}; ids are from 0 to '
                     f'{tokenizer.size - 1}')
  return Prompt(tokenizer.decode(prompt) if echo else '', prompt)


def _chat_ids(messages: Sequence[api.Message], chat: str, tokenizer) -> list[int]:
  """Token ids of a conversation in a chat format; InputError if it is none."""
  if chat == 'none':
    raise InputError('this server has no chat format; start it with --chat, or use /v1/completions')
  said = [conversation.Message(message.speaker, message.text) for message in messages]
  try:
    conversation.check(said)
  except ValueError as error:
    raise InputError(str(error)) from error
  return templates.encode_prompt(chat, said, tokenizer)


class Held(StreamingResponse):
  """A stream during which the engine works on the jobs of a call."""

  def __init__(self, content, worker: Worker, jobs: Sequence[Job]):
    super().__init__(content, media_type='text/event-stream',
                     headers={'Cache-Control': 'no-cache'})
    self._holding = worker.holding(jobs)

  async def __call__(self, scope, receive, send):
    with self._holding:
      await super().__call__(scope, receive, send)


class Api:
  """The handlers of the routes."""

  def __init__(self, service: Service):
    self.service = service

  def app(self, on_start, on_stop) -> Starlette:
    """The application; `on_start` and `on_stop` run when it begins and ends to serve."""
    @contextlib.asynccontextmanager
    async def lifespan(_):
      on_start()
      yield
      await run_in_threadpool(on_stop)
    routes = [Route('/health', self.health), Route('/v1/models', self.models),
              Route('/v1/models/{name:path}', self.models),
              Route('/v1/completions', self.completions, methods=['POST']),
              Route('/v1/chat/completions', self.chat, methods=['POST'])]
    handlers = {kind: _failed for kind in STATUS} | {
        HTTPException: _no_route, ClientDisconnect: _left, Exception: _broken}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

  async def health(self, _):
    """Whether the engine runs; needs no token."""
    worker = self.service.worker
    if worker.error:
      return _json(dict(status='error', message=worker.error), 500)
    return _json(dict(status='ok', samples=worker.held, call_seconds=worker.call_seconds))

  async def models(self, request: Request):
    """The one model."""
    self._authorize(request)
    one = dict(id=self.service.model, object='model', created=self.service.started,
               owned_by='srlm_jax')
    if (name := request.path_params.get('name')) is None:
      return _json(dict(object='list', data=[one]))
    self._check_model(name)
    return _json(one)

  async def completions(self, request: Request):
    """Continues texts."""
    asked = await self._read(request, api.Completion)
    prompts, tokenizer = asked.prompts, self.service.tokenizer
    if len(prompts) > MOST_PROMPTS:
      raise InputError(f'the request has {len(prompts)} prompts; at most {MOST_PROMPTS} may be in '
                       f'one request')
    encoded = await run_in_threadpool(
        lambda: [_completion_prompt(prompt, tokenizer, asked.echo) for prompt in prompts])
    return await self._answer(request, Call(self.service, asked, encoded), api.CompletionFormat)

  async def chat(self, request: Request):
    """Answers the last message of a conversation."""
    asked = await self._read(request, api.Chat)
    ids = await run_in_threadpool(_chat_ids, asked.messages, self.service.chat,
                                  self.service.tokenizer)
    return await self._answer(request, Call(self.service, asked, [Prompt('', ids)]),
                              api.ChatFormat)

  def _authorize(self, request: Request):
    given = request.headers.get('authorization', '').encode('latin-1')  # the bytes that came
    wanted = f'Bearer {self.service.key}'.encode(errors='surrogateescape')
    if self.service.key and not hmac.compare_digest(given, wanted):
      raise Unauthorized('the request lacks the token of this server; send it as '
                         '"Authorization: Bearer TOKEN"')

  def _check_model(self, name: str):
    if name != self.service.model:
      raise NoSuchModel(f'the model {name[:200]!r} does not exist; this server has '
                        f'{self.service.model!r}')

  async def _read(self, request: Request, kind: type[api.Asked]) -> api.Asked:
    self._authorize(request)
    body = bytearray()
    async for part in request.stream():
      body += part
      if len(body) > MOST_BODY:
        raise TooLarge(f'the request has more than {MOST_BODY:,} bytes; send less at once')
    asked = api.read(bytes(body), kind)
    self._check_model(asked.model)
    return asked

  async def _answer(self, request: Request, call: Call, kind: type[api.Format]):
    form = kind(uuid.uuid4().hex, int(time.time()), self.service.model, self.service.names)
    if call.asked.stream:
      return Held(_events(call, form), self.service.worker, call.jobs)
    with self.service.worker.holding(call.jobs):
      tasks = [asyncio.create_task(made) for made in (_collect(call, form), _disconnected(request))]
      try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
          raise ClientDisconnect
        return _json(tasks[0].result())
      finally:
        for task in tasks:
          task.cancel()


async def _collect(call: Call, form: api.Format) -> dict:
  """-> the whole answer."""
  whole = [text.Delta() for _ in call.answers]
  async for index, delta in call.deltas():
    whole[index].text += delta.text
    whole[index].thinking += delta.thinking
    whole[index].tokens += delta.tokens
    whole[index].finish = delta.finish
  choices = [form.choice(i, made, call.asked.top is not None) for i, made in enumerate(whole)]
  return form.common | dict(object=form.whole, choices=choices, usage=call.usage)


async def _events(call: Call, form: api.Format) -> AsyncIterator[bytes]:
  """Yields the events of a stream."""
  has_usage = call.asked.stream_options.include_usage
  common = form.common | dict(object=form.part) | (dict(usage=None) if has_usage else {})
  try:
    for index in range(len(call.answers)):
      if first := form.first(index):
        yield _event(common | dict(choices=[first]))
    async for index, delta in call.deltas():
      yield _event(common | dict(choices=[form.delta(index, delta, call.asked.top is not None)]))
    if has_usage:
      yield _event(common | dict(choices=[], usage=call.usage))
    yield b'data: [DONE]\n\n'
  except Failed as error:
    yield _event(api.error(str(error), STATUS[Failed]))


def _event(content: dict) -> bytes:
  return b'data: ' + msgspec.json.encode(content) + b'\n\n'


async def _disconnected(request: Request):
  """Returns when the client has left; the body must have been read."""
  while (await request.receive())['type'] != 'http.disconnect':
    pass


def _json(content: dict, status: int = 200, headers=None) -> Response:
  return Response(msgspec.json.encode(content), status, headers, 'application/json')


def _failed(_, error: Exception) -> Response:
  status = STATUS[type(error)]
  return _json(api.error(str(error), status), status,
               {'WWW-Authenticate': 'Bearer'} if status == 401 else None)


def _no_route(request: Request, error: HTTPException) -> Response:
  message = (f'there is no {request.method} {request.url.path[:200]}; there are GET /health, '
             f'GET /v1/models, POST /v1/completions and POST /v1/chat/completions')
  return _json(api.error(message, error.status_code), error.status_code, error.headers)


def _left(*_) -> Response:
  return Response(status_code=499)  # nobody reads it


def _broken(*_) -> Response:
  return _json(api.error('the server failed; its log says why', 500), 500)
