"""What a step costs: its floating-point operations, against what the device can; its memory."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

import sharding
from models.common import LanguageModel
from optim import is_matrix
from report import size


def step_flops(student: LanguageModel, teacher: LanguageModel | None, seq_len: int) -> float:
    """Of one token in a training step: three forward passes of the student, one of the teacher."""
    seen = 3 * forward_flops(student, seq_len)
    return seen if teacher is None else seen + forward_flops(teacher, seq_len)


def forward_flops(model: LanguageModel, seq_len: int) -> float:
    """Of one token, by the matrices and by attention to half of its row on average."""
    config = model.config
    axes = jax.tree.leaves(sharding.axes(model.blocks), is_leaf=lambda x: isinstance(x, tuple))
    blocks = zip(jax.tree.leaves(model.blocks), axes, strict=True)
    matrices = sum(leaf.size for leaf, names in blocks if is_matrix(names))
    attention = config.layers * config.heads * config.head_dim * seq_len
    return 2.0 * (matrices + model.unembedding.size + attention)


def matrix_peak(dtype: str) -> float:
    """FLOP/s of a matrix product on all devices, measured."""
    backend = jax.default_backend()
    size = 1024 if backend == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(4):
        begun = time.monotonic()
        product(a, a).block_until_ready()
        best = min(best, time.monotonic() - begun)
    devices = 1 if backend == "cpu" else jax.device_count()  # emulated ones share the processor
    return 2 * size**3 / best * devices


def memory(program: Any) -> str:
    found = program.compiled.memory_analysis()
    held, worked = found.argument_size_in_bytes, found.temp_size_in_bytes
    return f"{size(held)} of arrays and {size(worked)} to work in, a device"
