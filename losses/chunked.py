"""What walks over the vocabulary in chunks of tokens: the loss with its gradients, the figures of
an evaluation, and the making of targets."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray, PyTree

import data
import sharding
from losses import signal as signals
from losses.objective import Config, Objective
from losses.signal import SampledTargets, Signal, TeacherStates, TopK
from models.attention import einsum_f32
from models.base import LanguageModel
from sharding import claims, constrain, device, num_shards


@partial(jax.custom_vjp, nondiff_argnames=("objective",))
def distill_loss(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    signal: Signal,
    labels: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    objective: Objective,
    step: Int[Array, ""] | int,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The loss summed over the tokens of `mask`, and its two parts, unweighted: divergence, ce.

    `labels` and `mask` are of the predicted token: `labels[t]` follows what `hidden[t]` has read.
    Only the student is differentiated, and only through the loss. Without a signal the loss is the
    cross entropy alone. The caller divides by the tokens of the whole optimizer step.
    """
    return _value_and_grads(student_hidden, student_head, signal, labels, mask, objective, step)[0]


def _value_and_grads(hidden, student_head, signal, labels, mask, objective, step):
    """`distill_loss`, and its gradients on hidden and head before any cotangent."""
    config, (vocab, weights) = objective.config, _prepare_head(student_head, signal, hidden.dtype)
    alpha, temperature = objective.at("alpha", step), objective.at("temperature", step)
    weight = alpha * temperature**2 if config.temperature_squared else alpha
    rows, divergence, ce_weight = None, None, 1.0
    if signal is not None:
        rows, divergence, ce_weight = signal.rows, signal.divergence(vocab), 1.0 - alpha
    chunk = config.chunk or default_chunk(weights)
    # Devices add up head gradients of their own, which are reduced once and not at every chunk.
    parts = num_shards("rows")
    if len(hidden) * chunks(*hidden.shape[:2], chunk)[1] % parts:
        parts = 1

    def chunk_fn(carry, hidden, rows, labels, mask):
        sums, d_head = carry
        z = signals.head_logits(weights, hidden, vocab)
        terms = [("ce", ce_weight, *_cross_entropy(z, labels))]
        if divergence is not None:
            terms.append(("divergence", weight, *divergence(rows, config, z, temperature)))
        # Here and not after the scan: rows of the values, and so of the logits, would be exchanged.
        sums = sums | {name: sums[name] + jnp.sum(x, where=mask) for name, _, x, _ in terms}
        # a weight that is a constant 0 costs nothing; XLA would keep 0 * x
        d_z = sum(w * d for _, w, _, d in terms if not (isinstance(w, float) and w == 0))
        # Not a product with the mask: what is masked may not be finite.
        d_z = constrain(jnp.where(mask, d_z, 0.0).astype(hidden.dtype), "vocab rows")
        hidden = jnp.where(mask[:, None], hidden, jnp.zeros_like(hidden))
        split = d_z.reshape(len(d_z), parts, -1), hidden.reshape(parts, -1, hidden.shape[-1])
        d_head += constrain(einsum_f32("vpr,pre->pve", *split), "rows vocab embed")
        return (sums, d_head), einsum_f32("vr,ve->re", d_z, weights).astype(hidden.dtype)

    sums = dict.fromkeys(("divergence", "ce"), jnp.float32(0))
    d_head = constrain(jnp.zeros((parts, *weights.shape), jnp.float32), "rows vocab embed")
    init, arrays = (sums, d_head), (hidden, rows, labels, mask)
    (sums, d_head), d_hidden = scan_chunks(chunk_fn, init, chunk, arrays)
    d_head = constrain(d_head.sum(0), "vocab embed")[:vocab].astype(student_head.dtype)
    d_head = jnp.pad(d_head, [(0, len(student_head) - vocab), (0, 0)])
    return (weight * sums["divergence"] + ce_weight * sums["ce"], sums), (d_hidden, d_head)


