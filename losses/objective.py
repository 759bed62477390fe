"""What a run minimises: the divergence, its weights, and their schedules."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from losses.divergences import DIVERGENCES
from runtime.errors import Constraint, UserError, above, at_least, below, between, check

Divergence = Literal[tuple(DIVERGENCES)]
Schedule = Literal["constant", "linear", "cosine"]

INSIDE = Constraint("above 0, below 1 (for the ends: forward_kl, reverse_kl)", lambda x: 0 < x < 1)
FINITE = Constraint("finite", math.isfinite)
PAIRS = Constraint(
    "STUDENT:TEACHER blocks such as 3:7",
    lambda pairs: all(re.fullmatch(r"\d+:\d+", pair, re.ASCII) for pair in pairs),
)


@dataclass(frozen=True)
class Config:
    divergence: Divergence = "forward_kl"
    """What is measured between teacher and student."""
    alpha: Annotated[float, between(0, 1)] = 1.0
    """Weight of the divergence; the cross entropy with the data has the rest, 1 - alpha."""
    alpha_end: Annotated[float | None, between(0, 1)] = None
    """Where --loss.alpha-schedule leads."""
    alpha_schedule: Schedule = "constant"
    """How alpha goes from its first value to its last over the run."""
    temperature: Annotated[float, above(0)] = 1.0
    """Divides the logits of both in the divergence; the cross entropy is always at 1."""
    temperature_end: Annotated[float | None, above(0)] = None
    """Where --loss.temperature-schedule leads."""
    temperature_schedule: Schedule = "constant"
    """How the temperature goes from its first value to its last over the run."""
    beta: Annotated[float, INSIDE] = 0.5
    """jsd: the teacher's share of the mixture."""
    skew: Annotated[float, below(0, 1)] = 0.1
    """skew_kl, skew_reverse_kl: share of its first argument mixed into the second."""
    ab_alpha: Annotated[float, FINITE] = 0.2
    """alpha_beta: exponent of the teacher; 1 and 0 give forward_kl, 0 and 1 reverse_kl."""
    ab_beta: Annotated[float, FINITE] = 0.7
    """alpha_beta: exponent of the student."""
    temperature_squared: bool = True
    """Times T^2: some libraries leave it out, and it over-weights tvd (its gradient ~ 1/T)."""
    features: Literal["off", "cosine", "mse"] = "off"
    """Also match outputs of blocks to the teacher's: 1 - cosine, or the mean square of the
    difference, through a learned map (not exported) where widths differ."""
    feature_weight: Annotated[float, at_least(0)] = 1.0
    """Weight of that, a mean over the matched blocks, added to the rest."""
    feature_weight_end: Annotated[float | None, at_least(0)] = None
    """Where --loss.feature-weight-schedule leads."""
    feature_weight_schedule: Schedule = "constant"
    """How that weight goes from its first value to its last over the run."""
    feature_pairs: Annotated[tuple[str, ...], PAIRS] = ()
    """Blocks that are matched, from 0; by default each of the student's with the one it was cut
    from, else with that at its share of the depth."""
    chunk: Annotated[int | None, at_least(1)] = None
    """Tokens whose logits exist at once, in a few float32 arrays of chunk x vocabulary; by default
    what suits the device and the vocabulary."""

    def __post_init__(self):
        check(self, "--loss.")
        for name in ("alpha", "temperature", "feature_weight"):
            _, end, schedule = self.course(name)
            if (end is None) != (schedule == "constant"):
                flag = "--loss." + name.replace("_", "-")
                both = f"linear or cosine and {flag}-end"
                raise UserError(f"{flag}-schedule is {schedule}: give {both}, or neither")
        if self.feature_pairs and self.features == "off":
            raise UserError("--loss.feature-pairs needs --loss.features cosine or mse")

    def course(self, name: str) -> tuple[float, float | None, Schedule]:
        """Where a weight or the temperature starts and ends, and on which schedule."""
        return tuple(getattr(self, name + suffix) for suffix in ("", "_end", "_schedule"))


@dataclass(frozen=True)
class Objective:
    """What a training step is given beside its arrays: static, and equal to any of equal fields."""

    config: Config = Config()
    steps: int = 1
    """Optimizer steps of the run, which the schedules span."""
    dtype: str | None = None
    """What the models compute in; None for each model's own."""
    remat: str = "none"
    microbatches: int = 1
    norms: bool = False
    """Whether the step reports the norms of parameters and gradients, per layer."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Blocks of student and teacher whose outputs are matched."""

    def at(self, name: str, step: Int[Array, ""] | int) -> Float32[Array, ""] | float:
        """`alpha`, `temperature` or `feature_weight` at a step: a Python float where constant."""
        start, end, schedule = self.config.course(name)
        if end is None or end == start:
            return float(start)
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(self.steps, 1), 0.0, 1.0)
        if schedule == "cosine":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        return start + (end - start) * progress
