"""Which commit a name of the hub means: asked once, written down with a run, and used again."""

import contextlib
import re
from pathlib import Path
from typing import Literal

from runtime import files

COMMITS: dict[str, str] = {}  # by kind, `owner/name` and revision
CACHED: set[str] = set()  # commits of which the hub said nothing, so that the cache must do
FILE = "commits.json"  # of a run
REVISION = r"(?:@(?!.*\.\.)\w[\w./-]*)?"
COMMIT = re.compile(r"[0-9a-f]{40}")


def commit(source: str, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit of `owner/name` or `owner/name@revision`; the first answer counts. Where the hub
    gives none, the last one that the cache knows."""
    from huggingface_hub import utils

    utils.disable_progress_bars()  # they would run into ours
    name, _, revision = source.partition("@")
    key = f"{kind}s/{name}@{revision or 'main'}"
    if key not in COMMITS:
        COMMITS[key] = revision if COMMIT.fullmatch(revision) else _ask(name, revision, kind)
    return COMMITS[key]


def _ask(name: str, revision: str, kind: str) -> str:
    from huggingface_hub import HfApi, constants, errors

    folder = f"{kind}s--{name.replace('/', '--')}"
    ref, cached = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main"), ""
    with contextlib.suppress(OSError):
        cached = ref.read_text(encoding="utf-8").strip()
    known = COMMIT.fullmatch(cached) is not None
    try:
        timeout = 3 if known else 10  # seconds
        info = HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=timeout)
    except errors.RevisionNotFoundError:
        raise
    except (errors.HTTPError, OSError, ValueError) as error:
        if known:
            CACHED.add(cached)
            return cached
        if getattr(error, "response", None) is not None:
            raise
        raise ConnectionError(f"Couldn't reach it ({error}) and no cached snapshot") from error
    if info.sha != cached:
        with contextlib.suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(info.sha, encoding="utf-8")
    return info.sha


def answer(error: BaseException) -> str:
    """What the hub answered, where that is behind an error, and what to do; else the error."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return files.printable(error)
    remedy = "if it is private or gated, log in with `hf auth login` or HF_TOKEN"
    refused = cause.response.status_code in (401, 403, 404)
    return files.printable(cause) + (f" ({remedy})" if refused else "")


def restore(folder: Path) -> None:
    """The commits that a run began with count, not what the hub says now."""
    if (path := folder / FILE).exists():
        COMMITS.update(files.read_json(path))


def write(folder: Path) -> None:
    if COMMITS:
        files.write_json(folder / FILE, COMMITS)
