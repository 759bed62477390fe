"""The step, and whole runs of it on the embedded text with a teacher of a few thousand numbers."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_text import encoder, saved  # noqa: F401

import data
import distill
import eval
import losses
import models
import optim
import sharding
import student as students
from models.llama import Config, Llama
from runtime import (
    checkpoint,
    errors,
    figures,
    plan,
    prepare,
    processes,
    report,
    results,
    resume,
    selection,
)
from runtime.errors import UserError
from text import load_tokenizer
from text.chat import CHATML

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
ADAMW = optim.Config(lr=1e-2, warmup=0, schedule="constant", eps=1e-4)


def batch_of(rows: int = 8, seq: int = 24, seed: int = 0) -> data.Batch:
    """Two documents and some padding in each row; unequal numbers of counted tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 96, (rows, seq + 1)).astype(np.int32)
    ends = rng.integers(seq // 2, seq + 1, rows)
    middles = rng.integers(1, seq // 2, rows)
    index = np.arange(seq + 1)
    segments = 1 + (index >= middles[:, None]).astype(np.int32)
    segments[index > ends[:, None]] = 0
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return data.Batch(tokens, segments, mask & (rng.random(mask.shape) < 0.9))


def pair(name: str = "llama-2") -> tuple:
    teacher = models.load(FIXTURES / name)
    return teacher, students.cut(teacher, {"layers": (0, 2)})


def stepped(teacher, student, batch, steps: int = 1, microbatches: int = 1, **loss):
    objective = losses.Objective(losses.Config(**loss), steps=10, microbatches=microbatches)
    optimizer = optim.make(ADAMW, 10)
    state = distill.init_state(jax.tree.map(jnp.copy, student), optimizer)
    for _ in range(steps):
        state, metrics = distill.step((teacher, batch), state, optimizer, objective)
    return state, jax.device_get(metrics)


def near(a, b, tolerance):
    """Each leaf within `tolerance` of its largest entry."""

    def check(a, b):
        scale = np.abs(np.asarray(b)).max() if np.size(b) else 0.0
        assert np.abs(np.asarray(a) - np.asarray(b)).max(initial=0) <= tolerance * max(scale, 1e-3)

    jax.tree.map(check, a, b)


# ---- the step ----


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    teacher, _ = pair()
    student = students.cut(teacher, {"layers": (0, 1, 2)})
    _, metrics = stepped(teacher, student, batch_of())
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["grad_norm"] < 1e-5
    assert metrics["ce"] > 1


def test_microbatches_change_nothing():
    teacher, student = pair()
    whole, told = stepped(teacher, student, batch_of(), alpha=0.5)
    split, also = stepped(teacher, student, batch_of(), alpha=0.5, microbatches=4)
    for name in ("loss", "divergence", "ce", "grad_norm", "counted"):
        assert also[name] == pytest.approx(told[name], rel=2e-6)
    near(split.student, whole.student, 1e-5)


def test_padding_and_packing_change_nothing():
    teacher, student = pair()
    batch = batch_of()
    wider = data.Batch(
        np.pad(batch.tokens, ((0, 2), (0, 5))),
        np.pad(batch.segments, ((0, 2), (0, 5))),
        np.pad(batch.mask, ((0, 2), (0, 5))),
    )
    reordered = data.Batch(*(part[::-1].copy() for part in wider[:3]))
    _, told = stepped(teacher, student, batch, alpha=0.5)
    for other in (wider, reordered):
        _, also = stepped(teacher, student, other, alpha=0.5)
        for name in ("loss", "divergence", "ce", "counted"):
            assert also[name] == pytest.approx(told[name], rel=1e-6)


def test_a_batch_with_nothing_to_count_changes_nothing():
    teacher, student = pair()
    batch = batch_of()
    empty = batch._replace(mask=np.zeros_like(batch.mask))
    objective = losses.Objective(steps=10)
    optimizer = optim.make(optim.Config(weight_decay=0.0), 10)
    state = distill.init_state(jax.tree.map(jnp.copy, student), optimizer)
    state, metrics = distill.step((teacher, empty), state, optimizer, objective)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    near(state.student, student, 0)


def test_without_a_teacher_it_is_the_cross_entropy():
    teacher, student = pair()
    alone, told = stepped(None, student, batch_of(), alpha=0.0)
    beside, also = stepped(teacher, student, batch_of(), alpha=0.0)
    assert told["loss"] == also["loss"] == told["ce"]
    assert eqx.tree_equal(alone.student, beside.student)


def test_an_update_that_is_not_finite_is_left_out():
    teacher, student = pair()
    broken = eqx.tree_at(lambda model: model.norm, teacher, teacher.norm.at[3].set(jnp.nan))
    state, metrics = stepped(broken, student, batch_of(), steps=2)
    assert metrics["skipped"] == 2 and int(state.step) == 2
    assert eqx.tree_equal(state.student, student)
    fresh = distill.init_state(student, optim.make(ADAMW, 10))
    assert eqx.tree_equal(state.opt_state, fresh.opt_state)


def test_the_step_consumes_its_state_and_nothing_else():
    teacher, student = pair("bloom")
    before = jax.tree.map(np.array, teacher)
    optimizer, objective = optim.make(ADAMW, 10), losses.Objective(steps=10)
    state = distill.init_state(student, optimizer)
    lowered = distill.step.lower((teacher, batch_of()), state, optimizer, objective)
    program = lowered.compile()
    state_size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert program.compiled.memory_analysis().alias_size_in_bytes >= state_size
    program((teacher, batch_of()), state, optimizer, objective)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.student))
    jax.tree.map(np.testing.assert_array_equal, before, teacher)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_on_a_mesh_the_compiled_step_takes_its_own_state_back(name):
    """What it returns lies where it was, whatever the optimizer, and is that of one device."""
    mesh, objective = sharding.make_mesh(2, 2, 2), losses.Objective(losses.Config(alpha=0.5), 10)
    optimizer, pair_of = optim.make(dataclasses.replace(ADAMW, name=name), 10), pair("qwen2-mixed")
    with sharding.use_mesh(mesh):
        teacher, student = (sharding.shard(m, sharding.specs(m, mesh)) for m in pair_of)
        state = distill.init_state(student, optimizer)
        state = jax.device_put(state, plan.state_shardings(state, mesh, sharding.Layout()))
        frozen = teacher, sharding.from_host(batch_of(), mesh)
        program = distill.step.lower(frozen, state, optimizer, objective).compile()
        for _ in range(3):
            state, metrics = program(frozen, state, optimizer, objective)
    assert int(state.step) == 3 and metrics["skipped"] == 0
    if name == "adamw":
        whole, told = stepped(*pair("qwen2-mixed"), batch_of(), steps=3, alpha=0.5)
        for name in ("loss", "divergence", "ce"):
            assert metrics[name] == pytest.approx(told[name], rel=1e-5)
        near(state.student, whole.student, 1e-5)


