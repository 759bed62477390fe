"""Widths that transfer: real little training at widths of a factor of eight."""

import equinox as eqx
import numpy as np
import pytest
import readme
from widths import VOCAB, check, fresh, shape_of

import data
import losses
import mup
from benchmarks.mup import final, sweep

SCALING = mup.Config(32)
RATES = 2.0 ** np.arange(-8, -2)
STEPS, ROWS, SEQ = 40, 8, 32


def teacher_of(family: str):
    """A random model with an opinion: logits of a size of 3."""
    model = fresh(shape_of(family, 64, False), mup.Config(64), seed=99)
    return eqx.tree_at(lambda model: model.head, model, replace_fn=lambda head: 3 * head)


# Every pair of these choices is there, and half of all their combinations.
@pytest.mark.parametrize(
    ("family", "tied", "taught"),
    [
        ("llama", False, False),
        ("llama", True, True),
        ("bloom", False, True),
        ("bloom", True, False),
    ],
)
def test_the_coordinate_check(family, tied, taught):
    check(family, tied, teacher_of(family) if taught else None)


@pytest.fixture(scope="module")
def batches() -> list[data.Batch]:
    """The demo's text by its characters, of which there are few."""
    text = np.frombuffer((readme.ROOT / "demo" / "stories.txt").read_bytes(), np.uint8)
    ids = np.searchsorted(np.unique(text), text).astype(np.int32)
    assert ids.max() < VOCAB
    rows = ids[: STEPS * ROWS * (SEQ + 1)].reshape(STEPS, ROWS, SEQ + 1)
    mask = np.ones((ROWS, SEQ), bool)
    return [data.Batch(tokens, np.ones_like(tokens), mask) for tokens in rows]


def curves(width, family, tied, scaling, batches, teacher, rates):
    loss = losses.Config(alpha=0.0 if teacher is None else 1.0)
    model = fresh(shape_of(family, width, tied), scaling)
    return sweep(model, scaling, rates, batches, loss, teacher)


@pytest.mark.parametrize(("family", "taught"), [("llama", False), ("bloom", True)])
def test_the_best_rate_stays_and_wider_is_better_throughout(family, taught, batches):
    """Llama is tied here, and BLOOM is not."""
    teacher, tied = teacher_of(family) if taught else None, family == "llama"
    narrow, wide = (
        curves(width, family, tied, SCALING, batches, teacher, RATES) for width in (32, 256)
    )
    best, best_wide = (int(np.argmin(final(x))) for x in (narrow, wide))
    print(family, taught, final(narrow).round(3), final(wide).round(3))
    assert 0 < best < len(RATES) - 1 and abs(best_wide - best) <= 1
    assert (final(wide) < final(narrow)).all()
    tenths = [x[best].reshape(10, -1).mean(1) for x in (narrow, wide)]
    assert (tenths[1] < tenths[0]).all(), tenths


def test_without_it_the_best_rate_of_a_narrow_student_breaks_a_wide_one(batches):
    rates = RATES / 4
    narrow, wide = (
        final(curves(width, "llama", False, mup.Config(), batches, None, rates))
        for width in (32, 256)
    )
    print(narrow.round(3), wide.round(3))
    assert np.argmin(narrow) - np.argmin(wide) >= 2
    assert wide[np.argmin(narrow)] > wide.min() + 0.3
