"""Text from a model: the choice of a token, rows decoded together, many texts, the program:

python generate.py --model DIR --prompts FILE --out FILE.parquet
python generate.py --model DIR --prompt 'text'
"""

import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, PRNGKeyArray, UInt32

import models
import sharding
import text
from models.attention import Cache, einsum_f32
from models.base import LanguageModel, unstacked
from runtime import answers, buckets, commits, errors, files, processes, report
from runtime.errors import SEED, Constraint, UserError, above, at_least, between

Logits = Float32[Array, "batch vocab"]
Occurred = Bool[Array, "batch vocab"] | None  # tokens of a row, for --repetition-penalty
Prompts = Int[Array, "batch seq"]
Counts = Int[Array, " batch"]
Keys = Key[Array, " batch"]

OUT = Constraint(
    "a .parquet or .jsonl file on this machine or in a bucket",
    lambda path: errors.OUT.holds(path) and Path(path).suffix in (".parquet", ".jsonl"),
)
SHARE = Constraint("above 0 and at most 1", lambda x: 0 < x <= 1)
PART = 256  # tokens of a prompt read at once
LEAST = 64  # places of a cache that are always read
STEPS = 64  # tokens between two looks of the host at the rows
WIDTH = 64  # prompts are padded to a multiple of it, so that texts of many sets need one program


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; each filter looks at what those before it have left."""

    flag_prefix: ClassVar[str] = "--"

    temperature: Annotated[float, at_least(0)] = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Annotated[int, at_least(0)] = 0
    """Choose among this many of the likeliest tokens; 0 is all of them."""
    top_p: Annotated[float, SHARE] = 1.0
    """Choose among the fewest tokens whose probabilities add up to this."""
    min_p: Annotated[float, between(0, 1)] = 0.0
    """Choose among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, above(0)] = 1.0
    """Divides the positive logits of tokens that have occurred, and multiplies negative ones."""

    def __post_init__(self):
        errors.check(self, self.flag_prefix)

    @property
    def sampling(self) -> "Sampling":
        """These settings alone, of a config that holds more."""
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})


