"""How good a model is on held-out text, and how near to its teacher.

python eval.py --model DIR [--teacher DIR] --data.source FILE
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import jax

import data
import losses
import models
import sharding
import text
from models.base import LanguageModel
from runtime import errors, processes, report
from runtime.errors import UserError, at_least

Data = data.Config  # a field of a config hides the module it is named after


@dataclasses.dataclass(frozen=True)
class Config:
    """Score a model on a text, every token once."""

    model: str
    """Folder or hub id of the model."""
    teacher: str | None = None
    """Folder or hub id of a teacher with the same vocabulary: adds KL and agreement."""
    data: Data = dataclasses.field(default_factory=Data)
    seq_len: Annotated[int, at_least(1)] = 512
    """Tokens a window predicts; each window is read without those before it."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Windows at a time."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=sharding.Sizes)
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self):
        errors.check(self)
        if not self.data.source:
            raise UserError("--data.source is missing: name the text to score")


@sharding.jit
def _sums(model, teacher, batch, *, dtype, chunk) -> dict[str, jax.Array]:
    signal = batch.signal
    if signal is None and teacher is not None:
        signal = losses.teacher_states(teacher, batch, dtype=dtype)
    hidden = model.hidden(batch.tokens[:, :-1], batch.segments[:, :-1], dtype=dtype)
    labels = batch.tokens[:, 1:]
    return losses.measure(hidden, model.unembedding, signal, labels, batch.mask, chunk=chunk)


def evaluate(
    model: LanguageModel, teacher: LanguageModel | None, batches: Iterable[data.Batch], *,
    to_device: Callable[[data.Batch], data.Batch] = lambda batch: batch,
    dtype: Any = None, chunk: int | None = None,
) -> dict[str, int | float]:  # fmt: skip
    """Means over all counted tokens of all batches; exact however they are cut into batches.

    The teacher's side is that of the batch's signal where `to_device` adds one.
    """
    totals: dict[str, float] = {"tokens": 0.0}
    for batch in batches:
        sums = jax.device_get(_sums(model, teacher, to_device(batch), dtype=dtype, chunk=chunk))
        totals |= {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
    tokens = totals.pop("tokens")
    return {"tokens": int(tokens)} | {name: v / max(tokens, 1) for name, v in totals.items()}


def score(config: Config) -> None:
    """Prints the figures of a model on a text."""
    folder = models.fetch(config.model)
    models.seq_len(config.seq_len, config.seq_len, config.model, config.teacher or config.model)
    if config.teacher is not None:
        text.same_tokenizer(models.fetch(config.teacher, weights=False), folder)
    everything = dataclasses.replace(config.data, held_out=1.0, eval_source=None, packing="stream")
    vocab = models.config(folder).vocab
    corpus = data.open_corpus(everything, folder, seq_len=config.seq_len, seed=0, vocab=vocab)
    mesh = sharding.make_mesh(**config.mesh.sizes)
    model = models.load(folder, mesh=mesh)
    teacher = None if config.teacher is None else models.load(config.teacher, mesh=mesh)
    rows = -(-config.batch_size // mesh.size) * mesh.size  # each device has as many
    total = -(-sum(part.windows for part in corpus.held_out) // rows)
    with jax.set_mesh(mesh):
        means = evaluate(
            model, teacher, report.track(data.evaluation(corpus, rows), "scoring", total),
            to_device=partial(sharding.from_host, mesh=mesh), dtype=sharding.compute_dtype(),
        )  # fmt: skip
    if not means["tokens"]:
        raise UserError(f"{' '.join(config.data.source)}: no token to score")
    tokens, ce = means["tokens"], means["ce"]
    figures = {"tokens": tokens, "ce": ce, "perplexity": math.exp(min(ce, 700))}
    figures["bits_per_byte"] = ce * tokens / math.log(2) / corpus.bytes
    if teacher is not None:
        figures |= {name: means[name] for name in ("kl", "reverse_kl", "agreement", "teacher_ce")}
        figures["teacher_perplexity"] = math.exp(min(means["teacher_ce"], 700))
    if config.json:
        print(json.dumps({name: report.plain(value) for name, value in figures.items()}))
    else:
        for name, value in figures.items():
            print(f"{name:{max(map(len, figures))}}  {value:{',' if name == 'tokens' else '.4f'}}")


def main() -> None:
    config = errors.cli(Config)
    processes.start()
    with report.quietly(config.json):
        score(config)


if __name__ == "__main__":
    errors.run(main)
