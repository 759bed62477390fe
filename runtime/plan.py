"""What a run holds in the memory of each device, told before a weight is read."""

import contextlib
import dataclasses
import math
import os
import time
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
from config import Config, needs_teacher, student_config, uses_teacher_loss
from eval import Head, Seen
from models.base import LanguageModel
from runtime import target_store
from runtime.errors import UserError
from runtime.report import size

PROGRAM = 600_000_000  # bytes of a process that computes on the CPU, beside its arrays


class DeviceBytes(NamedTuple):
    """Bytes of one device. Arrays are exact; temporaries are what the compiler says."""

    teacher: int
    student: int
    moments: int
    batch: int
    gradients: int  # among the temporaries
    temporaries: int

    @property
    def arrays(self) -> int:
        return self.teacher + self.student + self.moments + self.batch

    @property
    def total(self) -> int:
        return self.arrays + max(self.temporaries, self.gradients)


def abstract_state(
    make: Callable[[jax.Array], PyTree], mesh: jax.sharding.Mesh, layout: sharding.Layout
) -> PyTree:
    """What `make` returns for a key, without its values."""
    found = eqx.filter_eval_shape(lambda: make(jax.random.key(0)))
    return with_shardings(found, state_shardings(found, mesh, layout))


def with_shardings(tree: PyTree, where: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        where,
    )


def state_shardings(state: PyTree, mesh: jax.sharding.Mesh, layout: sharding.Layout) -> PyTree:
    """Where every array of a state lies: moments may lie elsewhere than parameters."""
    where = sharding.specs(state, mesh, layout.params)
    moments = sharding.specs(state.opt_state, mesh, layout.moments)
    return eqx.tree_at(lambda state: state.opt_state, where, moments)


