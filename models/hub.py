"""A hub id or a folder to a model and back: safetensors, read and written in parts."""

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
from runtime import files, report
from runtime.errors import UserError

from .bloom import Bloom
from .llama import Llama

FAMILIES: dict[str, type[LanguageModel]] = {
    "bloom": Bloom,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama),
}

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
GENERATION = "generation_config.json"
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
HEAD = "lm_head.weight"


# ---- from the hub --------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, *, weights: bool = True) -> Path:
    """The local folder of a folder or a hub id (`owner/name`, `owner/name@revision`).

    Downloads what is needed and not in the cache; without `weights` only config and tokenizer.
    """
    wanted = ["config.json", GENERATION, *TOKENIZER, *(WEIGHTS if weights else ())]
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            # A folder may come from a stranger, and what it holds is copied into a student's.
            names = (*wanted, *WEIGHTS, "*.safetensors")
            files.check_links(path, [file for name in names for file in path.glob(name)])
            return path
    except (OSError, RuntimeError, ValueError):
        pass  # a path as no file can have it
    name, _, revision = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        cause = "no such folder, and no hub id (owner/name, owner/name@revision)"
        raise UserError(f"{files.printable(source)}: {cause}")
    from huggingface_hub import errors, snapshot_download, utils

    utils.disable_progress_bars()  # they would run into ours
    try:
        with report.progress(f"fetching {name}"):
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (errors.HTTPError, OSError, ValueError) as error:
        # Where the hub fails the cache is asked, whose error hides what the hub had answered.
        answers = [e for e in (error, error.__cause__) if getattr(e, "response", None) is not None]
        raise UserError(
            f"{source} is no folder here and could not be fetched:"
            f" {files.printable((answers or [error])[0])} (if it is private or gated, log in with"
            " `hf auth login` or HF_TOKEN)"
        ) from None


# ---- loading -------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor on file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, *index: slice) -> np.ndarray:
        """A part of it. The file is opened anew: the pages of one that stays open stay resident."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "numpy") as file:
                return file.get_slice(self.name)[index]
        except (SafetensorError, OSError) as error:
            cause = files.printable(error)
            raise UserError(f"{self.file}: it was changed while it was read, {cause}") from None


class Leaf(NamedTuple):
    """An array of a model and the tensors it is made of: one, or one for each layer."""

    array: Any  # the array, or its shape and dtype
    names: tuple[str, ...]
    axes: tuple[str, ...]  # of each tensor
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each tensor on file."""
        return tuple(len(rows) for rows in self.on_file((slice(None),) * self.array.ndim))

    def on_file(self, index: tuple[slice, ...]) -> list[range]:
        """The part of each tensor that holds `index` of the array.

        `embed` is a dimension of its own there. The axes on either side of it are fused, and only
        the first of them is ever split.
        """
        dimensions: list[range] = []
        sizes = self.array.shape[self.stacked :]
        previous = "embed"
        for axis, size, part in zip(self.axes, sizes, index[self.stacked :], strict=True):
            if "embed" in (axis, previous):
                dimensions.append(range(*part.indices(size)))
            else:
                first = dimensions.pop()
                dimensions.append(range(first.start * size, first.stop * size))
            previous = axis
        return dimensions


def leaves(model: LanguageModel) -> list[Leaf]:
    """The arrays of a model, or of their shapes, with the names and axes of their tensors."""
    entries = []
    axes_of = jax.tree.structure(model).flatten_up_to(sharding.axes(model))
    for (name, array), axes in zip(model.tensors(), axes_of, strict=True):
        name = name if name == HEAD else model.PREFIX + name
        stacked = axes[0] == "layers"
        layers = range(array.shape[0]) if stacked else (0,)
        entries.append(Leaf(array, tuple(map(name.format, layers)), axes[stacked:], stacked))
    return entries


def load(
    source: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None
) -> LanguageModel:
    """The model in a folder or on the hub, cast to `dtype` and laid over `mesh` if these are given.

    Each device reads its own part of the files. Without `dtype` every tensor stays as it is stored.
    """
    folder = fetch(source)
    family, config = read_config(folder)
    abstract = eqx.filter_eval_shape(lambda: family(config, jax.random.key(0)))
    tensors = read_index(folder, family)
    entries = leaves(abstract)
    check(entries, tensors, folder)
    if config.tied and HEAD in tensors:
        check_tied(tensors[HEAD], tensors[entries[0].names[0]])
    shardings = [None] * len(entries)
    if mesh is not None:
        shardings = jax.tree.leaves(sharding.specs(abstract, mesh))
    arrays: dict[int, jax.Array] = {}
    # The largest first: while it is read, nothing else is held but what a copy of it may take.
    order = sorted(range(len(entries)), key=lambda i: -math.prod(entries[i].array.shape))
    for i in report.track(order, f"loading {folder.name}", len(order)):
        parts = [tensors[name] for name in entries[i].names]
        arrays[i] = place_leaf(entries[i], parts, shardings[i], dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[i] for i in sorted(arrays)])


