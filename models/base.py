"""What every decoder here shares: its arrays, the scan over its blocks, linear maps, norms."""

import contextlib
import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, PyTree

import sharding
from models.attention import Cache, Hidden, Positions, einsum_f32, positions
from runtime.errors import UserError
from sharding import constrain

STD = 0.02  # of fresh matrices


class ModelConfig:
    """What the frozen dataclasses that size a family share. Sizes are named as axes are."""

    SELECTABLE: ClassVar[tuple[str, ...]] = ("layers",)  # the axes that `select` can index
    PER_LAYER: ClassVar[tuple[str, ...]] = ()  # the fields that hold an entry for each layer
    ALIBI: ClassVar[bool] = False  # whether attention is told positions by a bias
    residual_after_norm: ClassVar[bool] = False  # whether blocks add to their normed input

    @property
    def untied(self) -> bool:
        return not self.tied

    @property
    def longest(self) -> float:
        """How many positions the model is made for, if there is a limit."""
        return self.max_positions or math.inf

    def select(self, indices: Mapping[str, Sequence[int] | np.ndarray]) -> Any:
        """The config of a model that has only these indices of these axes, such as `layers`. Where
        they differ between blocks, they are an array with a row for each block that stays."""
        changes: dict[str, Any] = {}
        for axis, chosen in indices.items():
            if axis not in self.SELECTABLE:
                known = ", ".join(self.SELECTABLE)
                raise UserError(f"{self.model_type} models are cut along {known}, not {axis}")
            size, chosen = getattr(self, axis), np.asarray(chosen)
            if not chosen.size or chosen.min() < 0 or chosen.max() >= size:
                raise UserError(f"{axis} {chosen.tolist()} must be some of 0 to {size - 1}")
            changes[axis] = chosen.shape[-1]
        if "embed" in indices:  # norms divide by fewer, see `student.cut`
            changes["norm_eps"] = self.norm_eps * self.embed / changes["embed"]
        for name in self.PER_LAYER if "layers" in indices else ():
            entries = getattr(self, name)
            changes[name] = tuple(entries[i] for i in indices["layers"]) if entries else entries
        config = dataclasses.replace(self, **changes)
        heads = np.asarray(indices.get("heads", range(self.heads)))
        kv_heads = np.asarray(indices.get("kv_heads", range(self.kv_heads)))
        before, after = self.heads // self.kv_heads, config.heads // config.kv_heads
        if np.any(np.repeat(kv_heads, after, axis=-1) != heads // before):
            raise UserError(f"heads {heads.tolist()} do not keep to their groups of {before}")
        return config


def tensor(name: str, when: str | None = None) -> Any:
    """A field for the tensor of this name in a checkpoint, or all of these in its blocks; None
    where the config does not set the flag `when`."""
    return eqx.field(metadata={"tensor": name, "when": when})


class Tensors(eqx.Module):
    """A module whose arrays are tensors of a checkpoint, `[out, in]` as Hugging Face has them."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        """Fresh weights in float32: the axes of each array and the config give its shape.

        Norms are one, biases zero, all else is drawn anew.
        """
        fields = {x.name: x for x in dataclasses.fields(self) if "tensor" in x.metadata}
        drawn = [name for name in fields if not name.endswith(("norm", "bias"))]
        keys = dict(zip(drawn, jax.random.split(key, len(drawn)), strict=True))
        for name, field in fields.items():
            axes, when = sharding.field_axes(type(self), name), field.metadata["when"]
            if when is not None and not getattr(config, when):
                array = None
            elif axes is None:
                blocks = eqx.filter_vmap(partial(field.type, config))
                array = blocks(jax.random.split(keys[name], config.layers))
            else:
                shape = tuple(int(x) if x.isdigit() else getattr(config, x) for x in axes)
                if name in keys:
                    array = STD * jax.random.normal(keys[name], shape, jnp.float32)
                else:
                    array = jnp.ones(shape) if name.endswith("norm") else jnp.zeros(shape)
            setattr(self, name, array)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every array with its name, in the order of the leaves."""
        for field in dataclasses.fields(self):
            name, value = field.metadata.get("tensor"), getattr(self, field.name)
            if isinstance(value, Tensors):
                yield from value.tensors(prefix + name)
            elif name is not None and value is not None:
                yield prefix + name, value


class LanguageModel(Tensors):
    """A decoder: its family says what a block computes, here they are walked. Leaves of `blocks`
    are stacked: they have a leading dimension `layers`; but see `unstacked`."""

    Config: eqx.AbstractClassVar[type]
    PREFIX: eqx.AbstractClassVar[str]  # of names; checkpoints of the bare decoder leave it out

    config: eqx.AbstractVar[Any]
    embedding: eqx.AbstractVar[Float[Array, "vocab embed"]]
    blocks: eqx.AbstractVar[PyTree]
    head: eqx.AbstractVar[Float[Array, "vocab embed"] | None]

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        self.config = config
        super().__init__(config, key)

    @abstractmethod
    def embed_input(self, rows: Hidden) -> Hidden:
        """The input of the first block, from rows of the embedding."""

    @abstractmethod
    def position_inputs(self, positions: Positions) -> PyTree:
        """What every block needs to know of the positions, computed once for all of them."""

    @abstractmethod
    def block(
        self,
        weights: PyTree,
        x: Hidden,
        positions: Positions,
        position_inputs: PyTree,
        layer: Int[Array, ""] | int,
        cache: Cache | None,
    ) -> tuple[Hidden, Cache | None]:
        """One block; `weights` is `blocks` at `layer`."""

    @abstractmethod
    def final_norm(self, x: Hidden) -> Hidden:
        """The norm between the last block and the head."""

    @property
    def unembedding(self) -> Any:
        """The weight of the head, [vocab, embed]; its shape or place in a model of such."""
        return self.embedding if self.head is None else self.head

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in unless told otherwise: float16 is for storage only."""
        stored = self.embedding.dtype
        return jnp.dtype(jnp.float32) if stored == jnp.float16 else stored

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        *,
        embedded: Hidden | None = None,
        cache: Cache | None = None,
        doc_length: Int[Array, " batch"] | None = None,
        dtype: Any = None,
        remat: str = "none",
        taps: tuple[int, ...] = (),
    ) -> Hidden | tuple[Hidden, Cache] | tuple[Hidden, Float[Array, "taps batch seq embed"]]:
        """The states before the head, which is `unembedding`.

        Tokens attend and count positions within their own run of equal `segments`; segment 0 is
        padding. With a `cache` they continue its rows, and the grown cache is returned too; then
        `segments` only tells tokens from the padding behind them, which the cache forgets, and
        `doc_length` is the final length of each row whose text is read in parts. `remat` (none,
        dots, full) trades memory for recomputation. `embedded` are the rows of the embedding, where
        the caller differentiates by them. The outputs of the blocks `taps`, ascending, are returned
        too.
        """
        tokens = check_tokens(tokens, self.config.vocab)
        here = positions(tokens, segments, cache, doc_length)
        position_inputs = self.position_inputs(here)

        def through(x, cache, layer, weights):
            x = constrain(x, "batch seq embed")
            return self.block(weights, x, here, position_inputs, layer, cache)

        if remat != "none":
            through = jax.checkpoint(through, policy=REMAT[remat], prevent_cse=False)

        def step(carry, scanned):
            (x, cache, states), (layer, weights) = carry, scanned
            x, cache = through(x, cache, layer, weights)
            if states is not None:
                # One that is not asked for lies where the next that is will lie.
                slot = jnp.sum(jnp.array(taps) < layer)
                states = jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)
                states = constrain(states, "taps batch seq embed")
            return (x, cache, states), None

        x = self.embed_input(self.look_up(tokens, dtype) if embedded is None else embedded)
        layers, states = jnp.arange(self.config.layers), None
        if taps:
            rest = taps[-1] + 1 < len(layers)  # blocks behind the last, which need a place too
            states = jnp.zeros((len(taps) + rest, *x.shape), x.dtype)
        carry = x, cache, states
        if isinstance(self.blocks, tuple):
            for scanned in enumerate(self.blocks):
                carry, _ = step(carry, scanned)
        else:
            carry, _ = jax.lax.scan(step, carry, (layers, self.blocks))
        x, cache, states = carry
        x = constrain(self.final_norm(x), "batch seq embed")
        if states is not None:
            return x, states[: len(taps)]
        if cache is None:
            return x
        return x, eqx.tree_at(lambda cache: cache.length, cache, here.cache_length)

    def look_up(self, tokens: Int[Array, "batch seq"], dtype: Any = None) -> Hidden:
        """Rows of the embedding. A device looks up some columns for all rows of its `data`, and
        exchanges them: in its part of the vocabulary it would look for all columns as long."""
        table = self.embedding.astype(self.dtype if dtype is None else dtype)
        rows = constrain(table, "words columns")[constrain(tokens, "rows seq")]
        for axes in (*COLUMNS, "batch seq embed"):
            rows = constrain(rows, axes)
        return rows

    def __call__(
        self, tokens: Int[Array, "batch seq"], segments: Array | None = None, *, dtype: Any = None
    ) -> Float32[Array, "batch seq vocab"]:
        """Logits for the token after each token."""
        x = self.hidden(tokens, segments, dtype=dtype)
        logits = einsum_f32("bse,ve->bsv", x, self.unembedding.astype(x.dtype))
        return constrain(logits, "batch seq vocab")

    def cache(self, batch: int, capacity: int, dtype: Any = None) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens each."""
        config = self.config
        dtype, outer = self.dtype if dtype is None else dtype, (batch, config.kv_heads)
        keys = jnp.zeros((*outer, config.head_dim, capacity), dtype)
        values = jnp.zeros((*outer, capacity, config.head_dim), dtype)
        stacked = (jnp.broadcast_to(x, (config.layers, *x.shape)) for x in (keys, values))
        return Cache(keys, values, jnp.zeros(batch, jnp.int32)).replace(*stacked)


def check_tokens(tokens: Any, vocab: int) -> Int[Array, "batch seq"]:
    """Tokens as an array; outside of a trace, where XLA would read another row of the embedding for
    those that it lacks, these are refused."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        what = f"tokens are {tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"{what}, expected integers [batch, seq]")
    if tokens.size and not isinstance(tokens, jax.core.Tracer) and tokens.is_fully_addressable:
        values = np.asarray(tokens)  # a trace around this one would take jnp.min in
        if values.min() < 0 or values.max() >= vocab:
            extent = f"go from {values.min()} to {values.max()}"
            raise UserError(f"tokens {extent}, the vocabulary has {vocab}")
    return tokens


def unstacked(model: LanguageModel) -> LanguageModel:
    """A model whose blocks are a tuple, each with arrays of its own. To write a token costs an
    accelerator what it reads: a loop over stacked blocks would copy the weights of each before."""
    layers = range(model.config.layers)
    blocks = tuple(jax.tree.map(lambda leaf: leaf[i], model.blocks) for i in layers)  # noqa: B023
    return eqx.tree_at(lambda model: model.blocks, model, blocks)


# Where rows of the embedding lie when they are looked up, and on their way: XLA by itself would
# gather them whole.
COLUMNS = ("rows seq columns", "rows seq embed")


def add_rows(
    table: Float[Array, "vocab embed"], tokens: Int[Array, "batch seq"], rows: Hidden
) -> Float[Array, "vocab embed"]:
    """The backward pass of `look_up`, into what the head has already."""
    for axes in reversed(COLUMNS):
        rows = constrain(rows, axes)
    table = constrain(table, "words columns")
    return table.at[constrain(tokens, "rows seq")].add(rows.astype(table.dtype))


def linear(pattern: str, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A contraction over the last axes of both, in the dtype of `x`: weights are cast where they
    are used, block by block. Nothing else multiplies by a weight of a block: one that is a module
    needs `shape` and `astype`.

    Axes are merged: XLA on CPU transposes a weight of more than two at every use. There, for one
    token a row, the weight comes first: as the second factor it would be packed anew each time.
    """
    operands, result = pattern.split("->")
    summed = sum(axis not in result for axis in operands.split(",")[1])
    batch, outer = x.shape[:-summed], weight.shape[:-summed]
    x = x.reshape(*batch, -1)
    if batch[-1] == 1 and sharding.device()[0] == "cpu":
        matrix = weight.astype(x.dtype).reshape(math.prod(outer), -1)
        y = jax.lax.optimization_barrier(jnp.einsum("oi,...i->o...", matrix, x))  # or it is undone
        y = jnp.moveaxis(y, 0, -1)
    else:
        y = product(x, weight, math.prod(outer))
    y = y.reshape(*batch, *outer)
    return y if bias is None else y + bias.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, weight: Array, width: int) -> Float[Array, "*rest width"]:
    """In the dtype of `x`, also backward; but what devices add up, the gradient of the weight, is
    a sum in float32."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype).reshape(width, -1))


def product_backward(width, operands, d_y):
    x, weight = operands
    matrix = weight.astype(x.dtype).reshape(width, -1)
    d_matrix = jnp.einsum("...o,...i->oi", d_y, x, preferred_element_type=jnp.float32)
    d_weight = d_matrix.reshape(weight.shape).astype(weight.dtype)
    return jnp.einsum("...o,oi->...i", d_y, matrix), d_weight


product.defvjp(lambda *args: (product(*args), args[:2]), product_backward)


_intermediates: ContextVar[dict[str, Array] | None] = ContextVar("intermediates", default=None)


@contextlib.contextmanager
def intermediates() -> Iterator[dict[str, Array]]:
    """Inside, `sow` puts values of a block into this dict. What is traced there is not for a
    backward pass: nothing is rematerialised, or these would be values of another trace."""
    values: dict[str, Array] = {}
    token = _intermediates.set(values)
    try:
        yield values
    finally:
        _intermediates.reset(token)


def sow(name: str, x: Array) -> Array:
    """`x`, which those who ask for intermediates know by this name."""
    if (values := _intermediates.get()) is not None:
        values[name] = x
    return x


def recompute(function: Callable, **options: Any) -> Callable:
    """Of what is cheap to compute again, only the inputs are kept for the backward pass. It may end
    in a product: the result is not needed there, so the product is not repeated."""
    checkpointed = jax.checkpoint(function, prevent_cse=False, **options)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (checkpointed if _intermediates.get() is None else function)(*args)

    return call


@partial(recompute, static_argnums=2)
def rms_norm(x: Array, weight: Float[Array, " width"], eps: float) -> Float[Array, "*rest width"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


@partial(recompute, static_argnums=3)
def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Float[Array, "*rest width"]:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
