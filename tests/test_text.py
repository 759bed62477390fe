"""Sources, records and chat templates: what becomes of them, and what is refused."""

import dataclasses
import gzip
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import data
import text
from runtime import commits
from runtime.errors import UserError
from text import files, records, store

COMMIT = "0123456789abcdef" + "0" * 24
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Writes an empty thought into turns that no question follows, and leaves thoughts out of others.
THINKING = """\
{%- set last = messages | map(attribute='role') | list | length - 1 %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 >= last %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ '<|im_start|>' ~ message.content ~ eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.role ~ ': ' ~ message.content ~ '\\n' }}
    {%- endif %}
{%- endfor %}
"""
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "uno\n"},
    {"role": "user", "content": "two? or <|im_end|>"},
    {"role": "assistant", "content": "dos ünd"},
]


@pytest.fixture(scope="session")
def encoder() -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    lines = ["system user assistant one two uno dos the end\n"] * 9
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def saved(encoder: Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    encoder.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "bos_token": {"content": "<bos>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokenizer(encoder: Tokenizer, folder: Path, **config) -> text.Tokenizer:
    return text.load_tokenizer(saved(encoder, folder / "tokenizer", **config))


@pytest.fixture(scope="session")
def plain(encoder, tmp_path_factory) -> text.Tokenizer:
    return tokenizer(encoder, tmp_path_factory.mktemp("plain"))


def texts(source: Path | str, tokenizer: text.Tokenizer, **options) -> list[str]:
    """The documents of a source, long ones put together again."""
    found: list[str] = []
    for piece in text.pieces(text.find(str(source)), tokenizer, **options):
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    return found


def zstd(path: Path, content: bytes) -> None:
    with pyarrow.OSFile(str(path), "wb") as raw, pyarrow.CompressedOutputStream(raw, "zstd") as out:
        out.write(content)


# --- reading ---


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_its_documents(plain, tmp_path, kind, packing):
    expected = ["first", "zweite ünd 二", "third\nof two lines"]
    path = tmp_path / f"x{kind}"
    if kind == ".txt":
        path.write_text("\n\n \n".join(expected) + "\n\n")
    elif kind == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in [*expected, " ", None]))
    else:
        table = pyarrow.table({"id": range(5), "text": [*expected, "", None]})
        pyarrow.parquet.write_table(table, path)
    content = path.read_bytes()
    if packing == ".gz":
        path.with_name(path.name + packing).write_bytes(gzip.compress(content))
    elif packing == ".zst":
        zstd(path.with_name(path.name + packing), content)
    read = []
    odd = os.fsdecode(b"caf\xe9")  # as no locale of today spells it
    path = path.with_name(path.name + packing).rename(tmp_path / f"{odd}{kind}{packing}")
    assert texts(path, plain, documents="paragraph", progress=read.append) == expected
    assert sum(read) == path.stat().st_size == text.find(str(path)).size


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_articles_of_wikitext(plain, tmp_path, kind):
    lines = [
        " and the end of something . \n", " \n", " = Homarus gammarus = \n", " \n",
        " A lobster . \n", " = = Taxonomy = = \n", " = x + y is a sum \n", " = E = mc ² = \n",
        " An equation . \n",
    ]  # fmt: skip
    expected = ["".join(lines[:2]), "".join(lines[2:7]), "".join(lines[7:])]
    path = tmp_path / f"x{kind}"
    if kind == ".txt":
        path.write_text("".join(lines))
        expected[-1] += "\n"  # a file ends as its last line does
    else:
        rows = [line if line.strip() else "" for line in lines]  # as the data set has them
        expected[0], expected[1] = lines[0], "".join([*lines[2:3], *lines[4:7]])
        if kind == ".jsonl":
            path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    assert texts(path, plain, documents="article") == expected


