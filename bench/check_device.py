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
import json
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
from srlm_jax.models.attention import Cache, Prefix, Segments
from srlm_jax.models.config import Config
from srlm_jax.sample import engine as engines
from srlm_jax.sample.draw import Sampling
from srlm_jax.train import batch as batches

SMALL = Config(D=256, F=512, K=2, G=2, H=128, V=1024, layers=2, context=512, dtype='bfloat16')
# The largest of these whose DPO step is planned with at most half of the memory.
LARGE = {'1.1B': train.PLANS['gpu'].config,
         '0.2B': dataclasses.replace(train.PLANS['gpu'].config, D=1024, F=2816, G=4, layers=12),
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
      self.add(name, f'{type(error).__name__}: {str(error).splitlines()[0][:200]}', False)


def small() -> Config:
  """The model of the first three checks."""
  on_cpu = jax.default_backend() == 'cpu'
  return dataclasses.replace(SMALL, H=64, dtype='float32') if on_cpu else SMALL


def cpu():
  """One CPU core's device."""
  return jax.devices('cpu')[0]


def on_cpu(function, *args) -> np.ndarray:
  """-> the result in float32 on a CPU core."""
  args = jax.tree.map(lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating)
                      else x, jax.device_get(args))
  with jax.default_device(cpu()), jax.set_mesh(sharding.make_mesh(1, 1, 1, [cpu()])):
    return np.asarray(jax.jit(function)(*args))


def check_kernels(report: Report):
  """Packed, prefill, append and decode; shapes that all kernels support."""
  c, rng = small(), np.random.default_rng(0)
  found = kernels.choose(jax.default_backend(), c)
  packed = kernels.for_training(jax.default_backend(), c, 'full').packed
  B, T, S, W = 4, 512, 512, 512

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), c.dtype)
  q, k, v = normal(B, T, c.K, c.G, c.H), normal(B, T, c.K, c.H), normal(B, T, c.K, c.H)
  segments = Segments(jnp.asarray(np.sort(rng.integers(0, 4, (B, T)))[:, ::-1], jnp.int32))
  cache = Cache(normal(1, B, c.K, S, c.H), normal(1, B, c.K, S, c.H))
  prefix = Prefix(normal(1, c.K, W, c.H), normal(1, c.K, W, c.H), jnp.array([0, W, 7, W // 2]))
  length, layer = jnp.array([1, S, 129, 300]), jnp.int32(0)

  def written(append):
    def run(cache, k, v):
      return jnp.stack(jax.tree.leaves(append(cache, k, v, layer, length - 1)))
    return run
  is_real = np.asarray(segments.segment_ids > 0)[..., None, None, None]
  for name, kernel, plain, args in (
      ('packed', packed, attention.packed, (q, k, v, segments)),
      ('prefill', found.prefill, attention.prefill, (q, k, v, layer, prefix)),
      ('decode', found.decode, attention.XLA.decode, (q[:, 0], cache, layer, length, prefix)),
      ('append', written(found.append), written(attention.append), (cache, k[:, 0], v[:, 0]))):
    title = f'kernel {name}'
    with report.check(title):
      mine, wanted = np.asarray(jax.jit(kernel)(*args), np.float32), on_cpu(plain, *args)
      if name == 'packed':  # what padding attends to is not used
        mine, wanted = mine * is_real, wanted * is_real
      worst = float(np.abs(mine - wanted).max())
      report.add(title, f'{found.name}; largest difference {worst:.1e}', worst < CLOSE[c.dtype])


def check_greedy(report: Report):
  """Every greedy token has the highest logit of a forward pass, or one that nearly ties with it."""
  c, mesh = small(), sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  prompts = [list(range(1, 2 + 9 * i)) for i in range(6)]
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(c.dtype), llama.init_params(
        c, key)))(jax.random.key(0))
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
  """Loss, gradient norm and log-probs, on the mesh that the program chooses for all devices."""
  count = jax.device_count()
  plan = train.Plan(small(), 4 * count, 40, 40, 1, 1, 256)
  for loss in ('sft', 'dpo'):
    with report.check(f'step {loss}'):
      data = Packing(train.draw(plan, 2 if loss == 'dpo' else 1), plan.batch, 1, 0, plan.width,
                     parts=count, multiple=128)
      pack = batches.pack_pairs if loss == 'dpo' else batches.pack
      host_batches = [pack(data.rows(0), data.shape)]
      values = {}
      for name, mesh in (('cpu', sharding.make_mesh(1, 1, 1, [cpu()])),
                         ('devices', sharding.make_mesh(1, count, 1))):
        with jax.set_mesh(mesh):
          params = jax.jit(lambda key: llama.init_params(plan.config, key))(jax.random.key(0))
          (values[name],) = train.Ours(loss, plan, params, mesh, host_batches, 'full').steps()
      tolerance = 1e-4 if plan.config.dtype == 'float32' else 2e-2
      pairs = {key: (float(values['devices'][key]), float(wanted))
               for key, wanted in values['cpu'].items() if key in ('loss', 'grad_norm',
                                                                   'chosen_logp')}
      report.add(f'step {loss}', ', '.join(f'{key} {mine:.5g} ({wanted:.5g} on a CPU core)'
                                           for key, (mine, wanted) in pairs.items()),
                 all(np.isclose(mine, wanted, rtol=tolerance) for mine, wanted in pairs.values()))


def check_plan(report: Report):
  """Measured memory and time of a DPO step, against the estimate and the floor."""
  devices, is_cpu = sizing.devices(), jax.default_backend() == 'cpu'
  mesh, width = sharding.make_mesh(1, jax.device_count(), 1), 256 if is_cpu else 2048
  def planned(config):
    return sizing.training_bytes(config, sizing.Mesh(1, jax.device_count(), 1), width, True, 1,
                                 'dots')
  name = 'tiny' if is_cpu else next((
      name for name, config in LARGE.items() if planned(config) < devices.memory / 2), 'tiny')
  plan = train.Plan(LARGE[name], 2 * jax.device_count(), width // 8, width // 8, 3, 1, width)
  data = Packing(train.draw(plan, 2), plan.batch, 1, 0, width, jax.device_count(), 128,
                 (jax.device_count(), width))
  host_batches = [batches.pack_pairs(data.rows(i), data.shape) for i in range(plan.steps)]
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: llama.init_params(plan.config, key))(jax.random.key(0))
    ours = train.Ours('dpo', plan, params, mesh, host_batches, 'dots')
    del params
    ours.steps()  # compiles
    seconds = timing.seconds(ours.steps) / plan.steps
    _, peak = roofline.peaks(plan.config, is_cpu)
  examples = [e for i in range(plan.steps) for row in data.rows(i) for e in row]
  floor = train.operations(plan.config, examples, 'dpo') / plan.steps / peak / jax.device_count()
  report.add('time', f'a DPO step of {name}, {jax.device_count()} rows of {width}: {seconds:.3f} s,'
             f' the floor is {floor:.3f} s: MFU {floor / seconds:.0%}')
  estimate = planned(plan.config)
  compiled = ours.memory()
  stats = jax.local_devices()[0].memory_stats() or {}
  measured = stats.get('peak_bytes_in_use', compiled)
  report.add('memory', f'{measured / 2**30:.2f} GiB at the peak, {compiled / 2**30:.2f} by the '
             f'compiler; planned with {estimate / 2**30:.2f}',
             is_cpu or compiled < sizing.USABLE[devices.platform] * devices.memory)


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
