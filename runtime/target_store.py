"""A folder of a teacher's targets.

For every window of the corpus a record of fixed size, in shards of consecutive windows: token ids,
bit-packed to the width of the vocabulary, then values, then a checksum that knows which window of
which targets this is. So a reader finds any window by its number, and an unfinished shard goes on
where its last whole record ends.
"""

import dataclasses
import functools
import math
import os
import types
import typing
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8

import data
import losses
import models
import text
from runtime import buckets, files
from runtime.errors import UserError

VERSION = 2
MANIFEST, INDEX = "targets.json", "windows"
MAY_CHANGE = frozenset({"teacher-name", "data-flags", "shard"})
SHARD = 1 << 28  # bytes
ROWS = 1 << 16  # rows whose windows are looked up at once
SIGNALS = {"top-k": losses.TopK, "draws": losses.SampledTargets}

Values = Float32[np.ndarray, "..."]


def pack(values: Int[np.ndarray, "rows n"], width: int) -> UInt8[np.ndarray, "rows bytes"]:
    """Numbers of `width` bits, up to 32, one after the other; eight of them fill `width` bytes."""
    words = np.pad(values.astype("<u4"), ((0, 0), (0, -values.shape[1] % 8)))
    words = words.view(np.uint8).reshape(*words.shape, 4)
    bits = np.unpackbits(words, axis=2, count=width, bitorder="little")
    return np.packbits(bits.reshape(len(values), -1), axis=1, bitorder="little")


