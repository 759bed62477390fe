"""What people have, as text to tokenize: files and hub data sets, records, chat templates."""

import codecs
import contextlib
import dataclasses
import datetime
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 14  # characters: longer documents are tokenized in pieces of up to twice that
LONGEST = 1 << 26  # bytes or characters of a line: it is held in memory
PACKING = 256  # times smaller than it was: more than any text becomes

Progress = Callable[[int], object]


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    starts: bool = True
    ends: bool = True
    rendered: bool = False  # by a chat template, which has put the special tokens in
    spans: tuple[tuple[int, int], ...] | None = None  # characters to learn; None: all of them


# --- sources ---


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from: files, or a split of a hub data set."""

    name: str
    fingerprint: str
    size: int | None
    """Bytes of the files or rows of the data set, if known: what `pieces` reports progress in."""
    files: tuple[Path, ...] = ()
    hub: Any = None
    split: str = ""
    streaming: bool = False


def find(name: str, *, streaming: bool = False) -> Source:
    """The source that `name`, a file, folder, glob or `id[:config][:split]`, stands for."""
    try:
        return _find(name, streaming)
    except (OSError, RuntimeError) as error:  # a path may be too long, forbidden, of nobody's home
        raise UserError(f"{name}: cannot be read ({_line(error)})") from error


def _find(name: str, streaming: bool) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        files = _within(path, path.rglob("*"))
    elif path.is_file():
        files = [path]
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:.*)?", name) and not _kind(path):
        return _find_on_hub(name, streaming)
    elif set(name) & set("*?["):
        fixed = itertools.takewhile(lambda part: not set(part) & set("*?["), path.parts)
        files = _within(Path(*fixed), map(Path, glob.glob(str(path), recursive=True)))
    else:
        raise UserError(f"{name}: no such file or folder, and not a hub data set (owner/name)")
    kinds = f"{', '.join(KINDS)}, each also with {' or '.join(PACKED)}"
    if not files:
        raise UserError(f"{name}: no file to read in it; expected {kinds}")
    if not all(map(_kind, files)):
        raise UserError(f"{name}: not a kind of file that is read here; expected {kinds}")
    files = sorted(file.absolute() for file in files)  # links may lead to files without a suffix
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(name, digest(facts), sum(size for _, size, _ in facts), tuple(files))


def _within(folder: Path, found: Iterable[Path]) -> list[Path]:
    """The files to read among what was found in a folder."""
    found = [
        path for path in found
        if (path.is_file() and _kind(path)) or (path.is_symlink() and path.is_dir())
    ]  # fmt: skip
    check_links(folder, found)
    return [path for path in found if path.is_file()]


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuses links that lead out of a folder, but in the cache of the hub, which is made of them.

    The folder may come from a stranger.
    """
    top = folder.resolve()
    blobs = (place.parent / "blobs" for place in (top, *top.parents) if place.name == "snapshots")
    inside = [top, *blobs]
    for path in paths:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in inside):
            raise UserError(
                f"{_line(path)}: it is a link that leads out of {folder}: put what it leads to"
                " there, or name that itself"
            )


@contextlib.contextmanager
def _from_hub(told: str) -> Iterator[None]:
    """What the hub's libraries raise is `told`, with the reason in it."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        raise UserError(told.replace("{}", _line(error))) from error


def _find_on_hub(name: str, streaming: bool) -> Source:
    import datasets

    repository, config, split = (*name.split(":", 2), "", "")[:3]
    split = split or "train"
    with _from_hub(
        f"{name}: neither a local file nor a hub data set that can be read"
        " ({}); check the name and the network, or give a local file"
    ):
        hub = datasets.load_dataset_builder(repository, config or None)
    splits = hub.info.splits or {}
    size = splits[split].num_examples if split in splits else None
    facts = [repository, hub.config.name, str(hub.info.version), hub.hash, split]
    return Source(name, digest(facts), size, (), hub, split, streaming)


def _kind(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in KINDS else None


def digest(facts: Any) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _line(said: object) -> str:
    """What somebody else's file or program says, short and fit to be printed."""
    text = " ".join(str(said).split())[:300] or type(said).__name__
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# --- documents ---


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


