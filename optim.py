"""From gradients to new parameters: the schedule, the optimizers, what decays and what is frozen.

Which leaves are matrices (they decay, Muon takes them, Adafactor factors them) is read from the
names of their axes, never from their rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

import mup
import sharding
from runtime.errors import Constraint, UserError, above, at_least, below, check

Axes = tuple[str, ...] | None
Mup = mup.Config  # a field hides the module it is named after


@dataclass(frozen=True)
class Config:
    name: Literal["adamw", "lion", "adafactor", "sgd", "muon"] = "adamw"
    """The update rule; muon takes the matrices of the blocks and leaves the rest to adamw."""
    lr: Annotated[float | None, above(0)] = None
    """Learning rate at the peak; by default 3e-4, of fresh weights 1e-3, of a student that is given
    whole 5e-5. Muon and adafactor are scaled so that values for adamw serve."""
    lr_end: Annotated[float, at_least(0)] = 0.0
    """Learning rate at the end of the run (linear, cosine, wsd), at most --optim.lr."""
    warmup: Annotated[int | None, at_least(0)] = None
    """Optimizer steps of linear warmup; by default a twentieth of the run."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warmup: constant, linear, cosine, or wsd (constant, then a linear fall)."""
    wsd_decay: Annotated[float, Constraint("above 0 and at most 1", lambda x: 0 < x <= 1)] = 0.2
    """Share of the run that wsd spends falling, at its end."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Decay of the matrices, decoupled from the gradient and multiplied by the learning rate."""
    clip: Annotated[float, at_least(0)] = 1.0
    """Greatest global norm of the gradient; 0 turns clipping off."""
    betas: Annotated[
        tuple[float, float] | None,
        Constraint("two numbers from 0 to below 1", lambda betas: all(0 <= x < 1 for x in betas)),
    ] = None
    """Decay rates of the moments; by default 0.9 0.95, lion 0.9 0.99."""
    eps: Annotated[float, above(0)] = 1e-8
    """Added to the root of adamw's second moment."""
    momentum: Annotated[float, below(0, 1)] = 0.95
    """Momentum of sgd and of muon."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Stored dtype of the first moment (momentum); second moments are always float32."""
    train: tuple[str, ...] = ("*",)
    """Leaves that are trained: patterns such as 'embedding' or 'blocks.*norm*'."""
    freeze: tuple[str, ...] = ()
    """Of these, the leaves that stay as they are: patterns too."""

    def __post_init__(self):
        check(self, "--optim.")
        if self.lr is not None and self.lr_end > self.lr:
            raise UserError(f"--optim.lr-end is {self.lr_end}: --optim.lr is only {self.lr}")
        if self.name == "adafactor" and self.moment_dtype != "float32":
            raise UserError("--optim.moment-dtype bfloat16: adafactor has no first moment")


def make(config: Config, steps: int, mup: Mup | None = None) -> "Optimizer":
    """The optimizer of a run of `steps` optimizer steps."""
    warmup = steps // 20 if config.warmup is None else config.warmup
    if warmup > steps:
        raise UserError(f"--optim.warmup is {warmup}: it must not exceed --steps ({steps})")
    config = replace(config, warmup=warmup, lr=config.lr or 3e-4)
    return Optimizer(config, steps, mup or Mup())