def _backward(objective, grads, cotangents):
    scale, _ = cotangents
    d_hidden, d_head = ((scale * g.astype(scale.dtype)).astype(g.dtype) for g in grads)
    return d_hidden, d_head, None, None, None, None


distill_loss.defvjp(_value_and_grads, _backward)


def measure(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    signal: TeacherStates | None,
    labels: Int[Array, "batch seq"],
    *,
    top: int = 0,
    chunk: int | None = None,
) -> dict[str, Array]:
    """Measures each token: ce; beside a teacher teacher_ce, kl, reverse_kl and agreement (whether
    both find the same successor likeliest) too. And the `top` likeliest successors, as ids and
    log_probs, teacher_ids and teacher_log_probs."""
    vocab, weights = _prepare_head(student_head, signal, student_hidden.dtype)
    rows, teacher_logits = signal and signal.rows, signal and signal.logits(vocab)

    def chunk_fn(carry, hidden, teacher_hidden, labels):
        logits, figures = {"": signals.head_logits(weights, hidden, vocab)}, {}
        if teacher_logits is not None:
            logits["teacher_"] = teacher_logits(teacher_hidden)
            z, z_teacher = logits.values()
            for name, kind in (("kl", "forward_kl"), ("reverse_kl", "reverse_kl")):
                figures[name] = signals.full_divergence(z_teacher, Config(kind), z, 1.0)[0]
            figures["agreement"] = jnp.argmax(z, 0) == jnp.argmax(z_teacher, 0)
        for whose, z in logits.items():
            figures[f"{whose}ce"] = _cross_entropy(z, labels)[0]
            if top:
                largest, figures[f"{whose}ids"] = _largest(z.T, min(top, vocab))
                figures[f"{whose}log_probs"] = largest - signals.logsumexp(z)[:, None]
        # Or the mesh would exchange rows of the logits, to where those of the batch are.
        axes = "", "rows", "rows width"
        return carry, {name: constrain(x, axes[x.ndim]) for name, x in figures.items()}

    chunk, arrays = chunk or default_chunk(weights), (student_hidden, rows, labels)
    return scan_chunks(chunk_fn, None, chunk, arrays)[1]


@sharding.jit
def token_figures(
    model: LanguageModel, teacher: LanguageModel | None, batch: data.Batch, *,
    dtype: Any = None, **options: Any,
) -> dict[str, Array]:  # fmt: skip
    """What `measure` says of every token of a batch, by its signal if it has one."""
    signal = batch.signal
    if signal is None and teacher is not None:
        signal = signals.teacher_states(teacher, batch, dtype=dtype)
    hidden = model.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype)
    return measure(hidden, model.unembedding, signal, batch.tokens[:, 1:], **options)


def _prepare_head(head, signal, dtype):
    """Tokens that student and teacher share, and the student's head for tiles of their logits:
    padding rows of the wider have no probability."""
    teacher_head = getattr(signal, "head", None)
    vocab = len(head if teacher_head is None else teacher_head[: len(head)])
    return vocab, signals.prepare_head(head[:vocab], dtype)


def _cross_entropy(z, labels):
    """Per row, and its gradient on the logits `z`, [vocab, rows]."""
    hit = jnp.arange(len(z), dtype=labels.dtype)[:, None] == labels
    lse = signals.logsumexp(z)
    value = lse - jnp.where(hit, z, 0).sum(0)
    value, z = signals.apart_on_cpu((value, z))
    q = jnp.exp(z - lse)
    return value, jnp.where(hit, q - 1, q)


def top_k(
    teacher: TeacherStates, *, count: int, temperature: float, chunk: int | None = None
) -> TopK:
    """The `count` likeliest tokens of a teacher, likeliest first."""

    def chunk_fn(z, lse):
        # Logits are compared: log-probabilities could be rounded otherwise where XLA computes their
        # normaliser anew, and the last of the entries would count as one of the others too.
        largest, ids = _largest(z, count)
        edge = largest[:, -1:]
        below = jnp.where(z < edge, jnp.exp(z - edge), 0).sum(1)
        ties = (z >= edge).sum(1) - count  # as likely as the last of the entries
        rest = edge[:, 0] + jnp.log(below + ties.astype(below.dtype))
        return TopK(ids, largest - lse, rest - lse[:, 0])

    return _scan_logits(chunk_fn, teacher, temperature, chunk)


