"""What a run needs is told before a weight is read, and is what it then holds."""

import contextlib
import dataclasses
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import readme
from test_distill import config_of, teacher, text  # noqa: F401

import distill
import models
import sharding
from runtime import errors, plan, prepare, processes
from runtime.errors import UserError


@pytest.fixture(scope="module")
def half(teacher, tmp_path_factory) -> Path:
    """The teacher as it is often stored, in two bytes a number."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.load(teacher))
    models.save(model, folder, tokenizer=teacher)
    return folder


@pytest.fixture
def config(half, text, tmp_path) -> distill.Config:
    return dataclasses.replace(config_of(half, text, tmp_path / "run"), student_init="first")


class Begun(Exception):
    """A run has loaded all that it holds and would take its first step."""


@pytest.fixture
def begun(monkeypatch):
    def stop(run, state, *_):
        raise Begun(run, state)

    monkeypatch.setattr(distill, "loop", stop)


def resident(config: distill.Config) -> plan.DeviceBytes:
    config = distill.with_defaults(config)
    placement = prepare.placement(config)
    optimizer, _ = prepare.optimizer_and_objective(config)
    with sharding.use_mesh(placement.mesh, placement.layout):
        arguments = distill.abstract_arguments(config, placement)
        return plan.resident_bytes(config, placement, *arguments, optimizer)


@pytest.mark.parametrize("zero", [3, 1])
@pytest.mark.parametrize(
    ("sizes", "apart"), [((1, 8, 1), None), ((2, 2, 2), None), ((1, 4, 1), 4)], ids=str
)
def test_arrays_are_those_of_the_run(config, begun, sizes, apart, zero):
    mesh = distill.Mesh(*sizes)
    config = dataclasses.replace(config, mesh=mesh, zero=zero, teacher_devices=apart)
    need = resident(config)
    with pytest.raises(Begun) as end:
        distill.train(config)
    run, state = end.value.args
    parts = {
        "teacher": run.step_teacher, "student": state.student, "moments": state.opt_state,
        "batch": run.batch(0),
    }  # fmt: skip
    for name, part in parts.items():
        for device in run.placement.mesh.devices.flat:
            shards = [s for leaf in jax.tree.leaves(part) for s in leaf.addressable_shards]
            size = sum(shard.data.nbytes for shard in shards if shard.device == device)
            assert size == getattr(need, name), (name, device)
    assert need.gradients == need.student
    assert need.arrays == need.teacher + need.student + need.moments + need.batch


def test_arguments_are_what_the_compiler_counts(config):
    config = dataclasses.replace(distill.with_defaults(config), mesh=distill.Mesh(2, 2, 2))
    placement, (optimizer, objective) = (
        prepare.placement(config), prepare.optimizer_and_objective(config)
    )  # fmt: skip
    with sharding.use_mesh(placement.mesh):
        frozen, state = distill.abstract_arguments(config, placement)
        program = plan.compile_abstract(distill.step, (frozen, state), optimizer, objective)
    counters = plan.bytes_of((state.step, state.skipped))
    known = plan.resident_bytes(config, placement, frozen, state, optimizer).arrays + counters
    assert program.memory_analysis().argument_size_in_bytes == known


def test_a_plan_needs_no_more_than_a_config(config, half, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(half / "config.json", bare)
    assert models.abstract(bare) == models.abstract(half)
    monkeypatch.setattr(models, "load", None)
    planned = dataclasses.replace(config, teacher=str(bare), plan=True)
    distill.train(planned)
    said = capsys.readouterr().out
    need = resident(config)
    assert "data 1 x fsdp 8 x tensor 1" in said and "vocab=fsdp,tensor" in said
    for name in ("teacher", "student", "moments", "gradients"):
        size = re.escape(plan.size(getattr(need, name)))
        assert re.search(rf"^  {name} +{size}$", said, re.MULTILINE), said
    assert "estimate" not in said and said.endswith("it fits\n")
    assert not Path(config.out).exists()


def test_a_plan_says_what_would_fit(config, monkeypatch, capsys):
    """The flags that it tells are enough, and without them it is too much."""
    words = ["--teacher", config.teacher, "--student-layers", "2", "--student-init", "first"]
    words += ["--seq-len", "64", "--batch-size", "2", "--plan", "--devices", "1"]
    known, need = {}, distill.device_bytes

    def once(config, placement):
        key = dataclasses.replace(config, device_memory=None)
        known[key] = known.get(key) or need(config, placement)
        return known[key]

    monkeypatch.setattr(distill, "device_bytes", once)
    monkeypatch.setattr(plan, "loss_bytes", lambda *_: 0)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)

    def planned(*more: str) -> str:
        with contextlib.suppress(SystemExit):
            distill.train(errors.cli(distill.Config, [*words, *more]))
        return capsys.readouterr().out

    said = planned()
    assert "unknown" in said and "estimate" in said and "fit" not in said
    whole = next(iter(known.values()))
    less = ("--device-memory", str((whole.total - 1000) / 1e9))
    with pytest.raises(SystemExit) as ended:
        distill.train(errors.cli(distill.Config, [*words, *less]))
    said = capsys.readouterr().out
    assert ended.value.code == 3
    flags = re.search(r"it does not fit; with( .*) it does, in", said)
    assert flags, said
    assert planned(*less, *shlex.split(flags[1])).endswith("it fits\n")
    monkeypatch.setattr(distill, "device_bytes", lambda *_: whole)
    said = planned(*less)
    assert "it does not fit, nor with" in said
    assert all(word in said for word in ("kept targets", "adafactor", "--optim.freeze"))


def test_a_teacher_that_no_step_is_given_counts(config, monkeypatch, capsys):
    """One with devices of its own, on these."""
    planned = dataclasses.replace(config, plan=True, teacher_devices=4, quiet=False)
    distill.train(planned)
    assert "its own" in capsys.readouterr().out
    whole = resident(config)._replace(own_teacher=10**15)
    monkeypatch.setattr(distill, "device_bytes", lambda *_: whole)
    with pytest.raises(SystemExit):
        distill.train(planned)
    assert "give the teacher more --teacher-devices" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_what_is_easier_is_what_its_flags_say(name):
    words = ["--batch-size", "64", "--optim.name", name]
    given = errors.cli(distill.Config, words)
    placement = prepare.Placement(sharding.make_mesh(), sharding.Layout(), None)
    tried = list(plan.smaller_settings(given, placement))
    parts = [config.microbatches for _, config in tried]
    assert parts == sorted(parts) and set(parts) == {1, 2, 4, 8}
    assert (tried[-1][1].optim != given.optim) == (name == "adamw")
    for flags, config in tried:
        flags = shlex.split(flags)
        flags = dict(zip(flags[::2], flags[1::2], strict=True))  # in the place of those given
        assert errors.cli(distill.Config, readme.with_flags(words, flags)) == config


def test_what_is_easier_divides_by_the_rules_of_the_mesh():
    given = errors.cli(distill.Config, ["--batch-size", "16"])
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    for rule, most in (("batch=data,fsdp,tensor", 2), ("batch=", 16)):
        placement = prepare.Placement(mesh, sharding.Layout(overrides=(rule,)), None)
        tried = plan.smaller_settings(given, placement)
        assert max(config.microbatches for _, config in tried) == most


def test_what_cannot_fit_is_refused_but_not_by_force(config, begun, monkeypatch):
    need = resident(config)
    least = need.arrays + need.gradients
    monkeypatch.setattr(plan, "host_memory", lambda: plan.PROGRAM + 8.0 * least)
    with pytest.raises(Begun):
        distill.train(config)
    monkeypatch.setattr(plan, "host_memory", lambda: plan.PROGRAM + 8.0 * (least - 1))
    with pytest.raises(UserError, match="this host.*--force"):
        distill.train(config)
    with pytest.raises(Begun):
        distill.train(dataclasses.replace(config, force=True))
    small = dataclasses.replace(config, device_memory=(least - 1) / 1e9)
    with pytest.raises(UserError, match="--device-memory.*--force"):
        distill.train(small)


def test_a_compiled_step_that_cannot_fit_is_refused_with_what_would(config, monkeypatch, capsys):
    """Its arrays and gradients would fit."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    need = resident(config)
    memory = (need.arrays + need.gradients) / 1e9
    refused = dataclasses.replace(config, device_memory=memory, steps=1, quiet=False)
    monkeypatch.setattr(plan, "smaller_settings", lambda *_: [(" --remat full", config)])
    monkeypatch.setattr(distill, "device_bytes", lambda *_: need._replace(teacher=0))
    with pytest.raises(UserError, match="a step needs .* with --remat full it does, in .*--force"):
        distill.train(refused)
    assert "compiling with other settings, to find some that fit" in capsys.readouterr().err
    assert distill.train(dataclasses.replace(refused, force=True)).exists()


