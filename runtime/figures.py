"""What a run leaves to look at: curves, the table, the model card."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.files import atomic_write
from runtime.report import Metrics, count, figure, read_metrics


def curves(metrics_path: Path, png_path: Path) -> None:
    """Draws loss, cross entropy and KL with their held-out figures, and the learning rate."""
    import matplotlib
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)

    def points(key: str) -> tuple[list[int], list[float]]:
        known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        return [step for step, _ in known], [value for _, value in known]

    sheet = Figure(figsize=(11, 7), layout="constrained")
    (loss, ce), (kl, rate) = sheet.subplots(2, 2, sharex=True)
    held_out = {"color": "tab:orange", "marker": "o", "ms": 4, "label": "held out"}
    loss.set_title("training loss")
    loss.plot(*points("loss"), lw=1, label="loss")
    if points("divergence") != points("loss"):
        loss.plot(*points("divergence"), color="tab:purple", lw=1, label="divergence")
    ce.set_title("cross entropy, nats per token")
    ce.plot(*points("ce"), lw=1, label="training")
    ce.plot(*points("eval/ce"), **held_out)
    for level in points("eval/teacher_ce")[1][-1:]:
        ce.axhline(level, color="tab:green", ls="--", lw=1.2, label="teacher, held out")
    kl.set_title("KL from the teacher, nats per token")
    if points("eval/kl")[0]:
        kl.plot(*points("eval/kl"), **held_out)
    else:
        kl.text(0.5, 0.5, "no teacher in memory", transform=kl.transAxes, ha="center", color="gray")
    if any(value > 0 for value in points("eval/kl")[1]):
        kl.set_yscale("log")
    rate.set_title("learning rate")
    rate.plot(*points("lr"), lw=1)
    rate.ticklabel_format(axis="y", scilimits=(-2, 2))
    for panel in sheet.axes:
        panel.grid(which="both", alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    rate.xaxis.get_major_locator().set_params(integer=True)
    sheet.supxlabel("optimizer step", fontsize="medium")
    plain = {"axes.formatter.min_exponent": 4}  # 0.3 beside 0.1, not 3 × 10^-1
    with atomic_write(png_path) as half, matplotlib.rc_context(plain):
        sheet.savefig(half, format="png", dpi=130)


class Row(NamedTuple):
    """A model in the table at the end of a run; `None` is shown as a dash."""

    name: str
    ce: float | None
    kl: float | None = None
    agreement: float | None = None
    recovered: float | None = None


def rows(metrics: Sequence[Metrics]) -> list[Row]:
    """Teacher, student at step 0 and student now, from the evaluations among `metrics`."""
    evaluations = [line for line in metrics if "eval/ce" in line]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    start, teacher = first["eval/ce"], last.get("eval/teacher_ce")

    def student(line: Metrics) -> Row:
        ce, kl, agreement = (line.get(f"eval/{key}") for key in ("ce", "kl", "agreement"))
        gap = None if None in (start, teacher) or start <= teacher else start - teacher
        recovered = None if None in (gap, ce) else (start - ce) / gap
        return Row(f"student at step {line['step']}", ce, kl, agreement, recovered)

    students = [student(first), student(last)][: len(evaluations)]
    return students if teacher is None else [Row("teacher", teacher), *students]


HEADER = ("", "cross entropy", "perplexity", "KL", "top-1 agreement", "gap recovered")


def _cells(row: Row) -> list[str]:
    perplexity = "-"
    if row.ce is not None:
        exact = math.exp(min(row.ce, 700))
        perplexity = f"{exact:.2f}" if exact < 1e4 else count(exact)
    shares = ("-" if share is None else f"{share:.1%}" for share in (row.agreement, row.recovered))
    return [row.name, figure(row.ce), perplexity, figure(row.kl), *shares]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text."""
    columns = []
    for i, column in enumerate(zip(HEADER, *map(_cells, rows), strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_card(
    *, teacher: str | None, start: str, data: str, loss: str, tokens: int, steps: int,
    rows: Sequence[Row],
) -> str:  # fmt: skip
    """The README of a student; `start` says what it was before training.

    A teacher from a folder goes by the folder's name: only an id of the hub can be `base_model`.
    """
    base = ""
    if teacher is not None and Path(teacher).exists():
        teacher = Path(teacher).resolve().name
    elif teacher is not None:
        base = f"base_model: {json.dumps(teacher.partition('@')[0])}\n"
    title = f"A model trained on {data}" if teacher is None else f"A student of {teacher}"
    taught = "" if teacher is None else f"- **Teacher**: {teacher}\n"
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
---

# {title}

{taught}- **Student began as**: {start}
- **Data**: {data}
- **Loss**: {loss}
- **Training**: {count(tokens)} tokens in {steps:,} optimizer steps

Held-out figures: cross entropy in nats per token, KL(teacher ‖ student) at temperature 1, and the
share of the cross-entropy gap between teacher and untrained student that training closed.

{markdown(rows)}
"""
