"""The server, asked by OpenAI's client, and in raw HTTP where that client cannot make the error."""
import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from conftest import full_logits, main, make_mesh, ROOT
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from starlette.requests import Request as HttpRequest
import test_thinking
from test_tokenizer import byte_fallback, byte_level, metaspace, save
import uvicorn

from srlm_jax import conversation
from srlm_jax.checkpoint import convert
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Request, Sampling
from srlm_jax.sandbox import data as sandbox, world
from srlm_jax.serve import api, app, text, worker

MODEL, PROMPT = 'm0', 'User: Name two nice fruits.\nAssistant:'
GREEDY = dict(model=MODEL, temperature=0, max_tokens=24)


class Gated(engines.Engine):
  """An engine that a test can hold between two calls."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.gate, self.error = threading.Event(), None
    self.gate.set()

  def advance(self, slots):
    self.gate.wait()
    if self.error:
      raise self.error
    super().advance(slots)


class Parts:
  """M0, and the engine and tokenizer that the servers of these tests use."""

  def __init__(self):
    self.config = model_config.load(sandbox.M0)
    self.tokenizer = tokenizers.load(sandbox.M0)
    self.mesh = make_mesh(1, 1, 1)
    self.params = convert.load_hf(sandbox.M0, self.mesh, 'float32')

  def engine(self, kind=engines.Engine) -> engines.Engine:
    return kind(llama.Llama(self.config), self.params, self.mesh, self.tokenizer.eos_ids, 0,
                'serve', slots=8, size=128, steps=4)


class Served:
  """A running server, and what it is made of."""

  def __init__(self, parts: Parts, key: str = ''):
    self.parts, self.engine = parts, parts.engine(Gated)
    self.worker = worker.Worker(self.engine, 200, [1, 1])
    self.worker.start()
    service = app.Service(self.worker, parts.tokenizer, text.Names(parts.tokenizer), MODEL, 'plain',
                          key, 0)
    listener = socket.create_server(('127.0.0.1', 0))
    self.port = listener.getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}/v1'
    started = threading.Event()
    made = app.Api(service).app(started.set, self.worker.stop)
    self._server = uvicorn.Server(uvicorn.Config(made, log_level='critical',
                                                 timeout_graceful_shutdown=5))
    self._thread = threading.Thread(target=self._server.run, kwargs=dict(sockets=[listener]))
    self._thread.start()
    assert started.wait(60)
    self.client = openai.OpenAI(base_url=self.url, api_key=key or 'none', max_retries=0)

  def close(self):
    self.engine.gate.set()
    self._server.should_exit = True
    self._thread.join()

  def raw(self, method: str, path: str, body: bytes = b'', **headers) -> tuple[int, dict]:
    """-> the status and JSON of a request."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())

  def idle(self):
    """Waits until the engine holds nothing."""
    deadline = time.monotonic() + 20
    schedule = self.worker._slots.schedule
    while self.worker.held or schedule.running or schedule._waiting or self.worker._running:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    assert sorted(schedule._free) == list(range(self.engine.slots)) and not schedule._entries

  def ids(self, prompt: str) -> list[int]:
    return [*self.parts.tokenizer.start, *self.parts.tokenizer.encode(prompt)]


@pytest.fixture(scope='module')
def parts():
  return Parts()


@pytest.fixture(scope='module')
def served(parts):
  made = Served(parts)
  yield made
  made.close()


def offline(parts, requests, sampling: Sampling) -> list[str]:
  """The texts of the engine's samples, without a server."""
  decode = parts.tokenizer.decode
  return [decode([*request.ids, *result.ids])[len(decode(request.ids)):]
          for request, results in parts.engine().generate(requests, sampling) for result in results]


def prompts(count: int) -> list[str]:
  rng = np.random.default_rng(0)
  return [f'User: {world.instruction(rng)}\nAssistant:' for _ in range(count)]


async def ask(url: str, asked: list[dict]) -> list[str]:
  """Sends all requests at the same time, every second one as a stream -> their texts."""
  async with openai.AsyncOpenAI(base_url=url, api_key='none', max_retries=0) as client:
    async def one(i, fields):
      if i % 2:
        parts = [part async for part in await client.completions.create(**fields, stream=True)]
        return ''.join(part.choices[0].text for part in parts)
      return (await client.completions.create(**fields)).choices[0].text
    return await asyncio.gather(*(one(*pair) for pair in enumerate(asked)))


