"""µP: what it says of every leaf, what an update does with that, and what a run says of it. The
sweeps over widths are in tests/slow."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import widths
from test_distill import config_of, one_device, teacher, text  # noqa: F401

import distill
import losses
import models
import mup
import optim
import sharding
import student as students
from losses import features
from models.bloom import Bloom
from models.llama import Llama
from runtime import errors
from runtime.errors import UserError

LLAMA = Llama.Config(96, 64, 128, 2, heads=4, kv_heads=2, head_dim=16)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, tied=True, model_type="qwen3")
BIASED = dataclasses.replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True)
BLOOM = Bloom.Config(96, 64, 2, heads=4)
SHAPES = {
    "llama": LLAMA, "llama tied": dataclasses.replace(LLAMA, tied=True), "qwen3": QWEN3,
    "llama biased": BIASED, "bloom": BLOOM, "bloom untied": dataclasses.replace(BLOOM, tied=False),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", SHAPES)
BASE = 16  # of these: m is 4
SCALING = mup.Config(BASE)


def fresh(shape, scaling=SCALING):
    return widths.fresh(shape, scaling)


def leaves(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# ---- the table ----


def published(shape, base: int, scale: float = 8.0) -> dict[str, tuple]:
    """Standard deviation (or gain) and learning rate of every leaf by its name, for Adam: tables 3
    and 8 of Yang et al. 2022, with constants that are usual at the base width."""
    embed, mlp, mixed = shape.embed, shape.mlp, shape.heads * shape.head_dim
    m, hidden = embed / base, (embed**-0.5, base / embed)
    attention = scale / shape.head_dim / shape.head_dim**-0.5
    normalised = getattr(shape, "qk_norm", False)
    query = hidden if normalised else (attention * hidden[0], attention * hidden[1])
    readout = base**-0.5 / m
    table = {
        "embedding": (1.0, 1.0), "blocks.key": hidden, "blocks.value": hidden,
        "blocks.output": (mixed**-0.5, 1 / m), "blocks.up": hidden, "blocks.gate": hidden,
        "blocks.down": (mlp**-0.5, 1 / m), "blocks.query": query,
        "blocks.qkv": [query, hidden, hidden],
        "blocks.query_norm": (attention**0.5,) * 2, "blocks.key_norm": (attention**0.5,) * 2,
        "norm": (readout, readout) if shape.tied else (1.0, 1.0),
        "norm_bias": (0.0, readout) if shape.tied else (0.0, 1.0), "head": (readout, 1 / m),
        "blocks.query_bias": (0.0, attention),
        "blocks.qkv_bias": [(0.0, attention), (0.0, 1.0), (0.0, 1.0)],
    }  # fmt: skip
    gains = ("embedding_norm", "blocks.attention_norm", "blocks.mlp_norm")
    biases = (
        "embedding_norm_bias", "blocks.attention_norm_bias", "blocks.mlp_norm_bias",
        "blocks.key_bias", "blocks.value_bias", "blocks.output_bias", "blocks.up_bias",
        "blocks.gate_bias", "blocks.down_bias",
    )  # fmt: skip
    return table | dict.fromkeys(gains, (1.0, 1.0)) | dict.fromkeys(biases, (0.0, 1.0))


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@EVERY
@pytest.mark.parametrize("scale", [8.0, 3.0])
def test_initial_values_and_rates_of_every_leaf_are_those_published(name, scale):
    shape, scaling = SHAPES[name], mup.Config(BASE, qk_scale=scale)
    model, table = fresh(shape, scaling), published(shape, BASE, scale)
    rates = leaves(mup.scales(scaling, model).lr)
    for leaf, x in leaves(model).items():
        parts = table[leaf]
        if isinstance(parts, tuple):
            parts, x, rate = [parts], x[None], rates[leaf][None]
        else:  # fused: [layers, heads, 3, …]
            x, rate = np.moveaxis(x, 2, 0), np.broadcast_to(rates[leaf], x.shape[1:])
            rate = np.moveaxis(rate, 1, 0)
        for (std, lr), part, factor in zip(parts, x, rate, strict=True):
            np.testing.assert_allclose(factor, lr, rtol=1e-6, err_msg=leaf)
            drawn = std and not leaf.endswith("norm")
            error = 5 * (2 * part.size) ** -0.5 if drawn else 1e-6
            assert rms(part) == pytest.approx(std, rel=error), leaf
            assert not drawn or abs(part.mean()) < 5 * std * part.size**-0.5


@pytest.mark.parametrize("name", ["llama tied", "bloom"])
def test_on_a_mesh_they_are_the_same(name):
    with sharding.use_mesh(sharding.make_mesh(2, 2, 2)):
        split = fresh(SHAPES[name])
    assert len(split.blocks.up.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, split, fresh(SHAPES[name]))


def test_at_the_base_width_and_the_usual_head_dim_every_rate_is_that_of_adam():
    shape = dataclasses.replace(LLAMA, embed=64, heads=1, kv_heads=1, head_dim=64)
    rates = leaves(mup.scales(mup.Config(64), fresh(shape, mup.Config(64))).lr)
    assert all((rate == 1).all() for rate in rates.values())


@EVERY
def test_zero_init_starts_queries_and_what_is_added_to_the_stream_at_zero(name):
    plain, zero = (
        leaves(fresh(SHAPES[name], mup.Config(BASE, zero_init=x))) for x in (False, True)
    )
    zeros = {"blocks.output", "blocks.down"} | ({"blocks.query"} if name != "qwen3" else set())
    for leaf, x in plain.items():
        expected = np.zeros_like(x) if leaf in zeros else x.copy()
        if leaf == "blocks.qkv":
            expected[:, :, 0] = 0
        np.testing.assert_array_equal(zero[leaf], expected, err_msg=leaf)


def test_scores_are_multiplied_by_qk_scale_over_head_dim():
    """A model whose queries are as others' and whose attention is told so computes the same."""
    model = fresh(LLAMA, mup.Config(BASE, qk_scale=5.0))
    usual = fresh(LLAMA, mup.Config(BASE, qk_scale=LLAMA.head_dim**0.5))
    ratio = (5.0 / LLAMA.head_dim) / LLAMA.head_dim**-0.5
    np.testing.assert_allclose(model.blocks.query, ratio * usual.blocks.query, rtol=1e-6)
    normalised = fresh(QWEN3, mup.Config(BASE, qk_scale=5.0)).blocks
    np.testing.assert_allclose(normalised.query_norm * normalised.key_norm, ratio, rtol=1e-6)


