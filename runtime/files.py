"""Files and folders that are there whole or not at all, and what is read back of them.

In this order: writing, reading what may come from a stranger, digests, a lock, changed settings.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError

Settings = Mapping[str, Any]
PROCESS = f"{os.getpid()}-{secrets.token_hex(4)}"
NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
RESTORE = ": restore it, or begin anew with --no-resume"
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
def library_errors(problem: str) -> Iterator[None]:
    """What a library raises over somebody's file, or its panic, is an error in its own words; or in
    those of the hub, where its answer is behind it."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "response", None) is None:
            cause = cause.__cause__ or cause.__context__
        remedy, status = "", cause and cause.response.status_code
        if status in (401, 403, 404):
            remedy = "; if it is private or gated, log in with `hf auth login` or HF_TOKEN"
        raise UserError(f"{problem} ({printable(cause or error)}{remedy})") from error


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = RESUME) -> Iterator[Path]:
    """Yields the path of a partial file or folder, which replaces `path` when the body ends well;
    where the body leaves none, nothing is replaced.

    The caller makes it, and decides whether what is there may be replaced. It lies in a folder of
    this process alone, so that no link and no other writer's file is in its place.
    """
    with disk_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(path) as scratch:
            partial, old = Path(scratch, "new"), Path(scratch, f"old-{path.name}")
            try:
                yield partial
                if partial.exists():
                    sync(partial, *partial.rglob("*"))
                    if partial.is_dir() and path.exists():
                        path.replace(old)
                    partial.replace(path)
                    sync(path.parent)
            finally:
                if old.exists() and not path.exists():
                    old.replace(path)


def remove(folder: Path) -> None:
    """Removes a folder, which its readers see whole until it is gone."""
    with disk_errors(folder), _scratch(folder) as scratch:
        folder.replace(Path(scratch, "removed"))


def _scratch(path: Path) -> tempfile.TemporaryDirectory:
    """A new folder beside `path`, named after this process; those of dead ones of this host go."""
    host = platform.node()
    names = re.compile(rf"\..*\.{re.escape(host)}-(\d{{1,9}}-[0-9a-f]{{8}})-\w+\.partial")
    for name in os.listdir(path.parent):
        if (match := names.fullmatch(name)) and not _is_alive(match[1]):
            for old in (path.parent / name).glob("old-*"):  # killed between two renames
                if not (before := path.parent / old.name.removeprefix("old-")).exists():
                    old.replace(before)
            shutil.rmtree(path.parent / name, ignore_errors=True)
    prefix = f".{path.name[:24]}.{host}-{PROCESS}-"
    return tempfile.TemporaryDirectory(".partial", prefix, path.parent, ignore_cleanup_errors=True)


def _is_alive(process: str) -> bool:
    pid = int(process.partition("-")[0])
    if pid == os.getpid():
        return process == PROCESS  # in a container, the first process has the same each time
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it is another user's
    return True


def sync(*paths: Path) -> None:
    """Returns once files, and the entries of folders, would survive a crash of the system."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # not every file system can sync folders
                raise
        finally:
            os.close(descriptor)


def no_follow(path: str | Path, flags: int) -> int:
    """An `opener` that refuses a link: somebody could have put it there to a file of the user's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def append_json(file: IO[bytes], record: Settings) -> None:
    """Writes a line; the file has no buffer, so it is there at once, or an `OSError` says why."""
    left = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
    while left:
        left = left[file.write(left) :]


def write_json(path: Path, content: Settings, remedy: str = RESUME) -> None:
    """Writes a file that is there whole or not at all."""
    with atomic_write(path, remedy) as partial:
        partial.write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")


