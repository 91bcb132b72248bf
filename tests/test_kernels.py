"""The engine's kernels, interpreted on a CPU, against attention written out in numpy; and lowered for a GPU."""
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

CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
# (K, G, H, S, P): three blocks on TPU; two blocks or splits, as 70B is cut; no prefix
DECODE = [(4, 1, 128, 384, 128), (1, 8, 128, 1024, 256), (2, 3, 16, 256, 0)]
BOTH = pytest.mark.parametrize('decode', [kernels.tpu_decode, kernels.gpu_decode])


def normal(seed, *shapes, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def reference(q, k, v, prefix_k, prefix_v, visible):
  """q [B, T, K, G, H], k and v [B, K, S, H], prefix [K, P, H], visible [B, T, P + S] -> [B, T, K, G, H], float64."""
  q, k, v, prefix_k, prefix_v = (np.asarray(x, np.float64) for x in (q, k, v, prefix_k, prefix_v))
  k, v = (np.concatenate([np.broadcast_to(p, (len(x), *p.shape)), x], 2) for x, p in ((k, prefix_k), (v, prefix_v)))
  scores = np.where(visible[:, None, None], np.einsum('BTKGH,BKSH->BKGTS', q, k) * q.shape[-1] ** -0.5, -1e30)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum('BKGTS,BKSH->BTKGH', probs / probs.sum(-1, keepdims=True), v)


def decode_reference(q, k, v, layer, length, prefix_k, prefix_v, shared):
  visible = np.concatenate([np.arange(prefix_k.shape[1]) < np.asarray(shared)[:, None],
                            np.arange(k.shape[3]) < np.asarray(length)[:, None]], -1)
  return reference(q[:, None], k[layer], v[layer], prefix_k, prefix_v, visible[:, None])[:, 0]


@functools.cache
def interpreted(f):
  return jax.jit(functools.partial(f, interpret=True))


def decode_inputs(K, G, H, S, P, B, L=2, dtype=jnp.float32):
  return normal(0, (B, K, G, H), (L, B, K, S, H), (L, B, K, S, H), (K, P, H), (K, P, H), dtype=dtype)


@pytest.mark.parametrize('shape,dtype', [
    *((shape, jnp.float32) for shape in DECODE),
    *((shape, jnp.bfloat16) for shape in DECODE[1:])])  # XLA on CPU has no bf16 product for G = 1
@BOTH
def test_decode_is_attention_over_what_a_row_sees(decode, shape, dtype):
  *_, S, P = shape
  length = jnp.array([1, 128, S, S - 100, S // 2, 0, 129])  # a block's edge, and beyond; an idle row
  shared = jnp.array([0, P, P // 3, 0, P, P // 2, 1])
  q, k, v, *prefix = decode_inputs(*shape, B=len(length), dtype=dtype)
  out = interpreted(decode)(q, k, v, jnp.int32(1), length, *prefix, shared)
  assert out.dtype == dtype and out.shape == q.shape and jnp.isfinite(out).all()
  wanted = decode_reference(q, k, v, 1, length, *prefix, shared)
  busy = np.asarray(length) > 0
  np.testing.assert_allclose(np.asarray(out, np.float64)[busy], wanted[busy], atol=CLOSE[dtype])


@pytest.mark.parametrize('plain,dtype', [(attention.XLA, jnp.float32), (attention.CPU, jnp.float32),
                                         (attention.CPU, jnp.bfloat16)])
def test_plain_attention_is_the_same(plain, dtype):
  """What the kernels stand in for: decoding, the append, and prefilling."""
  length, shared = jnp.array([1, 64, 192, 100, 65, 0, 129, 7]), jnp.array([0, 33, 11, 0, 33, 16, 1, 33])
  q, k, v, *prefix = decode_inputs(2, 2, 16, 192, 33, B=len(length), dtype=dtype)
  out = jax.jit(plain.decode)(q, k, v, jnp.int32(1), length, *prefix, shared)
  busy = np.asarray(length) > 0
  wanted = decode_reference(q, k, v, 1, length, *prefix, shared)
  np.testing.assert_allclose(np.asarray(out, np.float64)[busy], wanted[busy], atol=CLOSE[dtype])
  written, _ = plain.append(k, v, q[:, :, 0], q[:, :, 0], jnp.int32(1), jnp.where(length, length - 1, 192))
  changed = (np.asarray(written) != np.asarray(k)).any(-1)
  assert np.argwhere(changed[:, :, 0]).tolist() == [[1, b, n - 1] for b, n in enumerate(length.tolist()) if n]
  inputs, wanted = prefill_inputs(4, 24, 33, 2, 2, 16, dtype)
  np.testing.assert_allclose(np.asarray(plain.prefill(*inputs), np.float64), wanted, atol=CLOSE[dtype])


@BOTH
def test_a_batch_of_idle_rows_is_finite(decode):
  q, k, v, *prefix = decode_inputs(1, 2, 16, 128, 128, B=2, L=1)
  none = jnp.zeros(2, jnp.int32)
  assert jnp.isfinite(interpreted(decode)(q, k, v, jnp.int32(0), none, *prefix, none)).all()


@BOTH
@hypothesis.settings(max_examples=10)
@hypothesis.given(rows=st.lists(st.tuples(st.integers(1, 256), st.integers(0, 128)), min_size=3, max_size=3),
                  layer=st.integers(0, 1))
def test_decode_at_any_lengths(decode, rows, layer):
  q, k, v, *prefix = decode_inputs(4, 2, 128, 256, 128, B=3)
  length, shared = jnp.array(rows).T
  out = interpreted(decode)(q, k, v, jnp.int32(layer), length, *prefix, shared)
  np.testing.assert_allclose(out, decode_reference(q, k, v, layer, length, *prefix, shared), atol=1e-5)


def test_decode_and_append_inside_a_shard_map():
  """Rows over data, heads over tensor."""
  q, k, v, *prefix = decode_inputs(4, 2, 16, 128, 128, B=4)
  (new,) = normal(1, (4, 4, 16))
  position, shared = jnp.array([0, 31, 127, 64]), jnp.array([0, 128, 7, 64])

  def step(q, k, v, new, position, prefix_k, prefix_v, shared):
    layer = jnp.int32(1)
    k, v = kernels.tpu_append(k, v, new, new, layer, position, interpret=True)
    return kernels.tpu_decode(q, k, v, layer, position + 1, prefix_k, prefix_v, shared, interpret=True)

  row, cache = PartitionSpec('data', 'tensor'), PartitionSpec(None, 'data', 'tensor')
  rows, heads = PartitionSpec('data'), PartitionSpec('tensor')
  out = jax.jit(jax.shard_map(
      step, mesh=make_mesh(2, 1, 2), in_specs=(row, cache, cache, row, rows, heads, heads, rows), out_specs=row,
      check_vma=False))(q, k, v, new, position, *prefix, shared)
  k, v = (x.at[1, jnp.arange(4), :, position].set(new) for x in (k, v))
  np.testing.assert_allclose(out, decode_reference(q, k, v, 1, position + 1, *prefix, shared), atol=1e-5)


@pytest.mark.parametrize('dtype', CLOSE)
@pytest.mark.parametrize('K,rows', [(1, 6), (256, 4)])  # one group of rows; several
def test_append_writes_its_places_and_no_other(K, rows, dtype):
  """A DMA happens when its wait comes, at the latest moment that the hardware may choose."""
  how = pltpu.InterpretParams(dma_execution_mode='on_wait', detect_races=True, uninitialized_memory='nan')
  L, H, S = 2, 8, 64
  cache_k, cache_v, k, v = normal(0, (L, rows, K, S, H), (L, rows, K, S, H), (rows, K, H), (rows, K, H), dtype=dtype)
  position = jnp.array([0, 15, S, S - 1, 16, 37])[:rows]
  wanted = [np.array(cache_k), np.array(cache_v)]
  for cache, new in zip(wanted, (k, v), strict=True):
    for b, p in enumerate(position.tolist()):
      if p < S:
        cache[1, b, :, p] = new[b]
  done = jax.jit(functools.partial(kernels.tpu_append, interpret=how))(cache_k, cache_v, k, v, jnp.int32(1), position)
  for cache, want in zip(done, wanted, strict=True):
    assert cache.dtype == dtype and np.asarray(cache).tobytes() == want.tobytes()


def prefill_inputs(B, T, P, K, G, H, dtype=jnp.float32):
  """q, k, v, prefix_k, prefix_v, shared; and what comes out."""
  q, k, v, *prefix = normal(0, (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (K, P, H), (K, P, H), dtype=dtype)
  shared = jnp.array([0, P, P // 3, 1 % (P + 1)])[:B]
  visible = np.concatenate([np.broadcast_to(np.arange(P) < np.asarray(shared)[:, None, None], (B, T, P)),
                            np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))], -1)
  wanted = reference(q, *(np.einsum('BTKH->BKTH', x) for x in (k, v)), *prefix, visible)
  return (q, k, v, *prefix, shared), wanted


@pytest.mark.parametrize('B,T,P,K,G,H,dtype', [
    (4, 256, 384, 1, 2, 16, jnp.float32), (2, 128, 0, 2, 1, 16, jnp.float32), (3, 256, 128, 2, 2, 32, jnp.bfloat16)])
def test_tpu_prefill_is_causal_after_the_prefix(B, T, P, K, G, H, dtype):
  inputs, wanted = prefill_inputs(B, T, P, K, G, H, dtype)
  out = interpreted(kernels.tpu_prefill)(*inputs)
  assert out.dtype == dtype
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=CLOSE[dtype])


@pytest.mark.parametrize('P', [0, 5])
def test_gpu_prefill_says_the_same_to_cudnn(P, monkeypatch):
  """cuDNN runs on no CPU; its arguments mean the same to XLA."""
  attend, seen = jax.nn.dot_product_attention, []
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *arrays, implementation, **named: (
      seen.append(implementation), attend(*arrays, **named, implementation='xla'))[1])
  inputs, wanted = prefill_inputs(3, 7, P, 2, 3, 16)
  np.testing.assert_allclose(kernels.gpu_prefill(*inputs), wanted, atol=1e-5)
  assert seen == ['cudnn']


def lowered_for_cuda(f, inputs):
  device = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    return jax.jit(f).trace(*inputs).lower(lowering_platforms=('cuda',)).as_text()


def test_gpu_decode_lowers_to_one_triton_kernel():
  q, k, v, *prefix = decode_inputs(1, 8, 128, 256, 128, B=1, L=1, dtype=jnp.bfloat16)
  one = jnp.ones(1, jnp.int32)
  text = lowered_for_cuda(kernels.gpu_decode, (q, k, v, jnp.int32(0), one, *prefix, one))
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 1 and 'gpu_decode' in text


def test_gpu_prefill_lowers_to_cudnn(monkeypatch):
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)  # none is here
  inputs, _ = prefill_inputs(2, 128, 128, 1, 2, 64, jnp.bfloat16)
  text = jax.jit(kernels.gpu_prefill).trace(*inputs).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @__cudnn$fmhaScaleBiasSoftmax') == 1


def test_a_format_changes_no_value():
  """And a program takes arrays in the format that they have."""
  x = normal(0, (3, 8, 2, 4, 16))[0]
  placed, other = (jax.device_put(tree, kernels.tpu_formats(tree))['wq_DKGH'] for tree in (
      dict(wq_DKGH=x), dict(wq_DKGH=x[0])))
  assert placed.format.layout.major_to_minor == (0, 2, 3, 1, 4) and other.format.layout.major_to_minor == (1, 2, 0, 3)
  np.testing.assert_array_equal(placed, x)
  taken = jax.jit(lambda x: x * 2).lower(placed).compile()
  assert taken.input_formats[0][0].layout.major_to_minor == (0, 2, 3, 1, 4)
  np.testing.assert_array_equal(taken(placed), x * 2)


def test_other_sizes_are_refused():
  inputs, _ = prefill_inputs(1, 100, 128, 1, 1, 16)
  with pytest.raises(ValueError, match='the rows are 100 and the prefix 128 tokens wide'):
    kernels.tpu_prefill(*inputs, interpret=True)
  q, k, v, *prefix = decode_inputs(1, 1, 16, 100, 0, B=1)
  one = jnp.ones(1, jnp.int32)
  for decode in (kernels.tpu_decode, kernels.gpu_decode):
    with pytest.raises(ValueError, match='multiples of 128 keys, not 100'):
      decode(q, k, v, jnp.int32(0), one, *prefix, one, interpret=True)
  with pytest.raises(ValueError, match='a multiple of 128 wide, not 16'):
    kernels.tpu_append(k, v, q[:, :, 0], q[:, :, 0], jnp.int32(0), one)
