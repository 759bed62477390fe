"""Runs, text and targets in buckets of real protocol servers, and a run that is killed there."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import load_file

from runtime import buckets, results
from runtime.report import read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# A program that kills itself when it is about to write the nth object of a checkpoint, or of one
# after it.
PROGRAM = """
import os, signal
import {0}
from runtime import buckets, errors
buckets.PAUSE, open_bucket = 0.1, buckets.open_bucket
step, left = map(int, os.environ.get("KILL_AT", "99 1").split())
class Mortal:
    def __init__(self, store):
        self.store = store
    def __getattr__(self, name):
        return getattr(self.store, name)
    def open_output_stream(self, name, **options):
        global left
        _, found, rest = name.partition("/checkpoints/")
        left -= bool(found) and int(rest.partition("/")[0]) >= step
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.store.open_output_stream(name, **options)
def mortal(url):
    store, path = open_bucket(url)
    return Mortal(store), path
buckets.open_bucket = mortal
errors.run({0}.main)
"""
FLAGS = [
    "--student-layers", "4", "--student-init", "last", "--student-heal", "none", "--steps", "12",
    "--batch-size", "16", "--seq-len", "64", "--eval-windows", "8", "--save-every", "1",
    "--log-every", "1", "--quiet",
]  # fmt: skip


def serve(command: list[str], port: int):
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            assert server.poll() is None, command
            time.sleep(0.1)
    raise AssertionError(command)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """An S3 server (moto) and a Google Cloud Storage server, each with the bucket `shelf`."""
    ports, home = (free_port(), free_port()), tmp_path_factory.mktemp("servers")
    s3 = serve([f"{BIN}/moto_server", "-H", "127.0.0.1", "-p", str(ports[0])], ports[0])
    storage = [f"{BIN}/gcp-storage-emulator", "start", "--host", "127.0.0.1", "--port"]
    storage += [str(ports[1]), "--in-memory", "--default-bucket", "shelf"]
    google = serve(storage, ports[1])
    where = f"http://127.0.0.1:{ports[0]}"
    urllib.request.urlopen(urllib.request.Request(f"{where}/shelf", method="PUT"))
    environment = {
        "AWS_ENDPOINT_URL": where, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{ports[1]}",
        "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            if not name.startswith("JAX"):
                patch.setenv(name, value)
        yield os.environ | environment
    for server in (s3, google):
        server.kill()
        server.wait()


def start(program: str, environment: dict[str, str], *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(program), *flags], env=environment, cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(program: str, environment: dict[str, str], *flags: str) -> str:
    out, err = (process := start(program, environment, *flags)).communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def names(url: str) -> set[str]:
    store, path = fs.FileSystem.from_uri(url)
    entries = store.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return {entry.path.removeprefix(f"{path}/") for entry in entries if entry.is_file}


def download(url: str, folder: Path) -> Path:
    buckets.download(url, folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(servers, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish("distill", servers, *FLAGS, "--out", str(out))
    return out


def same(run: Path, other: Path) -> None:
    weights = [(x / "student" / "model.safetensors").read_bytes() for x in (run, other)]
    assert weights[0] == weights[1]
    lines = [
        [{k: v for k, v in line.items() if k not in results.OF_ONE_START} for line in metrics]
        for metrics in (read_metrics(x / "metrics.jsonl") for x in (run, other))
    ]
    assert lines[0] == lines[1]


def test_a_run_that_is_killed_five_times_on_s3_ends_as_if_it_never_was(
    servers, uninterrupted, tmp_path
):
    url, stops = "s3://shelf/runs/killed", []
    for moment in ("1 1", "1 9", "4 12", "7 15", "10 16"):
        process = start("distill", servers | {"KILL_AT": moment}, *FLAGS, "--out", url)
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, said
        steps = (x.split("/")[1] for x in names(url) if "manifest" in x)
        stops.append(max(map(int, steps), default=0))
        shutil.rmtree(Path(servers["XDG_CACHE_HOME"]) / "compact-distill" / "buckets")
    assert stops[0] == 0 and len(set(stops)) > 2, stops
    finish("distill", servers, *FLAGS, "--out", url)
    same(download(url, tmp_path / "copy"), uninterrupted)


def start_several(
    program: str, count: int, environment: dict[str, str], *flags: str
) -> list[subprocess.Popen]:
    """Processes of one run, of which nothing but the bucket is shared."""
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count)]
    own = [[*together, "--process-id", str(i)] if count > 1 else [] for i in range(count)]
    homes = [{"XDG_CACHE_HOME": f"{environment['XDG_CACHE_HOME']}-{i}"} for i in range(count)]
    return [start(program, environment | homes[i], *flags, *own[i]) for i in range(count)]


def test_processes_that_share_nothing_but_a_bucket_are_killed_and_others_go_on(
    servers, uninterrupted, tmp_path
):
    """Two, then one, then two, on machines that know nothing of the run."""
    url, steps = "s3://shelf/runs/pair", [0]
    for count, moment in ((2, "3 4"), (1, "7 9"), (2, "99 1")):
        environment = servers | {"XDG_CACHE_HOME": str(tmp_path / moment), "KILL_AT": moment}
        group = start_several("distill", count, environment, *FLAGS, "--out", url)
        while all(process.poll() is None for process in group):
            time.sleep(0.1)
        if count == 1 or moment != "99 1":
            assert any(process.poll() == -signal.SIGKILL for process in group)
            for process in group:
                process.kill()
        said = [process.communicate(timeout=60)[1] for process in group]
        sealed = [name.split("/")[1] for name in names(url) if "manifest/metadata" in name]
        steps.append(max(map(int, sealed)))
        written = [f"checkpoints/{steps[-1]}/arrays/ocdbt.process_{i}/" for i in range(2)]
        parts = [any(name.startswith(part) for name in names(url)) for part in written]
        assert parts == [True, count == 2]
    assert [process.returncode for process in group] == [0, 0], said
    assert steps == sorted(set(steps)) and steps[-1] == 12
    copy = download(url, tmp_path / "copy")
    weights = [load_file(x / "student" / "model.safetensors") for x in (copy, uninterrupted)]
    for name, leaf in weights[0].items():
        np.testing.assert_allclose(leaf, weights[1][name], rtol=0, atol=1e-5)


def test_a_run_on_google_cloud_storage(servers, uninterrupted, tmp_path):
    url = "gs://anonymous@shelf/runs/whole"
    finish("distill", servers, *FLAGS, "--out", url)
    same(download(url, tmp_path / "copy"), uninterrupted)
    assert not any("checkpoints/9/" in name for name in names(url))


def test_text_models_and_targets_in_buckets(servers, uninterrupted, tmp_path):
    import pyarrow

    stories = (ROOT / "demo" / "stories.txt").read_bytes()
    store, _ = fs.FileSystem.from_uri("s3://shelf/text")
    with store.open_output_stream("shelf/text/a.txt.zst", compression=None) as file:
        file.write(pyarrow.compress(stories, "zstd", asbytes=True))
    fs.copy_files(str(ROOT / "demo" / "teacher"), "s3://shelf/teacher")
    text = ["--data.source", "s3://shelf/text/*.zst", "--data.documents", "paragraph"]
    pair = start_several(
        "targets", 2, servers, "--teacher", "s3://shelf/teacher", *text, "--seq-len", "64",
        "--steps", "12", "--batch-size", "16", "--out", "s3://shelf/targets", "--quiet",
    )  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    written = names("s3://shelf/targets")
    assert "targets.json" in written and sum(x.endswith(".targets") for x in written) == 2
    finish(
        "distill", servers, *FLAGS, "--targets", "s3://shelf/targets", "--out", "s3://shelf/kept"
    )
    said = finish("eval", servers, "--model", "s3://shelf/kept/student", *text, "--windows", "4")
    assert "perplexity" in said


def test_a_bucket_that_is_not_there_is_refused_before_the_work(servers):
    process = start("distill", servers, *FLAGS, "--out", "s3://nobodys/run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "--out s3://nobodys/run: cannot be written" in err
    assert len(err.strip().splitlines()) == 1
