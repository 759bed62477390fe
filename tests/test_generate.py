"""Sampling: what is drawn and what it depends on. The program: what it leaves behind."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

import data
import distill
import generate
import models
import sharding
import text
from generate import Decoding, Job, Sampling, sample, sample_token
from models.base import unstacked
from models.llama import Config, Llama
from runtime import answers, errors, files
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"

logits_of = eqx.filter_jit(lambda model, tokens: model(tokens))


def ragged(rows: int, longest: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, rows)
    tokens = rng.integers(3, 96, (rows, longest)).astype(np.int32)
    tokens[np.arange(longest) >= lengths[:, None]] = 0
    return jnp.asarray(tokens), jnp.asarray(lengths)


# ---- one token -----------------------------------------------------------------------------------

DRAWS = 20_000


def filtered(p: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution after the filters, by sorting."""
    order = np.argsort(-p)
    p = p[order]
    if sampling.top_k:
        p[sampling.top_k :] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        p[np.cumsum(p) - p >= sampling.top_p] = 0
    p[p < sampling.min_p * p[0]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=9),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(repetition_penalty=2.0),
        Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.03, repetition_penalty=1.2),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "min-p", "repetition", "all"],
)
def test_tokens_are_drawn_from_the_filtered_distribution(sampling):
    rng = np.random.default_rng(3)
    logits, occurred = rng.standard_normal(60), rng.random(60) < 0.3
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(DRAWS))
    drawn = eqx.filter_jit(sample_token)(
        jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1)),
        keys,
        jnp.full(DRAWS, 4),
        jnp.tile(jnp.asarray(occurred), (DRAWS, 1)) if sampling.repetition_penalty != 1 else None,
        sampling,
    )
    by = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    scaled = np.where(occurred, logits * by, logits) / sampling.temperature
    expected = DRAWS * filtered(np.exp(scaled) / np.exp(scaled).sum(), sampling)
    counts = np.bincount(np.asarray(drawn), minlength=60)
    assert not counts[expected == 0].any()
    often = expected >= 5
    cells = [(counts[often], expected[often]), ([counts[~often].sum()], [expected[~often].sum()])]
    counts, expected = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    counts, expected = counts[expected > 0], expected[expected > 0]
    distance = ((counts - expected) ** 2 / expected).sum()
    assert distance < scipy.stats.chi2.isf(1e-3, len(counts) - 1)


def test_the_first_token_of_a_text_follows_the_model():
    model = models.load(FIXTURES / "llama-2")
    prompt = np.array([5, 33, 71])
    p = np.asarray(jax.nn.softmax(logits_of(model, jnp.asarray(prompt)[None])[0, -1]), np.float64)
    draws = 4000
    expected = draws * filtered(p / p.sum(), Sampling(top_k=20))
    prompts = jnp.tile(jnp.asarray(prompt), (draws, 1))
    tokens, _ = sample(
        model, prompts, jnp.full(draws, 3), jax.random.key(1), Decoding(1, Sampling(top_k=20))
    )  # fmt: skip
    counts = np.bincount(np.asarray(tokens[:, 0]), minlength=96)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert ((counts - expected) ** 2 / expected).sum() < scipy.stats.chi2.isf(1e-3, 19)


@pytest.mark.parametrize(
    "wrong", ["temperature=-1.0", "top_k=-1", "top_p=0.0", "top_p=1.5", "min_p=2.0"]
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=f"--{wrong.partition('=')[0].replace('_', '-')} is"):
        eval(f"Sampling({wrong})")


# ---- many texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [256, 4])
def test_greedy_text_is_that_of_full_passes(strict, monkeypatch, part):
    """Rows of different lengths that end early or not; prompts read at once or in parts."""
    monkeypatch.setattr(generate, "PART", part)
    model, stop, new = models.load(FIXTURES / "qwen2-mixed"), tuple(range(0, 96, 7)), 9
    prompts, lengths = ragged(8, 14)
    tokens, counts = sample.__wrapped__(
        model, prompts, lengths, jax.random.key(0),
        Decoding(new, Sampling(temperature=0.0), stop),
    )  # fmt: skip
    ended = set()
    for row, length in enumerate(lengths.tolist()):
        said = prompts[row, :length].tolist()
        for _ in range(new):
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(said)] = said
            said.append(int(logits_of(model, jnp.asarray(padded))[0, len(said) - 1].argmax()))
            if said[-1] in stop:
                break
        assert tokens[row, : counts[row]].tolist() == said[length:]
        assert not tokens[row, counts[row] :].any()
        ended.add(said[-1] in stop)
    assert ended == {True, False}


