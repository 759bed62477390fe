"""How a student is born from a teacher: which of its blocks stay, or fresh weights in its image."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

import sharding
from models.attention import einsum_f32, positions
from models.base import LanguageModel
from runtime.errors import UserError

WAYS = ("greedy", "influence", "uniform", "first", "last", "random")

Progress = Callable[[int, int, str], None]  # done, of how many, what was found


class Calibration(NamedTuple):
    """A few windows of text, by which blocks are judged."""

    tokens: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]


class Choice(NamedTuple):
    """The teacher's blocks that stay, and the KL from the teacher that they leave, if measured."""

    kept: tuple[int, ...]
    kl: float | None = None


def parse(how: str) -> tuple[int, ...] | None:
    """The blocks that `how` lists, `None` where it names a way of choosing them."""
    if how in WAYS:
        return None
    try:
        kept = tuple(int(layer) for layer in how.split(","))
    except ValueError:
        raise UserError(
            f"--student-init is {how!r}: it must be one of {', '.join(WAYS)}, or a list of blocks"
            " such as 0,2,5"
        ) from None
    if list(kept) != sorted(set(kept)) or kept[0] < 0:
        raise UserError(f"--student-init is {how}: the blocks must ascend, each named once, from 0")
    return kept


def check(depth: int, layers: int, how: str) -> None:
    """Refuses what no choice among `depth` blocks can give."""
    listed = parse(how)
    if listed is not None and (len(listed) != layers or listed[-1] >= depth):
        raise UserError(
            f"--student-init {how} must list {layers} of the teacher's blocks, 0 to {depth - 1}"
        )
    if not 1 <= layers <= depth:
        raise UserError(
            f"--student-layers is {layers}: the teacher has {depth} blocks to keep (--student-init"
            " random can have more)"
        )


def choose(
    teacher: LanguageModel,
    layers: int,
    how: str = "greedy",
    calibration: Calibration | None = None,
    *,
    dtype: Any = None,
    progress: Progress = lambda done, total, found: None,
) -> Choice:
    """Which `layers` of the teacher's blocks a student keeps.

    `greedy` removes one block after the other, always the one whose absence moves the output least;
    `influence` removes those that turn their input least, all at once; both look at `calibration`.
    """
    depth, listed = teacher.config.layers, parse(how)
    check(depth, layers, how)
    if listed is not None:
        return Choice(listed)
    if layers == depth:
        return Choice(tuple(range(depth)), 0.0)
    if how in ("uniform", "first", "last"):
        ends = {
            "uniform": (0, depth - 1),
            "first": (0, layers - 1),
            "last": (depth - layers, depth - 1),
        }
        spaced = np.linspace(*ends[how], layers).round().astype(int)
        return Choice(tuple(spaced.tolist()))
    if how == "random":
        raise UserError("--student-init random keeps no blocks: make the student with fresh()")
    if calibration is None:
        raise UserError(f"--student-init {how} needs calibration windows to judge blocks by")
    if how == "influence":
        turned = np.asarray(_influence(teacher, calibration, dtype))
        progress(1, 1, f"influence {turned.min():.3f} to {turned.max():.3f}")
        return Choice(tuple(sorted(np.argsort(-turned, kind="stable")[:layers].tolist())))
    return _greedy(teacher, layers, calibration, dtype, progress)


def _greedy(teacher, layers, calibration, dtype, progress) -> Choice:
    kept, found = list(range(teacher.config.layers)), 0.0
    total = sum(range(layers + 1, len(kept) + 1))
    done = 0
    start = _embedded(teacher, calibration, dtype)
    goal = _finished(teacher, start, calibration)
    while len(kept) > layers:
        # Padded to one length: every candidate of every round runs the same compiled program.
        order = jnp.array(kept + [0] * (teacher.config.layers - len(kept)))
        x, costs = start, []
        for i in range(len(kept)):
            cost, x = _without(
                teacher, x, goal, calibration, order, jnp.array(i), jnp.array(len(kept))
            )
            costs.append(cost)
            done += 1
            progress(done, total, f"{len(kept)} blocks, KL {found:.3f}")
        costs = np.array(jax.device_get(costs))
        if not np.isfinite(costs).any():
            raise UserError("the teacher's output is not finite on the calibration windows")
        found = float(np.nanmin(costs))
        kept.pop(int(np.nanargmin(costs)))
    return Choice(tuple(kept), found)


@eqx.filter_jit
def _embedded(teacher, calibration, dtype) -> Float[Array, "batch seq embed"]:
    return teacher.embed(calibration.tokens, jnp.dtype(dtype or teacher.dtype))


def _walker(teacher: LanguageModel, calibration: Calibration):
    """Applies the block of some index to hidden states."""
    here = positions(calibration.tokens, calibration.segments)
    prepared = teacher.position_inputs(here)

    def apply(layer: Int[Array, ""], x: Float[Array, "batch seq embed"]) -> Array:
        weights = jax.tree.map(lambda leaf: leaf[layer], teacher.blocks)
        x = sharding.constrain(x, "batch seq embed")
        return teacher.block(weights, x, here, prepared, layer, None)[0]

    return apply


