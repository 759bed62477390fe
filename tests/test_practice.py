"""What a practitioner counts on: amounts, saves by the clock, cards, and the figures of a run."""

import dataclasses
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import numpy as np
import pytest
import yaml
from test_distill import (  # noqa: F401
    FIXTURES,
    config,
    one_device,
    quick,
    teacher,
    text,
)

import config as configs
import data
import distill
import generate
import models
from runtime import (
    card,
    checkpoint,
    commits,
    errors,
    files,
    prepare,
    processes,
    report,
    results,
    trackers,
)
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]


# ---- how long a run is ---------------------------------------------------------------------------


def test_steps_may_be_said_in_tokens(quick):  # noqa: F811
    asked = dataclasses.replace(quick, steps=None, tokens=1000)  # of 8 x 32 a step
    assert distill.with_defaults(asked).steps == 4
    assert distill.with_defaults(distill.with_defaults(asked)).steps == 4
    with pytest.raises(UserError, match="--steps and --tokens: leave one out"):
        dataclasses.replace(asked, steps=2)


def test_steps_may_be_said_in_epochs(quick):  # noqa: F811
    asked = distill.with_defaults(dataclasses.replace(quick, steps=None, epochs=0.5))
    folder = prepare.tokenizer_folder(asked)
    corpus = prepare.open_corpus(asked, folder, models.config(folder).vocab)
    asked = dataclasses.replace(quick, steps=None, epochs=0.5)
    steps = -(-corpus.windows // 16)
    assert distill.with_defaults(prepare.with_epochs(asked)).steps == steps
    with pytest.raises(UserError, match="--tokens and --epochs: leave one out"):
        dataclasses.replace(asked, tokens=2)


def test_by_default_a_run_is_as_long_as_its_model_is_large(monkeypatch):
    demo = distill.with_defaults(distill.Config())
    assert (demo.steps, demo.eval_every, demo.save_every) == (300, 100, 100)
    assert demo.export_dtype == "float32"
    small = distill.Config(teacher=str(FIXTURES / "llama-2"), seq_len=32)
    assert distill.with_defaults(small).steps == 300
    parameters = 20 * 16 * 32 * 4000  # a token each for twenty: 4,000 steps of 16 x 32
    large = models.abstract(FIXTURES / "llama-2")
    leaf = large.embedding.update(shape=(parameters // 16, 16))
    monkeypatch.setattr(configs.jax.tree, "leaves", lambda tree: [leaf])
    long = distill.with_defaults(small)
    assert (long.steps, long.eval_every, long.save_every) == (4000, 400, 200)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 3e-4),
        ({"student_init": "random"}, 1e-3),
        ({"student": str(FIXTURES / "llama-2")}, 5e-5),
        ({"student": str(FIXTURES / "llama-2"), "student_init": "grow", "student_layers": 4}, 3e-4),
        ({"student_init": "random", "optim": distill.Optim(lr=0.1)}, 0.1),
    ],
)
def test_rates_follow_what_a_student_begins_as(flags, expected):
    config = distill.Config(teacher=str(FIXTURES / "llama-2"), seq_len=32, **flags)
    assert distill.with_defaults(config).optim.lr == expected


def test_checkpoints_by_the_clock(quick, monkeypatch):  # noqa: F811
    saved = []
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda self, step, *_: saved.append(step))
    clocked = dataclasses.replace(quick, save_every=None, save_minutes=1e-9)
    distill.train(clocked)
    assert saved == [1, 2, 3, 4, 5, 6]
    saved.clear()
    hourly = dataclasses.replace(clocked, save_minutes=60.0, out=quick.out + "-hourly")
    distill.train(hourly)
    assert saved == [6]


# ---- what a run says of itself -------------------------------------------------------------------


def test_a_run_says_that_an_earlier_student_was_better(quick, monkeypatch, capsys):  # noqa: F811
    figures = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(
        results, "score", lambda *_: {"eval/ce": 1.0, "eval/kl": next(figures), "eval/of": "x"}
    )
    distill.train(quick)
    assert "best     at step 4: --keep-best keeps such a student" in capsys.readouterr().out


