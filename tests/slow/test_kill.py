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
