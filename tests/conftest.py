"""Eight emulated CPU devices, and every annotation of ours checked on every call."""

import base64
import gc
import importlib.util
import os
import sys
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["NPROC"] = "32"  # threads of XLA's pool: with 8, two programs in flight can wait forever
# Compiling is most of what these tests do, and XLA's fusion emitters are most of compiling.
FASTER = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FASTER

from jaxtyping import install_import_hook

CHECKED = ["config", "data", "distill", "eval", "generate", "losses", "models", "mup", "optim"]
CHECKED += ["runtime", "sharding", "student", "sweep", "targets", "text"]
install_import_hook(CHECKED, "beartype.beartype")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """The programs of a module end with it: each takes dozens of the 65,530 memory mappings that
    Linux gives a process, and beyond them the compiler crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def empty_pages(monkeypatch):
    """Runs of a test leave a report.html without text, whose program would compile for long. Those
    of the fixtures of a whole module have it, and are looked at."""
    if results := sys.modules.get("runtime.results"):
        page = SimpleNamespace(**vars(results.page))
        page.windows = lambda *_, **__: {"windows": [], "names": {}}
        monkeypatch.setattr(results, "page", page)


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch):
    """The curves of a run are plotted and saved as one pixel: drawing them takes half a second, at
    each evaluation. Those of the fixtures of a whole module are drawn, and in tests/test_report.py,
    where they are looked at."""
    if "runtime.figures" in sys.modules:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: path.write_bytes(PIXEL))


@pytest.fixture
def strict():
    """No implicit dtype promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield


# The comparison with transformers joins where the `reference` extra is installed.
if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["reference"]
