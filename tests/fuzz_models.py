"""Fuzzing targets: model folders, tokenizers, templates, checkpoints and HTTP. See fuzzing.py."""
import asyncio
import contextlib
import dataclasses
import functools
import gzip
import json
import pathlib
import re
import shutil
import socket
import threading
import types

from conftest import tokenizer_bytes
import fuzzing
from fuzzing import Target
import numpy as np
from safetensors.numpy import save, save_file
import tensorstore as ts
import test_tokenizer

from srlm_jax import config as configs, InputError
from srlm_jax.checkpoint import arrays, convert, hf, peft
from srlm_jax.conversation import Message
from srlm_jax.data import rendering, templates, tokenizer as tokenizers
from srlm_jax.eval import endpoint
from srlm_jax.models import config as model_config
from srlm_jax.models.config import Config, PRESETS
from srlm_jax.serve import app, text
from srlm_jax.serve.worker import Piece, PromptLogps

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / 'srlm_jax'
CONFIG = Config(D=8, F=8, K=1, G=1, H=8, V=64, layers=1, context=64, tied=True)
TEXT = 'User: Name a fruit, é 漢字 ﬁ ½.\n\tAssistant: <s> \0 🎉'
FOLDER = fuzzing.folders()


@functools.cache
def weights() -> dict[str, np.ndarray]:
  """The tensors of a model with CONFIG."""
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=leaf.hf_shape).astype('float32')
          for leaf in hf.leaves(CONFIG) for name in leaf.tensors}


@functools.cache
def source() -> pathlib.Path:
  """A Hugging Face folder."""
  folder = FOLDER / 'source'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(model_config.to_hf(CONFIG)))
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(chat_template='{{ bos_token }}')))
  save_file(weights(), folder / hf.SINGLE, dict(format='pt'))
  return folder


@functools.cache
def checkpoint() -> pathlib.Path:
  """The same as a checkpoint."""
  folder = FOLDER / 'checkpoint'
  convert.from_hf(source(), folder)
  return folder


@functools.cache
def workplace(name: str) -> pathlib.Path:
  folder = FOLDER / name
  folder.mkdir()
  return folder


def fresh(name: str, like: pathlib.Path | None = None) -> pathlib.Path:
  """A new folder, or a copy of one, in place of the one before of this name."""
  folder = FOLDER / name
  shutil.rmtree(folder, ignore_errors=True)
  if like:
    shutil.copytree(like, folder)
  else:
    folder.mkdir()
  return folder


def read_config(path):
  shape = model_config.load(path.parent)
  assert hf.leaves(shape) and model_config.from_hf(model_config.to_hf(shape))


def read_generation(path):
  assert all(0 <= i < 64 for i in tokenizers._eos_ids(path.parent, 1, 64))


def use(tokenizer):
  """What a run does with a tokenizer."""
  ids = tokenizer.encode(TEXT)
  tokenizer.decode([*ids, tokenizer.size, 10**9])
  assert all(0 <= i < tokenizer.size for i in ids)
  templates.encode_prompt('plain', 'Hi', tokenizer)
  if tokenizer.template:
    templates.encode_prompt('tokenizer', 'Hi', tokenizer)


def read_tokenizer(given):
  """given: the name of a tokenizer file, and what is in it; the other files are those of KIND."""
  name, data = given
  kind, _, file = name.partition('/')
  folder = fresh('tokenizer', tokenizer_folder(kind))
  (folder / file).write_bytes(data)
  use(tokenizers.load(folder, 2**20))


