"""Batches whose text a model has written: continuations of what the data's rows begin with.

Which steps have one, and what is written there, is a function of the seed and the step alone.
"""

import contextlib
import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

import data
import sharding
from generate import Decoding, Sampling, sample
from models.base import LanguageModel, unstacked
from optim import is_matrix
from runtime.errors import UserError, at_least, between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sampling):
    flag_prefix: ClassVar[str] = "--on-policy."

    fraction: Annotated[float, between(0, 1)] = 0.0
    """Share of the steps, drawn by the seed, whose text is written by a model instead of read."""
    writer: Literal["student", "teacher"] = "student"
    """Who writes it: the student as it is before that step, or the teacher."""
    prompt: Annotated[int | None, at_least(1)] = None
    """Tokens of each row that are read and continued, of the last document among them; by default
    a quarter of the row."""
    max_new: Annotated[int | None, at_least(1)] = None
    """Tokens written in a row at most; by default its rest."""

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Of prompts and of what follows them, at most, in rows that predict `seq_len` tokens."""
        prompt = self.prompt or max(1, seq_len // 4)
        if prompt > seq_len:
            raise UserError(f"--on-policy.prompt {prompt}: it must be --seq-len {seq_len} or less")
        return prompt, min(self.max_new or seq_len, seq_len + 1 - prompt)


def step_keys(seed: int, step: Int[Array, ""] | int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Two keys of a step: one draws whether text is written, the other the text."""
    return tuple(jax.random.split(jax.random.fold_in(jax.random.key(seed), step)))


def on_policy_steps(config: Config, seed: int, start: int, stop: int) -> Bool[np.ndarray, " steps"]:
    """At which of these steps text is written."""
    if not config.fraction or start >= stop:
        return np.zeros(max(0, stop - start), bool)
    draw = jax.vmap(lambda step: jax.random.uniform(step_keys(seed, step)[0]))
    return sharding.to_host(draw(np.arange(start, stop))) < config.fraction


@eqx.filter_jit
def continue_rows(
    writer: LanguageModel, batch: data.Batch, step: Int[Array, ""], *,
    config: Config, seed: int, vocab: int, stop: tuple[int, ...], dtype: Any = None,
    whole: bool = False,
) -> data.Batch:  # fmt: skip
    """The batch of a step, its rows continued by `writer` with the first `vocab` tokens.

    A row is the last document that its first tokens reach, and what was sampled, which alone
    counts; nothing where the document has ended. `whole` gathers the writer once for all tokens.
    """
    at = jnp.arange(batch.tokens.shape[1])
    longest, new = config.lengths(len(at) - 1)
    prompts, lengths = row_prompts(batch, longest, stop)
    if len(writer.unembedding) > vocab:  # tokens that only the writer has
        head = writer.unembedding[:vocab]
        writer = eqx.tree_at(lambda model: model.head, writer, head, is_leaf=lambda x: x is None)
    decoding, key = Decoding(new, config.sampling, stop, dtype), step_keys(seed, step)[1]
    with sharding.in_scope(generation_layout()) if whole else contextlib.nullcontext():
        writer = sharding.constrain_tree(generation_copy(writer, dtype)) if whole else writer
        words, counts = sample(writer, prompts, lengths, key, decoding)
    starts, ends = lengths[:, None], (lengths + counts)[:, None]
    words = jnp.take_along_axis(words, jnp.clip(at - starts, 0, new - 1), axis=1)
    tokens = jnp.where(at < starts, jnp.pad(prompts, ((0, 0), (0, len(at) - longest))), words)
    segments = (at < ends).astype(jnp.int32)
    continued = data.Batch(tokens * segments, segments, ((starts <= at) & (at < ends))[:, 1:])
    return jax.tree.map(lambda x: sharding.constrain(x, "batch seq"), continued)


def generation_layout() -> sharding.Layout:
    """That of the run, but for a writer that only `tensor` splits: no token gathers a weight."""
    return dataclasses.replace(sharding.in_scope.value, zero=1)


def generation_copy(writer: LanguageModel, dtype: Any = None) -> LanguageModel:
    """A writer whose matrices are in the dtype that it computes in, cast once for all tokens; on
    accelerators its blocks are apart."""
    dtype = writer.dtype if dtype is None else dtype
    cast = jax.tree.map(
        lambda leaf, names: leaf.astype(dtype) if is_matrix(names) else leaf,
        writer, sharding.axes(writer),
    )  # fmt: skip
    cast = cast if sharding.device()[0] == "cpu" else unstacked(cast)
    return jax.lax.optimization_barrier(cast)  # or XLA would cast in the loop


def row_prompts(
    batch: data.Batch, longest: int, stop: tuple[int, ...]
) -> tuple[Int[Array, "batch prompt"], Int[Array, " batch"]]:
    """Right-padded prompts of up to `longest` tokens, and their lengths, 0 where there is none."""
    tokens, segments = batch.tokens[:, :longest], batch.segments[:, :longest]
    at = jnp.arange(longest)
    last = jnp.max(jnp.where(segments > 0, at, 0), axis=1, keepdims=True)
    inside = (segments > 0) & (segments == jnp.take_along_axis(segments, last, axis=1))
    lengths = jnp.sum(inside, axis=1, keepdims=True)
    end = jnp.take_along_axis(tokens, last, axis=1)
    ended = (end == jnp.array(stop, jnp.int32)).any(axis=1, keepdims=True)
    # Alone it is the token by which some tokenizers begin a document.
    lengths = jnp.where(ended & (lengths > 1), 0, lengths)
    source = jnp.minimum(last - lengths + 1 + at, longest - 1)
    return jnp.where(at < lengths, jnp.take_along_axis(tokens, source, axis=1), 0), lengths[:, 0]