def test_64_concurrent_clients_get_what_each_gets_alone_and_what_the_engine_samples(served, parts):
  """Greedy, and at a temperature with a seed, mixed in the same calls of the engine."""
  texts = prompts(32)
  warm = GREEDY | dict(temperature=0.8, top_p=0.9, seed=7, extra_body=dict(top_k=40))
  asked = [fields | dict(prompt=prompt) for prompt in texts for fields in (GREEDY, warm)]
  asked = [*asked[::2], *asked[1::2]]
  found = asyncio.run(ask(served.url, asked))
  ids = [served.ids(prompt) for prompt in texts]
  wanted = [*offline(parts, [Request(f'{i}', x) for i, x in enumerate(ids)], Sampling(0, 1, 24)),
            *offline(parts, [Request('seed 7', x) for x in ids], Sampling(0.8, 0.9, 24, 40))]
  assert found == wanted and len(set(found)) > 40
  alone = [served.client.completions.create(**fields).choices[0].text for fields in asked[::9]]
  assert alone == found[::9]
  served.idle()


def test_a_stream_has_the_same_text_as_a_whole_answer_and_its_usage(served):
  fields = GREEDY | dict(messages=[dict(role='user', content='Name two nice fruits.')])
  whole = served.client.chat.completions.create(**fields)
  parts = list(served.client.chat.completions.create(
      **fields, stream=True, stream_options=dict(include_usage=True)))
  said = [part.choices[0] for part in parts[:-1]]
  assert said[0].delta.role == 'assistant' and parts[-1].choices == []
  assert ''.join(part.delta.content or '' for part in said) == whole.choices[0].message.content
  assert whole.choices[0].message.content.endswith('.') and whole.choices[0].finish_reason == 'stop'
  assert [part.finish_reason for part in said[-2:]] in ([None, 'stop'], [None, None, 'stop'])
  assert parts[-1].usage == whole.usage and not any(part.usage for part in parts[:-1])
  same = served.client.completions.create(**GREEDY, prompt=PROMPT)
  assert same.choices[0].text == whole.choices[0].message.content
  decoded = len(served.parts.tokenizer.encode(whole.choices[0].message.content.strip())) + 1  # eos
  assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
      len(served.ids(PROMPT)), decoded) and same.usage == whole.usage


def test_samples_of_a_prompt_differ_and_are_the_same_with_the_same_seed(served):
  def sample(**fields):
    made = served.client.completions.create(**GREEDY | dict(
        temperature=1.5, prompt=[PROMPT, PROMPT + ' A'], n=4) | fields)
    assert [c.index for c in made.choices] == list(range(8))
    return [c.text for c in made.choices]
  seeded = sample(seed=1)
  assert len({*seeded[:4]}) > 1 and sample(seed=1) == seeded != sample(seed=2)
  assert sample() != sample()
  ids = [served.ids(PROMPT), served.ids(PROMPT + ' A')]
  assert sample(seed=1, prompt=ids) == seeded


def test_stop_strings_end_a_sample_and_are_never_sent(served):
  """Also one that several tokens make, and one that comes in parts."""
  whole = served.client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text
  assert len(whole) > 12
  for start, end in ((3, 5), (4, 11), (1, 2)):
    stop = whole[start:end]
    fields = GREEDY | dict(prompt=PROMPT, stop=[stop, 'never'], logprobs=0)
    made = served.client.completions.create(**fields)
    streamed = list(served.client.completions.create(**fields, stream=True))
    for got in (made.choices[0].text, ''.join(part.choices[0].text for part in streamed)):
      assert got == whole[:whole.index(stop)]
    assert made.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == 'stop'
    assert all(offset < len(got) for offset in made.choices[0].logprobs.text_offset)
    tokens = [i for part in streamed for i in part.choices[0].logprobs.tokens]
    assert tokens == made.choices[0].logprobs.tokens
  served.idle()


