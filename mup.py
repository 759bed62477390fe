"""The maximal-update parametrisation (µP): a learning rate that is best at one width stays best.

After Yang et al. 2022 (Tensor Programs V, tables 3 and 8). Nothing in the forward pass knows of it.
A multiplier of c is folded into its leaf, which begins c times as large and is moved c times as
fast: under Adam, Lion and Muon, whose updates have a size of their own, that computes the same.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

import sharding
from models.base import STD, LanguageModel
from runtime.errors import above, at_least, check


@dataclass(frozen=True)
class Config:
    base_embed: Annotated[int | None, at_least(1)] = None
    """Turns µP on: the width at which --optim.lr was tuned. Fresh weights and their learning rates
    are scaled so that it is right at --student-embed too; MLP and heads are taken to grow along.
    Weight decay stays --optim.lr times --optim.weight-decay at every width."""
    qk_scale: Annotated[float, above(0)] = 8.0
    """Attention multiplies scores by this / head_dim; 8 is as usual at a head_dim of 64."""
    zero_init: bool = False
    """Start queries (unless they are normalised) and the projections into the stream at zero."""

    def __post_init__(self):
        check(self, "--mup.")

    def describe(self, embed: int) -> str:
        return f"m = {embed / self.base_embed:g} over width {self.base_embed}"


class Scale(NamedTuple):
    """Factors of a leaf, or of every leaf of a tree."""

    init: PyTree  # of its fresh values: normal of deviation STD, or one, or zero
    lr: PyTree  # of its learning rate


def scale(
    config: Config, names: tuple[str, ...], shape: tuple[int, ...], *, behind: bool = False,
    tied: bool = False, normalised: bool = False, muon: bool = False,
) -> Scale:  # fmt: skip
    """What the axes of a leaf say. It may stand `behind` the blocks of a model, whose embedding may
    be `tied` to the head, and whose queries and keys may be `normalised`."""
    base, size = config.base_embed, dict(zip(names, shape, strict=True))
    m, stacked = size.get("embed", base) / base, "layers" in names
    names, shape, readout = names[stacked:], shape[stacked:], base**-0.5 / m
    if "vocab" in names:
        return Scale(readout / STD, 1 / m) if behind else Scale(1 / STD, 1.0)
    if behind:  # the final norm, which carries the multiplier of a head that is the embedding
        return Scale(readout, readout) if tied else Scale(1.0, 1.0)
    init = lr = 1.0
    if "embed" in names and len(names) > 1:
        adds = names[0] == "embed"  # to the residual stream, which all others read
        fan_in = math.prod(shape[1:]) if adds else shape[-1]
        init = 0.0 if adds and config.zero_init else fan_in**-0.5 / STD
        # What must not grow is the spectral norm of an update (Yang, Simon and Bernstein 2023). Of
        # two with entries of one size, Adam's has few directions, and its norm grows as m; Muon's
        # has all of them, orthogonal, and its norm grows as the root of m.
        lr = m**-0.5 if muon and stacked else 1 / m
    # Models multiply scores by head_dim^-1/2. The rest goes into the queries, or its root into the
    # gains of both norms, where norms would take it out of these.
    sharpness = config.qk_scale * size.get("head_dim", 1) ** -0.5
    if names == ("head_dim",):
        return Scale(sharpness**0.5, sharpness**0.5)
    if names[0] == "heads" and not normalised:
        # Ones for queries, zeros for the keys and values that may be fused with them.
        query = np.zeros([size[name] if name.isdigit() else 1 for name in names], np.float32)
        query.flat[0] = 1
        init *= 1 - query if config.zero_init else sharpness**query
        lr *= sharpness**query
    return Scale(init, lr)


def scales(config: Config, tree: PyTree, muon: bool = False) -> Scale:
    """Those of every leaf of a model, or of a tree that has one. Fields stand in the order in which
    a token meets them, so that the final norm and the head are what is behind the blocks."""
    leaves, structure = jax.tree.flatten(tree)
    axes = structure.flatten_up_to(sharding.axes(tree))
    stacked = ["layers" in names for names in axes]
    behind = [any(stacked[:i]) and not stacked[i] for i in range(len(axes))]
    tied = not any(late and "vocab" in names for late, names in zip(behind, axes, strict=True))
    facts = {"tied": tied, "normalised": ("layers", "head_dim") in axes, "muon": muon}
    entries = [
        scale(config, names, leaf.shape, behind=late, **facts)
        for names, leaf, late in zip(axes, leaves, behind, strict=True)
    ]
    return Scale(*(jax.tree.unflatten(structure, part) for part in zip(*entries, strict=True)))


def initial(config: Config, model: LanguageModel) -> LanguageModel:
    """A model that is fresh from its family, with the values that its axes say."""
    if config.base_embed is None:
        return model
    return jax.tree.map(lambda x, y: x * np.asarray(y, x.dtype), model, scales(config, model).init)
