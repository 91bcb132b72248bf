"""Throughput of the server, compared with the sampling engine without it.

  python bench/serve.py            # 1, 16 and 64 clients; about 4 minutes on 2 cores
  python bench/serve.py --quick    # every path on tiny inputs

A random Llama (26M parameters on a CPU, 1.1B on a GPU) that never ends a text answers prompts of
100 token ids with 48 tokens each. The clients are in a process of their own: each sends one request
after the other, as a stream, with OpenAI's client. The server has 64 slots. The engine without it
gets the same requests at once, with as many slots as there are clients. Runs alternate, and numbers
are medians. The output is a table and a line of JSON.

  ratio   tokens per second of the server / those of the engine
  first   median seconds until a client has the first token
"""
import asyncio
import contextlib
import dataclasses
import multiprocessing
import socket
import statistics
import threading
import time

import jax
import numpy as np
import openai
import roofline
import timing
import uvicorn
import workloads

from srlm_jax import sharding
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.models import llama
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines
from srlm_jax.sandbox import data as sandbox
from srlm_jax.serve import app, text, worker

SLOTS, STEPS = 64, 4
CLIENTS = {1: 4, 16: 3, 64: 2}  # clients: requests of each
PROMPT, TOKENS = 100, 48
ROUNDS = 3
MODELS = dict(cpu=workloads.CPU, gpu=Config(D=2048, F=5632, K=4, G=8, H=64, V=32000, layers=22,
                                            context=2048, dtype='bfloat16'))
TINY = Config(D=64, F=128, K=2, G=2, H=16, V=1024, layers=2, context=256)


def clients(pipe):
  """The process of the clients: (url, prompts of each client) -> (seconds, seconds to the first
  token of every request)."""
  async def one(api, prompts, firsts):
    for prompt in prompts:
      began, seen = time.perf_counter(), 0
      async for part in await api.completions.create(
          model='bench', prompt=prompt, max_tokens=TOKENS, temperature=workloads.TEMPERATURE,
          top_p=workloads.TOP_P, stream=True, stream_options=dict(include_usage=True)):
        if not seen and part.choices:
          seen = 1
          firsts.append(time.perf_counter() - began)
      assert part.usage.completion_tokens == TOKENS, part

  async def all(url, asked):
    firsts = []
    async with openai.AsyncOpenAI(base_url=url, api_key='none', max_retries=0) as api:
      await api.models.list()  # imports and connects
      began = time.perf_counter()
      await asyncio.gather(*(one(api, prompts, firsts) for prompts in asked))
      return time.perf_counter() - began, statistics.median(firsts)
  with contextlib.suppress(EOFError):  # the benchmark has ended
    while True:
      pipe.send(asyncio.run(all(*pipe.recv())))


@dataclasses.dataclass
class Server:
  """A server in this process, and its clients in another one."""
  url: str
  pipe: object

  def seconds(self, asked: list[list[list[int]]]) -> tuple[float, float]:
    """The prompts of each client -> (seconds, median seconds to the first token)."""
    self.pipe.send((self.url, asked))
    return self.pipe.recv()


def serve(engine: engines.Engine, tokenizer) -> Server:
  """Starts a server."""
  thread = worker.Worker(engine, 1024, [1, 1])
  thread.start()
  service = app.Service(thread, tokenizer, text.Names(tokenizer), 'bench', 'none', '', 0)
  listener = socket.create_server(('127.0.0.1', 0))
  made = app.Api(service).app(lambda: None, thread.stop)
  server = uvicorn.Server(uvicorn.Config(made, log_level='warning', access_log=False))
  threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True).start()
  here, there = multiprocessing.Pipe()
  multiprocessing.get_context('spawn').Process(target=clients, args=(there,), daemon=True).start()
  return Server(f'http://127.0.0.1:{listener.getsockname()[1]}/v1', here)


def offline(engine: engines.Engine, asked: list[list[list[int]]]) -> float:
  """-> the seconds that the engine takes for the same requests."""
  sampling = engines.Sampling(workloads.TEMPERATURE, workloads.TOP_P, TOKENS)
  requests = [engines.Request(f'{i}/{j}', ids) for i, prompts in enumerate(asked)
              for j, ids in enumerate(prompts)]
  began = time.perf_counter()
  if len(asked) == 1:  # one after the other
    found = [results for request in requests for _, results in engine.generate([request], sampling)]
  else:
    found = [results for _, results in engine.generate(requests, sampling)]
  assert all(len(results[0].ids) == TOKENS for results in found)
  return time.perf_counter() - began


def main():
  f = timing.parser(__doc__).parse_args()
  on = jax.devices()[0]
  tokenizer = tokenizers.load(sandbox.M0)
  config = dataclasses.replace(TINY if f.quick else MODELS[on.platform], V=tokenizer.size)
  mesh = sharding.make_mesh(1, 1, 1, [on])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(config.dtype),
                                              llama.init_params(config, key)))(jax.random.key(0))

  def engine(slots):
    return engines.Engine(llama.Llama(config), params, mesh, (), 0, 'bench', slots=slots,
                          size=PROMPT + TOKENS, steps=STEPS)
  rng, server = np.random.default_rng(0), serve(engine(SLOTS), tokenizer)
  found = dict(machine=roofline.name(), parameters=llama.param_count(config), rows=[])
  print(f'{found["machine"]}; a Llama with {found["parameters"] / 1e6:,.1f}M parameters, '
        f'{config.dtype}; {SLOTS} slots')
  print(f'{"clients":>8} {"requests":>9} {"engine/s":>9} {"server/s":>9} {"ratio":>6} {"first":>6}')
  for count, each in CLIENTS.items():
    asked = [[rng.integers(3, config.V, PROMPT).tolist() for _ in range(1 if f.quick else each)]
             for _ in range(count)]
    own, tokens = engine(count), TOKENS * sum(map(len, asked))
    offline(own, asked), server.seconds(asked)  # compiles
    rounds = [(offline(own, asked), *server.seconds(asked))
              for _ in range(1 if f.quick else ROUNDS)]
    alone, served, first = map(statistics.median, zip(*rounds, strict=True))
    row = dict(clients=count, requests=count * len(asked[0]), tokens=tokens,
               engine_per_second=tokens / alone, server_per_second=tokens / served,
               ratio=statistics.median(a / b for a, b, _ in rounds), first_seconds=first)
    print(f'{count:8} {row["requests"]:9} {row["engine_per_second"]:9,.0f} '
          f'{row["server_per_second"]:9,.0f} {row["ratio"]:6.2f} {first:6.2f}', flush=True)
    found['rows'].append(row)
  timing.report(found, f.json)


if __name__ == '__main__':
  main()
