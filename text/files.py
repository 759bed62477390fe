"""Files and hub data sets, as text and as records."""

import codecs
import dataclasses
import functools
import glob
import io
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

from runtime import buckets, commits, report
from runtime.errors import UserError
from runtime.files import check_links, digest, library_errors, local_path, read_json

KINDS = (".txt", ".jsonl", ".parquet")
CONVERTERS = {".json": "from_json", ".csv": "from_csv"}  # of `datasets.Dataset`
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
HUB = re.compile(rf"(\w[\w.-]*/\w[\w.-]*{commits.REVISION})(?::([^:]*))?(?::(.*))?")
SIDECAR = ".settings.json"  # of a jsonl file, which holds records only
BLOCK = 1 << 20  # bytes read at once
PART = 1 << 30  # bytes of files, about, that are tokenized by themselves where there are more
LONGEST = 1 << 26  # characters of a line: it is held in memory

Progress = Callable[[int], object]
Choose = Callable[[Iterable[str], Any], list[str]]  # columns to read, of those that are there


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from: files, or a split of a hub data set."""

    name: str
    fingerprint: str
    files: tuple[Path, ...] = ()
    hub: tuple[str, str, str] = ("", "", "")  # repository, commit, config
    split: str = ""
    streaming: bool = False
    parts: tuple["Source", ...] = ()
    """What of a large source is tokenized by itself, and again where it has changed."""
    is_part: bool = False

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def builder(self) -> Any:
        """Asks the hub about a data set: not before it is read, since its tokens may be there."""
        import datasets

        datasets.disable_progress_bars()  # they would run into ours
        repository, commit, config = self.hub
        with library_errors(f"{self}: cannot be read"):
            if commit in commits.CACHED:
                datasets.config.HF_HUB_OFFLINE = True  # else it waits, and tries again for long
            builder = datasets.load_dataset_builder(repository, config or None, revision=commit)
            if datasets.config.HF_HUB_OFFLINE and builder.hash != commit:  # the last that it read
                raise ConnectionError(f"the hub is out of reach, and the cache lacks {commit}")
            return builder

    @property
    def size(self) -> int | None:
        """Bytes of the files or rows of the data set: what progress is reported in."""
        if self.files:
            return sum(file.stat().st_size for file in self.files)
        splits = self.builder.info.splits or {}
        return splits[self.split].num_examples if self.split in splits else None


def canonical(name: str) -> str:
    """One spelling for a path, the same from any folder; an id of the hub is as it is."""
    if buckets.in_bucket(name):
        return name
    path = local_path(name)
    if os.path.exists(path):  # a link is not followed: where it leads may lack the suffix
        return str(path.parent.resolve() / path.name)
    return str(path.absolute()) if glob.has_magic(name) else name


def hub_commit(name: str) -> tuple[str, str, str, str] | None:
    """Repository, commit, config and split of a hub data set; None for a path."""
    match = HUB.fullmatch(name)
    if match is None or kind(Path(name)) or os.path.exists(os.path.expanduser(name)):
        return None
    with library_errors(f"{name}: cannot be read"):
        commit = commits.commit(match[1], "dataset")
    return match[1].partition("@")[0], commit, match[2] or "", match[3] or "train"


def find(name: str, *, streaming: bool = False) -> Source:
    """The source that `name`, a file, folder, glob or `id[@revision][:config][:split]`, is."""
    with library_errors(f"{name}: cannot be read"):  # a path may be too long, or forbidden
        path, folder, hidden = buckets.local_path(name), None, 0
        if path.is_dir():
            folder, paths, root = path, [], str(path.absolute()).rstrip("/")
            for place, folders, names in os.walk(root or "/"):
                for x in (os.path.join(place, name) for name in (*folders, *names)):
                    if "/." not in x[len(root) :]:
                        paths.append(x)
                    elif kind(x):
                        hidden += 1
        elif path.is_file():
            paths = [str(path)]
        elif hub := hub_commit(name):
            return Source(name, digest(hub), (), hub[:3], hub[3], streaming)
        elif glob.has_magic(name):
            folder = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            paths = glob.glob(str(path), recursive=True)
        else:
            raise UserError(f"{name}: no such file or folder, and not a hub data set (owner/name)")
        paths = sorted((os.path.join(os.getcwd(), x) for x in paths), key=lambda x: x.split("/"))
        convertible = [x for x in paths if os.path.splitext(x)[1].lower() in CONVERTERS]
        if folder:
            # A folder that is a link is not read, but refused where it leads out.
            paths = [x for x in paths if kind(x) or (os.path.islink(x) and os.path.isdir(x))]
        targets = check_links(folder, paths)
        facts = [  # a file that another replaced may have its size and its date
            (path, target, x.st_size, x.st_mtime_ns, x.st_ctime_ns, x.st_ino)
            for path, (target, x) in zip(paths, targets, strict=True)
            if x and S_ISREG(x.st_mode)
        ]
        count, facts = len(facts), [x for x in facts if not is_pointer(path=x[0], size=x[2])]
        left_out = f"{hidden} hidden files and {count - len(facts)} Git LFS pointers left out"
        if not facts or not all(kind(x[0]) for x in facts):
            kinds = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSION)}"
            pull = f" ({left_out}; git lfs pull fetches them)" if count > len(facts) else ""
            convert = f"; {conversion(convertible[0])}" if convertible else ""
            raise UserError(f"{name}: no file to read in it; expected {kinds}{pull}{convert}")
        if hidden or count > len(facts):
            report.say(f"{name}: {left_out}")
    parts = (Source(name, digest(x), _paths(x), is_part=True) for x in _parts(facts))
    return Source(name, digest(facts), _paths(facts), parts=tuple(parts))


def _paths(facts: list[tuple]) -> tuple[Path, ...]:
    return tuple(Path(path) for path, *_ in facts)


def _parts(facts: list[tuple]) -> Iterable[list[tuple]]:
    """Large files one by one, and small ones in groups that stay when others come and go; none
    where all of them together are one part."""
    small, groups = PART // 16, {}
    if sum(size for _, _, size, *_ in facts) <= PART:
        return ()
    count = 1 << (sum(size for _, _, size, *_ in facts if size < small) // PART).bit_length()
    for x in facts:
        group = x[0] if x[2] >= small else zlib.crc32(os.fsencode(x[0])) % count
        groups.setdefault(group, []).append(x)
    return groups.values()


def conversion(path: str) -> str:
    """How to make a table of another kind one that is read."""
    stem, suffix = os.path.splitext(path)
    one, other = json.dumps(path), json.dumps(f"{stem}.parquet")
    call = f"datasets.Dataset.{CONVERTERS[suffix.lower()]}({one}).to_parquet({other})"
    return f"convert it once by: python -c {shlex.quote(f'import datasets; {call}')}"


def written_settings(file: Path) -> dict[str, Any]:
    """The settings by which generate.py wrote a file; of any other file, none."""
    import pyarrow.parquet

    try:
        if file.suffix != ".parquet":
            return read_json(file.with_suffix(SIDECAR))
        settings = json.loads(pyarrow.parquet.read_schema(file).metadata[b"generation"])
        return settings if isinstance(settings, dict) else {}
    except (UserError, OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return {}


def is_pointer(path: str, size: int) -> bool:
    """Whether Git LFS left a note in the place of a file's content."""
    if size > 200:
        return False
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def kind(part: str | Path | Source) -> str | None:
    """The suffix of a file, without its compression's; None for one that is not read here."""
    if isinstance(part, Source):
        return "hub"
    stem, suffix = os.path.splitext(part)
    suffix = os.path.splitext(stem)[1] if suffix.lower() in COMPRESSION else suffix
    return suffix.lower() if suffix.lower() in KINDS else None


