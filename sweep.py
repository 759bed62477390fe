"""A grid of runs of distill.py: each combination of some flags once, in a folder of its own."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

from runtime import errors, figures, files, report
from runtime.errors import UserError

FIGURES = {"eval/kl": "held-out KL", "eval/ce": "held-out cross entropy", "loss": "training loss"}
POSITIVE = re.compile(r"(?=.*[1-9])(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.I)  # has a logarithm
Run = dict[str, Any]  # a line of sweep.jsonl: the flags of a run, and what came of it


@dataclass(frozen=True)
class Config:
    """Train with each combination of values of some flags of distill.py, which stand before a --;
    flags that all runs share stand behind it:

    python sweep.py --optim.lr 1e-4 3e-4 1e-3 --seed 0 1 -- --student-init random --steps 500

    The same command goes on where it was interrupted; with other values it adds their runs."""

    out: str = "runs/sweep"
    """Folder of the runs, of the table sweep.md, of sweep.jsonl and of the picture sweep.png."""


def parse(words: Sequence[str]) -> tuple[Path, list[Run]]:
    """The folder of a sweep and its runs."""
    end = [*words, "--"].index("--")
    config, rest = errors.cli(Config, words[:end], return_unknown_args=True)
    starts = [i for i, word in enumerate(rest) if not i or word.startswith("--")]
    grid = {rest[i]: dict.fromkeys(rest[i + 1 : j]) for i, j in pairwise([*starts, len(rest)])}
    if not (grid and all(grid.values())):
        raise UserError(f"{' '.join(rest) or 'no flag'}: expected values, as --optim.lr 1e-4 1e-3")
    out, shared, runs = files.local_path(config.out), list(words[end + 1 :]), []
    for values in product(*grid.values()):
        swept = dict(zip(grid, values, strict=True))
        folder = str(out / ",".join(f"{x[2:]}={swept[x]}" for x in swept).replace("/", "%"))
        arguments = [*shared, *chain(*swept.items()), "--out", folder]
        runs.append({"swept": swept, "shared": shared, "folder": folder, "arguments": arguments})
    return out, runs


def call(arguments: Sequence[str]) -> int:
    """The exit status of distill.py. A signal is passed on to it, so that it saves."""
    command = [sys.executable, str(Path(__file__).with_name("distill.py")), *arguments]
    # In a session of its own: a Ctrl-C would reach it twice, and the second ends it at once.
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise


def outcome(run: Run, exit_status: int) -> Run:
    """A run that has ended, with its last figures and the time of its steps."""
    from runtime.results import EXPORTED, NotFinite

    folder = Path(run["folder"])
    paths = folder / EXPORTED, folder / "config.json"
    exported, asked = (files.read_json(path) if path.exists() else {} for path in paths)
    ended = "finished" if exported and exported["step"] == asked["steps"] else "stopped"
    status = {0: ended, NotFinite.status: "diverged"}.get(exit_status, "failed")
    metrics = report.read_metrics(folder / "metrics.jsonl")
    last = {name: value for line in metrics for name, value in line.items()}
    rates = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    seconds = round(last["tokens"] / harmonic_mean(rates), 1) if rates else 0
    values = {name: last.get(name) for name in FIGURES} | {"steps": last.get("step", 0)}
    return run | {"status": status} | values | {"seconds": seconds}


def write(out: Path, runs: Sequence[Run]) -> str:
    """Writes outcomes, table and picture, which has the first flag of numbers as its axis, a line
    for each combination of the others, and of several seeds the mean and the range."""
    from matplotlib import figure, rc_context

    rows = [[*runs[0]["swept"], "status", *FIGURES.values(), "steps", "seconds"]]
    for run in runs:
        numbers = *(report.figure(run[x]) for x in FIGURES), run["steps"], run["seconds"]
        rows.append([*run["swept"].values(), run["status"], *map(str, numbers)])
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    for name, text in (("sweep.jsonl", lines), ("sweep.md", figures.markdown(rows) + "\n")):
        with files.atomic_write(out / name) as half:
            half.write_text(text, encoding="utf-8")
    swept = {x: dict.fromkeys(run["swept"][x] for run in runs) for x in runs[0]["swept"]}
    numeric = [x for x in swept if x != "--seed" and all(map(POSITIVE.fullmatch, swept[x]))]
    axis, sheet = [*numeric, *swept][0], figure.Figure(figsize=(14, 4.5), layout="constrained")
    for panel, name in zip(sheet.subplots(1, 3), FIGURES, strict=True):
        groups: dict[str, dict[Any, list[float]]] = {}
        for run in (x for x in runs if x["status"] == "finished" and x[name] is not None):
            others = dict(run["swept"])
            x, _ = others.pop(axis), others.pop("--seed", None)
            points = groups.setdefault(" ".join(chain(*others.items())), {})
            points.setdefault(float(x) if numeric else x, []).append(run[name])
        for label, points in groups.items():
            x, values = zip(*sorted(points.items()), strict=True)
            panel.plot(x, [*map(mean, values)], "o-", label=label)
            panel.fill_between(x, [*map(min, values)], [*map(max, values)], alpha=0.2)
        panel.set(title=FIGURES[name], xlabel=axis, yscale="log")
        if numeric:
            panel.set(xscale="log", xticks=[*map(float, swept[axis])], xticklabels=[*swept[axis]])
        if len(groups) > 1:
            panel.legend(frameon=False)
    plain = {"axes.formatter.min_exponent": 4}
    with files.atomic_write(out / "sweep.png") as half, rc_context(plain):
        sheet.savefig(half, format="png", dpi=130)
    return figures.table(rows)


def main() -> None:
    from config import parse_flags

    out, runs = parse(sys.argv[1:])
    for run in runs:  # all, before the first begins
        parse_flags(run["arguments"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path, like = out / "sweep.jsonl", (runs[0]["shared"], [*runs[0]["swept"]])
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    earlier = (x for x in map(json.loads, lines) if (x["shared"], [*x["swept"]]) == like)
    ended = {str(run["swept"]): run for run in earlier}
    for run in runs:
        key, folder = str(run["swept"]), Path(run["folder"])
        if ended.get(key, run).get("status") != "finished" or not folder.exists():
            print(f"run       {folder}", flush=True)
            if (exit_status := call(run["arguments"])) == 2:
                raise SystemExit(2)  # refused, and the reason is on the screen
            ended[key] = outcome(run, exit_status)
            write(out, [*ended.values()])
    print(write(out, [*ended.values()]), f"picture   {out / 'sweep.png'}", sep="\n")
    if done := [run for run in ended.values() if run["status"] == "finished"]:
        name = "eval/ce" if any(run["eval/kl"] is None for run in done) else "eval/kl"
        keys = [run["swept"] | {"--seed": ""} for run in done]
        means = [mean(x[name] for x, y in zip(done, keys, strict=True) if y == key) for key in keys]
        best = done[means.index(min(means))]
        print("best      python distill.py", shlex.join(best["arguments"]))


if __name__ == "__main__":
    errors.run(main)
