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
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int, UInt8

import data
import losses
import models
import text
from runtime import files
from runtime.errors import UserError

VERSION = 1
MANIFEST, INDEX = "targets.json", "windows"
MAY_CHANGE = frozenset({"digest", "teacher-name", "data-flags", "shard", "index"})
SHARD = 1 << 28  # bytes
ROWS = 1 << 16  # rows whose windows are looked up at once
SIGNALS = {"top-k": losses.TopK, "draws": losses.SampledTargets}

Data = data.Config  # a field of a config hides the module it is named after


# ---- numbers as bits -----------------------------------------------------------------------------


def pack(values: Int[np.ndarray, "rows n"], width: int) -> UInt8[np.ndarray, "rows bytes"]:
    """Numbers of `width` bits, up to 32, one after the other; eight of them fill `width` bytes."""
    words = np.pad(values.astype("<u4"), ((0, 0), (0, -values.shape[1] % 8)))
    words = words.view(np.uint8).reshape(*words.shape, 4)
    bits = np.unpackbits(words, axis=2, count=width, bitorder="little")
    return np.packbits(bits.reshape(len(values), -1), axis=1, bitorder="little")


def unpack(
    packed: UInt8[np.ndarray, "rows bytes"], width: int, n: int
) -> Int[np.ndarray, "rows {n}"]:
    """The first `n` numbers of each row of what `pack` returned."""
    bits = np.unpackbits(packed, axis=1, count=n * width, bitorder="little")
    words = np.zeros((len(packed), n, 4), np.uint8)
    words[..., : -(-width // 8)] = np.packbits(
        bits.reshape(len(packed), n, width), axis=2, bitorder="little"
    )
    return words.view("<i4")[..., 0].astype(np.int32)


# A log-probability as a byte: the square of the byte, finer where there is more probability.
LEVELS, SPAN = 254, 32.0  # what is below exp(-32) is raised to it; 255 is no probability at all
DECODED = np.append(-SPAN * (np.arange(255) / LEVELS) ** 2, -np.inf).astype(np.float32)


def encode(
    log_p: Float32[np.ndarray, "..."], u: Float32[np.ndarray, "..."] | None = None
) -> UInt8[np.ndarray, "..."]:
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


# ---- a folder of targets -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """A folder of targets; its manifest holds all of this but the folder and the windows."""

    folder: Path
    windows: Int[np.ndarray, " windows"]
    """The numbers of the windows that are kept, ascending."""
    teacher: str
    """Fingerprint of the model."""
    teacher_name: str
    tokenizer: str
    """Fingerprint."""
    data: str
    """Fingerprint of the tokens, and of where each source starts and stops."""
    data_flags: dict[str, Any]
    seq_len: int
    vocab: int
    temperature: float
    dtype: str
    """What the teacher computed in."""
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
    def data_config(self) -> Data:
        lists = {name: tuple(x) for name, x in self.data_flags.items() if isinstance(x, list)}
        return Data(**self.data_flags | lists)

    @property
    def width(self) -> int:
        """Bits of a token id."""
        return max(1, (self.vocab - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        return -(-self.seq_len * self.entries // 8) * self.width

    @property
    def record(self) -> int:
        """Bytes of a window."""
        size = {"packed": 1, "float32": 4}[self.values]
        return self.id_bytes + self.seq_len * (self.entries + 1) * size + 4

    @property
    def shards(self) -> int:
        return -(-len(self.windows) // self.shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.targets"

    def size(self, shard: int) -> int:
        """Bytes of a whole shard."""
        return min(self.shard, len(self.windows) - shard * self.shard) * self.record

    def checksum(self, content: UInt8[np.ndarray, " bytes"], window: int) -> bytes:
        """The checksum of a record, which holds at no other place and in no other targets."""
        seed = zlib.crc32(f"{self.digest} {window}".encode())
        return zlib.crc32(content, seed).to_bytes(4, "little")

    def is_intact(self, record: UInt8[np.ndarray, " bytes"], window: int) -> bool:
        return record[-4:].tobytes() == self.checksum(record[:-4], window)


def windows_digest(corpus: data.Corpus) -> str:
    """A fingerprint of what the windows of a corpus are, by their numbers."""
    parts = [part for group in corpus.groups for part in group]
    return text.digest([[part.store.digest, part.start, part.stop] for part in parts])


def load(folder: Path | str, *, unfinished: bool = False) -> Targets:
    """Targets that are whole, unless `unfinished`, as far as the sizes of their files tell."""
    folder = Path(folder)
    path, index = folder / MANIFEST, folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so these are no targets of targets.py")
    files.check_links(folder, [path, index, *folder.glob("*.targets")])
    manifest = files.read_json(path, ": restore it, or make the targets anew")
    manifest.pop("version", None)  # the digest knows it
    try:
        digest, listed = manifest.pop("digest"), index.read_bytes()
        targets = Targets(folder, np.frombuffer(listed, "<i8").astype(np.int64), **manifest)
        altered = zlib.crc32(listed) != targets.index or digest != targets.digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        altered = True
    if altered:
        raise UserError(
            f"{path}: it or {INDEX} beside it was altered, or another version wrote it: restore"
            " them, or make anew"
        )
    for shard in range(0 if unfinished else targets.shards):
        path, expected = targets.path(shard), targets.size(shard)
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise UserError(
                f"{path}: a shard of {expected} bytes was expected, found {size or 'none'}: the"
                " same command of targets.py that began these targets finishes them"
            )
    return targets


def open_or_create(targets: Targets) -> Targets:
    """The targets that are in the folder already, made by the same settings, or these."""
    folder = targets.folder
    settings = targets.manifest | {"digest": targets.digest}
    run = files.RunFolder(folder, settings, MAY_CHANGE, MANIFEST)
    if (folder / MANIFEST).exists():
        previous, more = load(folder, unfinished=True), ()
        if previous.index != targets.index:
            more = (f"of {len(previous.windows)} windows, now {len(targets.windows)}",)
        run.check("give the same flags, or another --out", *more)
        return previous
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_bytes(targets.windows.astype("<i8").tobytes())
    run.write()
    return targets


def check(
    targets: Targets,
    corpus: data.Corpus,
    loss: losses.Config,
    *,
    tokenizer: Path,
    vocab: int,
    rows: int,
    teacher: Path | None = None,
) -> None:
    """Refuses targets that are not what a run of `rows` windows would have asked its teacher."""
    model = targets.teacher if teacher is None else models.fingerprint(teacher)
    tokens, windows = text.load_tokenizer(tokenizer).fingerprint, windows_digest(corpus)
    name, source = targets.teacher_name, " ".join(targets.data_config.source)
    heat = f"{loss.temperature:g}"
    if loss.temperature_end is not None:
        heat += f" to {loss.temperature_end:g}"
    sides = [
        (model == targets.teacher, f"the teacher {name} ({targets.teacher[:8]})",
         f"{teacher} ({model[:8]})"),
        (tokens == targets.tokenizer, f"the tokenizer of {name} ({targets.tokenizer[:8]})",
         f"that of {tokenizer} ({tokens[:8]})"),
        (vocab == targets.vocab, f"{targets.vocab} tokens", f"a student with {vocab}"),
        (corpus.seq_len == targets.seq_len, f"windows of {targets.seq_len}",
         f"--seq-len {corpus.seq_len}"),
        (windows == targets.data, f"the text of {source} ({targets.data[:8]})",
         f"--data flags that give another ({windows[:8]})"),
        (heat == f"{targets.temperature:g}", f"temperature {targets.temperature:g}",
         f"--loss.temperature {heat}"),
        (targets.kind == "top-k" or loss.divergence == "forward_kl",
         "forward_kl, the one that draws are unbiased for", f"--loss.divergence {loss.divergence}"),
    ]  # fmt: skip
    for equal, theirs, ours in sides:
        if not equal:
            raise UserError(
                f"{targets.folder}: these targets are for {theirs}, but this run has {ours}: give"
                " the same, or make others with targets.py"
            )
    if len(targets.windows) < corpus.windows:
        for step in range(-(-rows // ROWS)):
            _positions(targets, data.windows(corpus, step, ROWS)[: rows - step * ROWS])


# ---- reading and writing -------------------------------------------------------------------------


def _positions(targets: Targets, windows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Which of the records are those of these windows."""
    positions = np.searchsorted(targets.windows, windows)
    known = np.append(targets.windows, -1)[positions] == windows
    if not known.all():
        raise UserError(
            f"{targets.folder}: window {windows[~known][0]} is not among the {len(targets.windows)}"
            " kept: a run of the --steps, --batch-size and --seed they were made for reads those,"
            " and targets.py without --steps keeps all"
        )
    return positions


def read(targets: Targets, windows: Int[np.ndarray, " rows"]) -> losses.Targets:
    """What the teacher says of these windows."""
    rows = np.empty((len(windows), targets.record), np.uint8)
    positions = _positions(targets, windows)
    for record, window, position in zip(rows, windows.tolist(), positions.tolist(), strict=True):
        shard, i = divmod(position, targets.shard)
        path = targets.path(shard)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.preadv(file.fileno(), [record], i * targets.record)
        except OSError as error:
            raise UserError(f"{path}: cannot be read, {error.strerror}") from None
        if size != targets.record or not targets.is_intact(record, window):
            raise UserError(
                f"{path}: the targets of window {window} were altered: remove the file, and the"
                " command that made it makes it anew"
            )
    shape = (len(windows), targets.seq_len, targets.entries)
    ids = unpack(rows[:, : targets.id_bytes], targets.width, math.prod(shape[1:]))
    values = rows[:, targets.id_bytes : -4].reshape(len(windows), targets.seq_len, -1)
    if targets.values == "float32":
        values = values.view("<f4").astype(np.float32)
    else:
        values = DECODED[values]
        if targets.kind == "top-k":  # a distribution again
            values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return SIGNALS[targets.kind](ids.reshape(shape), values[..., :-1], values[..., -1])


def records(
    targets: Targets, signal: losses.Targets, windows: Int[np.ndarray, " rows"]
) -> UInt8[np.ndarray, "rows bytes"]:
    """What is on disk for these windows."""
    values = np.concatenate([signal.log_probs, signal.rest[..., None]], -1)
    if targets.values == "packed":
        u = None
        if targets.kind == "draws":  # one for all of a token, so that max(p, rest) has no bias
            rngs = (np.random.default_rng([targets.seed, window]) for window in windows.tolist())
            u = np.stack([rng.random((targets.seq_len, 1), np.float32) for rng in rngs])
        values = encode(values, u)
    values = values.reshape(len(windows), -1)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    ids = pack(signal.ids.reshape(len(windows), -1), targets.width)
    content = np.concatenate([ids, values], 1)
    sums = map(targets.checksum, content, windows.tolist())
    sums = np.frombuffer(b"".join(sums), np.uint8).reshape(-1, 4)
    return np.concatenate([content, sums], 1)


def unwritten(targets: Targets, index: int = 0, count: int = 1) -> Int[np.ndarray, " records"]:
    """Which records one of `count` processes has yet to write, in the order they are appended.

    Whatever follows the last whole record of an unfinished shard is cut off.
    """
    positions = [np.arange(0)]
    for shard in range(index, targets.shards, count):
        path, first = targets.path(shard), shard * targets.shard
        stop = min(first + targets.shard, len(targets.windows))
        if path.exists() and path.stat().st_size == targets.size(shard):
            continue
        with open(path, "ab+") as file:
            file.seek(0)
            for position in range(first, stop):
                record = np.frombuffer(file.read(targets.record), np.uint8)
                window = int(targets.windows[position])
                if len(record) < targets.record or not targets.is_intact(record, window):
                    break
            file.truncate((position - first) * targets.record)
        positions.append(np.arange(position, stop))
    return np.concatenate(positions)


def append(targets: Targets, signal: losses.Targets, positions: Int[np.ndarray, " rows"]) -> None:
    """Writes the next of what is `unwritten`."""
    shards = positions // targets.shard
    rows = records(targets, signal, targets.windows[positions])
    for shard in np.unique(shards).tolist():
        with open(targets.path(shard), "ab") as file:
            file.write(rows[shards == shard])
            if file.tell() == targets.size(shard):
                file.flush()
                os.fsync(file.fileno())
