"""Runs that are killed, stopped or left without disk: each goes on to the end it would have had.

Run from the repository: `python -m benchmarks.soak`, or with the names of some parts of it.
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from runtime import results

ROOT = Path(__file__).resolve().parents[1]
Part = Literal["kills", "devices", "meshes", "answers", "sigterm", "disk", "overhead"]
STEPS, SAVE, EVALUATE = 60, 7, 9


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = get_args(Part)
    moments: int = 25
    """At which a run is killed."""
    seed: int = 0


class Run(NamedTuple):
    """A run of a tiny teacher, and where it keeps things."""

    home: Path
    name: str = "whole"
    devices: int = 1
    flags: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return self.home / self.name

    @property
    def tokens(self) -> Path:
        return self.home / f"{self.name}-tokens"

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    def command(self) -> list[str]:
        flags = {
            "teacher": self.home / "teacher", "student-layers": 2, "student-init": "last",
            "student-heal": "none",
            "data.source": self.home / "text.txt", "data.documents": "paragraph",
            "data.cache": self.tokens, "seq-len": 32, "batch-size": 8, "steps": STEPS,
            "save-every": SAVE, "eval-every": EVALUATE, "eval-windows": 16, "log-every": 1,
            "out": self.out,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        given = {word.partition("=")[0] for word in self.flags}
        words = [word for word in words if word.partition("=")[0] not in given]
        return [sys.executable, "distill.py", *words, *self.flags]

    def start(self, before: Sequence[str] = ()) -> subprocess.Popen:
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
        environment |= {"NPROC": "32", "XDG_CACHE_HOME": str(self.home / "cache")}
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*before, *self.command()], cwd=ROOT, env=os.environ | environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def finish(self) -> None:
        process = self.start()
        if process.wait():
            raise RuntimeError(f"{self.name} ended with {process.returncode}: {self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def lines(self) -> list[dict[str, Any]]:
        """The metrics without times; those of a file that is being written, as far as it is."""
        with contextlib.suppress(OSError):
            lines = (self.out / "metrics.jsonl").read_text().split("\n")[:-1]
            lines = map(json.loads, lines)
            return [{k: v for k, v in x.items() if k not in results.OF_ONE_START} for x in lines]
        return []

    def step(self) -> int:
        return max((line["step"] for line in self.lines() if "loss" in line), default=0)

    def forget(self) -> None:
        for folder in (self.out, self.tokens):
            shutil.rmtree(folder, ignore_errors=True)


def prepare(home: Path, stories: int = 1500) -> None:
    """A teacher and a text."""
    import jax

    import models
    from models.llama import Config, Llama

    config = Config(2048, 16, 32, 3, 8, 8, 8, max_positions=64, tied=True, eos=0, pad=0)
    models.save(Llama(config, jax.random.key(3)), home / "teacher", tokenizer=ROOT / "demo/teacher")
    text = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:stories]
    (home / "text.txt").write_text("\n\n".join(text))


# ---- moments -------------------------------------------------------------------------------------


class Touch(NamedTuple):
    """The n-th time that Python opens, makes, renames or lists something of this name."""

    name: str
    times: int


TOUCH = """
import os, runpy, signal, sys
name, left = sys.argv[1], int(sys.argv[2])
def hook(event, args):
    global left
    if event == "open" or event.startswith(("os.", "shutil.")):
        if any(isinstance(arg, str | os.PathLike) and name in os.fspath(arg) for arg in args):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

Moment = Touch | Callable[[Run], bool]
TOKENS, CHECKPOINT, EXPORT = ".partial/new/", "-tmp", ".student."
BEST = ".student-best."


def at_step(number: int) -> Moment:
    return lambda run: run.step() >= number


def evaluating(run: Run) -> bool:
    """Its step is told, its figures are not yet."""
    lines = run.lines()
    return bool(lines) and "loss" in lines[-1] and lines[-1]["step"] % EVALUATE == 0


def writing(files: int) -> Moment:
    """So many files of a checkpoint are there: they are written where Python does not see it."""

    def reached(run: Run) -> bool:
        walk = os.walk(run.out / "checkpoints")
        return sum(len(names) for place, _, names in walk if CHECKPOINT in place) >= files

    return reached


def killed(run: Run, moment: Moment) -> bool:
    """Whether the run came to the moment, and was killed at it; else it ended well before."""
    if isinstance(moment, Touch):
        words = [sys.executable, "-c", TOUCH, moment.name, str(moment.times)]
        process = run.start(words)
        process.wait()
    else:
        process = run.start()
        while process.poll() is None and not moment(run):
            time.sleep(0.002)  # a step takes longer; the run is to have the processor
        process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{run.name} ended with {process.returncode}: {run.said()}")
    return process.returncode != 0


def reference(run: Run) -> None:
    """Leaves the run at its end, uninterrupted."""
    if not (run.out / "student").exists():
        run.finish()


