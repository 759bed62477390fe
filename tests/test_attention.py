"""Attention by blocks and by kernels is the dense one, and documents do not see each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from models import kernels
from models.attention import attention, positions
from models.bloom import alibi_slopes
from runtime.errors import UserError


def inputs(batch, seq, heads, kv_heads, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    counts = heads, kv_heads, kv_heads, heads
    return [
        jax.random.normal(key, (batch, seq, count, width), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]


def documents(batch, seq, mean=60):
    """Documents of about `mean` tokens, and padding at the end."""
    segments = np.cumsum(np.random.default_rng(1).random((batch, seq)) < 1 / mean, axis=1) + 1
    segments[:, -seq // 9 :] = 0
    return jnp.asarray(segments)


def call(name, query, key, value, segments=None, window=None, slopes=None):
    where = positions(jnp.zeros(query.shape[:2], jnp.int32), segments)
    with sharding.in_scope(sharding.Layout(attention=name)):
        layer, windows = jnp.array(1), (None, window)
        return attention(
            query, key, value, where, layer, None, windows=windows, slopes=slopes
        )[0]  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def with_gradients(function, name, query, key, value, gradient, **settings):
    mixed, pull = jax.vjp(partial(function, name, **settings), query, key, value)
    return mixed, *pull(gradient)


def distance(results, expected):
    return max(
        float(jnp.linalg.norm((x - y).astype(jnp.float32)) / jnp.linalg.norm(y.astype(jnp.float32)))
        for x, y in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize(
    "heads, kv_heads, width, packed, window, alibi",
    [
        (8, 2, 64, True, None, False),
        (4, 2, 80, True, 100, False),
        (2, 1, 128, False, 70, False),
        (12, 12, 20, True, None, True),
    ],
)
def test_blocks_are_the_dense_attention(heads, kv_heads, width, packed, window, alibi):
    arrays = inputs(2, 300, heads, kv_heads, width)
    settings = {"segments": documents(2, 300) if packed else None}
    settings["slopes"] = jnp.asarray(alibi_slopes(heads)) if alibi else None
    function = partial(call, window=window)
    expected = with_gradients(function, "dense", *arrays, **settings)
    assert distance(with_gradients(function, "blockwise", *arrays, **settings), expected) < 1e-6
    if width == 64:  # in bfloat16 as far from float32 as its own rounding
        half = [x.astype(jnp.bfloat16) for x in arrays]
        assert distance(with_gradients(function, "blockwise", *half, **settings), expected) < 1.5e-2


@pytest.mark.parametrize(
    "packed, window, alibi", [(True, None, False), (False, 70, False), (True, None, True)]
)
def test_splash_is_the_dense_attention(packed, window, alibi):
    arrays = inputs(2, 200, 4, 4 if alibi else 2, 20)
    segments = documents(2, 200) if packed else None
    slopes = jnp.asarray(alibi_slopes(4)) if alibi else None
    where = positions(jnp.zeros((2, 200), jnp.int32), segments).position

    def splash(name, query, key, value):
        settings = dict(packed=packed, window=window, interpret=True)
        return kernels.splash(query, key, value, where, slopes, **settings)

    def dense(name, *arrays):
        return call(name, *arrays, segments, window, slopes)

    expected = with_gradients(dense, "dense", *arrays)
    assert distance(with_gradients(splash, "splash", *arrays), expected) < 1e-5
    half = [x.astype(jnp.bfloat16) for x in arrays]
    with jax.default_matmul_precision("highest"):  # which Mosaic refuses for them
        program = str(jax.make_jaxpr(partial(with_gradients, splash, "splash"))(*half))
    assert "Precision.DEFAULT" in program and "Precision.HIGHEST" not in program


@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_a_document_does_not_see_another(name):
    query, key, value, _ = inputs(1, 300, 4, 2, 20)
    segments = jnp.asarray(np.repeat([1, 2, 3], 100))[None]
    changed = [x.at[:, 150].add(3.0) for x in (query, key, value)]
    before, after = (
        call(name, *arrays, segments) for arrays in ((query, key, value), changed)
    )  # fmt: skip
    same = np.asarray(before == after).all(axis=(0, 2, 3))
    assert same[:150].all() and same[200:].all() and not same[150:200].any()


def test_each_device_attends_to_its_own_rows_and_heads():
    arrays = inputs(4, 300, 8, 4, 20)
    settings, windowed = {"segments": documents(4, 300)}, partial(call, window=90)
    expected = with_gradients(windowed, "blockwise", *arrays, **settings)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with sharding.use_mesh(mesh):
        rows, heads = sharding.claims(["batch", "heads"], mesh)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(rows, None, heads))
        arrays = jax.device_put(arrays, place)
        program = with_gradients.lower(windowed, "blockwise", *arrays, **settings).compile()
        results = program(*arrays, **settings)
    assert distance(results, expected) < 1e-6
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()


def test_positions_of_keys_penalise_as_distances_do():
    """In bfloat16 eight dimensions hold slope x position to the accuracy of float32."""
    slopes = jnp.asarray(alibi_slopes(12))
    position = jnp.asarray([[0, 1, 255, 256, 4095, 32767]])
    query, key = (jnp.zeros((1, 6, 12, 8), jnp.bfloat16) for _ in range(2))
    query, key = kernels.with_alibi(query, key, position, slopes)
    scores = jnp.einsum("bqhd,bkhd->bhqk", *(x.astype(jnp.float32) for x in (query, key)))
    expected = np.asarray(slopes)[:, None, None] * np.asarray(position)[:, None]
    np.testing.assert_allclose(scores[0], np.broadcast_to(expected, scores[0].shape), rtol=2e-7)


@pytest.mark.parametrize(
    "device, dtype, head_dim, seq, expected",
    [
        (("gpu", "NVIDIA H100 80GB HBM3"), "bfloat16", 64, 128, "cudnn"),
        (("gpu", "NVIDIA GH200 480GB"), "bfloat16", 256, 128, "cudnn"),
        (("gpu", "NVIDIA B200"), "bfloat16", 64, 128, "cudnn"),
        (("gpu", "NVIDIA H100 80GB HBM3"), "bfloat16", 20, 128, "blockwise"),
        (("gpu", "NVIDIA H100 80GB HBM3"), "float32", 64, 128, "blockwise"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), "bfloat16", 64, 128, "blockwise"),
        (("tpu", "TPU v5p"), "bfloat16", 64, 128, "splash"),
        (("cpu", "cpu"), "float32", 64, 128, "dense"),
        (("cpu", "cpu"), "float32", 64, 4096, "blockwise"),
    ],
)
def test_the_devices_choose_what_attends(monkeypatch, device, dtype, head_dim, seq, expected):
    monkeypatch.setattr(sharding, "device", lambda: device)
    name, reason = kernels.choose(jnp.dtype(dtype), head_dim, seq, False)
    assert name == expected
    assert bool(reason) == (device[0] == "gpu" and name == "blockwise")


def test_a_kernel_of_other_devices_is_refused():
    layout = sharding.Layout(attention="cudnn")
    with sharding.in_scope(layout), pytest.raises(UserError, match="does not run there"):
        kernels.choose(jnp.dtype("bfloat16"), 64, 128, False)
