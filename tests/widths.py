"""How the values of fresh students, and what a few steps change of them, grow with their width."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import data
import distill
import losses
import models
import mup
import optim
from models.bloom import Bloom
from models.llama import Llama

WIDTHS = (64, 192, 512)
VOCAB = 96
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 17)).astype(np.int32)
# A batch has fewer tokens than the narrowest student has channels. With more of them, what the one
# token's update does to another is a sum of random terms that is lost only at larger widths.
READ = jnp.asarray(TOKENS[:, :-1])
BATCH = data.Batch(TOKENS, np.ones_like(TOKENS), np.ones((2, 16), bool))


@eqx.filter_jit
def drawn(shape, scaling, key):
    return mup.initial(scaling, models.FAMILIES[shape.model_type](shape, key))


def fresh(shape, scaling, seed=0):
    """A student of this shape; one program for all seeds."""
    return drawn(shape, scaling, jax.random.key(seed))


def shape_of(family: str, width: int, tied: bool):
    heads = width // 16
    if family == "bloom":
        return Bloom.Config(VOCAB, width, 2, heads, tied=tied)
    return Llama.Config(VOCAB, width, 2 * width, 2, heads, heads, 16, tied=tied)


@eqx.filter_jit
def coordinates(before, after, target) -> dict[str, jax.Array]:
    """Sizes of a model's values and of their changes: of the states behind every block, of what the
    block added to them, and of the logits what training is after, `target` over the mean."""

    def states(model):
        first = model.embed_input(model.look_up(READ))
        _, taps = model.hidden(READ, taps=(0, 1))
        return jnp.concatenate([first[None], taps]), model(READ)

    def rms(x):
        return jnp.sqrt(jnp.mean(x**2, axis=(1, 2, 3)))

    (x, z), (y, new) = states(before), states(after)
    added, now = jnp.diff(x, axis=0), jnp.diff(y, axis=0)
    sizes = {"states": y, "change": y - x, "added": now, "change of added": now - added}
    learned = jnp.mean(jnp.sum((target - 1 / VOCAB) * (new - z), axis=-1))
    initial = jnp.sqrt(jnp.mean(z**2))
    return {name: rms(x) for name, x in sizes.items()} | {"learned": learned, "logits": initial}


def slopes(
    family: str, tied: bool, scaling: mup.Config, teacher=None, lr=4e-3,
    widths=WIDTHS, at=(1, 3, 10), seeds=3,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The power of width with which each size grows, after so many steps on one batch (the first
    axis); a mean over fresh students."""
    target = jax.nn.one_hot(TOKENS[:, 1:], VOCAB)
    if teacher is not None:
        target = jax.nn.softmax(teacher(READ))
    # Adam's eps is small enough; decay and clipping are left out, as they are of no width.
    config = optim.Config(lr=lr, warmup=0, schedule="constant", weight_decay=0.0, clip=0.0)
    optimizer = optim.make(config, 100, scaling)
    objective = losses.Objective(losses.Config(alpha=0.0 if teacher is None else 1.0), 100)
    step, sizes = eqx.filter_jit(distill.step), []  # one that consumes nothing
    for width in widths:
        sizes.append([])
        start = distill.init_state(fresh(shape_of(family, width, tied), scaling), optimizer)
        for seed in range(seeds):
            model = fresh(shape_of(family, width, tied), scaling, seed)
            state = eqx.tree_at(lambda state: state.learner.student, start, model)
            for number in range(1, max(at) + 1):
                state, _ = step((teacher, BATCH), state, optimizer, objective)
                if number in at:
                    sizes[-1].append(jax.device_get(coordinates(model, state.student, target)))
    exponents = {}
    for name in sizes[0][0]:
        logs = np.log([np.array([x[name] for x in entries]) for entries in sizes])
        logs = logs.reshape(len(widths), seeds, len(at), -1).mean(1)
        fit = np.polyfit(np.log(widths), logs.reshape(len(widths), -1), 1)
        exponents[name] = fit[0].reshape(logs.shape[1:])
    return exponents


def check(family: str, tied: bool, teacher=None, **how) -> None:
    """In µP nothing grows with width, and without it what training changes does. A head of random
    rows is lost among wider states: the logits of a fresh model are smaller in µP."""
    for name, slope in slopes(family, tied, mup.Config(16), teacher, **how).items():
        print(family, tied, name, slope.round(3).tolist())
        if name != "logits":
            assert np.abs(slope).max() < 0.05, (family, tied, name, slope)
        elif not tied:
            assert np.abs(slope + 0.5).max() < 0.05, (family, slope)
    if teacher is not None:
        return
    how |= {"seeds": 1, "at": (3,), "widths": (64, 512)}
    standard = slopes(family, tied, mup.Config(), teacher, **how)
    print({name: slope.round(2).tolist() for name, slope in standard.items()})
    for name in ("change", "change of added", "learned"):
        assert standard[name][0, -1] > 0.5, (family, tied, name, standard[name])
