import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime import errors
from runtime.errors import UserError, cli, run


@dataclass(frozen=True)
class Loss:
    alpha: float = 0.5
    """weight of the teacher"""
    kind: Literal["forward", "reverse"] = "forward"
    betas: tuple[float, float] = (0.9, 0.95)
    per_token: bool = False

    def __post_init__(self):
        if self.alpha > 1:
            raise ValueError(f"loss.alpha is at most 1,\n  found {self.alpha}")


@dataclass(frozen=True)
class Data:
    source: tuple[str, ...] = ()
    rows: int | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"web": 1.0})


@dataclass(frozen=True)
class Config:
    """Distil a student from a teacher."""

    teacher: str | None = None
    """hub id or folder of the teacher"""
    steps: int = 200
    student_init: str = "greedy"
    resume: bool = True
    loss: Loss = field(default_factory=Loss)
    data: Data = field(default_factory=Data)

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"steps is positive, found {self.steps}")


@dataclass(frozen=True)
class Required:
    teacher: str
    fast: bool
    steps: int = 3
    score: Callable[[float], float] = abs


@dataclass(frozen=True)
class Constrained:
    rate: Annotated[float, errors.above(0)] = 0.5
    """How fast."""
    row_count: Annotated[int | None, errors.at_least(1)] = None
    share: Annotated[float, errors.between(0, 1)] = 0.5
    decay: Annotated[float, errors.below(0, 1)] = 0.9
    name: Annotated[str, errors.Constraint("one word", lambda name: " " not in name)] = "a"

    def __post_init__(self):
        errors.check(self)


@dataclass(frozen=True)
class Either:
    part: Loss | Data


@dataclass(frozen=True)
class Faulty:
    bug: bool = False

    def __post_init__(self):
        print("a warning", file=sys.stderr)
        if self.bug:
            raise KeyError("a bug")


FLAGS = {
    "--teacher": ["a"],
    "--steps": ["3"],
    "--student-init": ["random"],
    "--resume": [],
    "--no-resume": [],
    "--loss.alpha": ["0.25"],
    "--loss.kind": ["reverse"],
    "--loss.betas": ["0.5", "0.75"],
    "--loss.per-token": [],
    "--loss.no-per-token": [],
    "--data.source": ["a", "b"],
    "--data.rows": ["4"],
    "--data.weights.web": ["2"],
}


def refusal(Config, *args: str) -> str:
    with pytest.raises(UserError) as caught:
        cli(Config, args)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ([], Config()),
        (["--steps", "3"], Config(steps=3)),
        (["--steps=3", "--teacher=a"], Config(steps=3, teacher="a")),
        (["--student_init", "a_b"], Config(student_init="a_b")),
        (["--student-init=a=b"], Config(student_init="a=b")),
        (["--no-resume"], Config(resume=False)),
        (["--no_resume"], Config(resume=False)),
        (["--loss.per_token", "--loss.alpha", "-1"], Config(loss=Loss(-1.0, per_token=True))),
        (["--loss.alpha", "-inf"], Config(loss=Loss(-float("inf")))),
        (["--loss.betas", "0", "-.5"], Config(loss=Loss(betas=(0.0, -0.5)))),
        (["--data.source", "a", "b", "--steps", "1"], Config(steps=1, data=Data(("a", "b")))),
        (["--data.source"], Config(data=Data(()))),
        (["--data.weights.web", "2"], Config(data=Data(weights={"web": 2.0}))),
        # values that look like flags are values
        (["--teacher=--steps", "--steps", "3"], Config(teacher="--steps", steps=3)),
        (["--teacher=--no-resume", "--resume"], Config(teacher="--no-resume")),
        (["--data.source", "steps", "-", "--steps=3"], Config(steps=3, data=Data(("steps", "-")))),
    ],
)
def test_flags_make_a_config(args, config):
    assert cli(Config, args) == config