@pytest.mark.parametrize(
    ("said", "limits", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "4096"}, 4096),
        ("0::/a/b\n", {"a/memory.max": "2048", "a/b/memory.max": "4096"}, 2048),
        ("0::/a/b\n", {"memory.max": "4096", "a/b/memory.max": "max"}, 4096),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "1024"}, 1024),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, None),
    ],
)
def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch, said, limits, expected):
    monkeypatch.setattr(plan, "Path", lambda path: tmp_path / path.lstrip("/"))
    note = tmp_path / "proc/self/cgroup"
    note.parent.mkdir(parents=True)
    note.write_text(said)
    for name, limit in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    monkeypatch.setattr(plan.os, "sysconf", lambda name: 2**20)
    assert plan.host_memory() == (2**40 if expected is None else expected)


# ---- what a placement cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mesh.fsdp", "3"], "does not match 8 devices: choose sizes whose product is 8"),
        (["--mesh.data", "-1"], "at most one is -1"),
        (
            "--mesh.fsdp 1 --mesh.tensor 8 --student-init random --student-heads 4"
            " --student-kv-heads 4".split(),
            "blocks.query: its 4 heads do not divide over 8 devices of the mesh axes tensor; the"
            " nearest mesh that works has 4 there",
        ),
        (["--batch-size", "12"], "12 rows at a time, which do not divide over 8 devices"),
        (["--batch-size", "16", "--microbatches", "4"], "gives 4 rows at a time"),
        (
            [
                "--batch-size",
                "4",
                "--mesh.fsdp",
                "4",
                "--mesh.tensor",
                "2",
                "--plan",
                "--mesh.rules",
                "batch=data,fsdp,tensor",
            ],
            "4 rows at a time, which do not divide over 8",
        ),
        (["--zero", "2"], "'--zero'. Expected one of ('1', '3')"),
        (["--devices", "8"], "--devices without --plan"),
        (["--device-memory", "0", "--plan"], "--device-memory is 0.0: it must be above 0"),
        (["--teacher-devices", "8"], "the student needs one of them"),
        (["--teacher-devices", "4", "--distributed"], "with several processes: it is for one"),
        (["--teacher-devices", "4", "--targets", "x"], "no teacher is in memory"),
    ],
)
def test_placements_that_cannot_be_end_in_one_line(config, words, says, monkeypatch, capsys):
    monkeypatch.setattr(processes, "start", lambda *_, **__: None)  # the devices are there already
    data = ["--data.source", *config.data.source, "--data.cache", config.data.cache]
    given = ["distill.py", "--teacher", config.teacher, "--out", config.out, *data, *words]
    monkeypatch.setattr(sys, "argv", given)
    # Its thread would end this process at the next signal that a test sends.
    monkeypatch.setattr(processes, "end_at_once", lambda: None)
    with pytest.raises(SystemExit) as end:
        errors.run(distill.main)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(said) == 1 and said[0].startswith("error: ") and says in said[0], said
    assert not said[0].startswith("error: mu.")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"coordinator": "here:1"}, "given together"),
        ({"processes": 2, "process_id": 0}, "given together"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, "0 to 1"),
        ({"coordinator": "here:1", "processes": 2, "process_id": -1}, "0 to 1"),
    ],
)
def test_processes_that_cannot_be(flags, says):
    with pytest.raises(UserError, match=says):
        processes.start(processes.Config(**flags))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_refused(host):
    """gRPC would share it with the coordinator of another run, if that is its own."""
    with socket.create_server((host, 0), reuse_port=True) as taken:
        where = f"here:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{where}: .*in use.*another port"):
            processes.start(processes.Config(coordinator=where, processes=2, process_id=0))
