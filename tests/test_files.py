"""Files and folders are there whole or not at all, and say in one line what is wrong with them."""

import errno
import os
import platform
import subprocess
import sys

import pytest

from runtime import files
from runtime.errors import UserError


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as partial:
        partial.write_text("{")
        raise ZeroDivisionError
    with pytest.raises(UserError, match="a.json: cannot be written .No space left on device.; go"):
        with files.atomic_write(path, "; go") as partial:
            partial.write_text("{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_when_it_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    for content in ("old", "new"):
        with files.atomic_write(folder) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
            assert content == "old" or os.listdir(folder) == ["old"]
    assert os.listdir(folder) == ["new"]
    with pytest.raises(ZeroDivisionError), files.atomic_write(folder) as partial:
        partial.mkdir()
        (partial / "torn").write_text("")
        raise ZeroDivisionError
    replace = type(folder).replace
    monkeypatch.setattr(
        type(folder), "replace", lambda a, b: 1 / (a.name != "new") and replace(a, b)
    )
    with pytest.raises(ZeroDivisionError), files.atomic_write(folder) as partial:
        partial.mkdir()  # the last step fails, after the older folder was put aside
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"{", "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (None, "No such file"),
        ("pipe", "no regular file"),
    ],
)
def test_json_that_cannot_be_read_is_refused_in_a_line(tmp_path, content, why):
    path = tmp_path / "a.json"
    if content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^.*a.json is damaged .{why}.*: try again$"):
        files.read_json(path, ": try again")


def test_links_may_not_lead_out_of_a_folder(tmp_path):
    outside, folder = tmp_path / "secret", tmp_path / "hub" / "snapshots" / "main"
    folder.mkdir(parents=True)
    outside.write_text("")
    (folder.parent.parent / "blobs").mkdir()
    blob = folder.parent.parent / "blobs" / "1"
    blob.write_text("")
    (folder / "blob").symlink_to(blob)  # as the hub's cache is made
    (folder / "inside").symlink_to(folder / "blob")
    files.check_links(folder, folder.iterdir())
    (folder / "out").symlink_to(outside)
    with pytest.raises(UserError, match="out: it is a link that leads out of"):
        files.check_links(folder, folder.iterdir())
    (folder / "out").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="pipe: it is no file that can be read"):
        files.check_links(folder, folder.iterdir())


def test_what_others_say_is_printed_on_one_short_line():
    assert files.printable("a\n b\x1b[31m\u202e") == "a b\\x1b[31m\\u202e"
    assert files.printable("x" * 500) == "x" * 300 + "..."
    assert files.printable(ValueError()) == "ValueError"


def test_a_folder_knows_the_settings_that_made_it(tmp_path):
    def folder(**settings):
        default = {"remat": "none", "optim": {"b_1": 2}}
        return files.RunFolder(
            tmp_path / "run", settings, frozenset({"--steps", "--mesh"}), default
        )

    original = folder(steps=3, optim={"lr": 0.1, "b_1": 2}, mesh={"data": 1})
    assert original.previous() is None and original.changed() == []
    original.path.mkdir()
    original.write()
    assert not folder(steps=4, optim={"lr": 0.1, "b_1": 2}, mesh={"data": 8}).changed()
    other = folder(steps=3, optim={"lr": 0.2, "b_1": 2}, mesh={"data": 1})
    assert other.changed() == ["--optim.lr was 0.1, is 0.2"]
    newer = folder(steps=3, optim={"lr": 0.1, "b_1": 2}, mesh={"data": 1}, remat="none")
    assert not newer.changed()  # a flag that there was not yet counts as its default
    newer = folder(steps=3, optim={"lr": 0.1, "b_1": 2}, mesh={"data": 1}, remat="full")
    assert newer.changed() == ["--remat was none, is full"]
    assert original.set_aside() == tmp_path / "run.1" and not original.path.exists()
    original.path.mkdir()
    assert original.set_aside() == tmp_path / "run.2"


def test_a_folder_is_locked_once(tmp_path):
    with files.lock(tmp_path / ".lock"):
        for guarded in (None, tmp_path / "x"):
            words = f"{guarded or tmp_path} is in use by another run"
            with pytest.raises(UserError, match=words), files.lock(tmp_path / ".lock", guarded):
                pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    import fcntl

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with files.lock(tmp_path / ".lock"):
            assert os.listdir(tmp_path) == [".lock"]
    number = errno.EIO  # but another error is one
    monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(number=number))
    with pytest.raises(UserError, match=".lock: cannot be written .Input/output error"):
        with files.lock(tmp_path / ".lock"):
            pass
    monkeypatch.undo()
    with files.lock(tmp_path / ".lock", wait=True):
        pass


def test_no_link_in_a_folder_is_written_through(tmp_path):
    """Nor is what is called like something of ours removed."""
    (mine := tmp_path / "mine").write_text("mine")
    (folder := tmp_path / "run").mkdir()
    for name in (".a.json.partial", ".a.json.old", "a.json", ".lock"):
        (folder / name).symlink_to(mine)
    for name in (".b.partial", ".b.old", ".b.elsewhere-1-0123abcd-x.partial"):
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")
    files.write_json(folder / "a.json", {"a": 1})
    with files.atomic_write(folder / "b") as partial:
        partial.mkdir()
    with pytest.raises(UserError, match="cannot be written .Too many levels of symbolic"):
        with files.lock(folder / ".lock"):
            pass
    assert files.read_json(folder / "a.json") == {"a": 1} and mine.read_text() == "mine"
    assert len(list(folder.rglob("mine"))) == 3


def test_what_dead_processes_of_this_host_left_is_removed_alone(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, left = platform.node(), {}
    for process in (dead.pid, os.getppid(), os.getpid()):
        left[process] = tmp_path / f".a.{host}-{process}-0123abcd-x.partial"
        left[process].mkdir()
    (left[dead.pid] / "old-a").mkdir()
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "a"):
        raise ZeroDivisionError
    # What was there came back, as it would have had the process not been killed.
    assert set(tmp_path.iterdir()) == {left[os.getppid()], tmp_path / "a"}


def test_files_and_folders_are_synced_before_and_after_they_are_renamed(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda x: calls.append(os.stat(x).st_ino) or sync(x))
    spy = lambda a, b: calls.append("renamed") or replace(a, b)  # noqa: E731
    monkeypatch.setattr(type(tmp_path), "replace", spy)
    with files.atomic_write(tmp_path / "a") as partial:
        (partial / "b").mkdir(parents=True)
        (partial / "b" / "c").write_text("c")
    inodes = [(tmp_path / name).stat().st_ino for name in ("a", "a/b", "a/b/c", ".")]
    assert set(calls[:3]) == set(inodes[:3]) and calls[3:] == ["renamed", inodes[3]]
