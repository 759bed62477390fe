"""Greedy generation against transformers' own, each with its key-value cache.

    python -m benchmarks.generation [--shapes L B] [--rows 32] [--new 128] [--runs 3]

Each side runs in a process of its own, float32, random weights, prompts of 16 to 64 tokens. Shapes
are those of step.py, with 8 layers. The first run, which compiles, is told apart; the figure is the
best of the others.
"""

import argparse
import json
import os
import resource
import time

from benchmarks.step import SHAPES, compare, settings

LONGEST = 64


def prompts(shape: str, rows: int):
    """Right-padded tokens, and lengths."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, SHAPES[shape]["vocab_size"], (rows, LONGEST))
    return tokens.astype(np.int32), rng.integers(16, LONGEST + 1, rows)


def ours(shape: str, rows: int, new: int, runs: int) -> dict:
    import jax

    import generate
    import models
    from models.hf_config import HFConfig

    family = models.FAMILIES[SHAPES[shape]["model_type"]]
    model = family(family.Config.read(HFConfig(settings(shape, 8))), jax.random.key(0))
    tokens, lengths = prompts(shape, rows)
    greedy = generate.Decoding(new, generate.Sampling(temperature=0.0))

    def run():
        _, counts = generate.sample(model, tokens, lengths, jax.random.key(0), greedy)
        assert (jax.device_get(counts) == new).all()

    return result(run, rows * new, runs)


def plain(shape: str, rows: int, new: int, runs: int) -> dict:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings(shape, 8))).eval()
    model.generation_config.eos_token_id = None  # every row has as many
    tokens, lengths = (torch.tensor(array) for array in prompts(shape, rows))
    mask = torch.arange(LONGEST) >= LONGEST - lengths[:, None]  # left-padded, as it expects

    def run():
        tokens_out = model.generate(
            tokens.long(), attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert tokens_out.shape == (rows, LONGEST + new)

    return result(run, rows * new, runs)


def result(run, tokens: int, runs: int) -> dict:
    begun = time.perf_counter()
    run()
    first = time.perf_counter() - begun
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens/s": tokens / min(seconds), "peak memory MB": used / 1e3, "first run s": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["L"], choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side = {"ours": ours, "plain": plain}[args.child]
        print(json.dumps(side(args.shapes[0], args.rows, args.new, args.runs)))
        return
    print(f"{args.rows} rows x {args.new} tokens, load {os.getloadavg()[0]:.1f}")
    print("| shape | figure | ours | transformers | ratio |\n|---|---|---:|---:|---:|")
    for shape in args.shapes:
        compare("benchmarks.generation", shape, rows=args.rows, new=args.new, runs=args.runs)


if __name__ == "__main__":
    main()
