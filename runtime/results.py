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
    return report.Log(
        path if jax.process_index() == 0 else None, steps=config.steps, start=start,
        quiet=config.quiet, divergence="KL" if divergence == "forward_kl" else divergence,
    )  # fmt: skip


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
        line = {"step": number} | {k: float(metrics[k]) for k in ("loss", "divergence", "ce")}
        if not uses_teacher_loss(config.loss):
            line["divergence"] = None
        if "features" in metrics:
            line["features"] = float(metrics["features"])
        if config.on_policy.fraction:
            line["on_policy"] = int(written[number - 1 - start])
        line |= {"grad_norm": float(metrics["grad_norm"]), "lr": float(metrics["lr"])}
        rate = run.step_tokens * steps / seconds
        line |= {"tokens": number * run.step_tokens, "tokens_per_second": round(rate, 1)}
        line |= {name: value for name, value in metrics.items() if "/" in name}
        log.step(line, mfu=flops * steps / seconds / peak)

    return log_step


def score(run: Run, student: LanguageModel) -> dict[str, int | float]:
    """Figures on held-out windows, as metrics."""
    teacher = None if run.placement.teacher_mesh is not None else run.teacher
    scores = evaluation.evaluate(
        student, teacher, run.held_out(),
        to_device=run.to_device, dtype=run.objective.dtype, chunk=run.config.loss.chunk,
    )  # fmt: skip
    names = ("ce", "kl", "agreement", "teacher_ce")
    return {f"eval/{name}": scores[name] for name in names if name in scores}


def evaluate(run: Run, student: LanguageModel, number: int, log: report.Log) -> None:
    """Scores the student on held-out windows, and keeps the best one if that is asked for."""
    keeps = run.config.keep_best
    entry = {"step": number} | score(run, student)
    metrics = report.read_metrics(run.out / "metrics.jsonl") if keeps else []
    if keeps and is_best(metrics, entry):
        best = run.out / "student-best"
        export(run, student, number, best, [*metrics, entry])
    log.evaluation(entry)


def is_best(metrics: list[dict[str, Any]], entry: dict[str, Any]) -> bool:
    """Whether no evaluation before `entry` has a lower KL (cross entropy without a teacher)."""
    name = measure_of(entry)
    earlier = [line for line in metrics if line["step"] < entry["step"]]
    values = [line[name] for line in earlier if line.get(name) is not None]
    return entry[name] <= min(values, default=float("inf"))


def measure_of(entry: dict[str, Any]) -> str:
    """What students are compared by."""
    return "eval/kl" if "eval/kl" in entry else "eval/ce"


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
    config, folder, path = run.config, run.out / "student", run.out / "metrics.jsonl"
    first = jax.process_index() == 0
    metrics = report.read_metrics(path) if first else []
    known = any(line["step"] == step and "eval/ce" in line for line in metrics)
    if processes.allgather(first and not known).any():  # where --steps moved to an earlier save
        with report.Log(path if first else None, steps=step, start=step, quiet=config.quiet) as log:
            log.evaluation({"step": step} | score(run, student))
        metrics = report.read_metrics(path) if first else []
    if first:
        figures.curves(path, run.out / "curves.png")
    # Last of all files: a run that has its student is finished.
    export(run, student, step, folder, metrics)
    for line in samples(run, student):
        processes.say(config.quiet, line)
    if first:
        print(figures.table(figures.rows(metrics)))
        print(f"student  {folder}")
        best = run.out / "student-best"
        if config.keep_best and best.exists():
            evaluations = [line for line in metrics if "eval/ce" in line]
            name = measure_of(evaluations[-1])
            lines = [line for line in evaluations if line.get(name) is not None]
            at = min(reversed(lines), key=lambda line: line[name])["step"]
            print(f"best     {best} (step {at})")
        print(f"curves   {run.out / 'curves.png'}")
    processes.sync("finished")
    return folder


def samples(run: Run, student: LanguageModel) -> Iterator[str]:
    """Lines that show how teacher and student continue two held-out texts."""
    mesh, layout, teacher_mesh = run.placement
    windows, length = next(data.evaluation(run.corpus, 32)), min(24, run.config.seq_len)
    first, last = windows.segments[:, 0], windows.segments[:, length - 1]
    rows = np.argsort(first != last, kind="stable")[:2]  # one document's, where there are such
    prompts = windows.tokens[rows[last[rows] > 0], :length]
    writers = {"student": (student, mesh)} if len(prompts) else {}
    if writers and run.teacher is not None:
        writers = {"teacher": (run.teacher, teacher_mesh or mesh)} | writers
    return generate.continuations(
        writers, run.tokenizer, prompts, layout=layout, dtype=run.objective.dtype
    )
