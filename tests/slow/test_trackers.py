"""Trackers by the real libraries, without a network: what they stored is read back."""

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_distill import config, one_device, quick, teacher, text  # noqa: F401

from runtime import report
from runtime.files import read_json

ROOT = Path(__file__).parents[2]
TRACKED = {"loss", "divergence", "ce", "kl", "lr", "tokens_per_second", "eval/kl", "eval/ce"}


@pytest.fixture
def tracked(quick, monkeypatch, tmp_path):  # noqa: F811
    """Makes a run with a tracker in two processes, the first of which is stopped early."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "settings.json").write_text(json.dumps(dataclasses.asdict(quick)))
    flags = ["--config", str(tmp_path / "settings.json"), "--out", quick.out, "--steps", "8"]

    def run(name: str) -> tuple[Path, dict[str, dict[int, float]]]:
        command = [sys.executable, "distill.py", *flags, "--track", name]
        for more in (["--time-limit", "1e-6"], []):
            done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
            assert not more or "stopped at step 1," in done.stderr
        assert len(done.stdout.splitlines()) == 6  # the table and where things are
        out, expected = Path(quick.out), {}
        for line in report.read_metrics(out / "metrics.jsonl"):
            for key in TRACKED & line.keys():
                expected.setdefault(key, {})[line["step"]] = pytest.approx(line[key])
        assert set(expected) == TRACKED and list(expected["loss"]) == [*range(1, 9)]
        return out, expected

    return run


def test_tensorboard_has_the_figures_of_a_run(tracked):
    from tensorboardX.proto.event_pb2 import Event

    out, expected = tracked("tensorboard")
    scalars, texts, images = {}, {}, []
    for path in sorted((out / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # the length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            for value in event.summary.value:
                if value.HasField("image"):
                    images.append((value.tag, event.step, value.image.encoded_image_string))
                elif value.HasField("tensor"):
                    texts[value.tag.partition("/")[0]] = value.tensor.string_val[0].decode()
                else:
                    assert event.step not in scalars.get(value.tag, {}), "a step is there twice"
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    assert {name: scalars[name] for name in TRACKED} == expected
    ((tag, step, image),) = images
    assert (tag, step) == ("curves", 8) and image.startswith(b"\x89PNG")
    assert json.loads(texts["config"].strip("`json\n")) == read_json(out / "config.json")
    assert "| student at step 8 |" in texts["results"]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind a header of 7 bytes, as wandb writes it."""
    place, record = 7, b""
    while place < len(content):
        if (left := -place % 2**15) and left < 7:  # blocks end in padding
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        place += 7 + size
        record += content[place - size : place]
        if kind in (1, 4):  # the whole of it, or its last part
            yield record
            record = b""


def test_wandb_has_the_figures_of_a_run(tracked):
    from wandb.proto.wandb_internal_pb2 import Record

    out, expected = tracked("wandb")
    run_id, history, config = read_json(out / "track.json")["id"], {}, {}
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{run_id}") for folder in folders)
    for folder in folders:
        for data in leveldb_records(next(folder.glob("*.wandb")).read_bytes()):
            record = Record.FromString(data)
            config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
            items = {"/".join(x.nested_key): x.value_json for x in record.history.item}
            for name in items.keys() - {"_step"}:
                step = int(items["_step"])
                history.setdefault(name, {})[step] = json.loads(items[name])
    assert {name: history[name] for name in TRACKED} == expected
    assert config.items() >= read_json(out / "config.json").items()
    assert history["curves/_type"][8] == "image-file"
    (table,) = folders[1].rglob("results*.table.json")
    assert [row[0] for row in read_json(table)["data"]][1:] == [
        "student at step 0", "student at step 8",
    ]  # fmt: skip


def test_trackio_has_the_figures_of_a_run(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    out, expected = tracked("trackio")
    name = f"{out.name}-{read_json(out / 'track.json')['id']}"
    assert SQLiteStorage.get_runs("compact-distill") == [name]
    history, config = {}, SQLiteStorage.get_run_config("compact-distill", name)
    for line in SQLiteStorage.get_logs("compact-distill", name):
        for key in line.keys() - {"step", "timestamp"}:
            history.setdefault(key, {})[line["step"]] = line[key]
    assert {name: history[name] for name in TRACKED} == expected
    assert config.items() >= read_json(out / "config.json").items()
    assert history["curves"][8]["_type"] == "trackio.image"
    assert history["results"][8]["_value"][-1][""] == "student at step 8"
