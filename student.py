"""How a student is born from a teacher: which blocks and channels stay, or fresh weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float32, Int, PRNGKeyArray

import models
import sharding
from losses import divergences, features, signal
from models.attention import Hidden, einsum_f32, positions
from models.base import LanguageModel, intermediates
from runtime.errors import UserError

METHODS = ("greedy", "influence", "uniform", "first", "last", "random")
GROWTH = ("grow", "grow-stack")  # how a student becomes deeper

# Of the greedy choice. A head over a large vocabulary costs a token as much as several blocks.
LOGITS, LEAST = 2**24, 256  # of the positions that judge a candidate, and how many these are
JUDGED = 4  # blocks that are judged in every round at least
CANDIDATES, MULTIPLE = 4, 16  # students of a size that are compared; divides their MLP widths
WIDTHS = ("embed", "mlp", "heads")  # that can be cut; heads of keys and values with their heads
Heal = Literal["auto", "none", "seams", "all"]
# Of a healing solve, as a share of each input's square. A third is better at first, and worse after
# some training.
DAMPING = 1.0
PART = 8192  # tokens of healing text that go through a block at a time


class Calibration(NamedTuple):
    """A few windows of text, by which blocks are judged."""

    tokens: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]


class Choice(NamedTuple):
    """The teacher's blocks that stay, the KL that they leave, if measured, and what each would have
    added to it when it was judged last."""

    layers: tuple[int, ...]
    kl: float | None = None
    increases: tuple[float, ...] = ()


def parse(how: str) -> tuple[int, ...] | None:
    """The blocks that `how` lists, `None` where it names a way of choosing them."""
    if how in METHODS + GROWTH:
        return None
    words = [word.strip() for word in how.split(",")]
    layers = [int(word) if word.isdecimal() else -1 for word in words]
    if layers != sorted(set(layers)) or layers[0] < 0:
        raise UserError(
            f"--student-init is {how!r}: it must be one of {', '.join(METHODS + GROWTH)}, or a"
            " list of blocks such as 0,2,5, which ascend, each named once"
        )
    return tuple(layers)


def check(depth: int, layers: int, how: str) -> None:
    """Refuses what no choice among `depth` blocks can give."""
    listed = parse(how)
    if listed is not None and (len(listed) != layers or listed[-1] >= depth):
        blocks = f"{layers} of the teacher's blocks, 0 to {depth - 1}"
        raise UserError(f"--student-init {how} must list {blocks}")
    if not 1 <= layers <= depth:
        more = f"the teacher has {depth} blocks to keep (--student-init random can have more)"
        raise UserError(f"--student-layers is {layers}: {more}")


def choose_layers(
    teacher: LanguageModel,
    layers: int,
    how: str = "greedy",
    calibration: Calibration | None = None,
    *,
    dtype: Any = None,
    start: Choice | None = None,
    save: Callable[[Choice], None] = lambda choice: None,
    progress: Callable[[int, int, str], None] = lambda done, total, figure: None,
) -> Choice:
    """Which `layers` of the teacher's blocks a student keeps: `greedy` removes one by one the block
    whose absence moves the output least; `influence` removes those that turn their input least, all
    at once. `save` is called after each removal; a choice goes on from `start`, one of these."""
    depth, listed = teacher.config.layers, parse(how)
    check(depth, layers, how)
    if listed is not None:
        return Choice(listed)
    if layers == depth:
        return Choice(tuple(range(depth)), 0.0)
    if how in ("uniform", "first", "last"):
        first = depth - layers if how == "last" else 0
        last = layers - 1 if how == "first" else depth - 1
        return Choice(tuple(np.linspace(first, last, layers).round().astype(int).tolist()))
    if how == "random" or calibration is None:
        lack = "keeps no blocks, see fresh()" if how == "random" else "needs calibration windows"
        raise UserError(f"--student-init {how} {lack}")
    if how == "influence":
        influence = np.asarray(forward(teacher, calibration, None, dtype)[2])
        progress(1, 1, f"influence {influence.min():.3f} to {influence.max():.3f}")
        return Choice(tuple(sorted(np.argsort(-influence, kind="stable")[:layers].tolist())))
    return greedy(teacher, layers, calibration, dtype, start, save, progress)


def greedy(teacher, layers, calibration, dtype, start, save, progress) -> Choice:
    """The choice of `choose_layers` that removes one block at a time."""
    sample = sample_positions(calibration, teacher.config.vocab)
    first, log_p, _ = forward(teacher, calibration, sample, dtype)
    depth, states, done = teacher.config.layers, [first], 0
    remaining, kl, increases = start or Choice(tuple(range(depth)), 0.0, (-np.inf,) * depth)
    while len(remaining) > layers:
        for layer in remaining[len(states) - 1 : -1]:  # those before what went are as they were
            states.append(block_states(teacher, jnp.array(layer), states[-1], calibration)[1])
        # Padded to one length: every candidate of every round runs the same compiled program.
        order, costs = jnp.array([*remaining, *[0] * (depth - len(remaining))]), {}
        for i in np.argsort(increases, kind="stable").tolist():
            # What a block adds seldom falls as others go: the rest added more when judged last.
            if len(costs) >= JUDGED and min(costs.values()) - kl <= increases[i]:
                break
            place = jnp.array(i), jnp.array(len(remaining))
            cost = ablate(teacher, states[i], log_p, calibration, sample, order, *place)
            cost = float(broadcast_one_to_all(jax.device_get(cost)))  # all judge as many
            costs[i] = np.inf if np.isnan(cost) else cost
            done += 1
            later = JUDGED * (len(remaining) - layers - 1)
            total = max(done, JUDGED if start else depth) + later
            progress(done, total, f"{len(remaining)} blocks, KL {kl:.3f}")
        gone = min(costs, key=costs.__getitem__)
        if not np.isfinite(costs[gone]):
            raise UserError("the teacher's output is not finite on the calibration windows")
        increases = [costs[i] - kl if i in costs else x for i, x in enumerate(increases)]
        increases, kl = (*increases[:gone], *increases[gone + 1 :]), costs[gone]
        remaining, states = (*remaining[:gone], *remaining[gone + 1 :]), states[: gone + 1]
        save(Choice(remaining, kl, increases))
    return Choice(remaining, kl, increases)


def sample_positions(calibration: Calibration, vocab: int) -> Int[Array, " rows"]:
    """Some of the positions that count, numbered through all windows; all with a small vocabulary:
    where it costs nothing, the choice is not to depend on the sample."""
    counted = np.flatnonzero(np.asarray(calibration.mask))
    places = np.linspace(0, len(counted) - 1, min(len(counted), max(LEAST, LOGITS // vocab)))
    return jnp.asarray(counted[places.astype(int)])


def block_fn(teacher: LanguageModel, calibration: Calibration) -> Callable[[Array, Array], Array]:
    """A function that applies the block of some index to hidden states."""
    here = positions(calibration.tokens, calibration.segments)
    position_inputs = teacher.position_inputs(here)

    def apply(layer: Int[Array, ""], x: Hidden) -> Hidden:
        weights = jax.tree.map(lambda leaf: leaf[layer], teacher.blocks)
        x = sharding.constrain(x, "batch seq embed")
        return teacher.block(weights, x, here, position_inputs, layer, None)[0]

    return apply


@sharding.jit
def forward(
    teacher: LanguageModel, calibration: Calibration, sample: Int[Array, " rows"] | None, dtype: Any
):
    """The input of the first block, the log-probabilities at `sample`, and how far each block turns
    its input: 1 - cosine, a mean over tokens."""
    apply, weight = block_fn(teacher, calibration), calibration.mask.astype(jnp.float32)
    weight /= jnp.maximum(jnp.sum(weight), 1)

    def one(x, layer):
        y = apply(layer, x)
        turn = features.cosine(x.astype(jnp.float32), y.astype(jnp.float32))
        return y, jnp.sum(weight * turn)

    first = teacher.embed_input(teacher.look_up(calibration.tokens, dtype))
    last, influence = jax.lax.scan(one, first, jnp.arange(teacher.config.layers))
    return first, None if sample is None else log_probs(teacher, last, sample), influence


def log_probs(
    model: LanguageModel, x: Hidden, sample: Int[Array, " rows"]
) -> Float32[Array, "vocab rows"]:
    """What follows the tokens at `sample`, counted through all windows; `x` leaves the last
    block."""
    rows = model.final_norm(x.reshape(1, -1, x.shape[-1])[:, sample])[0]
    vocab = len(model.unembedding)
    z = signal.head_logits(signal.prepare_head(model.unembedding, x.dtype), rows, vocab)
    return z - signal.logsumexp(z)


@sharding.jit
def ablate(
    teacher: LanguageModel,
    x: Hidden,
    log_p: Float32[Array, "vocab rows"],
    calibration: Calibration,
    sample: Int[Array, " rows"],
    order: Int[Array, " layers"],
    i: Int[Array, ""],
    count: Int[Array, ""],
) -> Float32[Array, ""]:
    """The KL if block `order[i]` goes: `x` are the states before it."""
    apply = block_fn(teacher, calibration)
    last = jax.lax.fori_loop(i + 1, count, lambda j, x: apply(order[j], x), x)
    terms = divergences.kl(log_p, log_probs(teacher, last, sample))
    return jnp.mean(jnp.sum(terms, 0))


@sharding.jit
def importance(
    teacher: LanguageModel, calibration: Calibration, dtype: Any
) -> dict[str, Float32[Array, "layers channels"]]:
    """Means over tokens for each block: of the size of its MLP's channels, of what each head adds
    to the stream, and of the size of the stream's channels behind the block's norms."""
    apply, weight = block_fn(teacher, calibration), calibration.mask.astype(jnp.float32)[..., None]

    def mean(x):
        return jnp.sum(weight * jnp.abs(x.astype(jnp.float32)), (0, 1)) / jnp.sum(weight)

    def one(x, layer):
        with intermediates() as values:
            y = apply(layer, x)
        mixed, output = values["output"], teacher.blocks.output[layer]
        mixed, output = mixed.astype(jnp.float32), output.astype(jnp.float32)
        gram = jnp.einsum("ehd,ehk->hdk", output, output)
        squared = jnp.einsum("bshd,hdk,bshk->bsh", mixed, gram, mixed)
        return y, {
            "mlp": mean(values["down"]),
            "heads": mean(jnp.sqrt(jnp.maximum(squared, 0))),
            "embed": mean(values["query"]) + mean(values["gate"]),
        }

    first = teacher.embed_input(teacher.look_up(calibration.tokens, dtype))
    return jax.lax.scan(one, first, jnp.arange(teacher.config.layers))[1]


def narrowed(config: Any, **widths: int) -> Any:
    """A teacher's config with other widths (embed, mlp, heads, kv_heads), none more than its own.
    Where key and value heads go, their query heads go with them."""
    for axis, width in widths.items():
        flag, most = f"--student-{axis.replace('_', '-')}", getattr(config, axis)
        if axis not in config.SELECTABLE:
            reason = f"its config cannot say so; it is cut along {', '.join(config.SELECTABLE)}"
            raise UserError(f"{flag} with a {config.model_type} teacher: {reason}")
        if width > most:
            more = "--student-init random can have more"
            raise UserError(f"{flag} is {width}: the teacher has {most} ({more})")
    group, kv_heads = config.heads // config.kv_heads, widths.get("kv_heads", config.kv_heads)
    heads = widths.get("heads", kv_heads * group)
    if heads % kv_heads or heads > kv_heads * group:
        each = f"each of {kv_heads} key and value heads (--student-kv-heads) must have as many"
        raise UserError(f"--student-heads is {heads}: {each}, 1 to {group}")
    indices = {axis: range(width) for axis, width in widths.items()}
    if heads < config.heads:
        indices["heads"] = [i for i in range(kv_heads * group) if i % group < heads // kv_heads]
    return config.select(indices)


def sizes(config: Any, share: float) -> list[tuple[int, int]]:
    """Depths and MLP widths of a few students whose blocks have at most this share of the teacher's
    parameters: from all blocks, as narrow as that takes, to the fewest."""
    family = models.FAMILIES[config.model_type]
    blocks = eqx.filter_eval_shape(lambda: family(config, jax.random.key(0))).blocks
    total = sum(leaf.size for leaf in jax.tree.leaves(blocks)) / config.layers
    mlp = jax.tree.map(lambda x, axes: x.size * ("mlp" in axes), blocks, sharding.axes(blocks))
    mlp = sum(jax.tree.leaves(mlp)) / config.layers
    step = math.gcd(config.mlp, MULTIPLE) if "mlp" in config.SELECTABLE else config.mlp
    fewest, widths = max(1, int(share * config.layers + 1e-9)), {}
    for depth in np.linspace(config.layers, fewest, CANDIDATES).round().astype(int).tolist():
        left = share * total * config.layers / depth - (total - mlp)
        widths[depth] = min(config.mlp, int(left / mlp * config.mlp / step + 1e-9) * step)
    if widths[fewest] <= 0:
        raise UserError(f"--student-params {share:g}: a student of one block is larger than that")
    return [(depth, width) for depth, width in widths.items() if width > 0]


def choose_widths(
    teacher: LanguageModel, shape: Any, layers: Sequence[int], calibration: Calibration,
    dtype: Any = None,
) -> dict[str, Sequence[int] | np.ndarray]:  # fmt: skip
    """The indices of these blocks and, where `shape` is narrower than the teacher, of what matters
    most in them. Each block has its own MLP channels and heads, the same number of each group."""
    config, indices = teacher.config, {"layers": tuple(layers)}
    narrower = [axis for axis in WIDTHS if getattr(shape, axis) < getattr(config, axis)]
    if not narrower:
        return indices
    scores = jax.tree.map(sharding.to_host, importance(teacher, calibration, dtype))
    # From one process: the libraries of another machine may round otherwise.
    scores = {axis: np.asarray(broadcast_one_to_all(x))[list(layers)] for axis, x in scores.items()}

    def largest(x: np.ndarray, count: int) -> np.ndarray:
        return np.sort(np.argsort(-x, axis=-1, kind="stable")[..., :count], axis=-1)

    if "mlp" in narrower:
        indices["mlp"] = largest(scores["mlp"], shape.mlp)
    if "embed" in narrower:
        indices["embed"] = largest(scores["embed"].sum(0), shape.embed)
    if "heads" in narrower:
        groups = scores["heads"].reshape(len(layers), config.kv_heads, -1)
        kv_heads = largest(groups.sum(-1), shape.kv_heads)
        heads = largest(groups, shape.heads // shape.kv_heads)
        heads += groups.shape[-1] * np.arange(config.kv_heads)[:, None]
        heads = np.take_along_axis(heads, kv_heads[..., None], axis=1).reshape(len(layers), -1)
        indices |= {"kv_heads": kv_heads, "heads": heads}
    return indices


def cut(
    teacher: LanguageModel, indices: Mapping[str, Sequence[int] | np.ndarray],
    dtype: Any = jnp.float32,
) -> LanguageModel:  # fmt: skip
    """The teacher with only these indices of these axes, such as `{"layers": (0, 2, 5)}`; an array
    of them has a row for each block that stays. No buffer is shared with the teacher."""
    config = teacher.config.select(indices)
    abstract = eqx.filter_eval_shape(lambda: type(teacher)(config, jax.random.key(0)))
    places = [leaf.sharding for leaf in jax.tree.leaves(teacher)]
    if isinstance(places[0], NamedSharding):  # narrow axes may not divide where wide ones did
        places = jax.tree.leaves(sharding.specs(abstract, places[0].mesh))

    def part(path, leaf, axes, place):
        copy = jnp.copy(leaf) if indices.keys().isdisjoint(axes) else leaf
        for dimension, axis in enumerate(axes):
            index = np.asarray(indices.get(axis, ()))
            if index.ndim == 2:
                copy = jax.vmap(partial(jnp.take, axis=dimension - 1))(copy, index)
            elif axis in indices:
                copy = jnp.take(copy, index, axis=dimension)
        copy = copy.astype(dtype)
        if "embed" in indices and axes[-1] == "embed" and path[-1].name.endswith("norm"):
            # The mean square over fewer is larger by this squared if the others are near zero.
            copy *= (teacher.config.embed / config.embed) ** 0.5
        return jax.device_put(copy, place) if leaf.committed else copy

    places = jax.tree.unflatten(jax.tree.structure(teacher), places)
    copies = jax.tree_util.tree_map_with_path(part, teacher, sharding.axes(teacher), places)
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(copies))


def heal(
    teacher: LanguageModel,
    student: LanguageModel,
    layers: Sequence[int],
    calibration: Calibration,
    how: Heal,
    *,
    embed: Int[np.ndarray, " width"] | None = None,
    dtype: Any = None,
    progress: Callable[[int, int, str], None] = lambda done, total, figure: None,
) -> tuple[LanguageModel, float, float]:
    """Solves output and down projections of a student with these blocks of the teacher, so that the
    states behind each come close to the teacher's, of whose channels it has `embed`: of the blocks
    before and after what was removed (`seams`), or of all from the first of these (`all`); of all
    where widths were cut. One block after the other, each reads what the healed ones before it
    give. An eighth of the windows, at most PART tokens, tells the KL before and after; where it
    did not fall, the student is as it was."""
    rows, seq = calibration.tokens.shape
    shards = sharding.num_shards("batch")  # over which parts are to divide
    solved = rows - max(1, min(rows // 8, PART // seq))
    step = max(1, PART // seq // shards) * shards
    judge = Calibration(*(x[solved:] for x in calibration))
    starts = range(0, solved, step)
    parts = [Calibration(*(x[i : min(i + step, solved)] for x in calibration)) for i in starts]
    config, tokens = student.config, sum(int(np.sum(part.mask)) for part in parts)
    if tokens < (inputs := max(config.mlp, config.heads * config.head_dim)):
        need = f"solves for {inputs} inputs of a projection, and has {tokens} tokens to do so"
        raise UserError(f"--student-heal {how} {need}: give more text, or raise --heal-tokens")
    healed = student
    x, goal = ([first_states(m, part.tokens, dtype) for part in parts] for m in (student, teacher))
    narrower = any(getattr(config, x) < getattr(teacher.config, x) for x in WIDTHS)
    ends = [*layers[1:], teacher.config.layers]
    solves = [True] * len(layers) if narrower else blocks_to_heal(layers, teacher, how)
    for k, (first, layer, end) in enumerate(zip([0, *ends[:-1]], layers, ends, strict=True)):
        for block in range(first, end):
            states = map(partial(block_states, teacher, jnp.array(block)), goal, parts)
            after_attention, goal = map(list, zip(*states, strict=True))
            if block == layer:
                middle = after_attention
        for name, target in (("output", middle), ("down", goal)) if solves[k] else ():
            target = target if embed is None else [states[..., embed] for states in target]
            sums, behind = (), []
            for each in zip(x, target, parts, strict=True):
                *sides, inputs, states = normal_equations(healed, name, jnp.array(k), *each)
                sums = [y + z for y, z in zip(sums, sides, strict=True)] if sums else sides
                behind.append((states, inputs))
            healed, change = solve(healed, name, k, *sums)
        if solves[k]:  # `down` was the last
            x = [changed(*both, change) for both in behind]
        else:
            x = [
                block_states(healed, jnp.array(k), *both)[1] for both in zip(x, parts, strict=True)
            ]
        progress(k + 1, len(layers), "")
    before, after = (kl_between(teacher, model, judge, dtype) for model in (student, healed))
    return healed if after < before else student, before, after


def blocks_to_heal(layers: Sequence[int], teacher: LanguageModel, how: Heal) -> list[bool]:
    """Whether each block of the student is healed."""
    gaps = np.diff([-1, *layers, teacher.config.layers]) > 1  # before each, and behind the last
    seams = gaps[:-1] | gaps[1:]
    return (seams if how == "seams" else np.maximum.accumulate(seams)).tolist()


@sharding.jit
def first_states(model: LanguageModel, tokens: Int[Array, "batch seq"], dtype: Any) -> Hidden:
    """The input of the first block."""
    return model.embed_input(model.look_up(tokens, dtype))


@sharding.jit
def block_states(model: LanguageModel, layer: Int[Array, ""], x: Hidden, text: Calibration):
    """The states behind a block's attention, and behind the block."""
    with intermediates() as values:
        y = block_fn(model, text)(layer, x)
    return values["middle"], y


