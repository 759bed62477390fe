"""Records and plain text, as documents, conversations and prompts."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime import report
from runtime.errors import UserError
from runtime.files import printable
from text import files
from text.files import Source

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer

PIECE = 1 << 14  # characters: longer documents are tokenized in pieces of up to twice that
# Columns of a document, those that count first. The first of three or more may be empty.
SHAPES = (
    ("messages", "prompt", "completion", "finish_reason"),  # of generate.py
    ("messages",),
    ("conversations",),  # ShareGPT
    ("prompt", "completion"),
    ("prompt", "chosen"),  # DPO: what is rejected teaches nothing here
    ("chosen",),
    ("input", "instruction", "output"),  # Alpaca
    ("instruction", "output"),
)
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
TITLE = re.compile(r" = [^=].* = \n?")  # of an article of WikiText; sections have more signs


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
    shapes = [*SHAPES, ("text",)] if text_field is None else [(text_field,), *SHAPES]
    choose, counts = partial(_columns, shapes, "--data.text-field"), Counter()
    for part in source.files or [source]:
        if files.kind(part) != ".txt":
            rows = (
                (place, _filled(shapes, record, choose(record, place)))
                for place, record in files.records(part, choose, progress)
            )
            if documents == "article":
                yield from _articles((_row_text(*row) for row in rows), mask, part)
                continue
            for place, fields in rows:
                document = list(_record_pieces(fields, tokenizer, mask, place))
                counts[bool(document)] += 1
                yield from document
        elif documents == "file":
            yield from _document_pieces(files.text_blocks(part, progress), mask, part)
        elif documents == "article":
            yield from _articles((f"{x}\n" for x in files.text_lines(part, progress)), mask, part)
        else:
            lines = files.text_lines(part, progress)
            for text in lines if documents == "line" else _paragraphs(lines):
                yield from _document_pieces([text], mask, part)
    _say_left_out(source, counts)


def prompts(source: Source, tokenizer: "Tokenizer", column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source in order: lines of plain text, or a column of records.

    A column holds text, or messages: then what the assistant said last is left out. Without a
    column, it is `messages`, `prompt` (for a model that chats the words of its user), `text` or
    `conversations`, the first of these that a record has.
    """
    names = ("messages", "prompt", "text", "conversations") if column is None else (column,)
    shapes, counts = [(name,) for name in names], Counter()
    choose = partial(_columns, shapes, "--column")
    for part in source.files or [source]:
        if files.kind(part) == ".txt":
            lines = files.text_lines(part, lambda amount: None)
            yield from (Prompt(Piece(line), None) for line in lines if line.strip())
            continue
        for place, record in files.records(part, choose, lambda amount: None):
            fields = _filled(shapes, record, choose(record, place))
            prompt = _record_prompt(fields, tokenizer, place)
            counts[prompt is not None] += 1
            if prompt is not None:
                yield prompt
    _say_left_out(source, counts)


def _columns(
    shapes: Sequence[tuple[str, ...]], flag: str, names: Iterable[str], where: Any
) -> list[str]:
    """The columns, of those that are there, that may hold a document or a prompt."""
    names = list(names)
    if complete := [shape for shape in shapes if set(shape) <= set(names)]:
        return list(dict.fromkeys(itertools.chain(*complete)))
    expected = " or ".join(" and ".join(shape) for shape in shapes if len(shape) < 3)
    present = printable(", ".join(map(str, names)) or "none")
    raise UserError(f"{where}: no column {expected}; it has {present}: choose one with {flag}")


def _filled(
    shapes: Sequence[tuple[str, ...]], record: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The fields of the first shape that a record fills; none where it fills none."""
    for shape in shapes:
        if set(shape) <= set(names):
            fields = {name: record[name] for name in shape}
            required = list(fields.values())[len(shape) > 2 :]
            if None not in required and any(value not in ("", []) for value in required):
                return fields
    return {}


def _say_left_out(source: Source, counts: Mapping[bool, int]) -> None:
    if empty := counts[False]:
        report.say(f"{source}: {empty:,} of {sum(counts.values()):,} records left out: no text")


def _record_prompt(fields: dict, tokenizer: "Tokenizer", place: str) -> Prompt | None:
    for name, value in fields.items():
        if isinstance(value, str) and not value.strip():
            return None
        if isinstance(value, str) and (name != "prompt" or tokenizer.template is None):
            return Prompt(Piece(value), None)
        messages = _messages([value], name, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError(f"{place}: expected a turn of the user in {name!r}, found none")
        return Prompt(tokenizer.render_prompt(messages, place), tuple(messages))
    return None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "\n".join(group)


def _articles(lines: Iterable[str], mask: str, where: Any) -> Iterator[Piece]:
    """The articles of WikiText, each from its title to the next."""
    numbered = itertools.accumulate(
        lines, lambda last, line: (last[0] + bool(TITLE.fullmatch(line)), line), initial=(0, "")
    )
    for _, article in itertools.groupby(numbered, lambda pair: pair[0]):
        yield from _document_pieces((line for _, line in article), mask, where)


def _row_text(place: str, fields: Mapping[str, Any]) -> str:
    match list(fields.values()):
        case [] | [str()] as texts:
            return "".join(texts)
    raise UserError(f"{place}: --data.documents article is for lines of text, found {[*fields]}")


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


def _record_pieces(fields: dict, tokenizer: "Tokenizer", mask: str, place: str) -> Iterator[Piece]:
    match values := list(fields.values()):
        case []:
            return
        case [str()]:
            yield from _document_pieces(values, mask, place)
        case [str(prompt), str(completion)] if tokenizer.template is None:
            yield _answer(prompt, completion, tokenizer, mask)
        case [None, str(prompt), str(completion), reason]:  # what a model wrote after plain text
            yield _answer(prompt, completion, tokenizer, mask, ends=reason != "length")
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
        case [None | str() as more, str(prompt), str() as completion]:
            fields = {"prompt": f"{prompt}\n\n{more}" if more else prompt, "completion": completion}
            yield from _record_pieces(fields, tokenizer, mask, place)
        case [_, [{"role": "user" | "system"}, *_] as messages]:  # they begin with the prompt
            yield from _record_pieces({"messages": messages}, tokenizer, mask, place)
        case _:
            messages = _messages(values, " and ".join(fields), place)
            yield tokenizer.render_chat(messages, mask, place)


def _answer(
    prompt: str, completion: str, tokenizer: "Tokenizer", mask: str, *, ends: bool = True
) -> Piece:
    """A prompt and what follows it, without a chat template."""
    start = prompt if tokenizer.bos is None else tokenizer.special["bos_token"] + prompt
    text = start + completion + (tokenizer.special["eos_token"] if ends else "")
    return Piece(text, rendered=True, spans=None if mask == "all" else ((len(start), len(text)),))


def _messages(values: list, columns: str, place: str) -> list[dict[str, Any]]:
    """What columns of text or messages say, without the keys that a columnar file fills in."""
    turns = [
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in zip(("user", "assistant"), values, strict=False)
    ]
    messages = [_turn(turn) for x in turns for turn in (x if isinstance(x, list) else [x])]
    if not all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in messages):
        raise UserError(f"{place}: expected text or messages with role and content in {columns}")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _turn(message: Any) -> Any:
    match message:
        case {"from": str(role), "value": str(content)}:
            return {"role": ROLES.get(role, role), "content": content}
    return message
