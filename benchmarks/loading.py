"""What loading a checkpoint costs beside reading its bytes, and compile time against depth.

Run from the repository: `python -m benchmarks.loading`, or with `load` or `compile` behind it.
"""

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import models
import sharding
from models.base import LanguageModel
from models.bloom import Bloom
from models.hub import leaves
from models.llama import Llama

BUFFER = 1 << 24

# bloom-1b7 as it is published: the older names in the config, no prefix, no head.
BLOOM_1B7 = {
    "model_type": "bloom",
    "vocab_size": 250880,
    "n_embed": 2048,
    "n_layer": 24,
    "num_attention_heads": 16,
}

# A dtype to load as, and over how many devices.
LOADS = {
    "as stored, float16": (None, 1),
    "as float32": ("float32", 1),
    "as bfloat16": ("bfloat16", 1),
    "as stored, on 8 devices": (None, 8),
}

SMALL = {
    Bloom: dict(vocab=512, embed=64, heads=4),
    Llama: dict(vocab=512, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128),
}
DEPTHS = (4, 48)


def abstract(family: type[LanguageModel], **sizes: int) -> LanguageModel:
    """A model of shapes alone."""
    return eqx.filter_eval_shape(lambda: family(family.Config(**sizes), jax.random.key(0)))


def write_checkpoint(folder: Path) -> None:
    """Random float16 numbers in the shapes of bloom-1b7, of which a little is held at a time."""
    (folder / "config.json").write_text(json.dumps(BLOOM_1B7))
    model = abstract(Bloom, vocab=250880, embed=2048, layers=24, heads=16)
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for leaf in leaves(model):
        for name in leaf.names:
            start, end = end, end + 2 * math.prod(leaf.shape)
            header[name.removeprefix(Bloom.PREFIX)] = {
                "dtype": "F16",
                "shape": leaf.shape,
                "data_offsets": (start, end),
            }
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        said = json.dumps(header).encode()
        file.write(len(said).to_bytes(8, "little") + said)
        for start in range(0, end, BUFFER):
            count = min(BUFFER, end - start) // 2
            file.write((0.02 * rng.standard_normal(count, np.float32)).astype(np.float16))
        file.flush()
        os.fsync(file.fileno())  # or the disk is busy with it while we measure


def resident(what: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at their highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if what in line)
    return 1024 * int(line.split()[1])


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def read_into_buffer(path: Path) -> None:
    buffer = bytearray(BUFFER)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load(folder: Path, dtype: str | None, devices: int) -> dict[str, float]:
    """The first load of a process, with all that it does only once."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = None if devices == 1 else sharding.make_mesh(1, devices, 1)
    jax.block_until_ready(jnp.zeros(8))
    weights = folder / "model.safetensors"
    # What was never touched a virtual machine must first have from its host, whoever touches it.
    np.ones(2 * weights.stat().st_size, np.uint8)
    reading = [seconds(lambda: read_into_buffer(weights))]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    started = time.perf_counter()
    model = jax.block_until_ready(models.load(folder, dtype=dtype, mesh=mesh))
    loading = time.perf_counter() - started
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    peak = resident("VmHWM") - before
    del model
    reading.append(seconds(lambda: read_into_buffer(weights)))  # other loads come and go
    return {
        "peak memory / weights": peak / held,
        "time / reading into a buffer": loading / (sum(reading) / 2),
        "time / read_bytes": loading / seconds(weights.read_bytes),
        "seconds": loading,
    }


def loads(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder)
        print(f"{(folder / 'model.safetensors').stat().st_size / 1e9:.2f} GB in one file")
        for what, (dtype, devices) in LOADS.items():
            runs = [apart(load, folder, dtype, devices) for _ in range(repeats)]
            for figure in runs[0]:
                values = sorted(each[figure] for each in runs)
                spread = f"({values[0]:.2f} to {values[-1]:.2f})"
                print(f"{what:26} {figure:30} {median(values):6.2f} {spread}")


def apart(function: Callable, *args: Any) -> Any:
    """Calls a function in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compiling(model: LanguageModel) -> float:
    """Seconds from a forward pass to its program."""
    jax.clear_caches()
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return seconds(lambda: forward.lower(model, tokens).compile())


def compiles(repeats: int) -> None:
    for family, sizes in SMALL.items():
        shallow, deep = (abstract(family, layers=layers, **sizes) for layers in DEPTHS)
        compiling(shallow)
        pairs = [(compiling(shallow), compiling(deep)) for _ in range(repeats)]
        short, long = map(median, zip(*pairs, strict=True))
        print(f"{family.__name__:6} compiled in {short:.2f} s at {DEPTHS[0]} layers,", end=" ")
        print(f"{long:.2f} s at {DEPTHS[1]}: ratio {long / short:.2f}")


def main(
    what: tyro.conf.Positional[Literal["load", "compile", "both"]] = "both", repeats: int = 7
) -> None:
    """Measure loading, compiling, or both.

    Args:
        what: To measure.
        repeats: Of each measurement; medians are shown.
    """
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if what != "compile":
        loads(repeats)
    if what != "load":
        compiles(repeats)


if __name__ == "__main__":
    tyro.cli(main)
