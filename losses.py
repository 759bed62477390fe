"""What the student is trained on: divergences, their schedules, and the head walked in chunks.

A divergence is a sum over the vocabulary of f(log p, log q), p the teacher, q the student; with
g = df/dlog q its gradient on the student's logits is (g - q sum g) / T. Both are elementwise, so
the gradient is written out beside the value, and the vocabulary may lie on many devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from errors import UserError
from sharding import claims, constrain, ways

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta"
]
Schedule = Literal["constant", "linear", "cosine"]


SCHEDULED = ("", "_end", "_schedule")  # a value, and how it changes in the course of a run


@dataclass(frozen=True)
class Config:
    divergence: Divergence = "forward_kl"
    """What is measured between teacher and student."""
    alpha: float = 1.0
    """Weight of the divergence; the cross entropy with the data has the rest, 1 - alpha."""
    alpha_end: float | None = None
    """Where --loss.alpha-schedule leads."""
    alpha_schedule: Schedule = "constant"
    """How alpha goes from its first value to its last over the run."""
    temperature: float = 1.0
    """Divides the logits of both in the divergence; the cross entropy is always at 1."""
    temperature_end: float | None = None
    """Where --loss.temperature-schedule leads."""
    temperature_schedule: Schedule = "constant"
    """How the temperature goes from its first value to its last over the run."""
    beta: float = 0.5
    """jsd: the teacher's share of the mixture, strictly between 0 and 1."""
    skew: float = 0.1
    """skew_kl, skew_reverse_kl: share of its first argument mixed into the second."""
    ab_alpha: float = 0.2
    """alpha_beta: exponent of the teacher; 1 and 0 give forward_kl, 0 and 1 reverse_kl."""
    ab_beta: float = 0.7
    """alpha_beta: exponent of the student."""
    temperature_squared: bool = True
    """Times T^2: some libraries leave it out, and it over-weights tvd (its gradient ~ 1/T)."""
    features: Literal["off", "cosine", "mse"] = "off"
    """Also match outputs of blocks to the teacher's: 1 - cosine, or the mean square of the
    difference, through a learned map (not exported) where widths differ."""
    feature_weight: float = 1.0
    """Weight of that, a mean over the matched blocks, added to the rest."""
    feature_weight_end: float | None = None
    """Where --loss.feature-weight-schedule leads."""
    feature_weight_schedule: Schedule = "constant"
    """How that weight goes from its first value to its last over the run."""
    feature_pairs: tuple[str, ...] = ()
    """Blocks that are matched, from 0, as STUDENT:TEACHER (0:1 3:7); by default each of the
    student's with the one it was cut from, else with that at its share of the depth."""
    chunk: int | None = None
    """Tokens whose logits exist at once, in a few float32 arrays of chunk x vocabulary; by default
    what suits the device and the vocabulary."""

    def __post_init__(self):
        demands = [
            (
                "beta",
                0 < self.beta < 1,
                "strictly between 0 and 1 (at the ends take forward_kl or reverse_kl)",
            ),
            ("skew", 0 <= self.skew < 1, "from 0 to below 1"),
            (
                "feature_pairs",
                not self.feature_pairs or self.features != "off",
                "left out, or --loss.features cosine or mse given too",
            ),
            ("ab_alpha", math.isfinite(self.ab_alpha), "finite"),
            ("ab_beta", math.isfinite(self.ab_beta), "finite"),
            ("chunk", self.chunk is None or self.chunk >= 1, "1 or more tokens"),
        ]
        for name, fits, wanted in (
            ("alpha", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("temperature", lambda x: 0 < x < math.inf, "positive"),
            ("feature_weight", lambda x: 0 <= x < math.inf, "0 or more"),
        ):
            start, end, schedule = (getattr(self, name + part) for part in SCHEDULED)
            flag = f"--loss.{name.replace('_', '-')}-end"
            ends, still = end is not None, schedule == "constant"
            demands += [
                (name, fits(start), wanted),
                (f"{name}_end", not ends or fits(end), wanted),
                (f"{name}_schedule", still or ends, f"constant, or {flag} given too"),
                (f"{name}_schedule", not (still and ends), f"linear or cosine beside {flag}"),
            ]
        for field, holds, wanted in demands:
            if not holds:
                flag = "--loss." + field.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, field)}: it must be {wanted}")


