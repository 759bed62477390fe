"""What a run minimises: the divergence, its weights, and their schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from runtime.errors import UserError

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