@eqx.filter_jit
def _finished(teacher, x, calibration) -> Float[Array, "batch seq embed"]:
    apply = _walker(teacher, calibration)
    return teacher.final_norm(jax.lax.fori_loop(0, teacher.config.layers, apply, x))


@eqx.filter_jit
def _without(
    teacher: LanguageModel,
    x: Float[Array, "batch seq embed"],
    goal: Float[Array, "batch seq embed"],
    calibration: Calibration,
    order: Int[Array, " layers"],
    i: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Float32[Array, ""], Float[Array, "batch seq embed"]]:
    """The KL if block `order[i]` goes, and the states after it: `x` are the states before it."""
    apply = _walker(teacher, calibration)
    rest = jax.lax.fori_loop(i + 1, count, lambda j, x: apply(order[j], x), x)
    kl = _kl(teacher.unembedding, goal, teacher.final_norm(rest), calibration.mask)
    return kl, apply(order[i], x)


def _kl(
    head: Float[Array, "vocab embed"],
    teacher: Float[Array, "batch seq embed"],
    student: Float[Array, "batch seq embed"],
    mask: Bool[Array, "batch seq"],
    chunk: int = 256,
) -> Float32[Array, ""]:
    """Mean KL(teacher || student) per token of `mask`, of `chunk` tokens at a time."""
    head = head.astype(teacher.dtype)

    def one(rows):
        p, q = (jax.nn.log_softmax(einsum_f32("te,ve->tv", x, head)) for x in rows[:2])
        return jnp.sum(jnp.where(rows[2], jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0))

    def chunks(x):
        x = x.reshape(-1, *x.shape[2:])
        x = jnp.pad(x, [(0, -len(x) % chunk), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, chunk, *x.shape[1:])

    total = jnp.sum(jax.lax.map(one, (chunks(teacher), chunks(student), chunks(mask))))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


@eqx.filter_jit
def _influence(teacher, calibration, dtype) -> Float32[Array, " layers"]:
    """1 - cosine between each block's input and output, a mean over tokens."""
    apply = _walker(teacher, calibration)
    weight = calibration.mask.astype(jnp.float32)
    weight /= jnp.maximum(jnp.sum(weight), 1)

    def one(x, layer):
        y = apply(layer, x)
        a, b = x.astype(jnp.float32), y.astype(jnp.float32)
        length = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(length, 1e-30)
        return y, jnp.sum(weight * (1 - cosine))

    x = teacher.embed(calibration.tokens, jnp.dtype(dtype or teacher.dtype))
    return jax.lax.scan(one, x, jnp.arange(teacher.config.layers))[1]


def cut(teacher: LanguageModel, kept: tuple[int, ...], dtype: Any = jnp.float32) -> LanguageModel:
    """The teacher with only these blocks, in arrays of its own: no buffer is shared."""
    config = teacher.config.select_layers(kept)
    outline = eqx.filter_eval_shape(lambda: type(teacher)(config, jax.random.key(0)))
    index = jnp.array(kept)

    def part(leaf, axes):
        copy = leaf[index] if axes[0] == "layers" else jnp.copy(leaf)
        copy = copy.astype(dtype)
        return jax.device_put(copy, leaf.sharding) if leaf.committed else copy

    copies = jax.tree.map(part, teacher, sharding.axes(teacher))
    return jax.tree.unflatten(jax.tree.structure(outline), jax.tree.leaves(copies))


def fresh(
    family: type[LanguageModel], config: Any, key: PRNGKeyArray, mesh: Mesh | None = None
) -> LanguageModel:
    """Random weights in float32, born in their places on the mesh."""

    @eqx.filter_jit
    def born(key):
        model = family(config, key)
        return model if mesh is None else sharding.shard(model, sharding.specs(model, mesh))

    return born(key)


def resized(config: Any, layers: int, **widths: int | None) -> Any:
    """A teacher's config with another number of layers and other widths (embed, mlp, heads …)."""
    given = {name: width for name, width in widths.items() if width is not None}
    for name, width in given.items():
        if name not in {field.name for field in dataclasses.fields(config)}:
            flag = name.replace("_", "-")
            raise UserError(f"--student-{flag} means nothing to {config.model_type}")
        if width < 1:
            raise UserError(f"--student-{name.replace('_', '-')} is {width}: it must be positive")
    if layers < 1:
        raise UserError(f"--student-layers is {layers}: it must be positive")
    heads = given.get("heads", config.heads)
    groups = given.get("kv_heads", getattr(config, "kv_heads", 1))
    if heads % groups:
        raise UserError(
            f"{heads} heads of the student are not a multiple of its {groups} key and value heads:"
            " change --student-heads or --student-kv-heads"
        )
    depth = config.layers
    return dataclasses.replace(
        config.select_layers(tuple(i % depth for i in range(layers))), **given
    )


def from_teacher(
    teacher: LanguageModel,
    layers: int,
    how: str = "greedy",
    *,
    calibration: Calibration | None = None,
    key: PRNGKeyArray | None = None,
) -> LanguageModel:
    """A student in float32 with `layers` blocks, chosen or made anew as `how` says."""
    if how == "random":
        config = resized(teacher.config, layers)
        return fresh(type(teacher), config, jax.random.key(0) if key is None else key)
    return cut(teacher, choose(teacher, layers, how, calibration).kept)