def test_norms_are_told_per_layer():
    teacher, student = pair()
    objective = losses.Objective(steps=10, norms=True)
    optimizer = optim.make(ADAMW, 10)
    state = distill.init_state(jax.tree.map(jnp.copy, student), optimizer)
    _, metrics = distill.step((teacher, batch_of()), state, optimizer, objective)
    expected = np.sqrt((np.asarray(student.blocks.up) ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(metrics["param_norm/blocks.up"], expected, rtol=1e-5)
    total = sum(np.sum(np.square(v)) for k, v in metrics.items() if k.startswith("grad_norm/"))
    assert np.sqrt(total) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


# ---- the run ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    config = Config(2048, 16, 32, 3, 8, 8, 8, max_positions=64, tied=True, eos=0, pad=0)
    model = Llama(config, jax.random.key(3))
    model = jax.tree.map(lambda leaf: leaf * (10.0 if jnp.std(leaf) > 0 else 1.0), model)
    models.save(model, folder, tokenizer=ROOT / "demo" / "teacher")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "few.txt"
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:60]
    path.write_text("\n\n".join(stories))
    return path


def config_of(teacher: Path, text: Path, out: Path) -> distill.Config:
    return distill.Config(
        teacher=str(teacher), student_layers=2, student_heal="none", seq_len=32, batch_size=8,
        steps=6, eval_every=4, eval_windows=8, save_every=3, log_every=1, quiet=True, out=str(out),
        data=distill.Data(source=(str(text),), documents="paragraph", cache=str(text.parent)),
        optim=optim.Config(lr=1e-2, eps=1e-4),
    )  # fmt: skip


@pytest.fixture
def config(teacher, text, tmp_path) -> distill.Config:
    return config_of(teacher, text, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def one_device(monkeypatch):
    """Programs of eight compile slowly."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def trained(teacher, text, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that has ended, not to be changed, and what the run printed."""
    out, before = tmp_path_factory.mktemp("trained") / "run", contents(teacher)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        assert distill.train(config_of(teacher, text, out)) == out / "student"
    assert contents(teacher) == before
    return out, said.getvalue()


@pytest.fixture
def ended(trained, config, one_device) -> distill.Config:
    """The config of a run that has ended."""
    shutil.copytree(trained[0], config.out)
    return config


@pytest.fixture
def cut(ended) -> distill.Config:
    """The config of a run that was killed after step 3."""
    shutil.rmtree(Path(ended.out) / "student")
    shutil.rmtree(Path(ended.out) / "checkpoints" / "6")
    return ended


def metrics_of(out: str | Path) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in results.OF_ONE_START}
        for line in lines
    ]


def test_what_a_run_leaves(trained, ended, capsys):
    out, printed = Path(ended.out), trained[1]
    folder, lines = out / "student", metrics_of(ended.out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    needed = {"step", "loss", "divergence", "kl", "ce", "grad_norm", "lr", "tokens"}
    assert all(needed <= line.keys() and "on_policy" not in line for line in steps)
    assert steps[-1]["tokens"] == 6 * 8 * 32
    held_out = [line for line in lines if "eval/kl" in line]
    assert [line["step"] for line in held_out] == [0, 4, 6]
    needed = {"eval/ce", "eval/kl", "eval/agreement", "eval/teacher_ce"}
    assert all(needed <= line.keys() for line in held_out)
    assert held_out[-1]["eval/kl"] < held_out[0]["eval/kl"]
    assert json.loads((out / "config.json").read_text())["student_layers"] == 2
    assert len(json.loads((out / "choice.json").read_text())["kept"]) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    titles = re.findall(r'"title":"([^"]*)"', page)
    assert titles == ["run", "Result", "Curves", "Samples", "Start", "Settings"]
    assert '"blocks":{"kept":[' in page and "data:image/png;base64," in page
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert "tiny" in (folder / "README.md").read_text()
    exported = models.load(folder)
    assert exported.config.layers == 2
    assert "student at step 0" in printed and "student at step 6" in printed

    student_before = (folder / "model.safetensors").stat().st_mtime_ns
    distill.train(dataclasses.replace(ended, quiet=False))
    assert "finished" in capsys.readouterr().err
    assert (folder / "model.safetensors").stat().st_mtime_ns == student_before
    shutil.rmtree(folder)
    distill.train(ended)
    assert eqx.tree_equal(models.load(folder), exported)
    assert metrics_of(out) == lines


def test_a_continued_run_is_the_uninterrupted_one(trained, cut):
    assert checkpoint.latest(Path(cut.out) / "checkpoints") == 3
    continued = models.load(distill.train(cut))
    assert eqx.tree_equal(continued, models.load(trained[0] / "student"))
    assert metrics_of(cut.out) == metrics_of(trained[0])


def test_on_another_mesh_a_run_continues(trained, cut, monkeypatch):
    monkeypatch.undo()  # of its one device
    mesh = distill.Mesh(data=2, fsdp=2, tensor=2)
    moved = models.load(distill.train(dataclasses.replace(cut, mesh=mesh)))
    near(moved, models.load(trained[0] / "student"), 1e-3)


def test_other_mathematics_is_not_continued(ended):
    other = dataclasses.replace(ended, loss=losses.Config(alpha=0.5), steps=8)
    with pytest.raises(UserError, match="--loss.alpha was 1.0, is 0.5"):
        distill.train(other)
    distill.train(dataclasses.replace(other, resume=False))
    assert (Path(ended.out + ".1") / "student").exists()
    assert metrics_of(ended.out)[-1]["step"] == 8


def test_cross_entropy_alone_needs_no_teacher(config, one_device, monkeypatch):
    """The teacher is read for the cut and then freed; fresh weights need none of it."""
    loaded = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(a[0]) or load(*a, **k))
    plain = dataclasses.replace(
        config, loss=losses.Config(alpha=0.0), student_init="random", steps=2
    )
    distill.train(plain)
    assert not loaded
    assert "eval/kl" not in metrics_of(config.out)[-1]
    assert not (Path(config.out) / "report.html").exists()
    measured = dataclasses.replace(plain, eval_teacher=True, out=config.out + "-measured")
    distill.train(measured)
    assert loaded and "eval/kl" in metrics_of(measured.out)[-1]


def test_a_run_may_start_from_a_student(trained, config, one_device):
    first = trained[0] / "student"
    distill.train(dataclasses.replace(config, student=str(first), student_layers=None, steps=2))
    ends, begins = metrics_of(trained[0])[-1], metrics_of(config.out)[0]
    assert begins["eval/kl"] == pytest.approx(ends["eval/kl"], rel=1e-5)


