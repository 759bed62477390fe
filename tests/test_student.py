"""Which blocks stay, and that a student owns what it holds."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sharding
import student
from config import Config as Config_of_run
from config import with_defaults
from models.attention import positions
from models.base import intermediates
from models.llama import Config, Llama
from runtime import prepare, selection
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict")


@functools.cache
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


@eqx.filter_jit
def block_of(model, x, layer, tokens, segments=None):
    here, layer = positions(tokens, segments), jnp.asarray(layer)
    weights = jax.tree.map(lambda leaf: leaf[layer], model.blocks)
    return model.block(weights, x, here, model.position_inputs(here), layer, None)[0]


hidden_of = eqx.filter_jit(lambda model, tokens: model.hidden(tokens))
logits_of = eqx.filter_jit(lambda model, tokens, segments: model(tokens, segments))


def dense_kl(teacher, layers, calibration) -> float:
    """As anyone would write it: two whole models, two whole tables of probabilities."""
    shorter = student.cut(teacher, {"layers": layers})
    p, q = (
        jax.nn.log_softmax(logits_of(model, calibration.tokens, calibration.segments))
        for model in (teacher, shorter)
    )
    terms = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    counted = float(jnp.sum(jnp.where(calibration.mask, terms, 0)))
    return counted / float(jnp.sum(calibration.mask))


def test_greedy_removes_the_block_that_is_missed_least():
    teacher, calibration = teacher_of(), calibration_of()
    layers = tuple(range(6))
    while len(layers) > 3:
        candidates = [tuple(k for k in layers if k != gone) for gone in layers]
        costs = [dense_kl(teacher, candidate, calibration) for candidate in candidates]
        layers = candidates[int(np.argmin(costs))]
    choice = student.choose_layers(teacher, 3, "greedy", calibration)
    assert choice.layers == layers
    assert choice.kl == pytest.approx(min(costs), rel=1e-4)
    assert choice.layers != student.choose_layers(teacher, 3, "uniform").layers


def test_greedy_with_windows_per_layer():
    teacher = teacher_of(4, windows=(None, 3, 5, None), model_type="qwen2")
    calibration = calibration_of()
    choice = student.choose_layers(teacher, 3, "greedy", calibration)
    costs = {
        layers: dense_kl(teacher, layers, calibration)
        for layers in itertools.combinations(range(4), 3)
    }
    assert choice.layers == min(costs, key=costs.get)
    # Of probabilities in float32: this KL is near the rounding of a log probability.
    assert choice.kl == pytest.approx(costs[choice.layers], rel=1e-4, abs=5e-8)


def test_greedy_runs_one_compiled_program(monkeypatch):
    teacher, calibration = teacher_of(), calibration_of()
    student.choose_layers(teacher, 5, "greedy", calibration)
    monkeypatch.setattr(student.divergences, "kl", None)  # nothing is traced again
    assert len(student.choose_layers(teacher, 2, "greedy", calibration).layers) == 2


@functools.cache
def deep_teacher() -> Llama:
    """A teacher of 24 blocks, each louder or quieter than its neighbours."""
    model = Llama(Config(96, 32, 48, 24, heads=4, kv_heads=2, head_dim=8), jax.random.key(1))
    scale = jnp.asarray(np.random.default_rng(0).uniform(2, 4, 24), jnp.float32)
    louder = jax.tree.map(lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), model.blocks)
    return eqx.tree_at(lambda model: (model.blocks, model.head), model, (louder, 20 * model.head))


def rounds_of(layers: int, **more) -> list[student.Choice]:
    rounds, calibration = [], calibration_of(rows=4)
    student.choose_layers(deep_teacher(), layers, "greedy", calibration, save=rounds.append, **more)
    return rounds


def test_most_blocks_are_judged_once(monkeypatch):
    judged, ablate = [], student.ablate
    monkeypatch.setattr(student, "ablate", lambda *args: judged.append(1) or ablate(*args))
    lazy = rounds_of(12)
    assert [len(choice.layers) for choice in lazy] == [*range(23, 11, -1)]
    assert len(judged) < 24 + 12 * 24 / 4
    alone = student.Choice(tuple(range(24)))
    for left in range(23, 11, -1):
        anew = alone._replace(increases=(-np.inf,) * (left + 1), kl=alone.kl or 0.0)
        (alone,) = rounds_of(left, start=anew)
    calibration = calibration_of(rows=4)
    for choice in (lazy[-1], alone):
        cost = dense_kl(deep_teacher(), choice.layers, calibration)
        assert choice.kl == pytest.approx(cost, rel=1e-3)
    assert lazy[-1].kl <= alone.kl + 0.05


def test_a_sample_of_positions_judges_a_large_vocabulary(monkeypatch):
    text = calibration_of(rows=4)
    assert len(student.sample_positions(text, 96)) == np.sum(text.mask)
    monkeypatch.setattr(student, "LOGITS", 96 * 20)
    monkeypatch.setattr(student, "LEAST", 8)
    for vocab, count in ((96, 20), (1000, 8)):
        sample = student.sample_positions(text, vocab)
        assert len(set(sample.tolist())) == count and np.all(text.mask.reshape(-1)[sample])
    choice = student.choose_layers(teacher_of(), 4, "greedy", text)
    mask = jnp.zeros(text.mask.size, bool).at[student.sample_positions(text, 96)].set(True)
    cost = dense_kl(teacher_of(), choice.layers, text._replace(mask=mask.reshape(4, 24)))
    assert choice.kl == pytest.approx(cost, rel=1e-4)


def test_an_interrupted_choice_goes_on_to_the_same_bits():
    rounds = rounds_of(14)
    for i in (0, len(rounds) // 2, len(rounds) - 1):
        assert rounds_of(14, start=rounds[i]) == rounds[i + 1 :]
    ended, calibration = rounds[-1], calibration_of(rows=4)
    assert student.choose_layers(deep_teacher(), 14, "greedy", calibration, start=ended) == ended


def test_influence_keeps_the_blocks_that_turn_their_input_most():
    teacher, calibration = teacher_of(), calibration_of()
    x = teacher.embed_input(teacher.embedding[calibration.tokens])
    influence = []
    for layer in range(6):
        y = block_of(teacher, x, layer, calibration.tokens, calibration.segments)
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        influence.append((1 - cosine)[np.asarray(calibration.mask)].mean())
        x = y
    expected = tuple(sorted(np.argsort(influence)[::-1][:4].tolist()))
    assert student.choose_layers(teacher, 4, "influence", calibration).layers == expected


@pytest.mark.parametrize(
    ("how", "layers"),
    [
        ("uniform", (0, 2, 5)),
        ("first", (0, 1, 2)),
        ("last", (3, 4, 5)),
        ("1,2,5", (1, 2, 5)),
    ],
)
def test_choices_that_need_no_text(how, layers):
    assert student.choose_layers(teacher_of(), 3, how).layers == layers


@pytest.mark.parametrize("folder", ["bloom-residual", "qwen2-mixed", "llama-biases"])
def test_a_cut_is_the_teacher_without_the_other_blocks(folder):
    teacher = models.load(Path(__file__).parent / "fixtures" / folder)
    shorter = student.cut(teacher, {"layers": (0, 2)})
    assert shorter.config.layers == 2
    tokens = jnp.arange(40).reshape(2, 20)
    x = teacher.embed_input(teacher.embedding[tokens].astype(jnp.float32))
    for layer in (0, 2):
        x = block_of(teacher, x, layer, tokens)
    np.testing.assert_allclose(hidden_of(shorter, tokens), teacher.final_norm(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_student_shares_no_buffer_with_its_teacher(dtype):
    teacher = jax.tree.map(lambda leaf: leaf.astype(dtype), teacher_of())
    before = jax.tree.map(np.array, teacher)
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(teacher)}
    for layers in ((0, 1, 2, 3, 4, 5), (1, 4)):
        shorter = student.cut(teacher, {"layers": layers}, dtype)
        assert not held & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shorter)}
        for leaf in jax.tree.leaves(shorter):
            leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, before, teacher)
    assert {leaf.dtype for leaf in jax.tree.leaves(student.cut(teacher, {"layers": (0,)}))} == {
        jnp.dtype(jnp.float32)
    }


def test_on_a_mesh_the_choice_is_the_same_and_the_cut_stays_in_place():
    mesh = sharding.make_mesh(1, 4, 2)
    teacher, calibration = teacher_of(), calibration_of(rows=4)
    placed = sharding.shard(teacher, sharding.specs(teacher, mesh))
    with jax.set_mesh(mesh):
        choice = student.choose_layers(placed, 3, "greedy", calibration)
        assert choice.layers == student.choose_layers(teacher, 3, "greedy", calibration).layers
        shorter = student.cut(placed, {"layers": choice.layers})
    for leaf, where in zip(
        jax.tree.leaves(shorter), jax.tree.leaves(sharding.specs(shorter, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_fresh_students_may_have_other_widths():
    teacher = teacher_of()
    config = student.resized(teacher.config, 8, embed=16, mlp=20, heads=2, kv_heads=1)
    model = student.fresh(Llama, config, jax.random.key(0))
    assert model.blocks.query.shape == (8, 2, 8, 16)
    assert hidden_of(model, jnp.arange(6)[None]).shape == (1, 6, 16)
    bloom = student.resized(models.bloom.Config(96, 32, 3, heads=4), 2, heads=2)
    assert (bloom.heads, bloom.kv_heads, bloom.layers) == (2, 2, 2)
    with pytest.raises(UserError, match="--student-kv-heads means nothing to bloom"):
        student.resized(bloom, 2, kv_heads=1)
    with pytest.raises(
        UserError, match="heads 3 is not a multiple of .*heads 2: .*--student-kv-heads"
    ):
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
        student.choose_layers(teacher_of(), layers, how)
    assert "\n" not in str(error.value)


@pytest.fixture
def run(tmp_path):
    """A run's configuration, its teacher and its text, and an empty folder."""
    config = with_defaults(Config_of_run(student_layers=4, seq_len=32, out=str(tmp_path / "run")))
    corpus = prepare.open_corpus(config, Path(config.teacher), 2048)
    (tmp_path / "run").mkdir()
    return config, models.load(config.teacher), corpus, tmp_path / "run"


