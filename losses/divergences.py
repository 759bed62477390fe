"""Divergences between teacher and student, elementwise over the vocabulary.

A divergence is a sum over the vocabulary of f(log p, log q), p the teacher, q the student; with
g = df/dlog q its gradient on the student's logits is (g - q sum g) / T. Both are elementwise, so
the gradient is written out beside the value, and the vocabulary may lie on many devices.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from losses.objective import Config

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
