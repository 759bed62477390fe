"""What a teacher says of a batch: a field of the batch, and a divergence on tiles of logits.

Each kind of signal has
- `rows`, its arrays of [batch, seq, ...], which the loss cuts into chunks of tokens;
- `divergence(vocab)`, called once per loss: a function `(rows, config, z, temperature)` of a chunk
  of `rows` and the student's logits z, to the divergence of each row and its gradient on z;
- `head`, the teacher's, which all rows share; or None.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

import data
from losses.divergences import LOWEST, terms
from losses.objective import Config
from models.attention import einsum_f32
from models.base import LanguageModel
from sharding import constrain, device, num_shards

Logits = Float32[Array, "vocab rows"]  # so that sums over the vocabulary run along memory
Values = tuple[Float32[Array, " rows"], Logits]


def prepare_head(head: Float[Array, "rows embed"], dtype: jnp.dtype) -> Float[Array, "vocab embed"]:
    """A head in the dtype of hidden states, split over the vocabulary evenly, by added rows."""
    missing = -len(head) % num_shards("vocab")
    return constrain(jnp.pad(head.astype(dtype), [(0, missing), (0, 0)]), "vocab embed")


def head_logits(
    head: Float[Array, "padded embed"], hidden: Float[Array, "rows embed"], vocab: int
) -> Logits:
    """Rows of the head beyond `vocab` have no probability."""
    z = constrain(einsum_f32("ve,re->vr", head, hidden), "vocab rows")
    return z if len(z) == vocab else jnp.where(jnp.arange(len(z))[:, None] < vocab, z, -jnp.inf)


class TeacherStates(eqx.Module):
    """All that a teacher says: its states before its head, the head, and outputs of its blocks."""

    hidden: Float[Array, "batch seq embed"]
    head: Float[Array, "vocab embed"]
    taps: Float[Array, "batch taps seq embed"] | None = None
    rows = property(lambda self: self.hidden)

    def logits(self, vocab: int) -> Callable[[Float[Array, "rows embed"]], Logits]:
        """From hidden states to logits: rows of the wider head have no probability."""
        head = prepare_head(self.head[:vocab], self.hidden.dtype)
        return lambda hidden: head_logits(head, hidden, vocab)

    def divergence(self, vocab: int) -> Callable[..., Values]:
        logits = self.logits(vocab)
        return lambda hidden, *student: full_divergence(logits(hidden), *student)


class Targets(NamedTuple):
    """What a teacher says of some tokens at each position, `entries`, and of the rest."""

    ids: Int[Array, "*rows entries"]
    log_probs: Float32[Array, "*rows entries"]
    rest: Float32[Array, "*rows"]

    head = None
    rows = property(lambda self: self)
    entries = property(lambda self: (self.ids.T, jnp.arange(len(self.ids))))  # of logits

    def divergence(self, vocab: int) -> Callable[..., Values]:
        return type(self).chunk_divergence

    @classmethod
    def abstract(cls, batch: int, seq: int, entries: int) -> "Targets":
        """The shapes of targets, for a plan."""
        each = jax.ShapeDtypeStruct((batch, seq, entries), jnp.float32)
        return cls(each.update(dtype=jnp.int32), each, each.update(shape=(batch, seq)))


class TopK(Targets):
    """A teacher's likeliest tokens; `rest` is the log of the mass of all others, one bucket."""

    def chunk_divergence(self, config: Config, z: Logits, temperature: Any) -> Values:
        inv_temperature, entries = 1.0 / temperature, self.entries
        z *= inv_temperature
        z_entries, z = z[entries], z.at[entries].set(-jnp.inf)
        # Of the rest itself: one less the sum of the entries would be lost in rounding.
        lse_rest = jnp.maximum(logsumexp(z), LOWEST)
        lse = jnp.logaddexp(lse_rest, logsumexp(z_entries))
        log_q = jnp.vstack([z_entries, lse_rest]) - lse
        f, g = terms(config, jnp.vstack([self.log_probs.T, self.rest]), log_q)
        g -= jnp.exp(log_q) * g.sum(0)
        d_z = (jnp.exp(z - lse_rest) * g[-1]).at[entries].set(g[:-1])
        return f.sum(0), inv_temperature * d_z


