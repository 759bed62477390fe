"""What a run says: the metrics file, its progress, and numbers in words."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import append_json, atomic_write, disk_errors

Metrics = Mapping[str, Any]
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
# Seconds until a phase is shown, and between two times.
ON_TERMINAL, ELSEWHERE = (0.5, 0.2), (5.0, 10.0)
LONG = 300  # seconds left of a phase that somebody may want to shorten


def count(number: float | int, units: tuple[str, ...] = ("", "k", "M", "B", "T")) -> str:
    """1,234,567 as 1.2M."""
    decimals = 0
    while abs(number) >= (999.95 if decimals else 999.5) and len(units) > 1:
        number, units, decimals = number / 1000, units[1:], 1
    return f"{number:.{decimals}f}{units[0]}"


def size(number: float | int) -> str:
    """3,400,000,000 bytes as 3.4 GB."""
    return count(number, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: float | int) -> str:
    """3,725 seconds as 1h02m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


class Log(ExitStack):
    """The metrics file of a run and, on standard error, a bar on a terminal or else plain lines.

    Lines up to step `start` stay in the file. Without a path it writes and says nothing.
    """

    def __init__(
        self, path: Path | None, *, steps: int, start: int = 0, divergence: str = "KL",
        track: Callable[[Metrics], None] = lambda line: None,
    ):  # fmt: skip
        super().__init__()
        self.track = track
        self.steps, self.divergence, self.bar, self.path = steps, divergence, None, path
        self.quiet, self.last_lap = path is None or _quiet.get(), (time.monotonic(), start)
        if path is None:
            return
        earlier = [line for line in read_metrics(path) if line["step"] <= start] if start else []
        with atomic_write(path) as half:
            half.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        self.file = self.enter_context(path.open("ab", buffering=0))
        if sys.stderr.isatty() and not self.quiet:
            from tqdm import tqdm

            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}"
            bar = tqdm(total=steps, initial=start, bar_format=shape, dynamic_ncols=True)
            self.bar = self.enter_context(bar)

    def step(self, metrics: Metrics) -> None:
        """Records a training step and shows it."""
        metrics = self._record(metrics)
        text = step_line(metrics, self.steps, self.divergence)
        if self.bar is not None:
            self.bar.update(metrics["step"] - self.bar.n)
            self.bar.set_description_str(text)
        elif not self.quiet:
            self.say(f"step {metrics['step']}/{self.steps}  {text}")

    def evaluation(self, metrics: Metrics) -> None:
        """Records an evaluation and shows it."""
        number, *figures = self._record(metrics).items()
        if not self.quiet:
            figures = [pair for pair in figures if pair[0] != "eval/of"]
            words = [f"{name.removeprefix('eval/')} {figure(value)}" for name, value in figures]
            self.say("  ".join([f"held out at step {number[1]}", *words]))

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one, however quiet the run."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.path is not None:
            print(text, file=sys.stderr, flush=True)

    def lap(self, step: int) -> tuple[float, int]:
        """Seconds and steps since the last lap."""
        (since, last), self.last_lap = self.last_lap, (time.monotonic(), step)
        return max(time.monotonic() - since, 1e-9), step - last

    def _record(self, metrics: Metrics) -> dict[str, Any]:
        metrics = {name: plain(value) for name, value in metrics.items()}
        if self.path is not None:
            with disk_errors(self.path):
                append_json(self.file, metrics)
            self.track(metrics)
        return metrics


def step_line(line: Metrics, steps: int, divergence: str = "KL") -> str:
    """The figures of a step in one line, with the time left at its speed."""
    parts, speed = [f"loss {figure(line['loss'])}"], line.get("tokens_per_second")
    if line.get("divergence") is not None:
        parts.append(f"{divergence} {figure(line['divergence'])}")
    if speed:
        parts.append(f"{count(speed)} tok/s")
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.0%}")
    if speed and line["step"]:
        left = line["tokens"] / line["step"] * (steps - line["step"])
        parts.append(f"ETA {duration(left / speed)}")
    return "  ".join(parts)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Within it nothing is printed but warnings and results, if `quiet`."""
    token = _quiet.set(_quiet.get() or quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(text: str) -> None:
    """Prints a line for people."""
    if not _quiet.get():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, total: int | None = None, hint: str = "") -> Iterator[Callable[..., None]]:
    """Shows a phase that takes its time: a bar on a terminal, elsewhere a plain line now and then.

    Yields `advance(done, total=None, remark="")`, which costs nothing: a thread shows what it was
    called with last. A phase that never calls it is shown with the time it has taken; `hint` is
    shown until it will end in minutes.
    """
    screen, start, ended = sys.stderr, time.monotonic(), threading.Event()
    state = [0, total, ""]

    def advance(done: int, total: int | None = None, remark: str = "") -> None:
        state[:] = done, total or state[1], remark

    def show() -> None:
        from tqdm import tqdm

        bar, (pause, interval) = None, ON_TERMINAL if screen.isatty() else ELSEWHERE
        with suppress(OSError, ValueError):  # of a screen that is gone
            while not ended.wait(pause):
                pause, (done, total, remark) = interval, state
                line = phase_line(name, done, total, remark, time.monotonic() - start, hint)
                if not screen.isatty():
                    print(line, file=screen, flush=True)
                    continue
                if bar is None:
                    bar = tqdm(file=screen, leave=False, bar_format="{desc}", dynamic_ncols=True)
                bar.n, bar.total = done, total
                bar.bar_format = "{percentage:3.0f}%|{bar}| {desc}" if total else "{desc}"
                bar.set_description_str(line)
            if bar is not None:
                bar.close()

    thread = threading.Thread(target=show, daemon=True)
    if not _quiet.get():
        thread.start()
    try:
        yield advance
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def track(items: Iterable[Any], name: str, total: int | None = None) -> Iterator[Any]:
    """The items, with the progress of whoever works through them."""
    with progress(name, total) as advance:
        for done, item in enumerate(items):
            advance(done)
            yield item


def phase_line(
    name: str, done: int, total: int | None, remark: str, seconds: float, hint: str = ""
) -> str:
    """How far a phase is: counted and with the time left where its total is known."""
    parts = [name, f"{count(done)}/{count(total)}" if total else duration(seconds), remark]
    left = seconds / done * max(total - done, 0) if total and done else math.inf
    if left < math.inf:
        parts.append(f"ETA {duration(left)}")
    if left >= LONG:
        parts.append(hint)
    return "  ".join(filter(None, parts))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut off is left out."""
    lines, entries = path.read_bytes().split(b"\n") if path.exists() else [b""], []
    for number, line in enumerate(lines, 1):
        entry = None
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        elif number < len(lines):
            start = line[:40].decode(errors="replace")
            misfit = f"expected a JSON object with its step, found {start!r}"
            raise UserError(f"{path}, line {number}: {misfit}; remove it, or give --no-resume")
    return entries


def plain(value: Any) -> Any:
    """As JSON can say it: arrays as numbers and lists, what is not finite as null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
