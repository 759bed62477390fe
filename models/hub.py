"""A hub id or a folder to a model and back: safetensors, read and written in parts.

`fetch` asks the hub, `load` reads, `config` and `abstract` read all but the weights, `save` writes.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

import sharding
from models.base import LanguageModel
from models.hf_config import HFConfig
from runtime import buckets, commits, files, report
from runtime.errors import UserError

from .bloom import Bloom
from .llama import Llama

Source = str | os.PathLike

FAMILIES: dict[str, type[LanguageModel]] = {
    "bloom": Bloom,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama),
}

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SINGLE, INDEX, "model-*-of-*.safetensors")  # as `save` names them
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
GENERATION = "generation_config.json"
SHARD = re.compile(r"(?:\w[\w.-]{0,200}/)*[\w.-]{1,200}\.safetensors", re.ASCII)
HEAD = "lm_head.weight"

BLOCK = 1 << 22  # bytes read at a time


def fetch(source: Source, *, weights: bool = True) -> Path:
    """The local folder of a folder or a hub id (`owner/name`, `owner/name@revision`), downloaded
    where the cache lacks it; without `weights` only config and tokenizer."""
    wanted = ["config.json", GENERATION, *TOKENIZER, *((SINGLE, INDEX) if weights else ())]
    path = buckets.local_path(source)
    if os.path.isdir(path):
        # A folder may come from a stranger, and what it holds is copied into a student's.
        names = (*wanted, INDEX, "*.safetensors")
        files.check_links(path, (file for name in names for file in path.glob(name)))
        return path
    if not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?" + commits.REVISION, str(source)):
        what = files.printable(source)
        raise UserError(f"{what}: no such folder, and no hub id (owner/name, owner/name@revision)")
    if weights:
        config(source)  # what is not supported is refused before its weights are fetched
    from huggingface_hub import snapshot_download

    name, problem = str(source).partition("@")[0], "is no folder here and could not be fetched"
    with files.library_errors(f"{source} {problem}"), report.progress(f"fetching {name}"):
        commit = commits.commit(str(source))
        options = {"revision": commit, "local_files_only": commit in commits.CACHED}
        folder = Path(snapshot_download(name, allow_patterns=wanted, **options))
        if weights and (shards := sorted(set(index(folder).values()))):
            snapshot_download(name, allow_patterns=shards, **options)
        return folder


class Tensor(NamedTuple):
    """A tensor on file, whose bytes begin at `start`."""

    name: str
    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def blocks(self, rows: range) -> list[range]:
        """These rows in parts that are read at a time, small enough for the caches of a core."""
        step = max(1, BLOCK // (math.prod(self.shape[1:]) * self.dtype.itemsize))
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    def read(self, rows: range) -> np.ndarray:
        width = math.prod(self.shape[1:])
        start = self.start + rows.start * width * self.dtype.itemsize
        with files.library_errors(f"{self.file} changed while it was read"):
            numbers = np.fromfile(self.file, self.dtype, len(rows) * width, offset=start)
            return numbers.reshape(len(rows), *self.shape[1:])


class Leaf(NamedTuple):
    """An array of a model and the tensors it is made of: one, or one for each layer."""

    array: Any  # the array, or its shape and dtype
    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each tensor on file
    stacked: bool


def leaves(model: LanguageModel) -> list[Leaf]:
    """The arrays of a model, or of their shapes, with the names and shapes of their tensors: on
    file `embed` is a dimension of its own, and the axes on either side of it are fused."""
    entries = []
    axes_of = jax.tree.structure(model).flatten_up_to(sharding.axes(model))
    for (name, array), axes in zip(model.tensors(), axes_of, strict=True):
        name = name if name == HEAD else model.PREFIX + name
        stacked = axes[0] == "layers"
        names = tuple(map(name.format, range(array.shape[0]) if stacked else (0,)))
        sizes = zip(axes[stacked:], array.shape[stacked:], strict=True)
        fused = itertools.groupby(sizes, lambda pair: pair[0] == "embed")
        shape = tuple(math.prod(size for _, size in group) for _, group in fused)
        entries.append(Leaf(array, names, shape, stacked))
    return entries


def load(source: Source, *, dtype: Any = None, mesh: Mesh | None = None) -> LanguageModel:
    """The model in a folder or on the hub; each device of a `mesh` reads its own part of the files.
    Without `dtype` every tensor stays as it is stored."""
    folder = fetch(source)
    shapes = abstract(folder)
    tensors, entries = read_index(folder, shapes.PREFIX), leaves(shapes)
    check(entries, tensors, folder, shapes.config.tied)
    placement = [None] * len(entries)
    if mesh is not None:
        placement = jax.tree.leaves(sharding.specs(shapes, mesh))
    arrays: list[Any] = [None] * len(entries)
    # The largest first: while it is read, nothing else is held but what a copy of it may take.
    order = sorted(range(len(entries)), key=lambda i: -math.prod(entries[i].array.shape))
    for i in report.track(order, f"loading {folder.name}", len(order)):
        parts = [tensors[name] for name in entries[i].names]
        arrays[i] = read_leaf(entries[i], parts, placement[i], dtype)
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def read_leaf(leaf: Leaf, tensors: list[Tensor], where: Any, dtype: Any) -> jax.Array:
    """An array from its tensors; each row is read once, for all devices that hold parts of it."""
    stored = {tensor.dtype for tensor in tensors}
    if dtype is None:
        dtype = stored.pop() if len(stored) == 1 else np.float32
    dtype, shape = np.dtype(dtype), leaf.array.shape
    place = where or SingleDeviceSharding(jax.local_devices()[0])
    local, indices = place.shard_shape(shape), place.addressable_devices_indices_map(shape).values()

    def region(index: tuple[slice, ...]) -> tuple[range, ...]:
        return tuple(range(n)[part] for n, part in zip(shape, index, strict=True))[leaf.stacked :]

    parts = {key: aligned(local, dtype) for key in set(map(region, indices))}
    tensors = [tensor._replace(shape=shape[leaf.stacked :]) for tensor in tensors]

    def fill(job: tuple[int, range]) -> None:
        layer, rows = job
        block = tensors[layer].read(rows)
        for (first, *rest), part in parts.items():
            if rows.start in first:
                part = part[layer] if leaf.stacked else part
                columns = (slice(x.start, x.stop) for x in rest)
                part[rows.start - first.start :][: len(rows)] = block[:, *columns]

    jobs = [
        (layer, block)
        for layer, tensor in enumerate(tensors)
        for rows in {first for first, *_ in parts}
        for block in tensor.blocks(rows)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, jobs))
    if where is None:  # not bound to the device, so that it can be laid over a mesh later
        return jax.device_put(parts.popitem()[1])
    return jax.make_array_from_callback(shape, where, lambda x: parts[region(x)], dtype=dtype)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can take over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def fingerprint(folder: Path) -> str:
    """Of all bytes of a model's config and weights, wherever and since whenever they lie there."""
    names = {"config.json", *(index(folder).values() or [SINGLE])}
    names = sorted(name for name in names if (folder / name).exists())
    with ThreadPoolExecutor() as pool, report.progress(f"hashing {folder.name}"):
        paths = [folder / name for name in names]
        sums = dict(zip(names, pool.map(_sha256, paths), strict=True))
    return files.digest(sums)


