"""Matched hidden states: the loss and its gradient, what is kept for them, and runs with them."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_distill
from test_distill import FIXTURES, config, near, teacher, text  # noqa: F401

import data
import distill
import losses
import models
import optim
import sharding
import student as students
from losses import features
from models.attention import positions
from runtime.errors import UserError

SGD = optim.make(
    optim.Config("sgd", lr=1.0, momentum=0.0, clip=0.0, weight_decay=0.0, warmup=0,
                 schedule="constant"), 10
)  # fmt: skip


def random(*shape: int, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape)


def batch_of() -> data.Batch:
    return jax.tree.map(jnp.asarray, test_distill.batch_of())


def pair() -> tuple:
    teacher = models.load(FIXTURES / "llama-2")
    return teacher, students.cut(teacher, {"layers": (0, 2)})


@eqx.filter_jit
def outputs(model, tokens, segments) -> list:
    """Of every block, one after the other."""
    here = positions(tokens, segments)
    prepared = model.position_inputs(here)
    x, found = model.embed_input(model.embedding[tokens].astype("float32")), []
    for layer in range(model.config.layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
        x, _ = model.block(weights, x, here, prepared, jnp.array(layer), None)
        found.append(x)
    return found


def taps(states):
    """Outputs of blocks as a signal holds them, the rows first."""
    return jnp.moveaxis(states, 0, 1)


def dense(kind, pairs, ours, theirs, mask, weights=None):
    """By definition, of lists of the outputs of all blocks."""
    total = 0.0
    for i, (block, other) in enumerate(pairs):
        x, y = ours[block], theirs[other]
        if weights is not None:
            x = x @ weights[i].T
        if kind == "mse":
            far = ((x - y) ** 2).mean(-1)
        else:
            norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
            far = 1 - (x * y).sum(-1) / norms
        total += (far * mask).sum() / len(pairs)
    return total


@pytest.mark.parametrize(
    ("name", "layers", "remat"), [("llama-2", (0, 2), "full"), ("bloom", (1,), "none")]
)
def test_outputs_of_chosen_blocks(name, layers, remat):
    model, batch = models.load(FIXTURES / name), batch_of()
    read = batch.tokens[:, :-1], batch.segments[:, :-1]
    expected = outputs(model, *read)
    hidden, found = model.hidden(*read, remat=remat, taps=layers)
    np.testing.assert_allclose(found, jnp.stack([expected[i] for i in layers]), atol=1e-5)
    np.testing.assert_allclose(hidden, model.final_norm(expected[-1]), atol=1e-5)


def test_only_chosen_outputs_are_kept():
    """No array with room for the outputs of all three blocks; two have a place beside the rest."""
    model, batch = models.load(FIXTURES / "llama-2"), batch_of()

    def program(**how):
        read = batch.tokens[:, :-1], batch.segments[:, :-1]
        return str(jax.make_jaxpr(lambda model: model.hidden(*read, **how))(model))

    width = model.config.embed
    assert f"f32[3,8,24,{width}]" in program(taps=(0, 1, 2))
    assert f"f32[3,8,24,{width}]" not in program(taps=(0,))
    assert f"f32[1,8,24,{width}]" in program(taps=(2,))
    assert f"f32[2,8,24,{width}]" not in program(taps=(2,))
    assert f",8,24,{width}]" not in program()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_they_are_kept_once(remat):
    """Not anew for every block, as what a backward pass needs is."""
    model, batch = models.load(FIXTURES / "llama-2"), batch_of()

    def total(model):
        read = batch.tokens[:, :-1], batch.segments[:, :-1]
        return sum(jnp.sum(x) for x in model.hidden(*read, remat=remat, taps=(1, 2)))

    program = str(jax.make_jaxpr(jax.grad(total))(model))
    width = model.config.embed
    assert f"f32[2,8,24,{width}]" in program and f"f32[3,2,8,24,{width}]" not in program


@pytest.mark.parametrize("kind", features.DISTANCES)
@pytest.mark.parametrize(
    ("wide", "pairs"), [(False, ((0, 0), (1, 3))), (True, ((2, 1), (0, 1), (2, 3)))], ids=str
)
def test_the_loss_and_its_gradient(kind, wide, pairs):
    mask = jnp.array(np.random.default_rng(0).random((4, 6)) < 0.6)
    ours, theirs = random(3, 4, 6, 8), random(4, 4, 6, 12 if wide else 8, seed=1)
    left, right = (jnp.array(layers) for layers in features.tapped_layers(pairs))
    projection = features.projection(len(pairs), 8, theirs.shape[-1], jax.random.key(2))
    assert (projection is not None) == wide

    def found(ours, projection):
        return features.loss(kind, pairs, ours[left], taps(theirs[right]), mask, projection)

    def expected(ours, projection):
        weights = None if projection is None else projection.weight
        return dense(kind, pairs, ours, theirs, mask, weights)

    mine = jax.jit(jax.value_and_grad(found, (0, 1)))(ours, projection)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        mine,
        jax.value_and_grad(expected, (0, 1))(ours, projection),
    )


@pytest.mark.parametrize("kind", features.DISTANCES)
def test_what_is_masked_and_what_is_the_teachers(kind):
    mask = jnp.array(np.random.default_rng(0).random((4, 6)) < 0.6)
    pairs = ((0, 0), (1, 1))
    ours, theirs = random(2, 4, 6, 8), random(2, 4, 6, 8, seed=1)

    @jax.jit
    def loss(ours, theirs):
        return features.loss(kind, pairs, ours, taps(theirs), mask)

    whole = loss(ours, theirs)
    broken = jnp.where(mask[..., None], ours, jnp.nan), jnp.where(mask[..., None], theirs, jnp.inf)
    found, (d_ours, d_theirs) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*broken)
    assert found == whole > 0
    assert jnp.all(d_theirs == 0)
    assert jnp.all((d_ours == 0) == ~mask[..., None])


def test_vectors_without_a_direction():
    pairs, mask = ((0, 0),), jnp.ones((2, 3), bool)
    some, none = random(1, 2, 3, 4), jnp.zeros((1, 2, 3, 4))
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda x, y: features.loss("cosine", pairs, x, taps(y), mask))
    )
    for ours, theirs in ((none, some), (some, none), (none, none), (1e-30 * some, some)):
        value, gradient = value_and_grad(ours, theirs)
        assert value == 6 and jnp.all(gradient == 0)
    assert abs(value_and_grad(1e-4 * some, 1e15 * some)[0]) < 1e-5


def test_the_step_adds_it_once_per_counted_token():
    kind, parts = "cosine", 2
    teacher, student = pair()
    batch, pairs = batch_of(), ((0, 0), (1, 2))
    loss = losses.Config(alpha=0.0, features=kind, feature_weight=0.5)
    objective = losses.Objective(loss, 10, microbatches=parts, pairs=pairs)
    state = distill.init_state(jax.tree.map(jnp.copy, student), SGD)
    state, metrics = distill.step((teacher, batch), state, SGD, objective)
    read = batch.tokens[:, :-1], batch.segments[:, :-1]
    theirs, mask = outputs(teacher, *read), batch.mask

    def expected(student):
        far = dense(kind, pairs, outputs(student, *read), theirs, mask) / mask.sum()
        logits = jax.nn.log_softmax(student(*read))
        ce = -jnp.take_along_axis(logits, batch.tokens[:, 1:, None], 2)[..., 0]
        ce = (ce * mask).sum() / mask.sum()
        return ce + 0.5 * far, (ce, far)

    (total, (ce, far)), gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(student)
    for name, value in (("loss", total), ("ce", ce), ("features", far)):
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5)
    near(jax.tree.map(jnp.subtract, student, state.student), gradient, 1e-4)


def narrower() -> tuple:
    """Teacher, a student of half its width, and a projection; what trains them, one program."""
    teacher = models.load(FIXTURES / "llama-2")
    shape = students.resized(teacher.config, 2, embed=teacher.config.embed // 2)
    student = students.fresh(type(teacher), shape, jax.random.key(0))
    projection = features.projection(2, shape.embed, teacher.config.embed, jax.random.key(1))
    return teacher, student, projection


FADING = losses.Objective(
    losses.Config(features="cosine", feature_weight_end=0.0, feature_weight_schedule="linear"),
    4, pairs=((0, 0), (1, 1)),
)  # fmt: skip
FROZEN_UP = optim.make(
    optim.Config(lr=1e-2, eps=1e-4, warmup=0, schedule="constant", freeze=("blocks.up",)), 10
)


def test_on_a_mesh_the_step_is_the_same():
    """With projections, their moments, and a weight that follows a schedule."""

    def three(place, batch):
        teacher, student, projection = place(jax.tree.map(jnp.copy, narrower()))
        state = distill.init_state(student, FROZEN_UP, projection)
        for _ in range(3):
            state, metrics = distill.step((teacher, batch), state, FROZEN_UP, FADING)
        return state, jax.device_get(metrics)

    alone, told = three(lambda tree: tree, batch_of())
    assert told["loss"] == pytest.approx(told["divergence"] + 0.5 * told["features"], rel=1e-6)
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use_mesh(mesh):
        batch = sharding.from_host(batch_of(), mesh)
        split, also = three(lambda tree: sharding.shard(tree, sharding.specs(tree, mesh)), batch)
    assert also["features"] == pytest.approx(told["features"], rel=1e-5)
    near(split.student, alone.student, 1e-4)
    near(split.learner.projection, alone.learner.projection, 1e-4)
    weight = split.learner.projection.weight
    rows, width = weight.shape[1:]
    assert weight.sharding.shard_shape(weight.shape) == (2, rows, width // 2)


def test_a_projection_that_is_not_finite_leaves_all_as_it_was():
    teacher, student, fresh = narrower()
    fresh = eqx.tree_at(lambda tree: tree.weight, fresh, fresh.weight.at[0, 0, 0].set(jnp.inf))
    model, projection = jax.tree.map(jnp.copy, (student, fresh))
    state = distill.init_state(model, FROZEN_UP, projection)
    after, metrics = distill.step((teacher, batch_of()), state, FROZEN_UP, FADING)
    assert metrics["skipped"] == 1
    assert eqx.tree_equal(after.student, student)
    assert eqx.tree_equal(after.learner.projection, fresh)


def test_the_map_follows_the_cut():
    assert features.pairs((), 3, 8, [0, 4, 7]) == ((0, 0), (1, 4), (2, 7))
    assert features.pairs((), 2, 8) == ((0, 3), (1, 7))
    assert features.pairs((), 4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert features.pairs(("0:5", "2:1"), 3, 8, [0, 4, 7]) == ((0, 5), (2, 1))


class Reached(Exception):
    """That far a run was to go."""


def test_a_run_matches_the_blocks_it_was_cut_from(config, monkeypatch):  # noqa: F811
    def reached(run, *rest):
        raise Reached(run.objective.pairs)

    monkeypatch.setattr(distill, "loop", reached)
    wanted = losses.Config(features="cosine")
    cut = dataclasses.replace(config, loss=wanted, student_init="0,2")
    with pytest.raises(Reached) as found:
        distill.train(cut)
    assert found.value.args == (((0, 0), (1, 2)),)


@pytest.mark.parametrize(
    ("loss", "more", "says"),
    [
        ({"feature_pairs": ("0:0",)}, {}, "--loss.feature-pairs"),
        ({"features": "mse", "feature_weight": -1.0}, {}, "--loss.feature-weight"),
        ({"features": "mse", "feature_pairs": ("0:9",)}, {}, "teacher 0 to 2"),
        ({"features": "mse", "feature_pairs": ("2:0",)}, {}, "blocks 0 to 1"),
        ({"features": "mse", "feature_pairs": ("0-1",)}, {}, "STUDENT:TEACHER"),
        ({"features": "mse"}, {"teacher_devices": 4}, "--teacher-devices"),
        ({"features": "mse"}, {"targets": "somewhere"}, "--targets"),
    ],
)
def test_what_is_refused(config, loss, more, says):  # noqa: F811
    with pytest.raises(UserError, match=says) as error:
        distill.train(dataclasses.replace(config, loss=losses.Config(**loss), **more))
    assert "\n" not in str(error.value) and not Path(config.out).exists()
