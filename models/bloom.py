"""BLOOM: ALiBi attention, layer norms, an embedding norm, a tied head."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.attention import Cache, Positions, attention
from models.base import LanguageModel, layer_norm, linear, normal, rematerialise
from models.hf_config import HFConfig
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    embed: int
    layers: int
    heads: int
    norm_eps: float = 1e-5
    residual_after_norm: bool = False
    tied: bool = True
    max_positions: int | None = None  # ALiBi has no limit
    model_type: str = "bloom"
    bos: int | tuple[int, ...] | None = 1
    eos: int | tuple[int, ...] | None = 2
    pad: int | tuple[int, ...] | None = 3

    def __post_init__(self):
        if self.embed % self.heads:
            raise UserError(f"hidden_size {self.embed} does not divide into {self.heads} heads")

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def mlp(self) -> int:
        return 4 * self.embed

    @classmethod
    def read(cls, settings: HFConfig) -> "Config":
        """From the fields of a Hugging Face config."""
        settings = HFConfig({"bos_token_id": 1, "eos_token_id": 2} | settings.raw)
        embed = settings.count("hidden_size", "n_embed")
        settings.fixed("n_inner", 4 * embed)
        return cls(
            vocab=settings.count("vocab_size"),
            embed=embed,
            layers=settings.layers("n_layer", "num_hidden_layers"),
            heads=settings.count("n_head", "num_attention_heads"),
            norm_eps=settings.number("layer_norm_epsilon", 1e-5),
            residual_after_norm=settings.flag("apply_residual_connection_post_layernorm", False),
            tied=settings.flag("tie_word_embeddings", True),
            bos=settings.ids("bos_token_id"),
            eos=settings.ids("eos_token_id"),
            pad=settings.ids("pad_token_id"),
        )

    def write(self) -> dict[str, Any]:
        """The fields of a Hugging Face config."""
        return {
            "architectures": ["BloomForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "layer_norm_epsilon": self.norm_eps,
            "apply_residual_connection_post_layernorm": self.residual_after_norm,
        }

    def select_layers(self, layers: tuple[int, ...]) -> "Config":
        """The config of a model with only these blocks of this one."""
        return dataclasses.replace(self, layers=len(layers))


class Block(eqx.Module):
    attention_norm: Float[Array, " embed"]
    attention_norm_bias: Float[Array, " embed"]
    qkv: Float[Array, "heads 3 head_dim embed"]
    qkv_bias: Float[Array, "heads 3 head_dim"]
    output: Float[Array, "embed heads head_dim"]
    output_bias: Float[Array, " embed"]
    mlp_norm: Float[Array, " embed"]
    mlp_norm_bias: Float[Array, " embed"]
    up: Float[Array, "mlp embed"]
    up_bias: Float[Array, " mlp"]
    down: Float[Array, "embed mlp"]
    down_bias: Float[Array, " embed"]

    def __init__(self, config: Config, key: PRNGKeyArray):
        heads, head_dim, embed, mlp = config.heads, config.head_dim, config.embed, config.mlp
        keys = jax.random.split(key, 4)
        self.attention_norm, self.attention_norm_bias = jnp.ones(embed), jnp.zeros(embed)
        self.qkv = normal(keys[0], heads, 3, head_dim, embed)
        self.qkv_bias = jnp.zeros((heads, 3, head_dim))
        self.output, self.output_bias = normal(keys[1], embed, heads, head_dim), jnp.zeros(embed)
        self.mlp_norm, self.mlp_norm_bias = jnp.ones(embed), jnp.zeros(embed)
        self.up, self.up_bias = normal(keys[2], mlp, embed), jnp.zeros(mlp)
        self.down, self.down_bias = normal(keys[3], embed, mlp), jnp.zeros(embed)


# Hugging Face's names. Checkpoints of the bare decoder leave the prefix out.
PREFIX = "transformer."
NAMES = {
    "embedding": "word_embeddings.weight",
    "embedding_norm": "word_embeddings_layernorm.weight",
    "embedding_norm_bias": "word_embeddings_layernorm.bias",
    "blocks.attention_norm": "h.{}.input_layernorm.weight",
    "blocks.attention_norm_bias": "h.{}.input_layernorm.bias",
    "blocks.qkv": "h.{}.self_attention.query_key_value.weight",
    "blocks.qkv_bias": "h.{}.self_attention.query_key_value.bias",
    "blocks.output": "h.{}.self_attention.dense.weight",
    "blocks.output_bias": "h.{}.self_attention.dense.bias",
    "blocks.mlp_norm": "h.{}.post_attention_layernorm.weight",
    "blocks.mlp_norm_bias": "h.{}.post_attention_layernorm.bias",
    "blocks.up": "h.{}.mlp.dense_h_to_4h.weight",
    "blocks.up_bias": "h.{}.mlp.dense_h_to_4h.bias",
    "blocks.down": "h.{}.mlp.dense_4h_to_h.weight",
    "blocks.down_bias": "h.{}.mlp.dense_4h_to_h.bias",
    "norm": "ln_f.weight",
    "norm_bias": "ln_f.bias",
    "head": "lm_head.weight",
}


class Bloom(LanguageModel):
    Config: ClassVar = Config
    PREFIX: ClassVar = PREFIX
    NAMES: ClassVar = NAMES

    config: Config = eqx.field(static=True)
    embedding: Float[Array, "vocab embed"]
    embedding_norm: Float[Array, " embed"]
    embedding_norm_bias: Float[Array, " embed"]
    blocks: Block
    norm: Float[Array, " embed"]
    norm_bias: Float[Array, " embed"]
    head: Float[Array, "vocab embed"] | None

    def __init__(self, config: Config, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.config = config
        self.embedding = normal(keys[0], config.vocab, config.embed)
        self.embedding_norm, self.embedding_norm_bias = (
            jnp.ones(config.embed),
            jnp.zeros(config.embed),
        )
        self.blocks = eqx.filter_vmap(lambda key: Block(config, key))(
            jax.random.split(keys[1], config.layers)
        )
        self.norm, self.norm_bias = jnp.ones(config.embed), jnp.zeros(config.embed)
        self.head = None if config.tied else normal(keys[2], config.vocab, config.embed)

    def embed_input(self, rows: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return layer_norm(rows, self.embedding_norm, self.embedding_norm_bias, self.config.norm_eps)

    def position_inputs(self, positions: Positions) -> Float[Array, " heads"]:
        return jnp.asarray(alibi_slopes(self.config.heads))

    def block(
        self,
        weights: Block,
        x: Float[Array, "batch seq embed"],
        positions: Positions,
        position_inputs: Float[Array, " heads"],
        layer: Int[Array, ""],
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        w, eps, after = weights, self.config.norm_eps, self.config.residual_after_norm
        h = layer_norm(x, w.attention_norm, w.attention_norm_bias, eps)
        residual = h if after else x
        qkv = linear("bse,htde->bshtd", h, w.qkv, w.qkv_bias)
        query, key, value = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        mixed, cache = attention(query, key, value, positions, layer, cache, slopes=position_inputs)
        x = residual + linear("bshd,ehd->bse", mixed, w.output, w.output_bias)
        h = layer_norm(x, w.mlp_norm, w.mlp_norm_bias, eps)
        residual = h if after else x
        h = rematerialise(jax.nn.gelu)(linear("bse,me->bsm", h, w.up, w.up_bias))
        return residual + linear("bsm,em->bse", h, w.down, w.down_bias), cache

    def final_norm(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return layer_norm(x, self.norm, self.norm_bias, self.config.norm_eps)


def alibi_slopes(heads: int) -> np.ndarray:
    """A geometric sequence; beyond a power of two, every second slope of the next such sequence."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.array(slopes, np.float32)