@dataclass(frozen=True)
class Optimizer:
    """An update rule and its schedule: no arrays, equal to any other built from the same config."""

    config: Config
    steps: int
    mup: Mup = Mup()

    def lr(self, step: Int[Array, ""] | int) -> Float32[Array, ""]:
        """The learning rate of the update that leads from `step` to `step + 1`."""
        config, peak, end = self.config, self.config.lr, self.config.lr_end
        left = max(self.steps - config.warmup, 1)
        fall = min(left, math.ceil(config.wsd_decay * self.steps))
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, end, left),
            "cosine": optax.cosine_decay_schedule(peak, left, end / peak),
            "wsd": optax.linear_schedule(peak, end, fall, left - fall),
        }[config.schedule]
        warmup = optax.linear_schedule(peak / max(config.warmup, 1), peak, config.warmup - 1)
        schedule = optax.join_schedules([warmup, after], [config.warmup])
        return jnp.asarray(schedule(jnp.asarray(step, jnp.float32)), jnp.float32)

    def trainable(self, params: PyTree) -> PyTree[bool]:
        """Which leaves are updated: the inexact arrays, real or abstract, that `train` names and
        `freeze` does not. A pattern may leave out the first part of a path: `embedding` is
        `student.embedding` too."""
        train = sharding.match_leaves(params, self.config.train, "--optim.train")
        freeze = sharding.match_leaves(params, self.config.freeze, "--optim.freeze")
        leaves, structure = jax.tree.flatten(params)
        trainable = [
            train[name] and not freeze[name] and jnp.issubdtype(leaf.dtype, jnp.inexact)
            for name, leaf in zip(train, leaves, strict=True)
        ]
        if not any(trainable):
            patterns = " ".join(self.config.freeze)
            raise UserError(f"--optim.freeze {patterns} leaves nothing to train")
        return jax.tree.unflatten(structure, trainable)

    def init(self, params: PyTree) -> PyTree:
        """The moments of every leaf that is not frozen. Call it on placed parameters outside of
        jit, or constrain the result by `sharding.specs`."""
        trainable = eqx.filter(params, self.trainable(params))
        return self._chain(1.0, 0, True, params).init(optax.tree.cast(trainable, jnp.float32))

    def update(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        step: Int[Array, ""],
        finite: Bool[Array, ""] | bool = True,
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """New parameters, new state, and `grad_norm` (before clipping), `lr` and `finite`. Where
        the norm is not finite, or `finite` is false, both stay as they are."""
        trainable, model = self.trainable(params), params
        params, frozen = eqx.partition(params, trainable)
        grads = optax.tree.cast(eqx.filter(grads, trainable), jnp.float32)
        squares = jax.tree.map(_square_sum, grads, sharding.axes(grads))
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        finite &= jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            master = optax.tree.cast(params, jnp.float32)
            updates, state = self._chain(norm, step, finite, model).update(grads, state, master)
            params = optax.tree.where(finite, optax.apply_updates(params, updates), params)
        metrics = {"grad_norm": norm, "lr": self.lr(step), "finite": finite}
        return eqx.combine(params, frozen), state, metrics

    def _chain(self, norm, step, finite, model) -> optax.GradientTransformation:
        """The update of a step whose gradient has this norm: the chain itself counts no steps."""
        clip, scaled = self.config.clip, []
        if self.mup.base_embed is not None:
            factors = mup.scales(self.mup, model, muon=self.config.name == "muon").lr
            factors = eqx.filter(factors, self.trainable(model))
            scaled = [optax.stateless(lambda grads, _: jax.tree.map(jnp.multiply, grads, factors))]
        return optax.chain(
            optax.scale(jnp.minimum(clip / norm, 1)) if clip else optax.identity(),
            _rule(self.config, finite),
            *scaled,  # before the decay, whose strength is that of every width
            optax.add_decayed_weights(self.config.weight_decay, _over_axes(is_matrix)),
            optax.scale_by_learning_rate(self.lr(step)),
        )


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
    return names is not None and "embed" in names and bool(_other_axes(names))


def _other_axes(names: tuple[str, ...]) -> tuple[int, ...]:
    # a number is a count of fused projections: a stack, as `layers` is
    return tuple(
        i for i, name in enumerate(names) if name not in ("embed", "layers") and not name.isdigit()
    )


def _over_axes(of: Callable[[Axes], Any]) -> Callable[[PyTree], PyTree]:
    """Maps the axes of every leaf: the masks, labels and dimensions that optax asks for."""
    return lambda tree: jax.tree.map(lambda _, names: of(names), tree, sharding.axes(tree))


def _rule(config: Config, finite: Bool[Array, ""] | bool) -> optax.GradientTransformation:
    """Gradients to directions of ascent of unit learning rate, without decay."""
    first, second = config.betas or ((0.9, 0.99) if config.name == "lion" else (0.9, 0.95))
    guard = partial(_guard, finite=finite, dtype=jnp.dtype(config.moment_dtype))

    def adam_direction(state):
        mu = optax.tree.bias_correction(state.mu, first, state.count)
        nu = optax.tree.bias_correction(state.nu, second, state.count)
        return jax.tree.map(lambda m, n: m / (jnp.sqrt(n) + config.eps), mu, nu)

    adam = guard(optax.scale_by_adam(first, second, config.eps), direction=adam_direction)
    match config.name:
        case "adamw":
            return adam
        case "lion":
            return guard(optax.scale_by_lion(first, second))
        case "sgd":
            return guard(optax.trace(config.momentum) if config.momentum else optax.identity())
        case "adafactor":
            return guard(_adafactor())
        case "muon":
            muon = optax.contrib.muon(
                None,  # of unit learning rate
                beta=config.momentum,
                muon_weight_dimension_numbers=_over_axes(_muon_dimensions),
                consistent_rms=0.2,  # about Adam's, so that one rate serves both (Liu et al. 2025)
            )
            labels = _over_axes(lambda names: "muon" if _muon_dimensions(names) else "adam")
            return optax.partition({"muon": guard(muon), "adam": adam}, labels)


def _guard(rule, finite, dtype, direction=None) -> optax.GradientTransformation:
    """`rule` with a state that changes only where `finite`, and its first moment in `dtype`,
    computed in float32: optax's own `mu_dtype` multiplies it by its decay rate in bfloat16, where
    0.99 is 0.988. A `direction` is taken from the new state, behind a barrier: left to itself XLA
    computes it from the old moments, which it must copy for that."""

    def cast(state, dtype):
        def leaf(path, x):
            is_first = any(getattr(key, "name", None) in ("mu", "trace") for key in path)
            return x.astype(dtype) if is_first else x

        return jax.tree_util.tree_map_with_path(leaf, state)

    def update(grads, state, params=None):
        updates, new = rule.update(grads, cast(state, jnp.float32), params)
        state = optax.tree.where(finite, cast(new, dtype), state)
        if direction is not None:
            state = jax.lax.optimization_barrier(state)
            updates = direction(cast(state, jnp.float32))
        return updates, state

    return optax.GradientTransformation(lambda params: cast(rule.init(params), dtype), update)


def _muon_dimensions(names: Axes) -> optax.contrib.MuonDimensionNumbers | None:
    """`embed` against all else, apart for each layer and projection; none outside of the blocks."""
    if not is_matrix(names) or "layers" not in names:
        return None
    embed, others = names.index("embed"), _other_axes(names)
    ins, outs = (others, (embed,)) if embed < others[0] else ((embed,), others)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=ins, output_axis=outs)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor at an absolute learning rate, factored and clipped matrix by matrix. Its rows and
    columns lie in lists, so that nobody reads the axes of a parameter into them: they are small and
    stay whole on every device."""

    def clip(update, _):
        rms = jnp.sqrt(jnp.mean(update**2, axis=(1, 2), keepdims=True))
        return update / jnp.maximum(rms, 1)

    rule = optax.chain(optax.scale_by_factored_rms(), optax.stateless_with_tree_map(clip))

    def update(grads, state, params=None):
        leaves, structure = jax.tree.flatten(grads)
        matrices = _matrices(grads)
        updates, state = rule.update(matrices, state, matrices)
        updates = [x.reshape(leaf.shape) for x, leaf in zip(updates, leaves, strict=True)]
        return jax.tree.unflatten(structure, updates), state

    return optax.GradientTransformation(lambda params: rule.init(_matrices(params)), update)


def _matrices(tree: PyTree) -> list[Float[Array, "stack out in"]]:
    def matrix(leaf, names):
        stack = len(leaf) if names is not None and "layers" in names else 1
        if not is_matrix(names):
            return leaf.reshape(stack, -1, 1)
        if names[-1] == "embed":
            return leaf.reshape(stack, -1, leaf.shape[-1])
        return leaf.reshape(stack, leaf.shape[names.index("embed")], -1)

    return jax.tree.leaves(jax.tree.map(matrix, tree, sharding.axes(tree)))
