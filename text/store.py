"""The token store: a source's text, tokenized once, in flat files in a cache folder."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files as disk
from runtime import report
from runtime.errors import UserError
from text import files, records
from text.tokenizer import Tokenizer

VERSION = 2
CHUNK = 1 << 21  # characters tokenized at once
BLOCK = 1 << 12  # bytes of the token file that share a checksum: about what a window reads
FILES = ("tokens", "documents", "trained")
REMEDY = ": make room, give permission, or choose another folder with --data.cache"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a source becomes tokens."""

    text_field: str
    documents: str
    mask: str
    held_out: float  # share of the documents that are not to train on


@dataclasses.dataclass(frozen=True)
class Store:
    """A source's tokens on disk: first those to train on, then those of held-out documents."""

    folder: Path
    dtype: str
    tokens: int
    training: int
    documents: int
    bytes: int  # of the text that is learned (with `masked` the assistant's), in UTF-8
    masked: bool
    digest: str  # of all the above but the folder, and of the files


def open_store(
    name: str, tokenizer: Tokenizer, options: Options, cache: str | None, streaming: bool
) -> Store:
    """The store of a source in the cache; it is built if there is none that is whole."""
    source = files.find(name, streaming=streaming)
    facts = [source.fingerprint, tokenizer.fingerprint, list(dataclasses.astuple(options))]
    path = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "compact-distill")
    try:
        folder = Path(path).expanduser() / disk.digest([VERSION, *facts])
    except RuntimeError as error:
        raise UserError(f"{path}: {error}{REMEDY}") from None
    with disk.disk_errors(folder.parent, REMEDY):
        if store := load(folder):
            return store
        folder.parent.mkdir(parents=True, exist_ok=True)
        with disk.lock(folder.parent / ".lock", wait=True):  # each builder takes all cores
            if store := load(folder):  # another process has built it meanwhile
                return store
            for stale in folder.parent.glob("*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            with disk.atomic_folder(folder, REMEDY) as partial:
                build(partial, source, tokenizer, options)
    return load(folder)


def load(folder: Path) -> Store | None:
    """The store in a folder, or None where there is no whole one.

    The tokens themselves, most of it, are checked when they are read.
    """
    try:
        manifest = disk.read_json(folder / "store.json")
        checksum = manifest.pop("digest")
        if checksum != disk.digest(manifest) or manifest.pop("version") != VERSION:
            return None
        hashes = manifest.pop("files")
        store = Store(folder, **manifest, digest=checksum)
        if any(disk.file_digest(folder / name) != hashes[name] for name in (*FILES[1:], "sums")):
            return None
        size = (folder / "tokens").stat().st_size
        return store if size == store.tokens * np.dtype(store.dtype).itemsize else None
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class TokenFiles(contextlib.ExitStack):
    """Growing files: token ids, where documents end, and where runs of trained tokens start, stop.

    Positions are sorted: a search tells the document of any token, or whether it lies in a run.
    """

    def __init__(self, folder: Path, dtype: str):
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.folder, self.dtypes = folder, (dtype, "int64", "int64")
        self.files = [self.enter_context(open(folder / name, "wb")) for name in FILES]
        self.tokens = self.documents = self.ended = 0
        self.pending: tuple[list[int], list[int], list[int]] = ([], [], [])

    def add(self, ids: list[int], trained: list[int], ends: bool) -> None:
        tokens, documents, runs = self.pending
        runs += [self.tokens + position for position in trained]
        tokens += ids
        self.tokens += len(ids)
        if ends and self.tokens > self.ended:  # an empty document is none
            documents.append(self.tokens)
            self.ended = self.tokens
            self.documents += 1

    def flush(self) -> None:
        for i, values in enumerate(self.pending):
            self.files[i].write(np.array(values, self.dtypes[i]))
            values.clear()

    def extend(self, other: "TokenFiles") -> None:
        """Appends the whole of other files, which are closed."""
        for i, name in enumerate(FILES):
            with open(other.folder / name, "rb") as file:
                while block := file.read(1 << 22):
                    values = np.frombuffer(block, self.dtypes[i])
                    self.files[i].write(values + self.tokens if i else values)
        self.tokens += other.tokens
        self.documents += other.documents


def build(folder: Path, source: files.Source, tokenizer: Tokenizer, options: Options) -> None:
    """Tokenizes a source into an empty folder."""
    dtype = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
    with TokenFiles(folder, dtype) as training:
        with TokenFiles(folder / "held", dtype) as held_out:
            size = _tokenize(source, tokenizer, options, (training, held_out))
        count = training.tokens
        training.extend(held_out)
    shutil.rmtree(held_out.folder)
    if not training.documents:
        raise UserError(f"{source.name}: no documents in it: all it holds is empty or blank")
    masked = options.mask == "assistant"
    if masked and not (folder / "trained").stat().st_size:
        raise UserError(f"{source.name}: no assistant turns in it to learn from")
    write_sums(folder)
    manifest = {
        "version": VERSION,
        "dtype": dtype,
        "tokens": training.tokens,
        "training": count,
        "documents": training.documents,
        "bytes": size,
        "masked": masked,
        "files": {name: disk.file_digest(folder / name) for name in (*FILES, "sums")},
    }
    disk.write_json(folder / "store.json", manifest | {"digest": disk.digest(manifest)})


def write_sums(folder: Path) -> None:
    """Writes the checksums of the blocks of the token file to a file beside it."""
    with open(folder / "tokens", "rb") as tokens, open(folder / "sums", "wb") as file:
        while block := tokens.read(BLOCK):
            file.write(zlib.crc32(block).to_bytes(4, "little"))


def _tokenize(
    source: files.Source, tokenizer: Tokenizer, options: Options, sides: Sequence[TokenFiles]
) -> int:
    """Writes the tokens to train on and those held out; returns the bytes of the text to learn."""
    bos, size, out = [] if tokenizer.bos is None else [tokenizer.bos], 0, sides[0]
    position = 0

    def read(amount: int) -> None:
        nonlocal position
        position += amount

    how = {"text_field": options.text_field, "documents": options.documents, "mask": options.mask}
    pieces = records.pieces(source, tokenizer, **how, progress=read)
    with (
        report.progress(f"tokenizing {source.name}", source.size) as advance,
        contextlib.closing(_encoded(tokenizer, _chunks(pieces))) as chunks,
    ):
        for chunk in chunks:
            for piece, encoding in chunk:
                content, ids, runs = piece.text.encode(), encoding.ids, []
                if piece.starts:
                    out = sides[hash_bytes(content) < options.held_out * 2**64]
                if piece.spans is not None:
                    content = "".join(piece.text[slice(*span)] for span in piece.spans).encode()
                    runs = _runs(encoding.offsets, piece.spans)
                size += len(content)
                if not piece.rendered:
                    ids = (bos if piece.starts else []) + ids
                    ids += [tokenizer.eos] if piece.ends else []
                out.add(ids, runs, piece.ends)
            for side in sides:
                side.flush()
            tokens = report.count(sum(side.tokens for side in sides))
            advance(position, remark=f"{tokens} tokens")
    return size


def _chunks(pieces: Iterable[records.Piece]) -> Iterator[list[records.Piece]]:
    chunk, size = [], 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    tokenizer: Tokenizer, chunks: Iterable[list[records.Piece]]
) -> Iterator[Iterable[tuple[records.Piece, Any]]]:
    """While a chunk is tokenized the next is read and the one before is written."""
    with ThreadPoolExecutor(1) as pool:
        previous = None
        for chunk in itertools.chain(chunks, [None]):
            current = chunk and (chunk, pool.submit(tokenizer.encode, chunk))
            if previous:
                yield zip(previous[0], previous[1].result(), strict=True)
            previous = current


def _runs(offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where runs of tokens that share a character with the spans start and stop."""
    starts, stops = np.array(offsets, int).reshape(-1, 2).T
    inside = np.zeros(len(offsets) + 2, bool)
    for start, stop in spans:
        inside[1:-1] |= (starts < stop) & (stops > start) & (starts < stops)
    return np.flatnonzero(np.diff(inside)).tolist()


def hash_bytes(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