def texts(model, jobs, slots, sampling):
    decoding = Decoding(10, sampling, (2, 5, 7, 30, 44))
    finished = [
        (job[:2], tokens.tolist())
        for some in generate.generate(model, jobs, jax.random.key(1), decoding, slots=slots)
        for job, tokens in some
    ]
    assert sorted(name for name, _ in finished) == sorted(job[:2] for job in jobs)
    return dict(finished)


def test_a_row_does_not_depend_on_the_others_nor_on_the_mesh(monkeypatch):
    sampling = Sampling(0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3)
    folder, rng = FIXTURES / "llama-2", np.random.default_rng(0)
    prompts = [rng.integers(3, 96, 1 + (7 * i) % 20).tolist() for i in range(6)]
    jobs = [Job(3 * i, j, prompt) for i, prompt in enumerate(prompts) for j in range(2)]
    model = models.load(folder)
    together = texts(model, jobs, 16, sampling)
    assert sum(together[3 * i, 0] != together[3 * i, 1] for i in range(6)) >= 5
    assert len(set(map(len, together.values()))) > 2
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    traced = []

    def counted(program, *given, **how):
        traced.append(program.__name__)
        return program(*given, **how)

    for name in ("read_prompts", "append_token"):
        monkeypatch.setattr(generate, name, partial(counted, getattr(generate, name)))
    with sharding.use_mesh(mesh):  # four at a time: they take each other's places
        assert texts(models.load(folder, mesh=mesh), jobs, 4, sampling) == together
    # One program inserts and one decodes, however often they ran: in two loops, the second with the
    # whole cache.
    assert traced == ["read_prompts", *["append_token"] * 3]


@pytest.mark.parametrize("name", ["llama-2", "bloom"])
def test_blocks_apart_write_the_same_text(name):
    model = models.load(FIXTURES / name)
    prompts, lengths = ragged(8, 60)
    decoding = Decoding(90, Sampling(top_k=20), (2, 5))
    texts, counts = sample(model, prompts, lengths, jax.random.key(0), decoding)
    assert counts.max() > 80  # the cache of 150 places is filled beyond its second size
    apart = unstacked(model)
    again = sample(apart, prompts, lengths, jax.random.key(0), decoding)
    assert again[0].tolist() == texts.tolist()
    state = generate.idle_state(model, jax.random.split(jax.random.key(0), 8), 150, decoding)
    program = generate.decode.__wrapped__
    text = (
        jax.jit(lambda model, state: program((model, 8), state, decoding, 64))
        .lower(apart, state)
        .compile()
        .as_text()
    )
    assert "conditional(" not in text


def test_what_no_row_has_filled_is_not_read():
    model, decoding = models.load(FIXTURES / "llama-2"), Decoding(60, Sampling(temperature=0.0))
    prompts, lengths = ragged(2, 20)
    keys = jax.random.split(jax.random.key(0), 2)

    def continued(poison, steps):
        state = generate.read_prompts(model, prompts, lengths, keys, decoding, 60)
        values = state.cache.values.at[..., generate.LEAST :, :].set(poison)
        cache = state.cache.replace(state.cache.keys, values)
        state = generate.decode(
            (model, 2), dataclasses.replace(state, cache=cache), decoding, steps
        )
        return state.tokens.tolist()

    steps = generate.LEAST - int(lengths.max())
    assert continued(jnp.nan, steps) == continued(0, steps)
    assert continued(jnp.nan, steps + 1) != continued(0, steps + 1)  # what is read would be seen


def test_short_texts_do_not_wait_for_long_ones(monkeypatch):
    monkeypatch.setattr(generate, "STEPS", 1)  # so that every list is of one step
    model, rng = models.load(FIXTURES / "llama-2"), np.random.default_rng(0)
    jobs = [Job(i, 0, rng.integers(3, 96, 5).tolist()) for i in range(16)]
    lists = list(
        generate.generate(
            model, jobs, jax.random.key(1),
            Decoding(41, Sampling(), tuple(range(0, 96, 12))), slots=4,
        )
    )  # fmt: skip
    counts = {job.prompt: len(tokens) for some in lists for job, tokens in some}
    assert len(counts) == 16
    # Four at a time, each four as long as its longest.
    in_step = sum(max(counts[i] for i in range(k, k + 4)) for k in range(0, 16, 4))
    assert len(lists) < 0.8 * in_step


