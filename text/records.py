"""Records and plain text, as documents, conversations and prompts."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import UserError
from runtime.files import _line
from text.files import (
    Choose,
    Progress,
    Source,
    _check_length,
    _decoded,
    _file_records,
    _hub_records,
    _kind,
    _lines,
)

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer


PIECE = 1 << 14  # characters: longer documents are tokenized in pieces of up to twice that


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    starts: bool = True
    ends: bool = True
    rendered: bool = False  # by a chat template, which has put the special tokens in
    spans: tuple[tuple[int, int], ...] | None = None  # characters to learn; None: all of them


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
    choose = partial(_document_fields, text_field)
    for file in source.files:
        if _kind(file) == ".txt":
            if mask == "assistant":
                raise UserError(
                    f"{file}: plain text has no assistant turns; mask all of it, or give records"
                    " with messages or prompt and completion"
                )
            if documents == "file":
                yield from _document(_decoded(file, progress), file)
            else:
                lines = _lines(_decoded(file, progress), "\n", file)
                for text in lines if documents == "line" else _paragraphs(lines, file):
                    yield from _document([text], file)
        else:
            for place, record in _file_records(file, choose, progress):
                yield from _record(record, tokenizer, choose, mask, place)
    if source.hub is not None:
        for place, record in _hub_records(source, choose, progress):
            yield from _record(record, tokenizer, choose, mask, place)


class Prompt(NamedTuple):
    """Something to be continued."""

    piece: Piece
    messages: tuple[Mapping[str, Any], ...] | None  # what a chat template made it of, if one did


def prompts(source: Source, tokenizer: "Tokenizer", column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source in order: lines of plain text, or a column of records.

    A column holds text, or messages: then what the assistant said last is left out. Without a
    column, it is `messages`, `prompt` (for a model that chats the words of its user) or `text`,
    the first of these that a record has.
    """
    choose = partial(_prompt_fields, column)
    for file in source.files:
        if _kind(file) == ".txt":
            lines = _lines(_decoded(file, lambda amount: None), "\n", file)
            yield from (Prompt(Piece(line), None) for line in lines if line.strip())
        else:
            for place, record in _file_records(file, choose, lambda amount: None):
                yield from _prompt(record, tokenizer, choose, place)
    if source.hub is not None:
        for place, record in _hub_records(source, choose, lambda amount: None):
            yield from _prompt(record, tokenizer, choose, place)


def _paragraphs(lines: Iterable[str], file: Path) -> Iterator[str]:
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            paragraph, size = [], 0
            for line in group:
                paragraph.append(line)
                size += len(line) + 64  # what a line takes beside its characters
                _check_length("a paragraph", size, file)
            yield "\n".join(paragraph)


# Byte-level tokenizers join no letter with the line end before it and no word with the space after
# it: cuts there leave the tokens as they are. Those that put a space before any text add one at
# every cut.
SEAMS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def _document(blocks: Iterable[str], where: Any) -> Iterator[Piece]:
    """One document of plain text, given in any blocks, in pieces of bounded length."""
    rest, starts = "", True
    for block in blocks:
        rest += block
        at = 0
        while len(rest) - at > 2 * PIECE and (not starts or rest.strip()):
            found = (seam.search(rest, at + PIECE, at + 2 * PIECE) for seam in SEAMS)
            cut = next((match.start() for match in found if match), at + 2 * PIECE)
            yield Piece(rest[at:cut], starts, ends=False)
            at, starts = cut, False
        rest = rest[at:]
        _check_length("a stretch of blanks", len(rest), where)
    if not starts or rest.strip():
        yield Piece(rest, starts)


WRITTEN = ["messages", "prompt", "completion", "finish_reason"]  # by generate.py


def _document_fields(text_field: str, names: Iterable[str], where: Any) -> list[str]:
    """The fields of a record that hold its document; one that is asked for comes first."""
    names = list(names)
    choices = [WRITTEN, ["messages"], ["prompt", "completion"], [text_field]]
    if text_field != "text":
        choices.reverse()
    for choice in choices:
        if all(name in names for name in choice):
            return choice
    raise UserError(
        f"{where}: no field {text_field!r}, nor messages, nor prompt and completion; it has"
        f" {_line(', '.join(map(str, names)) or 'none')}: choose one with --data.text-field"
    )