def test_a_student_has_the_template_that_it_was_taught_with(config, tmp_path, one_device):
    turns = [("user", "one?"), ("assistant", "one and two and three and four. " * 9)]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "talk.jsonl").write_text((json.dumps(talk) + "\n") * 40)
    text = dataclasses.replace(
        config.data, source=(str(tmp_path / "talk.jsonl"),), mask="assistant",
        chat_template="chatml", held_out=0.5,
    )  # fmt: skip
    folder = distill.train(dataclasses.replace(config, data=text, steps=1))
    assert (folder / "chat_template.jinja").read_text() == CHATML
    text = dataclasses.replace(text, chat_template=None)  # it takes such text by itself now
    again = dataclasses.replace(
        config, data=text, steps=1, student=str(folder), student_layers=None, out=config.out + "-2",
        loss=losses.Config(alpha=0.0),
    )  # fmt: skip
    assert (distill.train(again) / "chat_template.jinja").read_text() == CHATML


def test_a_student_that_was_taught_to_chat_stops_where_a_turn_ends(encoder, tmp_path):  # noqa: F811
    folder = saved(encoder, tmp_path / "tokenizer")
    before = {"eos_token_id": 1, "top_k": 5}
    (folder / "generation_config.json").write_text(json.dumps(before))
    ends = {CHATML: [1, 3], "{{ messages[-1].content + eos_token }}": [1], None: 1}
    for template, eos in ends.items():
        notes = results.chat_files(folder, template)
        after = json.loads(notes.get("generation_config.json", json.dumps(before)))
        assert after == before | {"eos_token_id": eos}
        assert notes.get("chat_template.jinja") == template


def test_a_run_stops_when_nothing_is_finite(config, teacher, tmp_path, one_device):
    broken = tmp_path / "broken"
    model = models.load(teacher)
    model = eqx.tree_at(lambda m: m.norm, model, model.norm.at[0].set(jnp.nan))
    models.save(model, broken, tokenizer=teacher)
    sick = dataclasses.replace(config, teacher=str(broken), student_init="first", steps=40)
    with pytest.raises(UserError, match="not finite"):
        distill.train(sick)
    saved = checkpoint.latest(Path(config.out) / "checkpoints")
    assert saved == results.PATIENCE + 1  # the one that was under way when the last was told


def die(*_, **__):
    raise KeyboardInterrupt


def test_a_finished_run_that_goes_on_keeps_its_student_until_the_new_one_is_whole(
    trained, ended, monkeypatch
):
    longer, folder = dataclasses.replace(ended, steps=8), Path(ended.out) / "student"
    before = models.load(trained[0] / "student")
    for module, name in ((results, "evaluate"), (models, "save")):  # in its steps, and behind them
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, die)
            distill.train(longer)
        assert eqx.tree_equal(models.load(folder), before)
    assert checkpoint.latest(Path(ended.out) / "checkpoints") == 8
    distill.train(longer)
    assert not eqx.tree_equal(models.load(folder), before)


def test_a_finished_run_does_what_other_flags_say_or_refuses_them(trained, ended):
    folder, change = Path(ended.out) / "student", dataclasses.replace
    with pytest.raises(UserError, match="--steps 4: .* is at step 6: give that many or more"):
        distill.train(change(ended, steps=4))
    with pytest.raises(UserError, match="--keep-best was False, is True, but .*is finished: give"):
        distill.train(change(ended, keep_best=True))
    distill.train(change(ended, export_dtype="bfloat16"))
    assert models.load(folder).embedding.dtype == jnp.bfloat16
    distill.train(ended)
    assert eqx.tree_equal(models.load(folder), models.load(trained[0] / "student"))


def test_a_run_goes_on_where_its_curves_cannot_be_drawn(quick, monkeypatch):
    def full(*_):
        raise UserError("curves.png: cannot be written (No space left on device)")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(figures, "curves", full)
        distill.train(quick)
    assert checkpoint.latest(Path(quick.out) / "checkpoints") == 6
    assert distill.train(quick).exists()


def test_the_student_of_the_last_checkpoint_is_exported(trained, cut):
    out = Path(cut.out)
    before = (out / "config.json").read_bytes()
    folder = distill.train(dataclasses.replace(cut, export=True, steps=300))
    assert "in 3 optimizer steps" in (folder / "README.md").read_text()
    assert (out / "config.json").read_bytes() == before
    assert [line["step"] for line in metrics_of(out) if "eval/ce" in line] == [0, 3]
    distill.train(cut)
    assert eqx.tree_equal(models.load(folder), models.load(trained[0] / "student"))


# ---- stopped, continued, kept ----


@pytest.fixture
def quick(config, one_device) -> distill.Config:
    """Without a choice of blocks, which takes longer than the steps."""
    return dataclasses.replace(config, student_init="last")


def test_a_run_that_dies_while_it_ends_is_not_yet_finished(quick, monkeypatch):
    out, quick = Path(quick.out), dataclasses.replace(quick, eval_every=100)
    for module, name in ((figures, "curves"), (models, "save")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, die)
            distill.train(quick)
        assert not (out / "student").exists()
    assert (out / "curves.png").exists() and checkpoint.latest(out / "checkpoints") == 6
    (out / "curves.png").unlink()
    distill.train(quick)
    assert (out / "curves.png").exists() and models.load(out / "student").config.layers == 2


def test_a_time_limit_saves_and_the_run_goes_on_as_if_there_was_none(quick, capsys):
    out = Path(quick.out)
    for step in (1, 2):
        with pytest.raises(SystemExit) as stopped:
            distill.train(dataclasses.replace(quick, time_limit=1e-9))
        assert stopped.value.code == 0
        told = capsys.readouterr().err
        assert f"stopped at step {step}, all is saved; to continue: python" in told
        assert checkpoint.latest(out / "checkpoints") == step
        assert "for the student of this step, add --export" in told
        assert not (out / "student").exists() and (out / "curves.png").exists()
        (out / "curves.png").unlink()
    continued = models.load(distill.train(quick))
    whole = dataclasses.replace(quick, out=quick.out + "-whole")
    assert eqx.tree_equal(continued, models.load(distill.train(whole)))
    assert metrics_of(out) == metrics_of(whole.out)


