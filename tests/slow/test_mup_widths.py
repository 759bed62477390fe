"""Widths that transfer: real little training at widths of a factor of eight."""

import equinox as eqx
import pytest
from widths import check, fresh, shape_of

import mup


def teacher_of(family: str):
    """A random model with an opinion: logits of a size of 3."""
    model = fresh(shape_of(family, 64, False), mup.Config(64), seed=99)
    return eqx.tree_at(lambda model: model.head, model, replace_fn=lambda head: 3 * head)


@pytest.mark.parametrize("taught", [False, True], ids=["text", "teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_coordinate_check(family, tied, taught):
    check(family, tied, teacher_of(family) if taught else None)
