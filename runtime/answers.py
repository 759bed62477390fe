"""What a model wrote, on disk: a journal while it writes, then a data set, then perhaps the hub."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime import files
from runtime.errors import UserError
from runtime.files import Settings
from text.files import SIDECAR, written_settings

MAY_CHANGE = frozenset({"model", "prompts"})  # other names of the same files
REMEDY = "; finished answers are kept: make room or give permission, and repeat the command"


def check_settings(out: Path, before: Settings | None, now: Settings) -> None:
    """Refuses to go on with, or to take for finished, what was written by other settings."""
    if before is None:
        remedy = "move it away, give another --out, or --no-resume"
        raise UserError(f"{out} is there, and not from here: {remedy}")
    if changed := "; ".join(files.changes(before, now, MAY_CHANGE)):
        remedy = "give the same, another --out, or --no-resume"
        raise UserError(f"{out} was begun with other settings ({changed}): {remedy}")


class Journal(contextlib.ExitStack):
    """The finished answers, a line each, after a line of settings; a torn last line is cut off."""

    def __init__(self, out: Path, settings: Settings, *, resume: bool = True):
        super().__init__()
        self.path = journal_path(out)
        self.offsets: dict[tuple[int, int], int] = {}  # of the answer to a prompt, by its sample
        end = 0
        with contextlib.ExitStack() as opened, files.disk_errors(self.path, REMEDY):
            opened.enter_context(files.lock(self.path, out))
            # Without a buffer, which closing would write again.
            self.file = opened.enter_context(open(self.path, "ab", 0, opener=files.no_follow))
            before = settings_of(self.path, settings)
            with self.path.open("rb") as lines:
                begins = f"{json.dumps(settings)}\n".encode().startswith(lines.readline())
                foreign = [] if begins or before else [self.path]
                if out.suffix == ".jsonl" and settings_of(out, settings) is None:
                    foreign += filter(os.path.lexists, [out.with_suffix(SIDECAR)])
                if foreign:
                    remedy = "move it away, or give another --out"
                    raise UserError(f"{foreign[0]} is there, and not from here: {remedy}")
                if resume and before:
                    check_settings(out, before, settings)
                lines.seek(0)
                for line in lines if resume else ():
                    try:
                        record = json.loads(line if line.endswith(b"\n") else b"")
                        if end:
                            self.offsets[record["prompt"], record["sample"]] = end
                    except (ValueError, KeyError, TypeError):
                        break
                    end += len(line)
            self.file.truncate(end)
            if not end:
                files.append_json(self.file, settings)
            self.push(opened.pop_all())

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        with files.disk_errors(self.path, REMEDY):
            for record in records:
                self.offsets[record["prompt"], record["sample"]] = self.file.seek(0, os.SEEK_END)
                files.append_json(self.file, record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The answers by prompt and sample."""
        with self.path.open("rb") as file:
            for _, offset in sorted(self.offsets.items()):
                file.seek(offset)
                yield json.loads(file.readline())


def journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def schema(conversations: Sequence[Any]) -> Any:
    """The columns of a parquet file; their messages have every key that one of these has."""
    import pyarrow.parquet

    remedy = "give --out a name that ends in .jsonl"
    with files.library_errors(f"messages of these prompts do not fit into .parquet: {remedy}"):
        column = pyarrow.array([[{"role": "", "content": ""}], *conversations])
        # Not all that fits into a column fits into a file.
        pyarrow.parquet.write_table(pyarrow.table({"messages": column}), io.BytesIO())
    columns = {"prompt": "string", "completion": "string", "messages": column.type}
    return pyarrow.schema([*columns.items(), ("finish_reason", "string"), ("n_tokens", "int32")])


def save(out: Path, rows: Iterable[dict[str, Any]], columns: Any, settings: Settings) -> None:
    """Writes a data set, whole or not at all, with the settings in it or beside it."""
    import pyarrow.parquet

    with files.atomic_write(out, REMEDY) as partial:
        if out.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_json(out.with_suffix(SIDECAR), settings, REMEDY)
            return
        columns, rows = columns.with_metadata({"generation": json.dumps(settings)}), iter(rows)
        with pyarrow.parquet.ParquetWriter(partial, columns) as file:
            while batch := list(itertools.islice(rows, 1024)):
                file.write(pyarrow.Table.from_pylist(batch, columns))


def settings_of(out: Path, settings: Settings) -> dict[str, Any] | None:
    """The settings of these names that a data set or journal is from; None where it has none."""
    try:
        if out.suffix != ".journal":
            before = written_settings(out)
        else:
            with out.open("rb") as lines:
                before = json.loads(lines.readline())
        return before if before.keys() == settings.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def upload(name: str, out: Path, settings: Settings) -> str:
    """Puts a data set on the hub, with a card where there is none; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    file, model = f"train{out.suffix}", settings["model"]
    card = ["---", "configs:", "- config_name: default", f"  data_files: {file}", "---", ""]
    card += [f"Written by {model} for the prompts of {settings['prompts']}.", ""]
    card += ["| setting | value |", "|---|---|"]
    card += [f"| {k} | {v} |" for k, v in settings.items() if k != "chat-template"]
    hub, operations = HfApi(), [CommitOperationAdd(file, str(out))]
    with files.library_errors(f"--push {name}: cannot be written"):
        if not hub.file_exists(name, "README.md", repo_type="dataset"):
            operations.append(CommitOperationAdd("README.md", "\n".join([*card, ""]).encode()))
        title = f"Text written by {model}"
        hub.create_commit(name, operations, commit_message=title, repo_type="dataset")
        return f"{hub.endpoint}/datasets/{name}"
