"""What only an accelerator can show, in under eight minutes on one card and without a network.

    python -m benchmarks.accelerator [--only demo attention step …] [--results FILE]

Each figure is measured in a process of its own; what fails leaves a row that says so. A dated
section is appended to benchmarks/RESULTS.md.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = {
    "Llama-3.2-1B to 8 blocks, 8 x 4096": (8, 8, 4096, dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True)),
    "bloom-1b7 to 12 blocks, 8 x 2048": (12, 8, 2048, dict(
        model_type="bloom", vocab_size=250880, hidden_size=2048, n_layer=24, n_head=16)),
    "Llama-3.1-8B to 16 blocks, 8 x 4096": (16, 8, 4096, dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False)),
}  # fmt: skip
LARGE = "Llama-3.1-8B to 16 blocks, 8 x 4096"  # for eight devices


def median_seconds(call, repeats: int = 8) -> float:
    """Of a call that returns arrays; the first two are not counted."""
    import jax

    seconds = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds[2:])[repeats // 2]


def matrix_peak() -> float:
    """FLOP/s of a product of bfloat16 matrices on this device."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * 8192**3 / median_seconds(lambda: product(a, b))


def demo() -> dict:
    """The README's command on the embedded default, for a hundred steps."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        command = [sys.executable, "distill.py", "--steps", "100", "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    speeds = [step["tokens_per_second"] for step in steps if "tokens_per_second" in step]
    losses = [step["loss"] for step in steps if "loss" in step]
    return {
        "seconds": seconds, "tokens/s": speeds[-1] if speeds else 0.0,
        "loss, first": losses[0], "loss, last": losses[-1],
    }  # fmt: skip


def attention(seq: int, documents: int, alibi: bool = False) -> dict:
    """Milliseconds forward, and with the backward pass, of 32,768 tokens in 32 heads of 64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import sharding
    from models.attention import attention, positions
    from models.bloom import alibi_slopes

    rows, heads, groups, width = 32768 // seq, 32, 32 if alibi else 8, 64
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, gradient = (
        jax.random.normal(key, (rows, seq, count, width), jnp.bfloat16)
        for key, count in zip(keys, (heads, groups, groups, heads), strict=True)
    )
    segments = jnp.asarray(np.repeat(np.arange(1, documents + 1), seq // documents))
    slopes = jnp.asarray(alibi_slopes(heads)) if alibi else None

    def both(inputs, gradient, segments):
        def forward(query, key, value):
            where = positions(segments, segments)
            return attention(query, key, value, where, jnp.array(0), None, slopes=slopes)[0]

        mixed, pull = jax.vjp(forward, *inputs)
        return mixed, *pull(gradient)

    row = {}
    segments = jnp.broadcast_to(segments, (rows, seq))
    flops = 2 * rows * heads * width * seq * seq / documents
    exact = None
    own = {"gpu": "cudnn", "tpu": "splash"}[sharding.device()[0]]
    for name in ("dense", "blockwise", own):
        if name == "dense" and rows * heads * seq**2 > 2**32:
            continue
        try:
            with sharding.in_scope(sharding.Layout(attention=name)):
                ahead = jax.jit(lambda *args: both(*args)[0])
                full = jax.jit(lambda *args: both(*args))
                once = median_seconds(lambda: ahead(inputs, gradient, segments), 4)  # noqa: B023
                twice = median_seconds(lambda: full(inputs, gradient, segments), 4)  # noqa: B023
                results = full(inputs, gradient, segments)
        except Exception as error:  # the others are still to be measured
            row[name] = str(error).splitlines()[0][:80]
            continue
        row[f"{name} ms"], row[f"{name} ms, backward too"] = 1e3 * once, 1e3 * twice
        row[f"{name} TFLOP/s"] = 3.5 * flops / twice / 1e12
        if exact is None:
            exact = results
        norms = [
            float(jnp.linalg.norm((x - y).astype(jnp.float32)) / jnp.linalg.norm(y.astype(float)))
            for x, y in zip(results, exact, strict=True)
        ]
        row[f"{name} from the first"] = max(norms)
    return row


def step(shape: str, deterministic: bool = False) -> dict:
    """The compiled step with random weights: its speed, and its memory beside the compiler's."""
    import jax
    import numpy as np

    import distill
    import models
    import sharding
    import student
    from config import Config, with_defaults
    from runtime import plan, prepare

    layers, rows, seq, settings = SHAPES[shape]
    peak, rng = matrix_peak(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        config = with_defaults(Config(
            teacher=folder, student_layers=layers, student_init="uniform", seq_len=seq,
            batch_size=rows, out="unused", compute_dtype="bfloat16",
            deterministic=deterministic,
        ))  # fmt: skip
        placement = prepare.placement(config)
        with sharding.use_mesh(placement.mesh, placement.layout):
            optimizer, objective = prepare.optimizer_and_objective(config)
            arguments = distill.abstract_arguments(config, placement)
            begun = time.perf_counter()
            program = plan.compile_abstract(distill.step, arguments, optimizer, objective)
            compiled = time.perf_counter() - begun
            (teacher, batch), state = arguments
            vocab, places = models.config(folder).vocab, plan.state_shardings(state, *placement[:2])
            whole = student.fresh(type(teacher), models.config(folder), jax.random.key(0))
            state = distill.init_state(student.cut(whole, {"layers": range(layers)}), optimizer)
            state = jax.device_put(state, places)
            teacher = jax.tree.map(lambda x, y: x.astype(y.dtype), whole, teacher)
            del whole
            ids = rng.integers(0, vocab, batch.tokens.shape, np.int32)
            segments = np.broadcast_to(np.arange(seq + 1, dtype=np.int32) // 512 + 1, ids.shape)
            host = batch._replace(tokens=ids, segments=segments, mask=np.ones((rows, seq), bool))
            batch = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), host, batch)

            def once():
                nonlocal state
                state, metrics = program((teacher, batch), state)
                return metrics

            losses = [float(once()["loss"]).hex() for _ in range(4)]
            seconds = median_seconds(once, 6)
            held = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
            (teacher, _), state = arguments
            once_each = [plan.forward_flops(x, seq) for x in (state.student, teacher)]
            flops = rows * seq * (3 * once_each[0] + once_each[1])
        memory = program.memory_analysis()
    return {
        "tokens/s": rows * seq / seconds, "ms a step": 1e3 * seconds,
        "share of the peak": flops / seconds / peak / jax.device_count(),
        "measured peak TFLOP/s": peak / 1e12, "compile s": compiled, "GB held at most": held / 1e9,
        "GB by the compiler": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "loss of the fourth step": losses[-1],
    }  # fmt: skip


deterministic = step


def torch(shape: str) -> dict:
    """The same step in PyTorch and transformers: bfloat16 over float32 weights, row by row."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, rows, seq, settings = SHAPES[shape]
    name = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    device = torch.device("cuda")
    with device:
        teacher, student = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings | change), dtype=dtype)
            for change, dtype in (({}, torch.bfloat16), ({name: layers}, torch.float32))
        )
        tokens = torch.randint(0, settings["vocab_size"], (rows, seq + 1))
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    def once() -> float:
        for row in tokens.split(1):
            read, labels = row[:, :-1], row[:, 1:].reshape(-1)
            with torch.no_grad():
                p = F.log_softmax(teacher(read).logits.float(), -1)
            with torch.autocast("cuda", torch.bfloat16):
                logits = student(read).logits
            q = F.log_softmax(logits.float(), -1)
            kl = F.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")
            loss = (0.5 * kl + 0.5 * F.cross_entropy(logits.flatten(0, 1).float(), labels)) / rows
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    once()
    once()
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    best = sorted(seconds)[2]
    held = torch.cuda.max_memory_allocated() / 1e9
    return {"tokens/s": rows * seq / best, "ms a step": 1e3 * best, "GB held at most": held}


def decode() -> dict:
    """Greedy tokens/s of the shape of Llama-3.2-1B, 64 rows of 256 new tokens after 256."""
    import jax
    import jax.numpy as jnp

    import generate
    import models
    from models.base import unstacked
    from models.hf_config import HFConfig

    settings = SHAPES["Llama-3.2-1B to 8 blocks, 8 x 4096"][3]
    family = models.FAMILIES[settings["model_type"]]
    model = family(family.Config.read(HFConfig(dict(settings))), jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    rows, new, prompt = 64, 256, 256
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt), 0, model.config.vocab)
    lengths, weights = jnp.full(rows, prompt), sum(x.nbytes for x in jax.tree.leaves(model))
    figures = {}
    for name, form in (("stacked", model), ("apart", unstacked(model))):

        def seconds(count: int) -> float:
            greedy = generate.Sampling(temperature=0.0)
            decoding = generate.Decoding(count, greedy, (), "bfloat16")
            arguments = form, tokens, lengths, jax.random.key(0), decoding  # noqa: B023
            return median_seconds(lambda: generate.sample(*arguments), 3)

        first = seconds(1)
        each = (seconds(new + 1) - first) / new
        figures |= {f"{name}: tokens/s": rows / each, f"{name}: ms a token": 1e3 * each}
        figures[f"{name}: GB/s of weights"] = weights / each / 1e9
        figures[f"{name}: ms of the prompts"] = 1e3 * first
    return figures


def cases(devices: int) -> dict[str, list]:
    shapes = [shape for shape in SHAPES if shape != LARGE or devices >= 8]
    return {
        "demo": [[]],
        "attention": [[2048, 1], [2048, 16], [8192, 16], [32768, 16], [2048, 4, True]],
        "step": [[shape] for shape in shapes],
        "deterministic": [[shapes[0], True]] * 2,
        "decode": [[]],
        "torch": [[shape] for shape in shapes if shape != LARGE],
    }


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(cases(1))
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--results", default=str(ROOT / "benchmarks/RESULTS.md"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child[0]](*json.loads(args.child[1]))))
        return
    about = (
        "import jax; d = jax.devices(); print(d[0].device_kind, len(d), jax.__version__, sep='|')"
    )
    device = subprocess.check_output([sys.executable, "-c", about], text=True).splitlines()[-1]
    kind, count, version = device.split("|")
    lines = [f"\n## On an accelerator\n\n{datetime.date.today()}, {count} x {kind}, jax {version}. "
             "`python -m benchmarks.accelerator`\n\n| case | figures |\n|---|---|"]  # fmt: skip
    for name in args.only:
        for case in cases(int(count))[name]:
            command = [sys.executable, "-m", "benchmarks.accelerator", "--child", name]
            done = subprocess.run(
                [*command, json.dumps(case)], cwd=ROOT, capture_output=True, text=True, timeout=240
            )
            if done.returncode:
                error = re.sub(r"\s+", " ", done.stderr.strip().splitlines()[-1])[:200]
                print(done.stderr[-3000:], file=sys.stderr, flush=True)
                figures = f"failed: {error}"
            else:
                row = json.loads(done.stdout.splitlines()[-1])
                figures = "; ".join(f"{key} {cell(value)}" for key, value in row.items())
            lines.append(f"| {name} {' '.join(map(str, case))} | {figures} |")
            print(lines[-1], flush=True)
    with open(args.results, "a") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
