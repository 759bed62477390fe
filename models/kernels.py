"""Attention whose memory grows with the sequence alone: in plain JAX, by cuDNN, by splash.

Each function takes the queries, keys and values of whole rows and the position of every token in
its document. In a row of packed documents that is all there is to know: a query sees the keys from
the start of its document, or of its window, to itself.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import sharding
from runtime.errors import UserError

Name = Literal["auto", "dense", "blockwise", "cudnn", "splash"]
Heads = Float[Array, "batch seq heads head_dim"]
KVHeads = Float[Array, "batch seq kv_heads head_dim"]
Position = Int[Array, "#batch seq"]

# Shorter rows are attended to faster by whole products, where their S x S scores are small.
DENSE_BELOW = {"cpu": 256}
BLOCKS = {"cpu": 128}  # tokens; on accelerators a block is one large product
HOPPER = re.compile(r"\b(GH|GB|H|B)[1-3]0?0\b|\bH20\b|\bH800\b")  # or later
# How many documents of a row cuDNN keeps apart. It holds statistics of a whole row for each.
DOCUMENTS = 32


def choose(dtype: jnp.dtype, head_dim: int, seq: int, alibi: bool) -> tuple[str, str]:
    """What attends on the devices of the mesh in scope, and why it is not their own kernel."""
    head_dim += 8 if alibi else 0  # as `with_alibi`
    (platform, kind), name, reason = sharding.device(), sharding.in_scope.value.attention, ""
    if name in ("cudnn", "splash") and platform != {"cudnn": "gpu", "splash": "tpu"}[name]:
        raise UserError(f"--attention {name}: these devices are {kind}, and it does not run there")
    if name in ("auto", "cudnn") and platform == "gpu":
        if dtype != jnp.bfloat16:
            reason = f"cuDNN computes in bfloat16, not {jnp.dtype(dtype).name}"
        elif head_dim % 8 or head_dim > 256:
            reason = f"head_dim {head_dim} is no multiple of 8 up to 256"
        elif not HOPPER.search(kind):
            reason = f"cuDNN keeps documents apart from Hopper on, not on {kind}"
        elif sharding.in_scope.value.deterministic:
            reason = "cuDNN adds in one order only with memory for every document of a row"
        else:
            return "cudnn", ""
    elif name in ("auto", "splash") and platform == "tpu":
        return "splash", ""
    if name in ("dense", "blockwise"):
        return name, ""
    return "dense" if seq < DENSE_BELOW.get(platform, 0) else "blockwise", reason


def on_each_device(
    kernel: Callable, query: Heads, key: KVHeads, value: KVHeads, position: Position, slopes
) -> Heads:
    """`kernel` of what each device holds: rows lie over data and fsdp, heads over tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, position, slopes)
    rows, heads = (
        axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
        for axes, size in zip(
            sharding.claims(["batch", "heads"], mesh), query.shape[::2], strict=True
        )
    )
    if heads and key.shape[2] % math.prod(mesh.shape[axis] for axis in heads):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    split = PartitionSpec(rows, None, heads)
    of_rows = PartitionSpec(rows if position.shape[0] > 1 else None)
    return jax.shard_map(
        kernel,
        in_specs=(split, split, split, of_rows, PartitionSpec(heads)),
        out_specs=split,
        check_vma=False,
    )(query, key, value, position, slopes)


# ---- plain JAX ---------------------------------------------------------------------------


def blockwise(
    query: Heads, key: KVHeads, value: KVHeads, position: Position, slopes=None, *, window=None
) -> Heads:
    """Exact attention by blocks of queries and keys; what no query of a block sees is skipped.

    `window` may be an array: how many keys up to itself a query sees.
    """
    (batch, seq, heads, head_dim), groups = query.shape, key.shape[2]
    block = min(BLOCKS.get(sharding.device()[0], 512), seq)
    padded = -(-seq // block) * block
    index = jnp.arange(seq)
    first_key = index - position
    if window is not None:
        first_key = jnp.maximum(first_key, index - window + 1)
    # Padding sees itself: it stands behind all others, where causality hides it from them.
    first_key = jnp.pad(first_key, ((0, 0), (0, padded - seq)), constant_values=seq)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, padded - seq), (0, 0), (0, 0))) for x in (query, key, value)
    )
    query = query.reshape(batch, padded, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    slopes = None if slopes is None else slopes.reshape(groups, -1)
    mixed = _blockwise(block, query, key.swapaxes(1, 2), value.swapaxes(1, 2), first_key, slopes)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, head_dim)[:, :seq]


