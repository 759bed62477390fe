"""A teacher's targets, computed once and kept: what a run reads in place of its teacher.

python targets.py --teacher bigscience/bloom-1b7 --data.source FILE --out DIR

For every window of the corpus a record of fixed size, in shards of consecutive windows: token ids,
bit-packed to the width of the vocabulary, then values, then a checksum that knows which window of
which targets this is. So a reader finds any window by its number, and an unfinished shard goes on
where its last whole record ends.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt8

import checkpoint
import data
import errors
import losses
import models
import report
import sharding
import text
from errors import UserError
from models.common import LanguageModel

VERSION = 1
MANIFEST, INDEX = "targets.json", "windows"
SHARD = 1 << 28  # bytes
ROWS = 1 << 16  # rows whose windows are looked up at once
Data = data.Config  # a field of a config hides the module it is named after


@dataclasses.dataclass(frozen=True)
class Config:
    """Compute a teacher's targets once, for distill.py --targets."""

    teacher: str
    """Hub id or folder of the teacher."""
    out: str
    """Folder of the targets; those that an interrupted run left there are continued."""
    data: Data = dataclasses.field(default_factory=Data)
    seq_len: int | None = None
    """Tokens that a window predicts; by default 1024 or what the teacher can."""
    steps: int | None = None
    """Keep what the first steps of a run with this batch size and seed read; by default all."""
    batch_size: int = 16
    """Windows at a time."""
    seed: int = 0
    """Of the data's order and of draws."""
    top_k: int | None = None
    """The likeliest tokens, with the mass of the rest; 32 unless there are --draws."""
    draws: int | None = None
    """Instead, an unbiased sample of so many tokens, each with its weight: for forward_kl."""
    temperature: float = 1.0
    """Divides the teacher's logits; the run must use the same."""
    values: Literal["packed", "float32"] = "packed"
    """Log-probabilities as a byte each, off by at most 0.023 sqrt(-log p) + 0.0003 (draws by twice
    that, but not in the mean; the entries of top-k, made to add up to 1 again, by the mean of that
    more), -32 being the least; or as they are."""
    chunk: int | None = None
    """Tokens whose logits exist at once; by default what suits the device and the vocabulary."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the teacher computes in; auto is bfloat16 on accelerators, float32 on CPUs."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=sharding.Sizes)
    quiet: bool = False
    """Print only warnings."""
    distributed: bool = False
    """One of several processes, which a scheduler (Slurm, Cloud TPU, GKE, Open MPI) has started."""
    coordinator: str | None = None
    """host:port of the first of several processes, where no scheduler says so."""
    processes: int | None = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""

    def __post_init__(self):
        errors.check_counts(self, "seq_len", "steps", "batch_size", "top_k", "chunk")
        errors.check_counts(self, "draws", least=8)  # fewer could not be packed unbiased
        if self.top_k and self.draws:
            raise UserError(
                f"--top-k {self.top_k} and --draws {self.draws}: targets are one or the other"
            )
        errors.check_seed(self.seed)
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}: it must be positive")
        if not self.data.source:
            raise UserError("--data.source is missing: name the text that students will read")


# ---- numbers as bits -----------------------------------------------------------------------------


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
    text.check_links(folder, [path, index, *folder.glob("*.targets")])
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


def read(targets: Targets, windows: Int[np.ndarray, " rows"]) -> losses.Kept:
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
    kind = losses.TopK if targets.kind == "top-k" else losses.Draws
    return kind(ids.reshape(shape), values[..., :-1], values[..., -1])


def records(
    targets: Targets, kept: losses.Kept, windows: Int[np.ndarray, " rows"]
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


class Told(NamedTuple):
    """A batch, and what was kept of a teacher on it."""

    tokens: Int32[np.ndarray, "rows positions"]
    segments: Int32[np.ndarray, "rows positions"]
    mask: Bool[np.ndarray, "rows targets"]
    kept: losses.Kept


# ---- making them ---------------------------------------------------------------------------------


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
    report.write_json(folder / MANIFEST, targets.manifest | {"digest": targets.digest})
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


def append(targets: Targets, kept: losses.Kept, places: Int[np.ndarray, " rows"]) -> None:
    """Write the next of what is `missing`."""
    shards = places // targets.shard
    rows = records(targets, kept, targets.windows[places])
    for shard in np.unique(shards).tolist():
        with open(targets.path(shard), "ab") as file:
            file.write(rows[shards == shard])
            if file.tell() == targets.size(shard):
                file.flush()
                os.fsync(file.fileno())


@eqx.filter_jit
def targets_of(
    teacher: LanguageModel,
    batch: data.Batch,
    windows: Int[Array, " rows"],
    *,
    kind: str,
    entries: int,
    seed: int,
    temperature: float,
    chunk: int | None = None,
    dtype: str | None = None,
) -> losses.Kept:
    """What is kept of a teacher on a batch."""
    hidden = teacher.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype)
    settings = {"count": entries, "temperature": temperature, "chunk": chunk}
    if kind == "top-k":
        return losses.top_k(hidden, teacher.unembedding, **settings)
    return losses.draw(hidden, teacher.unembedding, windows, jax.random.key(seed), **settings)


def make(config: Config) -> Targets:
    """Compute the targets that `config` describes, or what is missing of them."""
    model = models.fetch(config.teacher)
    shape = models.config(model)
    seq_len = config.seq_len or min(1024, shape.max_positions or 1024)
    if seq_len > (shape.max_positions or seq_len):
        raise UserError(
            f"--seq-len {seq_len}: the model was made for {shape.max_positions} positions"
        )
    kind, entries = ("draws", config.draws) if config.draws else ("top-k", config.top_k or 32)
    if entries + (kind == "draws") > shape.vocab:
        raise UserError(f"--{kind} {entries}: the teacher's vocabulary has {shape.vocab} tokens")
    mesh = sharding.make_mesh(**config.mesh.sizes)
    if sharding.share(mesh)[1] < jax.process_count():
        raise UserError(
            f"--mesh.tensor {mesh.shape['tensor']}: each process writes rows of its own, so it must"
            f" divide the devices of a process, here {jax.local_device_count()}"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-config.batch_size // ways) * ways  # each device has as many
    dtype = sharding.compute_dtype(config.compute_dtype)
    corpus = data.open_corpus(
        config.data, model, seq_len=seq_len, seed=config.seed, vocab=shape.vocab
    )
    data.batch(corpus, 0, 1)  # a text that is too short ends here
    windows = np.arange(corpus.windows)
    if config.steps is not None:
        windows = np.unique(data.windows(corpus, 0, config.steps * config.batch_size))
    targets = Targets(
        Path(config.out),
        windows,
        teacher=models.fingerprint(model),
        teacher_name=_located(config.teacher),
        tokenizer=text.load_tokenizer(model).fingerprint,
        data=windows_of(corpus),
        data_flags=_flags(config.data),
        seq_len=seq_len,
        vocab=shape.vocab,
        temperature=config.temperature,
        dtype=dtype,
        kind=kind,
        entries=entries,
        values=config.values,
        seed=config.seed,
        shard=1,
        index=zlib.crc32(windows.astype("<i8").tobytes()),
    )
    shard = min(SHARD // targets.record, -(-len(windows) // jax.process_count()))
    targets = dataclasses.replace(targets, shard=max(1, shard))
    try:
        with checkpoint.lock(targets.folder), jax.set_mesh(mesh):
            return _make(config, targets, corpus, rows, mesh)
    except OSError as error:
        raise UserError(
            f"{error.filename or targets.folder}: {error.strerror or error}; make room or give"
            " permission, and the same command goes on from what is there"
        ) from error


def _located(name: str) -> str:
    """A name that means the same from another folder, where it is one of a file."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or set(name) & set("*?[") else name


def _flags(config: Data) -> dict[str, Any]:
    names = tuple(map(_located, config.source))
    beside = config.eval_source and _located(config.eval_source)
    config = dataclasses.replace(config, source=names, eval_source=beside, cache=None)
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _make(
    config: Config, targets: Targets, corpus: data.Corpus, rows: int, mesh: jax.sharding.Mesh
) -> Targets:
    index, count = jax.process_index(), jax.process_count()
    if index == 0:
        begin(targets)
    sharding.sync("targets begun")
    targets = begin(targets)
    todo = missing(targets, index, count)
    own = rows // count
    left = sharding.gathered(len(todo))  # of every process: all take part in every step
    steps = -(-int(left.max()) // own)
    if not steps:
        return targets
    if index == 0 and not config.quiet:
        print(f"{left.sum()} of {len(targets.windows)} windows to compute", file=sys.stderr)
    teacher = models.load(config.teacher, mesh=mesh)
    settings = {
        "kind": targets.kind, "entries": targets.entries, "seed": targets.seed,
        "temperature": targets.temperature, "chunk": config.chunk, "dtype": targets.dtype,
    }  # fmt: skip

    def batch(step: int) -> tuple[data.Batch, Int[Array, " rows"]]:
        windows = np.zeros(own, np.int64)  # what fills up the last batch is thrown away
        places = todo[step * own : (step + 1) * own]
        windows[: len(places)] = targets.windows[places]
        return sharding.from_host((data.read(corpus, windows), windows.astype(np.int32)), mesh)

    program = sharding.compiled(targets_of.lower(teacher, *batch(0), **settings))

    def finish(step: int, kept: losses.Kept) -> None:
        places = todo[step * own : (step + 1) * own]
        if len(places):  # another process may have more
            append(targets, jax.tree.map(lambda x: _own_rows(x)[: len(places)], kept), places)
        done = min(len(todo), (step + 1) * own)
        speed = done * targets.seq_len / (time.monotonic() - begun)
        progress(done, len(todo), f"{report.count(count * speed)} tok/s")

    begun = time.monotonic()
    with (
        report.counting("targets", quiet=config.quiet) as progress,
        contextlib.closing(data.prefetch(batch, 0, steps)) as batches,
    ):
        behind = None
        for step, read in enumerate(batches):
            kept = sharding.settled(program(teacher, *read, **settings))
            if behind is not None:
                finish(*behind)
            behind = step, kept
        finish(*behind)
    return targets


def _own_rows(x: Array) -> np.ndarray:
    """The rows that lie on the devices of this process, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def main() -> None:
    config = errors.cli(Config)
    sharding.start(
        distributed=config.distributed, coordinator=config.coordinator,
        processes=config.processes, process_id=config.process_id,
    )  # fmt: skip
    with sharding.peers():
        targets = make(config)
    if jax.process_index() == 0 and not config.quiet:
        tokens = len(targets.windows) * targets.seq_len
        print(
            f"{report.count(tokens)} tokens of {config.teacher} in {targets.folder},"
            f" {targets.record / targets.seq_len:.1f} bytes each"
        )


if __name__ == "__main__":
    errors.run(main)
