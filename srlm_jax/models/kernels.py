"""Attention kernels for TPU and GPU, and the choice of kernels for a platform.

Every kernel sees local arrays: it runs inside jax.shard_map over (B: data and fsdp, K: tensor),
with check_vma=False. The signatures are those of the functions in `models/attention.py`.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu, triton
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp

from srlm_jax.models import attention, cpu, packed
from srlm_jax.models.attention import Cache, Prefix
from srlm_jax.models.config import Config

MASKED = -1e30  # finite, so that a fully masked row is not NaN


def choose(platform: str, config: Config) -> attention.Kernels:
  """The sampling kernels of a platform: cpu, tpu or gpu.

  Plain XLA where the kernels do not support the model's head width or dtype.
  """
  if platform == 'cpu':
    if not cpu.supports(config):
      return attention.CPU
    return dataclasses.replace(attention.CPU, name='c++ and xla', decode=cpu.decode,
                               append=cpu.append)
  if platform == 'tpu' and config.H % 128 == 0:
    return attention.Kernels(
        'splash attention and pallas', packed.tpu_packed, tpu_prefill, tpu_decode, tpu_append,
        width_multiple=128, size_multiple=512, prefill_tokens=256, unrolled=False, fused=True,
        formats=tpu_formats)
  widths = 16, 32, 64, 128
  if platform in ('gpu', 'cuda') and config.H in widths and config.dtype == 'bfloat16':
    # Unrolled, because a loop over stacked layers would copy each layer out of the stack.
    return attention.Kernels(
        'cudnn and pallas', packed.gpu_packed, gpu_prefill, gpu_decode, attention.append,
        width_multiple=16, size_multiple=512, prefill_tokens=256, unrolled=True)
  return attention.XLA


def for_training(platform: str, config: Config, remat: str) -> attention.Kernels:
  """The training kernels of a platform.

  Layers stay stacked, except on a CPU, where the loop over them would copy each layer's weights,
  gradients and activations. Where `remat` is not none they stay stacked on a CPU too: without a
  loop, XLA recomputes all layers at once.
  """
  if platform == 'cpu':
    return dataclasses.replace(attention.CPU, unrolled=remat == 'none')
  return dataclasses.replace(choose(platform, config), unrolled=False, fused=False)


def tpu_formats(params):
  """Parameters (or their shapes) with shardings -> the formats in which the TPU kernels want them.

  Each head of wqkv_DKCH is stored as one matrix [D, H], and wo_KGHD by query head, then key head:
  the layouts that the matrix products read. From the default layout, XLA would copy these weights
  of all layers in every call.
  """
  def one(path, x):
    names = [getattr(key, 'key', getattr(key, 'name', '')) for key in path]
    name = names[-2] if names[-1] == 'values' else names[-1]  # values of an Int8
    *layers, a, b, c, d = range(max(x.ndim, 4))
    order = dict(wqkv_DKCH=(b, c, a, d), wo_KGHD=(b, a, c, d)).get(name)
    return Format(Layout((*layers, *order)), x.sharding) if order else x.sharding
  return jax.tree_util.tree_map_with_path(one, params)


def tpu_prefill(q, k, v, layer, prefix: Prefix, *, window: int | None, interpret=False):
  """As `attention.prefill`, by splash attention; ValueError unless T and W are multiples of 128.

  A window counts positions, and a row may use less than the whole prefix: its part of the prefix
  is moved next to its own keys, so that keys are as far apart in the row as in position.
  """
  T, G, W = q.shape[1], q.shape[3], prefix.k.shape[2]
  if T % 128 or W % 128:
    raise ValueError(f'splash attention needs multiples of 128; the rows have {T} tokens and the '
                     f'prefix {W}')
  block = min(512, W + T)
  # The causal mask hides the keys that pad the last block; fully visible blocks need no mask.
  width = pl.cdiv(W + T, block) * block
  if window is None:
    mask = splash_attention_mask.CausalMask((T, width), offset=W)
  else:
    mask = splash_attention_mask.LocalMask((T, width), (window - 1, 0), offset=W)
  sizes = splash_attention_kernel.BlockSizes(block_q=attention.divisor(T, 512), block_kv=block)
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
      splash_attention_mask.MultiHeadMask([mask] * G), interpret=interpret, block_sizes=sizes)
  scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5  # splash does not scale
  q = jnp.einsum('BTKGH->BKGTH', scaled).astype(q.dtype)
  # The transpose of the heads copies the keys anyway; prepending the prefix therefore adds no copy.
  moved = None if window is None else prefix.length
  k, v = (with_prefix(jnp.einsum('BTKH->BKTH', own), prefix_kv[layer], width, moved)
          for own, prefix_kv in ((k, prefix.k), (v, prefix.v)))
  key = jnp.arange(width)  # visible [B, width]; the mask above does the rest
  if window is None:
    visible = (key >= W) | (key < prefix.length[:, None])
  else:
    visible = key >= W - prefix.length[:, None]
  segments = splash_attention_kernel.SegmentIds(
      q=jnp.ones(q.shape[:1] + (T,), jnp.int32), kv=visible.astype(jnp.int32))
  out = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, segments)
  return jnp.einsum('BKGTH->BTKGH', out)


def tpu_decode(q, cache: Cache, layer, length, prefix: Prefix, *, window: int | None,
               interpret=False):
  """As `attention.decode`, in Pallas; reads the layer of the stacked cache in place.

  S, W and H are multiples of 128. A row of length 0 is idle, and its output is some finite number.
  """
  B, K, G, H = q.shape
  S, W = cache.k.shape[3], prefix.k.shape[2]
  check_width(H, interpret)
  itemsize = cache.k.dtype.itemsize
  # A grid step costs about as much as 512 KiB of DMA, and the last block of a row is read whole:
  # larger blocks read more unused keys, smaller ones take more steps.
  most = max(128, 256 * 1024 // (K * H * itemsize))
  block, prefix_block = attention.divisor(S, most), attention.divisor(W, most) if W else 0
  prefix_steps = W // prefix_block if W else 0
  # A batch of short rows, or of a short window, ends early.
  if window is None:
    place, steps, shared_steps = layer.reshape(1), pl.cdiv(jnp.max(length), block), prefix_steps
  else:
    start = attention.first_block(prefix, length, window, prefix_block) if W else jnp.int32(0)
    place, shared_steps = jnp.stack([layer, start]), prefix_steps - start
    steps = jnp.max(pl.cdiv(length, block) - visible_block(0, length, window, block))
  steps = jnp.maximum(steps, 1)
  # Rows of a group: their state fits into VMEM, and there are groups for both cores of v4 and v5p.
  rows = max(n for n in range(1, max(B // 2, 1) + 1)
             if B % n == 0 and (n == 1 or n * K * G <= 1024))

  def group(g, r, j, *_):
    return g, 0, 0, 0

  def keys(g, r, j, place, length, _):
    b = g * rows + jnp.maximum(r - 1, 0)
    last = jnp.maximum(pl.cdiv(length[b], block) - 1, 0)
    first, here = (visible_block(i, length[b], window, block) for i in (0, j))
    # An unchanged block is not fetched again.
    return place[0], b, 0, jnp.where(r == 0, first, jnp.minimum(here, last)), 0

  def prefix_keys(g, r, j, place, *_):
    here = j if window is None else j + place[1]
    return place[0], 0, jnp.where(r == 0, jnp.minimum(here, prefix_steps - 1), prefix_steps - 1), 0

  heads = pl.BlockSpec((rows, K, G, H), group)
  own = pl.BlockSpec((None, None, K, block, H), keys)
  shared = pl.BlockSpec((None, K, prefix_block, H), prefix_keys)
  state = [pltpu.VMEM((rows, K, G, width), jnp.float32) for width in (1, 1, H)]
  bounds = [pltpu.VMEM((rows, G, 1), jnp.int32)] * (1 if window is None else 2)
  return pl.pallas_call(
      functools.partial(tpu_decode_kernel, block=block, prefix_steps=prefix_steps, window=window),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(B // rows, 1 + rows, jnp.maximum(steps, shared_steps)),
          in_specs=[heads, own, own] + [shared, shared] * bool(W),
          out_specs=heads,
          scratch_shapes=[*state, *bounds]),
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
      interpret=interpret, name='tpu_decode',
  )(place, length, prefix.length, q, cache.k, cache.v,
    *((prefix.k, prefix.v) if W else ()))


def visible_block(j, length, window: int | None, block: int):
  """The j-th of the blocks of keys that the last of `length` tokens sees."""
  return j if window is None else j + jnp.maximum(length - window, 0) // block


def tpu_decode_kernel(place_ref, length_ref, prefix_length_ref, q_ref, k_ref, v_ref, *refs,
                      block: int, prefix_steps: int, window: int | None):
  """The online softmax of a group of rows, q [rows, K, G, H].

  First over the prefix, k and v [K, W, H] block by block, with one product for all rows; then row
  by row over the row's own keys, k and v [K, block, H]. `place_ref`: the layer and, with a window,
  the first block of the prefix that any row sees.
  """
  start_ref = None
  if window is not None:
    *refs, start_ref = refs
  *shared, out_ref, max_ref, sum_ref, acc_ref, limit_ref = refs
  rows, K, G, H = q_ref.shape
  r, j = pl.program_id(1), pl.program_id(2)
  first = pl.program_id(0) * rows

  @pl.when((r == 0) & (j == 0))
  def _():
    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def limit(i, _):
      limit_ref[i] = jnp.full((G, 1), prefix_length_ref[first + i])
      if window is not None:
        start = prefix_length_ref[first + i] + length_ref[first + i] - window
        start_ref[i] = jnp.full((G, 1), start)
    jax.lax.fori_loop(0, rows, limit, None)

  def add_prefix(prefix_k_ref, prefix_v_ref):
    here = j if window is None else j + place_ref[1]
    for head in range(K):
      k, v = prefix_k_ref[head], prefix_v_ref[head]  # [W, H]
      # In float32, because its tiles have 8 rows: with 8 query heads this moves no data.
      q = q_ref[:, head].astype(jnp.float32).reshape(rows * G, H).astype(q_ref.dtype)
      limit, start = (ref if ref is None else ref[...].reshape(rows * G, 1) - here * k.shape[0]
                      for ref in (limit_ref, start_ref))
      state = [ref.at[:, head] for ref in (max_ref, sum_ref, acc_ref)]
      flat = [ref[...].reshape(rows * G, -1) for ref in state]
      for ref, new in zip(state, softmax_step(q, k, v, start, limit, *flat), strict=True):
        ref[...] = new.reshape(ref.shape)

  if shared:
    steps = prefix_steps if window is None else prefix_steps - place_ref[1]
    pl.when((r == 0) & (j < steps))(functools.partial(add_prefix, *shared))

  length = length_ref[first + jnp.maximum(r - 1, 0)]
  here = visible_block(j, length, window, block)

  @pl.when((r > 0) & (here * block < length))
  def _():
    row = r - 1
    limit, start = length_ref[first + row] - here * block, None
    if window is not None:
      start = limit - window
    for head in range(K):
      state = [ref.at[row, head] for ref in (max_ref, sum_ref, acc_ref)]
      new = softmax_step(q_ref[row, head], k_ref[head], v_ref[head], start, limit,
                         *(ref[...] for ref in state))
      for ref, value in zip(state, new, strict=True):
        ref[...] = value

  @pl.when((r == pl.num_programs(1) - 1) & (j == pl.num_programs(2) - 1))
  def _():
    # The sum of an idle row is 0.
    out_ref[...] = (acc_ref[...] / jnp.maximum(sum_ref[...], 1e-30)).astype(out_ref.dtype)


def softmax_step(q, k, v, start, limit, top, total, acc):
  """Adds keys to an online softmax; a query sees those from `start` (None: 0) to `limit`.

  q [N, H], k and v [S, H], start and limit [] or [N, 1], top and total [N, 1], acc [N, H].
  """
  scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  scores *= q.shape[-1] ** -0.5
  key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  visible = key < limit if start is None else (start <= key) & (key < limit)
  scores = jnp.where(visible, scores, MASKED)
  above = jnp.maximum(top, scores.max(-1, keepdims=True))
  probs, decay = jnp.exp(scores - above), jnp.exp(top - above)
  new = jnp.dot(probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return above, decay * total + probs.sum(-1, keepdims=True), decay * acc + new


def tpu_append(cache: Cache, k, v, layer, position, *, interpret=False) -> Cache:
  """As `attention.append`, in Pallas, in place.

  XLA scatters one row after the other; here the DMAs of all rows are in flight at once.
  """
  B, K, H = k.shape
  check_width(H, interpret)
  dtype = cache.k.dtype
  # The tiles of this many rows fit into VMEM.
  rows = max(n for n in range(1, B + 1) if B % n == 0 and n * K <= max(512, K))
  tile = 32 // dtype.itemsize  # 8 sublanes of 32 bits, the smallest unit that a DMA can address
  new = pl.BlockSpec((rows, K, 1, H), lambda i, *_: (i, 0, 0, 0))
  whole = pl.BlockSpec(memory_space=pl.ANY)
  shape = jax.ShapeDtypeStruct(cache.k.shape, dtype)
  return Cache(*pl.pallas_call(
      functools.partial(tpu_append_kernel, rows=rows, tile=tile),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(B // rows,), in_specs=[new, new, whole, whole],
          out_specs=[whole, whole],
          scratch_shapes=[pltpu.VMEM((2, rows, K, tile, H), dtype),
                          pltpu.SemaphoreType.DMA((2,))]),
      out_shape=[shape, shape],
      input_output_aliases={4: 0, 5: 1},
      interpret=interpret, name='tpu_append',
  )(layer.reshape(1), position, *(x[:, :, None].astype(dtype) for x in (k, v)), cache.k, cache.v))


def tpu_append_kernel(layer_ref, position_ref, k_ref, v_ref, _, __, cache_k_ref, cache_v_ref,
                      tile_ref, semaphore, *, rows: int, tile: int):
  """Reads the tile around each row's position, inserts the new key and value, writes it back."""
  first, S = pl.program_id(0) * rows, cache_k_ref.shape[3]

  def each(do):
    jax.lax.fori_loop(0, rows, lambda row, _: do(row), None)

  def start(row):
    inside = jnp.minimum(position_ref[first + row], S - 1)
    return pl.multiple_of(inside // tile * tile, tile)

  def copies(row, out):
    for i, cache in enumerate((cache_k_ref, cache_v_ref)):
      hbm = cache.at[layer_ref[0], first + row, :, pl.ds(start(row), tile), :]
      vmem = tile_ref.at[i, row]
      yield pltpu.make_async_copy(*((vmem, hbm) if out else (hbm, vmem)), semaphore.at[int(out)])

  def begin(row, out):
    for copy in copies(row, out):
      copy.start()

  def end(row, out):
    for copy in copies(row, out):
      copy.wait()

  def modify(row):
    for i, new in enumerate((k_ref, v_ref)):
      old = tile_ref[i, row]  # [K, tile, H]
      position = start(row) + jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
      # A position of S matches nothing, and the tile stays as it is.
      tile_ref[i, row] = jnp.where(position == position_ref[first + row], new[row], old)
    begin(row, out=True)

  each(functools.partial(begin, out=False))
  # The semaphore counts bytes, not rows: a single row's arrival cannot be detected.
  each(functools.partial(end, out=False))
  each(modify)
  each(functools.partial(end, out=True))


def gpu_prefill(q, k, v, layer, prefix: Prefix, *, window: int | None):
  """As `attention.prefill`, by cuDNN: float16 or bfloat16, H a multiple of 8 and at most 128."""
  B, T, K, G, H = q.shape
  W = prefix.k.shape[2]
  prefix_kv = (jnp.broadcast_to(jnp.einsum('KWH->WKH', x[layer]), (B, W, K, H))
               for x in (prefix.k, prefix.v))
  k, v = (jnp.concatenate([x.astype(own.dtype), own], 1)
          for x, own in zip(prefix_kv, (k, v), strict=True))
  key = jnp.arange(W + T)
  causal = key - W <= jnp.arange(T)[:, None]
  mask = jnp.where(key < W, key < prefix.length[:, None, None], causal)  # [B, T, W + T]
  if window is not None:
    start = jnp.arange(T)[:, None] - window + 1  # the first visible key, if it is the row's own
    mask &= key >= jnp.where(key < W, prefix.length[:, None, None] + start, W + start)
  out = jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, mask=mask[:, None],
                                     implementation='cudnn')
  return out.reshape(q.shape)


