"""Several processes are one run, and survive the death of any of them."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_distill import config, near, teacher, text  # noqa: F401

import distill
import models
import sharding

ROOT = Path(__file__).parents[2]


def commands(config: distill.Config, count: int, port: int, *more: str) -> list[list[str]]:
    flags = {
        "teacher": config.teacher, "seq-len": 32, "batch-size": 8,
        "steps": config.steps, "eval-every": 4, "eval-windows": 8, "save-every": 3,
        "log-every": config.log_every, "data.source": config.data.source[0],
        "data.documents": "paragraph", "data.cache": config.data.cache, "optim.lr": 1e-2,
        "optim.eps": 1e-4, "out": config.out, "student-heal": config.student_heal,
        "heal-tokens": config.heal_tokens,
    }  # fmt: skip
    flags |= {"student": config.student} if config.student else {"student-layers": 2}
    words = [sys.executable, str(ROOT / "distill.py"), "--quiet", *more]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    together = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id"]
    return [[*words, *together, str(i)] for i in range(count)]


def started(
    config: distill.Config, *more: str, devices: int = 4, second: tuple[str, ...] = (),
    folders: tuple[Path, Path] = (ROOT, ROOT),
) -> list[subprocess.Popen]:  # fmt: skip
    """Two processes, the second with flags of its own, each in a folder of its own."""
    count = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices // count)}
    return [
        subprocess.Popen(
            [*command, *flags], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )
        for command, flags, folder in zip(
            commands(config, count, port, *more), ((), second), folders, strict=True
        )
    ]  # fmt: skip


WAITING = """
import os, sys, time
import jax
from runtime import errors, processes
from jax._src import distributed

def main():
    processes.PATIENCE, os.environ["HEARTBEAT_TIMEOUT"] = 8, "4"
    which = {"coordinator": sys.argv[1], "processes": 2, "process_id": int(sys.argv[2])}
    processes.start(processes.Config(**which))
    with processes.exit_with_peers():
        print("here", jax.process_count(), flush=True)
        if sys.argv[2] == sys.argv[3]:
            time.sleep(100)
        distributed.global_state.client.wait_at_barrier("both", 100_000)

errors.run(main)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_who_waits_for_a_dead_process_ends(victim):
    """jax aborts such a process from a thread of its own, in its own words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, where, str(number), str(victim)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in both] == ["here 2\n"] * 2
    both[victim].kill()
    _, said = both[1 - victim].communicate(timeout=60)
    both[victim].communicate()
    assert both[1 - victim].returncode, said


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_before_the_first_step_a_signal_ends_a_process_at_once(kind):
    """One that waits for another in native code, where no handler of Python runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    # Whoever runs the tests may ignore SIGHUP.
    begin = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); processes.end_at_once()"
    program = WAITING.replace("def main():", f"def main():\n    {begin}")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, where, str(number), "0"], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in both] == ["here 2\n"] * 2
    time.sleep(1)
    both[1].send_signal(kind)
    try:
        assert both[1].wait(timeout=6) == 130
        assert "interrupted" in both[1].stderr.read()
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_signal_to_any_process_saves_after_the_step_at_hand(config):
    config = dataclasses.replace(config, steps=4000, log_every=1000)
    pair = started(config, "--requeue-status", "75")
    metrics = Path(config.out) / "metrics.jsonl"
    for _ in range(600):
        if (metrics.exists() and metrics.read_text()) or pair[0].poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(1)
    pair[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=20)[1] for process in pair]
    assert [process.returncode for process in pair] == [75, 75], said
    assert "all is saved" in said[0]


def test_a_pause_of_one_process_does_not_end_the_run(config):
    config = dataclasses.replace(config, steps=40)
    pair = started(config)
    metrics = Path(config.out) / "metrics.jsonl"
    for _ in range(600):
        if (metrics.exists() and metrics.read_text()) or pair[0].poll() is not None:
            break
        time.sleep(0.1)
    for victim in (pair[1], pair[0]):  # the latter is the coordinator
        victim.send_signal(signal.SIGSTOP)
        time.sleep(20)
        victim.send_signal(signal.SIGCONT)
        time.sleep(2)
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said


def test_two_processes_are_one_and_survive_the_death_of_either(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    config = dataclasses.replace(config, student_heal="all", heal_tokens=1024)
    four = dataclasses.replace(config, teacher_devices=None, out=config.out + "-one")
    jax_devices, jax.devices = jax.devices, lambda *_: list(mesh.devices.flat)
    try:
        alone = models.load(distill.train(four))
    finally:
        jax.devices = jax_devices
    pair = started(config)
    for _ in range(600):  # until it has a checkpoint to go on from
        if (Path(config.out) / "checkpoints" / "3").exists() or pair[0].poll() is not None:
            break
        time.sleep(0.2)
    pair[1].kill()
    said = pair[0].communicate(timeout=90)[1]
    pair[1].communicate()
    if pair[0].returncode:  # it may have been done already
        assert "another process has ended" in said or "heartbeat" in said, said
        for process in (pair := started(config)):
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
    near(models.load(Path(config.out) / "student"), alone, 1e-6)
    lines = [(Path(out) / "metrics.jsonl").read_text() for out in (config.out, four.out)]
    ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in lines)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-6)


