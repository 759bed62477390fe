"""Reverse KL on the student's own text against forward KL on the data, on the demo.

    python -m benchmarks.on_policy [--steps 300] [--seeds 0 1 2]

All students are cut alike and trained by as many steps of as many tokens, of which prompts are a
part that counts nothing. The figures are of all held-out windows; the last row of a seed tells what
the divergence does alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BATCH, SEQ, BLOCKS = 16, 128, "0,4,5,7"
RUNS = {
    "forward KL, data": [],
    "reverse KL, student's text": [
        "--loss.divergence", "reverse_kl", "--on-policy.fraction", "1",
    ],
    "reverse KL, data": ["--loss.divergence", "reverse_kl"],
}  # fmt: skip
FIGURES = ("reverse_kl", "kl", "agreement", "ce")


def measured(folder: Path, seed: int) -> dict[str, float]:
    """Of all held-out windows."""
    import data
    import eval
    import models

    teacher = ROOT / "demo" / "teacher"
    source = data.Config(source=(str(ROOT / "demo" / "stories.txt"),), documents="paragraph")
    corpus = data.open_corpus(source, teacher, seq_len=SEQ, seed=seed, vocab=2048)
    student = models.load(folder)
    return eval.evaluate(student, models.load(teacher), data.evaluation(corpus, BATCH))


def train(out: Path, steps: int, seed: int, flags: list[str]) -> float:
    """Seconds that a run took."""
    command = [sys.executable, str(ROOT / "distill.py"), "--out", str(out), "--quiet", *flags]
    command += [
        "--student-init",
        BLOCKS,
        "--student-heal",
        "none",
        "--steps",
        str(steps),
        "--seed",
        str(seed),
    ]
    command += ["--batch-size", str(BATCH), "--seq-len", str(SEQ)]
    command += ["--eval-every", str(steps), "--eval-windows", "1", "--save-every", str(steps)]
    begun = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def read(out: Path) -> int:
    """Tokens of all steps."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["tokens"] for line in lines if "tokens" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print(f"| seed | student | {' | '.join(FIGURES)} | tokens | seconds |")
    print(f"|---|---|{'---:|' * (len(FIGURES) + 2)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for seed in args.seeds:
            for about, flags in RUNS.items():
                out = Path(name) / f"{seed}, {about}"
                seconds = train(out, args.steps, seed, flags)
                means = measured(out / "student", seed)
                figures = " | ".join(f"{means[figure]:.4f}" for figure in FIGURES)
                spent = f"{read(out):,} | {seconds:.0f}"
                print(f"| {seed} | {about} | {figures} | {spent} |", flush=True)


if __name__ == "__main__":
    main()
