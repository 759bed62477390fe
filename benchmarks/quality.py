"""What students learn from a teacher: by which loss, from which start, at equal tokens.

Run from the repository: `python -m benchmarks.quality`, of the embedded teacher; or of another, and
of its starts alone: `python -m benchmarks.quality --teacher DIR --data.source train.txt
--data.eval-source held.txt --seq-len 256`.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import tyro

import data
import distill
import losses
from config import uses_teacher_loss
from runtime import report

Data = data.Config  # a field hides the module it is named after
CROSS_ENTROPY = losses.Config(alpha=0)
CUTS = ("influence", "uniform", "first", "last", "random")
HEALS = ("seams", "all")
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


def main() -> None:
    config = tyro.cli(Config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        default = losses.Config()
        first = train(folder, config, "greedy", default)
        print(f"Teacher: cross entropy {first.after['eval/teacher_ce']:.4f}.\n")
        tell(*HEADER)
        tell(*["---"] * len(HEADER))
        tell(*row("greedy", default, first))
        # The blocks as a list from here on: they are chosen on windows that a seed would change.
        greedy = ",".join(map(str, first.kept))
        for heal in HEALS:
            healed = train(folder, config, greedy, default, heal=heal)
            tell(*row(f"greedy + {heal}", default, healed))
        for cut in ("influence", "uniform"):
            healed = train(folder, config, cut, default, heal="all")
            tell(*row(f"{cut} + all", default, healed))
        if config.teacher is not None:
            for cut in ("influence", "uniform"):
                tell(*row(cut, default, train(folder, config, cut, default)))
            return
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
