"""From a configuration to all that a run needs before its first step."""

import contextlib
import dataclasses
import json
import math
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Array, Float, PRNGKeyArray

import data
import losses
import models
import optim
import sharding
import student as students
import text
from config import (
    Config,
    needs_teacher,
    run_folder,
    stages,
    student_config,
    uses_teacher_loss,
    with_defaults,
)
from losses import features
from models import kernels
from models.base import LanguageModel
from runtime import checkpoint, commits, files, processes, report, target_store, topology
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CHOICE = "choice.json"  # of a run
ROUNDS = "choice-rounds.json"  # what remains after each round of a choice that goes on


class Placement(NamedTuple):
    """The devices of a run: those of the student, and those that are the teacher's alone."""

    mesh: jax.sharding.Mesh
    layout: sharding.Layout
    teacher_mesh: jax.sharding.Mesh | None


def placement(config: Config) -> Placement:
    devices, apart = jax.devices(), config.teacher_devices or 0
    if config.topology is not None:
        devices = topology.devices(config.topology)
    if apart >= len(devices):
        why = "the student needs one of them"
        raise UserError(f"--teacher-devices {apart} of {len(devices)}: {why}")
    mesh = sharding.make_mesh(**config.mesh.sizes, devices=devices[: len(devices) - apart])
    layout = sharding.Layout(config.zero, config.mesh.rules, config.attention, config.deterministic)
    with sharding.use_mesh(mesh, layout):  # one that is asked for and not there is refused
        attention(config, models.config(config.teacher))
    (axes,), rows = sharding.claims(["batch"], mesh, layout.params), config.batch_size
    rows //= config.microbatches
    if rows % (shards := math.prod(mesh.shape[axis] for axis in axes)):
        flags = f"--batch-size {config.batch_size} in {config.microbatches} --microbatches"
        misfit = f"do not divide over {shards} devices of the mesh axes {', '.join(axes)}"
        raise UserError(f"{flags} gives {rows} rows at a time, which {misfit}")
    if apart and config.batch_size % apart:
        flag = f"--batch-size {config.batch_size}"
        raise UserError(f"{flag} does not divide over the --teacher-devices {apart}")
    teacher_mesh = sharding.make_mesh(devices=devices[-apart:]) if apart else None
    return Placement(mesh, layout, teacher_mesh)


