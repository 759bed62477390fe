"""Mistakes of those who call it from Python: a clear error at the call. In a process of its own,
since here every annotation is checked, and theirs are not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json
import jax, numpy as np
import data, distill, losses, models, optim, student

model = models.load("demo/teacher")
tokens = np.ones((2, 9), np.int32)
batch = data.Batch(tokens, np.ones_like(tokens), np.ones((2, 8), bool))
beyond = batch._replace(tokens=np.where(np.arange(9) == 8, 2048, tokens))
optimizer, objective = optim.make(optim.Config(), 1), losses.Objective()
layers = {"layers": (0, 1)}
begin = lambda: distill.init_state(student.cut(model, layers), optimizer)
step = lambda batch, state: distill.step((model, batch), state, optimizer, objective)
consumed = begin()
after, _ = step(batch, consumed)
answers = {}
for name, call in CASES.items():
    try:
        answers[name] = str(jax.tree.map(np.shape, eval(call)))
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""
CASES = {
    "layers": ('student.cut(model, {"layers": (0, 8)})', "layers [0, 8] must be some of 0 to 7"),
    "label": ("step(beyond, begin())", "tokens go from 1 to 2048, the vocabulary has 2048"),
    "negative": ("model(-tokens)", "tokens go from -1 to -1, the vocabulary has 2048"),
    "row": ("model(tokens[0])", "tokens are int32 of shape (9,), expected integers [batch, seq]"),
    "floats": ("model(tokens / 2)", "tokens are float32 of shape (2, 9), expected integers"),
    "lists": (
        "step(data.Batch(*(x.tolist() for x in batch[:3])), begin())",
        "batch.tokens is a list, expected an array",
    ),
    "consumed": ("step(batch, consumed)", "a step has consumed this state: go on with the one"),
    "source": (
        'data.Config(source="demo/stories.txt")',
        "--data.source is demo/stories.txt: it must be a tuple, such as ('demo/stories.txt',)",
    ),
    "divergence": (
        'losses.Config(divergence="kl")',
        "--loss.divergence is kl: it must be one of forward_kl, reverse_kl, jsd",
    ),
    "optimizer": ('optim.Config(name="adam")', "--optim.name is adam: it must be one of adamw"),
}


@pytest.fixture(scope="module")
def answers():
    calls = {name: call for name, (call, _) in CASES.items()}
    calls |= {"list": "model(tokens.tolist())", "again": "step(batch, after)[0].step"}
    program = PROGRAM.replace("CASES", json.dumps(calls))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_a_call_is_told_there(answers, case):
    assert answers[case].startswith(f"UserError: {CASES[case][1]}")


def test_lists_of_tokens_are_read_and_a_state_goes_on(answers):
    assert (answers["list"], answers["again"]) == ("(2, 9, 2048)", "()")
