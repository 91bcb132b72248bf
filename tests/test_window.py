"""Sliding windows in every attention kernel, compared with dense attention in numpy."""
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import attend, decode_inputs, prefill_inputs
from test_packed import run

from srlm_jax.data import packing
from srlm_jax.data.examples import Example
from srlm_jax.models import attention, cache as caches, cpu, kernels, packed
from srlm_jax.models.attention import Cache, PairSegments, Prefix, Segments
from srlm_jax.models.config import PRESETS

CONFIG = dataclasses.replace(PRESETS['tiny-test'], H=128)


def cpp_decode(*arrays, window):
  if not cpu.supports(CONFIG):
    pytest.skip('there is no C++ compiler')
  return cpu.decode(*arrays, window=window)


DECODE = {  # name: function, keys of a block, rows that are read together
    'tpu': (functools.partial(kernels.tpu_decode, interpret=True), 128, 1),
    'gpu': (functools.partial(kernels.gpu_decode, interpret=True), 64, 1),
    'xla': (attention.XLA.decode, 64, 8),
    'xla for a cpu': (attention.CPU.decode, 64, 2),
    'c++': (cpp_decode, 1, 1)}
def slow(*values):
  return [pytest.param(x, marks=pytest.mark.slow) for x in values]


# In turn: part of two blocks, within the prefix of the last row; the token itself; less than a
# block; two blocks and more; more than the own keys of any row; all but the first token of the
# longest row; more than any row.
WINDOWS = [100, *slow(1, 20, 200, 400, 639, 1000)]
K, G, H, S = 4, 2, 128, 384
LENGTH = np.array([1, 128, S, S - 100, S // 2, 0, 129, 7])  # block boundaries; an idle row
BUSY = LENGTH > 0


def visible(position, prefix_length, W, S, window):
  """position [B, T] of queries, prefix_length [B] -> [B, T, W + S], by the definition."""
  mask = np.zeros((*position.shape, W + S), bool)
  for b, t in np.ndindex(position.shape):
    p, n = position[b, t], prefix_length[b]
    for key in range(max(p - window + 1, 0), p + 1):
      mask[b, t, key if key < n else W + key - n] = True
  return mask


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('W', [256, *slow(0)])
@pytest.mark.parametrize('name', DECODE)
def test_decode_sees_the_window_and_reads_nothing_before_it(name, W, window):
  """The blocks before a row's window are NaN, which a product with weight 0 would keep."""
  decode, block, rows = DECODE[name]
  layers = 1 if name == 'c++' else 2
  prefix_length = np.minimum([0, W, W // 3, 0, W, W // 2, 1, W], W)
  q, cache, prefix = decode_inputs(K, G, H, S, W, prefix_length, L=layers)
  mask = visible((prefix_length + LENGTH - 1)[:, None], prefix_length, W, S, window)
  wanted = attend(q[:, None], cache.k[-1], cache.v[-1], layers - 1, prefix, mask)[BUSY, 0]
  first = np.where(BUSY, np.maximum(LENGTH - window, 0), S)  # of the row's own keys
  first = first.reshape(-1, rows).min(1).repeat(rows)
  unread = np.arange(S) < (first // block * block)[:, None]
  cache = Cache(*(jnp.where(unread[:, None, :, None], jnp.nan, x) for x in (cache.k, cache.v)))
  if name != 'gpu':  # which reads the whole prefix, once for all rows
    first = np.maximum(prefix_length + LENGTH - window, 0)
    first = np.where(BUSY & (first < prefix_length), first, W).min()
    unread = np.arange(W)[:, None] < first // block * block
    prefix = Prefix(*(jnp.where(unread, jnp.nan, x) for x in (prefix.k, prefix.v)), prefix.length)
  out = jax.jit(functools.partial(decode, window=window))(
      q, cache, jnp.int32(layers - 1), jnp.asarray(LENGTH), prefix)
  np.testing.assert_allclose(np.asarray(out)[BUSY], wanted, atol=1e-5)


@pytest.mark.parametrize('name', ['xla for a cpu', 'c++'])
def test_a_long_row_costs_its_window(name):
  """8,192 keys take many times as long as the last 256 of them."""
  q, cache, prefix = decode_inputs(4, 2, 64, 8192, 64, [64] * 2, L=1)
  length = jnp.full(2, 8192)

  def seconds(window):
    step = jax.jit(functools.partial(DECODE[name][0], window=window))
    times = []
    for _ in range(8):
      start = time.perf_counter()
      jax.block_until_ready(step(q, cache, jnp.int32(0), length, prefix))
      times.append(time.perf_counter() - start)
    return min(times)
  ratio = seconds(None) / seconds(256)
  print(f'{name}: {ratio:.1f} times as long')
  assert ratio > 4


def test_the_blocks_that_tpu_decode_fetches(monkeypatch):
  """Counted over the steps of its grid: a block is fetched where its index changes."""
  keys, shared = jnp.zeros((1, 4, 4, 4096, 128)), jnp.zeros((1, 4, 1024, 128))
  q, cache = keys[0, :, :, :1], Cache(keys, keys)
  prefix = Prefix(shared, shared, jnp.array([1024, 500, 0, 1024]))

  def fetched(window, length):
    calls = []
    def pallas_call(kernel, *, grid_spec, out_shape, **named):
      return lambda *arrays: calls.append((grid_spec, arrays)) or jnp.zeros(out_shape.shape)
    with monkeypatch.context() as patch:
      patch.setattr(kernels.pl, 'pallas_call', pallas_call)
      kernels.tpu_decode(q, cache, jnp.int32(0), jnp.array(length), prefix, window=window)
    (spec, arrays), = calls
    steps = np.indices([int(n) for n in spec.grid]).reshape(len(spec.grid), -1)
    for block in spec.in_specs[1], spec.in_specs[3]:  # keys, keys of the prefix
      at = jax.jit(jax.vmap(lambda *step, f=block.index_map: f(*step, *arrays[:3])))(*steps)
      at = np.stack([np.broadcast_to(x, steps.shape[1]) for x in at])
      yield 1 + int((at[:, 1:] != at[:, :-1]).any(0).sum())

  # Blocks of 128 keys. Two groups of two rows, each of which reads the prefix once.
  long = 4096, 4000, 3968, 300
  assert list(fetched(None, long)) == [32 + 32 + 31 + 3, 2 * 8]
  # 256 keys lie in 2 blocks, or in 3. All windows are after the prefix, whose last block is fetched
  # anyway, once, because its index never changes.
  assert list(fetched(256, long)) == [2 + 3 + 2 + 3, 1]
  # The last row sees 1024 + 100 - 640 = 484 and later of the prefix: its blocks 3 to 7.
  assert list(fetched(640, (*long[:3], 100))) == [5 + 6 + 5 + 1, 2 * 5]


def test_a_window_that_no_row_exceeds_compiles_to_the_same_program(mesh):
  """Prefill of 16 tokens and decode of 64, after a prefix of 16, and packed rows of 16."""
  k, prefix = jnp.zeros((1, 2, 2, 64, 8)), jnp.zeros((1, 2, 16, 8))
  cache, prefix = Cache(k, k), caches.PrefixCache(prefix, prefix)
  q, ints, two = jnp.zeros((2, 16, 2, 1, 8)), jnp.zeros((2, 16), jnp.int32), jnp.zeros(2, jnp.int32)
  views = (caches.Prefill(two, two, two, jnp.int32(2)), caches.Decode(two, two, two > 0),
           packed.Packed(Segments(ints, ints)))

  def texts(window):
    for view in views:
      T = 1 if view is views[1] else 16
      def attend(q, view):
        k = q[..., 0, :]
        return view.attend(attention.XLA, q, k, k, cache, prefix, jnp.int32(0), window=window)
      yield jax.jit(attend).lower(q[:, :T], view).as_text()
  plain, *others = (list(texts(window)) for window in (None, 80, 79, 31, 15))
  same = [[a == b for a, b in zip(plain, other, strict=True)] for other in others]
  assert same == [[True, True, True], [True, False, True], [False, False, True], [False] * 3]


PREFILL = {
    'tpu': functools.partial(kernels.tpu_prefill, interpret=True),
    'gpu': kernels.gpu_prefill,
    'xla': attention.prefill}


@pytest.fixture
def cudnn_by_xla(monkeypatch):
  """cuDNN does not run on a CPU."""
  plain = jax.nn.dot_product_attention
  def by_xla(*arrays, implementation, **named):
    assert implementation == 'cudnn'
    return plain(*arrays, **named, implementation='xla')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)


@pytest.mark.parametrize('window', [300, *slow(1, 20, 128, 639, 1000)])
@pytest.mark.parametrize('name', PREFILL)
def test_prefill_sees_the_window(name, window, cudnn_by_xla):
  """Rows with none of the prefix, all of it, a third, and one token."""
  A, T, W = 4, 256, 384
  (q, k, v, layer, prefix), _ = prefill_inputs(A, T, W, 1, 2, 16)
  length = np.asarray(prefix.length)
  mask = visible(length[:, None] + np.arange(T), length, W, T, window)
  wanted = attend(q, *(np.einsum('BTKH->BKTH', x) for x in (k, v)), 1, prefix, mask)
  out = jax.jit(functools.partial(PREFILL[name], window=window))(q, k, v, layer, prefix)
  np.testing.assert_allclose(out, wanted, atol=1e-5)


def rows(responses: int) -> Segments:
  """Two rows of 384 tokens; examples longer and shorter than 128, and padding."""
  def example(prompt, *lengths):
    return Example('', [1] * prompt, tuple([1] * n for n in lengths[:responses]))
  made = [packing.layout(examples) for examples in (
      [example(150, 60, 80), example(10, 3, 40), example(1, 30, 1)],
      [example(5, 140, 30), example(160, 9, 12)])]
  def padded(name):
    return np.stack([np.pad(getattr(row, name), (0, 384 - len(row.tokens))) for row in made])
  arrays = map(padded, ('segment_ids', 'positions', 'second_segment')[:1 + responses])
  return (Segments if responses == 1 else PairSegments)(*arrays)


def dense(q, k, v, segments, *, window):
  """The definition: every response and its prompt are one sequence."""
  B, T = segments.segment_ids.shape
  second = getattr(segments, 'second_segment', np.zeros((B, T)))
  mask = np.tile(np.eye(T, dtype=bool), (B, 1, 1))  # padding sees itself
  for b in range(B):
    for response in range(1, segments.segment_ids[b].max() + 1):
      sequence = np.flatnonzero((segments.segment_ids[b] == response) | (second[b] == response))
      for p, at in enumerate(sequence):
        mask[b, at, sequence[max(p - window + 1, 0):p + 1]] = True
  return attention.attend(q, k, v, jnp.asarray(mask))


@pytest.mark.parametrize('window', [140, *slow(1, 20, 128, 229, 300)])
@pytest.mark.parametrize('responses', [2, *slow(1)])
@pytest.mark.parametrize('name', ['tpu', 'gpu', 'xla'])
def test_packed_rows_see_the_window(name, responses, window, cudnn_by_xla, monkeypatch):
  """Outputs and gradients; a rejected response is farther from its prompt than in position."""
  monkeypatch.setattr(packed, 'BLOCK', 128)
  f = dict(tpu=functools.partial(packed.tpu_packed, interpret=True), gpu=packed.gpu_packed,
           xla=attention.packed)[name]
  segments = rows(responses)
  found, wanted = (run(f, segments, K=1, H=16, window=window) for f in (f, dense))
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