@functools.cache
def tokenizer_folder(kind: str) -> pathlib.Path:
  if kind == 'sentencepiece':
    folder = workplace(kind)
    (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
    (folder / 'tokenizer_config.json').write_text('{"add_bos_token": true}')
    return folder
  made = test_tokenizer.KINDS[kind]() if kind in test_tokenizer.KINDS else small(kind)
  return test_tokenizer.save(workplace(kind), made)


def small(kind: str):
  """A tokenizer of a few pieces, with other parts than those of test_tokenizer."""
  library = test_tokenizer.library
  if kind == 'words':
    return library.Tokenizer(library.models.WordLevel({'a': 0, 'b': 1, '?': 2}, unk_token='?'))
  made = library.Tokenizer(library.models.Unigram([('<unk>', 0.0), ('a', -1.0), ('▁', -2.0)], 0))
  made.normalizer = library.normalizers.Sequence([
      library.normalizers.NFKC(), library.normalizers.Replace(library.Regex(' {2,}'), '▁')])
  return made


def tokenizer_files(*files: str) -> list[tuple[str, bytes]]:
  return [(file, (tokenizer_folder(file.partition('/')[0]) / file.partition('/')[2]).read_bytes())
          for file in files]


def damaged_tokenizers() -> list[tuple[str, bytes]]:
  """Files on which the tokenizers library panics, fails only when it encodes, or has other ids."""
  (name, data), = tokenizer_files('metaspace/tokenizer.json')
  found = [json.loads(data) for _ in range(4)]
  found[0]['model']['continuing_subword_prefix'] = 'x' * 24  # longer than a piece
  found[1]['normalizer'] = dict(type='Precompiled', precompiled_charsmap=1e30)
  vocab = found[2]['model']['vocab']
  vocab[max(vocab, key=vocab.get)] = 10**6
  found[3]['model']['vocab'][max(vocab, key=vocab.get)] = 2**31
  (unigram, data), = tokenizer_files('unigram/tokenizer.json')
  without_unk = json.loads(data)
  without_unk['model']['unk_id'] = None
  return [*((name, json.dumps(one).encode()) for one in found),
          (unigram, json.dumps(without_unk).encode())]


def json_of_tokenizer(rng, data: bytes, others) -> bytes:
  """Damages all but the vocabulary, which is most of a file and easy to read."""
  if rng.random() < 0.2:
    return fuzzing.damaged(rng, data, others)
  whole = json.loads(data)
  kept = {name: whole['model'].pop(name) for name in ('vocab', 'merges') if name in whole['model']}
  changed = fuzzing.damaged(rng, json.dumps(whole).encode())
  with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):
    found = json.loads(changed)
    found['model'] |= kept
    return json.dumps(found).encode()
  return changed


def header_of_tensors(rng, data: bytes, others) -> bytes:
  """Damages the JSON of a header and keeps its length right, or any bytes."""
  end = 8 + int.from_bytes(data[:8], 'little')
  if rng.random() < 0.3:
    return fuzzing.damaged(rng, data[:end], others) + data[end:]
  changed = fuzzing.damaged(rng, data[8:end])
  size = rng.choice((len(changed),) * 9 + (2**63, 10**15, 2**64 - 1, len(data), 0))
  return size.to_bytes(8, 'little') + changed + data[end:]


def read_tensors(data: bytes):
  folder = workplace('tensors')
  (folder / hf.SINGLE).write_bytes(data)
  for tensors in hf.find(folder, CONFIG).values():
    for tensor in tensors:
      assert tensor.read().tobytes() == np.asarray(tensor.map()).tobytes()


def index() -> bytes:
  return json.dumps(dict(metadata=dict(total_size=1), weight_map={
      name: f'model-0000{i % 2}.safetensors' for i, name in enumerate(weights())})).encode()


def read_index(data: bytes):
  folder = workplace('index')
  for i in range(2):
    file = folder / f'model-0000{i}.safetensors'
    if not file.exists():
      save_file(dict(list(weights().items())[i::2]), file)
  (folder / hf.INDEX).write_bytes(data)
  hf.find(folder, CONFIG)


def adapter() -> list[tuple[str, bytes]]:
  """The files of a PEFT folder."""
  fields = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=None, r=2,
                lora_alpha=4, lora_dropout=0.0, bias='none', target_modules=['q_proj'],
                fan_in_fan_out=False, use_rslora=False, init_lora_weights=True)
  name = 'base_model.model.model.layers.0.self_attn.q_proj'
  tensors = {f'{name}.lora_A.weight': np.ones((2, 8), 'float32'),
             f'{name}.lora_B.weight': np.ones((8, 2), 'float32')}
  return [(peft.CONFIG, json.dumps(fields).encode()), (peft.TENSORS, save(tensors))]


def damaged_adapter(rng, data: bytes, others) -> bytes:
  is_json = data.startswith(b'{')
  return (fuzzing.damaged if is_json else header_of_tensors)(rng, data, others)


def read_adapter(given):
  folder = workplace('adapter')
  for name, data in (dict(adapter()) | dict([given])).items():
    (folder / name).write_bytes(data)
  peft.read(folder, checkpoint())


def array_files() -> list[tuple[str, bytes]]:
  params = checkpoint() / 'steps/0/params'
  return [(str(path.relative_to(params)), path.read_bytes())
          for path in sorted(params.rglob('*')) if path.is_file()]


def read_arrays(given):
  """One damaged file of a step, as the conversion to Hugging Face reads it."""
  name, data = given
  folder = fresh('arrays', checkpoint())
  (folder / 'steps/0/params' / name).write_bytes(data)
  _read_all(folder / 'steps/0/params')


