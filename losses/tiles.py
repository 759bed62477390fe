"""A head walked in chunks of tokens: tiles of logits, and never all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PyTree

from models.attention import einsum_f32
from sharding import constrain, num_shards

Logits = Float32[Array, "vocab rows"]  # so that sums over the vocabulary run along memory


def prepare_head(head: Float[Array, "rows embed"], dtype: jnp.dtype) -> Float[Array, "vocab embed"]:
    """A head in the dtype of hidden states, split over the vocabulary alone, and filled up with
    rows to do so evenly."""
    missing = -len(head) % num_shards("vocab")
    return constrain(jnp.pad(head.astype(dtype), [(0, missing), (0, 0)]), "vocab embed")


def logits(
    head: Float[Array, "padded embed"], hidden: Float[Array, "rows embed"], vocab: int
) -> Logits:
    """Rows of the head beyond `vocab` have no probability."""
    z = constrain(einsum_f32("ve,re->vr", head, hidden), "vocab rows")
    return z if len(z) == vocab else jnp.where(jnp.arange(len(z))[:, None] < vocab, z, -jnp.inf)


def scan_chunks(chunk_fn: Callable, init: PyTree, chunk: int, arrays: PyTree) -> tuple:
    """`lax.scan` of `chunk_fn` along the sequence: each array, [batch, seq, ...], reaches it as
    [rows, ...], about `chunk` tokens at a time. What fills up the last one is 0, and False in a
    mask."""
    batch, seq = jax.tree.leaves(arrays)[0].shape[:2]
    count, length = chunks(batch, seq, chunk)
    padding = (0, 0), (0, count * length - seq), (0, 0)
    arrays = jax.tree.map(lambda x: jnp.pad(x, padding[: x.ndim]), arrays)

    def body(carry, i):
        def rows(x):
            x = jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1)
            x = x.reshape(batch * length, *x.shape[2:])
            return constrain(x, "rows width" if x.ndim == 2 else "rows")

        def unflatten(y):
            y = y.reshape(batch, length, *y.shape[1:])
            return constrain(y, "batch seq width" if y.ndim == 3 else "batch seq")

        carry, y = chunk_fn(carry, *jax.tree.map(rows, arrays))
        return carry, jax.tree.map(unflatten, y)

    def unchunk(y):
        return jnp.moveaxis(y, 0, 1).reshape(batch, count * length, *y.shape[3:])[:, :seq]

    carry, ys = jax.lax.scan(body, init, jnp.arange(count))
    return carry, jax.tree.map(unchunk, ys)


def chunks(batch: int, seq: int, chunk: int) -> tuple[int, int]:
    """How many chunks, and how many positions each: as even as can be, for the least padding."""
    count = -(-seq // max(1, chunk // batch))
    return count, -(-seq // count)


def default_chunk(head: Float[Array, "vocab embed"]) -> int:
    """As many tokens as keep their logits small beside what a device has, and its products large:
    below 128 the products of a CPU slow down, above 256 its caches; an accelerator wants 1024."""
    least, elements = (128, 2**22) if jax.default_backend() == "cpu" else (1024, 2**27)
    return max(least, elements * num_shards("vocab") // len(head))
