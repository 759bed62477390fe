"""A grid of runs: which there are, what is left of them, and how they end."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import matplotlib.figure
import pytest

import distill
import models
import sweep
from models.llama import Config as LlamaConfig
from models.llama import Llama
from runtime import errors, results
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = [
    "--steps", "6", "--batch-size", "8", "--seq-len", "32", "--student-init", "first",
    "--student-layers", "1", "--student-heal", "none", "--eval-windows", "8", "--log-every", "1",
    "--optim.clip", "0", "--quiet",
]  # fmt: skip


def run_of(swept, kl=0.5, *, status="finished", shared=()):
    swept = {f"--{name}": str(value) for name, value in swept.items()}
    folder = ",".join(f"{name}={value}" for name, value in swept.items())
    figures = {"eval/kl": kl, "eval/ce": None if kl is None else kl + 1, "loss": 2.0}
    end = {"status": status, **figures, "steps": 7, "seconds": 1.5}
    return {"swept": swept, "shared": list(shared), "folder": folder, "arguments": [folder]} | end


def swept_by(out):
    """The flags and the statuses in sweep.jsonl."""
    lines = map(json.loads, (out / "sweep.jsonl").read_text().splitlines())
    return {tuple(run["swept"].values()): run["status"] for run in lines}


def test_every_combination_has_a_run_and_a_folder_of_its_own():
    words = "--optim.lr 1e-4 3e-4 1e-4 --data.source a/b.txt -- --steps 5 --no-resume".split()
    out, runs = sweep.parse(words)
    assert str(out) == "runs/sweep"
    assert [run["swept"] for run in runs] == [
        {"--optim.lr": rate, "--data.source": "a/b.txt"} for rate in ("1e-4", "3e-4")
    ]
    folder = "runs/sweep/optim.lr=3e-4,data.source=a%b.txt"
    flags = ["--steps", "5", "--no-resume", "--optim.lr", "3e-4", "--data.source", "a/b.txt"]
    assert runs[1]["folder"] == folder and runs[1]["arguments"] == [*flags, "--out", folder]
    assert len(sweep.parse("--seed 0 1 2 --steps 1 2 --out x".split())[1]) == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no flag: expected values, as --optim.lr"),
        ("-- --steps 3", "no flag: expected values, as --optim.lr"),
        ("--seed", "--seed: expected values"),
        ("--keep-best --seed 1", "--keep-best --seed 1: expected values"),
        ("3 --seed 1", "3 --seed 1: expected values"),
        ("--seed 0 --seed 1", "--seed is given twice"),
        ("--out s3://x --seed 1", "--out is s3:/x/seed=1: it must be a path"),
        ("--seed 0 -- --seed 1", "--seed is given twice"),
        ("--seed 0 -- --out x", "--out is given twice"),
        ("--optm.lr 1 2", "Unrecognized options: --optm.lr, 1; Perhaps you meant: --optim.lr"),
        ("--optim.lr 1e-3 fast", "Error parsing --optim.lr: .* 'fast'"),
        ("--optim.lr 1e-3 -1", "--optim.lr is -1.0: it must be above 0"),
        ("--seed 0 1 -- --stepz 3", "Unrecognized options: --stepz, 3; Perhaps you meant: --steps"),
    ],
)
def test_a_typo_costs_no_run(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words.split()])
    monkeypatch.setattr(sweep, "call", lambda arguments: pytest.fail("a run began"))
    with pytest.raises(UserError, match=f"^{says}") as error:
        sweep.main()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("exit_status", "exported", "status"),
    [
        (0, 4, "finished"),
        (0, 2, "stopped"),  # an earlier end, before --steps was raised
        (0, None, "stopped"),
        (results.NotFinite.status, None, "diverged"),
        (1, 4, "failed"),
        (-9, None, "failed"),
    ],
)
def test_how_a_run_ends_and_its_last_figures(exit_status, exported, status, tmp_path):
    lines = [
        {"step": 0, "eval/ce": 5.0, "eval/kl": 2.0},
        {"step": 2, "loss": 3.0, "tokens": 100, "tokens_per_second": 50.0},
        {"step": 4, "loss": 1.0, "ce": 9.0, "kl": 9.0, "tokens": 200, "tokens_per_second": 25.0},
        {"step": 4, "eval/ce": 4.0, "eval/kl": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 4}))
    if exported is not None:
        (tmp_path / "exported.json").write_text(json.dumps({"step": exported}))
    run = sweep.outcome({"folder": str(tmp_path)}, exit_status)
    assert run["status"] == status and run["steps"] == 4
    assert (run["eval/kl"], run["eval/ce"], run["loss"]) == (1.5, 4.0, 1.0)
    assert run["seconds"] == pytest.approx(6.0)


def test_a_run_that_left_nothing_has_no_figures(tmp_path):
    run = sweep.outcome({"folder": str(tmp_path / "none")}, 1)
    assert (run["status"], run["steps"], run["loss"]) == ("failed", 0, None)


@pytest.fixture
def panels(monkeypatch):
    """The panels of the picture that is drawn, by title."""
    sheets, Figure = [], matplotlib.figure.Figure
    monkeypatch.setattr(
        matplotlib.figure, "Figure", lambda **more: sheets.append(Figure(**more)) or sheets[-1]
    )
    return lambda: {panel.get_title(): panel for panel in sheets[-1].axes}


def test_the_picture_has_a_line_for_each_width_and_the_mean_of_seeds(tmp_path, panels):
    runs = [
        run_of({"optim.lr": rate, "student-embed": width, "seed": seed}, kl)
        for rate, width, seed, kl in (
            ("3e-3", 64, 0, 0.4), ("3e-3", 64, 1, 0.2), ("1e-3", 64, 0, 0.6), ("1e-3", 64, 1, 0.6),
            ("1e-3", 128, 0, 0.5),
        )
    ]  # fmt: skip
    diverged = run_of({"optim.lr": "1", "student-embed": 64, "seed": 0}, 9.0, status="diverged")
    table = sweep.write(tmp_path, [*runs, diverged])
    kl = panels()["held-out KL"]
    assert kl.get_xscale() == "log" and kl.get_xlabel() == "--optim.lr"
    lines = {line.get_label(): line.get_xydata().tolist() for line in kl.lines}
    assert lines.keys() == {"--student-embed 64", "--student-embed 128"}
    assert lines["--student-embed 64"] == [[1e-3, 0.6], [3e-3, pytest.approx(0.3)]]
    assert lines["--student-embed 128"] == [[1e-3, 0.5]]
    band = kl.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band if point[0] == 3e-3} == {(3e-3, 0.2), (3e-3, 0.4)}
    assert [label.get_text() for label in kl.get_xticklabels()] == ["3e-3", "1e-3", "1"]
    header, first, *_, last = table.splitlines()
    assert header.split()[:4] == ["--optim.lr", "--student-embed", "--seed", "status"]
    assert first.split() == [
        "3e-3",
        "64",
        "0",
        "finished",
        "0.4000",
        "1.4000",
        "2.0000",
        "7",
        "1.5",
    ]
    assert last.split()[:4] == ["1", "64", "0", "diverged"]
    assert (tmp_path / "sweep.md").read_text().count("\n") == 8
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("runs", "axis", "labels"),
    [
        ([run_of({"loss.divergence": x, "loss.alpha": a}) for x in "ab" for a in (0.5, 1)],
         "--loss.alpha", {"--loss.divergence a", "--loss.divergence b"}),
        ([run_of({"loss.divergence": x, "seed": s}) for x in "ab" for s in "01"],
         "--loss.divergence", {""}),
        ([run_of({"topology": a}) for a in ("1.2.3", "e5")], "--topology", {""}),
        ([run_of({"loss.alpha": a}) for a in (0, 1)], "--loss.alpha", {""}),  # 0 has no logarithm
        ([run_of({"seed": s}) for s in (1, 2)], "--seed", {""}),
        ([run_of({"seed": s}, None) for s in (1, 2)], "--seed", set()),
    ],
)  # fmt: skip
def test_the_picture_of_other_sweeps(runs, axis, labels, tmp_path, panels):
    sweep.write(tmp_path, runs)
    kl = panels()["held-out KL"]
    assert kl.get_xlabel() == axis and {line.get_label() for line in kl.lines} <= labels | {
        "_child0"
    }
    assert len(kl.lines) == len(labels)
    assert (kl.get_xscale() == "log") == (axis == "--loss.alpha" and len(labels) == 2)


PROGRAM = """
import pathlib, signal, sys, time
asked, out = [], pathlib.Path(sys.argv[1])
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda kind, _: asked.append(kind))
(out / "begun").touch()
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
(out / "saved").write_text(str(asked))
"""


def test_a_signal_reaches_the_run_once_and_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "distill.py").write_text(PROGRAM)
    monkeypatch.setattr(sweep, "__file__", str(tmp_path / "sweep.py"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep.call([str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
    assert (tmp_path / "saved").read_text() == f"[{signal.SIGTERM.value}]"


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Starts a sweep whose runs are of this process, and returns what it printed last."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    config = LlamaConfig(2048, 16, 32, 2, 2, 2, 8, max_positions=64, tied=True, eos=0, pad=0)
    teacher = Llama(config, jax.random.key(3))
    models.save(teacher, tmp_path / "teacher", tokenizer=ROOT / "demo" / "teacher")
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:60]
    (tmp_path / "text.txt").write_text("\n\n".join(stories))
    shared = [*TINY, "--teacher", f"{tmp_path / 'teacher'}", "--data.source"]
    shared += [f"{tmp_path / 'text.txt'}", "--data.cache", f"{tmp_path / 'cache'}"]
    calls = []

    def call(words):
        calls.append(words)
        try:
            errors.run(lambda: distill.train(errors.cli(distill.Config, words)))
        except SystemExit as ended:
            return ended.code
        return 0

    def start(*words, more=()):
        out = ["--out", str(tmp_path / "sweep")]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *out, *words, "--", *shared, *more])
        calls.clear()
        try:
            sweep.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return len(calls), capsys.readouterr().out.splitlines()[-1]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sweep, "call", call)
    return start


def test_a_sweep_and_then_more_of_it(start, tmp_path, capsys):
    """Runs that are there are not repeated, and stay in the table while the other flags agree."""
    out = tmp_path / "sweep"
    calls, best = start("--optim.lr", "1e-3", "1e30")
    assert calls == 2 and swept_by(out) == {("1e-3",): "finished", ("1e30",): "diverged"}
    run = json.loads((out / "sweep.jsonl").read_text().splitlines()[0])
    metrics = (out / "optim.lr=1e-3" / "metrics.jsonl").read_text().splitlines()
    assert run["eval/kl"] == json.loads(metrics[-1])["eval/kl"] and run["steps"] == 6
    assert best.startswith("best      python distill.py --steps 6 ")
    assert best.endswith(f" --optim.lr 1e-3 --out {out / 'optim.lr=1e-3'}")
    assert start("--optim.lr", "1e-3") == (0, best) and len(swept_by(out)) == 2
    # Of a table with other shared flags nothing stays, and the run itself says that it is finished.
    assert start("--optim.lr", "1e-3", more=["--keep", "1"])[0] == 1
    assert swept_by(out) == {("1e-3",): "finished"}


def test_the_best_is_a_mean_over_seeds(tmp_path, monkeypatch, capsys):
    runs = [
        run_of({"optim.lr": rate, "seed": seed}, kl) | {"arguments": ["--seed", f"{seed}", rate]}
        for rate, kls in (("1", (0.1, 0.9)), ("2", (0.5, 0.3)), ("3", (0.6, 0.7)))
        for seed, kl in enumerate(kls)
    ]
    (tmp_path / "sweep.jsonl").write_text("\n".join(map(json.dumps, runs)))
    words = ["--out", str(tmp_path), "--optim.lr", "1", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "optim.lr=1,seed=0").mkdir()  # that run is not repeated
    sweep.main()
    assert capsys.readouterr().out.splitlines()[-1].endswith("python distill.py --seed 0 2")


def test_a_refusal_by_a_run_ends_the_sweep(start, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        start("--student-embed", "16", "63", "8")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --student-embed is 63")
    assert swept_by(tmp_path / "sweep") == {("16",): "finished"}
