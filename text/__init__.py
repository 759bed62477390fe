"""What people have, as text to tokenize: files and hub data sets, records, chat templates."""
# ruff: noqa: F401

from runtime.files import digest

from .files import Source, canonical, find, hub_commit
from .records import Piece, Prompt, pieces, prompts
from .tokenizer import Tokenizer, load_tokenizer, same_tokenizer, stop_ids
