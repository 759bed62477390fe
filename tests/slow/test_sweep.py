"""A sweep of the demo that is killed and stopped ends as one that never was; what stays frozen."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import soak
from runtime import checkpoint, results

ROOT = Path(__file__).parents[2]
SWEPT = ["--optim.lr", "1e-4", "1e-3", "1e-2", "--student-init", "first", "last"]
SHARED = [
    "--student-layers", "2", "--student-heal", "none", "--steps", "8", "--batch-size", "8",
    "--seq-len", "32", "--eval-windows", "8", "--eval-every", "3", "--save-every", "2",
    "--log-every", "1",
]  # fmt: skip
# Kills the sweep when it is about to start its third run.
BETWEEN = """
import os, runpy, signal, sys
left = 3
def hook(event, args):
    global left
    left -= event == "subprocess.Popen" and "distill.py" in str(args[1])
    if not left:
        left = -1  # to kill is an event too
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


def start(place: Path, *before: str) -> subprocess.Popen:
    """A sweep in `place`, of which the arguments are the same everywhere."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, *before, str(ROOT / "sweep.py"), "--out", "runs", *SWEPT, "--"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["XDG_CACHE_HOME"] = str(place.parent / "cache")
    with open(place / "log", "ab") as log:
        return subprocess.Popen(
            [*command, *SHARED], cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip


def finish(place: Path) -> str:
    """What the sweep prints."""
    (place / "log").unlink(missing_ok=True)
    status, said = start(place).wait(), (place / "log").read_text()
    assert status == 0, said
    return said


def wait_for(happened) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def child_of(sweep: subprocess.Popen) -> int:
    """The process that computes."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = re.match(r"(\d+) \(.*\) \w (\d+)", stat.read_text()).groups()
        except OSError:  # it has just ended
            continue
        if int(parent) == sweep.pid:
            return int(pid)
    raise AssertionError("no run")


def steps_of(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return lines.count('"loss"')


def left_by(place: Path) -> dict[str, object]:
    """All that a sweep leaves but times, logs and pictures."""
    left = {str(x.relative_to(place)): soak.contents(x) for x in place.glob("runs/*/student")}
    for path in (place / "runs").glob("**/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        timed = (*results.OF_ONE_START, "seconds")
        left[str(path.relative_to(place))] = [
            {k: v for k, v in line.items() if k not in timed} for line in lines
        ]
    return left


@pytest.fixture(scope="module")
def whole(home) -> str:
    return finish(home / "whole")


def test_killed_between_and_within_runs_and_stopped_it_ends_as_if_it_never_was(home, whole):
    place = home / "killed"
    assert start(place, "-c", BETWEEN).wait() == -signal.SIGKILL
    assert len(list(place.glob("runs/*"))) == len(list(place.glob("runs/*/student"))) + 3 == 5
    # Within the fourth run, with all its processes.
    sweep, fourth = start(place), place / "runs" / "optim.lr=1e-3,student-init=last"
    wait_for(lambda: steps_of(fourth) >= 3)
    child = child_of(sweep)
    for pid in (sweep.pid, child):
        os.kill(pid, signal.SIGKILL)
    sweep.wait()
    assert not (fourth / "student").exists()
    # Stopped within the sixth, which saves first, by a signal to the group, as Ctrl-C is.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a shell's `&` ignores it
    sweep, sixth = start(place), place / "runs" / "optim.lr=1e-2,student-init=last"
    wait_for(lambda: steps_of(sixth) >= 1)
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait() == 130
    last = checkpoint.latest(sixth / "checkpoints")
    assert f"stopped at step {last}, all is saved" in (place / "log").read_text()
    said = finish(place)
    assert said.count("\nrun  ") + said.startswith("run  ") == 1  # the sixth
    assert left_by(place) == left_by(home / "whole")
    assert said.splitlines()[-1] == whole.splitlines()[-1]


def test_a_finished_sweep_starts_no_run_and_knows_the_best(home, whole):
    said = finish(home / "whole").splitlines()
    assert not any(line.startswith("run  ") for line in said)
    assert len(said) == 1 + 6 + 2 and said == whole.splitlines()[-9:]
    lines = [json.loads(x) for x in (home / "whole/runs/sweep.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["eval/kl"])
    assert said[-1].endswith(f"--out {best['folder']}")
    # The command is as good as it looks.
    words = said[-1].split()[2:]
    done = subprocess.run(
        [sys.executable, ROOT / "distill.py", *words[1:]], cwd=home / "whole",
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "this run is finished" in done.stderr


def test_a_run_that_fails_does_not_stop_the_others(home):
    """One process of a sweep is killed from outside, and the sweep goes on without it."""
    sweep = start(home / "failed")
    wait_for(lambda: steps_of(home / "failed/runs/optim.lr=1e-4,student-init=first") >= 1)
    os.kill(child_of(sweep), signal.SIGKILL)
    table = home / "failed" / "runs" / "sweep.md"
    wait_for(lambda: table.exists() and table.read_text().count("\n") >= 4)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait() == 130
    assert re.search(r"\| 1e-4 \| first \| failed \|", table.read_text())
    assert re.search(r"\| 1e-4 \| last \| finished \|", table.read_text())


def test_what_is_not_trained_keeps_its_bits(tmp_path):
    """In a run of the demo's own teacher, of which the norms of the blocks are trained."""
    original = ROOT / "demo" / "teacher"
    flags = ["--student", original, "--loss.alpha", "0", "--optim.train", "blocks.*norm*"]
    flags += ["--steps", "3", "--batch-size", "8", "--seq-len", "32", "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "distill.py", *flags, "--eval-windows", "8"], cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = load_file(original / "model.safetensors")
    after = load_file(tmp_path / "run" / "student" / "model.safetensors")
    same = {name for name in before if np.array_equal(after[name], np.float32(before[name]))}
    assert before.keys() - same == {name for name in before if "layers." in name and "norm" in name}
