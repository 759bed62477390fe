"""A teacher's targets, computed once and kept: what a run reads in place of its teacher.

python targets.py --teacher bigscience/bloom-1b7 --data.source FILE --out DIR
"""

import contextlib
import dataclasses
import json
import time
import zlib
from typing import Annotated, Literal

import equinox as eqx
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jaxtyping import Array, Int

import data
import losses
import models
import sharding
import text
from models.base import LanguageModel
from runtime import buckets, checkpoint, errors, files, processes, report, target_store
from runtime.errors import OUT, SEED, UserError, above, at_least
from runtime.target_store import Targets, append, unwritten

Data = data.Config  # a field of a config hides the module it is named after


@dataclasses.dataclass(frozen=True)
class Config(processes.Config):
    """Compute a teacher's targets once, for distill.py --targets."""

    teacher: str
    """Hub id or folder of the teacher."""
    out: Annotated[str, OUT]
    """Folder of the targets; those that an interrupted run left there are continued."""
    data: Data = dataclasses.field(default_factory=Data)
    seq_len: Annotated[int | None, at_least(1)] = None
    """Tokens that a window predicts; by default 1024 or what the teacher can."""
    steps: Annotated[int | None, at_least(1)] = None
    """Keep what the first steps of a run with this batch size and seed read; by default all."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Windows at a time."""
    seed: Annotated[int, SEED] = 0
    """Of the data's order and of draws."""
    top_k: Annotated[int | None, at_least(1)] = None
    """The likeliest tokens, with the mass of the rest; 32 unless there are --draws."""
    draws: Annotated[int | None, at_least(8)] = None  # fewer could not be packed unbiased
    """Instead, an unbiased sample of so many tokens, each with its weight: for forward_kl."""
    temperature: Annotated[float, above(0)] = 1.0
    """Divides the teacher's logits; the run must use the same."""
    values: Literal["packed", "float32"] = "packed"
    """Log-probabilities as a byte each, off by at most 0.023 sqrt(-log p) + 0.0003 (draws by twice
    that, but not in the mean; the entries of top-k, made to add up to 1 again, by the mean of that
    more), -32 being the least; or as they are."""
    chunk: Annotated[int | None, at_least(1)] = None
    """Tokens whose logits exist at once; by default what suits the device and the vocabulary."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the teacher computes in; auto is bfloat16 on accelerators, float32 on CPUs."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=sharding.Sizes)
    quiet: bool = False
    """Print only warnings."""

    def __post_init__(self):
        errors.check(self)
        if self.top_k and self.draws:
            kinds = f"--top-k {self.top_k} and --draws {self.draws}"
            raise UserError(f"{kinds}: targets are one or the other")
        if not self.data.source:
            raise UserError("--data.source is missing: name the text that students will read")


@eqx.filter_jit
def targets_of(
    teacher: LanguageModel, batch: data.Batch, windows: Int[Array, " rows"], targets: Targets,
    chunk: int | None = None,
) -> losses.Targets:  # fmt: skip
    """What a teacher says of a batch, as far as `targets` keep it."""
    states = losses.teacher_states(teacher, batch, dtype=targets.dtype)
    settings = {"count": targets.entries, "temperature": targets.temperature, "chunk": chunk}
    if targets.kind == "top-k":
        return losses.top_k(states, **settings)
    return losses.sample_targets(states, windows, jax.random.key(targets.seed), **settings)


@buckets.mirrored
def make(config: Config) -> Targets:
    """Computes the targets that `config` describes, or those of them that are not written yet."""
    mesh = sharding.make_mesh(**config.mesh.sizes)
    if sharding.process_rows(mesh)[1] < jax.process_count():
        size, devices = mesh.shape["tensor"], jax.local_device_count()
        why = f"each process writes rows of its own, so it must divide the {devices} devices of one"
        raise UserError(f"--mesh.tensor {size}: {why}")
    targets, corpus = describe(config)
    remedy = "; make room or give permission, and the same command goes on from what is there"
    with files.disk_errors(targets.folder, remedy), checkpoint.lock(targets.folder):
        if buckets.owns(config.out):
            target_store.open_or_create(targets)
        sync_global_devices("targets begun")
        targets = target_store.open_or_create(targets)
        with jax.set_mesh(mesh):
            write(config, targets, corpus, mesh)
    return targets


def describe(config: Config) -> tuple[Targets, data.Corpus]:
    """The targets of a config, whether or not they are on disk, and the text they are for."""
    folder = models.fetch(config.teacher)
    shape = models.config(folder)
    seq_len = models.seq_len(config.seq_len, 1024, config.teacher)
    kind, entries = ("draws", config.draws) if config.draws else ("top-k", config.top_k or 32)
    if entries + (kind == "draws") > shape.vocab:
        raise UserError(f"--{kind} {entries}: the teacher's vocabulary has {shape.vocab} tokens")
    corpus = data.open_corpus(
        config.data, folder, seq_len=seq_len, seed=config.seed, vocab=shape.vocab
    )
    data.batch(corpus, 0, 1)  # a text that is too short ends here
    windows = np.arange(corpus.windows)
    if config.steps is not None:
        windows = np.unique(data.windows(corpus, 0, config.steps * config.batch_size))
    flags = dataclasses.replace(config.data.canonical(), cache=None, cache_limit=None)
    targets = Targets(
        buckets.place(config.out), windows, models.fingerprint(folder),
        text.canonical(config.teacher),
        tokenizer=text.load_tokenizer(folder).fingerprint,
        data=target_store.windows_digest(corpus),
        data_flags=json.loads(json.dumps(dataclasses.asdict(flags))),
        seq_len=seq_len, vocab=shape.vocab, temperature=config.temperature,
        dtype=sharding.compute_dtype(config.compute_dtype),
        kind=kind, entries=entries, values=config.values, seed=config.seed, shard=1,
        index=zlib.crc32(windows.astype("<i8").tobytes()),
    )  # fmt: skip
    share = -(-len(windows) // jax.process_count())
    shard = max(1, min(share, target_store.SHARD // targets.record.itemsize))
    return dataclasses.replace(targets, shard=shard), corpus


def write(config: Config, targets: Targets, corpus: data.Corpus, mesh: jax.sharding.Mesh) -> None:
    """Lets the teacher read the windows whose records are not written yet."""
    count = jax.process_count()
    todo = unwritten(targets, jax.process_index(), count)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-config.batch_size // shards) * shards // count  # each device has as many
    left = process_allgather(len(todo))  # of every process: all take part in every step
    steps = -(-int(left.max()) // rows)
    if not steps:
        return
    report.say(f"{left.sum()} of {len(targets.windows)} windows to compute")
    teacher = models.load(config.teacher, mesh=mesh)
    parts = [todo[step * rows :][:rows] for step in range(steps)]

    def batch(step: int) -> tuple[data.Batch, Int[Array, " rows"]]:
        windows = targets.windows[parts[step]]
        windows = np.pad(windows, (0, rows - len(windows)))  # and what that gives is thrown away
        return sharding.from_host((data.read(corpus, windows), windows.astype(np.int32)), mesh)

    with report.progress("compiling"):
        program = sharding.compiled(targets_of.lower(teacher, *batch(0), targets, config.chunk))
    start = time.monotonic()

    def save(step: int, signal: losses.Targets) -> None:
        if len(parts[step]):  # another process may have more
            own = jax.tree.map(lambda x: _own_rows(x)[: len(parts[step])], signal)
            append(targets, own, parts[step])
        done = min(len(todo), (step + 1) * rows)
        speed = count * done * targets.seq_len / (time.monotonic() - start)
        progress(done, len(todo), f"{report.count(speed)} tok/s")

    with (
        report.progress("targets") as progress,
        contextlib.closing(data.prefetch(batch, 0, steps)) as batches,
    ):
        computed = None  # on the device, while the records of the batch before are written
        for step, arrays in enumerate(batches):
            previous, computed = computed, program(teacher, *arrays, targets, config.chunk)
            processes.block_on_cpu(computed)
            if previous is not None:
                save(step - 1, previous)
        save(step, computed)


def _own_rows(x: Array) -> np.ndarray:
    """The rows that lie on the devices of this process, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def main() -> None:
    config = errors.cli(Config)
    processes.start(config)
    with processes.exit_with_peers(), report.quietly(config.quiet or jax.process_index() > 0):
        targets = make(config)
    if jax.process_index() == 0 and not config.quiet:
        tokens = len(targets.windows) * targets.seq_len
        size = f"{targets.record.itemsize / targets.seq_len:.1f} bytes each"
        print(f"{report.count(tokens)} tokens of {config.teacher} in {targets.folder}, {size}")


if __name__ == "__main__":
    errors.run(main)