def test_log_probs_are_those_of_the_full_forward_pass(served):
  """Of a text that is sent back with its log-probs, and of what follows it; and in chat."""
  made = served.client.completions.create(**GREEDY, prompt=PROMPT, logprobs=5, echo=True)
  found = made.choices[0].logprobs
  again = served.client.completions.create(
      model=MODEL, prompt=made.choices[0].text, logprobs=5, echo=True, max_tokens=0).choices[0]
  tokenizer, parts = served.parts.tokenizer, served.parts
  ids = served.ids(made.choices[0].text)
  with jax.set_mesh(parts.mesh):
    logits = full_logits(llama.Llama(parts.config), parts.params, jnp.asarray([ids]))
  wanted = np.asarray(jax.nn.log_softmax(logits[0]))
  assert again.finish_reason == 'length' and again.text == made.choices[0].text
  assert len(again.logprobs.tokens) == len(ids) == len(found.tokens) - 1  # without the eos
  for logprobs in (found, again.logprobs):
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    for t in range(1, len(ids)):
      assert logprobs.token_logprobs[t] == pytest.approx(wanted[t - 1, ids[t]], abs=1e-4)
      best = np.sort(wanted[t - 1])[::-1][:5]
      top = sorted(logprobs.top_logprobs[t].values(), reverse=True)
      np.testing.assert_allclose(top[:5], best, atol=1e-4)
      assert logprobs.top_logprobs[t][logprobs.tokens[t]] == logprobs.token_logprobs[t]
      offset = logprobs.text_offset[t]
      assert again.text[offset:].startswith(logprobs.tokens[t].lstrip() if t == 1 else
                                            logprobs.tokens[t])
  chat = served.client.chat.completions.create(
      **GREEDY, messages=[dict(role='user', content='Name two nice fruits.')], logprobs=True,
      top_logprobs=3).choices[0].logprobs.content
  after = len(served.ids(PROMPT))
  assert [x.logprob for x in chat] == pytest.approx(found.token_logprobs[after:], abs=1e-5)
  assert all(len(x.top_logprobs) == 3 and x.top_logprobs[0].logprob == x.logprob for x in chat)
  assert bytes(chat[0].bytes).decode() == chat[0].token == found.tokens[after]
  assert tokenizer.decode(ids).endswith(''.join(x.token for x in chat[:-1]))


def test_clients_that_leave_free_their_slots_and_others_go_on(served):
  served.idle()
  served.engine.gate.clear()
  before = served.engine.work.generated
  long = dict(model=MODEL, prompt=PROMPT, temperature=1.9, max_tokens=100)

  def leave():  # the connection of an answer that is not a stream
    connection = http.client.HTTPConnection('127.0.0.1', served.port)
    connection.request('POST', '/v1/completions', json.dumps(long | dict(n=4)).encode())
    return connection
  connections = [leave() for _ in range(3)]
  streams = [served.client.completions.create(**long, n=4, stream=True) for _ in range(2)]
  stay = threading.Thread(target=lambda: texts.append(
      served.client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text))
  texts = []
  stay.start()
  while served.worker.held < 21:
    time.sleep(0.01)
  for connection in connections:
    connection.close()
  for stream in streams:
    stream.close()
  while served.worker.held > 1:
    time.sleep(0.01)
  served.engine.gate.set()
  stay.join()
  served.idle()
  assert texts == [served.client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text]
  # Without the samples that nobody wants: at most one call of 4 tokens in 8 slots was under way.
  assert served.engine.work.generated - before < 32 + 2 * 24


BAD = [
    (dict(temperature=-1), 'temperature'), (dict(temperature='warm'), 'temperature'),
    (dict(top_p=0), 'top_p'), (dict(n=0), r'\$\.n'), (dict(n=1000), r'\$\.n'),
    (dict(max_tokens=0), 'max_tokens is 0, which needs "echo"'),
    (dict(prompt='a b ' * 400), 'the prompt has .* exceed the 128 tokens of a row; shorten'),
    (dict(prompt=[1] * 120), 'the prompt has 120 tokens and max_tokens is 24'),
    (dict(prompt=[5, 9999999]), 'token id 9999999; ids are from 0 to'),
    (dict(prompt=[]), 'prompt must be'), (dict(prompt=[[]]), 'prompt must be'),
    (dict(prompt=[1, 'a']), 'prompt must be'), (dict(prompt=['a'] * 2000), 'at most 1024'),
    (dict(prompt=['a'] * 60, n=4), 'asks for 240 samples, and the server holds at most 208'),
    (dict(stop=['a'] * 33), 'stop'), (dict(stop='a' * 1001), 'stop'),
    (dict(stop=['a' * 1001]), 'stop'),
    (dict(logprobs=6), 'logprobs'), (dict(presence_penalty=0.5), "'presence_penalty' is not "
     'supported; supported: echo, logprobs, .*temperature'),
    (dict(extra_body=dict(temprature=1)), 'did you mean "temperature"'),
    (dict(extra_body=dict(best_of=2)), 'best_of'), (dict(extra_body=dict(store=True)), 'store'),
    (dict(seed=2**70), 'seed'), (dict(stream_options=dict(x=1)), 'stream_options')]


