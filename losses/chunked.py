"""What walks over the vocabulary in chunks of tokens: the loss with its gradients, the figures of
an evaluation, and the making of targets."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from losses import tiles
from losses.objective import Config, Objective
from losses.signal import SampledTargets, Signal, TeacherStates, TopK, full_divergence
from models.attention import einsum_f32
from sharding import claims, constrain, num_shards


def distill_loss(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    signal: Signal,
    labels: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    objective: Objective,
    step: Int[Array, ""] | int,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The loss summed over the tokens of `mask`, and its two parts, unweighted: divergence, ce.

    `labels` and `mask` are of the predicted token: `labels[t]` follows what `hidden[t]` has read.
    Only the student is differentiated, and only through the loss. Without a signal the loss is the
    cross entropy alone. The caller divides by the tokens of the whole optimizer step.
    """
    arrays = student_hidden, _common_rows(student_head, signal), signal, labels, mask
    total, sums = _loss(objective, *arrays, jnp.asarray(step))
    return total, jax.lax.stop_gradient(sums)


def measure(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    signal: TeacherStates | None,
    labels: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    chunk: int | None = None,
) -> dict[str, Float32[Array, ""]]:
    """Sums over the tokens of `mask`: tokens and ce; beside a teacher teacher_ce, kl, reverse_kl
    and agreement (tokens for which both find the same successor likeliest) too."""
    head = _common_rows(student_head, signal)
    vocab, weights = len(head), tiles.prepare_head(head, student_hidden.dtype)
    teacher_logits = None if signal is None else signal.logits(vocab)

    def chunk_fn(sums, hidden, teacher_hidden, labels, mask):
        z = tiles.logits(weights, hidden, vocab)
        figures = {"tokens": jnp.ones(labels.shape), "ce": _cross_entropy(z, labels)[0]}
        if teacher_logits is not None:
            z_teacher = teacher_logits(teacher_hidden)
            figures["teacher_ce"] = _cross_entropy(z_teacher, labels)[0]
            for name, kind in (("kl", "forward_kl"), ("reverse_kl", "reverse_kl")):
                figures[name] = full_divergence(z_teacher, Config(kind), z, 1.0)[0]
            figures["agreement"] = jnp.argmax(z, 0) == jnp.argmax(z_teacher, 0)
        return {name: sums[name] + _masked_sum(figures[name], mask) for name in sums}, None

    names = ["tokens", "ce"]
    if signal is not None:
        names += ["teacher_ce", "kl", "reverse_kl", "agreement"]
    zeros = dict.fromkeys(names, jnp.float32(0))
    arrays = student_hidden, None if signal is None else signal.rows, labels, mask
    return tiles.scan_chunks(chunk_fn, zeros, chunk or tiles.default_chunk(weights), arrays)[0]


