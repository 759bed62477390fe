"""What a run says: the metrics file and the progress line."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import atomic_write, disk_errors

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
        with atomic_write(path) as half:
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
        with disk_errors(self.path):
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
