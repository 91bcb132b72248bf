"""Checks the devices of this machine before a run: `make check-device`.

It prints a report to paste into an issue:

  kernels  every attention kernel of the platform, against plain XLA in float32 on a CPU core
  greedy   the engine's greedy tokens, against a forward pass without a cache on a CPU core
  steps    one SFT and one DPO step on all devices, against the same step on a CPU core
  plan     bytes and seconds of a larger DPO step, against the bytes that the program plans with and
           the seconds that its FLOPs need at the measured peak

The exit code is 1 if a check failed. On a CPU the devices are the fake ones of XLA_FLAGS.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing
import train

from srlm_jax import environment, InputError, sharding
from srlm_jax.data.packing import Packing
from srlm_jax.models import attention, kernels, llama, sizing
from srlm_jax.models.attention import Cache, PairSegments, Prefix, Segments
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import batch as batches

SMALL = Config(D=256, F=512, K=2, G=2, H=128, V=1024, layers=2, context=512, dtype='bfloat16')
# The largest of these whose DPO step is planned with at most half of the memory.
LARGE = {
    '1.1B': dataclasses.replace(train.PLANS['gpu'].config, G=4, H=128),
    '0.2B': dataclasses.replace(train.PLANS['gpu'].config, D=1024, F=2816, G=2, H=128, layers=12),
    'tiny': train.PLANS['quick'].config}
CLOSE = dict(float32=1e-4, bfloat16=3e-2)  # of a kernel's results, whose inputs are normal
NEAR_TIE = 0.05  # standard deviations of the logits, by which rounding may change their order


class Report:
  """The lines of the report, and whether any check failed."""

  def __init__(self):
    self.failed = False

  def add(self, name: str, text: str, is_ok: bool = True):
    """Prints one line."""
    self.failed |= not is_ok
    print(f'| {name} | {"ok" if is_ok else "FAILED"} | {text} |', flush=True)

  @contextlib.contextmanager
  def check(self, name: str):
    """A block in which any error makes the check fail; the other checks still run."""
    try:
      yield
    except Exception as error:  # compilers and kernels raise many types
      traceback.print_exc()
      reason = ' '.join(str(error).split())[:200].replace('|', '/')
      self.add(name, f'{type(error).__name__}: {reason}', False)


def small() -> Config:
  """The model of the first three checks."""
  on_cpu = jax.default_backend() == 'cpu'
  return dataclasses.replace(SMALL, H=64, dtype='float32') if on_cpu else SMALL


def fsdp_mesh(config: Config):
  """-> a mesh of all devices: as much fsdp as divides the model, the rest is data."""
  fsdp = math.gcd(jax.device_count(), config.D)
  return sharding.make_mesh(jax.device_count() // fsdp, fsdp, 1)


def parameters(config: Config, mesh):
  """-> random float32 parameters, on the mesh as in training; a mesh must be set."""
  out = sharding.shardings(llama.abstract_params(config), mesh)
  return jax.jit(lambda key: llama.init_params(config, key), out_shardings=out)(jax.random.key(0))


def cpu():
  """One CPU core's device."""
  return jax.devices('cpu')[0]


def on_cpu(function, *args) -> np.ndarray:
  """-> the result in float32 on a CPU core."""
  args = jax.tree.map(lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating)
                      else x, jax.device_get(args))
  with jax.default_device(cpu()), jax.set_mesh(sharding.make_mesh(1, 1, 1, [cpu()])):
    return np.asarray(jax.jit(function)(*args))


def windowless(*functions):
  return (functools.partial(f, window=None) for f in functions)


