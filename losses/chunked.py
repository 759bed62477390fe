"""The head walked in chunks of tokens: loss and gradients without the whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from losses.divergences import DIVERGENCES, LOWEST
from losses.objective import Config, Objective
from losses.signal import SampledTargets, TeacherTargets, TopK, _kept_divergence
from sharding import claims, constrain, num_shards


def distill_loss(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "batch seq teacher_embed"] | None,
    teacher_head: Float[Array, "teacher_vocab teacher_embed"] | None,
    labels: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    objective: Objective,
    step: Int[Array, ""] | int,
    kept: TeacherTargets | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The loss summed over the tokens of `mask`, and its two parts, unweighted: divergence, ce.

    `labels` and `mask` are of the predicted token: `labels[t]` follows what `hidden[t]` has read.
    Only the student is differentiated, and only through the loss. What was `kept` of a teacher
    stands for it; without either the loss is the cross entropy alone. The caller divides by the
    tokens of the whole optimizer step.
    """
    student_head, teacher_head = _common_rows(student_head, teacher_head)
    arrays = (student_hidden, student_head, teacher_hidden, teacher_head, kept, labels, mask)
    total, sums = _loss(objective, *arrays, jnp.asarray(step))
    return total, jax.lax.stop_gradient(sums)


def measure(
    student_hidden: Float[Array, "batch seq embed"],
    student_head: Float[Array, "vocab embed"],
    teacher_hidden: Float[Array, "batch seq teacher_embed"] | None,
    teacher_head: Float[Array, "teacher_vocab teacher_embed"] | None,
    labels: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    *,
    chunk: int | None = None,
) -> dict[str, Float32[Array, ""]]:
    """Sums over the tokens of `mask`: tokens and ce; beside a teacher teacher_ce, kl, reverse_kl
    and agreement (tokens for which both find the same successor likeliest) too."""
    student_head, teacher_head = _common_rows(student_head, teacher_head)
    vocab = len(student_head)
    student_head = _placed(student_head, student_hidden)
    teacher_head = _placed(teacher_head, teacher_hidden)

    def slab(sums, hidden, teacher_hidden, labels, mask):
        z = _logits(student_head, hidden, vocab)
        found = {"tokens": jnp.ones(mask.shape), "ce": _cross_entropy(z, labels)[0]}
        if teacher_head is not None:
            z_teacher = _logits(teacher_head, teacher_hidden, vocab)
            found["teacher_ce"] = _cross_entropy(z_teacher, labels)[0]
            found["kl"] = _divergence(Config("forward_kl"), z_teacher, z, 1.0)[0]
            found["reverse_kl"] = _divergence(Config("reverse_kl"), z_teacher, z, 1.0)[0]
            found["agreement"] = jnp.argmax(z, 0) == jnp.argmax(z_teacher, 0)
        return {name: sums[name] + _counted(found[name], mask) for name in sums}, None

    chunk = chunk or _usual_chunk(student_head)
    names = ["tokens", "ce"]
    if teacher_head is not None:
        names += ["teacher_ce", "kl", "reverse_kl", "agreement"]
    sums = dict.fromkeys(names, jnp.float32(0))
    return _scan(slab, sums, chunk, (student_hidden, teacher_hidden, labels, mask))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(objective, *arrays):
    return _walk(objective, *arrays, learn=False)[0]


def _loss_forward(objective, *arrays):
    return _walk(objective, *arrays, learn=True)