def test_a_killed_choice_goes_on_after_its_last_round(run, monkeypatch, capsys):
    choose, (*_, out) = selection.choose_or_restore_layers, run
    facts = {"teacher": "a"}
    greedy, saved = student.choose_layers, []

    def die(*args, save, **more):
        def save_and_die(choice):
            save(choice)
            saved.append(choice)
            raise KeyboardInterrupt

        return greedy(*args, save=save_and_die, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(student, "choose_layers", die)
        choose(*run, facts)
    assert not (out / "choice.json").exists()
    rounds = (out / "choice-rounds.json").read_text()
    layers = choose(*run, facts)
    assert "continued at 7 blocks" in capsys.readouterr().err
    assert not (out / "choice-rounds.json").exists()
    choice = json.loads((out / "choice.json").read_text())
    for other in ({"teacher": "b"}, facts):  # of another teacher it begins anew
        (out / "choice.json").unlink()
        (out / "choice-rounds.json").write_text(rounds)
        assert choose(*run, other) == layers
        assert ("continued" in capsys.readouterr().err) == (other == facts)
        again = json.loads((out / "choice.json").read_text())
        assert (again["kept"], again["kl"]) == (choice["kept"], choice["kl"])


FIXTURES = Path(__file__).parent / "fixtures"


def text_of(rows: int, seed: int = 0, vocab: int = 96, seq: int = 32) -> student.Calibration:
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (rows, seq)))
    return student.Calibration(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))


