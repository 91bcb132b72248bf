"""Host time per engine call: from the end of one call on the device to the dispatch of the next.

  python bench/host.py              # 64 slots, 8 tokens per call, long judge prompts
  python bench/host.py --unrolled   # each layer's weights and cache are arrays, as on GPUs
  python bench/host.py --quick      # few requests

The engine runs a judge stage as in production: it renders and tokenizes prompts, schedules slots,
prepares the arrays of prefills, moves them to 8 devices and back, parses scores and writes records.
Only the two device programs are replaced, by programs with the same arguments that compute nothing;
their time is not counted where the host waits for it. The devices are 8 fake ones on a CPU, whose
dispatch is part of the figure.

While the host works, a device waits. The limit is half of the time of the tokens of a call at 70B,
by the estimates of docs/scale.md. Prints a table and a line of JSON; exits with 1 if the median is
above the limit.
"""
import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
import time
from unittest import mock

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           ' --xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing
import workloads

import srlm_jax
from srlm_jax import records, schema, sharding
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import attention, kernels, llama
from srlm_jax.models.config import Config
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, programs

SLOTS, STEPS, SIZE = 64, 8, 4096       # of a 70B sampler: configs of bench/aot.py
DECODE_MS = {'bf16': 12.9, 'int8': 10.1}  # of one step at 70B on v5p-16, the middle estimate
JUDGEMENTS = workloads.Kind(count=300, rubric=0, prompt=0, median=80, cap=256)
PROMPT, RESPONSE = 150, 800            # words, on average
# As many arrays as 70B on 8 devices; sizes that only a device would notice are small.
MODEL = Config(D=16, F=16, K=8, G=1, H=2, V=4096, layers=80, context=SIZE, dtype='bfloat16')


class Calls:
  """The device programs that compute nothing, and the host's seconds before each decode.

  seconds: of every call but the first. reading: the part that made requests; writing: records.
  """

  def __init__(self, text: Sequence[int]):
    """`text`: the tokens that every row generates, over and over."""
    self._text, self._ended = text, None
    self.seconds, self.reading, self.writing = [], [0.0], [0.0]
    static = ('model', 'sampling', 'steps', 'top')
    self._decode = jax.jit(self._advance, static_argnames=static, donate_argnames='cache',
                           keep_unused=True)
    self._prefill = jax.jit(lambda model, params, cache, prefix, tokens, view: cache,
                            static_argnames='model', donate_argnames='cache', keep_unused=True)

  def decode(self, *args, **kwargs):
    """Like `programs.decode`; waits for the devices."""
    made = self._decode(*args, **kwargs)
    if self._ended is not None:
      self.seconds.append(time.perf_counter() - self._ended)
    jax.block_until_ready(made)
    self._ended = time.perf_counter()
    self.reading.append(0.0)
    self.writing.append(0.0)
    return made

  def prefill(self, mesh):
    """Like `programs.prefill`."""
    return self._prefill

  def _advance(self, model, params, cache, prefix, rows, key, eos, per_row, *, sampling, steps,
               top):
    new = jnp.where(rows.live, jnp.minimum(rows.limit - rows.count, steps), 0)
    text = jnp.asarray(self._text)
    ids = text[(rows.count[:, None] + jnp.arange(steps)) % len(text)]
    count = rows.count + new
    after = rows.replace(length=rows.length + new, count=count,
                         live=rows.live & (count < rows.limit))
    return cache, after, (ids, jnp.zeros(ids.shape)), jnp.full((), steps, jnp.int32)

  def timed(self, kind: list[float], function, *args):
    """Calls a function, and adds its seconds to the last entry of `kind`."""
    started = time.perf_counter()
    result = function(*args)
    kind[-1] += time.perf_counter() - started
    return result


