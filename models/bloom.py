"""BLOOM: ALiBi attention, layer norms, an embedding norm, a tied head."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.attention import Hidden, Positions, attention
from models.hf_config import LAYERS, HFConfig
from runtime.errors import UserError

from .base import LanguageModel, ModelConfig, Tensors, layer_norm, linear, recompute, sow, tensor


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    ALIBI: ClassVar = True
    HARMLESS: ClassVar = (
        "offset_alibi", "skip_bias_add*", "*_fusion", "attention_softmax_in_fp32",
        "pretraining_tp",  # nothing is sliced unless slow_but_exact says so, nor then another model
        "slow_but_exact",
    )  # fmt: skip

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
    # Computes nothing: llama.cpp's converter takes it for the context, else the hidden size.
    seq_length: int | None = dataclasses.field(default=None, compare=False)

    kv_heads = property(lambda self: self.heads)
    head_dim = property(lambda self: self.embed // self.heads)
    mlp = property(lambda self: 4 * self.embed)

    def __post_init__(self):
        if self.embed % self.heads:
            raise UserError(f"hidden_size {self.embed} does not divide into {self.heads} heads")

    @classmethod
    def read(cls, settings: HFConfig) -> "Config":
        """From the fields of a Hugging Face config."""
        settings.raw = {"bos_token_id": 1, "eos_token_id": 2} | settings.raw
        embed = settings.count("hidden_size", "n_embed")
        settings.fixed("n_inner", 4 * embed)
        return cls(
            vocab=settings.count("vocab_size"),
            embed=embed,
            layers=settings.count("n_layer", "num_hidden_layers", below=LAYERS),
            heads=settings.count("n_head", "num_attention_heads"),
            norm_eps=settings.number("layer_norm_epsilon", 1e-5),
            residual_after_norm=settings.flag("apply_residual_connection_post_layernorm", False),
            tied=settings.flag("tie_word_embeddings", True),
            seq_length=settings.count("seq_length", default=None),
            **settings.ids(),
        )

    def write(self) -> dict[str, Any]:
        """The fields of a Hugging Face config."""
        length = {} if self.seq_length is None else {"seq_length": self.seq_length}
        return length | {
            "architectures": ["BloomForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "layer_norm_epsilon": self.norm_eps,
            "apply_residual_connection_post_layernorm": self.residual_after_norm,
        }


class Block(Tensors):
    attention_norm: Float[Array, " embed"] = tensor("input_layernorm.weight")
    attention_norm_bias: Float[Array, " embed"] = tensor("input_layernorm.bias")
    qkv: Float[Array, "heads 3 head_dim embed"] = tensor("self_attention.query_key_value.weight")
    qkv_bias: Float[Array, "heads 3 head_dim"] = tensor("self_attention.query_key_value.bias")
    output: Float[Array, "embed heads head_dim"] = tensor("self_attention.dense.weight")
    output_bias: Float[Array, " embed"] = tensor("self_attention.dense.bias")
    mlp_norm: Float[Array, " embed"] = tensor("post_attention_layernorm.weight")
    mlp_norm_bias: Float[Array, " embed"] = tensor("post_attention_layernorm.bias")
    up: Float[Array, "mlp embed"] = tensor("mlp.dense_h_to_4h.weight")
    up_bias: Float[Array, " mlp"] = tensor("mlp.dense_h_to_4h.bias")
    down: Float[Array, "embed mlp"] = tensor("mlp.dense_4h_to_h.weight")
    down_bias: Float[Array, " embed"] = tensor("mlp.dense_4h_to_h.bias")


class Bloom(LanguageModel):
    Config: ClassVar = Config
    PREFIX: ClassVar = "transformer."

    config: Config = eqx.field(static=True)
    embedding: Float[Array, "vocab embed"] = tensor("word_embeddings.weight")
    embedding_norm: Float[Array, " embed"] = tensor("word_embeddings_layernorm.weight")
    embedding_norm_bias: Float[Array, " embed"] = tensor("word_embeddings_layernorm.bias")
    blocks: Block = tensor("h.{}.")
    norm: Float[Array, " embed"] = tensor("ln_f.weight")
    norm_bias: Float[Array, " embed"] = tensor("ln_f.bias")
    head: Float[Array, "vocab embed"] | None = tensor("lm_head.weight", "untied")

    def embed_input(self, rows: Hidden) -> Hidden:
        return layer_norm(rows, self.embedding_norm, self.embedding_norm_bias, self.config.norm_eps)

    def position_inputs(self, positions: Positions) -> Float[Array, " heads"]:
        return jnp.asarray(alibi_slopes(self.config.heads))

    def block(self, weights: Block, x: Hidden, positions, position_inputs, layer, cache):
        w, eps, after = weights, self.config.norm_eps, self.config.residual_after_norm

        def first_norm(x):
            return layer_norm(x, w.attention_norm, w.attention_norm_bias, eps)

        def second_norm(x):
            return layer_norm(x, w.mlp_norm, w.mlp_norm_bias, eps)

        @recompute
        def heads(x):
            return linear("bse,htde->bshtd", first_norm(x), w.qkv, w.qkv_bias)

        @recompute
        def up(x):
            return linear("bse,me->bsm", second_norm(x), w.up, w.up_bias)

        @recompute
        def down(h):
            return linear("bsm,em->bse", sow("down", jax.nn.gelu(h)), w.down, w.down_bias)

        qkv = heads(x)
        query, key, value = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        mixed, cache = attention(query, key, value, positions, layer, cache, slopes=position_inputs)
        residual = first_norm(x) if after else x
        mixed = sow("output", mixed)
        x = sow("middle", residual + linear("bshd,ehd->bse", mixed, w.output, w.output_bias))
        residual = second_norm(x) if after else x
        return residual + down(up(x)), cache

    def final_norm(self, x: Hidden) -> Hidden:
        return layer_norm(x, self.norm, self.norm_bias, self.config.norm_eps)


def alibi_slopes(heads: int) -> np.ndarray:
    """A geometric sequence; beyond a power of two, every second slope of the next such sequence."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.array(slopes, np.float32)
