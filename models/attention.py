"""Attention: where tokens stand and whom they may see, values weighted, and the cache."""

from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

import models.kernels as kernels
from sharding import device

Hidden = Float[Array, "batch seq embed"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(pattern: str, a: Array, b: Array) -> Float32[Array, "..."]:
    """A contraction with a float32 result, whose backward pass multiplies in the dtype of `a`.

    Left to itself, the backward pass of half-precision operands would run in float32.
    """
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def einsum_f32_backward(pattern, operands, gradient):
    _, pull = jax.vjp(partial(jnp.einsum, pattern), *operands)
    return pull(gradient.astype(operands[0].dtype))


einsum_f32.defvjp(lambda *args: (einsum_f32(*args), args[1:]), einsum_f32_backward)


class Cache(eqx.Module):
    """The keys and values read so far; each row has a length of its own. They are stacked over
    layers, as the leaves of blocks are, or tuples with an array for each layer.

    What one head of one row attends to lies together, in the order in which it is summed.
    """

    keys: Float[Array, "batch kv_heads head_dim capacity"]
    values: Float[Array, "batch kv_heads capacity head_dim"]
    length: Int[Array, " batch"]

    def replace(self, keys: PyTree, values: PyTree) -> "Cache":
        return eqx.tree_at(lambda cache: (cache.keys, cache.values), self, (keys, values))

    def first(self, size: int) -> "Cache":
        """Only so many places of each row, of stacked layers."""
        return self.replace(self.keys[..., :size], self.values[..., :size, :])

    def with_first(self, cache: "Cache") -> "Cache":
        """With the first places and the lengths of a smaller cache."""

        def put(old, new):
            new = jnp.stack(new) if isinstance(new, tuple) else new
            return jax.lax.dynamic_update_slice(old, new, [0] * old.ndim)

        return cache.replace(put(self.keys, cache.keys), put(self.values, cache.values))

    def write(
        self,
        layer: Int[Array, ""] | int,
        index: Int[Array, "batch seq"],
        keys: Array,
        values: Array,
    ) -> "Cache":
        """With the keys and values of one layer put at `index`; past the capacity they are lost."""

        def put(old, new, where):
            if isinstance(old, tuple):
                return *old[:layer], put(old[layer][None], new, where)[0], *old[layer + 1 :]
            at = jnp.stack([jnp.full_like(index, layer if len(old) > 1 else 0), index], axis=-1)
            # The batch is a dimension of the scatter, no index: else it would be gathered where it
            # is split. By `jax.vmap`, GPUs would transpose the whole cache.
            axes = jax.lax.ScatterDimensionNumbers(
                update_window_dims=(2, 3), inserted_window_dims=(0, where),
                operand_batching_dims=(1,), scatter_indices_batching_dims=(0,),
                scatter_dims_to_operand_dims=(0, where),
            )  # fmt: skip
            new = new.astype(old.dtype)
            return jax.lax.scatter(old, at, new, axes, mode="drop", unique_indices=True)

        return self.replace(put(self.keys, keys, 4), put(self.values, values, 3))


class Positions(eqx.Module):
    """Where the tokens of a batch stand and whom they may see, computed once for all blocks."""

    query_index: Int[Array, "#batch seq"]  # of each token among the keys of its row
    key_index: Int[Array, " keys"]
    position: Int[Array, "#batch seq"]  # within its document
    doc_length: Int[Array, "#batch seq"]  # of the document of each token
    packed: bool = eqx.field(static=True)  # rows of several documents
    cache_length: Int[Array, " batch"] | None = None  # of each row, with the new tokens

    def visible(self, window: Int[Array, ""] | None = None) -> Bool[Array, "#batch seq keys"]:
        distance = self.query_index[:, :, None] - self.key_index
        mask = distance >= 0
        if self.packed:
            mask &= distance <= self.position[:, :, None]
        if window is not None:
            mask &= distance < window
        return mask


def positions(
    tokens: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"] | None = None,
    cache: Cache | None = None,
    doc_length: Int[Array, " batch"] | None = None,
) -> Positions:
    """Positions of tokens that stand alone, or that continue the rows of a cache.

    `doc_length` says how long a row of the cache will be once all parts of its text are read:
    dynamic rotary positions depend on it. Without it these tokens are the last.
    """
    batch, seq = tokens.shape
    index = jnp.arange(seq)
    if cache is not None:
        # Padding stands behind the tokens of its row, where causality hides it from them.
        new = jnp.full(batch, seq) if segments is None else jnp.sum(segments != 0, axis=1)
        query_index, length = cache.length[:, None] + index, cache.length + new
        final = length if doc_length is None else jnp.maximum(length, doc_length)
        final = jnp.broadcast_to(final[:, None], query_index.shape)
        keys = jnp.arange(cache.keys[0].shape[3])
        return Positions(query_index, keys, query_index, final, False, length)
    if segments is None:
        return Positions(index[None], index, index[None], jnp.full((1, seq), seq), False)
    changes = segments[:, 1:] != segments[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, index, seq), axis=1, reverse=True)
    return Positions(index[None], index, index - start, end - start + 1, True)


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    positions: Positions,
    layer: Int[Array, ""] | int,
    cache: Cache | None,
    *,
    windows: Sequence[int | None] = (),
    slopes: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Cache | None]:
    """Causal attention, grouped where there are fewer key heads; `slopes` are ALiBi's.

    `windows` says of each layer how many keys up to itself a query sees; None is all.
    """
    sizes = list(dict.fromkeys(windows)) or [None]
    window = jnp.array([size or 2**30 for size in windows])[layer] if any(sizes) else None
    name, (_, seq, _, head_dim) = "dense", query.shape
    if cache is None:
        name, _ = kernels.choose(query.dtype, head_dim, seq, slopes is not None)
    if name != "dense":
        kernel, each = kernels.blockwise, [window]
        if name != "blockwise":  # one is compiled for each window
            kernel, each = partial(getattr(kernels, name), packed=positions.packed), sizes
        branches = [partial(kernel, window=size) for size in each]
        kind = jnp.array([sizes.index(size) for size in windows] or [0])[layer]
        one = branches[0] if len(branches) == 1 else partial(jax.lax.switch, kind, branches)
        return kernels.on_each_device(one, query, key, value, positions.position, slopes), None
    groups = key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[3]).transpose(0, 2, 3, 1, 4)

    def mask_and_bias(positions: Positions) -> PyTree:
        bias = None
        if slopes is not None:  # the distance within a document is the distance within its row
            distance = (positions.key_index - positions.query_index[:, :, None]).astype(jnp.float32)
            bias = slopes.reshape(groups, -1), distance
        return positions.visible(window), bias

    if cache is None:
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = attention_values(grouped, keys, values, mask_and_bias(positions))
    else:
        cache = cache.write(layer, positions.query_index, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        mixed = cached_attention(grouped, keys, values, mask_and_bias(positions))
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape), cache


