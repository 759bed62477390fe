"""Files and hub data sets, as text and as records."""

import codecs
import contextlib
import dataclasses
import glob
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime import report
from runtime.errors import UserError
from runtime.files import check_links, digest, printable

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 26  # bytes or characters of a line: it is held in memory

Progress = Callable[[int], object]
# Which of its columns are read from a table, given the names of all, and where they stand.
Choose = Callable[[Iterable[str], Any], list[str]]


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


def canonical(name: str) -> str:
    """One spelling for a path, which means the same from any folder; an id of the hub is as it is.

    A link is not followed: the file that it leads to may lack the suffix.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return str(path.parent.resolve() / path.name)
    return str(path.absolute()) if _is_glob(name) else name


def _is_glob(name: str) -> bool:
    return not set("*?[").isdisjoint(name)


@contextlib.contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """What a library raises over somebody's file, or its panic, is an error in its own words."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{problem} ({printable(error)})") from error


# ---- finding -------------------------------------------------------------------------------------


def find(name: str, *, streaming: bool = False) -> Source:
    """The source that `name`, a file, folder, glob or `id[:config][:split]`, stands for."""
    with library_errors(f"{name}: cannot be read"):  # a path may be too long, or forbidden
        path = Path(name).expanduser()
        if path.is_dir():
            files = _within(path, path.rglob("*"))
        elif path.is_file():
            files = [path]
        elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:.*)?", name) and not file_kind(path):
            return _find_on_hub(name, streaming)
        elif _is_glob(name):
            fixed = itertools.takewhile(lambda part: not _is_glob(part), path.parts)
            files = _within(Path(*fixed), map(Path, glob.glob(str(path), recursive=True)))
        else:
            raise UserError(f"{name}: no such file or folder, and not a hub data set (owner/name)")
    if not files or not all(map(file_kind, files)):
        problem = "not a kind of file that is read here" if files else "no file to read in it"
        kinds = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSION)}"
        raise UserError(f"{name}: {problem}; expected {kinds}")
    files = sorted(file.absolute() for file in files)  # links may lead to files without a suffix
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(name, digest(facts), sum(size for _, size, _ in facts), tuple(files))


def _within(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """The files to read among those in a folder, none of which may lead out of it."""
    paths = [
        path for path in paths
        if (path.is_file() and file_kind(path)) or (path.is_symlink() and path.is_dir())
    ]  # fmt: skip
    check_links(folder, paths)
    return [path for path in paths if path.is_file()]


def file_kind(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSION else path.suffix
    return suffix if suffix in KINDS else None


def _find_on_hub(name: str, streaming: bool) -> Source:
    import datasets

    datasets.disable_progress_bars()  # they would run into ours
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    split = split or "train"
    hub = datasets.load_dataset_builder(repository, config or None)
    splits = hub.info.splits or {}
    size = splits[split].num_examples if split in splits else None
    facts = [repository, hub.config.name, str(hub.info.version), hub.hash, split]
    return Source(name, digest(facts), size, (), hub, split, streaming)


# ---- text ----------------------------------------------------------------------------------------


def _blocks(file: Path, progress: Progress) -> Iterator[bytes]:
    """The bytes of a file, uncompressed; progress is in bytes of the file itself."""
    import pyarrow

    with (
        library_errors(f"{file}: cannot be read to its end"),
        open(file, "rb") as raw,
        pyarrow.input_stream(raw, compression=COMPRESSION.get(file.suffix)) as stream,
    ):
        before = 0
        while block := stream.read(BLOCK):
            progress(raw.tell() - before)
            before = raw.tell()
            yield block


def text_blocks(file: Path, progress: Progress) -> Iterator[str]:
    """The text of a file, block by block, with universal newlines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    before = 0
    for block in itertools.chain(_blocks(file, progress), [b""]):
        if (zero := block.find(b"\0")) >= 0:
            raise UserError(f"{file}: byte {before + zero} is 0: a binary file, not text")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:  # its object: what was left of earlier blocks, and this
            at = before + len(block) - len(error.object) + error.start
            raise UserError(
                f"{file}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8;"
                " convert the file, as with: iconv -f latin1 -t utf-8"
            ) from error
        yield text
        before += len(block)


def split_lines(blocks: Iterable[Any], newline: Any, file: Path) -> Iterator[Any]:
    """Text or bytes split at `newline`."""
    rest, size = [], 0
    for block in blocks:
        first, *others = block.split(newline)
        rest.append(first)
        size += len(first)
        check_length("a line", size, file)
        for line in others:
            yield newline[:0].join(rest)
            rest, size = [line], len(line)
    yield newline[:0].join(rest)


def check_length(what: str, size: int, where: Any) -> None:
    if size > LONGEST:
        raise UserError(f"{where}: {what} in it is longer than {LONGEST >> 20} MiB: break it up")


# ---- records -------------------------------------------------------------------------------------


def parts(source: Source) -> tuple[Path | Source, ...]:
    """What is read one after the other: the files, or the data set as a whole."""
    return source.files or (source,)


def is_text(part: Path | Source) -> bool:
    return isinstance(part, Path) and file_kind(part) == ".txt"


def records(
    part: Path | Source, choose: Choose, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file that is no plain text, or of a data set, each with where it stands."""
    readers = {".jsonl": _json_records, ".parquet": _parquet_records, None: _hub_records}
    kind, name = (file_kind(part), part) if isinstance(part, Path) else (None, part.name)
    for number, record in readers[kind](part, choose, progress):
        yield f"{name} record {number}", record


def _json_records(file: Path, choose: Choose, progress: Progress) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(split_lines(_blocks(file, progress), b"\n", file), start=1):
        if not line.strip():
            continue
        with library_errors(f"{file} line {number}: not JSON that can be read"):
            record = json.loads(line)
            if b"\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()  # fails for half a surrogate pair
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {str(record)[:40]!r}")
        yield number, record


def _parquet_records(file: Path, choose: Choose, progress: Progress) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    compressed = file.suffix in COMPRESSION
    with (
        library_errors(f"{file}: not a whole parquet file"),
        tempfile.TemporaryFile() as uncompressed,  # parquet is read from its end
    ):
        if compressed:
            uncompressed.writelines(_blocks(file, lambda amount: None))
        table = pyarrow.parquet.ParquetFile(uncompressed if compressed else file)
        columns = choose(table.schema_arrow.names, file)
        number, rows, size = 0, max(table.metadata.num_rows, 1), file.stat().st_size
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from enumerate(batch.to_pylist(), start=number + 1)
            number += len(batch)
            progress(size * len(batch) // rows)


def _hub_records(source: Source, choose: Choose, progress: Progress) -> Iterator[tuple[int, dict]]:
    with library_errors(f"{source.name}: cannot be read"):
        if source.streaming:
            rows = source.hub.as_streaming_dataset(source.split)
        else:
            with report.progress(f"fetching {source.name}"):
                source.hub.download_and_prepare()
            rows = source.hub.as_dataset(source.split)
        if rows.column_names:
            rows = rows.select_columns(choose(rows.column_names, source.name))
        number = 0
        for batch in rows.with_format("arrow").iter(batch_size=1024):
            yield from enumerate(batch.to_pylist(), start=number + 1)
            number += len(batch)
            progress(len(batch))