def differences(run: Run, whole: Run) -> list[str]:
    """What the ends of two runs differ in."""
    differing = []
    for folder in ("student", "student-best"):
        a, b = (contents(r.out / folder) for r in (run, whole))
        names = sorted(a.keys() | b.keys())
        differing += [f"{folder}/{name}" for name in names if a.get(name) != b.get(name)]
    if run.lines() != whole.lines():
        differing.append("metrics.jsonl")
    if [line["step"] for line in run.lines() if "loss" in line] != list(range(1, run.step() + 1)):
        differing.append("the steps told")
    return differing


# ---- parts ---------------------------------------------------------------------------------------


def kills(
    home: Path, config: Config, devices: int = 1, flags: tuple[str, ...] = ()
) -> Iterator[str]:
    """One chain of kills and continuations after the other, each to the end."""
    chosen = random.Random(f"{config.seed} {devices}")
    whole = Run(home, f"whole-{devices}", devices, (*flags, "--keep-best"))
    run = whole._replace(name=f"killed-{devices}")
    reference(whole)
    counts, chains, wrong = collections.Counter(), 0, []
    while sum(counts.values()) < config.moments:
        kind = chosen.choice(
            ("step", "evaluation", "save", "save", "write", "best", "export", "tokens")
        )
        if kind == "tokens":
            shutil.rmtree(run.tokens, ignore_errors=True)
        moment = {
            "step": at_step(run.step() + chosen.randrange(1, 12)),
            "evaluation": evaluating,
            "save": Touch(CHECKPOINT, chosen.randrange(1, 120)),
            "write": writing(chosen.randrange(1, 10)),
            "best": Touch(BEST, chosen.randrange(1, 120)),
            "export": Touch(EXPORT, chosen.randrange(1, 36)),
            "tokens": Touch(TOKENS, chosen.randrange(1, 48)),
        }[kind]
        if killed(run, moment):
            counts[kind] += 1
            yield f"  {sum(counts.values()):2} killed, {kind:10}  step {run.step()}"
        else:
            chains, wrong = chains + 1, wrong + differences(run, whole)
            run.forget()
    run.finish()
    chains, wrong = chains + 1, wrong + differences(run, whole)
    kinds = ", ".join(f"{number} x {kind}" for kind, number in counts.items())
    yield f"{sum(counts.values())} kills ({kinds}) in {chains} runs on {devices} devices: differ in"
    yield f"  {', '.join(wrong) or 'nothing'}"


def meshes(home: Path, config: Config) -> Iterator[str]:
    """Killed on one mesh, continued on another; five steps later the students are compared."""
    import jax
    import numpy as np

    import models

    flags = ("--steps=20", "--save-every=15", "--optim.eps=1e-4", "--optim.lr=1e-2")
    one = ("--mesh.data=1", "--mesh.fsdp=8", "--mesh.tensor=1")
    other = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")
    whole = Run(home, "mesh-whole", 8, flags + one)
    whole.finish()
    run = whole._replace(name="mesh-killed")
    if not killed(run, at_step(17)):
        raise RuntimeError("it ended before it could be killed")
    run._replace(flags=flags + other).finish()
    students = [models.load(r.out / "student") for r in (run, whole)]
    worst = max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(*(map(np.asarray, jax.tree.leaves(s)) for s in students), strict=True)
    )
    yield f"killed on (1, 8, 1), five steps on (2, 2, 2): {worst:.1e} of a leaf's largest entry"


def sigterm(home: Path, config: Config) -> Iterator[str]:
    whole, run = Run(home), Run(home, "stopped")
    reference(whole)
    process = run.start()
    while run.step() < 20 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    status = process.wait(60)
    seconds, said = time.monotonic() - begun, run.said().strip().splitlines()[-1]
    yield f"SIGTERM: exit status {status} after {seconds:.1f} s, {said[:60]!r}..."
    run.finish()
    yield f"  continued, it differs in {', '.join(differences(run, whole)) or 'nothing'}"


LIMIT = "import os, resource, sys; n = int(sys.argv[1])\n"
LIMIT += "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"


