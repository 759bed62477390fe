"""The hub through its real client, against a small hub on loopback; and folders that are saved."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_server import Hub, commit
from safetensors.numpy import load_file

import models
import sharding
import student
from models.llama import Config, Llama
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent
SMALL = Config(vocab=16, embed=8, mlp=16, layers=2, heads=4, kv_heads=2, head_dim=4)
# Twice what the client writes at a time and more, so that half of it is worth keeping.
LARGE = Config(vocab=100_000, embed=64, mlp=8, layers=1, heads=2, kv_heads=2, head_dim=4, tied=True)
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
TEXTS = {"tokenizer.json": b'{"version": "1.0"}', "generation_config.json": b'{"top_k": 5}'}


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def digest(model):
    """What `load` made of a checkpoint, bit by bit."""
    hash = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(model):
        hash.update(repr((leaf.dtype.name, leaf.shape)).encode() + np.asarray(leaf).tobytes())
    return hash.hexdigest()


# ---- its client ----------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys, traceback
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
sys.path[:0] = ["tests", "."]
import distill, models, models.hub, test_hub, text
from runtime import resume
from runtime.errors import UserError

def load(source):
    return test_hub.digest(models.load(source))

def save(source, folder, **options):
    models.save(models.load(source), folder, **options)

def die_saving(source, folder):
    models.hub.os.fsync = lambda file: os.kill(os.getpid(), 9)
    save(source, folder)

def rows(source):
    source = text.find(source)
    records = text.files.records(source, lambda names, _: list(names), lambda count: None)
    return [source.fingerprint, *(record["text"] for _, record in records)]

verbs = {"fetch": models.hub.fetch, "load": load, "save": save, "die_saving": die_saving}
verbs |= {"rows": lambda *sources: json.dumps(list(map(rows, sources)))}
def begin(out, **options):
    others = options.pop("said", None)
    if others is not None:
        resume.processes.gather = lambda facts: [facts | others]
    names = {"teacher": "owner/teacher", "data": distill.Data(("owner/verses",)), "out": out}
    config = distill.Config(**names | options)
    resume.restore_commits(distill.with_defaults(config))
    config = distill.with_defaults(config)
    resume.last_step(config, resume.make_folder(config))
    return json.dumps([load(config.teacher), rows(*config.data.source)[1:]])

verbs |= {"begin": begin}
verbs |= {"find": lambda source: text.find(source).fingerprint}
for line in sys.stdin:
    verb, arguments, options = json.loads(line)
    try:
        answer = {"result": str(verbs[verb](*arguments, **options))}
    except UserError as error:
        answer = {"refused": str(error)}
    except BaseException:
        answer = {"bug": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process of its own: the client reads its environment once, when it is imported."""

    def __init__(self, home, endpoint, *, stderr=subprocess.DEVNULL, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        inherited = {k: v for k, v in inherited.items() if "proxy" not in k.lower()}
        known = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=inherited | known | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def start(self, verb, *arguments, **options):
        self.process.stdin.write(json.dumps([verb, list(map(str, arguments)), options]) + "\n")
        self.process.stdin.flush()

    def __call__(self, verb, *arguments, **options):
        self.start(verb, *arguments, **options)
        answer = json.loads(self.process.stdout.readline())
        assert "bug" not in answer, answer["bug"]
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer["result"]

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def client_of(home, endpoint, **environment):
    client = Client(home, endpoint, **environment)
    yield client
    client.close()


@pytest.fixture(scope="module")
def online(hub, home):
    yield from client_of(home, hub.endpoint)


@pytest.fixture(scope="module")
def offline(hub, home):
    yield from client_of(home, hub.endpoint, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unreachable(home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield from client_of(home, f"http://127.0.0.1:{port}")


def checkpoint(config, seed=0):
    return Llama(config, jax.random.key(seed))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The files of a small checkpoint, and what `load` makes of it."""
    folder = tmp_path_factory.mktemp("small")
    models.save(checkpoint(SMALL), folder)
    return files_of(folder) | TEXTS, digest(models.load(folder))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    models.save(checkpoint(SMALL, seed=1), folder)
    return files_of(folder), digest(models.load(folder))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    models.save(checkpoint(LARGE), folder)
    return files_of(folder)


def refused(call, *arguments, words=(), **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert text.isprintable()
    for word in words:
        assert word in text
    return text


# ---- fetching and loading ------------------------------------------------------------------------


def test_a_model_by_its_id_fetches_only_what_it_needs(hub, online, small):
    files, bits = small
    junk = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"]
    junk += ["onnx/model.onnx", "onnx/config.json", "original/params.json", "modeling_llama.py"]
    junk += [".gitattributes", "training_args.bin", "flax_model.msgpack", "optimizer.pt"]
    hub.add("owner/tiny", main=files | {name: b"junk" for name in junk})
    assert online("load", "owner/tiny") == bits
    assert {file for _, file, *_ in hub.asked("owner/tiny")} == NEEDED
    assert files_of(Path(online("fetch", "owner/tiny"))) == files


def test_a_fetched_model_comes_from_the_cache(hub, online, offline, unreachable, small):
    files, bits = small
    hub.add("owner/cached", main=files)
    folder = online("fetch", "owner/cached")
    assert len([entry for entry in hub.asked("owner/cached") if entry[2] == "GET"]) == len(files)
    hub.log.clear()
    assert online("fetch", "owner/cached") == folder
    assert hub.asked("owner/cached") == []
    hub.log.clear()
    assert offline("load", "owner/cached") == bits
    assert unreachable("load", "owner/cached") == bits
    assert hub.log == []


def test_a_revision(hub, online, offline, small, other):
    hub.add("owner/revised", main=small[0], old=other[0])
    assert online("load", "owner/revised@old") == other[1]
    refused(offline, "load", "owner/revised", words=["owner/revised ", "offline mode"])
    assert online("load", "owner/revised") == small[1]
    assert online("load", f"owner/revised@{commit('owner/revised', 'old')}") == other[1]
    assert offline("load", "owner/revised@old") == other[1]
    refused(
        online, "load", "owner/revised@lost", words=["owner/revised@lost", "Revision Not Found"]
    )


def test_shards_are_fetched_together(hub, online, tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "x", shard_size=1000)
    files = files_of(tmp_path / "x")
    assert len(files) > 4
    hub.add("owner/shards", main=files)
    assert online("load", "owner/shards") == digest(models.load(tmp_path / "x"))
    assert {file for _, file, *_ in hub.asked("owner/shards")} == set(files)


def test_shards_of_any_name_are_fetched_by_their_index(hub, online, tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "x", shard_size=1000)
    files = files_of(tmp_path / "x")
    index = json.loads(files["model.safetensors.index.json"])
    first, *others = sorted(set(index["weight_map"].values()))
    names = {first: "weights-a.safetensors"}
    names |= {name: f"sub/part{i}.safetensors" for i, name in enumerate(others)}
    files = {names.get(name, name): content for name, content in files.items()}
    index["weight_map"] = {tensor: names[name] for tensor, name in index["weight_map"].items()}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    junk = ["model-00001-of-00009.safetensors", "consolidated.safetensors", "sub/x.safetensors"]
    hub.add("owner/renamed", main=files | dict.fromkeys(junk, b"junk"))
    assert online("load", "owner/renamed") == digest(models.load(tmp_path / "x"))
    assert {file for _, file, *_ in hub.asked("owner/renamed")} == set(files)
    folder = tmp_path / "copy"
    shutil.copytree(online("fetch", "owner/renamed"), folder)
    before = models.fingerprint(folder)
    with open(folder / "sub" / "part0.safetensors", "ab") as file:
        file.write(b"more")
    assert models.fingerprint(folder) != before


def test_a_revision_is_asked_for_once(hub, online, small, other):
    """Whatever is pushed meanwhile, a process reads one commit."""
    hub.add("owner/moving", main=small[0], new=other[0])
    assert online("load", "owner/moving") == small[1]
    assert len([entry for entry in hub.log if entry[:2] == ("owner/moving", None)]) == 2
    hub.repositories["owner/moving"]["main"] = other[0]
    hub.log.clear()
    assert online("load", "owner/moving") == small[1] and hub.log == []


@pytest.mark.parametrize("status", [429, 503, 404, None])
def test_a_cached_model_does_not_wait_for_its_hub(hub, home, small, status):
    name = f"owner/cached-{status}"
    hub.add(name, main=small[0])
    online = Client(home, hub.endpoint)
    assert online("load", name) == small[1]
    online.close()
    if status is None:
        hub.silent.add(name)
    else:
        hub.answers[name] = status, {}
    later = Client(home, hub.endpoint)
    later("fetch", home)  # once it has started
    begun = time.monotonic()
    assert later("load", name) == small[1]
    assert time.monotonic() - begun < 6
    later.close()


def test_a_repository_of_pickles_alone(hub, online, small):
    pickles = {"config.json": small[0]["config.json"], "pytorch_model.bin": b"\x80\x02}q\x00."}
    hub.add("owner/pickles", main=pickles)
    refused(online, "load", "owner/pickles", words=["owner--pickles", "pickle", "save_pretrained"])
    assert {file for _, file, *_ in hub.asked("owner/pickles")} == {"config.json"}


@pytest.mark.parametrize("kind", ["gpt2", "t5", "gemma2"])
def test_a_model_of_another_family_is_refused_by_its_id_before_its_weights(
    hub, online, small, kind
):
    files = small[0] | {"config.json": json.dumps({"model_type": kind}).encode()}
    hub.add(f"owner/{kind}", main=files)
    words = [f"owner/{kind}: model_type '{kind}' is not supported, only bloom, llama, mistral"]
    assert refused(online, "load", f"owner/{kind}", words=words).startswith("owner/")
    assert "model.safetensors" not in {file for _, file, *_ in hub.asked(f"owner/{kind}")}


def test_the_tokenizer_of_a_model_is_fetched_without_its_weights(hub, online, small, tmp_path):
    files, bits = small
    more = {"merges.txt": b"a b", "chat_template.jinja": b"{{ x }}"}
    hub.add("owner/words", main=files | more | {"model-00001-of-00002.safetensors": b"junk"})
    models.save(checkpoint(SMALL), tmp_path / "model")
    online("save", tmp_path / "model", tmp_path / "out", tokenizer="owner/words")
    asked = {file for _, file, *_ in hub.asked("owner/words")}
    assert asked == NEEDED - {"model.safetensors"} | set(more)
    saved = files_of(tmp_path / "out")
    assert {name: saved[name] for name in TEXTS | more} == TEXTS | more
    assert digest(models.load(tmp_path / "out")) == bits
    # What is cached without weights is no checkpoint yet.
    assert online("load", "owner/words") == bits

    hub.add("owner/wordless", main={"config.json": b"{}"})
    arguments = tmp_path / "model", tmp_path / "out"
    words = ["owner/wordless", "tokenizer.json"]
    refused(online, "save", *arguments, tokenizer="owner/wordless", words=words)
    assert files_of(tmp_path / "out") == saved


# ---- what goes wrong -----------------------------------------------------------------------------

LOGIN = ["hf auth login", "HF_TOKEN"]
GATED = {"X-Error-Code": "GatedRepo"}
ANSWERS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}, ["Repository Not Found", *LOGIN]),
    "private": (401, {"X-Error-Code": "RepoNotFound"}, ["Repository Not Found", *LOGIN]),
    "denied": (401, {}, ["401 Unauthorized", *LOGIN]),
    "forbidden": (403, {}, ["403 Forbidden", *LOGIN]),
    "gated": (403, GATED, ["Cannot access gated repo", *LOGIN]),
    "gated-and-nobody": (401, GATED, ["Cannot access gated repo", *LOGIN]),
    "broken": (500, {}, ["500 Internal Server Error"]),
    "busy": (429, {}, ["429"]),
    "hangs-up": (None, {}, ["could not be fetched", "disconnected"]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none(hub, online, name):
    status, headers, words = ANSWERS[name]
    hub.answers[f"owner/{name}"] = status, headers
    refused(online, "load", f"owner/{name}", words=[f"owner/{name} ", *words])


def test_something_that_is_no_hub(hub, online):
    hub.answers["owner/portal"] = 200, {"Content-Type": "text/html"}, b"<html>\nLog in</html>"
    refused(
        online,
        "load",
        "owner/portal",
        words=["owner/portal is no folder here and could not be fetched"],
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_gate_before_the_files_alone(hub, online, small, status):
    hub.add(f"owner/gate-{status}", main=small[0])
    hub.closed[f"owner/gate-{status}"] = status, GATED
    refused(online, "load", f"owner/gate-{status}", words=["gated", *LOGIN])
    del hub.closed[f"owner/gate-{status}"]
    assert online("load", f"owner/gate-{status}") == small[1]


def test_an_empty_cache(offline, unreachable):
    for client in (offline, unreachable):
        words = ["owner/nowhere is no folder here and could not be fetched"]
        refused(client, "load", "owner/nowhere", words=words)


def test_a_cut_connection_is_resumed(hub, online, large):
    hub.add("owner/cut", main=large)
    hub.cuts["owner/cut"] = 1
    folder = Path(online("fetch", "owner/cut"))
    assert files_of(folder) == large
    weights = [
        entry for entry in hub.asked("owner/cut") if entry[1:3] == ("model.safetensors", "GET")
    ]
    ranges = [entry[3] for entry in weights]
    assert len(ranges) == 2
    assert ranges[0] is None
    resumed = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < resumed <= len(large["model.safetensors"]) // 2


def test_a_killed_download_is_no_checkpoint_until_it_is_resumed(hub, home, online, offline, large):
    hub.add("owner/killed", main=large)
    hub.stall = "owner/killed"
    doomed = Client(home, hub.endpoint)
    doomed.start("fetch", "owner/killed")
    assert hub.stalled.wait(60)
    doomed.close()
    hub.stall = None
    hub.released.set()
    refused(offline, "fetch", "owner/killed", words=["owner/killed", "incomplete"])
    refused(offline, "load", "owner/killed", words=["owner/killed", "incomplete"])
    hub.log.clear()
    assert files_of(Path(online("fetch", "owner/killed"))) == large
    asked = {file for _, file, *_ in hub.asked("owner/killed")}
    assert "model.safetensors" in asked
    assert offline("fetch", "owner/killed") == online("fetch", "owner/killed")


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_commits_it_began_with(hub, home, small, other, tmp_path):
    def begin(**options):
        client = Client(home, hub.endpoint)
        answer = json.loads(client("begin", tmp_path / "run", **options))
        client.close()
        return answer

    hub.add("owner/teacher", main=small[0], old=small[0])
    poems(hub, "owner/verses", main="new", old="new")
    hub.heads = {name: "old" for name in ("owner/teacher", "datasets/owner/verses")}
    assert begin() == [small[1], ["new"]]
    hub.add("owner/teacher", main=other[0], old=small[0], next=other[0])
    poems(hub, "owner/verses", main="newer", old="new")
    hub.heads.clear()
    assert begin() == begin(resume_anyway=True) == [small[1], ["new"]]
    assert begin(teacher="owner/teacher@next", resume_anyway=True) == [other[1], ["new"]]
    assert begin(resume=False) == [other[1], ["newer"]]
    # Of several processes the first says what all of them read.
    said = {"models/owner/teacher@main": commit("owner/teacher", "old")}
    assert begin(said=said) == [small[1], ["newer"]]


# ---- data sets -----------------------------------------------------------------------------------

POEMS = {name: f'{{"text": "{name}"}}\n'.encode() for name in ("old", "new", "newer")}


def poems(hub, name, **revisions):
    contents = {key: {"README.md": b"", "train.jsonl": POEMS[x]} for key, x in revisions.items()}
    hub.add(f"datasets/{name}", **contents)


def test_a_revision_of_a_data_set(hub, online, home):
    poems(hub, "owner/poems", main="new", old="old")
    names = "owner/poems", "owner/poems@old", f"owner/poems@{commit('datasets/owner/poems', 'old')}"
    new, old, by_hash = json.loads(online("rows", *names))
    assert [new[1:], old[1:], by_hash[1:]] == [["new"], ["old"], ["old"]]
    assert new[0] != old[0] == by_hash[0]  # what a token store belongs to
    poems(hub, "owner/poems", main="newer", old="old")
    hub.log.clear()
    assert online("find", "owner/poems") == new[0] and hub.log == []
    words = ["owner/poems@lost: cannot be read", "Revision Not Found"]
    refused(online, "find", "owner/poems@lost", words=words)
    hub.silent.add("datasets/owner/poems")
    later = Client(home, hub.endpoint)
    later("fetch", home)  # once it has started
    begun = time.monotonic()
    assert later("find", "owner/poems") == new[0]
    # Beside its tokens nothing of it can be had: what is cached last is of another commit.
    refused(later, "rows", "owner/poems", words=["out of reach"])
    assert time.monotonic() - begun < 10
    later.close()


@pytest.mark.parametrize("name", ["unknown", "denied", "forbidden", "gated", "gated-and-nobody"])
def test_a_data_set_that_is_not_given_to_us(hub, online, name):
    status, headers, words = ANSWERS[name]
    hub.answers[f"datasets/owner/{name}"] = status, headers
    words = [f"owner/{name}: cannot be read", *words]
    refused(online, "rows", f"owner/{name}", words=words)


def test_a_gate_before_the_files_of_a_data_set_alone(hub, online):
    poems(hub, "owner/gate", main="new")
    hub.closed["datasets/owner/gate"] = 403, GATED
    refused(online, "rows", "owner/gate", words=["owner/gate: cannot be read", "gated"])


def test_no_bars_of_the_hub_run_into_ours(hub, tmp_path, small):
    hub.add("owner/bars", main=small[0])
    poems(hub, "owner/bars", main="new")
    with open(tmp_path / "err", "w") as err:
        client = Client(tmp_path / "home", hub.endpoint, stderr=err)
        client("rows", f"owner/bars@{commit('datasets/owner/bars', 'main')}")
        client("fetch", f"owner/bars@{commit('owner/bars', 'main')}")
        client.close()
    said = (tmp_path / "err").read_text()
    assert "%|" not in said and "\r" not in said


# ---- saving --------------------------------------------------------------------------------------


def contents(folder):
    """Everything below a folder, hidden names too."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_model_loads_bit_by_bit(tmp_path, dtype):
    model = jax.tree.map(lambda x: x.astype(dtype), checkpoint(SMALL))
    models.save(model, tmp_path / "once")
    assert digest(models.load(tmp_path / "once")) == digest(model)
    models.save(models.load(tmp_path / "once"), tmp_path / "twice")
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")


def test_shards(tmp_path):
    model = checkpoint(SMALL)
    models.save(model, tmp_path / "whole")
    models.save(model, tmp_path / "parts", shard_size=1000)
    assert digest(models.load(tmp_path / "parts")) == digest(model)
    files = files_of(tmp_path / "parts")
    index = json.loads(files.pop("model.safetensors.index.json"))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    shards = {name for name in files if name.endswith(".safetensors")}
    assert shards == set(index["weight_map"].values())
    count = len(shards)
    names = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert shards == names and count > 2
    for name in shards:
        tensors = load_file(tmp_path / "parts" / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 1000
        for tensor in tensors:
            assert index["weight_map"][tensor] == name
            assert np.array_equal(tensors[tensor], whole[tensor])


def test_a_model_on_a_mesh_is_saved_as_from_one_device(tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "one")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = models.load(tmp_path / "one", mesh=mesh)
    assert len(model.blocks.query.sharding.device_set) == 8
    assert not model.blocks.query.is_fully_replicated
    models.save(model, tmp_path / "eight")
    assert files_of(tmp_path / "eight") == files_of(tmp_path / "one")


def test_saving_leaves_no_second_copy_behind(tmp_path):
    """jax keeps what an array has become on the host for as long as the array lives."""
    mesh = sharding.make_mesh(1, 8, 1)
    model = checkpoint(SMALL)
    model = sharding.shard(model, sharding.specs(model, mesh))
    models.save(model, tmp_path / "x")
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_no_byte_is_read_twice(tmp_path, monkeypatch, sizes):
    """However the leaves are split, and by rows or columns of what is on disk."""
    models.save(checkpoint(SMALL), tmp_path / "x")
    read, sizes_read = models.hub.Tensor.read, []

    def noted(tensor, *index):
        part = read(tensor, *index)
        sizes_read.append(part.nbytes)
        return part

    monkeypatch.setattr(models.hub.Tensor, "read", noted)
    loaded = models.load(tmp_path / "x", mesh=sharding.make_mesh(*sizes))
    assert sum(sizes_read) == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert digest(loaded) == digest(checkpoint(SMALL))


def test_a_fingerprint_is_of_what_is_there(tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "x")
    models.save(checkpoint(SMALL), tmp_path / "y")
    models.save(checkpoint(SMALL, seed=1), tmp_path / "z")
    prints = [models.fingerprint(tmp_path / name) for name in "xyz"]
    assert prints[0] == prints[1] != prints[2]
    (tmp_path / "x" / "model.safetensors").unlink()  # to load it is what fails
    assert models.fingerprint(tmp_path / "x") not in prints


def test_a_fingerprint_is_of_every_byte_and_reads_them_once(tmp_path, monkeypatch):
    folder, cached = tmp_path / "folder", tmp_path / "snapshots" / "x"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    with open(weights, "wb") as file:
        file.truncate(100_000_000)
    before = models.fingerprint(folder)
    with open(weights, "r+b") as file:
        file.seek((1 << 16) + (1 << 13))
        file.write(b"x" * (1 << 13))
    now = models.fingerprint(folder)
    assert now != before
    shutil.copytree(folder, cached)
    with open(weights, "rb") as file:  # as the hub's client keeps it
        blob = tmp_path / "blobs" / hashlib.file_digest(file, "sha256").hexdigest()
    blob.parent.mkdir()
    (cached / weights.name).rename(blob)
    (cached / weights.name).symlink_to(blob)
    clock = time.time() + 10  # what changed just now may change again before the clock ticks
    monkeypatch.setattr(time, "time", lambda: clock)
    assert models.fingerprint(folder) == now
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it was read again"))
    assert models.fingerprint(folder) == now
    monkeypatch.undo()
    assert models.fingerprint(cached) == now


def test_bloom_keeps_the_length_it_was_trained_at(tmp_path):
    """The converter of llama.cpp takes it for the context, and without it the hidden size."""
    teacher = shutil.copytree(ROOT / "tests" / "fixtures" / "bloom", tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text()) | {"seq_length": 2048}
    (teacher / "config.json").write_text(json.dumps(config))
    models.save(student.cut(models.load(teacher), {"layers": (1,)}), tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (exported["n_layer"], exported["seq_length"]) == (1, 2048)


def test_tokenizer_and_generation_settings_are_kept(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in [*TEXTS, "tokenizer_config.json", "README.md", "config.json", "x.safetensors"]:
        (source / name).write_bytes(TEXTS.get(name, name.encode()))
    models.save(checkpoint(SMALL), tmp_path / "out", tokenizer=source)
    saved = files_of(tmp_path / "out")
    copied = {*TEXTS, "tokenizer_config.json"}
    assert {name: saved[name] for name in copied} == {n: (source / n).read_bytes() for n in copied}
    assert saved.keys() == copied | {"config.json", "model.safetensors"}
    # A checkpoint replaced by itself keeps its tokenizer.
    models.save(models.load(tmp_path / "out"), tmp_path / "out", tokenizer=tmp_path / "out")
    assert files_of(tmp_path / "out") == saved
    for name in copied:
        (source / name).unlink()
    words = [str(source), "no tokenizer"]
    model = checkpoint(SMALL)
    refused(models.save, model, tmp_path / "more", tokenizer=source, words=words)
    assert not (tmp_path / "more").exists()


def test_a_checkpoint_replaces_a_checkpoint(tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "x", shard_size=1000)
    models.save(checkpoint(SMALL, seed=1), tmp_path / "x")
    models.save(checkpoint(SMALL, seed=1), tmp_path / "y")
    assert files_of(tmp_path / "x") == files_of(tmp_path / "y")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}
    (tmp_path / "empty").mkdir()
    models.save(checkpoint(SMALL, seed=1), tmp_path / "empty")
    models.save(checkpoint(SMALL, seed=1), tmp_path / "new" / "and" / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    models.save(checkpoint(SMALL), tmp_path / "link")
    assert digest(models.load(tmp_path / "x")) == digest(checkpoint(SMALL))
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "names",
    [["notes.txt"], ["config.json", "notes.txt"], ["model.safetensors"], [".git/config"]]
    + [["config.json", "model.safetensors", "notes.txt"]]
    + [["config.json", "model.safetensors", ".git/config"], ["config.json", "runs/1/metrics"]],
)
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, monkeypatch, names):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = contents(tmp_path)
    monkeypatch.chdir(folder)
    for place in (folder, ".", "../mine", folder / names[0]):
        refused(models.save, checkpoint(SMALL), place, words=["not replaced"])
    refused(models.save, checkpoint(SMALL), folder / names[0] / "x", words=["cannot be written"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["os.fsync", "json.dumps", "shutil.copyfile"])
def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, error, where):
    old = tmp_path / "old"
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_bytes(TEXTS["tokenizer.json"])
    models.save(checkpoint(SMALL), old)
    before = contents(tmp_path)

    def fail(*arguments, **options):
        raise error

    for place in (old, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises((UserError, KeyboardInterrupt)) as caught:
                models.save(checkpoint(SMALL, seed=1), place, tokenizer=tmp_path / "words")
        assert contents(tmp_path) == before
        if caught.type is UserError:
            assert str(caught.value) == f"{place}: cannot be written (No space left on device)"


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    models.save(checkpoint(SMALL), tmp_path / "x")
    before = contents(tmp_path)
    replace = Path.replace

    def fail(path, target):
        if path.name == "new":  # and not the older one, which goes back
            raise OSError(16, "Device or resource busy")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        refused(models.save, checkpoint(SMALL, seed=1), tmp_path / "x", words=["busy"])
    assert contents(tmp_path) == before


def test_a_save_that_is_killed_leaves_the_old_checkpoint(tmp_path, home, hub):
    source, old, new = tmp_path / "source", tmp_path / "old", tmp_path / "new"
    models.save(checkpoint(SMALL, seed=1), source)
    models.save(checkpoint(SMALL), old)
    before = files_of(old)
    for place in (old, new):
        doomed = Client(home, hub.endpoint)
        doomed.start("die_saving", source, place)
        assert doomed.process.wait(60) == -signal.SIGKILL
        doomed.close()
    assert files_of(old) == before
    assert not new.exists()
    # What was written; the next save removes it, as the second removed that of the first.
    left = [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert [name[:5] for name in left] == [".new."]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "old", *left}
    for place in (old, new):
        models.save(models.load(source), place)
        assert files_of(place) == files_of(source)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "old", "new"}


def test_notes_are_saved_whatever_is_in_the_names_of_files(tmp_path):
    models.save(checkpoint(SMALL), tmp_path / "x", notes={"README.md": "KL(a ‖ b) of \udcff.txt"})
    note = (tmp_path / "x" / "README.md").read_bytes()
    assert note == "KL(a ‖ b) of \\udcff.txt".encode()