def _common_rows(student_head, signal):
    """The student's head cut to the teacher's: padding rows of the wider have no probability."""
    teacher_head = getattr(signal, "head", None)
    return student_head if teacher_head is None else student_head[: len(teacher_head)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(objective, *arrays):
    return _value_and_grads(objective, *arrays, differentiate=False)[0]


def _loss_backward(objective, grads, cotangents):
    scale, _ = cotangents
    d_hidden, d_head = ((scale * g.astype(scale.dtype)).astype(g.dtype) for g in grads)
    return d_hidden, d_head, None, None, None, None


def _value_and_grads(objective, hidden, head, signal, labels, mask, step, differentiate=True):
    """`distill_loss` and, if asked for, its gradients on hidden and head before any cotangent."""
    config, vocab = objective.config, len(head)
    alpha, temperature = objective.at("alpha", step), objective.at("temperature", step)
    weight = alpha * temperature**2 if config.temperature_squared else alpha
    ce_weight = 1.0 if signal is None else 1.0 - alpha
    weights = tiles.prepare_head(head, hidden.dtype)
    divergence = None if signal is None else signal.divergence(vocab)
    chunk = config.chunk or tiles.default_chunk(head)
    # Parts of a chunk that lie on different devices: each adds up a head gradient of its own, so
    # that these are reduced once and not at every chunk.
    parts, rows = num_shards("rows"), len(hidden) * tiles.chunks(*hidden.shape[:2], chunk)[1]
    parts = parts if rows % parts == 0 else 1

    def chunk_fn(carry, hidden, rows, labels, mask):
        sums, d_head = carry
        z = tiles.logits(weights, hidden, vocab)
        ce, d_z = _cross_entropy(z, labels)
        values, grads = {"ce": ce}, [(ce_weight, d_z)]
        if divergence is not None:
            values["divergence"], d_z = divergence(rows, config, z, temperature)
            grads.append((weight, d_z))
        # Here and not after the scan: rows of the values, and so of the logits, would be exchanged.
        sums = sums | {name: sums[name] + _masked_sum(values[name], mask) for name in values}
        if not differentiate:
            return (sums, d_head), None
        # a weight that is a constant 0 costs nothing; XLA would keep 0 * x
        d_z = sum(w * d for w, d in grads if not (isinstance(w, float) and w == 0))
        # Not a product with the mask: what is masked may not be finite.
        d_z = constrain(jnp.where(mask, d_z, 0.0).astype(hidden.dtype), "vocab rows")
        hidden = jnp.where(mask[:, None], hidden, jnp.zeros_like(hidden))
        split = d_z.reshape(len(d_z), parts, -1), hidden.reshape(parts, -1, hidden.shape[-1])
        d_head += constrain(einsum_f32("vpr,pre->pve", *split), "rows vocab embed")
        return (sums, d_head), einsum_f32("vr,ve->re", d_z, weights).astype(hidden.dtype)

    sums, d_head = dict.fromkeys(("divergence", "ce"), jnp.float32(0)), None
    if differentiate:
        d_head = constrain(jnp.zeros((parts, *weights.shape), jnp.float32), "rows vocab embed")
    arrays = hidden, None if signal is None else signal.rows, labels, mask
    (sums, d_head), d_hidden = tiles.scan_chunks(chunk_fn, (sums, d_head), chunk, arrays)
    loss = weight * sums["divergence"] + ce_weight * sums["ce"], sums
    if not differentiate:
        return loss, None
    d_head = constrain(d_head.sum(0), "vocab embed")[:vocab]
    return loss, (d_hidden, d_head.astype(head.dtype))


_loss.defvjp(_value_and_grads, _loss_backward)


def _cross_entropy(z, labels):
    """Per row, and its gradient on the logits `z`, [vocab, rows]."""
    hit = jnp.arange(len(z), dtype=labels.dtype)[:, None] == labels
    lse = jax.nn.logsumexp(z, 0)
    value, z = tiles.barrier((lse - jnp.where(hit, z, 0).sum(0), z))
    q = jnp.exp(tiles.log_probs(z, lse))
    return value, jnp.where(hit, q - 1, q)


def _masked_sum(values, mask):
    return jnp.where(mask, values, jnp.zeros_like(values)).sum(dtype=jnp.float32)


def top_k(
    teacher: TeacherStates, *, count: int, temperature: float, chunk: int | None = None
) -> TopK:
    """The `count` likeliest tokens of a teacher, likeliest first."""

    def chunk_fn(log_p):
        largest, ids = _largest(log_p, count)
        edge = largest[:, -1:]
        below = jnp.where(log_p < edge, jnp.exp(log_p - edge), 0).sum(1)
        ties = (log_p >= edge).sum(1) - count  # as likely as the last of the entries
        return TopK(ids, largest, edge[:, 0] + jnp.log(below + ties.astype(below.dtype)))

    return _scan_log_probs(chunk_fn, teacher, temperature, chunk)


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
    shape = teacher.hidden.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    windows = jnp.broadcast_to(windows[:, None], shape)

    def chunk_fn(log_p, windows, positions):
        def noise(window, position):
            row_key = jax.random.fold_in(jax.random.fold_in(key, window), position)
            return jax.random.exponential(row_key, log_p.shape[1:])

        noise = constrain(jax.vmap(noise)(windows, positions), "rows vocab")
        priorities, ids = _largest(log_p + noise, count + 1)
        ids = ids[:, :-1]
        return SampledTargets(ids, jnp.take_along_axis(log_p, ids, 1), priorities[:, -1])

    return _scan_log_probs(chunk_fn, teacher, temperature, chunk, windows, positions)


def _scan_log_probs(target_fn, teacher: TeacherStates, temperature, chunk, *arrays):
    """What `target_fn` makes of the teacher's log-probabilities, [rows, vocab], of each chunk."""
    teacher_logits = teacher.logits(len(teacher.head))

    def chunk_fn(carry, hidden, *rows):
        z = teacher_logits(hidden).T / temperature
        return carry, target_fn(z - jax.nn.logsumexp(z, 1, keepdims=True), *rows)

    chunk = chunk or tiles.default_chunk(teacher.head)
    return tiles.scan_chunks(chunk_fn, None, chunk, (teacher.hidden, *arrays))[1]


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
