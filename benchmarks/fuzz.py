"""Mutated files: a loader takes what is still well formed, and refuses the rest in one line.

Run from the repository: `python -m benchmarks.fuzz --cases 1000 --seed 0`. Cases run in a worker
process with little memory to spare; one that dies or hangs is a failure, and a new one goes on.
Another kind of file is another entry of `KINDS`.
"""

import collections
import contextlib
import dataclasses
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from runtime import target_store
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 20  # seconds a case may take
SPARE = 2 << 30  # bytes it may allocate


@dataclasses.dataclass(frozen=True)
class Config:
    """How much to try."""

    cases: int = 1000
    seed: int = 0
    kinds: tuple[str, ...] = ()
    """Kinds of files to mutate; by default all."""


class Kind(NamedTuple):
    """A kind of file, and the way a run reads it."""

    make: Callable[[Path], None]
    """Writes honest files into a folder."""
    files: str
    """Which of them to mutate, as a glob."""
    load: Callable[[Path], Any]
    """Reads the folder; returns all that was read, and prints what a user would see."""
    sound: Callable[[Path], object] | None = None
    """Raises, or is false, unless a file that was accepted is well formed. None: the file is our
    own, and what is read must be what was written."""
    mutate: Callable[[random.Random, bytes], bytes] | None = None
    """None: a mutation of bytes."""


# ---- mutations -----------------------------------------------------------------------------------


def mutate_bytes(chosen: random.Random, content: bytes) -> bytes:
    at = chosen.randrange(len(content) + 1)
    size = chosen.choice((1, 2, 4, 8, 100))
    start, stop = content[:at], content[at + size :]
    match chosen.randrange(8):
        case 0:
            return start
        case 1:
            return start + stop
        case 2:
            return start + chosen.randbytes(size) + stop
        case 3:
            return start + chosen.randbytes(size) + content[at:]
        case 4:
            return start + content[at : at + size] * 2 + stop
        case 5:
            return start + bytes(size) + stop
        case 6:
            return start + b"\xff" * size + stop
        case _:
            return flip(chosen, content)


def flip(chosen: random.Random, content: bytes) -> bytes:
    at = chosen.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chosen.randrange(8)]) + content[at + 1 :]


ODD = [None, True, [], {}, "", [[]], {"": None}, ["a", 1], -1, 0, 1, 2, 0.5, 1e308, 2**31, 2**53]
ODD += [2**63, 2**64, 10**30, "x" * 99, "\ud800", "a\nb\x1b[2J", "../../x", "/etc/passwd", "\0"]
ODD += ["(a+)+$", "{{ x }}", "<eos>"]


def mutate_json(chosen: random.Random, content: bytes) -> bytes:
    """Another value at some place of the tree, or a broken tree."""
    if chosen.random() < 0.3:
        return mutate_bytes(chosen, content)
    tree = json.loads(content)
    for _ in range(chosen.choice((1, 1, 1, 3))):
        parent, key = place(chosen, tree)
        match chosen.randrange(7):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[chosen.choice(("", "x", "type", "a\nb", *parent))] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent.append(parent[key])
            case 3 if isinstance(parent[key], int):
                parent[key] += chosen.choice((-1, 1, -(2**40), 2**40))
            case 4:
                parent[key] = place(chosen, tree)[0]
                break  # it may now be its own ancestor
            case _:
                parent[key] = chosen.choice(ODD)
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        text = "[" * 200_000
    if chosen.random() < 0.1:
        text = re.sub(r"\d+", lambda _: chosen.choice(("NaN", "1e999", "9" * 5000)), text, count=1)
    return text.encode()


