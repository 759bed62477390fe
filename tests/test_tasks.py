"""Tasks without lm-eval: what is said. With it: tests/reference."""

import sys

import pytest

import eval
import runtime
from runtime.errors import UserError


def test_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "runtime.tasks", raising=False)
    monkeypatch.delattr(runtime, "tasks", raising=False)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "a", "--tasks", "piqa"])
    with pytest.raises(UserError, match=r"^--tasks needs lm-eval: pip install .*\[tasks\]'$"):
        eval.main()