def test_processes_that_hold_parts_of_one_model_read_the_same_rows(config):
    """Two processes with a device each, the model split over both."""
    config = dataclasses.replace(config, teacher_devices=None, steps=3)
    alone = dataclasses.replace(config, out=config.out + "-one")
    pair = started(config, "--mesh.fsdp", "1", "--mesh.tensor", "2", devices=2)
    said = [process.communicate(timeout=240)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    student = Path(distill.train(alone))
    near(models.load(Path(config.out) / "student"), models.load(student), 1e-5)
    ours, theirs = (
        [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        for out in (config.out, alone.out)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert mine.get("eval/kl", 0) == pytest.approx(other.get("eval/kl", 0), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "second", "says"),
    [
        ({}, ("--seed", "1"), "--seed is 0 in process 0, but 1 in process 1"),
        ({"teacher": "teacher"}, (), "the content of --teacher is "),
        ({"student": "student"}, (), "the content of --student is "),
        ({"out": "run"}, (), "the folder run is "),  # a path that is another place on each host
    ],
)
def test_processes_that_are_no_one_run_are_told_why(config, tmp_path, changes, second, says):
    folders = tmp_path / "0", tmp_path / "1"
    for number, folder in enumerate(folders):
        for name in ("teacher", "student"):
            shutil.copytree(config.teacher, folder / name)
            weights = folder / name / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + bytes([number]))
    pair = started(dataclasses.replace(config, **changes), folders=folders, second=second)
    for process in pair:
        said = process.communicate(timeout=120)[1]
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert process.returncode == 2 and len(lines) == 1 and says in lines[0], said
    assert not list(tmp_path.glob("**/metrics.jsonl"))


COMMITS = """
import sys
import distill
from runtime import commits, errors, processes, resume

def main():
    which = {"coordinator": sys.argv[1], "processes": 2, "process_id": int(sys.argv[2])}
    processes.start(processes.Config(**which))
    commits.COMMITS["models/owner/name@main"] = sys.argv[2] * 40
    resume.restore_commits(distill.with_defaults(distill.Config()))
    print(commits.COMMITS["models/owner/name@main"])

errors.run(main)
"""


def test_processes_read_the_commits_that_the_first_was_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COMMITS, where, str(number)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in both]
    assert [out.splitlines()[-1:] for out, _ in said] == [["0" * 40]] * 2, said


@pytest.mark.parametrize("number", [0, 1])
def test_a_meeting_of_processes_that_fails_ends_in_one_line(number):
    """Neither the first, who waits for the second, nor the second, who finds no first."""
    program = "import distill; from runtime import errors, processes; processes.PATIENCE = 1;"
    program += " errors.run(distill.main)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--coordinator", where, "--processes", "2", "--process-id", str(number)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2 and not ended.stdout, ended
    said = ended.stderr.splitlines()
    assert len(said) == 1 and said[0].startswith("error: the processes could not meet"), said
    assert where in said[0] and "did not answer in 1 s" in said[0]


def together(program: str, count: int, *flags: str) -> list[str]:
    """What each of so many processes of a program prints, with four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    several = ["--coordinator", where, "--processes", str(count), "--process-id"]
    several = [[*several, str(i)] if count > 1 else [] for i in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / program), *flags, *own],
            cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // count)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in several
    ]  # fmt: skip
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * count, said
    lines = ([x for x in out.splitlines() if not x.startswith("[Gloo]")] for out, _ in said)
    return ["\n".join(x) for x in lines]


def test_processes_write_what_one_does(tmp_path):
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")
    (tmp_path / "prompts.txt").write_text("\n".join(story[:30] for story in stories[:12]))
    written = []
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        flags = ["--model", "demo/teacher", "--prompts", str(tmp_path / "prompts.txt")]
        flags += ["--max-new", "24", "--batch-size", "8", "--samples", "2", "--quiet"]
        said = together("generate.py", count, *flags, "--out", str(out))
        assert "24 answers" in said[0] and not any(said[1:]), said
        written.append(out.read_text())
    assert written[0] == written[1] and written[0].count("\n") == 24


def test_processes_score_as_one_does():
    flags = ["--model", "demo/teacher", "--teacher", "demo/teacher", "--data.source"]
    flags += ["demo/stories.txt", "--data.documents", "paragraph", "--windows", "20", "--json"]
    figures = []
    for count in (1, 2):
        first, *others = together("eval.py", count, *flags, "--seq-len", "64")
        assert not any(others)
        figures.append(json.loads(first))
    assert figures[1] == pytest.approx(figures[0], rel=1e-6, abs=1e-9)
