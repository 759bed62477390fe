"""Trackers of a run: the lines of metrics.jsonl go to them too, with settings, curves and table."""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from runtime import figures, files
from runtime.errors import UserError
from runtime.report import Metrics

Name = Literal["wandb", "trackio", "tensorboard"]
Send = Callable[..., None]
Tracker = tuple[Send, Callable[[], None]]  # what it logs by, and is closed by


def wandb(package: str, out: Path, run_id: str, settings: files.Settings, start: int) -> Tracker:
    """Opens Weights & Biases, or trackio, which has its interface but for the id."""
    library = importlib.import_module(package)
    project = os.environ.get(f"{package.upper()}_PROJECT", "compact-distill")
    names: dict[str, Any] = {"name": f"{out.name}-{run_id}"}
    if package == "wandb":
        names = {"name": out.name, "id": run_id, "dir": out, "settings": {"console": "off"}}
    library.init(project=project, resume="allow", config=dict(settings), **names)

    def log(step: int, values: dict[str, Any], curves: Path | None, rows: Sequence) -> None:
        if curves is not None:
            values["curves"] = library.Image(str(curves))
            values["results"] = library.Table(columns=rows[0], data=rows[1:])
        library.log(values, step=step)

    return log, library.finish


def tensorboard(out: Path, run_id: str, settings: files.Settings, start: int) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
    writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def log(step: int, values: dict[str, Any], curves: Path | None, rows: Sequence) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if curves is not None:
            from matplotlib.image import imread

            writer.add_image("curves", imread(curves), step, dataformats="HWC")
            writer.add_text("results", figures.markdown(rows), step)

    return log, writer.close


OPEN = {x: partial(wandb, x) for x in ("wandb", "trackio")} | {"tensorboard": tensorboard}


def check_installed(names: Sequence[Name]) -> None:
    for name in names:
        if importlib.util.find_spec({"tensorboard": "tensorboardX"}.get(name, name)) is None:
            raise UserError(f"--track {name}: it is not installed: pip install -e '.[{name}]'")


@contextlib.contextmanager
def opened(names: Sequence[Name], folder: files.RunFolder, start: int) -> Iterator[Send]:
    """Yields what sends a line of metrics to the trackers of a run, in the end with curves and
    table. One that fails is left out, with a warning, and the run goes on."""
    path, active = folder.path / "track.json", {name: OPEN[name] for name in names}
    run_id = files.read_json(path)["id"] if path.exists() else secrets.token_hex(4)
    if names:
        files.write_json(path, {"id": run_id})

    def each(act: Callable[[Any], Any]) -> None:
        for name, tracker in list(active.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what they print is no result
                    active[name] = act(tracker) or tracker
            except Exception as error:
                del active[name]
                why = files.printable(error)
                print(f"--track {name} fails and is left out: {why}", file=sys.stderr, flush=True)

    def send(line: Metrics, curves: Path | None = None, rows: Sequence = ()) -> None:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        step, _ = numbers.pop("step"), numbers.pop("time", None)  # all have clocks of their own
        each(lambda tracker: tracker[0](step, dict(numbers), curves, rows))

    each(lambda open_tracker: open_tracker(folder.path, run_id, folder.settings, start))
    try:
        yield send
    finally:
        each(lambda tracker: tracker[1]())
