"""Rotary positions: the plain ones and the four ways in which checkpoints stretch them."""

import dataclasses
import math
import reprlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.attention import Positions
from models.hf_config import HFConfig
from runtime.errors import UserError

YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
FIELDS: dict[str, tuple[str, ...]] = {  # of each kind of rotary positions
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", *YARN),
}
ORIGINAL = "original_max_position_embeddings"
Table = tuple[Float[Array, "#batch seq 1 half"], Float[Array, "#batch seq 1 half"]]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions; fields beyond `theta` are of kinds that stretch them, 0 where required."""

    kind: str = "default"
    theta: float = 10000.0
    original: int = 0  # positions before stretching
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.theta <= 1:
            raise UserError(f"rope_theta must be above 1, found {self.theta}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            high = f"high_freq_factor {self.high_freq_factor}"
            raise UserError(f"low_freq_factor {self.low_freq_factor} must be below {high}")

    @classmethod
    def read(cls, settings: HFConfig, positions: int) -> "Rope":
        """From either dialect: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
        theta = settings.peek("rope_theta")
        raw = {} if theta is None else {"rope_theta": theta}
        for name in ("rope_scaling", "rope_parameters"):
            given = settings.peek(name) or {}
            if not isinstance(given, dict):
                settings.reject(name, given, "an object")
            for field, value in given.items():
                if value is not None and raw.setdefault(field, value) != value:
                    what = reprlib.repr(value)
                    raise UserError(f"{field} is given twice, and {name} says {what}")
        rope = HFConfig(raw)
        kind = rope.get(["rope_type", "type"], str, "the kind of rotary positions", "default")
        if kind not in FIELDS:
            raise UserError(f"rope_type = {kind!r} is not supported, only {', '.join(FIELDS)} are")
        values: dict[str, Any] = {"kind": kind, "theta": rope.number("rope_theta", 10000.0)}
        for name in FIELDS[kind]:
            read = rope.flag if name == "truncate" else rope.number
            default = getattr(cls, name)
            values[name] = read(name, ... if default == 0 else default)
        original = settings.count(ORIGINAL, default=rope.count(ORIGINAL, default=positions))
        original = {"dynamic": positions, "llama3": original, "yarn": original}.get(kind, 0)
        rope.reject_unread(("finetuned",))  # how the checkpoint was made
        return cls(original=original, **values)

    @property
    def longest(self) -> int:
        """How many positions the kinds that are made for more than the trained ones reach."""
        return int(self.factor * self.original) if self.kind in ("dynamic", "yarn") else 0

    def write(self) -> dict[str, Any] | None:
        """`rope_scaling` as every version of transformers reads it."""
        if self.kind == "default":
            return None
        fields = {name: getattr(self, name) for name in FIELDS[self.kind]}
        if self.kind in ("llama3", "yarn"):
            fields[ORIGINAL] = self.original
        given = {name: value for name, value in fields.items() if value is not None}
        return {"rope_type": self.kind} | given

    def table(self, head_dim: int, positions: Positions) -> Table:
        """Cosine and sine of every position's angles, in float32."""
        frequencies, scale = self.frequencies(head_dim, positions), self.attention_scale()
        angles = positions.position[:, :, None].astype(jnp.float32) * frequencies
        return scale * jnp.cos(angles)[:, :, None], scale * jnp.sin(angles)[:, :, None]

    def frequencies(self, head_dim: int, positions: Positions) -> Float[Any, "*rows half"]:
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        plain = 1.0 / np.float32(self.theta) ** exponents
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "dynamic":  # the base grows with the document, past the trained positions
            length = jnp.maximum(positions.doc_length, self.original).astype(jnp.float32)
            growth = self.factor * length / self.original - (self.factor - 1)
            theta = self.theta * growth ** (head_dim / (head_dim - 2))
            return 1.0 / theta[:, :, None] ** exponents
        if self.kind == "llama3":
            # Long waves are stretched, short ones stay as they are, those between are blended.
            turns = self.original * plain / (2 * math.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            short = np.clip((turns - low) / (high - low), 0, 1)
            return np.float32(short * plain + (1 - short) * plain / self.factor)
        if self.kind == "yarn":  # likewise, blended linearly over the dimensions
            # The dimensions that turn this often over the original positions.
            waves = [
                self.original / (turns * 2 * math.pi) for turns in (self.beta_fast, self.beta_slow)
            ]
            first, last = (head_dim * math.log(wave) / (2 * math.log(self.theta)) for wave in waves)
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
            long = np.clip(ramp, 0, 1)
            return np.float32((1 - long) * plain + long * plain / self.factor)
        return plain

    def attention_scale(self) -> float:
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * growth + 1.0) / (0.1 * self.mscale_all_dim * growth + 1.0)
        return 0.1 * growth + 1.0


def rotate(
    x: Float[Array, "batch seq some_heads head_dim"], table: Table
) -> Float[Array, "batch seq some_heads head_dim"]:
    """Turns each pair (i, i + head_dim / 2) by its angle, in float32."""
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
