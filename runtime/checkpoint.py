"""State ⇄ disk, on Orbax: in the background, whole or absent, checked when read, onto any mesh.

A checkpoint is a folder named by its step. Beside the arrays it holds a manifest: shape, dtype and
checksum of every array by its path in the state, and the JSON that the caller stored with them.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped, UInt, UInt32

from runtime import files, processes
from runtime.errors import UserError

# What another of its step is about to replace is `<step>.old`: second choice, but still counted.
FINISHED = re.compile(r"(\d+)(\.old)?")
LEFTOVER = re.compile(r"\d+(\.old)?\.(orbax-checkpoint-tmp.*|removed)")


class _Damaged(Exception):
    """A checkpoint that cannot be trusted; its text says why."""


def lock(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of `folder`; the first process holds it for all."""
    first = jax.process_index() == 0
    return files.lock(Path(folder) / ".lock") if first else contextlib.nullcontext()


class Checkpoints:
    """Writes checkpoints into `folder`, in the background, and keeps the newest `keep`.

    All processes of a run share the folder, and call this alike.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), max(keep, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        _clean(self.folder)
        self._writer = _writer()
        self._writing: Path | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            _say(f"warning: {error}")  # what already ends the run goes first

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Starts to write `state`, whose buffers may be donated as soon as this returns.

        Waits for the save before; if that one failed, it is a warning, and the run goes on.
        """
        try:
            self.wait()
        except UserError as error:
            _say(f"warning: {error}")
        arrays = _named(state)
        sums = _checksums(arrays)
        kinds = {name: [*_kind(array), sums[name]] for name, array in arrays.items()}
        manifest = json.dumps({"step": step, "extra": extra, "arrays": kinds})
        self._writing = self.folder / str(step)
        if jax.process_index() == 0 and self._writing.exists():
            old = self._writing.with_name(f"{step}.old")
            shutil.rmtree(old, ignore_errors=True)
            self._writing.rename(old)
        args = _orbax().args
        parts = args.Composite(
            arrays=args.PyTreeSave(arrays),
            manifest=args.JsonSave({"text": manifest, "digest": _digest(manifest)}),
        )
        self._writer.save(self._writing, args=parts)

    def wait(self) -> None:
        """Returns once the last save is on disk; a `UserError` if it could not be written."""
        written, self._writing = self._writing, None
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # a full disk is an OSError, a ValueError or a RuntimeError
            # The old one would tell of its other troubles next time; they may still be under way.
            failed, self._writer = self._writer, _writer()
            with contextlib.suppress(Exception):
                failed.close()
            _clean(self.folder, tries=50)
            raise UserError(
                f"the checkpoint {written} could not be written ({_reason(error)}), the ones"
                " before are intact: free space there, or choose another folder"
            ) from error
        if written is not None:
            _prune(self.folder, int(written.name), self.keep)

    def close(self) -> None:
        """As `wait`; nothing can be saved after it."""
        try:
            self.wait()
        finally:
            self._writer.close()


def latest(folder: str | Path) -> int | None:
    """The step of the newest checkpoint whose manifest is whole; `None` if there was never any."""
    found = _finished(folder)
    for path in found:
        with contextlib.suppress(_Damaged):
            return _manifest(path)["step"]
    if found:
        raise _all_damaged(found)
    return None


def restore(
    folder: str | Path, like: PyTree, step: int | None = None
) -> tuple[PyTree, dict[str, Any], int]:
    """State, what was stored with it, and step, from the newest whole checkpoint (or of `step`).

    `like` is a state of arrays, real or abstract; the arrays restored go where its arrays are.
    """
    found = _finished(folder, step)
    if not found:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{folder}: expected a {which}, found none")
    for path in found:
        try:
            manifest, arrays = _read(path, like)
        except _Damaged as reason:
            _say(f"warning: the checkpoint {path} is damaged and skipped: {reason}")
        else:
            state = jax.tree.unflatten(jax.tree.structure(like), arrays)
            return state, manifest["extra"], manifest["step"]
    raise _all_damaged(found)


def _all_damaged(found: list[Path]) -> UserError:
    return UserError(
        f"{found[0].parent}: expected a whole checkpoint, found {len(found)}, all damaged: put"
        " back a copy, or move them away to start anew"
    )