@sharding.jit
def normal_equations(
    model: LanguageModel, name: str, layer: Int[Array, ""], x: Hidden, target: Hidden,
    text: Calibration,
) -> tuple[Array, Array, Array, Hidden]:  # fmt: skip
    """Of the change of a projection that brings the states behind it to `target`: both sides, then
    its inputs and these states as they are. A token weighs 1 / |target|: a few have huge states,
    and alone would decide."""
    with intermediates() as values:
        values["whole"] = block_fn(model, text)(layer, x)
    states = values["middle" if name == "output" else "whole"]
    inputs = values[name].reshape(*x.shape[:2], -1)
    target = target.astype(jnp.float32)
    weight = jnp.where(text.mask, 1 / jnp.linalg.norm(target, axis=-1), 0)[..., None]
    product, left = partial(jnp.einsum, precision="highest"), weight * inputs.astype(jnp.float32)
    gram = product("bsi,bsj->ij", left, inputs.astype(jnp.float32))
    return gram, product("bsi,bse->ie", left, target - states), inputs, states


@sharding.jit
def changed(states: Hidden, inputs: Array, change: Float32[Array, "inputs embed"]) -> Hidden:
    """The states behind a projection that was changed."""
    return (states + einsum_f32("bsi,ie->bse", inputs, change)).astype(states.dtype)


