"""Training from kept targets against training beside the teacher, on the demo.

    python -m benchmarks.kept [--steps 300] [--seeds 0]

Prints bytes a token; then tokens/s, of steps that take turns in one process, so that whatever else
the machine does slows all of them (reading from disk is part of a step; without any teacher a step
is as fast as kept targets could ever make it); then the KL of students on all held-out windows,
after runs over the same tokens in the same order.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime import target_store

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
BATCH, SEQ, BLOCKS = 16, 128, (0, 4, 5, 7)
CONTROL = "no teacher, cross entropy"
KINDS = {
    "top-k 32, float32": {"top_k": 32, "values": "float32"},
    "top-k 32": {"top_k": 32},
    "draws 16": {"draws": 16},
}


def targets_of_demo(out: Path, steps: int, seed: int = 0, **kind):
    import data
    import targets

    source = data.Config(source=(str(DEMO / "stories.txt"),), documents="paragraph")
    about = {"seq_len": SEQ, "batch_size": BATCH, "steps": steps, "seed": seed, "data": source}
    config = targets.Config(str(DEMO / "teacher"), str(out), quiet=True, **about, **kind)
    targets.make(config)
    return target_store.load(out)


def sizes(folder: Path) -> None:
    print("| kept | bytes a token, vocabulary 250,880 |\n|---|---:|")
    for name, kind in KINDS.items():
        wide = dataclasses.replace(
            targets_of_demo(folder / name, 1, **kind), vocab=250_880, seq_len=1024
        )
        print(f"| {name} | {wide.record.itemsize / 1024:.1f} |", flush=True)


def speeds(folder: Path, turns: int) -> None:
    import jax
    import jax.numpy as jnp

    import data
    import distill
    import losses
    import models
    import optim
    import sharding
    import student

    teacher = models.load(DEMO / "teacher")
    all_kept = {name: target_store.load(folder / name) for name in KINDS}
    some = next(iter(all_kept.values()))
    corpus = data.open_corpus(some.data_config, DEMO / "teacher", seq_len=SEQ, seed=0, vocab=2048)
    windows = data.windows(corpus, 0, BATCH)
    optimizer, runs = optim.make(optim.Config(), 100), {}
    for name, of in {"online": teacher, **all_kept, CONTROL: None}.items():

        def read(of=of):
            batch = data.read(corpus, windows)
            if isinstance(of, target_store.Targets):
                batch = batch._replace(signal=target_store.read(of, windows))
            return teacher if of is teacher else None, jax.device_put(batch)

        loss = losses.Config(alpha=0.0 if of is None else 1.0)
        fixed = optimizer, losses.Objective(loss, steps=100, dtype="float32")
        state = distill.init_state(
            jax.tree.map(jnp.copy, student.cut(teacher, {"layers": BLOCKS})), optimizer
        )
        program = sharding.compiled(distill.step.lower(read(), state, *fixed))
        runs[name] = [program, read, state, [], fixed]
    for _ in range(turns + 2):
        for run in runs.values():
            program, read, state, seconds, fixed = run
            begun = time.perf_counter()
            run[2], metrics = program(read(), state, *fixed)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begun)
    print("\n| targets | tokens/s | of online |\n|---|---:|---:|")
    medians = {name: statistics.median(run[3][2:]) for name, run in runs.items()}
    for name, seconds in medians.items():
        ratio = medians["online"] / seconds
        print(f"| {name} | {BATCH * SEQ / seconds:,.0f} | {ratio:.2f} |", flush=True)


def qualities(folder: Path, steps: int, seed: int) -> None:
    online = None
    for name in ("online", *KINDS):
        flags = []
        if name != "online":
            where = folder / f"{name}, {seed}"
            targets_of_demo(where, steps, seed, **KINDS[name])
            flags = ["--targets", str(where)]
        out = folder / f"{name}, {seed}, run"
        flags += ["--out", str(out), "--steps", str(steps), "--seed", str(seed), "--quiet"]
        flags += ["--eval-teacher", "--eval-every", str(steps), "--eval-windows", "100000"]
        command = [sys.executable, str(ROOT / "distill.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kl = [line["eval/kl"] for line in lines if "eval/kl" in line][-1]
        online = online or kl
        print(f"| {seed} | {name} | {kl:.4f} | {kl / online:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes(folder)
        speeds(folder, args.turns)
        print("\n| seed | targets | held-out KL | of online |\n|---|---|---:|---:|", flush=True)
        for seed in args.seeds:
            qualities(folder, args.steps, seed)


if __name__ == "__main__":
    main()
