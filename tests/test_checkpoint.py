"""Saved is restored bit by bit, on any mesh; what is not whole is never taken for a state."""

import contextlib
import errno
import gc
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from runtime import checkpoint
from runtime.checkpoint import Checkpoints, latest, restore
from runtime.errors import UserError
from sharding import make_mesh

ROOT = Path(__file__).parents[1]
PLACES = {
    "matrix": PartitionSpec("fsdp", "tensor"),
    "stacked": PartitionSpec(None, "tensor", ("fsdp", "data")),
    "flags": PartitionSpec("data"),
}


class Weights(eqx.Module):
    matrix: jax.Array
    stacked: jax.Array
    head: jax.Array | None
    flags: jax.Array
    name: str = eqx.field(static=True)


class Moments(NamedTuple):
    count: jax.Array
    mu: Weights


class State(eqx.Module):
    student: Weights
    opt_state: tuple
    step: jax.Array


def state_of(step: int, mesh=None, scale: int = 1) -> State:
    """Every bit follows from `step`; NaNs, infinities and -0 are among the values."""
    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    generator = np.random.default_rng(step)

    def placed(value, spec):
        where = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(value.shape, where, lambda part: value[part])

    def bits(name, shape, dtype):
        raw = generator.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        value = np.frombuffer(raw, dtype).reshape(shape)
        if dtype == np.uint8:
            value = value % 2 == 0
        return placed(value, PLACES.get(name, PartitionSpec()))

    def weights():
        return Weights(
            bits("matrix", (16 * scale, 24), np.float32),
            bits("stacked", (3, 8, 16), jnp.bfloat16),
            None,
            bits("flags", (8,), np.uint8),
            "student",
        )

    moments = Moments(bits("count", (), np.int32), weights())
    return State(weights(), (moments, None, ()), placed(np.array(step, np.int32), PartitionSpec()))


def same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
               for x, y in pairs)  # fmt: skip


def write(folder: Path, *steps: int, keep: int = 10) -> None:
    with Checkpoints(folder, keep) as saved:
        for step in steps:
            saved.save(step, state_of(step), {"from": step})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    write(folder, 1, 2)
    return folder


@pytest.fixture
def copy(pair, tmp_path):
    return Path(shutil.copytree(pair, tmp_path / "copy"))


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 1), (4, 1, 2)])
@pytest.mark.parametrize("abstract", [False, True])
def test_what_one_mesh_saved_another_restores_bit_by_bit(tmp_path, sizes, abstract):
    state = state_of(7, make_mesh(1, 8, 1))
    with Checkpoints(tmp_path) as saved:
        saved.save(7, state, {"chosen": [0, 2], "text": "ü\n"})
    devices = jax.devices()[: int(np.prod(sizes))]
    like = state_of(0, make_mesh(*sizes, devices=devices))
    if abstract:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
    restored, extra, step = restore(tmp_path, like)
    assert same(restored, state)
    assert (extra, step) == ({"chosen": [0, 2], "text": "ü\n"}, 7)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert new.sharding == old.sharding


def test_shapes_without_a_place_are_restored_to_the_first_device(pair):
    like = eqx.filter_eval_shape(lambda: jax.tree.map(jnp.zeros_like, state_of(0)))
    restored, _, _ = restore(pair, like)
    assert same(restored, state_of(2))


def test_buffers_may_be_donated_or_deleted_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x * 3 + 1, state),
        donate_argnums=0,
    )
    mesh = make_mesh(1, 8, 1)
    with Checkpoints(tmp_path, keep=4) as saved:
        for step in range(2):
            state = state_of(step, mesh, scale=4096)
            saved.save(step, state, {})
            for _ in range(4):
                state = overwrite(state)
        for step in range(2, 4):
            state = state_of(step, mesh, scale=4096)
            saved.save(step, state, {})
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            state = overwrite(state_of(9, mesh, scale=4096))  # into the memory that came free
    for step in reversed(range(4)):
        assert same(restore(tmp_path, state)[0], state_of(step, mesh, scale=4096))
        shutil.rmtree(tmp_path / str(step))


