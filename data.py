"""Tokens, from stores on disk to batches: a batch is a pure function of the step.

Text is tokenized once, into flat files. They are read in windows that overlap by one token, so that
each but a document's first is predicted exactly once an epoch; the last window is padded and
masked. A permutation computed per index shuffles the windows anew in every epoch, so that nothing
is as long as the stream and any step is as near as the first.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Int32

import text
from runtime.errors import LOCAL, Constraint, UserError, above, between, check
from text.store import BLOCK, Store, hash_bytes, open_store, prune

T = TypeVar("T")
Rows = Int[np.ndarray, " rows"]
SHARES = Constraint(  # less rounds to nothing
    "above a millionth of their sum",
    lambda x: all(1e-6 * sum(x) < weight < math.inf for weight in x),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train on."""

    source: tuple[str, ...] = ()
    """Files, folders or globs of .txt, .jsonl, .parquet (also .gz, .zst), or hub data sets as
    id@revision:config:split, where the id is enough; by default the articles of WikiText-103, or
    the demo's."""
    weights: Annotated[tuple[float, ...], SHARES] = ()
    """How much of each source goes into the mixture; without them, all of every source."""
    text_field: str | None = None
    """The field of a record that holds its text; by default text, where it has no conversation."""
    documents: Literal["file", "paragraph", "line", "article"] = "file"
    """What a document is in plain text; paragraphs end at a blank line. An article is the lines of
    WikiText, in files or records, from a title to the next."""
    mask: Literal["all", "assistant"] = "all"
    """Which tokens to learn: all, or those of the assistant's turns."""
    packing: Literal["auto", "stream", "fit"] = "auto"
    """How documents lie in rows: one behind the other, cut where a row ends (stream); or whole, by
    best fit, conversations longer than a row cut behind an answer; auto is fit for --data.mask
    assistant."""
    chat_template: str | None = None
    """A file with the chat template to use, or chatml, for tokenizers that have its tokens; by
    default the tokenizer's own, or where it has none, that of a source's writer (generate.py)."""
    cache: Annotated[str | None, LOCAL] = None
    """Folder for tokenized text; by default compact-distill in the user's cache folder."""
    cache_limit: Annotated[float | None, above(0)] = None
    """GB of tokenized text there; where there is more, what was used longest ago is removed."""
    held_out: Annotated[float, between(0, 1)] = 0.01
    """Share of the documents kept for evaluation, chosen by their content; 1 keeps all."""
    eval_source: str | None = None
    """A source to evaluate on, instead of held-out documents."""
    streaming: bool = False
    """Read hub data sets over the network, without downloading them first."""

    def __post_init__(self):
        check(self, "--data.")
        if self.weights and len(self.weights) != len(self.source):
            counts = f"{len(self.weights)} of {len(self.source)}"
            raise UserError(f"--data.weights: expected one for each --data.source, found {counts}")

    @property
    def fits(self) -> bool:
        """Whether documents are kept whole in their rows."""
        return self.packing == "fit" or (self.packing, self.mask) == ("auto", "assistant")

    def canonical(self) -> "Config":
        """With one spelling for each path, the same from any folder."""
        names = {"eval_source": self.eval_source, "chat_template": self.chat_template}
        names = {k: v if v in (None, "chatml") else text.canonical(v) for k, v in names.items()}
        return dataclasses.replace(self, source=tuple(map(text.canonical, self.source)), **names)


class Batch(NamedTuple):
    """Rows of `seq_len + 1` tokens."""

    tokens: Int32[np.ndarray, "rows positions"]
    segments: Int32[np.ndarray, "rows positions"]  # documents of a row, from 1; 0 is padding
    mask: Bool[np.ndarray, "rows targets"]  # whether predicting the token after a position counts
    signal: Any = None  # of the teacher, one of `losses.signal`, where it is asked already


