"""Compiles a step for accelerators that are not here, and says what a device would hold.

    python -m benchmarks.plans v5p:2x2x1 [--shape NAME] [--rows 8] [--seq 4096] [--remat none]
    python -m benchmarks.plans cuda:8 --target h100.txtpb

For TPUs jax needs libtpu (set TPU_SKIP_MDS_QUERY=1), for GPUs jax[cuda13] and XLA's description of
the chip (set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1). `--text FILE` leaves the compiled program.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies

import distill
import sharding
from benchmarks.accelerator import SHAPES
from config import Config, with_defaults
from runtime import plan, prepare


def chips(topology: str, target: str | None) -> list:
    name, _, count = topology.partition(":")
    if name != "cuda":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    # These ask the GPU of this machine, and there is none.
    cudnn.check_compute_capability = lambda capability: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: False
    settings = dict(target_config=Path(target).read_text(), topology=f"1x1x{count or 1}")
    return topologies.get_topology_desc(platform="cuda", **settings).devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology")
    parser.add_argument("--target")
    parser.add_argument("--shape", default=next(iter(SHAPES)), choices=list(SHAPES))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--text")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    layers, rows, seq, settings = SHAPES[args.shape]
    rows, seq = args.rows or rows, args.seq or seq
    key = jax.random.key(0)  # nothing can run under the mesh
    jax.random.key = lambda seed: key
    mesh = sharding.make_mesh(devices=list(chips(args.topology, args.target)))
    layout = sharding.Layout(attention=args.attention)
    with tempfile.TemporaryDirectory() as folder, sharding.use_mesh(mesh, layout):
        (Path(folder) / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
        config = with_defaults(Config(
            teacher=folder, student_layers=layers, student_init="uniform", seq_len=seq,
            batch_size=rows, remat=args.remat, out="unused", compute_dtype="bfloat16",
        ))  # fmt: skip
        optimizer, objective = prepare.optimizer_and_objective(config)
        placement = prepare.Placement(mesh, layout, None)
        arguments = distill.abstract_arguments(config, placement)
        program = plan.compile_abstract(distill.step, arguments, optimizer, objective)
    memory, device = program.memory_analysis(), mesh.devices.flat[0]
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    held, worked = (f"{size / 1e9:.2f}" for size in sizes)
    print(
        f"{args.shape}, as {rows} x {seq}, on {mesh.size} x {device.device_kind}: {held} GB of"
        f" arguments and {worked} GB of temporaries on each"
    )
    if args.text:
        Path(args.text).write_text(program.as_text())


if __name__ == "__main__":
    main()
