"""Trackers of a run: the lines of metrics.jsonl go to them too, with settings, curves and table."""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime import figures, files
from runtime.errors import UserError
from runtime.report import Metrics

Name = Literal["wandb", "trackio", "tensorboard"]
FILE = "track.json"  # of a run: the id by which it continues its tracks
PROJECT = "compact-distill"


class Wandb:
    def __init__(self, out: Path, run_id: str, settings: files.Settings, start: int):
        import wandb

        self.library, self.run = wandb, wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), dir=out, id=run_id, name=out.name,
            resume="allow", config=dict(settings), settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def log(self, step: int, numbers: Metrics) -> None:
        self.run.log(dict(numbers), step=step)

    def results(self, step: int, curves: Path, rows: list[list[str]]) -> None:
        table = self.library.Table(columns=rows[0], data=rows[1:])
        self.log(step, {"curves": self.library.Image(str(curves)), "results": table})

    def close(self) -> None:
        self.library.finish()


class Trackio(Wandb):
    """It has the interface of wandb, but for the id."""

    def __init__(self, out: Path, run_id: str, settings: files.Settings, start: int):
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{out.name}-{run_id}"
        self.library, self.run = (
            trackio,
            trackio.init(project, name, resume="allow", config=dict(settings)),
        )


class TensorBoard:
    def __init__(self, out: Path, run_id: str, settings: files.Settings, start: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def log(self, step: int, numbers: Metrics) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def results(self, step: int, curves: Path, rows: list[list[str]]) -> None:
        from matplotlib.image import imread

        self.writer.add_image("curves", imread(curves), step, dataformats="HWC")
        self.writer.add_text("results", figures.markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


KINDS = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}


def check_installed(names: Sequence[Name]) -> None:
    for name in names:
        if importlib.util.find_spec("tensorboardX" if name == "tensorboard" else name) is None:
            raise UserError(f"--track {name}: it is not installed: pip install -e '.[{name}]'")


class Trackers(contextlib.AbstractContextManager):
    """The trackers of a run. One that fails is left out, with a warning, and the run goes on."""

    def __init__(self, names: Sequence[Name] = (), folder: Any = None, start: int = 0):
        self.active: dict[str, Any] = {name: KINDS[name] for name in names}
        if names:
            path, run_id = folder.path / FILE, secrets.token_hex(4)
            if not path.exists():
                files.write_json(path, {"id": run_id})
            facts = folder.path, files.read_json(path)["id"], folder.settings, start
            self._each(lambda name, kind: self.active.update({name: kind(*facts)}))

    def log(self, line: Metrics) -> None:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        step, _ = numbers.pop("step"), numbers.pop("time", None)  # all have a clock of their own
        self._each(lambda _, tracker: tracker.log(step, numbers))

    def results(self, step: int, curves: Path, rows: list[list[str]]) -> None:
        self._each(lambda _, tracker: tracker.results(step, curves, rows))

    def __exit__(self, *_: object) -> None:
        self._each(lambda _, tracker: tracker.close())

    def _each(self, act: Callable[[str, Any], object]) -> None:
        for name, tracker in list(self.active.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what they print is not the result
                    act(name, tracker)
            except Exception as error:
                del self.active[name]
                why = files.printable(error)
                print(f"--track {name} fails and is left out: {why}", file=sys.stderr, flush=True)
