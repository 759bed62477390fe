"""The token store: a source's text, tokenized once, in flat files in a cache folder."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from runtime import report
from runtime.errors import UserError
from runtime.files import digest
from text import files, records
from text.tokenizer import Tokenizer

VERSION = 2


CHUNK = 1 << 21  # characters tokenized at once


BLOCK = 1 << 12  # bytes of the token file that share a checksum: about what a window reads


FILES = ("tokens", "documents", "trained")


@dataclasses.dataclass(frozen=True)
class Store:
    """A source's tokens on disk: first those to train on, then those of held-out documents."""

    folder: Path
    dtype: str
    tokens: int
    training: int
    documents: int
    bytes: int
    """Of the text that is learned (with `masked` the assistant's), in UTF-8."""
    masked: bool
    digest: str
    """Of all the above but the folder, and of the files."""


class _Stream:
    """Growing files of token ids, of where documents end and of where trained tokens start, stop.

    A file of positions is sorted, so that a search tells the document of any token, or whether it
    lies between a start and a stop.
    """

    def __init__(self, folder: Path, dtype: str, files: contextlib.ExitStack):
        folder.mkdir()
        self.folder, self.dtypes = folder, (dtype, "int64", "int64")
        self.files = [files.enter_context(open(folder / name, "wb")) for name in FILES]
        self.hashes = [hashlib.blake2b(digest_size=16) for _ in FILES]
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
            self._write(i, np.array(values, self.dtypes[i]))
            values.clear()

    def _write(self, i: int, values: np.ndarray) -> None:
        self.files[i].write(values)
        self.hashes[i].update(values)

    def extend(self, other: "_Stream") -> None:
        """Append the whole of another stream."""
        for i, name in enumerate(FILES):
            with open(other.folder / name, "rb") as file:
                while block := file.read(1 << 22):
                    values = np.frombuffer(block, self.dtypes[i])
                    self._write(i, values + self.tokens if i else values)
        self.tokens += other.tokens
        self.documents += other.documents

    def sync(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())