def test_the_student_of_the_best_evaluation_is_kept(quick, tmp_path, monkeypatch):
    """Figures are made up, with the best at step 2; after it the run is stopped and continued."""
    figures, seen, moments = {0: 3.0, 2: 1.0, 4: 2.0, 6: 1.5}, [], set()
    best = Path(quick.out) / "student-best"
    host = platform.node()
    leftover = best.with_name(f".student-best.{host}-{os.getpid()}-0123abcd-x.partial")
    leftover.mkdir(parents=True)  # of a run that was killed

    def evaluate(run, student):
        seen.append(jax.tree.map(np.array, student))
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return {"eval/kl": [*figures.values()][len(seen) - 1], "eval/ce": 1.0}

    def files() -> frozenset | None:
        if best.exists():
            return frozenset((path.name, path.read_bytes()) for path in best.iterdir())

    def spied(call):
        def spy(*args, **options):
            if threading.current_thread() is threading.main_thread():
                moments.add(files())  # what a kill would leave
            return call(*args, **options)

        return spy

    monkeypatch.setattr(results, "score", evaluate)
    for name in ("mkdir", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, spied(getattr(os, name)))
    config = dataclasses.replace(quick, keep_best=True, eval_every=2)
    with pytest.raises(SystemExit):
        distill.train(config)
    assert checkpoint.latest(Path(quick.out) / "checkpoints") == 3
    kept = files()
    distill.train(config)
    held_out = [line for line in metrics_of(quick.out) if "eval/kl" in line]
    assert {line["step"]: line["eval/kl"] for line in held_out} == figures
    assert files() == kept and len(seen) == 4
    assert eqx.tree_equal(jax.tree.map(np.array, models.load(best)), seen[1])
    assert not eqx.tree_equal(seen[1], seen[3])
    assert not list(best.parent.glob(".student*"))
    assert {None, kept} < moments and len(moments) == 3  # absent, of step 0, of step 2
    [before] = moments - {None, kept}
    (tmp_path / "before").mkdir()
    for name, content in before:
        (tmp_path / "before" / name).write_bytes(content)
    assert eqx.tree_equal(jax.tree.map(np.array, models.load(tmp_path / "before")), seen[0])


def test_what_is_accepted_by_resume_anyway_is_said_and_done(quick, text, tmp_path, capsys):
    out, source = Path(quick.out), tmp_path / "own.txt"
    shutil.copy(text, source)
    quick = dataclasses.replace(
        quick, quiet=False, data=dataclasses.replace(quick.data, source=(str(source),))
    )
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(quick, time_limit=1e-9))  # after its first step
    lines = metrics_of(out)
    source.write_text(source.read_text().replace("Once", "Twice"))
    with pytest.raises(UserError, match=f"other text than {source} holds now"):
        distill.train(quick)
    other = dataclasses.replace(quick, loss=losses.Config(alpha=0.5))
    with pytest.raises(UserError, match="--loss.alpha was 1.0, is 0.5"):
        distill.train(other)
    assert metrics_of(out) == lines
    capsys.readouterr()
    distill.train(dataclasses.replace(other, resume_anyway=True))
    told = capsys.readouterr().err
    assert "continued anyway: --loss.alpha was 1.0, is 0.5\n" in told
    assert f"continued anyway: {out} was trained on other text than {source} holds now\n" in told
    now = metrics_of(out)
    assert now[: len(lines)] == lines
    steps = [line for line in now if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        alpha = 1.0 if line["step"] == 1 else 0.5
        mixed = alpha * line["divergence"] + (1 - alpha) * line["ce"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
        assert line["ce"] > 1.1 * line["divergence"]
    with pytest.raises(UserError, match="--loss.alpha was 0.5, is 1.0"):  # the run is another now
        distill.train(quick)


def test_the_teacher_and_the_held_out_text_are_part_of_a_run(
    quick, teacher, text, tmp_path, capsys
):
    own, source, out = tmp_path / "own", tmp_path / "own.txt", Path(quick.out)
    shutil.copytree(teacher, own)
    shutil.copy(text, source)
    held_out = dataclasses.replace(quick.data, eval_source=str(source))
    quick = dataclasses.replace(quick, teacher=str(own), data=held_out, quiet=False, steps=2)
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(quick, time_limit=1e-9))
    content = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(content[:-4] + bytes(4))
    with pytest.raises(UserError, match=f"another teacher than {own} is now"):
        distill.train(quick)
    source.write_text(source.read_text().replace("Once", "Twice"))
    capsys.readouterr()
    distill.train(dataclasses.replace(quick, resume_anyway=True))
    told = capsys.readouterr().err
    assert f"continued anyway: {out} was trained with another teacher than {own} is now\n" in told
    assert f"continued anyway: {out} was evaluated on other text than {source} holds" in told
    kinds = [line["eval/of"] for line in metrics_of(out) if "eval/ce" in line]
    assert len(set(kinds)) == 2  # of step 0 and of step 2
    distill.train(dataclasses.replace(quick, steps=3))  # the run is another now


def test_an_evaluation_reads_its_windows_however_the_batch_is_cut(config, teacher):
    corpus = data.open_corpus(config.data, teacher, seq_len=32, seed=0, vocab=2048)
    corpus = dataclasses.replace(corpus, held_out=corpus.groups[0])
    counted = set()
    for rows, parts in ((8, 1), (8, 4), (16, 1), (3, 1)):
        cut = dataclasses.replace(config, batch_size=rows, microbatches=parts, eval_windows=5)
        place = prepare.Placement(sharding.make_mesh(devices=jax.devices()[:1]), None, None)
        facts = {"config": cut, "corpus": corpus, "process_rows": (0, 1), "placement": place}
        run = prepare.Run(**dict.fromkeys(prepare.Run._fields) | facts)
        batches, total = run.held_out()
        batches = list(batches)
        assert len(batches) == total == -(-5 // (rows // parts))
        counted.add(sum(int(batch.mask.sum()) for batch in batches))
    assert counted == {int(data.read(corpus, np.arange(5)).mask.sum())}


def test_evaluations_of_other_text_are_not_compared():
    one, other = ({"eval/kl": kl, "eval/of": text} for kl, text in ((1.0, "a"), (2.0, "b")))
    assert results.is_best([one], other) and not results.is_best([one], other | {"eval/of": "a"})


def test_no_resume_moves_aside_whatever_is_there(config):
    out = Path(config.out)
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}")
    resume.make_folder(dataclasses.replace(config, resume=False))
    assert (Path(config.out + ".1") / "metrics.jsonl").exists() and not list(out.iterdir())


def test_checkpoints_without_their_settings_are_refused(config, monkeypatch):
    monkeypatch.setattr(checkpoint, "latest", lambda folder: 3)
    with pytest.raises(UserError, match="checkpoints, but no config.json"):
        resume.last_step(config, resume.make_folder(config))


LOOP, PIPE, MODEL = Path("loop"), None, '{"model_type": "llama", "hidden_size": 16}'
IN_THE_WAY = {
    "checkpoints": {"mine": "cannot be read .Not a dir", LOOP: "cannot be read .Too many levels"},
    "student": dict.fromkeys(("mine", LOOP, PIPE), "more than a checkpoint, so not replaced"),
    "student-best": dict.fromkeys(("mine", LOOP, PIPE), "more than a checkpoint, so not replaced"),
    ".lock": {Path: "cannot be written .Is a dir", LOOP: "cannot be written .Too many levels"},
    "config.json": {"mine": "is damaged", Path: "is damaged", MODEL: "is not from here: give ano"},
    "choice.json": {"mine": "is damaged", Path: "is damaged", PIPE: "is damaged"},
    ".": dict.fromkeys(("mine", LOOP, PIPE), "cannot be written .File exists.*another --out"),
}


@pytest.mark.parametrize(
    "name, content, says", [(n, *case) for n, cases in IN_THE_WAY.items() for case in cases.items()]
)
def test_what_is_in_the_way_of_a_run_is_one_line_and_stays(config, name, content, says):
    path = Path(config.out) / name
    path.parent.mkdir(exist_ok=True)
    if content is PIPE:
        os.mkfifo(path)
    elif content is LOOP:
        path.symlink_to(path.name)
    elif content is Path:
        path.mkdir()
    else:
        path.write_text(content)
    inode = path.lstat().st_ino
    with pytest.raises(UserError, match=says):
        distill.train(dataclasses.replace(config, keep_best=True))
    assert path.lstat().st_ino == inode
    if isinstance(content, str):
        assert path.read_text() == content


def test_a_lock_that_may_not_be_written_is_one_line(config, monkeypatch):
    open_file = os.open

    def refuse(path, *args, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="run/.lock: cannot be written .Permission denied"):
        distill.train(config)


@pytest.mark.parametrize(
    "name",
    ["the version of jax", "the version of this program", "the last checkpoint"]
    + ["the choice of blocks", "the content of --data", "the content of --teacher"],
)
def test_what_differs_between_processes_is_named(quick, monkeypatch, name):
    def gather(facts):
        return [facts, facts | {name: "another"} if name in facts else facts]

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(resume, "sync_global_devices", lambda what: None)
    with pytest.raises(UserError, match=f"{name} is .* in process 0, but another in process 1"):
        if name.startswith("the content"):
            distill.train(quick)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            resume.check_processes(resume.make_folder(quick))


def watched_windows(monkeypatch) -> list:
    """What every later call of `data.windows` gives."""
    read, windows = [], data.windows

    def watch(*args, **options):
        read.append(windows(*args, **options).tolist())
        return windows(*args, **options)

    monkeypatch.setattr(data, "windows", watch)
    return read


def test_with_another_batch_size_a_run_reads_on(quick, monkeypatch):
    windows = data.windows
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(quick, time_limit=1e-9))
    read = watched_windows(monkeypatch)
    again = {"batch_size": 16, "steps": 3, "resume_anyway": True}
    distill.train(dataclasses.replace(quick, **again))
    first = windows(prepare.open_corpus(quick, Path(quick.teacher), 2048), 0, 40).tolist()
    assert set(map(tuple, read)) >= {tuple(first[8:24]), tuple(first[24:40])}
    assert [line["tokens"] for line in metrics_of(quick.out) if "loss" in line] == [
        8 * 32, 24 * 32, 40 * 32,
    ]  # fmt: skip
    assert "1.3k tokens" in (Path(quick.out) / "student" / "README.md").read_text()


