"""Mutated files of every kind, a seeded sample; `benchmarks/fuzz.py` tries as many as wanted."""

import os
import random
from pathlib import Path

import pytest

from benchmarks import fuzz
from runtime.errors import UserError


def test_mutated_files_are_taken_if_they_are_sound_and_refused_in_one_line():
    seen = {name: [] for name in fuzz.KINDS}
    for name, number, verdict, reason in fuzz.trials(150, 7, fuzz.KINDS):
        assert verdict != "failure", (name, number, reason)
        seen[name].append(verdict)
    assert all(seen.values())
    refused = [verdict == "refused" for verdicts in seen.values() for verdict in verdicts]
    assert 0.4 < sum(refused) / len(refused) < 0.95


def nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * 100)


def raises(folder: Path) -> None:
    if (folder / "file").read_bytes() != b"x" * 100:
        raise KeyError("x")


def talks(folder: Path) -> None:
    if (folder / "file").read_bytes() != b"x" * 100:
        print("what?")
        raise UserError("no")


def dies(folder: Path) -> None:
    if (folder / "file").read_bytes() != b"x" * 100:
        os.abort()


def hangs(folder: Path) -> None:
    while (folder / "file").read_bytes() != b"x" * 100:
        pass


def swells(folder: Path) -> None:
    if (folder / "file").read_bytes() != b"x" * 100:
        bytearray(2 * fuzz.SPARE)


def takes(folder: Path) -> bytes:
    return (folder / "file").read_bytes()


@pytest.mark.parametrize(
    "load, sound, reason",
    [
        (raises, None, "KeyError"),
        (talks, None, "not one line"),
        (dies, None, "died"),
        (hangs, None, "hangs"),
        (swells, None, "MemoryError"),
        (takes, None, "read as something else"),
        (takes, fuzz.sound_json, "accepted although"),
    ],
)
def test_what_counts_as_a_failure(load, sound, reason):
    kinds = {"x": fuzz.Kind(nothing, "file", load, sound)}
    patience = 0.5 if load is hangs else fuzz.PATIENCE
    told = list(fuzz.trials(2, 0, kinds, patience))
    assert [verdict for _, _, verdict, _ in told] == ["failure"] * 2
    assert all(reason in why for _, _, _, why in told), told


def test_no_flipped_bit_of_a_token_store_is_taken(tmp_path):
    fuzz.make_store(tmp_path / "case")
    (tmp_path / "case").rename(tmp_path / "honest")
    store, chosen = fuzz.KINDS["token store"], random.Random(0)
    with fuzz.copied(tmp_path / "honest") as folder:
        expected = store.load(folder)
        files = sorted(folder.glob(store.files))
    assert len(files) == 5
    for file in files:
        for _ in range(12):
            with fuzz.copied(tmp_path / "honest") as folder, fuzz.telling() as said:
                content, facts = file.read_bytes(), file.stat()
                file.write_bytes(fuzz.flip(chosen, content))
                os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
                assert store.load(folder) == expected
            assert said or file.name == "store.json", file  # where a space became another