@pytest.mark.parametrize("folder", ["bloom", "bloom-residual", "qwen3", "llama-biases"])
def test_intermediates_are_the_inputs_of_projections(folder):
    model, text = models.load(FIXTURES / folder), text_of(2)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    x = student.first_states(model, text.tokens, None)

    @eqx.filter_jit
    def tapped(weights, x):
        here, layer = positions(text.tokens, text.segments), jnp.array(1)
        with intermediates() as values:
            y = model.block(weights, x, here, model.position_inputs(here), layer, None)[0]
        return values, y

    weights = jax.tree.map(lambda leaf: leaf[1], model.blocks)
    values, y = tapped(weights, x)
    np.testing.assert_array_equal(y, block_of(model, x, 1, text.tokens, text.segments))
    for name, states in (("output", values["middle"]), ("down", y)):
        weight = getattr(weights, name)
        changed = eqx.tree_at(lambda w: getattr(w, name), weights, 2 * weight)  # noqa: B023
        after, whole = tapped(changed, x)
        added = values[name].reshape(64, -1) @ weight.reshape(weight.shape[0], -1).T
        moved = {"output": after["middle"], "down": whole}[name] - states
        np.testing.assert_allclose(moved.reshape(64, -1), added, atol=1e-5)


def test_healing_finds_the_projections_of_a_teacher_that_only_they_differ_from(monkeypatch):
    teacher, text = teacher_of(4), text_of(24)
    noise = iter(jax.random.split(jax.random.key(2), 2))
    spoiled = eqx.tree_at(
        lambda model: (model.blocks.output, model.blocks.down),
        teacher,
        replace_fn=lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape),
    )
    monkeypatch.setattr(student, "DAMPING", 1e-9)
    monkeypatch.setattr(student, "blocks_to_heal", lambda *_: [True] * 4)
    healed, before, after = student.heal(teacher, spoiled, range(4), text, "all")
    assert before > 0.1 and after < 1e-6
    for name in ("output", "down"):
        weights = (getattr(model.blocks, name) for model in (healed, teacher))
        np.testing.assert_allclose(*weights, atol=1e-2)


