import os
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import tyro
from hypothesis import assume, example, given, settings
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
class Near:
    seed: int = 0
    seq: int = 8


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
    ("args", "text"),
    [
        ("--stpes 5", "unknown flag --stpes: did you mean --steps? (--help lists the flags)"),
        ("--student_int=a", "unknown flag --student_int: did you mean --student-init?"),
        ("-steps 5", "unknown flag -steps: did you mean --steps?"),
        ("--alpha 5", "unknown flag --alpha: did you mean --loss.alpha?"),
        ("--los.alpha 5", "unknown flag --los.alpha: did you mean --loss.alpha?"),
        ("--loss.no-alpha", "unknown flag --loss.no-alpha: did you mean --loss.alpha?"),
        ("--data.weights.wbe 1", "unknown flag --data.weights.wbe: did you mean --data.weights"),
        ("--quantization 4", "unknown flag --quantization (--help lists the flags)"),
        ("--steps 5 --resume --steps 5", "--steps is given twice (--steps and --steps)"),
        ("--steps=5 --steps 6", "--steps is given twice (--steps and --steps)"),
        ("--resume --no-resume", "--resume is given twice (--resume and --no-resume)"),
        ("--student-init a --student_init b", "twice (--student-init and --student_init)"),
        ("--data.source a b --data.source c", "--data.source is given twice"),
        ("--loss.no-per-token --loss.per_token", "--loss.per-token is given twice"),
        ("--loss.alpha 2 --loss.alpha 3", "--loss.alpha is given twice"),
        ("--loss.betas -inf -.5 --steps x", "--steps expects INT, found 'x'"),
        ("--data.source a b --steps x", "--steps expects INT, found 'x'"),
        ("--steps", "--steps expects INT, found nothing"),
        ("--steps --resume", "--steps expects INT, found the flag --resume"),
        ("--teacher -dash", "found the flag -dash (as a value: --teacher=-dash)"),
        ("--steps -- 5", "--steps expects INT, found nothing"),
        ("--steps=", "--steps expects INT, found ''"),
        ("--steps abc", "--steps expects INT, found 'abc'"),
        ("--steps=1.5", "--steps expects INT, found '1.5'"),
        ("--steps 1 2", "--steps expects INT, found '1' '2'"),
        ("--loss.alpha half", "--loss.alpha expects FLOAT, found 'half'"),
        ("--loss.betas 0.9", "--loss.betas expects FLOAT FLOAT, found '0.9'"),
        ("--data.rows many", "--data.rows expects {None}|INT, found 'many'"),
        ("--data.weights.web x", "--data.weights.web expects FLOAT, found 'x'"),
        ("--loss.kind revers", "expects one of forward, reverse, found 'revers': did you mean rev"),
        ("--loss.kind mse", "--loss.kind expects one of forward, reverse, found 'mse'"),
        ("--resume=True", "--resume expects no value, found 'True': write --resume or --no-resume"),
        ("--no_resume yes", "--no_resume expects no value, found 'yes'"),
        ("steps", "unexpected argument 'steps': did you mean --steps?"),
        ("elsewhere --steps 5", "unexpected argument 'elsewhere' (--help lists the flags)"),
        ("--steps 5 -- --resume", "unexpected argument '--resume': did you mean --resume?"),
    ],
)
def test_a_refusal_says_what_was_expected_and_found(args, text, capfd):
    assert text in refusal(Config, *args.split())
    assert capfd.readouterr() == ("", "")


def test_a_config_refuses_in_its_own_words():
    assert refusal(Config, "--loss.alpha", "2") == "loss.alpha is at most 1, found 2.0"
    assert refusal(Config, "--steps", "-5") == "steps is positive, found -5"


@pytest.mark.parametrize("typed", ["--see", "--seeq"])  # a letter replaced, added, left out
def test_flags_as_near_as_each_other_are_all_named(typed):
    assert ": did you mean --seed or --seq? (" in refusal(Near, typed, "1")


