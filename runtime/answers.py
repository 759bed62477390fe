"""What a model wrote, on disk: a journal while it writes, then a data set, then perhaps the hub."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import files
from runtime.errors import UserError

Settings = Mapping[str, Any]
MAY_CHANGE = frozenset({"model", "prompts"})  # other names of the same files
REMEDY = (
    "; answers that are finished are kept: make room or give permission, and give the same command"
    " again"
)


def check_settings(out: Path, before: Settings | None, now: Settings) -> None:
    """Refuses to go on with, or to take for finished, what was written by other settings."""
    if before is None:
        raise UserError(f"{out} is there, and not from here: give another --out, or --no-resume")
    if changed := files.changes(before, now, MAY_CHANGE):
        raise UserError(
            f"{out} was begun with other settings ({'; '.join(changed)}): give the same, another"
            " --out, or --no-resume"
        )


class Journal(contextlib.ExitStack):
    """The answers that are finished, a line each, after a line of settings.

    A line that a crash cut off is taken out; its answer is to be written again.
    """

    def __init__(self, out: Path, settings: Settings, *, resume: bool = True):
        super().__init__()
        self.path, self.lock = journal_path(out), out.with_name(f".{out.name}.lock")
        self.offsets: dict[tuple[int, int], int] = {}
        try:
            with files.disk_errors(self.path, REMEDY):
                self.enter_context(files.lock(self.lock, out))
                # Without a buffer, which closing would write again.
                self.file = self.enter_context(self.path.open("a+b", buffering=0))
            end = self._read(out, settings) if resume else 0
            with files.disk_errors(self.path, REMEDY):
                self.file.truncate(end)
                if not end:
                    self._append(settings)
        except BaseException:
            self.close()
            raise

    def _read(self, out: Path, settings: Settings) -> int:
        """Notes where the answers are; returns where the last whole one ends."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if end:
                    self.offsets[record["prompt"], record["sample"]] = end
            except (ValueError, KeyError, TypeError):
                break
            if not end:
                check_settings(out, record if isinstance(record, dict) else None, settings)
            end += len(line)
        return end

    def _append(self, record: Mapping[str, Any]) -> None:
        left = memoryview(json.dumps(record).encode() + b"\n")
        while left:
            left = left[self.file.write(left) :]

    def __contains__(self, answer: tuple[int, int]) -> bool:
        return answer in self.offsets

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        with files.disk_errors(self.path, REMEDY):
            for record in records:
                self.offsets[record["prompt"], record["sample"]] = self.file.seek(0, os.SEEK_END)
                self._append(record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The answers by prompt and sample."""
        for _, offset in sorted(self.offsets.items()):
            self.file.seek(offset)
            yield json.loads(self.file.readline())

    def remove(self) -> None:
        """Once its answers are in the data set."""
        self.path.unlink()
        self.lock.unlink()


def journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def schema(conversations: Sequence[Any]) -> Any:
    """The columns of a parquet file; their messages have every key that one of these has."""
    import pyarrow.parquet

    try:
        column = pyarrow.array([[{"role": "", "content": ""}], *conversations])
        # Not all that fits into a column fits into a file.
        pyarrow.parquet.write_table(pyarrow.table({"messages": column}), io.BytesIO())
    except (pyarrow.ArrowException, OverflowError) as error:
        raise UserError(
            f"messages of these prompts do not fit into one column of .parquet ({error}): give"
            " --out a name that ends in .jsonl"
        ) from error
    columns = {"prompt": "string", "completion": "string", "messages": column.type}
    return pyarrow.schema([*columns.items(), ("finish_reason", "string"), ("n_tokens", "int32")])


def save(out: Path, rows: Iterable[dict[str, Any]], columns: Any, settings: Settings) -> None:
    """A data set that is there whole or not at all, with the settings in it or beside it.

    `columns` are the `schema` of a parquet file.
    """
    import pyarrow.parquet

    with files.atomic_write(out, REMEDY) as partial:
        if out.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_json(sidecar(out), settings, REMEDY)
            return
        columns, rows = columns.with_metadata({"generation": json.dumps(settings)}), iter(rows)
        with pyarrow.parquet.ParquetWriter(partial, columns) as file:
            while batch := list(itertools.islice(rows, 1024)):
                file.write(pyarrow.Table.from_pylist(batch, columns))


def sidecar(out: Path) -> Path:
    """Where the settings of a jsonl file are, which holds records only."""
    return out.with_suffix(".settings.json")


def settings_of(out: Path) -> dict[str, Any] | None:
    """The settings a data set was written by; None where it does not say."""
    import pyarrow.parquet

    try:
        if out.suffix == ".jsonl":
            return json.loads(sidecar(out).read_bytes())
        return json.loads(pyarrow.parquet.read_schema(out).metadata[b"generation"])
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None


CARD = """\
---
configs:
- config_name: default
  data_files: {file}
---

Written by {model} for the prompts of {prompts}.

| setting | value |
|---|---|
{table}
"""


@contextlib.contextmanager
def _hub(name: str) -> Iterator[Any]:
    """The hub, whose refusals become one line."""
    from huggingface_hub import HfApi, errors

    try:
        yield HfApi()
    except (errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = ": log in with `hf auth login` or HF_TOKEN, with the right to write there"
        cause = files.printable(str(error).strip().partition("\n")[0] or error)
        raise UserError(f"--push {name}: {cause}{hint if status in (401, 403) else ''}") from error


def reserve(name: str) -> None:
    """Makes a data set on the hub, private unless it is there: so a refusal comes early."""
    with _hub(name) as hub:
        hub.create_repo(name, repo_type="dataset", private=True, exist_ok=True)


def upload(name: str, out: Path, settings: Settings) -> str:
    """Puts a data set on the hub, with a card where there is none; returns its address."""
    from huggingface_hub import CommitOperationAdd

    file = f"train{out.suffix}"
    table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    card = CARD.format(file=file, table=table, **{k: settings[k] for k in ("model", "prompts")})
    with _hub(name) as hub:
        operations = [CommitOperationAdd(file, str(out))]
        if not hub.file_exists(name, "README.md", repo_type="dataset"):
            operations.append(CommitOperationAdd("README.md", card.encode()))
        message = f"Text written by {settings['model']}"
        hub.create_commit(name, operations, commit_message=message, repo_type="dataset")
        return f"{hub.endpoint}/datasets/{name}"