def read_json(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Reads the JSON object in a file; a `UserError` says what is wrong with it, and `remedy`."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "no regular file")  # reading a pipe would never end
        if isinstance(content := json.loads(path.read_bytes()), dict):
            return content
        why = "no JSON object"
    except OSError as error:
        why = error.strerror
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON, {error}"
    raise UserError(f"{path} is damaged ({printable(why)}){remedy}")


def check_links(
    folder: Path | None, paths: Iterable[str | Path]
) -> list[tuple[str, os.stat_result | None]]:
    """Where paths lead, and what the system says of that, None where nothing is there. It is asked
    once for each: there may be many, and on another machine.

    A folder may come from a stranger: links that lead out of it, and pipes, are refused. The cache
    of the hub is made of links from `snapshots` to `blobs`, which are followed.
    """
    real, allowed, targets = functools.cache(os.path.realpath), ("",), []
    if folder is not None:
        root = folder.resolve()
        blobs = (x.parent / "blobs" for x in (root, *root.parents) if x.name == "snapshots")
        allowed = tuple(os.path.join(place, "") for place in (root, *blobs))
    for path in map(os.fspath, paths):
        parent, name = os.path.split(path)
        target, facts = os.path.join(real(parent), name), None
        try:
            facts = os.lstat(path)
            if stat.S_ISLNK(facts.st_mode):
                target, facts = os.path.realpath(path), None
                facts = os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        if not f"{target}/".startswith(allowed):
            why = f"it is a link that leads out of {folder}"
            raise UserError(f"{printable(path)}: {why}: put what it leads to there")
        if facts and not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
            raise UserError(f"{printable(path)}: it is no file that can be read")
        targets.append((target, facts))
    return targets


def printable(text: object, limit: int = 300) -> str:
    """What somebody else's file or program says, on one line, short and safe to print."""
    line = " ".join(str(text).split()) or type(text).__name__
    line = line if len(line) <= limit else f"{line[:limit]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def local_path(path: str | os.PathLike) -> Path:
    """A path that a user gave; of a home folder that there is not, `~` is a name like any."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where programs of this user keep what they can make again."""
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "compact-distill"


def digest(facts: Any) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class InUse(UserError):
    """Another process holds a lock."""


@contextlib.contextmanager
def lock(
    path: Path, guarded: Path | str | None = None, *, wait: bool = False, remedy: str = RESUME
) -> Iterator[None]:
    """Holds the lock file `path`, which the system releases however the process ends.

    Where another process holds it, this waits, or refuses what is `guarded`: the folder, if None.
    """
    with disk_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = no_follow(path, os.O_RDWR | os.O_CREAT)
        try:
            flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            what, remedy = guarded or path.parent, "wait for its end, or choose another name"
            raise InUse(f"{what} is in use by another run: {remedy}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def flock(descriptor: int, kind: int) -> None:
    """Locks an open file, where its file system has locks."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise


def flags(settings: Settings, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names, spelled as flags are: `--a.b-c`."""
    for name, value in settings.items():
        name = prefix + name.replace("_", "-")
        yield from flags(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]


def arguments(flag: str, value: Any) -> list[str]:
    """A setting as words of a command line; none where it is None."""
    if isinstance(value, bool):
        group, dot, name = flag[2:].rpartition(".")
        return [flag if value else f"--{group}{dot}no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [] if value is None else [flag, *map(str, values)]


def changes(
    before: Settings, now: Settings, may_change: Set[str], prefix: str = "", *,
    default: Settings | None = None, words: str = "{} was {}, is {}",
) -> list[str]:  # fmt: skip
    """How settings differ, a line each; `may_change` names single ones or groups (`a` of `a.b`)."""

    old = dict(flags(default or {}, prefix)) | dict(flags(before, prefix))
    return [
        words.format(name, old.get(name), value)
        for name, value in flags(now, prefix)
        if old.get(name) != value and not may_change & {name, name.partition(".")[0]}
    ]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run and its settings, which a file in it remembers."""

    path: Path
    settings: Settings
    """As JSON returns them: lists, not tuples."""
    may_change: Set[str]
    default: Settings = dataclasses.field(default_factory=dict)
    """What counts for a setting that is younger than the folder."""

    def previous(self) -> dict[str, Any] | None:
        """The settings that made what is there; None where nothing is."""
        path = self.path / "config.json"
        previous = read_json(path) if path.exists() else None
        if previous is not None and previous.keys().isdisjoint(self.settings):
            raise UserError(f"{path} is not from here: give another --out, or --no-resume")
        return previous

    def changed(self) -> list[str]:
        """The flags that may not change and did, a line each."""
        previous = self.previous()
        before = self.settings if previous is None else previous
        return changes(before, self.settings, self.may_change, "--", default=self.default)

    def write(self) -> None:
        write_json(self.path / "config.json", self.settings)

    def set_aside(self) -> Path:
        """Renames the folder to the first free `<path>.<number>`."""
        names = (self.path.with_name(f"{self.path.name}.{i}") for i in itertools.count(1))
        return self.path.rename(next(path for path in names if not path.exists()))
