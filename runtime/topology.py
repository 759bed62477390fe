"""Chips that need not be here: their figures, and their own compilers."""

import importlib.util
import os
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from runtime import roofline
from runtime.errors import UserError


class Chip(NamedTuple):
    """What a maker says of one chip."""

    memory: float  # bytes
    peak: float  # FLOP/s of bfloat16 products
    bandwidth: float  # bytes/s of its memory
    links: float  # bytes/s to the chips beside it
    gpu: dict[str, Any] | None = None  # what XLA asks of one


HOPPER = {
    "major": 9, "cores": 132, "units": 128, "cache": 52_428_800, "clock": 1.98,
    "shared": 233_472, "dnn": "9 minor: 10",
}  # fmt: skip
AMPERE = HOPPER | {"major": 8, "cores": 108, "units": 64, "cache": 41_943_040, "clock": 1.41}
AMPERE |= {"shared": 167_936}
CHIPS = {
    "a100": Chip(85.10e9, 312e12, 2.039e12, 300e9, AMPERE | {"name": "NVIDIA A100-SXM4-80GB"}),
    "h100": Chip(84.98e9, 989e12, 3.352e12, 450e9, HOPPER | {"name": "NVIDIA H100 80GB HBM3"}),
    "h200": Chip(151.4e9, 989e12, 4.8e12, 450e9, HOPPER | {"name": "NVIDIA H200"}),
    "v5e": Chip(17.18e9, 197e12, 0.819e12, 200e9),
    "v5p": Chip(102.8e9, 459e12, 2.765e12, 600e9),
    "v6e": Chip(34.36e9, 918e12, 1.64e12, 448e9),
}
ALONE = {  # else libtpu looks for the machines of a pod, and complains
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
NODE = 8  # GPUs that are linked
NETWORK = 400e9  # bytes/s between such nodes, by the adapters of all its GPUs
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  core_count: {cores}  fpus_per_core: {units}  clock_rate_ghz: {clock}  l2_cache_size: {cache}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn} }}
device_description_str: "{name}"
"""


def parse(topology: str) -> tuple[Chip, str]:
    """A chip, and how many there are (`8`) or how they stand (`4x4x4`)."""
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    pattern = r"[1-9]\d*" if chip is not None and chip.gpu else r"[1-9]\d*(x[1-9]\d*)+"
    if chip is None or not re.fullmatch(pattern, shape):
        expected = f"a chip of {', '.join(CHIPS)}, how many GPUs, and how TPUs stand"
        raise UserError(f"--topology {topology}: expected h100:8 or v5p:4x4x4, with {expected}")
    return chip, shape


def devices(topology: str) -> list[jax.Device]:
    """For programs that are compiled and never run."""
    chip, shape = parse(topology)
    package, extra = ("jax_cuda13_plugin", "cuda") if chip.gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(package) is None:
        install = f"pip install -e '.[{extra}]'"
        raise UserError(f"--topology {topology}: its compiler is not installed: {install}")
    jax.config.update("jax_compilation_cache_dir", None)  # nothing here can read their programs
    try:
        if not chip.gpu:
            os.environ |= ALONE
            return list(topologies.get_topology_desc(topology, "tpu").devices)
        nodes, each = max(1, int(shape) // NODE), min(int(shape), NODE)
        if nodes * each != int(shape):
            raise UserError(f"--topology {topology}: beyond {NODE} GPUs, a multiple of {NODE}")
        sizes = {"memory": int(chip.memory), "bandwidth": int(chip.bandwidth)}
        sizes["optin"] = chip.gpu["shared"] - 1024
        _believe_in_cudnn()
        return list(topologies.get_topology_desc(
            "", "cuda", target_config=GPU.format(**chip.gpu | sizes), topology=f"1x{nodes}x{each}"
        ).devices)  # fmt: skip
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology {topology}: its compiler refuses it: {reason}") from None


def _believe_in_cudnn() -> None:
    # These ask the GPU of this machine, where there may be none.
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    cudnn.check_compute_capability = lambda capability: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: False


def cost(topology: str, program: Any, flops: float) -> roofline.Cost:
    """Of a compiled step whose models take so many FLOPs on each device."""
    chip, _ = parse(topology)
    if chip.gpu:
        return roofline.cost(program.as_text(), chip.peak, chip.bandwidth)
    # libtpu cannot write out a program with asynchronous copies.
    return roofline.Cost(Counter({"products": flops / chip.peak}), flops, 0.0)


def table(topology: str, cost: roofline.Cost, tokens: int, devices: int) -> list[str]:
    """The least time of a step over so many tokens, and where it goes."""
    chip, _ = parse(topology)
    links = chip.links if chip.gpu is None or devices <= NODE else min(chip.links, NETWORK)
    rows, sending = cost.seconds.most_common(), cost.sent / links
    least, peak = max(cost.least, sending), f"{chip.peak / 1e12:.0f} TFLOP/s"
    how = f"  its products at {peak}; this compiler tells no more"
    if chip.gpu:
        rows.append(("collectives", sending))
        how = f"  kernels at {peak} or {chip.bandwidth / 1e12:.2f} TB/s, and at the same time"
        how += f" {cost.sent / 1e9:.1f} GB to other devices at {links / 1e9:.0f} GB/s"
    return [
        f"no step is faster than {1e3 * least:.1f} ms: {tokens / least:,.0f} tokens/s,"
        f" {cost.flops / chip.peak / least:.0%} of the peak",
        *(f"  {name:14}{1e3 * seconds:>7.1f} ms" for name, seconds in rows),
        how,
    ]