def gpu_decode(q, cache: Cache, layer, length, prefix: Prefix, *, window: int | None,
               interpret=False):
  """As `attention.decode`, in Triton; H is a power of two, at least 16."""
  B, K, G, H = q.shape
  L, S = cache.k.shape[0], cache.k.shape[3]
  split = attention.divisor(S, 512)  # even a single row must occupy many multiprocessors
  width = max(16, pl.next_power_of_2(G))  # the smallest matrix of a Triton product has 16 rows
  padded = jnp.pad(q, ((0, 0), (0, 0), (0, width - G), (0, 0)))
  keys = pl.BlockSpec((L, None, None, split, H), lambda b, h, j: (0, b, h, j, 0))
  out, lse = pl.pallas_call(
      functools.partial(gpu_decode_kernel, block=64, window=window),
      grid=(B, K, S // split),
      in_specs=[pl.BlockSpec((1,), lambda b, h, j: (0,)), pl.BlockSpec((1,), lambda b, h, j: (b,)),
                pl.BlockSpec((None, None, width, H), lambda b, h, j: (b, h, 0, 0)), keys, keys],
      out_specs=[pl.BlockSpec((None, None, None, width, H), lambda b, h, j: (j, b, h, 0, 0)),
                 pl.BlockSpec((None, None, None, width), lambda b, h, j: (j, b, h, 0))],
      out_shape=[jax.ShapeDtypeStruct((S // split, B, K, width, H), jnp.float32),
                 jax.ShapeDtypeStruct((S // split, B, K, width), jnp.float32)],
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret, name='gpu_decode',
  )(layer.reshape(1), length, padded, cache.k, cache.v)
  start = None if window is None else prefix.length + length - window
  return add_prefix(q, out[..., :G, :], lse[..., :G], layer, prefix, start)


def gpu_decode_kernel(layer_ref, length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, block: int,
                      window: int | None):
  """The softmax over one split of the keys of one head: q [G, H], k and v [L, split, H]."""
  layer, q, split = layer_ref[0], q_ref[...], k_ref.shape[1]
  own = length_ref[0] - pl.program_id(2) * split
  # The visible keys of this split: from `start` to `here`.
  here = jnp.clip(own, 0, split)
  start = 0 if window is None else jnp.clip(own - window, 0, split)

  def add(i, carry):
    top, total, acc = carry
    k, v = (ref[layer, pl.ds(i * block, block), :] for ref in (k_ref, v_ref))
    scores = triton.dot(q, k.T) * q.shape[-1] ** -0.5  # [G, block]
    key = i * block + jnp.arange(block)
    visible = key < here if window is None else (start <= key) & (key < here)
    scores = jnp.where(visible[None], scores, MASKED)
    above = jnp.maximum(top, scores.max(-1))
    probs, decay = jnp.exp(scores - above[:, None]), jnp.exp(top - above)
    total = decay * total + probs.sum(-1)
    return above, total, decay[:, None] * acc + triton.dot(probs.astype(v.dtype), v)

  rows, blocks = q.shape[:1], pl.cdiv(here, block)
  empty = (jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32),
           jnp.zeros(q.shape, jnp.float32))
  top, total, acc = jax.lax.fori_loop(start // block, blocks, add, empty)
  total = jnp.maximum(total, 1e-30)  # the sum of a split without visible keys is 0
  out_ref[...] = acc / total[:, None]
  lse_ref[...] = top + jnp.log(total)


def add_prefix(q, out, lse, layer, prefix: Prefix, start):
  """Merges attention over the prefix into q [B, K, G, H]'s partial results -> [B, K, G, H].

  Partial results over disjoint sets of keys are stacked along the first dimension:
  out [parts, B, K, G, H] and the log of the softmax's denominator, lse [parts, B, K, G].
  The prefix is one XLA matrix product over all rows: it is read once, not once per row, and the
  product has B * G rows instead of G. Row b sees its tokens from start[b] (None: 0).
  """
  W = prefix.k.shape[2]
  if W:
    k, v = prefix.k[layer], prefix.v[layer]
    scores = jnp.einsum('BKGH,KWH->BKGW', q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    visible = jnp.arange(W) < prefix.length[:, None, None, None]
    if start is not None:
      visible &= jnp.arange(W) >= start[:, None, None, None]
    scores = jnp.where(visible, scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    part = jnp.einsum('BKGW,KWH->BKGH', probs, v, preferred_element_type=jnp.float32)
    out = jnp.concatenate([out, part[None]])
    lse = jnp.concatenate([lse, jax.nn.logsumexp(scores, axis=-1)[None]])
  return merge(out, lse).astype(q.dtype)


def merge(out, lse):
  """Partial results out [parts, ..., H], lse [parts, ...] -> attention over all keys [..., H]."""
  weight = jax.nn.softmax(lse, axis=0)
  return jnp.sum(weight[..., None] * out, axis=0)


def with_prefix(own, prefix_kv, width: int, length=None):
  """own [B, K, T, H], prefix_kv [K, W, H] -> [B, K, width, H]: prefix, own, and zeros.

  With `length` [B], the first length[b] tokens of the prefix are the last ones before row b's own.
  """
  prefix_kv = prefix_kv.astype(own.dtype)
  if length is None or not prefix_kv.shape[1]:
    prefix_kv = jnp.broadcast_to(prefix_kv, own.shape[:1] + prefix_kv.shape)
  else:
    prefix_kv = jax.vmap(lambda tokens: jnp.roll(prefix_kv, -tokens, axis=1))(length)
  keys = jnp.concatenate([prefix_kv, own], axis=2)
  return jnp.pad(keys, ((0, 0), (0, 0), (0, width - keys.shape[2]), (0, 0)))


def check_width(H: int, interpret):
  """ValueError for heads that do not fill the TPU's lanes.

  XLA would pad, and therefore copy, the whole cache in every call.
  """
  if H % 128 and not interpret:
    raise ValueError(f'the TPU kernels read the cache in place only if the head width is a '
                     f'multiple of 128, not {H}')
