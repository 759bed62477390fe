"""What a run says: the metrics file, its progress, and numbers in words."""

import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import UserError
from runtime.files import atomic_write, disk_errors

Metrics = Mapping[str, Any]
T = TypeVar("T")
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def count(number: float | int) -> str:
    """1,234,567 as 1.2M."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def size(number: float | int) -> str:
    """3,400,000,000 bytes as 3.4 GB."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float | int, units: Sequence[str]) -> str:
    decimals = 0
    while abs(number) >= (999.95 if decimals else 999.5) and len(units) > 1:
        number, units, decimals = number / 1000, units[1:], 1
    return f"{number:.{decimals}f}{units[0]}"


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
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


# ---- the steps of a run --------------------------------------------------------------------------


class Log:
    """The metrics file of a run and, on standard error, a bar on a terminal or else plain lines.

    A run that continues from step `start` keeps the lines of the file up to there, a new one none.
    `divergence` is what the lines call the divergence. Without a path it writes and says nothing.
    """

    def __init__(self, path: Path | None, *, steps: int, start: int = 0, divergence: str = "KL"):
        from tqdm import tqdm

        self.steps, self.divergence, self.bar = steps, divergence, None
        self.path, self.file, self.quiet = path, None, path is None or _quiet.get()
        if path is None:
            return
        earlier = [line for line in read_metrics(path) if line["step"] <= start] if start else []
        with atomic_write(path) as half:
            half.write_text("".join(map(_encode, earlier)), encoding="utf-8")
        self.file = path.open("ab", buffering=0)
        if sys.stderr.isatty() and not self.quiet:
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}"
            self.bar = tqdm(total=steps, initial=start, bar_format=shape, dynamic_ncols=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        for resource in filter(None, (self.bar, self.file)):
            resource.close()

    def step(self, metrics: Metrics, mfu: float | None = None) -> None:
        """Records a training step and shows it."""
        metrics = self._record(metrics)
        text = step_line(metrics, self.steps, mfu, self.divergence)
        if self.bar is not None:
            self.bar.update(metrics["step"] - self.bar.n)
            self.bar.set_description_str(text)
        elif not self.quiet:
            self.say(f"step {metrics['step']}/{self.steps}  {text}")

    def evaluation(self, metrics: Metrics) -> None:
        """Records an evaluation and shows it."""
        metrics = self._record(metrics)
        if not self.quiet:
            keys = [key for key in metrics if key != "step"]
            figures = "  ".join(f"{k.removeprefix('eval/')} {figure(metrics[k])}" for k in keys)
            self.say(f"held out at step {metrics['step']}  {figures}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one, however quiet the run."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.file is not None:
            print(text, file=sys.stderr, flush=True)

    def _record(self, metrics: Metrics) -> dict[str, Any]:
        metrics = {name: plain(value) for name, value in metrics.items()}
        if self.file is not None:
            line = _encode(metrics).encode()
            with disk_errors(self.path):
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return metrics


def step_line(
    metrics: Metrics, steps: int, mfu: float | None = None, divergence: str = "KL"
) -> str:
    """The figures of a step in one line, with the time left at its speed."""
    parts = [f"loss {figure(metrics['loss'])}"]
    if metrics.get("divergence") is not None:
        parts.append(f"{divergence} {figure(metrics['divergence'])}")
    speed = metrics.get("tokens_per_second")
    if speed:
        parts.append(f"{count(speed)} tok/s")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    if speed and metrics["step"]:
        left = metrics["tokens"] / metrics["step"] * (steps - metrics["step"])
        parts.append(f"ETA {duration(left / speed)}")
    return "  ".join(parts)


class Stopwatch:
    """Time since the last lap, without the time while it was paused."""

    def start(self, step: int) -> None:
        self.since, self.step = time.monotonic(), step

    def lap(self, step: int) -> tuple[float, int]:
        """Seconds and steps since the last one."""
        seconds, steps = time.monotonic() - self.since, step - self.step
        self.start(step)
        return max(seconds, 1e-9), steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start


# ---- phases that take their time -----------------------------------------------------------------

# Seconds until a phase is shown, and between two times.
ON_TERMINAL, ELSEWHERE = (0.5, 0.2), (5.0, 10.0)


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
def progress(name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows that a phase goes on, and how long it still will: a bar on a terminal, elsewhere a
    plain line now and then, nothing of a phase that is over at once.

    Yields `advance(done, total=None, remark="")`, which costs nothing: a thread shows what it was
    called with last. A phase that never calls it is shown with the time it has taken.
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
                line = phase_line(name, done, total, remark, time.monotonic() - start)
                if not screen.isatty():
                    screen.write(line + "\n")
                    screen.flush()
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


def track(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """The items, with the progress of whoever works through them."""
    with progress(name, total) as advance:
        for done, item in enumerate(items):
            advance(done)
            yield item


def phase_line(name: str, done: int, total: int | None, remark: str, seconds: float) -> str:
    """How far a phase is: counted and with the time left where its total is known."""
    parts = [name, f"{count(done)}/{count(total)}" if total else duration(seconds), remark]
    if total and done:
        parts.append(f"ETA {duration(seconds / done * max(total - done, 0))}")
    return "  ".join(filter(None, parts))


# ---- the metrics file ----------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut off is left out."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    entries = []
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
            entries.append(entry)
    return entries


def plain(value: Any) -> Any:
    """As JSON can say it: arrays as numbers and lists, what is not finite as null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(metrics: Metrics) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"