def _blocks(file: Path, progress: Progress) -> Iterator[bytes]:
    try:
        with open(file, "rb") as raw, _unpacked(file, raw) as stream:
            seen = size = 0
            while block := stream.read(BLOCK):
                progress(raw.tell() - seen)
                seen, size = raw.tell(), size + len(block)
                _check_packing(file, size, seen)
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read to its end ({_line(error)})") from error


def _check_packing(file: Path, size: int, packed: int) -> None:
    """Refuses a small file that is made to fill memory and disk."""
    if size > LONGEST + PACKING * packed:
        raise UserError(
            f"{file}: it unpacks to more than {PACKING} times its size, as text does not: unpack"
            " it yourself if it is as it should be"
        )


def _unpacked(file: Path, raw: io.BufferedReader) -> Any:
    if file.suffix == ".gz":
        return gzip.open(raw)
    if file.suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(raw, "zstd")
    return raw


def _decoded(file: Path, progress: Progress) -> Iterator[str]:
    """The text of a file, block by block, with universal newlines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    before = 0
    for block in itertools.chain(_blocks(file, progress), [b""]):
        if (zero := block.find(b"\0")) >= 0:
            raise UserError(f"{file}: byte {before + zero} is 0: a binary file, not text")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:  # in what it kept of earlier blocks, and this one
            at = before + len(block) - len(error.object) + error.start
            raise UserError(
                f"{file}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8;"
                " convert the file, as with: iconv -f latin1 -t utf-8"
            ) from error
        yield text
        before += len(block)


def _lines(blocks: Iterable[Any], newline: Any, file: Path) -> Iterator[Any]:
    """Text or bytes split at `newline`."""
    rest, size = [], 0
    for block in blocks:
        first, *others = block.split(newline)
        rest.append(first)
        size += len(first)
        _check_length("a line", size, file)
        for line in others:
            yield newline[:0].join(rest)
            rest, size = [line], len(line)
    yield newline[:0].join(rest)


def _check_length(what: str, size: int, where: Any) -> None:
    if size > LONGEST:
        raise UserError(f"{where}: {what} in it is longer than {LONGEST >> 20} MiB: break it up")


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


# --- records ---

# Which of its columns are read from a table, given the names of all, and where they were found.
Choose = Callable[[Iterable[str], Any], list[str]]
WRITTEN = ["messages", "prompt", "completion", "finish_reason"]  # by generate.py


def _file_records(file: Path, choose: Choose, progress: Progress) -> Iterator[tuple[str, dict]]:
    """The records of a file, each with where it stands."""
    read = _json_records if _kind(file) == ".jsonl" else _parquet_records
    return ((f"{file} record {number}", record) for number, record in read(file, choose, progress))


def _json_records(file: Path, choose: Choose, progress: Progress) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(_blocks(file, progress), b"\n", file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if b"\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()  # fails for half a surrogate pair
        except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
            raise UserError(f"{file} line {number}: not JSON ({_line(error)})") from error
        if not isinstance(record, dict):
            found = _line(str(record)[:40])
            raise UserError(f"{file} line {number}: expected an object, found {found!r}")
        yield number, record


def _parquet_records(file: Path, choose: Choose, progress: Progress) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as whole:  # parquet is read from its end: unpack it first
        if file.suffix in PACKED:
            whole.writelines(_blocks(file, lambda amount: None))
        try:
            table = pyarrow.parquet.ParquetFile(whole if file.suffix in PACKED else file)
            columns = choose(table.schema_arrow.names, file)
            number, rows, size = 0, max(table.metadata.num_rows, 1), file.stat().st_size
            groups = map(table.metadata.row_group, range(table.num_row_groups))
            _check_packing(file, sum(group.total_byte_size for group in groups), size)
            unpacked = 0
            # In small batches: a page holds a text once that many rows may repeat.
            for batch in table.iter_batches(batch_size=32, columns=columns):
                found = batch.to_pylist()
                unpacked += _length(found)
                _check_packing(file, unpacked, size)
                yield from enumerate(found, start=number + 1)
                number += len(batch)
                progress(size * len(batch) // rows)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{file}: not a whole parquet file ({_line(error)})") from error


def _length(value: Any) -> int:
    """Characters of all text in a record."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_length, value)) if isinstance(value, list) else len(str(value))