@pytest.mark.parametrize('change, message', BAD)
def test_bad_fields_are_refused_with_one_sentence(served, change, message):
  with pytest.raises(openai.BadRequestError, match=message) as caught:
    served.client.completions.create(**GREEDY | dict(prompt='a') | change)
  assert caught.value.type == 'invalid_request_error'
  assert '\n' not in caught.value.body['message'] and len(caught.value.body['message']) < 400


@pytest.mark.parametrize('change, message', [
    (dict(messages=[]), 'messages'),
    (dict(messages=[dict(role='assistant', content='x')]), 'the role assistant, not user'),
    (dict(messages=[dict(role='user', content=' ')]), 'no text'),
    (dict(messages=[dict(role='tool', content='x')]), 'roles: system, developer, user, assistant'),
    (dict(messages=[dict(role='user', content=None)]), 'message 1 has no text'),
    (dict(messages=[dict(role='user', content='a b ' * 400)], max_tokens=None),
     r'the prompt has \d+ tokens, and a row of this server has 128 for prompt and response'),
    (dict(messages=[dict(role='user', content=[dict(type='image_url', image_url='x')])]),
     'only texts are supported'),
    (dict(top_logprobs=2), 'top_logprobs needs'), (dict(tools=[dict(type='function')]), "'tools'"),
    (dict(max_completion_tokens=5), 'max_tokens and max_completion_tokens')])
def test_bad_fields_of_a_chat_are_refused(served, change, message):
  said = [dict(role='user', content='Hello')]
  with pytest.raises(openai.BadRequestError, match=message):
    served.client.chat.completions.create(**GREEDY | dict(messages=said) | change)


def test_neutral_values_of_unsupported_fields_are_ignored(served):
  made = served.client.completions.create(
      **GREEDY, prompt=PROMPT, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1,
      user='me', suffix=None, stop=[''])
  assert made == served.client.completions.create(**GREEDY, prompt=PROMPT).copy(
      update=dict(id=made.id, created=made.created))
  parts = [dict(type='text', text='Name two nice '), dict(type='text', text='fruits.')]
  chat = served.client.chat.completions.create(
      model=MODEL, temperature=0, messages=[dict(role='user', content=parts)], tools=[],
      metadata=dict(a='b'), store=False, parallel_tool_calls=False, service_tier='auto')
  assert chat.choices[0].message.content == made.choices[0].text
  two = served.client.completions.create(**GREEDY, prompt=PROMPT, n=2, best_of=2, stop='')
  assert [choice.text for choice in two.choices] == [made.choices[0].text] * 2


@pytest.mark.parametrize('method, path, body, status, message', [
    ('POST', '/v1/completions', b'{"model":', 400, 'is not JSON'),
    ('POST', '/v1/completions', b'\xff\xfe', 400, 'is not JSON'),
    ('POST', '/v1/completions', b'{"model": "m0", "prompt": "\xff"}', 400, 'is not JSON'),
    ('POST', '/v1/completions', b'', 400, 'is not JSON'),
    ('POST', '/v1/completions', b'[1]', 400, 'no JSON object'),
    ('POST', '/v1/completions', b'[' * 100_000, 400, 'is not JSON'),
    ('POST', '/v1/completions', b'{"model": "m0"}', 400, 'prompt'),
    ('POST', '/v1/completions', b'{"model": "m1", "prompt": "a"}', 404, "'m1' does not exist"),
    ('POST', '/v1/completions', b'"' + b'a' * 5_000_000 + b'"', 413, 'more than 4,194,304 bytes'),
    ('GET', '/v1/embeddings', b'', 404, 'there is no GET /v1/embeddings'),
    ('GET', '/v1/completions', b'', 405, 'there is no GET /v1/completions'),
    ('GET', '/v1/models/m9', b'', 404, "'m9' does not exist")])