def test_lines_of_metrics_hold_means_time_speed_and_memory(quick):  # noqa: F811
    every = dataclasses.replace(quick, log_every=1)
    distill.train(every)
    third = dataclasses.replace(quick, log_every=3, out=quick.out + "-third")
    distill.train(third)
    lines = (report.read_metrics(Path(c.out) / "metrics.jsonl") for c in (every, third))
    ones, threes = ([line for line in x if "loss" in line] for x in lines)
    assert [line["step"] for line in threes] == [3, 6]
    for name in ("loss", "divergence", "ce"):
        values = [line[name] for line in ones]
        assert [line[f"mean_{name}"] for line in ones] == values
        means = np.reshape(values, (2, 3)).mean(axis=1)
        assert np.allclose([line[f"mean_{name}"] for line in threes], means, rtol=1e-6)
    times = [line["time"] for line in ones]
    assert times == sorted(times)
    assert all(line["mfu"] > 0 and line["memory"] > 2**20 for line in ones)


def test_the_card_holds_what_a_stranger_needs(quick, tmp_path, monkeypatch):  # noqa: F811
    gifted = tmp_path / "gifted"
    gifted.mkdir()
    for path in Path(quick.teacher).iterdir():
        (gifted / path.name).write_bytes(path.read_bytes())
    (gifted / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Gifted\n")
    run = dataclasses.replace(quick, teacher=str(gifted), export_dtype="bfloat16")
    folder = distill.train(run)
    words = (folder / "README.md").read_text()
    assert 'license: "apache-2.0"' in words and "base_model" not in words
    assert re.search(r"\*\*Size\*\*: 2 blocks, \S+ parameters, \S+ kB in bfloat16", words)
    assert re.search(r"in 6 optimizer steps, \S+ at \S+ tokens/s on \d x cpu", words)
    assert re.search(r"jax \d\S+, equinox \d\S+, optax \d", words)
    assert (folder / "curves.png").read_bytes() == (Path(run.out) / "curves.png").read_bytes()
    (snippet,) = re.findall(r"```python\n(.*?)```", words, re.S)
    compile(snippet, "card", "exec")
    (line,) = re.findall(r"```bash\npython distill.py (.*)\n```", words)
    assert "--teacher gifted" in line and str(tmp_path) not in line
    again = errors.cli(distill.Config, line.replace("gifted", str(gifted)).split())
    again = distill.with_defaults(dataclasses.replace(again, out=run.out, data=run.data))
    apart = {"--out", "--data", "--save-every", "--eval-every", "--log-every", "--quiet"}
    folders = [configs.run_folder(x) for x in (distill.with_defaults(run), again)]
    assert not files.changes(*(folder.settings for folder in folders), apart, "--")


def test_flags_of_a_card_are_flags():
    off = dataclasses.replace(
        distill.with_defaults(distill.Config()), deterministic=True,
        loss=distill.losses.Config(temperature_squared=False),
        data=data.Config(("/a/b.txt", "owner/set")),
    )  # fmt: skip
    words = card.command(off)
    assert "--deterministic --" in words and "--loss.no-temperature-squared" in words
    assert "--data.source b.txt owner/set" in words


def test_a_student_is_stored_as_its_teacher_is(quick, tmp_path):  # noqa: F811
    half = models.load(quick.teacher, dtype="bfloat16")
    models.save(half, tmp_path / "half", tokenizer=quick.teacher)
    asked = dataclasses.replace(quick, teacher=str(tmp_path / "half"), export_dtype="auto")
    assert distill.with_defaults(asked).export_dtype == "bfloat16"
    assert distill.with_defaults(dataclasses.replace(quick, export_dtype="auto")).export_dtype == (
        models.load(quick.teacher).embedding.dtype.name
    )


# ---- what else is taken from a model's own files -------------------------------------------------


@pytest.mark.parametrize(
    "own, flags, expected",
    [
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {}, (0.7, 20, 1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 1.0}, (1.0, 0, 1.0, 1.0)),
        ({"temperature": 0.7, "top_p": 0.8}, {}, (1.0, 0, 1.0, 1.0)),  # it does not sample
        (None, {"top_p": 0.5}, (1.0, 0, 0.5, 1.0)),
    ],
)
def test_a_model_writes_as_its_files_say(tmp_path, own, flags, expected):
    if own is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(own))
    config = generate.Config(model="m", prompts="p", out="o.jsonl", **flags)
    sampling = generate.with_model_settings(config, tmp_path).sampling
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    assert tuple(getattr(sampling, name) for name in names) == expected