def test_a_solve_is_ridge_regression_with_weights():
    teacher, text = teacher_of(4), text_of(4)
    text = text._replace(mask=text.mask.at[:, 20:].set(False))
    x = student.first_states(teacher, text.tokens, None)
    target = x + jax.random.normal(jax.random.key(3), x.shape)
    block = teacher, "down", jnp.array(2), x, target, text
    gram, moment, inputs, states = student.normal_equations(*block)
    healed, change = student.solve(teacher, "down", 2, gram, moment)
    behind = student.block_states(healed, jnp.array(2), x, text)[1]
    np.testing.assert_allclose(student.changed(states, inputs, change), behind, atol=1e-3)
    w = jax.tree.map(lambda leaf: np.asarray(leaf[2], np.float64), teacher.blocks)
    y = np.float64(block_of(teacher, x, 2, text.tokens, text.segments))[:, :20].reshape(80, 32)
    without = eqx.tree_at(lambda m: m.blocks.down, teacher, 0 * teacher.blocks.down)
    zero = block_of(without, x, 2, text.tokens, text.segments)
    middle = np.float64(zero)[:, :20].reshape(80, 32)
    h = middle / np.sqrt(np.mean(middle**2, -1, keepdims=True) + 1e-6) * w.mlp_norm
    gate = h @ w.gate.T
    m = gate / (1 + np.exp(-gate)) * (h @ w.up.T)
    np.testing.assert_allclose(y, middle + m @ w.down.T, atol=1e-3)
    goal = np.float64(target)[:, :20].reshape(80, 32)
    scale = 1 / np.linalg.norm(goal, axis=-1, keepdims=True)
    gram = m.T @ (scale * m)
    gram += student.DAMPING * np.diag(np.diag(gram))
    change = np.linalg.solve(gram, m.T @ (scale * (goal - y))).T
    np.testing.assert_allclose(healed.blocks.down[2], w.down + change, rtol=1e-3, atol=1e-3)
    others = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(healed.blocks.down[others], teacher.blocks.down[others])


def test_which_blocks_are_healed():
    teacher = teacher_of(6)
    for layers, seams, behind in (
        ((0, 1, 4, 5), [0, 1, 1, 0], [0, 1, 1, 1]),
        ((1, 2, 3), [1, 0, 1], [1, 1, 1]),
        ((0, 1, 2, 3), [0, 0, 0, 1], [0, 0, 0, 1]),
    ):
        assert student.blocks_to_heal(layers, teacher, "seams") == seams
        assert student.blocks_to_heal(layers, teacher, "all") == behind


@pytest.mark.parametrize("how", ["seams", "all"])
@pytest.mark.parametrize("folder", ["bloom-residual", "qwen2-mixed", "llama-biases", "mistral"])
def test_healing_lowers_the_kl_on_text_it_has_not_read(folder, how):
    teacher = models.load(FIXTURES / folder)
    vocab, layers = min(96, teacher.config.vocab), (0, teacher.config.layers - 1)
    shorter = student.cut(teacher, {"layers": layers})
    healed, before, after = student.heal(teacher, shorter, layers, text_of(24, vocab=vocab), how)
    unread = text_of(8, seed=1, vocab=vocab)
    costs = [student.kl_between(teacher, model, unread, None) for model in (shorter, healed)]
    assert after < before and costs[1] < costs[0]
    again, *_ = student.heal(teacher, shorter, layers, text_of(24, vocab=vocab), how)
    jax.tree.map(np.testing.assert_array_equal, again, healed)


