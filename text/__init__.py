"""What people have, as text to tokenize: files and hub data sets, records, chat templates."""
# ruff: noqa: F401

from runtime.files import digest

from .files import Source, canonical, find, hub_commit, written_settings
from .records import Piece, Prompt, pieces, prompts
from .tokenizer import (
    Tokenizer,
    chat_template,
    choose_template,
    load_tokenizer,
    same_tokenizer,
    stop_ids,
)
