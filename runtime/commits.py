"""Which commit a name of the hub means: asked once, written down with a run, and used again.

And whether what a program makes can be put there.
"""

import contextlib
import re
from pathlib import Path
from typing import Literal

from runtime import files

COMMITS: dict[str, str] = {}  # by kind, `owner/name` and revision; and licenses
FILE = "commits.json"  # of a run
CACHED: set[str] = set()  # commits of which the hub said nothing, so that the cache must do
REVISION = r"(?:@(?!.*\.\.)\w[\w./-]*)?"


def commit(source: str, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit of `owner/name` or `owner/name@revision`; the first answer counts. Where the hub
    gives none, the last one that the cache knows."""
    from huggingface_hub import HfApi, constants, errors, utils

    utils.disable_progress_bars()  # they would run into ours
    name, _, revision = source.partition("@")
    revision, folder = revision or "main", f"{kind}s--{name.replace('/', '--')}"
    key, ref = f"{kind}s/{name}@{revision}", Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    if key in COMMITS or re.fullmatch(r"[0-9a-f]{40}", revision):
        return COMMITS.setdefault(key, revision)
    cached = ref.read_text(encoding="utf-8") if ref.is_file() else None
    try:
        timeout = 3 if cached else 10  # seconds
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=timeout)
    except (errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, errors.RevisionNotFoundError) or not cached:
            raise
        CACHED.add(cached)
        return COMMITS.setdefault(key, cached)
    if info.sha != cached:
        with contextlib.suppress(OSError):  # the cache may be somebody else's
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(info.sha, encoding="utf-8")
    if license := (info.card_data or {}).get("license"):
        COMMITS[f"license {kind}s/{name}"] = str(license)
    return COMMITS.setdefault(key, info.sha)


def restore(folder: Path) -> None:
    """Lets names mean what they meant to the run in a folder."""
    if (path := folder / FILE).exists():
        COMMITS.update(files.read_json(path))


def reserve(name: str, kind: Literal["model", "dataset"]) -> None:
    """Makes a repository on the hub, private unless it is there: so a refusal comes early."""
    from huggingface_hub import HfApi

    with files.library_errors(f"--push {name}: cannot be written"):
        HfApi().create_repo(name, repo_type=kind, private=True, exist_ok=True)