def test_a_run_heals_its_student_before_the_first_step(run, capsys):
    config, teacher, corpus, _ = run
    config = dataclasses.replace(config, student_heal="seams", heal_tokens=1024)
    layers = [0, 4, 5, 7]
    shorter = student.cut(teacher, {"layers": layers})
    healed = selection.heal(config, teacher, shorter, layers, corpus)
    before, after = map(
        float, re.findall(r"KL (\S+) before, (\S+) after", capsys.readouterr().err)[0]
    )
    assert after < before
    again = selection.heal(config, teacher, shorter, layers, corpus)
    jax.tree.map(np.testing.assert_array_equal, again, healed)
    whole = dataclasses.replace(config, student_layers=8)
    assert selection.heal(whole, teacher, teacher, list(range(8)), corpus) is teacher
    with pytest.raises(UserError, match="344 inputs of a projection, and has 224 tokens"):
        few = dataclasses.replace(config, heal_tokens=256)
        selection.heal(few, teacher, shorter, layers, corpus)
    for other in ({"student_init": "random"}, {"student": config.teacher}):
        with pytest.raises(UserError, match="--student-heal: it is for a student that is cut"):
            Config_of_run(student_heal="all", **other)


@pytest.mark.parametrize("steps, tokens", [(10, 16384), (1000, 32000), (10000, 262144)])
def test_a_run_heals_by_half_as_much_text_as_it_trains_on(steps, tokens):
    shape = {"steps": steps, "batch_size": 4, "seq_len": 16}
    for more, expected in (({}, tokens), ({"heal_tokens": 7}, 7)):
        config = Config_of_run(teacher=str(FIXTURES / "llama-2"), **shape, **more)
        assert with_defaults(config).heal_tokens == expected
    assert with_defaults(Config_of_run(**shape)).heal_tokens == 16384  # the demo


def test_healing_that_does_not_help_is_left_out(monkeypatch):
    teacher = teacher_of()
    shorter = student.cut(teacher, {"layers": (0, 1, 5)})
    unchanged = np.zeros((), np.float32)
    monkeypatch.setattr(student, "solve", lambda model, *_: (model, unchanged))
    monkeypatch.setattr(student, "changed", lambda states, *_: states)
    healed, before, after = student.heal(teacher, shorter, (0, 1, 5), text_of(8), "all")
    assert healed is shorter and after == before
    with pytest.raises(UserError, match="solves for 48 inputs.* has 32 tokens.*--heal-tokens"):
        student.heal(teacher, shorter, (0, 1, 5), text_of(2), "all")


def test_a_cut_along_every_axis():
    """Of a model that puts zeros where the other indices are, a cut computes the same."""
    teacher = teacher_of(4)
    indices = {"layers": (0, 3), "mlp": tuple(range(0, 48, 3)), "kv_heads": (1,), "heads": (2, 3)}
    silent = {"mlp": "down", "heads": "output"}

    def mute(leaf, axes, axis):
        dimension = axes.index(axis)
        keep = np.isin(np.arange(leaf.shape[dimension]), indices[axis])
        keep = jnp.asarray(keep, leaf.dtype)
        return leaf * keep.reshape(-1, *[1] * (leaf.ndim - 1 - dimension))

    axes = sharding.axes(teacher).blocks
    muted = eqx.tree_at(
        lambda model: (model.blocks.down, model.blocks.output), teacher,
        [mute(getattr(teacher.blocks, x), getattr(axes, x), axis) for axis, x in silent.items()],
    )  # fmt: skip
    narrow, wide = student.cut(teacher, indices), student.cut(muted, {"layers": (0, 3)})
    assert narrow.config.mlp == 16 and narrow.config.heads == 2 and narrow.config.kv_heads == 1
    assert narrow.blocks.key.shape == (2, 1, 8, 32) and narrow.blocks.gate.shape == (2, 16, 32)
    tokens = jnp.arange(40).reshape(2, 20)
    np.testing.assert_allclose(hidden_of(narrow, tokens), hidden_of(wide, tokens), atol=1e-4)


