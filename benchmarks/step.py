"""A training step against the same step written plainly in PyTorch with transformers.

    python -m benchmarks.step [--shapes L B] [--steps 8] [--rows 4] [--seq 256]

Each side runs in a process of its own and measures the peak of a matrix product there. Shape L is a
Llama (vocabulary 32000, hidden 512, 8 to 4 layers), B a BLOOM (vocabulary 250880, hidden 256, 8 to
4 layers); float32, AdamW, half divergence and half cross entropy.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

BATCH, SEQ = 4, 256
SHAPES = {
    "L": dict(model_type="llama", vocab_size=32000, hidden_size=512, intermediate_size=1408,
              num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False),
    "B": dict(model_type="bloom", vocab_size=250880, hidden_size=256, n_head=8),
}  # fmt: skip
LAYERS = {"llama": "num_hidden_layers", "bloom": "n_layer"}


def settings(shape: str, layers: int) -> dict:
    chosen = SHAPES[shape]
    return chosen | {LAYERS[chosen["model_type"]]: layers}


def flops(shape: str) -> float:
    """By matrices and causal attention: three passes of the student and one of the teacher."""
    s = SHAPES[shape]
    width = s["hidden_size"]
    mlp = 3 * s["intermediate_size"] if "intermediate_size" in s else 8 * width
    block = 4 * width * width + mlp * width + width * SEQ
    head = s["vocab_size"] * width
    return 2.0 * BATCH * SEQ * (3 * (4 * block + head) + (8 * block + head))


def timed(step, steps: int) -> float:
    """Median seconds of a step, which returns when its loss is known."""
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2]


def peak(product, sync, size: int = 2048) -> float:
    product()
    return 2 * size**3 / min(timed(lambda: sync(product()), 1) for _ in range(5))


def ours(shape: str, steps: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import data
    import distill
    import losses
    import models
    import optim
    import sharding
    from models.hf_config import HFConfig

    family = models.FAMILIES[SHAPES[shape]["model_type"]]
    teacher, student = (
        family(family.Config.read(HFConfig(settings(shape, layers))), jax.random.key(layers))
        for layers in (8, 4)
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPES[shape]["vocab_size"], (BATCH, SEQ + 1)).astype(np.int32)
    mask = np.ones((BATCH, SEQ), bool)
    batch = data.Batch(jnp.asarray(tokens), jnp.ones_like(jnp.asarray(tokens)), jnp.asarray(mask))
    fixed = optim.make(optim.Config(), 100), losses.Objective(losses.Config(alpha=0.5), steps=100)
    state = distill.init_state(student, fixed[0])
    del student
    begun = time.perf_counter()
    program = sharding.compiled(distill.step.lower((teacher, batch), state, *fixed))
    compiled = time.perf_counter() - begun

    def step():
        nonlocal state
        state, metrics = program((teacher, batch), state, *fixed)
        return float(metrics["loss"])

    timed(step, 2)
    seconds = timed(step, steps)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    return result(
        shape, seconds, used, compiled, peak(lambda: product(a, a), jax.block_until_ready)
    )


def plain(shape: str, steps: int) -> dict:
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    teacher, student = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings(shape, layers)))
        for layers in (8, 4)
    )
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.95))
    tokens = torch.randint(0, SHAPES[shape]["vocab_size"], (BATCH, SEQ + 1))
    read, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)

    def step():
        with torch.no_grad():
            p = F.log_softmax(teacher(read).logits, -1)
        logits = student(read).logits
        q = F.log_softmax(logits, -1)
        kl = F.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")
        loss = 0.5 * kl + 0.5 * F.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    timed(step, 2)
    seconds = timed(step, steps)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    a = torch.ones(2048, 2048)
    return result(shape, seconds, used, 0.0, peak(lambda: a @ a, lambda x: x))


def result(shape: str, seconds: float, used: int, compiled: float, peak: float) -> dict:
    return {
        "tokens/s": BATCH * SEQ / seconds,
        "peak memory MB": used / 1e3,
        "compile s": compiled,
        "share of matrix peak": flops(shape) / seconds / peak,
        "matrix peak GFLOP/s": peak / 1e9,
    }


def compare(module: str, shape: str, **flags: int) -> None:
    """Runs both sides, each in a process of its own, and prints a row for each figure."""
    command = [sys.executable, "-m", module, "--shapes", shape]
    command += [f"--{name}={value}" for name, value in flags.items()]
    mine, theirs = (
        json.loads(subprocess.check_output([*command, "--child", side]).splitlines()[-1])
        for side in ("ours", "plain")
    )
    for name, value in mine.items():
        ratio = f"{value / theirs[name]:.2f}" if theirs[name] else ""
        print(f"| {shape} | {name} | {value:.2f} | {theirs[name]:.2f} | {ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=BATCH)
    parser.add_argument("--seq", type=int, default=SEQ)
    args = parser.parse_args()
    globals().update(BATCH=args.rows, SEQ=args.seq)
    if args.child:
        print(json.dumps({"ours": ours, "plain": plain}[args.child](args.shapes[0], args.steps)))
        return
    print("| shape | figure | ours | PyTorch | ratio |\n|---|---|---:|---:|---:|")
    for shape in args.shapes:
        compare("benchmarks.step", shape, steps=args.steps, rows=args.rows, seq=args.seq)


if __name__ == "__main__":
    main()