def _build(
    folder: Path, source: files.Source, tokenizer: Tokenizer, config: Any, held_out: float
) -> None:
    """Tokenize a source into a new folder; its manifest is written last."""
    dtype = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
    with contextlib.ExitStack() as files:
        stream, held = (_Stream(path, dtype, files) for path in (folder, folder / "held"))
        size = _tokenize(source, tokenizer, config, held_out, stream, held)
        training = stream.tokens
        held.sync()
        stream.extend(held)
        stream.sync()
    shutil.rmtree(held.folder)
    sums = _write_sums(folder)
    if not stream.documents:
        raise UserError(f"{source.name}: no documents in it: all it holds is empty or blank")
    if config.mask == "assistant" and not (folder / "trained").stat().st_size:
        raise UserError(f"{source.name}: no assistant turns in it to learn from")
    hashes = {name: hash.hexdigest() for name, hash in zip(FILES, stream.hashes, strict=True)}
    manifest = {
        "version": VERSION,
        "dtype": dtype,
        "tokens": stream.tokens,
        "training": training,
        "documents": stream.documents,
        "bytes": size,
        "masked": config.mask == "assistant",
        "files": hashes | {"sums": sums},
    }
    with open(folder / "store.json", "w") as file:
        json.dump(manifest | {"digest": digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_sums(folder: Path) -> str:
    """Checksums of the blocks of the token file, in a file beside it; returns the hash of that."""
    hash = hashlib.blake2b(digest_size=16)
    with open(folder / "tokens", "rb") as tokens, open(folder / "sums", "wb") as file:
        while block := tokens.read(BLOCK):
            entry = zlib.crc32(block).to_bytes(4, "little")
            file.write(entry)
            hash.update(entry)
        file.flush()
        os.fsync(file.fileno())
    return hash.hexdigest()


def _tokenize(
    source: files.Source,
    tokenizer: Tokenizer,
    config: Any,
    held_out: float,
    training: _Stream,
    held: _Stream,
) -> int:
    """Write the tokens of a source to two streams; returns the bytes of the text to learn."""
    bos, size, out = [] if tokenizer.bos is None else [tokenizer.bos], 0, training

    def write(pieces: Sequence[records.Piece], encodings: Sequence[Any]) -> None:
        nonlocal size, out
        for piece, encoding in zip(pieces, encodings, strict=True):
            content, ids, runs = piece.text.encode(), encoding.ids, []
            if piece.starts:
                out = held if _hash(content) < held_out * 2**64 else training
            if piece.spans is not None:
                content = "".join(piece.text[slice(*span)] for span in piece.spans).encode()
                runs = _runs(encoding.offsets, piece.spans)
            size += len(content)
            if not piece.rendered:
                ids = (bos if piece.starts else []) + ids
                ids += [tokenizer.eos] if piece.ends else []
            out.add(ids, runs, piece.ends)
        training.flush()
        held.flush()

    start, position = time.monotonic(), 0

    def read(amount: int) -> None:
        nonlocal position
        position += amount

    phase = report.progress(f"tokenizing {source.name}", source.size)
    with phase as advance, ThreadPoolExecutor(1) as pool:
        pieces = records.pieces(
            source,
            tokenizer,
            text_field=config.text_field,
            documents=config.documents,
            mask=config.mask,
            progress=read,
        )
        # While a chunk is tokenized the next is read and the one before is written.
        before = None
        for chunk in itertools.chain(_chunks(pieces), [None]):
            now = chunk and (chunk, pool.submit(tokenizer.encode, chunk), position)
            if before:
                write(before[0], before[1].result())
                tokens = training.tokens + held.tokens
                speed = report.count(tokens / max(time.monotonic() - start, 1e-3))
                advance(before[2], remark=f"{report.count(tokens)} tokens  {speed} tok/s")
            before = now
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


def _runs(offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where runs of tokens that share a character with the spans start and stop."""
    starts, stops = np.array(offsets, int).reshape(-1, 2).T
    inside = np.zeros(len(offsets) + 2, bool)
    for start, stop in spans:
        inside[1:-1] |= (starts < stop) & (stops > start) & (starts < stops)
    return np.flatnonzero(np.diff(inside)).tolist()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _load(folder: Path) -> Store | None:
    """The store in a folder, or None where there is no whole one.

    The tokens themselves, most of it, are checked when they are read.
    """
    try:
        manifest = json.loads((folder / "store.json").read_bytes())
        checksum = manifest.pop("digest")
        if checksum != digest(manifest) or manifest.pop("version") != VERSION:
            return None
        hashes = manifest.pop("files")
        store = Store(folder, **manifest, digest=checksum)
        size = store.tokens * np.dtype(store.dtype).itemsize
        if (folder / "tokens").stat().st_size != size:
            return None
        if any(_hash_of(folder / name) != hashes[name] for name in (*FILES[1:], "sums")):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return store


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _store(name: str, tokenizer: Tokenizer, config: Any, held_out: float) -> Store:
    """The store of a source in the cache, built if there is none that is whole."""
    source = files.find(name, streaming=config.streaming)
    options = [config.text_field, config.documents, config.mask, held_out]
    key = digest([VERSION, source.fingerprint, tokenizer.fingerprint, options])
    cache = Path(
        config.cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "compact-distill")
    )
    try:
        cache = cache.expanduser()
        folder = cache / key
        if store := _load(folder):
            return store
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            if store := _load(folder):  # another process has built it meanwhile
                return store
            partial = cache / f"{key}.{uuid.uuid4().hex}.partial"
            try:
                _build(partial, source, tokenizer, config, held_out)
                shutil.rmtree(folder, ignore_errors=True)  # what a damaged one left
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{cache}: cannot keep tokenized text there ({reason}): make room,"
            " give permission, or choose another folder with --data.cache"
        ) from error
    return _load(folder)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One builder at a time (each takes all cores); what interrupted ones left is removed."""
    lock = os.open(cache, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # no locks on this file system: builds have names of their own
            pass
        else:
            for partial in cache.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        yield
    finally:
        os.close(lock)
