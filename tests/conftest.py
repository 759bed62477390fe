"""Eight emulated CPU devices, and every annotation of ours checked on every call."""

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


@pytest.fixture
def strict():
    """No implicit dtype promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield


# The comparison with transformers joins where the `reference` extra is installed.
if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["reference"]
