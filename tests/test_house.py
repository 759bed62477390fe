"""Who may import whom, and that importing does nothing."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From top to bottom; an arrow may only go down.
FLOORS = [
    {"distill", "targets", "sweep"},
    {"runtime.plan"},
    {"config"},
    {"runtime.on_policy"},
    {"runtime.target_store"},
    {"generate", "eval"},
    {"student", "losses.features", "optim", "runtime.checkpoint", "runtime.answers"},
    {"mup"},
    {"losses", "models", "data"},
    {"text"},
    {"runtime.figures"},
    {"runtime.report", "sharding", "runtime.processes"},
    {"runtime.files"},
    {"runtime.errors"},
]
TOP = {path.stem for path in ROOT.glob("*.py")} | {"models"}


def sources() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py")]
    return {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in files}


def imports(name: str, file: Path) -> set[str]:
    """The modules of this project that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and name.startswith("models."), (name, node.module)
            found |= (
                {f"models.{node.module}"}
                if node.module
                else {f"models.{alias.name}" for alias in node.names}
            )
    return {module for module in found if module.split(".")[0] in TOP}


GRAPH = {name: imports(name, file) for name, file in sources().items()}


def test_every_module_has_a_floor():
    assert TOP <= set().union(*FLOORS), TOP
    assert len(GRAPH) > 8


def test_imports_form_no_circle():
    graph = {name.removesuffix(".__init__"): modules for name, modules in GRAPH.items()}
    list(TopologicalSorter(graph).static_order())


def test_arrows_only_go_down():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    for name, modules in GRAPH.items():
        for module in modules:
            above, below = name.split(".")[0], module.split(".")[0]
            assert above == below == "models" or floor[above] < floor[below], (name, module)


def test_models_import_sharding_alone():
    for name, modules in GRAPH.items():
        if name.startswith("models."):
            assert {module for module in modules if not module.startswith("models")} <= {"sharding"}


def test_nothing_imports_distill():
    assert not any("distill" in modules for modules in GRAPH.values())


CHECK = """
import json, os, sys
environment, states = dict(os.environ), {}
for module in sys.argv[1:]:
    __import__(module)
    state = states[module] = {"jax": "jax" in sys.modules}
    state["environment"] = dict(os.environ) == environment
    if state["jax"]:
        import jax
        from jax._src import xla_bridge
        state["backends"] = len(xla_bridge._backends)
        config = dict(jax.config.values)
        state["config"] = {key: str(value) for key, value in sorted(config.items())}
print(json.dumps(states))
"""


def states_after(*modules: str) -> dict[str, dict]:
    """What each import leaves, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1 and not done.stderr, done
    return json.loads(done.stdout)


def test_importing_does_nothing():
    """No output, no environment, no configuration, no device."""
    without_jax = ["runtime.errors", "runtime.answers", "runtime.report", "text", "data"]
    for module, state in states_after(*without_jax).items():
        assert state["environment"], module
        assert not state["jax"], f"{module} imports jax"
    states = states_after("jax", *sorted(TOP))
    for module, state in states.items():
        assert state["environment"], module
        assert not state["backends"], f"{module} touched a device"
        assert state["config"] == states["jax"]["config"], module


def test_text_is_written_and_read_in_utf_8_whatever_the_locale():
    rooms = ("", "losses", "models", "runtime", "text")
    for file in (file for room in rooms for file in (ROOT / room).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if getattr(getattr(node, "func", None), "attr", "") in ("read_text", "write_text"):
                options = {option.arg for option in node.keywords}
                assert "encoding" in options, (file, node.lineno)