def check_kernels(report: Report):
  """Packed, prefill, append and decode; shapes that all kernels support."""
  c, rng = small(), np.random.default_rng(0)
  found = kernels.choose(jax.default_backend(), c)
  training = kernels.for_training(jax.default_backend(), c, 'full')
  B, T, S, W = 4, 512, 512, 512

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), c.dtype)
  q, k, v = normal(B, T, c.K, c.G, c.H), normal(B, T, c.K, c.H), normal(B, T, c.K, c.H)
  ids = jnp.asarray(np.sort(rng.integers(0, 5, (B, T)))[:, ::-1], jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(T), ids.shape)  # only a window reads them
  segments = Segments(ids, positions)
  # Segments 3 and 1 are prompts whose second responses are 2 and 0: padding.
  pairs = PairSegments(ids, positions, jnp.where(ids % 2 == 1, ids - 1, 0))
  cache = Cache(normal(1, B, c.K, S, c.H), normal(1, B, c.K, S, c.H))
  prefix = Prefix(normal(1, c.K, W, c.H), normal(1, c.K, W, c.H), jnp.array([0, W, 7, W // 2]))
  length, layer = jnp.array([1, S, 129, 300]), jnp.int32(0)

  def written(append):
    def run(cache, k, v):
      return jnp.stack(jax.tree.leaves(append(cache, k, v, layer, length - 1)))
    return run
  is_real = np.asarray(segments.segment_ids > 0)[..., None, None, None]
  for name, kernel, plain, args in (
      ('packed', *windowless(training.packed, attention.packed), (q, k, v, segments)),
      ('packed pairs', *windowless(training.packed, attention.packed), (q, k, v, pairs)),
      ('prefill', *windowless(found.prefill, attention.prefill), (q, k, v, layer, prefix)),
      ('decode', *windowless(found.decode, attention.XLA.decode),
       (q[:, 0], cache, layer, length, prefix)),
      ('append', written(found.append), written(attention.append), (cache, k[:, 0], v[:, 0]))):
    title = f'kernel {name}'
    with report.check(title):
      mine, wanted = np.asarray(jax.jit(kernel)(*args), np.float32), on_cpu(plain, *args)
      if 'packed' in name:  # what padding attends to is not used
        mine, wanted = mine * is_real, wanted * is_real
      worst = float(np.abs(mine - wanted).max())
      by = training.name if 'packed' in name else found.name
      report.add(title, f'{by}; largest difference {worst:.1e}', worst < CLOSE[c.dtype])


def check_greedy(report: Report):
  """Every greedy token has the highest logit of a forward pass, or one that nearly ties with it."""
  c, mesh = small(), sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  prompts = [[*range(1, 42), *range(100 + i, 101 + 10 * i)] for i in range(6)]  # share a prefix
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x.astype(c.dtype), parameters(c, mesh))
  engine = engines.Engine(llama.Llama(c), params, mesh, (), 0, 'check', slots=8, size=256, steps=8)
  made = engine.generate([engines.Request(str(i), ids) for i, ids in enumerate(prompts)],
                         Sampling(0.0, 1.0, 48))
  plain, gaps = llama.Llama(dataclasses.replace(c, dtype='float32')), []
  for request, (result,) in made:
    tokens = np.asarray([[*request.ids, *result.ids]])
    logits = on_cpu(lambda params, tokens: plain.apply({'params': params}, tokens), params, tokens)
    logits = logits[0, len(request.ids) - 1:-1]
    taken = np.take_along_axis(logits, np.asarray(result.ids)[:, None], 1)[:, 0]
    gaps += ((logits.max(1) - taken) / logits.std(1)).tolist()
  report.add('greedy', f'{len(gaps)} tokens, {np.mean(np.equal(gaps, 0)):.1%} the same; largest '
             f'distance to the highest logit {max(gaps):.3f} standard deviations',
             max(gaps) < NEAR_TIE)


def check_steps(report: Report):
  """Loss, gradient norm and log-probs, on the devices and in float32 on a CPU core."""
  count = jax.device_count()
  plan = train.Plan(small(), 4 * count, 40, 40, 1, 1, 256)
  for loss in ('sft', 'dpo'):
    with report.check(f'step {loss}'):
      data = Packing(train.draw(plan, 2 if loss == 'dpo' else 1), plan.batch, 1, 0, plan.width,
                     parts=count, multiple=128)
      pack = batches.pack_pairs if loss == 'dpo' else batches.pack
      host_batches = [pack(data.rows(0), data.shape)]
      values = {}
      exact = dataclasses.replace(plan, config=dataclasses.replace(plan.config, dtype='float32'))
      for name, mesh, using in (('cpu', sharding.make_mesh(1, 1, 1, [cpu()]), exact),
                                ('devices', fsdp_mesh(plan.config), plan)):
        with jax.set_mesh(mesh):
          params = parameters(using.config, mesh)
          (values[name],) = train.Ours(loss, using, params, mesh, host_batches, 'full').steps()
      tolerance = 1e-4 if plan.config.dtype == 'float32' else 2e-2
      pairs = {key: (float(values['devices'][key]), float(wanted))
               for key, wanted in values['cpu'].items()
               if key in ('grad_norm', 'chosen_logp' if loss == 'dpo' else 'loss')}
      report.add(f'step {loss}', ', '.join(f'{key} {mine:.5g} ({wanted:.5g} on a CPU core)'
                                           for key, (mine, wanted) in pairs.items()),
                 all(np.isclose(mine, wanted, rtol=tolerance) for mine, wanted in pairs.values()))


def check_plan(report: Report):
  """Memory and time of a DPO step, against the estimate and the floor."""
  devices, is_cpu = sizing.devices(), jax.default_backend() == 'cpu'
  count, width = jax.device_count(), 256 if is_cpu else 2048

  def planned(config):
    mesh = fsdp_mesh(config).shape
    return sizing.training_bytes(config, sizing.Mesh(*mesh.values()), width, True, 1, 'dots',
                                 'float32', devices.platform)
  name = 'tiny' if is_cpu else next((
      name for name, config in LARGE.items() if planned(config) < devices.memory / 2), 'tiny')
  plan = train.Plan(LARGE[name], 2 * count, width // 8, width // 8, 3, 1, width)
  data = Packing(train.draw(plan, 2), plan.batch, 1, 0, width, count, 128, (count, width))
  host_batches = [batches.pack_pairs(data.rows(i), data.shape) for i in range(plan.steps)]
  _, peak = roofline.peaks(plan.config, is_cpu)
  mesh = fsdp_mesh(plan.config)
  with jax.set_mesh(mesh):
    ours = train.Ours('dpo', plan, parameters(plan.config, mesh), mesh, host_batches, 'dots')
    ours.steps()  # compiles
    seconds = timing.seconds(ours.steps) / plan.steps
    compiled = ours.memory()
  examples = [e for i in range(plan.steps) for row in data.rows(i) for e in row]
  floor = train.operations(plan.config, examples, 'dpo') / plan.steps / peak / count
  title = f'a DPO step of {name}, {count} rows of {width}, attention by {ours.kernels}'
  report.add('time', f'{title}: {seconds:.3f} s; the floor at {peak / 1e12:.2f} TFLOP/s is '
             f'{floor:.3f} s: MFU {floor / seconds:.0%}')
  stats = jax.local_devices()[0].memory_stats() or {}
  most = stats.get('peak_bytes_in_use')
  by_process = f'; at most {most / 2**30:.2f} in use by this process' if most else ''
  report.add('memory', f'{compiled / 2**30:.2f} GiB by the compiler, planned with '
             f'{planned(plan.config) / 2**30:.2f}{by_process}',
             is_cpu or compiled < devices.usable)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.parse_args()
  given = jax.config.jax_platforms
  if given and 'cpu' not in given:  # the references run on a CPU core
    jax.config.update('jax_platforms', f'{given},cpu')
  try:
    environment.pin()
  except InputError as error:
    sys.exit(f'error: {error}')
  report, found = Report(), environment.record()
  print(f'Devices: {found["devices"]} x {found["device_kind"]} ({found["platform"]}), '
        f'{sizing.devices().memory / 2**30:.1f} GiB each\n\n| check | result | |\n|---|---|---|')
  for check in (check_kernels, check_greedy, check_steps, check_plan):
    with report.check(check.__name__.removeprefix('check_')):
      check(report)
  print(f'\n{json.dumps(found)}')
  sys.exit(report.failed)


if __name__ == '__main__':
  main()