def test_a_choice_far_from_every_other_has_no_nearest():
    assert "did you mean" not in refusal(Config, "--loss.kind", "mse")


def test_required_flags_are_named_with_what_they_take():
    assert refusal(Required) == "missing --teacher STR, --fast {True,False}"
    assert refusal(Required, "--teacher", "a", "--steps", "2") == "missing --fast {True,False}"
    assert cli(Required, ["--teacher", "a", "--fast", "True"]) == Required("a", True)
    assert "expects one of True, False, found 'yes'" in refusal(Required, "--fast", "yes")


def test_a_field_that_no_text_describes_has_no_flag():
    assert "unknown flag --score" in refusal(Required, "--teacher=a", "--fast=True", "--score=abs")


def test_a_refusal_of_another_kind_is_what_tyro_says_on_one_line():
    text = refusal(Either)
    assert "part:loss" in text and "part:data" in text and "─" not in text and "│" not in text


def test_bugs_and_warnings_of_a_config_come_through(capsys):
    assert cli(Faulty, []).bug is False
    assert capsys.readouterr().err == "a warning\n"
    with pytest.raises(KeyError, match="a bug"):
        cli(Faulty, ["--bug"])


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.text())
@example("--steps=4")
@example("--")
def test_any_text_is_a_value_after_an_equals_sign(text):
    config = cli(Config, [f"--student-init={text}", "--steps", "3"])
    assert config == Config(student_init=text, steps=3)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(FLAGS)),
    st.sampled_from(["insert", "delete", "replace"]),
    st.sampled_from(string.ascii_letters + string.digits + "._-"),
    st.data(),
)
def test_a_typo_is_answered_with_the_true_flag(flag, edit, character, data):
    at = data.draw(st.integers(2, len(flag) - 1))
    typed = flag[:at] + ("" if edit == "delete" else character) + flag[at + (edit != "insert") :]
    assume(typed.replace("_", "-") not in FLAGS)
    assert flag in refusal(Config, typed, *FLAGS[flag])


junk = ["--", "-", "-x", "--stpes", "--steps=x", "--steps=4", "--resume=", "5", "reverse", "None"]


@settings(deadline=None)
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
    folders = [str(Path(errors.__file__).parent), str(Path(__file__).parent)]
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
        "error: unknown flag --stpes: did you mean --steps? (--help lists the flags)\n"
    )


def test_a_program_without_mistakes_runs():
    done = python(PROGRAM, "--steps", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{replace(Config(), steps=5)}\n"


def test_help_shows_the_documentation_of_the_fields():
    done = python(PROGRAM, "--steps", "x", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for text in "A program.", "--loss.alpha FLOAT", "weight of the teacher", "hub id or folder":
        assert text in done.stdout


@pytest.mark.parametrize("newline", ["\\n", "\\r\\n", "\\n\\n  "])
def test_a_mistake_of_several_lines_is_folded(newline):
    done = python(
        f"from runtime import errors\ndef main(): raise errors.UserError('one{newline}two')\nerrors.run(main)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: one two\n")


def test_a_bug_keeps_its_traceback():
    done = python(
        "from runtime import errors\ndef main(): raise ValueError('a bug')\nerrors.run(main)"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: a bug\n")


@pytest.mark.parametrize("kind", [BrokenPipeError, SystemExit])
def test_what_is_no_mistake_of_the_user_passes_through(kind):
    def main():
        raise kind

    with pytest.raises(kind) as caught:
        run(main)
    assert caught.value.args == ()


def test_an_interruption_ends_with_a_line_while_threads_go_on():
    done = python(
        "from runtime import errors, threading\n"
        "def main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    print('said')\n"
        "    raise KeyboardInterrupt\n"
        "errors.run(main)"
    )
    assert (done.returncode, done.stdout) == (130, "said\n")
    assert (
        done.stderr
        == "interrupted; the same command goes on from what was saved, if anything was\n"
    )


def test_importing_errors_does_not_import_tyro():
    done = python("from runtime import errors, sys; print('tyro' in sys.modules)")
    assert done.stdout == "False\n"
