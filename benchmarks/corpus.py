"""How fast text becomes tokens and tokens become batches, and in how much memory.

Run from the repository: `python -m benchmarks.corpus`.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tyro

import data
import text
from text import store

SEQ_LEN = 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes to measure at."""

    megabytes: int = 100
    """Text to tokenize."""
    tokens: int = 10**9
    """Of the store that batches are read from."""
    steps: int = 10**6
    """Of the iteration that must not grow."""


def resident() -> float:
    """Megabytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def make_text(path: Path, size: int) -> None:
    """Documents of a few hundred made-up words, as frequent as words are (Zipf)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 10, 30000)]
    odds = 1 / np.arange(1, len(words) + 1)
    written = 0
    with open(path, "w") as file:
        while written < size:
            chosen = rng.choice(len(words), rng.integers(20, 600), p=odds / odds.sum())
            written += file.write(" ".join(words[i] for i in chosen).capitalize() + ".\n\n")


def make_tokenizer(folder: Path, corpus: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with open(corpus) as file:
        sample = file.read(3_000_000).split("\n\n")
    trainer = trainers.BpeTrainer(
        vocab_size=16000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(sample, trainer)
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def encode_bare(folder: Path, documents: str) -> float:
    """Seconds that the batch encoder alone takes for the same texts, its results thrown away."""
    tokenizer = text.load_tokenizer(folder)
    source = text.find(str(folder / "text.txt"))
    pieces = [piece.text for piece in text.pieces(source, tokenizer, documents=documents)]
    per_call = max(1, len(pieces) * store.CHUNK // sum(map(len, pieces)))
    started = time.perf_counter()
    for i in range(0, len(pieces), per_call):
        tokenizer.encoder.encode_batch_fast(pieces[i : i + per_call], add_special_tokens=False)
    return time.perf_counter() - started


def build(folder: Path, documents: str) -> tuple[float, float, int]:
    """Seconds, megabytes over the baseline and tokens of the same text made into a store."""
    text.load_tokenizer(folder)
    before = peak()
    config = data.Config(
        source=(str(folder / "text.txt"),), documents=documents, cache=str(folder / documents)
    )
    started = time.perf_counter()
    corpus = data.open_corpus(config, folder, seq_len=SEQ_LEN, seed=0, vocab=1 << 16)
    return time.perf_counter() - started, peak() - before, corpus.tokens


def make_store(folder: Path, tokens: int) -> data.Corpus:
    """A sparse store, as if of documents of 300 tokens each."""
    rng = np.random.default_rng(0)
    with open(folder / "tokens", "wb") as file:
        file.truncate(2 * tokens)
    store.write_sums(folder)
    with open(folder / "documents", "wb") as file:
        end = 0
        while end < tokens:
            ends = end + np.cumsum(rng.integers(50, 550, 1 << 16))
            file.write(np.minimum(ends[: np.searchsorted(ends, tokens) + 1], tokens))
            end = int(ends[-1])
    sparse = store.Store(folder, "uint16", tokens, tokens, 0, False, "")
    return data.Corpus(((data.TokenRange(sparse, 0, tokens, SEQ_LEN),),), (), (), SEQ_LEN, 0)


def batches(folder: Path, tokens: int) -> dict[str, float]:
    corpus = make_store(folder, tokens)
    data.batch(corpus, 0, 64)
    before = resident()
    times, first = [], {}
    for step in (1, 10**9):
        started = time.perf_counter()
        data.batch(corpus, step, 64)
        first[f"ms to the first batch at step {step:.0e}"] = 1e3 * (time.perf_counter() - started)
    for step in range(1000):
        started = time.perf_counter()
        data.batch(corpus, step, 64)
        times.append(time.perf_counter() - started)
    size = 64 * SEQ_LEN / 1e6
    return {
        "M tokens/s, median": size / float(np.median(times)),
        "M tokens/s, best tenth": size / float(np.quantile(times, 0.1)),
        "MB resident more than before": resident() - before,
        "MB peak of the process": peak(),
        **first,
    }


def iterate(folder: Path, tokens: int, steps: int) -> dict[str, float]:
    corpus = make_store(folder, tokens)
    held = {}
    for step in range(steps):
        data.batch(corpus, step, 1)
        if step + 1 in (steps // 100, steps):
            held[f"MB resident after {step + 1} steps"] = resident()
    return held


def apart(function, *args):
    """Call a function in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    config = tyro.cli(Config)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_text(folder / "text.txt", config.megabytes * 10**6)
        make_tokenizer(folder, folder / "text.txt")
        size = (folder / "text.txt").stat().st_size / 1e6
        for documents in ("paragraph", "file"):
            bare = apart(encode_bare, folder, documents)
            seconds, memory, tokens = apart(build, folder, documents)
            bare = (bare + apart(encode_bare, folder, documents)) / 2  # other loads come and go
            print(
                f"{size:.0f} MB by {documents}: {tokens / seconds / 1e6:.2f} M tokens/s,", end=" "
            )
            print(f"{bare / seconds:.2f} x the bare encoder, peak {memory:.0f} MB over baseline")
    for function, *sizes in ((batches, config.tokens), (iterate, config.tokens, config.steps)):
        with tempfile.TemporaryDirectory() as name:
            for what, value in apart(function, Path(name), *sizes).items():
                print(f"{value:10.2f} {what}")


if __name__ == "__main__":
    main()