def test_with_another_length_of_its_windows_a_run_reads_on(quick, monkeypatch):
    windows = data.windows
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(quick, time_limit=1e-9))
    read = watched_windows(monkeypatch)
    shorter = dataclasses.replace(quick, seq_len=12, steps=3, resume_anyway=True)
    distill.train(shorter)
    first = windows(prepare.open_corpus(shorter, Path(quick.teacher), 2048), 0, 40).tolist()
    assert set(map(tuple, read)) >= {tuple(first[22:30]), tuple(first[30:38])}  # 8 of 32 are 21.3
    assert [line["tokens"] for line in metrics_of(quick.out) if "loss" in line] == [
        8 * 32, 8 * 32 + 8 * 12, 8 * 32 + 16 * 12,
    ]  # fmt: skip


def test_a_narrow_student_is_cut_trained_continued_and_exported(quick, capsys):
    narrow = dataclasses.replace(
        quick, student_layers=None, student_init=None, student_mlp=16, student_heads=4,
        student_kv_heads=4, student_embed=12, student_heal="all", heal_tokens=512,
        loss=losses.Config(features="mse"), quiet=False,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(narrow, time_limit=1e-9))
    printed = capsys.readouterr().err
    before, after = map(float, re.findall(r"KL (\S+) before, (\S+) after", printed)[0])
    assert after < before
    folder = distill.train(narrow)
    shape = models.load(folder).config
    assert (shape.layers, shape.embed, shape.mlp) == (3, 12, 16)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, 4, 8)
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 8
    assert "; 16 of 32 mlp" in (folder / "README.md").read_text()
    assert "3 of the teacher's 3 blocks" in (folder / "README.md").read_text()


def test_a_student_grows_and_is_continued_and_exported(trained, config, one_device):
    """The new run begins with the figures that the shallow student ended with."""
    deeper = dataclasses.replace(
        config, student=str(trained[0] / "student"), student_init="grow-stack", student_layers=4
    )
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(deeper, time_limit=1e-9))
    folder = distill.train(deeper)
    ends, begins = metrics_of(trained[0])[-1], metrics_of(config.out)[0]
    assert begins["eval/kl"] == pytest.approx(ends["eval/kl"], rel=1e-5)
    assert models.load(folder).config.layers == 4
    assert "the weights of student, grown to 4 blocks" in (folder / "README.md").read_text()
    assert distill.with_defaults(dataclasses.replace(deeper, out=None)).out == "runs/tiny-4L"


def test_fresh_weights_with_leaves_of_the_teacher_that_stay(config, teacher, one_device):
    """Without a teacher in the loss, which is read for its leaves and then freed."""
    fresh = dataclasses.replace(
        config, student_init="random", student_copy=("embedding",), loss=losses.Config(alpha=0.0),
        optim=dataclasses.replace(config.optim, train=("blocks.*", "norm")),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--student-copy blocks.\*: student.blocks.* is \(2, 16\)"):
        distill.train(dataclasses.replace(fresh, student_copy=("blocks.*",)))
    assert not Path(config.out).exists()
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(fresh, time_limit=1e-9))
    student, original = models.load(distill.train(fresh)), models.load(teacher)
    np.testing.assert_array_equal(student.embedding, original.embedding)
    assert np.abs(student.norm - 1).max() > 0