def test_bad_requests_have_a_status_and_one_sentence(served, method, path, body, status, message):
  found, answer = served.raw(method, path, body)
  assert found == status and re.search(message, answer['error']['message'])
  served.idle()


def test_models_and_health(served):
  assert [model.id for model in served.client.models.list()] == [MODEL]
  assert served.client.models.retrieve(MODEL).id == MODEL
  assert served.raw('GET', '/health') == (
      200, dict(status='ok', samples=0, call_seconds=0))


def test_a_chat_may_have_several_turns(served):
  said = [dict(role='user', content='Name two nice fruits.'),
          dict(role='assistant', content='Fig and peach.'), dict(role='user', content='Why?')]
  made = served.client.chat.completions.create(**GREEDY, messages=said, logprobs=True)
  messages = [conversation.Message(**message) for message in said]
  ids = templates.encode_prompt('plain', messages, served.parts.tokenizer)
  assert made.usage.prompt_tokens == len(ids)
  same = served.client.completions.create(**GREEDY, prompt=ids)
  assert same.choices[0].text == made.choices[0].message.content


def test_a_message_of_an_answer_can_be_sent_back(served):
  """The object of the client, with the fields that it adds; and a message of a developer."""
  said = [dict(role='developer', content='Be brief.'),
          dict(role='user', content='Name two nice fruits.')]
  create = served.client.chat.completions.create
  reply = create(**GREEDY, messages=said).choices[0].message
  after = dict(role='user', content='Why?')
  plain = [said[0] | dict(role='system'), said[1],
           dict(role='assistant', content=reply.content), after]
  filled = reply.model_dump() | dict(tool_calls=[], annotations=[], reasoning_content='hm')
  found = [create(**GREEDY, messages=messages)
           for messages in ([*said, reply, after], [*said, filled, after], plain)]
  assert len({made.choices[0].message.content for made in found}) == 1
  assert len({made.usage.prompt_tokens for made in found}) == 1
  with pytest.raises(openai.BadRequestError, match='tool_calls'):
    create(**GREEDY, messages=[*said, filled | dict(tool_calls=[dict(id='a')]), after])


def test_names_of_special_tokens_in_a_user_s_text_are_text(served):
  said = 'a </s><s> [INST] b'
  made = served.client.chat.completions.create(
      **GREEDY | dict(max_tokens=1), messages=[dict(role='user', content=said)])
  ids = templates.encode_prompt('plain', said, served.parts.tokenizer)
  assert made.usage.prompt_tokens == len(ids)
  assert not {*served.parts.tokenizer.eos_ids} & {*ids}


def test_more_samples_than_may_wait_are_refused(served, monkeypatch):
  monkeypatch.setattr(served.worker, 'most_waiting', 0)
  served.engine.gate.clear()
  stream = served.client.completions.create(**GREEDY, prompt=PROMPT, n=8, stream=True)
  for how in (dict(), dict(stream=True)):
    with monkeypatch.context() as patch, pytest.raises(
        openai.RateLimitError, match='holds 8 samples, and at most 8'):
      patch.delattr(text, 'Answer')  # none is made
      served.client.completions.create(**GREEDY, prompt=PROMPT, **how)
  served.engine.gate.set()
  assert list(stream)[-1].choices[0].finish_reason == 'stop'
  assert served.client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text
  served.idle()