def mixed(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_checksums_are_those_of_the_whole_array_on_any_mesh(sizes):
    devices = jax.devices()[: math.prod(sizes)]
    named = checkpoint._named(state_of(3, make_mesh(*sizes, devices=devices)))
    for name, array in named.items():
        whole = np.asarray(array)
        words = np.frombuffer(whole.tobytes(), f"<u{whole.dtype.itemsize}").astype(np.uint64)
        position = mixed(np.arange(words.size, dtype=np.uint64))
        sum_of_words = int(mixed(words ^ position).sum() % 2**32)
        assert int(checkpoint.checksum(array)) == sum_of_words, name


def test_the_checksum_of_one_device_writes_out_a_slab_alone():
    array = jnp.zeros((64, 256, 256), jnp.float32)
    program = checkpoint._checksum.lower(array, checkpoint.SLABS).compile()
    assert program.memory_analysis().temp_size_in_bytes < array.nbytes / 8


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16, np.uint8])
def test_no_flipped_bit_leaves_a_checksum_as_it_was(dtype):
    value = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (3, 5), dtype)

    def checksum(x):
        return checkpoint.checksum(jnp.asarray(x))

    sums = {int(checksum(value))}
    for index in np.ndindex(value.shape):
        for bit in range(value.dtype.itemsize * 8):
            flipped = value.copy()
            flipped[index] ^= dtype(1 << bit)
            sums.add(int(checksum(flipped)))
    assert len(sums) == 1 + value.nbytes * 8
    assert int(checksum(value[::-1])) not in sums


def test_the_newest_are_kept_and_a_run_begun_again_supersedes_later_steps(tmp_path):
    write(tmp_path, 10, 20, 30, keep=2)
    assert steps(tmp_path) == ["20", "30"]
    write(tmp_path, 25, keep=2)
    assert steps(tmp_path) == ["20", "25"]
    write(tmp_path, 25, keep=1)  # the same step again
    assert steps(tmp_path) == ["25"]
    assert same(restore(tmp_path, state_of(0))[0], state_of(25))


def test_leftovers_are_cleaned_up_and_nothing_else(copy):
    for name in ("3.orbax-checkpoint-tmp", "0.removed", "notes.removed", "best"):
        shutil.copytree(copy / "2", copy / name)
    assert latest(copy) == 2
    Checkpoints(copy).close()
    assert steps(copy) == ["1", "2", "best", "notes.removed"]


def test_what_is_called_like_a_checkpoint_and_is_none_stays(copy, capfd):
    for name in ("3", "4", "4.removed", "2024"):
        (copy / name).mkdir()
        (copy / name / "mine").write_text("mine")
    (copy / "5").write_text("mine")
    (copy / "6").symlink_to(copy / "2024")
    assert latest(copy) == taken(copy, capfd) == 2
    with Checkpoints(copy, keep=1) as saved:
        saved.save(3, state_of(3), {})
        with pytest.raises(UserError, match="3 could not be written .File exists"):
            saved.wait()
        saved.save(4, state_of(4), {})
        with pytest.raises(UserError, match="4 could not be written .File exists"):
            saved.wait()
        saved.save(7, state_of(7), {})
    mine = {"3", "4", "4.removed", "5", "6", "2024"}
    assert set(steps(copy)) == mine | {"7"} and len(list(copy.glob("*/mine"))) == 5