def test_leaves_of_a_teacher_with_devices_of_its_own(config, teacher, monkeypatch):
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    apart = dataclasses.replace(
        config, student_init="random", student_copy=("embedding",), teacher_devices=1, steps=1,
        optim=dataclasses.replace(config.optim, freeze=("embedding",)),
    )  # fmt: skip
    student, original = models.load(distill.train(apart)), models.load(teacher)
    np.testing.assert_array_equal(student.embedding, original.embedding)


@pytest.mark.parametrize(
    "tokens, line",
    [(512, r"healing   KL \S+ before"), (32, "healing   left out: .* raise --heal-")],
)
def test_a_cut_is_healed_where_the_text_is_long_enough(quick, capsys, tokens, line):
    config = dataclasses.replace(
        quick, student_heal="auto", heal_tokens=tokens, time_limit=1e-9, quiet=False
    )
    with pytest.raises(SystemExit):
        distill.train(config)
    assert re.search(line, capsys.readouterr().err)


def test_a_share_of_the_parameters_decides_depth_and_width(quick, monkeypatch, capsys, teacher):
    shared = dataclasses.replace(
        quick, student_layers=None, student_init=None, student_params=0.95, quiet=False
    )
    out, cut, cuts = Path(quick.out), selection.cut_and_heal, []

    def die_at_the_second(*args):
        cuts.append(args)
        if len(cuts) == 2:
            raise KeyboardInterrupt
        return cut(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(selection, "cut_and_heal", die_at_the_second)
        distill.train(shared)
    assert not (out / "choice.json").exists()
    assert capsys.readouterr().err.count("candidate ") == 1
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(shared, time_limit=1e-9))
    folder, printed = distill.train(shared), capsys.readouterr().err
    assert printed.count("candidate ") == 1 and "candidate 2 blocks, MLPs of 32" in printed
    choice = json.loads((out / "choice.json").read_text())
    sizes = [(len(entry["kept"]), entry["mlp"]) for entry in choice["candidates"]]
    assert sizes == students.sizes(models.config(str(teacher)), 0.95) == [(3, 16), (2, 32)]
    assert choice["kl"] == min(entry["kl"] for entry in choice["candidates"])
    shape = models.load(folder).config
    assert (shape.layers, shape.mlp) == (len(choice["kept"]), choice["mlp"])
    assert json.loads((out / "config.json").read_text())["student_layers"] is None
    with pytest.raises(UserError, match="--student-params"):
        distill.train(dataclasses.replace(shared, student_params=0.9, steps=8))


@pytest.mark.parametrize("how", ["greedy", "influence"])
def test_a_choice_that_may_take_long_names_the_cheaper_way(quick, monkeypatch, capsys, how):
    monkeypatch.setattr(report, "ELSEWHERE", (0.0, 0.001))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(distill, "loop", die)
        distill.train(dataclasses.replace(quick, student_init=how, quiet=False))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("choosing blocks")]
    assert lines
    assert ("(one pass: --student-init influence)" in lines[0]) == (how == "greedy")


@pytest.mark.parametrize(
    "blocks", [[0, 7], [-1, 0], [1, 0], [0, 0], ["0", "1"], "01", [0, 1.5], [0]]
)
def test_a_choice_of_blocks_that_cannot_be(quick, blocks):
    Path(quick.out).mkdir()
    (Path(quick.out) / "choice.json").write_text(json.dumps({"kept": blocks}))
    corpus = data.open_corpus(quick.data, quick.teacher, seq_len=32, seed=0, vocab=2048)
    with pytest.raises(UserError, match="expected the choice of 2 blocks of 0 to 2, found"):
        selection.choose_or_restore_layers(quick, None, corpus, Path(quick.out))


@pytest.mark.parametrize(
    "kind, before, saves",
    [
        (signal.SIGHUP, signal.SIG_DFL, True),
        (signal.SIGHUP, signal.SIG_IGN, False),  # as nohup starts a program
        (signal.SIGUSR1, signal.SIG_DFL, True),
        (signal.SIGUSR2, signal.SIG_DFL, True),
    ],
)
def test_other_signals_save_too(kind, before, saves):
    previous = signal.signal(kind, before)
    try:
        with processes.Interruption() as interruption:
            os.kill(os.getpid(), kind)
            assert interruption.asked == saves
    finally:
        signal.signal(kind, previous)


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_out_of_memory_names_what_needs_less(error):
    with pytest.raises(UserError, match="out of memory.*--plan.*--remat.*--microbatches"):
        with processes.exit_with_peers():
            raise error


def test_the_best_is_what_the_first_process_finds(monkeypatch, tmp_path):
    run = prepare.Run(**dict.fromkeys(prepare.Run._fields))
    config = distill.Config(keep_best=True)
    exported = []
    monkeypatch.setattr(results, "score", lambda *_: {"eval/kl": 1.0})
    monkeypatch.setattr(results, "export", lambda *_: exported.append(1))
    for best in (False, True):
        monkeypatch.setattr(results, "process_allgather", lambda own, best=best: [best, not best])
        run = run._replace(config=config, out=tmp_path)
        results.evaluate(run, pair()[1], 1, report.Log(None, steps=1))
        assert bool(exported) == best


def test_another_spelling_of_the_text_is_the_same_setting(ended, text, monkeypatch):
    monkeypatch.chdir(text.parent)
    (text.parent / "below").mkdir(exist_ok=True)
    for name in (text.name, f"./{text.name}", f"below/../{text.name}"):
        again = dataclasses.replace(ended.data, source=(name,))
        distill.train(dataclasses.replace(ended, data=again))  # finished, not another run's


@pytest.mark.parametrize("steps", ["4:5", "1:2", "7:9"])
def test_a_run_that_is_continued_is_traced_where_its_steps_come(cut, steps):
    """The first of them may lie before the steps that are left, or after."""
    assert distill.train(dataclasses.replace(cut, profile_steps=steps)).exists()
    files = (Path(cut.out) / "trace").rglob("*.xplane.pb")
    assert any(path.stat().st_size for path in files) == (steps == "4:5")
    assert (Path(cut.out) / "trace").exists() == (steps == "4:5")


@pytest.mark.parametrize("steps", ["3", "3:2", "0:2", "a:b", "1:2:3", ":", "1:", "1.5:2", ""])
def test_steps_that_cannot_be_traced(steps):
    with pytest.raises(UserError, match="expected a:b, the first and last step"):
        arguments("--profile-steps", steps)


def test_damaged_notes_are_named(ended):
    (Path(ended.out) / "config.json").write_text('{"teacher": ')
    with pytest.raises(UserError, match="config.json is damaged"):
        distill.train(ended)


