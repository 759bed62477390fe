"""What the student is trained on: divergences, their schedules, the head walked in chunks."""

from .chunked import distill_loss, measure, sample_targets, top_k
from .divergences import DIVERGENCES
from .objective import Config, Divergence, Objective
from .signal import (
    SampledTargets,
    Signal,
    Targets,
    TeacherStates,
    TopK,
    partition_rows,
    teacher_states,
)

__all__ = [
    "DIVERGENCES", "Config", "Divergence", "Objective", "SampledTargets", "Signal", "Targets",
    "TeacherStates", "TopK", "distill_loss", "measure", "partition_rows", "sample_targets",
    "teacher_states", "top_k",
]  # fmt: skip
