"""Paths such as s3://bucket/folder or gs://bucket/folder, in the flags of programs.

A bucket can neither rename nor append: programs read and write folders of this machine in its
place. What they read is fetched when it is asked for. What they write is copied while they go on,
in such an order that whoever begins from the copy finds every checkpoint and the exported student
whole or not at all.

Of several processes each has a folder of its own, and copies from it what it alone has written: its
part of a checkpoint, which the first seals when all parts are there.
"""

import contextlib
import functools
import glob
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from runtime import files, report
from runtime.errors import UserError

PAUSE = 10.0  # seconds between two copies of what has changed
THREADS = 8
# What says that other files are whole: it is written after them, and removed before them.
SEAL = re.compile(
    r"checkpoints/\d+/(manifest/metadata|arrays/array_metadatas/process_[1-9]\d*)"
    r"|exported\.json|student-best/config\.json"
)
STEP = re.compile(r"checkpoints/(\d+)/")
# What a process that is not the first has written.
PART = r"checkpoints/\d+/arrays/(ocdbt\.process_{0}/.*|array_metadatas/process_{0})|.*\.targets"
PASSING = re.compile(r"(.*/)?\..*|checkpoints/\d+\..*")  # locks, and what is half written

Facts = tuple[int, int]  # size and date of a file


def in_bucket(path: object) -> bool:
    return isinstance(path, str) and re.match(r"(s3|gs)://.", path) is not None


def place(path: str, use: str | None = None) -> Path:
    """The path, or what stands on this machine for one in a bucket that is to be written, in each
    process another."""
    if not in_bucket(path):
        return files.local_path(path)
    use = use or f"written-{process()[0]}"
    return files.cache_folder() / "buckets" / use / path.replace("://", "/")


def owns(path: str) -> bool:
    """Whether this process makes and cleans the folder that a program writes: the first does it for
    all, but in a bucket."""
    return in_bucket(path) or process()[0] == 0


def process() -> tuple[int, int]:
    """Which of how many processes this is."""
    import jax

    return jax.process_index(), jax.process_count()


def local_path(path: str | os.PathLike) -> Path:
    """The path of what is to be read: of a file, a folder or a pattern in a bucket, once it is
    here."""
    return files.local_path(path) if not in_bucket(path) else fetch(path)


def open_bucket(url: str) -> tuple[Any, str]:
    """The file system of a bucket, and the path in it."""
    from pyarrow import fs

    return fs.FileSystem.from_uri(url)


@functools.cache
def fetch(url: str) -> Path:
    plain = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), url.split("/")))
    with files.library_errors(f"{url}: cannot be read"), report.progress(f"fetching {url}"):
        if not download(plain, place(plain, "read"), url if plain != url else "*"):
            raise UserError(f"{url}: there is no such object or folder")
    return place(url, "read")


def mirrored(program: Callable[[Any], Any], file: bool = False) -> Callable[[Any], Any]:
    """A program that is called with its configuration, of which `out` may be in a bucket: a folder,
    or a `file` with others of its name beside it."""

    @functools.wraps(program)
    def run(config: Any) -> Any:
        if not in_bucket(config.out) or getattr(config, "plan", False):
            return program(config)
        folder, _, name = config.out.rpartition("/") if file else (config.out, "", "")
        pattern = f"{glob.escape(config.out.removesuffix(Path(name).suffix))}.*" if file else "*"
        with report.quietly(config.quiet or process()[0] > 0), mirror(folder, pattern):
            return program(config)

    return run


def download(url: str, place: Path, pattern: str = "*", deep: bool = True) -> list[str]:
    """Makes a file or folder of this machine equal to what is in a bucket; names of its files."""
    store, path = open_bucket(url)
    names = {x.path[len(path) + 1 :]: x for x in entries(store, path, deep)}
    names = {name: x for name, x in names.items() if fnmatch(f"{url}/{name}".rstrip("/"), pattern)}
    for old in place.rglob("*") if place.is_dir() else ():
        name = old.relative_to(place).as_posix()
        if old.is_file() and name not in names and fnmatch(f"{url}/{name}", pattern):
            old.unlink(missing_ok=True)

    def bring(name: str) -> None:
        entry, target = names[name], place / name
        if ".." in Path(name).parts:
            raise UserError(f"{url}: {files.printable(name)} is no name for a file")
        if facts_of(target) == (entry.size, entry.mtime_ns):
            return
        with files.atomic_write(target) as partial:
            with (
                store.open_input_stream(entry.path, compression=None) as source,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(source, file, 1 << 22)
            os.utime(partial, ns=(entry.mtime_ns, entry.mtime_ns))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(bring, names))
    return list(names)


def entries(store: Any, path: str, deep: bool = True) -> list[Any]:
    """The object of this name, or the objects in the folder of this name and, if `deep`, below."""
    from pyarrow.fs import FileSelector

    found = [store.get_file_info(path)]
    if not found[0].is_file:
        found = store.get_file_info(FileSelector(path, allow_not_found=True, recursive=deep))
    return [entry for entry in found if entry.is_file]


def facts_of(path: Path) -> Facts | None:
    """None where there is no such file."""
    with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
            return path.stat().st_size, path.stat().st_mtime_ns
    return None