def unpack(x: UInt8[np.ndarray, "rows bytes"], width: int, n: int) -> Int[np.ndarray, "rows n"]:
    """The first `n` numbers of each row of what `pack` returned."""
    bits = np.unpackbits(x, axis=1, count=n * width, bitorder="little").reshape(len(x), n, width)
    words = np.zeros((len(x), n, 4), np.uint8)
    words[..., : -(-width // 8)] = np.packbits(bits, axis=2, bitorder="little")
    return words.view("<i4")[..., 0]


# A log-probability as a byte: the square of the byte, finer where there is more probability.
LEVELS, SPAN = 254, 32.0  # what is below exp(-32) is raised to it; 255 is no probability at all
DECODED = np.append(-SPAN * (np.arange(255) / LEVELS) ** 2, -np.inf).astype(np.float32)


def encode(log_p: Values, u: Values | None = None) -> UInt8[np.ndarray, "..."]:
    """The nearest byte; with `u`, uniform in [0, 1), a neighbour that preserves the mean of p.

    It is monotone for one `u`: of numbers rounded with the same, the largest stays the largest.
    """
    level = LEVELS * np.sqrt(np.clip(-log_p, 0, SPAN) / SPAN)
    if u is None:
        code = np.rint(level)
    else:
        high = np.minimum(np.floor(level), LEVELS - 1).astype(np.int32)
        upper, lower = np.exp(DECODED[high]), np.exp(DECODED[high + 1])
        code = high + (u >= (np.exp(log_p) - lower) / (upper - lower))
    return np.where(log_p == -np.inf, 255, code).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """A folder of targets; its manifest holds all of this but the folder and the windows.

    `teacher`, `tokenizer` and `data` are fingerprints, the last of the tokens and of where each
    source starts and stops; `dtype` is what the teacher computed in.
    """

    folder: Path
    windows: Int[np.ndarray, " windows"]
    """The numbers of the windows that are kept, ascending."""
    teacher: str
    teacher_name: str
    tokenizer: str
    data: str
    data_flags: dict[str, Any]
    seq_len: int
    vocab: int
    temperature: float
    dtype: str
    kind: Literal["top-k", "draws"]
    entries: int
    values: Literal["packed", "float32"]
    seed: int
    shard: int
    """Windows of a shard."""
    index: int
    """Checksum of the file that lists the windows."""

    @property
    def manifest(self) -> dict[str, Any]:
        fields = [field.name for field in dataclasses.fields(self)][2:]
        return {"version": VERSION} | {name: getattr(self, name) for name in fields}

    @functools.cached_property
    def digest(self) -> str:
        return text.digest(self.manifest)

    @property
    def data_config(self) -> data.Config:
        lists = {name: tuple(x) for name, x in self.data_flags.items() if isinstance(x, list)}
        return data.Config(**self.data_flags | lists | {"cache": None})

    @property
    def width(self) -> int:
        """Bits of a token id."""
        return max(1, (self.vocab - 1).bit_length())

    @property
    def record(self) -> np.dtype:
        """What is on disk for a window."""
        ids, shape = -(-self.seq_len * self.entries // 8), (self.seq_len, self.entries + 1)
        value = {"packed": "u1", "float32": "<f4"}[self.values]
        fields = [("ids", "u1", ids * self.width), ("values", value, shape), ("checksum", "<u4")]
        return np.dtype(fields)

    @property
    def shards(self) -> range:
        return range(-(-len(self.windows) // self.shard))

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.targets"

    def positions(self, shard: int) -> range:
        """Which of the records a shard holds."""
        return range(len(self.windows))[shard * self.shard :][: self.shard]

    def is_whole(self, shard: int) -> bool:
        path, size = self.path(shard), len(self.positions(shard)) * self.record.itemsize
        return path.exists() and path.stat().st_size == size

    def checksum(self, record: bytes, window: int) -> int:
        """The checksum of a record, which holds at no other place and in no other targets."""
        return zlib.crc32(record[:-4], zlib.crc32(f"{self.digest} {window}".encode()))

    def is_intact(self, record: bytes, window: int) -> bool:
        is_whole = len(record) == self.record.itemsize
        return is_whole and record[-4:] == self.checksum(record, window).to_bytes(4, "little")


def windows_digest(corpus: data.Corpus) -> str:
    """A fingerprint of what the windows of a corpus are, by their numbers."""
    parts = [part for group in corpus.groups for part in group]
    return text.digest([[part.store.digest, part.start, part.stop] for part in parts])


def load(folder: Path | str, *, unfinished: bool = False) -> Targets:
    """Targets that are whole, unless `unfinished`, as far as the sizes of their files tell."""
    folder = buckets.local_path(folder)
    path, index = folder / MANIFEST, folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so these are no targets of targets.py")
    files.check_links(folder, [path, index, *folder.glob("*.targets")])
    manifest = files.read_json(path, ": restore it, or make the targets anew")
    manifest.pop("version", None)  # the digest knows it
    try:
        digest, listed = manifest.pop("digest"), index.read_bytes()
        targets = Targets(folder, np.frombuffer(listed, "<i8"), **manifest)
        intact = (zlib.crc32(listed), digest) == (targets.index, targets.digest)
        sizes = targets.seq_len, targets.vocab, targets.entries, targets.shard
        for settings, kind in ((manifest, Targets), (vars(targets.data_config), data.Config)):
            hints = typing.get_type_hints(kind)
            intact &= all(has_type(value, hints[name]) for name, value in settings.items())
        intact &= all(size > 0 for size in sizes) and targets.record.itemsize > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        why = f"it or {INDEX} beside it was altered, or another version wrote it"
        raise UserError(f"{path}: {why}: restore them, or make anew")
    for shard in () if unfinished else targets.shards:
        if not targets.is_whole(shard):
            remedy = "the same command of targets.py that began these targets finishes them"
            raise UserError(f"{targets.path(shard)}: it is not whole: {remedy}")
    return targets


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value that was read from a file is what a field may hold."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return value in arguments
    if kind is types.UnionType:
        return any(has_type(value, argument) for argument in arguments)
    if kind is tuple:
        return type(value) is tuple and all(has_type(x, arguments[0]) for x in value)
    return type(value) is kind or (kind is float and type(value) is int)


def open_or_create(targets: Targets) -> Targets:
    """The targets that are in the folder already, made by the same settings, or these."""
    folder = targets.folder
    if (folder / MANIFEST).exists():
        previous = load(folder, unfinished=True)
        before, now = (x.manifest | {"windows": len(x.windows)} for x in (previous, targets))
        if changed := "; ".join(files.changes(before, now, MAY_CHANGE)):
            remedy = "give the same flags, or another --out"
            raise UserError(f"{folder} has other settings ({changed}): {remedy}")
        return previous
    for path in (*folder.glob(INDEX), *folder.glob("*.targets")):
        remedy = "move it away, or give another --out"
        raise UserError(f"{folder}: {path.name} is in it, but no {MANIFEST}: {remedy}")
    with files.atomic_write(folder / INDEX) as partial:
        partial.write_bytes(targets.windows.astype("<i8").tobytes())
    files.write_json(folder / MANIFEST, targets.manifest | {"digest": targets.digest})
    return targets


def check(
    targets: Targets, corpus: data.Corpus, loss: losses.Config, *,
    tokenizer: Path, vocab: int, rows: int, teacher: Path | None = None,
) -> None:  # fmt: skip
    """Refuses targets that are not what a run of `rows` windows would have asked its teacher."""
    model = targets.teacher if teacher is None else models.fingerprint(teacher)
    tokens, windows = text.load_tokenizer(tokenizer).fingerprint, windows_digest(corpus)
    name, source = targets.teacher_name, " ".join(targets.data_config.source)
    end = "" if loss.temperature_end is None else f" to {loss.temperature_end:g}"
    heat = f"{loss.temperature:g}{end}"
    unbiased = "forward_kl" if targets.kind == "draws" else loss.divergence
    # What the value is of and the value, as the targets have it and as the run has it.
    sides = [
        (f"the teacher {name}", targets.teacher, teacher, model),
        (f"the tokenizer of {name}", targets.tokenizer, f"that of {tokenizer}", tokens),
        ("a vocabulary of", targets.vocab, "one of", vocab),
        ("windows of", targets.seq_len, "--seq-len", corpus.seq_len),
        (f"the text of {source}", targets.data, "--data flags that give another", windows),
        ("temperature", f"{targets.temperature:g}", "--loss.temperature", heat),
        ("draws, unbiased for", unbiased, "--loss.divergence", loss.divergence),
    ]
    for theirs, expected, ours, value in sides:
        if value != expected:
            misfit = f"these targets are for {theirs} {expected}, but this run has {ours} {value}"
            remedy = "give the same, or make others with targets.py"
            raise UserError(f"{targets.folder}: {misfit}: {remedy}")
    if len(targets.windows) < corpus.windows:
        for step in range(-(-rows // ROWS)):
            _positions(targets, data.windows(corpus, step, ROWS)[: rows - step * ROWS])


def _positions(targets: Targets, windows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Which of the records are those of these windows."""
    positions = np.searchsorted(targets.windows, windows)
    known = np.append(targets.windows, -1)[positions] == windows
    if not known.all():
        why = f"window {windows[~known][0]} is not among the {len(targets.windows)} kept"
        remedy = "make them for this run's --steps, --batch-size and --seed, or without --steps"
        raise UserError(f"{targets.folder}: {why}: {remedy}")
    return positions


def read(targets: Targets, windows: Int[np.ndarray, " rows"]) -> losses.Targets:
    """What the teacher says of these windows."""
    rows, size, positions = [], targets.record.itemsize, _positions(targets, windows).tolist()
    for window, position in zip(windows.tolist(), positions, strict=True):
        path, i = targets.path(position // targets.shard), position % targets.shard
        with files.library_errors(f"{path}: cannot be read"):
            rows.append(np.fromfile(path, np.uint8, size, offset=i * size).tobytes())
        if not targets.is_intact(rows[-1], window):
            remedy = "remove the file, and the command that made it makes it anew"
            raise UserError(f"{path}: the targets of window {window} were altered: {remedy}")
    rows, shape = np.frombuffer(b"".join(rows), targets.record), (targets.seq_len, targets.entries)
    ids = unpack(rows["ids"], targets.width, math.prod(shape)).reshape(-1, *shape)
    packed, values = targets.values == "packed", rows["values"]
    values = DECODED[values] if packed else values.astype(np.float32)
    if packed and targets.kind == "top-k":  # a distribution again
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return SIGNALS[targets.kind](ids, values[..., :-1], values[..., -1])


def records(
    targets: Targets, signal: losses.Targets, windows: Int[np.ndarray, " rows"]
) -> Shaped[np.ndarray, " rows"]:
    """What is on disk for these windows."""
    rows, numbers = np.zeros(len(windows), targets.record), windows.tolist()
    values, u = np.concatenate([signal.log_probs, signal.rest[..., None]], -1), None
    if targets.kind == "draws":  # one for all of a token, so that max(p, rest) has no bias
        rngs = [np.random.default_rng([targets.seed, window]) for window in numbers]
        u = np.stack([rng.random((targets.seq_len, 1), np.float32) for rng in rngs])
    if targets.values == "packed":
        values = encode(values, u)
    rows["ids"], rows["values"] = pack(signal.ids.reshape(len(rows), -1), targets.width), values
    content = [row.tobytes() for row in rows]
    rows["checksum"] = list(map(targets.checksum, content, numbers))
    return rows


def unwritten(targets: Targets, index: int = 0, count: int = 1) -> Int[np.ndarray, " records"]:
    """Which records one of `count` processes has yet to write, in the order they are appended.

    Whatever follows the last whole record of an unfinished shard is cut off.
    """
    todo, size = [np.arange(0)], targets.record.itemsize
    for shard in targets.shards[index::count]:
        positions, written = targets.positions(shard), 0
        with open(targets.path(shard), "ab+") as file:
            file.seek((len(positions) - 1) * size)
            if targets.is_intact(file.read(size + 1), int(targets.windows[positions[-1]])):
                continue  # with nothing behind its last record
            file.seek(0)
            for position in positions:
                if not targets.is_intact(file.read(size), int(targets.windows[position])):
                    break
                written += 1
            file.truncate(written * size)
        todo.append(np.array(positions[written:], int))
    return np.concatenate(todo)


def append(targets: Targets, signal: losses.Targets, positions: Int[np.ndarray, " rows"]) -> None:
    """Writes the next of what is `unwritten`."""
    shards = positions // targets.shard
    rows = records(targets, signal, targets.windows[positions])
    for shard in np.unique(shards).tolist():
        with open(targets.path(shard), "ab") as file:
            file.write(rows[shards == shard])
            file.flush()
            if targets.is_whole(shard):
                os.fsync(file)
