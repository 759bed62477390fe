"""Files and folders that are there whole or not at all, and what is read back of them.

Everything here may be used by every room: writing (`atomic_write`, `atomic_folder`, `write_json`),
reading (`read_json`, `check_links`, `printable`), digests, locks, and `RunFolder`, a folder that
knows the settings that made it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import UserError

RESUME = ": make room or give permission; the same command goes on from what was saved"


@contextlib.contextmanager
def disk_errors(path: Path, remedy: str = RESUME) -> Iterator[None]:
    """An `OSError` in the body, such as a full disk, becomes a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}){remedy}") from error


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = RESUME) -> Iterator[Path]:
    """Yields the path of a partial file, which replaces `path` when the body ends well."""
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(path, remedy):
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, remedy: str = RESUME) -> Iterator[Path]:
    """Yields an empty folder, which replaces `folder` and all in it when the body ends well.

    The caller decides whether what is there may be replaced, and lets nobody else write it.
    """
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    with disk_errors(folder, remedy):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for path in partial.iterdir():
                _sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Without it a crash of the system could leave an empty file under the final name."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(
    path: Path, content: Mapping[str, Any], remedy: str = RESUME, *, sort_keys: bool = False
) -> None:
    """Writes a file that is there whole or not at all."""
    with atomic_write(path, remedy) as partial:
        text = json.dumps(content, indent=2, sort_keys=sort_keys)
        partial.write_text(f"{text}\n", encoding="utf-8")


def read_json(
    path: Path, remedy: str = ": restore it, or begin anew with --no-resume"
) -> dict[str, Any]:
    """Reads the JSON object in a file; a `UserError` says what is wrong with it, and `remedy`."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "no regular file")  # reading a pipe would never end
        content = json.loads(path.read_bytes())
        why = "no JSON object"
    except OSError as error:
        content, why = None, error.strerror
    except (ValueError, RecursionError) as error:
        content, why = None, f"not valid JSON, {error}"
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged ({printable(why)}){remedy}")
    return content


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuses links that lead out of a folder, and pipes; the folder may come from a stranger.

    The cache of the hub is made of links from `snapshots` to `blobs`, which are followed.
    """
    root = folder.resolve()
    blobs = (place.parent / "blobs" for place in (root, *root.parents) if place.name == "snapshots")
    allowed = [root, *blobs]
    for path in paths:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(
                f"{printable(path)}: it is a link that leads out of {folder}: put what it leads to"
                " there, or name that itself"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{printable(path)}: it is no file that can be read")


def printable(text: object, limit: int = 300) -> str:
    """What somebody else's file or program says, on one line, short and safe to print."""
    line = " ".join(str(text).split()) or type(text).__name__
    line = line if len(line) <= limit else f"{line[:limit]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def digest(facts: Any) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def lock(path: Path, guarded: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, which the system releases however the process ends.

    Where another process holds it, this waits, or raises a `UserError` that names what is
    `guarded`, by default the folder.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, blocking=wait)
    try:
        held.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{guarded or path.parent} is in use by another run: wait for its end, or choose"
            " another name"
        ) from None
    except OSError as error:  # filelock itself knows file systems without flock
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        held.release()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, spelled as flags are: `a.b-c`."""
    names: dict[str, Any] = {}
    for name, value in settings.items():
        name = prefix + name.replace("_", "-")
        names |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return names


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    may_change: frozenset[str] = frozenset(),
    prefix: str = "",
) -> list[str]:
    """How settings differ, a line each; `may_change` names single ones or groups (`a` of `a.b`)."""
    before, now = flat(before, prefix), flat(now, prefix)
    return [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if before.get(name) != value and not may_change & {name, name.partition(".")[0]}
    ]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder and the settings that make what is in it; a manifest there remembers them."""

    path: Path
    settings: Mapping[str, Any]
    """As JSON returns them: lists, not tuples."""
    may_change: frozenset[str] = frozenset()
    manifest: str = "config.json"
    prefix: str = ""
    """Of the names of settings: "--" spells them as flags."""

    def previous(self) -> dict[str, Any] | None:
        """The settings that made what is there; None where nothing is."""
        path = self.path / self.manifest
        return read_json(path) if path.exists() else None

    def changed(self) -> list[str]:
        """The settings that may not change and did, a line each."""
        previous = self.previous()
        return (
            []
            if previous is None
            else changes(previous, self.settings, self.may_change, self.prefix)
        )

    def check(self, remedy: str, *more: str) -> None:
        """Refuses a folder that other settings, or `more` changes that the caller knows, made."""
        if changed := [*self.changed(), *more]:
            raise UserError(f"{self.path} has other settings ({'; '.join(changed)}): {remedy}")

    def write(self) -> None:
        write_json(self.path / self.manifest, self.settings)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return lock(self.path / ".lock")

    def set_aside(self) -> Path:
        """Renames the folder to the first free `<path>.<number>`."""
        names = (self.path.with_name(f"{self.path.name}.{i}") for i in itertools.count(1))
        free = next(path for path in names if not path.exists())
        self.path.rename(free)
        return free
