"""A run whose step hangs ends by itself, and says where it was."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from test_distill import ROOT, config, one_device, quick, teacher, text  # noqa: F401

from runtime import checkpoint

# The fourth step takes a minute.
HANGS = """
import sys, time
import distill
block, calls = distill.processes.block_on_cpu, []
def hang_at_last(result):
    calls.append(1)
    if len(calls) == 4:
        time.sleep(60)
    return block(result)
distill.processes.block_on_cpu = hang_at_last
distill.errors.run(distill.main)
"""


def test_a_run_whose_step_hangs_ends_with_the_stacks(quick, tmp_path):  # noqa: F811
    (tmp_path / "settings.json").write_text(json.dumps(dataclasses.asdict(quick)))
    flags = ["--config", str(tmp_path / "settings.json"), "--out", quick.out]
    limit = ["--hang-limit", "0.1"]
    command = [sys.executable, "-c", HANGS, *flags, *limit]
    hung = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert hung.returncode == 1
    assert "Timeout (0:00:06)!" in hung.stderr and "in hang_at_last" in hung.stderr
    assert "in loop" in hung.stderr and not Path(quick.out, "student").exists()
    assert checkpoint.latest(Path(quick.out) / "checkpoints") == 3
    command = [sys.executable, "distill.py", *flags, *limit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and Path(quick.out, "student").exists(), done.stderr
