"""What the student is trained on: divergences, their schedules, the head walked in chunks."""

from .chunked import distill_loss, draw, measure, top_k
from .divergences import DIVERGENCES
from .objective import Config, Objective
from .signal import SampledTargets, TeacherTargets, TopK

__all__ = [
    "DIVERGENCES",
    "Config",
    "SampledTargets",
    "TeacherTargets",
    "Objective",
    "TopK",
    "distill_loss",
    "draw",
    "measure",
    "top_k",
]
