"""What every decoder here shares: the outline of a model, its scan over blocks, linear, norms."""

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, PyTree

from models.attention import Cache, Positions, einsum_f32, positions
from sharding import constrain


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
    def embed_input(self, rows: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """The input of the first block, from rows of the embedding."""

    @abstractmethod
    def position_inputs(self, positions: Positions) -> PyTree:
        """What every block needs to know of the positions, computed once for all of them."""

    @abstractmethod
    def block(
        self,
        weights: PyTree,
        x: Float[Array, "batch seq embed"],
        positions: Positions,
        position_inputs: PyTree,
        layer: Int[Array, ""],
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """One block; `weights` is `blocks` at `layer`."""

    @abstractmethod
    def final_norm(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
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
        return self.embed_input(self.embedding[tokens].astype(dtype))

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
        *,
        embedded: Float[Array, "batch seq embed"] | None = None,
        cache: Cache | None = None,
        dtype: Any = None,
        remat: str = "none",
        taps: tuple[int, ...] = (),
    ) -> (
        Float[Array, "batch seq embed"]
        | tuple[Float[Array, "batch seq embed"], Cache]
        | tuple[Float[Array, "batch seq embed"], Float[Array, "taps batch seq embed"]]
    ):
        """The states before the head, which is `unembedding`.

        Tokens attend and count positions within their own run of equal `segments`; segment 0 is
        padding. With a `cache` they continue its rows, and the grown cache is returned too; then
        `segments` only tells tokens from the padding behind them, which the cache forgets. `dtype`
        is computed in, `remat` (none, dots, full) trades memory for recomputation. `embedded` are those
        of the embedding, where the caller has looked them up to differentiate by them. With the
        numbers of some blocks, ascending, in `taps` their outputs are returned too.
        """
        here = positions(tokens, segments, cache)
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

        embedded = self.embedding[tokens] if embedded is None else embedded
        x = self.embed_input(embedded.astype(self.dtype if dtype is None else dtype))
        layers, states = jnp.arange(self.config.layers), None
        if taps:
            rest = taps[-1] + 1 < len(layers)  # blocks behind the last, which need a place too
            states = jnp.zeros((len(taps) + rest, *x.shape), x.dtype)
        (x, cache, states), _ = jax.lax.scan(step, (x, cache, states), (layers, self.blocks))
        x = constrain(self.final_norm(x), "batch seq embed")
        if states is not None:
            return x, states[: len(taps)]
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
        logits = einsum_f32("bse,ve->bsv", x, self.unembedding.astype(x.dtype))
        return constrain(logits, "batch seq vocab")

    def cache(self, batch: int, capacity: int, dtype: Any = None) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens each."""
        config = self.config
        outer = config.layers, batch, config.kv_heads
        dtype = self.dtype if dtype is None else dtype
        keys = jnp.zeros((*outer, config.head_dim, capacity), dtype)
        values = jnp.zeros((*outer, capacity, config.head_dim), dtype)
        return Cache(keys, values, jnp.zeros(batch, jnp.int32))


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
rematerialise = partial(jax.checkpoint, prevent_cse=False)


@partial(rematerialise, static_argnums=2)
def rms_norm(
    x: Float[Array, "*rest width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "*rest width"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


@partial(rematerialise, static_argnums=3)
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


def normal(key: PRNGKeyArray, *shape: int) -> Float[Array, "..."]:
    """Fresh weights as the families here are initialised."""
    return 0.02 * jax.random.normal(key, shape, jnp.float32)
