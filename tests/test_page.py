"""The page that shows a text token by token: its figures, its texts, and that it is safe."""

import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import eval
import models
import sharding
from models.llama import Config, Llama
from runtime import errors, page

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><script>alert(1)</script><!-- é €😀 \u202e\u2028\x07\x7f 日本 &amp; \\u003c "


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A student and its teacher, tiny ones."""
    folders = []
    for name, seed in (("student", 0), ("teacher", 1)):
        config = Config(2048, 16, 32, 1, 2, 2, 8, max_positions=128, tied=True, eos=0, pad=0)
        model = jax.tree.map(lambda leaf: leaf * 8, Llama(config, jax.random.key(seed)))
        folders.append(tmp_path_factory.mktemp(name))
        models.save(model, folders[-1], tokenizer=ROOT / "demo" / "teacher")
    return folders


@pytest.fixture(scope="module")
def content(folders, tmp_path_factory):
    """What a page has of a text that wants to do harm; and its batch."""
    path = tmp_path_factory.mktemp("text") / "hostile.txt"
    path.write_text(HOSTILE * 3 + "\n\nOnce upon a time.", encoding="utf-8")
    config = data.Config((str(path),), documents="paragraph", held_out=1.0, cache=str(path.parent))
    corpus = data.open_corpus(config, folders[1], seq_len=96, seed=0, vocab=2048)
    mesh, loaded = sharding.make_mesh(), [models.load(folder) for folder in folders]
    with jax.set_mesh(mesh):
        on = partial(sharding.from_host, mesh=mesh)
        batches = data.evaluation(corpus, 8)
        return page.windows(*loaded, batches, folders[1], to_device=on), corpus


def test_figures_are_those_of_the_logits(content, folders):
    (windows, names), corpus = content[0].values(), content[1]
    batch = next(data.evaluation(corpus, 8))
    assert len(windows) == sum(batch.segments[:, 1] > 0) > 2
    size, log_probs = batch.tokens.shape[1] - 1, {}
    for whose, folder in zip(("", "teacher_"), folders, strict=True):
        arrays = jnp.array(batch.tokens[:, :-1]), jnp.array(batch.segments[:, :-1])
        logits = models.load(folder)(*arrays)
        log_probs[whose] = np.asarray(jax.nn.log_softmax(logits))
    kl = np.sum(jnp.exp(log_probs["teacher_"]) * (log_probs["teacher_"] - log_probs[""]), -1)
    for i, window in enumerate(windows):
        end = len(window["tokens"]) - 1
        assert window["tokens"] == batch.tokens[i, : end + 1].tolist()
        assert window["mask"] == batch.mask[i, :end].tolist()
        np.testing.assert_allclose(window["kl"], kl[i, :end], atol=2e-4)
        for whose, values in log_probs.items():
            ce = -np.take_along_axis(values[i], batch.tokens[i, 1:, None], 1)[:end, 0]
            np.testing.assert_allclose(window[f"{whose}ce"], ce, atol=2e-4)
            ids = np.array(window[f"{whose}ids"])
            assert ids.shape == (end, 5) and set(ids.flat) <= names.keys()
            top = np.take_along_axis(values[i, :end], ids, 1)
            np.testing.assert_allclose(window[f"{whose}log_probs"], top, atol=2e-4)
            assert (top[:, 0] >= values[i, :end].max(1) - 1e-5).all()
    assert windows[0]["mask"].count(True) == size  # a whole window


def test_tokens_read_together_are_the_text(content):
    """Also letters of several tokens, and across windows, which share a token."""
    windows = content[0]["windows"]
    text = windows[0]["text"] + [piece for window in windows[1:] for piece in window["text"][1:]]
    assert HOSTILE * 3 in "".join(text).replace("\ufffd", "")
    assert content[0]["names"] and "" in windows[0]["text"]  # the first token of such a letter


class Reader(HTMLParser):
    """The scripts of a page, and all that it would fetch."""

    def __init__(self):
        super().__init__()
        self.scripts, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "data", "action", "poster")
        self.sources += [value for name, value in attributes if name in names]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += text


def test_a_page_is_one_file_that_its_text_cannot_leave(content, tmp_path):
    sections = [{"title": HOSTILE, "table": [["", HOSTILE], ["a", "b"]]}]
    page.write(tmp_path / "page.html", HOSTILE, content[0], sections)
    html, reader = (tmp_path / "page.html").read_text(encoding="utf-8"), Reader()
    reader.feed(html)
    assert len(reader.scripts) == html.count("<script") == 2
    embedded = json.loads(reader.scripts[0])
    expected = {"title": HOSTILE, "sections": sections} | content[0]
    assert embedded == json.loads(json.dumps(expected))
    assert reader.sources == ["data:,"] and "http" not in html.replace("http-equiv", "")


def test_eval_writes_a_page_of_the_first_windows(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("One day a fox met a crow on the hill. " * 120)
    words = ["--model", folders[0], "--teacher", folders[1], "--data.source", tmp_path / "text.txt"]
    words += ["--data.cache", tmp_path, "--seq-len", 64, "--html", tmp_path / "page.html", "--json"]
    config = errors.cli(eval.Config, [str(word) for word in words])
    figures, reader = eval.score(config), Reader()
    reader.feed((tmp_path / "page.html").read_text())
    content = json.loads(reader.scripts[0])
    assert content["title"] == f"{folders[0]} beside {folders[1]}"
    assert len(content["windows"]) == page.WINDOWS < figures["tokens"] / 64
    tokens = [kl for window in content["windows"] for kl in window["kl"]]
    assert len(tokens) == page.WINDOWS * 64
    size = (tmp_path / "page.html").stat().st_size
    assert size / len(tokens) < 2e6 / (20 * 256)