def _loss_backward(objective, gradients, cotangents):
    scale, _ = cotangents
    d_hidden, d_head = ((scale * g.astype(scale.dtype)).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None, None, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _walk(objective, hidden, head, *arrays, learn):
    """`distill_loss` and, if `learn`, its gradients on hidden and head before any cotangent.

    Logits lie as [vocab, rows], so that sums over the vocabulary run along rows of memory.
    """
    teacher_hidden, teacher_head, kept, labels, mask, step = arrays
    config = objective.config
    alpha, temperature = objective.at("alpha", step), objective.at("temperature", step)
    scale = alpha * temperature**2 if config.temperature_squared else alpha
    taught = teacher_head is not None or kept is not None
    rest = 1.0 - alpha if taught else 1.0
    weights, teacher_weights = _placed(head, hidden), _placed(teacher_head, teacher_hidden)
    chunk = config.chunk or _usual_chunk(head)
    parts = _data_slices(hidden, chunk)

    def slab(carry, hidden, teacher_hidden, kept, labels, mask):
        ce, divergence, d_head = carry
        z = _logits(weights, hidden, len(head))
        value, d_z = _cross_entropy(z, labels)
        ce += _counted(value, mask)
        gradients = [(rest, d_z)]
        if taught:
            if kept is None:
                z_teacher = _logits(teacher_weights, teacher_hidden, len(head))
                value, d_z = _divergence(config, z_teacher, z, temperature)
            else:
                value, d_z = _kept_divergence(config, kept, z, temperature)
            divergence += _counted(value, mask)
            gradients.append((scale, d_z))
        if not learn:
            return (ce, divergence, d_head), None
        # a weight that is a constant 0 costs nothing; XLA would keep 0 * x
        d_z = sum(w * d for w, d in gradients if not (isinstance(w, float) and w == 0))
        # Not a product with the mask: what is masked may not be finite.
        d_z = constrain(jnp.where(mask, d_z, 0.0).astype(hidden.dtype), "vocab rows")
        hidden = jnp.where(mask[:, None], hidden, jnp.zeros_like(hidden))
        split = d_z.reshape(len(d_z), parts, -1), hidden.reshape(parts, -1, hidden.shape[-1])
        d_head += constrain(_product("vpr,pre->pve", *split), "rows vocab embed")
        d_hidden = _product("vr,ve->re", d_z, weights).astype(hidden.dtype)
        return (ce, divergence, d_head), d_hidden

    zero = jnp.float32(0)
    d_head = None
    if learn:
        d_head = constrain(jnp.zeros((parts, *weights.shape), jnp.float32), "rows vocab embed")
    arrays = (hidden, teacher_hidden, kept, labels, mask)
    (ce, divergence, d_head), d_hidden = _scan(slab, (zero, zero, d_head), chunk, arrays)
    loss = scale * divergence + rest * ce, {"divergence": divergence, "ce": ce}
    if not learn:
        return loss, None
    d_head = constrain(d_head.sum(0), "vocab embed")[: len(head)]
    return loss, (d_hidden, d_head.astype(head.dtype))


# A gradient computes its log-probabilities anew, once the value is known, from logits that the
# barrier makes new to the compiler: fused with what reads them, where those of the value would be
# kept at [vocab, rows].
_again = jax.lax.optimization_barrier


def _cross_entropy(z, labels):
    """Per row, and its gradient on the logits `z`, [vocab, rows]."""
    hit = jnp.arange(len(z), dtype=labels.dtype)[:, None] == labels
    lse = jax.nn.logsumexp(z, 0)
    value, z = _again((lse - jnp.where(hit, z, 0).sum(0), z))
    q = jnp.exp(_log(z, lse))
    return value, jnp.where(hit, q - 1, q)


def _divergence(config: Config, z_teacher, z, temperature):
    """Per row, and its gradient on the student's logits `z`, [vocab, rows]."""
    cold = 1.0 / temperature
    lse_p, lse_q = jax.nn.logsumexp(z_teacher * cold, 0), jax.nn.logsumexp(z * cold, 0)

    def terms(z_teacher, z):
        log_q = _log(z * cold, lse_q)
        return *DIVERGENCES[config.divergence](config, _log(z_teacher * cold, lse_p), log_q), log_q

    value, z_teacher, z = _again((terms(z_teacher, z)[0].sum(0), z_teacher, z))
    _, g, log_q = terms(z_teacher, z)
    if config.divergence == "forward_kl":  # there g = q - p, which sums to 0
        return value, cold * g
    return value, cold * (g - jnp.exp(log_q) * g.sum(0))


def _log(z, lse):
    return jnp.maximum(z - lse, LOWEST)


def _scan(slab, init, chunk: int, arrays):
    """`lax.scan` of `slab` along the sequence: each array, [batch, seq, ...], reaches it as [rows,
    ...], about `chunk` tokens at a time. What fills up the last one is 0, and False in a mask."""
    batch, seq = arrays[0].shape[:2]
    count, length = _chunks(batch, seq, chunk)

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, count * length - seq), *[(0, 0)] * (x.ndim - 2)])

    def rows(x, i):
        x = jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1)
        x = x.reshape(batch * length, *x.shape[2:])
        return constrain(x, "rows width" if x.ndim == 2 else "rows")

    def whole(y):
        y = y.reshape(batch, length, *y.shape[1:])
        return constrain(y, "batch seq width" if y.ndim == 3 else "batch seq")

    def joined(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(batch, count * length, *y.shape[3:])[:, :seq]

    def one(carry, i):
        carry, y = slab(carry, *jax.tree.map(partial(rows, i=i), arrays))
        return carry, jax.tree.map(whole, y)

    arrays = jax.tree.map(padded, arrays)
    carry, ys = jax.lax.scan(one, init, jnp.arange(count))
    return carry, jax.tree.map(joined, ys)


def _usual_chunk(head) -> int:
    """As many tokens as keep their logits small beside what a device has, and its products large.

    Measured: below 128 tokens the products of a CPU slow down, above 256 its caches; an
    accelerator wants 1024.
    """
    least, room = (128, 2**22) if jax.default_backend() == "cpu" else (1024, 2**27)
    return max(least, room * num_shards("vocab") // len(head))


def _chunks(batch: int, seq: int, chunk: int) -> tuple[int, int]:
    """How many chunks, and how many positions each: as even as can be, for the least padding."""
    count = -(-seq // max(1, chunk // batch))
    return count, -(-seq // count)


def _data_slices(hidden, chunk: int) -> int:
    """Parts of a chunk that lie on different devices: each adds up a head gradient of its own, so
    that these are reduced once and not at every chunk."""
    batch, seq = hidden.shape[:2]
    parts = num_shards("rows")
    return parts if batch * _chunks(batch, seq, chunk)[1] % parts == 0 else 1


def _common_rows(student_head, teacher_head):
    """Both heads cut to the narrower: padding rows of the wider have no probability."""
    if teacher_head is None:
        return student_head, None
    rows = min(len(student_head), len(teacher_head))
    return student_head[:rows], teacher_head[:rows]


def _placed(head, hidden):
    """A head in the dtype of the hidden states, split over the vocabulary alone, and filled up
    with rows to do so evenly."""
    if head is None:
        return None
    more = -len(head) % num_shards("vocab")
    return constrain(jnp.pad(head.astype(hidden.dtype), [(0, more), (0, 0)]), "vocab embed")


def _logits(head, hidden, vocab: int):
    """[vocab, rows]; rows of the head beyond `vocab` have no probability."""
    z = constrain(_product("ve,re->vr", head, hidden), "vocab rows")
    return z if len(z) == vocab else jnp.where(jnp.arange(len(z))[:, None] < vocab, z, -jnp.inf)


def _product(axes: str, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _counted(values, mask):
    return jnp.where(mask, values, jnp.zeros_like(values)).sum(dtype=jnp.float32)


def top_k(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    *,
    count: int,
    temperature: float,
    chunk: int | None = None,
) -> TopK:
    """The `count` likeliest tokens of a teacher, likeliest first."""
    log_probs = _log_probs(head, hidden, temperature)

    def slab(carry, hidden):
        log_p = log_probs(hidden)
        found, ids = _largest(log_p, count)
        edge = found[:, -1:]
        below = jnp.where(log_p < edge, jnp.exp(log_p - edge), 0).sum(1)
        ties = (log_p >= edge).sum(1) - count  # as likely as the last that is kept
        return carry, TopK(ids, found, edge[:, 0] + jnp.log(below + ties.astype(below.dtype)))

    return _scan(slab, None, chunk or _usual_chunk(head), (hidden,))[1]


def draw(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
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
    log_probs = _log_probs(head, hidden, temperature)
    places = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    windows = jnp.broadcast_to(windows[:, None], places.shape)

    def slab(carry, hidden, windows, places):
        log_p = log_probs(hidden)

        def noise(window, place):
            now = jax.random.fold_in(jax.random.fold_in(key, window), place)
            return jax.random.exponential(now, log_p.shape[1:])

        noise = constrain(jax.vmap(noise)(windows, places), "rows vocab")
        priorities, ids = _largest(log_p + noise, count + 1)
        ids = ids[:, :-1]
        return carry, SampledTargets(ids, jnp.take_along_axis(log_p, ids, 1), priorities[:, -1])

    return _scan(slab, None, chunk or _usual_chunk(head), (hidden, windows, places))[1]


def _log_probs(head, hidden, temperature: float):
    """A function from hidden states to log-probabilities, [rows, vocab]."""
    weights = _placed(head, hidden)

    def log_probs(hidden):
        z = _logits(weights, hidden, len(head)).T / temperature
        return z - jax.nn.logsumexp(z, 1, keepdims=True)

    return log_probs


def _largest(x, count: int):
    """The largest of each row, in order, and where they are: first in each device's part of it."""
    if num_shards("vocab") == 1 or len(x) % num_shards("rows"):
        # The barrier: a slice of what is found, merged into it, would make XLA sort all of x.
        return jax.lax.optimization_barrier(jax.lax.top_k(x, count))
    rows, vocab = claims(["rows", "vocab"], jax.sharding.get_abstract_mesh())

    def top(x):
        values, ids = jax.lax.top_k(x, min(count, x.shape[1]))
        return values, ids + x.shape[1] * jax.lax.axis_index(vocab)

    # Left to itself, XLA would gather the whole of x.
    where = PartitionSpec(rows or None, vocab)
    values, ids = jax.shard_map(top, in_specs=where, out_specs=(where, where))(x)
    values, best = jax.lax.top_k(constrain(values, "rows width"), count)
    return values, jnp.take_along_axis(constrain(ids, "rows width"), best, 1)
