"""Llama, Mistral, Qwen2 and Qwen3: rotary positions, grouped attention, gated units."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from models.attention import Cache, Positions, attention
from models.base import LanguageModel, linear, normal, rematerialise, rms_norm
from models.hf_config import HFConfig
from runtime.errors import UserError

from .rotary import Rope, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

# What a config may say, but not otherwise.
FIXED = {
    "is_causal": True,
    "position_embedding_type": "rope",
    "pretraining_tp": 1,
    "use_rope": True,
}

# What a config that does not say means, where that differs between the members of the family.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rope: Rope = Rope()
    windows: tuple[int | None, ...] = ()  # per layer, empty: none has one
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    model_type: str = "llama"
    bos: int | tuple[int, ...] | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UserError(
                f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads"
                f" {self.kv_heads}"
            )
        if self.head_dim % 2 or (self.head_dim == 2 and self.rope.kind == "dynamic"):
            raise UserError(
                f"head_dim {self.head_dim} does not fit rotary positions of {self.rope.kind}"
            )

    @classmethod
    def read(cls, settings: HFConfig) -> "Config":
        """From the fields of a Hugging Face config."""
        kind = settings.raw["model_type"]
        settings = HFConfig(DEFAULTS[kind] | settings.raw)
        embed, layers = settings.count("hidden_size"), settings.layers("num_hidden_layers")
        heads = settings.count("num_attention_heads")
        head_dim = settings.count("head_dim", default=None)
        if head_dim is None and embed % heads:
            raise UserError(f"hidden_size {embed} does not divide into {heads} heads")
        positions = settings.count("max_position_embeddings", default=32768)
        activation = settings.get("hidden_act", str, "the name of an activation", "silu")
        if activation not in ACTIVATIONS:
            settings.reject("hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
        for name, only in FIXED.items():
            settings.fixed(name, only)
        for name in ("hidden_activation", "activation_function"):
            settings.fixed(name, activation)
        biased = settings.flag("attention_bias", False) and kind in ("llama", "qwen3")
        return cls(
            vocab=settings.count("vocab_size"),
            embed=embed,
            mlp=settings.count("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=settings.count("num_key_value_heads", default=heads),
            head_dim=head_dim or embed // heads,
            max_positions=positions,
            rope=Rope.read(settings, positions),
            windows=read_windows(settings, layers),
            activation=activation,
            norm_eps=settings.number("rms_norm_eps", 1e-6),
            qkv_bias=biased or kind == "qwen2",
            output_bias=biased,
            mlp_bias=settings.flag("mlp_bias", False) and kind == "llama",
            qk_norm=kind == "qwen3",
            tied=settings.flag("tie_word_embeddings", False),
            model_type=kind,
            bos=settings.ids("bos_token_id"),
            eos=settings.ids("eos_token_id"),
            pad=settings.ids("pad_token_id"),
        )

    def write(self) -> dict[str, Any]:
        """The fields of a Hugging Face config."""
        written = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.write(),
            "hidden_act": self.activation,
            "rms_norm_eps": self.norm_eps,
        }
        if self.model_type in ("llama", "qwen3"):
            written["attention_bias"] = self.output_bias
        if self.model_type == "llama":
            written["mlp_bias"] = self.mlp_bias
        return written | write_windows(self)

    def select_layers(self, layers: tuple[int, ...]) -> "Config":
        """The config of a model with only these blocks of this one."""
        windows = tuple(self.windows[layer] for layer in layers) if self.windows else ()
        return dataclasses.replace(self, layers=len(layers), windows=windows)


def read_windows(settings: HFConfig, layers: int) -> tuple[int | None, ...]:
    """How far back each layer sees; `None` is all the way."""
    kind = settings.raw["model_type"]
    window = settings.count("sliding_window", default=None)
    mixed = kind.startswith("qwen")  # the others give every layer the same
    if mixed and not settings.flag("use_sliding_window", False):
        window = None
    if kind == "llama":
        settings.fixed("sliding_window", None)
    first = settings.get("max_window_layers", int, "a number of layers", 28) if mixed else 0
    usual = [
        "sliding_attention" if window and layer >= first else "full_attention"
        for layer in range(layers)
    ]
    types = settings.get("layer_types", list, "a list with an entry for each layer", usual)
    known = ["full_attention", "sliding_attention"] if window else ["full_attention"]
    if len(types) != layers or any(kind not in known for kind in types):
        settings.reject("layer_types", types, f"{' or '.join(known)} for {layers} layers")
    if not mixed and types != usual:
        settings.reject("layer_types", types, f"{usual[0]} throughout")
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def write_windows(config: Config) -> dict[str, Any]:
    window = max((size for size in config.windows if size), default=None)
    if config.model_type == "mistral":
        return {"sliding_window": window}
    if not config.model_type.startswith("qwen"):
        return {}
    types = ["sliding_attention" if size else "full_attention" for size in config.windows]
    types = types or ["full_attention"] * config.layers
    written = {"use_sliding_window": window is not None, "sliding_window": window}
    return written | {"layer_types": types, "max_window_layers": types.count("full_attention")}


class Block(eqx.Module):
    attention_norm: Float[Array, " embed"]
    query: Float[Array, "heads head_dim embed"]
    key: Float[Array, "kv_heads head_dim embed"]
    value: Float[Array, "kv_heads head_dim embed"]
    query_bias: Float[Array, "heads head_dim"] | None
    key_bias: Float[Array, "kv_heads head_dim"] | None
    value_bias: Float[Array, "kv_heads head_dim"] | None
    query_norm: Float[Array, " head_dim"] | None
    key_norm: Float[Array, " head_dim"] | None
    output: Float[Array, "embed heads head_dim"]
    output_bias: Float[Array, " embed"] | None
    mlp_norm: Float[Array, " embed"]
    gate: Float[Array, "mlp embed"]
    up: Float[Array, "mlp embed"]
    down: Float[Array, "embed mlp"]
    gate_bias: Float[Array, " mlp"] | None
    up_bias: Float[Array, " mlp"] | None
    down_bias: Float[Array, " embed"] | None

    def __init__(self, config: Config, key: PRNGKeyArray):
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        embed, mlp = config.embed, config.mlp
        keys = jax.random.split(key, 7)

        def zeros(present: bool, *shape: int) -> Array | None:
            return jnp.zeros(shape) if present else None

        self.attention_norm, self.mlp_norm = jnp.ones(embed), jnp.ones(embed)
        self.query = normal(keys[0], heads, head_dim, embed)
        self.key = normal(keys[1], kv_heads, head_dim, embed)
        self.value = normal(keys[2], kv_heads, head_dim, embed)
        self.query_bias = zeros(config.qkv_bias, heads, head_dim)
        self.key_bias = zeros(config.qkv_bias, kv_heads, head_dim)
        self.value_bias = zeros(config.qkv_bias, kv_heads, head_dim)
        self.query_norm = jnp.ones(head_dim) if config.qk_norm else None
        self.key_norm = jnp.ones(head_dim) if config.qk_norm else None
        self.output = normal(keys[3], embed, heads, head_dim)
        self.output_bias = zeros(config.output_bias, embed)
        self.gate = normal(keys[4], mlp, embed)
        self.up = normal(keys[5], mlp, embed)
        self.down = normal(keys[6], embed, mlp)
        self.gate_bias = zeros(config.mlp_bias, mlp)
        self.up_bias = zeros(config.mlp_bias, mlp)
        self.down_bias = zeros(config.mlp_bias, embed)


# Hugging Face's names. Checkpoints of the bare decoder leave the prefix out.
PREFIX = "model."
NAMES = {
    "embedding": "embed_tokens.weight",
    "blocks.attention_norm": "layers.{}.input_layernorm.weight",
    "blocks.query": "layers.{}.self_attn.q_proj.weight",
    "blocks.key": "layers.{}.self_attn.k_proj.weight",
    "blocks.value": "layers.{}.self_attn.v_proj.weight",
    "blocks.query_bias": "layers.{}.self_attn.q_proj.bias",
    "blocks.key_bias": "layers.{}.self_attn.k_proj.bias",
    "blocks.value_bias": "layers.{}.self_attn.v_proj.bias",
    "blocks.query_norm": "layers.{}.self_attn.q_norm.weight",
    "blocks.key_norm": "layers.{}.self_attn.k_norm.weight",
    "blocks.output": "layers.{}.self_attn.o_proj.weight",
    "blocks.output_bias": "layers.{}.self_attn.o_proj.bias",
    "blocks.mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "blocks.gate": "layers.{}.mlp.gate_proj.weight",
    "blocks.up": "layers.{}.mlp.up_proj.weight",
    "blocks.down": "layers.{}.mlp.down_proj.weight",
    "blocks.gate_bias": "layers.{}.mlp.gate_proj.bias",
    "blocks.up_bias": "layers.{}.mlp.up_proj.bias",
    "blocks.down_bias": "layers.{}.mlp.down_proj.bias",
    "norm": "norm.weight",
    "head": "lm_head.weight",
}


class Llama(LanguageModel):
    Config: ClassVar = Config
    PREFIX: ClassVar = PREFIX
    NAMES: ClassVar = NAMES

    config: Config = eqx.field(static=True)
    embedding: Float[Array, "vocab embed"]
    blocks: Block
    norm: Float[Array, " embed"]
    head: Float[Array, "vocab embed"] | None

    def __init__(self, config: Config, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.config = config
        self.embedding = normal(keys[0], config.vocab, config.embed)
        self.blocks = eqx.filter_vmap(lambda key: Block(config, key))(
            jax.random.split(keys[1], config.layers)
        )
        self.norm = jnp.ones(config.embed)
        self.head = None if config.tied else normal(keys[2], config.vocab, config.embed)

    def embed_input(self, rows: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return rows

    def position_inputs(self, positions: Positions) -> tuple[PyTree, Int[Array, " layers"] | None]:
        windows = None
        if self.config.windows:
            windows = jnp.array([size or 2**30 for size in self.config.windows])
        return self.config.rope.table(self.config.head_dim, positions), windows

    def block(
        self,
        weights: Block,
        x: Float[Array, "batch seq embed"],
        positions: Positions,
        position_inputs: PyTree,
        layer: Int[Array, ""],
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        w, eps = weights, self.config.norm_eps
        table, windows = position_inputs
        h = rms_norm(x, w.attention_norm, eps)
        query = linear("bse,hde->bshd", h, w.query, w.query_bias)
        key = linear("bse,hde->bshd", h, w.key, w.key_bias)
        value = linear("bse,hde->bshd", h, w.value, w.value_bias)
        if w.query_norm is not None:
            query, key = rms_norm(query, w.query_norm, eps), rms_norm(key, w.key_norm, eps)
        query, key = rotate(query, table), rotate(key, table)
        window = None if windows is None else windows[layer]
        mixed, cache = attention(query, key, value, positions, layer, cache, window=window)
        x = x + linear("bshd,ehd->bse", mixed, w.output, w.output_bias)
        h = rms_norm(x, w.mlp_norm, eps)
        gate = linear("bse,me->bsm", h, w.gate, w.gate_bias)
        up = linear("bse,me->bsm", h, w.up, w.up_bias)
        activation = ACTIVATIONS[self.config.activation]
        h = rematerialise(lambda gate, up: activation(gate) * up)(gate, up)
        return x + linear("bsm,em->bse", h, w.down, w.down_bias), cache

    def final_norm(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return rms_norm(x, self.norm, self.config.norm_eps)
