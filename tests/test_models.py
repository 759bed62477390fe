"""What holds for every model, and what transformers computed, kept as files."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import config
import models
import sharding
from models.attention import positions
from models.llama import Config, Llama
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict")

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())


def some(*names: str):
    folders = [path for path in FIXTURES if path.name in names]
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


every_fixture = some(*(path.name for path in FIXTURES))
# One of each way to tell positions, and a window. Dynamic ones follow the length of the row so far,
# so that a cache, which keeps earlier keys, cannot equal the full pass beyond the trained length.
NAMES = ("bloom-6-heads", "llama-yarn-mscale", "qwen2-mixed")
some_fixtures = some(*NAMES)

logits_of = eqx.filter_jit(
    lambda model, tokens, segments=None, **how: model(tokens, segments, **how)
)
hidden_of = eqx.filter_jit(lambda model, tokens, **how: model.hidden(tokens, **how))


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 96, shape))


load = functools.cache(models.load)


def block_by_block(model, x, here):
    position_inputs = model.position_inputs(here)
    for layer in range(model.config.layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
        x, _ = model.block(weights, x, here, position_inputs, jnp.array(layer), None)
    return model.final_norm(x)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


@every_fixture
def test_logits_of_transformers(folder):
    expected = load_file(folder / "expected.safetensors")
    logits = logits_of(load(folder), jnp.asarray(expected["tokens"]))
    assert logits.dtype == jnp.float32
    assert np.abs(expected["logits"]).max() > 1
    close(logits, expected["logits"], 1e-4)


@every_fixture
def test_the_future_does_not_leak_and_the_past_is_heard(folder):
    model, tokens = load(folder), random_tokens(2, 24)
    before, others = logits_of(model, tokens), (tokens + 1) % 96
    after = logits_of(model, tokens.at[:, 13:].set(others[:, 13:]))
    np.testing.assert_array_equal(after[:, :13], before[:, :13])
    assert (after[:, 13:] != before[:, 13:]).any(axis=-1).all()
    windows = [size for size in getattr(model.config, "windows", ()) if size]
    for at in range(12 if windows else 0, 13):
        after = logits_of(model, tokens.at[:, at].set(others[:, at]))
        assert (after[:, 12] != before[:, 12]).any(axis=-1).all()


@some_fixtures
def test_scan_is_an_explicit_loop_of_blocks(folder):
    model, tokens = load(folder), random_tokens(2, 20)
    x = model.embed_input(model.embedding[tokens].astype(jnp.float32))
    looped = eqx.filter_jit(block_by_block)(model, x, positions(tokens))
    close(hidden_of(model, tokens), looped)


@every_fixture
def test_packed_documents_are_separate_ones(folder):
    """Each alone is padded to the length of all: so one program does, and padding is tested too."""
    model, lengths = load(folder), (9, 1, 14)
    tokens = random_tokens(2, sum(lengths))
    segments = jnp.asarray(np.repeat([[1, 2, 3], [7, 1, 7]], lengths, axis=1))
    packed = logits_of(model, tokens, segments)
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        alone = jnp.roll(tokens, -start, axis=1)
        real = jnp.broadcast_to(jnp.arange(sum(lengths)) < length, tokens.shape).astype(int)
        close(packed[:, start : start + length], logits_of(model, alone, real)[:, :length])


@some(*NAMES, "llama-dynamic")
def test_padding_changes_nothing(folder):
    model, tokens = load(folder), random_tokens(2, 20)
    padded = jnp.concatenate([tokens, jnp.zeros((2, 4), tokens.dtype)], axis=1)
    segments = jnp.asarray(np.repeat([[1, 0]], [20, 4], axis=1).repeat(2, axis=0))
    alone = logits_of(model, tokens)
    close(logits_of(model, padded, segments)[:, :20], alone)
    if folder.name != "llama-dynamic":  # its rows, told nothing, are as long as their padding
        close(logits_of(model, padded)[:, :20], alone)


@some_fixtures
def test_cached_decoding_is_the_full_pass(folder):
    """Rows of different lengths: a ragged prefill of many tokens, then one at a time."""
    model, lengths, extra = load(folder), np.array([11, 3, 7]), 6
    tokens = random_tokens(3, 11 + extra)
    full = hidden_of(model, tokens)
    prompts = jnp.asarray((np.arange(11) < lengths[:, None]).astype(np.int32))
    cache = model.cache(3, 11 + extra)
    # Twice in parts: what the first left behind its rows must be overwritten.
    first, cache = hidden_of(model, tokens[:, :2], cache=cache)
    rest = prompts[:, 2:]
    second, cache = hidden_of(model, tokens[:, 2:11], segments=rest, cache=cache)
    np.testing.assert_array_equal(cache.length, lengths)
    cached = jnp.concatenate([first, second], axis=1)
    for row, length in enumerate(lengths):
        close(cached[row, :length], full[row, :length])
    for step in range(extra):
        at = jnp.asarray(lengths + step)
        one, cache = hidden_of(model, tokens[jnp.arange(3), at][:, None], cache=cache)
        close(one[:, 0], full[jnp.arange(3), at])


@some_fixtures
def test_a_cache_is_read_as_far_as_it_is_filled(folder):
    model, tokens = load(folder), random_tokens(2, 70)
    full = hidden_of(model, tokens)
    _, begun = hidden_of(model, tokens[:, :31], cache=model.cache(2, 70))
    cache = begun
    for at in range(31, 70):
        one, cache = hidden_of(model, tokens[:, at : at + 1], cache=cache)
        close(one[:, 0], full[:, at])
    poisoned = begun.replace(
        begun.keys.at[..., 32:].set(jnp.nan), begun.values.at[..., 32:, :].set(jnp.nan)
    )
    one, first = hidden_of(model, tokens[:, 31:32], cache=poisoned.first(32))
    close(one[:, 0], full[:, 31])
    one, _ = hidden_of(model, tokens[:, 32:33], cache=poisoned.with_first(first))
    assert jnp.isnan(one).any()  # so what is read would be seen


def test_dynamic_rotary_cache_within_the_trained_length():
    folder = Path(__file__).parent / "fixtures" / "llama-dynamic"
    model, tokens = load(folder), random_tokens(2, 16)
    _, cache = hidden_of(model, tokens[:, :15], cache=model.cache(2, 16))
    one, _ = hidden_of(model, tokens[:, 15:], cache=cache)
    close(one[:, 0], hidden_of(model, tokens)[:, 15])


@some_fixtures
def test_remat_changes_nothing(folder):
    model, tokens = load(folder), random_tokens(2, 20)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, remat):
        return jnp.mean(model.hidden(tokens, remat=remat) ** 2)

    plain = loss(model, "none")
    dynamic, static = eqx.partition(model, eqx.is_array)
    for remat in ("dots", "full"):
        jax.tree.map(close, plain, loss(model, remat))
        forward = lambda x, remat=remat: loss.__wrapped__(eqx.combine(x, static), remat)  # noqa: E731
        program = str(jax.make_jaxpr(forward)(dynamic))
        assert "remat" in program or "checkpoint" in program


@some_fixtures
def test_half_precision_stays_near(folder):
    model, tokens = load(folder), random_tokens(2, 20)
    x = hidden_of(model, tokens, dtype="bfloat16")
    assert x.dtype == jnp.bfloat16
    exact = hidden_of(model, tokens)
    error = jnp.abs(x.astype(jnp.float32) - exact)
    assert 0 < jnp.mean(error) < 0.03 * jnp.mean(jnp.abs(exact))
    half = models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    error = jnp.abs(hidden_of(half, tokens, dtype="float32") - exact)
    assert 0 < jnp.mean(error) < 0.03 * jnp.mean(jnp.abs(exact))


@every_fixture
def test_saved_and_loaded_again_is_bit_equal(folder, tmp_path):
    model = load(folder)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again")
    assert eqx.tree_equal(model, again)
    models.save(model, tmp_path / "shards", shard_size=30_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    assert eqx.tree_equal(model, models.load(tmp_path / "shards"))


@some_fixtures
def test_on_a_mesh(folder, tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    whole, tokens = load(folder), random_tokens(8, 20)
    model = models.load(folder, mesh=mesh)
    for leaf, axes in zip(
        jax.tree.leaves(model), jax.tree.leaves(sharding.axes(model), is_leaf=is_names), strict=True
    ):
        fsdp = "embed" in axes or "vocab" in axes
        tensor = {"vocab", "heads", "kv_heads", "mlp"} & set(axes)
        parts = (2 if fsdp else 1) * (2 if tensor else 1)
        held = {shard.data.size for shard in leaf.addressable_shards}
        assert held == {leaf.size // parts}, axes
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) > 0
    batch = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        logits = logits_of(model, jax.device_put(tokens, batch))
    close(logits, logits_of(whole, tokens))
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(model, eqx.is_array), whole)
    models.save(model, tmp_path / "saved")
    models.save(whole, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes()


def is_names(node) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def test_the_program_does_not_grow_with_depth():
    def program(layers: int) -> str:
        config = Config(96, 32, 48, layers, heads=4, kv_heads=2, head_dim=8)
        abstract = eqx.filter_eval_shape(Llama, config, jax.random.key(0))
        dynamic, static = eqx.partition(abstract, lambda leaf: hasattr(leaf, "shape"))
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        forward = jax.jit(lambda arrays, tokens: eqx.combine(arrays, static)(tokens))
        return forward.lower(dynamic, tokens).as_text()

    assert len(program(4).splitlines()) == len(program(48).splitlines())


def test_fresh_weights_of_every_family():
    """Drawn anew for each block, the same for the same key, and with outputs near zero."""
    for name in ("bloom", "llama-biases", "llama-3.2-tied", "qwen3"):
        folder = FIXTURES[0].parent / name
        config = load(folder).config
        make = eqx.filter_jit(models.FAMILIES[config.model_type])
        model = make(config, jax.random.key(1))
        assert jax.tree.structure(model) == jax.tree.structure(load(folder))
        assert not jnp.array_equal(model.blocks.up[0], model.blocks.up[1])
        assert eqx.tree_equal(model, make(config, jax.random.key(1)))
        logits = logits_of(model, random_tokens(2, 20))
        assert 0 < jnp.std(logits) < 1


def test_dynamic_positions_of_a_prompt_that_is_read_in_parts():
    """The base follows the whole prompt, also where only a part of it is there."""
    model = models.load(FIXTURES[0].parent / "llama-dynamic")
    tokens, lengths = random_tokens(2, 40), jnp.array([40, 27])
    real = (jnp.arange(40) < lengths[:, None]).astype(jnp.int32)
    cache, parts = model.cache(2, 40), []
    for part in (slice(0, 16), slice(16, 40)):
        how = {"segments": real[:, part], "cache": cache, "doc_length": lengths}
        hidden, cache = hidden_of(model, tokens[:, part], **how)
        parts.append(hidden)
    together = jnp.concatenate(parts, axis=1)
    for row, length in enumerate(lengths.tolist()):
        close(together[row, :length], hidden_of(model, tokens[row : row + 1, :length])[0])


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        # As Qwen2.5 and Qwen3 say how to go beyond what they were trained on.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16}, 32),
        ({"type": "dynamic", "factor": 2.0}, 64),
        ({"type": "linear", "factor": 2.0}, 32),
        (LLAMA3, 32),
    ],
)
def test_how_many_positions_a_model_is_made_for(tmp_path, scaling, longest):
    shutil.copytree(FIXTURES[0].parent / "llama-2", tmp_path / "x")
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    raw |= {"max_position_embeddings": 32, "rope_scaling": scaling}
    raw.pop("rope_parameters")
    (tmp_path / "x" / "config.json").write_text(json.dumps(raw))
    assert models.config(tmp_path / "x").longest == longest
    run = config.Config(teacher=str(tmp_path / "x"), seq_len=longest)
    assert config.with_defaults(run).seq_len == longest
    with pytest.raises(UserError, match=f"made for {longest} positions"):
        config.with_defaults(dataclasses.replace(run, seq_len=longest + 1))
