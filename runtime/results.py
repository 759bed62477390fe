"""What a run measures of its student, and what it leaves: the checkpoint, the curves, the table."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import data
import eval as evaluation
import generate
import models
import sharding
import text
from config import describe_loss, uses_teacher_loss
from models.base import LanguageModel
from runtime import figures, plan, processes, report
from runtime.errors import UserError
from runtime.prepare import Run

PATIENCE = 5  # updates in a row that may be left out


class NotFinite(UserError):
    """A run whose updates are left out one after the other."""


def open_log(run: Run, start: int) -> report.Log:
    config, path = run.config, run.out / "metrics.jsonl"
    divergence = config.loss.divergence
    path = path if jax.process_index() == 0 else None
    divergence = "KL" if divergence == "forward_kl" else divergence
    return report.Log(path, steps=config.steps, start=start, divergence=divergence)


def step_logger(
    run: Run,
    student: LanguageModel,
    start: int,
    log: report.Log,
    watch: report.Stopwatch,
    written: Any,
) -> Callable[[int, dict[str, Any]], None]:
    """What records the metrics of a step, and shows them."""
    config = run.config
    teacher = run.teacher if run.targets is None and uses_teacher_loss(config.loss) else None
    flops = run.step_tokens * plan.step_flops(student, teacher, config.seq_len)
    peak = plan.matrix_peak(config.compute_dtype)

    def log_step(number: int, metrics: dict[str, Any]) -> None:
        metrics = jax.device_get(metrics)
        if metrics["skipped"]:
            log.say(f"step {number}: loss or gradient is not finite, the update is left out")
        if metrics["skipped"] >= PATIENCE:
            raise NotFinite(
                f"step {number}: loss or gradient was not finite {PATIENCE} times in a row; the"
                " state is saved: look at the data, or begin anew with --no-resume and a lower"
                " --optim.lr"
            )
        if number % config.log_every and number != config.steps:
            return
        seconds, steps = watch.lap(number)
        names = ("loss", "divergence", "ce", "features", "grad_norm", "lr")
        line = {"step": number} | {name: metrics[name] for name in names if name in metrics}
        if not uses_teacher_loss(config.loss):
            line["divergence"] = None
        if config.on_policy.fraction:
            line["on_policy"] = int(written[number - 1 - start])
        rate = run.step_tokens * steps / seconds
        line |= {"tokens": number * run.step_tokens, "tokens_per_second": round(rate, 1)}
        line |= {name: value for name, value in metrics.items() if "/" in name}
        log.step(line, mfu=flops * steps / seconds / peak)

    return log_step


def score(run: Run, student: LanguageModel) -> dict[str, int | float]:
    """Figures on held-out windows, as metrics."""
    teacher = None if run.placement.teacher_mesh is not None else run.teacher
    batches, total = run.held_out()
    scores = evaluation.evaluate(
        student, teacher, report.track(batches, "evaluating", total),
        to_device=run.to_device, dtype=run.objective.dtype, chunk=run.config.loss.chunk,
    )  # fmt: skip
    names = ("ce", "kl", "agreement", "teacher_ce")
    return {f"eval/{name}": scores[name] for name in names if name in scores}


def evaluate(run: Run, student: LanguageModel, number: int, log: report.Log) -> None:
    """Scores the student on held-out windows, and keeps the best one if that is asked for."""
    entry = {"step": number} | score(run, student)
    if run.config.keep_best:
        metrics = report.read_metrics(run.out / "metrics.jsonl")
        if is_best([line for line in metrics if line["step"] < number], entry):
            export(run, student, number, run.out / "student-best", [*metrics, entry])
    log.evaluation(entry)


def is_best(metrics: list[dict[str, Any]], entry: dict[str, Any]) -> bool:
    """Whether no other evaluation has a lower KL (cross entropy without a teacher)."""
    name = "eval/kl" if "eval/kl" in entry else "eval/ce"
    others = [line[name] for line in metrics if line.get(name) is not None]
    return entry[name] is not None and all(entry[name] <= x for x in [*others, float("inf")])


def export(
    run: Run, student: LanguageModel, step: int, folder: Path, metrics: list[dict[str, Any]]
) -> None:
    """The student as a checkpoint of Hugging Face, with a card that says how it came about."""
    config = run.config
    start = "random weights"
    if config.student is not None:
        start = f"the weights of {Path(config.student).name}"
    elif run.layers is not None:
        depth, blocks = models.config(config.teacher).layers, ", ".join(map(str, run.layers))
        start = f"{len(run.layers)} of the teacher's {depth} blocks: {blocks}"
    teacher = config.teacher if run.targets is None else run.targets.teacher_name
    if run.targets is None and teacher == config.student:
        teacher = None
    card = figures.model_card(
        teacher=teacher,
        start=start,
        data=", ".join(Path(name).name for name in config.data.source),
        loss=describe_loss(config.loss, config.on_policy),
        tokens=step * run.step_tokens,
        steps=step,
        rows=figures.rows(metrics),
    )
    dtype = jnp.dtype(config.export_dtype)
    exported = jax.tree.map(lambda leaf: leaf.astype(dtype), student)
    with report.progress("exporting"):
        models.save(exported, folder, tokenizer=run.tokenizer, notes={"README.md": card})


def finish(run: Run, student: LanguageModel, step: int) -> Path:
    """Curves, the exported student, samples and the table."""
    folder, path = run.out / "student", run.out / "metrics.jsonl"
    first = jax.process_index() == 0
    metrics = report.read_metrics(path) if first else []
    known = any(line["step"] == step and "eval/ce" in line for line in metrics)
    if processes.allgather(first and not known).any():  # where --steps moved to an earlier save
        with report.Log(path if first else None, steps=step, start=step) as log:
            log.evaluation({"step": step} | score(run, student))
        metrics = report.read_metrics(path) if first else []
    if first:
        figures.curves(path, run.out / "curves.png")
    # Last of all files: a run that has its student is finished.
    export(run, student, step, folder, metrics)
    for line in samples(run, student):
        report.say(line)
    if first:
        print(figures.table(figures.rows(metrics)), f"student  {folder}", sep="\n")
        if (best := run.out / "student-best").exists():
            evaluations = [line for line in metrics if "eval/ce" in line]
            step = next(e["step"] for e in reversed(evaluations) if is_best(evaluations, e))
            print(f"best     {best} (step {step})")
        print(f"curves   {run.out / 'curves.png'}")
    processes.sync("finished")
    return folder


def samples(run: Run, student: LanguageModel) -> Iterator[str]:
    """Lines that show how each model continues two held-out texts, by its likeliest tokens."""
    mesh, layout, teacher_mesh = run.placement
    windows, length = next(data.evaluation(run.corpus, 32)), min(24, run.config.seq_len)
    first, last = windows.segments[:, 0], windows.segments[:, length - 1]
    rows = np.argsort(first != last, kind="stable")[:2]  # one document's, where there are such
    prompts = windows.tokens[rows[last[rows] > 0], :length]
    if not len(prompts):
        return
    writers = {"student": (student, mesh)}
    if run.teacher is not None:
        writers = {"teacher": (run.teacher, teacher_mesh or mesh)} | writers
    decode, stop = text.load_tokenizer(run.tokenizer).encoder.decode, text.stop_ids(run.tokenizer)
    greedy = generate.Decoding(32, generate.Sampling(0.0), stop, run.objective.dtype)
    lengths, results = np.full(len(prompts), length), {}
    for name, (model, mesh) in writers.items():
        with sharding.use_mesh(mesh, layout):
            result = generate.sample(model, prompts, lengths, jax.random.key(0), greedy)
            results[name] = tuple(map(sharding.to_host, result))
    for row, prompt in enumerate(prompts):
        yield f"\n> {decode(prompt.tolist())!r}"
        for name, (tokens, counts) in results.items():
            yield f"{name:8}  {decode(tokens[row, : counts[row]].tolist())!r}"
