"""Placement: one mesh, one table of rules, and the axis names that parameters carry.

A parameter says its axes in its annotation (`weight: Float[Array, "mlp embed"]`); `RULES` says over
which mesh axes an axis may be split; everything about placement follows from the two.
"""

import contextlib
import ctypes
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# In order of precedence: each mesh axis goes to the first axis of an array that claims it. So a
# head ("vocab embed") is split over its vocabulary alone, an activation over its batch first.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "rows": ("data",),  # of a batch, where fsdp is left to the vocabulary
    "vocab": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "columns": ("fsdp", "tensor"),  # of the embedding, where its rows are looked up
}

Rules = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the axes of a run lie: ZeRO 3 splits parameters, gradients and moments; ZeRO 1 keeps
    parameters whole, and splits moments over the devices that share the batch."""

    zero: int = 3
    overrides: tuple[str, ...] = ()
    """Rules such as `vocab=fsdp,tensor`, over both."""
    attention: str = "auto"
    """What attends there: a name of `models.kernels`."""
    deterministic: bool = False
    """Whether GPUs add in one order too."""

    def __post_init__(self):
        if len(dict(map(_rule, self.overrides))) < len(self.overrides):
            given = " ".join(self.overrides)
            raise UserError(f"--mesh.rules {given}: one of the axes is named twice")

    @property
    def params(self) -> Rules:
        """For parameters, gradients and activations."""
        return self._rules(
            {"rows": ("data", "fsdp"), "vocab": ("tensor",), "embed": (), "columns": ("tensor",)}
        )

    @property
    def moments(self) -> Rules:
        return self._rules({"vocab": ("data", "fsdp", "tensor"), "embed": ("data", "fsdp")})

    def _rules(self, zero_1: Rules) -> Rules:
        return RULES | (zero_1 if self.zero == 1 else {}) | dict(map(_rule, self.overrides))


def _rule(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, axes = text.partition("=")
    axes = tuple(axis for axis in axes.split(",") if axis)
    known = set(axes) <= set(MESH_AXES) and len(set(axes)) == len(axes)
    if not equals or name not in RULES or not known:
        expected = "AXIS=MESH,AXES such as vocab=fsdp,tensor, with an axis of"
        known = f"{', '.join(RULES)} and mesh axes of {', '.join(MESH_AXES)} (or none)"
        raise UserError(f"--mesh.rules {text}: expected {expected} {known}")
    return name, axes


# The layout goes where the mesh in scope goes: jax holds programs of other layouts apart.
in_scope = jax.make_user_context(Layout())


@contextlib.contextmanager
def use_mesh(mesh: Mesh, layout: Layout = Layout()) -> Iterator[None]:
    """Places activations and new states on `mesh` by the rules of `layout`."""
    with jax.set_mesh(mesh), in_scope(layout):
        yield


@dataclasses.dataclass(frozen=True)
class Sizes:
    data: int = 1
    """Copies of the models, each with a share of the batch. One of the three may be -1: the devices
    that are left."""
    fsdp: int = -1
    """Ways to split parameters, moments and the batch."""
    tensor: int = 1
    """Ways to split heads, MLP and vocabulary."""

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in MESH_AXES}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`; a size of -1 takes the devices that are left."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True)), len(devices)
    mesh = "mesh " + " x ".join(f"{name} {size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) == 1:
        given = math.prod(size for size in sizes.values() if size != -1)
        sizes[rest[0]] = count // max(given, 1)
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        remedy = f"choose sizes whose product is {count}; at most one is -1 (what is left)"
        raise UserError(f"{mesh} does not match {count} devices: {remedy}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=devices)


def axes(tree: PyTree) -> PyTree:
    """The axis names of every array in `tree`, `None` where none are declared: those in the
    annotation of the Equinox module that holds it, however deep in other containers (an optimizer
    state, say). An array with one dimension more is stacked over `layers`."""

    def declared(path, leaf):
        node, names = tree, None
        for key in path:
            match key:
                case jax.tree_util.GetAttrKey(name=name):
                    if isinstance(node, eqx.Module):
                        names = field_axes(type(node), name)
                    node = getattr(node, name)
                case jax.tree_util.SequenceKey(idx=at) | jax.tree_util.DictKey(key=at):
                    node = node[at]
                case _:
                    return None
        extra = getattr(leaf, "ndim", -1) - len(names or ())
        stacked = {0: (), 1: ("layers",)}.get(extra)
        return None if names is None or stacked is None else (*stacked, *names)

    return jax.tree_util.tree_map_with_path(declared, tree)


def field_axes(module: type, field: str) -> tuple[str, ...] | None:
    """The axis names in the annotation of a field, `X | None` included; None where it has none."""
    annotation = next((f.type for f in dataclasses.fields(module) if f.name == field), None)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        annotation = options[0] if len(options) == 1 else None
    names = getattr(annotation, "dim_str", None)
    return None if names is None else tuple(names.split())


def match_leaves(tree: PyTree, patterns: Sequence[str], flag: str) -> dict[str, bool]:
    """The name of every leaf, in order, such as `student.blocks.query`, and whether it fits one of
    these patterns of `flag`, several of which a comma may join. A pattern may leave out the first
    part of a name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    matches = dict.fromkeys(names, False)
    for pattern in ",".join(patterns).split(",") if patterns else ():
        paths = [(name, name.partition(".")[2]) for name in names]
        matching = [path[0] for path in paths if any(fnmatchcase(x, pattern) for x in path)]
        if not matching:
            raise UserError(f"{flag} {pattern} names no parameter; there are {', '.join(names)}")
        matches |= dict.fromkeys(matching, True)
    return matches