def requests(judge: judges.Judge, tokenizer, count: int, calls: Calls) -> Iterator[engines.Request]:
  """Yields judge requests with 3 samples each, made when the engine asks for them."""
  rng = np.random.default_rng(0)
  words = judge.text.split()

  def write(median):
    return ' '.join(rng.choice(words, rng.integers(median // 2, median * 3 // 2)))

  def encode(prompt, response):
    return templates.encode_prompt('llama2', judge.render(prompt=prompt, response=response),
                                   tokenizer)
  for i in range(count):
    ids = calls.timed(calls.reading, encode, write(PROMPT), write(RESPONSE))
    yield engines.Request(f'p{i}/0', ids, 3, lengths=workloads.lengths(rng, JUDGEMENTS, 3))


def measure(count: int, unrolled: bool) -> tuple[Calls, dict]:
  """-> the calls of a stage of `count` requests, and what they did."""
  judge = judges.load('additive')
  tokenizer = tokenizers.load(pathlib.Path(srlm_jax.__file__).parent / 'sandbox' / 'm0')
  calls = Calls(tokenizer.encode(judge.example))
  choice = dataclasses.replace(attention.XLA, width_multiple=128, size_multiple=512,
                               unrolled=unrolled)
  mesh = sharding.make_mesh(1, 1, 8)
  with jax.set_mesh(mesh):
    out = sharding.shardings(llama.abstract_params(MODEL), mesh)
    params = jax.jit(functools.partial(llama.init_params, MODEL), out_shardings=out)(
        jax.random.key(0))
  made = dict(requests=0, samples=0, prompt_tokens=0, tokens=0, scores=0)

  def save(file, request, results):
    judgements = []
    for j, result in enumerate(results):
      text = tokenizer.decode(result.ids).strip()
      score, reason = judges.read(judge, text, result.finish)
      judgements.append(schema.Judgement(
          id=f'{request.id}/{j}', prompt_id=request.id, response_id=request.id, index=j, text=text,
          score=score, reason=reason, finish=result.finish))
    file.append(judgements)
    return sum(j.score is not None for j in judgements)

  with (mock.patch.object(programs, 'decode', calls.decode),
        mock.patch.object(programs, 'prefill', calls.prefill),
        mock.patch.object(kernels, 'choose', lambda platform, config: choice),
        tempfile.TemporaryDirectory() as folder):
    engine = engines.Engine(llama.Llama(MODEL), params, mesh, (), 0, 'bench', slots=SLOTS,
                            size=SIZE, steps=STEPS)
    sampling = engines.Sampling(workloads.TEMPERATURE, workloads.TOP_P, JUDGEMENTS.cap)
    file = records.Appender(pathlib.Path(folder, 'judgements.jsonl'))
    for request, results in engine.generate(requests(judge, tokenizer, count, calls), sampling):
      made['requests'] += 1
      made['samples'] += len(results)
      made['prompt_tokens'] += len(request.ids)
      made['tokens'] += sum(len(r.ids) for r in results)
      assert results[0].finish == 'length', results[0].finish
      made['scores'] += calls.timed(calls.writing, save, file, request, results)
    file.close()
  return calls, made


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--unrolled', action='store_true', help='layers are separate arrays')
  parser.add_argument('--quick', action='store_true', help='few requests')
  parser.add_argument('--json', help='also writes the JSON to this file')
  f = parser.parse_args()
  calls, made = measure(50 if f.quick else JUDGEMENTS.count, f.unrolled)
  ms = {name: 1e3 * np.asarray(values)[1:len(calls.seconds)]
        for name, values in (('all', calls.seconds), ('prompts', calls.reading[1:]),
                             ('records', calls.writing[1:]))}
  limits = {bits: STEPS * step / 2 for bits, step in DECODE_MS.items()}
  found = dict(machine=roofline.name(), unrolled=f.unrolled, calls=len(ms['all']),
               limits_ms=limits, **made,
               **{f'{name}_ms': dict(median=float(np.median(x)), p90=float(np.quantile(x, 0.9)),
                                     most=float(x.max())) for name, x in ms.items()})
  print(f'{found["machine"]}; {len(ms["all"])} calls of {STEPS} tokens in {SLOTS} slots; '
        f'{made["requests"]} requests of {made["prompt_tokens"] / made["requests"]:,.0f} prompt '
        f'tokens and {made["tokens"] / made["samples"]:.0f} tokens per sample')
  print(f'{"ms of the host per call":26} {"median":>7} {"p90":>7} {"most":>7}')
  for name, title in (('all', 'all'), ('prompts', 'of this: prompts to tokens'),
                      ('records', 'of this: records')):
    x = found[f'{name}_ms']
    print(f'{title:26} {x["median"]:7.1f} {x["p90"]:7.1f} {x["most"]:7.1f}')
  print('limit: ' + ', '.join(f'{x:.1f} ms ({bits})' for bits, x in limits.items()))
  timing.report(found, f.json)
  sys.exit(found['all_ms']['median'] > min(limits.values()))


if __name__ == '__main__':
  main()
