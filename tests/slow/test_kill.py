"""Runs that are killed go on to the very student, and the very metrics, of one that was not.

Moments follow the progress of the run, never the clock; `benchmarks/soak.py` tries more of them.
"""

import shutil

import pytest

from benchmarks import soak


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, a text and one cache of compiled programs for all runs."""
    folder = tmp_path_factory.mktemp("soak")
    soak.prepare(folder, stories=500)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> soak.Run:
    run = soak.Run(home)
    run.finish()
    return run


MOMENTS = {
    "the store of tokens": soak.Touch(soak.TOKENS, 4),
    "a step": soak.at_step(2 * soak.SAVE + 3),
    "a checkpoint": soak.Touch(soak.CHECKPOINT, 8),
    "an export": soak.Touch(soak.EXPORT, 3),
}


def test_killed_again_and_again_it_ends_as_if_it_never_was(whole):
    run = whole._replace(name="killed")
    for name, moment in MOMENTS.items():
        assert soak.killed(run, moment), f"it ended before {name}"
        assert not (run.out / "student").exists()
    run.finish()
    assert soak.differences(run, whole) == []
    assert run.step() == soak.STEPS


CUTTING = {
    "the second round": soak.Touch("choice-rounds.json", 3),
    "the end of the choice": soak.Touch("choice.json", 1),
    "the healing": lambda run: (run.out / "choice.json").exists(),
    "the first evaluation": lambda run: bool(run.lines()),
}


def test_a_choice_and_a_healing_that_are_killed_end_as_if_they_never_were(home):
    flags = "--student-init=greedy", "--student-layers=1", "--student-heal=all"
    uncut = soak.Run(home, "cut", flags=(*flags, "--heal-tokens=1024", "--steps=10"))
    uncut.finish()
    assert "healing   KL" in uncut.log.read_text()
    run = uncut._replace(name="cut-killed")
    for name, moment in CUTTING.items():
        assert soak.killed(run, moment), f"it ended before {name}"
        assert run.step() == 0
    run.finish()
    assert soak.differences(run, uncut) == []


STAGES = {
    "the end of the first stage": soak.at_step(20),
    "the second choice": soak.Touch("choice-2.json", 1),
    "the second healing": lambda run: (run.out / "choice-2.json").exists(),
    "the second stage": soak.at_step(33),
}


def test_stages_that_are_killed_end_as_if_they_never_were(home):
    flags = "--student-init=greedy", "--student-layers=1", "--student-stages=2", "--steps=40"
    staged = soak.Run(home, "staged", flags=(*flags, "--student-heal=all", "--heal-tokens=1024"))
    staged.finish()
    run = staged._replace(name="staged-killed")
    for name, moment in STAGES.items():
        assert soak.killed(run, moment), f"it ended before {name}"
        assert not (run.out / "student").exists()
    run.finish()
    assert soak.differences(run, staged) == []


def test_what_differs_is_told(whole):
    """The comparison can fail."""
    assert soak.differences(whole, whole) == []
    other = whole._replace(name="other")
    shutil.copytree(whole.out, other.out)
    weights, metrics = other.out / "student" / "model.safetensors", other.out / "metrics.jsonl"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:5] + lines[6:]))
    told = ["student/model.safetensors", "metrics.jsonl", "the steps told"]
    assert soak.differences(other, whole) == told