def claims(
    names: Sequence[str], mesh: Mesh | AbstractMesh, rules: Rules | None = None
) -> list[tuple[str, ...]]:
    """The mesh axes that each of these axes is split over."""
    rules = in_scope.value.params if rules is None else rules
    claimed: dict[str, tuple[str, ...]] = {}
    free = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    for name in rules:
        if name in names:
            claimed[name] = tuple(axis for axis in rules[name] if axis in free)
            free = [axis for axis in free if axis not in claimed[name]]
    return [claimed.get(name, ()) for name in names]


def specs(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> PyTree:
    """A `NamedSharding` for every array of `tree` (arrays or their shapes), by its axis names."""

    def place(path, leaf, names):
        if names is None:
            return NamedSharding(mesh, PartitionSpec())
        entries, shape = claims(names, mesh, rules), leaf.shape
        if "vocab" in names and "embed" in names:
            rows, width = names.index("vocab"), names.index("embed")
            if shape[rows] % _parts(mesh, entries[rows]):  # the losses pad it; no array need be
                entries[width] += entries[rows]
                entries[rows] = ()
                while shape[width] % _parts(mesh, entries[width]):
                    entries[width] = entries[width][:-1]
        for i, (axis, size) in enumerate(zip(names, shape, strict=True)):
            parts = _parts(mesh, entries[i])
            if size % parts and axis == "kv_heads":  # few: every device holds them whole
                entries[i] = ()
            elif size % parts:
                nearest = max(n for n in range(1, parts) if size % n == 0)
                name = jax.tree_util.keystr(path).lstrip(".")
                where = f"{parts} devices of the mesh axes {', '.join(entries[i])}"
                remedy = f"the nearest mesh that works has {nearest} there"
                raise UserError(f"{name}: its {size} {axis} do not divide over {where}; {remedy}")
        return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))

    return jax.tree_util.tree_map_with_path(place, tree, axes(tree))


