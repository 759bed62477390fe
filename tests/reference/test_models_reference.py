"""Logits, gradients and saved folders against transformers."""

import itertools
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from variants import VARIANTS, build, older_dialect

import generate
import models
import mup
import student
from models import kernels
from models.bloom import alibi_slopes
from models.hub import leaves

pytestmark = pytest.mark.usefixtures("strict")

logits_of = eqx.filter_jit(lambda model, tokens: model(tokens))


def tokens_for(seed: int, shape=(2, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, shape)


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def ours(folder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(logits_of(models.load(folder), jnp.asarray(tokens)))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name, tmp_path):
    for seed in range(3):
        reference = build(name, seed)
        reference.save_pretrained(tmp_path)
        tokens = tokens_for(seed)
        expected = reference_logits(reference, tokens)
        assert np.abs(expected).max() > 1
        assert np.abs(ours(tmp_path, tokens) - expected).max() <= 1e-4
    if older_dialect(tmp_path):
        assert np.abs(ours(tmp_path, tokens) - expected).max() <= 1e-4


@pytest.mark.parametrize("name", ["llama-2", "qwen2-mixed"])
def test_logits_of_long_rows(name, tmp_path):
    """Attended to by blocks; the window of Qwen ends within one."""
    window = {"sliding_window": 700} if name == "qwen2-mixed" else {}
    reference = build(name, 0, max_position_embeddings=8192, **window)
    reference.save_pretrained(tmp_path)
    tokens = tokens_for(0, (1, 8192))
    assert kernels.choose(jnp.dtype("float32"), 8, 8192, False)[0] == "blockwise"
    expected = reference_logits(reference, tokens)
    assert np.abs(ours(tmp_path, tokens) - expected).max() <= 1e-4


def test_alibi_of_long_rows(tmp_path):
    """Transformers adds ALiBi by the position of the key and takes its softmax in float32: at 8,192
    tokens it is 1.3e-4 from what its layers compute around an attention in float64."""
    reference = build("bloom-6-heads", 0)
    reference.save_pretrained(tmp_path)
    tokens = tokens_for(0, (1, 8192))

    def attention(module, hidden_states, residual, *args, **kwargs):
        heads, head_dim = module.num_heads, module.head_dim
        qkv = module.query_key_value(hidden_states).view(8192, heads, 3, head_dim).double()
        mixed = torch.empty(8192, heads, head_dim, dtype=torch.float64)
        slopes = alibi_slopes(heads).tolist()
        for head, start in itertools.product(range(heads), range(0, 8192, 512)):
            query, end = qkv[start : start + 512, head, 0], start + 512
            distance = torch.arange(end) - torch.arange(start, end)[:, None]
            scores = query @ qkv[:end, head, 1].T * head_dim**-0.5 + slopes[head] * distance
            weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
            mixed[start:end, head] = weights @ qkv[:end, head, 2]
        return module.dense(mixed.view(1, 8192, -1).to(hidden_states.dtype)) + residual, None

    for block in reference.double().transformer.h:
        block.self_attention.forward = partial(attention, block.self_attention)
    expected = reference_logits(reference, tokens)
    assert np.abs(ours(tmp_path, tokens) - expected).max() <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folder_loads_in_transformers(name, tmp_path):
    reference = build(name, seed=3)
    reference.save_pretrained(tmp_path / "theirs")
    models.save(models.load(tmp_path / "theirs"), tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(reference)
    tokens = tokens_for(3)
    np.testing.assert_array_equal(
        reference_logits(back.eval(), tokens), reference_logits(reference, tokens)
    )


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"bloom-residual"}))
@pytest.mark.parametrize("how", student.GROWTH)
def test_grown_students_load_in_transformers(name, how, tmp_path):
    """With the logits of the shallow one, and the window of each block that was copied."""
    reference = build(name, seed=3)
    reference.save_pretrained(tmp_path / "theirs")
    deeper = student.grow(models.load(tmp_path / "theirs"), 7, how)
    models.save(deeper, tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert back.config.num_hidden_layers == 7
    tokens = tokens_for(3)
    expected = reference_logits(reference, tokens)
    assert np.abs(reference_logits(back.eval(), tokens) - expected).max() <= 1e-5


@pytest.mark.parametrize(
    "name", ["llama-2", "smollm2", "llama-biases", "mistral", "qwen2-mixed", "qwen3"]
)
@pytest.mark.parametrize("widths", [{"mlp": 20}, {"heads": 2}, {"kv_heads": 1}, {"embed": 20}])
def test_narrow_students_load_in_transformers(name, widths, tmp_path):
    build(name, seed=3).save_pretrained(tmp_path / "theirs")
    teacher, tokens = models.load(tmp_path / "theirs"), tokens_for(3)
    text = student.Calibration(jnp.asarray(tokens), jnp.ones_like(tokens), tokens >= 0)
    shape = student.narrowed(teacher.config, **widths)
    narrow = student.cut(teacher, student.choose_widths(teacher, shape, (0, 2), text))
    models.save(narrow, tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = reference_logits(back.eval(), tokens)
    assert np.abs(np.asarray(logits_of(narrow, tokens)) - expected).max() <= 1e-4
    assert np.abs(ours(tmp_path / "ours", tokens) - expected).max() <= 1e-4


@pytest.mark.parametrize("name", ["bloom", "llama-2", "llama-3.2-tied", "llama-biases", "qwen3"])
def test_fresh_students_in_mup_load_in_transformers(name, tmp_path):
    """Every multiplier is in their weights: transformers knows of none."""
    reference = build(name, seed=3)
    reference.save_pretrained(tmp_path / "theirs")
    shape, scaling = models.config(tmp_path / "theirs"), mup.Config(8)
    scaled = mup.initial(scaling, models.FAMILIES[shape.model_type](shape, jax.random.key(0)))
    models.save(scaled, tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = tokens_for(3)
    expected = reference_logits(back.eval(), tokens)
    assert np.abs(np.asarray(logits_of(scaled, tokens)) - expected).max() <= 1e-5
    assert np.abs(ours(tmp_path / "ours", tokens) - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["bloom", "bloom-residual", "llama-2", "llama-3.2-tied", "qwen3"])
def test_gradients_of_cross_entropy(name, tmp_path):
    reference = build(name, seed=0)
    reference.save_pretrained(tmp_path)
    tokens = tokens_for(0)
    reference(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    @eqx.filter_grad
    def gradient(model):
        logits = model(jnp.asarray(tokens))[:, :-1]
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens)[:, 1:])
        return jnp.mean(terms)

    gradients = gradient(models.load(tmp_path))
    compared = set()
    for leaf in leaves(gradients):
        parts = leaf.array if leaf.stacked else leaf.array[None]
        for name, part in zip(leaf.names, parts, strict=True):
            wanted, part = expected[name], np.asarray(part)
            error = np.abs(part.reshape(wanted.shape) - wanted)
            if name.endswith("query_key_value.bias"):  # keys shift all scores alike: zero, absolute
                heads = (-1, 3, part.shape[-1])
                error, scale = error.reshape(heads), np.abs(wanted).reshape(heads)
                assert error[:, 1].max() <= 1e-6
                assert error[:, [0, 2]].max() <= 1e-4 * scale[:, [0, 2]].max()
            elif name.endswith("k_proj.bias"):
                assert error.max() <= 1e-4 * max(np.abs(wanted).max(), 1e-2)
            else:
                assert error.max() <= 1e-4 * np.abs(wanted).max(), name
            compared.add(name)
    assert compared == set(expected)


def test_checkpoints_of_the_bare_bloom_decoder(tmp_path):
    """As the published ones are: no prefix, the older names of the config."""
    reference = build("bloom", seed=0)
    reference.transformer.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "word_embeddings.weight" in names
    tokens = tokens_for(0)
    expected = reference_logits(reference, tokens)
    assert np.abs(ours(tmp_path, tokens) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype, tmp_path):
    half = build("llama-2", seed=0).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {dtype}
    tokens = tokens_for(0)
    # Not half.float(): the rotary table of that model stays rounded.
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference_logits(reference.eval(), tokens)
    exact = np.asarray(logits_of(models.load(tmp_path, dtype="float32"), jnp.asarray(tokens)))
    assert np.abs(exact - expected).max() <= 1e-4
    computed = np.asarray(logits_of(model, jnp.asarray(tokens)))
    error = np.abs(computed - expected).mean()
    if dtype == "float16":  # for storage only: computed in float32
        assert error <= 1e-5
    else:
        with torch.no_grad():
            theirs = half(torch.tensor(tokens)).logits.float().numpy()
        assert 0 < error <= 1.2 * np.abs(theirs - expected).mean()


def test_the_embedded_teacher():
    folder = Path(__file__).parents[2] / "demo" / "teacher"
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(0, reference.config.vocab_size, (2, 128))
    expected = reference_logits(reference.eval(), tokens)
    model = models.load(folder, dtype="float32")
    logits = np.asarray(logits_of(model, jnp.asarray(tokens)))
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(expected).max() > 1


def test_dynamic_positions_of_a_long_prompt(tmp_path):
    """A prompt that is read in parts is continued as transformers continues it, read whole."""
    reference = build("llama-dynamic", seed=0)
    reference.save_pretrained(tmp_path)
    prompts = tokens_for(5, (16, 300))
    expected = reference_logits(reference, prompts)[:, -1].argmax(-1)
    new, _ = generate.sample(
        models.load(tmp_path), jnp.asarray(prompts), jnp.full(16, prompts.shape[1]),
        jax.random.key(0), generate.Decoding(1, generate.Sampling(temperature=0.0)),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(new)[:, -1], expected)


def test_sharded_checkpoints(tmp_path):
    reference = build("qwen2", seed=0)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = tokens_for(0)
    assert np.abs(ours(tmp_path, tokens) - reference_logits(reference, tokens)).max() <= 1e-4


def test_old_rotary_tables_are_ignored(tmp_path):
    reference = build("llama-1", seed=0)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, file)
    tokens = tokens_for(0)
    assert np.abs(ours(tmp_path, tokens) - reference_logits(reference, tokens)).max() <= 1e-4
