"""Tiny random models of every family and variant, made by transformers."""

import json
from pathlib import Path

import torch
import transformers
from transformers import BloomConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TEXT = dict(vocab_size=96, bos_token_id=1, eos_token_id=2)
SMALL = TEXT | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
BLOOM = TEXT | dict(hidden_size=32, n_layer=3, n_head=4)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def rope(kind: str, theta: float = 10000.0, **settings) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **settings))


SLIDING = dict(use_sliding_window=True, sliding_window=5)
MIXED = ["full_attention", "sliding_attention", "full_attention"]
YARN = dict(factor=4.0, original_max_position_embeddings=16)

VARIANTS: dict[str, tuple[type, dict]] = {
    "bloom": (BloomConfig, BLOOM),
    "bloom-6-heads": (BloomConfig, BLOOM | dict(hidden_size=48, n_head=6)),
    "bloom-11-heads": (BloomConfig, BLOOM | dict(hidden_size=44, n_head=11)),
    "bloom-residual": (BloomConfig, BLOOM | dict(apply_residual_connection_post_layernorm=True)),
    "llama-1": (LlamaConfig, SMALL | dict(num_key_value_heads=4)),
    "llama-2": (LlamaConfig, SMALL | dict(rms_norm_eps=1e-5)),
    "llama-3.1": (LlamaConfig, SMALL | rope("llama3", 5e5, factor=8.0, **LLAMA3)),
    "llama-3.2-tied": (
        LlamaConfig,
        SMALL | rope("llama3", 5e5, factor=32.0, **LLAMA3) | dict(tie_word_embeddings=True),
    ),
    "smollm2": (LlamaConfig, SMALL | rope("default", 1e5) | dict(tie_word_embeddings=True)),
    "llama-one-key-head": (LlamaConfig, SMALL | dict(num_key_value_heads=1)),
    "llama-head-dim": (LlamaConfig, SMALL | dict(head_dim=12)),
    "llama-biases": (LlamaConfig, SMALL | dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": (LlamaConfig, SMALL | rope("linear", factor=2.5)),
    "llama-dynamic": (
        LlamaConfig,
        SMALL | rope("dynamic", factor=2.0) | dict(max_position_embeddings=16),
    ),
    "llama-yarn": (LlamaConfig, SMALL | rope("yarn", **YARN)),
    "llama-yarn-mscale": (
        LlamaConfig,
        SMALL | rope("yarn", mscale=0.7, mscale_all_dim=1.2, beta_fast=20.0, beta_slow=2.0, **YARN),
    ),
    "llama-yarn-attention": (
        LlamaConfig,
        SMALL | rope("yarn", attention_factor=0.8, truncate=False, **YARN),
    ),
    **{
        f"llama-{name}": (LlamaConfig, SMALL | dict(hidden_act=name))
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
    },
    "mistral": (MistralConfig, SMALL | dict(sliding_window=6)),
    "mistral-no-window": (MistralConfig, SMALL | dict(sliding_window=None, head_dim=16)),
    "qwen2": (Qwen2Config, SMALL | rope("default", 1e6)),
    "qwen2-tied": (Qwen2Config, SMALL | dict(tie_word_embeddings=True)),
    "qwen2-sliding": (Qwen2Config, SMALL | SLIDING | dict(max_window_layers=1)),
    "qwen2-mixed": (Qwen2Config, SMALL | SLIDING | dict(layer_types=MIXED)),
    "qwen3": (Qwen3Config, SMALL | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-biases": (
        Qwen3Config,
        SMALL | SLIDING | dict(attention_bias=True, layer_types=MIXED, head_dim=8),
    ),
}

# One of each kind, to be kept in the repository.
STORED = (
    "bloom",
    "bloom-6-heads",
    "bloom-residual",
    "llama-2",
    "llama-3.2-tied",
    "llama-biases",
    "llama-dynamic",
    "llama-yarn-mscale",
    "mistral",
    "qwen2-mixed",
    "qwen3",
)


def build(name: str, seed: int, **changes) -> torch.nn.Module:
    """With every parameter random, biases and norms too, so that none can be left out unseen."""
    kind, settings = VARIANTS[name]
    torch.manual_seed(seed)
    config = kind(**json.loads(json.dumps(settings | changes)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def older_dialect(folder: Path) -> bool:
    """Rewrites rotary settings as `rope_theta` and `rope_scaling`; says whether there were any."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    new = config.pop("rope_parameters", None)
    if new is None:
        return False
    config["rope_theta"] = new.pop("rope_theta")
    kind = new.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind} | new
    path.write_text(json.dumps(config))
    return True