def test_a_run_that_needs_no_teacher_is_continued_from_nothing(quick, monkeypatch):
    """Killed after its blocks were chosen, before its first checkpoint."""
    alone = dataclasses.replace(quick, loss=losses.Config(alpha=0.0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "loop", die)
        distill.train(alone)
    assert (Path(alone.out) / "choice.json").exists()
    continued = models.load(distill.train(alone))
    whole = dataclasses.replace(alone, out=alone.out + "-whole")
    assert eqx.tree_equal(continued, models.load(distill.train(whole)))


def test_a_held_out_text_too_short_for_samples(quick, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("The fox ran.")
    with_it = dataclasses.replace(quick.data, eval_source=str(short))
    assert distill.train(dataclasses.replace(quick, data=with_it, steps=1)).exists()
    assert "gap recovered" in capsys.readouterr().out


def test_what_is_refused_leaves_the_run_as_it_was(ended):
    note = Path(ended.out) / "config.json"
    before = note.read_bytes()
    lion = dataclasses.replace(ended.optim, name="lion")
    other = dataclasses.replace(ended, optim=lion, steps=8, resume_anyway=True)
    with pytest.raises(UserError, match="opt_state"):
        distill.train(other)
    assert note.read_bytes() == before
    with pytest.raises(UserError, match="--steps 4"):  # finished beyond that
        distill.train(dataclasses.replace(ended, steps=4))
    assert note.read_bytes() == before
    shallow = dataclasses.replace(ended, student_layers=1, steps=8, resume_anyway=True)
    with pytest.raises(UserError, match="expected the choice of 1 blocks"):
        distill.train(shallow)
    distill.train(dataclasses.replace(ended, steps=7))
    assert json.loads(note.read_text())["steps"] == 7


def test_an_end_that_moves_to_an_earlier_save_is_evaluated(quick):
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(quick, time_limit=1e-9, profile_steps="1:5"))
    assert list((Path(quick.out) / "trace").rglob("*.xplane.pb"))  # it ended with the run
    distill.train(dataclasses.replace(quick, steps=1))
    told = [line["step"] for line in metrics_of(quick.out) if "eval/ce" in line]
    assert told == [0, 1]


def test_a_student_alone_reads_what_it_would_read_beside_its_teacher():
    words = ["--student", str(ROOT / "demo" / "teacher")]
    beside, alone = (
        distill.with_defaults(arguments(*words, *more)) for more in ([], ["--loss.alpha", "0"])
    )
    assert (alone.data, alone.seq_len) == (beside.data, beside.seq_len)


def test_figures_that_are_not_finite_are_null(teacher, text, tmp_path, capsys, monkeypatch):
    model = models.load(teacher)
    wild = eqx.tree_at(lambda model: model.norm, model, model.norm * 1e6)
    none = eqx.tree_at(lambda model: model.norm, model, model.norm * jnp.nan)
    for name, broken in (("wild", wild), ("none", none)):
        models.save(broken, tmp_path / name, tokenizer=teacher)
        monkeypatch.setattr(sys, "argv", [
            "eval.py", "--model", str(tmp_path / name), "--data.source", str(text), "--json",
            "--seq-len", "32", "--data.documents", "paragraph", "--data.cache", str(text.parent),
        ])  # fmt: skip
        eval.main()
        printed = capsys.readouterr().out
        found = json.loads(printed, parse_constant=lambda word: pytest.fail(word))
        assert (found["perplexity"] is None) == (name == "none")


def arguments(*words: str) -> distill.Config:
    return errors.cli(distill.Config, words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loss.divergnce", "jsd"], "--loss.divergence"),
        (["--learning-rate", "1e-3"], "; instead of --learning-rate it has --optim.lr$"),
        (["--max_steps", "3"], "; instead of --max-steps it has --steps$"),
        (["--output-dir", "a"], "; instead of --output-dir it has --out$"),
        (["--num-layers", "3"], "; instead of --num-layers it has --student-layers$"),
        (["--data", "a"], "; instead of --data it has --data.source$"),
        (["--dataset", "a"], "; instead of --dataset it has --data.source$"),
        (["--version"], "; instead of --version it has the commit of its checkout"),
        (["--loss.divergence", "forwardkl"], "forward_kl"),
        (["--loss.alpha", "1.5"], "alpha"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "10", "--microbatches", "3"], "--microbatches"),
        (["--student-init", "greeedy"], "greedy"),
        (["--optim.lr", "-1"], "--optim.lr"),
        (["--student", "x", "--student-init", "first"], "--student-init with --student"),
        (["--student-init", "grow"], "--student-init grow: give the --student that is to grow"),
        (["--student-copy", "head"], "--student-copy: .* add --student-init random"),
        (["--student", "x", "--student-copy", "head"], "--student-copy: it is for fresh weights"),
        (["--student-params", "1"], "--student-params is 1.0: it must be from 0 to below 1"),
        (["--student-params", "0.5", "--student-layers", "2"], "it decides which blocks"),
        (["--student-params", "0.5", "--student-mlp", "8"], "it decides which blocks"),
        (["--student-params", "0.5", "--student-init", "random"], "it decides which blocks"),
        (["--student-params", "0.5", "--student-init", "0,2"], "it decides which blocks"),
        (["--student-params", "0.5", "--student", "x"], "it decides which blocks"),
    ],
)
def test_flags_that_cannot_be(words, says):
    with pytest.raises(UserError, match=says) as error:
        arguments(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"student_layers": 9}, "--student-layers is 9"),
        ({"seq_len": 65}, "--seq-len 65"),
        ({"seq_len": 64, "batch_size": 4096}, "too little text"),
        ({"batch_size": 12}, "do not divide over 8"),
        ({"teacher": "/nowhere"}, "/nowhere"),
        (
            {"mesh": distill.Mesh(fsdp=4, tensor=2, rules=("batch=fsdp,tensor",)), "batch_size": 4},
            "do not divide over 8 devices of the mesh axes fsdp, tensor",
        ),
        ({"student_embed": 32}, "--student-init random"),
        (
            {"student_embed": 32, "student": str(FIXTURES / "llama-2"), "student_layers": 3},
            "beside --student",
        ),
        ({"student_init": "0,7"}, "must list 2 of the teacher's blocks"),
        ({"student_heads": 4}, "--student-heads is 4: each of 8 key and value heads"),
        (
            {"student_params": 0.01, "student_layers": None},
            "--student-params 0.01: a student of one block is larger than that",
        ),
        (
            {"teacher": str(FIXTURES / "bloom"), "student_mlp": 8},
            "--student-mlp with a bloom teacher: its config cannot say so",
        ),
        ({"seed": -1}, "--seed is -1"),
        ({"mesh": distill.Mesh(fsdp=3)}, "mesh"),
        ({"out": "/proc/nothing"}, "--out"),
        ({"out": __file__}, "--out"),
    ],
)
def test_runs_that_cannot_be(config, change, says):
    with pytest.raises(UserError, match=says) as error:
        distill.train(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)


