"""The sampling kernels: interpreted on a CPU and compared with numpy, and lowered for a GPU."""
import functools

from conftest import make_mesh
import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
import numpy as np
import pytest

from srlm_jax.models import attention, kernels
from srlm_jax.models.attention import Cache, Prefix

CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
# (K, G, H, S, W): three blocks on TPU; two blocks or splits, as for 70B; no prefix; more blocks of
# the prefix than of the cache
DECODE = [(4, 1, 128, 384, 128), (1, 8, 128, 1024, 256), (2, 3, 16, 256, 0), (8, 8, 128, 256, 384)]
BOTH = pytest.mark.parametrize('decode', [kernels.tpu_decode, kernels.gpu_decode])


def normal(seed, *shapes, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def attend(q, k, v, layer, prefix, mask):
  """q [B, T, K, G, H], k and v [B, K, S, H], mask [B, T, W + S] -> [B, T, K, G, H], float64."""
  q, k, v, *prefix_kv = (np.asarray(x, np.float64)
                         for x in (q, k, v, prefix.k[layer], prefix.v[layer]))
  k, v = (np.concatenate([np.broadcast_to(w, (len(x), *w.shape)), x], 2)
          for x, w in zip((k, v), prefix_kv, strict=True))
  scores = np.einsum('BTKGH,BKSH->BKGTS', q, k) * q.shape[-1] ** -0.5
  scores = np.where(mask[:, None, None], scores, -1e30)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum('BKGTS,BKSH->BTKGH', probs / probs.sum(-1, keepdims=True), v)


def attend_decode(q, cache, layer, length, prefix):
  """`attention.decode` in numpy."""
  mask = np.concatenate([np.arange(prefix.k.shape[2]) < np.asarray(prefix.length)[:, None],
                         np.arange(cache.k.shape[3]) < np.asarray(length)[:, None]], -1)
  return attend(q[:, None], cache.k[layer], cache.v[layer], layer, prefix, mask[:, None])[:, 0]


@functools.cache
def interpreted(f):
  return jax.jit(functools.partial(f, window=None, interpret=True))


def decode_inputs(K, G, H, S, W, prefix_length, L=2, dtype=jnp.float32):
  """-> q, cache, prefix of as many rows as there are prefix lengths."""
  B = len(prefix_length)
  q, k, v, *prefix = normal(0, (B, K, G, H), (L, B, K, S, H), (L, B, K, S, H), (L, K, W, H),
                            (L, K, W, H), dtype=dtype)
  return q, Cache(k, v), Prefix(*prefix, jnp.asarray(prefix_length))


@pytest.mark.parametrize('shape,dtype', [
    *((shape, jnp.float32) for shape in DECODE),
    *((shape, jnp.bfloat16) for shape in DECODE[1:3])])  # XLA on CPU lacks the other bf16 products
@BOTH
def test_decode_equals_attention_in_numpy(decode, shape, dtype):
  *_, S, W = shape
  length = jnp.array([1, 128, S, S - 100, S // 2, 0, 129, 7])  # block boundaries; an idle row
  q, cache, prefix = decode_inputs(*shape, [0, W, W // 3, 0, W, W // 2, 1, W], dtype=dtype)
  out = interpreted(decode)(q, cache, jnp.int32(1), length, prefix)
  assert out.dtype == dtype and out.shape == q.shape and jnp.isfinite(out).all()
  wanted = attend_decode(q, cache, 1, length, prefix)
  busy = np.asarray(length) > 0
  np.testing.assert_allclose(np.asarray(out, np.float64)[busy], wanted[busy], atol=CLOSE[dtype])


@pytest.mark.parametrize('plain,dtype', [(attention.XLA, jnp.float32), (attention.CPU, jnp.float32),
                                         (attention.CPU, jnp.bfloat16)])
def test_plain_xla_equals_attention_in_numpy(plain, dtype):
  """Decode, append and prefill."""
  length = jnp.array([1, 64, 192, 100, 65, 0, 129, 7])
  q, cache, prefix = decode_inputs(2, 2, 16, 192, 33, [0, 33, 11, 0, 33, 16, 1, 33], dtype=dtype)
  decode = jax.jit(functools.partial(plain.decode, window=None))
  out = decode(q, cache, jnp.int32(1), length, prefix)
  busy = np.asarray(length) > 0
  wanted = attend_decode(q, cache, 1, length, prefix)
  np.testing.assert_allclose(np.asarray(out, np.float64)[busy], wanted[busy], atol=CLOSE[dtype])
  new, position = q[:, :, 0], jnp.where(length, length - 1, 192)
  written = plain.append(cache, new, new, jnp.int32(1), position)
  changed = (np.asarray(written.k) != np.asarray(cache.k)).any(-1)
  assert np.argwhere(changed[:, :, 0]).tolist() == [
      [1, b, n - 1] for b, n in enumerate(length.tolist()) if n]
  inputs, wanted = prefill_inputs(4, 24, 33, 2, 2, 16, dtype)
  found = np.asarray(plain.prefill(*inputs, window=None), np.float64)
  np.testing.assert_allclose(found, wanted, atol=CLOSE[dtype])


@BOTH
def test_a_batch_of_idle_rows_is_finite(decode):
  q, cache, prefix = decode_inputs(1, 2, 16, 128, 128, [0, 0], L=1)
  idle = jnp.zeros(2, jnp.int32)
  assert jnp.isfinite(interpreted(decode)(q, cache, jnp.int32(0), idle, prefix)).all()


@BOTH
@hypothesis.settings(max_examples=10)
@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(1, 256), st.integers(0, 128)), min_size=3, max_size=3),
    layer=st.integers(0, 1))
def test_decode_with_random_lengths(decode, rows, layer):
  length, prefix_length = jnp.array(rows).T
  q, cache, prefix = decode_inputs(4, 2, 128, 256, 128, prefix_length)
  out = interpreted(decode)(q, cache, jnp.int32(layer), length, prefix)
  np.testing.assert_allclose(out, attend_decode(q, cache, layer, length, prefix), atol=1e-5)


@BOTH
@pytest.mark.parametrize('rows', [1, 5, 6])  # of a batch: one group; groups of one, and of several
def test_a_row_does_not_depend_on_the_other_rows(decode, rows):
  """Their queries and keys are NaN, and each row is the only one with numbers once."""
  q, cache, prefix = decode_inputs(2, 4, 128, 256, 128, [64, 0, 128, 1, 77, 128][:rows])
  length = jnp.array([100, 256, 1, 128, 129, 200])[:rows]
  wanted = attend_decode(q, cache, 0, length, prefix)
  for row in range(rows):
    others = np.arange(rows)[:, None, None, None] != row
    poisoned = Cache(*(jnp.where(others, jnp.nan, x) for x in (cache.k, cache.v)))
    out = interpreted(decode)(jnp.where(others, jnp.nan, q), poisoned, jnp.int32(0), length, prefix)
    np.testing.assert_allclose(out[row], wanted[row], atol=1e-5)


def test_decode_and_append_inside_a_shard_map():
  """Rows over data, heads over tensor."""
  q, cache, prefix = decode_inputs(4, 2, 16, 128, 128, [0, 128, 7, 64])
  (new,) = normal(1, (4, 4, 16))
  position = jnp.array([0, 31, 127, 64])

  def step(q, cache, new, position, prefix):
    layer = jnp.int32(1)
    cache = kernels.tpu_append(cache, new, new, layer, position, interpret=True)
    return kernels.tpu_decode(q, cache, layer, position + 1, prefix, window=None, interpret=True)

  row, slots = PartitionSpec('data', 'tensor'), PartitionSpec(None, 'data', 'tensor')
  rows, heads = PartitionSpec('data'), PartitionSpec(None, 'tensor')
  out = jax.jit(jax.shard_map(
      step, mesh=make_mesh(2, 1, 2), in_specs=(row, slots, row, rows, Prefix(heads, heads, rows)),
      out_specs=row, check_vma=False))(q, cache, new, position, prefix)
  cache = Cache(*(x.at[1, jnp.arange(4), :, position].set(new) for x in (cache.k, cache.v)))
  np.testing.assert_allclose(out, attend_decode(q, cache, 1, position + 1, prefix), atol=1e-5)


@pytest.mark.parametrize('dtype', CLOSE)
@pytest.mark.parametrize('K,rows', [(1, 6), (256, 4)])  # one group of rows; several
def test_append_writes_the_given_positions_only(K, rows, dtype):
  """Each DMA is executed at its wait, the latest moment that hardware may choose."""
  how = pltpu.InterpretParams(dma_execution_mode='on_wait', detect_races=True,
                              uninitialized_memory='nan')
  L, H, S = 2, 8, 64
  *cache, k, v = normal(0, (L, rows, K, S, H), (L, rows, K, S, H), (rows, K, H), (rows, K, H),
                        dtype=dtype)
  position = jnp.array([0, 15, S, S - 1, 16, 37])[:rows]
  wanted = list(map(np.array, cache))
  for array, new in zip(wanted, (k, v), strict=True):
    for b, p in enumerate(position.tolist()):
      if p < S:
        array[1, b, :, p] = new[b]
  append = jax.jit(functools.partial(kernels.tpu_append, interpret=how))
  found = append(Cache(*cache), k, v, jnp.int32(1), position)
  for array, want in zip((found.k, found.v), wanted, strict=True):
    assert array.dtype == dtype and np.asarray(array).tobytes() == want.tobytes()


def prefill_inputs(A, T, W, K, G, H, dtype=jnp.float32):
  """-> (q, k, v, layer, prefix), and the result in numpy."""
  q, k, v, *prefix = normal(0, (A, T, K, G, H), (A, T, K, H), (A, T, K, H), (2, K, W, H),
                            (2, K, W, H), dtype=dtype)
  length = jnp.array([0, W, W // 3, 1 % (W + 1)])[:A]
  prefix = Prefix(*prefix, length)
  prefix_mask = np.broadcast_to(np.arange(W) < np.asarray(length)[:, None, None], (A, T, W))
  own_mask = np.broadcast_to(np.tri(T, dtype=bool), (A, T, T))
  mask = np.concatenate([prefix_mask, own_mask], -1)
  wanted = attend(q, *(np.einsum('BTKH->BKTH', x) for x in (k, v)), 1, prefix, mask)
  return (q, k, v, jnp.int32(1), prefix), wanted


@pytest.mark.parametrize('A,T,W,K,G,H,dtype', [
    (4, 256, 384, 1, 2, 16, jnp.float32), (2, 128, 0, 2, 1, 16, jnp.float32),
    (3, 256, 128, 2, 2, 32, jnp.bfloat16)])
def test_tpu_prefill_is_causal_after_the_prefix(A, T, W, K, G, H, dtype):
  inputs, wanted = prefill_inputs(A, T, W, K, G, H, dtype)
  out = interpreted(kernels.tpu_prefill)(*inputs)
  assert out.dtype == dtype
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=CLOSE[dtype])


@pytest.mark.parametrize('W', [0, 5])
def test_the_arguments_of_cudnn_mean_the_same_to_xla(W, monkeypatch):
  """cuDNN does not run on a CPU."""
  plain, calls = jax.nn.dot_product_attention, []
  def by_xla(*arrays, implementation, **named):
    calls.append(implementation)
    return plain(*arrays, **named, implementation='xla')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  inputs, wanted = prefill_inputs(3, 7, W, 2, 3, 16)
  np.testing.assert_allclose(kernels.gpu_prefill(*inputs, window=None), wanted, atol=1e-5)
  assert calls == ['cudnn']


def lowered_for_cuda(f, inputs):
  device = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    return jax.jit(f).trace(*inputs).lower(lowering_platforms=('cuda',)).as_text()


def test_gpu_decode_lowers_to_one_triton_kernel():
  q, cache, prefix = decode_inputs(1, 8, 128, 256, 128, [1], L=1, dtype=jnp.bfloat16)
  length = jnp.ones(1, jnp.int32)
  decode = functools.partial(kernels.gpu_decode, window=None)
  text = lowered_for_cuda(decode, (q, cache, jnp.int32(0), length, prefix))
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 1 and 'gpu_decode' in text


def test_gpu_prefill_lowers_to_cudnn(monkeypatch):
  # cuDNN is not installed here.
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
  inputs, _ = prefill_inputs(2, 128, 128, 1, 2, 64, jnp.bfloat16)
  traced = jax.jit(functools.partial(kernels.gpu_prefill, window=None)).trace(*inputs)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @__cudnn$fmhaScaleBiasSoftmax') == 1


def test_a_format_changes_no_value():
  """A program takes arrays in the format that they have."""
  x = normal(0, (3, 8, 2, 4, 16))[0]
  placed, other = (jax.device_put(tree, kernels.tpu_formats(tree))['wqkv_DKCH'] for tree in (
      dict(wqkv_DKCH=x), dict(wqkv_DKCH=x[0])))
  assert placed.format.layout.major_to_minor == (0, 2, 3, 1, 4)
  assert other.format.layout.major_to_minor == (1, 2, 0, 3)
  out = jax.device_put(dict(wo_KGHD=x), kernels.tpu_formats(dict(wo_KGHD=x)))['wo_KGHD']
  assert out.format.layout.major_to_minor == (0, 2, 1, 3, 4)
  np.testing.assert_array_equal(out, x)
  np.testing.assert_array_equal(placed, x)
  taken = jax.jit(lambda x: x * 2).lower(placed).compile()
  assert taken.input_formats[0][0].layout.major_to_minor == (0, 2, 3, 1, 4)
  np.testing.assert_array_equal(taken(placed), x * 2)


def test_unsupported_sizes_are_refused():
  inputs, _ = prefill_inputs(1, 100, 128, 1, 1, 16)
  with pytest.raises(ValueError, match='the rows have 100 tokens and the prefix 128'):
    kernels.tpu_prefill(*inputs, window=None, interpret=True)
  q, cache, prefix = decode_inputs(1, 1, 16, 100, 0, [1])
  one = jnp.ones(1, jnp.int32)
  for decode in (kernels.tpu_decode, kernels.gpu_decode):
    with pytest.raises(ValueError, match='a multiple of 128 keys, not 100'):
      decode(q, cache, jnp.int32(0), one, prefix, window=None, interpret=True)
  with pytest.raises(ValueError, match='a multiple of 128, not 16'):
    kernels.tpu_append(cache, q[:, :, 0], q[:, :, 0], jnp.int32(0), one)
