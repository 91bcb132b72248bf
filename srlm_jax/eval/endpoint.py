"""An outside judge: a model behind an OpenAI-compatible API, or in a folder, through our engine.

`open` gives a client, and `Client.ask` the answers to requests. Every answer is appended to
FOLDER/endpoint.jsonl as soon as it arrives, so a run that is repeated, after a kill too, asks only
for what is missing.

The evaluations take a judge by flags (`--judge=URL --judge_model=NAME`, see `define_flags`), a run
by its config. With `judge.by=endpoint` the judge gives the rewards of a run:

  python -m srlm_jax.eval.endpoint --config=iter2 --workdir=runs/x --config.judge.by=endpoint ...
"""
import collections
from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
import urllib.parse

from absl import flags
from etils import epath
import jax
from ml_collections import ConfigDict
import tqdm

from srlm_jax import (
  catalog,
  cli,
  config as configs,
  conversation,
  hosts,
  InputError,
  model_files,
  preemption,
  records,
  schema,
  stage,
  storage,
)
from srlm_jax.data import templates, thinking
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, judge as judging, monitor

FILE = 'endpoint.jsonl'
TELL = 30           # seconds between two lines about requests that failed
LONGEST_PAUSE = 60  # seconds between attempts, unless the server asks for more (Retry-After)
LONGEST_ASKED = 3600     # seconds that a server may ask for; after more, the program ends
MOST_ANSWER = 2**24      # bytes of an HTTP response
OPENAI = 'api.openai.com'
# Variables that the library would send to any server.
OF_OPENAI = ('OPENAI_ORG_ID', 'OPENAI_PROJECT_ID', 'OPENAI_CUSTOM_HEADERS')