def _hub_records(source: Source, choose: Choose, progress: Progress) -> Iterator[tuple[str, dict]]:
    with _from_hub(f"{source.name}: cannot be read ({{}})"):
        if source.streaming:
            rows = source.hub.as_streaming_dataset(source.split)
        else:
            source.hub.download_and_prepare()
            rows = source.hub.as_dataset(source.split)
    if rows.column_names:
        rows = rows.select_columns(choose(rows.column_names, source.name))
    batches, number = iter(rows.with_format("arrow").iter(batch_size=1024)), 0
    while True:
        with _from_hub(f"{source.name}: reading stopped at row {number} ({{}})"):
            batch = next(batches, None)
        if batch is None:
            return
        for i, record in enumerate(batch.to_pylist(), start=number + 1):
            yield f"{source.name} record {i}", record
        number += len(batch)
        progress(len(batch))


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


# --- tokenizers and chat templates ---

# Around what a template generates, while it is rendered; NUL occurs in no text that is trained on.
OPEN, CLOSE = "\0generation(", "\0)generation"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with the conventions of the files beside it."""

    encoder: Any
    size: int
    """One more than its largest id."""
    bos: int | None
    """Put before each document of plain text; None where the model expects none."""
    eos: int
    """Put after each document of plain text."""
    special: Mapping[str, str]
    """Special tokens by their role, such as `eos_token`: templates refer to them."""
    closing: tuple[str, ...]
    """The special tokens, one of which ends a turn."""
    added: tuple[str, ...]
    """All tokens that stand for a text of their own, special or not."""
    template: Any
    """The compiled chat template, or None."""
    marks: bool
    """Whether the template says itself what the assistant generates."""
    fingerprint: str

    def encode(self, pieces: Sequence[Piece]) -> list[Any]:
        """Encodings on all cores, without special tokens."""
        # Offsets into the text cost a third of the speed and serve only to find the spans.
        spans = any(piece.spans is not None for piece in pieces)
        encode = self.encoder.encode_batch if spans else self.encoder.encode_batch_fast
        with _refusing("tokenizer.json fails on a text"):
            return encode([piece.text for piece in pieces], add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """What the chat template writes, with marks around what it says is generated."""
        return self.template.render(
            messages=messages,
            add_generation_prompt=prompt,
            tools=None,
            documents=None,
            **self.special,
        )

    def conversation(self, messages: Sequence[Mapping[str, Any]], mask: str, place: str) -> Piece:
        """Messages as the chat template writes them, with the spans of the assistant's turns."""
        with self._rendering(place):
            text, spans = _unmarked(self.render(messages))
            if mask == "all":
                spans = None
            elif not self.marks:
                spans = self._turns(messages, text)
        return Piece(text, rendered=True, spans=spans)

    def question(self, messages: Sequence[Mapping[str, Any]], place: str) -> Piece:
        """Messages as the chat template writes them, up to where the assistant goes on."""
        with self._rendering(place):
            return Piece(self._written(messages, prompt=True), rendered=True)

    @contextlib.contextmanager
    def _rendering(self, place: str) -> Iterator[None]:
        """Whatever goes wrong with the template is told with the place of the messages."""
        if self.template is None:
            raise UserError(
                f"{place}: a conversation, but the tokenizer has no chat template: put a"
                " chat_template.jinja beside tokenizer.json, or give plain text"
            )
        try:
            yield
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise UserError(f"{place}: the chat template refuses it ({_line(error)})") from error

    def _turns(self, messages: list, text: str) -> tuple[tuple[int, int], ...]:
        """The assistant's turns in `text`, found by rendering the conversation up to each."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._begin(messages, i, text)
            through = self._written(messages[: i + 1])
            stop = len(through)
            if not text.startswith(through):
                rest = text[start:]
                ends = [rest.find(token) + len(token) for token in self.closing if token in rest]
                stop = start + min(ends, default=len(rest))
            body = text[start:stop].rstrip()
            spans.append((start, start + len(body) if body.endswith(self.closing) else stop))
        return tuple(spans)

    def _begin(self, messages: list, i: int, text: str) -> int:
        """Where in `text` the assistant's words of message `i` begin: behind what opens a turn."""
        if i:
            before = self._written(messages[:i])
            if not text.startswith(before):
                raise UserError(
                    "the chat template writes a turn differently when others follow, so that the"
                    " assistant's cannot be found: put {% generation %} around them in it"
                )
            start = len(before)
            opening = self._written(messages[:i], prompt=True)[start:]
        else:  # a template may refuse to write nothing: what opens a turn opens this one too
            opening = self._written(messages, prompt=True)[len(text) :]
            start = max(text.find(opening), 0)
        shared = os.path.commonprefix([opening, text[start:]])
        if shared != opening:
            # It opens a thought that the turn lacks, though both may begin with some letters.
            heads = [end for end in ("\n", *self.added) if end in shared]
            shared = shared[: max((shared.rfind(end) + len(end) for end in heads), default=0)]
        return start + len(shared)

    def _written(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        return _unmarked(self.render(messages, prompt))[0]


def _unmarked(rendered: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """What a template rendered without its marks, and the spans that they enclosed."""
    text, spans = "", []
    for i, part in enumerate(re.split(f"{re.escape(OPEN)}|{re.escape(CLOSE)}", rendered)):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, tuple(spans)


def _encoder(path: Path) -> Any:
    import tokenizers

    with _refusing(f"{path}: not a tokenizer"), _muted():
        encoder = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        encoder.no_truncation()  # either may have been saved with it
        encoder.no_padding()
        return encoder


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json and what the configs beside it say."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; save the model's fast tokenizer there")
    encoder = _encoder(path)
    with _refusing(f"{path}: not a tokenizer"), _muted():
        sample = encoder.encode("a").ids
    config = _config(folder / "tokenizer_config.json")
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    for key, value in special.items():
        if not isinstance(value, str) or not _encodable(value):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {_line(key)} is not text")
    models = [_config(folder / name) for name in ("generation_config.json", "config.json")]
    bos, eos = (_token(name, encoder, special, models) for name in ("bos", "eos"))
    if eos is None:
        raise UserError(f"{folder}: no eos_token in tokenizer_config.json to end documents with")
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            special.setdefault(name, encoder.id_to_token(token))
    added = config.get("add_bos_token")
    if added is None:  # then the tokenizer's own post-processor says so
        added = bos is not None and sample[:1] == [bos]
    source = _template(folder, config)
    own = encoder.get_added_tokens_decoder().values()
    closing = {token.content for token in own if token.special}
    facts = [
        hashlib.blake2b(path.read_bytes()).hexdigest(),
        eos,
        bos if added else None,
        source,
        special,
    ]
    return Tokenizer(
        encoder,
        size=max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        bos=bos if added else None,
        eos=eos,
        special=special,
        closing=tuple(sorted(closing | {special["eos_token"]})),
        added=tuple(token.content for token in own),
        template=source and Template(source, folder),
        marks=bool(source and re.search(r"\{%-?\s*generation\s*-?%\}", source)),
        fingerprint=digest(facts),
    )


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the tokenizer's library raises: nothing precise, and panics, which are no
    `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({_line(error)})") from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without what a panic prints of itself."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    return config


def _token(name: str, encoder: Any, special: Mapping, models: Sequence[Mapping]) -> int | None:
    if f"{name}_token" in special:
        token = encoder.token_to_id(special[f"{name}_token"])
        if token is None:
            found = _line(special[f"{name}_token"])
            raise UserError(f"{name}_token {found!r} is not in tokenizer.json")
        return token
    ids = [config.get(f"{name}_token_id") for config in models]
    ids = [found[0] if isinstance(found, list) and found else found for found in ids]
    ids = [found for found in ids if isinstance(found, int) and 0 <= found < 1 << 32]
    return next(filter(encoder.id_to_token, ids), None)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which the model of a folder has ended."""
    found = {load_tokenizer(folder).eos}
    for name in ("generation_config.json", "config.json"):
        ids = _config(folder / name).get("eos_token_id")
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return tuple(sorted(found))


def _encodable(text: str) -> bool:
    """Whether it is text that can be stored: JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: its chat template cannot be read ({_line(error)})") from error
    if template is not None and not (isinstance(template, str) and _encodable(template)):
        raise UserError(f"{folder}: its chat template is not text")
    return template


class Template:
    """A chat template: a program, and of somebody else's.

    A sandbox keeps it from what is Python's; a process of its own bounds the time and the memory
    that it takes, and can write no file.
    """

    SECONDS, MEMORY = 10, 1 << 30  # of the processor, and bytes; for all it does with one list

    def __init__(self, source: str, folder: Path):
        import jinja2

        self.source, self.pipe = source, None
        try:
            _environment().parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"{folder}: its chat template is malformed ({_line(error)})") from error

    def render(self, **variables: Any) -> str:
        """What it writes; a `ValueError` holds what it complains of."""
        if self.pipe is None:
            self.start()
        try:
            self.pipe.send_bytes(json.dumps(variables, default=str).encode())
            text, error = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise UserError(
                f"the chat template takes more than {self.SECONDS} s or {self.MEMORY >> 20} MiB"
            ) from None
        if error or not _encodable(text):
            raise ValueError(error or "it writes what is not text")
        return text

    def start(self) -> None:
        self.pipe, there = multiprocessing.Pipe()
        code = "import sys; sys.path[0] = sys.argv[1]; import text; text._serve(*sys.argv[2:])"
        here, end = os.path.dirname(os.path.abspath(__file__)), there.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", code, here, *map(str, (end, self.SECONDS, self.MEMORY))],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[end], start_new_session=True,
        )  # fmt: skip
        there.close()
        self.pipe.send_bytes(self.source.encode())
        weakref.finalize(self, _stop, self.pipe, process)


def _stop(pipe: Any, process: subprocess.Popen) -> None:
    pipe.close()
    process.kill()
    process.wait()


def _serve(end: str, seconds: str, memory: str) -> None:
    """What the process of a template does until nobody asks any more."""
    from multiprocessing.connection import Connection

    pipe = Connection(int(end))
    source, compiled = pipe.recv_bytes().decode(), functools.cache(_environment().from_string)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for kind, limit in (
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    while True:
        try:
            variables = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        last = int(time.process_time()) + int(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (last, hard))
        try:
            answer = compiled(source).render(**variables), None
            if len(answer[0]) > LONGEST:
                answer = None, f"it writes more than {LONGEST >> 20} MiB"
        except Exception as error:
            answer = None, _line(error)
        pipe.send_bytes(json.dumps(answer).encode())


def _environment() -> Any:
    """A sandbox for templates, with what those of published tokenizers expect there."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}...{% endgeneration %}` encloses what the assistant writes."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opened, closed = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            return nodes.Scope([opened, *body, closed], lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def same_tokenizer(one: Path, other: Path) -> None:
    """Refuses two folders whose tokenizers give a token different ids."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    first, second = (
        {index: token for token, index in _encoder(file).get_vocab().items()} for file in files
    )
    for index in sorted(first.keys() | second.keys()):
        if first.get(index) != second.get(index):
            raise UserError(
                f"teacher and student have different tokenizers: id {index} is"
                f" {first.get(index)!r} in {one} and {second.get(index)!r} in {other}; train on the"
                " teacher's own text instead, with --loss.alpha 0"
            )
