"""Greedy text and the filters of sampling, against transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs
from variants import VARIANTS, build

import models
from generate import Decoding, Sampling, filter_logits, sample, sample_token

pytestmark = pytest.mark.usefixtures("strict")

ENDS, NEW = (2, 11, 40, 77), 24


def ragged(rows: int = 64, longest: int = 21) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, rows)
    tokens = rng.integers(3, 96, (rows, longest)).astype(np.int32)
    return np.where(np.arange(longest) < lengths[:, None], tokens, tokens[:, :1]), lengths


def generated(folder: Path, prompts: np.ndarray, lengths: np.ndarray, **how) -> list[list[int]]:
    """What transformers continues left-padded prompts with, up to the end of each.

    The padding repeats a token of its row: the penalty counts what attention does not see.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    left = np.stack([np.roll(row, -n) for row, n in zip(prompts, lengths, strict=True)])
    real = np.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None]
    result = model.generate(
        torch.tensor(left, dtype=torch.int64), attention_mask=torch.tensor(real),
        max_new_tokens=NEW, do_sample=False, eos_token_id=list(ENDS), pad_token_id=0, **how,
    )  # fmt: skip
    rows = result[:, prompts.shape[1] :].tolist()
    ends = [[i for i, token in enumerate(row) if token in ENDS] for row in rows]
    return [row[: end[0] + 1] if end else row for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("name", ["bloom-6-heads", "llama-2"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text(name, penalty, tmp_path, monkeypatch):
    """Of models with a head of their own: a random one that is tied repeats the last token."""
    kind, settings = VARIANTS[name]
    monkeypatch.setitem(VARIANTS, name, (kind, settings | {"tie_word_embeddings": False}))
    build(name, seed=0).save_pretrained(tmp_path)
    prompts, lengths = ragged()
    how = {} if penalty == 1 else {"repetition_penalty": penalty}
    expected = generated(tmp_path, prompts, lengths, **how)
    assert len({len(row) for row in expected}) > 2
    assert len({token for row in expected for token in row}) > 10
    tokens, counts = sample(
        models.load(tmp_path), jnp.asarray(prompts), jnp.asarray(lengths),
        jax.random.key(0), Decoding(NEW, Sampling(0.0, repetition_penalty=penalty), ENDS),
    )  # fmt: skip
    result = [row[:n].tolist() for row, n in zip(np.asarray(tokens), counts, strict=True)]
    assert result == expected


FILTERS = {
    "temperature": (Sampling(temperature=0.6), [theirs.TemperatureLogitsWarper(0.6)]),
    "top-k": (Sampling(top_k=7), [theirs.TopKLogitsWarper(7)]),
    "top-k-of-more": (Sampling(top_k=1000), [theirs.TopKLogitsWarper(1000)]),
    "top-p": (Sampling(top_p=0.8), [theirs.TopPLogitsWarper(0.8)]),
    "top-p-of-one": (Sampling(top_p=1e-6), [theirs.TopPLogitsWarper(1e-6)]),
    "min-p": (Sampling(min_p=0.1), [theirs.MinPLogitsWarper(0.1)]),
    "all": (
        Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02),
        [
            theirs.TemperatureLogitsWarper(1.7),
            theirs.TopKLogitsWarper(40),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.02),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    sampling, warpers = FILTERS[name]
    logits = 3 * np.random.default_rng(1).standard_normal((50, 300)).astype(np.float32)
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)
    result = np.asarray(filter_logits(jnp.asarray(logits), sampling))
    assert np.isfinite(result).any(axis=1).all()
    if name != "temperature" and name != "top-k-of-more":
        assert not np.isfinite(result).all(axis=1).any()
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6)


def test_repetition_penalty():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((50, 30)).astype(np.float32)
    said = rng.integers(0, 30, (50, 12))
    penalised = theirs.RepetitionPenaltyLogitsProcessor(1.5)(
        torch.tensor(said), torch.tensor(logits)
    )
    occurred = np.zeros(logits.shape, bool)
    np.put_along_axis(occurred, said, True, axis=1)
    keys, step = jax.random.split(jax.random.key(0), 50), jnp.zeros(50, jnp.int32)
    greedy = Sampling(temperature=0.0, repetition_penalty=1.5)
    result = sample_token(jnp.asarray(logits), keys, step, jnp.asarray(occurred), greedy)
    expected = penalised.argmax(dim=-1).numpy()
    assert (expected != logits.argmax(axis=1)).any()
    np.testing.assert_array_equal(result, expected)
