"""The site is built, with every public function on it; the notebook runs from top to bottom."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import readme

MODULES = ("distill", "models", "losses", "data", "text", "student", "optim", "sharding")
NOTEBOOK = readme.ROOT / "examples" / "first_student.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=readme.ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def public(name: str) -> dict[str, str]:
    """What a module has for others, and where each is defined."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or [
        key for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and key[0] != "_"
        and value.__module__.partition(".")[0] == name
    ]  # fmt: skip
    values = {f"{name}.{key}": getattr(module, key) for key in names if key != "main"}
    return {
        key: f"{value.__module__}.{value.__qualname__}"
        for key, value in values.items() if callable(value)
    }  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_on_the_site(site, name):
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    entries = set(re.findall(r'id="([\w.]+)"', pages))
    names = public(name)
    assert len(names) > 3
    missing = [key for key, origin in names.items() if entries.isdisjoint((key, origin))]
    assert not missing


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), (page, tag)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells as one program: it has no magic, and shows by print and by plt.show alone."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    environment = os.environ | {"PYTHONPATH": str(readme.ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    environment |= {"MPLBACKEND": "agg", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join("".join(cell["source"]) for cell in code)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (float(kl) for kl in re.findall(r"  kl ([\d.]+)", done.stdout))
    assert after < before / 2, done.stdout
    assert (tmp_path / "first-student" / "model.safetensors").exists()
