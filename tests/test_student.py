"""Which blocks stay, and that a student owns what it holds."""

import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sharding
import student
from models.llama import Config, Llama
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict")


def teacher_of(layers: int = 6, **more) -> Llama:
    config = Config(96, 32, 48, layers, heads=4, kv_heads=2, head_dim=8, **more)
    model = Llama(config, jax.random.key(0))
    # Blocks that matter, each to another degree.
    scale = jnp.linspace(2.0, 12.0, layers)[jnp.array([3, 0, 5, 1, 4, 2])[:layers]]
    louder = jax.tree.map(
        lambda leaf: leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1)), model.blocks
    )
    return eqx.tree_at(lambda model: (model.blocks, model.head), model, (louder, 20 * model.head))


def calibration_of(rows: int = 2, seq: int = 24) -> student.Calibration:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2]], [10, seq - 10], axis=1).repeat(rows, axis=0)
    return student.Calibration(
        jnp.asarray(rng.integers(0, 96, (rows, seq))),
        jnp.asarray(segments),
        jnp.asarray(rng.random((rows, seq)) < 0.8),
    )


logits_of = eqx.filter_jit(lambda model, tokens, segments: model(tokens, segments))


def dense_kl(teacher, kept, calibration) -> float:
    """As anyone would write it: two whole models, two whole tables of probabilities."""
    shorter = student.cut(teacher, kept)
    p, q = (
        jax.nn.log_softmax(logits_of(model, calibration.tokens, calibration.segments))
        for model in (teacher, shorter)
    )
    terms = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    counted = float(jnp.sum(jnp.where(calibration.mask, terms, 0)))
    return counted / float(jnp.sum(calibration.mask))


def test_greedy_removes_the_block_that_is_missed_least():
    teacher, calibration = teacher_of(), calibration_of()
    kept = tuple(range(6))
    while len(kept) > 3:
        candidates = [tuple(k for k in kept if k != gone) for gone in kept]
        costs = [dense_kl(teacher, candidate, calibration) for candidate in candidates]
        kept = candidates[int(np.argmin(costs))]
    choice = student.choose(teacher, 3, "greedy", calibration)
    assert choice.kept == kept
    assert choice.kl == pytest.approx(min(costs), rel=1e-4)
    assert choice.kept != student.choose(teacher, 3, "uniform").kept


def test_greedy_with_windows_per_layer():
    teacher = teacher_of(4, windows=(None, 3, 5, None), model_type="qwen2")
    calibration = calibration_of()
    choice = student.choose(teacher, 3, "greedy", calibration)
    costs = {
        kept: dense_kl(teacher, kept, calibration) for kept in itertools.combinations(range(4), 3)
    }
    assert choice.kept == min(costs, key=costs.get)
    assert choice.kl == pytest.approx(costs[choice.kept], rel=1e-4)


def test_greedy_runs_one_compiled_program():
    teacher, calibration = teacher_of(), calibration_of()
    student.choose(teacher, 5, "greedy", calibration)
    before = student._without._cached._cache_size()
    student.choose(teacher, 2, "greedy", calibration)
    assert student._without._cached._cache_size() == before > 0


def test_influence_keeps_the_blocks_that_turn_their_input_most():
    teacher, calibration = teacher_of(), calibration_of()
    here = models.common.place(calibration.tokens, calibration.segments)
    x = teacher.embed(calibration.tokens, jnp.dtype(jnp.float32))
    influence = []
    for layer in range(6):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], teacher.blocks)
        y, _ = teacher.block(
            weights, x, here, teacher.position_inputs(here), jnp.array(layer), None
        )
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        influence.append((1 - cosine)[np.asarray(calibration.mask)].mean())
        x = y
    expected = tuple(sorted(np.argsort(influence)[::-1][:4].tolist()))
    assert student.choose(teacher, 4, "influence", calibration).kept == expected


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("uniform", (0, 2, 5)),
        ("first", (0, 1, 2)),
        ("last", (3, 4, 5)),
        ("1,2,5", (1, 2, 5)),
    ],
)
def test_choices_that_need_no_text(how, kept):
    assert student.choose(teacher_of(), 3, how).kept == kept


@pytest.mark.parametrize("folder", ["bloom-residual", "qwen2-mixed", "llama-biases"])
def test_a_cut_is_the_teacher_without_the_other_blocks(folder):
    teacher = models.load(Path(__file__).parent / "fixtures" / folder)
    shorter = student.cut(teacher, (0, 2))
    assert shorter.config.layers == 2
    tokens = jnp.arange(40).reshape(2, 20)
    here = models.common.place(tokens)
    x = teacher.embed(tokens, jnp.dtype(jnp.float32))
    for layer in (0, 2):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], teacher.blocks)
        x, _ = teacher.block(
            weights, x, here, teacher.position_inputs(here), jnp.array(layer), None
        )
    np.testing.assert_allclose(shorter.hidden(tokens), teacher.final_norm(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_student_shares_no_buffer_with_its_teacher(dtype):
    teacher = jax.tree.map(lambda leaf: leaf.astype(dtype), teacher_of())
    before = jax.tree.map(np.array, teacher)
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(teacher)}
    for kept in ((0, 1, 2, 3, 4, 5), (1, 4)):
        shorter = student.cut(teacher, kept, dtype)
        assert not held & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shorter)}
        for leaf in jax.tree.leaves(shorter):
            leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, before, teacher)
    assert {leaf.dtype for leaf in jax.tree.leaves(student.cut(teacher, (0,)))} == {
        jnp.dtype(jnp.float32)
    }


def test_on_a_mesh_the_choice_is_the_same_and_the_cut_stays_in_place():
    mesh = sharding.make_mesh(1, 4, 2)
    teacher, calibration = teacher_of(), calibration_of(rows=4)
    placed = sharding.shard(teacher, sharding.specs(teacher, mesh))
    with jax.set_mesh(mesh):
        choice = student.choose(placed, 3, "greedy", calibration)
        assert choice.kept == student.choose(teacher, 3, "greedy", calibration).kept
        shorter = student.cut(placed, choice.kept)
    for leaf, where in zip(
        jax.tree.leaves(shorter), jax.tree.leaves(sharding.specs(shorter, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_fresh_students_may_have_other_widths():
    teacher = teacher_of()
    config = student.resized(teacher.config, 8, embed=16, mlp=20, heads=2, kv_heads=1)
    model = student.fresh(Llama, config, jax.random.key(0))
    assert model.blocks.query.shape == (8, 2, 8, 16)
    assert model(jnp.arange(6)[None]).shape == (1, 6, 96)
    same = student.from_teacher(teacher, layers=7, how="random")
    assert same.blocks.up.shape == (7, 48, 32)
    with pytest.raises(UserError, match="3 heads .* 2 key .* --student-kv-heads"):
        student.resized(teacher.config, 8, heads=3)


@pytest.mark.parametrize(
    ("layers", "how", "says"),
    [
        (7, "greedy", "--student-init random can have more"),
        (0, "uniform", "--student-layers is 0"),
        (3, "0,1", "must list 3"),
        (3, "0,1,6", "0 to 5"),
        (3, "2,1,0", "ascend"),
        (3, "0,0,1", "once"),
        (3, "greediest", "one of greedy"),
        (3, "greedy", "calibration"),
    ],
)
def test_choices_that_cannot_be(layers, how, says):
    with pytest.raises(UserError, match=says) as error:
        student.choose(teacher_of(), layers, how)
    assert "\n" not in str(error.value)
