"""Attention of the sampling engine on accelerators: prefill, decode, and the cache's append, for TPU and for GPU.

Every function sees local arrays: inside jax.shard_map over (B: data, K: tensor), with check_vma=False. Beside its
own keys, query row b sees the first shared[b] keys of one prefix, the same matrix for all rows.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu, triton
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp

from srlm_jax.models import attention, packed
from srlm_jax.models.config import Config

HIDDEN = -1e30  # finite: a row that sees nothing stays a number


def choose(platform: str, config: Config) -> attention.Kernels:
  """How a model of this shape attends on cpu, tpu or gpu; where its heads or numbers do not fit the kernels, by XLA."""
  if platform == 'cpu':
    return attention.CPU
  if platform == 'tpu' and config.H % 128 == 0:
    return attention.Kernels('splash attention and pallas', packed.tpu_train, tpu_prefill, tpu_decode, tpu_append,
                             width=128, group=256, block=512, unrolled=False, formats=tpu_formats)
  if platform in ('gpu', 'cuda') and config.H in (16, 32, 64, 128) and config.dtype == 'bfloat16':
    return attention.Kernels('cudnn and pallas', packed.gpu_train, gpu_prefill, gpu_decode, attention.append, width=16,
                             group=256, block=512, unrolled=True)  # a loop over layers would copy each out of the stack
  return attention.XLA


def to_train(platform: str, config: Config, remat: bool) -> attention.Kernels:
  """The same to train with. The layers stay stacked, but for a CPU, whose loop over them copies each layer's weights,
  gradients and activations; with `remat`, for it too: where no loop bounds them, XLA recomputes all layers at once."""
  return dataclasses.replace(choose(platform, config), unrolled=platform == 'cpu' and not remat)


def tpu_formats(params):
  """Parameters (or their shapes) with a sharding -> their formats: each head of wq_DKGH as one matrix [D, H], as the
  product wants it; as it comes, XLA copies all layers of it into that layout in every call."""
  def one(path, x):
    names = [getattr(key, 'key', getattr(key, 'name', '')) for key in path]
    if names[-1] != 'wq_DKGH' and names[-2:] != ['wq_DKGH', 'values']:  # of 8 bits
      return x.sharding
    *layers, D, K, G, H = range(x.ndim)
    return Format(Layout((*layers, K, G, D, H)), x.sharding)
  return jax.tree_util.tree_map_with_path(one, params)


def tpu_prefill(q, k, v, prefix_k, prefix_v, shared, *, interpret=False):
  """Causal attention of whole rows: q [B, T, K, G, H], k and v [B, T, K, H], prefix [K, P, H], shared [B] -> as q.

  T and P are multiples of 128, or it is a ValueError.
  """
  T, G, P = q.shape[1], q.shape[3], prefix_k.shape[1]
  if T % 128 or P % 128:
    raise ValueError(f'splash attention wants multiples of 128; the rows are {T} and the prefix {P} tokens wide')
  block = min(512, P + T)
  width = pl.cdiv(P + T, block) * block  # no query sees the keys that fill the last block, and most blocks skip it
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, width), offset=P)] * G)
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
      mask, interpret=interpret,
      block_sizes=splash_attention_kernel.BlockSizes(block_q=attention.divisor(T, 512), block_kv=block))
  q = jnp.einsum('BTKGH->BKGTH', q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash does not scale
  # the heads' transpose copies the keys anyway, so the prefix's copy into every row rides along
  k, v = (with_prefix(jnp.einsum('BTKH->BKTH', own), prefix, width) for own, prefix in ((k, prefix_k), (v, prefix_v)))
  key = jnp.arange(width)
  visible = (key >= P) | (key < shared[:, None])  # [B, P + T, filled up]; the mask hides what is later
  segments = splash_attention_kernel.SegmentIds(q=jnp.ones(q.shape[:1] + (T,), jnp.int32), kv=visible.astype(jnp.int32))
  out = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, segments)
  return jnp.einsum('BKGTH->BTKGH', out)


def tpu_decode(q, k, v, layer, length, prefix_k, prefix_v, shared, *, interpret=False):
  """One token a row against one layer of the stacked cache, read in place.

  q [B, K, G, H], k and v [L, B, K, S, H], layer [], length [B], prefix [K, P, H], shared [B] -> [B, K, G, H]. Row b
  sees s < length[b]; S and H are multiples of 128; a row of length 0 is idle, its output some finite number.
  """
  B, K, G, H = q.shape
  S = k.shape[3]
  check_width(H, interpret)
  # A grid step costs about as much as 512 KiB of DMA, and a row's last block is read whole: larger blocks waste bytes,
  # smaller ones steps.
  block = attention.divisor(S, max(128, 256 * 1024 // (K * H * k.dtype.itemsize)))
  steps = jnp.maximum(pl.cdiv(jnp.max(length), block), 1)  # a batch of short rows ends early

  def row(b, j, layer, length):
    return b, 0, 0, 0

  def keys(b, j, layer, length):
    last = jnp.maximum(pl.cdiv(length[b], block) - 1, 0)
    return layer[0], b, 0, jnp.minimum(j, last), 0  # an unchanged block is not fetched again

  out, lse = pl.pallas_call(
      functools.partial(tpu_decode_kernel, block=block),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(B, steps),
          in_specs=[pl.BlockSpec((None, K, G, H), row),
                    pl.BlockSpec((None, None, K, block, H), keys),
                    pl.BlockSpec((None, None, K, block, H), keys)],
          out_specs=[pl.BlockSpec((None, K, G, H), row), pl.BlockSpec((None, K, G, 1), row)],
          scratch_shapes=[pltpu.VMEM((K, G, 1), jnp.float32), pltpu.VMEM((K, G, 1), jnp.float32),
                          pltpu.VMEM((K, G, H), jnp.float32)]),
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, K, G, 1), jnp.float32)],
      # rows are parallel: v4 and v5p split them between a chip's two cores
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret, name='tpu_decode',
  )(layer.reshape(1), length, q, k, v)
  return with_prefix_part(q, out[None], lse[None, ..., 0], prefix_k, prefix_v, shared)


def tpu_decode_kernel(layer_ref, length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, max_ref, sum_ref, acc_ref, *,
                      block: int):
  """Folds one block of a row's keys into its running softmax: q [K, G, H], k and v [K, block, H]."""
  b, j = pl.program_id(0), pl.program_id(1)
  length = length_ref[b]

  @pl.when(j == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, HIDDEN)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  @pl.when(j * block < length)
  def _():
    v = v_ref[...]
    scores = jnp.einsum('KGH,KSH->KGS', q_ref[...], k_ref[...], preferred_element_type=jnp.float32)
    scores *= q_ref.shape[-1] ** -0.5
    position = j * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    scores = jnp.where(position < length, scores, HIDDEN)
    top = jnp.maximum(max_ref[...], scores.max(-1, keepdims=True))
    probs = jnp.exp(scores - top)
    decay = jnp.exp(max_ref[...] - top)
    max_ref[...] = top
    sum_ref[...] = decay * sum_ref[...] + probs.sum(-1, keepdims=True)
    acc_ref[...] = decay * acc_ref[...] + jnp.einsum(
        'KGS,KSH->KGH', probs.astype(v.dtype), v, preferred_element_type=jnp.float32)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    total = jnp.maximum(sum_ref[...], 1e-30)  # an idle row's sum is 0
    out_ref[...] = acc_ref[...] / total
    lse_ref[...] = max_ref[...] + jnp.log(total)


