"""Checkpoints from strangers: what is wrong is answered in one line that names file and cause."""

import json
import math
import os
import resource
import struct

import jax
import numpy as np
import pytest

import models
from models import hub
from runtime.errors import UserError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
QWEN2 = LLAMA | {"model_type": "qwen2"}
BLOOM = {"model_type": "bloom", "vocab_size": 8, "n_embed": 4, "n_layer": 1, "n_head": 2}
BASES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "bloom": BLOOM}
DELETED = object()

LAYER = "model.layers.0."
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    LAYER + "input_layernorm.weight": (4,),
    LAYER + "self_attn.q_proj.weight": (4, 4),
    LAYER + "self_attn.k_proj.weight": (2, 4),
    LAYER + "self_attn.v_proj.weight": (2, 4),
    LAYER + "self_attn.o_proj.weight": (4, 4),
    LAYER + "post_attention_layernorm.weight": (4,),
    LAYER + "mlp.gate_proj.weight": (6, 4),
    LAYER + "mlp.up_proj.weight": (6, 4),
    LAYER + "mlp.down_proj.weight": (4, 6),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
BLOOM_SHAPES = {
    "word_embeddings.weight": (8, 4),
    "word_embeddings_layernorm.weight": (4,),
    "word_embeddings_layernorm.bias": (4,),
    "h.0.input_layernorm.weight": (4,),
    "h.0.input_layernorm.bias": (4,),
    "h.0.self_attention.query_key_value.weight": (12, 4),
    "h.0.self_attention.query_key_value.bias": (12,),
    "h.0.self_attention.dense.weight": (4, 4),
    "h.0.self_attention.dense.bias": (4,),
    "h.0.post_attention_layernorm.weight": (4,),
    "h.0.post_attention_layernorm.bias": (4,),
    "h.0.mlp.dense_h_to_4h.weight": (16, 4),
    "h.0.mlp.dense_h_to_4h.bias": (16,),
    "h.0.mlp.dense_4h_to_h.weight": (4, 16),
    "h.0.mlp.dense_4h_to_h.bias": (4,),
    "ln_f.weight": (4,),
    "ln_f.bias": (4,),
}
SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "BOOL": 1}


# ---- files, byte by byte -------------------------------------------------------------------------


def tensors_of(shapes):
    """Each tensor as its dtype, shape and bytes, which differ from tensor to tensor."""
    draw = np.random.default_rng(0)
    return {
        name: ("F32", shape, draw.normal(size=shape).astype(np.float32).tobytes())
        for name, shape in shapes.items()
    }


def blank(dtype, *shape):
    return dtype, shape, bytes(SIZES[dtype] * math.prod(shape))


