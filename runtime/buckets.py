"""Paths such as s3://bucket/folder or gs://bucket/folder, in the flags of programs.

A bucket can neither rename nor append: programs read and write folders of this machine in its
place. What they read is fetched when it is asked for. What they write is copied while they go on,
in such an order that whoever begins from the copy finds every checkpoint and the exported student
whole or not at all.
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
SEAL = re.compile(r"checkpoints/\d+/manifest/metadata|exported\.json|student-best/config\.json")
PASSING = re.compile(r"(.*/)?\..*|checkpoints/\d+\..*")  # locks, and what is half written

Facts = tuple[int, int]  # size and date of a file


def in_bucket(path: object) -> bool:
    return isinstance(path, str) and re.match(r"(s3|gs)://.", path) is not None


def place(path: str, use: str = "written") -> Path:
    """The path, or what stands on this machine for one in a bucket that is to be written."""
    if not in_bucket(path):
        return files.local_path(path)
    return files.cache_folder() / "buckets" / use / path.replace("://", "/")


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


def mirrored(program: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A program that is called with its configuration, of which `out` may be in a bucket."""

    @functools.wraps(program)
    def run(config: Any) -> Any:
        if not in_bucket(config.out) or getattr(config, "plan", False):
            return program(config)
        with mirror(config.out):
            return program(config)

    return run


def download(url: str, place: Path, pattern: str = "*") -> list[str]:
    """Makes a file or folder of this machine equal to what is in a bucket; names of its files."""
    from pyarrow.fs import FileSelector

    store, path = open_bucket(url)
    entries = [store.get_file_info(path)]
    if not entries[0].is_file:
        entries = store.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    names = {x.path[len(path) + 1 :]: x for x in entries if x.is_file}
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


def facts_of(path: Path) -> Facts | None:
    """None where there is no such file."""
    with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
            return path.stat().st_size, path.stat().st_mtime_ns
    return None


@contextlib.contextmanager
def mirror(url: str) -> Iterator[None]:
    """Keeps a folder of this machine, which begins as the one in the bucket, and its copy there."""
    import jax

    if jax.process_count() > 1:
        remedy = "mount the bucket as a folder that all of them share"
        raise UserError(f"--out {url} with several processes: {remedy}")
    folder, ended = place(url), threading.Event()
    with files.lock(folder.with_name(f".{folder.name}.lock"), url):
        with files.library_errors(f"--out {url}: cannot be read"), report.progress("fetching"):
            download(url, folder)
        copy = Copy(url, folder)
        with files.library_errors(f"--out {url}: cannot be written"):
            copy.probe()

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
        finally:
            ended.set()
            thread.join()
            problem = f"{url}: cannot be written, what it lacks is in {folder}"
            with files.library_errors(problem), report.progress(f"copying to {url}"):
                copy.update()
    report.say(f"copy      {url}")


class Copy:
    """The copy of a folder in a bucket, which it has been made equal to."""

    def __init__(self, url: str, folder: Path):
        self.folder, (self.bucket, self.path) = folder, open_bucket(url)
        self.stored = self.listing()
        for checkpoint in folder.glob("checkpoints/*"):  # killed while it was copied
            if not (checkpoint / "manifest" / "metadata").exists():
                shutil.rmtree(checkpoint)

    def probe(self) -> None:
        """Fails where nothing can be written."""
        name = f"{self.path}/.probe"
        with self.bucket.open_output_stream(name):
            pass
        self.bucket.delete_file(name)

    def listing(self) -> dict[str, Facts]:
        """The files of the folder. Seals are looked at first: what they say of others, which are
        looked at later, is true then."""
        facts = {}
        for seals in (True, False):
            for folder, _, names in os.walk(self.folder):  # it does not mind what vanishes
                for path in (Path(folder, name) for name in names):
                    name = path.relative_to(self.folder).as_posix()
                    if bool(SEAL.fullmatch(name)) == seals and not PASSING.fullmatch(name):
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
        seals = {name for name in changed if SEAL.fullmatch(name)}

        def put(name: str) -> None:
            path = f"{self.path}/{name}"
            if facts_of(self.folder / name) != now[name] and name in seals:
                return  # the next time
            with contextlib.suppress(FileNotFoundError), open(self.folder / name, "rb") as source:
                with self.bucket.open_output_stream(path, compression=None) as file:
                    shutil.copyfileobj(source, file, 1 << 22)
                stored[name] = now[name]

        def remove(name: str) -> None:
            if stored.pop(name, None) is not None:
                self.bucket.delete_file(f"{self.path}/{name}")

        with ThreadPoolExecutor(THREADS) as pool:
            for action, names in (
                (remove, seals),
                (put, changed - seals & now.keys()),
                (put, seals & now.keys()),
                (remove, changed - seals - now.keys()),
            ):
                list(pool.map(action, names))