def test_a_cut_along_the_width():
    """What is never written is not missed, but for the norms, which divide by fewer."""
    teacher = student.cut(teacher_of(2), {"embed": range(0, 32, 2)})
    assert hidden_of(teacher, jnp.arange(6)[None]).shape == (1, 6, 16)
    axes_of = jax.tree.structure(teacher).flatten_up_to(sharding.axes(teacher))
    for leaf, axes in zip(jax.tree.leaves(teacher), axes_of, strict=True):
        assert leaf.shape == tuple(getattr(teacher.config, axis) for axis in axes)


WRITERS = {"mlp": ("up",), "heads": ("output",), "embed": ("embedding", "output", "down")}


def muted(model: Llama, indices: dict) -> Llama:
    """With zeros where what is not of these indices, of some axes, is written."""
    axes_of = sharding.axes(model)

    def mute(path, leaf, axes):
        for axis, writers in WRITERS.items():
            if axis in indices and path[-1].name in writers:
                index = np.asarray(indices[axis])
                size = leaf.shape[axes.index(axis)]
                mask = np.stack([np.isin(np.arange(size), row) for row in np.atleast_2d(index)])
                names = [axis] if index.ndim == 1 else ["layers", axis]
                shape = [leaf.shape[i] if x in names else 1 for i, x in enumerate(axes)]
                leaf = leaf * mask.reshape(shape).astype(leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(mute, model, axes_of)


INDICES = {
    "mlp": np.stack([np.arange(i, 48, 3) for i in (0, 2, 1, 0)]),
    "embed": np.arange(1, 32, 2),
    "some heads": np.array([[0, 2], [1, 2], [0, 3], [1, 3]]),
    "kv_heads": np.array([[0], [1], [1], [0]]),
    "heads": np.array([[0, 1], [2, 3], [2, 3], [0, 1]]),
}


ALL_AXES = ["mlp", "embed", "kv_heads", "heads"]


@pytest.mark.parametrize(
    ("axes", "widths", "layers", "kind"),
    [
        (["mlp"], {"mlp": 16}, (0, 1, 2, 3), "llama"),
        (["some heads"], {"heads": 2}, (0, 1, 2, 3), "llama"),
        (["kv_heads", "heads"], {"kv_heads": 1}, (0, 1, 2, 3), "llama"),
        (["embed"], {"embed": 16}, (0, 1, 2, 3), "llama"),
        (ALL_AXES, {"mlp": 16, "embed": 16, "kv_heads": 1}, (0, 3), "llama"),
        (ALL_AXES, {"mlp": 16, "embed": 16, "kv_heads": 1}, (0, 3), "qwen3"),
    ],
)
def test_channels_that_write_nothing_go_and_the_logits_stay(axes, widths, layers, kind):
    # Norms of queries and keys, which are as wide as before, share the eps of the others.
    more = {"qk_norm": True, "norm_eps": 1e-8} if kind == "qwen3" else {}
    config = Config(96, 32, 48, 4, heads=4, kv_heads=2, head_dim=8, model_type=kind, **more)
    model = Llama(config, jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf * (5.0 if jnp.std(leaf) > 0 else 1.0), model)
    indices = {"heads" if axis == "some heads" else axis: INDICES[axis] for axis in axes}
    teacher, text = muted(model, indices), calibration_of()
    shape = student.narrowed(config, **widths)
    chosen = student.choose_widths(teacher, shape, layers, text)
    assert chosen.pop("layers") == layers
    for axis, index in indices.items():
        rows = index[list(layers)] if index.ndim == 2 else index
        np.testing.assert_array_equal(chosen[axis], rows)
    narrow = student.cut(teacher, {"layers": layers} | chosen)
    assert narrow.config == shape.select({"layers": layers})
    shallow = student.cut(teacher, {"layers": layers})
    expected = logits_of(shallow, text.tokens, text.segments)
    assert jnp.std(expected) > 0.1
    np.testing.assert_allclose(logits_of(narrow, text.tokens, text.segments), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "says"),
    [
        ({"mlp": 49}, "--student-mlp is 49: the teacher has 48 .--student-init random"),
        ({"kv_heads": 3}, "--student-kv-heads is 3: the teacher has 2"),
        ({"heads": 3}, "--student-heads is 3: each of 2 key and value heads .* 1 to 2"),
        ({"heads": 4, "kv_heads": 1}, "--student-heads is 4: each of 1 key and value heads"),
    ],
)
def test_widths_that_cannot_be_cut(widths, says):
    with pytest.raises(UserError, match=says) as error:
        student.narrowed(teacher_of().config, **widths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("folder", [None, "bloom"])
def test_candidates_have_the_share_of_the_parameters(folder, share):
    config = Config(96, 32, 128, 10, 4, 2, 8)
    if folder is not None:
        config = dataclasses.replace(models.load(FIXTURES / folder).config, layers=10)
    sizes, whole = student.sizes(config, share), parameters(config)
    assert sizes[-1] == (int(10 * share + 1e-9), config.mlp)
    assert 10 >= sizes[0][0] and len({depth for depth, _ in sizes}) == len(sizes) <= 4
    for depth, width in sizes:
        changes = {} if width == config.mlp else {"mlp": width}
        part = parameters(dataclasses.replace(config, layers=depth, **changes)) / whole
        assert share - 0.1 < part <= share + 1e-6
    if folder is None and share >= 0.5:
        assert sizes[0][0] == 10 and len(sizes) > 1


def parameters(config) -> int:
    """Of all blocks."""
    model = eqx.filter_eval_shape(
        lambda: models.FAMILIES[config.model_type](config, jax.random.key(0))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(model.blocks))


@pytest.mark.parametrize("axis", ["embed", "mlp", "heads", "kv_heads"])
def test_the_config_of_bloom_says_no_width(axis):
    config = models.load(FIXTURES / "bloom").config
    flag = f"--student-{axis.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{flag} with a bloom teacher: .* cut along layers$"):
        student.narrowed(config, **{axis: 2})