def solve(
    student: LanguageModel, name: str, layer: int, *equations: Array
) -> tuple[LanguageModel, np.ndarray]:
    """The student with one projection of a block changed, by ridge regression in float64, and the
    change."""
    gram, moment = (np.float64(sharding.to_host(x)) for x in equations)
    squares = np.diag(gram)
    gram[np.diag_indices_from(gram)] += DAMPING * squares + 1e-6 * np.mean(squares)
    change = np.linalg.solve(gram, moment).astype(np.float32)
    # From one process: the libraries of another machine may round otherwise.
    change = np.asarray(broadcast_one_to_all(change))
    leaf = getattr(student.blocks, name)
    step = change.T.reshape(leaf.shape[1:]).astype(leaf.dtype)
    leaf = jax.device_put(leaf.at[layer].add(step), leaf.sharding)
    return eqx.tree_at(lambda model: getattr(model.blocks, name), student, leaf), change


def kl_between(teacher: LanguageModel, student: LanguageModel, text: Calibration, dtype: Any):
    """The KL at a sample of positions."""
    sample = sample_positions(text, teacher.config.vocab)
    log_p, log_q = (forward(model, text, sample, dtype)[1] for model in (teacher, student))
    return float(jnp.mean(jnp.sum(divergences.kl(log_p, log_q), 0)))