@pytest.mark.parametrize(
    ("args", "words"),
    [
        # a flag that there is none of, and those like it
        ("--stpes 5", "Unrecognized options: --stpes, 5; Perhaps you meant: --steps INT"),
        ("--student_int=a", "--student_int=a; Perhaps you meant: --student-init STR"),
        ("--alpha 5", "--alpha, 5; Perhaps you meant: --loss.alpha FLOAT"),
        ("--los.alpha 5", "Perhaps you meant: --loss.alpha FLOAT"),
        ("--stpes 5 --alp 1", "similar to --alp: --loss.alpha FLOAT"),
        ("--quantization 4", "Unrecognized options: --quantization, 4"),
        ("--steps 5 -- --resume", "Unrecognized options: --resume"),
        # a value that belongs to no flag
        ("steps", "Unrecognized options: steps"),
        ("--steps 1 2", "Unrecognized options: 2 behind --steps"),
        ("--resume=True", "Unrecognized options: True behind --resume"),
        ("--no_resume yes --steps 1", "Unrecognized options: yes behind --no_resume"),
        # a flag without its values
        ("--steps", "Missing value for argument '--steps'. Expected 1 values"),
        ("--steps --resume", "Missing value for argument '--steps'. Expected 1 values"),
        ("--teacher -dash", "Missing value for argument '--teacher'"),
        ("--loss.betas 0.9", "Missing value for argument '--loss.betas'. Expected 2 values"),
        # a value of another type
        (
            "--steps=",
            "parsing --steps: invalid literal for int() with base 10: ''; expected --steps INT",
        ),
        ("--data.source a b --steps x", "--steps: invalid literal for int() with base 10: 'x'"),
        ("--steps=1.5", "base 10: '1.5'; expected --steps INT"),
        ("--loss.alpha half", "'half'; expected --loss.alpha FLOAT"),
        ("--data.rows many", "expected INT, found 'many'; expected --data.rows INT"),
        (
            "--loss.kind mse",
            "'mse' for argument '--loss.kind'. Expected one of ('forward', 'reverse')",
        ),
        # a flag given twice
        ("--steps 5 --resume --steps 5", "--steps is given twice (--steps and --steps)"),
        ("--steps=5 --steps 6", "--steps is given twice (--steps and --steps)"),
        ("--resume --no-resume", "--resume is given twice (--resume and --no-resume)"),
        ("--student-init a --student_init b", "twice (--student-init and --student_init)"),
        ("--data.source a b --data.source c", "--data.source is given twice"),
        ("--loss.no-per-token --loss.per_token", "--loss.per-token is given twice"),
        # what a config says itself
        ("--loss.alpha 2", "loss.alpha is at most 1, found 2.0"),
        ("--steps -5", "steps is positive, found -5"),
    ],
)
def test_a_refusal_is_one_line(args, words, capfd):
    line = refusal(Config, *args.split())
    assert words in line and "─" not in line and "│" not in line and "helptext" not in line
    assert line == words or not words.startswith(("loss.", "steps"))
    assert capfd.readouterr() == ("", "")


def test_required_flags_are_named_with_what_they_take():
    line = refusal(Required)
    assert "Missing from" in line and "--teacher STR" in line and "--fast {True,False}" in line
    assert "--teacher" not in refusal(Required, "--teacher", "a", "--steps", "2")
    assert cli(Required, ["--teacher", "a", "--fast", "True"]) == Required("a", True)
    assert "Expected one of ('True', 'False')" in refusal(Required, "--fast", "yes")
    assert "--score is fixed" in refusal(Required, "--teacher=a", "--fast=True", "--score=abs")
    assert "{part:loss, part:data}" in refusal(Either)