# ---- what moves ----


move = eqx.filter_jit(lambda optimizer, *args: optimizer.update(*args))


def update(optimizer, params, steps=2):
    """Updates by random gradients."""
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for step in range(steps):
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
        params, state, _ = move(optimizer, grads, state, params, jnp.array(step, jnp.int32))
    return params, state


PLAIN = {"warmup": 0, "schedule": "constant", "clip": 0.0, "lr": 1e-2}


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "bloom", "bloom untied"])
def test_an_update_is_that_of_the_rule_times_the_factor(name, rule):
    model = fresh(SHAPES[name])
    config = optim.Config(rule, weight_decay=0.0, **PLAIN)
    usual = leaves(update(optim.make(config, 10), model)[0])
    scaled = leaves(update(optim.make(config, 10, SCALING), model)[0])
    table, m = published(SHAPES[name], BASE), SHAPES[name].embed / BASE
    for leaf, x in leaves(model).items():
        if isinstance(table[leaf], tuple):
            factor = table[leaf][1]
        else:
            rates = np.array([lr for _, lr in table[leaf]])
            factor = rates.reshape(3, *[1] * (x.ndim - 3))
        if rule == "muon" and leaf.startswith("blocks.") and not leaf.endswith(("norm", "bias")):
            factor = factor * m**0.5  # its update grows as the root of m, not as m
        np.testing.assert_allclose(
            scaled[leaf] - x, factor * (usual[leaf] - x), atol=1e-6, err_msg=leaf
        )


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_decay_is_the_learning_rate_times_its_strength_at_every_width(rule):
    model = fresh(LLAMA)
    configs = (optim.Config(rule, weight_decay=strength, **PLAIN) for strength in (0.0, 0.5))
    free, decayed = (leaves(update(optim.make(x, 10, SCALING), model, 1)[0]) for x in configs)
    for leaf, x in leaves(model).items():
        decay = 0 if leaf.endswith("norm") else 1e-2 * 0.5 * x
        np.testing.assert_allclose(free[leaf] - decayed[leaf], decay, atol=1e-6, err_msg=leaf)


@EVERY
def test_what_is_frozen_changes_no_other_factor(name):
    """Neither a head nor norms of queries that are frozen are taken for absent."""
    model = fresh(SHAPES[name])
    frozen = [leaf for leaf in ("head", "embedding", "blocks.query_norm") if leaf in leaves(model)]
    config = optim.Config(weight_decay=0.0, freeze=tuple(frozen), **PLAIN)
    every = dataclasses.replace(config, freeze=())
    free = leaves(update(optim.make(every, 10, SCALING), model)[0])
    some = leaves(update(optim.make(config, 10, SCALING), model)[0])
    for leaf, x in leaves(model).items():
        np.testing.assert_array_equal(some[leaf], x if leaf in frozen else free[leaf], err_msg=leaf)


def test_the_map_of_hidden_states_moves_as_what_reads_the_stream():
    model = fresh(LLAMA)
    projection = features.projection(2, LLAMA.embed, 32, jax.random.key(0))
    alone = mup.scales(SCALING, model).lr
    both = mup.scales(SCALING, distill.Learner(model, projection)).lr
    assert eqx.tree_equal(both.student, alone) and both.projection.weight == BASE / LLAMA.embed


