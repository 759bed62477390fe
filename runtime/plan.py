"""What a run holds in the memory of each device, before a weight is read; what a step costs."""

import contextlib
import dataclasses
import math
import os
import resource
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import data
import losses
import models
import optim
import sharding
from config import Config, needs_teacher, profile_window, student_config, uses_teacher_loss
from models.base import LanguageModel
from runtime import on_policy, prepare, report, roofline, target_store, topology
from runtime.prepare import Placement
from runtime.report import size

PROGRAM = 600_000_000  # bytes of a process that computes on the CPU, beside its arrays


RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage


class DeviceBytes(NamedTuple):
    """Bytes of one device. Arrays are exact; temporaries are what the compiler says."""

    teacher: int
    student: int
    moments: int
    batch: int
    gradients: int  # among the temporaries
    own_teacher: int = 0  # on a device that is the teacher's alone
    temporaries: int = 0
    cost: roofline.Cost | None = None

    @property
    def arrays(self) -> int:
        return self.teacher + self.student + self.moments + self.batch

    @property
    def total(self) -> int:
        """On a device of the student."""
        return self.arrays + max(self.temporaries, self.gradients)


def with_shardings(tree: PyTree, places: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), tree, places)


def state_shardings(state: PyTree, mesh: jax.sharding.Mesh, layout: sharding.Layout) -> PyTree:
    """Where every array of a state lies: moments may lie elsewhere than parameters."""
    places = sharding.specs(state, mesh, layout.params)
    moments = sharding.specs(state.opt_state, mesh, layout.moments)
    return eqx.tree_at(lambda state: state.opt_state, places, moments)


def abstract_frozen(config: Config, placement: Placement) -> tuple[Any, data.Batch]:
    """The teacher, or none, and the batch that a step is given."""
    mesh, layout, teacher_mesh = placement
    rows, seq, where = config.batch_size, config.seq_len, sharding.row_sharding(mesh, layout.params)
    ids = jax.ShapeDtypeStruct((rows, seq + 1), jnp.int32, sharding=where)
    batch = data.Batch(ids, ids, ids.update(shape=(rows, seq), dtype=bool))
    if config.targets is not None:
        targets = target_store.load(config.targets)
        signal = target_store.SIGNALS[targets.kind].abstract(rows, seq, targets.entries)
        signal = jax.tree.map(lambda leaf: leaf.update(sharding=where), signal)
        return None, batch._replace(signal=signal)
    if not uses_teacher_loss(config.loss):
        return None, batch
    teacher = models.abstract(config.teacher)
    teacher = with_shardings(teacher, sharding.specs(teacher, mesh, layout.params))
    if teacher_mesh is None:
        return teacher, batch
    return None, batch._replace(signal=abstract_states(config, teacher, batch))


def abstract_states(config: Config, teacher: LanguageModel, batch: data.Batch) -> Any:
    """What the teacher says of a batch, where its rows lie."""
    dtype = config.compute_dtype
    states = eqx.filter_eval_shape(losses.teacher_states, teacher, batch, dtype=dtype)
    parts = states.hidden.update(sharding=batch.mask.sharding), teacher.unembedding
    return eqx.tree_at(lambda states: (states.hidden, states.head), states, parts)