def disk(home: Path, config: Config) -> Iterator[str]:
    """No file may grow beyond a size; then, where root runs this, a file system that is full."""
    whole, run = Run(home), Run(home, "limited")
    reference(whole)
    if not killed(run, at_step(2 * SAVE + 1)):
        raise RuntimeError("it ended before it could be killed")
    checkpoints = run.out / "checkpoints"
    before = contents(checkpoints / str(2 * SAVE))
    process = run.start([sys.executable, "-c", LIMIT, "100000"])
    status = process.wait()
    lines = [line for line in run.said().splitlines() if "could not be" in line or "error" in line]
    intact = contents(checkpoints / str(2 * SAVE)) == before
    yield f"files of 100 kB at most: exit status {status}, checkpoint {2 * SAVE} intact: {intact}"
    yield from (f"  {line[:140]}" for line in lines)
    yield f"  Traceback: {'Traceback' in run.said()}"
    run.finish()
    yield f"  with room again, it differs in {', '.join(differences(run, whole)) or 'nothing'}"
    run = run._replace(name="tmpfs")
    run.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "soak", str(run.out)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield "a full tmpfs: not measured, it cannot be mounted"
        return
    try:
        status = run.start().wait()
        lines = [line for line in run.said().splitlines() if "could not" in line or "error" in line]
        yield f"a tmpfs of 900 kB: exit status {status}, traceback: {'Traceback' in run.said()}"
        yield from (f"  {line[:140]}" for line in lines)
        names = sorted(path.name for path in (run.out / "checkpoints").iterdir())
        yield f"  checkpoints left: {', '.join(names)}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(run.out)], check=True)
        run.finish()
        yield f"  with room again, it differs in {', '.join(differences(run, whole)) or 'nothing'}"
    finally:
        subprocess.run(["umount", str(run.out)])


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; a card without its time and its name."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    mine = rb"(optimizer steps), .* tokens/s on .*|from_pretrained\(.*?\)"
    return {str(name): re.sub(mine, rb"\1", path.read_bytes()) for name, path in files.items()}


def answers(home: Path, config: Config) -> Iterator[str]:
    """A data set that is killed while it is written has every answer once, the same as ever."""
    prompts, count, samples = home / "prompts.txt", 60, 5
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:count]
    prompts.write_text("".join(f"{i}: {story.split('.')[0]}.\n" for i, story in enumerate(stories)))

    def start(name: str) -> subprocess.Popen:
        words = ["--model=demo/teacher", f"--prompts={prompts}", f"--out={home / name}"]
        words += [f"--samples={samples}", "--batch-size=4", "--max-new=48", "--quiet"]
        environment = os.environ | {"XDG_CACHE_HOME": str(home / "cache")}
        return subprocess.Popen(
            [sys.executable, "generate.py", *words], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    if start("whole.jsonl").wait():
        raise RuntimeError("the uninterrupted run failed")
    journal, chosen = home / "killed.jsonl.journal", random.Random(config.seed)
    for enough in sorted(chosen.uniform(0, count * samples) for _ in range(config.moments)):
        doomed = start("killed.jsonl")
        while doomed.poll() is None and (
            not journal.exists() or journal.read_bytes().count(b"\n") < enough
        ):
            time.sleep(0.001)
        time.sleep(chosen.uniform(0, 0.05))
        doomed.kill()
        doomed.wait()
    if start("killed.jsonl").wait():
        raise RuntimeError("the run could not be continued")
    whole, killed = ((home / f"{name}.jsonl").read_bytes() for name in ("whole", "killed"))
    often = set(
        collections.Counter(json.loads(line)["prompt"] for line in killed.splitlines()).values()
    )
    yield (
        f"killed {config.moments} times while {count} prompts were answered: each has {often}"
        f" answers of {samples}, {'the same' if whole == killed else 'OTHERS'} as of one run"
    )


def overhead(home: Path, config: Config) -> Iterator[str]:
    """What a save adds to the steps after it: of twenty steps of a run the first ten follow one."""
    out = home / "demo"
    flags = {"save-every": 20, "eval-every": 10**6, "log-every": 1, "out": out}
    words = [sys.executable, "distill.py", *(f"--{name}={value}" for name, value in flags.items())]
    environment = os.environ | {"XDG_CACHE_HOME": str(home / "cache")}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run, at = Run(home, "demo"), {}
    while process.poll() is None:
        with contextlib.suppress(OSError):
            step = run.step()
            at.setdefault(step, (time.monotonic(), processor(process.pid)))
        time.sleep(0.02)
    times = []
    for i, what in enumerate(("wall", "CPU")):
        halves = [
            [at[step + 10][i] - at[step][i] for step in range(start, max(at) - 10, 20)
             if step in at and step + 10 in at] for start in (20, 30)
        ]  # fmt: skip
        after, other = map(statistics.median, halves)
        times.append(f"{1 + (after - other) / (5 * other):.4f} x the {what} time")
    yield f"saving every 50 steps of the demo: {', '.join(times)} of never ({len(halves[0])} saves)"


def processor(process: int) -> float:
    """Seconds that a process has kept processors busy."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    config = tyro.cli(Config)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    mesh = ("--mesh.data=1", "--mesh.fsdp=8", "--mesh.tensor=1")
    parts = {
        "kills": kills,
        "devices": lambda home, config: kills(home, config, 8, mesh),
        "meshes": meshes,
        "answers": answers,
        "sigterm": sigterm,
        "disk": disk,
        "overhead": overhead,
    }
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for part in config.parts:
            for line in parts[part](Path(name), config):
                print(line, flush=True)


if __name__ == "__main__":
    main()