def cached_attention(
    query: Float[Array, "batch kv_heads group seq head_dim"],
    key: Float[Array, "batch kv_heads head_dim keys"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask_and_bias: PyTree,
) -> Float[Array, "batch kv_heads group seq head_dim"]:
    """`attention_values` of what a cache holds."""
    if query.shape[3] > 1 or device()[0] != "cpu":
        key, value = key.swapaxes(2, 3).astype(query.dtype), value.astype(query.dtype)
        return attention_values(query, key, value, mask_and_bias)
    # For one token of a CPU, sums read the cache in place; a product would have its part copied.
    one, key, value = (x.astype(jnp.float32) for x in (query[:, :, :, 0], key, value))
    scores = jnp.sum(one[..., None] * key[:, :, None], axis=3)
    weights = softmax(scores[:, :, :, None], query.shape[-1], mask_and_bias)[:, :, :, 0]
    mixed = jnp.sum(weights[..., None] * value[:, :, None], axis=3)
    return mixed[:, :, :, None].astype(query.dtype)


def attention_weights(query: Array, key: Array, mask_and_bias: PyTree) -> Array:
    """How much each query takes of each key, [batch, kv_heads, group, query, key]."""
    return softmax(einsum_f32("bkgqd,bksd->bkgqs", query, key), query.shape[-1], mask_and_bias)


def softmax(scores: Array, head_dim: int, mask_and_bias: PyTree) -> Float32[Array, "..."]:
    """Of products of queries with keys: scaled, biased, and only over what the mask leaves."""
    mask, bias = mask_and_bias
    scores = scores * head_dim**-0.5
    if bias is not None:
        slopes, distance = bias
        scores += slopes[:, :, None, None] * distance[:, None, None]
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


# Heads before tokens: so XLA on CPU multiplies twice as fast.
@jax.custom_vjp
def attention_values(query: Array, key: Array, value: Array, mask_and_bias: PyTree) -> Array:
    """Values, weighted; for the backward pass the weights are computed again, not kept."""
    weights = attention_weights(query, key, mask_and_bias).astype(value.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, value)


def attention_values_backward(residuals, gradient):
    query, key, value, mask_and_bias = residuals
    weights = attention_weights(query, key, mask_and_bias)
    d_value = jnp.einsum("bkgqs,bkgqd->bksd", weights.astype(value.dtype), gradient)
    d_weights = einsum_f32("bkgqd,bksd->bkgqs", gradient, value)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - centre) * query.shape[-1] ** -0.5).astype(query.dtype)
    d_query = jnp.einsum("bkgqs,bksd->bkgqd", d_scores, key)
    d_key = jnp.einsum("bkgqs,bkgqd->bksd", d_scores, query)
    return d_query, d_key, d_value, None


attention_values.defvjp(lambda *args: (attention_values(*args), args), attention_values_backward)