def tpu_append(cache_k, cache_v, k, v, layer, position, *, interpret=False):
  """Writes k and v [B, K, H] into caches [L, B, K, S, H] at [layer, b, :, position[b]], in place; S writes nothing.

  XLA scatters rows one after the other; here all of them are in flight at once.
  """
  B, K, H = k.shape
  check_width(H, interpret)
  rows = max(n for n in range(1, B + 1) if B % n == 0 and n * K <= max(512, K))  # their tiles fit in VMEM
  tile = 32 // cache_k.dtype.itemsize  # 8 sublanes of 32 bits: the least that a DMA can address
  new, cache = pl.BlockSpec((rows, K, 1, H), lambda i, *_: (i, 0, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)
  shape = jax.ShapeDtypeStruct(cache_k.shape, cache_k.dtype)
  return tuple(pl.pallas_call(
      functools.partial(tpu_append_kernel, rows=rows, tile=tile),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(B // rows,), in_specs=[new, new, cache, cache], out_specs=[cache, cache],
          scratch_shapes=[pltpu.VMEM((2, rows, K, tile, H), cache_k.dtype), pltpu.SemaphoreType.DMA((2,))]),
      out_shape=[shape, shape],
      input_output_aliases={4: 0, 5: 1},
      interpret=interpret, name='tpu_append',
  )(layer.reshape(1), position, *(x[:, :, None].astype(cache_k.dtype) for x in (k, v)), cache_k, cache_v))


def tpu_append_kernel(layer_ref, position_ref, k_ref, v_ref, _, __, cache_k_ref, cache_v_ref, tile_ref, semaphore, *,
                      rows: int, tile: int):
  """Reads the tiles around a group of rows' positions, puts the new key and value in, and writes them back."""
  first, S = pl.program_id(0) * rows, cache_k_ref.shape[3]

  def each(do):
    jax.lax.fori_loop(0, rows, lambda row, _: do(row), None)

  def start(row):
    inside = jnp.minimum(position_ref[first + row], S - 1)
    return pl.multiple_of(inside // tile * tile, tile)

  def copies(row, out):
    for i, cache in enumerate((cache_k_ref, cache_v_ref)):
      there, here = cache.at[layer_ref[0], first + row, :, pl.ds(start(row), tile), :], tile_ref.at[i, row]
      yield pltpu.make_async_copy(*((here, there) if out else (there, here)), semaphore.at[int(out)])

  def begin(row, out):
    for copy in copies(row, out):
      copy.start()

  def end(row, out):
    for copy in copies(row, out):
      copy.wait()

  def modify(row):
    for i, new in enumerate((k_ref, v_ref)):
      old = tile_ref[i, row]  # [K, tile, H]
      at = start(row) + jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
      tile_ref[i, row] = jnp.where(at == position_ref[first + row], new[row], old)  # no place is S: all stays
    begin(row, out=True)

  each(functools.partial(begin, out=False))
  each(functools.partial(end, out=False))  # the semaphore counts bytes, not rows: only all of them are sure to be here
  each(modify)
  each(functools.partial(end, out=True))


def gpu_prefill(q, k, v, prefix_k, prefix_v, shared):
  """As tpu_prefill, by cuDNN: float16 or bfloat16, any T and P, H a multiple of 8 up to 128."""
  B, T, K, G, H = q.shape
  P = prefix_k.shape[1]
  k, v = (jnp.concatenate([jnp.broadcast_to(jnp.einsum('KPH->PKH', prefix), (B, P, K, H)).astype(own.dtype), own], 1)
          for own, prefix in ((k, prefix_k), (v, prefix_v)))
  key = jnp.arange(P + T)
  visible = jnp.where(key < P, key < shared[:, None, None], key - P <= jnp.arange(T)[:, None])  # [B, T, P + T]
  out = jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, mask=visible[:, None], implementation='cudnn')
  return out.reshape(q.shape)


def gpu_decode(q, k, v, layer, length, prefix_k, prefix_v, shared, *, interpret=False):
  """As tpu_decode, by Triton; H is a power of two, at least 16."""
  B, K, G, H = q.shape
  L, S = k.shape[0], k.shape[3]
  split = attention.divisor(S, 512)  # one row alone must occupy many processors
  width = max(16, pl.next_power_of_2(G))  # Triton's least matrix
  padded = jnp.pad(q, ((0, 0), (0, 0), (0, width - G), (0, 0)))
  keys = pl.BlockSpec((L, None, None, split, H), lambda b, h, j: (0, b, h, j, 0))
  out, lse = pl.pallas_call(
      functools.partial(gpu_decode_kernel, block=64),
      grid=(B, K, S // split),
      in_specs=[pl.BlockSpec((1,), lambda b, h, j: (0,)), pl.BlockSpec((1,), lambda b, h, j: (b,)),
                pl.BlockSpec((None, None, width, H), lambda b, h, j: (b, h, 0, 0)), keys, keys],
      out_specs=[pl.BlockSpec((None, None, None, width, H), lambda b, h, j: (j, b, h, 0, 0)),
                 pl.BlockSpec((None, None, None, width), lambda b, h, j: (j, b, h, 0))],
      out_shape=[jax.ShapeDtypeStruct((S // split, B, K, width, H), jnp.float32),
                 jax.ShapeDtypeStruct((S // split, B, K, width), jnp.float32)],
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret, name='gpu_decode',
  )(layer.reshape(1), length, padded, k, v)
  return with_prefix_part(q, out[..., :G, :], lse[..., :G], prefix_k, prefix_v, shared)


def gpu_decode_kernel(layer_ref, length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, block: int):
  """The softmax over one split of one head's keys: q [G, H], k and v [L, split, H]."""
  layer, q = layer_ref[0], q_ref[...]
  here = jnp.clip(length_ref[0] - pl.program_id(2) * k_ref.shape[1], 0, k_ref.shape[1])  # visible keys of this split

  def fold(i, carry):
    top, total, acc = carry
    k, v = k_ref[layer, pl.ds(i * block, block), :], v_ref[layer, pl.ds(i * block, block), :]
    scores = triton.dot(q, k.T) * q.shape[-1] ** -0.5  # [G, block]
    scores = jnp.where((i * block + jnp.arange(block) < here)[None], scores, HIDDEN)
    above = jnp.maximum(top, scores.max(-1))
    probs, decay = jnp.exp(scores - above[:, None]), jnp.exp(top - above)
    return above, decay * total + probs.sum(-1), decay[:, None] * acc + triton.dot(probs.astype(v.dtype), v)

  top, total, acc = jax.lax.fori_loop(0, pl.cdiv(here, block), fold, (
      jnp.full(q.shape[:1], HIDDEN, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32), jnp.zeros(q.shape, jnp.float32)))
  total = jnp.maximum(total, 1e-30)  # a split beyond the row's length has a sum of 0
  out_ref[...] = acc / total[:, None]
  lse_ref[...] = top + jnp.log(total)


def with_prefix_part(q, out, lse, prefix_k, prefix_v, shared):
  """Adds what q [B, K, G, H] sees of the prefix [K, P, H] to parts out [N, B, K, G, H] and lse [N, B, K, G].

  By XLA, not in the kernels: as one matrix product over all rows, the prefix is read once, not once a row, and the
  product is B * G rows high rather than G.
  """
  P = prefix_k.shape[1]
  if P:
    scores = jnp.einsum('BKGH,KPH->BKGP', q, prefix_k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.arange(P) < shared[:, None, None, None], scores, HIDDEN)
    probs = jax.nn.softmax(scores, axis=-1).astype(prefix_v.dtype)
    part = jnp.einsum('BKGP,KPH->BKGH', probs, prefix_v, preferred_element_type=jnp.float32)
    out = jnp.concatenate([out, part[None]])
    lse = jnp.concatenate([lse, jax.nn.logsumexp(scores, axis=-1)[None]])
  return merge(out, lse).astype(q.dtype)


def merge(out, lse):
  """Attention over N sets of keys from each set's own: out [N, ..., H], log of its sum lse [N, ...] -> [..., H]."""
  weight = jax.nn.softmax(lse, axis=0)
  return jnp.sum(weight[..., None] * out, axis=0)


def with_prefix(own, prefix, width: int):
  """own [B, K, T, H], prefix [K, P, H] -> [B, K, P + T filled up with zeros to `width`, H]."""
  prefix = jnp.broadcast_to(prefix.astype(own.dtype), own.shape[:1] + prefix.shape)
  keys = jnp.concatenate([prefix, own], axis=2)
  return jnp.pad(keys, ((0, 0), (0, 0), (0, width - keys.shape[2]), (0, 0)))


def check_width(H: int, interpret):
  """A ValueError for heads that fill no TPU lanes: XLA would pad, thus copy, the whole cache for every call."""
  if H % 128 and not interpret:
    raise ValueError(f'the TPU kernels read the cache in place if heads are a multiple of 128 wide, not {H}')
