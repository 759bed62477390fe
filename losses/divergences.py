"""Divergences between teacher and student, elementwise over the vocabulary.

A divergence is a sum over the vocabulary of f(log p, log q), p the teacher, q the student; with
g = df/dlog q its gradient on the student's logits is (g - q sum g) / T. To add one, write f.

Every f is 0 or more term by term, and g is 0 where p = q, whatever the rounding of the two
normalisers. So f contains the b - a of KL(a || b), whose sum is 0, and `stop` takes out of its
derivative what cancels exactly on paper and only nearly in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbs = Float[Array, "*shape"]
# Stands for -inf, so that 0 times a logarithm is 0; far below any real log-probability.
LOWEST = -1e9
stop = jax.lax.stop_gradient


def kl(log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """Terms of KL(a || b); their derivatives are a log(a / b) by log a, and b - a by log b."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    return a * (stop(log_a) - log_b) + (b - stop(a))


def skewed_kl(share: float, log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    """Terms of KL(a || m), m = share a + (1 - share) b."""
    log_m = log_mixture(share, log_a, log_b)
    excess = (1 - share) * (jnp.exp(log_b) - jnp.exp(log_a))  # m - a, and the slope by log m
    slope = stop(excess) * (log_m - stop(log_m))  # its value is 0
    return jnp.exp(log_a) * stop(log_a - log_m) + (stop(excess) + slope)


def jsd(config: Any, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """Terms of beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    # The slope by log m is -m, and log m has the slope (1 - beta) q / m: they cancel q's own log.
    log_m = stop(log_mixture(config.beta, log_p, log_q))
    to_q = (1 - config.beta) * jnp.exp(log_q) * (stop(log_q) - log_m)
    return config.beta * jnp.exp(log_p) * (log_p - log_m) + to_q


def tvd(config: Any, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """Terms of half the sum of |p - q|."""
    d = jnp.exp(log_q) - jnp.exp(log_p)
    return d * stop(jnp.sign(d)) / 2  # the slope of jnp.abs at 0 is 1


def alpha_beta(config: Any, log_p: LogProbs, log_q: LogProbs) -> LogProbs:
    """f = d^2 exp[x_0, x_a, x_s] and g = -d exp[x_0, x_a], divided differences of exp.

    The points are x_c = s log q + c d, with d = log p - log q and s = a + b. Multiplied out this is
    the formula of the literature, which has no value where a, b or s is 0; these have all limits.
    """
    a, s, d = config.ab_alpha, config.ab_alpha + config.ab_beta, log_p - log_q

    def exp_at(c):  # above 0 only with a negative exponent: kept finite
        return jnp.exp(jnp.minimum(s * log_q + c * d, 60.0))

    def slope(c, e):  # exp[x_c, x_e]
        gap = jnp.abs((e - c) * d)
        ratio = jnp.where(gap == 0, 1.0, -jnp.expm1(-gap) / jnp.where(gap == 0, 1.0, gap))
        return jnp.maximum(exp_at(c), exp_at(e)) * ratio

    low, middle, high = sorted((0.0, a, s))
    far = d * (slope(middle, high) - slope(low, middle)) / ((high - low) or 1.0)
    # Where the three are close the difference of slopes is lost: a series around their mean.
    mean = (a + s) / 3
    second, third = (sum((c - mean) ** k for c in (0.0, a, s)) for k in (2, 3))
    series = 0.5 + second / 48 * d**2 + third / 360 * d**3
    f = jnp.where((high - low) * jnp.abs(d) < 0.25, exp_at(mean) * d**2 * series, far)
    return stop(f) + stop(-d * slope(0.0, a)) * (log_q - stop(log_q))


def log_mixture(share: float, log_a: LogProbs, log_b: LogProbs) -> LogProbs:
    log_share = math.log(share) if share > 0 else -math.inf
    return jnp.logaddexp(log_a + log_share, log_b + math.log1p(-share))


DIVERGENCES = {
    "forward_kl": lambda config, log_p, log_q: kl(log_p, log_q),
    "reverse_kl": lambda config, log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skew_kl": lambda config, log_p, log_q: skewed_kl(config.skew, log_p, log_q),
    "skew_reverse_kl": lambda config, log_p, log_q: skewed_kl(config.skew, log_q, log_p),
    "tvd": tvd,
    "alpha_beta": alpha_beta,
}
"""`(losses.Config, log p, log q) -> f`; `--loss.divergence` takes the same names."""


def terms(config: Any, log_p: LogProbs, log_q: LogProbs) -> tuple[LogProbs, LogProbs]:
    """f, and g = df/dlog q."""
    log_p, log_q = jnp.maximum(log_p, LOWEST), jnp.maximum(log_q, LOWEST)
    f = DIVERGENCES[config.divergence]
    return jax.jvp(lambda log_q: f(config, log_p, log_q), (log_q,), (jnp.ones_like(log_q),))
