"""A folder of a teacher's targets.

For every window of the corpus a record of fixed size, in shards of consecutive windows: token ids,
bit-packed to the width of the vocabulary, then values, then a checksum that knows which window of
which targets this is. So a reader finds any window by its number, and an unfinished shard goes on
where its last whole record ends.
"""

import dataclasses
import functools
import json
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


SHARD = 1 << 28  # bytes


ROWS = 1 << 16  # rows whose windows are looked up at once


Data = data.Config  # a field of a config hides the module it is named after


def pack(values: Int[np.ndarray, "rows n"], width: int) -> UInt8[np.ndarray, "rows bytes"]:
    """Numbers of `width` bits, up to 32, one after the other; eight of them fill `width` bytes."""
    rows, n = values.shape
    groups = np.zeros((rows, -(-n // 8) * 8), "<u8")
    groups[:, :n] = values
    groups = groups.reshape(-1, 8)
    packed = np.zeros((len(groups), width + 5), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * width, 8)
        spread = np.ascontiguousarray(groups[:, i] << np.uint64(shift)).view(np.uint8)
        packed[:, byte : byte + 5] |= spread.reshape(-1, 8)[:, :5]
    return packed[:, :width].reshape(rows, -1)


def unpack(
    packed: UInt8[np.ndarray, "rows bytes"], width: int, n: int
) -> Int[np.ndarray, "rows {n}"]:
    """The first `n` numbers of each row of what `pack` has made."""
    groups = packed.reshape(-1, width)
    groups = np.pad(groups, ((0, 0), (0, 8)))
    values = np.empty((len(groups), 8), np.int32)
    for i in range(8):
        byte, shift = divmod(i * width, 8)
        word = np.ascontiguousarray(groups[:, byte : byte + 8]).view("<u8")[:, 0]
        values[:, i] = (word >> np.uint64(shift)) & np.uint64((1 << width) - 1)
    return values.reshape(len(packed), -1)[:, :n]


# A log-probability as a byte: the square of the byte, finer where there is more probability.
LEVELS, SPAN = 254, 32.0  # what is below exp(-32) is raised to it; 255 is no probability at all


DECODED = np.append(-SPAN * (np.arange(255) / LEVELS) ** 2, -np.inf).astype(np.float32)


def encode(
    log_p: Float32[np.ndarray, "..."], u: Float32[np.ndarray, "..."] | None = None
) -> UInt8[np.ndarray, "..."]:
    """The nearest byte; with `u`, uniform in [0, 1), a neighbour such that the mean of p is kept.

    It is monotone for one `u`: of numbers rounded with the same, the largest stays the largest.
    """
    place = LEVELS * np.sqrt(np.clip(-log_p, 0, SPAN) / SPAN)
    if u is None:
        code = np.rint(place)
    else:
        high = np.minimum(np.floor(place), LEVELS - 1).astype(np.int32)
        upper, lower = np.exp(DECODED[high]), np.exp(DECODED[high + 1])
        code = high + (u >= (np.exp(log_p) - lower) / (upper - lower))
    return np.where(log_p == -np.inf, 255, code).astype(np.uint8)


def decode(codes: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return DECODED[codes]


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

    def seal(self, content: UInt8[np.ndarray, " bytes"], window: int) -> UInt8[np.ndarray, "4"]:
        """The checksum of a record, which holds at no other place and in no other targets."""
        seed = zlib.crc32(f"{self.digest} {window}".encode())
        return np.frombuffer(zlib.crc32(content, seed).to_bytes(4, "little"), np.uint8)

    def whole(self, record: UInt8[np.ndarray, " bytes"], window: int) -> bool:
        return bool((record[-4:] == self.seal(record[:-4], window)).all())


def windows_of(corpus: data.Corpus) -> str:
    """A fingerprint of what the windows of a corpus are, by their numbers."""
    parts = [part for group in corpus.groups for part in group]
    return text.digest([[part.store.digest, part.start, part.stop] for part in parts])


def load(folder: Path | str) -> Targets:
    """Targets that are whole, as far as the sizes of their files tell."""
    targets = _load(Path(folder))
    for shard in range(targets.shards):
        path, size = targets.path(shard), targets.size(shard)
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise UserError(
                f"{path}: a shard of {size} bytes was expected, found {found or 'none'}: the same"
                " command of targets.py that began these targets finishes them"
            )
    return targets


def _load(folder: Path) -> Targets:
    path, index = folder / MANIFEST, folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so these are no targets of targets.py")
    files.check_links(folder, [path, index, *folder.glob("*.targets")])
    try:
        manifest = json.loads(path.read_bytes())
        version, digest = manifest.pop("version"), manifest.pop("digest")
        listed = index.read_bytes() if index.is_file() else b""  # from a pipe it would never end
        targets = Targets(folder, np.frombuffer(listed, "<i8").astype(np.int64), **manifest)
        altered = zlib.crc32(listed) != targets.index or digest != targets.digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        version, altered = VERSION, True
    if version != VERSION:
        raise UserError(f"{path}: of version {version}, this program reads version {VERSION}")
    if altered:
        raise UserError(f"{path}: it or {INDEX} beside it was altered: restore them, or make anew")
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
    tokens, windows = text.load_tokenizer(tokenizer).fingerprint, windows_of(corpus)
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
    for holds, made, found in sides:
        if not holds:
            raise UserError(
                f"{targets.folder}: these targets are for {made}, but this run has {found}: give"
                " the same, or make others with targets.py"
            )
    if len(targets.windows) < corpus.windows:
        for step in range(-(-rows // ROWS)):
            asked = data.windows(corpus, step, ROWS)[: rows - step * ROWS]
            _places(targets, asked)


def _places(targets: Targets, windows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    places = np.searchsorted(targets.windows, windows)
    found = np.append(targets.windows, -1)[places] == windows
    if not found.all():
        raise UserError(
            f"{targets.folder}: window {windows[~found][0]} is not among the {len(targets.windows)}"
            " kept: a run of the --steps, --batch-size and --seed they were made for reads those,"
            " and targets.py without --steps keeps all"
        )
    return places


def read(targets: Targets, windows: Int[np.ndarray, " rows"]) -> losses.Targets:
    """What is kept of these windows."""
    rows = np.empty((len(windows), targets.record), np.uint8)
    places = _places(targets, windows)
    for record, window, place in zip(rows, windows.tolist(), places.tolist(), strict=True):
        shard, at = divmod(place, targets.shard)
        path = targets.path(shard)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.preadv(file.fileno(), [record], at * targets.record)
        except OSError as error:
            raise UserError(f"{path}: cannot be read, {error.strerror}") from None
        if size != targets.record or not targets.whole(record, window):
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
        values = decode(values)
        if targets.kind == "top-k":  # a distribution again
            values -= np.log(np.exp(values).sum(-1, keepdims=True))
    kind = losses.TopK if targets.kind == "top-k" else losses.SampledTargets
    return kind(ids.reshape(shape), values[..., :-1], values[..., -1])


def records(
    targets: Targets, kept: losses.Targets, windows: Int[np.ndarray, " rows"]
) -> UInt8[np.ndarray, "rows bytes"]:
    """What is on disk for these windows."""
    ids, log_probs, rest = kept
    values = np.concatenate([log_probs, rest[..., None]], -1)
    if targets.values == "packed":
        u = None
        if targets.kind == "draws":  # one for all of a token, so that max(p, rest) has no bias
            rngs = (np.random.default_rng([targets.seed, window]) for window in windows.tolist())
            u = np.stack([rng.random((targets.seq_len, 1), np.float32) for rng in rngs])
        values = encode(values, u)
    values = values.reshape(len(windows), -1)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    content = np.concatenate([pack(ids.reshape(len(windows), -1), targets.width), values], 1)
    seals = [
        targets.seal(row, window) for row, window in zip(content, windows.tolist(), strict=True)
    ]
    return np.concatenate([content, np.stack(seals)], 1)


def begin(targets: Targets) -> Targets:
    """The targets of this description in its folder: begun there, or as they were begun before."""
    folder = targets.folder
    if (folder / MANIFEST).exists():
        before = _load(folder)
        free = {"teacher_name", "data_flags", "shard", "index"}
        changed = [
            f"{name} was {was}, is {targets.manifest[name]}"
            for name, was in before.manifest.items()
            if was != targets.manifest[name] and name not in free
        ]
        if before.index != targets.index:
            changed.append(f"of {len(before.windows)} windows, now {len(targets.windows)}")
        if changed:
            raise UserError(
                f"{folder} holds other targets ({'; '.join(changed)}): give the same flags, or"
                " another --out"
            )
        return before
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_bytes(targets.windows.astype("<i8").tobytes())
    files.write_json(folder / MANIFEST, targets.manifest | {"digest": targets.digest})
    return targets


def missing(targets: Targets, index: int = 0, count: int = 1) -> Int[np.ndarray, " places"]:
    """Which records one of `count` processes has yet to write, in the order they are appended.

    Whatever follows the last whole record of an unfinished shard is cut off.
    """
    places = [np.arange(0)]
    for shard in range(index, targets.shards, count):
        path, first = targets.path(shard), shard * targets.shard
        stop = min(first + targets.shard, len(targets.windows))
        if path.exists() and path.stat().st_size == targets.size(shard):
            continue
        with open(path, "ab+") as file:
            file.seek(0)
            for place in range(first, stop):
                found = np.frombuffer(file.read(targets.record), np.uint8)
                window = int(targets.windows[place])
                if len(found) < targets.record or not targets.whole(found, window):
                    break
            file.truncate((place - first) * targets.record)
        places.append(np.arange(place, stop))
    return np.concatenate(places)


def append(targets: Targets, kept: losses.Targets, places: Int[np.ndarray, " rows"]) -> None:
    """Write the next of what is `missing`."""
    shards = places // targets.shard
    rows = records(targets, kept, targets.windows[places])
    for shard in np.unique(shards).tolist():
        with open(targets.path(shard), "ab") as file:
            file.write(rows[shards == shard])
            if file.tell() == targets.size(shard):
                file.flush()
                os.fsync(file.fileno())
