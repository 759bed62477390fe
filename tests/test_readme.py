"""README.md and docs/ keep their word: their flags are flags, snippets of README.md run. tests/slow
runs the commands, and the snippets of docs/."""

import importlib
import re
import shutil
import tomllib

import jax
import numpy as np
import pytest
import readme

import distill
import sweep
from runtime import errors

PYTHON = readme.blocks(readme.README, "python")
CALLS = [call for page in readme.PAGES for call in readme.calls(page)]


def test_the_readme_has_commands_of_every_program():
    calls = readme.calls(readme.README)
    assert {name for name, _ in calls} == set(readme.PROGRAMS)
    assert len(calls) > 12 and len(PYTHON) >= 2


@pytest.mark.parametrize(
    ("name", "arguments"), CALLS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_commands_have_flags_that_the_program_takes(name, arguments):
    if "--help" in arguments:
        return  # below
    if name == "sweep":
        for run in sweep.parse(arguments)[1]:
            errors.cli(distill.Config, run["arguments"])
        return
    config = errors.cli(importlib.import_module(name).Config, arguments)
    if "--distributed" in arguments:
        assert config.distributed


def test_flags_that_the_text_names_exist(capsys):
    """In one of the programs: a sentence does not say which one it speaks of."""
    known = set()
    for program in readme.PROGRAMS:
        with pytest.raises(SystemExit):
            errors.cli(importlib.import_module(program).Config, ["--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    pages = "\n".join(page.read_text() for page in readme.PAGES)
    codes = re.findall(r"`([^`\n]+)`", pages)
    codes = [code for code in codes if not re.search(r"\b(pip|uv|pytest)\b", code)]
    named = {flag for code in codes for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9.-]*", code)}
    assert len(named) > 30
    assert named <= known, named - known


def test_what_is_installed_can_be_installed():
    settings = tomllib.loads((readme.ROOT / "pyproject.toml").read_text())["project"]
    for line in (line for page in readme.PAGES for line in readme.shell_lines(page)):
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in settings["optional-dependencies"], line
        for file in re.findall(r"-c (\S+)", line):
            assert (readme.ROOT / file).exists(), line


def test_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    shutil.copytree(readme.ROOT / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (*names["tokens"].shape, 2048)
    assert names["hidden"].shape[:2] == names["tokens"].shape == (1, 4)
    assert (tmp_path / "folder" / "model.safetensors").exists()
    assert np.isfinite(names["metrics"]["loss"]) and int(names["state"].step) == 1
    jax.block_until_ready(names["state"])
