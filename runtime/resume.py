"""The folder of a run: made, entered by every process, and only by the settings that made it."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

import text
from config import Config, run_folder
from runtime import buckets, checkpoint, commits, files, processes, report, selection
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def restore_commits(config: Config) -> None:
    """Lets ids of the hub mean, in all processes, the commits that they meant when the run began,
    or what they mean now to the first process."""
    for source in (*config.data.source, config.data.eval_source or ""):
        text.hub_commit(source)
    if config.resume:
        commits.restore(run_folder(config).path)
    commits.COMMITS.update(processes.gather(commits.COMMITS)[0])


def make_folder(config: Config) -> files.RunFolder:
    """The folder of a run, made by the first process; --no-resume moves an older run aside."""
    folder = run_folder(config)
    if buckets.owns(config.out):
        with files.disk_errors(folder.path, ": give another --out"):
            folder.path.mkdir(parents=True, exist_ok=True)
            if not config.resume and any(folder.path.iterdir()):
                with checkpoint.lock(folder.path):
                    aside = folder.set_aside()
                folder.path.mkdir()
                report.say(f"the run that was in {folder.path} is in {aside} now")
    return folder


@contextlib.contextmanager
def open_folder(config: Config) -> Iterator[files.RunFolder]:
    """The folder of a run. A new one goes again where the run is refused before it has decided
    anything."""
    path = run_folder(config).path
    new = [place for place in (path, *path.parents) if not place.exists()]
    try:
        yield make_folder(config)
    except UserError:
        if buckets.owns(config.out) and path in new and path.is_dir():
            if {entry.name for entry in path.iterdir()} <= {".lock", "config.json", commits.FILE}:
                shutil.rmtree(path)
                with contextlib.suppress(OSError):  # where another run began meanwhile
                    for parent in new[1:]:
                        parent.rmdir()
        raise


def check_processes(folder: files.RunFolder) -> None:
    """Refuses processes of which one was started otherwise, or has another folder in mind."""
    if jax.process_count() == 1:
        return
    path, token, choice = folder.path, folder.path / ".processes", folder.path / selection.FILE
    if jax.process_index() == 0:
        files.write_json(token, {"token": secrets.token_hex()})
    sync_global_devices("folder")
    sources = (file for room in (".", "*") for file in ROOT.glob(f"{room}/*.py"))
    facts = {
        "the version of jax": jax.__version__,
        "the version of this program": files.digest(list(map(files.file_digest, sorted(sources)))),
        **{f"--{name}": value for name, value in folder.settings.items()},
        "the last checkpoint": checkpoint.latest(path / "checkpoints"),
        "the choice of blocks": files.read_json(choice).get("kept") if choice.exists() else None,
    }
    if not buckets.in_bucket(folder.settings["out"]):
        here = files.read_json(token)["token"] if token.exists() else "another one"
        facts[f"the folder {path}"] = here
    processes.check_same(facts)
    if jax.process_index() == 0:
        token.unlink()


def last_step(config: Config, folder: files.RunFolder) -> int | None:
    """The step of the last checkpoint of a run, which must have been made by the same settings."""
    check_processes(folder)
    last, previous = checkpoint.latest(folder.path / "checkpoints"), folder.previous()
    changed = folder.changed()
    if last is None and config.export:
        raise UserError(f"--export: {folder.path} has no checkpoint yet: leave the flag out")
    if last is not None and previous is None:
        remedy = "restore it, or begin anew with --no-resume"
        raise UserError(f"{folder.path} has checkpoints, but no config.json: {remedy}")
    if last is None:
        if changed and buckets.owns(config.out):
            for name in (selection.FILE, selection.ROUNDS):
                (folder.path / name).unlink(missing_ok=True)
        write_config(folder)
        return None
    if changed and not config.resume_anyway:
        remedy = "give the same, another --out, --no-resume, or --resume-anyway to go on with these"
        raise UserError(f"{folder.path} has other settings ({'; '.join(changed)}): {remedy}")
    if changed:
        report.say(f"continued anyway: {'; '.join(changed)}")
    if last > config.steps and not config.export:
        remedy = "give that many or more, another --out, or --no-resume"
        raise UserError(f"--steps {config.steps}: {folder.path} is at step {last}: {remedy}")
    if (steps := previous.get("steps", config.steps)) != config.steps and not config.export:
        if config.student_stages > 1:
            raise UserError(f"--steps was {steps}, by which --student-stages lie: give the same")
        report.say(f"--steps was {steps}: schedules now end at {config.steps}")
    return last


def write_config(folder: files.RunFolder) -> None:
    if buckets.owns(folder.settings["out"]):
        folder.write()
        if commits.COMMITS:
            files.write_json(folder.path / commits.FILE, commits.COMMITS)