def test_a_refused_start_leaves_no_folder(quick, tmp_path):
    new = tmp_path / "new" / "run"
    refused = dataclasses.replace(quick, out=str(new), batch_size=10**6)
    with pytest.raises(UserError, match="too little text"):
        distill.train(refused)
    assert not new.parent.exists()
    with pytest.raises(UserError, match="--export with --no-resume: leave one out"):
        dataclasses.replace(refused, export=True, resume=False)
    with pytest.raises(UserError, match="--export: .* has no checkpoint yet"):
        distill.train(dataclasses.replace(refused, export=True))
    assert not new.parent.exists()
    new.mkdir(parents=True)
    with pytest.raises(UserError, match="too little text"):
        distill.train(refused)
    assert new.exists()


def test_other_tokenizers_are_refused_by_their_first_id(config, teacher, tmp_path):
    other = tmp_path / "other"
    models.save(models.load(teacher), other, tokenizer=teacher)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {index: token for token, index in vocabulary.items()}
    vocabulary[by_id[1500]], vocabulary[by_id[1501]] = 1501, 1500
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="id 1500"):
        distill.train(dataclasses.replace(config, student=str(other), student_layers=None))


# ---- eval.py ----


def test_figures_do_not_depend_on_batches(config, teacher, text):
    corpus = data.open_corpus(
        dataclasses.replace(config.data, held_out=1.0), teacher, seq_len=32, seed=0, vocab=2048
    )
    model, other = (
        models.load(teacher),
        students.cut(models.load(teacher), {"layers": (0, 2)}),
    )
    found = [
        eval.evaluate(other, model, data.evaluation(corpus, rows), chunk=chunk)
        for rows, chunk in ((8, 512), (5, 64))
    ]
    assert found[0]["tokens"] == found[1]["tokens"] == corpus_tokens(corpus)
    for name in found[0]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def corpus_tokens(corpus) -> int:
    batches = list(data.evaluation(corpus, 8))
    return int(sum(batch.mask.sum() for batch in batches))


def test_eval_prints_one_object(teacher, text, tmp_path, capsys, monkeypatch):
    words = ["--model", str(teacher), "--teacher", str(teacher), "--data.source", str(text)]
    words += ["--data.cache", str(tmp_path), "--seq-len", "32", "--json"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    eval.main()
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "tokens", "ce", "perplexity", "bits_per_byte", "kl", "reverse_kl", "agreement",
        "teacher_ce", "teacher_perplexity", "teacher_bits_per_byte",
    ]  # fmt: skip
    assert found["kl"] == pytest.approx(0, abs=1e-5) and found["agreement"] == 1
    assert found["ce"] == found["teacher_ce"] == pytest.approx(np.log(found["perplexity"]))
    encoder = load_tokenizer(teacher).encoder  # of one document, by file, all but its first token
    size = len(text.read_bytes()) - len(encoder.decode(encoder.encode(text.read_text()).ids[:1]))
    assert found["bits_per_byte"] == pytest.approx(found["ce"] * found["tokens"] / np.log(2) / size)
    assert found["teacher_bits_per_byte"] == found["bits_per_byte"]


@pytest.fixture
def scored(monkeypatch, capsys):
    """The figures that eval.py prints."""

    def scored(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words), "--json"])
        eval.main()
        return json.loads(capsys.readouterr().out)

    return scored


def test_eval_scores_the_student_of_a_run_on_what_it_held_out(trained, ended, scored):
    figures = scored("--run", ended.out)
    assert figures["kl"] > 0 and figures["tokens"] < 8 * 32 * 8
    shares = [figures["teacher_bits_per_byte"] / figures["bits_per_byte"]]
    assert shares == [pytest.approx(figures["teacher_ce"] / figures["ce"])]
    last = metrics_of(trained[0])[-1]
    part = scored("--run", ended.out, "--windows", ended.eval_windows)
    for name in ("ce", "kl", "agreement", "teacher_ce"):
        assert part[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5)
    assert scored("--run", ended.out, "--windows", 1)["tokens"] <= 32
    shutil.rmtree(Path(ended.out) / "student")
    with pytest.raises(UserError, match="--run .*run: it has no student yet: .* --export"):
        scored("--run", ended.out)


def test_eval_heeds_what_is_held_out(teacher, text, tmp_path, scored):
    words = ["--model", teacher, "--data.cache", tmp_path, "--data.documents", "paragraph"]
    words += ["--seq-len", 32]
    everything = scored(*words, "--data.source", text)
    part = scored(*words, "--data.source", text, "--data.held-out", 0.2)
    assert 0.1 < part["tokens"] / everything["tokens"] < 0.4
    assert scored(*words, "--data.eval-source", text) == everything


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--run or --model: give one of the two"),
        ("--run a --model b", "--run or --model: give one of the two"),
        ("--model b", "--data.source is missing"),
        ("--run a --data.source b", "--data with --run: it has its text"),
        ("--model demo/teacher --data.source b --html c", "--html: .* give --teacher"),
        ("--model a --tasks b --html c", "--tasks with --html or --data.source: .* give one"),
        ("--run a", "a/config.json .*: give the folder of a run"),
    ],
)
def test_what_eval_cannot_score(words, says, scored):
    with pytest.raises(UserError, match=says):
        scored(*words.split())


def test_a_students_folder_with_files_of_the_users_is_refused_before_the_run(
    quick, tmp_path, monkeypatch
):
    out, steps = Path(quick.out), quick.steps
    distill.train(dataclasses.replace(quick, steps=2))
    (out / "student-best").mkdir()
    more = dataclasses.replace(quick, steps=steps, keep_best=True)
    monkeypatch.setattr(distill, "prepare_state", None)  # what comes next
    for name in ("student", "student-best"):
        mine = out / name / "mine.gguf"
        mine.write_text("mine")
        with pytest.raises(UserError, match=f"{name}: more than a checkpoint, so not replaced"):
            distill.train(more)
        assert mine.read_text() == "mine"
        mine.unlink()
    monkeypatch.undo()
    for name in ("student", "student-best", "checkpoints"):  # moved to a larger disk
        shutil.move(out / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    names = ("config.json", "metrics.jsonl", "curves.png")
    files = {name: (out / name).read_bytes() for name in names}
    for name in files:  # no other link is written through
        shutil.move(out / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    distill.train(more)
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert not any((out / name).is_symlink() for name in files)
    assert checkpoint.latest(tmp_path / "checkpoints") == steps
    for name in ("student", "student-best"):
        assert (out / name).is_symlink() and models.load(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
