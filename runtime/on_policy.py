"""Batches whose text a model has written: what it makes of prompts that the data's rows begin with.

Which steps have one, and what is written there, is a function of the seed and the step alone.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

import data
import sharding
from generate import Sampling, sample
from models.base import LanguageModel
from runtime import errors
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sampling):
    fraction: float = 0.0
    """Share of the steps whose text is written by a model instead of read; they are drawn by the
    seed."""
    writer: Literal["student", "teacher"] = "student"
    """Who writes it: the student as it is before that step, or the teacher."""
    prompt: int | None = None
    """Tokens of each row that are read and continued, of the last document among them; by default
    a quarter of the row."""
    max_new: int | None = None
    """Tokens written in a row at most; by default its rest."""

    def __post_init__(self):
        if not 0 <= self.fraction <= 1:
            raise UserError(f"--on-policy.fraction is {self.fraction}: it must be from 0 to 1")
        errors.check_counts(self, "prompt", "max_new", prefix="--on-policy.")
        try:
            super().__post_init__()
        except UserError as error:
            raise UserError(str(error).replace("--", "--on-policy.", 1)) from None

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Of prompts and of what follows them, at most, in rows that predict `seq_len` tokens."""
        prompt = self.prompt or max(1, seq_len // 4)
        if prompt > seq_len:
            raise UserError(
                f"--on-policy.prompt is {prompt}: with --seq-len {seq_len} it must be {seq_len} or"
                " less, so that something can follow"
            )
        return prompt, min(self.max_new or seq_len, seq_len + 1 - prompt)


def keys(seed: int, step: Int[Array, ""] | int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Of a step: that which says whether text is written, and that of the text."""
    turn, words = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return turn, words


def turns(config: Config, seed: int, start: int, stop: int) -> Bool[np.ndarray, " steps"]:
    """At which of these steps text is written."""
    if not config.fraction or start >= stop:
        return np.zeros(max(0, stop - start), bool)
    drawn = jax.vmap(lambda step: jax.random.uniform(keys(seed, step)[0]))(np.arange(start, stop))
    return sharding.to_host(drawn) < config.fraction


@eqx.filter_jit
def write(
    writer: LanguageModel,
    batch: data.Batch,
    step: Int[Array, ""],
    *,
    config: Config,
    seed: int,
    vocab: int,
    stop: tuple[int, ...],
    dtype: Any = None,
) -> data.Batch:
    """The batch of a step, continued by `writer` after the beginnings of its rows.

    A row is a document: the last one that its first tokens reach, from where it begins there, and
    then what was sampled, from the first `vocab` tokens, which alone counts. A document that has
    ended is not continued: its row counts nothing.
    """
    rows, width = batch.tokens.shape
    longest, new = config.lengths(width - 1)
    prompts, lengths = beginnings(batch, longest, stop)
    if len(writer.unembedding) > vocab:  # tokens that only the writer has
        head = writer.unembedding[:vocab]
        writer = eqx.tree_at(lambda model: model.head, writer, head, is_leaf=lambda x: x is None)
    found, counts = sample(
        writer, prompts, lengths, keys(seed, step)[1],
        max_new=new, sampling=config.sampling, stop=stop, dtype=dtype,
    )  # fmt: skip
    at = jnp.arange(width)
    begins, ends = lengths[:, None], (lengths + counts)[:, None]
    tokens = jnp.pad(prompts, ((0, 0), (0, width - longest)))
    after = jnp.clip(at - begins, 0, new - 1)
    tokens = jnp.where(at < begins, tokens, jnp.take_along_axis(found, after, axis=1))
    segments = (at < ends).astype(jnp.int32)
    written = (begins <= at) & (at < ends)
    made = data.Batch(tokens * segments, segments, written[:, 1:])
    return jax.tree.map(lambda x: sharding.constrain(x, "batch seq"), made)


def beginnings(
    batch: data.Batch, longest: int, stop: tuple[int, ...]
) -> tuple[Int[Array, "batch prompt"], Int[Array, " batch"]]:
    """Right-padded prompts of up to `longest` tokens, and their lengths, 0 where there is none."""
    tokens, segments = batch.tokens[:, :longest], batch.segments[:, :longest]
    at = jnp.arange(longest)
    last = jnp.max(jnp.where(segments > 0, at, -1), axis=1, keepdims=True)
    inside = (segments == jnp.take_along_axis(segments, jnp.maximum(last, 0), axis=1)) & (last >= 0)
    first = jnp.min(jnp.where(inside, at, longest), axis=1, keepdims=True)
    lengths = jnp.maximum(last - first + 1, 0)
    end = jnp.take_along_axis(tokens, jnp.maximum(last, 0), axis=1)
    ended = (end == jnp.array(stop, jnp.int32)).any(axis=1, keepdims=True)
    # Alone it is the token by which some tokenizers begin a document.
    lengths = jnp.where(ended & (lengths > 1), 0, lengths)
    moved = jnp.take_along_axis(tokens, jnp.minimum(first + at, longest - 1), axis=1)
    return jnp.where(at < lengths, moved, 0), lengths[:, 0]
