"""The token store: a source's text, tokenized once, in flat files in a cache folder.

python -m text.store lists the stores of a cache.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from runtime import errors, files, report
from runtime.errors import LOCAL, UserError, above
from text import records
from text.files import Source
from text.packing import best_fit, split_document
from text.records import Piece
from text.tokenizer import Tokenizer

VERSION = 3
CHUNK = 1 << 21  # characters tokenized at once
BLOCK = 1 << 12  # bytes of the token file that share a checksum: about what a window reads
FILES = ("tokens", "documents", "trained")
REMEDY = ": make room, give permission, or choose another folder with --data.cache"


@dataclasses.dataclass(frozen=True)
class Store:
    """A source's tokens on disk: first those to train on, then those of held-out documents."""

    folder: Path
    dtype: str
    tokens: int
    training: int
    documents: int
    masked: bool
    digest: str
    """Of all the above but the folder, and of the files."""


def open_store(
    source: Source, tokenizer: Tokenizer, config: Any, seq_len: int, *, wait: bool = True
) -> Store | None:
    """The store of a source in the cache of a `data.Config`; built if there is none that is whole.
    While another process builds it, this waits, or returns None.

    `config.held_out` is the share of the documents that are not to train on.
    """
    row = [seq_len] if config.fits else []
    options = [config.text_field, config.documents, config.mask, config.held_out, *row]
    facts = [VERSION, records.SHAPES, source.fingerprint, tokenizer.fingerprint, options]
    cache = files.local_path(config.cache or files.cache_folder())
    folder = cache / files.digest(facts)
    with files.disk_errors(cache, REMEDY):
        if store := load(folder):
            return store
        # Each builder takes all cores, but parts of a source are for processes to share.
        lock = cache / (f".{folder.name}.lock" if source.is_part else ".lock")
        with contextlib.ExitStack() as stack:
            with report.progress("waiting for another process that tokenizes"):
                try:
                    stack.enter_context(files.lock(lock, wait=wait, remedy=REMEDY))
                except files.InUse:
                    return None
            if source.is_part:
                stack.callback(lock.unlink, missing_ok=True)  # who waits finds the store
            if store := load(folder):  # another process has built it meanwhile
                return store
            with files.atomic_write(folder, REMEDY) as partial:
                partial.mkdir(0o777 if config.cache else 0o700)  # text may be private
                build(partial, source, tokenizer, config, *row)
                if load(folder):  # by another host, where it does not see this lock
                    shutil.rmtree(partial)
            return load(folder)


def load(folder: Path) -> Store | None:
    """The store in a folder, if it is whole; its tokens are checked when they are read.

    As long as there is such an object, the folder is locked and not removed.
    """
    try:
        manifest = files.read_json(folder / "store.json")
        manifest.pop("source", None)
        intact = manifest.pop("digest") == (checksum := files.digest(manifest))
        version, hashes = manifest.pop("version"), manifest.pop("files")
        store = Store(folder, **manifest, digest=checksum)
        file = os.open(folder / "store.json", os.O_RDONLY)
        weakref.finalize(store, os.close, file)
        files.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # somebody else's
            os.utime(file)  # it is used now
        for name in (*FILES[1:], "sums"):
            intact &= files.file_digest(folder / name) == hashes[name]
        size = store.tokens * np.dtype(store.dtype).itemsize
        intact &= version == VERSION and (folder / "tokens").stat().st_size == size
        return store if intact else None
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def stores(cache: Path) -> list[tuple[float, int, Path]]:
    """When the stores of a cache were used, their bytes and folders, used longest ago first."""
    entries = []
    for path in cache.glob("*/store.json"):
        with contextlib.suppress(OSError):  # another process removes it, or it is private
            if {"store.json", "sums", *FILES} == set(os.listdir(path.parent)):
                size = sum(file.stat().st_size for file in path.parent.iterdir())
                entries.append((path.stat().st_mtime, size, path.parent))
    return sorted(entries)


