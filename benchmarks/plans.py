"""Plans of known shapes for accelerators that are not here, a row of a table each.

    python -m benchmarks.plans h100:1 [--shapes NAME ...] [--rows 8] [--seq 4096] [FLAGS]

FLAGS are those of distill.py. It needs the compiler of the chips: the extras cuda and tpu.
"""

import argparse
import json
import tempfile
from pathlib import Path

import distill
import sharding
from benchmarks.accelerator import SHAPES
from config import Config, with_defaults
from runtime import errors, prepare, processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seq", type=int)
    args, flags = parser.parse_known_args()
    processes.start(devices=1)
    print("| step | chips | arrays + temporaries, GB | at least | tokens/s | of the peak | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for name in args.shapes:
        layers, rows, seq, settings = SHAPES[name]
        rows, seq = args.rows or rows, args.seq or seq
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
            words = (
                f"--plan --topology {args.topology} --teacher {folder} --student-layers {layers}"
            )
            words += f" --seq-len {seq} --batch-size {rows}"
            config = with_defaults(errors.cli(Config, [*words.split(), *flags]))
            placement = prepare.placement(config)
            with sharding.use_mesh(placement.mesh, placement.layout):
                need = distill.device_bytes(config, placement)
        cost, (chip, _) = need.cost, distill.topology.parse(args.topology)
        parts = ", ".join(f"{part} {1e3 * x:.0f}" for part, x in cost.seconds.most_common(5))
        print(
            f"| {name.split(',')[0]}, {rows} x {seq} {' '.join(flags)} | {args.topology} |"
            f" {need.arrays / 1e9:.1f} + {need.temporaries / 1e9:.1f} | {1e3 * cost.least:.0f} ms |"
            f" {rows * seq / cost.least:,.0f} | {cost.flops / chip.peak / cost.least:.0%} |"
            f" {parts}; {cost.sent / 1e9:.1f} GB sent |",
            flush=True,
        )


if __name__ == "__main__":
    main()