def _read_all(params):
  stored = arrays.open_all(params, {leaf.name: leaf.shape for leaf in hf.leaves(CONFIG)})
  for array in stored.values():
    arrays.read_into(np.empty(array.shape, array.dtype.numpy_dtype), array)


ARRAY = 'layers.mlp.gate_DF'


def read_zarray(data: bytes):
  """The description of an array in a store whose checksums are right: a hostile checkpoint."""
  folder = fresh('zarray', checkpoint())
  params = folder / 'steps/0/params'
  _store(params).write(f'{ARRAY}/{arrays.DESCRIPTION}', data).result()
  _read_all(params)


def zarray() -> bytes:
  params = checkpoint() / 'steps/0/params'
  return _store(params).read(f'{ARRAY}/{arrays.DESCRIPTION}').result().value


def _store(params):
  return ts.KvStore.open(dict(driver='ocdbt', base=f'file://{params}/')).result()


SAID = (Message('system', 'Be brief.'), Message('user', 'Name a fruit.'), Message('assistant', 'A'),
        Message('user', 'Another.'))
VARIABLES = dict(bos_token='<s>', eos_token='</s>')
# Each would take all memory or time.
BOMBS = (b"{{ 'a' * 10 ** 10 }}", b"{{ 'a' * 10 ** 8 }}", b"{{ '%1000000000d' % 1 }}",
         b"{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}"
         b"{% endfor %}", b"{{ messages | tojson(indent=10 ** 9) }}",
         b'{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
         b'{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', b'{{ ' + b'(' * 20_000,
         b'{{ ' + b'[' * 2000 + b']' * 2000 + b' }}', b'{% if 1 %}' * 200 + b'{% endif %}' * 200,
         b"{{ ''.__class__.__mro__ }}", b'{{ cycler.__init__.__globals__ }}')


def chat_templates() -> list[bytes]:
  return [path.read_bytes() for folder in (TESTS / 'chat_templates', PACKAGE / 'data')
          for path in sorted(folder.glob('*.jinja'))]


def read_chat_template(data: bytes):
  template = rendering.Template(data.decode(errors='surrogateescape'), 'the template')
  assert isinstance(rendering.render(template, SAID, VARIABLES, True), str)


# HTTP requests to the server.

class Stub:
  """A worker of the server without an engine: each sample is a few tokens."""
  error, held, call_seconds = '', 0, 0

  def __init__(self, tokenizer):
    self.engine = types.SimpleNamespace(slots=8, size=64, check_fits=self.check_fits)
    self.ids = tokenizer.encode('A pear, é.')[:5]

  def check_fits(self, prompt_tokens, max_tokens):
    if prompt_tokens + max_tokens > 64:
      raise InputError('it does not fit')

  def check_room(self, count):
    if count > 1000:
      raise InputError('too many samples')

  @contextlib.contextmanager
  def holding(self, jobs):
    for job in jobs:
      n = len(job.request.ids) - 1
      if job.prompt_top is not None:
        job.tell(PromptLogps([-1.0] * n, [{1: -1.0}] * n))
      for number in range(job.request.n if job.is_sampled else 0):
        job.tell(Piece(number, self.ids, [-1.0] * len(self.ids),
                       [{1: -1.0, 2: -2.0}] * len(self.ids), 'eos'))
    yield

  def stop_sample(self, job, number):
    pass


@functools.cache
def api():
  folder = tokenizer_folder('sentencepiece')
  tokenizer = tokenizers.load(folder)
  service = app.Service(Stub(tokenizer), tokenizer, text.Names(tokenizer), 'm', 'plain', '', 0)
  return app.Api(service).app(lambda: None, lambda: None)


ROUTES = ('/v1/completions', '/v1/chat/completions')


def requests() -> list[tuple[str, bytes]]:
  completion = dict(
      model='m', prompt=['Name a fruit.', 'Why?'], max_tokens=8, temperature=0.7, top_p=0.9,
      top_k=5, n=2, seed=1, stop=['\n', 'x'], stream=False, logprobs=2, echo=True, user='u',
      metadata={}, presence_penalty=0, logit_bias={}, suffix=None, best_of=2)
  chat = dict(
      model='m', messages=[dict(role='system', content='Be brief.'), dict(
          role='user', content=[dict(type='text', text='Name a fruit.')])], max_tokens=8,
      temperature=0.0, top_p=1, n=1, seed=None, stop='x', stream=True,
      stream_options=dict(include_usage=True), logprobs=True, top_logprobs=2, tools=[],
      response_format=dict(type='text'), parallel_tool_calls=True)
  ids = dict(model='m', prompt=[[1, 2, 3], [4]], max_tokens=0, echo=True, logprobs=0)
  return [(ROUTES[0], json.dumps(completion).encode()), (ROUTES[1], json.dumps(chat).encode()),
          (ROUTES[0], json.dumps(ids).encode()), (ROUTES[1], json.dumps(dict(
              model='m', messages=[dict(role='user', content='Hi')])).encode())]