@contextlib.contextmanager
def mirror(url: str, pattern: str = "*") -> Iterator[None]:
    """Keeps a folder of this machine, which begins as the one in the bucket, and its copy there; or
    such files of it as fit a pattern."""
    from jax.experimental.multihost_utils import sync_global_devices

    from runtime import checkpoint

    folder, ended, alone = place(url), threading.Event(), False
    with files.lock(folder.with_name(f".{folder.name}.lock"), url):
        with files.library_errors(f"--out {url}: cannot be read"), report.progress("fetching"):
            download(url, folder, pattern, deep=pattern == "*")
        sync_global_devices("fetched")
        checkpoint.merge_parts(folder / "checkpoints")
        copy = Copy(url, folder, pattern)
        with files.library_errors(f"--out {url}: cannot be written"):
            copy.begin()
        sync_global_devices("copies begun")

        def keep_up() -> None:
            while not ended.wait(PAUSE):
                try:
                    copy.update()
                except OSError as error:  # the next time may do
                    why = files.printable(error)
                    print(f"warning: {url} lacks what is new: {why}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=keep_up, daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            alone = not isinstance(error, SystemExit)  # others may not come here
            raise
        finally:
            ended.set()
            thread.join()
            problem = f"{url}: cannot be written, what it lacks is in {folder}"
            with files.library_errors(problem), report.progress(f"copying to {url}"):
                if copy.number:
                    copy.update()
                if not alone:  # then the first finds all parts
                    sync_global_devices("parts copied")
                if not copy.number:
                    copy.update()
    report.say(f"copy      {url}")


class Copy:
    """The copy of a folder in a bucket, which it has been made equal to."""

    def __init__(self, url: str, folder: Path, pattern: str = "*"):
        self.url, self.folder, self.pattern = url, folder, pattern
        self.bucket, self.path = open_bucket(url)
        self.number, self.count = process()
        self.stored = self.listing()
        for half in folder.glob("checkpoints/*"):  # killed while it was copied
            if not (half / "manifest" / "metadata").exists():
                shutil.rmtree(half)

    def begin(self) -> None:
        """Removes what is half a checkpoint; fails where nothing can be written."""
        if self.number == 0:
            name = f"{self.path}/.probe"
            with self.bucket.open_output_stream(name):
                pass
            self.bucket.delete_file(name)
            self.update()

    def listing(self) -> dict[str, Facts]:
        """The files that this process copies. Seals are looked at first: what they say of others,
        which are looked at later, is true then."""
        facts, own = {}, re.compile(PART.format(self.number) if self.number else ".*")
        for seals in (True, False):
            for folder, _, names in os.walk(self.folder):  # it does not mind what vanishes
                for path in (Path(folder, name) for name in names):
                    name = path.relative_to(self.folder).as_posix()
                    if bool(SEAL.fullmatch(name)) != seals or PASSING.fullmatch(name):
                        continue
                    if own.fullmatch(name) and fnmatch(f"{self.url}/{name}", self.pattern):
                        facts[name] = facts_of(path)
        return {name: x for name, x in facts.items() if x is not None}

    def update(self) -> None:
        """Copies what has changed, and removes what is gone."""
        now, stored = self.listing(), self.stored
        changed = {x for x in now.keys() | stored.keys() if now.get(x) != stored.get(x)}
        sealed_by = {"student/": "exported.json", "student-best/": "student-best/config.json"}
        for folder, seal in sealed_by.items():
            if any(name.startswith(folder) for name in changed):
                changed.add(seal)
        seals, gone = {x for x in changed if SEAL.fullmatch(x)}, changed - now.keys()
        steps = {STEP.match(name)[1] for name in now if STEP.match(name)}
        old = {x for x in gone if STEP.match(x) and STEP.match(x)[1] not in steps}

        def put(name: str) -> None:
            if name in seals and (facts_of(self.folder / name) != now[name] or self.lacks(name)):
                return  # the next time
            with contextlib.suppress(FileNotFoundError), open(self.folder / name, "rb") as source:
                path = f"{self.path}/{name}"
                with self.bucket.open_output_stream(path, compression=None) as file:
                    shutil.copyfileobj(source, file, 1 << 22)
                stored[name] = now[name]

        def remove(name: str) -> None:
            if stored.pop(name, None) is not None:
                with contextlib.suppress(FileNotFoundError):
                    self.bucket.delete_file(f"{self.path}/{name}")

        with ThreadPoolExecutor(THREADS) as pool:
            for action, names in (
                (remove, seals - old),
                (put, changed - seals - gone),
                (remove, gone - seals - old),
                (put, seals - gone),
            ):
                list(pool.map(action, names))
        whole = (name for name in now if name.endswith("/manifest/metadata"))
        if self.number == 0 and steps and not any(stored.get(x) == now[x] for x in whole):
            return  # what is gone stays there until a later one is whole
        for name in old:
            del stored[name]
        for step in {STEP.match(name)[1] for name in old if self.number == 0}:
            found = entries(self.bucket, f"{self.path}/checkpoints/{step}")  # all processes' parts
            for entry in sorted(found, key=lambda x: not x.path.endswith("/manifest/metadata")):
                self.bucket.delete_file(entry.path)

    def lacks(self, seal: str) -> bool:
        """Whether another process has yet to copy its part of what is to be sealed."""
        if not seal.endswith("/manifest/metadata"):
            return False
        parts = f"{self.path}/{seal.removesuffix('manifest/metadata')}arrays/array_metadatas"
        others = (f"{parts}/process_{i}" for i in range(1, self.count))
        return not all(self.bucket.get_file_info(path).is_file for path in others)
