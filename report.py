"""What a run says: the metrics file, the progress line, the curves, the table, the model card."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import errors
from errors import UserError

Metrics = Mapping[str, Any]


def count(number: float) -> str:
    """1,234,567 as 1.2M."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def size(number: float) -> str:
    """3,400,000,000 bytes as 3.4 GB."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    decimals = 0
    while abs(number) >= (999.95 if decimals else 999.5) and len(units) > 1:
        number, units, decimals = number / 1000, units[1:], 1
    return f"{number:.{decimals}f}{units[0]}"


def duration(seconds: float) -> str:
    """3,725 seconds as 1h02m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


class Log:
    """The metrics file of a run and, on standard error, a bar on a terminal or else plain lines.

    A run that continues from step `start` keeps the lines of the file up to there, a new one none.
    `divergence` is what the lines call the divergence. Without a path nothing is told.
    """

    def __init__(
        self, path: Path | None, *, steps: int, start: int = 0, quiet: bool = False,
        divergence: str = "KL",
    ):  # fmt: skip
        from tqdm import tqdm

        self.steps, self.divergence, self.bar = steps, divergence, None
        self.path, self.file, self.quiet = path, None, quiet or path is None
        if path is None:
            return
        kept = [line for line in read(path) if line["step"] <= start] if start else []
        with _whole(path) as half:
            half.write_text("".join(map(_encode, kept)), encoding="utf-8")
        self.file = path.open("ab", buffering=0)
        if sys.stderr.isatty() and not quiet:
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}"
            self.bar = tqdm(total=steps, initial=start, bar_format=shape, dynamic_ncols=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`, never back: metrics come later than the steps they tell of."""
        if self.bar is not None:
            self.bar.update(max(step - self.bar.n, 0))

    def step(self, metrics: Metrics, mfu: float | None = None) -> None:
        """Records a training step and shows it."""
        metrics = self._record(metrics)
        text = progress(metrics, self.steps, mfu, self.divergence)
        if self.bar is not None:
            self.advance(metrics["step"])
            self.bar.set_description_str(text)
        elif not self.quiet:
            self.say(f"step {metrics['step']}/{self.steps}  {text}")

    def evaluation(self, metrics: Metrics) -> None:
        """Records an evaluation and shows it."""
        metrics = self._record(metrics)
        if not self.quiet:
            keys = [key for key in metrics if key != "step"]
            figures = "  ".join(f"{k.removeprefix('eval/')} {_figure(metrics[k])}" for k in keys)
            self.say(f"held out at step {metrics['step']}  {figures}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one, however quiet the run."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.file is not None:
            print(text, file=sys.stderr, flush=True)

    def _record(self, metrics: Metrics) -> dict[str, Any]:
        metrics = {name: plain(value) for name, value in metrics.items()}
        if self.file is None:
            return metrics
        line = _encode(metrics).encode()
        with _writing(self.path):
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return metrics


SECONDS = 10  # between two lines


@contextmanager
def counting(name: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for counted work, elsewhere than on a terminal a line now and then; called with what is
    done, of how much, and a remark."""
    from tqdm import tqdm

    off = quiet or not sys.stderr.isatty()
    begun = told = time.monotonic()
    with tqdm(desc=name, disable=off, leave=False, dynamic_ncols=True) as bar:

        def show(done: int, total: int, remark: str) -> None:
            nonlocal told
            bar.total = total
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)
            now = time.monotonic()
            if off and not quiet and done and now - told > SECONDS:
                left = duration((now - begun) / done * (total - done))
                print(f"{name}  {done}/{total}  {remark}  ETA {left}", file=sys.stderr, flush=True)
                told = now

        yield show


class Stopwatch:
    """Time since the last lap, without what was spent aside."""

    def start(self, number: int) -> None:
        self.begun, self.number = time.monotonic(), number

    def lap(self, number: int) -> tuple[float, int]:
        """Seconds and steps since the last one."""
        seconds, steps = time.monotonic() - self.begun, number - self.number
        self.start(number)
        return max(seconds, 1e-9), steps

    @contextmanager
    def aside(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.begun += time.monotonic() - begun


def progress(metrics: Metrics, steps: int, mfu: float | None = None, divergence: str = "KL") -> str:
    """The figures of a step in one line, with the time left at its speed."""
    parts = [f"loss {_figure(metrics['loss'])}"]
    if metrics.get("divergence") is not None:
        parts.append(f"{divergence} {_figure(metrics['divergence'])}")
    speed = metrics.get("tokens_per_second")
    if speed:
        parts.append(f"{count(speed)} tok/s")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    if speed and metrics["step"]:
        left = metrics["tokens"] / metrics["step"] * (steps - metrics["step"])
        parts.append(f"ETA {duration(left / speed)}")
    return "  ".join(parts)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut off is left out."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found = []
    for number, line in enumerate([*lines, last], 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError
        except (ValueError, RecursionError):
            if number <= len(lines):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with its step, found"
                    f" {line[:40].decode(errors='replace')!r}; remove the line, or start anew with"
                    " --no-resume"
                ) from None
        else:
            found.append(entry)
    return found


def plain(value: Any) -> Any:
    """As JSON can say it: arrays as numbers and lists, what is not finite as null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(metrics: Metrics) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file that is there whole or not at all."""
    with _whole(path) as half:
        half.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that this program wrote."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: restore it, or begin anew with --no-resume")
    return found


_writing = partial(
    errors.writing,
    remedy=": make room or give permission; the same command goes on from what was saved",
)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    with _writing(path), errors.whole(path) as half:
        yield half


def curves(metrics_path: Path, png_path: Path) -> None:
    """Draws the run: loss, cross entropy and KL with their held-out figures, learning rate."""
    import matplotlib
    from matplotlib.figure import Figure

    lines = read(metrics_path)

    def points(key: str) -> tuple[list[int], list[float]]:
        known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        return [step for step, _ in known], [value for _, value in known]

    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, ce), (kl, rate) = figure.subplots(2, 2, sharex=True)
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
    for panel in figure.axes:
        panel.grid(which="both", alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    rate.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("optimizer step", fontsize="medium")
    plain = {"axes.formatter.min_exponent": 4}  # 0.3 beside 0.1, not 3 × 10^-1
    with _whole(png_path) as half, matplotlib.rc_context(plain):
        figure.savefig(half, format="png", dpi=130)


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
    return [row.name, _figure(row.ce), perplexity, _figure(row.kl), *shares]


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
