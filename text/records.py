"""Records and plain text, as documents, conversations and prompts."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import UserError
from runtime.files import printable
from text.files import (
    Choose,
    Progress,
    Source,
    check_length,
    is_text,
    parts,
    records,
    split_lines,
    text_blocks,
)

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer

PIECE = 1 << 14  # characters: longer documents are tokenized in pieces of up to twice that
GENERATED_COLUMNS = ["messages", "prompt", "completion", "finish_reason"]  # of generate.py


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    starts: bool = True
    ends: bool = True
    rendered: bool = False  # by a chat template, which has put the special tokens in
    spans: tuple[tuple[int, int], ...] | None = None  # characters to learn; None: all of them


class Prompt(NamedTuple):
    """Something to be continued."""

    piece: Piece
    messages: tuple[Mapping[str, Any], ...] | None  # that a chat template rendered, if one did


def pieces(
    source: Source,
    tokenizer: "Tokenizer",
    *,
    text_field: str = "text",
    documents: str = "file",
    mask: str = "all",
    progress: Progress = lambda amount: None,
) -> Iterator[Piece]:
    """The documents of a source in order, blank ones left out; in memory a few at a time."""
    choose = partial(_document_columns, text_field)
    for part in parts(source):
        if not is_text(part):
            for place, record in records(part, choose, progress):
                yield from _record_pieces(record, tokenizer, choose, mask, place)
            continue
        _check_mask(mask, part)
        if documents == "file":
            yield from _document_pieces(text_blocks(part, progress), part)
        else:
            lines = split_lines(text_blocks(part, progress), "\n", part)
            for text in lines if documents == "line" else _paragraphs(lines, part):
                yield from _document_pieces([text], part)


def prompts(source: Source, tokenizer: "Tokenizer", column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source in order: lines of plain text, or a column of records.

    A column holds text, or messages: then what the assistant said last is left out. Without a
    column, it is `messages`, `prompt` (for a model that chats the words of its user) or `text`,
    the first of these that a record has.
    """
    choose = partial(_prompt_columns, column)
    for part in parts(source):
        if is_text(part):
            lines = split_lines(text_blocks(part, lambda amount: None), "\n", part)
            yield from (Prompt(Piece(line), None) for line in lines if line.strip())
        else:
            for place, record in records(part, choose, lambda amount: None):
                if prompt := _prompt(record, tokenizer, choose, place):
                    yield prompt


# ---- plain text ----------------------------------------------------------------------------------


def _check_mask(mask: str, where: Any) -> None:
    if mask == "assistant":
        raise UserError(
            f"{where}: plain text has no assistant turns; mask all of it, or give records with"
            " messages or prompt and completion"
        )


def _paragraphs(lines: Iterable[str], file: Path) -> Iterator[str]:
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            paragraph, size = [], 0
            for line in group:
                paragraph.append(line)
                size += len(line) + 64  # what a line takes beside its characters
                check_length("a paragraph", size, file)
            yield "\n".join(paragraph)


# Byte-level tokenizers join no letter with the line end before it and no word with the space after
# it: cuts there leave the tokens as they are. Those that put a space before any text add one at
# every cut.
SEAMS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def _document_pieces(blocks: Iterable[str], where: Any) -> Iterator[Piece]:
    """One document of plain text, given in any blocks, in pieces of bounded length."""
    rest, starts = "", True
    for block in blocks:
        rest += block
        at = 0
        while len(rest) - at > 2 * PIECE and (not starts or rest.strip()):
            seams = (seam.search(rest, at + PIECE, at + 2 * PIECE) for seam in SEAMS)
            cut = next((match.start() for match in seams if match), at + 2 * PIECE)
            yield Piece(rest[at:cut], starts, ends=False)
            at, starts = cut, False
        rest = rest[at:]
        check_length("a stretch of blanks", len(rest), where)
    if not starts or rest.strip():
        yield Piece(rest, starts)


# ---- records -------------------------------------------------------------------------------------


