"""How much of the teacher's time on devices of its own falls into the student's.

    python -m benchmarks.overlap [--student 2] [--teacher 1] [--steps 10]

A run of the embedded demo on so many emulated devices is traced; every operation in the trace names
its program. A step waits for what the teacher says of its batch, so what overlaps it is the teacher
at a later one. XLA runs only one program of several CPU devices at a time: there, two that could
overlap do not, so one of the counts is to be 1.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

from runtime import processes

Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def operations(trace: Path) -> dict[str, Spans]:
    """When operations of each program ran, in nanoseconds."""
    import jax

    found: dict[str, Spans] = {}
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    program = dict(event.stats).get("hlo_module")
                    if program is not None:
                        span = event.start_ns, event.start_ns + event.duration_ns
                        found.setdefault(program, []).append(span)
    return {program: union(spans) for program, spans in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=int, default=2)
    parser.add_argument("--teacher", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    import distill

    processes.start(devices=args.student + args.teacher)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = distill.Config(
            out=folder, quiet=True, teacher_devices=args.teacher, student_init="uniform",
            student_heal="none",
            steps=args.steps + 6, profile_steps=f"5:{args.steps + 4}", eval_windows=16,
        )  # fmt: skip
        distill.train(config)
        found = operations(Path(folder) / "trace")
    student, teacher = found["jit_step"], found["jit_view"]
    either = length(union([*student, *teacher]))
    both = length(student) + length(teacher) - either
    print("| ms a step | |\n|---|---:|")
    for name, time in (
        ("student computes", length(student)), ("teacher computes", length(teacher)),
        ("both at once", both), ("either", either),
    ):  # fmt: skip
        print(f"| {name} | {time / 1e6 / args.steps:.0f} |")
    print(f"| share of the teacher's that overlaps | {both / length(teacher):.0%} |")


if __name__ == "__main__":
    main()