def test_bugs_and_warnings_of_a_config_come_through(capsys):
    assert cli(Faulty, []).bug is False
    assert capsys.readouterr().err == "a warning\n"
    with pytest.raises(KeyError, match="a bug"):
        cli(Faulty, ["--bug"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rate", 0.0, "--rate is 0.0: it must be above 0"),
        ("rate", math.nan, "--rate is nan: it must be above 0"),
        ("rate", math.inf, "--rate is inf: it must be above 0"),
        ("row_count", 0, "--row-count is 0: it must be 1 or more"),
        ("share", 1.5, "--share is 1.5: it must be from 0 to 1"),
        ("decay", 1.0, "--decay is 1.0: it must be from 0 to below 1"),
        ("name", "a b", "--name is a b: it must be one word"),
    ],
)
def test_a_constraint_stands_beside_its_field(name, value, words):
    assert refusal(Constrained, f"--{name}={value}") == words
    Constrained(**{name: getattr(Constrained(), name)})


def test_constraints_are_shown_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli(Constrained, ["--help"])
    help = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "How fast. Must be above 0. (default: 0.5)", "Must be 1 or more. --share",
        "Must be from 0 to 1.", "Must be from 0 to below 1.", "Must be one word.",
    ):  # fmt: skip
        assert words in help


@settings(deadline=None, max_examples=15)
@given(st.permutations([name for name in FLAGS if "no-" not in name]), st.data())
def test_order_and_spelling_of_flags_do_not_matter(names, data):
    args = []
    for name in names:
        values = FLAGS[name]
        name = name.replace("-", "_") if data.draw(st.booleans()) else name
        name = "--" + name[2:]
        joined = len(values) > 0 and data.draw(st.booleans())
        args += [f"{name}={values[0]}", *values[1:]] if joined else [name, *values]
    expected = Config(
        teacher="a",
        steps=3,
        student_init="random",
        loss=Loss(0.25, "reverse", (0.5, 0.75), True),
        data=Data(("a", "b"), 4, {"web": 2.0}),
    )
    assert cli(Config, args) == expected


@settings(deadline=None, max_examples=20)
@given(st.text())
@example("--steps=4")
@example("--")
def test_any_text_is_a_value_after_an_equals_sign(text):
    config = cli(Config, [f"--student-init={text}", "--steps", "3"])
    assert config == Config(student_init=text, steps=3)


junk = ["--", "-", "-x", "--stpes", "--steps=x", "--steps=4", "--resume=", "5", "reverse", "None"]
junk += ["-" * 20, "─" * 20]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([*FLAGS, *junk]), max_size=6))
def test_only_what_tyro_accepts_and_names_once_is_accepted(args):
    before = args[: args.index("--")] if "--" in args else args
    flags = [arg.partition("=")[0].replace("no-", "") for arg in before if arg[:2] == "--"]
    try:
        expected = tyro.cli(Config, args=args, console_outputs=False)
    except SystemExit:
        expected = None
    if expected is None or len(flags) > len(set(flags)):
        refusal(Config, *args)
    else:
        assert cli(Config, args) == expected


PROGRAM = """
from runtime import errors
from test_errors import Config

def main():
    print(errors.cli(Config, description="A program."))

errors.run(main)
"""