def place(chosen: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container in the tree, and a key of it: as often near the root as far from it."""
    found = tree
    while True:
        if not found:
            found = {"": 0}
        key = chosen.choice(list(found) if isinstance(found, dict) else range(len(found)))
        if not isinstance(found[key], dict | list) or not found[key] or chosen.random() < 0.2:
            return found, key
        found = found[key]


def mutate_header(chosen: random.Random, content: bytes) -> bytes:
    """Of a safetensors file; mostly one whose length is told truly."""
    size = int.from_bytes(content[:8], "little")
    if chosen.random() < 0.3:
        return mutate_bytes(chosen, content[: 8 + size]) + content[8 + size :]
    header = mutate_json(chosen, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def mutate_footer(chosen: random.Random, content: bytes) -> bytes:
    """Of a parquet file, where its metadata lies."""
    size = int.from_bytes(content[-8:-4], "little")
    cut = len(content) - 8 - size
    if chosen.random() < 0.4:
        return mutate_bytes(chosen, content)
    footer = content[cut:-8]
    for _ in range(chosen.choice((1, 1, 4))):
        footer = mutate_bytes(chosen, footer) or b"\0"
    return content[:cut] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


# ---- honest files, and how they are read ---------------------------------------------------------


TEMPLATE = """{% for message in messages %}{{ '<|' + message.role + '|>' }}
{{ message['content'] | trim }}<eos>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
TALK = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A bear."}]


def story(i: int) -> str:
    words = (ROOT / "demo" / "stories.txt").read_text()[: 1 << 14].split()
    chosen = random.Random(i)
    return " ".join(chosen.choices(words, k=chosen.randrange(5, 60)))


def make_tokenizer(folder: Path) -> None:
    from tokenizers import (
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    folder.mkdir(parents=True, exist_ok=True)
    encoder = Tokenizer(models.BPE(byte_fallback=False))
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("``", '"')])
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s+(?!\S)|\s+"), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator([story(i) for i in range(40)], trainer)
    encoder.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", encoder.token_to_id("<bos>"))]
    )
    encoder.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<eos>", "lstrip": False},
        "bos_token": "<bos>",
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "x", "template": ""}],
        "added_tokens_decoder": {"0": {"content": "<eos>", "special": True}},
        "model_max_length": 1000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder: Path) -> None:
    import jax

    import models
    from models.llama import Config, Llama

    config = Config(300, 16, 24, 2, 2, 1, 8, max_positions=64, tied=False, eos=0, pad=0)
    models.save(Llama(config, jax.random.key(0)), folder)


def make_shards(folder: Path) -> None:
    import models

    make_model(folder)
    models.save(models.load(folder), folder, shard_size=20_000)


def make_bloom(folder: Path) -> None:
    import jax

    import models
    from models.bloom import Bloom, Config

    models.save(Bloom(Config(300, 16, 2, 2, max_positions=64), jax.random.key(0)), folder)


def load_model(folder: Path) -> Any:
    import jax
    import numpy as np

    import models

    model = models.load(folder)
    return repr(model.config), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]


def make_text(folder: Path) -> None:
    make_tokenizer(folder)
    (folder / "text.txt").write_text("\n\n".join(story(i) for i in range(30)))


def make_gzip(folder: Path) -> None:
    make_text(folder)
    plain = folder / "text.txt"
    (folder / "text.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def make_template(folder: Path) -> None:
    make_jsonl(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def make_jsonl(folder: Path) -> None:
    make_tokenizer(folder)
    records = [{"messages": [*TALK, {"role": "user", "content": story(i)}, TALK[1]], "id": i}
               for i in range(20)]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))


def make_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    make_tokenizer(folder)
    table = pyarrow.table({"text": [story(i) for i in range(60)], "messages": [TALK] * 60})
    pyarrow.parquet.write_table(table, folder / "text.parquet", row_group_size=25)


def load_text(folder: Path, **options: Any) -> Any:
    """All batches of the text there, tokenized with the tokenizer there."""
    import data

    source, *_ = *folder.glob("text.*"), *folder.parent.glob("text.*")
    config = data.Config((str(source),), held_out=1.0, cache=str(folder / "cache"), **options)
    corpus = data.open_corpus(config, folder, seq_len=16, seed=0, vocab=1 << 20)
    arrays = [array.tobytes() for batch in data.evaluation(corpus, 4) for array in batch[:3]]
    return corpus.digest, arrays


def load_talk(folder: Path) -> Any:
    return load_text(folder, mask="assistant")


