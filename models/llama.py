"""Llama, Mistral, Qwen2 and Qwen3: rotary positions, grouped attention, gated units."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from models.attention import Hidden, Positions, attention
from models.hf_config import LAYERS, HFConfig
from runtime.errors import UserError

from .base import LanguageModel, ModelConfig, Tensors, linear, recompute, rms_norm, sow, tensor
from .rotary import Rope, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

FULL, SLIDING = "full_attention", "sliding_attention"

# What a config may say, but not otherwise.
FIXED = dict(is_causal=True, position_embedding_type="rope", pretraining_tp=1, use_rope=True)

# What a config that does not say means, where that differs between the members of the family.
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS = {
    "llama": ENDS | {"max_position_embeddings": 2048},
    "mistral": ENDS
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}

# Sizes and settings by their names in a Hugging Face config.
NAMES = {
    "vocab": "vocab_size", "embed": "hidden_size", "mlp": "intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "max_positions": "max_position_embeddings", "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    SELECTABLE: ClassVar = ("layers", "embed", "mlp", "heads", "kv_heads")
    PER_LAYER: ClassVar = ("windows",)
    HARMLESS: ClassVar = ("use_sliding_window", "max_window_layers")  # read where they matter

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
            groups = f"num_key_value_heads {self.kv_heads}"
            raise UserError(f"num_attention_heads {self.heads} is not a multiple of {groups}")
        if self.head_dim % 2 or (self.head_dim == 2 and self.rope.kind == "dynamic"):
            rotary = f"rotary positions of {self.rope.kind}"
            raise UserError(f"head_dim {self.head_dim} does not fit {rotary}")

    @property
    def longest(self) -> int:
        return max(self.max_positions, self.rope.longest)

    @classmethod
    def read(cls, settings: HFConfig) -> "Config":
        """From the fields of a Hugging Face config."""
        kind = settings.peek("model_type")
        settings.raw = DEFAULTS[kind] | settings.raw
        layers = settings.count("num_hidden_layers", below=LAYERS)
        embed, heads = settings.count("hidden_size"), settings.count("num_attention_heads")
        head_dim = settings.count("head_dim", default=None)
        if head_dim is None and embed % heads:
            raise UserError(f"hidden_size {embed} does not divide into {heads} heads")
        positions = settings.count("max_position_embeddings", default=32768)
        activation = settings.get("hidden_act", str, "the name of an activation", "silu")
        if activation not in ACTIVATIONS:
            settings.reject("hidden_act", activation, f"one of {', '.join(ACTIVATIONS)}")
        aliases = dict.fromkeys(("hidden_activation", "activation_function"), activation)
        for name, only in (FIXED | aliases).items():
            settings.fixed(name, only)
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
            **settings.ids(),
        )

    def write(self) -> dict[str, Any]:
        """The fields of a Hugging Face config."""
        written = {name: getattr(self, field) for field, name in NAMES.items()}
        written["architectures"] = [f"{self.model_type.capitalize()}ForCausalLM"]
        written |= {"rope_theta": self.rope.theta, "rope_scaling": self.rope.write()}
        kind, window = self.model_type, max(filter(None, self.windows), default=None)
        if kind in ("llama", "qwen3"):
            written["attention_bias"] = self.output_bias
        if kind == "llama":
            written["mlp_bias"] = self.mlp_bias
        if kind == "mistral":
            written["sliding_window"] = window
        if kind.startswith("qwen"):
            types = [SLIDING if size else FULL for size in self.windows] or [FULL] * self.layers
            written |= {"layer_types": types, "max_window_layers": types.count(FULL)}
            written |= {"use_sliding_window": window is not None, "sliding_window": window}
        return written


def read_windows(settings: HFConfig, layers: int) -> tuple[int | None, ...]:
    """How far back each layer sees; `None` is all the way."""
    kind = settings.peek("model_type")
    window = settings.count("sliding_window", default=None)
    mixed = kind.startswith("qwen")  # the others give every layer the same
    if mixed and not settings.flag("use_sliding_window", False):
        window = None
    if kind == "llama":
        settings.fixed("sliding_window", None)
    first = settings.get("max_window_layers", int, "a number of layers", 28) if mixed else 0
    usual = [SLIDING if window and layer >= first else FULL for layer in range(layers)]
    types = settings.get("layer_types", list, "a list with an entry for each layer", usual)
    known = [FULL, SLIDING] if window else [FULL]
    if len(types) != layers or any(kind not in known for kind in types):
        settings.reject("layer_types", types, f"{' or '.join(known)} for {layers} layers")
    if not mixed and types != usual:
        settings.reject("layer_types", types, f"{usual[0]} throughout")
    windows = tuple(window if kind == SLIDING else None for kind in types)
    return windows if any(windows) else ()


class Block(Tensors):
    attention_norm: Float[Array, " embed"] = tensor("input_layernorm.weight")
    query: Float[Array, "heads head_dim embed"] = tensor("self_attn.q_proj.weight")
    key: Float[Array, "kv_heads head_dim embed"] = tensor("self_attn.k_proj.weight")
    value: Float[Array, "kv_heads head_dim embed"] = tensor("self_attn.v_proj.weight")
    query_bias: Float[Array, "heads head_dim"] | None = tensor("self_attn.q_proj.bias", "qkv_bias")
    key_bias: Float[Array, "kv_heads head_dim"] | None = tensor("self_attn.k_proj.bias", "qkv_bias")
    value_bias: Float[Array, "kv_heads head_dim"] | None = tensor(
        "self_attn.v_proj.bias", "qkv_bias"
    )
    query_norm: Float[Array, " head_dim"] | None = tensor("self_attn.q_norm.weight", "qk_norm")
    key_norm: Float[Array, " head_dim"] | None = tensor("self_attn.k_norm.weight", "qk_norm")
    output: Float[Array, "embed heads head_dim"] = tensor("self_attn.o_proj.weight")
    output_bias: Float[Array, " embed"] | None = tensor("self_attn.o_proj.bias", "output_bias")
    mlp_norm: Float[Array, " embed"] = tensor("post_attention_layernorm.weight")
    gate: Float[Array, "mlp embed"] = tensor("mlp.gate_proj.weight")
    up: Float[Array, "mlp embed"] = tensor("mlp.up_proj.weight")
    down: Float[Array, "embed mlp"] = tensor("mlp.down_proj.weight")
    gate_bias: Float[Array, " mlp"] | None = tensor("mlp.gate_proj.bias", "mlp_bias")
    up_bias: Float[Array, " mlp"] | None = tensor("mlp.up_proj.bias", "mlp_bias")
    down_bias: Float[Array, " embed"] | None = tensor("mlp.down_proj.bias", "mlp_bias")


class Llama(LanguageModel):
    Config: ClassVar = Config
    PREFIX: ClassVar = "model."

    config: Config = eqx.field(static=True)
    embedding: Float[Array, "vocab embed"] = tensor("embed_tokens.weight")
    blocks: Block = tensor("layers.{}.")
    norm: Float[Array, " embed"] = tensor("norm.weight")
    head: Float[Array, "vocab embed"] | None = tensor("lm_head.weight", "untied")

    def embed_input(self, rows: Hidden) -> Hidden:
        return rows

    def position_inputs(self, positions: Positions) -> PyTree:
        return self.config.rope.table(self.config.head_dim, positions)

    def block(self, weights: Block, x: Hidden, positions, position_inputs, layer, cache):
        w, eps = weights, self.config.norm_eps
        activation = ACTIVATIONS[self.config.activation]

        @recompute
        def heads(x):
            h = sow("query", rms_norm(x, w.attention_norm, eps))
            query = linear("bse,hde->bshd", h, w.query, w.query_bias)
            key = linear("bse,hde->bshd", h, w.key, w.key_bias)
            return query, key, linear("bse,hde->bshd", h, w.value, w.value_bias)

        @recompute
        def gate_and_up(x):
            h = sow("gate", rms_norm(x, w.mlp_norm, eps))
            gate = linear("bse,me->bsm", h, w.gate, w.gate_bias)
            return gate, linear("bse,me->bsm", h, w.up, w.up_bias)

        @recompute
        def down(gate, up):
            h = sow("down", activation(gate) * up)
            return linear("bsm,em->bse", h, w.down, w.down_bias)

        query, key, value = heads(x)
        if w.query_norm is not None:
            query, key = rms_norm(query, w.query_norm, eps), rms_norm(key, w.key_norm, eps)
        query, key = rotate(query, position_inputs), rotate(key, position_inputs)
        windows = self.config.windows
        mixed, cache = attention(query, key, value, positions, layer, cache, windows=windows)
        mixed = sow("output", mixed)
        x = sow("middle", x + linear("bshd,ehd->bse", mixed, w.output, w.output_bias))
        return x + down(*gate_and_up(x)), cache

    def final_norm(self, x: Hidden) -> Hidden:
        return rms_norm(x, self.norm, self.config.norm_eps)
