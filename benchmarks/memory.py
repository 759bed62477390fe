"""What the compiled step holds and works in, on each device; nothing is run.

    python -m benchmarks.memory [--shapes L B]

The shapes are those of benchmarks/step.py, over emulated devices that share everything (fsdp).
"""

import argparse
import dataclasses
import itertools

from benchmarks.step import SHAPES, settings
from runtime import processes

COUNTS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    rows: int = 8
    seq: int = 128
    vocab: int | None = None
    devices: int = 1
    zero: int = 3
    remat: str = "none"
    microbatches: int = 1


def sizes(case: Case) -> tuple[int, int]:
    """Bytes of a device: the step's arguments, and what it works in beside them."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import data
    import distill
    import losses
    import models
    import optim
    import sharding
    from models.hf_config import HFConfig
    from runtime import plan

    family = models.FAMILIES[SHAPES[case.shape]["model_type"]]

    def config(layers: int):
        changed = {} if case.vocab is None else {"vocab_size": case.vocab}
        return family.Config.read(HFConfig(settings(case.shape, layers) | changed))

    optimizer = optim.make(optim.Config(), 100)
    objective = losses.Objective(
        losses.Config(alpha=0.5), steps=100, remat=case.remat, microbatches=case.microbatches
    )
    mesh = sharding.make_mesh(devices=jax.devices()[: case.devices])
    layout = sharding.Layout(case.zero)
    with sharding.use_mesh(mesh, layout):
        key = jax.random.key(0)
        state = eqx.filter_eval_shape(lambda: distill.init_state(family(config(4), key), optimizer))
        state = plan.with_shardings(state, plan.state_shardings(state, mesh, layout))
        teacher = eqx.filter_eval_shape(family, config(8), key)
        teacher = plan.with_shardings(teacher, sharding.specs(teacher, mesh, layout.params))
        split = sharding.row_sharding(mesh)
        ids = jax.ShapeDtypeStruct((case.rows, case.seq + 1), jnp.int32, sharding=split)
        mask = jax.ShapeDtypeStruct((case.rows, case.seq), bool, sharding=split)
        frozen = teacher, data.Batch(ids, ids, mask)
        program = plan.compile_abstract(distill.step, (frozen, state), optimizer, objective)
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def table(title: str, rows: dict[str, Case], columns: dict[str, dict]) -> None:
    """Megabytes of a device, arguments + temporaries."""
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}", flush=True)
    for name, case in rows.items():
        cells = (sizes(dataclasses.replace(case, **change)) for change in columns.values())
        told = (f"{held / 1e6:,.0f} + {worked / 1e6:,.0f}" for held, worked in cells)
        print(f"| {name} | {' | '.join(told)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()

    processes.start(devices=max(COUNTS))
    plain = {shape: Case(shape) for shape in args.shapes}
    table(
        "Tokens of a row, 8 rows on one device.",
        plain, {str(seq): {"seq": seq} for seq in (128, 256, 512, 1024, 2048)},
    )  # fmt: skip
    table(
        "Words of the vocabulary, 8 x 128 on one device.",
        plain, {f"{k}k": {"vocab": k * 1024} for k in (32, 64, 128, 256)},
    )  # fmt: skip
    table(
        "Devices that share 8 x 128.",
        {
            f"{shape}, zero {zero}": Case(shape, zero=zero)
            for shape, zero in itertools.product(args.shapes, (3, 1))
        },
        {str(count): {"devices": count} for count in COUNTS},
    )
    table(
        "What the blocks compute again, and parts of the batch, 8 x 1024 on one device.",
        {shape: Case(shape, seq=1024) for shape in args.shapes},
        {
            "none": {}, "dots": {"remat": "dots"}, "full": {"remat": "full"},
            "full, 4 microbatches": {"remat": "full", "microbatches": 4},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
