"""Trackers of a run: the lines of metrics.jsonl go to them too, with settings, curves and table."""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from runtime import figures, files
from runtime.errors import UserError

Name = Literal["wandb", "trackio", "tensorboard"]
# Opens a track where it starts; then a step with its figures, curves and table is sent to it.
Tracker = Generator[None, Any, None]


def wandb(library: str, out: Path, run_id: str, settings: files.Settings, start: int) -> Tracker:
    """Weights & Biases; or trackio, which has its interface but knows runs by their names."""
    tracker, project = importlib.import_module(library), f"{library.upper()}_PROJECT"
    more = {"id": run_id, "dir": out, "settings": {"console": "off"}} if library == "wandb" else {}
    facts = {"project": os.environ.get(project, "compact-distill"), "config": dict(settings)}
    tracker.init(name=f"{out.name}-{run_id}", resume="allow", **facts, **more)
    while True:
        step, values, curves, rows = yield
        if curves is not None:
            table = tracker.Table(columns=rows[0], data=rows[1:])
            values = {"curves": tracker.Image(str(curves)), "results": table}
        tracker.log(values, step=step)
        if curves is not None:
            tracker.finish()  # that of a run which is stopped ends with Python, and is marked so


def tensorboard(out: Path, run_id: str, settings: files.Settings, start: int) -> Tracker:
    from matplotlib.image import imread
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
    writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")
    while True:
        step, values, curves, rows = yield
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if curves is not None:
            writer.add_image("curves", imread(curves), step, dataformats="HWC")
            writer.add_text("results", figures.markdown(rows), step)
            writer.close()


OPEN = {x: partial(wandb, x) for x in ("wandb", "trackio")} | {"tensorboard": tensorboard}


def check_installed(names: Sequence[Name]) -> None:
    for name in names:
        if importlib.util.find_spec({"tensorboard": "tensorboardX"}.get(name, name)) is None:
            raise UserError(f"--track {name}: it is not installed: pip install -e '.[{name}]'")


def open_all(names: Sequence[Name], folder: files.RunFolder, start: int) -> Callable[..., None]:
    """What sends a line of metrics, or curves and table, to trackers. One that fails is left out,
    with a warning. A run that goes on continues its tracks, by the id that is in its folder."""
    path = folder.path / "track.json"
    if names and not path.exists():
        files.write_json(path, {"id": secrets.token_hex(4)})
    facts = folder.path, files.read_json(path)["id"] if names else "", folder.settings, start
    active = {name: OPEN[name](*facts) for name in names}

    def send_all(event: Any) -> None:
        for name, tracker in list(active.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what they print is no result
                    tracker.send(event)
            except Exception as error:
                del active[name]
                why = files.printable(error)
                print(f"--track {name} fails and is left out: {why}", file=sys.stderr, flush=True)

    def send(line, curves=None, rows=()):
        values = {name: value for name, value in line.items() if isinstance(value, int | float)}
        step, _ = values.pop("step"), values.pop("time", None)  # all have clocks of their own
        send_all((step, values, curves, rows))

    send_all(None)
    return send