def load_plain(folder: Path) -> Any:
    """Without the cache: the store follows from the files that are mutated."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return load_text(folder, mask="all")


def make_store(folder: Path) -> None:
    """Its text lies elsewhere: a store knows it by its inode, which a copy does not have."""
    make_jsonl(folder)
    (folder / "text.jsonl").rename(folder.parent / "text.jsonl")
    load_talk(folder)


def load_store(folder: Path) -> Any:
    """Damage is repaired, or told and repaired at the next start."""
    [manifest] = folder.glob("cache/*/store.json")
    before = manifest.stat().st_ino
    try:
        found = load_talk(folder)
    except UserError as error:
        print(error)
        found = load_talk(folder)
    if not manifest.exists() or manifest.stat().st_ino != before:
        print("built again")
    return found


def make_kept(folder: Path) -> None:
    import data
    import targets

    make_model(folder)
    make_text(folder)
    source = data.Config((str(folder / "text.txt"),), cache=str(folder / "cache"))
    targets.make(
        targets.Config(
            teacher=str(folder), out=str(folder / "kept"), data=source, seq_len=16, top_k=4,
            quiet=True,
        )
    )  # fmt: skip


def load_kept(folder: Path) -> Any:

    kept = target_store.load(folder / "kept")
    return kept.manifest, [array.tobytes() for array in target_store.read(kept, kept.windows)]


def state_of(step: int) -> dict[str, Any]:
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(step)
    weights = {f"w{i}": jnp.asarray(rng.normal(size=(5, 7 * i)), jnp.float32) for i in range(1, 4)}
    return weights | {"step": jnp.int32(step), "half": jnp.arange(9).astype(jnp.bfloat16) * step}


def make_checkpoints(folder: Path) -> None:
    from runtime import checkpoint

    with checkpoint.Checkpoints(folder) as saved:
        for step in (1, 2):
            saved.save(step, state_of(step), {"data": "0" * 32, "steps": step})


def load_checkpoint(folder: Path) -> Any:
    """What was saved, of whichever step: it is compared here, as both may be right."""
    import numpy as np

    from runtime import checkpoint

    state, extra, step = checkpoint.restore(folder, state_of(0))
    assert checkpoint.latest(folder) in (step, 2)
    assert extra == {"data": "0" * 32, "steps": step}
    return all(np.asarray(state[k]).tobytes() == np.asarray(v).tobytes()
               for k, v in state_of(step).items())  # fmt: skip


def make_metrics(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": i, "loss": 1 / i, "eval/kl": None} for i in range(1, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_metrics(folder: Path) -> Any:
    from runtime import report

    return report.read_metrics(folder / "metrics.jsonl")


# ---- what is well formed, told without the code that is under test -------------------------------


def sound_tensors(path: Path) -> bool:
    """Every byte after the header belongs to one tensor, of a known type and the right size."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    at = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        width = {"F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
        if start != at or stop - start != width * math.prod(entry["shape"]):
            return False
        at = stop
    return 8 + size + at == len(content)


def sound_index(path: Path) -> bool:
    where = json.loads(path.read_bytes())["weight_map"]
    names = {}
    for file in path.parent.glob("*.safetensors"):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names |= dict.fromkeys(header.keys() - {"__metadata__"}, file.name)
    return where == names


def sound_json(path: Path) -> bool:
    return isinstance(json.loads(path.read_bytes()), dict)


def sound_gzip(path: Path) -> bool:
    return bool(gzip.decompress(path.read_bytes()).decode())


def sound_lines(path: Path) -> bool:
    lines = path.read_bytes().split(b"\n")
    if path.name == "metrics.jsonl":
        lines.pop()  # of a run that was killed while it wrote
    return all(isinstance(json.loads(line), dict) for line in lines if line.strip())


def sound_template(path: Path) -> bool:
    import jinja2

    jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(path.read_text())
    return True


def sound_parquet(path: Path) -> bool:
    content = path.read_bytes()
    return content[:4] == content[-4:] == b"PAR1"


KINDS = {
    "safetensors header": Kind(
        make_model, "model.safetensors", load_model, sound_tensors, mutate_header
    ),
    "safetensors body": Kind(make_model, "model.safetensors", load_model, sound_tensors),
    "shard": Kind(make_shards, "*.safetensors", load_model, sound_tensors, mutate_header),
    "index": Kind(make_shards, "*.index.json", load_model, sound_index, mutate_json),
    "config of llama": Kind(make_model, "config.json", load_model, sound_json, mutate_json),
    "config of bloom": Kind(make_bloom, "config.json", load_model, sound_json, mutate_json),
    "tokenizer": Kind(make_text, "tokenizer.json", load_plain, sound_json, mutate_json),
    "tokenizer config": Kind(
        make_jsonl, "tokenizer_config.json", load_plain, sound_json, mutate_json
    ),
    "chat template": Kind(make_template, "chat_template.jinja", load_talk, sound_template),
    "jsonl": Kind(make_jsonl, "text.jsonl", load_talk, sound_lines),
    "packed text": Kind(make_gzip, "text.txt.gz", load_plain, sound_gzip),
    "parquet": Kind(make_parquet, "text.parquet", load_plain, sound_parquet, mutate_footer),
    "token store": Kind(make_store, "cache/*/*", load_store),
    "kept targets": Kind(make_kept, "kept/[!.]*", load_kept),
    "checkpoint": Kind(make_checkpoints, "2/**/*", load_checkpoint),
    "metrics": Kind(make_metrics, "metrics.jsonl", load_metrics, sound_lines),
}


