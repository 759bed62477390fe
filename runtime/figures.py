"""What a run leaves to look at: curves, the table; and a program that draws the curves of several:

python -m runtime.figures runs/one runs/other --out compare.png
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from runtime import errors
from runtime.errors import UserError
from runtime.files import atomic_write, local_path
from runtime.report import Metrics, count, figure, read_metrics

HEADER = ["", "cross entropy", "perplexity", "KL", "top-1 agreement", "gap recovered"]
HELD_OUT = {"color": "tab:orange", "marker": "o", "ms": 4, "label": "held out"}
PANELS = {  # what each panel draws of the metrics, and how
    "training loss": {"loss": {"label": "loss"}, "divergence": {"label": "divergence"}},
    "cross entropy, nats per token": {
        "ce": {"label": "training"},
        "eval/ce": HELD_OUT,
        "eval/teacher_ce": {"color": "tab:green", "ls": "--", "label": "teacher, held out"},
    },
    "KL from the teacher, nats per token": {"kl": {"label": "training"}, "eval/kl": HELD_OUT},
    "learning rate": {"lr": {}},
}


def curves(runs: Mapping[str, Path], png_path: Path) -> None:
    """Draws loss, cross entropy and KL with their held-out figures, and the learning rate, of each
    metrics file; over tokens too, where all runs read as many in a step."""
    import matplotlib
    from matplotlib.figure import Figure

    metrics = {name: read_metrics(path) for name, path in runs.items()}
    counted = [line for lines in metrics.values() for line in lines if line.get("tokens")]
    rates = {line["tokens"] / line["step"] for line in counted}
    sheet = Figure(figsize=(11, 7), layout="constrained")
    panels = sheet.subplots(2, 2, sharex=True)
    for panel, (title, series) in zip(panels.flat, PANELS.items(), strict=True):
        panel.set_title(title)
        panel.grid(which="both", alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        for (number, name), key in product(enumerate(metrics), series):
            style = {"lw": 1} | series[key]
            if len(runs) > 1:  # a color for each, named once, paler for what was trained on
                style |= {"color": f"C{number}", "label": name if key == next(iter(series)) else ""}
                style["alpha"] = 1 if key.startswith("eval/") else 0.6
            points = [(x["step"], x[key]) for x in metrics[name] if x.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), **style)
        values = [y for line in panel.lines for y in line.get_ydata() if y > 0]
        if "lr" not in series and max(values, default=0) > 4 * min(values, default=0):
            panel.set_yscale("log")
        if not panel.lines:
            panel.text(0.5, 0.5, "no teacher", transform=panel.transAxes, ha="center", color="gray")
        elif "lr" not in series:
            panel.legend(frameon=False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    rate = rates.pop() if len(rates) == 1 else None
    for panel in panels[0] if rate else ():
        axis = panel.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        axis.xaxis.set_major_formatter(lambda tokens, _: count(tokens).replace(".0", ""))
        axis.spines["top"].set_visible(False)
    words = "optimizer step" + ", tokens above" * bool(rate) + "; dots: held out" * (len(runs) > 1)
    sheet.supxlabel(words, fontsize="medium")
    plain = {"axes.formatter.min_exponent": 4}  # 0.3 beside 0.1, not 3 × 10^-1
    with atomic_write(png_path) as half, matplotlib.rc_context(plain):
        sheet.savefig(half, format="png", dpi=130)


def rows(metrics: Sequence[Metrics]) -> list[list[str]]:
    """Header, teacher, student at step 0 and student now, from the evaluations among `metrics`."""
    table, evaluations = [HEADER], [line for line in metrics if "eval/ce" in line]
    if not evaluations:
        return table
    start, teacher = evaluations[0]["eval/ce"], evaluations[-1].get("eval/teacher_ce")
    gap = None if None in (start, teacher) or start <= teacher else start - teacher
    models = {} if teacher is None else {"teacher": {"eval/ce": teacher}}
    for line in (evaluations[0], evaluations[-1]):
        models[f"student at step {line['step']}"] = line
    for name, line in models.items():
        ce, kl, agreement = (line.get(f"eval/{key}") for key in ("ce", "kl", "agreement"))
        recovered = None if name == "teacher" or None in (gap, ce) else (start - ce) / gap
        perplexity = math.inf if ce is None else math.exp(min(ce, 700))
        shown = f"{perplexity:.2f}" if perplexity < 1e4 else count(perplexity)
        shown = shown if perplexity < 1e15 else "diverged"
        shares = ["-" if share is None else f"{share:.1%}" for share in (agreement, recovered)]
        table.append([name, figure(ce), shown, figure(kl), *shares])
    return table


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as aligned plain text."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in rows)
    return "\n".join(map("  ".join, lines))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a markdown table."""
    header, *others = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw the curves of runs, whose folders are named, into one picture.

    python -m runtime.figures runs/one runs/other --out compare.png"""

    out: str = "compare.png"
    """File to write."""


def main() -> None:
    config, folders = errors.cli(Config, return_unknown_args=True)
    runs = {folder: local_path(folder) / "metrics.jsonl" for folder in folders}
    missing = [x for x, path in runs.items() if not path.exists()] if runs else ["no folder"]
    if missing:
        raise UserError(f"{' '.join(missing)}: name folders of runs that have begun")
    curves(runs, local_path(config.out))
    print(config.out)


if __name__ == "__main__":
    errors.run(main)