def _parts(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


shard = eqx.filter_shard  # of a tree and its specs; inside a jitted function, constrained so


def constrain_tree(tree: PyTree, *, moments: bool = False) -> PyTree:
    """Inside a jitted function: every array placed by its axes on the mesh in scope, if any."""
    mesh, layout = jax.sharding.get_abstract_mesh(), in_scope.value
    if mesh.empty:
        return tree
    return shard(tree, specs(tree, mesh, layout.moments if moments else layout.params))


def device() -> tuple[str, str]:
    """The platform and the kind of the devices of the mesh in scope, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind


def num_shards(name: str) -> int:
    """Over how many devices of the mesh in scope activations are split along this axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(mesh, claims([name], mesh)[0])


def constrain(x: Shaped[Array, "..."], names: str) -> Shaped[Array, "..."]:
    """Pins an activation with these axes, such as `"batch seq embed"`, to the mesh of the enclosing
    `jax.set_mesh`, if any. A dimension that does not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    entries = [
        axes if axes and size % _parts(mesh, axes) == 0 else None
        for size, axes in zip(x.shape, claims(names.split(), mesh), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def process_rows(mesh: Mesh, rules: Rules | None = None) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many: processes whose devices hold
    the same rows, parts of one model, read the same."""
    (axes,), held = claims(["batch"], mesh, rules), {}
    ways, rows = _parts(mesh, axes), NamedSharding(mesh, PartitionSpec(axes or None))
    for device, (part,) in rows.devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(part.start or 0)
    kinds = sorted({tuple(sorted(parts)) for parts in held.values()})
    if sum(map(len, kinds)) != ways or len({len(parts) for parts in kinds}) > 1:
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        why = "devices of one process would hold some rows of another one's and some of their own"
        remedy = "choose sizes that divide the devices of a process, or are multiples"
        raise UserError(f"mesh {sizes}: {why}: {remedy}")
    return kinds.index(tuple(sorted(held[jax.process_index()]))), len(kinds)


def row_sharding(mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """Where the rows of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(claims(["batch"], mesh, rules)[0] or None))


def from_host(tree: PyTree, mesh: Mesh, rules: Rules | None = None) -> PyTree:
    """Arrays of the rows that each process has, its part of `process_rows`, as global arrays."""
    rows = row_sharding(mesh, rules)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)


def compiler_options() -> dict[str, str | bool]:
    """Of the compiler, as they are best for the devices of the mesh in scope."""
    platform, _ = device()
    if platform == "gpu" and in_scope.value.deterministic:
        return {"xla_gpu_deterministic_ops": True}
    return _cpu_options() if platform == "cpu" else {}


@functools.cache
def _cpu_options() -> dict[str, str]:
    # Of this library's fusions on the CPU, those of other operations than products read constants
    # as whole arrays and run on one thread: more memory, and more time for losses and sums.
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # other versions lack it
        jax.jit(lambda: 0, compiler_options=options)()
        return options
    return {}


def jit(function: Callable | None = None, *, donate: str = "none") -> Callable:
    """`eqx.filter_jit` with these options; inlined into a program that traces its arguments."""
    if function is None:
        return functools.partial(jit, donate=donate)

    @functools.cache
    def program() -> Callable:  # made late, as devices are asked for
        return eqx.filter_jit(function, donate=donate, compiler_options=compiler_options())

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs)))
        return (function if traced else program())(*args, **kwargs)

    return call


def compiled(lowered: Any) -> Any:
    """The program of a lowered function."""
    program = lowered.compile(compiler_options=compiler_options())
    with contextlib.suppress(OSError, AttributeError):  # hundreds of MB that the compiler had
        ctypes.CDLL(None).malloc_trim(0)
    return program


def compute_dtype(asked: str = "auto") -> str:
    """What models compute in: auto is bfloat16 on accelerators, float32 on CPUs."""
    if asked != "auto":
        return asked
    return "float32" if device()[0] == "cpu" else "bfloat16"


def to_host(array: Array) -> np.ndarray:
    """All of an array, whichever processes hold its parts; all of them call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
