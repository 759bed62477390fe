"""How good a model is on held-out text, and how near to its teacher.

python eval.py --model DIR [--teacher DIR] --data.source FILE
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

import data
import losses
import models
import sharding
import text
from models.base import LanguageModel
from runtime import errors, processes, report

Data = data.Config  # a field of a config hides the module it is named after


@dataclasses.dataclass(frozen=True)
class Config:
    """Score a model on a text, every token once."""

    model: str
    """Folder or hub id of the model."""
    teacher: str | None = None
    """Folder or hub id of a teacher with the same vocabulary: adds KL and agreement."""
    data: Data = dataclasses.field(default_factory=Data)
    seq_len: int = 512
    """Tokens a window predicts; each window is read without those before it."""
    batch_size: int = 8
    """Windows at a time."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=sharding.Sizes)
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self):
        errors.check_counts(self, "seq_len", "batch_size")
        if not self.data.source:
            raise errors.UserError("--data.source is missing: name the text to score")


class Seen(NamedTuple):
    """A batch that the teacher has read already, on devices of its own."""

    tokens: Int[Array, "batch tokens"]
    segments: Int[Array, "batch tokens"]
    mask: Bool[Array, "batch seq"]
    hidden: Float[Array, "batch seq embed"]


class Head(eqx.Module):
    """What the student's devices need of a teacher that reads elsewhere."""

    unembedding: Float[Array, "vocab embed"]


def view(
    teacher: LanguageModel | Head | None, batch: data.Batch | Seen, dtype: Any
) -> tuple[Float[Array, "batch seq embed"] | None, Float[Array, "vocab embed"] | None]:
    """The teacher's states before its head, and the head."""
    if teacher is None:
        return None, None
    if isinstance(batch, Seen):
        return batch.hidden, teacher.unembedding
    hidden = teacher.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype)
    return jax.lax.stop_gradient(hidden), teacher.unembedding


@sharding.jit
def _sums(model, teacher, batch, *, dtype, chunk) -> dict[str, jax.Array]:
    hidden = model.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype)
    beside = view(teacher, batch, dtype)
    labels = batch.tokens[:, 1:]
    return losses.measure(hidden, model.unembedding, *beside, labels, batch.mask, chunk=chunk)


def evaluate(
    model: LanguageModel,
    teacher: LanguageModel | Head | None,
    batches: Iterable[data.Batch],
    *,
    to_device: Callable[[data.Batch], data.Batch | Seen] = lambda batch: batch,
    dtype: Any = None,
    chunk: int | None = None,
) -> dict[str, int | float]:
    """Means over all counted tokens of all batches; exact however they are cut into batches."""
    totals: dict[str, int | float] = {}
    for batch in batches:
        found = jax.device_get(_sums(model, teacher, to_device(batch), dtype=dtype, chunk=chunk))
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop("tokens", 0.0)
    return {"tokens": int(tokens)} | {name: v / max(tokens, 1) for name, v in totals.items()}


def main() -> None:
    config = errors.cli(Config)
    processes.start()
    folder = models.fetch(config.model)
    shape = models.config(folder)
    for name in filter(None, (config.model, config.teacher)):
        longest = models.config(name).longest
        if longest is not None and config.seq_len > longest:
            raise errors.UserError(
                f"--seq-len {config.seq_len}: {name} was made for {longest} positions"
            )
    if config.teacher is not None:
        text.same_tokenizer(models.fetch(config.teacher, weights=False), folder)
    everything = dataclasses.replace(config.data, held_out=1.0, eval_source=None)
    corpus = data.open_corpus(everything, folder, seq_len=config.seq_len, seed=0, vocab=shape.vocab)
    mesh = sharding.make_mesh(**config.mesh.sizes)
    model = models.load(folder, mesh=mesh)
    teacher = None if config.teacher is None else models.load(config.teacher, mesh=mesh)
    rows = -(-config.batch_size // mesh.size) * mesh.size  # each device has as many
    with jax.set_mesh(mesh):
        found = evaluate(
            model,
            teacher,
            data.evaluation(corpus, rows),
            to_device=partial(sharding.from_host, mesh=mesh),
            dtype=sharding.compute_dtype(),
        )
    if not found["tokens"]:
        raise errors.UserError(f"{' '.join(config.data.source)}: no token to score")
    figures = summary(found, corpus.bytes)
    if config.json:
        print(json.dumps({name: report.plain(value) for name, value in figures.items()}))
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(
                f"{name:{width}}  {value:,}" if name == "tokens" else f"{name:{width}}  {value:.4f}"
            )


def summary(found: dict[str, int | float], size: int) -> dict[str, int | float]:
    """The figures of an evaluation of `size` bytes of text, by the names that `--json` prints."""
    nats = found["ce"] * found["tokens"]
    figures = {
        "tokens": found["tokens"],
        "ce": found["ce"],
        "perplexity": math.exp(min(found["ce"], 700)),
        "bits_per_byte": nats / math.log(2) / size,
    }
    if "kl" in found:
        figures |= {name: found[name] for name in ("kl", "reverse_kl", "agreement", "teacher_ce")}
        figures["teacher_perplexity"] = math.exp(min(found["teacher_ce"], 700))
    return figures


if __name__ == "__main__":
    errors.run(main)