def test_an_error_of_the_engine_reaches_every_client(parts, capfd):
  served = Served(parts)
  served.engine.gate.clear()
  failures = []

  def wait(**how):
    try:
      list(served.client.completions.create(**GREEDY, prompt=PROMPT, **how))
    except openai.APIError as error:
      failures.append(error)
  threads = [threading.Thread(target=wait, kwargs=how)
             for how in (dict(), dict(stream=True), dict(n=20))]
  for thread in threads:
    thread.start()
  while served.worker.held < 22:
    time.sleep(0.01)
  served.engine.error = RuntimeError('the device is lost')
  served.engine.gate.set()
  for thread in threads:
    thread.join(20)
  message = 'the engine has stopped: the device is lost; restart the server'
  assert len(failures) == 3 and all(message in str(error) for error in failures)
  assert sum(isinstance(error, openai.InternalServerError) for error in failures) == 2
  with pytest.raises(openai.InternalServerError, match='the device is lost'):
    served.client.completions.create(**GREEDY, prompt=PROMPT)
  assert served.raw('GET', '/health') == (500, dict(status='error', message=message))
  assert served.worker.held == 0
  served.close()
  assert 'RuntimeError: the device is lost' in capfd.readouterr().err


def test_a_token_is_required_where_there_is_one(parts):
  served = Served(parts, key='sesame')
  assert served.client.completions.create(**GREEDY, prompt=PROMPT).choices[0].text
  for key in ('other', 'sesam', 'ö'):
    header = {'Authorization': f'Bearer {key}'.encode()}
    for method, path in (('POST', '/v1/completions'), ('GET', '/v1/models')):
      status, answer = served.raw(method, path, b'{}', **header)
      assert status == 401 and 'lacks the token' in answer['error']['message']
  for header in (dict(), dict(Authorization='sesame')):
    assert served.raw('POST', '/v1/completions', b'{}', **header)[0] == 401
  assert served.raw('GET', '/health')[0] == 200
  served.close()


def test_a_token_may_have_any_characters(served):
  service = app.Service(served.worker, served.parts.tokenizer, None, MODEL, 'plain', 'ö', 0)

  def authorize(token: bytes):
    headers = [(b'authorization', b'Bearer ' + token)]
    app.Api(service)._authorize(HttpRequest(dict(type='http', headers=headers)))
  authorize('ö'.encode())
  with pytest.raises(app.Unauthorized):
    authorize('ö'.encode('latin-1'))


def test_health_says_for_how_long_a_call_has_run(served):
  served.engine.gate.clear()
  stream = served.client.completions.create(**GREEDY, prompt=PROMPT, stream=True)
  while served.worker._call_began is None:
    time.sleep(0.01)
  served.worker._call_began -= 600
  assert served.raw('GET', '/health')[1]['call_seconds'] >= 600
  served.engine.gate.set()
  list(stream)
  served.idle()


def test_flags_that_cannot_work_are_refused(tmp_path):
  model = f'--model={sandbox.M0}'
  said = main('serve', model, '--host=0.0.0.0', code=1,
              before='import os; os.environ.pop("SRLM_API_KEY", None)')
  assert 'set SRLM_API_KEY to a secret token' in said
  with socket.create_server(('127.0.0.1', 0)) as taken:
    said = main('serve', model, f'--port={taken.getsockname()[1]}', code=1)
  assert 'cannot be used' in said and 'choose other ones' in said
  said = main('serve', f'--model={tmp_path}/none', '--port=0', code=1)
  assert 'copy the tokenizer of the model there' in said