@pytest.mark.parametrize(
    ("widths", "solved"),
    [({"mlp": 32}, ["down"]), ({"heads": 2}, ["output"]), ({"embed": 24}, ["output", "down"])],
)
def test_healing_a_narrow_student(widths, solved):
    teacher, text = models.load(FIXTURES / "mistral"), text_of(24)
    shape = student.narrowed(teacher.config, **widths)
    indices = student.choose_widths(teacher, shape, range(3), text)
    narrow, embed = student.cut(teacher, indices), indices.get("embed")
    healed, before, after = student.heal(teacher, narrow, range(3), text, "seams", embed=embed)
    unread = text_of(8, seed=1)
    costs = [student.kl_between(teacher, model, unread, None) for model in (narrow, healed)]
    assert after < before and costs[1] < costs[0]
    for name in solved:
        leaves = [getattr(model.blocks, name) for model in (narrow, healed)]
        assert jnp.all(jnp.any(leaves[0] != leaves[1], axis=range(1, leaves[0].ndim)))


def test_on_a_mesh_heads_that_no_longer_divide_are_whole():
    mesh, teacher = sharding.make_mesh(4, 1, 2), teacher_of(4)
    placed = sharding.shard(teacher, sharding.specs(teacher, mesh))
    shape, text = student.narrowed(teacher.config, kv_heads=1, mlp=16), calibration_of(rows=4)
    with jax.set_mesh(mesh):
        indices = student.choose_widths(placed, shape, (0, 2), text)
        narrow = student.cut(placed, indices)
    for axis, index in student.choose_widths(teacher, shape, (0, 2), text).items():
        np.testing.assert_array_equal(indices[axis], index)
    for leaf, where in zip(
        jax.tree.leaves(narrow), jax.tree.leaves(sharding.specs(narrow, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


@pytest.mark.parametrize(
    ("folder", "indices", "says"),
    [
        ("bloom", {"heads": (0, 1)}, "bloom models are cut along layers, not heads"),
        ("llama-2", {"head_dim": (0, 1)}, "not head_dim"),
        ("llama-2", {"heads": (0, 1), "kv_heads": (0, 1)}, "groups of 2"),
        ("llama-2", {"heads": (0, 1, 2)}, "not a multiple"),
        ("llama-2", {"mlp": ()}, "0 to 47"),
        ("llama-2", {"layers": (0, 3)}, "0 to 2"),
    ],
)
def test_cuts_that_cannot_be(folder, indices, says):
    teacher = models.load(Path(__file__).parent / "fixtures" / folder)
    with pytest.raises(UserError, match=says):
        student.cut(teacher, indices)


def test_every_program_gets_the_compiler_options_of_a_step(monkeypatch):
    programs = set()

    def jit(function):
        programs.add(function.__name__)
        return function

    monkeypatch.setattr(sharding, "jit", jit)
    # Reloaded, its classes would be others for the rest of the tests.
    copy = importlib.util.module_from_spec(student.__spec__)
    student.__spec__.loader.exec_module(copy)
    assert programs == {
        "forward", "ablate", "importance", "first_states", "block_states", "changed",
        "normal_equations",
    }  # fmt: skip


# ---- deeper, and partly the teacher ----


def perturbed(folder: str):
    """A model in which no norm and no bias is what it is at first."""
    model = models.load(FIXTURES / folder)

    def noisy(leaf):
        return leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return jax.tree.map(noisy, model)


@pytest.mark.parametrize("how", student.GROWTH)
@pytest.mark.parametrize("folder", ["bloom", "llama-biases", "mistral", "qwen2-mixed", "qwen3"])
def test_a_grown_student_computes_what_the_shallow_one_does(folder, how):
    shallow = perturbed(folder)
    tokens, segments = jnp.asarray(np.arange(48).reshape(2, 24)), jnp.ones((2, 24), int)
    expected = logits_of(shallow, tokens, segments)
    deeper = student.grow(shallow, 7, how)
    order = {"grow": [0, 0, 0, 1, 1, 2, 2], "grow-stack": [0, 1, 2, 0, 1, 2, 0]}[how]
    assert student.growth(shallow.config, 7, how) == tuple(order)
    assert deeper.config.layers == 7 and deeper.blocks.output.shape[0] == 7
    windows = getattr(shallow.config, "windows", ())
    assert getattr(deeper.config, "windows", ()) == tuple(windows[i] for i in order if windows)
    np.testing.assert_allclose(logits_of(deeper, tokens, segments), expected, atol=1e-5)
    zero = {i for i in range(7) if not np.any(deeper.blocks.down[i])}
    assert zero == {i for i in range(7) if order.index(order[i]) < i}
    # The copies are no dead ends: what is zero has a gradient.
    grads = eqx.filter_grad(lambda model: jnp.sum(logits_of(model, tokens, segments) ** 2))(deeper)
    assert all(np.any(grads.blocks.down[i]) and np.any(grads.blocks.output[i]) for i in zero)


@pytest.mark.parametrize(
    ("folder", "layers", "says"),
    [
        ("bloom", None, "--student-init grow needs --student-layers above 3"),
        ("qwen3", 3, "--student-init grow needs --student-layers above 3"),
        ("bloom-residual", 6, "--student-init grow: its blocks add to their normed input"),
    ],
)
def test_growth_that_cannot_be(folder, layers, says):
    run = Config_of_run(student=str(FIXTURES / folder), student_init="grow", student_layers=layers)
    with pytest.raises(UserError, match=f"^{says}"):
        with_defaults(run)


def test_a_fresh_student_takes_leaves_of_its_teacher():
    teacher = teacher_of()
    config = dataclasses.replace(teacher.config, layers=2, mlp=40)
    fresh = student.fresh(Llama, config, jax.random.key(1))
    copied = student.copy_leaves(fresh, teacher, ("head", "student.embed*", "norm"))
    paths = jax.tree_util.tree_leaves_with_path((fresh, copied))
    names = [jax.tree_util.keystr(path[1:]) for path, _ in paths][: len(paths) // 2]
    before, after, theirs = map(jax.tree.leaves, (fresh, copied, teacher))
    for name, old, new, leaf in zip(names, before, after, theirs, strict=True):
        taken = name in (".head", ".embedding", ".norm")
        np.testing.assert_array_equal(new, leaf if taken else old, err_msg=name)
        assert new is not leaf and new.dtype == jnp.float32


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["embedding", "heads"], "--student-copy heads names no parameter; there are student.emb"),
        (
            ["blocks.*"],
            r"--student-copy blocks.\*: student.blocks.attention_norm is \(2, 32\), the",
        ),
    ],
)
def test_leaves_that_cannot_be_copied_are_refused_before_any_weight_is_read(patterns, says):
    teacher = teacher_of()
    shape = dataclasses.replace(teacher.config, layers=2)
    with pytest.raises(UserError, match=f"^{says}"):
        eqx.filter_eval_shape(
            lambda: student.copy_leaves(Llama(shape, jax.random.key(0)), teacher, patterns)
        )
