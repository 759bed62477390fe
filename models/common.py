"""What every decoder here shares: the outline of a model, attention, norms, the cache."""

import math
import re
import reprlib
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, PyTree

from sharding import UserError, constrain


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


class Place(eqx.Module):
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


def place(
    tokens: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"] | None = None,
    cache: Cache | None = None,
) -> Place:
    batch, seq = tokens.shape
    index = jnp.arange(seq)
    if cache is not None:
        # Padding stands behind the tokens of its row, where causality hides it from them.
        new = jnp.full(batch, seq) if segments is None else jnp.sum(segments != 0, axis=1)
        query = cache.length[:, None] + index
        extent = jnp.broadcast_to((cache.length + new)[:, None], query.shape)
        key = jnp.arange(cache.keys.shape[4])
        filled = jnp.max(jnp.where(new > 0, cache.length + new, 0))
        return Place(query, key, query, extent, None, filled)
    if segments is None:
        return Place(index[None], index, index[None], jnp.full((1, seq), seq), None)
    edge = jnp.ones((batch, 1), bool)
    changes = segments[:, 1:] != segments[:, :-1]
    starts = jnp.concatenate([edge, changes], axis=1)
    ends = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, index, seq), axis=1, reverse=True)
    documents = jnp.cumsum(starts, axis=1)  # two runs of one number are two documents
    return Place(index[None], index, index - start, end - start + 1, documents)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(pattern: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    """A contraction with a float32 result, whose backward pass multiplies in the dtype of `a`.

    Left to itself, the backward pass of half-precision operands would run in float32.
    """
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def product_forward(pattern, a, b):
    return product(pattern, a, b), (a, b)


def product_backward(pattern, operands, gradient):
    a, b = operands
    _, pull = jax.vjp(partial(jnp.einsum, pattern), a, b)
    return pull(gradient.astype(a.dtype))


product.defvjp(product_forward, product_backward)


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    place: Place,
    layer: Int[Array, ""],
    cache: Cache | None,
    *,
    window: Int[Array, ""] | None = None,
    slopes: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Cache | None]:
    """Causal attention, grouped where there are fewer key heads; `slopes` are ALiBi's."""
    groups = key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[3]).transpose(0, 2, 3, 1, 4)

    def seen(place: Place) -> PyTree:
        bias = None
        if slopes is not None:  # the distance within a document is the distance within its row
            distance = (place.key - place.query[:, :, None]).astype(jnp.float32)
            bias = slopes.reshape(groups, -1), distance
        return place.visible(window), bias

    if cache is None:
        mixed = mix(grouped, *(x.swapaxes(1, 2) for x in (key, value)), seen(place))
    else:
        cache = cache.write(layer, place.query, key, value)

        def among(size: int) -> Callable[[], Array]:
            fewer = eqx.tree_at(lambda place: place.key, place, place.key[:size])
            return lambda: recall(grouped, *cache.read(layer, size), seen(fewer))

        # What is still empty is not read. Each part is compiled: they are few, and not small.
        capacity = len(place.key)
        part = max(32, -(-capacity // 8))
        sizes = [min(size, capacity) for size in range(part, capacity + part, part)]
        mixed = jax.lax.switch((place.filled - 1) // part, [among(size) for size in sizes])
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape), cache


def recall(
    query: Float[Array, "batch kv_heads group seq head_dim"],
    key: Float[Array, "batch kv_heads head_dim keys"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    seen: PyTree,
) -> Float[Array, "batch kv_heads group seq head_dim"]:
    """As `mix`, of what a cache holds."""
    if query.shape[3] > 1:
        key, value = key.swapaxes(2, 3).astype(query.dtype), value.astype(query.dtype)
        return mix(query, key, value, seen)
    # For one token, sums read the cache in place; a product would have its part copied first.
    one, key, value = (x.astype(jnp.float32) for x in (query[:, :, :, 0], key, value))
    scores = jnp.sum(one[..., None] * key[:, :, None], axis=3)
    weights = softmax(scores[:, :, :, None], query.shape[-1], seen)[:, :, :, 0]
    mixed = jnp.sum(weights[..., None] * value[:, :, None], axis=3)
    return mixed[:, :, :, None].astype(query.dtype)


def attention(query: Array, key: Array, seen: PyTree) -> Float32[Array, "..."]:
    """How much each query takes of each key, [batch, kv_heads, group, query, key]."""
    return softmax(product("bkgqd,bksd->bkgqs", query, key), query.shape[-1], seen)


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
def mix(query: Array, key: Array, value: Array, seen: PyTree) -> Float[Array, "..."]:
    """Values, weighted; for the backward pass the weights are computed again, not kept."""
    weights = attention(query, key, seen).astype(value.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, value)


def mix_forward(query, key, value, seen):
    return mix(query, key, value, seen), (query, key, value, seen)


def mix_backward(kept, gradient):
    query, key, value, seen = kept
    weights = attention(query, key, seen)
    d_value = jnp.einsum("bkgqs,bkgqd->bksd", weights.astype(value.dtype), gradient)
    d_weights = product("bkgqd,bksd->bkgqs", gradient, value)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - centre) * query.shape[-1] ** -0.5).astype(query.dtype)
    d_query = jnp.einsum("bkgqs,bksd->bkgqd", d_scores, key)
    d_key = jnp.einsum("bkgqs,bkgqd->bksd", d_scores, query)
    return d_query, d_key, d_value, None


mix.defvjp(mix_forward, mix_backward)


def linear(
    pattern: str, x: Float[Array, "..."], weight: Float[Array, "..."], bias: Array | None = None
) -> Float[Array, "..."]:
    """A contraction in the dtype of `x`: weights are cast where they are used, block by block.

    The axes it sums over are the last of both. They are merged, and so are those it makes: XLA on
    CPU transposes a weight of more than two axes at every use. For one token a row the weight comes
    first: as the second factor it would be packed anew each time, for too little use.
    """
    operands, made = pattern.split("->")
    summed = sum(axis not in made for axis in operands.split(",")[1])
    kept, outer = x.shape[:-summed], weight.shape[:-summed]
    matrix = weight.astype(x.dtype).reshape(math.prod(outer), -1)
    x = x.reshape(*kept, -1)
    if kept[-1] == 1:
        y = jax.lax.optimization_barrier(jnp.einsum("oi,...i->o...", matrix, x))  # or it is undone
        y = jnp.moveaxis(y, 0, -1)
    else:
        y = jnp.einsum("...i,oi->...o", x, matrix)
    y = y.reshape(*kept, *outer)
    return y if bias is None else y + bias.astype(x.dtype)


# Of what is cheap to compute again, only the inputs are kept for the backward pass.
cheap = partial(jax.checkpoint, prevent_cse=False)


@partial(cheap, static_argnums=2)
def rms_norm(
    x: Float[Array, "*rest width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*rest width"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


@partial(cheap, static_argnums=3)
def layer_norm(
    x: Float[Array, "*rest width"],
    weight: Float[Array, " width"],
    bias: Float[Array, " width"],
    eps: float,
) -> Float[Array, "*rest width"]:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LanguageModel(eqx.Module):
    """A decoder. A family says what its blocks hold and compute; how they are walked is said here.

    Every array of a model is a tensor of its checkpoint, `[out, in]` as Hugging Face has it. Blocks
    are stacked: their leaves have a leading dimension `layers`.
    """

    Config: eqx.AbstractClassVar[type]
    PREFIX: eqx.AbstractClassVar[str]
    NAMES: eqx.AbstractClassVar[dict[str, str]]

    config: eqx.AbstractVar[Any]
    embedding: eqx.AbstractVar[Float[Array, "vocab embed"]]
    blocks: eqx.AbstractVar[PyTree]
    head: eqx.AbstractVar[Float[Array, "vocab embed"] | None]

    @abstractmethod
    def enter(self, rows: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """The input of the first block, from rows of the embedding."""

    @abstractmethod
    def prepare(self, place: Place) -> PyTree:
        """What every block needs to know of the positions, computed once for all of them."""

    @abstractmethod
    def block(
        self,
        weights: PyTree,
        x: Float[Array, "batch seq embed"],
        place: Place,
        prepared: PyTree,
        layer: Int[Array, ""],
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """One block; `weights` is `blocks` at `layer`."""

    @abstractmethod
    def finish(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """The norm between the last block and the head."""

    @property
    def unembedding(self) -> Float[Array, "vocab embed"]:
        return self.embedding if self.head is None else self.head

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in unless told otherwise: float16 is for storage only."""
        stored = self.embedding.dtype
        return jnp.dtype(jnp.float32) if stored == jnp.float16 else stored

    def embed(
        self, tokens: Int[Array, "batch seq"], dtype: jnp.dtype
    ) -> Float[Array, "batch seq embed"]:
        """The input of the first block."""
        return self.enter(self.embedding[tokens].astype(dtype))

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        *,
        rows: Float[Array, "batch seq embed"] | None = None,
        cache: Cache | None = None,
        dtype: Any = None,
        remat: str = "none",
        after: tuple[int, ...] = (),
    ) -> (
        Float[Array, "batch seq embed"]
        | tuple[Float[Array, "batch seq embed"], Cache]
        | tuple[Float[Array, "batch seq embed"], Float[Array, "taps batch seq embed"]]
    ):
        """The states before the head, which is `unembedding`.

        Tokens attend and count positions within their own run of equal `segments`; segment 0 is
        padding. With a `cache` they continue its rows, and the grown cache is returned too; then
        `segments` only tells tokens from the padding behind them, which the cache forgets. `dtype`
        is computed in, `remat` (none, dots, full) trades memory for recomputation. `rows` are those
        of the embedding, where the caller has looked them up to differentiate by them. With the
        numbers of some blocks, ascending, in `after` their outputs are returned too.
        """
        here = place(tokens, segments, cache)
        prepared = self.prepare(here)

        def through(x, cache, layer, weights):
            x = constrain(x, "batch seq embed")
            return self.block(weights, x, here, prepared, layer, cache)

        if remat != "none":
            through = jax.checkpoint(through, policy=REMAT[remat], prevent_cse=False)

        def step(carry, scanned):
            (x, cache, states), (layer, weights) = carry, scanned
            x, cache = through(x, cache, layer, weights)
            if states is not None:
                # One that is not asked for lies where the next that is will lie.
                slot = jnp.sum(jnp.array(after) < layer)
                states = jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)
                states = constrain(states, "taps batch seq embed")
            return (x, cache, states), None

        rows = self.embedding[tokens] if rows is None else rows
        x = self.enter(rows.astype(self.dtype if dtype is None else dtype))
        layers, states = jnp.arange(self.config.layers), None
        if after:
            rest = after[-1] + 1 < len(layers)  # blocks behind the last, which need a place too
            states = jnp.zeros((len(after) + rest, *x.shape), x.dtype)
        (x, cache, states), _ = jax.lax.scan(step, (x, cache, states), (layers, self.blocks))
        x = constrain(self.finish(x), "batch seq embed")
        if states is not None:
            return x, states[: len(after)]
        if cache is None:
            return x
        return x, eqx.tree_at(lambda cache: cache.length, cache, here.extent[:, 0])

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        *,
        dtype: Any = None,
    ) -> Float32[Array, "batch seq vocab"]:
        """Logits for the token after each token."""
        x = self.hidden(tokens, segments, dtype=dtype)
        logits = product("bse,ve->bsv", x, self.unembedding.astype(x.dtype))
        return constrain(logits, "batch seq vocab")

    def cache(self, batch: int, capacity: int, dtype: Any = None) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens each."""
        config = self.config
        outer = config.layers, batch, config.kv_heads
        dtype = self.dtype if dtype is None else dtype
        keys = jnp.zeros((*outer, config.head_dim, capacity), dtype)
        values = jnp.zeros((*outer, capacity, config.head_dim), dtype)
        return Cache(keys, values, jnp.zeros(batch, jnp.int32))


def normal(key: PRNGKeyArray, *shape: int) -> Float[Array, "..."]:
    """Fresh weights as the families here are initialised."""
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


# Words that name, in some decoder's config, mathematics that is not computed here: switches, which
# may be there if they are off, and factors, which may be there if they are one.
SWITCHES = re.compile(
    r"quantiz|compression_config|soft_?cap|logit_cap|expert|moe|clip_qkv|qk_(layer_?)?norm|no_rope"
    r"|nope|^(use_)?alibi|rope_interleave|rope_local|rotary_dim|parallel_(attn|residual)|cross_att"
    r"|encoder_decoder|prefix_lm|bidirectional|attention_(chunk|sink)|sliding_window_pattern"
    r"|kv_shared|query_pre_attn|temperature_tuning|by_inverse_layer|swiglu_"
)
FACTORS = re.compile(
    r"multiplier|(logits?|residual|embedding|attn|attention|value)_scal|scale_(emb|depth)"
    r"|partial_rotary|rotary_pct"
)


def foreign(name: str, value: Any) -> bool:
    if SWITCHES.search(name):
        return value not in (None, False, 0, "", [], {})
    return bool(FACTORS.search(name)) and (value is True or value not in (None, 1))


class Settings:
    """The fields of a checkpoint's config, read with errors that name the field."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        for name, value in raw.items():
            if foreign(name, value):
                raise UserError(f"{name} = {reprlib.repr(value)} is not supported")

    def get(
        self,
        names: str | Sequence[str],
        kinds: type | tuple,
        what: str,
        default: Any,
        fits: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """The field under whichever of its names it is given."""
        names = [names] if isinstance(names, str) else names
        given = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
        for name, value in given.items():
            typed = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
            if not typed or not fits(value):
                self.refuse(name, value, what)
        values = list(given.values())
        if any(value != values[0] for value in values):
            said = [f"{name} = {reprlib.repr(value)}" for name, value in given.items()]
            raise UserError(f"{' and '.join(said)} are two names of one field, and disagree")
        if not given and default is ...:
            raise UserError(f"it lacks {' or '.join(names)}, {what}")
        return values[0] if given else default

    def count(self, *names: str, default: Any = ..., below: int = 2**31) -> Any:
        what = f"a positive whole number below {below}"
        return self.get(names, int, what, default, lambda value: 0 < value < below)

    def layers(self, *names: str) -> int:
        """How many layers: names are made for each of them, so nonsense is refused before that."""
        return self.count(*names, below=10_000)

    def number(self, name: str, default: Any = ...) -> Any:
        kinds, what = (int, float), "a positive number"
        value = self.get(name, kinds, what, default, lambda value: 0 < value <= sys.float_info.max)
        return None if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, bool, "true or false", default)

    def ids(self, name: str) -> Any:
        """Token ids: none, one, or several."""
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(type(v) is int for v in values):
            self.refuse(name, value, "a token id, or a list of them")
        return tuple(value) if isinstance(value, list) else value

    def fixed(self, name: str, value: Any) -> None:
        """Refuses any value but the one that is computed here."""
        found = self.raw.get(name)
        if found is not None and found != value:
            raise UserError(f"{name} = {reprlib.repr(found)} is not supported, only {value!r} is")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        raise UserError(f"{name} must be {expected}, found {reprlib.repr(value)}")
