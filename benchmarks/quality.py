"""What students learn from a teacher: by which loss, from which start, at equal tokens.

Run from the repository: `python -m benchmarks.quality`, of the embedded teacher; or of another, and
of its starts alone: `python -m benchmarks.quality --teacher DIR --data.source train.txt
--data.eval-source held.txt --seq-len 256 --batch-size 4 --optim.lr 3e-4`.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import tyro

import data
import distill
import losses
import models
import optim
import sharding
import student as students
from config import uses_teacher_loss, with_defaults
from runtime import prepare, report, results

Data, Optim = data.Config, optim.Config  # a field hides the module it is named after
CROSS_ENTROPY = losses.Config(alpha=0)
CUTS = ("influence", "uniform", "first", "last", "random")
# How students of half a teacher are cut, and healed: the first makes what all need ready.
STARTS = {
    "even": {"student_init": "uniform", "student_heal": "none"},
    "even, healed": {"student_init": "uniform", "student_heal": "all"},
    "influence": {"student_init": "influence", "student_heal": "none"},
    "influence, healed": {"student_init": "influence", "student_heal": "all"},
    "greedy": {"student_heal": "none"},
    "greedy, seams healed": {"student_heal": "seams"},
    "greedy, healed": {"student_heal": "all"},
}  # fmt: skip
SHARE = 0.5  # of the parameters of the teacher's blocks
HEADER = (
    "start", "loss", "CE at step 0", "KL at step 0", "CE", "KL", "agreement", "gap recovered",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """How long and how often to train."""

    steps: int = 150
    """Optimizer steps of every run."""
    seeds: int = 3
    """Orders of the text in which distillation meets cross entropy alone."""
    teacher: str | None = None
    """Hub id or folder of a teacher, in the embedded one's place; then only starts are compared."""
    seq_len: int | None = None
    """Tokens of a window."""
    batch_size: int = 16
    """Windows of a step."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """Of the starts from another teacher."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of these starts."""
    data: Data = dataclasses.field(default_factory=Data)
    """The text."""


class Result(NamedTuple):
    """Held-out figures of a run before and after it, and the blocks that its student kept."""

    before: dict[str, Any]
    after: dict[str, Any]
    kept: tuple[int, ...] | None

    @property
    def recovered(self) -> float:
        start = self.before["eval/ce"]
        return (start - self.after["eval/ce"]) / (start - self.after["eval/teacher_ce"])


def train(
    folder: Path, config: Config, start: str, loss: losses.Config, seed: int = 0, heal: str = "none"
) -> Result:
    """A run of its own; all of them share the tokenized text."""
    begun, out = time.monotonic(), Path(tempfile.mkdtemp(dir=folder))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        distill.train(
            distill.Config(
                teacher=config.teacher, student_init=start, student_heal=heal, loss=loss, seed=seed,
                steps=config.steps, out=str(out), seq_len=config.seq_len,
                batch_size=config.batch_size, eval_teacher=True, quiet=True,
                data=dataclasses.replace(config.data, cache=str(folder / "text")),
                eval_every=config.steps, save_every=config.steps, eval_windows=sys.maxsize,
            )
        )  # fmt: skip
    found = [line for line in report.read_metrics(out / "metrics.jsonl") if "eval/ce" in line]
    choice = out / "choice.json"
    kept = tuple(json.loads(choice.read_text())["kept"]) if choice.exists() else None
    seconds = round(time.monotonic() - begun)
    print(f"{start}, heal {heal}, {loss}, seed {seed}: {seconds} s", file=sys.stderr)
    return Result(found[0], found[-1], kept)


def row(start: str, loss: losses.Config, found: Result) -> list[str]:
    ends = [line[f"eval/{name}"] for line in (found.before, found.after) for name in ("ce", "kl")]
    shares = (found.after["eval/agreement"], found.recovered)
    name = loss.divergence if uses_teacher_loss(loss) else "cross entropy only"
    blocks = "" if found.kept is None else f" ({' '.join(map(str, found.kept))})"
    return [start + blocks, name, *(f"{x:.4f}" for x in ends), *(f"{x:.1%}" for x in shares)]


