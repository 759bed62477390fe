"""What a teacher says of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from losses.divergences import DIVERGENCES, LOWEST
from losses.objective import Config


class TopK(NamedTuple):
    """A teacher's likeliest tokens, and one bucket for all others."""

    ids: Int[Array, "*rows kept"]
    log_probs: Float32[Array, "*rows kept"]
    rest: Float32[Array, "*rows"]
    """Log of the mass of the others."""


class SampledTargets(NamedTuple):
    """A sample of distinct tokens: each stands for max(p, rest), which in the mean is its p."""

    ids: Int[Array, "*rows kept"]
    log_probs: Float32[Array, "*rows kept"]
    rest: Float32[Array, "*rows"]
    """Log of the threshold."""


TeacherTargets = TopK | SampledTargets


def _kept_divergence(config: Config, kept: TeacherTargets, z, temperature):
    """`_divergence` where of each row's teacher only `kept` is known."""
    cold = 1.0 / temperature
    z, ids, log_p = z * cold, kept.ids.T, kept.log_probs.T
    here = ids, jnp.arange(z.shape[1])
    z_kept = z[here]
    if isinstance(kept, SampledTargets):
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