class TokenRange(NamedTuple):
    """A stretch of a store's tokens, as windows."""

    store: Store
    start: int
    stop: int
    seq_len: int

    @property
    def windows(self) -> int:
        return max(0, -(-(self.stop - self.start - 1) // self.seq_len))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Windows to train and to evaluate on; within a group every window comes once an epoch."""

    groups: tuple[tuple[TokenRange, ...], ...]
    weights: tuple[float, ...]
    held_out: tuple[TokenRange, ...]
    seq_len: int
    seed: int
    chat_template: str | None = None
    """By which conversations are rendered, where it is not the tokenizer's own."""

    @property
    def sizes(self) -> list[int]:
        return [sum(part.windows for part in group) for group in self.groups]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(part.stop - part.start for group in self.groups for part in group)

    @property
    def windows(self) -> int:
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """What the sources' tokens are, wherever their stores lie."""
        return text.digest([part.store.digest for group in self.groups for part in group])


def open_corpus(
    config: Config, tokenizer_folder: Path | str, *, seq_len: int, seed: int, vocab: int
) -> Corpus:
    """The corpus a config describes; text that is new is tokenized first. With `held_out=1`, all of
    it is for `evaluation`: every token of a text once, in order."""
    if not config.source:
        raise UserError("no text to train on: name some with --data.source")
    find = partial(text.find, streaming=config.streaming)
    sources = [find(name) for name in config.source]
    template = text.choose_template(config.chat_template, tokenizer_folder, sources)
    tokenizer = text.load_tokenizer(tokenizer_folder, vocab, template)

    def split(source: text.Source, share: float) -> tuple[TokenRange, TokenRange]:
        """What of a source is to train on, and what is held out."""
        store = open_store(source, tokenizer, dataclasses.replace(config, held_out=share), seq_len)
        cut, total = store.training, max(1, TokenRange(store, 0, store.tokens, seq_len).windows)
        held = store.tokens - cut
        # Too few documents for their hashes to divide them as asked: hold out the last windows.
        if share > 0 and not seq_len < held <= max(4 * share, 2 / total) * store.tokens:
            held = max(1, round(share * total))
            if held == 1 and total > 2 and (store.tokens - 1) % seq_len:
                held = 2  # the last one is not whole, and may be a few tokens only
            cut = max(0, total - held) * seq_len
        held_out = TokenRange(store, cut, store.tokens, seq_len)
        return TokenRange(store, 0, cut, seq_len), held_out

    share = 0.0 if config.eval_source else config.held_out
    for part in itertools.chain(*(source.parts for source in sources)):  # processes share these
        options = dataclasses.replace(config, held_out=share)
        open_store(part, tokenizer, options, seq_len, wait=False)
    ranges = [[split(part, share) for part in source.parts or [source]] for source in sources]
    training = [tuple(training for training, _ in parts) for parts in ranges]
    held_out = tuple(held_out for parts in ranges for _, held_out in parts)
    if config.eval_source:
        source = find(config.eval_source)
        held_out = tuple(split(part, 1.0)[1] for part in source.parts or [source])
    if config.cache_limit is not None:  # now that what this run reads is open
        prune(config.cache, config.cache_limit)
    groups = tuple(training) if config.weights else (tuple(itertools.chain(*training)),)
    return Corpus(groups, config.weights, held_out, seq_len, seed, template)


def batch(
    corpus: Corpus, step: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batch:
    """The rows of one process in the batch of a step; all processes' rows are the whole batch."""
    if corpus.windows < batch_size or min(corpus.sizes) == 0:
        needed = (batch_size - 1) * corpus.seq_len + 2
        held_out = sum(part.stop - part.start for part in corpus.held_out)
        raise UserError(
            f"too little text: a batch of {batch_size} x {corpus.seq_len} needs at least {needed}"
            f" tokens (each source of a mixture 2), found {corpus.tokens} to train on and"
            f" {held_out} held out: give more text, a smaller batch or shorter sequences"
        )
    return read(corpus, windows(corpus, step, batch_size, process_index, process_count))


def windows(
    corpus: Corpus, step: int, batch_size: int, process_index: int = 0, process_count: int = 1,
    first_row: int = 0,
) -> Rows:  # fmt: skip
    """Which windows, numbered through all sources, are the rows of one process at a step."""
    rows = first_row + _rows(step, batch_size, process_index, process_count)
    groups, windows = assign_sources(rows, corpus.weights, corpus.seed)
    first = 0
    for group, size in enumerate(corpus.sizes):
        here = groups == group
        epochs, places = np.divmod(windows[here], size)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = permute(places[now], size, f"{corpus.seed} {group} {epoch}")
        windows[here] = first + places
        first += size
    return windows


def read(corpus: Corpus, windows: Rows, *, held_out: bool = False) -> Batch:
    """Windows by their numbers through all sources; those beyond the last are padding."""
    parts = corpus.held_out if held_out else [part for group in corpus.groups for part in group]
    ends = np.cumsum([part.windows for part in parts])
    chosen = np.minimum(np.searchsorted(ends, windows, "right"), len(parts) - 1)
    tokens = np.zeros((len(windows), corpus.seq_len + 1), np.int32)
    segments, mask = np.zeros_like(tokens), np.ones((len(windows), corpus.seq_len), bool)
    for i in np.unique(chosen):
        part, rows = parts[i], np.flatnonzero(chosen == i)
        folder, dtype = part.store.folder, np.dtype(part.store.dtype)
        starts = part.start + (windows[rows] - (ends[i] - part.windows)) * corpus.seq_len
        places = starts[:, None] + np.arange(corpus.seq_len + 1)
        real = places < part.stop
        try:
            file, sums = (open(folder / name, "rb", 0) for name in ("tokens", "sums"))
        except OSError as error:
            remedy = "run this again, and what is gone is tokenized anew"
            raise UserError(f"{folder}: cannot be read ({error.strerror}): {remedy}") from None
        with file, sums:
            for row, start, count in zip(rows, starts.tolist(), real.sum(1).tolist(), strict=True):
                content = _checked(file, sums, start * dtype.itemsize, count * dtype.itemsize)
                tokens[row, :count] = np.frombuffer(content, dtype)
        # Mapped for this call alone: pages once touched stay resident as long as a mapping.
        documents = np.memmap(folder / "documents", np.int64, "r")
        before = np.searchsorted(documents, places, "right")
        segments[rows] = (before - before[:, :1] + 1) * real
        if part.store.masked:  # then tokens between a start and a stop are learned
            bounds = np.memmap(folder / "trained", np.int64, "r")
            mask[rows] = np.searchsorted(bounds, places[:, 1:], "right") % 2 == 1
    mask &= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(tokens, segments, mask)


def evaluation(
    corpus: Corpus, batch_size: int, process_index: int = 0, process_count: int = 1,
    limit: int | float = math.inf,
) -> Iterator[Batch]:  # fmt: skip
    """Every held-out window once, in order, up to `limit`; the rows after the last are padding."""
    total = sum(part.windows for part in corpus.held_out)
    count = min(total, limit)
    for step in range(-(-count // batch_size)):
        rows = _rows(step, batch_size, process_index, process_count)
        yield read(corpus, np.where(rows < count, rows, total), held_out=True)


def _rows(step: int, batch_size: int, index: int, count: int) -> Rows:
    if batch_size % count:
        raise UserError(f"a batch of {batch_size} rows does not divide over {count} processes")
    own = batch_size // count
    return step * batch_size + index * own + np.arange(own)


def assign_sources(rows: Rows, weights: Sequence[float], seed: int) -> tuple[Rows, Rows]:
    """For each row of the endless sequence: its source, and how many rows of it came before. Of any
    n rows the first source has n * weight, rounded up or down by the seed; of the rest the next has
    its share, and so on. In integers: the counts must be exact."""
    source = np.full_like(rows, max(0, len(weights) - 1))
    before, left = rows.copy(), np.ones(len(rows), bool)
    for i, weight in enumerate(weights[:-1]):
        share = round(weight / sum(weights[i:]) * 2**24)
        phase = hash_bytes(f"{seed} {i}".encode()) % 2**24
        taken = (before * share + phase) >> 24
        here = left & ((((before + 1) * share + phase) >> 24) > taken)
        source[here] = i
        left &= ~here
        before = np.where(here, taken, np.where(left, before - taken, before))
    return source, before


def permute(index: Int[np.ndarray, " n"], size: int, key: str) -> Int[np.ndarray, " n"]:
    """Where a permutation of `range(size)`, one for each key, puts these indices: a Feistel network
    on pairs of numbers below a and b, with a * b just above `size`; what falls beyond is sent on
    (Black and Rogaway 2002, ciphers with arbitrary finite domains)."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    # Twelve rounds: with eight, orders of as few as five are not equally likely.
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=48).digest(), np.uint32)

    def mix(x):  # 31 bits that depend on all bits of x: the finalizer of splitmix64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        return x >> 33

    def encrypt(index):
        left, right = index // b, index % b
        for even, odd in keys.reshape(-1, 2):
            left = (left + mix(right ^ even)) % a
            right = (right + mix(left ^ odd)) % b
        return left * b + right

    index = encrypt(index.astype(np.uint64))
    while (beyond := index >= size).any():
        index[beyond] = encrypt(index[beyond])
    return index.astype(np.int64)


def _checked(tokens: IO[bytes], sums: IO[bytes], start: int, size: int) -> memoryview:
    """Bytes of the token file, after its blocks that hold them were compared to their sums."""
    first, stop = start // BLOCK, -(-(start + size) // BLOCK)
    blocks = memoryview(os.pread(tokens.fileno(), (stop - first) * BLOCK, first * BLOCK))
    expected = os.pread(sums.fileno(), (stop - first) * 4, first * 4)
    present = [zlib.crc32(blocks[i : i + BLOCK]) for i in range(0, len(blocks), BLOCK)]
    if size and present != np.frombuffer(expected, "<u4").tolist():
        with contextlib.suppress(OSError):  # without it, the next start builds the store anew
            Path(tokens.name).with_name("store.json").unlink()
        where, remedy = f"{first * BLOCK} and {stop * BLOCK}", "and the text is tokenized anew"
        what = f"{tokens.name}: it was damaged between the bytes {where}"
        raise UserError(f"{what}: run this again, {remedy}")
    return blocks[start - first * BLOCK :][:size]


def prefetch(load: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> Iterator[T]:
    """`load(step)` for each step, computed ahead in a thread. Close the generator, or let it go, to
    end the thread: in native code at the interpreter's end it would abort the process."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        steps = range(start, stop)
        pending = collections.deque(pool.submit(load, step) for step in steps[:ahead])
        for step in steps:
            result = pending.popleft().result()
            if step + ahead < stop:
                pending.append(pool.submit(load, step + ahead))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
