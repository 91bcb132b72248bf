"""The sandbox's oracle behind an OpenAI-compatible API: a judge for tests and demonstrations.

  python -m srlm_jax.sandbox.endpoint --port=8008

Then give http://127.0.0.1:8008/v1 as the URL of the judge, with any name of a model. The oracle
answers what a judge is asked (the judge templates of `reward`, the comparison of two answers, and
the grading of MT-Bench) in the format that each asks for. With --fail=N one request in N fails: a
rate limit (429 with Retry-After), an error (500) and a connection that hangs, in turn.
"""
import asyncio
import contextlib
import functools
import hmac
import itertools
import os
import re
import socket
import sys
import time

from absl import flags

from srlm_jax import cli, InputError, records
from srlm_jax.reward import judges
from srlm_jax.sandbox import world

try:
  from starlette.applications import Starlette
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route
  import uvicorn
except ModuleNotFoundError as error:
  sys.exit(f'error: {error.name} is not installed; install the extra: pip install -e \'.[serve]\'')

KEY = 'SRLM_API_KEY'  # environment variable with the key that requests must then have
TEMPLATES = ('sandbox', 'sandbox_choice', 'additive', 'multiple_choice', 'word_categories', 'short',
             'short_choice')
UNKNOWN = 'This is not an instruction of the sandbox.'
HANG = 3600    # seconds for which a connection hangs, if the client does not close it
RETRY_AFTER = 1  # seconds
_PART = r'<{0}>\n(?P<{0}>.*)\n</{0}>'  # of eval/head_to_head.py and eval/mt_bench.py
_PAIR = re.compile(r'\s+'.join(map(_PART.format, ('prompt', 'answer_a', 'answer_b'))), re.DOTALL)
_GRADED = (  # the last turn is graded
    re.compile(_PART.format('question_2') + '.*' + _PART.format('answer_2'), re.DOTALL),
    re.compile(_PART.format('question') + '.*' + _PART.format('answer'), re.DOTALL))


def answer(text: str) -> str | None:
  """What the oracle answers to the text of a judge request; None if it knows no such request.

  >>> answer(judges.load('sandbox').render(prompt='What do cows eat?', response='nuts'))[-8:]
  'Score: 2'
  """
  for judge, pattern in _templates():
    if match := pattern.fullmatch(text):
      return _judged(judge, match['prompt'], match['response'])
  if match := _PAIR.search(text):
    return _compared(match['prompt'], match['answer_a'], match['answer_b'])
  for pattern in _GRADED:
    if match := pattern.search(text):
      return _rated(*match.groups())
  return None


@functools.cache
def _templates() -> list[tuple[judges.Judge, re.Pattern]]:
  """Judge templates, and what their prompts look like."""
  found = []
  for name in TEMPLATES:
    judge = judges.load(name)
    pattern = re.escape(judge.text)
    for slot in judge.slots:
      pattern = pattern.replace(re.escape(f'{{{slot}}}'), f'(?P<{slot}>.*)')
    found.append((judge, re.compile(pattern, re.DOTALL)))
  return found


def _judged(judge: judges.Judge, prompt: str, response: str) -> str:
  if not world.parse(prompt):
    return UNKNOWN
  share = sum(world.grade(prompt, response)) / 5
  score = judge.nearest(judge.lowest + share * (judge.highest - judge.lowest))
  return f'{world.review(prompt, response)}\n{judge.state(score)}'


def _compared(prompt: str, a: str, b: str) -> str:
  if not world.parse(prompt):
    return UNKNOWN
  first, second = (sum(world.grade(prompt, x)) for x in (a, b))
  winner = 'A' if first > second else 'B' if first < second else 'tie'
  return f'A has {first} points and B has {second}.\nWinner: {winner}'


def _rated(question: str, response: str) -> str:
  if not world.parse(question):
    return UNKNOWN
  rating = max(2 * sum(world.grade(question, response)), 1)
  return f'{world.review(question, response)}\nRating: [[{rating}]]'


class Api:
  """The handlers of the routes."""

  def __init__(self, fail: int, log: str, key: str):
    """`fail`: one request in so many fails, 0 for none; `log`: a file of requests, or ''."""
    self._fail, self._key = fail, key
    self._numbers, self._failures = itertools.count(1), itertools.cycle((429, 500, None))
    self._log = records.Appender(log) if log else None

  def app(self, on_start=lambda: None) -> Starlette:
    """The application; `on_start` runs when it begins to serve."""
    @contextlib.asynccontextmanager
    async def lifespan(_):
      on_start()
      yield
    return Starlette(routes=[Route('/v1/models', self.models),
                             Route('/v1/chat/completions', self.chat, methods=['POST'])],
                     lifespan=lifespan)

  async def models(self, _):
    return JSONResponse(dict(object='list', data=[dict(id='oracle', object='model')]))

  async def chat(self, request: Request) -> Response:
    """Answers the last message, or fails."""
    number, body = next(self._numbers), await request.json()
    asked = str(body['messages'][-1]['content'])
    given = request.headers.get('authorization', '').removeprefix('Bearer ')
    if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
      return self._refuse(number, asked, 401, 'the request lacks the key')
    if self._fail and number % self._fail == 0:
      status = next(self._failures)
      if status is None:
        self._write(number, asked, 'hangs')
        await asyncio.sleep(HANG)
      return self._refuse(number, asked, status or 503, 'this failure is deliberate')
    text = answer(asked)
    if text is None:
      return self._refuse(number, asked, 400, 'the oracle of the sandbox knows no such request')
    self._write(number, asked, 'answered')
    count = [len(str(x).split()) for x in (asked, text)]  # words, in place of tokens
    return JSONResponse(dict(
        id=f'chatcmpl-{number}', object='chat.completion', created=int(time.time()),
        model=str(body.get('model')),
        choices=[dict(index=0, finish_reason='stop',
                      message=dict(role='assistant', content=text))],
        usage=dict(prompt_tokens=count[0], completion_tokens=count[1], total_tokens=sum(count))))

  def _refuse(self, number: int, asked: str, status: int, message: str) -> Response:
    self._write(number, asked, str(status))
    headers = {'Retry-After': str(RETRY_AFTER)} if status == 429 else {}
    return JSONResponse(dict(error=dict(message=message, type='error', param=None, code=None)),
                        status, headers)

  def _write(self, number: int, asked: str, outcome: str):
    if self._log:
      self._log.append([dict(number=number, request=records.digest(asked), outcome=outcome,
                             time=time.time())])


def define_flags():
  flags.DEFINE_string('host', '127.0.0.1', 'Address to serve on.')
  flags.DEFINE_integer('port', 8008, 'Port to serve on; 0: any that is free.', lower_bound=0,
                       upper_bound=65535)
  flags.DEFINE_integer('fail', 0, 'One request in so many fails; 0: none.', lower_bound=0)
  flags.DEFINE_string('log', '', 'File to which every request is appended, as JSON lines.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  try:
    listener = socket.create_server((f.host, f.port))
  except OSError as error:
    raise InputError(f'--host={f.host} --port={f.port} cannot be used ({error}); choose other ones'
                     ) from error
  port = listener.getsockname()[1]

  def on_start():
    print(f'the oracle of the sandbox: http://{f.host}:{port}/v1', flush=True)
  uvicorn.Server(uvicorn.Config(
      Api(f.fail, f.log, os.environ.get(KEY, '')).app(on_start), log_level='warning',
      access_log=False, timeout_graceful_shutdown=1)).run(sockets=[listener])


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