def place_leaf(leaf: Leaf, tensors: list[Tensor], where: Any, dtype: Any) -> jax.Array:
    stored = {tensor.dtype for tensor in tensors}
    if dtype is None:
        dtype = stored.pop() if len(stored) == 1 else np.float32
    dtype, shape, parts = np.dtype(dtype), leaf.array.shape, {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)  # devices that hold the same share it
        if key not in parts:
            parts[key] = read_leaf(leaf, tensors, index, dtype)
        return parts[key]

    if where is None:  # not bound to the device, so that it can be laid over a mesh later
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, where, part, dtype=dtype)


CHUNK = 1 << 24  # bytes read at a time


def read_leaf(
    leaf: Leaf, tensors: list[Tensor], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part of a leaf at `index`, read in blocks of rows."""
    rows, *columns = leaf.on_file(index)
    if leaf.stacked:
        tensors = tensors[index[0]]
    shape = tuple(
        len(range(size)[part]) for size, part in zip(leaf.array.shape, index, strict=True)
    )
    array = aligned(shape, dtype)
    outs = array.reshape(len(tensors), len(rows), *map(len, columns))
    step = max(1, CHUNK // (math.prod(map(len, columns)) * dtype.itemsize))

    def fill(job: tuple[int, int]) -> None:
        i, start = job
        some, *rest = (
            slice(part.start, part.stop) for part in (rows[start : start + step], *columns)
        )
        outs[i, start : start + step] = tensors[i].read(some, *rest)

    jobs = [(i, start) for i in range(len(tensors)) for start in range(0, len(rows), step)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, jobs))
    return array


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can take over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


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
    if not path.exists():
        raise UserError(f"{path}: no such file, so {folder} is no checkpoint")
    settings = HFConfig(files.read_json(path, ""))
    kind = settings.peek("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{path}: model_type {reprlib.repr(kind)} is not supported, only {known} are"
        )
    family = FAMILIES[kind]
    try:
        config = family.Config.read(settings)
        settings.reject_unread(family.Config.HARMLESS)
        return family, config
    except UserError as error:
        raise UserError(f"{path}: {files.printable(error)}") from None


def read_index(folder: Path, family: type[LanguageModel]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its full name: those of a bare decoder lack the prefix."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        stored = read_header(single)
    elif index.exists():
        stored = read_shards(index)
    else:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        only = f", only {pickles[0].name}" if pickles else ""
        raise UserError(
            f"{folder}: it holds no model.safetensors and no {index.name}{only}; pickles (.bin,"
            " .pt) are never read: convert them with transformers, from_pretrained(...) then"
            " save_pretrained(...)"
        )
    tensors = {tensor.name: tensor for tensor in stored}
    if any(name.startswith(family.PREFIX) for name in tensors):
        return tensors
    return {name if name == HEAD else family.PREFIX + name: x for name, x in tensors.items()}


def read_shards(index: Path) -> list[Tensor]:
    shards = files.read_json(index, "").get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index}: weight_map must give the file of each tensor")
    for name in shards.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            what = reprlib.repr(name)
            raise UserError(f"{index}: {what} is not the name of a safetensors file beside it")
    paths = [index.parent / name for name in sorted(set(shards.values()))]
    stored = [tensor for path in paths for tensor in read_header(path)]
    if wrong := {(tensor.name, tensor.file.name) for tensor in stored} ^ set(shards.items()):
        name, file = min(wrong)
        raise UserError(f"{index}: it and {file} do not agree on {files.printable(name)}")
    return stored


def read_header(path: Path) -> list[Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            described = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        cause = files.printable(error)
        raise UserError(f"{path}: not a whole safetensors file, {cause}") from None
    for name, (code, _) in described.items():
        if code not in DTYPES:
            what, known = f"{files.printable(name)} has dtype {code}", ", ".join(DTYPES)
            raise UserError(f"{path}: {what}, only {known} are supported")
    return [Tensor(path, name, DTYPES[code], shape) for name, (code, shape) in described.items()]


def check(entries: list[Leaf], tensors: dict[str, Tensor], folder: Path) -> None:
    """Every tensor is there once, in its shape, and none is left over."""
    shapes = {name: leaf.shape for leaf in entries for name in leaf.names}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{folder}: tensor {name} of shape {shape} is missing")
        file, _, _, stored = tensors[name]
        if stored != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {stored}, the config asks for {shape}"
            )
    for name, tensor in tensors.items():
        if name not in shapes and name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            what = files.printable(name)
            raise UserError(f"{tensor.file}: tensor {what} is not one that this config asks for")


def check_tied(head: Tensor, embedding: Tensor) -> None:
    """A head that is stored although it is tied must be the embedding."""
    equal = head.shape == embedding.shape and head.dtype == embedding.dtype
    step = max(1, CHUNK // max(1, embedding.shape[1] * embedding.dtype.itemsize))
    for start in range(0, embedding.shape[0] if equal else 0, step):
        rows = slice(start, min(start + step, embedding.shape[0]))
        equal = equal and head.read(rows).tobytes() == embedding.read(rows).tobytes()
    if not equal:
        raise UserError(f"{head.file}: {HEAD} differs from the embedding it is tied to")


def abstract(source: str | os.PathLike) -> LanguageModel:
    """The model of a folder or hub id as `load` gives it, without reading (or fetching) a weight.

    Each leaf has the dtype that is stored; where no file says so, the one that the config names.
    """
    folder = fetch(source, weights=False)
    family, config = read_config(folder)
    empty = eqx.filter_eval_shape(family, config, jax.random.key(0))
    raw = files.read_json(folder / "config.json")
    usual = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    usual = jnp.dtype(usual if usual in (dtype.name for dtype in CODES) else "float32")
    try:
        tensors = read_index(folder, family)
    except UserError:
        tensors = {}
    dtypes = [getattr(tensors.get(x.names[0]), "dtype", usual) for x in leaves(empty)]
    arrays, structure = jax.tree.flatten(empty)
    typed = map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), arrays, dtypes)
    return jax.tree.unflatten(structure, typed)


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
    notes = notes or {}
    with files.disk_errors(Path(folder), ""):
        folder = Path(folder).expanduser().resolve()
        if not replaceable(folder, notes):
            raise UserError(
                f"{folder}: it exists and is more than a checkpoint, so it is not replaced: choose"
                " another name"
            )
    texts = None if tokenizer is None else fetch(tokenizer, weights=False)
    if jax.process_index() != 0:  # the first one writes; the others lend what they hold
        for part in separate(model):
            sharding.to_host(part)
        return
    if texts is not None and not any((texts / name).exists() for name in TOKENIZER):
        raise UserError(f"{tokenizer}: it holds no tokenizer, none of {', '.join(TOKENIZER)}")
    config = model.config
    ids = {"bos_token_id": config.bos, "eos_token_id": config.eos, "pad_token_id": config.pad}
    stored = model.embedding.dtype.name
    common = {"model_type": config.model_type, "tie_word_embeddings": config.tied}
    common |= ids | {"dtype": stored, "torch_dtype": stored}  # the newer and the older name
    generation = {key: value for key, value in ids.items() if value is not None}
    with files.atomic_folder(folder, "") as partial:
        write_weights(model, partial, shard_size)
        write_json(partial / "config.json", common | config.write())
        write_json(partial / GENERATION, generation)
        for name in (GENERATION, *TOKENIZER):
            if texts is not None and (texts / name).exists():
                shutil.copyfile(texts / name, partial / name)
        for name, text in notes.items():
            (partial / name).write_text(text)


def replaceable(folder: Path, notes: Iterable[str] = ()) -> bool:
    """There is nothing, or a checkpoint alone: a clone, a run, or somebody's own file is more."""
    if not folder.is_dir():
        return not folder.exists()
    present = {path.name: path.is_file() for path in folder.iterdir()}
    ours = ("config.json", GENERATION, "README.md", *TOKENIZER, *WEIGHTS, *notes)
    alone = all(is_file and any(fnmatch(x, own) for own in ours) for x, is_file in present.items())
    whole = "config.json" in present and not present.keys().isdisjoint(WEIGHTS)
    return not present or (alone and whole)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def separate(model: LanguageModel) -> Iterator[jax.Array]:
    """Every tensor of a model, in an array of its own: jax keeps what it has copied to the host for
    as long as the array lives that it was copied from."""
    for leaf in leaves(model):
        for i in range(len(leaf.names)):
            yield leaf.array[i] if leaf.stacked else jnp.copy(leaf.array)


def write_weights(model: LanguageModel, folder: Path, shard_size: int) -> None:
    """Writes tensor after tensor: safetensors' own writer would hold those of a whole file."""
    shards: list[dict[str, dict[str, Any]]] = [{}]
    size = 0
    for leaf in leaves(model):
        for name in leaf.names:
            count = math.prod(leaf.shape) * leaf.array.dtype.itemsize
            if size and size + count > shard_size:
                shards.append({})
                size = 0
            offsets = size, size + count
            entry = {"dtype": CODES[leaf.array.dtype], "shape": leaf.shape, "data_offsets": offsets}
            shards[-1][name] = entry
            size += count
    paths = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        paths = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        ends = [list(shard.values())[-1]["data_offsets"][1] for shard in shards]
        where = {name: path for path, shard in zip(paths, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(ends)}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    tensors = separate(model)
    for path, shard in zip(paths, shards, strict=True):
        header = json.dumps({"__metadata__": {"format": "pt"}} | shard).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, part in zip(shard, tensors, strict=False):
                value = np.ascontiguousarray(sharding.to_host(part))
                file.write(value.reshape(-1).view(np.uint8))