def bytes_of(tree: PyTree) -> int:
    """What one device holds of arrays that are placed."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled(step: Callable, arrays: PyTree, *fixed: Any) -> Any:
    """The program of a step for (frozen, state), arrays of which only the outline is known."""
    known, static = eqx.partition(arrays, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def run(frozen, state):
        return step.__wrapped__(*eqx.combine((frozen, state), static), *fixed)

    return sharding.compiled(jax.jit(run, donate_argnums=1).lower(*known))


Start = Callable[[Any, optim.Optimizer], PyTree]


def arrays(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    begin: Start,
    optimizer: optim.Optimizer,
) -> tuple[tuple[Any, Any], PyTree]:
    """The arguments of a step: frozen and state."""
    shape = student_config(config)
    if config.student is None and config.student_init != "random":
        shape = shape.select({"layers": tuple(range(config.student_layers))})
    family = models.FAMILIES[shape.model_type]
    # First, so that what does not divide is named as a leaf of the student, not as its moment.
    sharding.specs(eqx.filter_eval_shape(family, shape, jax.random.key(0)), mesh, layout.params)
    state = abstract_state(lambda key: begin(family(shape, key), optimizer), mesh, layout)
    rows = jax.sharding.NamedSharding(
        mesh,
        jax.sharding.PartitionSpec(sharding.claims(["batch"], mesh, layout.params)[0] or None),
    )
    ids = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), bool, sharding=rows)
    batch, teacher = data.Batch(ids, ids, mask), None
    if config.targets is not None:
        made = target_store.load(config.targets)

        def like(dtype, *entries):
            shape = (config.batch_size, config.seq_len, *entries)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        kind = losses.TopK if made.kind == "top-k" else losses.SampledTargets
        told = like(jnp.int32, made.entries), like(jnp.float32, made.entries), like(jnp.float32)
        return (None, target_store.Told(*batch, kind(*told))), state
    if uses_teacher_loss(config.loss) or config.eval_teacher:
        teacher = models.abstract(config.teacher)
        if config.teacher_devices is not None:
            wide = (config.batch_size, config.seq_len, teacher.config.embed)
            seen = jax.ShapeDtypeStruct(wide, jnp.dtype(config.compute_dtype), sharding=rows)
            batch = Seen(*batch, seen)
            teacher = eqx.filter_eval_shape(lambda model: Head(model.unembedding), teacher)
        teacher = with_shardings(teacher, sharding.specs(teacher, mesh, layout.params))
    return (teacher, batch), state


def resident_bytes(
    frozen: tuple[Any, Any], state: PyTree, optimizer: optim.Optimizer
) -> DeviceBytes:
    """What follows from shapes alone."""
    moving = eqx.filter(state.student, optimizer.trainable(state.student))
    return DeviceBytes(
        teacher=bytes_of(frozen[0]),
        student=bytes_of(state.student),
        moments=bytes_of(state.opt_state),
        batch=bytes_of(frozen[1]),
        gradients=bytes_of(moving),
        temporaries=0,
    )


class SeparateTeacherBytes(NamedTuple):
    """Bytes of a teacher that no step is given: on a device of the student, on one of its own."""

    student_device: int = 0
    teacher_device: int = 0


def beside(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    teacher_mesh: jax.sharding.Mesh | None,
) -> SeparateTeacherBytes:
    if not needs_teacher(config) or (teacher_mesh is None and config.targets is None):
        return SeparateTeacherBytes()
    teacher = models.abstract(config.teacher)
    where = sharding.specs(teacher, mesh if teacher_mesh is None else teacher_mesh, layout.params)
    size = bytes_of(with_shardings(teacher, where))
    return (
        SeparateTeacherBytes(student_device=size)
        if teacher_mesh is None
        else SeparateTeacherBytes(teacher_device=size)
    )


def need(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    step: Callable,
    begin: Start,
    fixed: Callable,
) -> DeviceBytes:
    """What a step needs, as compiled for this mesh."""
    optimizer, objective = fixed(config)
    frozen, state = arrays(config, mesh, layout, begin, optimizer)
    found = resident_bytes(frozen, state, optimizer)
    program = compiled(step, (frozen, state), optimizer, objective)
    return found._replace(temporaries=program.memory_analysis().temp_size_in_bytes)


def loss_bytes(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    begin: Start,
    fixed: Callable,
) -> int:
    """The temporaries of the head and the loss, compiled alone."""
    optimizer, objective = fixed(config)
    (teacher, batch), state = arrays(config, mesh, layout, begin, optimizer)
    rows, seq = config.batch_size // config.microbatches, config.seq_len

    def like(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch.mask.sharding)

    def states(width):
        return like((seq, width), jnp.dtype(config.compute_dtype))

    beside = None
    if teacher is not None and uses_teacher_loss(config.loss):
        beside = states(models.config(config.teacher).embed), teacher

    def loss(hidden, head, beside, labels, mask):
        total, _ = losses.distill_loss(
            hidden, head, *beside, labels, mask, objective=objective, step=0
        )
        return total

    def gradient(hidden, student, beside, labels, mask):
        beside = (None, None) if beside is None else (beside[0], beside[1].unembedding)
        return jax.grad(loss, (0, 1))(hidden, student.unembedding, beside, labels, mask)

    program = jax.jit(gradient).lower(
        states(state.student.config.embed), state.student, beside,
        like((seq,), jnp.int32), like((seq,), bool),
    )  # fmt: skip
    return sharding.compiled(program).memory_analysis().temp_size_in_bytes


# ---- against what there is -----------------------------------------------------------------------


def device_memory(config: Config) -> tuple[float, str]:
    """Bytes that a device has for a run, and how they are known."""
    device = jax.devices()[0]
    if config.device_memory is not None:
        return config.device_memory * 1e9, "--device-memory"
    if config.devices is not None:
        return math.inf, "say how much with --device-memory"
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf), device.device_kind
    return (host_memory() - PROGRAM) / jax.local_device_count(), "this host, less its program"


def host_memory() -> float:
    """What this process may use: the memory of the host, or the limit of its control group."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, where = line.split(":", 2)
            own = groups[1] if kinds == "memory" else groups[0]
            inner = own / where.lstrip("/")
            groups += [inner, *(path for path in inner.parents if path.is_relative_to(own))]
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                found.append(int((group / name).read_text()))
    return float(min(found))


