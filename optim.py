"""From gradients to new parameters: the schedule, the optimizers, what decays and what is frozen.

Which leaves are matrices (they decay, Muon takes them, Adafactor factors them) is read from the
names of their axes, never from their rank.
"""

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

import sharding
from runtime.errors import UserError, above, check

Name = Literal["adamw", "lion", "adafactor", "sgd", "muon"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]
MomentDtype = Literal["float32", "bfloat16"]
Axes = tuple[str, ...] | None


@dataclass(frozen=True)
class Config:
    name: Name = "adamw"
    """The update rule; muon takes the matrices of the blocks and leaves the rest to adamw."""
    lr: Annotated[float, above(0)] = 3e-4
    """Learning rate at the peak; muon and adafactor are scaled so that values for adamw serve."""
    lr_end: float = 0.0
    """Learning rate at the end of the run (linear, cosine, wsd)."""
    warmup: int | None = None
    """Optimizer steps of linear warmup; by default a twentieth of the run."""
    schedule: Schedule = "cosine"
    """After the warmup: constant, linear, cosine, or wsd (constant, then a linear fall)."""
    wsd_decay: float = 0.2
    """Share of the run that wsd spends falling, at its end."""
    weight_decay: float = 0.01
    """Decay of the matrices, decoupled from the gradient and multiplied by the learning rate."""
    clip: float = 1.0
    """Greatest global norm of the gradient; 0 turns clipping off."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments; by default 0.9 0.95, lion 0.9 0.99."""
    eps: float = 1e-8
    """Added to the root of adamw's second moment."""
    momentum: float = 0.95
    """Momentum of sgd and of muon."""
    moment_dtype: MomentDtype = "float32"
    """Stored dtype of the first moment (momentum); second moments are always float32."""
    freeze: tuple[str, ...] = ()
    """Leaves that stay as they are: patterns such as 'embedding' or 'blocks.*norm*'."""

    def __post_init__(self):
        check(self, "--optim.")
        demands = (
            ("name", self.name in get_args(Name), f"one of {', '.join(get_args(Name))}"),
            ("lr", 0 < self.lr < math.inf, "positive"),
            ("lr-end", 0 <= self.lr_end <= self.lr, "between 0 and --optim.lr"),
            ("warmup", self.warmup is None or self.warmup >= 0, "0 or more steps"),
            (
                "schedule",
                self.schedule in get_args(Schedule),
                f"one of {', '.join(get_args(Schedule))}",
            ),
            ("wsd-decay", 0 < self.wsd_decay <= 1, "a share of the run, above 0 and at most 1"),
            ("weight-decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip", 0 <= self.clip < math.inf, "0 (off) or positive"),
            (
                "betas",
                self.betas is None or all(0 <= beta < 1 for beta in self.betas),
                "two numbers from 0 to below 1",
            ),
            ("eps", 0 < self.eps < math.inf, "positive"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            (
                "moment-dtype",
                self.moment_dtype in get_args(MomentDtype)
                and (self.moment_dtype == "float32" or self.name != "adafactor"),
                "float32, or bfloat16 where there is a first moment (adafactor keeps none)",
            ),
        )
        for flag, holds, wanted in demands:
            if not holds:
                found = getattr(self, flag.replace("-", "_"))
                raise UserError(f"--optim.{flag} is {found}: it must be {wanted}")


def make(config: Config, steps: int) -> "Optimizer":
    """The optimizer of a run of `steps` optimizer steps."""
    if steps < 1:
        raise UserError(f"--steps is {steps}: it must be positive")
    warmup = steps // 20 if config.warmup is None else config.warmup
    if warmup > steps:
        raise UserError(f"--optim.warmup is {warmup}: it must not exceed --steps ({steps})")
    return Optimizer(replace(config, warmup=warmup), steps)


@dataclass(frozen=True)
class Optimizer:
    """An update rule and its schedule: no arrays, equal to any other built from the same config."""

    config: Config
    steps: int

    def lr(self, step: Int[Array, ""] | int) -> Float32[Array, ""]:
        """The learning rate of the update that leads from `step` to `step + 1`."""
        config, step = self.config, jnp.asarray(step, jnp.float32)
        start = config.warmup
        if config.schedule == "wsd":
            start = max(start, self.steps - math.ceil(config.wsd_decay * self.steps))
        progress = jnp.clip((step - start) / max(self.steps - start, 1), 0, 1)
        match config.schedule:
            case "constant":
                left = jnp.ones_like(progress)
            case "cosine":
                left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case _:
                left = 1 - progress
        warm = jnp.minimum((step + 1) / max(config.warmup, 1), 1)
        return warm * (config.lr_end + (config.lr - config.lr_end) * left)

    def trainable(self, params: PyTree) -> PyTree[bool]:
        """Which leaves are updated: the inexact arrays, real or abstract, that `freeze` spares."""
        named, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
        arrays = [
            hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in named
        ]
        for pattern in self.config.freeze:
            if not any(fnmatchcase(path, pattern) for path in paths):
                known = ", ".join(path for path, array in zip(paths, arrays, strict=True) if array)
                raise UserError(f"--optim.freeze {pattern} names no parameter; there are {known}")
        moving = [
            array and not any(fnmatchcase(path, pattern) for pattern in self.config.freeze)
            for path, array in zip(paths, arrays, strict=True)
        ]
        if not any(moving):
            raise UserError(
                f"--optim.freeze {' '.join(self.config.freeze)} leaves nothing to train"
            )
        return jax.tree.unflatten(structure, moving)

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step: moments for every leaf that is not frozen.

        Call it on placed parameters outside of jit, or constrain the result by `sharding.specs`.
        """
        moving = eqx.filter(params, self.trainable(params))
        return _direction(self.config).init(optax.tree.cast(moving, jnp.float32))

    def update(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        step: Int[Array, ""],
        sound: Bool[Array, ""] | bool = True,
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """New parameters, new state, and `grad_norm` (before clipping), `lr` and `finite`.

        Where the norm is not finite, or the gradient is not `sound`, both stay as they are.
        """
        config, trainable = self.config, self.trainable(params)
        grads = optax.tree.cast(eqx.filter(grads, trainable), jnp.float32)
        moving, frozen = eqx.partition(params, trainable)
        squares = jax.tree.map(_square_sum, grads, sharding.axes(grads))
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        finite = sound & jnp.isfinite(norm)
        scale = jnp.minimum(config.clip / norm, 1) if config.clip else jnp.ones_like(norm)
        # optax mixes integers and floats
        with jax.numpy_dtype_promotion("standard"):
            rule = optax.with_extra_args_support(_direction(config))
            directions, state = rule.update(grads, state, grads, scale=scale, finite=finite)
        lr = self.lr(step)

        def moved(
            param: Float[Array, "..."], direction: Float32[Array, "..."], names: Axes
        ) -> Float[Array, "..."]:
            master = param.astype(jnp.float32)
            if is_matrix(names):
                direction = direction + config.weight_decay * master
            moved = (master - lr * direction).astype(param.dtype)
            return jnp.where(finite, moved, param)

        moving = jax.tree.map(moved, moving, directions, sharding.axes(moving))
        return eqx.combine(moving, frozen), state, {"grad_norm": norm, "lr": lr, "finite": finite}


SLABS = 64


def _square_sum(grad: Float32[Array, "..."], names: Axes) -> Float32[Array, ""]:
    """A slab at a time: XLA on CPU writes out all squares that it is to add."""
    stacked = names is not None and names[0] == "layers"
    if not stacked and (names is None or sharding.num_shards(names[0]) > 1 or len(grad) % SLABS):
        return jnp.sum(grad**2)
    slabs = grad if stacked else grad.reshape(SLABS, -1)
    return jnp.sum(jax.lax.map(lambda slab: jnp.sum(slab**2), slabs))


def is_matrix(names: Axes) -> bool:
    """Whether an array with these axes is a matrix, or a stack of them."""
    return names is not None and "embed" in names and bool(_beside_embed(names))


def _beside_embed(names: tuple[str, ...]) -> tuple[int, ...]:
    # a number is a count of fused projections: a stack, as `layers` is
    return tuple(
        i for i, name in enumerate(names) if name not in ("embed", "layers") and not name.isdigit()
    )


def _direction(config: Config) -> optax.GradientTransformation:
    """Gradients to directions of ascent of unit learning rate, without decay."""
    first, second = config.betas or ((0.9, 0.99) if config.name == "lion" else (0.9, 0.95))

    adam = _adam(first, second, config.eps, jnp.dtype(config.moment_dtype))

    def stored(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return _first_moment_in(jnp.dtype(config.moment_dtype), rule)

    match config.name:
        case "adamw":
            return adam
        case "lion":
            return stored(_guarded(optax.scale_by_lion(first, second)))
        case "sgd" if config.momentum == 0:
            return _guarded(optax.identity())
        case "sgd":
            return stored(_guarded(optax.trace(config.momentum)))
        case "adafactor":
            return _guarded(_adafactor())
    muon = optax.contrib.scale_by_muon(
        beta=config.momentum, weight_dimension_numbers=_muon_dimensions
    )
    matrices = optax.chain(stored(_guarded(muon)), optax.stateless(_as_long_as_adam))
    rules = {"muon": matrices, "adam": adam}

    def labels(params):
        def label(_, names: Axes) -> str:  # embedding and head lie outside of the blocks
            return "muon" if is_matrix(names) and "layers" in names else "adam"

        return jax.tree.map(label, params, sharding.axes(params))

    return optax.partition(rules, labels)


def _guarded(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` for gradients times `scale`; it keeps its state where these are not finite."""

    def update(grads, state, params=None, *, scale, finite, **_):
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        directions, following = rule.update(grads, state, params)
        keep = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
        return directions, keep

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _adam(
    first: float, second: float, eps: float, dtype: jnp.dtype
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, each of whose arrays is complete before the next is taken from it.

    So all are updated where they lie. Left to itself XLA computes directions from the old moments,
    which, donated as they are, it must copy for that, and keeps the clipped gradients too.
    """

    def update(grads, state, params=None, *, scale, finite, **_):
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        shares = 1 - first**count, 1 - second**count  # of a moment that began at 0

        def moment(decay, old, seen):
            new = (1 - decay) * seen + decay * old.astype(jnp.float32)
            return jnp.where(finite, new, old.astype(jnp.float32)).astype(old.dtype)

        def moments(grad, mu, nu):
            nu, grad = jax.lax.optimization_barrier((moment(second, nu, (grad * scale) ** 2), grad))
            return jax.lax.optimization_barrier((moment(first, mu, grad * scale), nu))

        def direction(mu, nu):
            return mu.astype(jnp.float32) / shares[0] / (jnp.sqrt(nu / shares[1]) + eps)

        both = jax.tree.map(moments, grads, state.mu, state.nu)
        mu, nu = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0)), both)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    init = _first_moment_in(dtype, optax.scale_by_adam(first, second, eps)).init
    return optax.GradientTransformationExtraArgs(init, update)


def _muon_dimensions(params: PyTree) -> PyTree:
    """The matrix of every leaf: `embed` against all else, apart for each layer and projection."""

    def dimensions(_, names: Axes) -> optax.contrib.MuonDimensionNumbers:
        embed, others = names.index("embed"), _beside_embed(names)
        ins, outs = (others, (embed,)) if embed < others[0] else ((embed,), others)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=ins, output_axis=outs)

    return jax.tree.map(dimensions, params, sharding.axes(params))


def _as_long_as_adam(updates: PyTree, _) -> PyTree:
    """Orthogonal matrices at Adam's root mean square, so that one learning rate serves both.

    An orthogonal [out, in] has 1 / sqrt(max(out, in)); Adam has about 0.2 (Liu et al. 2025).
    """

    def scaled(update: Array, dims: optax.contrib.MuonDimensionNumbers) -> Array:
        sides = (dims.reduction_axis, dims.output_axis)
        longer = max(math.prod(update.shape[axis] for axis in side) for side in sides)
        return 0.2 * longer**0.5 * update

    return jax.tree.map(scaled, updates, _muon_dimensions(updates))


def _first_moment_in(
    dtype: jnp.dtype, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`rule` with its first moment stored in `dtype`, and still computed in float32.

    optax's own `mu_dtype` multiplies the moment by its decay rate in bfloat16, where 0.99 is 0.988.
    """

    def cast(state, dtype):
        moment = "trace" if isinstance(state, optax.TraceState) else "mu"
        return state._replace(**{moment: optax.tree.cast(getattr(state, moment), dtype)})

    def init(params):
        return cast(rule.init(params), dtype)

    def update(grads, state, params=None, **more):
        directions, state = rule.update(grads, cast(state, jnp.float32), params, **more)
        return directions, cast(state, dtype)

    rule = optax.with_extra_args_support(rule)
    return optax.GradientTransformationExtraArgs(init, update)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor at an absolute learning rate, factored and clipped matrix by matrix.

    Its rows and columns have other shapes than the parameters. They lie in lists, so that nobody
    reads the axes of a parameter into them: they are small and stay whole on every device.
    """
    factored = optax.scale_by_factored_rms()

    def matrices(tree):
        return jax.tree.leaves(jax.tree.map(_as_matrices, tree, sharding.axes(tree)))

    def clipped(update: Float32[Array, "stack out in"]) -> Float32[Array, "stack out in"]:
        rms = jnp.sqrt(jnp.mean(update**2, axis=(1, 2), keepdims=True))
        return update / jnp.maximum(rms, 1)

    def init(params):
        return factored.init(matrices(params))

    def update(grads, state, params=None):
        seen = matrices(grads)
        updates, state = factored.update(seen, state, seen)
        leaves, structure = jax.tree.flatten(grads)
        updates = [
            clipped(update).reshape(leaf.shape)
            for update, leaf in zip(updates, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, updates), state

    return optax.GradientTransformation(init, update)


def _as_matrices(leaf: Float[Array, "..."], names: Axes) -> Float[Array, "stack out in"]:
    stack = leaf.shape[0] if names is not None and "layers" in names else 1
    if not is_matrix(names):
        return leaf.reshape(stack, -1, 1)
    if names[-1] == "embed":
        return leaf.reshape(stack, -1, leaf.shape[-1])
    return leaf.reshape(stack, leaf.shape[names.index("embed")], -1)