def _prompt_fields(column: str | None, names: Iterable[str], where: Any) -> list[str]:
    names = list(names)
    choices = ["messages", "prompt", "text"] if column is None else [column]
    if found := [choice for choice in choices if choice in names]:
        return found
    raise UserError(
        f"{where}: no column {' or '.join(choices)}; it has"
        f" {_line(', '.join(map(str, names)) or 'none')}: choose one with --column"
    )


def _record(
    record: Mapping[str, Any], tokenizer: "Tokenizer", choose: Choose, mask: str, place: str
) -> Iterator[Piece]:
    fields = choose(record, place)
    values = [record[field] for field in fields]
    if values == [None]:
        return
    if fields == WRITTEN:
        yield _answer(record, tokenizer, mask, place)
        return
    if len(values) == 1 and isinstance(values[0], str):
        if mask == "assistant":
            raise UserError(
                f"{place}: its {fields[0]!r} is plain text and has no assistant turns; mask all,"
                " or give records with messages or prompt and completion"
            )
        yield from _document(values, place)
        return
    roles = ("user", "assistant")
    turns = [
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in zip(roles, values, strict=False)
    ]
    if not all(isinstance(turn, list) for turn in turns):
        raise UserError(f"{place}: expected text or messages in {' and '.join(fields)}")
    messages = _messages([message for turn in turns for message in turn], fields[0], place)
    if messages:
        yield tokenizer.conversation(messages, mask, place)


def _messages(found: list, field: str, place: str) -> list[dict[str, Any]]:
    """Messages as they were before a columnar file filled in every key that some message has."""
    if not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in found
    ):
        raise UserError(f"{place}: expected messages with role and content in {field!r}")
    return [{k: v for k, v in message.items() if v is not None} for message in found]


def _answer(record: Mapping[str, Any], tokenizer: "Tokenizer", mask: str, place: str) -> Piece:
    """What a model wrote; where it was cut off there is no end to learn."""
    messages, prompt, completion, reason = (record[field] for field in WRITTEN)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f"{place}: expected text in prompt and completion")
    if messages is None:
        start = prompt if tokenizer.bos is None else tokenizer.special["bos_token"] + prompt
        text = start + completion + ("" if reason == "length" else tokenizer.special["eos_token"])
        spans = None if mask == "all" else ((len(start), len(text)),)
        return Piece(text, rendered=True, spans=spans)
    messages = _messages(messages, "messages", place)
    piece = tokenizer.conversation(messages, mask, place)
    if reason != "length":
        return piece
    asked, body = tokenizer.question(messages[:-1], place).text, completion.strip()
    # Behind the question: as few letters as an answer may have could be those of its end token.
    start = len(os.path.commonprefix([asked, piece.text]))
    found = piece.text.find(body, start) if body else start
    stop = start if found < 0 else found + len(body)  # a template may have made it another text
    spans = piece.spans and tuple((a, min(b, stop)) for a, b in piece.spans if a < stop)
    return piece._replace(text=piece.text[:stop], spans=spans)


def _prompt(
    record: Mapping[str, Any], tokenizer: "Tokenizer", choose: Choose, place: str
) -> Iterator[Prompt]:
    fields = choose(record, place)
    field = next((field for field in fields if record[field] is not None), fields[0])
    value = record[field]
    if isinstance(value, str) and not value.strip():
        return
    if isinstance(value, str) and field == "prompt" and tokenizer.template is not None:
        value = [{"role": "user", "content": value}]
    if isinstance(value, str):
        yield Prompt(Piece(value), None)
    elif isinstance(value, list):
        messages = _messages(value, field, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError(f"{place}: expected a turn of the user in {field!r}, found none")
        yield Prompt(tokenizer.question(messages, place), tuple(messages))
    elif value is not None:
        raise UserError(f"{place}: expected text or messages in {field!r}")