@dataclasses.dataclass(frozen=True)
class Request:
  """A conversation that ends with what the judge is asked. `index`: among equal requests."""
  id: str
  messages: conversation.Messages
  index: int = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How answers are drawn."""
  temperature: float  # -1: the server's
  max_tokens: int
  top_p: float = 1.0


class Cache:
  """The answers in a file, by the hash of their request. Memory holds only where they are."""

  def __init__(self, path):
    self.path = epath.Path(path)
    self._lock = threading.Lock()
    self._copy = tempfile.TemporaryFile()  # a file in a bucket cannot be read in parts
    self._places = {}  # {hash of the id: offset in the copy}; the ids would take more memory
    self._file = records.Appender(self.path)  # removes a line that a kill cut off
    for answer in records.read(self.path, schema.JudgeAnswer):
      self._keep(answer)

  def __contains__(self, key: str) -> bool:
    return hash(key) in self._places

  def __len__(self) -> int:
    return len(self._places)

  def get(self, key: str) -> schema.JudgeAnswer:
    with self._lock:
      self._copy.seek(self._places[hash(key)])
      line = self._copy.readline()
    return records.parse(line, str(self.path), schema.JudgeAnswer)

  def put(self, answer: schema.JudgeAnswer):
    """Appends an answer; a kill does not lose it."""
    with self._lock:
      self._file.append([answer])
      self._keep(answer)

  def _keep(self, answer: schema.JudgeAnswer):
    self._places[hash(answer.id)] = self._copy.seek(0, os.SEEK_END)
    self._copy.write(records.dump(answer).encode())

  def close(self):
    self._file.close()
    self._copy.close()


class Client:
  """Asks a judge. `name`: of the judge, for results. One host may use it, in a `with` block."""

  def __init__(self, name: str, sampling: Sampling, prices: tuple[float, float], folder,
               title: str):
    """`prices`: dollars per million tokens of requests and of answers, 0 for unknown."""
    self.name, self.title, self._sampling, self._prices = name, title, sampling, prices
    self._cache = Cache(epath.Path(folder) / FILE)
    self._used = set()  # hashes of the keys of the answers that were given to the caller
    self._tokens = [0, 0]
    self._says_usage = True
    self.sent = 0  # attempts

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._cache.close()

  def ask(self, requests: Iterable[Request], total: int | None = None) -> Iterator[
      tuple[str, str]]:
    """Yields (id, text) of the answer to every request, in any order; shows the progress.

    total: the number of requests, if it is known. Equal requests are sent once. Raises InputError
    if the judge refuses a request or does not answer, and preemption.Stopped after SIGTERM.
    """
    return ((name, answer.text) for name, answer in self.answers(requests, total))

  @property
  def kept(self) -> int:
    """The number of answers in the file."""
    return len(self._cache)

  def answer(self, request: Request) -> schema.JudgeAnswer:
    """The answer to a request that was asked before."""
    return self._cache.get(self._key(request))

  def answers(self, requests: Iterable[Request], total: int | None = None) -> Iterator[
      tuple[str, schema.JudgeAnswer]]:
    """`ask` with the whole answers."""
    ready, waiting, before = collections.deque(), {}, len(self._used)
    requests = iter(requests)

    def missing():
      for request in requests:
        key = self._key(request)
        if key in waiting:
          waiting[key].append(request.id)
        elif key in self._cache:
          ready.append((request.id, key))
        else:
          waiting[key] = [request.id]
          yield key, request

    def given():
      while ready:
        name, key = ready.popleft()
        answer = self._cache.get(key)
        self._count(key, answer)
        progress.update()
        yield name, answer
    new = 0
    with preemption.deferred(), _progress(self.title, total) as progress:
      for request in requests:  # answers that a stopped run kept, one at a time in memory
        if (key := self._key(request)) not in self._cache:
          requests = itertools.chain([request], requests)
          break
        ready.append((request.id, key))
        yield from given()
      with contextlib.closing(self._send(missing())) as keys:
        for key in keys:
          new += 1
          ready.extend((name, key) for name in waiting.pop(key))
          yield from given()
      yield from given()
    cost = '' if self.cost is None else f', {self.cost:.4f} dollars'
    hosts.log(f'{self.title}: {len(self._used) - before} answers of {self.name} in '
              f'{self._cache.path}, {new} of them new ({self.sent} requests with retries); '
              f'{self._tokens[0]:,} tokens of requests, {self._tokens[1]:,} of answers{cost}')

  @property
  def cost(self) -> float | None:
    """Dollars for the answers given so far, cached ones too; None if prices or usage are unknown.
    """
    if not any(self._prices) or not self._says_usage:
      return None
    return sum(n * price for n, price in zip(self._tokens, self._prices, strict=True)) / 1e6

  def _count(self, key: str, answer: schema.JudgeAnswer):
    if hash(key) not in self._used:
      self._used.add(hash(key))
      self._tokens[0] += answer.prompt_tokens
      self._tokens[1] += answer.answer_tokens
      self._says_usage &= answer.prompt_tokens > 0

  def _key(self, request: Request) -> str:
    """A hash of what decides the answer; not of the URL, which may change for the same model."""
    messages = [[m.role, m.content] for m in request.messages]
    return records.digest(json.dumps([self._identity(), messages,
                                      *dataclasses.astuple(self._sampling), request.index]))

  def _identity(self) -> str:
    """The model that answers."""
    raise NotImplementedError

  def _send(self, missing: Iterable[tuple[str, Request]]) -> Iterator[str]:
    """Asks for answers, puts each into the cache and yields its key."""
    raise NotImplementedError


class Remote(Client):
  """A judge behind an OpenAI-compatible API."""

  def __init__(self, c, sampling: Sampling, folder, title: str):
    """`c`: the section `endpoint`. Raises InputError if it is not complete."""
    try:
      import openai
    except ModuleNotFoundError as error:
      raise InputError('openai is not installed; install the extra: pip install -e \'.[judge]\''
                       ) from error
    configs.check_url('the URL of the judge', c.url)
    configs.check_key_env('the variable of the judge\'s key', c.key_env)
    if not c.model:
      raise InputError(f'the judge is {c.url}, and its model is not named; give --judge_model or '
                       f'endpoint.model')
    self._secret = os.environ.get(c.key_env, '').strip() if c.key_env else ''
    if c.key_env and not self._secret:
      raise InputError(f'the environment variable {c.key_env}, which should have the judge\'s key, '
                       f'is not set; export it')
    super().__init__(c.model, sampling, (c.price_in, c.price_out), folder, title)
    self._url, self._attempts, self._concurrency = c.url, c.attempts, c.concurrency
    self._openai = openai
    with _without(*(() if self._is_openai() else OF_OPENAI)):
      # Another key in the environment (OPENAI_API_KEY) would be sent if none were given here.
      self._api = openai.OpenAI(base_url=c.url, api_key=self._secret or 'none', timeout=c.timeout,
                                max_retries=0, http_client=_http_client(openai, c.timeout))
    self._stopping, self._lock = threading.Event(), threading.Lock()
    self._tell_after = 0.0
    self._pace = _Pace(c.per_minute, self._stopping)

  def _identity(self):
    return self.name

  def _is_openai(self) -> bool:
    return urllib.parse.urlsplit(self._url).hostname == OPENAI

  def __exit__(self, *_):
    super().__exit__()
    self._api.close()

  def _send(self, missing):
    self._stopping.clear()
    with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
      running = set()
      try:
        for key, request in missing:
          running.add(pool.submit(self._answer, key, request))
          while len(running) >= self._concurrency:
            done, running = self._wait(running)
            yield from (future.result() for future in done)
        while running:
          done, running = self._wait(running)
          yield from (future.result() for future in done)
      finally:  # the block ends when the requests that are under way have been answered and saved
        self._stopping.set()

  def _wait(self, running):
    """Waits for one of the futures -> those done and those not; stops after SIGTERM."""
    done, left = (), running
    while not done:
      preemption.stop_if_requested(self.title)
      done, left = concurrent.futures.wait(running, 1, concurrent.futures.FIRST_COMPLETED)
    return done, left

  def _answer(self, key: str, request: Request) -> str:
    """One request, with retries; saves the answer -> its key. Runs in a thread."""
    for attempt in range(1, self._attempts + 1):
      self._pace.wait()
      if self._stopping.is_set():
        raise _Stopping
      with self._lock:
        self.sent += 1
      try:
        self._cache.put(self._one_attempt(key, request))
        return key
      except _Failure as failure:
        if failure.retry_after > LONGEST_ASKED:
          raise self._error(f'{failure.reason}, and asks to wait for {failure.retry_after:.0f} s; '
                            f'the answers so far are kept, run the same command again then'
                            ) from None
        if attempt == self._attempts or self._stopping.is_set():
          raise self._error(f'{failure.reason} ({attempt} attempts); the answers so far are kept, '
                            f'run the same command again later') from None
        pause = _pause(attempt, failure.retry_after)
        self._tell(f'{failure.reason}; the request is repeated in {pause:.0f} s')
        self._stopping.wait(pause)
    raise AssertionError('unreachable')

  def _tell(self, text: str):
    """Prints a failure, the first one and one per TELL seconds."""
    with self._lock:
      if time.monotonic() < self._tell_after:
        return
      self._tell_after = time.monotonic() + TELL
    hosts.log(f'{self.title}: {self._error(text)}')

  def _one_attempt(self, key: str, request: Request) -> schema.JudgeAnswer:
    """Raises _Failure if it is worth another attempt, else InputError."""
    openai = self._openai
    try:
      answer = _read(key, self._api.chat.completions.create(**self._body(request)))
      return dataclasses.replace(answer, text=self._without_key(answer.text))
    except openai.APIStatusError as error:
      said = f'answered {error.status_code}: {_reason(error)}'
      if error.status_code in (408, 429) or error.status_code >= 500:
        raise _Failure(said, _retry_after(error.response.headers.get('retry-after'))) from None
      advice = {401: 'name the variable that has the key (endpoint.key_env, --judge_key_env)',
                403: 'the key may not do this', 404: 'correct the URL or the name of the model'}
      raise self._error(f'{said}; {advice.get(error.status_code, "correct the request")}'
                        ) from None
    except openai.APITimeoutError:
      raise _Failure(f'did not answer in {self._api.timeout:g} s') from None
    except (openai.APIError, ValueError, RecursionError) as error:  # no connection, or no JSON
      why = f' ({error.__cause__})' if isinstance(error, openai.APIConnectionError) else ''
      raise _Failure(f'gave no answer: {str(error) or type(error).__name__}{why}') from None

  def _body(self, request: Request) -> dict:
    s = self._sampling
    # OpenAI's newer models refuse max_tokens; most other servers know no other name.
    limit = 'max_completion_tokens' if self._is_openai() else 'max_tokens'
    body = dict(model=self.name, messages=[dataclasses.asdict(m) for m in request.messages])
    body[limit] = s.max_tokens
    if s.temperature >= 0:
      body['temperature'] = s.temperature
    if s.top_p < 1:
      body['top_p'] = s.top_p
    return body

  def _error(self, text: str) -> InputError:
    """An error in one sentence, in which the key cannot be: a server may repeat it."""
    text = self._without_key(' '.join(text.split()))
    return InputError(f'the judge {self._url} {configs.short(text, 400)}')

  def _without_key(self, text: str) -> str:
    return text.replace(self._secret, '[key]') if self._secret else text


class Local(Client):
  """A model in a folder, a checkpoint or a Hugging Face model, that our engine runs."""

  def __init__(self, c, sampling: Sampling, folder, title: str):
    """`c`: the section `endpoint`. The model is loaded when the first answer is missing."""
    if sampling.temperature < 0:
      raise InputError(f'the judge is the folder {c.url}, and its temperature is -1; give a '
                       f'temperature of 0 or more')
    if jax.process_count() > 1:
      raise InputError(f'the judge is the folder {c.url}, which one process must run; start this '
                       f'program on one host, or serve the model (python -m srlm_jax.serve)')
    if not epath.Path(c.url).is_dir():
      raise InputError(f'the judge {c.url} is neither a folder nor an http(s) URL; give one of '
                       f'the two')
    self._folder = c.url
    super().__init__(c.model or c.url.rstrip('/'), sampling, (0.0, 0.0), folder, title)

  def _identity(self):
    if not hasattr(self, '_hash'):
      is_checkpoint = model_files.exists(self._folder)
      self._hash = (model_files.recorded_hash(self._folder) if is_checkpoint else
                    records.digest(*(storage.stamp(path) for path in sorted(
                        epath.Path(self._folder).iterdir()) if not path.is_dir())))
    return self._hash

  def _send(self, missing):
    missing = iter(missing)
    if (first := next(missing, None)) is None:
      return
    s, chat = self._sampling, engines.chat_of(self._folder)
    engine, tokenizer = engines.load(engines.config_alone(), self._folder, self.title, chat)
    asked = (engines.Request(key, _prompt(chat, request.messages, tokenizer))
             for key, request in itertools.chain([first], missing))
    for request, (result,) in engine.generate(
        asked, engines.Sampling(s.temperature, s.top_p, s.max_tokens, 0)):
      said = thinking.read(tokenizer, request.ids, result.ids)
      self.sent += 1
      self._cache.put(schema.JudgeAnswer(
          id=request.id, text=said.text, finish=result.finish, prompt_tokens=len(request.ids),
          answer_tokens=len(result.ids)))
      yield request.id


def _prompt(chat: str, messages: conversation.Messages, tokenizer) -> list[int]:
  """Token ids of a request in a chat format; with `none`, the text is continued."""
  if chat == 'none':
    return [*tokenizer.start, *tokenizer.encode(conversation.text(messages))]
  return templates.encode_prompt(chat, messages, tokenizer)


def _http_client(openai, timeout: float):
  """A client for HTTP that refuses a response of more than MOST_ANSWER bytes or `timeout` seconds.

  The library has no limit for the first, and one for each part for the second.
  """
  import httpx2

  class Body(httpx2.SyncByteStream):
    """The body of a response."""

    def __init__(self, body):
      self._body, self._end = body, time.monotonic() + timeout

    def __iter__(self):
      size = 0
      for part in self._body:
        size += len(part)
        if size > MOST_ANSWER:
          raise httpx2.ReadError(f'the answer has more than {MOST_ANSWER:,} bytes')
        if time.monotonic() > self._end:
          raise httpx2.ReadTimeout('')
        yield part

    def close(self):
      self._body.close()

  def limit(response):
    coding = response.headers.get('content-encoding', 'identity')
    if coding != 'identity':  # a small body could become a large one
      raise httpx2.DecodingError(f'the answer is encoded as {coding[:20]!r}, which was not asked '
                                 f'for')
    response.stream = Body(response.stream)
  return openai.DefaultHttpxClient(timeout=timeout, headers={'Accept-Encoding': 'identity'},
                                   event_hooks=dict(response=[limit]))


@contextlib.contextmanager
def _without(*names: str):
  """A block in which environment variables are not set."""
  before = {name: os.environ.pop(name) for name in names if name in os.environ}
  try:
    yield
  finally:
    os.environ.update(before)


class _Pace:
  """Spreads the starts of requests evenly over each minute."""

  def __init__(self, per_minute: int, stopping: threading.Event):
    """`per_minute`: 0 for no limit."""
    self._interval = 60 / per_minute if per_minute else 0.0
    self._next, self._lock, self._stopping = 0.0, threading.Lock(), stopping

  def wait(self):
    """Returns when the next request may start, or at once when the client stops."""
    with self._lock:
      start = max(time.monotonic(), self._next)
      self._next = start + self._interval
    self._stopping.wait(max(start - time.monotonic(), 0))


class _Failure(Exception):
  """An attempt failed in a way that may pass."""

  def __init__(self, reason: str, retry_after: float = 0.0):
    super().__init__(reason)
    self.reason, self.retry_after = reason, retry_after


class _Stopping(Exception):
  """Another request failed for good, so this one is not sent."""


def _pause(attempt: int, retry_after: float) -> float:
  """Seconds before the next attempt: exponential, with jitter, and no less than the server asks."""
  return retry_after + random.uniform(0.5, 1) * min(2 ** (attempt - 1), LONGEST_PAUSE)


def _retry_after(text: str | None) -> float:
  """The header Retry-After -> seconds from now: a number, or a date.

  >>> _retry_after('2'), _retry_after('soon'), _retry_after('Thu, 01 Jan 1970 00:00:00 GMT')
  (2.0, 0.0, 0.0)
  """
  try:
    seconds = float(text or 0)
  except ValueError:
    try:
      when = email.utils.parsedate_to_datetime(text)
      seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError, IndexError):
      seconds = 0.0
  return seconds if 0 < seconds < float('inf') else 0.0


def _read(key: str, completion) -> schema.JudgeAnswer:
  """What `openai` returns -> the answer. Raises _Failure if there is none."""
  # The library checks no types: every part may be any JSON.
  choices, usage = (getattr(completion, name, None) for name in ('choices', 'usage'))
  choice = choices[0] if choices and isinstance(choices, list) else None
  message = getattr(choice, 'message', None)
  if not hasattr(message, 'content'):
    raise _Failure('answered without a message')
  cut = getattr(choice, 'finish_reason', None) == 'length'
  return schema.JudgeAnswer(
      id=key, text=without_thinking(_text(message.content)), finish=schema.CUT if cut else
      schema.EOS, prompt_tokens=_tokens(usage, 'prompt_tokens'),
      answer_tokens=_tokens(usage, 'completion_tokens'))


def _text(content) -> str:
  """The content of a message: a text, its parts, or null."""
  parts = [dict(text=content or '')] if isinstance(content, str | None) else content
  texts = [part['text'] for part in parts if isinstance(part, dict) and
           isinstance(part.get('text'), str)] if isinstance(parts, list) else []
  if not texts:
    raise _Failure('answered without a text')
  # A half of a surrogate pair, which JSON can hold, cannot be written as UTF-8.
  return ''.join(texts).encode(errors='replace').decode()


def without_thinking(text: str) -> str:
  """A text without the thinking that it begins with, as `data.thinking` reads a local model.

  >>> without_thinking('<think>At first [[3]].</think> Rating: [[8]]'), without_thinking('[[8]]')
  ('Rating: [[8]]', '[[8]]')
  >>> without_thinking('<think>It has no end: [[3]]')
  ''
  """
  if not text.lstrip().startswith('<think>'):
    return text
  return text.partition('</think>')[2].strip()


def _tokens(usage, name: str) -> int:
  """A count of tokens that the server gives; 0 if it gives none."""
  count = getattr(usage, name, None)
  return int(count) if isinstance(count, int | float) and 0 <= count < 2**53 else 0


def _reason(error) -> str:
  """What the body of an error says."""
  said = error.body.get('message', error.body) if isinstance(error.body, dict) else error.body
  return str(said or error.response.reason_phrase)


def _progress(title: str, total: int | None):
  return tqdm.tqdm(total=total, desc=title, unit='answers', delay=2, leave=False,
                   mininterval=2 if sys.stderr.isatty() else 30)


def open(c, folder, sampling: Sampling | None = None, title: str = 'judge') -> Client:
  """The judge of the section `endpoint`, whose answers are kept in FOLDER/endpoint.jsonl.

  The caller holds a lock of the folder, or of the workdir. sampling: by default, that of the
  section. Raises InputError if the section names no judge.
  """
  sampling = sampling or Sampling(c.temperature, c.max_tokens)
  if not c.url:
    raise InputError('no judge is configured; give --judge or endpoint.url: the URL of an '
                     'OpenAI-compatible API, or the folder of a model')
  return (Remote if configs.is_url(c.url) else Local)(c, sampling, folder, title)


def define_flags():
  """The section `endpoint` as flags: --judge for its url, --judge_KEY for another key."""
  for key, setting in _section():
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(
        setting.values.kind, flags.DEFINE_string)
    define(_flag(key), setting.default, f'Judge: {setting.unit}.')


def from_flags() -> ConfigDict:
  """The section `endpoint` from those flags. Raises InputError for a value out of range."""
  found = ConfigDict()
  for key, setting in _section():
    value = found[key] = flags.FLAGS[_flag(key)].value
    if not setting.values.allow(value):
      raise InputError(f'--{_flag(key)}={configs.show(value)}; {setting.wanted(value)}')
  return found


def _section() -> list[tuple[str, configs.Setting]]:
  return [(name.removeprefix('endpoint.'), setting) for name, setting in configs.SETTINGS.items()
          if name.startswith('endpoint.')]


def _flag(key: str) -> str:
  return 'judge' if key == 'url' else f'judge_{key}'


def run(config, workdir):
  """MODEL/respond -> MODEL/judge in the format of the judge stage, judged by the endpoint.

  The template and the sampling are those of `judge`, so runs that judge themselves compare. With
  endpoint.temperature=-1 no temperature is sent to an API, and judge.temperature is recorded as -1.
  """
  if config.judge.by != 'endpoint':
    raise InputError(f'config.judge.by is {config.judge.by}; set it to endpoint')
  is_remote = configs.is_url(config.endpoint.url)
  if is_remote and config.endpoint.temperature == -1:
    config = catalog.replace(config, {'judge.temperature': -1.0})
  spec = catalog.find('eval.endpoint', '' if is_remote else 'local')
  config = spec.view(config)
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  if not is_remote:
    judging.sample(s, config, judge, 'responses')
    return
  if not (total := sum(1 for _ in judging.items(s, config, 'responses'))):
    raise InputError(f'{s.path(*spec.reads)} has no responses to judge; run the stage that writes '
                     f'them first')
  c, cost = config.judge, None
  sampling = Sampling(c.temperature, c.max_tokens, c.top_p)
  is_first = hosts.is_first_host()
  with (open(config.endpoint, s.folder, sampling, s.title) if is_first else
        contextlib.nullcontext()) as client:
    s.begin()  # after `open`, which may refuse the config
    with preemption.together(s.title):
      if client:
        _judge_all(s, config, judge, total, client)
        cost = client.cost
  judgements = records.read_shards(s.folder, 'judgements', schema.Judgement)
  s.finish(dataclasses.replace(judging.summary(judge, judgements), cost=cost))


def _judge_all(s: stage.Stage, config, judge: judges.Judge, responses: int, client: Client):
  """Asks for all judgements and writes them in the order of the responses.

  Shows them as they arrive. What a killed run showed of the answers that are kept stays.
  """
  n, waiting = config.judge.n, {}

  def requests():
    for item in judging.items(s, config, 'responses'):
      text = judge.render(prompt=item.prompt, response=item.response)
      for j in range(n):
        yield item, Request(f'{item.id}/{j}', (conversation.Message('user', text),), j)

  def judgement(item, request, answer):
    score, reason = judges.read(judge, answer.text, answer.finish)
    return schema.Judgement(
        id=request.id, prompt_id=item.prompt_id, response_id=item.id, index=request.index,
        text=answer.text, score=score, reason=reason, finish=answer.finish)

  def asked():
    for item, request in requests():
      waiting[request.id] = item, request
      yield request
  with contextlib.closing(
      monitor.Monitor(s.folder, 'judgements', schema.Judgement, client.kept)) as shown:
    for name, answer in client.answers(asked(), responses * n):  # it is in the file of answers now
      shown.add([judgement(*waiting.pop(name), answer)])
  judged = (judgement(item, request, client.answer(request)) for item, request in requests())
  records.write(s.folder / records.shard_name('judgements', 0, 1), judged)


if __name__ == '__main__':
  cli.main(run)