def _finished(folder: str | Path, step: int | None = None) -> list[Path]:
    """The checkpoints (of `step`) that were written to their end, newest first."""
    paths = [path for path in Path(folder).absolute().glob("*") if FINISHED.fullmatch(path.name)]
    paths = [path for path in paths if step in (None, int(path.stem))]
    return sorted(paths, key=lambda path: (int(path.stem), not path.suffix), reverse=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes what `step`, now whole, supersedes; later steps too, of a run that was given up."""
    if jax.process_index() == 0:
        found = _finished(folder)
        kept = [path for path in found if int(path.stem) <= step and not path.suffix][:keep]
        for path in set(found) - set(kept):
            path.rename(path.with_name(f"{path.name}.removed"))  # none is ever seen half removed
        _clean(folder)


def _clean(folder: Path, tries: int = 1) -> None:
    """Removes what is no checkpoint; again where others may still write into what is removed."""
    if jax.process_index() != 0:
        return
    for attempt in range(tries):
        found = [path for path in folder.glob("*") if LEFTOVER.fullmatch(path.name)]
        if attempt and not found:
            return
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        if tries > 1:
            time.sleep(0.1)


def _manifest(path: Path) -> dict[str, Any]:
    for entry in (path, *path.rglob("*")):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise _Damaged(f"{entry.name} is neither a file nor a folder")
    try:
        stored = json.loads((path / "manifest" / "metadata").read_text())
        intact = _digest(stored["text"]) == stored["digest"]
        manifest = json.loads(stored["text"])
        step = manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"no manifest can be read ({_reason(error)})") from error
    if not intact or step != int(path.stem):
        raise _Damaged("its manifest is not the one that was written")
    return manifest


def _read(path: Path, like: PyTree) -> tuple[dict[str, Any], list[Array]]:
    expected, reason = _named(like), None
    try:
        manifest = _manifest(path)
        _check_fit(path, manifest["arrays"], expected)
        arrays = {name: _load(path, name, leaf) for name, leaf in expected.items()}
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # no fault of the file's
    except Exception as error:  # a broken file may raise anything
        reason = _reason(error)
    if not processes.allgather(reason is None).all():
        reason = reason or "another process cannot read it"
    if reason is not None:
        raise _Damaged(reason)
    for name, checksum in _checksums(arrays).items():
        if manifest["arrays"][name][2] != checksum:
            raise _Damaged(f"the checksum of {name} is wrong")
    return manifest, [arrays[name] for name in expected]


def _load(path: Path, name: str, like) -> Array:
    """Each device reads its own part.

    Not through Orbax: on a broken file that waits at barriers and prints what its threads raise.
    """
    import tensorstore

    files = {"driver": "file", "path": f"{path}/arrays/"}
    store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
    if (stored.shape, stored.dtype.numpy_dtype) != (like.shape, like.dtype):
        raise _Damaged(f"{name} is {stored.dtype.name}{list(stored.shape)} there")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(
        like.shape,
        getattr(like, "sharding", None) or here,
        lambda part: stored[part].read().result(),
        dtype=like.dtype,
    )


def _check_fit(path: Path, stored: dict[str, list], expected: dict[str, Any]) -> None:
    for name in (*expected, *stored):
        want = _kind(expected[name]) if name in expected else None
        have = stored[name][:2] if name in stored else None
        if want != have:
            want, have = (f"{kind[1]}{kind[0]}" if kind else "none" for kind in (want, have))
            raise UserError(
                f"{path}: expected {name} to be {want}, found {have}: continue with the model and"
                " optimizer it was made with, or choose another folder"
            )


def _named(state: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def _kind(array) -> list:
    return [list(array.shape), array.dtype.name]


def _checksums(arrays: dict[str, Array]) -> dict[str, int]:
    alone = all(
        array.is_fully_addressable and len(array.devices()) == 1 for array in arrays.values()
    )
    return {name: int(found) for name, found in jax.device_get(_sums(arrays, alone)).items()}


SLABS = 64


@functools.partial(jax.jit, static_argnums=1)
def _sums(arrays: dict[str, Array], alone: bool) -> dict[str, UInt32[Array, ""]]:
    """On one device a slab at a time: XLA on CPU writes out all words that it is to add."""

    def checksum(array):
        if not alone or array.size < SLABS or array.size % SLABS:
            return _checksum(_words(array))
        # Half-precision floats would go through the loop as float32, and NaNs come out as others.
        slabs = (array if array.dtype.itemsize == 4 else _words(array)).reshape(SLABS, -1)

        def one(i):
            words = _words(slabs[i])
            return _checksum(words, i * words.size)

        return jnp.sum(jax.lax.map(one, jnp.arange(SLABS)), dtype=jnp.uint32)

    return {name: checksum(array) for name, array in arrays.items()}


def _words(array: Shaped[Array, "..."]) -> UInt[Array, "..."]:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word)


def _checksum(words: UInt[Array, "..."], first: Int[Array, ""] | int = 0) -> UInt32[Array, ""]:
    """Of words and their positions, from `first`, in the whole array: the same however devices
    split it.

    A bijection mixes each word with its position, then all are added modulo 2^32. So a change
    within one word always shows, any other in all but one case of 2^32.
    """
    position = jnp.zeros(words.shape, jnp.uint32)
    for dimension, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        position = position * jnp.uint32(size) + along
    position += jnp.asarray(first).astype(jnp.uint32)
    return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(position)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(" [")[0].rsplit(": ", 1)[-1][:200]


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@functools.cache
def _orbax():
    """Orbax, without its log and without what its threads print about a save that failed."""
    import orbax.checkpoint

    whole = logging.Formatter("%(pathname)s %(message)s")  # and the trace, if there is one
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: "orbax" not in whole.format(record))
    hook = sys.unraisablehook

    def hushed(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = hushed
    return orbax.checkpoint


def _writer():
    ocp = _orbax()
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            arrays=ocp.PyTreeCheckpointHandler(use_compression=False),
            manifest=ocp.JsonCheckpointHandler(),
        )
    )