def filter_logits(logits: Logits, sampling: Sampling) -> Logits:
    """Logits at the temperature, those of tokens that a filter leaves out at minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_largest(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_largest(logits, jax.nn.softmax(logits), sampling.top_p)
    if sampling.min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def keep_largest(logits: Logits, weights: Logits, amount: float | int) -> Logits:
    """The largest logits, until their weights reach `amount`; the others at minus infinity."""
    # The threshold is searched bit by bit: 32 sums over a vocabulary that may be split over
    # devices, where a sort would gather it.
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    ranks = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # ordered as the floats

    def set_bit(i: Int[Array, ""], threshold: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(ranks >= higher[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight >= amount, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(len(logits), jnp.uint32))
    return jnp.where(ranks >= threshold[:, None], logits, -jnp.inf)


def sample_token(
    logits: Logits, keys: Keys, step: Counts, occurred: Occurred, sampling: Sampling
) -> Counts:
    """A token for each row, by the row's key and step alone."""
    if occurred is not None:
        penalty = sampling.repetition_penalty
        penalized = logits * jnp.where(logits > 0, 1 / penalty, penalty)
        logits = jnp.where(occurred, penalized, logits)
    vocab = logits.shape[1]
    if sampling.temperature:
        keys = jax.vmap(jax.random.fold_in)(keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
        logits = filter_logits(logits, sampling) + noise
    # argmax, by two reductions: XLA on CPU takes ten times as long for one of pairs.
    logits = logits.T
    best = logits == jnp.max(logits, axis=0)
    return jnp.min(jnp.where(best, jnp.arange(vocab)[:, None], vocab - 1), axis=0)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How rows are continued; the same for all of them, and static in every program."""

    max_new: int
    sampling: Sampling = Sampling()
    stop: tuple[int, ...] = ()  # tokens that end a row, and are its last
    dtype: Any = None


class DecodeState(eqx.Module):
    """Texts that are being continued, each as far as it is."""

    cache: Cache
    keys: Keys
    tokens: Int[Array, "batch new"]
    count: Counts
    active: Bool[Array, " batch"]
    occurred: Occurred


def constrain_state(state: Any) -> Any:
    """Splits every array by its axes over the mesh in scope, if any."""
    return jax.tree.map(
        lambda array, axes: sharding.constrain(array, " ".join(axes)), state, sharding.axes(state)
    )


@sharding.jit
def idle_state(model: LanguageModel, keys: Keys, capacity: int, decoding: Decoding) -> DecodeState:
    """Rows that hold nothing yet."""
    batch, penalized = len(keys), decoding.sampling.repetition_penalty != 1
    # The head may have fewer rows than the config says: on-policy text leaves padding out.
    occurred = jnp.zeros((batch, len(model.unembedding)), bool) if penalized else None
    tokens, count = jnp.zeros((batch, decoding.max_new), jnp.int32), jnp.zeros(batch, jnp.int32)
    cache = model.cache(batch, capacity, decoding.dtype)
    return constrain_state(DecodeState(cache, keys, tokens, count, count > 0, occurred))


def read_prompts(
    model: LanguageModel, prompts: Prompts, lengths: Counts, keys: Keys, decoding: Decoding, room=0
) -> DecodeState:
    """Right-padded prompts, read in parts, with their first new token; those of no length idle."""
    batch, seq = prompts.shape
    part = -(-seq // -(-seq // PART))
    prompts = jnp.pad(prompts, ((0, 0), (0, -seq % part)))
    row = jnp.arange(batch)

    def read_part(carry):
        start, cache, last = carry
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, part, axis=1)
        real = (start + jnp.arange(part) < lengths[:, None]).astype(jnp.int32)
        hidden, cache = model.hidden(
            tokens, real, cache=cache, doc_length=lengths, dtype=decoding.dtype
        )
        end = jnp.clip(lengths - 1 - start, 0, part - 1)[:, None, None]
        last = jnp.where(real[:, :1] > 0, jnp.take_along_axis(hidden, end, 1)[:, 0], last)
        return start + part, cache, last

    state = idle_state(model, keys, prompts.shape[1] + room, decoding)
    last = jnp.zeros((batch, model.config.embed), state.cache.keys.dtype)
    first = (jnp.zeros((), jnp.int32), state.cache.first(prompts.shape[1]), last)
    _, cache, last = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(lengths), read_part, first)
    cache = state.cache.with_first(cache)
    occurred = state.occurred
    if occurred is not None:
        real = jnp.arange(prompts.shape[1]) < lengths[:, None]
        tokens = jnp.where(real, prompts, occurred.shape[1])
        occurred = occurred.at[row[:, None], tokens].set(True, mode="drop")
    state = dataclasses.replace(state, cache=cache, active=lengths > 0, occurred=occurred)
    return append_token(model, state, last, decoding)


def append_token(
    model: LanguageModel,
    state: DecodeState,
    hidden: Float[Array, "batch embed"],
    decoding: Decoding,
) -> DecodeState:
    """Active rows, with the token that follows these hidden states."""
    # A vocabulary is many rows, a batch is few: XLA on CPU is faster with the many first.
    logits = einsum_f32("ve,be->vb", model.unembedding.astype(hidden.dtype), hidden).T
    logits = sharding.constrain(logits, "batch vocab")
    token = sample_token(logits, state.keys, state.count, state.occurred, decoding.sampling)
    token, active, occurred = token.astype(jnp.int32)[:, None], state.active, state.occurred
    here = active[:, None] & (jnp.arange(decoding.max_new) == state.count[:, None])
    tokens = jnp.where(here, token, state.tokens)
    if occurred is not None:
        occurred |= active[:, None] & (jnp.arange(occurred.shape[1]) == token)
    count = state.count + active.astype(jnp.int32)
    ended = (token == jnp.array(decoding.stop, jnp.int32)).any(axis=1)
    active = active & ~ended & (count < decoding.max_new)
    return constrain_state(DecodeState(state.cache, state.keys, tokens, count, active, occurred))


@sharding.jit(donate="all-except-first")
def decode(
    frozen: tuple[LanguageModel, Any], state: DecodeState, decoding: Decoding, steps: int
) -> DecodeState:
    """Up to `steps` more tokens for each row, until so many rows are idle; consumes the state."""
    (model, idle), capacity = frozen, state.cache.keys.shape[-1]

    def goes_on(size, carry):
        step, state = carry
        longest = jnp.max(jnp.where(state.active, state.cache.length, 0))
        return (step < steps) & (jnp.sum(~state.active) < idle) & (longest < size)

    def advance(carry):
        step, state = carry
        before = jnp.maximum(state.count - 1, 0)[:, None]
        token = jnp.take_along_axis(state.tokens, before, axis=1)
        real = state.active.astype(jnp.int32)[:, None]
        hidden, cache = model.hidden(token, real, cache=state.cache, dtype=decoding.dtype)
        state = dataclasses.replace(state, cache=cache)
        return step + 1, append_token(model, state, hidden[:, 0], decoding)

    # What no row has filled is not read: each loop has a cache of its own size.
    part, step = max(LEAST, -(-capacity // 4)), jnp.array(0)
    for size in [*range(part, capacity, part), capacity]:
        cache, first = state.cache, state.cache.first(size)
        if isinstance(model.blocks, tuple):
            first = first.replace(tuple(first.keys), tuple(first.values))
        carry = step, dataclasses.replace(state, cache=first)
        step, state = jax.lax.while_loop(partial(goes_on, size), advance, carry)
        state = dataclasses.replace(state, cache=cache.with_first(state.cache))
    return state


@sharding.jit
def sample(
    model: LanguageModel, prompts: Prompts, lengths: Counts, key: PRNGKeyArray, decoding: Decoding
) -> tuple[Int[Array, "batch new"], Counts]:
    """Continuations of right-padded prompts, and how many tokens each has; zeros follow them."""
    # A row has a key of its own: it depends neither on its neighbours nor on the mesh in scope.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
    state = read_prompts(model, prompts, lengths, keys, decoding, decoding.max_new)
    state = decode((model, len(prompts)), state, decoding, decoding.max_new)
    return state.tokens, state.count


class Job(NamedTuple):
    """One sample of one prompt. What is written depends on the key, and on these, alone."""

    prompt: int
    sample: int
    tokens: Sequence[int]


def generate(
    model: LanguageModel, jobs: Sequence[Job], key: PRNGKeyArray, decoding: Decoding, *, slots: int,
    steps: int = STEPS, width: int = WIDTH, unfinished: bool = False,
) -> Iterator[list[tuple[Job, Int[np.ndarray, " new"]]]]:  # fmt: skip
    """Every job with its new tokens, some at a time, as they are finished; or all at work every
    few `steps`, if `unfinished` are asked for.

    Up to `slots` are continued at once, longer prompts first. As soon as a quarter of them are
    finished others take their place: short texts wait for long ones only at the end.
    """
    shards = sharding.num_shards("batch")
    slots = -(-min(slots, len(jobs)) // shards) * shards
    group = -(-slots // (4 * shards)) * shards
    queue = deque(sorted(jobs, key=lambda job: -len(job.tokens)))
    width = -(-len(queue[0].tokens) // width) * width
    running: dict[int, Job] = {}
    keys = jax.random.split(key, slots)  # none is used: each job brings its own
    state = idle_state(model, keys, width + decoding.max_new, decoding)
    while queue or running:
        free = [slot for slot in range(slots) if slot not in running]
        while queue and len(free) >= min(group, len(queue)):
            added = {free.pop(): queue.popleft() for _ in range(min(group, len(queue)))}
            running |= added
            prompts, lengths = np.zeros((group, width), np.int32), np.zeros(group, np.int32)
            names, places = np.zeros((group, 2), np.int32), np.full(group, slots, np.int32)
            for i, (slot, job) in enumerate(added.items()):
                lengths[i], names[i], places[i] = len(job.tokens), job[:2], slot
                prompts[i, : lengths[i]] = job.tokens
            state = insert_prompts((model, key, prompts, lengths, names, places), state, decoding)
        idle = min(group, len(queue)) if queue else slots
        state = decode((model, np.int32(idle)), state, decoding, steps)
        tokens, counts, active = map(sharding.to_host, (state.tokens, state.count, state.active))
        ready = [slot for slot in sorted(running) if unfinished or not active[slot]]
        yield [(running[slot], tokens[slot, : counts[slot]]) for slot in ready]
        running = {slot: job for slot, job in running.items() if active[slot]}


@sharding.jit(donate="all-except-first")
def insert_prompts(frozen: tuple[Any, ...], state: DecodeState, decoding: Decoding) -> DecodeState:
    """With other prompts in some rows; consumes the state. A slot beyond the last row is none."""
    model, key, prompts, lengths, names, slots = frozen
    name_keys = jax.vmap(lambda name: jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1]))
    fresh = read_prompts(model, prompts, lengths, name_keys(names), decoding)

    def insert(old, axes, new):
        new = new[tuple(map(slice, old.shape))]  # a cache rounded up may have more than the rows
        at = [slice(size) for size in new.shape]
        at[axes.index("batch")] = slots
        return old.at[tuple(at)].set(new, mode="drop")

    return constrain_state(jax.tree.map(insert, state, sharding.axes(state), fresh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sampling, processes.Config):
    """Let a model continue prompts, and keep what it writes as a data set to train on; or one
    --prompt, or its side of a --chat, on the terminal."""

    model: str
    """Hub id or folder of the model."""
    prompts: str | None = None
    """File, folder or glob of .txt (one prompt a line), .jsonl, .parquet (also .gz, .zst), or a
    hub data set as id[@revision][:config][:split]."""
    out: Annotated[str | None, OUT] = None
    """File to write what --prompts bring."""
    prompt: str | None = None
    """A text to continue on standard output, as it is written."""
    chat: bool = False
    """Answer line by line, with the model's chat template; an empty line is the end."""
    temperature: Annotated[float | None, at_least(0)] = None
    """Divides the logits; 0 takes the likeliest token. By default, as for the next three, what the
    model's generation_config.json says where it samples, else 1."""
    top_k: Annotated[int | None, at_least(0)] = None
    """Choose among this many of the likeliest tokens; 0, else the default, is all of them."""
    top_p: Annotated[float | None, SHARE] = None
    """Choose among the fewest tokens whose probabilities add up to this; else 1."""
    repetition_penalty: Annotated[float | None, above(0)] = None
    """Divides the positive logits of tokens that have occurred, and multiplies negative ones; else
    1."""
    column: str | None = None
    """The column of prompts, text or messages; by default messages, else prompt (for a model with
    a chat template what its user says), else text."""
    samples: Annotated[int, at_least(1)] = 1
    """Answers to each prompt."""
    max_prompt: Annotated[int, at_least(1)] = 1024
    """Tokens a prompt may have; longer ones are left out."""
    max_new: Annotated[int, at_least(1)] = 256
    """Tokens an answer may have."""
    stop: tuple[int, ...] = ()
    """Token ids that end an answer, besides those that the model's files name."""
    seed: Annotated[int, SEED] = 0
    """Of the sampling."""
    batch_size: Annotated[int, at_least(1)] = 32
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
        ways = (self.prompts is not None) + (self.prompt is not None) + self.chat
        if ways != 1 or (self.prompts is None) != (self.out is None):
            raise UserError("--prompts with --out, --prompt or --chat: give one of the three")
        if self.prompts is None and (self.distributed or self.coordinator):
            raise UserError("--prompt and --chat are for one process: give --prompts")


def with_model_settings(config: Config, folder: Path) -> Config:
    """With the sampling of the model's own files, where no flag says another."""
    path = folder / models.hub.GENERATION
    own = files.read_json(path) if path.exists() else {}
    own = own if own.get("do_sample") else {}
    usual = {field.name: field.default for field in dataclasses.fields(Sampling)}
    names = [name for name in usual if getattr(config, name) is None]
    values = {name: usual[name] if own.get(name) is None else own[name] for name in names}
    return dataclasses.replace(config, **values)


def prepare(
    config: Config, folder: Path, tokenizer: text.Tokenizer, prompts: Sequence[text.Prompt]
) -> tuple[list[Job], Decoding, dict[str, Any]]:
    """Jobs of the prompts that are not too long, and the settings of what is written."""
    config = with_model_settings(config, folder)
    shape, dtype = models.config(folder), sharding.compute_dtype(config.compute_dtype)
    if any(not 0 <= token < shape.vocab for token in config.stop):
        stop = " ".join(map(str, config.stop))
        raise UserError(f"--stop {stop}: expected token ids from 0 to {shape.vocab - 1}")
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    pieces = [prompt.piece for prompt in prompts]
    encodings = zip(pieces, tokenizer.encode(pieces), strict=True)
    tokens = [encoded.ids if piece.rendered else bos + encoded.ids for piece, encoded in encodings]
    longest, remedy = config.max_prompt, "raise --max-prompt"
    if shape.longest - config.max_new < longest:
        longest = max(0, shape.longest - config.max_new)
        remedy = f"lower --max-new (the model has {shape.longest} positions)"
    fitting = [i for i, ids in enumerate(tokens) if 0 < len(ids) <= longest]
    if not fitting:
        raise UserError(
            f"{config.prompts or '--prompt'}: all {len(prompts)} prompts are longer than {longest}"
            f" tokens (the shortest has {min(map(len, tokens))}): give shorter ones, or {remedy}"
        )
    if excess := len(prompts) - len(fitting):
        words = f"{excess} of {len(prompts)} prompts left out: over {longest} tokens, or none"
        print(words, file=sys.stderr)
    stop = tuple(sorted({*text.stop_ids(folder), *config.stop}))
    settings = {
        "model": config.model, "prompts": config.prompts,
        "samples": config.samples, "max-prompt": longest, "max-new": config.max_new,
        "seed": config.seed, "stop": list(stop), "compute-dtype": dtype,
        **{name.replace("_", "-"): value for name, value in vars(config.sampling).items()},
        "chat-template": text.chat_template(folder), "text of the prompts": text.digest(tokens),
    }  # fmt: skip
    jobs = [Job(i, j, tokens[i]) for i in fitting for j in range(config.samples)]
    return jobs, Decoding(config.max_new, config.sampling, stop, dtype), settings


def answer(job: Job, tokens: list[int], stop: Sequence[int], decode: Callable) -> dict[str, Any]:
    """A record of the journal; its text is what the tokens add to that of the prompt."""
    stopped = tokens[-1] in stop
    said = tokens[: len(tokens) - stopped]
    before, whole = decode(job.tokens), decode([*job.tokens, *said])
    completion = whole[len(before) :] if whole.startswith(before) else decode(said)
    if not stopped:
        completion = completion.rstrip("\ufffd")  # the first bytes of a letter
    record = {"prompt": job.prompt, "sample": job.sample, "completion": completion}
    return record | {"finish_reason": "stop" if stopped else "length", "n_tokens": len(tokens)}


def load(config: Config, folder: Path) -> tuple[jax.sharding.Mesh, LanguageModel]:
    mesh = sharding.make_mesh(**config.mesh.sizes)
    model = models.load(folder, dtype=sharding.compute_dtype(config.compute_dtype), mesh=mesh)
    return mesh, model if mesh.devices.flat[0].platform == "cpu" else unstacked(model)


def write(config: Config, jobs: list[Job], decoding: Decoding, folder: Path, add: Callable) -> None:
    """Lets the model do these jobs, and adds them as they are finished."""
    mesh, model = load(config, folder)
    key, start, done, tokens = jax.random.key(config.seed), time.monotonic(), 0, 0
    with sharding.use_mesh(mesh), report.progress("generating", len(jobs)) as advance:
        for finished in generate(model, jobs, key, decoding, slots=config.batch_size):
            add(finished)
            done, tokens = done + len(finished), tokens + sum(len(new) for _, new in finished)
            advance(done, remark=f"{report.count(tokens / (time.monotonic() - start))} tok/s")


def converse(config: Config) -> None:
    """Continues --prompt, or answers line by line, on standard output."""
    folder, messages, key = models.fetch(config.model), [], jax.random.key(config.seed)
    tokenizer = text.load_tokenizer(folder, models.config(folder).vocab)
    decode, sign = tokenizer.encoder.decode, "> " if sys.stdin.isatty() else ""
    lines = iter(partial(input, sign), "") if config.chat else [config.prompt]
    mesh, model = load(config, folder)
    with sharding.use_mesh(mesh), contextlib.suppress(EOFError):
        for turn, line in enumerate(lines):
            messages.append({"role": "user", "content": line})
            piece = tokenizer.render_prompt(messages, "--chat") if config.chat else text.Piece(line)
            prompts, completion = [text.Prompt(piece, None)], ""
            (job, *_), decoding, settings = prepare(config, folder, tokenizer, prompts)
            jobs, width = [job._replace(prompt=turn)], settings["max-prompt"]  # one for all turns
            options = {"slots": 1, "steps": 1, "width": width, "unfinished": True}
            for ((job, new),) in generate(model, jobs, key, decoding, **options):
                before = len(completion)
                completion = answer(job, new.tolist(), decoding.stop, decode)["completion"]
                print(completion[before:], end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": completion})


@partial(buckets.mirrored, file=True)
def run(config: Config) -> None:
    out, folder = buckets.place(config.out), models.fetch(config.model)
    tokenizer = text.load_tokenizer(folder, models.config(folder).vocab)
    prompts = list(text.prompts(text.find(config.prompts), tokenizer, config.column))
    if not prompts:
        raise UserError(f"{config.prompts}: no prompts in it: all it holds is empty or blank")
    jobs, decoding, settings = prepare(config, folder, tokenizer, prompts)
    settings["weights"] = models.fingerprint(folder)
    columns, decode = None, tokenizer.encoder.decode
    if out.suffix == ".parquet":  # what does not fit is refused now, not in the end
        columns = answers.schema([prompt.messages for prompt in prompts if prompt.messages])
    first = jax.process_index() == 0
    if config.push is not None and first:
        commits.reserve(config.push, "dataset")

    def add(finished):
        if first:
            journal.add([answer(job, new.tolist(), decoding.stop, decode) for job, new in finished])

    def row(record):
        prompt, completion = prompts[record["prompt"]], record["completion"]
        turn = {"role": "assistant", "content": completion}
        messages = None if prompt.messages is None else [*prompt.messages, turn]
        row = {"prompt": prompt.piece.text, "completion": completion, "messages": messages}
        return row | {name: record[name] for name in ("finish_reason", "n_tokens")}

    with contextlib.ExitStack() as opened:
        finished, before, answered = False, answers.settings_of(out, settings), []
        if first:  # the others lend it their devices
            begun = answers.journal_path(out).exists()
            finished = out.exists() and config.resume and not (begun and before)
        if finished:
            answers.check_settings(out, before, settings)
            print(f"{config.out} is finished", file=sys.stderr)
            answered = [job[:2] for job in jobs]
        elif first:
            journal = answers.Journal(out, settings, resume=config.resume)
            answered = list(opened.enter_context(journal).offsets)
        answered = set(map(tuple, processes.gather({"answered": answered})[0]["answered"]))
        if missing := [job for job in jobs if job[:2] not in answered]:
            write(config, missing, decoding, folder, add)
        if first and not finished:
            answers.save(out, map(row, journal), columns, settings)
            journal.path.unlink()  # now that its answers are in the data set
            print(f"{len(jobs)} answers  {config.out}")
    if config.push is not None and first:
        print(f"data set  {answers.upload(config.push, out, settings)}")


def main() -> None:
    config = errors.cli(Config)
    processes.start(config)
    with processes.exit_with_peers(), report.quietly(config.quiet or jax.process_index() > 0):
        processes.check_same(dict(files.flags(dataclasses.asdict(config))))
        converse(config) if config.prompts is None else run(config)


if __name__ == "__main__":
    errors.run(main)