def ask(given):
  """A request to the application; a 4xx is an InputError, and anything but that or 200 a defect."""
  path, body = given
  status, answer = asyncio.run(_ask(path, body))
  assert status == 200 or 400 <= status < 500, (status, answer)
  if answer.startswith(b'data: '):
    assert answer.endswith(b'data: [DONE]\n\n')
    parts = [json.loads(part[6:]) for part in answer.split(b'\n\n')[:-2]]
    assert all('choices' in part for part in parts)
    return
  found = json.loads(answer)
  if status != 200:
    assert found['error']['message'] and found['error']['type']
    raise InputError(found['error']['message'])
  assert found['choices'] and found['usage']


async def _ask(path: str, body: bytes) -> tuple[int, bytes]:
  parts, sent = [dict(type='http.request', body=body, more_body=False)], []

  async def receive():
    if parts:
      return parts.pop()
    await asyncio.sleep(3600)  # the client waits

  async def send(message):
    sent.append(message)
  scope = dict(type='http', asgi=dict(version='3.0'), http_version='1.1', method='POST',
               scheme='http', path=path, raw_path=path.encode(), query_string=b'', root_path='',
               headers=[(b'content-type', b'application/json')], client=('127.0.0.1', 1),
               server=('127.0.0.1', 80))
  await api()(scope, receive, send)
  body = b''.join(m.get('body', b'') for m in sent if m['type'] == 'http.response.body')
  return sent[0]['status'], body


# HTTP answers to the client of an outside judge.

class Hostile:
  """A server that answers every request with the same bytes, and then closes the connection."""

  def __init__(self):
    self.answer, self.endless = b'', b''
    self._listener = socket.create_server(('127.0.0.1', 0))
    self.url = f'http://127.0.0.1:{self._listener.getsockname()[1]}/v1'
    threading.Thread(target=self._serve, daemon=True).start()

  def _serve(self):
    while True:
      connection, _ = self._listener.accept()
      with connection, contextlib.suppress(OSError):
        connection.settimeout(5)
        received = b''
        while not self._is_whole(received):
          if not (part := connection.recv(2**16)):
            raise ConnectionError('the client has left')
          received += part
        connection.sendall(self.answer)
        while self.endless:
          connection.sendall(self.endless)

  @staticmethod
  def _is_whole(received: bytes) -> bool:
    """Whether that is all of a request."""
    head, end, body = received.partition(b'\r\n\r\n')
    sizes = re.findall(rb'(?i)\r\ncontent-length: (\d+)', head)
    return bool(end) and len(body) >= int(sizes[0] if sizes else 0)


@functools.cache
def hostile() -> tuple[Hostile, endpoint.Remote]:
  server, c = Hostile(), configs.get('m2', 'tiny').endpoint.unlock()
  c.update(dict(url=server.url, model='m', timeout=20.0))
  client = endpoint.Remote(c, endpoint.Sampling(0.0, 8), workplace('judge'), 'judge')
  # Else a request may be sent on the connection of the answer before, which the server closes.
  client._api._client.headers['Connection'] = 'close'
  return server, client


def answers() -> list[bytes]:
  completion = dict(id='x', object='chat.completion', created=1, model='m', choices=[dict(
      index=0, finish_reason='stop', message=dict(role='assistant', content='Score: 3'))],
      usage=dict(prompt_tokens=3, completion_tokens=4, total_tokens=7))
  parts = json.loads(json.dumps(completion))
  parts['choices'][0]['message']['content'] = [dict(type='text', text='Score: 3')]
  failure = dict(error=dict(message='too many requests', type='rate_limit', code=None))
  return [_http(200, json.dumps(completion)), _http(200, json.dumps(parts)),
          _http(429, json.dumps(failure), **{'Retry-After': '1'}), _http(500, 'oops'),
          _http(400, json.dumps(failure))]


def _http(status: int, body: str | bytes, **headers) -> bytes:
  body = body if isinstance(body, bytes) else body.encode()
  fields = {'Content-Type': 'application/json', 'Content-Length': len(body)} | headers
  lines = [f'HTTP/1.1 {status} X', *(f'{name}: {value}' for name, value in fields.items())]
  return '\r\n'.join([*lines, '', '']).encode() + body


