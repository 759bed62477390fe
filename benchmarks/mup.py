"""Where the best learning rate lies at several widths, with µP and without, on the demo.

    python -m benchmarks.mup --out benchmarks/mup.png

Fresh students of two blocks learn from the embedded teacher. All that is between two runs of a
panel is the width and the learning rate: one batch order, one seed, one schedule.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import data
import distill
import losses
import models
import mup
import optim
import student
from models.base import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
HEAD_DIM = 16


def fresh(shape: Any, scaling: mup.Config, seed: int = 0) -> LanguageModel:
    """A student of this shape, in µP if `scaling` says so."""
    family = models.FAMILIES[shape.model_type]
    return student.fresh(lambda *of: mup.initial(scaling, family(*of)), shape, jax.random.key(seed))


@eqx.filter_jit
def step(frozen: Any, state: distill.State, lr: jax.Array, optimizer: Any, objective: Any):
    """A step at any learning rate by one program, of an `optimizer` whose own is at most 1: all of
    an update is proportional to it."""
    new, metrics = distill.step(frozen, state, optimizer, objective)
    learner = jax.tree.map(lambda x, y: x + lr * (y - x), state.learner, new.learner)
    return eqx.tree_at(lambda state: state.learner, new, learner), metrics["loss"]


def sweep(
    model: LanguageModel, scaling: mup.Config, rates: Iterable[float],
    batches: Sequence[data.Batch], loss: losses.Config, teacher: LanguageModel | None = None,
    **settings: Any,
) -> np.ndarray:  # fmt: skip
    """The loss at every step of a run at each learning rate."""
    optimizer = optim.make(optim.Config(lr=1.0, **settings), len(batches), scaling)
    objective, curves = losses.Objective(loss, len(batches)), []
    start = distill.init_state(model, optimizer)
    for rate in rates:
        state, curve = start, []
        for batch in batches:
            frozen = teacher, batch
            state, value = step(frozen, state, np.float32(rate), optimizer, objective)
            curve.append(value)
        curves.append(np.array(jax.device_get(curve)))
    return np.array(curves)


def final(curves: np.ndarray) -> np.ndarray:
    """The mean loss over the last tenth of the steps, infinite where a run diverged."""
    tail = curves[..., -max(1, curves.shape[-1] // 10) :].mean(-1)
    return np.where(np.isfinite(tail), tail, np.inf)


def draw(path: str, rates: np.ndarray, results: dict[str, dict[int, np.ndarray]]) -> None:
    """A panel for each parametrisation, a line for each width, a mark at its lowest loss."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9, 3.6), layout="constrained")
    panels = sheet.subplots(1, len(results), sharey=True)
    for panel, (name, lines) in zip(panels, results.items(), strict=True):
        for i, (width, loss) in enumerate(lines.items()):
            color = f"C{i}"
            panel.plot(rates, loss, "o-", ms=3, lw=1.2, color=color, label=f"width {width}")
            best = int(np.argmin(loss))
            panel.plot(rates[best], loss[best], "*", ms=13, color=color)
        panel.set(title=name, xscale="log", xlabel="learning rate")
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL from the teacher, last steps")
    panels[-1].legend(frameon=False)
    sheet.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--base", type=int, default=32, help="the width that µP scales from")
    parser.add_argument("--rates", type=int, nargs=2, default=[-10, -1], help="powers of two")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--out", help="a picture")
    args = parser.parse_args()
    teacher = models.load(ROOT / "demo" / "teacher", dtype="float32")
    source = data.Config(source=(str(ROOT / "demo" / "stories.txt"),), documents="paragraph")
    vocab = teacher.config.vocab
    corpus = data.open_corpus(source, ROOT / "demo/teacher", seq_len=args.seq, seed=0, vocab=vocab)
    batches = [data.batch(corpus, step, args.rows) for step in range(args.steps)]
    rates = 2.0 ** np.arange(args.rates[0], args.rates[1] + 1)
    parametrisations = {
        "standard": mup.Config(),
        f"µP over width {args.base}": mup.Config(args.base),
    }
    results: dict[str, dict[int, np.ndarray]] = {}
    print(f"| | {' | '.join(f'2^{int(np.log2(rate))}' for rate in rates)} | best |")
    print("|---|" + "---:|" * (len(rates) + 1))
    for name, scaling in parametrisations.items():
        for width in args.widths:
            begun, heads = time.monotonic(), width // HEAD_DIM
            shape = dataclasses.replace(
                teacher.config, embed=width, mlp=3 * width, heads=heads, kv_heads=heads, layers=2
            )
            model = fresh(shape, scaling)
            loss = final(sweep(model, scaling, rates, batches, losses.Config(), teacher))
            results.setdefault(name, {})[width] = loss
            best = f"2^{int(np.log2(rates[np.argmin(loss)]))}"
            print(
                f"| {name}, {width} | {' | '.join(f'{x:.3f}' for x in loss)} | {best} |", flush=True
            )
            print(f"{name}, {width}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if args.out:
        draw(args.out, rates, results)


if __name__ == "__main__":
    main()
