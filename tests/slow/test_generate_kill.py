"""A run of generate.py that is killed at any moment loses nothing and writes nothing twice."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_generate import ROOT, base, plain, prompts_file, ran, read  # noqa: F401

from runtime import answers


def started(base: dict, tmp_path: Path, **flags) -> subprocess.Popen:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (base | flags).items()]
    environment = {"JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.Popen(
        [sys.executable, "generate.py", *words],
        cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_at_any_moment_nothing_is_lost_or_written_twice(base, tmp_path):
    prompts_file(tmp_path, 40)
    out = tmp_path / "out.parquet"
    flags = {"samples": 8, "batch_size": 2, "max_new": 12, "out": out}
    expected = read(ran(**base | flags | {"out": tmp_path / "whole.parquet"}))
    journal, rng = answers.journal_path(flags["out"]), random.Random(0)
    for share in (0.1, 0.5, 0.8):
        doomed = started(base, tmp_path, **flags)
        enough = rng.uniform(share, share + 0.1) * 320
        while not journal.exists() or journal.read_bytes().count(b"\n") < enough:
            assert doomed.poll() is None, doomed.stderr.read()
            time.sleep(0.002)
        doomed.send_signal(signal.SIGKILL)
        doomed.communicate()
        assert not flags["out"].exists()
        with journal.open("ab") as file:  # as a crash of the machine may leave it
            file.write(b'{"prompt": 1, "sample"')
    last = started(base, tmp_path, **flags)
    assert last.wait(60) == 0, last.stderr.read()
    last.communicate()
    assert read(flags["out"]) == expected
    assert not journal.exists()