def text_blocks(file: Path, progress: Progress) -> Iterator[str]:
    """The text of a file, block by block, with universal newlines; progress is in its bytes."""
    import pyarrow

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    with (
        library_errors(f"{file}: cannot be read to its end"),
        open(file, "rb") as raw,
        pyarrow.input_stream(raw, compression=COMPRESSION.get(file.suffix.lower())) as stream,
    ):
        block, before, at = None, 0, 0
        while block != b"":
            block = stream.read(BLOCK)
            progress(raw.tell() - before)
            before = raw.tell()
            if (zero := block.find(b"\0")) >= 0:
                raise UserError(f"{file}: byte {at + zero} is 0: a binary file, not text")
            at += len(block)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its object: what was left of blocks, and this
                first, byte = at - len(error.object) + error.start, error.object[error.start]
                problem = f"byte {first} (0x{byte:02x}) is not UTF-8"
                remedy = "convert it, as with: iconv -f latin1 -t utf-8"
                raise UserError(f"{file}: {problem}; {remedy}") from error


def text_lines(file: Path, progress: Progress) -> Iterator[str]:
    rest = ""
    for block in text_blocks(file, progress):
        *lines, rest = (rest + block).split("\n")
        yield from lines
        if len(rest) > LONGEST:
            raise UserError(f"{file}: a line in it is longer than {LONGEST >> 20} MiB: break it up")
    yield rest


def records(part: Path | Source, choose: Choose, progress: Progress) -> Iterator[tuple[str, dict]]:
    """The records of a file that is no plain text, or of a data set, each with where it stands."""
    readers = {".jsonl": _json_records, ".parquet": _parquet_records, "hub": _hub_records}
    for number, record in enumerate(readers[kind(part)](part, choose, progress), start=1):
        if record is not None:
            yield f"{part} record {number}", record


def _json_records(file: Path, choose: Choose, progress: Progress) -> Iterator[dict | None]:
    for number, line in enumerate(text_lines(file, progress), start=1):
        with library_errors(f"{file} line {number}: not JSON that can be read"):
            record = json.loads(line) if line.strip() else None
            if "\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()  # fails for half a surrogate pair
            if line.strip() and not isinstance(record, dict):
                raise ValueError(f"expected an object, found {str(record)[:40]!r}")
        yield record


def _parquet_records(file: Path, choose: Choose, progress: Progress) -> Iterator[dict]:
    import pyarrow.parquet

    with (
        library_errors(f"{file}: not a whole parquet file"),
        open(file, "rb") as raw,  # not by its name, which pyarrow wants to be UTF-8
        tempfile.TemporaryFile() as temporary,
    ):
        if compression := COMPRESSION.get(file.suffix.lower()):  # parquet is read from its end
            shutil.copyfileobj(pyarrow.input_stream(raw, compression), temporary)
        table = pyarrow.parquet.ParquetFile(temporary if compression else raw)
        columns = choose(table.schema_arrow.names, file)
        rows, size = max(table.metadata.num_rows, 1), file.stat().st_size
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
            progress(size * len(batch) // rows)


def _hub_records(source: Source, choose: Choose, progress: Progress) -> Iterator[dict]:
    with library_errors(f"{source}: cannot be read"):
        if source.streaming:
            rows = source.builder.as_streaming_dataset(source.split)
        else:
            with report.progress(f"fetching {source}"):
                source.builder.download_and_prepare()
            rows = source.builder.as_dataset(source.split)
        if rows.column_names:
            rows = rows.select_columns(choose(rows.column_names, source))
        for batch in rows.with_format("arrow").iter(batch_size=1024):
            yield from batch.to_pylist()
            progress(len(batch))
