"""The commands of README.md and docs/, run as they stand but for sizes: on tiny models of the
families that they name, from a hub on loopback, with fewer steps of fewer and shorter rows. A
command that stands in several places runs once."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
import readme
from hub_server import Hub

import models
from models.hf_config import HFConfig

ROOT = readme.ROOT
TINY = {
    "vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 0,
}  # fmt: skip
BLOOM = {"vocab_size": 2048, "hidden_size": 16, "n_head": 2, "eos_token_id": 0}
MODELS = {
    "bigscience/bloom-1b7": BLOOM | {"model_type": "bloom", "n_layer": 24},
    "HuggingFaceTB/SmolLM2-135M": TINY | {"model_type": "llama", "num_hidden_layers": 4},
    "Qwen/Qwen2.5-1.5B-Instruct": TINY | {"model_type": "qwen2", "num_hidden_layers": 2},
    "meta-llama/Llama-3.1-8B": TINY | {"model_type": "llama", "num_hidden_layers": 32},
}
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip
TEMPLATE = """\
{%- for message in messages %}
{{- message['role'] + ': ' + message['content'] + '<|endoftext|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""
SMALL = {
    "distill": {
        "--steps": "2", "--batch-size": "8", "--seq-len": "32", "--eval-windows": "8",
        "--calibration-windows": "8",
    },
    "targets": {"--seq-len": "32"},
    "generate": {"--max-new": "16", "--batch-size": "4"},
    "eval": {},
}  # fmt: skip
CALLS = [call for page in readme.PAGES for call in readme.calls(page)]
COMMANDS = [
    (name, arguments) for i, (name, arguments) in enumerate(CALLS)
    if "…" not in arguments and (name, arguments) not in CALLS[:i]
]  # fmt: skip
SNIPPETS = [page for page in readme.PAGES[1:] if readme.blocks(page, "python")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a tiny random model by each name, all with the tokenizer of the demo, and a chat
    template where the model of that name has one."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tokenizer / name).write_bytes((ROOT / "demo" / "teacher" / name).read_bytes())
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    server = Hub()
    for i, (name, config) in enumerate(MODELS.items()):
        family = models.FAMILIES[config["model_type"]]
        model = jax.jit(family, static_argnums=0)(
            family.Config.read(HFConfig(config)), jax.random.key(i)
        )
        models.save(model, folder / str(i), tokenizer=tokenizer)
        files = files_of(folder / str(i))
        if "Instruct" not in name:
            del files["chat_template.jinja"]
        server.add(name, main=files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the reader of the pages is: a checkout's demo beside texts of their own."""
    place = tmp_path_factory.mktemp("place")
    (place / "my").mkdir()
    stories = (ROOT / "demo" / "stories.txt").read_text().split("\n\n")[:80]
    for name, some in (("prompts", stories[:30]), ("original", stories[30:])):
        lines = [{"prompt": story[:40], "completion": story[40:]} for story in some]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (place / "my" / f"{name}.jsonl").write_text(text)
    (place / "demo").mkdir()
    (place / "demo" / "teacher").symlink_to(ROOT / "demo" / "teacher")
    (place / "demo" / "stories.txt").write_text("\n\n".join(stories))
    return place


def run(name: str, arguments: list[str], place: Path, hub: Hub, home: str = "hub") -> str:
    return python([str(ROOT / f"{name}.py"), *arguments], place, hub, home)


def python(arguments: list[str], place: Path, hub: Hub, home: str = "hub") -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = {k: v for k, v in environment.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / home)}
    environment |= {"XDG_CACHE_HOME": str(place / "cache"), "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr  # the hub client's own bars
    return done.stdout


def smaller(name: str, arguments: list[str], number: int, place: Path) -> list[str]:
    """The arguments as a shell in `place` passes them, with small sizes."""
    if "--help" in arguments:
        return arguments
    matches = {word: sorted(place.glob(word)) for word in arguments if "*" in word}
    paths = {word: [str(path.relative_to(place)) for path in matches[word]] for word in matches}
    arguments = [path for word in arguments for path in paths.get(word, [word])]
    flags = dict(SMALL["distill" if name == "sweep" else name])
    if name == "distill" and "--out" not in arguments and arguments:
        flags["--out"] = f"runs/{number}"  # several commands train a student of one name
    if name in ("distill", "targets", "sweep") and "--targets" not in arguments and arguments:
        flags["--data.held-out"] = "0.2"
        if "--data.source" not in arguments:
            flags |= {"--data.source": "demo/stories.txt", "--data.documents": "paragraph"}
    return readme.with_flags(arguments, flags)


@pytest.mark.parametrize(
    "number", range(len(COMMANDS)), ids=lambda i: " ".join(COMMANDS[i][1])[:40]
)
def test_a_command(number, hub, place):
    """In the order of the pages: some read what others have written."""
    name, arguments = COMMANDS[number]
    if "--plan" in arguments:
        return compare_plan(arguments, place, hub)
    arguments = smaller(name, arguments, number, place)
    printed = run(name, arguments, place, hub)
    if "--help" in arguments:
        assert "--student-layers" in printed
    elif name == "distill":
        folder = place / re.search(r"^student  (.+)$", printed, re.M)[1]
        assert models.config(folder).layers == models.load(folder).config.layers
    elif name == "sweep":
        assert re.search(r"^best +python distill.py", printed, re.M)
    elif name == "eval":
        assert re.search(r"^perplexity +\d", printed, re.M)
    elif "--prompt" in arguments:
        assert printed.strip()
    else:
        assert (place / arguments[arguments.index("--out") + 1]).exists()


def compare_plan(arguments: list[str], place: Path, hub: Hub) -> None:
    """The table in the README is what the program prints for the model it names."""
    name = arguments[arguments.index("--teacher") + 1]
    files, hub.repositories[name]["main"] = (
        hub.repositories[name]["main"],
        {"config.json": json.dumps(LLAMA_8B).encode()},
    )
    printed = run("distill", arguments, place, hub, home="hub-of-plan").splitlines()
    hub.repositories[name]["main"] = files
    (block,) = readme.blocks(readme.README, "console")
    expected = [line for line in block.splitlines() if not line.startswith(("$", "    --"))]
    assert len(printed) == len(expected)
    number = r"\d+(?:\.\d+)?"
    for line, said in zip(printed, expected, strict=True):
        assert re.sub(number, "#", line).split() == re.sub(number, "#", said).split()
        for here, there in zip(re.findall(number, line), re.findall(number, said), strict=True):
            assert float(here) == pytest.approx(float(there), rel=0.1), line


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.stem)
def test_snippets_of_a_page(page, hub, place):
    """After the commands: some load what these have left."""
    code = "".join(readme.blocks(page, "python"))
    if "transformers" in code:
        pytest.importorskip("transformers")
    assert python(["-c", code], place, hub)
