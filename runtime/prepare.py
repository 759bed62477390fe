"""From a configuration to all that a run needs before its first step."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Array, Float, PRNGKeyArray

import data
import losses
import models
import mup
import optim
import sharding
import student as students
import text
from config import (
    Config,
    needs_teacher,
    stages,
    student_config,
    uses_teacher_loss,
    with_defaults,
)
from losses import features
from models import kernels
from models.base import LanguageModel
from runtime import (
    checkpoint,
    commits,
    files,
    processes,
    report,
    selection,
    target_store,
    topology,
)
from runtime.errors import UserError


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
    track: Callable[..., None] = lambda *_: None

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

    def held_out(self, limit: int | None = None) -> tuple[Iterator[data.Batch], int]:
        """Batches of the windows that an evaluation reads, and at most how many batches."""
        rows = self.config.batch_size
        if self.placement.teacher_mesh is None:  # else they are to divide over its devices too
            rows //= self.config.microbatches
        windows = sum(part.windows for part in self.corpus.held_out)
        limit = min(limit or self.config.eval_windows, windows)
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
    return optim.make(config.optim, config.steps, config.mup), objective


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
        reads = needs_teacher(config) or (cuts and not (begun and (out / selection.FILE).exists()))
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
            config, layers = selection.choose_or_restore_layers(
                config, teacher, corpus, out, facts, stage
            )
        if cuts and not begun:
            student = selection.cut_and_heal(config, teacher, layers, corpus)
    if not begun and config.student is not None:
        student = models.load(config.student, dtype=jnp.float32, mesh=mesh)
        if config.student_init is not None:
            student = students.grow(student, config.student_layers, config.student_init)
    elif not begun and not cuts:
        shape, key = student_config(config), jax.random.key(config.seed)
        family = models.FAMILIES[shape.model_type]
        student = students.fresh(lambda *of: mup.initial(config.mup, family(*of)), shape, key)
        if config.student_copy:
            with sharding.use_mesh(teacher_mesh or mesh, layout):
                student = students.copy_leaves(student, teacher, config.student_copy)
    if student is not None:
        student = jax.device_put(student, sharding.specs(student, mesh, layout.params))
    return config, teacher if needs_teacher(config) else None, student, layers


def next_stage(run: Run, student: LanguageModel) -> tuple[Run, LanguageModel]:
    """The run and its student once the next stage has removed blocks, and what is left is healed.
    As `cut_and_heal`, the same each time."""
    stage, mesh = run.stage + 1, run.placement.mesh
    config = dataclasses.replace(run.config, student_layers=run.stages[stage][0])
    config, layers = selection.choose_or_restore_layers(
        config, student, run.corpus, run.out, run.facts, stage, run.layers
    )
    student = students.cut(student, {"layers": tuple(map(run.layers.index, layers))})
    student = selection.heal(config, run.teacher, student, layers, run.corpus)
    student = jax.device_put(student, sharding.specs(student, mesh, run.placement.layout.params))
    return run._replace(config=config, layers=layers, stage=stage), student


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
    if config.mup.base_embed is not None:
        report.say(f"µP        {config.mup.describe(student.config.embed)}")
    report.say(f"attention {attention(config, student.config)}")


def attention(config: Config, shape: Any) -> str:
    """What attends on the mesh in scope, and why it is not the kernel of its devices."""
    dtype = jnp.dtype(config.compute_dtype)
    name, reason = kernels.choose(dtype, shape.head_dim, config.seq_len, shape.ALIBI)
    return name + (f" ({reason})" if reason else "")
