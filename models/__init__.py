"""BLOOM and the Llama family: `load` and `save` of Hugging Face checkpoints."""

from .hub import FAMILIES, config, fetch, fingerprint, load, outline, save

__all__ = ["FAMILIES", "config", "fetch", "fingerprint", "load", "outline", "save"]