def test_conversations_are_kept_whole_by_default():
    assert data.Config(mask="assistant").fits and data.Config(packing="fit").fits
    assert not data.Config().fits
    assert not data.Config(mask="assistant", packing="stream").fits


def test_help_names_the_common_flags_first_and_defaults_in_words(capsys):
    with pytest.raises(SystemExit):
        errors.cli(distill.Config, ["--help"])
    printed = capsys.readouterr().out
    assert "None" not in printed
    flags = re.findall(r"(?m)^\W*(--[\w.-]+)(?= [A-Z{[]|, --no)", printed.partition("--help")[2])
    common = ["--teacher", "--student-layers", "--student-params", "--steps", "--tokens"]
    assert flags[:5] == common
    assert flags.index("--out") < flags.index("--targets") < flags.index("--data.source")
    assert printed.index("python distill.py --teacher ") < printed.index("--student-layers INT")
    with pytest.raises(SystemExit):
        errors.cli(generate.Config, ["--help"])
    flags = re.findall(r"(?m)^\W*(--[\w.-]+)(?= [A-Z{[]|, --no)", capsys.readouterr().out)
    assert flags[:3] == ["--model", "--prompts", "--out"]


def test_a_license_is_the_hubs(monkeypatch):
    monkeypatch.setitem(commits.COMMITS, "license models/owner/name", "mit")
    assert card.license_of("owner/name@main") == "mit"


def test_the_embedded_teacher_lies_in_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "DEMO", tmp_path / "demo")
    with pytest.raises(UserError, match="run distill.py in its checkout, or give --teacher"):
        distill.with_defaults(distill.Config())


# ---- blocks removed in stages --------------------------------------------------------------------


