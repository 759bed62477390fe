"""Files and hub data sets, as text and as records."""

import codecs
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime import report
from runtime.errors import UserError
from runtime.files import _line, check_links, digest

KINDS = (".txt", ".jsonl", ".parquet")


PACKED = (".gz", ".zst")


BLOCK = 1 << 20  # bytes read at once


LONGEST = 1 << 26  # bytes or characters of a line: it is held in memory


PACKING = 256  # times smaller than it was: more than any text becomes


Progress = Callable[[int], object]


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

    datasets.disable_progress_bars()  # they would run into ours
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    split = split or "train"
    with _from_hub(
        f"{name}: neither a local file nor a hub data set that can be read"
        " ({}); check the name and the network, or give a local file"
    ):
        with report.progress(f"fetching {repository}"):
            hub = datasets.load_dataset_builder(repository, config or None)
    splits = hub.info.splits or {}
    size = splits[split].num_examples if split in splits else None
    facts = [repository, hub.config.name, str(hub.info.version), hub.hash, split]
    return Source(name, digest(facts), size, (), hub, split, streaming)


def _kind(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in KINDS else None


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


# Which of its columns are read from a table, given the names of all, and where they were found.
Choose = Callable[[Iterable[str], Any], list[str]]


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
            with report.progress(f"fetching {source.name}"):
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
