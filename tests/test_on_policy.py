"""Batches that a model writes: what they hold, which steps have one, and runs that use them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import (  # noqa: F401
    ADAMW,
    FIXTURES,
    config,
    metrics_of,
    one_device,
    pair,
    teacher,
    text,
)
from test_features import Reached

import data
import distill
import generate
import losses
import models
import optim
import sharding
from runtime import on_policy, plan, results
from runtime.errors import UserError

STEP = jnp.array(7, jnp.int32)
SEED = 1  # draws steps of both kinds, before and after a cut
STOP = 5  # of the small models, where a test ends texts early


def rows_of(seed: int = 0) -> data.Batch:
    """Every kind of row: one document, two, one that ends with the prompt, one all of padding."""
    tokens = np.random.default_rng(seed).integers(6, 96, (8, 21)).astype(np.int32)
    segments = np.ones((8, 21), np.int32)
    segments[1, 3:] = 2
    segments[2, 4:] = 0  # a text that is shorter than the prompt
    segments[3] = 0
    tokens[4, 7] = STOP  # ends just there
    tokens[5, 7], segments[5, 7:] = STOP, 2  # begins just there
    tokens[6, 2] = STOP
    segments[6, 3:] = 2
    return data.Batch(tokens, segments, segments[:, 1:] > 0)


PROMPTS = [(0, 8), (3, 8), (0, 4), (0, 0), (0, 0), (7, 8), (3, 8), (0, 8)]  # in the rows above


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURES / "qwen2-mixed")


def written(writer, batch, step=STEP, vocab=96, stop=(STOP,), **settings):
    settings = {"config": on_policy.Config(prompt=8, **settings), "stop": stop, "vocab": vocab}
    continued = on_policy.continue_rows(writer, batch, step, seed=SEED, **settings)
    return jax.tree.map(np.asarray, continued)


def test_the_likeliest_continuations_of_the_last_documents():
    """Against the whole model, run anew for every token."""
    model, batch = models.load(FIXTURES / "bloom"), rows_of()
    whole = eqx.filter_jit(model)
    starts, ends = (np.array(side) for side in zip(*PROMPTS, strict=True))

    def texts() -> list[list[int]]:
        """Each prompt with 13 tokens more, whatever they are."""
        rows = [row[a:b].tolist() for row, a, b in zip(batch.tokens, starts, ends, strict=True)]
        for _ in range(13):
            padded = np.array([row + [0] * (21 - len(row)) for row in rows], np.int32)
            at = np.maximum([len(row) - 1 for row in rows], 0)
            best = whole(padded)[np.arange(8), at].argmax(1).tolist()
            rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
        return rows

    # The token that most rows come to ends them: some at once, some later, some never.
    often = int(np.bincount(np.concatenate([row[-13:] for row in texts()])).argmax())
    batch.tokens[batch.tokens == STOP] = often
    continued = written(model, batch, stop=(often,), temperature=0.0)
    types = [x.dtype for x in jax.tree.leaves(continued)]
    assert types == [np.int32, np.int32, bool]
    lengths = set()
    for row, expected in enumerate(texts()):
        size = ends[row] - starts[row]
        if row == 4 or not size:
            assert not continued.segments[row].any() and not continued.mask[row].any()
            continue
        if often in expected[size:]:
            expected = expected[: expected.index(often, size) + 1]
        lengths.add(len(expected) - size)
        assert continued.tokens[row].tolist() == expected + [0] * (21 - len(expected))
        assert continued.segments[row].tolist() == [1] * len(expected) + [0] * (21 - len(expected))
        labels = continued.tokens[row, 1:][continued.mask[row]]
        assert labels.tolist() == expected[size:]
        assert np.flatnonzero(continued.mask[row])[0] == size - 1
    assert len(lengths) > 1, "all rows are as long as each other"


def test_lengths():
    rest = on_policy.Config(prompt=8, max_new=99).lengths(20)
    assert rest == (8, 13) and on_policy.Config().lengths(20) == (5, 16)


def test_tokens_that_only_the_writer_has_are_not_written():
    """Vocabularies are padded to unequal widths: the head is cut, the penalty follows it."""
    model, batch = models.load(FIXTURES / "llama-3.2-tied"), rows_of()
    batch.tokens[:] %= 20
    assert eqx.filter_jit(model)(batch.tokens).argmax(-1).max() >= 20
    plain = written(model, batch, vocab=20, temperature=0.0, max_new=3)
    continued = written(model, batch, vocab=20, temperature=0.0, max_new=3, repetition_penalty=1e9)
    for texts in (plain, continued):
        assert texts.tokens.max() < 20
        counts = texts.mask.sum(1)
        assert counts.max() == 3 and counts[3] == 0
    assert (continued.tokens != plain.tokens).any()


def test_the_text_is_of_the_step_and_the_seed(model):
    batch = rows_of()
    continued = written(model, batch, temperature=0.7)
    assert np.array_equal(continued.tokens, written(model, batch, temperature=0.7).tokens)
    other = written(model, batch, step=STEP + 1, temperature=0.7)
    assert not np.array_equal(continued.tokens, other.tokens)
    prompts, lengths = on_policy.row_prompts(jax.tree.map(jnp.asarray, batch), 8, (STOP,))

    def samples(seed: int) -> list[list[int]]:
        decoding = generate.Decoding(13, generate.Sampling(temperature=0.7), (STOP,))
        key = on_policy.step_keys(seed, STEP)[1]
        tokens, counts = generate.sample(model, prompts, lengths, key, decoding)
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    said = [
        row[1:][mask].tolist() for row, mask in zip(continued.tokens, continued.mask, strict=True)
    ]
    assert said == samples(SEED) != samples(SEED + 1)


def test_on_a_mesh_the_text_is_the_same(model):
    batch, mesh = rows_of(), sharding.make_mesh(2, 2, 2)
    alone = written(model, batch, temperature=0.7)
    model = sharding.shard(model, sharding.specs(model, mesh))
    with sharding.use_mesh(mesh):
        there = sharding.from_host(batch, mesh)
        config = on_policy.Config(prompt=8, temperature=0.7)
        split = on_policy.continue_rows(
            model, there, STEP, config=config, seed=SEED, vocab=96, stop=(STOP,)
        )
    for x, batch_x, expected in zip(*map(jax.tree.leaves, (split, there, alone)), strict=True):
        assert x.sharding.is_equivalent_to(batch_x.sharding, x.ndim)
        assert x.dtype == batch_x.dtype
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1)])
def test_no_token_moves_weights_or_a_cache(model, sizes):
    """The copy that writes is gathered once, in the dtype that it computes in."""
    mesh, rows = sharding.make_mesh(*sizes), rows_of()
    settings = dict(config=on_policy.Config(prompt=8), seed=SEED, vocab=96, stop=(STOP,))

    def program(whole):
        def write(frozen, step):
            return on_policy.continue_rows.__wrapped__(
                *frozen, step, **settings, dtype=jnp.bfloat16, whole=whole
            )

        with sharding.use_mesh(mesh):
            split = sharding.row_sharding(mesh)
            batch = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype, sharding=split), rows
            )
            writer = eqx.filter_eval_shape(lambda: model)
            writer = plan.with_shardings(writer, sharding.specs(writer, mesh))
            step = jax.ShapeDtypeStruct((), jnp.int32)
            return plan.compile_abstract(jax.jit(write), ((writer, batch), step))

    def moved(program):
        pattern = r"= (.*?) (?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\(.*while/"
        shapes = " ".join(re.findall(pattern, program.as_text()))
        return re.findall(r"\[[\d,]+\]", shapes)

    assert not moved(program(True))  # numbers alone: how many rows are done
    assert bool(moved(program(False))) == (sizes[1] > 1)


def test_a_step_on_it_counts_what_was_written():
    teacher, student = pair("qwen2-mixed")  # noqa: F811
    objective, optimizer = losses.Objective(losses.Config("reverse_kl")), optim.make(ADAMW, 10)
    continued = written(teacher, rows_of(), temperature=0.7)

    def metrics_on(batch):
        state = distill.init_state(jax.tree.map(jnp.copy, student), optimizer)
        return jax.device_get(distill.step((teacher, batch), state, optimizer, objective)[1])

    metrics = metrics_on(continued)
    assert metrics["counted"] == continued.mask.sum()
    # Prompts and padding are read, and judged by nobody.
    other = continued._replace(tokens=np.where(continued.segments > 0, continued.tokens, 9))
    assert metrics_on(other)["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


def test_the_steps_that_have_one():
    half = on_policy.Config(fraction=0.5)
    drawn = on_policy.on_policy_steps(half, 0, 0, 1000)
    assert 430 < drawn.sum() < 570
    np.testing.assert_array_equal(on_policy.on_policy_steps(half, 0, 640, 700), drawn[640:700])
    assert (on_policy.on_policy_steps(half, 1, 0, 1000) != drawn).any()
    fewer = on_policy.on_policy_steps(on_policy.Config(fraction=0.2), 0, 0, 1000)
    assert (fewer <= drawn).all() and 0 < fewer.sum() < drawn.sum()
    assert on_policy.on_policy_steps(on_policy.Config(fraction=1.0), 0, 0, 1000).all()
    assert not on_policy.on_policy_steps(on_policy.Config(), 0, 0, 1000).any()


# ---- the run ----


def asked(config, **settings):  # noqa: F811
    loss = losses.Config("reverse_kl")
    settings = on_policy.Config(**{"fraction": 0.5, "prompt": 8} | settings)
    return dataclasses.replace(config, student_init="0,2", loss=loss, on_policy=settings, seed=SEED)


@pytest.fixture
def brief(monkeypatch):
    """Runs that neither evaluate nor show samples."""
    monkeypatch.setattr(results, "score", lambda *_: {"eval/ce": 1.0})
    monkeypatch.setattr(results, "samples", lambda *_: iter(()))


def test_a_continued_run_is_the_uninterrupted_one(config, tmp_path, brief):  # noqa: F811
    """Of a narrower student too, whose map is kept in checkpoints and not exported."""
    changed = dataclasses.replace(
        asked(config), loss=losses.Config("reverse_kl", 0.5, features="mse"),
        student_init="random", student_embed=8, mesh=distill.Mesh(data=4, fsdp=2),
    )  # fmt: skip
    folder = distill.train(changed)
    whole, lines = models.load(folder), metrics_of(config.out)
    assert whole.config.embed == 8
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6 and min(line["features"] for line in steps) > 0
    turns = [line["on_policy"] for line in steps]
    assert set(turns[:3]) == set(turns[3:]) == {0, 1}
    card = (Path(folder) / "README.md").read_text()
    assert "50% of the steps on the student's text" in card and "features mse" in card
    cut = tmp_path / "cut"
    shutil.copytree(config.out, cut)
    shutil.rmtree(cut / "student")
    shutil.rmtree(cut / "checkpoints" / "6")
    stored = json.loads((cut / "checkpoints" / "3" / "manifest" / "metadata").read_text())["text"]
    assert json.loads(stored)["arrays"]["learner.projection.weight"][0] == [2, 16, 8]
    continued = models.load(distill.train(dataclasses.replace(changed, out=str(cut))))
    assert eqx.tree_equal(continued, whole)
    assert metrics_of(cut) == lines


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_who_writes_at_a_step(config, teacher, brief, monkeypatch, request, writer):  # noqa: F811
    """The student as the steps before have left it, or the teacher; on any mesh, in parts."""
    places = {"mesh": distill.Mesh(data=2, fsdp=2, tensor=2)}
    if writer == "teacher":
        request.getfixturevalue("one_device")
        places = {"microbatches": 2}
    asks = dataclasses.replace(asked(config, fraction=1.0, writer=writer), **places)
    calls = []
    compile_writer = distill.compile_writer

    def watched(run, state):
        write = compile_writer(run, state)

        def noted(state, batch):
            if len(calls) == 2:
                raise Reached
            assert state.step == len(calls)
            continued = write(state, batch)
            model = run.teacher if writer == "teacher" else state.student
            calls.append(jax.device_get((model, batch, continued)))
            return continued

        return noted

    monkeypatch.setattr(distill, "compile_writer", watched)
    with pytest.raises(Reached):
        distill.train(asks)
    if writer == "teacher":
        assert all(eqx.tree_equal(model, models.load(teacher)) for model, _, _ in calls)
        return
    for step, (model, batch, continued) in enumerate(calls):

        def same(model, step=step, batch=batch, continued=continued) -> float:
            settings = {"config": asks.on_policy, "seed": SEED, "vocab": 2048, "stop": (0,)}
            again = on_policy.continue_rows(model, batch, jnp.array(step), **settings)
            labels = (
                np.asarray(x)[:, 1:][continued.mask] for x in (again.tokens, continued.tokens)
            )
            return np.mean(np.equal(*labels))

        # Where sums are in another order a row may take another turn.
        assert same(model) > 0.8
        assert same(calls[1 - step][0]) < 0.8


@pytest.mark.parametrize(
    ("settings", "more", "says"),
    [
        ({"fraction": 1.5}, {}, "--on-policy.fraction"),
        ({"prompt": 0}, {}, "--on-policy.prompt"),
        ({"max_new": 0}, {}, "--on-policy.max-new"),
        ({"top_p": 0.0}, {}, "--on-policy.top-p"),
        ({"prompt": 33}, {}, "--seq-len 32"),
        ({}, {"loss": losses.Config(alpha=0.0)}, "--loss.alpha 0"),
        ({}, {"loss": losses.Config(alpha=0.0, features="mse")}, "--loss.alpha 0"),
        ({}, {"teacher_devices": 4}, "--teacher-devices"),
        ({}, {"targets": "somewhere"}, "--targets"),
    ],
)
def test_what_is_refused(config, settings, more, says):  # noqa: F811
    with pytest.raises(UserError, match=says) as error:
        distill.train(dataclasses.replace(asked(config, **settings), **more))
    assert "\n" not in str(error.value) and not Path(config.out).exists()