def test_articles_are_no_conversations(plain, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1 =", "completion": "2"}))
    with pytest.raises(UserError, match="article is for lines of text, found .*completion"):
        texts(path, plain, documents="article")


def test_folders_and_globs_are_read_in_order(plain, tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/3.jsonl", "a/notes.md"):
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("l") else name)
    os.rename(tmp_path / "books/b/2.txt", tmp_path / "books/blob")  # as in the hub's cache
    os.symlink(tmp_path / "books/blob", tmp_path / "books/b/2.txt")
    assert texts(tmp_path / "books", plain) == ["a/1.txt", "a/3.jsonl", "b/2.txt"]
    assert texts(tmp_path / "books/*/*.txt", plain) == ["a/1.txt", "b/2.txt"]
    facts = text.find(str(tmp_path / "books")).fingerprint
    os.utime(tmp_path / "books/b/2.txt", (1, 1))
    assert text.find(str(tmp_path / "books")).fingerprint != facts


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.text(st.sampled_from("ab \n\r\tü二"), max_size=60), st.integers(1, 9), st.booleans())
@example(" " * 30, 9, False)
@example(" " * 30 + "a", 9, False)
def test_blocks_and_pieces_leave_no_trace(plain, tmp_path, monkeypatch, content, block, bom):
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode("utf-8-sig" if bom else "utf-8"))
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    with monkeypatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        patch.setattr(records, "PIECE", 4)
        assert texts(path, plain) == (["\n".join(lines)] if content.strip() else [])
        assert texts(path, plain, documents="line") == [line for line in lines if line.strip()]


def test_tokens_do_not_depend_on_the_pieces(encoder, plain, tmp_path, monkeypatch):
    content = "the end of one, two.\nuno dos\n\n  the user\n" * 50
    (tmp_path / "x.txt").write_text(content)
    monkeypatch.setattr(records, "PIECE", 60)
    pieces = list(text.pieces(text.find(str(tmp_path / "x.txt")), plain))
    ids = [token for encoding in plain.encode(pieces) for token in encoding.ids]
    assert len(pieces) > 10 and ids == encoder.encode(content).ids
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_read_row_by_row(plain, tmp_path, monkeypatch, streaming):
    import datasets

    rows = [f"row {i}" for i in range(2500)]
    table = pyarrow.table({"id": range(2500), "text": rows})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    load = datasets.load_dataset_builder

    def local(repository, config, revision):
        assert (repository, config, revision) == ("owner/name", "some-config", COMMIT)
        files = {"test": str(tmp_path / "x.parquet")}
        return load("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    monkeypatch.setattr(commits, "commit", lambda source, kind: COMMIT)
    source = text.find("owner/name:some-config:test", streaming=streaming)
    seen = []
    found = text.pieces(source, plain, progress=seen.append)
    assert [piece.text for piece in found] == rows
    assert sum(seen) == 2500 and source.size in (2500, None)
    assert source.fingerprint == text.find("owner/name:some-config:test").fingerprint
    for name in ("owner/name:some-config", "owner/name:some-config:validation"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read .*'test'"):
            list(text.pieces(text.find(name, streaming=streaming), plain))


def test_a_source_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "blob").write_text("b")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path / "deep")
    names = ["../a.txt", "~/a.txt", "./../a.txt", "../deep/../a.txt", str(tmp_path / "a.txt")]
    assert {text.canonical(name) for name in names} == {str(tmp_path / "a.txt")}
    assert (
        text.canonical("b.txt") == text.canonical("../deep/b.txt") == str(Path("b.txt").absolute())
    )
    assert text.canonical("*.txt") == text.canonical("./*.txt") == str(Path("*.txt").absolute())
    for name in ("owner/name", "owner/name:config:split", "missing.txt", "~nobody-of-this-name/x"):
        assert text.canonical(name) == name


# --- special tokens ---