def prune(cache: str | os.PathLike | None, limit: float) -> None:
    """Removes stores from a cache until the others take `limit` GB: those that were used longest
    ago go first, none that a process uses now, or may use where no file can be locked."""
    cache = files.local_path(cache or files.cache_folder())
    entries = stores(cache)
    total = sum(size for _, size, _ in entries)
    for _, size, folder in entries:
        # While nobody builds one.
        part = cache / f".{folder.name}.lock"
        with (
            contextlib.suppress(OSError, UserError), files.lock(cache / ".lock"), files.lock(part)
        ):  # fmt: skip
            part.unlink()
            if total <= limit * 1e9:
                return
            with open(folder / "store.json", "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.remove(folder)
            total -= size
            report.say(f"removed {folder}, {report.size(size)}: more than {limit:g} GB are cached")


class TokenFiles(contextlib.ExitStack):
    """Growing files of token ids, of where documents end and of where trained tokens start, stop.

    A file of positions is sorted, so that a search tells the document of any token, or whether it
    lies between a start and a stop.
    """

    def __init__(self, folder: Path, dtype: str):
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.folder, self.code = folder, np.dtype(dtype).char
        self.files = [self.enter_context(open(folder / name, "wb")) for name in FILES]
        self.tokens = self.ended = 0

    def add(self, ids: list[int], trained: list[int], ends: bool) -> None:
        tokens, documents, runs = self.files
        tokens.write(array(self.code, ids))
        runs.write(array("q", [self.tokens + position for position in trained]))
        self.tokens += len(ids)
        if ends and self.tokens > self.ended:  # an empty document is none
            documents.write(array("q", [self.tokens]))
            self.ended = self.tokens

    def extend(self, other: "TokenFiles") -> None:
        """Appends the whole of other files, which are closed."""
        for file, name in zip(self.files, FILES, strict=True):
            with open(other.folder / name, "rb") as source:
                while block := source.read(1 << 22):
                    is_ids = name == "tokens"
                    file.write(block if is_ids else np.frombuffer(block, np.int64) + self.tokens)
        self.tokens += other.tokens


def build(
    folder: Path, source: Source, tokenizer: Tokenizer, config: Any, row: int | None = None
) -> None:
    """Tokenizes a source into an empty folder, in rows of so many tokens if they are given."""
    dtype = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
    with TokenFiles(folder, dtype) as training:
        with TokenFiles(folder / "held", dtype) as held_out:
            if row is None:
                _tokenize(source, tokenizer, config, training, held_out)
            else:
                loose = [TokenFiles(folder / name, dtype) for name in ("loose", "loose-held")]
                with loose[0], loose[1]:
                    _tokenize(source, tokenizer, config, *loose)
                for documents, out in zip(loose, (training, held_out), strict=True):
                    pack(documents, out, row, config.mask == "assistant")
                    shutil.rmtree(documents.folder)
        count = training.tokens
        training.extend(held_out)
    shutil.rmtree(held_out.folder)
    documents, trained = ((folder / name).stat().st_size // 8 for name in FILES[1:])
    if not documents:
        raise UserError(f"{source.name}: no documents in it: all it holds is empty or blank")
    masked = config.mask == "assistant" or row is not None  # of rows, the padding is
    if masked and not trained:
        raise UserError(f"{source.name}: no assistant turns in it to learn from")
    write_sums(folder)
    facts = (training.tokens, count, documents, masked)
    manifest = {"version": VERSION} | dataclasses.asdict(Store(folder, dtype, *facts, digest=""))
    del manifest["folder"], manifest["digest"]
    manifest["files"] = {name: files.file_digest(folder / name) for name in (*FILES, "sums")}
    manifest |= {"digest": files.digest(manifest), "source": source.name}
    (folder / "store.json").write_text(json.dumps(manifest), encoding="utf-8")


def pack(loose: TokenFiles, out: TokenFiles, row: int, masked: bool) -> None:
    """Writes documents by best fit into rows of so many tokens, each filled up with padding."""
    ends, trained = (np.fromfile(loose.folder / name, np.int64) for name in FILES[1:])
    documents = np.stack([np.append(0, ends)[:-1], ends], axis=1)
    runs = trained.reshape(-1, 2) if masked else documents  # what is learned
    pieces = [
        x
        for a, b in documents.tolist()
        for x in split_document(a, b, row, runs if masked else None)
    ]
    if (left_out := loose.tokens - sum(b - a for a, b in pieces)) > 0:
        report.say(f"{report.count(left_out)} tokens left out, of answers longer than a row")
    tokens = np.memmap(loose.folder / "tokens", loose.code, "r") if pieces else None
    for members in best_fit([b - a for a, b in pieces], row):
        begun = out.tokens
        for a, b in (pieces[i] for i in members):
            inside = slice(np.searchsorted(runs[:, 1], a, "right"), np.searchsorted(runs[:, 0], b))
            out.add(tokens[a:b].tolist(), (runs[inside].clip(a, b) - a).ravel().tolist(), True)
        out.add([0] * (begun + row - out.tokens), [], True)


def write_sums(folder: Path) -> None:
    """Writes the checksums of the blocks of the token file to a file beside it."""
    with open(folder / "tokens", "rb") as tokens, open(folder / "sums", "wb") as file:
        while block := tokens.read(BLOCK):
            file.write(zlib.crc32(block).to_bytes(4, "little"))


def _tokenize(
    source: Source, tokenizer: Tokenizer, config: Any,
    training: TokenFiles, held_out: TokenFiles,
) -> None:  # fmt: skip
    """Writes the tokens of a source."""
    bos, out = [] if tokenizer.bos is None else [tokenizer.bos], training
    position = 0

    def read(amount: int) -> None:
        nonlocal position
        position += amount

    pieces = records.pieces(
        source, tokenizer, text_field=config.text_field, documents=config.documents,
        mask=config.mask, progress=read,
    )  # fmt: skip
    with (
        report.progress(f"tokenizing {source.name}", source.size) as advance,
        contextlib.closing(_encoded(tokenizer, pieces)) as encoded,
    ):
        for piece, encoding in encoded:
            ids, runs = encoding.ids, []
            if piece.starts:
                is_held_out = hash_bytes(piece.text.encode()) < config.held_out * 2**64
                out = held_out if is_held_out else training
            if piece.spans is not None:
                runs = _runs(encoding.offsets, piece.spans)
            if not piece.rendered:
                ids = (bos if piece.starts else []) + ids
                ids += [tokenizer.eos] if piece.ends else []
            out.add(ids, runs, piece.ends)
            advance(position, remark=f"{report.count(training.tokens + held_out.tokens)} tokens")


def _encoded(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Any]]:
    """While some are tokenized the next are read and those before are written."""
    with ThreadPoolExecutor(1) as pool:
        current, chunk, size = None, [], 0
        for piece in itertools.chain(pieces, [None]):
            if piece is not None:
                chunk.append(piece)
                size += len(piece.text)
            if piece is None or size >= CHUNK:
                previous, current = current, (chunk, pool.submit(tokenizer.encode, chunk))
                if previous is not None:
                    yield from zip(previous[0], previous[1].result(), strict=True)
                chunk, size = [], 0
        yield from zip(current[0], current[1].result(), strict=True)


def _runs(offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where runs of tokens that share a character with the spans start and stop."""
    starts, stops = np.array(offsets, int).reshape(-1, 2).T
    inside = np.zeros(len(offsets) + 2, bool)
    for start, stop in spans:
        inside[1:-1] |= (starts < stop) & (stops > start) & (starts < stops)
    return np.flatnonzero(np.diff(inside)).tolist()


def hash_bytes(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Config:
    """List the tokenized texts of a cache, those used longest ago first."""

    cache: Annotated[str | None, LOCAL] = None
    """The folder; by default compact-distill in the user's cache folder."""
    cache_limit: Annotated[float | None, above(0)] = None
    """GB; where there are more, remove those that were used longest ago."""


def main() -> None:
    config = errors.cli(Config)
    if config.cache_limit is not None:
        prune(config.cache, config.cache_limit)
    for used, size, folder in stores(files.local_path(config.cache or files.cache_folder())):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
        source = files.read_json(folder / "store.json").get("source", "")
        print(f"{day}  {report.size(size):>8}  {folder}  {source}")


if __name__ == "__main__":
    errors.run(main)
