"""Rows of whole documents: nothing is cut that fits, no answer comes without its question."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text import CHATML, encoder, saved  # noqa: F401

import data
from text import packing


@given(st.lists(st.integers(1, 9), max_size=40))
def test_best_fit_fills_rows_with_everything(lengths):
    rows = packing.best_fit(lengths, 9)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes, default=0) <= 9
    assert sum(size <= 4 for size in sizes) <= 1  # two half empty ones were one


@given(st.integers(1, 60), st.integers(2, 12))
def test_a_long_text_is_cut_so_that_each_token_is_predicted_once(length, row):
    pieces = packing.split_document(5, 5 + length, row)
    assert all(b - a <= row for a, b in pieces)
    assert [i for a, b in pieces for i in range(a + 1, b)] == list(range(6, 5 + length))


def test_a_long_conversation_is_cut_behind_its_answers():
    runs = np.array([[2, 5], [7, 9], [12, 30], [33, 36], [50, 52]])
    # An answer that a row cannot hold loses its end, a question that fills a row its beginning.
    assert packing.split_document(0, 53, 10, runs) == [(0, 9), (9, 19), (30, 36), (45, 53)]
    assert packing.split_document(0, 90, 10, np.array([[70, 90]])) == [(65, 75)]
    assert packing.split_document(0, 53, 60, runs) == [(0, 53)]


TALKS = [
    [x for i in range(turns) for x in (("user", f"{n}?" * (i + 1)), ("assistant", f"{n}!" * 3))]
    for n, turns in enumerate([1, 2, 1, 3, 1, 1, 2, 9])
]


@pytest.mark.parametrize("mask", ["all", "assistant"])
def test_conversations_are_whole_in_their_rows(encoder, tmp_path, mask):  # noqa: F811
    folder = saved(encoder, tmp_path / "tokenizer", chat_template=CHATML)
    talks = [[{"role": role, "content": x} for role, x in talk] for talk in TALKS]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    config = data.Config(
        source=(str(path),), cache=str(tmp_path / "cache"), mask=mask, held_out=0.0, packing="fit"
    )
    corpus = data.open_corpus(config, folder, seq_len=96, seed=0, vocab=300)
    rows = [data.batch(corpus, step, 1) for step in range(corpus.windows)]
    learned = collections.Counter()
    for tokens, segments, counted, _ in (jax_free(row) for row in rows):
        for document in set(segments[segments > 0].tolist()):
            here = tokens[segments == document].tolist()
            said = encoder.decode(here, skip_special_tokens=False)
            if any(here):  # else it is padding, or what the next row begins with
                assert (
                    len(here) == 1
                    or said.lstrip().startswith("<|im_start|>user\n")
                    or mask == "all"
                )
        learned.update(tokens[1:][counted].tolist())
    answers = "".join(x + "<|im_end|>" for talk in TALKS for role, x in talk if role == "assistant")
    if mask == "assistant":
        ids = encoder.encode(answers, add_special_tokens=False).ids
        assert sum(learned.values()) == sum(learned[i] for i in set(ids))
        assert learned[3] == sum(map(len, TALKS)) // 2  # each answer and its end
    assert all(not counted[tokens[1:] == 0].any() for tokens, _, counted, _ in map(jax_free, rows))
    stream = dataclasses.replace(config, packing="stream")
    assert data.open_corpus(stream, folder, seq_len=96, seed=0, vocab=300).windows <= len(rows)


def jax_free(batch):
    return [x if x is None else x[0] for x in batch]


def test_what_no_row_can_hold_is_told(encoder, tmp_path, capsys):  # noqa: F811
    folder = saved(encoder, tmp_path / "tokenizer", chat_template=CHATML)
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!" * 50}]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    config = data.Config(
        source=(str(path),), cache=str(tmp_path), mask="assistant", held_out=1.0, packing="fit"
    )
    corpus = data.open_corpus(config, folder, seq_len=32, seed=0, vocab=300)
    assert corpus.held_out[0].windows == 2  # the beginning of the answer, and what follows it
    assert " tokens left out, of answers longer than a row" in capsys.readouterr().err