def _sha256(path: Path) -> str:
    """Of a file; the hub's cache names large ones by it, and of others it is remembered."""
    path, stat = path.resolve(), path.stat()
    if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name
    facts = [str(path), stat.st_ino, stat.st_size, stat.st_ctime_ns]
    memory = files.cache_folder() / "fingerprints" / files.digest(facts)
    with contextlib.suppress(UserError, KeyError):
        return files.read_json(memory)["sha256"]
    with open(path, "rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_ctime > 2:  # else it may change again before the clock ticks
        with contextlib.suppress(UserError, OSError):
            files.write_json(memory, {"sha256": value})
    return value


def config(source: Source) -> Any:
    """The config alone of a model in a folder or on the hub."""
    folder = fetch(source, weights=False)
    path = folder / "config.json"
    name = path if os.path.isdir(buckets.local_path(source)) else source
    if not path.exists():
        raise UserError(f"{path}: no such file, so {folder} is no checkpoint")
    settings = HFConfig(files.read_json(path, ""))
    kind = settings.peek("model_type")
    if str(kind) not in FAMILIES:
        what, known = reprlib.repr(kind), ", ".join(FAMILIES)
        raise UserError(f"{name}: model_type {what} is not supported, only {known} are")
    try:
        config = FAMILIES[kind].Config.read(settings)
        settings.reject_unread(config.HARMLESS)
        return config
    except UserError as error:
        raise UserError(f"{name}: {files.printable(error)}") from None


def seq_len(asked: int | None, usual: int, *sources: Source) -> int:
    """Tokens of a window: as asked for, or the usual number as far as these models can."""
    for source in sources:
        longest = config(source).longest
        if asked is not None and asked > longest:
            raise UserError(f"--seq-len {asked}: {source} was made for {longest} positions")
        usual = min(usual, longest)
    return usual if asked is None else asked


def index(folder: Path) -> dict[str, str]:
    """The file of each tensor of a checkpoint in shards; of any other checkpoint, nothing."""
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return {}
    shards = files.read_json(path, "").get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: weight_map must give the file of each tensor")
    for name in shards.values():
        if not (isinstance(name, str) and SHARD.fullmatch(name)):
            what = reprlib.repr(name)
            raise UserError(f"{path}: {what} is not the name of a safetensors file beside it")
    files.check_links(folder, (folder / name for name in set(shards.values())))
    return shards


def read_index(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its full name: those of a bare decoder lack the prefix."""
    if shards := index(folder):
        stored = [x for name in sorted(set(shards.values())) for x in read_header(folder / name)]
        places = {(x.name, str(x.file.relative_to(folder))) for x in stored}
        if wrong := places ^ set(shards.items()):
            name, file = min(wrong)
            what = f"it and {file} do not agree on {files.printable(name)}"
            raise UserError(f"{folder / INDEX}: {what}")
    elif (folder / SINGLE).exists():
        stored = read_header(folder / SINGLE)
    else:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        only = f", only {pickles[0].name}" if pickles else ""
        remedy = "convert them with transformers, from_pretrained(...) then save_pretrained(...)"
        what = f"{folder}: it holds no {SINGLE} and no {INDEX}{only}"
        raise UserError(f"{what}; pickles are never read: {remedy}")
    bare = not any(tensor.name.startswith(prefix) for tensor in stored)
    return {prefix + x.name if bare and x.name != HEAD else x.name: x for x in stored}


def read_header(path: Path) -> list[Tensor]:
    from safetensors import safe_open

    with (
        files.library_errors(f"{path}: not a whole safetensors file"),
        safe_open(path, "numpy") as file,
    ):
        parts = {name: file.get_slice(name) for name in file.offset_keys()}
        described = [(name, x.get_dtype(), tuple(x.get_shape())) for name, x in parts.items()]
        end = path.stat().st_size
    tensors = []
    for name, code, shape in reversed(described):
        if code not in DTYPES:
            what, known = f"{files.printable(name)} has dtype {code}", ", ".join(DTYPES)
            raise UserError(f"{path}: {what}, only {known} are supported")
        end -= math.prod(shape) * DTYPES[code].itemsize  # they fill the file to its end
        tensors.append(Tensor(name, path, end, DTYPES[code], shape))
    return tensors[::-1]


def check(entries: list[Leaf], tensors: dict[str, Tensor], folder: Path, tied: bool) -> None:
    """Every tensor is there once, in its shape, and none is left over; a tied head is no other."""
    shapes = {name: leaf.shape for leaf in entries for name in leaf.names}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{folder}: tensor {name} of shape {shape} is missing")
        file, stored = tensors[name].file, tensors[name].shape
        if stored != shape:
            what = f"tensor {name} has shape {stored}, the config asks for {shape}"
            raise UserError(f"{file}: {what}")
    for name, tensor in tensors.items():
        if name not in shapes and name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            what = f"tensor {files.printable(name)} is not one that this config asks for"
            raise UserError(f"{tensor.file}: {what}")
    if tied and HEAD in tensors:
        head, embedding = tensors[HEAD], tensors[entries[0].names[0]]
        same = head.dtype == embedding.dtype and head.shape == embedding.shape
        rows = embedding.blocks(range(embedding.shape[0])) if same else ()
        if not same or any(head.read(x).tobytes() != embedding.read(x).tobytes() for x in rows):
            raise UserError(f"{head.file}: {HEAD} differs from the embedding it is tied to")


def abstract(source: Source) -> LanguageModel:
    """The shapes of what `load` gives, without reading (or fetching) a weight. Each leaf has the
    dtype that is stored; where no file says so, the one that the config names."""
    folder = fetch(source, weights=False)
    settings = config(folder)
    family = FAMILIES[settings.model_type]
    shapes = eqx.filter_eval_shape(lambda: family(settings, jax.random.key(0)))
    raw = files.read_json(folder / "config.json")
    usual = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    usual = {dtype.name: dtype for dtype in CODES}.get(usual, np.dtype(np.float32))
    try:
        tensors = read_index(folder, family.PREFIX)
    except UserError:
        tensors = {}
    dtypes = [getattr(tensors.get(leaf.names[0]), "dtype", usual) for leaf in leaves(shapes)]
    dtypes = jax.tree.unflatten(jax.tree.structure(shapes), dtypes)
    return jax.tree.map(lambda shape, dtype: shape.update(dtype=dtype), shapes, dtypes)


def save(
    model: LanguageModel, folder: Source, *, tokenizer: Source | None = None,
    notes: Mapping[str, str | bytes] | None = None, shard_size: int = 5_000_000_000,
) -> None:  # fmt: skip
    """A checkpoint that Hugging Face tools load, with the tokenizer of another folder or hub id and
    `notes` as further files. It appears when it is whole, in place of an older checkpoint."""
    notes = notes or {}
    folder = check_replaceable(folder, notes)
    texts = None if tokenizer is None else fetch(tokenizer, weights=False)
    if jax.process_index() != 0:  # the first one writes; the others lend what they hold
        for part in separate(model):
            sharding.to_host(part)
        return
    if texts is not None and not any((texts / name).exists() for name in TOKENIZER):
        raise UserError(f"{tokenizer}: it holds no tokenizer, none of {', '.join(TOKENIZER)}")
    config, stored = model.config, model.embedding.dtype.name
    ids = {"bos_token_id": config.bos, "eos_token_id": config.eos, "pad_token_id": config.pad}
    common = {"model_type": config.model_type, "tie_word_embeddings": config.tied}
    common |= ids | {"dtype": stored, "torch_dtype": stored}  # the newer and the older name
    with files.atomic_write(folder, "") as partial:
        partial.mkdir(parents=True)
        contents = write_weights(model, partial, shard_size)
        contents["config.json"] = common | config.write()
        contents[GENERATION] = {key: value for key, value in ids.items() if value is not None}
        for name, content in contents.items():
            text = json.dumps(content, indent=2, sort_keys=True)
            (partial / name).write_text(f"{text}\n", encoding="utf-8")
        for name in (GENERATION, *TOKENIZER):
            if texts is not None and (texts / name).exists():
                shutil.copyfile(texts / name, partial / name)
        for name, note in notes.items():
            note = note.encode(errors="backslashreplace") if isinstance(note, str) else note
            (partial / name).write_bytes(note)


def check_replaceable(folder: Source, notes: Iterable[str] = ()) -> Path:
    """Where `save` would write a checkpoint: a link is followed; what is not ours is refused."""
    ours = ("config.json", GENERATION, "README.md", "curves.png", *TOKENIZER, *WEIGHTS, *notes)
    with files.disk_errors(Path(folder), ""):
        folder = Path(os.path.realpath(files.local_path(folder)))  # of a loop, the link
        is_folder, present = folder.is_dir(), set()
        if is_folder:
            present = {path.name for path in folder.iterdir()}
        whole = "config.json" in present and not present.isdisjoint(WEIGHTS)
        foreign = [x for x in present if not any(fnmatch(x, own) for own in ours)]
        if (present and not whole) or foreign or (not is_folder and os.path.lexists(folder)):
            what = "more than a checkpoint, so not replaced"
            raise UserError(f"{folder}: {what}: move it away, or choose another name")
    return folder


def separate(model: LanguageModel) -> Iterator[jax.Array]:
    """Every tensor of a model, in an array of its own: jax keeps what it has copied to the host for
    as long as the array lives that it was copied from."""
    for leaf in leaves(model):
        for i in range(len(leaf.names)):
            yield leaf.array[i] if leaf.stacked else jnp.copy(leaf.array)


def write_weights(model: LanguageModel, folder: Path, shard_size: int) -> dict[str, Any]:
    """Writes tensor after tensor: safetensors' own writer would hold those of a whole file. Returns
    the files of JSON that belong to them: an index, if there are several shards."""
    shards: list[dict[str, dict[str, Any]]] = []
    end, total = math.inf, 0  # of the last shard, and of all
    for leaf in leaves(model):
        size = math.prod(leaf.shape) * leaf.array.dtype.itemsize
        for name in leaf.names:
            if end + size > shard_size:
                shards.append({})
                end = 0
            entry = {"dtype": CODES[leaf.array.dtype], "shape": leaf.shape}
            shards[-1][name] = entry | {"data_offsets": (end, end + size)}
            end, total = end + size, total + size
    count, tensors, where = len(shards), separate(model), {}
    for i, shard in enumerate(shards, 1):
        path = f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
        where |= dict.fromkeys(shard, path)
        header = json.dumps({"__metadata__": {"format": "pt"}} | shard).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in itertools.islice(tensors, len(shard)):
                numbers = np.ascontiguousarray(sharding.to_host(array))
                file.write(numbers.reshape(-1).view(np.uint8))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return {INDEX: index} if count > 1 else {}
