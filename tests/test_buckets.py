"""Folders in buckets: what is fetched, in which order copies are made, and runs that lie there."""

import contextlib
import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import jax
import pytest
from test_distill import config, one_device, quick, teacher, text  # noqa: F401

import distill
import generate
import sharding
from runtime import buckets
from runtime.errors import UserError
from text import files as sources

URL = "s3://shelf/runs/one"


class Bucket:
    """An object store as pyarrow shows it, which remembers every state that it was in."""

    def __init__(self):
        self.objects, self.states, self.clock = {}, [], 0

    def put(self, path: str, content: bytes) -> None:
        self.clock += 1
        self.objects[path] = content, self.clock * 10**9
        self.states.append(dict(self.objects))

    def get_file_info(self, what):
        if isinstance(what, str):
            return self._info(what)
        return [self._info(x) for x in self.objects if x.startswith(f"{what.base_dir}/")]

    def _info(self, path):
        content, date = self.objects.get(path, (b"", 0))
        here = path in self.objects
        return SimpleNamespace(path=path, is_file=here, size=len(content), mtime_ns=date)

    def open_input_stream(self, path, compression):
        return io.BytesIO(self.objects[path][0])

    @contextlib.contextmanager
    def open_output_stream(self, path, compression=None):
        stream = io.BytesIO()
        yield stream
        self.put(path, stream.getvalue())

    def delete_file(self, path):
        del self.objects[path]
        self.states.append(dict(self.objects))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    store = Bucket()
    monkeypatch.setattr(buckets, "open_bucket", lambda url: (store, url.partition("://")[2]))
    monkeypatch.setattr(buckets, "THREADS", 1)  # operations one by one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    buckets.fetch.cache_clear()
    yield store
    buckets.fetch.cache_clear()


def names(folder):
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


# ---- what is read --------------------------------------------------------------------------------


def test_what_is_fetched_is_what_the_bucket_holds(bucket):
    for name in ("a.txt", "b.jsonl", "deep/c.jsonl"):
        bucket.put(f"shelf/text/{name}", name.encode())
    place = buckets.local_path("s3://shelf/text")
    assert names(place) == {"a.txt", "b.jsonl", "deep/c.jsonl"}
    assert (place / "deep/c.jsonl").read_text() == "deep/c.jsonl"
    bucket.delete_file("shelf/text/a.txt")
    bucket.put("shelf/text/b.jsonl", b"other bytes")
    buckets.fetch.cache_clear()
    unchanged = (place / "deep/c.jsonl").stat().st_ino
    assert names(buckets.local_path("s3://shelf/text")) == {"b.jsonl", "deep/c.jsonl"}
    assert (place / "b.jsonl").read_text() == "other bytes"
    assert (place / "deep/c.jsonl").stat().st_ino == unchanged  # nothing is fetched twice
    assert buckets.local_path("s3://shelf/text/b.jsonl").read_text() == "other bytes"


def test_text_is_found_by_a_pattern(bucket):
    for name in ("1.jsonl", "2.jsonl", "notes.md"):
        bucket.put(f"shelf/text/{name}", b'{"text": "x"}')
    found = sources.find("gs://shelf/text/*.jsonl")
    assert [file.name for file in found.files] == ["1.jsonl", "2.jsonl"]
    assert sources.canonical("gs://shelf/text/*.jsonl") == "gs://shelf/text/*.jsonl"


def test_what_cannot_be_read_is_one_line(bucket):
    with pytest.raises(UserError, match="s3://shelf/nowhere: there is no such object or folder"):
        buckets.local_path("s3://shelf/nowhere")
    bucket.put("shelf/trap/../../x", b"")
    with pytest.raises(UserError, match="is no name for a file"):
        buckets.local_path("s3://shelf/trap")
    bucket.get_file_info = None  # as a library that fails
    with pytest.raises(UserError, match="s3://shelf/text: cannot be read"):
        buckets.local_path("s3://shelf/text")


# ---- what is written -----------------------------------------------------------------------------


def checkpoint(folder, step):
    for name in ("arrays/d/0", "arrays/d/1", "manifest/metadata"):
        path = folder / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{step} {name}")


def export(folder, step):
    (folder / "exported.json").unlink(missing_ok=True)
    (folder / "student").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "student" / name).write_text(f"of step {step}")
    (folder / "exported.json").write_text(json.dumps({"step": step}))


