"""Files that are there whole or not at all, and what is read back of them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from runtime.errors import UserError


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """A full disk, say, is told in a line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}){remedy}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` once all is written."""
    half = path.with_name(f"{path.name}.partial")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuses links that lead out of a folder, but in the cache of the hub, which is made of them.

    The folder may come from a stranger.
    """
    top = folder.resolve()
    blobs = (place.parent / "blobs" for place in (top, *top.parents) if place.name == "snapshots")
    inside = [top, *blobs]
    for path in paths:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in inside):
            raise UserError(
                f"{_line(path)}: it is a link that leads out of {folder}: put what it leads to"
                " there, or name that itself"
            )


def digest(facts: Any) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _line(said: object) -> str:
    """What somebody else's file or program says, short and fit to be printed."""
    text = " ".join(str(said).split())[:300] or type(said).__name__
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file that is there whole or not at all."""
    with _whole(path) as half:
        half.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that this program wrote."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: restore it, or begin anew with --no-resume")
    return found


_writing = partial(
    writing,
    remedy=": make room or give permission; the same command goes on from what was saved",
)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    with _writing(path), whole(path) as half:
        yield half