def refuse(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    begin: Start,
    optimizer: optim.Optimizer,
    teacher_mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Ends a run that cannot fit before it begins."""
    found = resident_bytes(*arrays(config, mesh, layout, begin, optimizer), optimizer)
    has, what = device_memory(config)
    aside = beside(config, mesh, layout, teacher_mesh)
    least = max(found.arrays + found.gradients + aside.student_device, aside.teacher_device)
    if least > has:
        raise UserError(
            f"a device has {size(has)} ({what}), and arrays and gradients alone need {size(least)}:"
            " --plan tells what would fit, --force tries all the same"
        )


def smaller_settings(config: Config, ways: int) -> Iterator[tuple[str, Config]]:
    """Settings that need less and less memory; only the last changes the mathematics."""
    flags = ""
    for policy in ("dots", "full"):
        if config.remat != policy and (config.remat, policy) != ("full", "dots"):
            flags = f" --remat {policy}"
            config = dataclasses.replace(config, remat=policy)
            yield flags, config
    rows = config.batch_size
    for parts in range(config.microbatches + 1, rows // ways + 1):
        if rows % parts == 0 and rows // parts % ways == 0:
            config = dataclasses.replace(config, microbatches=parts)
            yield f"{flags} --microbatches {parts}", config
    if config.microbatches > 1:
        flags += f" --microbatches {config.microbatches}"
    if config.optim.name != "adafactor" and config.optim.moment_dtype == "float32":
        optimizer = dataclasses.replace(config.optim, moment_dtype="bfloat16")
        config = dataclasses.replace(config, optim=optimizer)
        yield f"{flags} --optim.moment-dtype bfloat16", config


def written(rules: sharding.Rules) -> str:
    return " ".join(f"{name}={','.join(axes)}" for name, axes in rules.items())


def table(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: sharding.Layout,
    step: Callable,
    begin: Start,
    fixed: Callable,
    teacher_mesh: jax.sharding.Mesh | None = None,
) -> str:
    """The plan of a run, for people."""
    told = (mesh, layout, step, begin, fixed)
    found, (has, what) = need(config, *told), device_memory(config)
    loss = loss_bytes(config, mesh, layout, begin, fixed)
    guess = jax.default_backend() == "cpu" and (config.devices or config.device_memory)
    blocks = found.temporaries - loss - found.gradients
    aside = beside(config, mesh, layout, teacher_mesh)
    found = found._replace(teacher=found.teacher + aside.student_device)
    lines = [
        "mesh       " + " x ".join(f"{name} {count}" for name, count in mesh.shape.items()),
        "rules      " + written(layout.params),
    ]
    if layout.moments != layout.params:
        lines.append("moments    " + written(layout.moments))
    lines += ["", "bytes of each device"]
    rows = [
        ("teacher", found.teacher, ""),
        ("student", found.student, ""),
        ("moments", found.moments, ""),
        ("batch", found.batch, ""),
        ("gradients", found.gradients, ""),
        ("head and loss", loss, "compiled alone"),
        ("activations", max(blocks, 0), "the rest of what the program works in"),
        ("in all", found.total, "an estimate, compiled for CPUs" if guess else ""),
        ("there is", has, what),
    ]
    if teacher_mesh is not None:
        rows.append(("its own", aside.teacher_device, "of each device that is the teacher's alone"))
    lines += [
        f"  {name:14}{size(number) if math.isfinite(number) else 'unknown':>10}  {remark}".rstrip()
        for name, number, remark in rows
    ]
    lines.append("")
    if aside.teacher_device > has:
        return "\n".join([*lines, "it does not fit: give the teacher more --teacher-devices"])
    if found.total <= has:
        return "\n".join([*lines, "it fits"] if math.isfinite(has) else lines[:-1])
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for flags, other in smaller_settings(config, ways):
        less = need(other, *told).total + aside.student_device
        if less <= has:
            lines.append(f"it does not fit; with{flags} it does, in {size(less)}")
            return "\n".join(lines)
    lines.append(
        "it does not fit, nor with --remat full, the most --microbatches and bfloat16 moments: take"
        " more devices, a smaller --batch-size or --seq-len, or fewer --student-layers"
    )
    return "\n".join(lines)


def step_flops(student: LanguageModel, teacher: LanguageModel | None, seq_len: int) -> float:
    """Of one token in a training step: three forward passes of the student, one of the teacher."""
    seen = 3 * forward_flops(student, seq_len)
    return seen if teacher is None else seen + forward_flops(teacher, seq_len)


def forward_flops(model: LanguageModel, seq_len: int) -> float:
    """Of one token, by the matrices and by attention to half of its row on average."""
    config = model.config
    axes = jax.tree.leaves(sharding.axes(model.blocks), is_leaf=lambda x: isinstance(x, tuple))
    blocks = zip(jax.tree.leaves(model.blocks), axes, strict=True)
    matrices = sum(leaf.size for leaf, names in blocks if optim.is_matrix(names))
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