class SampledTargets(Targets):
    """A sample of distinct tokens: each stands for max(p, threshold), which in the mean is its p;
    `rest` is the log of the threshold."""

    def chunk_divergence(self, config: Config, z: Logits, temperature: Any) -> Values:
        """The forward KL, the one divergence that a sample of p estimates without bias."""
        inv_temperature, entries, log_p = 1.0 / temperature, self.entries, self.log_probs.T
        z *= inv_temperature
        lse, weight = logsumexp(z), jnp.exp(jnp.maximum(log_p, self.rest))
        f = weight * (log_p - z[entries] + lse)
        d_z = (jnp.exp(z - lse) * weight.sum(0)).at[entries].add(-weight)
        return f.sum(0), inv_temperature * d_z


Signal = TeacherStates | TopK | SampledTargets | None


def teacher_states(
    teacher: LanguageModel, batch: data.Batch, *, dtype: Any = None, taps: tuple[int, ...] = ()
) -> TeacherStates:
    """A teacher's forward pass, never differentiated, with the outputs of the blocks `taps`."""
    states = teacher.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype, taps=taps)
    hidden, outputs = (states[0], jnp.moveaxis(states[1], 0, 1)) if taps else (states, None)
    return TeacherStates(*jax.lax.stop_gradient((hidden, teacher.unembedding, outputs)))


def partition_rows(batch: data.Batch) -> tuple[data.Batch, data.Batch]:
    """The arrays of a batch that have its rows first, and the one that has none: the head."""
    head = getattr(batch.signal, "head", None)
    return eqx.partition(batch, lambda leaf: leaf is not head)


def apart_on_cpu(value_and_logits: tuple) -> tuple:
    """Makes logits new to a CPU's compiler, so that a gradient computes its log-probabilities anew,
    fused with what reads them: those of the value would be kept whole. Compilers of GPUs compute
    both in one pass, unless they are kept apart."""
    if device()[0] != "cpu":
        return value_and_logits
    return jax.lax.optimization_barrier(value_and_logits)


def logsumexp(z: Logits) -> Float32[Array, " rows"]:
    """Over the vocabulary. Logits lie in memory, and one pass over them is what it costs; but a
    CPU is faster with the largest first, and then a sum without choices."""
    if device()[0] == "cpu":
        return jax.nn.logsumexp(z, 0)

    def merge(a, b):
        (top_a, sum_a), (top_b, sum_b) = a, b
        shrink = jnp.where(top_a == top_b, 1.0, jnp.exp(-jnp.abs(top_a - top_b)))  # -inf too
        sums = sum_a + sum_b * shrink, sum_a * shrink + sum_b
        return jnp.maximum(top_a, top_b), jnp.where(top_a > top_b, *sums)

    init = jnp.float32(-jnp.inf), jnp.float32(0)
    top, total = jax.lax.reduce((z, jnp.ones_like(z)), init, merge, (0,))
    return top + jnp.log(total)


def full_divergence(z_teacher: Logits, config: Config, z: Logits, temperature: Any) -> Values:
    """Per row, and its gradient on the student's logits `z`."""
    inv_temperature = 1.0 / temperature
    lse_p, lse_q = logsumexp(z_teacher * inv_temperature), logsumexp(z * inv_temperature)

    def value_and_slope(z_teacher, z):
        log_q = z * inv_temperature - lse_q
        return *terms(config, z_teacher * inv_temperature - lse_p, log_q), log_q

    value = value_and_slope(z_teacher, z)[0].sum(0)
    value, z_teacher, z = apart_on_cpu((value, z_teacher, z))
    _, g, log_q = value_and_slope(z_teacher, z)
    if config.divergence != "forward_kl":  # there g = q - p, which sums to 0
        g -= jnp.exp(log_q) * g.sum(0)
    return value, inv_temperature * g
