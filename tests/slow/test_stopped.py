"""A run that is asked to stop saves, and the same command goes on from there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from test_distill import ROOT, config, metrics_of, teacher, text  # noqa: F401

from runtime import checkpoint


def test_sigterm_saves_and_says_how_to_go_on(config, teacher, text):
    """In a process of its own: killed gently after its first line, continued to the end."""
    out = Path(config.out)
    command = [
        sys.executable, "distill.py", "--teacher", str(teacher), "--student-layers", "2",
        "--student-init", "last", "--student-heal", "none", "--data.source", str(text),
        "--data.documents", "paragraph", "--data.cache", str(text.parent), "--seq-len", "32",
        "--batch-size", "4", "--steps", "400", "--save-every", "1000", "--log-every", "1",
        "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    for line in run.stderr:
        if line.startswith("step 3/"):
            break
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 0, told
    stopped = checkpoint.latest(out / "checkpoints")
    assert f"stopped at step {stopped}" in told and "to continue: python" in told
    command[command.index("400")] = str(stopped + 2)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert metrics_of(out)[-1]["step"] == stopped + 2
    steps = [line["step"] for line in metrics_of(out) if "loss" in line]
    assert steps == list(range(1, stopped + 3))
