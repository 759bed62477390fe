"""Attention: where tokens stand and whom they may see, values weighted, and the cache."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(
    pattern: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float32[Array, "..."]:
    """A contraction with a float32 result, whose backward pass multiplies in the dtype of `a`.

    Left to itself, the backward pass of half-precision operands would run in float32.
    """
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def einsum_f32_forward(pattern, a, b):
    return einsum_f32(pattern, a, b), (a, b)


def einsum_f32_backward(pattern, operands, gradient):
    a, b = operands
    _, pull = jax.vjp(partial(jnp.einsum, pattern), a, b)
    return pull(gradient.astype(a.dtype))


einsum_f32.defvjp(einsum_f32_forward, einsum_f32_backward)


class Cache(eqx.Module):
    """The keys and values read so far, stacked over layers; each row has a length of its own.

    What one head of one row attends to lies together, in the order in which `recall` sums it.
    """

    keys: Float[Array, "layers batch kv_heads head_dim capacity"]
    values: Float[Array, "layers batch kv_heads capacity head_dim"]
    length: Int[Array, " batch"]

    def write(
        self, layer: Int[Array, ""], index: Int[Array, "batch seq"], keys: Array, values: Array
    ) -> "Cache":
        """With the keys and values of one layer put at `index`; past the capacity they are lost."""
        rows = jnp.arange(index.shape[0])[:, None]
        at = layer, rows
        stored = (
            self.keys.at[*at, :, :, index].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[*at, :, index].set(values.astype(self.values.dtype), mode="drop"),
        )
        return eqx.tree_at(lambda cache: (cache.keys, cache.values), self, stored)

    def read(self, layer: Int[Array, ""], size: int) -> tuple[Array, Array]:
        """The keys and values of one layer, up to `size` of each row."""
        return self.keys[layer, ..., :size], self.values[layer, ..., :size, :]


class Positions(eqx.Module):
    """Where the tokens of a batch stand and whom they may see, computed once for all blocks."""

    query: Int[Array, "#batch seq"]  # the index of each token among the keys of its row
    key: Int[Array, " keys"]
    position: Int[Array, "#batch seq"]  # within its document
    extent: Int[Array, "#batch seq"]  # how many tokens its document has
    document: Int[Array, "batch seq"] | None
    filled: Int[Array, ""] | None = None  # of a cache: its longest row that goes on

    def visible(self, window: Int[Array, ""] | None = None) -> Bool[Array, "#batch seq keys"]:
        distance = self.query[:, :, None] - self.key
        seen = distance >= 0
        if self.document is not None:
            seen &= self.document[:, :, None] == self.document[:, None, :]
        if window is not None:
            seen &= distance < window
        return seen


def positions(
    tokens: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"] | None = None,
    cache: Cache | None = None,
) -> Positions:
    batch, seq = tokens.shape
    index = jnp.arange(seq)
    if cache is not None:
        # Padding stands behind the tokens of its row, where causality hides it from them.
        new = jnp.full(batch, seq) if segments is None else jnp.sum(segments != 0, axis=1)
        query = cache.length[:, None] + index
        extent = jnp.broadcast_to((cache.length + new)[:, None], query.shape)
        key = jnp.arange(cache.keys.shape[4])
        filled = jnp.max(jnp.where(new > 0, cache.length + new, 0))
        return Positions(query, key, query, extent, None, filled)
    if segments is None:
        return Positions(index[None], index, index[None], jnp.full((1, seq), seq), None)
    edge = jnp.ones((batch, 1), bool)
    changes = segments[:, 1:] != segments[:, :-1]
    starts = jnp.concatenate([edge, changes], axis=1)
    ends = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, index, seq), axis=1, reverse=True)
    documents = jnp.cumsum(starts, axis=1)  # two runs of one number are two documents
    return Positions(index[None], index, index - start, end - start + 1, documents)


def attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    positions: Positions,
    layer: Int[Array, ""],
    cache: Cache | None,
    *,
    window: Int[Array, ""] | None = None,
    slopes: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Cache | None]:
    """Causal attention, grouped where there are fewer key heads; `slopes` are ALiBi's."""
    groups = key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[3]).transpose(0, 2, 3, 1, 4)

    def seen(positions: Positions) -> PyTree:
        bias = None
        if slopes is not None:  # the distance within a document is the distance within its row
            distance = (positions.key - positions.query[:, :, None]).astype(jnp.float32)
            bias = slopes.reshape(groups, -1), distance
        return positions.visible(window), bias

    if cache is None:
        mixed = attention_values(
            grouped, *(x.swapaxes(1, 2) for x in (key, value)), seen(positions)
        )
    else:
        cache = cache.write(layer, positions.query, key, value)

        def among(size: int) -> Callable[[], Array]:
            fewer = eqx.tree_at(lambda positions: positions.key, positions, positions.key[:size])
            return lambda: cached_attention(grouped, *cache.read(layer, size), seen(fewer))

        # What is still empty is not read. Each part is compiled: they are few, and not small.
        capacity = len(positions.key)
        part = max(32, -(-capacity // 8))
        sizes = [min(size, capacity) for size in range(part, capacity + part, part)]
        mixed = jax.lax.switch((positions.filled - 1) // part, [among(size) for size in sizes])
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape), cache


def cached_attention(
    query: Float[Array, "batch kv_heads group seq head_dim"],
    key: Float[Array, "batch kv_heads head_dim keys"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    seen: PyTree,
) -> Float[Array, "batch kv_heads group seq head_dim"]:
    """As `mix`, of what a cache holds."""
    if query.shape[3] > 1:
        key, value = key.swapaxes(2, 3).astype(query.dtype), value.astype(query.dtype)
        return attention_values(query, key, value, seen)
    # For one token, sums read the cache in place; a product would have its part copied first.
    one, key, value = (x.astype(jnp.float32) for x in (query[:, :, :, 0], key, value))
    scores = jnp.sum(one[..., None] * key[:, :, None], axis=3)
    weights = softmax(scores[:, :, :, None], query.shape[-1], seen)[:, :, :, 0]
    mixed = jnp.sum(weights[..., None] * value[:, :, None], axis=3)
    return mixed[:, :, :, None].astype(query.dtype)


def attention_weights(query: Array, key: Array, seen: PyTree) -> Float32[Array, "..."]:
    """How much each query takes of each key, [batch, kv_heads, group, query, key]."""
    return softmax(einsum_f32("bkgqd,bksd->bkgqs", query, key), query.shape[-1], seen)


def softmax(scores: Float32[Array, "..."], head_dim: int, seen: PyTree) -> Float32[Array, "..."]:
    """Of products of queries with keys: scaled, biased, and only over what is seen."""
    visible, bias = seen
    scores = scores * head_dim**-0.5
    if bias is not None:
        slopes, distance = bias
        scores += slopes[:, :, None, None] * distance[:, None, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


# Heads before tokens: so XLA on CPU multiplies twice as fast.
@jax.custom_vjp
def attention_values(query: Array, key: Array, value: Array, seen: PyTree) -> Float[Array, "..."]:
    """Values, weighted; for the backward pass the weights are computed again, not kept."""
    weights = attention_weights(query, key, seen).astype(value.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, value)


def attention_values_forward(query, key, value, seen):
    return attention_values(query, key, value, seen), (query, key, value, seen)


def attention_values_backward(kept, gradient):
    query, key, value, seen = kept
    weights = attention_weights(query, key, seen)
    d_value = jnp.einsum("bkgqs,bkgqd->bksd", weights.astype(value.dtype), gradient)
    d_weights = einsum_f32("bkgqd,bksd->bkgqs", gradient, value)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - centre) * query.shape[-1] ** -0.5).astype(query.dtype)
    d_query = jnp.einsum("bkgqs,bksd->bkgqd", d_scores, key)
    d_key = jnp.einsum("bkgqs,bkgqd->bksd", d_scores, query)
    return d_query, d_key, d_value, None


attention_values.defvjp(attention_values_forward, attention_values_backward)