def layout(tensors):
    """The header of a safetensors file as an object, and the bytes behind it."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    return header, data


def write_raw(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_raw(folder / "model.safetensors", *layout(tensors))
    return folder


def change(base, changes):
    return {name: value for name, value in (base | changes).items() if value is not DELETED}


def refused(source, *words):
    """What `load` answers: one line that can be printed anywhere, and names what it is about."""
    with pytest.raises(UserError) as caught:
        models.load(source)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 800
    for word in words:
        assert str(word) in text, text
    return text


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama", LLAMA, tensors_of(LLAMA_SHAPES))


@pytest.fixture
def weights(llama):
    return llama / "model.safetensors"


def same(model, other):
    """Equal configs and equal bits: nothing of a model is computed from anything else."""
    assert model.config == other.config
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["/no/such/folder", "./no-such", "../no-such", "a/b/c", "@main", "-x/y z", "~nobody-here/x"]
    + ["nul\0l/x", "https://huggingface.co/owner/name", "x" * 5000, "a..b/c", "owner/name.git"],
)
def test_a_source_that_is_neither_folder_nor_hub_id(source):
    with pytest.raises(UserError, match="no (such )?folder") as caught:
        models.load(source)
    assert str(caught.value).isprintable()


def test_a_source_without_a_checkpoint(llama, weights, tmp_path):
    refused(weights, weights, "no such folder")
    refused(tmp_path, tmp_path / "config.json", "no such file")
    weights.unlink()
    refused(llama, llama, "model.safetensors")
    weights.symlink_to(llama / "gone")
    refused(llama, "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pth"])
def test_only_pickles(llama, weights, name):
    weights.unlink()
    (llama / name).write_bytes(b"\x80\x02}q\x00.")
    refused(llama, llama, name, "pickle", "safetensors", "save_pretrained")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_place_of_a_file(llama, name):
    (llama / name).unlink()
    (llama / name).mkdir()
    refused(llama, llama / name)


# ---- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMA_SHAPES)
def test_a_missing_tensor(tmp_path, name):
    tensors = tensors_of(LLAMA_SHAPES)
    del tensors[name]
    refused(write(tmp_path / "x", LLAMA, tensors), tmp_path / "x", name, "missing")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.bias", "model.layers.1.x", "other"])
def test_an_extra_tensor(tmp_path, name):
    tensors = tensors_of(LLAMA_SHAPES) | {name: blank("F32", 6)}
    folder = write(tmp_path / "x", LLAMA, tensors)
    refused(folder, folder / "model.safetensors", name)


def test_an_extra_tensor_whose_name_would_break_the_line(tmp_path):
    tensors = tensors_of(LLAMA_SHAPES) | {"model.a\nb\x1b[2J": blank("F32", 6)}
    refused(write(tmp_path / "x", LLAMA, tensors), "model.safetensors", "a b\\x1b")


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1), (16,), (4, 5), (2, 4), (), (0, 4)])
def test_a_misshapen_tensor(tmp_path, shape):
    name = LAYER + "self_attn.q_proj.weight"
    folder = write(tmp_path / "x", LLAMA, tensors_of(LLAMA_SHAPES) | {name: blank("F32", *shape)})
    refused(folder, folder / "model.safetensors", name, shape, (4, 4))


@pytest.mark.parametrize("dtype", ["I64", "F64", "F8_E4M3", "BOOL"])
def test_a_tensor_of_another_type(tmp_path, dtype):
    name = "model.norm.weight"
    folder = write(tmp_path / "x", LLAMA, tensors_of(LLAMA_SHAPES) | {name: blank(dtype, 4)})
    refused(folder, folder / "model.safetensors", name, dtype, "BF16")


def test_a_stored_head_that_is_tied(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = tensors_of(LLAMA_SHAPES)
    without = write(tmp_path / "without", tied, change(tensors, {"lm_head.weight": DELETED}))
    equal = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    model = models.load(write(tmp_path / "equal", tied, equal))
    same(model, models.load(without))
    assert model.head is None

    differs = write(tmp_path / "differs", tied, tensors)
    refused(differs, differs / "model.safetensors", "lm_head.weight", "differs")
    last = bytearray(tensors["model.embed_tokens.weight"][2])
    last[-1] ^= 1
    almost = tensors | {"lm_head.weight": ("F32", (8, 4), bytes(last))}
    refused(write(tmp_path / "almost", tied, almost), "lm_head.weight", "differs")
    longer = tensors | {"lm_head.weight": blank("F32", 9, 4)}
    refused(write(tmp_path / "longer", tied, longer), "lm_head.weight", "differs")
    flat = tensors | {"lm_head.weight": blank("F32", 32)}
    refused(write(tmp_path / "flat", tied, flat), "lm_head.weight", "differs")


def test_stored_rotary_tables_are_ignored(tmp_path, llama):
    tables = {LAYER + "self_attn.rotary_emb.inv_freq": blank("F32", 1)}
    stored = write(tmp_path / "x", LLAMA, tensors_of(LLAMA_SHAPES) | tables)
    same(models.load(stored), models.load(llama))


def test_names_with_and_without_prefix(tmp_path, llama):
    tensors = tensors_of(BLOOM_SHAPES)
    bare = models.load(write(tmp_path / "bare", BLOOM, tensors))
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    same(bare, models.load(write(tmp_path / "prefixed", BLOOM, prefixed)))
    headed = prefixed | {"lm_head.weight": tensors["word_embeddings.weight"]}
    same(bare, models.load(write(tmp_path / "headed", BLOOM, headed)))
    decoder = {name.removeprefix("model."): t for name, t in tensors_of(LLAMA_SHAPES).items()}
    same(models.load(llama), models.load(write(tmp_path / "decoder", LLAMA, decoder)))
    both = tensors | prefixed
    refused(write(tmp_path / "both", BLOOM, both), "model.safetensors", "word_embeddings")


# ---- safetensors files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -1, -4, -100])
def test_a_truncated_file(llama, weights, kept):
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(llama, weights)


def test_a_file_with_something_behind_its_tensors(llama, weights):
    weights.write_bytes(weights.read_bytes() + b"more")
    refused(llama, weights)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**31, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1])
def test_a_header_of_another_length(llama, weights, length):
    write_raw(weights, *layout(tensors_of(LLAMA_SHAPES)), length=length)
    refused(llama, weights)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe{}", b"not json", b"[" * 10**5, b"{}"]
    + [b'{"a":' * 5000, b'{"x": 1}', b'{"x": {}}', b'{"x": {"dtype": "F32"}}', b"\x80\x04}."],
)
def test_a_header_that_is_none(llama, weights, header):
    write_raw(weights, header, bytes(64))
    refused(llama, llama)


def lie(**fields):
    return lambda entry: entry | fields


LIES = {
    "offsets beyond the file": lie(data_offsets=[0, 10**9]),
    "far beyond": lie(data_offsets=[2**63, 2**63 + 128]),
    "one byte early": lie(data_offsets=[0, 127]),
    "empty": lie(data_offsets=[0, 0]),
    "backwards": lie(data_offsets=[128, 0]),
    "a gap": lie(data_offsets=[4, 132]),
    "negative": lie(data_offsets=[-128, 0]),
    "fractions": lie(data_offsets=[0.0, 128.0]),
    "three offsets": lie(data_offsets=[0, 64, 128]),
    "no offsets": lie(data_offsets=None),
    "a larger shape": lie(shape=[8, 5]),
    "a smaller shape": lie(shape=[8, 3]),
    "a negative shape": lie(shape=[-8, -4]),
    "a shape of text": lie(shape=["8", "4"]),
    "a shape that overflows": lie(shape=[2**62, 2**62 + 8, 4]),
    "a shape that wraps around to the size": lie(shape=[2**32, 2**32, 8, 4]),
    "no shape": lie(shape=None),
    "another dtype": lie(dtype="F16"),
    "an unknown dtype": lie(dtype="F31"),
    "a dtype that is no text": lie(dtype=32),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(llama, weights, case):
    header, data = layout(tensors_of(LLAMA_SHAPES))
    name = "model.embed_tokens.weight"
    assert header[name]["data_offsets"] == [0, 128]
    header[name] = LIES[case](header[name])
    write_raw(weights, header, data)
    refused(llama, weights)


def test_a_lie_about_a_tensor_whose_name_would_break_the_line(llama, weights):
    header, data = layout({"a\nb\x1b[2J": blank("F32", 4)})
    header["a\nb\x1b[2J"]["data_offsets"] = [0, 12]
    write_raw(weights, header, data)
    refused(llama, weights)


def test_tensors_that_overlap(llama, weights):
    header, data = layout(tensors_of(LLAMA_SHAPES))
    up, gate = LAYER + "mlp.up_proj.weight", LAYER + "mlp.gate_proj.weight"
    header[up]["data_offsets"] = header[gate]["data_offsets"]
    write_raw(weights, header, data)
    refused(llama, weights)


def test_a_tensor_that_is_there_twice(llama, weights):
    header, data = layout(tensors_of(LLAMA_SHAPES))
    for entry, more in (
        (header["model.norm.weight"] | {"data_offsets": [len(data), len(data) + 16]}, bytes(16)),
        (header["model.norm.weight"] | {"shape": [2, 2]}, b""),
    ):
        text = json.dumps(header)[:-1] + ', "model.norm.weight": ' + json.dumps(entry) + "}"
        write_raw(weights, text.encode(), data + more)
        refused(llama, weights)


# ---- shards --------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def shards(llama, weights):
    """A folder of two shards, and the map that its index holds."""
    weights.unlink()
    tensors = tensors_of(LLAMA_SHAPES)
    where = {name: PARTS[i % 2] for i, name in enumerate(tensors)}
    for part in PARTS:
        own = {name: tensor for name, tensor in tensors.items() if where[name] == part}
        write_raw(llama / part, *layout(own))
    write_index(llama, where)
    return llama, where


def write_index(folder, where):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_two_shards_are_one_model(shards, tmp_path):
    whole = write(tmp_path / "whole", LLAMA, tensors_of(LLAMA_SHAPES))
    same(models.load(shards[0]), models.load(whole))


def test_a_shard_that_is_cut_or_missing(shards):
    folder, where = shards
    write_index(folder, where | {"model.norm.weight": "sub/x.safetensors"})
    refused(folder, folder / "sub" / "x.safetensors", "No such file")
    write_index(folder, where)
    (folder / PARTS[1]).write_bytes((folder / PARTS[1]).read_bytes()[:-1])
    refused(folder, folder / PARTS[1])
    (folder / PARTS[1]).unlink()
    refused(folder, PARTS[1], "No such file")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "", "."]
    + ["..", "pytorch_model.bin", "a\0.safetensors", "\ud800.safetensors", "x\ny.safetensors"]
    + ["x" * 5000 + ".safetensors", ".safetensors", 7, None, ["a"], {"a": "b"}, True],
    ids=lambda name: repr(name)[:20],
)
def test_an_index_that_names_no_shard_beside_it(shards, name):
    folder, where = shards
    outside = tensors_of({"model.norm.weight": (4,)})
    write_raw(folder.parent / "outside.safetensors", *layout(outside))
    write_index(folder, where | {"model.norm.weight": name})
    refused(folder, folder / INDEX)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"weight_map": null}', '{"weight_map": []}', "[" * 10**5]
    + ['{"weight_map": "model.safetensors"}', '{"weight_map": {}}', '{"weight_map": {"x": []}}'],
    ids=lambda text: text[:24],
)
def test_an_index_that_is_none(shards, text):
    folder, _ = shards
    (folder / INDEX).write_text(text)
    refused(folder, folder)


def test_a_tensor_in_two_shards(shards):
    folder, where = shards
    name = next(name for name in where if where[name] == PARTS[0])
    tensors = tensors_of(LLAMA_SHAPES)
    own = {n: t for n, t in tensors.items() if where[n] == PARTS[1] or n == name}
    write_raw(folder / PARTS[1], *layout(own))
    refused(folder, PARTS[1], name)


def test_an_index_that_does_not_fit_its_shards(shards):
    folder, where = shards
    name = "model.norm.weight"
    write_index(folder, change(where, {name: DELETED}))
    refused(folder, where[name], name)
    write_index(folder, where | {"model.extra\n": PARTS[0]})
    refused(folder, folder / INDEX, "model.extra", PARTS[0])
    write_index(folder, where | {name: PARTS[where[name] == PARTS[0]]})
    refused(folder, folder, name)


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b"{]", b"{'model_type': 'llama'}", b"\xff\xfe", b"\0" * 64]
    + [b'{"a": "\xe9"}', b"[" * 10**5, b'{"a":' * 10**5, b'{"x": ' + b"9" * 5000 + b"}", b"{}"],
    ids=lambda content: str(content[:16]),
)
def test_a_config_that_is_none(llama, content):
    (llama / "config.json").write_bytes(content)
    refused(llama, llama / "config.json")


def test_a_config_nested_as_deep_as_json_goes(llama):
    deep = '{"a":' * 900 + "1" + "}" * 900
    text = json.dumps(LLAMA)[:-1] + f', "quantization_config": {deep}' + "}"
    (llama / "config.json").write_text(text)
    refused(llama, llama / "config.json", "quantization_config")


def configure(folder, base, **changes):
    config = change(BASES[base], changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


SIZES_OF = {
    "llama": ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    + ["num_attention_heads"],
    "bloom": ["vocab_size", "n_embed", "n_layer", "n_head"],
}
COUNTS = [*(("llama", name) for name in SIZES_OF["llama"]), ("llama", "num_key_value_heads")]
COUNTS += [("llama", "head_dim"), ("llama", "max_position_embeddings")]
COUNTS += [("mistral", "sliding_window"), *(("bloom", name) for name in SIZES_OF["bloom"])]
NUMBERS = [("llama", "rms_norm_eps"), ("llama", "rope_theta"), ("bloom", "layer_norm_epsilon")]
FLAGS = [("llama", "tie_word_embeddings"), ("llama", "attention_bias"), ("llama", "mlp_bias")]
FLAGS += [("qwen2", "use_sliding_window"), ("bloom", "apply_residual_connection_post_layernorm")]
TOKENS = [("llama", name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
MISTYPED = {
    **dict.fromkeys(COUNTS, (0, -4, True, False, "4", 4.0, 4.5, [4], {"a": 4}, math.nan, 2**31)),
    **dict.fromkeys(NUMBERS, (0, -1e-5, "1e-5", True, [1], math.nan, math.inf, -math.inf, 10**400)),
    **dict.fromkeys(FLAGS, (0, 1, "true", [], 1.0)),
    **dict.fromkeys(TOKENS, ("2", 2.0, True, [True], ["2"], [[2]], {"a": 2})),
}


@pytest.mark.parametrize(("base", "name"), MISTYPED)
def test_a_field_of_another_type(llama, base, name):
    for value in MISTYPED[base, name]:
        refused(llama, configure(llama, base, **{name: value}), name)


@pytest.mark.parametrize("base", SIZES_OF)
def test_a_missing_field(llama, base):
    for name in ("model_type", *SIZES_OF[base]):
        for value in (DELETED, None):
            refused(llama, configure(llama, base, **{name: value}), name)


def rope(**fields):
    return {"rope_scaling": fields}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNSUPPORTED = {
    "an unknown family": ("llama", {"model_type": "gemma2"}, "gemma2", "qwen3"),
    "a family of another type": ("llama", {"model_type": ["llama"]}, "model_type"),
    "a family over several lines": ("llama", {"model_type": "a\nb"}, "model_type"),
    "heads that do not divide": ("llama", {"num_attention_heads": 3}, "hidden_size 4", "3 heads"),
    "odd head_dim": ("llama", {"head_dim": 3}, "head_dim 3"),
    "one frequency, which cannot grow": (
        "llama", {"head_dim": 2} | rope(type="dynamic", factor=2.0), "head_dim 2",
    ),
    "a base that turns nothing": ("llama", {"rope_theta": 1.0}, "rope_theta"),
    "two dialects that disagree": (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta",
    ),
    "kv heads that do not divide": (
        "llama", {"num_attention_heads": 2, "num_key_value_heads": 4}, "num_key_value_heads 4",
    ),
    "heads of BLOOM that do not divide": ("bloom", {"n_head": 3}, "hidden_size 4", "3 heads"),
    "two spellings that disagree": ("bloom", {"num_attention_heads": 4}, "num_attention_heads"),
    "two sizes that disagree": ("bloom", {"hidden_size": 8}, "hidden_size", "n_embed"),
    "a BLOOM of another width": ("bloom", {"n_inner": 8}, "n_inner", "16"),
    "an unknown activation": ("llama", {"hidden_act": "quick_gelu"}, "hidden_act", "silu"),
    "an activation of another type": ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
    "quantization": (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config",
        "gptq",
        "give the float32, bfloat16 or float16 checkpoint it was made from",
    ),
    "a huge quantization": (
        "llama",
        {"quantization_config": {str(i): "x" * 100 for i in range(1000)}},
        "quantization_config",
    ),
    "compression": ("llama", {"compression_config": {"format": "int"}}, "compression_config"),
    "a window of Llama": ("llama", {"sliding_window": 8}, "sliding_window"),
    "layer types of no list": ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
    "too few layer types": ("qwen2", {"layer_types": []}, "layer_types"),
    "too many layer types": ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    "an unknown layer type": ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types"),
    "a layer type of no text": ("qwen2", {"layer_types": [["full_attention"]]}, "layer_types"),
    "a layer type of null": ("qwen2", {"layer_types": [None]}, "layer_types"),
    "a window without a size": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"]},
        "layer_types",
    ),
    "a window that is not used": (
        "qwen2", {"sliding_window": 4, "layer_types": ["sliding_attention"]}, "layer_types",
    ),
    "mixed layers of Mistral": (
        "mistral", {"sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types",
    ),
    "a number of window layers that is none": (
        "qwen2", {"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers",
    ),
    "longrope": (
        "llama",
        rope(type="longrope", long_factor=[1.0], short_factor=[1.0]),
        "rope_type = 'longrope'",
    ),
    "su": ("llama", rope(type="su", long_factor=[1.0], short_factor=[1.0]), "rope_type = 'su'"),
    "unknown rotary positions": ("llama", rope(rope_type="spiral"), "rope_type = 'spiral'"),
    "rotary positions of no text": ("llama", rope(rope_type=["linear"]), "rope_type"),
    "rotary positions of two kinds": (
        "llama", rope(rope_type="linear", type="dynamic", factor=2.0), "rope_type", "type",
    ),
    "rotary positions of no object": ("llama", {"rope_scaling": [2.0]}, "rope_scaling"),
    "rotary positions as text": ("llama", {"rope_parameters": "linear"}, "rope_parameters"),
    "linear without a factor": ("llama", rope(type="linear"), "factor"),
    "dynamic without a factor": ("llama", rope(type="dynamic"), "factor"),
    "yarn without a factor": ("llama", rope(type="yarn"), "factor"),
    "llama3 without a factor": ("llama", rope(**change(LLAMA3, {"factor": DELETED})), "factor"),
    "llama3 without a low factor": (
        "llama", rope(**change(LLAMA3, {"low_freq_factor": DELETED})), "low_freq_factor",
    ),
    "a factor of text": ("llama", rope(type="linear", factor="2"), "factor"),
    "a negative factor": ("llama", rope(type="linear", factor=-2.0), "factor"),
    "a factor that is no number": ("llama", rope(type="linear", factor=math.nan), "factor"),
    "low above high": ("llama", rope(**(LLAMA3 | {"low_freq_factor": 8.0})), "low_freq_factor 8"),
    "low equal to high": (
        "llama", rope(**(LLAMA3 | {"low_freq_factor": 4.0})), "low_freq_factor 4",
    ),
    "a rotary field of another kind": (
        "llama", rope(type="linear", factor=2.0, beta_fast=32), "beta_fast",
    ),
    "a rotary field over several lines": (
        "llama", rope(type="linear", factor=2.0, **{"\n": 1}), "n",
    ),
    "sections of positions": ("llama", rope(type="default", mrope_section=[1]), "mrope_section"),
    "part of the dimensions": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "part of them, inside": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "positions of each layer type": (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "full_attention",
    ),
    "slices of pretraining": ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_that_is_not_computed_here(llama, case):
    base, changes, *words = UNSUPPORTED[case]
    refused(llama, configure(llama, base, **changes), *words)


# Settings of some decoders, with values that change what is computed: nobody here reads them.
FOREIGN = {
    "rope_interleaved": True, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256, "attention_multiplier": 0.0078125, "logits_scaling": 8.0,
    "scale_emb": 12, "scale_embedding": True, "clip_qkv": 8.0, "qk_norm": True,
    "no_rope_layers": [1, 1, 1, 0], "use_rope": False, "position_embedding_type": "alibi",
    "alibi": True, "rotary_pct": 0.25, "rope_local_base_freq": 10000.0,
    "attention_chunk_size": 8192, "sliding_window_pattern": 6, "is_causal": False,
    "use_bidirectional_attention": "all", "is_encoder_decoder": True,
    "cross_attention_layers": [3, 8], "parallel_attn": True, "num_local_experts": 8,
    "num_kv_shared_layers": 1, "swiglu_limit": 7.0, "hidden_activation": "gelu",
    "activation_function": "gelu", "of_tomorrow": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_setting_of_other_decoders(llama, name):
    refused(llama, configure(llama, "llama", **{name: FOREIGN[name]}), name)


INERT = {
    "what training alone needs": {
        "attention_dropout": 0.1, "hidden_dropout": 0.1, "resid_pdrop": 0.1,
        "initializer_range": 0.02, "gradient_checkpointing": True, "router_aux_loss_coef": 0.001,
        "clip_grad": 1.0,
    },
    "what describes the checkpoint": {
        "architectures": ["LlamaForCausalLM"], "_name_or_path": "somewhere\nelse",
        "transformers_version": "4.30.0.dev0", "torch_dtype": "bfloat16", "dtype": "float16",
        "use_cache": False, "auto_map": {"AutoModelForCausalLM": "modeling.Llama"},
        "rms_norm_eps_version": 2, "": 1,
    },
    "one slice": {"pretraining_tp": 1},
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False},
    "other decoders' settings, switched off": {
        "quantization_config": None, "final_logit_softcapping": None, "attention_multiplier": 1.0,
        "logits_scaling": 1, "qk_norm": False, "qk_layernorm": False, "partial_rotary_factor": 1.0,
        "num_local_experts": 0, "attention_chunk_size": None, "no_rope_layers": [],
        "add_cross_attention": False, "is_encoder_decoder": False, "is_causal": True,
        "use_rope": True, "use_bidirectional_attention": False, "position_embedding_type": "rope",
        "hidden_activation": "silu", "sliding_window": None,
    },
    "plain rotary positions in both dialects": {
        "rope_theta": 10000, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "rotary positions of nothing": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": None}},
    "rotary positions named twice": {"rope_scaling": {"rope_type": "default", "type": "default"}},
    "layer types": {"layer_types": ["full_attention"]},
    "nothing where something is known": {
        "hidden_act": None, "rms_norm_eps": None, "head_dim": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", INERT)
def test_a_setting_that_changes_nothing(llama, case):
    plain = models.load(llama)
    configure(llama, "llama", **INERT[case])
    same(models.load(llama), plain)


def test_a_config_of_bloom_as_published(tmp_path):
    published = {
        "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "n_inner": None,
        "offset_alibi": 100, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "masked_softmax_fusion": True, "bias_dropout_fusion": True, "unk_token_id": 0,
        "attention_softmax_in_fp32": True, "attention_dropout": 0.0, "seq_length": 2048,
        "pretraining_tp": 4,  # how it was trained; nothing is sliced unless slow_but_exact says so
        "slow_but_exact": False, "use_cache": True,
    }  # fmt: skip
    tensors = tensors_of(BLOOM_SHAPES)
    plain = models.load(write(tmp_path / "plain", BLOOM, tensors))
    same(plain, models.load(write(tmp_path / "published", BLOOM | published, tensors)))
    names = ("model_type", "vocab_size")
    renamed = {name: BLOOM[name] for name in names} | published
    same(plain, models.load(write(tmp_path / "renamed", renamed, tensors)))


@pytest.mark.parametrize(
    ("kind", "ends"), [("llama", (1, 2)), ("mistral", (1, 2)), ("qwen2", (None, None))]
)
def test_what_a_config_leaves_out_is_what_transformers_takes(llama, kind, ends):
    raw = json.loads((llama / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        raw.pop(name, None)
    raw |= {"model_type": kind, "num_key_value_heads": raw["num_attention_heads"]}
    (llama / "config.json").write_text(json.dumps(raw))
    found = models.config(llama)
    assert (found.bos, found.eos) == ends
    usual = {"llama": 2048, "mistral": 131072, "qwen2": 32768}
    assert found.max_positions == usual[kind]
    (llama / "config.json").write_text(json.dumps(raw | {"eos_token_id": None}))
    assert models.config(llama).eos is None


def test_yarn_that_says_it_was_finetuned(llama):
    fields = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    configure(llama, "llama", **rope(**fields))
    plain = models.load(llama)
    configure(llama, "llama", **rope(**fields, finetuned=True))
    same(models.load(llama), plain)


HUGE = {
    "vocabulary": {"vocab_size": 2**31 - 1},
    "width": {"hidden_size": 2**30},
    "mlp": {"intermediate_size": 10**9},
    "layers": {"num_hidden_layers": 10**9},
    "heads": {"num_attention_heads": 2**30, "num_key_value_heads": 1, "head_dim": 2**20},
    "kv heads": {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2},
    "everything": {
        "vocab_size": 2**31 - 1, "hidden_size": 2**30, "intermediate_size": 2**31 - 1,
        "num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**30,
    },
    "everything, in many layers": {
        "hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 9999,
        "num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "case"),
    [*(("llama", case) for case in HUGE), *(("qwen2", case) for case in [*HUGE][:-1])],
)
def test_sizes_without_measure_are_refused_before_memory_is_taken(llama, monkeypatch, base, case):
    monkeypatch.delattr(hub, "aligned")  # where the memory of every array comes from
    configure(llama, base, **HUGE[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(llama, llama)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_file_cut_while_it_is_read(llama, weights, monkeypatch):
    check = hub.check

    def cut(*arguments):
        check(*arguments)
        os.truncate(weights, os.path.getsize(weights) - 64)

    monkeypatch.setattr(hub, "check", cut)
    refused(llama, weights, "changed while it was read")