def compile_abstract(step: Callable, arguments: PyTree, *static: Any) -> Any:
    """The program of a step for (frozen, state), of which only shapes are known."""
    shapes, rest = eqx.partition(arguments, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def run(frozen, state):
        return step.__wrapped__(*eqx.combine((frozen, state), rest), *static)

    return sharding.compiled(jax.jit(run, donate_argnums=1).lower(*shapes))


def bytes_of(tree: PyTree) -> int:
    """What one device holds of arrays that are placed."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def resident_bytes(
    config: Config, placement: Placement, frozen: tuple[Any, Any], state: PyTree,
    optimizer: optim.Optimizer, program: Any = None,
) -> DeviceBytes:  # fmt: skip
    """What follows from shapes alone, and from the compiled step if it is given."""
    teacher, own, temporaries, cost = bytes_of(frozen[0]), 0, 0, None
    mesh, layout, teacher_mesh = placement
    if frozen[0] is None and needs_teacher(config):  # no step is given it
        model = models.abstract(config.teacher)
        places = sharding.specs(model, teacher_mesh or mesh, layout.params)
        size = bytes_of(with_shardings(model, places))
        teacher, own = (0, size) if teacher_mesh is not None else (size, 0)
    if program is not None:
        temporaries = program.memory_analysis().temp_size_in_bytes
    if program is not None and config.topology is not None:
        tokens = config.batch_size * config.seq_len / mesh.size
        flops = tokens * step_flops(state.student, frozen[0], config.seq_len)
        cost = topology.cost(config.topology, program, flops)
    trainable = eqx.filter(state.learner, optimizer.trainable(state.learner))
    parts = map(bytes_of, (state.student, state.opt_state, frozen[1], trainable))
    return DeviceBytes(teacher, *parts, own, temporaries, cost)


def writer_fits(config: Config, placement: Placement, writer: LanguageModel, arrays: Any) -> bool:
    """Whether a device has room for a whole copy of the writer beside the arrays of a run."""
    layout = dataclasses.replace(placement.layout, zero=1)
    copy = eqx.filter_eval_shape(on_policy.generation_copy, writer, config.compute_dtype)
    copy = with_shardings(copy, sharding.specs(copy, placement.mesh, layout.params))
    return bytes_of((arrays, copy)) <= device_memory(config)[0]


def loss_bytes(
    config: Config, frozen: tuple[Any, Any], state: PyTree, objective: losses.Objective
) -> int:
    """The temporaries of the head and the loss, compiled alone."""
    teacher, batch = frozen
    if teacher is not None:
        batch = batch._replace(signal=abstract_states(config, teacher, batch))
    count = config.batch_size // config.microbatches
    rows, head = losses.partition_rows(batch)
    rows = jax.tree.map(lambda leaf: leaf.update(shape=(count, *leaf.shape[1:])), rows)
    signal, mask = eqx.combine(rows, head).signal, rows.mask
    shape, dtype = (*mask.shape, state.student.config.embed), jnp.dtype(config.compute_dtype)
    hidden, labels = mask.update(shape=shape, dtype=dtype), mask.update(dtype=jnp.int32)

    def loss(*inputs):
        return losses.distill_loss(*inputs, objective=objective, step=0)[0]

    inputs = hidden, state.student.unembedding, signal, labels, mask
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs)
    return sharding.compiled(program).memory_analysis().temp_size_in_bytes


def device_memory(config: Config) -> tuple[float, str]:
    """Bytes that a device has for a run, and how they are known."""
    device = jax.devices()[0]
    if config.device_memory is not None:
        return config.device_memory * 1e9, "--device-memory"
    if config.topology is not None:
        return topology.parse(config.topology)[0].memory, config.topology
    if config.devices is not None:
        return math.inf, "say how much with --device-memory"
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf), device.device_kind
    return (host_memory() - PROGRAM) / jax.local_device_count(), "this host, less its program"


def host_memory() -> float:
    """What this process may use: the memory of the host, or the limit of its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, where = line.split(":", 2)
            own = groups[1] if kinds == "memory" else groups[0]
            inner = own / where.lstrip("/")
            groups += [inner, *(path for path in inner.parents if path.is_relative_to(own))]
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limits.append(int((group / name).read_text(encoding="utf-8")))
    return float(min(limits))


def fits(config: Config, need: DeviceBytes) -> bool:
    return max(need.total, need.own_teacher) <= device_memory(config)[0]


def smaller_settings(config: Config, placement: Placement) -> Iterator[tuple[str, Config]]:
    """Settings that need less and less memory; only the last two change the mathematics."""
    flags = ""
    for policy in ("dots", "full"):
        if config.remat != policy and (config.remat, policy) != ("full", "dots"):
            flags = f" --remat {policy}"
            config = dataclasses.replace(config, remat=policy)
            yield flags, config
    (axes,) = sharding.claims(["batch"], placement.mesh, placement.layout.params)
    rows, shards = config.batch_size, math.prod(placement.mesh.shape[axis] for axis in axes)
    for parts in range(config.microbatches + 1, rows // shards + 1):
        if rows % parts == 0 and rows // parts % shards == 0:
            config = dataclasses.replace(config, microbatches=parts)
            yield f"{flags} --microbatches {parts}", config
    if config.microbatches > 1:
        flags += f" --microbatches {config.microbatches}"
    if config.optim.name != "adafactor" and config.optim.moment_dtype == "float32":
        for flag, change in (
            ("--optim.moment-dtype bfloat16", {"moment_dtype": "bfloat16"}),
            ("--optim.name adafactor", {"name": "adafactor"}),
        ):
            optimizer = dataclasses.replace(config.optim, **change)
            yield f"{flags} {flag}", dataclasses.replace(config, optim=optimizer)


def table(config: Config, placement: Placement, need: DeviceBytes, loss: int) -> str:
    """What a device of the student holds, for people; `loss` of its temporaries are the head's."""
    mesh, layout, teacher_mesh = placement
    memory, source = device_memory(config)
    elsewhere = config.topology is None and (config.devices or config.device_memory)
    guess = jax.default_backend() == "cpu" and elsewhere
    lines = ["mesh       " + " x ".join(f"{name} {count}" for name, count in mesh.shape.items())]
    for name, rules in (("rules", layout.params), ("moments", layout.moments)):
        if name == "rules" or rules != layout.params:
            spelled = (f"{axis}={','.join(places)}" for axis, places in rules.items())
            lines.append(f"{name:11}{' '.join(spelled)}")
    lines.append(f"attention  {prepare.attention(config, models.config(config.teacher))}")
    if config.mup.base_embed is not None:
        lines.append(f"µP         {config.mup.describe(student_config(config).embed)}")
    rest = max(need.temporaries - loss - need.gradients, 0)
    parts = ("teacher", "student", "moments", "batch", "gradients")
    rows = [(name, getattr(need, name), "") for name in parts]
    rows += [
        ("head and loss", loss, "compiled alone"),
        ("activations", rest, "the rest of what the program works in"),
        ("in all", need.total, "an estimate, compiled for CPUs" if guess else ""),
        ("there is", memory, source),
        ("a save", need.student + need.moments, "of the host for each device, while it is written"),
    ]
    if teacher_mesh is not None:
        rows.append(("its own", need.own_teacher, "of each device that is the teacher's alone"))
    lines += ["", "bytes of each device"]
    lines += [
        f"  {name:14}{size(number) if math.isfinite(number) else 'unknown':>10}  {remark}".rstrip()
        for name, number, remark in rows
    ]
    if config.topology is not None:
        tokens = config.batch_size * config.seq_len
        lines += ["", *topology.table(config.topology, need.cost, tokens, mesh.size)]
    return "\n".join([*lines, ""])


def forward_flops(model: LanguageModel, seq_len: int) -> float:
    """Of one token, by the matrices and by attention to half of its row on average."""
    config = model.config
    axes = jax.tree.leaves(sharding.axes(model.blocks), is_leaf=lambda x: isinstance(x, tuple))
    blocks = zip(jax.tree.leaves(model.blocks), axes, strict=True)
    matrices = sum(leaf.size for leaf, names in blocks if optim.is_matrix(names))
    attention = config.layers * config.heads * config.head_dim * seq_len
    return 2.0 * (matrices + model.unembedding.size + attention)


def step_flops(student: LanguageModel, teacher: LanguageModel | None, seq_len: int) -> float:
    """Of one token: the teacher's forward pass, the student's, and twice that backward."""
    flops = 3 * forward_flops(student, seq_len)
    return flops if teacher is None else flops + forward_flops(teacher, seq_len)


def matrix_peak(dtype: str) -> float:
    """FLOP/s of a matrix product on all devices, measured."""
    backend = jax.default_backend()
    size = 1024 if backend == "cpu" else 8192
    a, product = jnp.ones((size, size), dtype), jax.jit(jnp.matmul)
    # Five times, of which the first compiles.
    seconds = min(timeit.repeat(lambda: product(a, a).block_until_ready(), number=1))
    devices = 1 if backend == "cpu" else jax.device_count()  # emulated ones share the processor
    return 2 * size**3 / seconds * devices


def peak_memory() -> int:
    """Bytes that a device has held at most; on CPUs, that this process has."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


class Trace:
    """A trace of the steps a:b for Perfetto or TensorBoard, if such are asked for."""

    def __init__(self, steps: str | None, folder: Path):
        self.first, self.last = profile_window(steps) if steps else (0, 0)
        self.folder, self.running = folder, False

    def before(self, number: int) -> None:
        if number == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, number: int, state: PyTree, log: report.Log, *, ends: bool) -> None:
        if self.running and (ends or number == self.last):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
            log.say(f"steps {self.first} to {number} are traced in {self.folder}")