def sample_targets(
    teacher: TeacherStates,
    windows: Int[Array, " batch"],
    key: PRNGKeyArray,
    *,
    count: int,
    temperature: float,
    chunk: int | None = None,
) -> SampledTargets:
    """A priority sample of a teacher's tokens (Duffield, Lund and Thorup 2007).

    Token i has the priority p_i / u_i, u uniform: the largest are taken, and the next is the
    threshold. Hardly any unbiased sample of this size varies less. What is drawn at a position
    depends on the number of its window alone.
    """

    def chunk_fn(z, lse, windows, positions):
        log_p = z - lse

        def noise(window, position):
            row_key = jax.random.fold_in(jax.random.fold_in(key, window), position)
            return jax.random.exponential(row_key, log_p.shape[1:])

        noise = constrain(jax.vmap(noise)(windows, positions), "rows vocab")
        priorities, ids = _largest(log_p + noise, count + 1)
        ids = ids[:, :-1]
        return SampledTargets(ids, jnp.take_along_axis(log_p, ids, 1), priorities[:, -1])

    shape = teacher.hidden.shape[:2]
    rows = (jnp.broadcast_to(x, shape) for x in (windows[:, None], jnp.arange(shape[1])))
    return _scan_logits(chunk_fn, teacher, temperature, chunk, *rows)


def _scan_logits(target_fn, teacher: TeacherStates, temperature, chunk, *arrays):
    """What `target_fn` makes of the teacher's logits, [rows, vocab], and their logsumexp."""
    teacher_logits = teacher.logits(len(teacher.head))

    def chunk_fn(carry, hidden, *rows):
        z = teacher_logits(hidden).T / temperature
        return carry, target_fn(z, jax.nn.logsumexp(z, 1, keepdims=True), *rows)

    chunk = chunk or default_chunk(teacher.head)
    return scan_chunks(chunk_fn, None, chunk, (teacher.hidden, *arrays))[1]


def _largest(x, count: int):
    """The largest of each row, in order, and where they are: first in each device's part of it."""
    if num_shards("vocab") == 1 or len(x) % num_shards("rows"):
        # The barrier: a slice of these, merged into the search, would make XLA sort all of x.
        return jax.lax.optimization_barrier(jax.lax.top_k(x, count))
    rows, vocab = claims(["rows", "vocab"], jax.sharding.get_abstract_mesh())

    def top(x):
        values, ids = jax.lax.top_k(x, min(count, x.shape[1]))
        return values, ids + x.shape[1] * jax.lax.axis_index(vocab)

    # Left to itself, XLA would gather the whole of x.
    spec = PartitionSpec(rows or None, vocab)
    values, ids = jax.shard_map(top, in_specs=spec, out_specs=(spec, spec))(x)
    values, best = jax.lax.top_k(constrain(values, "rows width"), count)
    return values, jnp.take_along_axis(constrain(ids, "rows width"), best, 1)


def scan_chunks(chunk_fn: Callable, init: PyTree, chunk: int, arrays: PyTree) -> tuple:
    """`lax.scan` of `chunk_fn` along the sequence: each array, [batch, seq, ...], reaches it as
    [rows, ...], about `chunk` tokens at a time. The last one is filled up with 0, or False."""
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
    below 128 the products of a CPU slow down, above 256 its caches; an accelerator wants 1024.
    Every device has the hidden states of all of them, however many share the vocabulary."""
    least, elements = (128, 2**22) if device()[0] == "cpu" else (1024, 2**29)
    vocab, embed = head.shape
    return max(least, min(elements * num_shards("vocab") // vocab, elements // (4 * embed)))