@pytest.mark.parametrize("added", [None, True, False])
@pytest.mark.parametrize("processed", [True, False])
def test_documents_have_one_bos_if_the_tokenizer_says_so(encoder, tmp_path, added, processed):
    encoder = Tokenizer.from_str(encoder.to_str())
    if processed:
        pair = ("<bos>", 0), ("<eos>", 1)
        encoder.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, list(pair))
    encoder.enable_truncation(4)
    encoder.enable_padding(pad_to_multiple_of=1000)
    folder = saved(encoder, tmp_path / "tokenizer", add_bos_token=added)
    path = tmp_path / "x.txt"
    path.write_text("the user\n" * 2000 + "the end")
    config = data.Config(source=(str(path),), cache=str(tmp_path / "cache"), held_out=1.0)
    corpus = data.open_corpus(config, folder, seq_len=10**6, seed=0, vocab=300)
    (batch,) = data.evaluation(corpus, 1)
    tokens = batch.tokens[0][batch.segments[0] > 0].tolist()
    bos = processed if added is None else added
    assert [tokens.count(0), tokens.count(1)] == [bos, 1]
    assert tokens.index(1) == len(tokens) - 1 and (not bos or tokens[0] == 0)
    assert encoder.decode(tokens) == "the user\n" * 2000 + "the end" and len(tokens) > 2000


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_eos_of_a_model_config(encoder, tmp_path, name):
    folder = saved(encoder, tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no eos_token"):
        text.load_tokenizer(folder)
    (folder / name).write_text('{"eos_token_id": [3, 1], "bos_token_id": 0}')
    found = text.load_tokenizer(folder)
    assert (found.eos, found.bos, found.special["eos_token"]) == (3, None, "<|im_end|>")


# --- conversations ---


REASONING = """\
{{- bos_token }}
{%- for message in messages %}
{{- ('<|Asks|>' if message.role == 'user' else '<|Answers|>') + message.content }}
{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Answers|><think>\\n' }}{%- endif %}
"""


# As Mistral's: the system prompt goes into the last turn of the user.
INSTRUCT = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + (system if message == last else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + ENDING }}
    {%- endif %}
{%- endfor %}
"""
FIRST = "{%- if messages[0].role == 'system' %}{%- endif %}"  # without asking whether there is one
VARIES = "('uno, ' * 60 if message.role == 'assistant' and not loop.last else message.content)"


def said(content: str) -> dict:
    return {"role": "assistant", "content": content}


ENDED = ["uno\n<|im_end|>", "dos ünd<|im_end|>"]
TURNS = {
    "each with its end": (CHATML, TALK, ENDED),
    "none": (CHATML, TALK[:2], []),
    "the first": (FIRST + CHATML, TALK[2:], ENDED),
    "a template by name": (
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}], TALK, ENDED,
    ),
    # the prompt has the start of the thought
    "a thought in the last": (THINKING, TALK, [ENDED[0], "\n</think>\n\n" + ENDED[1]]),
    "a thought that is left out": (
        THINKING, [*TALK[:2], said("<think>hm</think><the end>"), *TALK[3:]],
        ["<the end><|im_end|>", "\n</think>\n\n" + ENDED[1]],
    ),
    "tokens that are not special": (
        REASONING, [{"role": "user", "content": "one\nline"}, said("uno"), *TALK[3:]],
        ["uno<eos>", "dos ünd<eos>"],
    ),
    "marks": (MARKED, TALK, ["<|im_start|>uno\n<eos>", "<|im_start|>dos ünd<eos>"]),
    "marks without turns": (MARKED, TALK[:2], []),
    "a system prompt in the last turn of the user": (
        INSTRUCT.replace("ENDING", "eos_token"), [*TALK[:2], said("one? [INST] uno"), *TALK[3:]],
        ["one? [INST] uno<eos>", "dos ünd<eos>"],
    ),
    "such a prompt, without ends": (
        INSTRUCT.replace("ENDING", "''"), TALK, ["uno", "dos ünd"],
    ),
    "other words": (
        CHATML.replace("message['content']", VARIES), [said("uno, due"), *TALK[3:]],
        ["uno, " * 60 + "<|im_end|>", ENDED[1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TURNS)
def test_the_turns_of_the_assistant_are_learned_and_nothing_else(encoder, tmp_path, case):
    template, messages, expected = TURNS[case]
    encoder = Tokenizer.from_str(encoder.to_str())
    encoder.add_tokens([AddedToken(name, special=False) for name in ("<|Asks|>", "<|Answers|>")])
    encoder.add_special_tokens(["<|" + "reserved" * 20 + "|>"])  # one that occurs nowhere
    chats = tokenizer(encoder, tmp_path, chat_template=template)
    piece = chats.render_chat(messages, "assistant", "here")
    assert [piece.text[a:b].removeprefix(" ") for a, b in piece.spans] == expected
    (encoding,) = chats.encode([piece])
    runs = store._runs(encoding.offsets, piece.spans)
    pairs = zip(runs[::2], runs[1::2], strict=True)
    decode = partial(encoder.decode, skip_special_tokens=False)
    assert [decode(encoding.ids[a:b]).removeprefix(" ") for a, b in pairs] == expected
    whole = chats.render_chat(messages, "all", "here")
    assert whole.spans is None and whole.text == piece.text


def test_a_template_beside_the_tokenizer_overrules_its_config(encoder, tmp_path):
    folder = saved(encoder, tmp_path / "tokenizer", chat_template="overruled")
    (folder / "chat_template.jinja").write_text("the file")
    piece = text.load_tokenizer(folder).render_chat(TALK, "all", "here")
    assert piece.text == "the file"


@pytest.mark.parametrize("said", ["t", "", " of", "end", "what was cut off"])
@pytest.mark.parametrize("mask", ["all", "assistant"])
def test_of_an_answer_that_was_cut_off_no_end_is_learned(encoder, tmp_path, said, mask):
    chats = tokenizer(encoder, tmp_path, chat_template=CHATML)
    path, asked = tmp_path / "x.jsonl", TALK[:2]
    question = chats.render_prompt(asked, "here").text
    record = {
        "prompt": question, "completion": said, "finish_reason": "length", "n_tokens": 1,
        "messages": [*asked, {"role": "assistant", "content": said}],
    }  # fmt: skip
    path.write_text(json.dumps(record) + "\n")
    (piece,) = text.pieces(text.find(str(path)), chats, mask=mask)
    assert piece.text == question + said
    if mask == "assistant":
        assert "".join(piece.text[a:b] for a, b in piece.spans) == said


def test_a_prompt_is_the_first_column_that_a_record_has(plain, tmp_path):
    path = tmp_path / "x.jsonl"
    records = [{"messages": None, "prompt": "one"}, {"prompt": " ", "text": "no"}, {"text": "two"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = [prompt.piece.text for prompt in text.prompts(text.find(str(path)), plain)]
    assert found == ["one", "two"]


def test_records_become_conversations(encoder, tmp_path):
    chatml = tokenizer(encoder, tmp_path, chat_template=CHATML)
    asked = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nuno<|im_end|>\n"
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "uno"}]
    records = [
        {"messages": turns, "text": "not this"},
        {"prompt": "one?", "completion": "uno"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"talk": turns},
    ]
    for record in records:
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(record))
        field = "talk" if "talk" in record else None
        assert texts(path, chatml, mask="assistant", text_field=field) == [asked]
    path = tmp_path / "x.parquet"  # where every message has every key
    tools = [turns[0] | {"tool_calls": None}, turns[1] | {"tool_calls": ["x"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": tools}]), path)
    strict = CHATML.replace("{%- for", "{{- 'tool_calls' in messages[0] }}{%- for", 1)
    assert texts(path, tokenizer(encoder, tmp_path, chat_template=strict)) == ["False" + asked]
    path.with_suffix(".jsonl").write_text('{"text": "a", "body": "b", "messages": []}')
    assert texts(path.with_suffix(".jsonl"), chatml, text_field="body") == ["b"]
    assert texts(path.with_suffix(".jsonl"), chatml, text_field="text") == ["a"]


def test_the_first_column_that_has_a_value_counts_and_empty_records_are_counted(
    plain, tmp_path, capsys
):
    records = [{"messages": None, "text": "a"}, {"messages": [], "text": "b"}, {"text": " "}]
    records += [{"messages": None, "prompt": "c", "completion": "d", "text": ""}, {"text": None}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = ("messages", "prompt", "completion", "text")
    rows = [{name: record.get(name) or None for name in columns} for record in records]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
    for file in (path, path.with_suffix(".parquet")):
        assert texts(file, plain) == ["a", "b", "cd<eos>"]
        assert f"{file}: 2 of 5 records left out: no text" in capsys.readouterr().err
        assert len(list(text.prompts(text.find(str(file)), plain))) == 3
        assert "2 of 5 records left out" in capsys.readouterr().err


SHAPES = {
    "ShareGPT": {"conversations": [
        {"from": "human", "value": "one?", "weight": None}, {"from": "gpt", "value": "uno"}]},
    "Alpaca": {"instruction": "one?", "input": "", "output": "uno"},
    "Alpaca without inputs": {"instruction": "one?", "output": "uno", "text": "Below is"},
    "DPO": {"prompt": "one?", "chosen": "uno", "rejected": "due"},
    "DPO of messages": {
        "prompt": "one?", "chosen": [TALK[1], said("uno")], "rejected": [TALK[1], said("due")]},
    "DPO of answers": {"prompt": [TALK[1]], "chosen": [said("uno")], "rejected": [said("due")]},
    "DPO without prompts": {"chosen": [TALK[1], said("uno")], "rejected": [said("due")]},
}  # fmt: skip


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_other_tools_are_conversations(encoder, tmp_path, shape, kind):
    chatml, path = tokenizer(encoder, tmp_path, chat_template=CHATML), tmp_path / f"x{kind}"
    if kind == ".jsonl":
        path.write_text(json.dumps(SHAPES[shape]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SHAPES[shape]]), path)
    (piece,) = text.pieces(text.find(str(path)), chatml, mask="assistant")
    asked = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert piece.text == asked + "uno<|im_end|>\n"
    assert [piece.text[a:b] for a, b in piece.spans] == ["uno<|im_end|>"]


def test_text_is_tokenized_anew_where_other_columns_count(encoder, tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", json.dumps({"prompt": "a", "completion": "b"}).encode())
    folder, cache = saved(encoder, tmp_path / "tokenizer"), tmp_path / "cache"
    config = data.Config(source=(str(path),), cache=str(cache), held_out=1.0)
    for shapes in (records.SHAPES, records.SHAPES[3:]):
        monkeypatch.setattr(records, "SHAPES", shapes)
        data.open_corpus(config, folder, seq_len=4, seed=0, vocab=300)
    assert len(list(cache.glob("*/store.json"))) == 2


def test_the_input_of_an_instruction_follows_it(plain, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"instruction": "add", "input": "1 2", "output": "3"}))
    assert texts(path, plain) == ["add\n\n1 23<eos>"]


@pytest.mark.parametrize("bos", [True, False])
def test_an_answer_is_learned_without_a_template(encoder, tmp_path, bos):
    chats = tokenizer(encoder, tmp_path, add_bos_token=bos)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "one? ", "completion": "uno"}))
    (piece,) = text.pieces(text.find(str(path)), chats, mask="assistant")
    assert piece.text == "<bos>" * bos + "one? uno<eos>"
    assert [piece.text[a:b] for a, b in piece.spans] == ["uno<eos>"]


def test_masks_reach_the_batch(encoder, tmp_path):
    folder = saved(encoder, tmp_path / "tokenizer", chat_template=CHATML)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps({"messages": TALK})] * 3))
    config = data.Config(
        source=(str(path),), cache=str(tmp_path / "cache"), mask="assistant", held_out=1.0,
        packing="stream",
    )  # fmt: skip
    corpus = data.open_corpus(config, folder, seq_len=7, seed=0, vocab=300)
    kept = []
    for batch in data.evaluation(corpus, 4):
        kept += batch.tokens[:, 1:][batch.mask].tolist()
    expected = "uno\n<|im_end|>dos ünd<|im_end|>" * 3
    assert encoder.decode(kept, skip_special_tokens=False) == expected


def test_a_chat_template_that_is_asked_for(encoder, tmp_path):
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0].content }}")
    path = write(tmp_path / "x.jsonl", json.dumps({"messages": TALK}).encode())
    config = data.Config(source=(str(path),), cache=str(tmp_path / "cache"), held_out=1.0)
    asked = {"chatml": CHATML, str(tmp_path / "mine.jinja"): "mine be short"}
    for name, own in itertools.product(asked, (None, "of the tokenizer")):
        folder = saved(encoder, tmp_path / "tokenizer", chat_template=own)
        config = dataclasses.replace(config, chat_template=name)
        corpus = data.open_corpus(config, folder, seq_len=200, seed=0, vocab=300)
        (batch,) = data.evaluation(corpus, 1)
        tokens = batch.tokens[0][batch.segments[0] > 0].tolist()
        expected = asked[name]
        if name == "chatml":
            turns = (f"<|im_start|>{x['role']}\n{x['content']}<|im_end|>\n" for x in TALK)
            expected = "".join(turns)
        assert encoder.decode(tokens, skip_special_tokens=False) == expected
    config = dataclasses.replace(config, chat_template="nowhere.jinja")
    with pytest.raises(UserError, match="--data.chat-template nowhere.jinja: cannot be read"):
        data.open_corpus(config, folder, seq_len=200, seed=0, vocab=300)


def test_templates_may_do_what_published_ones_do(encoder, tmp_path):
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%%') }}{{ bos_token }}"
    )
    made = tokenizer(encoder, tmp_path, chat_template=template)
    expected = '{"role": "user", "content": "<ü>"}%<bos>'
    assert (
        made.render_chat([{"role": "user", "content": "<ü>"}, TALK[0]], "all", "here").text
        == expected
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.x }}", "refuses it"),
        (
            None,
            "no chat template: put a chat_template.jinja beside .* --data.chat-template .*chatml",
        ),
        ("{% for %}", "malformed"),
    ],
)
def test_templates_that_fail(encoder, tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        made = tokenizer(encoder, tmp_path, chat_template=template)
        made.render_chat(TALK, "all", "x.jsonl record 1")


def test_a_template_whose_turns_cannot_be_told_apart(encoder, tmp_path):
    template = "{{ messages | length }}" + CHATML.replace("message['content']", "'x'")
    made = tokenizer(encoder, tmp_path, chat_template=template)
    with pytest.raises(UserError, match="put {% generation %} around"):
        made.render_chat(TALK, "assistant", "x.jsonl record 1")


# --- what is refused, in one line ---


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


TABLE = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"body": ["a"] * 99, "title": ["b"] * 99}), TABLE)
TABLE = TABLE.getvalue().to_pybytes()

REFUSED = {
    "empty.txt": (b"", "no documents in it"),
    "blank.jsonl": (b'{"text": " "}\n\n{"text": null}\n', "no documents in it"),
    "binary.txt": (b"ab\0cd", "byte 2 is 0: a binary file"),
    "latin.txt": (("a" * 70 + "\nä").encode("latin1"), r"byte 71 \(0xe4\) is not UTF-8"),
    "marked.txt": (b"\xef\xbb\xbfab\xff", r"byte 5 \(0xff\) is not UTF-8"),
    "half.txt": ("aü".encode()[:-1], r"byte 1 \(0xc3\) is not UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe4"}', r"byte 24 \(0xe4\) is not UTF-8"),
    "field.jsonl": (b'{"body": "a", "id": 1}', "no column messages.*; it has body, id: choose one"),
    "field.parquet": (TABLE, "or text; it has body, title: choose one with --data"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": "a}', "line 3: not JSON"),
    "list.jsonl": (b"[1]", r"line 1: not JSON .*expected an object, found '\[1\]'"),
    "surrogate.jsonl": (b'{"text": "\\ud83d"}', "line 1: not JSON .*surrogates"),
    "number.jsonl": (b'{"text": 3}', "record 1: expected text or messages with .* in text"),
    "turns.jsonl": (b'{"messages": [{"content": "a"}]}', "record 1: .* messages with role"),
    "half.parquet": (TABLE[: len(TABLE) // 2], "not a whole parquet file"),
    "other.parquet": (b"not parquet at all", "not a whole parquet file"),
    "half.txt.gz": (gzip.compress(os.urandom(999))[:-20], "cannot be read to its end"),
    "other.txt.gz": (b"not gzip", "cannot be read to its end"),
    "other.txt.zst": (b"not zstd at all", "cannot be read to its end"),
    "x.csv": (b"text\na\n", "expected .txt.*python -c .*from_csv.*x.csv.*to_parquet"),
    "folder/x.json": (b"[]", "no file to read in it.*python -c .*from_json.*folder/x.json"),
    "story.md": (b"text", r"expected .txt, .jsonl, .parquet, each also with .gz or .zst"),
    "folder/story.md": (b"text", "no file to read in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files(encoder, tmp_path, name):
    content, message = REFUSED[name]
    path = write(tmp_path / name, content)
    source = path.parent if name.startswith("folder") else path
    folder = saved(encoder, tmp_path / "tokenizer", chat_template=CHATML)
    config = data.Config(source=(str(source),), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message) as caught:
        data.open_corpus(config, folder, seq_len=4, seed=0, vocab=300)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert not [path for path in tmp_path.glob("cache/*") if path.name != ".lock"]


@pytest.mark.parametrize(
    "name, content", [("it's.csv", 'text\n"a\nb"\n'), ("x y.json", '[{"text": "a\\nb", "id": 1}]')]
)
def test_the_remedy_for_tables_of_other_kinds_is_a_command_that_works(
    plain, tmp_path, name, content
):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        text.find(str(tmp_path / name))
    command = str(caught.value).partition("once by: ")[2]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, env=environment)
    assert texts((tmp_path / name).with_suffix(".parquet"), plain) == ["a\nb"]


def test_plain_text_has_no_assistant(plain, tmp_path):
    for name, content in (("x.txt", b"a"), ("x.jsonl", b'{"text": "a"}')):
        path = write(tmp_path / name, content)
        with pytest.raises(UserError, match="no assistant turns; mask all"):
            texts(path, plain, mask="assistant")


def test_sources_that_are_not_there(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    names = ["missing.txt", "./missing/folder", "missing", str(tmp_path / "*.txt")]
    for name in [*names, "~nobody-of-this-name/x.txt", "x" * 300]:
        with pytest.raises(UserError, match="no such file|no file to read|cannot be read") as it:
            text.find(name)
        assert "\n" not in str(it.value)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing: cannot be read .Cannot reach") as it:
        text.find("nobody/nothing")
    assert "\n" not in str(it.value)


def test_bad_tokenizers(encoder, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer.json in it"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"not": "one"}')
    with pytest.raises(UserError, match="not a tokenizer"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"eos_token '<none>' is not in tokenizer.json"):
        tokenizer(encoder, tmp_path, eos_token="<none>")
    bad = tmp_path / "bad"
    bad.mkdir()
    text.same_tokenizer(saved(encoder, tmp_path), bad)  # none is there to differ
    (bad / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        text.same_tokenizer(tmp_path, bad)
    folder = saved(encoder, tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        text.load_tokenizer(folder)


def test_hidden_files_and_lfs_pointers_are_left_out_with_a_word(tmp_path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
    names = ["a.txt", "._a.txt", ".git/a.txt", ".ipynb_checkpoints/a.jsonl", "b.txt", "C.TXT.GZ"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(pointer if name == "b.txt" else "text")
    source = text.find(str(tmp_path))
    assert [file.name for file in source.files] == ["C.TXT.GZ", "a.txt"]
    assert "3 hidden files and 1 Git LFS pointers left out" in capsys.readouterr().err
    assert text.find(str(tmp_path / ".git")).files  # it was asked for by its name
    with pytest.raises(UserError, match="no file to read in it.*git lfs pull"):
        text.find(str(tmp_path / "b.txt"))


def test_the_system_is_asked_once_for_a_file_of_a_folder(tmp_path, monkeypatch):
    """Asked ten times, 50,000 files took five seconds, and a minute on a file system far away."""
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("x" * 300)
    text.find(str(tmp_path))  # the first time it imports
    calls = []
    for name in ("stat", "lstat", "open"):
        real = getattr(os, name)
        spy = lambda *x, real=real, **options: calls.append(x) or real(*x, **options)  # noqa: E731
        monkeypatch.setattr(os, name, spy)
    assert len(text.find(str(tmp_path)).files) == 100
    assert len(calls) < 150


@pytest.mark.parametrize("kind", [".TXT", ".Txt.GZ"])
def test_suffixes_in_any_case(plain, tmp_path, kind):
    content = b"some text"
    path = tmp_path / f"x{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith("GZ") else content)
    assert texts(path, plain) == ["some text"]


def test_a_file_that_was_replaced_is_another(tmp_path):
    """Though its size and its date are those of the one before."""
    path, other = tmp_path / "a.txt", tmp_path / "other"
    path.write_text("one")
    before = text.find(str(path)).fingerprint
    other.write_text("two")
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    other.replace(path)
    assert text.find(str(path)).fingerprint != before
    prints, stat = [before, text.find(str(path)).fingerprint], path.stat()
    path.write_text("ten")  # in its place, and its date is set back
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prints.append(text.find(str(path)).fingerprint)
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path)  # another way to the same inode
    prints += [text.find(str(folder / "a.txt")).fingerprint for _ in range(2)]
    assert len(set(prints)) == 4 and prints[-1] == prints[-2]


def test_templates_have_one_date(encoder, tmp_path):
    """Else a store of tokens would be another one every day; Llama 3's own is this one."""
    made = tokenizer(encoder, tmp_path, chat_template="{{ strftime_now('%d %b %Y %H') }}")
    assert made.render_chat(TALK, "all", "here").text == "26 Jul 2024 00"
