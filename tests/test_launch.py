"""The files for schedulers: what each starts is a command that distill.py takes."""

import json
import math
import os
import subprocess
import sys

import pytest
import readme
import yaml

import distill
from runtime import errors

LAUNCH = readme.ROOT / "launch"
RECORD = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def config(arguments: list[str]) -> distill.Config:
    assert arguments[0] == "distill.py"
    return errors.cli(distill.Config, arguments[1:])


def program(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bash(folder, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}"} | environment
    return subprocess.run(
        ["bash", "-c", script, "script", *arguments], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (85, True), (1, False)])
def test_slurm_queues_again_what_was_stopped_and_nothing_else(tmp_path, status, requeued):
    program(tmp_path / "bin" / "srun", '#!/bin/sh\n"$@"\nexit $STATUS\n')
    program(tmp_path / "bin" / "scontrol", '#!/bin/sh\necho "$@" > asked\n')
    program(tmp_path / ".venv" / "bin" / "python", RECORD)
    script = (LAUNCH / "slurm.sbatch").read_text()
    done = bash(tmp_path, script, "--steps", "7", STATUS=str(status), SLURM_JOB_ID="12")
    run = config(json.loads(done.stdout))
    assert run.distributed and run.steps == 7
    assert (run.out, run.requeue_status) == ("runs/slurm-12", 85)
    assert done.returncode == status
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 12\n"


def test_skypilot_tells_each_node_who_it_is(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    program(tmp_path / ".venv" / "bin" / "python", RECORD)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    done = bash(tmp_path, task["run"], **nodes, SKYPILOT_NODE_RANK="1")
    run = config(json.loads(done.stdout))
    assert (run.coordinator, run.processes, run.process_id) == ("10.0.0.1:8476", 2, 1)
    assert run.out.startswith(next(iter(task["volumes"])))
    assert run.requeue_status in task["resources"]["job_recovery"]["recover_on_exit_codes"]


def jobset(name: str):
    """A job set, its one job, and what the container of its last host runs."""
    job_set = yaml.safe_load((LAUNCH / name).read_text())
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    last = str(spec["completions"] - 1)
    words = [word.replace("$(HOST)", last) for word in container["command"] + container["args"]]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    run = config(words[1:])
    assert any(run.out.startswith(path) for path in mounts)
    assert run.requeue_status, "a run that was stopped would count as completed"
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    return job_set["metadata"]["name"], job["name"], spec, container, run


def test_the_first_of_the_gpu_hosts_is_the_coordinator():
    name, job, spec, container, run = jobset("jobset-gpu.yaml")
    assert (run.processes, run.process_id) == (spec["completions"], spec["completions"] - 1)
    assert run.coordinator == f"{name}-{job}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert "HOST" in [variable["name"] for variable in container["env"]]


def test_the_tpu_hosts_have_all_chips_of_their_slice():
    *_, spec, container, run = jobset("jobset-tpu.yaml")
    selector = spec["template"]["spec"]["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert run.distributed and run.batch_size % chips == 0
