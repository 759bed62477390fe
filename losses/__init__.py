"""What the student is trained on: divergences, their schedules, the head walked in chunks."""
# ruff: noqa: F401

from .chunked import distill_loss, measure, sample_targets, token_figures, top_k
from .divergences import DIVERGENCES
from .objective import Config, Divergence, Objective
from .signal import SampledTargets, Targets, TeacherStates, TopK, partition_rows, teacher_states