@pytest.mark.parametrize("rule", ["adamw", "muon", "adafactor"])
def test_off_it_leaves_values_updates_and_states_as_they_are(rule):
    """The chain is written out once more, without it."""
    model, config = fresh(LLAMA, mup.Config()), optim.Config(rule, lr=1e-3, warmup=0)
    assert eqx.tree_equal(model, students.fresh(Llama, LLAMA, jax.random.key(0)))
    optimizer = optim.make(config, 10)

    class Chain(optim.Optimizer):
        def _chain(self, norm, step, finite, model):
            return optax.chain(
                optax.scale(jnp.minimum(self.config.clip / norm, 1)),
                optim._rule(self.config, finite),
                optax.add_decayed_weights(0.01, optim._over_axes(optim.is_matrix)),
                optax.scale_by_learning_rate(self.lr(step)),
            )

    chain = Chain(optimizer.config, 10)
    assert eqx.tree_equal(update(optimizer, model), update(chain, model))
    arrays = model, optimizer.init(model), model, jnp.array(0, jnp.int32)
    programs = (move.lower(x, *arrays).as_text() for x in (optimizer, chain))
    assert len(set(programs)) == 1


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_step_costs_what_it_costs_without(name):
    costs, model = [], fresh(SHAPES[name])
    for scaling in (mup.Config(), SCALING):
        optimizer = optim.make(optim.Config(), 10, scaling)
        state = distill.init_state(model, optimizer)
        fixed = optimizer, losses.Objective(losses.Config(alpha=0.0), 10)
        program = sharding.compiled(distill.step.lower((None, widths.BATCH), state, *fixed))
        costs.append(program.compiled.memory_analysis().temp_size_in_bytes)
    assert costs[1] <= 1.01 * costs[0]


# ---- widths ----


def test_states_and_their_changes_are_of_one_size_at_every_width():
    """A part of the check in tests/slow."""
    widths.check("llama", False, widths=(64, 256), at=(2,), seeds=2)


def test_updates_of_muon_have_one_spectral_norm_at_every_width():
    """A factor of 1 / m would let it fall: it is what updates of few directions need."""
    norms = []
    for width in (32, 128):
        model = fresh(widths.shape_of("llama", width, False), mup.Config(32))
        config = optim.Config("muon", weight_decay=0.0, **PLAIN)
        new, _ = update(optim.make(config, 10, mup.Config(32)), model, 1)
        change = jax.tree.map(lambda x, y: np.asarray(x - y)[0], new.blocks, model.blocks)
        matrices = change.up, change.down, change.output.reshape(width, width)
        norms.append([np.linalg.norm(x, 2) for x in matrices])
    np.testing.assert_allclose(norms[1], norms[0], rtol=0.1)


# ---- runs ----


@pytest.mark.usefixtures("one_device")
def test_a_run_says_what_it_scales_by_and_goes_on_by_the_same(teacher, text, tmp_path, capsys):
    config = dataclasses.replace(
        config_of(teacher, text, tmp_path / "run"), student_init="random", mup=mup.Config(4),
        steps=2, quiet=False,
    )  # fmt: skip
    distill.train(dataclasses.replace(config, plan=True))
    assert "\nµP         m = 4 over width 4\n" in capsys.readouterr().out
    distill.train(config)
    assert "\nµP        m = 4 over width 4\n" in capsys.readouterr().err
    fresh = widths.fresh(dataclasses.replace(models.config(teacher), layers=2), config.mup)
    trained = models.load(tmp_path / "run" / "student")
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), trained, fresh)
    # At most lr a step, of matrices a quarter of it; the head's multiplier lies in the final norm.
    assert 1e-4 < moved.blocks.up < 0.25 * 0.021 and 5e-3 < moved.embedding < 0.021
    assert 1e-4 < moved.norm < 0.021 / 8
    other = dataclasses.replace(config, mup=mup.Config(8), steps=4)
    with pytest.raises(UserError, match="--mup.base-embed"):
        distill.train(other)


RANDOM = "--student-init random --mup.base-embed"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--mup.base-embed 64", "--mup.base-embed without --student-init random, or with"),
        ("--student-init first --mup.base-embed 64", "--mup.base-embed without --student-init"),
        ("--student x --mup.base-embed 64", "--mup.base-embed without --student-init random"),
        (
            f"{RANDOM} 64 --optim.name sgd",
            "--mup.base-embed with --optim.name sgd: no rule is known",
        ),
        (f"{RANDOM} 64 --optim.name adafactor", "--mup.base-embed with --optim.name adafactor"),
        (f"{RANDOM} 0", "--mup.base-embed is 0: it must be 1 or more"),
        (f"{RANDOM} -64", "--mup.base-embed is -64: it must be 1 or more"),
        (f"{RANDOM} 64 --mup.qk-scale 0", "--mup.qk-scale is 0.0: it must be above 0"),
        ("--mup.zero-init", "--mup.qk-scale or --mup.zero-init: add --mup.base-embed"),
    ],
)
def test_what_cannot_be_scaled_is_refused_in_a_line(words, says):
    with pytest.raises(UserError) as refusal:
        errors.cli(distill.Config, words.split())
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