def _document_columns(text_field: str, names: Iterable[str], where: Any) -> list[str]:
    """The columns that hold a record's document; one that is asked for comes first."""
    choices = [GENERATED_COLUMNS, ["messages"], ["prompt", "completion"], [text_field]]
    if text_field != "text":
        choices.reverse()
    names = list(names)
    for choice in choices:
        if all(name in names for name in choice):
            return choice
    expected = f"field {text_field!r}, nor messages, nor prompt and completion"
    raise _no_column(expected, names, where, "--data.text-field")


def _prompt_columns(column: str | None, names: Iterable[str], where: Any) -> list[str]:
    choices, names = ["messages", "prompt", "text"] if column is None else [column], list(names)
    if columns := [choice for choice in choices if choice in names]:
        return columns
    raise _no_column(f"column {' or '.join(choices)}", names, where, "--column")


def _no_column(expected: str, names: list, where: Any, flag: str) -> UserError:
    present = printable(", ".join(map(str, names)) or "none")
    return UserError(f"{where}: no {expected}; it has {present}: choose one with {flag}")


def _record_pieces(
    record: Mapping[str, Any], tokenizer: "Tokenizer", choose: Choose, mask: str, place: str
) -> Iterator[Piece]:
    columns = choose(record, place)
    values = [record[column] for column in columns]
    if columns == GENERATED_COLUMNS:
        yield _generated(record, tokenizer, mask, place)
    elif len(values) == 1 and isinstance(values[0], str):
        _check_mask(mask, f"{place}, {columns[0]!r}")
        yield from _document_pieces(values, place)
    elif values != [None]:
        turns = [
            [{"role": role, "content": value}] if isinstance(value, str) else value
            for role, value in zip(("user", "assistant"), values, strict=False)
        ]
        if not all(isinstance(turn, list) for turn in turns):
            raise UserError(f"{place}: expected text or messages in {' and '.join(columns)}")
        if messages := _messages(list(itertools.chain(*turns)), columns[0], place):
            yield tokenizer.render_chat(messages, mask, place)


def _messages(values: list, column: str, place: str) -> list[dict[str, Any]]:
    """Messages as they were before a columnar file filled in every key that some message has."""
    if not all(isinstance(value, dict) and isinstance(value.get("role"), str) for value in values):
        raise UserError(f"{place}: expected messages with role and content in {column!r}")
    return [{k: v for k, v in message.items() if v is not None} for message in values]


def _generated(record: Mapping[str, Any], tokenizer: "Tokenizer", mask: str, place: str) -> Piece:
    """What a model wrote; where it was cut off there is no end to learn."""
    messages, prompt, completion, reason = (record[column] for column in GENERATED_COLUMNS)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f"{place}: expected text in prompt and completion")
    if messages is None:
        start = prompt if tokenizer.bos is None else tokenizer.special["bos_token"] + prompt
        text = start + completion + ("" if reason == "length" else tokenizer.special["eos_token"])
        spans = None if mask == "all" else ((len(start), len(text)),)
        return Piece(text, rendered=True, spans=spans)
    messages = _messages(messages, "messages", place)
    piece = tokenizer.render_chat(messages, mask, place)
    if reason != "length":
        return piece
    asked, body = tokenizer.render_prompt(messages[:-1], place).text, completion.strip()
    # Behind the prompt: as few letters as an answer may have could be those of its end token.
    start = len(os.path.commonprefix([asked, piece.text]))
    at = piece.text.find(body, start)
    stop = start if at < 0 else at + len(body)  # a template may have made it another text
    spans = piece.spans and tuple((a, min(b, stop)) for a, b in piece.spans if a < stop)
    return piece._replace(text=piece.text[:stop], spans=spans)


def _prompt(
    record: Mapping[str, Any], tokenizer: "Tokenizer", choose: Choose, place: str
) -> Prompt | None:
    columns = choose(record, place)
    column = next((column for column in columns if record[column] is not None), columns[0])
    value = record[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and (column != "prompt" or tokenizer.template is None):
        return Prompt(Piece(value), None)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{place}: expected text or messages in {column!r}")
    messages = _messages(value, column, place)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{place}: expected a turn of the user in {column!r}, found none")
    return Prompt(tokenizer.render_prompt(messages, place), tuple(messages))
