"""Files made to harm: nothing outside the given folders is read, and no code of theirs is run."""

import ast
import gzip
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import models
import text
from benchmarks import fuzz
from runtime import checkpoint
from runtime.errors import UserError
from text import files

ROOT = Path(__file__).parents[1]
SECRET = "what nobody may read"


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A model with its tokenizer."""
    folder = tmp_path_factory.mktemp("honest") / "model"
    fuzz.make_model(folder)
    fuzz.make_tokenizer(folder)
    return folder


@pytest.fixture
def model(honest, tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in honest.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    refused = str(caught.value)
    assert refused.isprintable() and len(refused) < 1000 and SECRET not in refused, refused
    return refused


# ---- names and links that lead elsewhere ---------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("way", ["absolute", "relative", "through a link"])
def test_a_link_out_of_a_model(model, tmp_path, name, way):
    outside = tmp_path / "outside"
    outside.write_bytes((model / name).read_bytes() if (model / name).exists() else SECRET.encode())
    (model / name).unlink(missing_ok=True)
    target = {"absolute": outside, "relative": "../outside", "through a link": "inside"}[way]
    (model / name).symlink_to(target)
    if way == "through a link":
        (model / "inside").symlink_to(outside)
    for action in (models.load, models.config, models.fetch):
        assert f"{model / name}: it is a link that leads out of" in refusal(action, model)
    exported = tmp_path / "exported"
    refusal(models.save, models.load(fresh(tmp_path)), exported, tokenizer=model)
    assert not exported.exists()


def fresh(tmp_path: Path) -> Path:
    fuzz.make_model(tmp_path / "fresh")
    return tmp_path / "fresh"


def test_a_shard_that_is_a_link(tmp_path):
    fuzz.make_shards(tmp_path / "model")
    shard = next((tmp_path / "model").glob("model-00001*"))
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    assert "link that leads out of" in refusal(models.load, tmp_path / "model")


OUTSIDE = ["../outside.safetensors", "/tmp/outside.safetensors", "..", "\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_a_place_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    fuzz.make_shards(folder)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    first = next(iter(where["weight_map"]))
    file = folder / where["weight_map"][first]
    (tmp_path / "outside.safetensors").write_bytes(file.read_bytes())
    for tensor, held in where["weight_map"].items():
        if held == file.name:
            where["weight_map"][tensor] = name
    index.write_text(json.dumps(where))
    assert "is not the name of a safetensors file beside it" in refusal(models.load, folder)


def test_links_of_the_hubs_cache_and_within_a_folder_are_followed(model, honest, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(model.iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(model)
    for folder in (snapshot, model, tmp_path / "link"):
        assert fuzz.load_model(folder) == fuzz.load_model(honest)
    outside = tmp_path / "outside"
    outside.write_bytes((blobs / "0").read_bytes())
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(outside)
    assert "link that leads out of" in refusal(models.load, snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_would_never_end_is_not_opened(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    assert "no file that can be read" in refusal(models.fetch, model)
    (model / name).unlink()
    (model / name).symlink_to(name)
    refusal(models.load, model) if name != "tokenizer.json" else refusal(text.load_tokenizer, model)


def link_outside(where: str, folder: Path, outside: Path) -> Path:
    """A link in the folder to a file or a folder that is not in it."""
    secret = outside / "secret.txt"
    link = folder / ("deep/x.txt" if where != "a folder" else "deep/x")
    target = {
        "absolute": secret,
        "relative": os.path.relpath(secret, link.parent),
        "through a link": "y",
        "a folder": outside,
    }[where]
    if where == "through a link":
        (link.parent / "y").symlink_to(secret)
    link.symlink_to(target)
    return link


@pytest.mark.parametrize("where", ["absolute", "relative", "through a link", "a folder"])
def test_a_link_out_of_a_folder_of_text(tmp_path, where):
    folder, outside = tmp_path / "text", tmp_path / "text-outside"  # one name begins the other
    for place in (folder / "deep", outside):
        place.mkdir(parents=True)
    (folder / "a.txt").write_text("A bear.")
    (outside / "secret.txt").write_text(SECRET)
    link = link_outside(where, folder, outside)
    for name in ("", "**", "deep/*", "*/x*"):
        refused = refusal(text.find, str(folder / name))
        assert "it is a link that leads out of" in refused and str(link) in refused
    named = text.find(str(link if where != "a folder" else link / "secret.txt"))
    assert [file.read_text() for file in named.files] == [SECRET]  # it was asked for by its name


def test_links_within_a_folder_of_text_and_the_hubs_cache_are_followed(tmp_path):
    hub = tmp_path / "datasets--a--b"
    snapshot, blobs = hub / "snapshots" / "1", hub / "blobs"
    for place in (snapshot / "data", blobs, tmp_path / "own" / "deep"):
        place.mkdir(parents=True)
    (blobs / "0").write_text("A bear.")
    (snapshot / "data" / "a.txt").symlink_to("../../../blobs/0")
    (tmp_path / "own" / "a").write_text("A bear.")
    (tmp_path / "own" / "deep" / "a.txt").symlink_to("../a")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    names = [snapshot, snapshot / "data", hub, snapshot.parent / "*" / "data" / "*.txt"]
    for name in (*names, tmp_path / "own", tmp_path / "link", tmp_path / "*" / "deep" / "*.txt"):
        assert {file.read_text() for file in text.find(str(name)).files} == {"A bear."}
    (tmp_path / "outside").write_text(SECRET)
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(tmp_path / "outside")
    for name in names:
        assert "leads out of" in refusal(text.find, str(name))


def test_kept_targets_that_lie_elsewhere_are_not_read(tmp_path):
    fuzz.make_kept(tmp_path)
    expected, folder = fuzz.load_kept(tmp_path), tmp_path / "kept"
    for file in sorted(folder.glob("[!.]*")):
        file.rename(tmp_path / "outside")
        file.symlink_to(tmp_path / "outside")
        assert f"{file}: it is a link that leads out of" in refusal(fuzz.load_kept, tmp_path)
        file.unlink()
        os.mkfifo(file)
        refusal(fuzz.load_kept, tmp_path)
        file.unlink()
        (tmp_path / "outside").rename(file)
    assert fuzz.load_kept(tmp_path) == expected


def test_a_checkpoint_whose_data_lie_elsewhere_is_not_read(tmp_path, capfd):
    """What lies there is just what was saved: nothing but its place is wrong."""
    import tensorstore

    state = {"w": jnp.arange(4, dtype=jnp.float32)}
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as saved:
        for step in (1, 2):
            saved.save(step, state, {})
    arrays = folder / "2" / "arrays"
    for path in sorted(arrays.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    base, context = {"driver": "memory", "path": "x/y/arrays/"}, tensorstore.Context()
    kinds = ("value", "btree_node", "version_tree_node")
    astray = {f"{kind}_data_prefix": "../../../outside/" for kind in kinds}
    store = {"driver": "ocdbt", "base": base, "path": "w/", **astray}
    metadata = {"shape": [4], "dtype": "<f4", "chunks": [4], "compressor": None}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    tensorstore.open(spec, create=True, context=context).result()[...] = np.arange(4, dtype="f4")
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    astray = 0
    for key in memory.list().result():
        name = key.decode().removeprefix("x/y/arrays/")
        astray += name.startswith("../../../outside/")
        path = Path(os.path.normpath(arrays / name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(memory.read(key).result().value)
    assert astray >= 2 and (arrays / "manifest.ocdbt").exists() and (tmp_path / "outside").exists()
    _, _, step = checkpoint.restore(folder, state)
    assert step == 1 and "2 is damaged and skipped" in capfd.readouterr().err


# ---- what never ends -----------------------------------------------------------------------------


def read_length(path: Path, **options) -> int:
    tokenizer = text.load_tokenizer(path.parent)
    source = text.find(str(path))
    return sum(len(piece.text) for piece in text.pieces(source, tokenizer, **options))


BLOCKS = {
    "one line": (b"a", "jsonl", {}, "a line in it is longer than 4 MiB"),
    "one line, compressed": (b"a", "jsonl.gz", {}, "a line in it is longer"),
    "one line of text": (b"a", "txt", {"documents": "line"}, "a line in it is longer"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_what_never_ends(model, case, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 1 << 22)
    block, kind, options, reason = BLOCKS[case]
    path = model / f"endless.{kind}"
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as file:
        for _ in range(6):
            file.write(block * ((1 << 20) // len(block)))
    refused = refusal(read_length, path, **options)
    assert reason in refused and str(path) in refused


def test_a_long_document_is_read_all_the_same(model):
    path = model / "long.txt"
    path.write_bytes(b"a word " * (10 << 17) + b"\n")
    assert read_length(path) == path.stat().st_size


@pytest.mark.parametrize("opening", [b"[", b'{"text":', b'{"text":[{"a":'])
def test_deep_nesting(model, opening):
    path = model / "deep.jsonl"
    path.write_bytes(opening * 200_000)
    assert "line 1: not JSON" in refusal(read_length, path)
    for name, action in (
        ("tokenizer.json", text.load_tokenizer),
        ("tokenizer_config.json", text.load_tokenizer),
        ("config.json", models.config),
    ):
        before = (model / name).read_bytes()
        (model / name).write_bytes(opening * 200_000)
        assert name in refusal(action, model)
        (model / name).write_bytes(before)


# ---- templates -----------------------------------------------------------------------------------


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch SENTINEL') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('touch SENTINEL').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch SENTINEL') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__globals__}'.format_map({'x': raise_exception}) }}",
    "{{ ''.format.__self__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ ([messages] | map('attr', '__class__') | list)[0].__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ raise_exception.__code__ }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% for x in ().__class__.__bases__ %}{{ x }}{% endfor %}",
    "{{ ''.encode().__class__ }}",
    "{{ dict.__mro__ }}",
    "{{ range.__class__ }}",
    "{{ raise_exception(messages.__class__) }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
]


def rendered(folder: Path, template: str) -> str:
    (folder / "chat_template.jinja").write_text(template)
    return text.load_tokenizer(folder).render_chat(fuzz.TALK, "all", "x.jsonl record 1").text


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_reaches_nothing_of_pythons(model, tmp_path, monkeypatch, template):
    """It is refused, or the names stand for nothing."""
    monkeypatch.chdir(tmp_path)
    try:
        refused = rendered(model, template)
    except UserError as error:
        assert str(error).isprintable()
        refused = ""
    for sign in ("<class", "<module", "<function", "<built-in", "<frozen", "root:", "{'", "0x"):
        assert sign not in refused, refused
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- code that comes with files ------------------------------------------------------------------


def test_code_beside_a_model_is_never_run(model, tmp_path):
    sentinel = tmp_path / "ran"
    for name in ("modeling.py", "configuration.py", "tokenization.py", "__init__.py"):
        (model / name).write_text(f"open({str(sentinel)!r}, 'w')\n")
    for name, extra in (
        ("config.json", {"auto_map": {"AutoConfig": "configuration.C", "AutoModel": "modeling.M"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.T", None]},
                                   "tokenizer_class": "T", "trust_remote_code": True}),
    ):  # fmt: skip
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | extra))
    models.load(model)
    (model / "text.txt").write_text("Once upon a time there was a bear. " * 40)
    fuzz.load_plain(model)
    assert not sentinel.exists()


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was read')",)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_under_another_name(model, name):
    import pickle

    (model / name).write_bytes(pickle.dumps(Trap()))
    refusal(text.load_tokenizer if name.startswith("tokenizer") else models.load, model)


def test_a_pickle_as_text_or_state(model, tmp_path, capfd):
    import pickle

    for name in ("text.parquet", "text.jsonl"):
        (model / name).write_bytes(pickle.dumps(Trap()))
        refusal(read_length, model / name)
    state = {"w": jnp.arange(4, dtype=jnp.float32)}
    with checkpoint.Checkpoints(tmp_path / "c") as saved:
        for step in (1, 2):
            saved.save(step, state, {})
    (tmp_path / "c" / "2" / "manifest" / "metadata").write_bytes(pickle.dumps(Trap()))
    assert checkpoint.restore(tmp_path / "c", state)[2] == 1


def test_nothing_here_can_read_a_pickle():
    readers = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch"}
    rooms = ("losses", "models", "runtime", "text")
    for file in [
        *ROOT.glob("*.py"),
        *(path for room in rooms for path in ROOT.glob(f"{room}/*.py")),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not readers & {name.partition(".")[0] for name in names}, file
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "trust_remote_code"), file
