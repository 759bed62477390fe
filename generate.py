"""Text from a model: sampling with a key-value cache, and data sets that a model wrote.

python generate.py --model DIR --prompts FILE --out FILE.parquet
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, PRNGKeyArray, UInt32

import models
import sharding
import text
from models.attention import Cache, einsum_f32
from models.base import LanguageModel
from runtime import answers, errors, processes, report
from runtime.errors import UserError

# ---- the choice of a token -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; each filter looks at what those before it have left."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 is all of them."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Choose among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that have occurred, and multiplies negative ones."""

    def __post_init__(self):
        for name, expected, fits in (
            ("temperature", "0 or more", self.temperature >= 0),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "more than 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "more than 0", self.repetition_penalty > 0),
        ):
            if not fits:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}: it must be {expected}")

    @property
    def sampling(self) -> "Sampling":
        """These settings alone, of a config that holds more."""
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})

    @property
    def remembers(self) -> bool:
        """Whether it matters which tokens have occurred."""
        return self.repetition_penalty != 1


def filtered(
    logits: Float32[Array, "batch vocab"], sampling: Sampling
) -> Float32[Array, "batch vocab"]:
    """Logits at the temperature, those of tokens that a filter leaves out at minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = largest(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p < 1:
        logits = largest(logits, jax.nn.softmax(logits), sampling.top_p)
    if sampling.min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def largest(
    logits: Float32[Array, "batch vocab"],
    weights: Float32[Array, "batch vocab"],
    amount: float | int,
) -> Float32[Array, "batch vocab"]:
    """The largest logits, until their weights reach `amount`; the others at minus infinity.

    The last one kept is found bit by bit: 32 sums, each over a vocabulary that may be split over
    devices, where a sort would gather it and cost more.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    ranks = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # ordered as the floats

    def refined(i: Int[Array, ""], rank: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
        higher = rank | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        kept = jnp.sum(jnp.where(ranks >= higher[:, None], weights, 0.0), axis=-1)
        return jnp.where(kept >= amount, higher, rank)

    rank = jax.lax.fori_loop(0, 32, refined, jnp.zeros(len(logits), jnp.uint32))
    return jnp.where(ranks >= rank[:, None], logits, -jnp.inf)


def choose(
    logits: Float32[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    step: Int[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None,
    sampling: Sampling,
) -> Int[Array, " batch"]:
    """A token for each row, by the row's key and step alone."""
    if seen is not None:
        by = jnp.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = jnp.where(seen, logits * by, logits)
    vocab = logits.shape[1]
    if sampling.temperature:
        now = jax.vmap(jax.random.fold_in)(keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(now)
        logits = filtered(logits, sampling) + noise
    # argmax, by two reductions: XLA on CPU takes ten times as long for one of pairs.
    logits = logits.T
    best = logits == jnp.max(logits, axis=0)
    return jnp.min(jnp.where(best, jnp.arange(vocab)[:, None], vocab - 1), axis=0)


# ---- rows that are continued ---------------------------------------------------------------------

PART = 256  # tokens of a prompt read at once


class Rows(eqx.Module):
    """Texts that are being continued, each at a place of its own."""

    cache: Cache
    keys: Key[Array, " batch"]
    tokens: Int[Array, "batch new"]
    count: Int[Array, " batch"]
    live: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"] | None


def begin(
    model: LanguageModel,
    prompts: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    *,
    max_new: int,
    room: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    dtype: Any,
) -> Rows:
    """Right-padded prompts with their first new token, in a cache with `room` for more.

    A row of length 0 is none. Long prompts are read in parts, as many as the longest one has.
    """
    batch, seq = prompts.shape
    part = -(-seq // -(-seq // PART))
    prompts = jnp.pad(prompts, ((0, 0), (0, -seq % part)))
    row = jnp.arange(batch)

    def read(carry):
        start, cache, last = carry
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, part, axis=1)
        real = (start + jnp.arange(part) < lengths[:, None]).astype(jnp.int32)
        hidden, cache = model.hidden(tokens, real, cache=cache, dtype=dtype)
        at = lengths - 1 - start
        here = (0 <= at) & (at < part)
        last = jnp.where(here[:, None], hidden[row, jnp.clip(at, 0, part - 1)], last)
        return start + part, cache, last

    cache = placed(model.cache(batch, prompts.shape[1] + room, dtype))
    last = jnp.zeros((batch, model.config.embed), cache.keys.dtype)
    start = (jnp.zeros((), jnp.int32), cache, last)
    _, cache, last = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(lengths), read, start)
    seen = None
    if sampling.remembers:
        real = jnp.arange(prompts.shape[1]) < lengths[:, None]
        vocab = model.config.vocab
        seen = jnp.zeros((batch, vocab), bool)
        seen = seen.at[row[:, None], jnp.where(real, prompts, vocab)].set(True, mode="drop")
    tokens = jnp.zeros((batch, max_new), jnp.int32)
    rows = Rows(cache, keys, tokens, jnp.zeros(batch, jnp.int32), lengths > 0, seen)
    return placed(extend(model, rows, last, sampling, stop))


def extend(
    model: LanguageModel,
    rows: Rows,
    hidden: Float[Array, "batch embed"],
    sampling: Sampling,
    stop: tuple[int, ...],
) -> Rows:
    """With the token that follows these hidden states, in rows that are live."""
    # A vocabulary is many rows, a batch is few: XLA on CPU is faster with the many first.
    logits = einsum_f32("ve,be->vb", model.unembedding.astype(hidden.dtype), hidden).T
    logits = sharding.constrain(logits, "batch vocab")
    token = choose(logits, rows.keys, rows.count, rows.seen, sampling).astype(jnp.int32)
    row, new = jnp.arange(len(token)), rows.tokens.shape[1]
    tokens = rows.tokens.at[row, jnp.where(rows.live, rows.count, new)].set(token, mode="drop")
    seen = rows.seen
    if seen is not None:
        seen = seen.at[row, jnp.where(rows.live, token, seen.shape[1])].set(True, mode="drop")
    count = rows.count + rows.live.astype(jnp.int32)
    ended = (token[:, None] == jnp.array(stop, jnp.int32)).any(axis=1)
    live = rows.live & ~ended & (count < new)
    return Rows(rows.cache, rows.keys, tokens, count, live, seen)


def advance(
    model: LanguageModel,
    rows: Rows,
    idle: Int[Array, ""] | int,
    steps: int,
    *,
    sampling: Sampling,
    stop: tuple[int, ...],
    dtype: Any,
) -> Rows:
    """Up to `steps` more tokens for each row, until as many rows as `idle` are not live."""

    def goes_on(carry):
        step, rows = carry
        return (step < steps) & (jnp.sum(~rows.live) < idle)

    def step(carry):
        step, rows = carry
        before = jnp.maximum(rows.count - 1, 0)[:, None]
        token = jnp.take_along_axis(rows.tokens, before, axis=1)
        real = rows.live.astype(jnp.int32)[:, None]
        hidden, cache = model.hidden(token, real, cache=rows.cache, dtype=dtype)
        rows = eqx.tree_at(lambda rows: rows.cache, rows, cache)
        return step + 1, placed(extend(model, rows, hidden[:, 0], sampling, stop))

    return jax.lax.while_loop(goes_on, step, (0, rows))[1]


def placed(rows: Any) -> Any:
    """Every array split by its axes over the mesh in scope, if any."""
    return jax.tree.map(
        lambda array, axes: sharding.constrain(array, " ".join(axes)), rows, sharding.axes(rows)
    )


@sharding.jit
def sample(
    model: LanguageModel,
    prompts: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    key: PRNGKeyArray,
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    stop: tuple[int, ...] = (),
    dtype: Any = None,
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Continuations of right-padded prompts, and how many tokens each has; zeros follow them.

    A token of `stop` ends its row and is the last one counted. Each row has a key of its own, so
    that what it says does not depend on its neighbours, nor on the mesh in scope.
    """
    batch = len(prompts)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    how = {"sampling": sampling, "stop": stop, "dtype": dtype}
    rows = begin(model, prompts, lengths, keys, max_new=max_new, room=max_new, **how)
    rows = advance(model, rows, batch, max_new, **how)
    return rows.tokens, rows.count


def continuations(
    writers: Mapping[str, tuple[LanguageModel, jax.sharding.Mesh]],
    tokenizer: Path,
    prompts: Int[np.ndarray, "batch seq"],
    *,
    layout: sharding.Layout | None = None,
    max_new: int = 32,
    dtype: Any = None,
) -> Iterator[str]:
    """Lines that show what each model makes of the same beginnings, by its likeliest tokens."""
    encoder, stop = text.load_tokenizer(tokenizer).encoder, text.stop_ids(tokenizer)
    lengths = np.full(len(prompts), prompts.shape[1])
    told = {}
    for name, (model, mesh) in writers.items():
        with sharding.use_mesh(mesh, layout):
            found = sample(
                model, prompts, lengths, jax.random.key(0), max_new=max_new,
                sampling=Sampling(temperature=0.0), stop=stop, dtype=dtype,
            )  # fmt: skip
            told[name] = tuple(map(sharding.to_host, found))
    for row, prompt in enumerate(prompts):
        yield f"\n> {encoder.decode(prompt.tolist())!r}"
        for name, (tokens, counts) in told.items():
            yield f"{name:8}  {encoder.decode(tokens[row, : counts[row]].tolist())!r}"


# ---- many texts ----------------------------------------------------------------------------------

STEPS = 64  # tokens between two looks of the host at the rows
WIDTH = 64  # prompts are padded to a multiple of it, so that texts of many sets need one program


class Job(NamedTuple):
    """One sample of one prompt. What is written depends on the key, and on these, alone."""

    prompt: int
    sample: int
    tokens: Sequence[int]


def generate(
    model: LanguageModel,
    jobs: Sequence[Job],
    key: PRNGKeyArray,
    *,
    slots: int,
    max_new: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    dtype: Any = None,
) -> Iterator[list[tuple[Job, Int[np.ndarray, " new"]]]]:
    """Every job with its new tokens, some at a time, as they are finished.

    Up to `slots` are continued at once. As soon as a quarter of them are finished others take their
    place; so short texts wait for long ones only at the end. Longer prompts come first: they are
    read together with those of their length.
    """
    ways = sharding.num_shards("batch")
    slots = -(-min(slots, len(jobs)) // ways) * ways
    group = -(-slots // (4 * ways)) * ways
    queue = deque(sorted(jobs, key=lambda job: -len(job.tokens)))
    width = -(-len(queue[0].tokens) // WIDTH) * WIDTH
    held: list[Job | None] = [None] * slots
    how = {"sampling": sampling, "stop": stop, "dtype": dtype}
    rows = idle_rows(model, slots, width + max_new, max_new, sampling, dtype)
    while queue or any(held):
        free = [slot for slot, job in enumerate(held) if job is None]
        while queue and len(free) >= min(group, len(queue)):
            prompts, lengths = np.zeros((group, width), np.int32), np.zeros(group, np.int32)
            names, places = np.zeros((group, 2), np.int32), np.full(group, slots, np.int32)
            for i in range(min(group, len(queue))):
                job, places[i] = queue.popleft(), free.pop()
                prompts[i, : len(job.tokens)], lengths[i] = job.tokens, len(job.tokens)
                names[i], held[places[i]] = job[:2], job
            rows = refill((model, prompts, lengths, names, places, key), rows, **how)
        idle = min(group, len(queue)) if queue else slots
        rows = decode((model, np.int32(idle)), rows, **how)
        tokens, counts, live = map(sharding.to_host, (rows.tokens, rows.count, rows.live))
        ended = [slot for slot, job in enumerate(held) if job is not None and not live[slot]]
        yield [(held[slot], tokens[slot, : counts[slot]]) for slot in ended]
        for slot in ended:
            held[slot] = None


@sharding.jit
def idle_rows(
    model: LanguageModel, slots: int, capacity: int, max_new: int, sampling: Sampling, dtype: Any
) -> Rows:
    """Rows that hold nothing yet."""
    zeros = jnp.zeros(slots, jnp.int32)
    seen = jnp.zeros((slots, model.config.vocab), bool) if sampling.remembers else None
    keys = jax.vmap(jax.random.key)(zeros)
    tokens = jnp.zeros((slots, max_new), jnp.int32)
    cache = model.cache(slots, capacity, dtype)
    return placed(Rows(cache, keys, tokens, zeros, zeros > 0, seen))


@sharding.jit(donate="all-except-first")
def refill(frozen: tuple[Any, ...], rows: Rows, **how: Any) -> Rows:
    """With other prompts in some rows; those placed beyond the last row are none."""
    model, prompts, lengths, names, places, key = frozen
    keys = jax.vmap(lambda name: jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1]))
    fresh = begin(model, prompts, lengths, keys(names), max_new=rows.tokens.shape[1], room=0, **how)

    def put(old, axes, new):
        new = new[tuple(map(slice, old.shape))]  # room of padding alone
        at = [slice(size) for size in new.shape]
        at[axes.index("batch")] = places
        return old.at[tuple(at)].set(new, mode="drop")

    return placed(jax.tree.map(put, rows, sharding.axes(rows), fresh))


@sharding.jit(donate="all-except-first")
def decode(frozen: tuple[LanguageModel, Int[Array, ""]], rows: Rows, **how: Any) -> Rows:
    """`advance`, by a bounded number of tokens."""
    model, idle = frozen
    return advance(model, rows, idle, STEPS, **how)


# ---- the program ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sampling):
    """Let a model continue prompts, and keep what it writes as a data set to train on."""

    model: str
    """Hub id or folder of the model."""
    prompts: str
    """File, folder or glob of .txt (one prompt a line), .jsonl, .parquet (also .gz, .zst), or a
    hub data set as id[:config][:split]."""
    out: str
    """File to write, .parquet or .jsonl."""
    column: str | None = None
    """The column of prompts, text or messages; by default messages, else prompt (for a model with
    a chat template what its user says), else text."""
    samples: int = 1
    """Answers to each prompt."""
    max_prompt: int = 1024
    """Tokens a prompt may have; longer ones are left out."""
    max_new: int = 256
    """Tokens an answer may have."""
    stop: tuple[int, ...] = ()
    """Token ids that end an answer, besides those that the model's files name."""
    seed: int = 0
    """Of the sampling."""
    batch_size: int = 32
    """Answers written at once."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is bfloat16 on accelerators, float32 on CPUs."""
    resume: bool = True
    """Continue what an earlier run has begun; --no-resume begins anew."""
    push: str | None = None
    """Hub id of a data set to upload the result to; one that is not there yet is made private."""
    quiet: bool = False
    """Print only warnings and the result."""
    mesh: sharding.Sizes = dataclasses.field(default_factory=lambda: sharding.Sizes(-1, 1, 1))

    def __post_init__(self):
        super().__post_init__()
        errors.check_counts(self, "samples", "max_prompt", "max_new", "batch_size")
        errors.check_seed(self.seed)
        if Path(self.out).suffix not in (".parquet", ".jsonl"):
            raise UserError(f"--out {self.out}: expected the name of a .parquet or .jsonl file")


class Task(NamedTuple):
    """What is to be written, and by which settings."""

    prompts: list[text.Prompt]
    jobs: list[Job]
    stop: tuple[int, ...]
    dtype: str
    settings: dict[str, Any]


def prepare(config: Config, folder: Path, tokenizer: text.Tokenizer) -> Task:
    shape = models.config(folder)
    if tokenizer.size > shape.vocab:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.size - 1}, the model's vocabulary"
            f" has {shape.vocab}: they do not belong together"
        )
    for token in config.stop:
        if not 0 <= token < shape.vocab:
            raise UserError(f"--stop {token}: expected token ids from 0 to {shape.vocab - 1}")
    room, remedy = config.max_prompt, "raise --max-prompt"
    if shape.max_positions is not None and shape.max_positions - config.max_new < room:
        room = shape.max_positions - config.max_new
        remedy = f"lower --max-new (the model has {shape.max_positions} positions)"
        if room < 1:
            raise UserError(
                f"--max-new {config.max_new} leaves no room for prompts: the model was made for"
                f" {shape.max_positions} positions"
            )
    prompts = list(text.prompts(text.find(config.prompts), tokenizer, config.column))
    if not prompts:
        raise UserError(f"{config.prompts}: no prompts in it: all it holds is empty or blank")
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    encodings = tokenizer.encode([prompt.piece for prompt in prompts])
    tokens = [
        encoding.ids if prompt.piece.rendered else bos + encoding.ids
        for prompt, encoding in zip(prompts, encodings, strict=True)
    ]
    lengths = list(map(len, tokens))
    if not min(lengths):
        raise UserError(f"{config.prompts}: prompt {lengths.index(0) + 1} has no tokens")
    fits = [i for i, length in enumerate(lengths) if length <= room]
    if not fits:
        raise UserError(
            f"{config.prompts}: all {len(prompts)} prompts are longer than {room} tokens (the"
            f" shortest has {min(lengths)}): give shorter ones, or {remedy}"
        )
    if len(fits) < len(prompts):
        count = len(prompts) - len(fits)
        print(f"{count} of {len(prompts)} prompts left out: over {room} tokens", file=sys.stderr)
    dtype = sharding.compute_dtype(config.compute_dtype)
    stop = tuple(sorted({*text.stop_ids(folder), *config.stop}))
    settings = {
        "model": config.model, "prompts": config.prompts,
        "samples": config.samples, "max-prompt": room, "max-new": config.max_new,
        "seed": config.seed, "stop": list(stop), "compute-dtype": dtype,
        **{name.replace("_", "-"): value for name, value in vars(config.sampling).items()},
        "text of the prompts": text.digest(tokens), "weights": models.fingerprint(folder),
    }  # fmt: skip
    jobs = [Job(i, j, tokens[i]) for i in fits for j in range(config.samples)]
    return Task(prompts, jobs, stop, dtype, settings)


def write(
    config: Config,
    task: Task,
    folder: Path,
    tokenizer: text.Tokenizer,
    journal: answers.Journal,
) -> None:
    """Lets the model write what the journal lacks."""
    jobs = [job for job in task.jobs if job[:2] not in journal]
    if not jobs:
        return
    mesh = sharding.make_mesh(**config.mesh.sizes)
    model = models.load(folder, dtype=task.dtype, mesh=mesh)
    begun, done, count = time.monotonic(), 0, 0
    with sharding.use_mesh(mesh), report.counting("generating", quiet=config.quiet) as show:
        for finished in generate(
            model, jobs, jax.random.key(config.seed), slots=config.batch_size,
            max_new=config.max_new, sampling=config.sampling, stop=task.stop, dtype=task.dtype,
        ):  # fmt: skip
            journal.add(
                [answer(job, tokens.tolist(), task.stop, tokenizer) for job, tokens in finished]
            )
            done, count = done + len(finished), count + sum(len(tokens) for _, tokens in finished)
            speed = count / (time.monotonic() - begun)
            show(done, len(jobs), f"{report.count(speed)} tok/s")


def answer(
    job: Job, tokens: list[int], stop: tuple[int, ...], tokenizer: text.Tokenizer
) -> dict[str, Any]:
    """A record of the journal; its text is what the tokens add to that of the prompt."""
    stopped = tokens[-1] in stop
    said, decode = tokens[: len(tokens) - stopped], tokenizer.encoder.decode
    before, whole = decode(job.tokens), decode([*job.tokens, *said])
    completion = whole[len(before) :] if whole.startswith(before) else decode(said)
    if not stopped:
        completion = completion.rstrip("\ufffd")  # the first bytes of a letter
    return {
        "prompt": job.prompt,
        "sample": job.sample,
        "completion": completion,
        "finish_reason": "stop" if stopped else "length",
        "n_tokens": len(tokens),
    }


def rows(task: Task, journal: answers.Journal) -> Iterator[dict[str, Any]]:
    """The data set, in the order of its prompts."""
    for record in journal:
        prompt, completion = task.prompts[record["prompt"]], record["completion"]
        messages = prompt.messages
        if messages is not None:
            messages = [*messages, {"role": "assistant", "content": completion}]
        yield {
            "prompt": prompt.piece.text,
            "completion": completion,
            "messages": messages,
            "finish_reason": record["finish_reason"],
            "n_tokens": record["n_tokens"],
        }


def run(config: Config) -> None:
    out = Path(config.out).expanduser()
    folder = models.fetch(config.model)
    tokenizer = text.load_tokenizer(folder)
    task = prepare(config, folder, tokenizer)
    columns = None
    if out.suffix == ".parquet":  # what does not fit is refused now, not in the end
        columns = answers.schema([prompt.messages for prompt in task.prompts if prompt.messages])
    if config.push is not None:
        answers.reserve(config.push)
    if out.exists() and config.resume and not answers.journal_path(out).exists():
        answers.check_settings(out, answers.settings_of(out), task.settings)
        print(f"{out} is finished", file=sys.stderr)
    else:
        with answers.Journal(out, task.settings, resume=config.resume) as journal:
            write(config, task, folder, tokenizer, journal)
            answers.save(out, rows(task, journal), columns, task.settings)
            journal.remove()
        print(f"{len(task.jobs)} answers  {out}")
    if config.push is not None:
        print(f"data set  {answers.upload(config.push, out, task.settings)}")


def main() -> None:
    config = errors.cli(Config)
    processes.start()
    run(config)


if __name__ == "__main__":
    errors.run(main)