# ---- the worker ----------------------------------------------------------------------------------


def judge(kind: Kind, seed: str, honest: Path, expected: Any) -> tuple[str, str]:
    """`accepted`, `refused` or `failure` of one mutation, and what was said."""
    chosen = random.Random(seed)
    with copied(honest) as folder:
        files = sorted(file for file in folder.glob(kind.files) if file.is_file())
        file = chosen.choice(files)
        facts, before = file.stat(), file.read_bytes()
        content = before
        while content == before:
            content = (kind.mutate or mutate_bytes)(chosen, before)
        file.write_bytes(content)
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        try:
            with telling() as said:
                found = kind.load(folder)
        except UserError as error:
            text = str(error)
            lines = "".join(said).strip().splitlines()
            if len(text.splitlines()) != 1 or len(text) > 1000 or not text.isprintable() or lines:
                return "failure", f"not one line: {text[:300]!r} after {lines[:3]}"
            return "refused", text.replace(str(folder), "")
        except BaseException as error:
            return "failure", f"{type(error).__name__}: {str(error)[:300]!r}"
        if kind.sound is None:
            if found != expected:
                return "failure", f"{file.relative_to(folder)}: it was read as something else"
            return ("refused", said[0].strip()) if said else ("accepted", "")
        try:
            if not kind.sound(file):
                return "failure", "broken, and accepted"
        except Exception as error:
            return "failure", f"accepted although {type(error).__name__}: {str(error)[:200]}"
        return "accepted", ""


@contextlib.contextmanager
def copied(honest: Path) -> Iterator[Path]:
    """A copy, always in the one place where the honest files were made: stores know their text by
    its path and date."""
    folder = honest.with_name("case")
    shutil.rmtree(folder, ignore_errors=True)  # a worker died over it
    try:
        yield Path(shutil.copytree(honest, folder))
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def telling() -> Iterator[list[str]]:
    """Collects what is printed, also by native code."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield said
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            said += filter(None, [printed.getvalue(), file.read().decode(errors="replace")])


def work(pipe: Any, root: Path, kinds: Mapping[str, Kind]) -> None:
    """Answers cases until there are none; honest files are made where they are missing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    expected = {}
    for name, kind in kinds.items():
        folder = root / name
        if not folder.exists():
            kind.make(root / "case")
            (root / "case").rename(folder)
        with copied(folder) as copy:
            expected[name] = kind.load(copy)
    status = Path("/proc/self/status").read_text()
    held = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + SPARE, held + SPARE))
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            name, seed = pipe.recv()
            pipe.send(judge(kinds[name], f"{name} {seed}", root / name, expected[name]))


def trials(
    cases: int, seed: int, kinds: Mapping[str, Kind], patience: float = PATIENCE
) -> Iterator[tuple[str, str, str, str]]:
    """Kind, number, verdict and reason of each case."""
    names, context = list(kinds), multiprocessing.get_context("spawn")
    process = None
    with tempfile.TemporaryDirectory() as root:
        try:
            for i in range(cases):
                name, number = names[i % len(names)], f"{seed}.{i}"
                if process is None:
                    pipe, other = context.Pipe()
                    process = context.Process(target=work, args=(other, Path(root), kinds))
                    process.start()
                    other.close()
                    pipe.recv()
                try:
                    pipe.send((name, number))
                    verdict = pipe.recv() if pipe.poll(patience) else ("failure", "it hangs")
                except (EOFError, ConnectionError):
                    process.join()
                    verdict = "failure", f"the process died ({process.exitcode})"
                if verdict[1] == "it hangs" or not process.is_alive():
                    process.kill()
                    process.join()
                    process = None
                yield name, number, *verdict
        finally:
            if process is not None:
                pipe.close()
                process.join(PATIENCE)
                process.kill()


def main() -> None:
    config = tyro.cli(Config)
    counts = collections.Counter()
    kinds = {name: KINDS[name] for name in config.kinds or KINDS}
    for name, number, verdict, reason in trials(config.cases, config.seed, kinds):
        counts[name, verdict] += 1
        if verdict == "failure":
            print(f"{name} {number}: {reason}", flush=True)
    print(f"{'kind':20}  accepted  refused  failures")
    for name in kinds:
        row = [counts[name, verdict] for verdict in ("accepted", "refused", "failure")]
        print(f"{name:20}  {row[0]:8}  {row[1]:7}  {row[2]:8}")
    failures = sum(count for (_, verdict), count in counts.items() if verdict == "failure")
    print(f"{config.cases} cases, {failures} failures")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