def test_blocks_are_removed_in_stages(quick, monkeypatch):  # noqa: F811
    staged = dataclasses.replace(
        quick, student_layers=1, student_stages=2, student_init="influence", save_every=2,
        student_heal="all", heal_tokens=512,
    )  # fmt: skip
    assert configs.stages(distill.with_defaults(staged)) == [(2, 3), (1, 6)]
    distill.train(staged)
    out = Path(staged.out)
    first, second = (json.loads((out / f"choice{x}.json").read_text()) for x in ("", "-2"))
    assert len(first["kept"]) == 2 and set(second["kept"]) < set(first["kept"])
    whole = models.load(out / "student")
    assert whole.config.layers == 1
    assert (
        f"1 of the teacher's 3 blocks: {second['kept'][0]}"
        in (out / "student" / "README.md").read_text()
    )
    lines = [line for line in report.read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    lr = distill.optim.make(staged.optim, 6).lr
    assert np.allclose([line["lr"] for line in lines], [lr(step) for step in range(6)], rtol=1e-6)
    for stop in (2, 3, 5):  # within a stage, between them, and in the last one
        again = dataclasses.replace(staged, out=f"{staged.out}-{stop}")
        wishes = iter([0] * (2 * stop - 1) + [processes.STOP])  # one before, one after a step
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(processes.Interruption, "wish", lambda _, x=wishes: next(x))
            distill.train(again)
        assert checkpoint.latest(Path(again.out) / "checkpoints") == stop
        distill.train(again)
        assert eqx.tree_equal(models.load(Path(again.out) / "student"), whole)
    with pytest.raises(UserError, match="--steps was 6, by which --student-stages lie"):
        distill.train(dataclasses.replace(staged, steps=8))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"student_init": "0,1"}, "--student-stages: it chooses blocks alone"),
        ({"student_mlp": 8}, "--student-stages: it chooses blocks alone"),
        ({"loss": distill.losses.Config(alpha=0.0)}, "with the teacher beside the student"),
        ({"student_stages": 3}, "--student-stages 3: there are only 1 blocks to remove"),
    ],
)
def test_stages_that_cannot_be(quick, change, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        distill.with_defaults(dataclasses.replace(quick, **{"student_stages": 2} | change))


# ---- trackers ------------------------------------------------------------------------------------


@pytest.fixture
def tensorboard(monkeypatch):
    """A module in the place of tensorboardX, whose writer records what it is called with."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def __getattr__(self, name):
            return lambda *args, **_: calls.append((name, *args))

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    there = {"tensorboardX": True}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", there.get)
    return Writer, calls


def test_a_tracker_gets_numbers_curves_and_table(quick, tensorboard):  # noqa: F811
    distill.train(dataclasses.replace(quick, track=("tensorboard",), log_norms=True))
    out, (first, config, *calls, curves, table, last) = Path(quick.out), tensorboard[1]
    assert first == ("open", str(out / "tensorboard"), 1)
    assert config[:2] == ("add_text", "config") and '"steps": 6' in config[2]
    expected = [
        ("add_scalar", name, value, line["step"])
        for line in report.read_metrics(out / "metrics.jsonl")
        for name, value in line.items()
        if name not in ("step", "time") and isinstance(value, float | int)
    ]
    assert calls == expected
    assert curves[:2] == ("add_image", "curves") and curves[2].ndim == 3 and curves[3] == 6
    assert "| student at step 6 |" in table[2] and last == ("close",)


def fail(*_, **__):
    raise OSError("no route to\nits host")


WARNING = "--track tensorboard fails and is left out: no route to its host\n"


def test_a_tracker_that_fails_stops_no_run(quick, tensorboard, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(tensorboard[0], "add_scalar", fail, raising=False)
    distill.train(dataclasses.replace(quick, track=("tensorboard",)))
    assert capsys.readouterr().err.count(WARNING) == 1
    assert (Path(quick.out) / "student").exists()


@pytest.mark.parametrize("method", ["__init__", "add_text", "add_image", "close"])
def test_trackers_may_fail_at_any_time(tmp_path, tensorboard, monkeypatch, capsys, method):
    monkeypatch.setattr(tensorboard[0], method, fail, raising=False)
    curves = ROOT / "benchmarks" / "mup.png"
    send = trackers.open_all(("tensorboard",), files.RunFolder(tmp_path, {}, set()), 0)
    for line in ({"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}):
        send(line)
    send({"step": 2}, curves, [["", "KL"], ["student", "0.1"]])
    assert capsys.readouterr().err == WARNING


def test_a_tracker_that_is_not_there_is_refused(quick, tensorboard):  # noqa: F811
    words = r"--track wandb: it is not installed: pip install -e '.\[wandb\]'"
    with pytest.raises(UserError, match=words):
        distill.train(dataclasses.replace(quick, track=("tensorboard", "wandb")))
    assert not Path(quick.out).exists() and not tensorboard[1]
    with pytest.raises(UserError, match="choice 'mlflow' for argument '--track'. Expected one of"):
        errors.cli(distill.Config, ["--track", "mlflow"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert trackers.OPEN.keys() <= extras["optional-dependencies"].keys()


# ---- a run from the settings of another ----------------------------------------------------------


def test_a_run_is_repeated_from_its_config(quick, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(commits, "COMMITS", {})
    distill.train(dataclasses.replace(quick, resume=False, push=None))
    first, again = Path(quick.out), str(tmp_path / "again")
    (first / "commits.json").write_text('{"models/a/b@main": "0123"}')
    words = ["--config", str(first / "config.json"), f"--out={again}"]
    repeated = configs.parse_flags(words)
    assert repeated.resume and repeated.out == again and repeated.config is None
    assert commits.COMMITS == {"models/a/b@main": "0123"}
    distill.train(repeated)
    weights = [Path(x) / "student" / "model.safetensors" for x in (quick.out, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    changed = configs.parse_flags([*words, "--tokens", "1000", "--optim.lr", "0.5"])
    assert (changed.steps, changed.tokens, changed.optim.lr) == (None, 1000, 0.5)
    same = dataclasses.replace(changed, tokens=None, steps=repeated.steps, optim=repeated.optim)
    assert same == repeated
    settings = json.loads((first / "config.json").read_text()) | {"student_init": "last"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings | {"optim": {"lr": 1e-5}}))
    written = configs.parse_flags(["--config", str(tmp_path / "a.yaml"), "--out", again])
    assert (written.student_init, written.optim.lr) == ("last", 1e-5)
    assert written.data == repeated.data


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "expected the node content"),
        ("[1]", ""),
        ('{"stepz": 3}', "Unrecognized options: --stepz"),
        ('{"steps": 0}', "--steps is 0: it must be 1 or more"),
        (None, "No such file"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"^--config {path}: .*{words}.*: give the config.json of"):
        configs.parse_flags(["--config", str(path), "--out", "x"])


def test_a_config_does_not_say_where_a_run_is(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"out": "runs/x"}')
    with pytest.raises(UserError, match=f"--config {path}: add the --out of this run"):
        configs.parse_flags(["--config", str(path)])