def damaged_answer(rng, data: bytes, others) -> bytes:
  """Damages the body and keeps its length right, or anything."""
  head, _, body = data.partition(b'\r\n\r\n')
  if rng.random() < 0.3:
    return fuzzing.damaged(rng, data, others)
  status = int(head.split()[1])
  return _http(status if rng.random() < 0.9 else rng.choice((199, 204, 302, 304, 401, 503, 999)),
               fuzzing.damaged(rng, body))


HOSTILE = (
    _http(200, '{}', **{'Content-Length': 10**15}), _http(200, '{}', **{'Content-Length': -1}),
    _http(200, '{}', **{'Content-Encoding': 'gzip'}),
    _http(200, gzip.compress(b'{' + b' ' * 10**7), **{'Content-Encoding': 'gzip'}),
    *(_http(429, '{}', **{'Retry-After': x}) for x in (
        '1e10', '1e400', '-1', 'nan', '9' * 400, 'Fri, 31 Dec 9999 23:59:59 GMT',
        'Fri, 31 Dec 99999999999999999999 23:59:59 GMT', 'Thu, 01 Jan 1970 00:00:00')),
    b'HTTP/1.1 302 X\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n',
    b'HTTP/1.1 302 X\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n',
    b'HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n{}',
    b'HTTP/1.1 200 X\r\n' + b'a: b\r\n' * 20_000, b'HTTP/9.9 999 X\r\n\r\n', b'x' * 200_000)


def ask_judge(data: bytes):
  """One attempt. A failure after which the client tries again counts as an InputError."""
  server, client = hostile()
  server.answer = data
  try:
    answer = client._one_attempt('key', endpoint.Request('r', (Message('user', 'Why?'),)))
  except endpoint._Failure as failure:
    pause = endpoint._pause(3, failure.retry_after)
    assert 0 < pause < 1e6 or failure.retry_after > endpoint.LONGEST_ASKED
    raise InputError(failure.reason) from None
  assert isinstance(answer.text, str) and answer.text.encode() is not None


FAMILIES = {shape.family: dataclasses.replace(shape, layers=2) for shape in PRESETS.values()}
SENTENCEPIECE = tuple(('sentencepiece/tokenizer.model', data) for data in (
    # A control piece and a piece whose names are not UTF-8.
    tokenizer_bytes().replace(b'</s>', b'</\x80>', 1), tokenizer_bytes().replace(b'\n\x03pea',
                                                                                 b'\n\x03p\x80a')))
KINDS = (*test_tokenizer.KINDS, 'words', 'unigram')

TARGETS = [
    Target('config', [json.dumps(model_config.to_hf(shape)).encode()
                      for shape in FAMILIES.values()],
           fuzzing.in_file(read_config, 'config.json')),
    Target('generation_config', [b'{"eos_token_id": [1, 2], "bos_token_id": 0}',
                                 b'{"eos_token_id": 3, "temperature": 0.6}'],
           fuzzing.in_file(read_generation, 'generation_config.json')),
    Target('tokenizer_model', tokenizer_files('sentencepiece/tokenizer.model'), read_tokenizer,
           examples=SENTENCEPIECE),
    Target('tokenizer_json', tokenizer_files(*(f'{kind}/tokenizer.json' for kind in KINDS)),
           read_tokenizer, examples=damaged_tokenizers(), damage=json_of_tokenizer, share=0.15,
           seconds=30),
    Target('tokenizer_config', tokenizer_files('sentencepiece/tokenizer_config.json', *(
        f'{kind}/tokenizer_config.json' for kind in KINDS)), read_tokenizer, share=0.1, seconds=30),
    Target('safetensors', [save(weights(), dict(format='pt'))], read_tensors,
           damage=header_of_tensors, megabytes=512),
    Target('safetensors_index', [index()], read_index, share=0.5),
    Target('peft', adapter(), read_adapter, damage=damaged_adapter, share=0.5),
    Target('checkpoint', array_files(), read_arrays, share=0.05, seconds=30, megabytes=512),
    Target('zarray', [zarray()], read_zarray, share=0.05, seconds=30, megabytes=512),
    Target('chat_template', chat_templates(), read_chat_template, examples=BOMBS, share=0.3,
           seconds=60),
    Target('server', requests(), ask, share=0.5),
    Target('judge_answer', answers()[:2], ask_judge, refused=answers()[2:], examples=HOSTILE,
           damage=damaged_answer, share=0.2, seconds=60),
]