@dataclass(frozen=True)
class Objective:
    """What a training step is told beside its arrays: static, and equal to another made alike."""

    config: Config = Config()
    steps: int = 1
    """Optimizer steps of the run, which the schedules span."""
    dtype: str | None = None
    """What the models compute in; None for each model's own."""
    remat: str = "none"
    microbatches: int = 1
    norms: bool = False
    """Whether the step tells the norms of parameters and gradients, per layer."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Blocks of student and teacher whose outputs are matched."""

    def at(self, name: str, step: Int[Array, ""] | int) -> Float32[Array, ""] | float:
        """`alpha`, `temperature` or `feature_weight` at an optimizer step: a Python float where it
        is constant."""
        start, end, schedule = (getattr(self.config, name + part) for part in SCHEDULED)
        if end is None or end == start:
            return float(start)
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(self.steps, 1), 0.0, 1.0)
        if schedule == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        return start + (end - start) * progress


# The terms of a KL carry -p + q, which add nothing to a sum over the vocabulary: so every term is
# >= 0, and its derivative is 0 where p = q, free of the rounding of two normalisers.

LogProbs = Float[Array, "*shape"]
Terms = tuple[LogProbs, LogProbs]


def forward_kl(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    g = jnp.exp(log_q) - jnp.exp(log_p)
    return jnp.exp(log_p) * (log_p - log_q) + g, g


def reverse_kl(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    g = q * (log_q - log_p)
    return g + (p - q), g


def jsd(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    log_m = _log_mixture(config.beta, log_p, log_q)
    g = (1 - config.beta) * jnp.exp(log_q) * (log_q - log_m)
    return config.beta * jnp.exp(log_p) * (log_p - log_m) + g, g


def skew_kl(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    rest = 1 - config.skew
    log_m = _log_mixture(config.skew, log_p, log_q)
    excess = rest * (jnp.exp(log_q) - jnp.exp(log_p))  # m - p
    share = rest * jnp.exp(log_q - log_m)  # of q in m
    return jnp.exp(log_p) * (log_p - log_m) + excess, share * excess


def skew_reverse_kl(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = _log_mixture(config.skew, log_q, log_p)
    excess = (1 - config.skew) * (p - q)  # m - q
    share = jnp.exp(_log_share(config.skew) + log_q - log_m)  # of q in m
    kl = q * (log_q - log_m)
    return kl + excess, kl + share * excess


def tvd(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.abs(q - p) / 2, jnp.sign(q - p) * q / 2


def alpha_beta(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
    """f = d^2 exp[x_0, x_a, x_s] and g = -d exp[x_0, x_a], divided differences of exp.

    The points are x_c = s log q + c d, with d = log p - log q and s = a + b. Multiplied out this is
    the formula of the literature, which has no value where a, b or s is 0; these have all limits.
    """
    a, s = config.ab_alpha, config.ab_alpha + config.ab_beta
    d = log_p - log_q

    def exp_at(c):
        # above 0 only with a negative exponent: kept finite
        return jnp.exp(jnp.minimum(s * log_q + c * d, 60.0))

    def slope(c, e):  # exp[x_c, x_e]
        gap = jnp.abs((e - c) * d)
        ratio = jnp.where(gap == 0, 1.0, -jnp.expm1(-gap) / jnp.where(gap == 0, 1.0, gap))
        return jnp.maximum(exp_at(c), exp_at(e)) * ratio

    low, middle, high = sorted((0.0, a, s))
    span = high - low
    far = d * (slope(middle, high) - slope(low, middle)) / (span or 1.0)
    # Where the three are close the difference of slopes is lost: a series around their mean.
    mean = (a + s) / 3
    second, third = (sum((c - mean) ** k for c in (0.0, a, s)) for k in (2, 3))
    series = 0.5 + second / 48 * d**2 + third / 360 * d**3
    f = jnp.where(span * jnp.abs(d) < 0.25, exp_at(mean) * d**2 * series, far)
    return f, -d * slope(0.0, a)


def _log_share(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def _log_mixture(share: float, log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """log(share a + (1 - share) b)"""
    log_a, log_b = log_a + _log_share(share), log_b + math.log1p(-share)
    return jnp.maximum(log_a, log_b) + jnp.log1p(jnp.exp(-jnp.abs(log_a - log_b)))


# Stands for -inf, so that 0 times a logarithm is 0; far below any real log-probability.
LOWEST = -1e9


def _floored(terms: Callable[..., Terms]) -> Callable[[Config, LogProbs, LogProbs], Terms]:
    def floored(config: Config, log_p: LogProbs, log_q: LogProbs) -> Terms:
        return terms(config, jnp.maximum(log_p, LOWEST), jnp.maximum(log_q, LOWEST))

    return floored


DIVERGENCES: dict[str, Callable[[Config, LogProbs, LogProbs], Terms]] = {
    terms.__name__: _floored(terms)
    for terms in (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, alpha_beta)
}
"""`(config, log p, log q) -> (f, g)`, elementwise: f sums to the divergence, g = df/dlog q."""


class TopK(NamedTuple):
    """A teacher's likeliest tokens, and one bucket for all others."""

    ids: Int[Array, "*rows kept"]
    log_probs: Float32[Array, "*rows kept"]
    rest: Float32[Array, "*rows"]
    """Log of the mass of the others."""


class Draws(NamedTuple):
    """A sample of distinct tokens: each stands for max(p, rest), which in the mean is its p."""

    ids: Int[Array, "*rows kept"]
    log_probs: Float32[Array, "*rows kept"]
    rest: Float32[Array, "*rows"]
    """Log of the threshold."""


Kept = TopK | Draws


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
    kept: Kept | None = None,
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
    return max(least, room * ways("vocab") // len(head))


def _chunks(batch: int, seq: int, chunk: int) -> tuple[int, int]:
    """How many chunks, and how many positions each: as even as can be, for the least padding."""
    count = -(-seq // max(1, chunk // batch))
    return count, -(-seq // count)


def _data_slices(hidden, chunk: int) -> int:
    """Parts of a chunk that lie on different devices: each adds up a head gradient of its own, so
    that these are reduced once and not at every chunk."""
    batch, seq = hidden.shape[:2]
    parts = ways("rows")
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
    more = -len(head) % ways("vocab")
    return constrain(jnp.pad(head.astype(hidden.dtype), [(0, more), (0, 0)]), "vocab embed")


def _logits(head, hidden, vocab: int):
    """[vocab, rows]; rows of the head beyond `vocab` have no probability."""
    z = constrain(_product("ve,re->vr", head, hidden), "vocab rows")
    return z if len(z) == vocab else jnp.where(jnp.arange(len(z))[:, None] < vocab, z, -jnp.inf)


def _product(axes: str, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _counted(values, mask):
    return jnp.where(mask, values, jnp.zeros_like(values)).sum(dtype=jnp.float32)


# What is kept of a teacher, for later.


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
) -> Draws:
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
        return carry, Draws(ids, jnp.take_along_axis(log_p, ids, 1), priorities[:, -1])

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
    if ways("vocab") == 1 or len(x) % ways("rows"):
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


def _kept_divergence(config: Config, kept: Kept, z, temperature):
    """`_divergence` where of each row's teacher only `kept` is known."""
    cold = 1.0 / temperature
    z, ids, log_p = z * cold, kept.ids.T, kept.log_probs.T
    here = ids, jnp.arange(z.shape[1])
    z_kept = z[here]
    if isinstance(kept, Draws):
        lse = jax.nn.logsumexp(z, 0)
        weight = jnp.exp(jnp.maximum(log_p, kept.rest))
        f = weight * (log_p - z_kept + lse)
        d_z = (jnp.exp(z - lse) * weight.sum(0)).at[here].add(-weight)
        return f.sum(0), cold * d_z
    z = z.at[here].set(-jnp.inf)
    # Of the rest itself: one less the sum of the kept would be lost in rounding.
    lse_rest = jnp.maximum(jax.nn.logsumexp(z, 0), LOWEST)
    lse = jnp.logaddexp(lse_rest, jax.nn.logsumexp(z_kept, 0))
    log_q, log_q_rest = z_kept - lse, lse_rest - lse
    f, g = DIVERGENCES[config.divergence](config, log_p, log_q)
    f_rest, g_rest = DIVERGENCES[config.divergence](config, kept.rest, log_q_rest)
    total = g.sum(0) + g_rest
    d_kept = g - jnp.exp(log_q) * total
    d_z = jnp.exp(z - lse_rest) * (g_rest - jnp.exp(log_q_rest) * total)
    return f.sum(0) + f_rest, cold * d_z.at[here].set(d_kept)
