"""Serves a model behind OpenAI's API.

`python -m srlm_jax.serve --model=DIR`, then `openai.OpenAI(base_url='http://127.0.0.1:8000/v1')`.
docs/serving.md describes it.
"""
import ipaddress
import os
import signal
import socket
import sys
import time

from absl import flags
import jax

from srlm_jax import cli, InputError
from srlm_jax.config import CHATS
from srlm_jax.sample import engine as engines

try:
  import uvicorn

  from srlm_jax.serve import app, text, worker
except ModuleNotFoundError as error:
  sys.exit(f'error: {error.name} is not installed; install the extra: pip install -e \'.[serve]\'')

KEY = 'SRLM_API_KEY'  # environment variable with the token that requests must have


def define_flags():
  flags.DEFINE_string('model', None, 'Folder of a checkpoint or of a Hugging Face model.',
                      required=True)
  flags.DEFINE_string('name', '', 'Name of the model in requests; default: --model.')
  flags.DEFINE_string('host', '127.0.0.1', f'Address to serve on. Any but those of this machine '
                      f'itself needs a token in the environment: {KEY}.')
  flags.DEFINE_integer('port', 8000, 'Port to serve on; 0: any that is free.', lower_bound=0,
                       upper_bound=65535)
  flags.DEFINE_enum('chat', '', ('', 'none', *CHATS),
                    'Chat format; default: that with which the model was trained here, or else the '
                    'template of its tokenizer.')
  flags.DEFINE_integer('slots', -1, 'Samples that decode together; -1: chosen.', lower_bound=-1)
  flags.DEFINE_integer('size', 4096, 'Tokens of prompt and response together, at most the context.',
                       lower_bound=2)
  flags.DEFINE_integer('steps', 4, 'Tokens per call; new requests enter between calls.',
                       lower_bound=1)
  flags.DEFINE_integer('queue', 1024, 'Samples that may wait for slots; more are refused.',
                       lower_bound=0)
  flags.DEFINE_enum('dtype', '', ('', 'float32', 'bfloat16'),
                    'Type of parameters and activations; default: float32 on a CPU, else bfloat16.')
  flags.DEFINE_bool('int8', False, '8-bit weights.')
  flags.DEFINE_integer('tensor', -1, 'Devices for tensor parallelism; -1: chosen.', lower_bound=-1)
  flags.DEFINE_integer('seed', 0, 'Seed of the PRNG.', lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_integer('grace', 30, 'Seconds that running requests have after SIGTERM.',
                       lower_bound=0)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  key = os.environ.get(KEY, '')
  if not key and not is_local(f.host):
    raise InputError(f'--host={f.host} can be reached from elsewhere; set {KEY} to a secret token, '
                     f'or use --host=127.0.0.1')
  if jax.process_count() > 1:
    raise InputError('the server runs on one host; start it in one process')
  listener = listen(f.host, f.port)
  chat = f.chat or engines.chat_of(f.model)
  engine, tokenizer = engines.load(config(f), f.model, 'serve', chat)
  thread = worker.Worker(engine, f.queue, tokenizer.eos_ids[:1] * 2)
  started = time.time()
  thread.start()
  service = app.Service(thread, tokenizer, text.Names(tokenizer), f.name or f.model.rstrip('/'),
                        chat, key, int(started))
  host, port = listener.getsockname()[:2]
  address = f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'

  def on_start():
    print(f'serve: {service.model} on {address}, chat format {chat}, {engine.slots} '
          f'slots of {engine.size} tokens, kernels {engine.kernels}', flush=True)

  for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends them again when it has ended
    signal.signal(number, lambda *_: None)
  uvicorn.Server(uvicorn.Config(
      app.Api(service).app(on_start, thread.stop), log_level='warning', access_log=False,
      timeout_graceful_shutdown=f.grace)).run(sockets=[listener])
  if thread.is_alive:  # no exit handler may wait for the engine
    print('serve: the engine does not end its call; the process ends without it', flush=True)
    os._exit(1)
  print(f'serve: ended, {engine.work.generated:,} tokens generated', flush=True)


def config(f):
  """The config with which an engine is loaded."""
  for name, value in (('slots', f.slots), ('tensor', f.tensor)):
    if value == 0:
      raise InputError(f'--{name}=0; give a positive number, or -1: chosen')
  return engines.config_alone(f.dtype, f.tensor, f.seed, slots=f.slots, size=f.size, steps=f.steps,
                              int8=f.int8)


def is_local(host: str) -> bool:
  """Whether only this machine can reach an address."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


def listen(host: str, port: int) -> socket.socket:
  """A socket for a server; InputError if the address cannot be used."""
  try:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)
  except OSError as error:
    raise InputError(f'--host={host} --port={port} cannot be used ({error}); choose other ones'
                     ) from error


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