def tell(*cells: str) -> None:
    """A row of a markdown table, as soon as it is known."""
    print(f"| {' | '.join(cells)} |", flush=True)


def compare_starts(folder: Path, config: Config) -> None:
    """What students of half a teacher have lost before and after the steps of the program."""
    tell("start", "blocks", "MLP", "parameters", "seconds", "KL at step 0", "KL", "CE", "agreement")
    tell(*["---"] * 9)
    shapes = students.sizes(models.config(models.fetch(config.teacher)), SHARE)
    starts = STARTS | {
        f"{depth} blocks, narrow, healed": {
            "student_layers": depth, "student_mlp": mlp, "student_heal": "all"
        }
        for depth, mlp in shapes[:-1]  # the last is as wide as the teacher
    } | {"--student-params, healed": {"student_params": SHARE, "student_heal": "all"}}  # fmt: skip
    for name, flags in starts.items():
        begun = time.monotonic()
        asked = with_defaults(
            distill.Config(
                teacher=config.teacher, out=tempfile.mkdtemp(dir=folder), seq_len=config.seq_len,
                steps=config.steps, batch_size=config.batch_size, eval_windows=sys.maxsize,
                data=dataclasses.replace(config.data, cache=str(folder / "text")),
                optim=config.optim, compute_dtype=config.compute_dtype, **flags,
            )
        )  # fmt: skip
        placement = prepare.placement(asked)
        with sharding.use_mesh(placement.mesh, placement.layout), report.quietly(True):
            run, state = distill.prepare_state(asked, Path(asked.out), placement)
            seconds = time.monotonic() - begun
            before, fixed = results.score(run, state.student), (run.optimizer, run.objective)
            for step in range(config.steps):
                state, _ = distill.step((run.step_teacher, run.batch(step)), state, *fixed)
            after, shape = results.score(run, state.student), state.student.config
        size = sum(leaf.size for leaf in jax.tree.leaves(state.student))
        figures = [before["eval/kl"], after["eval/kl"], after["eval/ce"], after["eval/agreement"]]
        sizes = str(shape.layers), str(shape.mlp), report.count(size), f"{seconds:.0f}"
        tell(name, *sizes, *(f"{x:.4f}" for x in figures))


def main() -> None:
    config = tyro.cli(Config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        if config.teacher is not None:
            return compare_starts(folder, config)
        default = losses.Config()
        first = train(folder, config, "greedy", default)
        print(f"Teacher: cross entropy {first.after['eval/teacher_ce']:.4f}.\n")
        tell(*HEADER)
        tell(*["---"] * len(HEADER))
        tell(*row("greedy", default, first))
        # The blocks as a list from here on: they are chosen on windows that a seed would change.
        greedy = ",".join(map(str, first.kept))
        for heal in ("seams", "all"):
            healed = train(folder, config, greedy, default, heal=heal)
            tell(*row(f"greedy + {heal}", default, healed))
        alone = train(folder, config, greedy, CROSS_ENTROPY)
        tell(*row("greedy", CROSS_ENTROPY, alone))
        for divergence in get_args(losses.Divergence):
            if divergence != default.divergence:
                loss = losses.Config(divergence)
                tell(*row("greedy", loss, train(folder, config, greedy, loss)))
        for cut in CUTS:
            tell(*row(cut, default, train(folder, config, cut, default)))
        print()
        tell("seed", "CE, forward_kl", "CE, cross entropy only", "gain")
        tell(*["---"] * 4)
        for seed in range(config.seeds):
            pair = (first, alone)
            if seed:
                pair = [train(folder, config, greedy, x, seed) for x in (default, CROSS_ENTROPY)]
            distilled, plain = (found.after["eval/ce"] for found in pair)
            tell(str(seed), f"{distilled:.4f}", f"{plain:.4f}", f"{plain - distilled:.4f}")


if __name__ == "__main__":
    main()