class Run(NamedTuple):
    """Everything that stays the same from the first step to the last."""

    config: Config
    out: Path
    placement: Placement
    process_rows: tuple[int, int]  # which part of a batch's rows this process reads, of how many
    teacher: LanguageModel | None  # for the loss and for held-out figures
    head: Float[Array, "vocab embed"] | None  # the teacher's, where its blocks are elsewhere
    targets: target_store.Targets | None  # for the loss, in the teacher's place
    tokenizer: Path
    corpus: data.Corpus
    optimizer: optim.Optimizer
    objective: losses.Objective
    layers: list[int] | None  # blocks of the teacher that the student began as
    facts: dict[str, str | None]  # fingerprints of what it learns from, which may not change
    first_token: int = 0  # of step 0; not 0 where a checkpoint had batches of another size
    stages: tuple[tuple[int | None, int], ...] = ()  # blocks of the student, and its last step
    stage: int = 0

    @property
    def last_step(self) -> int:
        """The last step of the student that has these blocks."""
        return self.stages[self.stage][1]

    @property
    def step_teacher(self) -> LanguageModel | None:
        """The teacher that a step is given; else a batch brings what is needed of it."""
        apart = self.placement.teacher_mesh is not None or self.targets is not None
        return None if apart or not uses_teacher_loss(self.config.loss) else self.teacher

    def tokens(self, step: int) -> int:
        """Tokens that are read after so many steps."""
        return self.first_token + step * self.config.batch_size * self.config.seq_len

    def batch(self, step: int) -> data.Batch:
        """What a step reads: a function of its number alone, so that nothing of it is saved."""
        size, rows = self.config.batch_size, self.process_rows
        first = -(-self.first_token // self.config.seq_len)
        windows = data.windows(self.corpus, step, size, *rows, first_row=first)
        batch = data.read(self.corpus, windows)
        if self.targets is not None:
            batch = batch._replace(signal=target_store.read(self.targets, windows))
        return self.to_device(batch)

    def to_device(self, batch: data.Batch) -> data.Batch:
        """Global arrays of a batch, with the states of a teacher that has devices of its own."""
        mesh, layout, teacher_mesh = self.placement
        local = sharding.from_host(batch, mesh, layout.params)
        if self.teacher is None or teacher_mesh is None:
            return local
        with sharding.use_mesh(teacher_mesh, layout):
            remote = sharding.from_host(batch, teacher_mesh, layout.params)
            states = teacher_states(self.teacher, remote, dtype=self.objective.dtype)
        hidden = jax.device_put(states.hidden, local.tokens.sharding)
        return local._replace(signal=losses.TeacherStates(hidden, self.head))

    def held_out(self) -> tuple[Iterator[data.Batch], int]:
        """Batches of the windows that an evaluation reads, and at most how many batches."""
        rows = self.config.batch_size
        if self.placement.teacher_mesh is None:  # else they are to divide over its devices too
            rows //= self.config.microbatches
        limit = self.config.eval_windows
        batches = data.evaluation(self.corpus, rows, *self.process_rows, limit=limit)
        return batches, -(-limit // rows)


teacher_states = sharding.jit(losses.teacher_states)


def optimizer_and_objective(
    config: Config, layers: list[int] | None = None
) -> tuple[optim.Optimizer, losses.Objective]:
    """What a step is given beside its arrays, for a student cut from these blocks, if any."""
    objective = losses.Objective(
        config.loss, config.steps, config.compute_dtype, config.remat,
        config.microbatches, config.log_norms,
    )  # fmt: skip
    if config.loss.features != "off":
        depth, given = models.config(config.teacher).layers, config.loss.feature_pairs
        pairs = features.pairs(given, config.student_layers, depth, layers)
        objective = dataclasses.replace(objective, pairs=pairs)
    return optim.make(config.optim, config.steps), objective


def restore_commits(config: Config) -> None:
    """Lets ids of the hub mean, in all processes, the commits that they meant when the run began,
    or what they mean now to the first process."""
    for source in (*config.data.source, config.data.eval_source or ""):
        text.hub_commit(source)
    path = run_folder(config).path / commits.FILE
    if config.resume and path.exists():
        commits.COMMITS.update(files.read_json(path))
    commits.COMMITS.update(processes.gather(commits.COMMITS)[0])


def make_folder(config: Config) -> files.RunFolder:
    """The folder of a run, made by the first process; --no-resume moves an older run aside."""
    folder = run_folder(config)
    if jax.process_index() == 0:
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
        if jax.process_index() == 0 and path in new and path.is_dir():
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
    path, token, choice = folder.path, folder.path / ".processes", folder.path / CHOICE
    if jax.process_index() == 0:
        files.write_json(token, {"token": secrets.token_hex()})
    sync_global_devices("folder")
    sources = (file for room in (".", "*") for file in ROOT.glob(f"{room}/*.py"))
    facts = {
        "the version of jax": jax.__version__,
        "the version of this program": files.digest(list(map(files.file_digest, sorted(sources)))),
        **{f"--{name}": value for name, value in folder.settings.items()},
        f"the folder {path}": files.read_json(token)["token"] if token.exists() else "another one",
        "the last checkpoint": checkpoint.latest(path / "checkpoints"),
        "the choice of blocks": files.read_json(choice).get("kept") if choice.exists() else None,
    }
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
        if changed and jax.process_index() == 0:
            for name in (CHOICE, ROUNDS):
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
    if jax.process_index() == 0:
        folder.write()
        if commits.COMMITS:
            files.write_json(folder.path / commits.FILE, commits.COMMITS)


def prepare(config: Config, out: Path, placement: Placement) -> tuple[Run, LanguageModel | None]:
    """All that a run needs, read and checked, and its student if it has no checkpoint yet."""
    if config.push is not None and jax.process_index() == 0:
        commits.reserve(config.push, "model")
    process_rows = sharding.process_rows(placement.mesh, placement.layout.params)
    tokenizer, vocab = tokenizer_folder(config), student_config(config).vocab
    corpus, targets = open_corpus(config, tokenizer, vocab), None
    if config.targets is not None:
        targets = target_store.load(config.targets)
        named = config.teacher != config.student  # else nobody needs its weights
        target_store.check(
            targets, corpus, config.loss, tokenizer=tokenizer, vocab=vocab,
            rows=config.steps * config.batch_size,
            teacher=models.fetch(config.teacher) if named else None,
        )  # fmt: skip
    facts = {"teacher": targets and targets.digest, "data": corpus.digest}
    held_out = [[part.store.digest, part.start, part.stop] for part in corpus.held_out]
    facts["held_out"] = files.digest(held_out)
    plan, last = tuple(stages(config)), checkpoint.latest(out / "checkpoints") or 0
    stage = sum(end < last for _, end in plan[:-1])
    config = dataclasses.replace(config, student_layers=plan[stage][0])
    config, teacher, student, layers = teacher_and_student(
        config, out, placement, corpus, facts, stage
    )
    head = None
    if teacher is not None and placement.teacher_mesh is not None:
        places = sharding.specs(teacher, placement.mesh, placement.layout.params)
        head = jax.device_put(teacher.unembedding, places.unembedding)
    run = Run(
        config, out, placement, process_rows, teacher, head, targets, tokenizer, corpus,
        *optimizer_and_objective(config, layers), layers, facts, stages=plan, stage=stage,
    )  # fmt: skip
    sync_global_devices("prepared")
    return run, student


def tokenizer_folder(config: Config) -> Path:
    """The folder with the tokenizer of a run: the student's is the teacher's, if there is one."""
    tokenizer = models.fetch(config.teacher, weights=False)
    if config.student is not None and needs_teacher(config):
        text.same_tokenizer(tokenizer, models.fetch(config.student, weights=False))
    elif config.student is not None:
        tokenizer = models.fetch(config.student, weights=False)
    return tokenizer


def open_corpus(config: Config, tokenizer: Path, vocab: int) -> data.Corpus:
    """The text of a run, and enough of it."""
    if needs_teacher(config):
        vocab = min(vocab, models.config(config.teacher).vocab)
    corpus = data.open_corpus(
        config.data, tokenizer, seq_len=config.seq_len, seed=config.seed, vocab=vocab
    )
    data.batch(corpus, 0, config.batch_size)  # a text that is too short ends here
    if not any(part.windows for part in corpus.held_out):
        remedy = "raise --data.held-out, or give --data.eval-source"
        raise UserError(f"there is no text to evaluate on: {remedy}")
    return corpus


def with_epochs(config: Config) -> Config:
    """With the steps that --epochs asks for; text that is new is tokenized for that."""
    if config.epochs is None:
        return config
    whole = with_defaults(config)
    with report.quietly(config.quiet or jax.process_index() > 0):
        corpus = open_corpus(whole, tokenizer_folder(whole), student_config(whole).vocab)
    steps = math.ceil(config.epochs * corpus.windows / config.batch_size)
    return dataclasses.replace(config, steps=steps, epochs=None)


def continued(run: Run, step: int, extra: dict[str, Any]) -> Run:
    """The run behind a checkpoint, of the same text and teacher; it goes on from the next token."""
    config, source = run.config, " ".join(run.config.data.source)
    for name, what in (
        ("data", f"trained on other text than {source} holds"),
        ("teacher", f"trained with another teacher than {config.targets or config.teacher} is"),
        ("held_out", f"evaluated on other text than {config.data.eval_source or source} holds"),
    ):
        if extra.get(name) in (None, run.facts[name]) or run.facts[name] is None:
            continue
        other = f"{run.out} was {what} now"
        if not config.resume_anyway:
            remedy = "put the old one back, begin anew with --no-resume, or add --resume-anyway"
            raise UserError(f"{other}: {remedy}")
        report.say(f"continued anyway: {other}")
    tokens = run.tokens(step)
    return run._replace(first_token=extra.get("tokens", tokens) - tokens)


def teacher_and_student(
    config: Config, out: Path, placement: Placement, corpus: data.Corpus,
    facts: dict[str, str | None], stage: int = 0,
) -> tuple[Config, LanguageModel | None, LanguageModel | None, list[int] | None]:  # fmt: skip
    """The configuration with the size that was chosen; the teacher, if the run looks at it; the
    student, if there is no checkpoint of it; and the teacher's blocks that it began as, if it was
    cut. Adds the teacher's fingerprint to `facts`."""
    mesh, layout, teacher_mesh = placement
    begun = checkpoint.latest(out / "checkpoints") is not None
    cuts = config.student is None and config.student_init != "random"
    teacher = student = layers = None
    with sharding.use_mesh(teacher_mesh or mesh, layout):
        reads = needs_teacher(config) or (cuts and not (begun and (out / CHOICE).exists()))
        reads |= bool(config.student_copy) and not begun
        if reads and facts["teacher"] is None:
            facts["teacher"] = models.fingerprint(models.fetch(config.teacher))
        compared = dict(facts)
        if config.student is not None and not begun and jax.process_count() > 1:
            compared["student"] = models.fingerprint(models.fetch(config.student))
        processes.check_same({f"the content of --{name}": compared[name] for name in compared})
        if reads:
            teacher = models.load(config.teacher, mesh=teacher_mesh or mesh)
        if cuts:
            config, layers = choose_or_restore_layers(config, teacher, corpus, out, facts, stage)
        if cuts and not begun:
            student = cut(config, teacher, layers, corpus)
    if not begun and config.student is not None:
        student = models.load(config.student, dtype=jnp.float32, mesh=mesh)
        if config.student_init is not None:
            student = students.grow(student, config.student_layers, config.student_init)
    elif not begun and not cuts:
        shape, key = student_config(config), jax.random.key(config.seed)
        student = students.fresh(models.FAMILIES[shape.model_type], shape, key)
        if config.student_copy:
            with sharding.use_mesh(teacher_mesh or mesh, layout):
                student = students.copy_leaves(student, teacher, config.student_copy)
    if student is not None:
        student = jax.device_put(student, sharding.specs(student, mesh, layout.params))
    return config, teacher if needs_teacher(config) else None, student, layers


def candidates(config: Config) -> list[Config]:
    """The configurations among which --student-params chooses, the deepest first; or this one."""
    if config.student_params is None:
        return [config]
    sizes = students.sizes(models.config(config.teacher), config.student_params)
    return [
        dataclasses.replace(config, student_params=None, student_layers=depth, student_mlp=width)
        for depth, width in sizes
    ]


def choose_or_restore_layers(
    config: Config, teacher: LanguageModel | None, corpus: data.Corpus, out: Path,
    facts: dict[str, str | None] | None = None, stage: int = 0, among: Sequence[int] | None = None,
) -> tuple[Config, list[int]]:  # fmt: skip
    """Which of the teacher's blocks the student begins as, and the one of `candidates` that says
    so; decided once in the life of a run, or once in a stage of it. Later stages choose `among`
    the blocks that a student has in the place of the teacher."""
    path = out / (f"choice-{stage + 1}.json" if stage else CHOICE)
    sized = {x.student_layers: x for x in candidates(config)}
    if path.exists():
        choice = files.read_json(path)
        layers, depth = choice.get("kept"), models.config(config.teacher).layers
        ascending = isinstance(layers, list) and [x for x in range(depth) if x in layers]
        if not ascending or layers != ascending or len(layers) not in sized:
            what = f"{' or '.join(map(str, sized))} blocks of 0 to {depth - 1}"
            remedy = "give --student-layers as at the beginning, or begin anew with --no-resume"
            raise UserError(f"{path}: expected the choice of {what}, found {layers}: {remedy}")
    else:
        choice = choose(config, teacher, corpus, out / ROUNDS, facts and [facts, stage])
        if among is not None:
            choice["kept"] = [among[i] for i in choice["kept"]]
        if jax.process_index() == 0:
            files.write_json(path, choice)
            (out / ROUNDS).unlink(missing_ok=True)
    kl, blocks = choice.get("kl"), " ".join(map(str, choice["kept"]))
    cost = f", which leaves a KL of {kl:.3f}" if kl else ""
    report.say(f"student   blocks {blocks}{cost} (chosen in {choice.get('seconds')}s)")
    return sized[len(choice["kept"])], choice["kept"]


def choose(
    config: Config, teacher: LanguageModel, corpus: data.Corpus, rounds: Path,
    facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The blocks that stay, of several candidates those with the lowest KL. What was decided is
    written to `rounds`, from which a choice that was interrupted goes on for the same `facts`."""
    begun, text = time.monotonic(), calibration(corpus, config.calibration_windows)
    facts = json.loads(json.dumps([facts, config.student_init, config.compute_dtype]))
    state = processes.gather(files.read_json(rounds) if rounds.exists() else {})[0]
    if state.get("facts") != facts:
        state = {"facts": facts}
    table = state.setdefault("candidates", [])
    if "round" in state:
        report.say(f"choice    continued at {len(state['round'][0])} blocks")

    def save(**changes: Any) -> None:
        state.update(changes)
        if jax.process_index() == 0:
            files.write_json(rounds, state)

    for candidate in candidates(config)[len(table) :]:
        start = None
        if "round" in state:  # of a deeper one, perhaps: those are first
            layers, kl, increases = state["round"]
            start = students.Choice(tuple(layers), kl, tuple(increases))
        cheaper = config.student_init == "greedy"
        hint = "(one pass: --student-init influence)" if cheaper else ""
        with report.progress("choosing blocks", hint=hint) as progress:
            choice = students.choose_layers(
                teacher, candidate.student_layers, config.student_init, text, start=start,
                save=lambda choice: save(round=choice), dtype=config.compute_dtype,
                progress=progress,
            )  # fmt: skip
        table.append({"kept": list(choice.layers), "kl": choice.kl})
        if config.student_params is not None:
            table[-1] |= judge(candidate, teacher, list(choice.layers), corpus)
            save()
    best = min(table, key=lambda entry: entry["kl"])
    compared = {} if config.student_params is None else {"candidates": table}
    return best | {"seconds": round(time.monotonic() - begun, 1)} | compared


def judge(
    config: Config, teacher: LanguageModel, layers: list[int], corpus: data.Corpus
) -> dict[str, Any]:
    """Size and KL of the student with these blocks, on text that no choice and no healing reads."""
    read = max(config.calibration_windows, -(-config.heal_tokens // config.seq_len))
    text = calibration(corpus, config.calibration_windows, first=read)
    student = cut(config, teacher, layers, corpus)
    kl = students.kl_between(teacher, student, text, config.compute_dtype)
    size, mlp = sum(leaf.size for leaf in jax.tree.leaves(student)), student.config.mlp
    shape = f"{len(layers)} blocks, MLPs of {mlp}, {report.count(size)} parameters"
    report.say(f"candidate {shape}: KL {kl:.3f}")
    return {"kl": kl, "mlp": mlp, "parameters": size}


def cut(
    config: Config, teacher: LanguageModel, layers: list[int], corpus: data.Corpus
) -> LanguageModel:
    """The student that has these blocks and the widths of its flags, healed. It is the same each
    time, and so is not kept for a run that dies before its first checkpoint."""
    shape, text = student_config(config), calibration(corpus, config.calibration_windows)
    indices = students.choose_widths(teacher, shape, layers, text, config.compute_dtype)
    student = students.cut(teacher, indices)
    return heal(config, teacher, student, layers, corpus, embed=indices.get("embed"))


def next_stage(run: Run, student: LanguageModel) -> tuple[Run, LanguageModel]:
    """The run and its student once the next stage has removed blocks, and what is left is healed.
    As `cut`, the same each time."""
    stage, mesh = run.stage + 1, run.placement.mesh
    config = dataclasses.replace(run.config, student_layers=run.stages[stage][0])
    config, layers = choose_or_restore_layers(
        config, student, run.corpus, run.out, run.facts, stage, run.layers
    )
    student = students.cut(student, {"layers": tuple(map(run.layers.index, layers))})
    student = heal(config, run.teacher, student, layers, run.corpus)
    student = jax.device_put(student, sharding.specs(student, mesh, run.placement.layout.params))
    return run._replace(config=config, layers=layers, stage=stage), student


def heal(
    config: Config, teacher: LanguageModel, student: LanguageModel, layers: list[int],
    corpus: data.Corpus, embed: np.ndarray | None = None,
) -> LanguageModel:  # fmt: skip
    """The student with what was cut repaired, where that makes it better; `embed` are the teacher's
    channels that its stream has."""
    if config.student_heal == "none" or student.config == teacher.config:
        return student
    begun, windows = time.monotonic(), -(-config.heal_tokens // config.seq_len)
    text = calibration(corpus, windows)
    try:
        with report.progress("healing") as progress:
            healed, before, after = students.heal(
                teacher, student, layers, text, config.student_heal, embed=embed,
                dtype=config.compute_dtype, progress=progress,
            )  # fmt: skip
    except UserError as error:
        if config.student_heal != "auto":
            raise
        report.say(f"healing   left out: {error}")
        return student
    figures = f"KL {before:.3f} before, {after:.3f} after"
    left_out = ": left out, it is no better" if healed is student else ""
    report.say(f"healing   {figures} ({time.monotonic() - begun:.1f}s){left_out}")
    return healed


def calibration(corpus: data.Corpus, windows: int, first: int = 0) -> students.Calibration:
    """Some windows of the text, or all where there are fewer."""
    rows = data.windows(corpus, 0, min(windows, corpus.windows), first_row=first)
    batch = data.read(corpus, rows)
    return students.Calibration(batch.tokens[:, :-1], batch.segments[:, :-1], batch.mask)


def fresh_learner(
    config: Config, key: PRNGKeyArray, layers: list[int] | None = None
) -> tuple[LanguageModel, features.Projection | None]:
    """A student of the run's shape and the projection beside it, with fresh weights."""
    shape = student_config(config)
    if config.student is None and config.student_init != "random":
        shape = shape.select({"layers": tuple(layers or range(config.student_layers))})
    student = models.FAMILIES[shape.model_type](shape, key)
    if config.student_copy:  # what it cannot copy is refused before a weight is read
        teacher = models.FAMILIES[shape.model_type](models.config(config.teacher), key)
        student = students.copy_leaves(student, teacher, config.student_copy)
    return student, projection(config, shape.embed)


def projection(config: Config, embed: int) -> features.Projection | None:
    """What maps the student's states to the teacher's width, if the loss asks for such a map."""
    pairs = optimizer_and_objective(config)[1].pairs
    if not pairs:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)  # no step's
    return features.projection(len(pairs), embed, models.config(config.teacher).embed, key)


def print_summary(run: Run, student: LanguageModel) -> None:
    """What is about to happen, and how large it is."""
    config, corpus, device = run.config, run.corpus, jax.devices()[0]
    for name, model in (("teacher", run.teacher), ("student", student)):
        if model is not None:
            leaves = jax.tree.leaves(model)
            count = report.count(sum(leaf.size for leaf in leaves))
            size = report.size(sum(leaf.nbytes for leaf in leaves))
            apart = name == "teacher" and run.placement.teacher_mesh is not None
            where = " on devices of its own" if apart else ""
            report.say(f"{name}   {model.config.layers} blocks, {count} parameters, {size}{where}")
    amount = f"{report.count(corpus.tokens)} tokens, {report.count(corpus.windows)} windows"
    read = config.steps * config.batch_size
    steps = f"{config.steps} steps of {config.batch_size}"
    shares = f"{report.count(read * config.seq_len)} tokens, {read / corpus.windows:.2g} epochs"
    report.say(f"data      {amount} of {config.seq_len}; {steps}: {shares}")
    mesh = " x ".join(f"{name} {size}" for name, size in run.placement.mesh.shape.items())
    devices = f"{jax.device_count()} x {device.device_kind}"
    report.say(f"device    {devices} ({mesh}), {config.compute_dtype}")
    report.say(f"attention {attention(config, student.config)}")


def attention(config: Config, shape: Any) -> str:
    """What attends on the mesh in scope, and why it is not the kernel of its devices."""
    dtype = jnp.dtype(config.compute_dtype)
    name, reason = kernels.choose(dtype, shape.head_dim, config.seq_len, shape.ALIBI)
    return name + (f" ({reason})" if reason else "")