# ---- the program ---------------------------------------------------------------------------------

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "the reference"},
]


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
    """The program on one device, where nothing says otherwise: programs of eight compile slowly."""
    make_mesh = sharding.make_mesh

    def small(data=1, fsdp=-1, tensor=1, **options):
        if (data, fsdp, tensor) == (-1, 1, 1):
            return make_mesh(1, 1, 1, devices=jax.devices()[:1])
        return make_mesh(data, fsdp, tensor, **options)

    if request.node.name != "test_records_and_settings":
        monkeypatch.setattr(sharding, "make_mesh", small)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("plain"), chats=False)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("chat"), chats=True)


@pytest.fixture(params=["plain", "chat"])
def folder(request):
    return request.getfixturevalue(request.param)


def checkpoint(folder: Path, *, chats: bool) -> Path:
    """A small model over the letters of ASCII, which ends an answer now and then."""
    letters = {chr(i): i for i in range(128)}
    encoder = Tokenizer(kinds.WordLevel(letters | {"Ġ": 128}, unk_token="~"))
    encoder.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    encoder.decoder = decoders.Fuse()
    encoder.add_special_tokens(["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    source = folder / "tokenizer"
    source.mkdir()
    encoder.save(str(source / "tokenizer.json"))
    config = {"eos_token": "<eos>", "bos_token": "<bos>", "add_bos_token": True}
    if chats:
        (source / "chat_template.jinja").write_text(CHATML)
        config |= {"eos_token": "<|im_end|>", "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    shape = Config(
        vocab=136, embed=16, mlp=16, layers=2, heads=2, kv_heads=1, head_dim=8, max_positions=128,
        eos=(130, 132),
    )  # fmt: skip
    model = eqx.filter_jit(Llama)(shape, jax.random.key(0))
    ends = model.head.at[jnp.array(shape.eos)].mul(20.0)
    models.save(eqx.tree_at(lambda m: m.head, model, ends), folder / "model", tokenizer=source)
    return folder / "model"


def ran(*args, **flags) -> Path:
    """The program, in this process; returns what it wrote."""
    flags = {"max_new": 12, "batch_size": 4} | flags  # one program serves most tests
    words = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    generate.run(errors.cli(generate.Config, [*map(str, args), *words]))
    return Path(flags["out"])


def read(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts_file(folder: Path, count: int = 5) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{'tell me of ' * (i % 3)}{i}\n\n" for i in range(count)))
    return path


@pytest.fixture
def base(plain, tmp_path):
    return dict(model=plain, prompts=prompts_file(tmp_path), out=tmp_path / "out.jsonl")


def test_records_and_settings(base, tmp_path):
    lines = [line for line in Path(base["prompts"]).read_text().splitlines() if line]
    rows = read(ran(**base, samples=2, batch_size=16))
    assert [row["prompt"] for row in rows] == [line for line in lines for _ in range(2)]
    assert rows[0].keys() == {"prompt", "completion", "messages", "finish_reason", "n_tokens"}
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert len({row["completion"] for row in rows}) > 6
    for row in rows:
        ends = row["finish_reason"] == "stop"
        assert row["n_tokens"] <= 12 if ends else row["n_tokens"] == 12
        assert row["messages"] is None
    settings = json.loads((tmp_path / "out.settings.json").read_text())
    assert settings["samples"] == 2 and settings["stop"] == [130, 132] and settings["max-new"] == 12
    table = ran(**base | {"out": tmp_path / "deep" / "out.parquet"}, samples=2, batch_size=3)
    assert read(table) == rows
    noted = json.loads(pyarrow.parquet.read_schema(table).metadata[b"generation"])
    assert noted == settings
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "prompts.txt", "out.jsonl", "out.settings.json", "out.parquet"
    }  # fmt: skip
    assert read(ran(**base | {"out": tmp_path / "other.jsonl"}, seed=1)) != rows[::2]


def test_greedy_answers_are_those_of_the_model(base, plain):
    rows = read(ran(**base, temperature=0))
    tokenizer, model = text.load_tokenizer(plain), models.load(plain)
    encode, decode = tokenizer.encoder.encode, tokenizer.encoder.decode
    ids = [[129, *encode(row["prompt"], add_special_tokens=False).ids] for row in rows]
    lengths = np.array(list(map(len, ids)))
    prompts = np.zeros((len(ids), max(lengths)), np.int32)
    prompts[np.arange(max(lengths)) < lengths[:, None]] = np.concatenate(ids)
    tokens, counts = sample(
        model, jnp.asarray(prompts), jnp.asarray(lengths), jax.random.key(0),
        Decoding(12, Sampling(temperature=0.0), (130, 132)),
    )  # fmt: skip
    for row, said, count in zip(rows, tokens.tolist(), counts.tolist(), strict=True):
        assert row["n_tokens"] == count
        assert row["completion"] == decode(said[:count])


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_conversations(chat, tmp_path, ending):
    """The whole history is in the prompt, the last answer is not."""
    path = tmp_path / "talk.jsonl"
    tool = {"role": "tool", "content": "3", "name": "sum"}
    talks = [TALK, TALK[:2], [*TALK[1:3], tool, TALK[-1]], TALK]
    path.write_text("".join(json.dumps({"messages": talk, "id": 1}) + "\n" for talk in talks))
    rows = read(ran(model=chat, prompts=path, out=tmp_path / f"out{ending}"))
    histories = [TALK[:4], TALK[:2], [*TALK[1:3], tool], TALK[:4]]
    for row, history in zip(rows, histories, strict=True):
        *before, last = [
            {k: v for k, v in message.items() if v is not None} for message in row["messages"]
        ]
        assert before == history
        assert last == {"role": "assistant", "content": row["completion"]}
        assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert all(message["content"] in row["prompt"] for message in history)
        assert "the reference" not in row["prompt"]


def test_a_prompt_is_what_the_user_says_to_a_model_that_chats(plain, chat, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hi", "completion": "no", "text": "t", "other": "o"}\n' * 4)
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for model, flags, expected in (
        (chat, {}, asked),
        (plain, {}, "hi"),
        (chat, {"column": "prompt"}, asked),
        (chat, {"column": "other"}, "o"),
    ):
        out = tmp_path / "out.jsonl"
        rows = read(ran("--no-resume", model=model, prompts=path, out=out, **flags))
        assert [row["prompt"] for row in rows] == [expected] * 4


def test_long_prompts_are_left_out_and_counted(base, capsys):
    everything = read(ran(**base))
    rows = read(ran("--no-resume", **base, max_prompt=13))
    assert "1 of 5 prompts left out: over 13 tokens" in capsys.readouterr().err
    # What is said to a prompt does not depend on how many were left out before it.
    assert rows == [row for row in everything if len(row["prompt"]) < 13]
    assert len(rows) == 4


@pytest.mark.parametrize("mask", ["all", "assistant"])
def test_it_is_a_source_to_train_on(folder, tmp_path, mask):
    """The mask covers the answer and its end, where it has one, and nothing else."""
    chats = (folder / "chat_template.jinja").exists()
    path = tmp_path / "p.jsonl"
    records = [{"messages": [TALK[0], {"role": "user", "content": f"say {i}"}]} for i in range(6)]
    if not chats:
        records = [{"text": f"say {i}"} for i in range(6)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = ran(model=folder, prompts=path, out=tmp_path / "out.parquet")
    rows = read(out)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    config = data.Config(
        source=(str(out),), mask=mask, held_out=1.0, cache=str(tmp_path / "c"), packing="stream"
    )
    corpus = data.open_corpus(config, folder, seq_len=60, seed=0, vocab=136)
    batches = list(data.evaluation(corpus, 1))
    tokens = np.concatenate([b.tokens[0, 1:][b.segments[0, 1:] > 0] for b in batches])
    masks = np.concatenate([b.mask[0][b.segments[0, 1:] > 0] for b in batches])
    learned = text.load_tokenizer(folder).encoder.decode(
        tokens[masks].tolist(), skip_special_tokens=False
    )
    end = "<|im_end|>" if chats else "<eos>"
    answered = [row["completion"] + end * (row["finish_reason"] == "stop") for row in rows]
    if mask == "assistant":
        assert learned == "".join(answered)
    else:
        assert all(answer in learned for answer in answered)
        assert learned.count("say ") == 6
        asked = 2 * 6 if chats else 0
        assert learned.count(end) == asked + sum(row["finish_reason"] == "stop" for row in rows)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_the_template_of_a_writer_travels_with_its_text(chat, plain, tmp_path, ending):
    """To a student whose tokenizer has none; one that has keeps its own."""
    path, (out, base) = tmp_path / "p.jsonl", (tmp_path / f"{x}{ending}" for x in ("out", "base"))
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    ran(model=chat, prompts=path, out=out)
    config = data.Config(source=(str(out),), mask="assistant", held_out=1.0, cache=str(tmp_path))
    corpus = data.open_corpus(config, plain, seq_len=120, seed=0, vocab=136)
    assert corpus.chat_template == CHATML
    (batch,) = data.evaluation(corpus, 1)
    decode = text.load_tokenizer(plain).encoder.decode
    said = decode(batch.tokens[0].tolist(), skip_special_tokens=False)
    assert said.startswith("<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\none?")
    assert data.open_corpus(config, chat, seq_len=120, seed=0, vocab=136).chat_template is None
    # It is no setting to print, nor is there one for a model without a template.
    path.write_text(json.dumps({"text": "hi"}) + "\n")
    ran(model=plain, prompts=path, out=base)
    both = dataclasses.replace(config, source=(str(base), str(out)))
    assert data.open_corpus(both, plain, seq_len=120, seed=0, vocab=136).chat_template == CHATML


# ---- runs that end before they end ---------------------------------------------------------------


@pytest.mark.parametrize(
    "torn", [b'{"prompt": 1, "sam', b'{"prompt": 1, "sample": 0, "n": 5}', b"\0\0\0\n"]
)
def test_a_journal_keeps_what_is_whole_and_goes_on_behind_it(tmp_path, torn):
    out, records = tmp_path / "x.jsonl", [{"prompt": i, "sample": 0, "n": i} for i in range(3)]
    with answers.Journal(out, {"seed": 1}) as journal:
        journal.add(records[2:])
    with journal.path.open("ab") as file:
        file.write(torn)
    with answers.Journal(out, {"seed": 1}) as journal:
        assert list(journal) == records[2:] and (1, 0) not in journal.offsets
        journal.add(records[:2])
    with answers.Journal(out, {"seed": 1}) as journal:
        assert list(journal) == records


def test_a_full_disk_loses_nothing(base, tmp_path, monkeypatch):
    expected = read(ran(**base, samples=3))
    append, left = files.append_json, 6

    def fill(file, record):
        nonlocal left
        left -= 1
        if not left:
            file.write(b'{"prompt": 0, "sam')
            raise OSError(28, "No space left on device")
        append(file, record)

    out = base | {"out": tmp_path / "again.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_json", fill)
        with pytest.raises(UserError, match="No space left on device.*kept: make room"):
            ran(**out, samples=3)
    journal = answers.journal_path(out["out"]).read_text().splitlines()
    assert len(journal) == 6 and not journal[-1].endswith("}")
    calls = []
    monkeypatch.setattr(files, "append_json", lambda *a: (calls.append(1), append(*a)))
    assert read(ran(**out, samples=3)) == expected
    assert len(calls) == 15 - 4

    def full(path, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match="last.settings.json: cannot be written"):
            ran(**base | {"out": tmp_path / "last.jsonl"}, samples=3)
    assert not list(tmp_path.glob("*.partial"))
    calls.clear()
    assert read(ran(**base | {"out": tmp_path / "last.jsonl"}, samples=3)) == expected
    assert not calls


def test_a_finished_run_is_not_repeated(base, monkeypatch, capsys):
    ran(**base)
    monkeypatch.setattr(generate, "write", None)
    ran(**base | {"batch_size": 3})
    assert "is finished" in capsys.readouterr().err


def test_only_the_same_run_is_continued(base, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ran(**base)
    with pytest.raises(UserError, match=r"other settings \(top-k was 0, is 4\).*--no-resume"):
        ran(**base, top_k=4)
    first = read(ran(**base))
    with pytest.raises(UserError, match=r"other settings \(samples was 1, is 2; seed was 0, is 3"):
        ran(**base, samples=2, seed=3)
    Path(base["prompts"]).write_text("something else\n" * 4)
    with pytest.raises(UserError, match="text of the prompts was"):
        ran(**base)
    assert read(base["out"]) == first
    ran("--no-resume", **base, seed=3)
    assert [row["prompt"] for row in read(base["out"])] == ["something else"] * 4
    settings = json.loads(base["out"].with_suffix(".settings.json").read_text())
    with answers.Journal(base["out"], settings):
        with pytest.raises(UserError, match="in use by another run"):
            ran("--no-resume", **base)


WRONG = {
    "too-long": (dict(max_prompt=1), "all 5 prompts are longer than 1 tokens .the shortest has 2"),
    "no-room": (dict(max_new=128), "longer than 0 tokens.*lower --max-new .the model has 128"),
    "taken": (
        dict(max_new=100, content="tell me " * 9),
        r"longer than 28 tokens.*lower --max-new .the model has 128 positions",
    ),
    "seed": (dict(seed=-1), "--seed is -1: it must be from 0"),
    "hidden": (dict(out=".jsonl"), "--out is .jsonl: it must be a .parquet or .jsonl file"),
    "scheme": (dict(out="ftp://b/x.jsonl"), "--out is ftp://b/x.jsonl: it must be a .parquet or"),
    "ending": (dict(out="x.csv"), "--out is x.csv: it must be a .parquet or .jsonl file"),
    "empty": (dict(content=" \n\n"), "prompts.txt: no prompts in it"),
    "missing": (dict(prompts="nowhere.txt"), "nowhere.txt: no such file"),
    "column": (dict(name="p.jsonl", content='{"a": 1}', column="b"), "no column b; it has a"),
    "columns": (dict(name="p.jsonl", content='{"a": 1}'), "no column messages or prompt or text"),
    "number": (dict(name="p.jsonl", content='{"text": 1}'), "record 1: expected text or messages"),
    "template": (
        dict(name="p.jsonl", content=json.dumps({"messages": TALK})),
        "record 1: a conversation, but the tokenizer has no chat template",
    ),
    "answer": (
        dict(name="p.jsonl", content=json.dumps({"messages": TALK[-1:]})),
        "record 1: expected a turn of the user",
    ),
    "stop": (dict(stop=136), "--stop 136: expected token ids from 0 to 135"),
    "samples": (dict(samples=0), "--samples is 0: it must be 1 or more"),
    "temperature": (dict(temperature=-1), "--temperature is -1.0: it must be 0 or more"),
    "mesh": (dict(**{"mesh.tensor": 3}), "does not match 8 devices|mesh data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_a_line(base, tmp_path, name):
    flags, message = WRONG[name]
    flags = dict(flags)
    if "content" in flags:
        base["prompts"] = tmp_path / flags.pop("name", "prompts.txt")
        base["prompts"].write_text(flags.pop("content"))
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        ran(**base | flags)
    assert "\n" not in str(caught.value)
    if name != "mesh":
        assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("home", ["~", "~nobody-of-this-name"])
def test_a_file_from_elsewhere_is_not_replaced(base, tmp_path, monkeypatch, home):
    """Wherever it is: `~` is expanded as in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = Path(os.path.expanduser(home)).absolute() / "mine.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine\n")
    with pytest.raises(UserError, match="is there, and not from here"):
        ran(**base | {"out": f"{home}/mine.jsonl"})
    assert path.read_text() == "mine\n"


# ---- the hub -------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Takes data sets and models: as much of the hub as a commit of small files needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b""):
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        file = self.path.rpartition("/")[2]
        self.answer(200 if file in self.server.files else 404)

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        server.asked.append(self.path)
        if server.status != 200:
            return self.answer(server.status)
        reply = {"status": "ok", "errors": [], "warnings": []}  # of its metadata
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            reply = {"url": f"{server.endpoint}/datasets/me/set"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            reply = {"files": [{"path": name} | modes for name in names]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{server.endpoint}/datasets/me/set/commit/1"
            reply = {"commitUrl": url, "commitOid": "1"}
        self.answer(200, json.dumps(reply).encode())


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.asked, server.status = {}, [], [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "odd", [{"calls": [{"arguments": {}}]}, {"id": 2**70}, {"id": [1, "a"]}], ids=str
)
def test_messages_that_fit_into_no_column_are_refused_before_the_work(chat, tmp_path, odd):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text((json.dumps({"messages": [TALK[0] | odd, TALK[1]]}) + "\n") * 4)
    flags = dict(model=chat, prompts=prompts)
    with pytest.raises(UserError, match="a name that ends in .jsonl"):
        ran(**flags, out=tmp_path / "x.parquet")
    assert not answers.journal_path(tmp_path / "x.parquet").exists()
    row, *_ = read(ran(**flags, out=tmp_path / "x.jsonl"))
    assert row["messages"][0] == TALK[0] | odd


def test_a_disk_that_is_full_from_the_start(base, tmp_path):
    """Every write fails, that of the settings too, and so would one at closing."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in base.items()]
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); import signal;"
    code += " signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import generate;"
    code += " from runtime import errors; errors.run(generate.main)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--mesh.data=1", "--max-new=12"], cwd=ROOT,
        capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "cannot be written" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_journal_of_something_else_is_refused(base):
    journal = answers.journal_path(Path(base["out"]))
    for content in ("[1]\n", "Dear diary,\n", '{"a": 1}\n', '{"modem"'):
        journal.write_text(content)
        for flags in ((), ("--no-resume",)):
            with pytest.raises(UserError, match="not from here"):
                ran(*flags, **base)
        assert journal.read_text() == content
    mine = journal.with_name("mine")
    journal.rename(mine)
    journal.symlink_to(mine)
    mine.write_text("")
    with pytest.raises(UserError, match="cannot be written .Too many levels of symbolic"):
        ran(**base)
    assert mine.read_text() == ""


def test_a_file_of_the_users_is_not_replaced_where_a_journal_is(base):
    journal, out = answers.journal_path(Path(base["out"])), Path(base["out"])
    journal.write_text("")
    out.write_text("mine")
    with pytest.raises(UserError, match="is there, and not from here: move it away"):
        ran(**base)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("content", ['{"learning rate": 1}', "[1]", "", "Dear diary"])
@pytest.mark.parametrize("flags", [(), ("--no-resume",)])
def test_settings_of_something_else_are_refused(base, monkeypatch, content, flags):
    """As the journal is, and before the work."""
    settings = base["out"].with_suffix(".settings.json")
    settings.write_text(content)
    monkeypatch.setattr(generate, "write", None)
    for finished in (False, True):
        if finished:
            base["out"].write_text("{}\n")
        with pytest.raises(UserError, match="is there, and not from here: move it away"):
            ran(*flags, **base)
    assert settings.read_text() == content and base["out"].read_text() == "{}\n"


def test_the_same_weights_of_another_day_go_on(base, plain, monkeypatch):
    ran(**base)
    os.utime(plain / "model.safetensors", (1, 1))
    monkeypatch.setattr(generate, "write", None)
    ran(**base)


def test_push(base, hub):
    ran(**base, push="me/set")
    (created,) = hub.created
    assert (created["name"], created["type"]) == ("set", "dataset")
    assert created.get("private") or created["visibility"] == "private"  # older clients, newer ones
    assert hub.files["train.jsonl"] == base["out"].read_bytes()
    card = hub.files["README.md"].decode()
    assert "data_files: train.jsonl" in card and "| max-new | 12 |" in card
    assert "chat-template" not in card
    hub.files["README.md"] = b"my own words"
    hub.files.pop("train.jsonl")
    ran(**base, push="me/set")  # of what is finished
    assert hub.files["train.jsonl"] == base["out"].read_bytes()
    assert hub.files["README.md"] == b"my own words"


def test_a_student_is_pushed(hub, tmp_path):
    config = distill.Config(
        push="me/small", steps=1, student_init="first", student_heal="none", quiet=True,
        eval_windows=4, out=str(tmp_path / "run"),
    )  # fmt: skip
    folder = distill.train(config)
    for created in hub.created:  # before the work, and again before the upload
        assert (created["name"], created.get("type", "model")) == ("small", "model")
        assert created.get("private") or created["visibility"] == "private"
    assert len(hub.created) == 2
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b'from_pretrained("me/small")' in hub.files["README.md"]
    hub.files.clear()
    distill.train(dataclasses.replace(config, push="me/later"))  # of what is finished
    assert "model.safetensors" in hub.files and hub.created[-1]["name"] == "later"
    hub.status = 401
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    with pytest.raises(UserError, match="--push me/small: .*log in with `hf auth login`"):
        distill.train(again)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("status", "message"), [(401, "log in with `hf auth login`"), (418, "418")]
)
def test_a_hub_that_refuses_does_so_before_the_work(base, hub, status, message):
    hub.status = status
    with pytest.raises(UserError, match=f"--push me/set: .*{message}"):
        ran(**base, push="me/set")
    assert not answers.journal_path(base["out"]).exists()
    with pytest.raises(UserError, match="--push not/an/id: "):
        ran(**base, push="not/an/id")


# ---- on the terminal -----------------------------------------------------------------------------


def conversed(*args, **flags) -> None:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in ({"max_new": 12} | flags).items()]
    generate.converse(errors.cli(generate.Config, [*map(str, args), *words]))


@pytest.mark.parametrize("flags", [{"temperature": 0}, {"seed": 3}])
def test_a_prompt_is_continued_as_in_a_file(base, capsys, flags):
    rows = read(ran(**base, **flags))
    capsys.readouterr()
    conversed(model=base["model"], prompt=rows[0]["prompt"], **flags)
    assert capsys.readouterr().out == rows[0]["completion"] + "\n"


def test_text_is_shown_as_it_is_written(monkeypatch):
    """Of a character of several bytes nothing before its last."""
    demo = Path(__file__).parents[1] / "demo" / "teacher"
    whole = " Ünï 日本🙂 or \ufffd."
    tokens = np.array(text.load_tokenizer(demo).encoder.encode(whole).ids)
    assert len(tokens) > len(whole)
    monkeypatch.setattr(
        generate, "load", lambda *_: (jax.sharding.Mesh(jax.devices()[:1], "data"), None)
    )
    monkeypatch.setattr(sharding, "use_mesh", contextlib.nullcontext)
    monkeypatch.setattr(
        generate, "generate",
        lambda _, jobs, *__, **___: ([(jobs[0], tokens[: i + 1])] for i in range(len(tokens))),
    )  # fmt: skip
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *x, **_: pieces.extend(x))
    conversed(model=demo, prompt="Once")
    assert "".join(pieces) == whole
    assert {"Ü", "ï", "日", "本", "🙂"} <= set(pieces)


def test_a_chat_remembers_and_compiles_once(chat, monkeypatch, capsys):
    asked, programs = [], []
    prepare = generate.prepare
    monkeypatch.setattr(
        generate, "prepare", lambda *x: asked.append(x[3][0].piece.text) or prepare(*x)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("one?\ntwo?\nthree?\n\nnot read\n"))

    def compiles(name, *_, **__):
        if "compile" in name:
            programs.append(len(asked))

    jax.monitoring.register_event_duration_secs_listener(compiles)
    conversed("--chat", model=chat, seed=4, max_new=8)
    jax.monitoring.unregister_event_duration_listener(compiles)
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(asked) == 3 and len(set(answers)) > 1
    expected = [
        (f"user\n{x}?", f"assistant\n{y}")
        for x, y in zip(("one", "two", "three"), [*answers[:2], ""], strict=True)
    ]
    written = "".join(f"<|im_start|>{x}<|im_end|>\n" for turn in expected for x in turn)
    assert asked[2] == written.removesuffix("<|im_end|>\n")
    assert max(programs) == 1  # after the first question nothing
    monkeypatch.setattr("sys.stdin", io.StringIO("one?\n"))  # without an empty line
    conversed("--chat", model=chat, seed=4, max_new=8)
    assert capsys.readouterr().out.splitlines() == answers[:1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({}, "--prompts with --out, --prompt or --chat: give one of the three"),
        ({"prompt": "a", "prompts": "b", "out": "c.jsonl"}, "give one of the three"),
        ({"prompt": "a", "coordinator": "b:1"}, "--prompt and --chat are for one process"),
        ({"prompts": "b"}, "--prompts with --out, "),
        ({"prompt": "a", "out": "c.jsonl"}, "--prompts with --out, "),
        ({"prompt": "a" * 200}, "--prompt: all 1 prompts are longer than 116 .* lower --max-new"),
    ],
)
def test_what_cannot_be_continued(plain, flags, words):
    with pytest.raises(UserError, match=words):
        conversed(model=plain, **flags)


def test_a_model_without_a_template_does_not_chat(plain, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with pytest.raises(UserError, match="--chat: .* the tokenizer has no chat template"):
        conversed("--chat", model=plain)
