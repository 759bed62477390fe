"""Placement follows from axis names."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import sharding
from runtime.errors import UserError


class Part(eqx.Module):
    weight: Float[Array, "mlp embed"]
    bias: Float[Array, " mlp"] | None
    name: str = eqx.field(static=True, default="part")


class Whole(eqx.Module):
    embedding: Float[Array, "vocab embed"]
    blocks: Part


def whole(vocab=16, embed=8, mlp=24, layers=3) -> Whole:
    blocks = eqx.filter_vmap(lambda scale: Part(scale * jnp.ones((mlp, embed)), None))
    return Whole(jnp.ones((vocab, embed)), blocks(jnp.arange(1.0, layers + 1)))


def test_axes_are_read_from_annotations():
    axes = sharding.axes(whole())
    assert axes.embedding == ("vocab", "embed")
    assert axes.blocks.weight == ("layers", "mlp", "embed")
    assert axes.blocks.bias is None


def test_axes_are_found_inside_an_optimizer_state():
    model = whole()
    state = optax.adam(1e-3).init(model)
    assert sharding.axes(state)[0].mu.blocks.weight == ("layers", "mlp", "embed")
    assert sharding.axes(state)[0].count is None


@pytest.mark.parametrize(
    ("sizes", "names", "expected"),
    [
        ((1, 8, 1), "vocab embed", ["fsdp", ""]),
        ((2, 2, 2), "vocab embed", ["fsdp tensor", ""]),
        ((2, 2, 2), "layers mlp embed", ["", "tensor", "fsdp"]),
        ((2, 2, 2), "embed", ["fsdp"]),
        ((2, 2, 2), "heads 3 head_dim embed", ["tensor", "", "", "fsdp"]),
        ((2, 2, 2), "batch seq embed", ["data fsdp", "", ""]),
        ((2, 2, 2), "batch seq vocab", ["data fsdp", "", "tensor"]),
        ((2, 2, 2), "rows seq vocab", ["data", "", "fsdp tensor"]),
        ((8, 1, 1), "vocab embed", ["", ""]),
    ],
)
def test_each_mesh_axis_goes_to_the_first_axis_that_claims_it(sizes, names, expected):
    claims = sharding.claims(names.split(), sharding.make_mesh(*sizes))
    assert claims == [tuple(axes.split()) for axes in expected]


def test_shard_places_every_leaf():
    mesh, model = sharding.make_mesh(2, 2, 2), whole()
    placed = sharding.shard(model, sharding.specs(model, mesh))
    assert placed.embedding.addressable_shards[0].data.shape == (4, 8)
    assert placed.blocks.weight.addressable_shards[0].data.shape == (3, 12, 4)
    np.testing.assert_array_equal(placed.blocks.weight, model.blocks.weight)


def test_constrain_pins_inside_a_jitted_function():
    mesh = sharding.make_mesh(2, 4, 1)
    x = jnp.ones((8, 3, 5))
    pin = jax.jit(lambda x: sharding.constrain(x, "batch seq embed"))
    with jax.set_mesh(mesh):
        assert pin(x).addressable_shards[0].data.shape == (1, 3, 5)
        assert pin(x[:3]).addressable_shards[0].data.shape == (3, 3, 5)  # three rows stay whole
    assert sharding.constrain(x, "batch seq embed") is x


def test_few_key_heads_are_replicated():
    class Keys(eqx.Module):
        key: Float[Array, "kv_heads head_dim embed"]

    mesh = sharding.make_mesh(1, 2, 4)
    placed = sharding.specs(Keys(jnp.ones((2, 4, 8))), mesh).key
    assert placed.spec == P(None, None, ("fsdp",))


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(UserError) as error:
        sharding.specs(whole(mlp=27), sharding.make_mesh(1, 1, 8))
    text = str(error.value)
    assert "blocks.weight" in text and "27 mlp" in text and "tensor" in text and "3 there" in text


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (16, 1, 1)])
def test_meshes_that_do_not_match_the_devices(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(*sizes)


def test_what_is_left_goes_to_the_axis_that_asks():
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    two = sharding.make_mesh(devices=jax.devices()[:2])
    assert dict(two.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