def test_a_folder_without_checkpoints(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    with pytest.raises(UserError, match="expected a checkpoint, found none"):
        restore(tmp_path, state_of(0))


def taken(folder: Path, capfd) -> int:
    """The step that is restored, bit by bit as it was saved; another than 2 is announced."""
    state, extra, step = restore(folder, state_of(0))
    assert same(state, state_of(step)) and extra == {"from": step}
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2 - step, warnings
    assert all("damaged and skipped: " in line for line in warnings)
    return step


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_no_flipped_bit_is_accepted(copy, capfd):
    chosen, found = random.Random(0), 0
    names = files(copy / "2")
    assert len(names) > 8
    for file in names:
        whole = file.read_bytes()
        places = range(len(whole)) if len(whole) <= 20 else chosen.sample(range(len(whole)), 20)
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << chosen.randrange(8)
            file.write_bytes(flipped)
            found += taken(copy, capfd) == 1
        file.write_bytes(whole)
    assert found > 30  # the others hit what nothing depends on, such as times and placements
    assert taken(copy, capfd) == 2


def test_every_byte_of_an_array_is_guarded(copy, capfd):
    raw = np.asarray(state_of(2).student.matrix).tobytes()
    [file] = [file for file in files(copy / "2") if raw in file.read_bytes()]
    whole = file.read_bytes()
    for place in range(whole.index(raw), whole.index(raw) + len(raw), 61):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        assert taken(copy, capfd) == 1


@pytest.mark.parametrize("harm", ["removed", "emptied", "halved", "lengthened", "linked", "piped"])
def test_an_incomplete_checkpoint_is_skipped(copy, capfd, harm):
    found = 0
    for file in files(copy / "2"):
        whole = file.read_bytes()
        file.unlink()
        match harm:
            case "emptied":
                file.write_bytes(b"")
            case "halved":
                file.write_bytes(whole[: len(whole) // 2])
            case "lengthened":
                file.write_bytes(whole + b"\0")
            case "linked":
                file.symlink_to(copy / "1" / file.relative_to(copy / "2"))
            case "piped":
                os.mkfifo(file)
        found += taken(copy, capfd) == 1
        file.unlink(missing_ok=True)
        file.write_bytes(whole)
    assert found >= (1 if harm == "lengthened" else 4)
    shutil.rmtree(copy / "2")
    (copy / "2").mkdir()
    assert latest(copy) == taken(copy, capfd) == 1


@pytest.mark.parametrize(
    "claim",
    [
        {"shape": [10**7, 10**6]},
        {"chunks": [10**7, 10**6]},
        {"shape": [10**7, 10**6], "chunks": [10**7, 10**6]},
        {"dtype": "<f8"},
        {"compressor": {"id": "zlib", "level": 1}},  # a little may become anything
    ],
)
def test_an_array_that_claims_to_be_larger_is_not_allocated(copy, capfd, claim):
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{copy}/2/arrays/"}
    store, name = tensorstore.KvStore.open(store).result(), "student.matrix/.zarray"
    metadata = json.loads(store.read(name).result().value)
    store.write(name, json.dumps(metadata | claim).encode()).result()
    assert taken(copy, capfd) == 1


@pytest.mark.parametrize("name", ["manifest/metadata", "arrays/manifest.ocdbt"])
def test_a_file_that_claims_to_be_larger_is_not_read(copy, capfd, name):
    os.truncate(copy / "2" / name, 1 << 43)
    assert latest(copy) == taken(copy, capfd) == 1


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(copy, capfd):
    shutil.rmtree(copy / "2")
    shutil.copytree(copy / "1", copy / "2")
    assert taken(copy, capfd) == 1


def test_all_damaged_is_never_taken_for_a_fresh_start(copy):
    for step in ("1", "2"):
        shutil.rmtree(copy / step / "arrays")
    with pytest.raises(UserError, match="found 2, all damaged: put back a copy, or move them"):
        restore(copy, state_of(0))
    for step in ("1", "2"):
        (copy / step / "manifest" / "metadata").unlink()
    with pytest.raises(UserError, match="found 2, all damaged"):
        latest(copy)


@pytest.mark.parametrize(
    "where, value, refusal",
    [
        (lambda s: s.student.matrix, jnp.zeros((16, 23)), "student.matrix to be float32[16, 23], "
         "found float32[16, 24]"),
        (lambda s: s.student.stacked, jnp.zeros((3, 8, 16)), "student.stacked to be float32"),
        (lambda s: s.opt_state[0].mu.flags, None, "opt_state[0].mu.flags to be none, found bool"),
        (lambda s: s.student.head, jnp.zeros(2), "student.head to be float32[2], found none"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_by_its_first_leaf(pair, where, value, refusal):
    like = eqx.tree_at(where, state_of(0), value, is_leaf=lambda x: x is None)
    with pytest.raises(UserError, match=re.escape(refusal)):
        restore(pair, like)


@contextlib.contextmanager
def small_disk(size: int):
    """No file may grow beyond `size`; the system says so as it says that a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax leaves writes behind that it never began.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(tmp_path, capsys, caplog, size):
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(1, state_of(1), {"from": 1})
    saved.wait()
    with small_disk(size):
        saved.save(2, state_of(2), {})
        with pytest.raises(UserError, match=r"2 could not be written \(.+\), the ones before are"):
            saved.wait()
        assert steps(tmp_path) == ["1"]
        saved.save(3, state_of(3), {})
        with contextlib.suppress(UserError):
            saved.save(4, state_of(4), {})
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and "3 could not be written" in told[0]
        with pytest.raises(UserError, match="4 could not be written"):
            saved.wait()
    assert same(restore(tmp_path, state_of(0))[0], state_of(1))
    saved.save(4, state_of(4), {"from": 4})  # there is room again
    saved.close()
    assert steps(tmp_path) == ["4"] and not caplog.records
    assert same(restore(tmp_path, state_of(0))[0], state_of(4))
    gc.collect()


def test_the_log_keeps_what_others_say(caplog):
    checkpoint._orbax()
    for where in ("orbax/file.py", "elsewhere/file.py"):
        try:
            exec(compile("raise OSError('full')", where, "exec"))
        except OSError as error:
            logging.getLogger("asyncio").error("never retrieved", exc_info=error)
    (kept,) = caplog.records
    assert "elsewhere" in caplog.text and kept.getMessage() == "never retrieved"


def test_an_error_on_the_way_out_is_not_hidden_by_that_of_a_save(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), small_disk(100), Checkpoints(tmp_path) as saved:
        saved.save(1, state_of(1), {})
        raise ZeroDivisionError
    assert "1 could not be written" in capsys.readouterr().err
    with pytest.raises(UserError), small_disk(100), Checkpoints(tmp_path) as saved:
        saved.save(1, state_of(1), {})


def test_saving_and_restoring_say_nothing(tmp_path, capfd):
    write(tmp_path, 1, 2)
    restore(tmp_path, state_of(0))
    assert capfd.readouterr() == ("", "")


def child(code: str, *args, **environment: str) -> subprocess.Popen:
    imports = "import sys\nsys.path[:0] = ['.', 'tests']\n"
    return subprocess.Popen(
        [sys.executable, "-c", imports + code, *map(str, args)],
        cwd=ROOT, env=os.environ | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


LOCKED = """
from runtime import checkpoint
with checkpoint.lock(sys.argv[1]):
    print("orbax" in sys.modules, flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_others_out_until_its_process_dies(tmp_path):
    process = child(LOCKED, tmp_path)
    assert process.stdout.readline() == "False\n"  # nor is Orbax imported before it is needed
    with pytest.raises(UserError, match=f"{tmp_path} is in use by another run"):
        with checkpoint.lock(tmp_path):
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for _ in range(2):  # what a crash leaves, and what a run that ended well leaves
        with checkpoint.lock(tmp_path):
            assert latest(tmp_path) is None


def test_a_folder_that_cannot_be_made_ends_promptly(tmp_path, monkeypatch, recwarn):
    """Orbax would wait for it five minutes, in a thread that outlives the program."""
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state_of(1), {})
        saved.wait()
        threads, mkdir = set(threading.enumerate()), os.mkdir

        def refuse(path, *args, **options):
            if str(path).startswith(str(tmp_path)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return mkdir(path, *args, **options)

        with monkeypatch.context() as patch:  # root may write anywhere
            patch.setattr(os, "mkdir", refuse)
            saved.save(2, state_of(2), {})
            with pytest.raises(UserError, match="2 could not be written .Permission denied"):
                saved.wait()
        assert set(threading.enumerate()) <= threads and not recwarn.list
        saved.save(3, state_of(3), {})
    assert steps(tmp_path) == ["1", "3"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("where", ["files", "folder", "arrays"])
def test_what_cannot_be_read_is_not_taken_for_damaged(copy, monkeypatch, number, where):
    """Nor for no checkpoint: a run would go on from an older one, or begin anew."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def load(*_):
        raise ValueError(f"DATA_LOSS: Error reading x: no [os_error_code='{number}'] [spec={{}}]")

    if where == "files":
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: refuse())
    elif where == "folder":
        monkeypatch.setattr(os, "listdir", refuse)
    else:
        monkeypatch.setattr(checkpoint, "_load", load)
    with pytest.raises(UserError, match=f"cannot be read .{os.strerror(number)}.: give permission"):
        restore(copy, state_of(0))
    if where != "arrays":
        with pytest.raises(UserError, match="cannot be read"):
            latest(copy)


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match="checkpoints: cannot be read .Not a directory"):
        latest(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="checkpoints: cannot be written .File exists"):
        Checkpoints(tmp_path / "checkpoints")


def test_a_checkpoint_is_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    write(tmp_path, 1)
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda file: order.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: order.append(str(b)) or rename(a, b))
    write(tmp_path, 2, keep=1)
    written = [str(path) for path in (tmp_path / "2", *(tmp_path / "2").rglob("*"))]
    assert set(written) <= set(order[: order.index(str(tmp_path / "1.removed"))])
    assert steps(tmp_path) == ["2"]
