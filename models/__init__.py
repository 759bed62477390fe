"""BLOOM and the Llama family: `load` and `save` of Hugging Face checkpoints."""

from .hub import FAMILIES, abstract, config, fetch, fingerprint, load, save, seq_len

__all__ = ["FAMILIES", "config", "fetch", "fingerprint", "load", "abstract", "save", "seq_len"]
