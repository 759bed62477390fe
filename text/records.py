"""Records and plain text, as documents, conversations and prompts."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import UserError
from runtime.files import printable
from text import files
from text.files import Source

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
    source: Source, tokenizer: "Tokenizer", *, text_field: str | None = None,
    documents: str = "file", mask: str = "all", progress: files.Progress = lambda amount: None,
) -> Iterator[Piece]:  # fmt: skip
    """The documents of a source in order, blank ones left out; in memory a few at a time."""
    choices = [GENERATED_COLUMNS, ["messages"], ["prompt", "completion"]]
    choices += [[text_field or "text"]]
    if text_field is not None:
        choices.reverse()  # one that is asked for comes first
    choose = partial(_columns, choices, "--data.text-field")
    for part in source.files or [source]:
        if files.kind(part) != ".txt":
            for place, record in files.records(part, choose, progress):
                values = {name: record[name] for name in choose(record, place)}
                yield from _record_pieces(values, tokenizer, mask, place)
        elif documents == "file":
            yield from _document_pieces(files.text_blocks(part, progress), mask, part)
        else:
            lines = files.text_lines(part, progress)
            for text in lines if documents == "line" else _paragraphs(lines):
                yield from _document_pieces([text], mask, part)


def prompts(source: Source, tokenizer: "Tokenizer", column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source in order: lines of plain text, or a column of records.

    A column holds text, or messages: then what the assistant said last is left out. Without a
    column, it is `messages`, `prompt` (for a model that chats the words of its user) or `text`,
    the first of these that a record has.
    """
    choices = [["messages"], ["prompt"], ["text"]] if column is None else [[column]]
    choose = partial(_columns, choices, "--column")
    for part in source.files or [source]:
        if files.kind(part) == ".txt":
            lines = files.text_lines(part, lambda amount: None)
            yield from (Prompt(Piece(line), None) for line in lines if line.strip())
            continue
        for place, record in files.records(part, choose, lambda amount: None):
            names = choose(record, place)
            name = next((name for name in names if record[name] is not None), names[0])
            value = record[name]
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            if isinstance(value, str) and (name != "prompt" or tokenizer.template is None):
                yield Prompt(Piece(value), None)
                continue
            messages = _messages([value], name, place)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise UserError(f"{place}: expected a turn of the user in {name!r}, found none")
            yield Prompt(tokenizer.render_prompt(messages, place), tuple(messages))


def _columns(choices: list[list[str]], flag: str, names: Iterable[str], where: Any) -> list[str]:
    """The first choice that is all there, for a document; what may hold a prompt, every one."""
    names = list(names)
    if complete := [choice for choice in choices if set(choice) <= set(names)]:
        return sum(complete, []) if flag == "--column" else complete[0]
    expected = " or ".join(" and ".join(x) for x in choices if x != GENERATED_COLUMNS)
    present = printable(", ".join(map(str, names)) or "none")
    raise UserError(f"{where}: no column {expected}; it has {present}: choose one with {flag}")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "\n".join(group)


# Cuts that leave the tokens of byte-level tokenizers as they are: these join no letter with the
# line end before it and no word with the space after it. Others may add a space at every cut.
SEAMS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def _document_pieces(blocks: Iterable[str], mask: str, where: Any) -> Iterator[Piece]:
    """One document of plain text, given in any blocks, in pieces of bounded length."""
    if mask == "assistant":
        remedy = "mask all of it, or give records with messages or prompt and completion"
        raise UserError(f"{where}: plain text has no assistant turns; {remedy}")
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
    if not starts or rest.strip():
        yield Piece(rest, starts)


def _record_pieces(columns: dict, tokenizer: "Tokenizer", mask: str, place: str) -> Iterator[Piece]:
    match values := list(columns.values()):
        case [None]:
            return
        case [str()]:
            yield from _document_pieces(values, mask, place)
        case [None, str(prompt), str(completion), reason]:  # what a model wrote after plain text
            start = prompt if tokenizer.bos is None else tokenizer.special["bos_token"] + prompt
            end = "" if reason == "length" else tokenizer.special["eos_token"]
            text = start + completion + end
            spans = None if mask == "all" else ((len(start), len(text)),)
            yield Piece(text, rendered=True, spans=spans)
        case [messages, str(), str(completion), reason]:
            messages = _messages([messages], "messages", place)
            piece = tokenizer.render_chat(messages, mask, place)
            if reason == "length":  # it was cut off there: no end to learn
                asked, body = tokenizer.render_prompt(messages[:-1], place).text, completion.strip()
                # Behind the prompt: a short answer could occur in the name of its end token.
                start = len(os.path.commonprefix([asked, piece.text]))
                at = piece.text.find(body, start)
                stop = start if at < 0 else at + len(body)  # a template may have changed it
                spans = piece.spans and tuple((a, min(b, stop)) for a, b in piece.spans if a < stop)
                piece = piece._replace(text=piece.text[:stop], spans=spans)
            yield piece
        case [_, _, _, _]:
            raise UserError(f"{place}: expected text in prompt and completion")
        case _:
            if messages := _messages(values, " and ".join(columns), place):
                yield tokenizer.render_chat(messages, mask, place)


def _messages(values: list, columns: str, place: str) -> list[dict[str, Any]]:
    """What columns of text or messages say, without the keys that a columnar file fills in."""
    turns = [
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in zip(("user", "assistant"), values, strict=False)
    ]
    messages = [turn for x in turns for turn in (x if isinstance(x, list) else [x])]
    if not all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in messages):
        raise UserError(f"{place}: expected text or messages with role and content in {columns}")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]