def _block(x: Array, i: Int[Array, ""], size: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _scores(query: Array, key: Array, first_key: Array, slopes, i, j) -> Array:
    """Of a block of queries with a block of keys; hidden keys have the least score."""
    size = first_key.shape[1]
    scores = jnp.einsum("bkgqd,bksd->bkgqs", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    queries, keys = i * size + jnp.arange(size), j * size + jnp.arange(size)
    distance = keys - queries[:, None]
    if slopes is not None:
        scores += slopes[:, :, None, None] * distance.astype(jnp.float32)
    visible = (distance <= 0) & (keys >= first_key[:, :, None])
    return jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(size: int, query, key, value, first_key, slopes):
    return _blockwise_forward(size, query, key, value, first_key, slopes)[0]


def _blockwise_forward(size, query, key, value, first_key, slopes):
    def of_queries(i):
        queries, first = _block(query, i, size), _block(first_key, i, size, 1)

        def with_keys(j, carry):
            greatest, total, mixed = carry
            scores = _scores(queries, _block(key, j, size), first, slopes, i, j)
            new = jnp.maximum(greatest, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(greatest - new)
            values = _block(value, j, size)
            added = jnp.einsum(
                "bkgqs,bksd->bkgqd",
                weights.astype(value.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return new, total * shrink + weights.sum(axis=-1), mixed * shrink[..., None] + added

        zero = jnp.zeros(queries.shape, jnp.float32)
        start = jnp.full_like(zero[..., 0], jnp.finfo(jnp.float32).min), zero[..., 0], zero
        greatest, total, mixed = jax.lax.fori_loop(jnp.min(first) // size, i + 1, with_keys, start)
        return (mixed / total[..., None]).astype(query.dtype), greatest + jnp.log(total)

    mixed, log_total = jax.lax.map(of_queries, jnp.arange(query.shape[3] // size))
    mixed, log_total = (jnp.moveaxis(x, 0, 3) for x in (mixed, log_total))
    mixed, log_total = mixed.reshape(query.shape), log_total.reshape(query.shape[:-1])
    return mixed, (query, key, value, first_key, slopes, mixed, log_total)


def _blockwise_backward(size, residuals, gradient):
    query, key, value, first_key, slopes, mixed, log_total = residuals
    centre = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_queries(carry, i):
        queries, first, d_mixed = (
            _block(query, i, size),
            _block(first_key, i, size, 1),
            _block(gradient, i, size),
        )
        total, middle = (_block(x, i, size, 3)[..., None] for x in (log_total, centre))

        def with_keys(j, carry):
            d_key, d_value, d_queries = carry
            keys = _block(key, j, size)
            weights = jnp.exp(_scores(queries, keys, first, slopes, i, j) - total)
            d_weights = product("bkgqd,bksd->bkgqs", d_mixed, _block(value, j, size))
            d_scores = weights * (d_weights - middle) * query.shape[-1] ** -0.5
            d_scores = d_scores.astype(query.dtype)
            d_queries += product("bkgqs,bksd->bkgqd", d_scores, keys)
            d_keys = product("bkgqs,bkgqd->bksd", d_scores, queries)
            d_values = product("bkgqs,bkgqd->bksd", weights.astype(value.dtype), d_mixed)
            add = jax.lax.dynamic_update_slice_in_dim
            d_key = add(d_key, _block(d_key, j, size) + d_keys, j * size, 2)
            return d_key, add(d_value, _block(d_value, j, size) + d_values, j * size, 2), d_queries

        start = *carry, jnp.zeros(queries.shape, jnp.float32)
        *carry, d_queries = jax.lax.fori_loop(jnp.min(first) // size, i + 1, with_keys, start)
        return tuple(carry), d_queries.astype(query.dtype)

    zero = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(query.shape[3] // size)
    (d_key, d_value), d_query = jax.lax.scan(of_queries, (zero, zero), blocks)
    d_query = jnp.moveaxis(d_query, 0, 3).reshape(query.shape)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# ---- kernels of accelerators -------------------------------------------------------------


def with_alibi(
    query: Heads, key: KVHeads, position: Position, slopes: Float[Array, " heads"]
) -> tuple[Array, Array]:
    """Queries and keys with eight dimensions more, which add slope x position to each score.

    The softmax of a query does not change when all its scores move together, so a key may be
    penalised by its position where ALiBi does so by its distance. A slope in three parts and a
    position in two are exact in bfloat16.
    """
    parts, rest = [], slopes.astype(jnp.float32)
    for _ in range(3):  # a cast to bfloat16 and back could be left out by the compiler
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest -= parts[-1]
    none = jnp.zeros_like(slopes)
    extra_query = jnp.stack([x for part in parts for x in (part, part)] + [none, none], axis=-1)
    high, low = position // 256 * 256, position % 256
    extra_key = jnp.stack([high, low] * 3 + [jnp.zeros_like(low)] * 2, axis=-1)[:, :, None]

    def append(x: Array, extra: Array) -> Array:
        extra = jnp.broadcast_to(extra.astype(x.dtype), (*x.shape[:-1], 8))
        return jnp.concatenate([x, extra], axis=-1)

    return append(query, extra_query), append(key, extra_key)


def widened(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def cudnn(
    query: Heads, key: KVHeads, value: KVHeads, position: Position, slopes=None, *,
    packed: bool, window: int | None = None,
) -> Heads:  # fmt: skip
    """cuDNN's fused attention; rows of more documents than it keeps apart go blockwise."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    def fused(query, key, value, position, slopes, mask=MaskType.CAUSAL, **documents):
        head_dim = query.shape[-1]
        if slopes is not None:
            query, key = with_alibi(query, key, position, slopes * head_dim**0.5)
            value = widened(value, query.shape[-1])
        scale = head_dim**-0.5
        mixed = dot_product_attention(
            query, key, value, scale=scale, mask_type=mask, sliding_window_length=window,
            **documents,
        )  # fmt: skip
        return mixed[..., :head_dim]

    def fused_packed(query, key, value, position, slopes):
        # The offsets of keys are taken for those of queries, so there must be as many heads.
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        of_document = document[:, None] == jnp.arange(DOCUMENTS)[:, None]
        lengths = jnp.sum(of_document, axis=2, dtype=jnp.int32)
        starts = jnp.where(lengths > 0, jnp.cumsum(lengths, axis=1) - lengths, -1)
        starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1).astype(jnp.int32)
        lengths = jnp.where(lengths > 0, lengths, -1)
        documents = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts)
        return fused(query, key, value, position, slopes, MaskType.PADDING_CAUSAL, **documents)

    if not packed:
        return fused(query, key, value, position, slopes)
    document = jnp.cumsum(position == 0, axis=1) - 1
    few = jnp.max(document) < DOCUMENTS
    many = partial(blockwise, window=window)
    return jax.lax.cond(few, fused_packed, many, query, key, value, position, slopes)


def at_default_precision(kernel: Callable) -> Callable:
    """`kernel`, and its backward pass, where jax asks for no more than the operands have: Mosaic
    refuses products of bfloat16 at float32's precision."""
    default = partial(jax.default_matmul_precision, "default")

    def forward(*args):
        with default():
            return jax.vjp(kernel, *args)

    def backward(pull, gradient):
        with default():
            return pull(gradient)

    call = jax.custom_vjp(lambda *args: forward(*args)[0])
    call.defvjp(forward, backward)
    return call


def splash(
    query: Heads, key: KVHeads, value: KVHeads, position: Position, slopes=None, *,
    packed: bool, window: int | None = None, interpret: bool = False,
) -> Heads:  # fmt: skip
    """Splash attention of TPUs, in blocks of 512 tokens, 128 in short rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, seq, heads, head_dim = query.shape
    query *= head_dim**-0.5
    document = jnp.cumsum(position == 0, axis=1)
    if slopes is not None:
        query, key = with_alibi(query, key, position, slopes)
    block = 512 if seq >= 512 else 128
    length, width = -(-seq // block) * block, -(-query.shape[-1] // 128) * 128
    query, key, value = (
        widened(jnp.pad(x, ((0, 0), (0, length - seq), (0, 0), (0, 0))), width).swapaxes(1, 2)
        for x in (query, key, value)
    )
    shape = length, length
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=kernels.BlockSizes(**sizes),
    )  # fmt: skip
    document = jnp.pad(document, ((0, 0), (0, length - seq)))
    document = jnp.broadcast_to(document, (batch, length))
    each = (
        at_default_precision(jax.vmap(kernel)) if query.dtype == jnp.bfloat16 else jax.vmap(kernel)
    )
    mixed = each(query, key, value, kernels.SegmentIds(document, document))
    return mixed.swapaxes(1, 2)[:, :seq, :, :head_dim]
