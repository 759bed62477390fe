"""State ⇄ disk, on Orbax: in the background, whole or absent, checked when read, onto any mesh.

A checkpoint is a folder named by its step. Beside the arrays it holds a manifest: shape, dtype and
checksum of every array by its path in the state, and the JSON that the caller stored with them.
Orbax's CheckpointManager does not do: after a full disk its next save puts the torn checkpoint
under its final name, and it skips a step that is there already without a word.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, PyTree, Shaped, UInt32

from runtime import files
from runtime.errors import UserError

PART = re.compile(r"(arrays|manifest|_CHECKPOINT_METADATA|commit_success.txt)(\..*tmp.*)?")
UNREADABLE = {getattr(errno, x) for x in "EACCES EPERM EIO ESTALE ENOTDIR ELOOP".split()}
LARGEST = 1 << 28  # bytes of a file that holds no arrays: it is read at once
LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removed)")


def lock(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of `folder`; the first process holds the lock for all."""
    first = jax.process_index() == 0
    return files.lock(Path(folder) / ".lock") if first else contextlib.nullcontext()


class Checkpoints(contextlib.AbstractContextManager):
    """Writes checkpoints into `folder`, in the background, and keeps the newest `keep`.

    All processes of a run call this alike. They share the folder; or each has its own, and writes
    what its devices hold: `merge_parts` reads the parts, once they lie together.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, shared: bool = True):
        self.folder, self.keep, self.shared = Path(folder).absolute(), max(keep, 1), shared
        self.first = jax.process_index() == 0 or not shared
        with files.disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._writer, self._writing, self._refused = _writer(shared), None, None

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            _warn(error)  # what ends the run already goes first

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Starts to write `state`, whose buffers may be donated as soon as this returns.

        Waits for the save before; if that one failed, it is a warning, and the run goes on.
        """
        try:
            self.wait()
        except UserError as error:
            _warn(error)
        arrays, args = _named(state), _orbax().args
        kinds = {key: [list(x.shape), x.dtype.name, checksum(x)] for key, x in arrays.items()}
        manifest = json.dumps({"step": step, "extra": extra, "arrays": kinds})
        self._writing, self._refused = self.folder / str(step), self._obstacle(step)
        if self._refused:
            return
        if self.first and self._writing.exists():  # damaged, or of a run given up
            self._writing.rename(self._writing.with_name(f"{step}.removed"))
        sealed = args.JsonSave({"text": manifest, "digest": _digest(manifest)})
        parts = args.Composite(arrays=args.PyTreeSave(arrays), manifest=sealed)
        self._writer.save(self._writing, args=parts)

    def _obstacle(self, step: int) -> OSError | None:
        """Why no folder can be made here: Orbax would wait for it, longer than the program runs."""
        error = None
        try:
            if self.first:
                for path in (self.folder / f"{step}", self.folder / f"{step}.removed"):
                    if os.path.lexists(path) and not _is_ours(path):
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                path.mkdir(parents=True, exist_ok=True)
                path.rmdir()
        except OSError as caught:
            error = caught
        if process_allgather(error is not None).any():
            return error or OSError("the first process cannot make it")
        return None

    def wait(self) -> None:
        """Returns once the last save is on disk; a `UserError` if it could not be written."""
        path, self._writing = self._writing, None
        try:
            refused, self._refused = self._refused, None
            if refused:
                raise refused
            self._writer.wait_until_finished()
            if path is not None and self.first:  # before older ones are removed
                files.sync(path, *path.rglob("*"))
        except Exception as error:  # a full disk is an OSError, a ValueError or a RuntimeError
            # The old writer would report its other troubles next time; it may still be writing.
            failed, self._writer = self._writer, _writer(self.shared)
            with contextlib.suppress(Exception):
                failed.close()
            for _ in range(50):
                if not self._clean():
                    break
                time.sleep(0.1)
            why = f"could not be written ({_reason(error)}), the ones before are intact"
            remedy = "free space there, or choose another folder"
            raise UserError(f"the checkpoint {path} {why}: {remedy}") from error
        if path is not None and self.first:
            # Later ones are those of a run that was given up.
            paths, step = _finished(self.folder), int(path.name)
            newest = [x for x in paths if int(x.name) <= step][: self.keep]
            for other in set(paths) - set(newest):
                other.rename(other.with_name(f"{other.name}.removed"))  # at once, for its readers
            self._clean()

    def close(self) -> None:
        """As `wait`; nothing can be saved after it."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def _clean(self) -> list[Path]:
        """Removes what is no checkpoint, and returns it."""
        paths = self.folder.glob("*") if self.first else ()
        leftovers = [path for path in paths if LEFTOVER.fullmatch(path.name) and _is_ours(path)]
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        return leftovers


def latest(folder: str | Path) -> int | None:
    """The step of the newest checkpoint whose manifest is whole; `None` if there was never any."""
    for path in _newest_first(folder):
        with contextlib.suppress(ValueError):
            return _manifest(path)["step"]
    return None


def restore(folder: str | Path, like: PyTree) -> tuple[PyTree, dict[str, Any], int]:
    """State, what was stored with it, and step, from the newest whole checkpoint.

    `like` is a state of arrays, real or abstract; the arrays restored go where its arrays are.
    """
    leaves = _named(like)
    wanted = {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in leaves.items()}
    for path in _newest_first(folder):
        reason = None
        try:
            manifest = _manifest(path)
            kinds = {name: f"{x[1]}{x[0]}" for name, x in manifest["arrays"].items()}
            for name in wanted | kinds:
                if wanted.get(name) != kinds.get(name):
                    misfit = f"{wanted.get(name, 'none')}, found {kinds.get(name, 'none')}"
                    remedy = "continue with the model and optimizer it was made with"
                    raise UserError(f"{path}: expected {name} to be {misfit}: {remedy}")
            with _readable(path):
                arrays = {name: _load(path, name, leaf) for name, leaf in leaves.items()}
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the file's
        except Exception as error:  # a broken file may raise anything
            reason = _reason(error)
        if not process_allgather(reason is None).all():
            reason = reason or "another process cannot read it"
        else:
            stored = manifest["arrays"]
            wrong = [name for name, x in arrays.items() if checksum(x) != stored[name][2]]
            reason = f"the checksum of {wrong[0]} is wrong" if wrong else None
        if reason is None:
            state = jax.tree.unflatten(jax.tree.structure(like), arrays.values())
            return state, manifest["extra"], manifest["step"]
        _warn(f"the checkpoint {path} is damaged and skipped: {reason}")
    raise UserError(f"{folder}: expected a checkpoint, found none")


def merge_parts(folder: Path) -> None:
    """Lets each checkpoint here find the arrays that several processes have written apart."""
    import tensorstore

    context = tensorstore.Context()  # of one: so a copy is one of names alone

    def store(path: Path) -> Any:
        base = {"driver": "file", "path": f"{path}/"}
        return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()

    for arrays in folder.glob("*/arrays"):
        if len(parts := list(arrays.glob("ocdbt.process_*"))) > 1:
            with contextlib.suppress(Exception):  # what is broken is told when it is read
                transaction = tensorstore.Transaction(atomic=True)
                whole = store(arrays).with_transaction(transaction)
                for part in parts:
                    store(part).experimental_copy_range_to(whole).result()
                transaction.commit_sync()


def _finished(folder: str | Path) -> list[Path]:
    """The checkpoints that were written to their end, newest first."""
    folder, names = Path(folder).absolute(), []
    with contextlib.suppress(FileNotFoundError), _readable(folder):
        names = os.listdir(folder)
    paths = [folder / name for name in names if re.fullmatch(r"\d+", name)]
    return sorted(filter(_is_ours, paths), key=lambda path: int(path.name), reverse=True)


def _is_ours(path: Path) -> bool:
    """Whether this is a folder that holds nothing but parts of a checkpoint, none if it is torn."""
    with contextlib.suppress(FileNotFoundError), _readable(path):
        is_folder = path.is_dir() and not path.is_symlink()
        return is_folder and all(map(PART.fullmatch, os.listdir(path)))
    return False


def _newest_first(folder: str | Path) -> Iterator[Path]:
    """The finished checkpoints; it is an error to ask on behind the last of them."""
    yield from (paths := _finished(folder))
    if paths:
        damaged = f"found {len(paths)}, all damaged"
        remedy = "put back a copy, or move them away to start anew"
        raise UserError(f"{folder}: expected a checkpoint, {damaged}: {remedy}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refuses what may be whole, but cannot be read now: an `OSError`, or one of tensorstore's."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
        number = getattr(error, "errno", None) or (number and int(number[1]))
        if number in UNREADABLE:
            remedy = "give permission or mount its disk anew; to do without it, move it away"
            raise UserError(f"{path}: cannot be read ({os.strerror(number)}): {remedy}") from error
        raise


def _manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; a `ValueError` where that cannot be trusted."""
    try:
        with _readable(path):
            for entry in (path, *path.rglob("*")):
                if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                    raise ValueError(f"{entry.name} is neither a file nor a folder")
                if entry.parent.name != "d" and entry.stat().st_size > LARGEST:
                    raise ValueError(f"{entry.name} is too large")
            stored = json.loads((path / "manifest" / "metadata").read_text(encoding="utf-8"))
            manifest = json.loads(stored["text"])
            if _digest(stored["text"]) != stored["digest"] or manifest["step"] != int(path.name):
                raise ValueError("it is not the one that was written")
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no manifest can be read ({_reason(error)})") from error


