"""How good a model is on held-out text or on tasks, and how near to its teacher.

python eval.py --run DIR
python eval.py --model DIR [--teacher DIR] --data.source FILE
python eval.py --model DIR [--teacher DIR] --tasks lambada_openai piqa
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import data
import losses
import models
import sharding
import text
from models.base import LanguageModel
from runtime import buckets, commits, errors, files, processes, report
from runtime.errors import LOCAL, UserError, at_least
from runtime.figures import table

Data = data.Config  # a field of a config hides the module it is named after


@dataclasses.dataclass(frozen=True)
class Config(processes.Config):
    """Score a model on a text, every token once, or on tasks of lm-eval."""

    run: str | None = None
    """Folder of a run: scores its student beside its teacher, on the text that it held out."""
    model: str | None = None
    """Folder or hub id of the model, where no --run says it."""
    teacher: str | None = None
    """Folder or hub id of a teacher with the same vocabulary: adds KL and agreement."""
    data: Data = dataclasses.field(default_factory=lambda: Data(held_out=1.0))
    seq_len: Annotated[int | None, at_least(1)] = None
    """Tokens a window predicts; each window is read without those before it. By default the run's,
    else 512, or for tasks what the model can read."""
    windows: Annotated[int | None, at_least(1)] = None
    """Score the first so many windows, or questions of each task, or all where there are fewer."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Windows at a time."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=sharding.Sizes)
    tasks: tuple[str, ...] = ()
    """Instead of a text, tasks of lm-eval or patterns such as arc_*."""
    task_path: str | None = None
    """Folder with tasks of your own, as lm-eval describes them."""
    num_fewshot: Annotated[int | None, at_least(0)] = None
    """Solved examples before each question, by default what each task says."""
    out: Annotated[str, LOCAL] = "tasks.json"
    """File for what lm-eval says of tasks; of the teacher's it is tasks-teacher.json."""
    html: Annotated[str | None, LOCAL] = None
    """File for a page that shows the first windows token by token, beside the teacher."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self):
        errors.check(self)
        if (self.run is None) == (self.model is None):
            raise UserError("--run or --model: give one of the two")
        if self.run is not None and self.data != Data(held_out=1.0):
            raise UserError("--data with --run: it has its text; for another give its --model")
        if self.tasks and (self.html or self.data.source):
            raise UserError("--tasks with --html or --data.source: these are of a text, give one")
        if not (self.run or self.tasks or self.data.source or self.data.eval_source):
            raise UserError("--data.source is missing: name the text to score, or --tasks")


@sharding.jit
def _sums(model, teacher, batch, **options) -> dict[str, jax.Array]:
    figures = losses.token_figures(model, teacher, batch, **options) | {"tokens": batch.mask}
    return {name: jnp.sum(x, where=batch.mask, dtype=jnp.float32) for name, x in figures.items()}


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


def of_run(config: Config) -> Config:
    """The configuration that scores the student of `config.run`."""
    folder = buckets.local_path(config.run)
    settings = files.read_json(folder / "config.json", ": give the folder of a run")
    if not (student := folder / "student").exists():
        remedy = "let it finish, or give its command --export"
        raise UserError(f"--run {config.run}: it has no student yet: {remedy}")
    commits.restore(folder)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["data"].items()}
    seq_len = config.seq_len or (None if config.tasks else settings["seq_len"])
    teacher = settings["teacher"]
    if settings["targets"] or teacher == settings["student"]:  # no teacher was in its memory
        teacher = None
    return dataclasses.replace(
        config, run=None, model=str(student), teacher=config.teacher or teacher,
        data=Data(**values), seq_len=seq_len,
    )  # fmt: skip


def score(config: Config) -> dict[str, int | float]:
    """The figures of a model on a text."""
    folder, source = models.fetch(config.model), config.data
    seq_len = models.seq_len(config.seq_len, 512, config.model, config.teacher or config.model)
    if config.teacher is not None:
        text.same_tokenizer(models.fetch(config.teacher, weights=False), folder)
    elif config.html is not None:
        raise UserError("--html: its colours are the KL from a teacher, give --teacher")
    if source.eval_source is not None:
        all_of_it = {"source": (source.eval_source,), "held_out": 1.0}
        source = dataclasses.replace(source, weights=(), eval_source=None, **all_of_it)
    vocab = models.config(folder).vocab
    corpus = data.open_corpus(source, folder, seq_len=seq_len, seed=0, vocab=vocab)
    mesh = sharding.make_mesh(**config.mesh.sizes)
    model = models.load(folder, mesh=mesh)
    teacher = None if config.teacher is None else models.load(config.teacher, mesh=mesh)
    rows = -(-config.batch_size // mesh.size) * mesh.size  # each device has as many
    windows = sum(part.windows for part in corpus.held_out)
    limit = min(config.windows or windows, windows)
    read = partial(data.evaluation, corpus, rows, *sharding.process_rows(mesh))
    on = {"to_device": partial(sharding.from_host, mesh=mesh), "dtype": sharding.compute_dtype()}
    with jax.set_mesh(mesh):
        batches = report.track(read(limit=limit), "scoring", -(-limit // rows))
        means = evaluate(model, teacher, batches, **on)
        if config.html is not None:
            from runtime import page

            some, title = min(limit, page.WINDOWS), f"{config.model} beside {config.teacher}"
            content = page.windows(model, teacher, read(limit=some), folder, **on)
            if jax.process_index() == 0:
                page.write(files.local_path(config.html), title, content)
    if not means["tokens"]:
        raise UserError(f"{' '.join(source.source)}: no token to score")
    everything = data.evaluation(corpus, rows, limit=limit)
    counted = [batch.tokens[:, 1:][batch.mask] for batch in everything]
    decoded = text.load_tokenizer(folder).encoder.decode(np.concatenate(counted).tolist())
    bits = means["tokens"] / math.log(2) / max(len(decoded.encode()), 1)  # a byte, of nats a token
    figures = {"tokens": means["tokens"], "ce": means["ce"]}
    figures |= {"perplexity": math.exp(min(means["ce"], 700)), "bits_per_byte": means["ce"] * bits}
    if teacher is not None:
        figures |= {name: means[name] for name in ("kl", "reverse_kl", "agreement", "teacher_ce")}
        figures["teacher_perplexity"] = math.exp(min(means["teacher_ce"], 700))
        figures["teacher_bits_per_byte"] = means["teacher_ce"] * bits
    return figures


def main() -> None:
    config = errors.cli(Config)
    processes.start(config)
    first = jax.process_index() == 0
    with processes.exit_with_peers(), report.quietly(config.json or not first):
        processes.check_same(dict(files.flags(dataclasses.asdict(config))))
        config = config if config.run is None else of_run(config)
        if config.tasks:
            from runtime import tasks

            figures = tasks.evaluate(config)
            rows = [["", *next(iter(figures.values()))]]
            rows += [[task, *map(report.figure, row.values())] for task, row in figures.items()]
        else:
            figures = {name: report.plain(value) for name, value in score(config).items()}
            rows = [
                [x, f"{y:,}" if x == "tokens" else report.figure(y)] for x, y in figures.items()
            ]
        if first:
            print(json.dumps(figures) if config.json else table(rows))


if __name__ == "__main__":
    errors.run(main)