def test_in_every_state_of_the_copy_what_is_sealed_is_whole(bucket, tmp_path):
    folder = tmp_path / "run"
    copy = buckets.Copy(URL, folder)
    for step in (1, 2, 3):
        checkpoint(folder, step)
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir(exist_ok=True)
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp-1" / "half").write_text("")
        shutil.rmtree(folder / "checkpoints" / str(step - 1), ignore_errors=True)
        (folder / ".lock").write_text("")
        (folder / "metrics.jsonl").write_text("line\n" * step)
        for name in ("config.json", "model.safetensors"):
            (folder / "student-best").mkdir(exist_ok=True)
            (folder / "student-best" / name).write_text(f"of step {step}")
        if step != 2:
            export(folder, step)
        copy.update()
        assert {x.removeprefix("shelf/runs/one/") for x in bucket.objects} == {
            name for name in names(folder) if name != ".lock" and "tmp" not in name
        }
    whole = set()
    for state in bucket.states:
        state = {path.removeprefix("shelf/runs/one/"): x.decode() for path, (x, _) in state.items()}
        for step in "123":
            if f"checkpoints/{step}/manifest/metadata" in state:
                whole.add(step)
                assert f"checkpoints/{step}/arrays/d/0" in state
                assert f"checkpoints/{step}/arrays/d/1" in state
        if "exported.json" in state:
            step = json.loads(state["exported.json"])["step"]
            assert state["student/config.json"] == state["student/model.safetensors"]
            assert state["student/config.json"] == f"of step {step}"
        if best := state.get("student-best/config.json"):
            assert state["student-best/model.safetensors"] == best
    assert whole == set("123") and len(bucket.states) > 20


def test_older_checkpoints_stay_until_a_later_one_is_whole(bucket, tmp_path, monkeypatch):
    copy = buckets.Copy(URL, folder := tmp_path / "run")
    for steps in ((1, 2), (3, 4), (5, 6)):
        shutil.rmtree(folder, ignore_errors=True)
        for step in steps:
            checkpoint(folder, step)
        if steps == (5, 6):  # another process lags behind
            monkeypatch.setattr(buckets.Copy, "lacks", lambda *_: True)
        copy.update()
    sealed = [{x.split("/")[-3] for x in state if "manifest" in x} for state in bucket.states]
    first = next(i for i, steps in enumerate(sealed) if steps)
    assert all(sealed[first:]) and sealed[-1] == {"3", "4"}


def test_half_a_checkpoint_is_none(bucket, tmp_path):
    checkpoint(folder := tmp_path / "run", 7)
    (folder / "checkpoints/7/manifest/metadata").unlink()
    for name in names(folder):
        bucket.put(f"shelf/runs/one/{name}", b"")
    buckets.download(URL, folder)
    copy = buckets.Copy(URL, folder)
    assert not (folder / "checkpoints/7").exists()
    copy.update()
    assert not bucket.objects


def test_a_run_in_a_bucket_goes_on_where_nothing_of_it_is(bucket, quick, tmp_path):  # noqa: F811
    weights = (distill.train(quick) / "model.safetensors").read_bytes()
    there = dataclasses.replace(quick, out=URL)
    with pytest.raises(SystemExit):
        distill.train(dataclasses.replace(there, time_limit=1e-9))
    assert "shelf/runs/one/checkpoints/1/manifest/metadata" in bucket.objects
    shutil.rmtree(tmp_path / "cache")  # another machine
    student = distill.train(there)
    assert bucket.objects["shelf/runs/one/student/model.safetensors"][0] == weights
    assert "shelf/runs/one/checkpoints/6/manifest/metadata" in bucket.objects
    assert not any("/checkpoints/1/" in name for name in bucket.objects)
    shutil.rmtree(tmp_path / "cache")
    assert distill.train(there) == student and student.exists()  # it is finished


def test_answers_in_a_bucket_go_on_where_nothing_of_them_is(bucket, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once\nThe dog\nLily\nA bird\n")
    config = generate.Config(
        model="demo/teacher", prompts=str(tmp_path / "prompts.txt"), max_new=4, batch_size=1,
        out=str(tmp_path / "answers.jsonl"), mesh=sharding.Sizes(1, 1, 1), quiet=True,
    )  # fmt: skip
    jax_devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *_: jax_devices()[:1])
    generate.run(config)
    there, answered = dataclasses.replace(config, out=f"{URL}/answers.jsonl"), []
    bucket.put("shelf/runs/one/other.txt", b"of somebody")
    write = generate.answer

    def interrupted(*of):
        if len(answered) == 2:
            raise KeyboardInterrupt
        return answered.append(of) or write(*of)

    monkeypatch.setattr(generate, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.run(there)
    lines = bucket.objects["shelf/runs/one/answers.jsonl.journal"][0].splitlines()
    assert len(lines) == 3 and answered
    shutil.rmtree(tmp_path / "cache")  # another machine
    answered.clear()
    generate.run(there)
    assert len(answered) == 2
    objects = {path.removeprefix("shelf/runs/one/"): x for path, (x, _) in bucket.objects.items()}
    assert objects.keys() == {"answers.jsonl", "answers.settings.json", "other.txt"}
    assert objects["answers.jsonl"] == (tmp_path / "answers.jsonl").read_bytes()
    assert not list((tmp_path / "cache").rglob("other.txt"))


def test_what_a_bucket_cannot_do_is_refused(bucket, quick):  # noqa: F811
    with pytest.raises(UserError, match="--no-resume with --out in a bucket: nothing there can be"):
        dataclasses.replace(quick, out=URL, resume=False)
    with pytest.raises(UserError, match="must be .*s3://bucket/folder"):
        dataclasses.replace(quick, out="s3://shelf")
    bucket.open_output_stream = None
    with pytest.raises(UserError, match=f"--out {URL}: cannot be written"):
        distill.train(dataclasses.replace(quick, out=URL))
