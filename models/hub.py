"""A hub id or a folder to a model and back: safetensors, read and written in byte ranges."""

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from models.base import LanguageModel
from models.hf_config import HFConfig
from runtime.errors import UserError

from .bloom import Bloom
from .llama import Llama

FAMILIES: dict[str, type[LanguageModel]] = {
    "bloom": Bloom,
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
}

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
GENERATION = "generation_config.json"
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
HEAD = "lm_head.weight"


# ---- from the hub --------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, *, weights: bool = True) -> Path:
    """The local folder of a folder or a hub id (`owner/name`, `owner/name@revision`).

    Downloads what is needed and not in the cache; without `weights` only config and tokenizer.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            check_links(path)
            return path
    except (OSError, RuntimeError, ValueError):
        pass  # a path as no file can have it
    name, _, revision = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        cause = "no such folder, and no hub id (owner/name, owner/name@revision)"
        raise UserError(f"{printable(str(source))}: {cause}")
    from huggingface_hub import errors, snapshot_download

    wanted = ["config.json", GENERATION, *TOKENIZER, *(WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except errors.GatedRepoError:
        cause = (
            "is gated: accept its terms on the hub, then log in with `hf auth login` or HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        cause = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        cause = "is no folder here and no repository on the hub, or a private one: check the"
        cause += " spelling, or log in with `hf auth login` or HF_TOKEN"
    except errors.HFValidationError:
        cause = "is no folder here and no valid hub id (owner/name, owner/name@revision)"
    except (errors.HTTPError, OSError, ValueError) as error:
        # Where the hub fails the cache is asked, whose error hides what the hub had answered.
        answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), None)
        if status in (401, 403):
            cause = "is closed to you: log in with `hf auth login` or HF_TOKEN"
        elif status is not None:
            cause = f"could not be fetched, the hub answered {status}: try again later"
        elif isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
            cause = "is not whole in the local cache and the hub cannot be reached: connect, or"
            cause += " name a folder"
        else:
            cause = f"could not be fetched, {printable(str(error))}"
    raise UserError(f"{source} {cause}")


def check_links(folder: Path) -> None:
    """No file of a checkpoint lies elsewhere, but in the cache of the hub, which is made of links.

    A folder may come from a stranger, and what it holds is copied into a student's.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in ("config.json", GENERATION, *TOKENIZER, *WEIGHTS, "*.safetensors"):
        for path in folder.glob(name):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in inside):
                raise UserError(
                    f"{path}: it is a link to a file outside of {folder}: put the file itself there"
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{path}: it is no file that can be read")


def printable(text: str) -> str:
    """On one line of some length, and safe to print: names in a checkpoint may hold anything."""
    text = text if len(text) < 400 else f"{text[:400]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# ---- loading -------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Leaf(NamedTuple):
    """An array of a model and the tensors it is made of: one, or one for each layer."""

    array: Any  # the array, or its shape and dtype
    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each tensor
    stacked: bool


def leaves(model: LanguageModel) -> list[Leaf]:
    """The arrays of a model (or of its outline) beside the names and shapes of their tensors."""
    entries = []
    structure = jax.tree.structure(model)
    axes_of = structure.flatten_up_to(sharding.axes(model))
    for (name, array), axes in zip(model.tensors(), axes_of, strict=True):
        name = name if name == HEAD else model.PREFIX + name
        stacked = axes[0] == "layers"
        layers = range(array.shape[0]) if stacked else (0,)
        shape = merge(axes[stacked:], array.shape[stacked:])
        entries.append(Leaf(array, tuple(map(name.format, layers)), shape, stacked))
    return entries


def merge(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on file: `embed` is a dimension of its own, the axes on either side are fused."""
    merged: list[int] = []
    fusing = False
    for name, size in zip(axes, shape, strict=True):
        if name == "embed" or not fusing:
            merged.append(size)
        else:
            merged[-1] *= size
        fusing = name != "embed"
    return tuple(merged)


def load(
    source: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None
) -> LanguageModel:
    """The model in a folder or on the hub, cast to `dtype` and laid over `mesh` if these are given.

    Each device reads its own part of the files. Without `dtype` every tensor stays as it is stored.
    """
    folder = fetch(source)
    family, config = read_config(folder)
    outline = eqx.filter_eval_shape(lambda: family(config, jax.random.key(0)))
    tensors = named(family, folder)
    wanted = leaves(outline)
    check(wanted, tensors, folder)
    if config.tied and HEAD in tensors:
        check_tied(tensors[HEAD], tensors[wanted[0].names[0]])
    shardings = [None] * len(wanted)
    if mesh is not None:
        shardings = jax.tree.leaves(sharding.specs(outline, mesh))
    arrays: dict[int, jax.Array] = {}
    # The largest first: while it is read, nothing else is held but what a copy of it may take.
    for i in sorted(range(len(wanted)), key=lambda i: -math.prod(wanted[i].array.shape)):
        leaf = wanted[i]
        parts = [tensors[name] for name in leaf.names]
        arrays[i] = place_leaf(leaf, parts, shardings[i], dtype)
    return jax.tree.unflatten(jax.tree.structure(outline), [arrays[i] for i in range(len(wanted))])


def named(family: type[LanguageModel], folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, by their full names: some checkpoints leave the prefix out."""
    tensors = read_index(folder)
    if any(name.startswith(family.PREFIX) for name in tensors):
        return tensors
    return {
        name if name == HEAD else family.PREFIX + name: tensor for name, tensor in tensors.items()
    }


def place_leaf(leaf: Leaf, parts: list[Tensor], where: Any, dtype: Any) -> jax.Array:
    shape = leaf.array.shape
    stored = {part.dtype for part in parts}
    if dtype is not None:
        target = np.dtype(dtype)
    else:
        target = stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    everything = (slice(None),) * len(shape)
    wanted = [everything]
    if where is not None:
        wanted = where.addressable_devices_indices_map(shape).values()
    outs = {ranges(index, shape): None for index in wanted}
    outs = {part: aligned(tuple(map(len, part)), target) for part in outs}
    if leaf.stacked:
        jobs = [
            job
            for layer, tensor in enumerate(parts)
            for job in split(
                [(p[1:], out[layer - p[0].start]) for p, out in outs.items() if layer in p[0]],
                tensor, shape[1:],
            )
        ]  # fmt: skip
    else:
        jobs = split(list(outs.items()), parts[0], shape)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: fill(*job), jobs))
    if where is None:  # not bound to the device, so that it can be laid over a mesh later
        return jax.device_put(outs[ranges(everything, shape)])
    return jax.make_array_from_callback(
        shape, where, lambda index: outs[ranges(index, shape)], dtype=target
    )


def ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can take over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


CHUNK = 1 << 24  # bytes read at a time

Part = tuple[tuple[range, ...], np.ndarray]  # which of a tensor's rows, columns ..., and for them


def split(
    outs: list[Part], tensor: Tensor, shape: tuple[int, ...]
) -> list[tuple[list[Part], Tensor, tuple[int, ...]]]:
    """The arguments of calls of `fill` that fill all of `outs`, and read nothing twice."""
    step = max(1, CHUNK // (math.prod(shape[1:]) * tensor.dtype.itemsize))
    alike: dict[range, list[Part]] = {}
    for part, out in outs:
        alike.setdefault(part[0], []).append((part, out))
    return [
        (
            [((rows[i : i + step], *part[1:]), out[i : i + step]) for part, out in some],
            tensor, shape,
        )
        for rows, some in alike.items()
        for i in range(0, len(rows), step)
    ]  # fmt: skip


def fill(outs: list[Part], tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Reads some rows of a tensor, seen in this shape, into arrays for parts of them."""
    rows = outs[0][0][0]
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start + rows.start * math.prod(shape[1:]) * tensor.dtype.itemsize)
        out = outs[0][1]
        if out.shape[1:] == shape[1:] and out.dtype == tensor.dtype:  # then there is but this one
            read_exactly(file, out, tensor)
            return
        found = np.empty((len(rows), *shape[1:]), tensor.dtype)
        read_exactly(file, found, tensor)
        for part, out in outs:
            out[:] = found[(slice(None), *(slice(axis.start, axis.stop) for axis in part[1:]))]


def read_exactly(file: Any, out: np.ndarray, tensor: Tensor) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))
    while view:
        count = file.readinto(view)
        if not count:
            raise UserError(f"{tensor.file}: it ended early, it was changed while it was read")
        view = view[count:]


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so {path.parent} is no checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON, {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object was expected, found a {type(found).__name__}")
    return found


SAMPLE = 1 << 16  # bytes, of which a fingerprint takes up to a thousand from a file


def fingerprint(folder: Path) -> str:
    """Of a model's config and weights, wherever and since whenever they lie there."""
    hash = hashlib.blake2b(digest_size=16)
    for path in sorted({folder / "config.json", *folder.glob("*.safetensors")}):
        size = path.stat().st_size
        hash.update(f"{path.name} {size}\n".encode())
        count = min(1 << 10, -(-size // SAMPLE))
        with open(path, "rb", buffering=0) as file:
            for start in np.linspace(0, max(0, size - SAMPLE), count).astype(int).tolist():
                hash.update(os.pread(file.fileno(), SAMPLE, start))
    return hash.hexdigest()


def config(source: str | os.PathLike) -> Any:
    """The config alone of a model in a folder or on the hub."""
    return read_config(fetch(source, weights=False))[1]


def read_config(folder: Path) -> tuple[type[LanguageModel], Any]:
    path = folder / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        found = reprlib.repr(kind)
        raise UserError(f"{path}: model_type {found} is not supported, only {known} are")
    family = FAMILIES[kind]
    try:
        return family, family.Config.read(HFConfig(raw))
    except UserError as error:
        raise UserError(f"{path}: {printable(str(error))}") from None


def read_index(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f", only {pickles[0].name}" if pickles else ""
        raise UserError(
            f"{folder}: it holds no model.safetensors and no {index.name}{found}; pickles (.bin,"
            " .pt) are never read: convert them with transformers, from_pretrained(...) then"
            " save_pretrained(...)"
        )
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise UserError(f"{index}: weight_map must give the file of each tensor")
    for name in where.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            found = reprlib.repr(name)
            raise UserError(f"{index}: {found} is not the name of a safetensors file beside it")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if not (folder / name).exists():
            raise UserError(f"{index}: {name} is missing from {folder}")
        for tensor, at in read_header(folder / name).items():
            if where.get(tensor) != name:
                raise UserError(
                    f"{folder / name}: it holds {printable(tensor)}, which the index does not say"
                )
            tensors[tensor] = at
    lost = [tensor for tensor in where if tensor not in tensors]
    if lost:
        raise UserError(f"{index}: {printable(lost[0])} is not in {where[lost[0]]}")
    return tensors


def read_header(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, "numpy") as file, open(path, "rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
            for name in file.offset_keys():  # in the order of the file, which has no gaps
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    known = ", ".join(DTYPES)
                    raise UserError(
                        f"{path}: {printable(name)} has dtype {part.get_dtype()}, only {known} are"
                        " supported"
                    )
                tensors[name] = Tensor(path, start, DTYPES[part.get_dtype()], (*part.get_shape(),))
                start += math.prod(part.get_shape()) * tensors[name].dtype.itemsize
    except (SafetensorError, OSError, ValueError) as error:
        cause = printable(str(error))
        raise UserError(f"{path}: not a whole safetensors file, {cause}") from None
    return tensors


def check(wanted: list[Leaf], tensors: dict[str, Tensor], folder: Path) -> None:
    """Every tensor is there once, in its shape, and none is left over."""
    shapes = {name: leaf.shape for leaf in wanted for name in leaf.names}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{folder}: tensor {name} of shape {shape} is missing")
        if tensors[name].shape != shape:
            found = tensors[name]
            raise UserError(
                f"{found.file}: tensor {name} has shape {found.shape}, the config asks for {shape}"
            )
    for name, tensor in tensors.items():
        if name not in shapes and name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            found = printable(name)
            raise UserError(f"{tensor.file}: tensor {found} is not one that this config asks for")


def check_tied(head: Tensor, embedding: Tensor) -> None:
    """A head that is stored although it is tied must be the embedding."""
    equal = head.shape == embedding.shape and head.dtype == embedding.dtype
    rows = max(1, CHUNK // max(1, embedding.shape[1] * embedding.dtype.itemsize))
    for first in range(0, embedding.shape[0] if equal else 0, rows):
        part = range(first, min(first + rows, head.shape[0])), range(head.shape[1])
        a, b = (np.empty(tuple(map(len, part)), tensor.dtype) for tensor in (head, embedding))
        fill([(part, a)], head, head.shape)
        fill([(part, b)], embedding, head.shape)
        equal = equal and a.tobytes() == b.tobytes()
    if not equal:
        raise UserError(f"{head.file}: {HEAD} differs from the embedding it is tied to")


def abstract(source: str | os.PathLike) -> LanguageModel:
    """The model of a folder or hub id as `load` gives it, without reading (or fetching) a weight.

    Each leaf has the dtype that is stored; where no file says so, the one that the config names.
    """
    folder = fetch(source, weights=False)
    family, config = read_config(folder)
    empty = eqx.filter_eval_shape(family, config, jax.random.key(0))
    raw = read_json(folder / "config.json")
    usual = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    usual = usual if usual in (dtype.name for dtype in CODES) else "float32"
    try:
        tensors = named(family, folder)
    except UserError:
        tensors = {}
    typed = []
    for leaf in leaves(empty):
        stored = tensors.get(leaf.names[0])
        dtype = jnp.dtype(usual) if stored is None else stored.dtype
        typed.append(jax.ShapeDtypeStruct(leaf.array.shape, dtype))
    return jax.tree.unflatten(jax.tree.structure(empty), typed)


# ---- saving --------------------------------------------------------------------------------------


def save(
    model: LanguageModel,
    folder: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    notes: Mapping[str, str] | None = None,
    shard_size: int = 5_000_000_000,
) -> None:
    """A checkpoint that Hugging Face tools load, with the tokenizer of another folder or hub id.

    The folder appears when it is whole, with `notes` as further files in it; an older checkpoint of
    this name is replaced.
    """
    try:
        folder = Path(folder).expanduser().resolve()
        free = replaceable(folder, notes or {})
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: it cannot be written, {error}") from None
    if not free:
        raise UserError(
            f"{folder}: it exists and is more than a checkpoint, so it is not replaced: choose"
            " another name"
        )
    texts = None if tokenizer is None else fetch(tokenizer, weights=False)
    if jax.process_index() != 0:  # the first one writes; the others lend what they hold
        for leaf in leaves(model):
            for part in separate(leaf):
                sharding.to_host(part)
        return
    if texts is not None and not any((texts / name).exists() for name in TOKENIZER):
        raise UserError(f"{tokenizer}: it holds no tokenizer, none of {', '.join(TOKENIZER)}")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_weights(model, partial, shard_size)
        config = model.config
        ids = {"bos_token_id": config.bos, "eos_token_id": config.eos, "pad_token_id": config.pad}
        stored = model.embedding.dtype.name
        common = {"model_type": config.model_type, "tie_word_embeddings": config.tied}
        dtypes = {"dtype": stored, "torch_dtype": stored}  # the newer and the older name
        write_json(partial / "config.json", common | ids | dtypes | config.write())
        write_json(partial / GENERATION, {key: ids[key] for key in ids if ids[key] is not None})
        for name in (GENERATION, *TOKENIZER):
            if texts is not None and (texts / name).exists():
                shutil.copyfile(texts / name, partial / name)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: it cannot be written, {error.strerror or error}") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)


def replaceable(folder: Path, notes: Iterable[str] = ()) -> bool:
    """There is nothing, or a checkpoint alone: a clone, a run, or somebody's own file is more."""
    if not folder.is_dir():
        return not folder.exists()
    found = {path.name: path.is_file() for path in folder.iterdir()}
    ours = ("config.json", GENERATION, "README.md", *TOKENIZER, *WEIGHTS, *notes)
    alone = all(found.values()) and all(any(fnmatch(name, own) for own in ours) for name in found)
    whole = "config.json" in found and not found.keys().isdisjoint(WEIGHTS)
    return not found or (alone and whole)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def separate(leaf: Leaf) -> Iterator[jax.Array]:
    """The tensors of a leaf, each an array of its own: jax keeps what it has copied to the host as
    long as the array lives that it was copied from."""
    if not leaf.stacked:
        yield jnp.copy(leaf.array)
        return
    for layer in range(len(leaf.names)):
        yield leaf.array[layer]


def write_weights(model: LanguageModel, folder: Path, shard_size: int) -> None:
    """One leaf after the other, each tensor to its place in files laid out beforehand."""
    wanted = leaves(model)
    layout: list[dict[str, dict[str, Any]]] = [{}]
    sizes = [0]
    for leaf in wanted:
        for name in leaf.names:
            size = math.prod(leaf.shape) * leaf.array.dtype.itemsize
            if sizes[-1] and sizes[-1] + size > shard_size:
                layout.append({})
                sizes.append(0)
            layout[-1][name] = {
                "dtype": CODES[leaf.array.dtype],
                "shape": leaf.shape,
                "data_offsets": (sizes[-1], sizes[-1] + size),
            }
            sizes[-1] += size
    files = ["model.safetensors"]
    if len(layout) > 1:
        count = len(layout)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        where = {name: file for file, part in zip(files, layout, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    starts: dict[str, tuple[str, int]] = {}
    for file, part in zip(files, layout, strict=True):
        header = json.dumps({"__metadata__": {"format": "pt"}} | part).encode()
        header += b" " * (-len(header) % 8)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
        for name, entry in part.items():
            starts[name] = (file, 8 + len(header) + entry["data_offsets"][0])
    for leaf in wanted:
        for name, part in zip(leaf.names, separate(leaf), strict=True):
            file, start = starts[name]
            with open(folder / file, "r+b") as out:
                out.seek(start)
                value = np.ascontiguousarray(sharding.to_host(part))
                out.write(value.reshape(-1).view(np.uint8))
    for file in files:
        with open(folder / file, "rb") as out:
            os.fsync(out.fileno())
