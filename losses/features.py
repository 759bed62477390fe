"""Hidden states of the teacher as targets: which blocks are matched, and how far apart they are."""

from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from models.attention import einsum_f32
from runtime.errors import UserError

Pairs = tuple[tuple[int, int], ...]  # blocks of student and teacher whose outputs are matched
Vectors = Float32[Array, "*rows width"]
SHORTEST = 1e-12  # squared: what is shorter than 1e-6 has no direction


def pairs(
    given: Sequence[str], layers: int, teacher_layers: int, cut_from: Sequence[int] | None = None
) -> Pairs:
    """The blocks of `given` (3:7 is the student's 3 and the teacher's 7). Without any: every block
    with the one it was cut from, or else with the one at the same share of the depth."""
    if not given:
        share = (-(-(i + 1) * teacher_layers // layers) - 1 for i in range(layers))
        return tuple(enumerate(share if cut_from is None else cut_from))
    pairs = [tuple(map(int, pair.split(":"))) for pair in given]
    for student, teacher in pairs:
        if student >= layers or teacher >= teacher_layers:
            has = f"the student has blocks 0 to {layers - 1}, the teacher 0 to {teacher_layers - 1}"
            raise UserError(f"--loss.feature-pairs {student}:{teacher}: {has}")
    return tuple(pairs)


def tapped_layers(pairs: Pairs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks of student and teacher whose outputs are matched, each once, in order."""
    return tuple(tuple(sorted({pair[i] for pair in pairs})) for i in (0, 1))


class Projection(eqx.Module):
    """From the student's width to the teacher's, stacked over pairs as blocks are over layers."""

    weight: Float[Array, "teacher_embed embed"]


def projection(count: int, embed: int, teacher_embed: int, key: PRNGKeyArray) -> Projection | None:
    """A fresh map for each of `count` pairs; none where the widths are the same."""
    if not count or embed == teacher_embed:
        return None

    def fresh(key):  # states keep their size on the way
        return Projection(jax.random.normal(key, (teacher_embed, embed)) * embed**-0.5)

    return eqx.filter_vmap(fresh)(jax.random.split(key, count))


def cosine(x: Vectors, y: Vectors) -> Float32[Array, "*rows"]:
    """1 - cos; 1, and without a gradient, where either has no direction."""
    xx, yy = jnp.sum(x * x, axis=-1), jnp.sum(y * y, axis=-1)
    long = (xx > SHORTEST) & (yy > SHORTEST)
    inverse = jax.lax.rsqrt(jnp.where(long, xx, 1.0)) * jax.lax.rsqrt(jnp.where(long, yy, 1.0))
    return 1 - jnp.where(long, jnp.sum(x * y, axis=-1) * inverse, 0.0)


DISTANCES = {"cosine": cosine, "mse": lambda x, y: jnp.mean((x - y) ** 2, axis=-1)}


def loss(
    kind: str,
    pairs: Pairs,
    student_states: Float[Array, "student_layers batch seq embed"],
    teacher_states: Float[Array, "batch teacher_layers seq teacher_embed"],
    mask: Bool[Array, "batch seq"],
    projection: Projection | None = None,
) -> Float32[Array, ""]:
    """The distance of the mapped states, a mean over pairs, summed over the tokens of `mask`. The
    states are outputs of the blocks of `tapped_layers(pairs)`; the teacher's are constants."""
    student_layers, teacher_layers = tapped_layers(pairs)
    order = [student_layers.index(student) for student, _ in pairs]
    if order != list(range(len(student_layers))):
        student_states = student_states[jnp.array(order)]
    order = jnp.array([teacher_layers.index(teacher) for _, teacher in pairs])

    # One pair at a time, and computed again in the backward pass: float32 copies of all of them
    # would outweigh the states.
    @partial(jax.checkpoint, prevent_cse=False)
    def add(total, pair):
        x, tap, projection = pair
        y = jax.lax.dynamic_index_in_dim(teacher_states, tap, axis=1, keepdims=False)
        y = jax.lax.stop_gradient(y)
        # Not a product with the mask: what is masked may not be finite.
        x, y = (jnp.where(mask[..., None], z, jnp.zeros_like(z)) for z in (x, y))
        if projection is not None:
            x = einsum_f32("bse,te->bst", x, projection.weight.astype(x.dtype))
        distance = DISTANCES[kind](x.astype(jnp.float32), y.astype(jnp.float32))
        return total + jnp.sum(jnp.where(mask, distance, 0.0)), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (student_states, order, projection))
    return total / len(pairs)