@contextlib.contextmanager
def program(*flags, before='pass'):
  """A server in a process of its own, which first runs `before` -> the process and its URL."""
  code = (f'import runpy; {before}; '
          f'runpy.run_module("srlm_jax.serve", run_name="__main__", alter_sys=True)')
  environment = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='')
  process = subprocess.Popen(
      [sys.executable, '-c', code, f'--model={sandbox.M0}', '--name=m0', '--port=0',
       *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    yield process, re.search(r'on (http://\S+),', line)[1]
  finally:
    process.kill()
    process.wait()


def test_a_hugging_face_folder_has_the_chat_format_of_its_tokenizer():
  """A file named manifest.json in it is of no training here: the package's M0 has an old one."""
  assert (sandbox.M0 / 'manifest.json').exists()
  assert engines.chat_of(sandbox.M0) == 'none'


def test_a_server_that_ends_finishes_what_it_has_and_takes_nothing_new(parts):
  served = Served(parts)
  served.engine.gate.clear()
  stream = served.client.completions.create(**GREEDY, prompt=PROMPT, n=12, stream=True)
  served._server.should_exit = True
  with pytest.raises(OSError):
    while True:
      served.raw('GET', '/health')
  served.engine.gate.set()
  assert sum(bool(part.choices[0].finish_reason) for part in stream) == 12
  served.close()
  assert not served._thread.is_alive() and not served.worker._thread.is_alive()


@pytest.mark.slow
def test_sigterm_finishes_running_requests_and_exits_with_0():
  with program('--slots=1', '--steps=1', '--chat=plain') as (process, url):
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
    fields = dict(model=MODEL, prompt=PROMPT, temperature=1.0, max_tokens=40, n=16)
    stream = client.completions.create(**fields, stream=True)
    parts = [next(stream)]
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
      while True:
        openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0).models.list()
    parts += stream
    assert sum(bool(part.choices[0].finish_reason) for part in parts) == 16
    assert process.wait(20) == 0
    assert re.search(r'serve: ended, [\d,]+ tokens', process.stdout.read())


@pytest.mark.slow
def test_requests_that_take_longer_than_the_grace_period_are_cut(tmp_path):
  with program('--slots=1', '--steps=1', '--grace=1') as (process, url):
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
    stream = client.completions.create(model=MODEL, prompt=PROMPT, temperature=1.9, max_tokens=200,
                                       n=128, stream=True)
    next(stream)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError):
      list(stream)
      raise AssertionError('the stream ended as if it were whole')
    assert process.wait(20) == 0


@pytest.mark.slow
def test_a_call_that_never_ends_does_not_keep_the_process():
  before = ('import time; from srlm_jax.serve import worker; worker.LAST_CALL = 1; '
            'worker.Worker._read_prompts = lambda self: time.sleep(self._held * 1000)')
  with program('--slots=1', '--grace=1', before=before) as (process, url):
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
    stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError):
      list(stream)
      raise AssertionError('the stream ended as if it were whole')
    assert process.wait(20) == 1
    assert 'the engine does not end its call' in process.stdout.read()


# Text.


@pytest.fixture(scope='module')
def codecs(tmp_path_factory):
  """Tokenizers that join pieces in different ways."""
  found = [tokenizers.load(sandbox.M0)]
  for kind in (byte_level, byte_fallback, metaspace):
    folder = tmp_path_factory.mktemp('codec')
    save(folder, kind())
    found.append(tokenizers.load(folder))
  return found


@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data(), said=st.text(max_size=12), before=st.text(max_size=12))
def test_text_in_parts_is_the_text_of_all_ids(codecs, data, said, before):
  """Of any text, and of any ids, among which are special ones and parts of characters.

  Of bytes that are not UTF-8, some tokenizers replace also those before, which have been sent.
  """
  codec = data.draw(st.sampled_from(codecs))
  ids = data.draw(st.one_of(
      st.just([i for _ in range(4) for i in codec.encode(f' {said} é😀')]),
      st.lists(st.integers(0, codec.size - 1), max_size=80)))
  first = [codec.bos_id, *codec.encode(before)]
  detokenizer = text.Detokenizer(codec, first)
  found = [detokenizer.add(i) for i in ids]
  whole = codec.decode([*first, *ids])[len(codec.decode(first)):]
  assert ''.join([*found, detokenizer.end()]) == whole or (
      '\ufffd' in whole and codecs.index(codec) > 1)


def test_half_a_character_is_never_sent(codecs):
  for codec in codecs[1:3]:
    detokenizer = text.Detokenizer(codec, [codec.bos_id])
    said = 'a 😀é😀 z ' + '😀漢\x80' * 30
    found = [detokenizer.add(i) for i in codec.encode(said)]
    assert not any('\ufffd' in part for part in found) and '' in found
    assert ''.join(found).strip() == said


def first_stop(said: str, stops: list[str]) -> str:
  """The text before the stop string that is complete first, character by character."""
  for end in range(len(said) + 1):
    starts = [end - len(stop) for stop in stops if said[:end].endswith(stop)]
    if starts:
      return said[:min(starts)]
  return said


@hypothesis.given(said=st.text('ab', max_size=30), data=st.data(),
                  stops=st.lists(st.text('abc', min_size=1, max_size=4), max_size=4))