def fresh(family: Callable[..., LanguageModel], config: Any, key: PRNGKeyArray) -> LanguageModel:
    """Random weights in float32, made in their places on the mesh in scope, if any."""
    return eqx.filter_jit(lambda key: sharding.constrain_tree(family(config, key)))(key)


def resized(config: Any, layers: int, **widths: int) -> Any:
    """A teacher's config with another number of layers and other widths (embed, mlp, heads …)."""
    known = {field.name for field in dataclasses.fields(config)}
    for name in widths:
        if name not in known:
            flag = name.replace("_", "-")
            raise UserError(f"--student-{flag} means nothing to {config.model_type}")
    numbers = tuple(i % config.layers for i in range(layers))
    try:
        return dataclasses.replace(config.select({"layers": numbers}), **widths)
    except UserError as error:
        flags = "--student-embed, --student-heads or --student-kv-heads"
        raise UserError(f"{error}: change {flags}") from None


def growth(config: Any, layers: int | None, how: str) -> tuple[int, ...]:
    """The block of a shallower student that each of so many repeats: one by one, or as a stack."""
    depth = config.layers
    if layers is None or layers <= depth:
        raise UserError(f"--student-init {how} needs --student-layers above {depth}, --student's")
    if config.residual_after_norm:
        reason = "its blocks add to their normed input, which no copy could leave as it is"
        raise UserError(f"--student-init {how}: {reason}; leave the flag out")
    return tuple(i % depth if how == "grow-stack" else i * depth // layers for i in range(layers))


def grow(shallow: LanguageModel, layers: int, how: str) -> LanguageModel:
    """A model of so many blocks that computes what `shallow` does: what copies of a block add to
    the residual stream is zero."""
    order = growth(shallow.config, layers, how)
    deeper = cut(shallow, {"layers": order})
    copies = jnp.array([i for i, block in enumerate(order) if block in order[:i]])
    axes = vars(sharding.axes(deeper.blocks)).items()
    outputs = {name for name, names in axes if names and names[1] == "embed" and names[2:]}

    def silence(path, leaf):
        is_output = path[-1].name.removesuffix("_bias") in outputs
        return leaf.at[copies].set(0) if is_output else leaf

    blocks = jax.tree_util.tree_map_with_path(silence, deeper.blocks)
    return eqx.tree_at(lambda model: model.blocks, deeper, blocks)


def copy_leaves(
    student: LanguageModel, teacher: LanguageModel, patterns: Sequence[str]
) -> LanguageModel:
    """The student with copies of those leaves of its teacher that these patterns name."""
    named = sharding.match_leaves({"student": student}, patterns, "--student-copy")
    leaves, structure = jax.tree.flatten(student)
    for i, (name, leaf) in enumerate(zip(named, jax.tree.leaves(teacher), strict=True)):
        if named[name] and leaf.shape != leaves[i].shape:
            shapes = f"{name} is {leaves[i].shape}, the teacher's {leaf.shape}"
            raise UserError(f"--student-copy {' '.join(patterns)}: {shapes}: leave it out")
        leaves[i] = jnp.copy(leaf).astype(leaves[i].dtype) if named[name] else leaves[i]
    return jax.tree.unflatten(structure, leaves)
