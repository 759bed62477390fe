"""What people have, as text to tokenize: files and hub data sets, records, chat templates."""

from runtime.files import digest

from .files import Source, canonical, find
from .records import Piece, Prompt, pieces, prompts
from .tokenizer import Tokenizer, load_tokenizer, same_tokenizer, stop_ids

__all__ = [
    "Piece",
    "Prompt",
    "Source",
    "Tokenizer",
    "canonical",
    "digest",
    "find",
    "load_tokenizer",
    "pieces",
    "prompts",
    "same_tokenizer",
    "stop_ids",
]