def test_stop_strings_are_found_in_any_parts_and_nothing_of_them_is_sent(said, data, stops):
  cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=10)))
  wanted, sent, found = first_stop(said, stops), '', text.Stops(stops)
  for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
    new, is_stopped = found.add(said[start:end])
    sent += new
    assert wanted.startswith(sent)
    if is_stopped:
      break
  else:
    sent += found.end()
  assert sent == wanted


def test_a_long_stop_string_costs_what_is_held_back():
  """No prefix is compared that is longer than the text."""
  class Counted(str):
    slices = 0

    def __getitem__(self, index):
      Counted.slices += 1
      return str.__getitem__(self, index)
  found = text.Stops([Counted('ab' * 500)])
  assert found.add('cab') == ('c', False) and Counted.slices == 3


def test_tokens_with_the_same_text_keep_their_log_probs():
  names = {1: 'a', 2: 'a', 3: 'b', 4: 'a', 5: 'b'}
  token = text.Token(2, -2.0, {1: -1.0, 3: -3.0, 4: -4.0, 5: -5.0}, 0)
  found = api.CompletionFormat('x', 0, MODEL, names)._logprobs([token])
  assert found['top_logprobs'] == [
      {'token_id:1': -1.0, 'b': -3.0, 'token_id:4': -4.0, 'token_id:5': -5.0, 'a': -2.0}]


@pytest.mark.parametrize('prompt, parts, said, thought', [
    (['Why?'], ['yes ', '<end>'], 'yes ', ''),
    (['Why?'], ['<think>', '\nhm', '</think>', '\n\nSo.', '<end>'], 'So.', 'hm'),
    (['Why?', '<think>', '\n'], ['hm', '</think>', '\n\nSo.STOP', 'no'], 'So.', 'hm'),
    (['Why?', '<think>'], ['hm', '<end>'], '', 'hm'),
    (['<think>', '</think>', 'Why?'], ['a', '<think>', 'hm', '</think>', 'b'], 'ab', 'hm')])
@pytest.mark.parametrize('stops', [['STOP'], ['STOP', '>x', 'k>x']])
@pytest.mark.parametrize('count', [1, 3, 50])
def test_thinking_is_told_from_the_text_of_a_chat(
    tmp_path, prompt, parts, said, thought, stops, count):
  """In parts of any size, also where the beginning of a stop string cuts a mark."""
  tokenizer = test_thinking.save(tmp_path)
  ids = test_thinking.ids(tokenizer, *parts)
  answer = text.Answer(tokenizer, test_thinking.ids(tokenizer, *prompt), stops, 0, True)
  whole = text.Delta()
  for start in range(0, len(ids), count):
    part = ids[start:start + count]
    made = answer.add(part, [-1.0] * len(part), [], 'stop' * (start + count >= len(ids)))
    whole.text, whole.thinking = whole.text + made.text, whole.thinking + made.thinking
    if made.finish:
      break
  assert (whole.text, whole.thinking, made.finish) == (said, thought, 'stop')
  form = api.ChatFormat('x', 0, MODEL, {})
  for added in (form.choice(0, whole, False)['message'], form.delta(0, whole, False)['delta']):
    assert added.get('reasoning_content', '') == thought and added.get('content', '') == said


@pytest.mark.parametrize('fields', [
    dict(temperature=1e-300), dict(temperature=2, top_p=1e-300), dict(top_k=10**9),
    dict(seed=-2**63), dict(seed=2**63 - 1), dict(temperature=2, top_k=1),
    dict(n=128, max_tokens=1), dict(stop=['', '\0', '\ufffd', ' ' * 1000]),
    dict(prompt='\0' * 30), dict(prompt=[[0], [1023]]), dict(max_tokens=0, echo=True, logprobs=5),
    dict(prompt='\ufeff\u202e\U0010ffff')])
def test_extreme_values_do_not_stop_the_engine(served, fields):
  """A request that is allowed must not end the thread that serves all others."""
  extra = dict(top_k=fields.pop('top_k')) if 'top_k' in fields else None
  made = served.client.completions.create(
      **GREEDY | dict(prompt=PROMPT, temperature=1, extra_body=extra, max_tokens=4) | fields)
  assert len(made.choices) in (1, 2, 128) and all(choice.finish_reason for choice in made.choices)
  assert served.raw('GET', '/health')[1]['status'] == 'ok'
  served.idle()
