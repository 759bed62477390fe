"""A teacher's targets, computed once and kept: what a run reads in place of its teacher.

python targets.py --teacher bigscience/bloom-1b7 --data.source FILE --out DIR
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int

import data
import losses
import models
import sharding
import text
from models.base import LanguageModel
from runtime import checkpoint, errors, processes, report
from runtime.errors import UserError
from runtime.target_store import SHARD, Targets, append, begin, missing, windows_of

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
) -> losses.TeacherTargets:
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
    seq_len = config.seq_len or min(1024, shape.longest or 1024)
    if seq_len > (shape.longest or seq_len):
        raise UserError(f"--seq-len {seq_len}: the model was made for {shape.longest} positions")
    kind, entries = ("draws", config.draws) if config.draws else ("top-k", config.top_k or 32)
    if entries + (kind == "draws") > shape.vocab:
        raise UserError(f"--{kind} {entries}: the teacher's vocabulary has {shape.vocab} tokens")
    mesh = sharding.make_mesh(**config.mesh.sizes)
    if sharding.process_rows(mesh)[1] < jax.process_count():
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
    processes.sync("targets begun")
    targets = begin(targets)
    todo = missing(targets, index, count)
    own = rows // count
    left = processes.allgather(len(todo))  # of every process: all take part in every step
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

    def finish(step: int, kept: losses.TeacherTargets) -> None:
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
            kept = processes.block_on_cpu(program(teacher, *read, **settings))
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
    processes.start(
        distributed=config.distributed, coordinator=config.coordinator,
        processes=config.processes, process_id=config.process_id,
    )  # fmt: skip
    with processes.exit_with_peers():
        targets = make(config)
    if jax.process_index() == 0 and not config.quiet:
        tokens = len(targets.windows) * targets.seq_len
        print(
            f"{report.count(tokens)} tokens of {config.teacher} in {targets.folder},"
            f" {targets.record / targets.seq_len:.1f} bytes each"
        )


if __name__ == "__main__":
    errors.run(main)