def _load(path: Path, name: str, like) -> Array:
    """Reads an array, each device its own part.

    Not through Orbax: on a broken file that waits at barriers and prints what its threads raise.
    """
    import tensorstore

    base = {"driver": "file", "path": f"{path}/arrays/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": {"compressor": None}}
    stored = tensorstore.open(spec, open=True).result()
    chunk = stored.chunk_layout.read_chunk.shape or like.shape  # it is allocated whole
    sizes = zip(chunk, like.shape, strict=True)
    if stored.shape != like.shape or any(size > max(whole, 1) for size, whole in sizes):
        raise ValueError(f"{name} is stored in another shape than it has")
    place = getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(
        like.shape, place, lambda part: stored[part].read().result(), dtype=like.dtype
    )


def _named(state: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def checksum(array: Array) -> int:
    """Of words and their positions in the whole array: the same however devices split it.

    A bijection mixes each word with its position, then all are added modulo 2^32. So a change
    within one word always shows, any other in all but one case of 2^32.
    """
    alone = array.is_fully_addressable and len(array.devices()) == 1
    return int(_checksum(array, SLABS if alone and array.size and array.size % SLABS == 0 else 1))


SLABS = 64


@functools.partial(jax.jit, static_argnums=1)
def _checksum(array: Shaped[Array, "..."], slabs: int) -> UInt32[Array, ""]:
    """A slab after the other: XLA on CPU writes out all words that it is to add."""
    if slabs > 1:
        # Half-precision floats would go through the loop as float32, and NaNs come out as others.
        rows = (array if array.dtype.itemsize == 4 else _words(array)).reshape(slabs, -1)
        index = jnp.arange(rows.shape[1], dtype=jnp.uint32)

        def one(i):
            position = index + i.astype(jnp.uint32) * jnp.uint32(rows.shape[1])
            return jnp.sum(_hash_mix(_words(rows[i]) ^ _hash_mix(position)), dtype=jnp.uint32)

        return jnp.sum(jax.lax.map(one, jnp.arange(slabs)), dtype=jnp.uint32)
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    for dimension, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        position = position * jnp.uint32(size) + index
    return jnp.sum(_hash_mix(words ^ _hash_mix(position)), dtype=jnp.uint32)


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _hash_mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(" [")[0].rsplit(": ", 1)[-1][:200]


def _warn(reason: object) -> None:
    if jax.process_index() == 0:
        print(f"warning: {reason}", file=sys.stderr, flush=True)


@functools.cache
def _orbax():
    """Orbax, without its log and without what its threads print about a save that failed."""
    import orbax.checkpoint

    trace = logging.Formatter("%(pathname)s %(message)s")  # and the traceback, if there is one
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: "orbax" not in trace.format(record))
    show = sys.unraisablehook
    sys.unraisablehook = lambda x: str(x.exc_value) == "Event loop is closed" or show(x)
    return orbax.checkpoint


def _writer(shared: bool):
    """Orbax for all processes, or for each as if it were alone."""
    ocp, this, who, how = _orbax(), jax.process_index(), {}, {}
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    if not shared:
        alone = ocp.options.MultiprocessingOptions(this, {this}, f"process-{this}")
        # Else what one process tells itself, of folders that it made, is told to all.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        who, how = {"multiprocessing_options": alone}, {"async_options": at_once}
        unasked = SimpleNamespace(validate_all_array_metadatas=lambda _: None)  # of the others
        implementation = ocp.BasePyTreeCheckpointHandler(
            use_compression=False, enable_post_merge_validation=False,
            array_metadata_validator=unasked, **who,
        )  # fmt: skip
        arrays = ocp.PyTreeCheckpointHandler(handler_impl=implementation)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(**who, **how),
        arrays=arrays, manifest=ocp.JsonCheckpointHandler(**who),
    )  # fmt: skip
    return ocp.AsyncCheckpointer(handler, **who, **how)