def python(program: str, *args: str) -> subprocess.CompletedProcess:
    folders = [str(Path(errors.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )


def test_a_program_ends_with_one_line_and_status_2():
    done = python(PROGRAM, "--stpes", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: Unrecognized options: --stpes, 5; Perhaps you meant: --steps INT\n"
    )


def test_a_program_without_mistakes_runs(capsys):
    run(lambda: print(cli(Config, ["--steps", "5"])))
    assert capsys.readouterr() == (f"{replace(Config(), steps=5)}\n", "")


def test_help_shows_the_documentation_of_the_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: cli(Config, ["--steps", "x", "--help"], description="A program."))
    printed, complaints = capsys.readouterr()
    assert (caught.value.code, complaints) == (0, "")
    for words in "A program.", "--loss.alpha FLOAT", "weight of the teacher", "hub id or folder":
        assert words in printed


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n  "])
def test_a_mistake_of_several_lines_is_folded(newline, capsys):
    def main():
        raise UserError(f"one{newline}two")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: one two\n")


@pytest.mark.parametrize("kind", [BrokenPipeError, SystemExit, ValueError])
def test_what_is_no_mistake_of_the_user_passes_through(kind):
    def main():
        raise kind

    with pytest.raises(kind) as caught:
        run(main)
    assert caught.value.args == ()


def test_an_interruption_ends_with_a_line_while_threads_go_on():
    done = python(
        "import sys, threading\n"
        "from runtime import errors\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    print('said')\n"
        "    raise KeyboardInterrupt\n"
        "assert 'tyro' not in sys.modules\n"
        "errors.run(main)"
    )
    assert (done.returncode, done.stdout) == (130, "said\n")
    words = "interrupted; the same command goes on from what was saved, if anything was\n"
    assert done.stderr == words


TALKS = r"""
import sys
from runtime import errors
def main():
    for _ in range(3):
        print("to people", "\u2016 \udcff", file=sys.stderr, flush=True)
    sys.stderr.isatty()
    print("out \u2016 \udcff", flush=True)
    open(sys.argv[1], "w").write("ended")
errors.run(main)
"""


@pytest.mark.parametrize("without", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_program_goes_on_without_a_screen(tmp_path, without):
    """What it opens itself never takes the number that libraries print to."""
    program = TALKS.replace("errors.run", "sys.modules['x'] = open(__file__); errors.run")
    (tmp_path / "x.py").write_text(program)
    command = f"{sys.executable} {tmp_path / 'x.py'} {tmp_path / 'end'} {without}"
    home = str(Path(errors.__file__).parents[1])
    assert (
        subprocess.run(command, shell=True, env=os.environ | {"PYTHONPATH": home}).returncode == 0
    )
    assert (tmp_path / "end").read_text() == "ended"


def test_a_reader_that_goes_away_ends_no_program(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", TALKS, str(tmp_path / "end")], stdout=write, stderr=write,
        env=os.environ | {"PYTHONPATH": str(Path(errors.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "ended"


def test_what_a_locale_cannot_spell_is_escaped(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TALKS, str(tmp_path / "end")], capture_output=True, text=True,
        env=os.environ
        | {"PYTHONPATH": str(Path(errors.__file__).parents[1]), "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out \\u2016 \\udcff\n")


@pytest.mark.parametrize("out", ["s3://bucket", "gs:/bucket", "hf://a/b", "r\udcff"])
def test_what_is_written_is_a_path_on_this_machine(out):
    import targets
    from config import Config as Run

    for make in (lambda: Run(out=out), lambda: targets.Config(teacher="t", out=out)):
        with pytest.raises(UserError, match="--out is .*: it must be a path on this machine"):
            make()
    import data

    with pytest.raises(UserError, match="--data.cache is .*: it must be a path on this machine"):
        Run(data=data.Config(cache=out, source=("x",)))


@pytest.mark.parametrize("home", ["~", "~nobody-of-this-name"])  # of nobody, it is a name like any
def test_a_home_folder_is_expanded(monkeypatch, tmp_path, home):
    import config
    import models
    import text
    from runtime import target_store
    from text import store

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / home if home != "~" else tmp_path
    (place / "model").mkdir(parents=True)
    (place / "a.txt").write_text("a")
    assert config.run_folder(config.Config(out=f"{home}/run")).path.absolute() == place / "run"
    assert models.fetch(f"{home}/model").absolute() == place / "model"
    assert models.hub.check_replaceable(f"{home}/student") == place / "student"
    assert text.find(f"{home}/a.txt").files == (place / "a.txt",)
    with pytest.raises(UserError, match="no targets.json in it") as refused:
        target_store.load(f"{home}/kept")
    assert Path(str(refused.value).partition(":")[0]).absolute() == place / "kept"
    paths = []
    monkeypatch.setattr(store, "stores", lambda folder: paths.append(folder) or [])
    monkeypatch.setattr(sys, "argv", ["store", f"--cache={home}/cache"])
    store.main()
    assert [path.absolute() for path in paths] == [place / "cache"]
