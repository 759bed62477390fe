"""Plans for chips that are not here: what is refused, and what a program's text is reckoned at."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_distill import config, teacher, text  # noqa: F401

import distill
import sharding
from config import with_defaults
from models import kernels
from runtime import errors, prepare, roofline, topology
from runtime.errors import UserError

PEAK, BANDWIDTH = 1e12, 1e9


def cost(function, *shapes) -> roofline.Cost:
    return roofline.cost(jax.jit(function).lower(*shapes).compile().as_text(), PEAK, BANDWIDTH)


def test_products_of_a_loop_count_at_every_turn():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    weights = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)

    def blocks(x, weights):
        with jax.named_scope("teacher"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    result = cost(blocks, x, weights)
    assert result.flops == 7 * 2 * 64 * 32 * 32 and result.sent == 0
    # Every kernel is bound by its bytes here: a turn reads at least its weight, and both states.
    assert result.seconds["teacher"] >= 7 * 4 * (2 * 64 * 32 + 32 * 32) / BANDWIDTH
    assert result.least < 3 * result.seconds["teacher"]


def test_as_much_as_xla_counts_itself():
    a, b = (jax.ShapeDtypeStruct((256, 256), jnp.float32) for _ in range(2))
    program = jax.jit(lambda a, b: a @ b @ b).lower(a, b).compile()
    ours = roofline.cost(program.as_text(), PEAK, BANDWIDTH)
    assert ours.flops == program.cost_analysis()["flops"]


def test_what_devices_send_each_other():
    mesh = sharding.make_mesh()
    split, whole = (NamedSharding(mesh, PartitionSpec(x)) for x in ("fsdp", None))
    x = jax.ShapeDtypeStruct((1024, 16), jnp.float32, sharding=split)
    gather = jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile()
    assert roofline.cost(gather.as_text(), PEAK, BANDWIDTH).sent == 1024 * 16 * 4
    reduce = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()
    assert roofline.cost(reduce.as_text(), PEAK, BANDWIDTH).sent == 2 * 16 * 4


@pytest.mark.parametrize(
    "name", ["x100:8", "h100", "h100:0", "h100:2x2", "v5p", "v5p:8", "v5p:2x0", "v5p:"]
)
def test_a_topology_that_is_none(name):
    with pytest.raises(UserError, match=re.escape(f"--topology {name}: expected h100:8 or v5p")):
        topology.parse(name)


@pytest.mark.parametrize("name, extra", [("h100:8", "cuda"), ("v5e:2x2", "tpu")])
def test_a_compiler_that_is_not_installed(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{name}: its compiler is not installed.*\[{extra}\]"):
        topology.devices(name)


def test_gpus_stand_in_nodes(monkeypatch):
    asked = []
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology, "_believe_in_cudnn", lambda: None)

    def describe(*args, **settings):
        asked.append(settings)
        raise ValueError("no such chip\nand much more")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", describe)
    for name in ("h100:4", "a100:16"):
        with pytest.raises(UserError, match=f"{name}: its compiler refuses it: no such chip$"):
            topology.devices(name)
    assert [settings["topology"] for settings in asked] == ["1x1x4", "1x2x8"]
    assert "major: 8" in asked[1]["target_config"] and "A100" in asked[1]["target_config"]
    with pytest.raises(UserError, match="h100:12: beyond 8 GPUs, a multiple of 8"):
        topology.devices("h100:12")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--topology", "h100:8"], "--topology without --plan"),
        (["--topology", "h100:8", "--plan", "--devices", "8"], "--topology with --devices"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        errors.cli(distill.Config, words)


def test_gpus_add_in_one_order_where_that_is_asked_for(config, monkeypatch):
    asked = dataclasses.replace(with_defaults(config), deterministic=True)
    layout = prepare.placement(asked).layout
    monkeypatch.setattr(sharding, "device", lambda: ("gpu", "NVIDIA H100"))
    assert sharding.compiler_options() == {}
    with sharding.in_scope(layout):
        assert sharding.compiler_options() == {"xla_gpu_deterministic_ops": True}
        # Its backward pass would take 280 GB for 8 rows of 4,096 tokens.
        assert kernels.choose(jnp.dtype("bfloat16"), 64, 4096, False) == (
            "blockwise", "cuDNN adds in one order only with memory for every document of a row"
        )  # fmt: skip
    assert kernels.choose(jnp.dtype("bfloat16"), 64, 4096, False) == ("cudnn", "")


def test_a_plan_for_chips_of_another_kind(config, monkeypatch, capsys):
    """With the devices of this machine in the place of theirs."""
    monkeypatch.setattr(topology, "devices", lambda name: jax.devices())
    slow = topology.CHIPS["h100"]._replace(peak=1e10, bandwidth=1e8, links=1e8)
    monkeypatch.setitem(topology.CHIPS, "h100", slow)
    planned = dataclasses.replace(config, plan=True, quiet=False, topology="h100:8")
    distill.train(planned)
    said = capsys.readouterr().out
    assert "85.0 GB  h100:8" in said and "it fits" in said
    least, tokens = re.search(r"faster than ([\d.]+) ms: ([\d,]+) tokens/s", said).groups()
    assert float(tokens.replace(",", "")) == pytest.approx(8 * 32 / float(least) * 1e3, rel=0.2)
    assert all(re.search(rf"^  {part} +[\d.]+ ms$", said, re.M) for part in ("teacher", "update"))
    distill.train(dataclasses.replace(planned, topology="v5p:2x2x2"))
    assert re.search(r"products +[\d.]+ ms\n  its products at 459 TFLOP/s", capsys.readouterr().out)
