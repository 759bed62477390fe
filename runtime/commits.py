"""Which commit a name of the hub means: asked once, written down with a run, and used again."""

import contextlib
import re
from pathlib import Path
from typing import Literal

COMMITS: dict[str, str] = {}  # by kind, `owner/name` and revision
CACHED: set[str] = set()  # commits of which the hub said nothing, so that the cache must do
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
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")
    cached = ref.read_text(encoding="utf-8") if ref.is_file() else None
    try:
        timeout = 3 if cached else 10  # seconds
        info = HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=timeout)
    except errors.RevisionNotFoundError:
        raise
    except (errors.HTTPError, OSError, ValueError):
        if not cached:
            raise
        CACHED.add(cached)
        return cached
    if info.sha != cached:
        with contextlib.suppress(OSError):  # the cache may be somebody else's
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(info.sha, encoding="utf-8")
    return info.sha
