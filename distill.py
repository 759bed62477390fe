"""Distil a student from a teacher: the run, from a checkpoint to a checkpoint.

python distill.py --teacher bigscience/bloom-1b7 --student-layers 12
"""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

import data
import generate
import losses
import models
import optim
import sharding
import student as students
import text
from config import (
    Config,
    Data,
    Mesh,
    Optim,
    check_resumable,
    describe_loss,
    needs_teacher,
    profile_window,
    say,
    student_config,
    uses_teacher_loss,
    with_defaults,
    write_config,
)
from eval import Head, Seen, evaluate, view
from losses import features
from models.base import LanguageModel
from runtime import (
    checkpoint,
    errors,
    figures,
    files,
    on_policy,
    plan,
    processes,
    report,
    target_store,
)
from runtime.errors import UserError

__all__ = ["Config", "Data", "Mesh", "Optim", "State", "begin", "main", "step", "train"]

# ---- the step ------------------------------------------------------------------------------------


class State(eqx.Module):
    """What a step changes."""

    student: LanguageModel
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates left out in a row, because something was not finite
    projection: features.Projection | None = None  # its moments are beside those of the student


def init_state(
    student: LanguageModel,
    optimizer: optim.Optimizer,
    projection: features.Projection | None = None,
) -> State:
    """The state before the first step, its moments where the mesh in scope wants them."""
    zero = jnp.zeros((), jnp.int32)
    moments = _moments(student, projection, optimizer)
    return State(student, moments, zero, jnp.copy(zero), projection)


@eqx.filter_jit
def _moments(
    student: LanguageModel, projection: features.Projection | None, optimizer: optim.Optimizer
) -> Any:
    moments = optimizer.init(student)
    if projection is not None:
        moments = moments, thawed(optimizer).init(projection)
    return sharding.constrain_tree(moments, moments=True)


def thawed(optimizer: optim.Optimizer) -> optim.Optimizer:
    """For what --optim.freeze does not name."""
    return replace(optimizer, config=replace(optimizer.config, freeze=()))


@eqx.filter_jit(donate="all-except-first")
def step(
    frozen: tuple[LanguageModel | Head | None, data.Batch | Seen | target_store.Told],
    state: State,
    optimizer: optim.Optimizer,
    objective: losses.Objective,
) -> tuple[State, dict[str, Float32[Array, "..."]]]:
    """One optimizer step on `frozen`, a teacher (or none) and a batch; consumes `state`.

    The loss is a sum over the counted tokens of the whole batch, divided once by their number. An
    update that is not finite is left out.
    """
    teacher, batch = frozen
    if not uses_teacher_loss(objective.config):
        teacher = None
    moving, still = eqx.partition(state.student, optimizer.trainable(state.student))
    ours, theirs = features.ends(objective.pairs)
    tokens = jnp.sum(batch.mask).astype(jnp.float32)
    share = 1 / jnp.maximum(tokens, 1)

    def loss(moving, embedded, projection, rows):
        student = eqx.combine(moving, still)
        read, segments, labels = rows.tokens[:, :-1], rows.segments[:, :-1], rows.tokens[:, 1:]
        kept = rows.kept if isinstance(rows, target_store.Told) else None
        with jax.named_scope("teacher"):
            if theirs:
                seen, goals = teacher.hidden(read, segments, dtype=objective.dtype, taps=theirs)
                beside = seen, teacher.unembedding
            else:
                beside = (None, None) if kept else view(teacher, rows, objective.dtype)
        with jax.named_scope("student"):
            hidden = student.hidden(
                read, segments, embedded=embedded, dtype=objective.dtype, remat=objective.remat,
                taps=ours,
            )  # fmt: skip
            hidden, states = hidden if ours else (hidden, None)
        with jax.named_scope("loss"):
            total, parts = losses.distill_loss(
                hidden, student.unembedding, *beside, labels, rows.mask,
                objective=objective, step=state.step, kept=kept,
            )  # fmt: skip
        if ours:
            with jax.named_scope("features"):
                far = features.loss(
                    objective.config.features, objective.pairs, states, goals, rows.mask, projection
                )
                total += objective.at("feature_weight", state.step) * far
                parts["features"] = far
        return total * share, {"loss": total} | parts

    def gradient(rows):
        read = rows.tokens[:, :-1]
        embedded = jax.lax.stop_gradient(state.student.embedding)[read]
        moved = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        (_, parts), found = moved(moving, embedded, state.projection, rows)
        grads, d_embedded, d_projection = found
        if grads.embedding is not None:
            # Added to what the head has found where they are tied: autodiff would add two arrays.
            found = grads.embedding.at[read].add(d_embedded.astype(grads.embedding.dtype))
            grads = eqx.tree_at(lambda model: model.embedding, grads, found)
        return sharding.constrain_tree((grads, d_projection)), parts

    if objective.microbatches == 1:
        (grads, d_projection), parts = gradient(batch)
    else:
        rows = microbatches(batch, objective.microbatches)
        outline = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], rows))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outline)
        ((grads, d_projection), parts), _ = jax.lax.scan(
            lambda sums, rows: (jax.tree.map(jnp.add, sums, gradient(rows)), None), zeros, rows
        )
    with jax.named_scope("update"):
        sound, moments, projection = jnp.isfinite(parts["loss"]), state.opt_state, state.projection
        if projection is not None:
            moments, others = moments
            sound &= jnp.isfinite(d_projection.weight).all()
        student, opt_state, found = optimizer.update(
            grads, moments, state.student, state.step, sound
        )
        if projection is not None:
            projection, others, _ = thawed(optimizer).update(
                d_projection, others, projection, state.step, found["finite"]
            )
            opt_state = opt_state, others
    skipped = jnp.where(found.pop("finite"), 0, state.skipped + 1)
    metrics = {name: value * share for name, value in parts.items()} | found
    metrics |= {"counted": tokens, "skipped": skipped}
    if objective.norms:
        metrics |= norms("param_norm", state.student) | norms("grad_norm", grads)
    # Where XLA would put them is not always where the next step expects them.
    student, projection = sharding.constrain_tree((student, projection))
    opt_state = sharding.constrain_tree(opt_state, moments=True)
    state = State(student, opt_state, state.step + 1, sharding.constrain_tree(skipped), projection)
    return state, sharding.constrain_tree(metrics)


def microbatches(batch: data.Batch | Seen, count: int) -> data.Batch | Seen:
    """Every `count`-th row together: so each part takes rows from every device, and none moves."""

    def split(x):
        x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
        return sharding.constrain(x, " ".join(("parts", "batch", "seq", "width")[: x.ndim]))

    return jax.tree.map(split, batch)


def norms(what: str, tree: Any) -> dict[str, Float32[Array, "..."]]:
    """The norm of every leaf, of stacked leaves for each layer."""
    found = {}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    for (path, leaf), axes in zip(
        leaves, structure.flatten_up_to(sharding.axes(tree)), strict=True
    ):
        over = tuple(range(1 if axes[0] == "layers" else 0, leaf.ndim))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found[f"{what}/{name}"] = jnp.sqrt(jnp.sum(leaf.astype(jnp.float32) ** 2, axis=over))
    return found


# ---- what a run is made of -----------------------------------------------------------------------


class Run(NamedTuple):
    """Everything that stays the same from the first step to the last."""

    config: Config
    out: Path
    mesh: jax.sharding.Mesh
    layout: sharding.Layout
    share: tuple[int, int]  # which rows of a batch this process reads
    teacher: LanguageModel | None  # for the loss and for held-out figures
    teacher_mesh: jax.sharding.Mesh | None  # where it has devices of its own
    targets: target_store.Targets | None  # for the loss, in the teacher's place
    tokenizer: Path
    corpus: data.Corpus
    optimizer: optim.Optimizer
    objective: losses.Objective

    @property
    def uses_teacher_loss(self) -> bool:
        return uses_teacher_loss(self.config.loss)

    def beside(self) -> LanguageModel | Head | None:
        """What a program on the student's devices is given of the teacher."""
        if self.teacher is None or self.teacher_mesh is None:
            return self.teacher
        head = Head(self.teacher.unembedding)
        return jax.device_put(head, sharding.specs(head, self.mesh, self.layout.params))

    def to_device(self, batch: data.Batch) -> data.Batch | Seen:
        here = sharding.from_host(batch, self.mesh, self.layout.params)
        if self.teacher is None or self.teacher_mesh is None:
            return here
        with sharding.use_mesh(self.teacher_mesh, self.layout):
            there = sharding.from_host(batch, self.teacher_mesh, self.layout.params)
            hidden, _ = ask(self.teacher, there, self.objective.dtype)
        return Seen(*here, jax.device_put(hidden, here.tokens.sharding))

    def batch(self, step: int) -> data.Batch | Seen | target_store.Told:
        """What is read at a step: a pure function of it, so that nothing is to be kept."""
        windows = data.windows(self.corpus, step, self.config.batch_size, *self.share)
        rows = data.read(self.corpus, windows)
        if self.targets is None:
            return self.to_device(rows)
        told = target_store.Told(*rows, target_store.read(self.targets, windows))
        return sharding.from_host(told, self.mesh, self.layout.params)

    @property
    def step_tokens(self) -> int:
        return self.config.batch_size * self.config.seq_len

    def evaluate(self, student: LanguageModel) -> dict[str, int | float]:
        """Figures on held-out windows, as metrics."""
        rows = self.config.batch_size
        if self.teacher_mesh is None:  # else they are to divide over its devices too
            rows //= self.config.microbatches
        batches = islice(
            data.evaluation(self.corpus, rows, *self.share),
            -(-self.config.eval_windows // rows),
        )
        found = evaluate(
            student, self.beside(), batches,
            to_device=self.to_device, dtype=self.objective.dtype, chunk=self.config.loss.chunk,
        )  # fmt: skip
        kept = ("ce", "kl", "agreement", "teacher_ce")
        return {f"eval/{name}": found[name] for name in kept if name in found}


ask = eqx.filter_jit(view)


def meshes(config: Config) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh | None]:
    """That of the student, and that of a teacher with devices of its own."""
    devices, apart = jax.devices(), config.teacher_devices or 0
    if apart >= len(devices):
        raise UserError(
            f"--teacher-devices {apart}: there are {len(devices)} devices, and the student needs"
            " one of them"
        )
    mesh = sharding.make_mesh(**config.mesh.sizes, devices=devices[: len(devices) - apart])
    rows, ways = config.batch_size // config.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise UserError(
            f"--batch-size {config.batch_size} in {config.microbatches} --microbatches gives {rows}"
            f" rows at a time, which do not divide over {ways} devices of the mesh axes data, fsdp"
        )
    if not apart:
        return mesh, None
    if config.batch_size % apart:
        raise UserError(
            f"--teacher-devices {apart}: --batch-size {config.batch_size} does not divide over them"
        )
    return mesh, sharding.make_mesh(devices=devices[-apart:])


def fixed(
    config: Config, kept: list[int] | None = None
) -> tuple[optim.Optimizer, losses.Objective]:
    """What a step is told beside its arrays; `kept` are the teacher's blocks that the student is
    made of."""
    objective = losses.Objective(
        config.loss, config.steps, config.compute_dtype, config.remat,
        config.microbatches, config.log_norms,
    )  # fmt: skip
    if config.loss.features != "off":
        depth = models.config(config.teacher).layers
        given = config.loss.feature_pairs
        pairs = features.pairs(given, config.student_layers, depth, kept)
        objective = replace(objective, pairs=pairs)
    return optim.make(config.optim, config.steps), objective


def beginning(config: Config) -> Callable[[LanguageModel, optim.Optimizer], State]:
    """`init_state`, with what the loss of this run learns beside the student."""
    count = len(fixed(config)[1].pairs)

    def begun(student: LanguageModel, optimizer: optim.Optimizer) -> State:
        if not count:
            return init_state(student, optimizer)
        widths = student.config.embed, models.config(config.teacher).embed
        key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)  # no step's
        return init_state(student, optimizer, features.projection(count, *widths, key))

    return begun


def choose(config: Config, teacher: LanguageModel, windows: data.Batch, out: Path) -> list[int]:
    """Which of the teacher's blocks the student keeps; decided once in the life of a run."""
    path = out / "choice.json"
    if path.exists():
        found = files.read_json(path)
        kept = found.get("kept")
        if not isinstance(kept, list) or len(kept) != config.student_layers or "kl" not in found:
            raise UserError(
                f"{path}: expected the choice of {config.student_layers} blocks, found {kept}: give"
                " the --student-layers that the run was begun with, or begin anew with --no-resume"
            )
    else:
        begun = time.monotonic()
        seen = students.Calibration(windows.tokens[:, :-1], windows.segments[:, :-1], windows.mask)
        with report.counting("choosing blocks", quiet=config.quiet) as progress:
            choice = students.choose_layers(
                teacher, config.student_layers, config.student_init, seen,
                dtype=config.compute_dtype, progress=progress,
            )  # fmt: skip
        seconds = round(time.monotonic() - begun, 1)
        found = {"kept": list(choice.layers), "kl": choice.kl, "seconds": seconds}
        if jax.process_index() == 0:
            files.write_json(path, found)
    cost = "" if found["kl"] is None else f", which leaves a KL of {found['kl']:.3f}"
    blocks = " ".join(map(str, found["kept"]))
    say(config, f"student   blocks {blocks}{cost} (chosen in {found.get('seconds')}s)")
    return found["kept"]


# ---- the run -------------------------------------------------------------------------------------


def train(config: Config) -> Path:
    """Runs, or continues, what `config` describes; returns the folder of the exported student."""
    begun = time.monotonic()
    config = with_defaults(config)
    mesh, teacher_mesh = meshes(config)
    layout = sharding.layout(config.zero, config.mesh.rules)
    if config.plan:
        with sharding.use_mesh(mesh, layout):
            print(plan.table(config, mesh, layout, step, beginning(config), fixed, teacher_mesh))
        return Path(config.out)
    out = Path(config.out)
    if jax.process_index() == 0:
        make_room(config, out)
    processes.sync("folder")
    with checkpoint.lock(out), sharding.use_mesh(mesh, layout):
        run, state, kept = prepare(config, out, mesh, teacher_mesh, layout)
        if state is None:
            return out / "student"
        greet(run, state)
        if int(state.step) < config.steps:
            if jax.process_index() == 0 and (out / "student").exists():  # that of fewer steps
                (out / "student").rename(out / f".student-{os.getpid()}")  # gone at once, or not
                shutil.rmtree(out / f".student-{os.getpid()}")
            with checkpoint.Checkpoints(out / "checkpoints", config.keep) as saved:
                state = loop(run, state, saved, kept, begun)
        return finish(run, state, kept)


def make_room(config: Config, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not config.resume and (out / "config.json").exists():
            with checkpoint.lock(out):
                free = (Path(f"{out}.{i}") for i in itertools.count(1))
                aside = next(path for path in free if not path.exists())
                out.rename(aside)
            out.mkdir()
            say(config, f"the run that was in {out} is in {aside} now")
        (out / ".lock").touch()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


def prepare(
    config: Config,
    out: Path,
    mesh: jax.sharding.Mesh,
    teacher_mesh: jax.sharding.Mesh | None,
    layout: sharding.Layout,
) -> tuple[Run | None, State | None, list[int] | None]:
    """All that a run needs before its next step, and which blocks were kept; nothing if it is
    finished."""
    share = sharding.process_rows(mesh, layout.params)
    last = checkpoint.latest(out / "checkpoints")
    check_resumable(config, out)
    if last is not None and last >= config.steps and (out / "student").exists():
        say(config, f"this run is finished: the student is in {out / 'student'}")
        return None, None, None
    if last is None:
        write_config(config, out)
    (optimizer, _), born = fixed(config), beginning(config)
    cuts = config.student is None and config.student_init != "random"
    tokenizer = models.fetch(config.teacher, weights=False)
    looking = needs_teacher(config)
    if config.student is not None and looking:
        text.same_tokenizer(tokenizer, models.fetch(config.student, weights=False))
    elif config.student is not None:
        tokenizer = models.fetch(config.student, weights=False)
    shape = student_config(config)
    vocab = shape.vocab
    if looking:
        vocab = min(vocab, models.config(config.teacher).vocab)
    if not config.force:
        plan.refuse(config, mesh, layout, born, optimizer, teacher_mesh)
    corpus = data.open_corpus(
        config.data, tokenizer, seq_len=config.seq_len, seed=config.seed, vocab=vocab
    )
    digests = processes.allgather(int(corpus.digest[:15], 16))
    if (digests != digests[0]).any():
        raise UserError(
            "the processes read different text: give all of them the same --data.source"
        )
    data.batch(corpus, 0, config.batch_size)  # a text that is too short ends here
    made = None
    if config.targets is not None:
        made = target_store.load(config.targets)
        named = config.teacher != config.student  # else nobody needs its weights
        target_store.check(
            made, corpus, config.loss, tokenizer=tokenizer, vocab=shape.vocab,
            rows=config.steps * config.batch_size,
            teacher=models.fetch(config.teacher) if named else None,
        )  # fmt: skip
    if not any(part.windows for part in corpus.held_out):
        raise UserError(
            "there is no text to evaluate on: raise --data.held-out, or give --data.eval-source"
        )

    teacher, kept = None, None
    with sharding.use_mesh(teacher_mesh or mesh, layout):
        chosen = (out / "choice.json").exists()
        if looking or (cuts and (last is None or not chosen)):
            teacher = models.load(config.teacher, mesh=teacher_mesh or mesh)
        if cuts:
            windows = data.batch(corpus, 0, min(config.calibration_windows, corpus.windows))
            kept = choose(config, teacher, windows, out)
            shape = shape.select({"layers": tuple(kept)})
        student = None
        if last is None and cuts:
            student = students.cut(teacher, {"layers": tuple(kept)})
    if not looking:
        teacher = None
    family = models.FAMILIES[shape.model_type]
    if last is not None:
        outline = plan.abstract_state(lambda key: born(family(shape, key), optimizer), mesh, layout)
        state, extra, _ = checkpoint.restore(out / "checkpoints", outline)
        if extra["data"] != corpus.digest:
            other = f"{out} was trained on other text than {' '.join(config.data.source)} holds now"
            if not config.resume_anyway:
                raise UserError(
                    f"{other}: put the old text back, begin anew with --no-resume, or add"
                    " --resume-anyway"
                )
            say(config, f"continued anyway: {other}")
        write_config(config, out)  # only now: what is refused leaves the run as it was
        state = eqx.tree_at(lambda state: state.skipped, state, jnp.zeros_like(state.skipped))
    else:
        if config.student is not None:
            student = models.load(config.student, dtype=jnp.float32, mesh=mesh)
        elif not cuts:
            student = students.fresh(family, shape, jax.random.key(config.seed), mesh)
        student = jax.device_put(student, sharding.specs(student, mesh))
        state = born(student, optimizer)
        # What lies there already stays: `sharding.shard` would hold all of it twice for a moment.
        state = jax.device_put(state, plan.state_shardings(state, mesh, layout))
    run = Run(
        config, out, mesh, layout, share, teacher, teacher_mesh, made, tokenizer, corpus,
        *fixed(config, kept),
    )  # fmt: skip
    processes.sync("prepared")
    return run, state, kept


def greet(run: Run, state: State) -> None:
    """What is about to happen, and how large it is."""
    beside = " on devices of its own" if run.teacher_mesh is not None else ""
    for name, model in (("teacher", run.teacher), ("student", state.student)):
        if model is not None:
            leaves = jax.tree.leaves(model)
            count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
            about = f"{model.config.layers} blocks, {report.count(count)} parameters"
            where = beside if name == "teacher" else ""
            say(run.config, f"{name}   {about}, {report.size(size)}{where}")
    corpus, config, device = run.corpus, run.config, jax.devices()[0]
    say(
        config,
        f"data      {report.count(corpus.tokens)} tokens, {report.count(corpus.windows)} windows of"
        f" {config.seq_len}; {config.steps} steps of {config.batch_size} windows",
    )
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    say(
        config,
        f"device    {jax.device_count()} x {device.device_kind} ({mesh}), {config.compute_dtype}",
    )


PATIENCE = 5  # updates in a row that may be left out


def loop(
    run: Run, state: State, saved: checkpoint.Checkpoints, kept: list[int] | None, begun: float
) -> State:
    """From the step of `state` to the last. The device is never waited for, but one step behind."""
    config, start = run.config, int(state.step)
    fixed = (run.optimizer, run.objective)
    beside = run.beside() if run.targets is None else None
    compiling = time.monotonic()
    program = sharding.compiled(step.lower((beside, run.batch(start)), state, *fixed))
    say(
        config,
        f"compiled  in {report.duration(time.monotonic() - compiling)}, {plan.memory(program)}",
    )
    flops = run.step_tokens * plan.step_flops(
        state.student,
        run.teacher if run.uses_teacher_loss and not run.targets else None,
        config.seq_len,
    )
    peak = plan.matrix_peak(config.compute_dtype)
    turns = on_policy.turns(config.on_policy, config.seed, start, config.steps)
    write = author(run, state) if turns.any() else None
    if start:
        say(config, f"goes on   from step {start}")
    spent = report.Stopwatch()
    label = "KL" if config.loss.divergence == "forward_kl" else config.loss.divergence
    first, last = profile_window(config.profile_steps) if config.profile_steps else (0, 0)
    deadline = begun + 60 * (config.time_limit or float("inf"))

    def tell(number: int, metrics: dict[str, Any]) -> None:
        found = jax.device_get(metrics)
        if found["skipped"]:
            log.say(f"step {number}: loss or gradient is not finite, the update is left out")
        if found["skipped"] >= PATIENCE:
            save(int(state.step))
            saved.wait()
            raise UserError(
                f"step {number}: loss or gradient was not finite {PATIENCE} times in a row; the"
                " state is saved: look at the data, or begin anew with --no-resume and a lower"
                " --optim.lr"
            )
        if number % config.log_every and number != config.steps:
            return
        seconds, steps = spent.lap(number)
        rate = run.step_tokens * steps / seconds
        line = {"step": number} | {k: float(found[k]) for k in ("loss", "divergence", "ce")}
        if not run.uses_teacher_loss:
            line["divergence"] = None
        line |= {"features": found["features"]} if "features" in found else {}
        line |= {"on_policy": int(turns[number - 1 - start])} if config.on_policy.fraction else {}
        line |= {"grad_norm": float(found["grad_norm"]), "lr": float(found["lr"])}
        line |= {"tokens": number * run.step_tokens, "tokens_per_second": round(rate, 1)}
        line |= {name: value for name, value in found.items() if "/" in name}
        log.step(line, mfu=flops * steps / seconds / peak)

    def look(number: int) -> None:
        found = {"step": number} | run.evaluate(state.student)
        name = "eval/kl" if "eval/kl" in found else "eval/ce"
        told = report.read(metrics) if config.keep_best else []
        lines = [line for line in told if line["step"] < number]
        before = [line[name] for line in lines if line.get(name) is not None]
        if config.keep_best and found[name] <= min(before, default=float("inf")):
            export(run, state, run.out / "student-best", kept, [*told, found])
        log.evaluation(found)

    def save(number: int) -> None:
        saved.save(number, state, {"data": run.corpus.digest})

    def stops(number: int) -> bool:
        """Whether to end early; all processes must find the same, so they ask each other then."""
        if number == config.steps:
            return False
        if jax.process_count() > 1 and number % config.log_every:
            return False
        late = interruption.asked or time.monotonic() > deadline
        return bool(processes.allgather(late).any())

    metrics = run.out / "metrics.jsonl"
    with (
        report.Log(
            metrics if jax.process_index() == 0 else None, steps=config.steps, start=start,
            quiet=config.quiet, divergence=label,
        ) as log,
        Interruption() as interruption,
        contextlib.closing(data.prefetch(run.batch, start, config.steps)) as batches,
    ):  # fmt: skip
        if start == 0:
            look(0)
        spent.start(start)
        behind: tuple[int, dict[str, Any]] | None = None
        for number, batch in enumerate(batches, start + 1):
            if number == first:
                jax.profiler.start_trace(run.out / "trace")
            if turns[number - 1 - start]:
                batch = write(state, batch)
            state, found = processes.block_on_cpu(program((beside, batch), state, *fixed))
            if behind is not None:
                tell(*behind)
            behind = number, found
            evaluates = number % config.eval_every == 0 or number == config.steps
            saves = number % config.save_every == 0 or number == config.steps
            ends = stops(number)
            traces = start < first <= number <= last  # else it was not begun here
            if traces and (ends or number == min(last, config.steps)):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                log.say(f"steps {first} to {number} are traced in {run.out / 'trace'}")
            if not (evaluates or saves or ends):
                continue
            tell(*behind)
            behind = None
            with spent.aside():
                if evaluates:
                    look(number)
                if saves or ends:
                    save(number)
            if ends:
                saved.wait()
                words = [word for word in sys.argv if word not in ("--no-resume", "--no_resume")]
                again = shlex.join(["python", *words])
                log.say(f"stopped at step {number}, all is saved; to continue: {again}")
                raise SystemExit(0)
    return state


def author(run: Run, state: State) -> Callable[[State, data.Batch], data.Batch]:
    """Makes the batch of a step from the state before it and the data's batch."""
    config = run.config
    how = {
        "config": config.on_policy,
        "seed": config.seed,
        "vocab": min(state.student.config.vocab, run.teacher.config.vocab),
        "stop": text.stop_ids(run.tokenizer),
        "dtype": run.objective.dtype,
    }

    def given(state: State, batch: data.Batch) -> tuple[Any, ...]:
        writer = run.teacher if config.on_policy.writer == "teacher" else state.student
        return writer, batch, state.step

    begun = time.monotonic()
    lowered = on_policy.write.lower(*given(state, run.batch(int(state.step))), **how)
    program = sharding.compiled(lowered)
    took = report.duration(time.monotonic() - begun)
    say(config, f"writer    the {config.on_policy.writer}, compiled in {took}")
    return lambda state, batch: processes.block_on_cpu(program(*given(state, batch), **how))


class Interruption:
    """Ctrl-C and SIGTERM as a wish to stop after the step; a second one is taken at its word."""

    asked = False

    def __enter__(self) -> "Interruption":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others may not
            for kind in (signal.SIGINT, signal.SIGTERM):
                self.before[kind] = signal.signal(kind, self.ask)
        return self

    def ask(self, kind: int, _: Any) -> None:
        self.asked = True
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


def export(
    run: Run, state: State, folder: Path, kept: list[int] | None, metrics: list[dict[str, Any]]
) -> None:
    """The student as a checkpoint of Hugging Face, with a card that says how it came about."""
    config, steps = run.config, int(state.step)
    start = "random weights"
    if config.student is not None:
        start = f"the weights of {Path(config.student).name}"
    elif kept is not None:
        depth = models.config(config.teacher).layers
        start = f"{len(kept)} of the teacher's {depth} blocks: {', '.join(map(str, kept))}"
    teacher = config.teacher if run.targets is None else run.targets.teacher_name
    if run.targets is None and teacher == config.student:
        teacher = None
    card = figures.model_card(
        teacher=teacher,
        start=start,
        data=", ".join(Path(name).name for name in config.data.source),
        loss=describe_loss(config.loss, config.on_policy),
        tokens=steps * run.step_tokens,
        steps=steps,
        rows=figures.rows(metrics),
    )
    dtype = jnp.dtype(config.export_dtype)
    exported = jax.tree.map(lambda leaf: leaf.astype(dtype), state.student)
    models.save(exported, folder, tokenizer=run.tokenizer, notes={"README.md": card})


def finish(run: Run, state: State, kept: list[int] | None) -> Path:
    """Curves, the exported student, samples and the table."""
    config, folder, metrics = run.config, run.out / "student", run.out / "metrics.jsonl"
    number, first = int(state.step), jax.process_index() == 0
    lines = report.read(metrics) if first else []
    told = any(line["step"] == number and "eval/ce" in line for line in lines)
    if processes.allgather(first and not told).any():  # where --steps has moved to an earlier save
        with report.Log(
            metrics if first else None, steps=number, start=number, quiet=config.quiet
        ) as log:
            log.evaluation({"step": number} | run.evaluate(state.student))
        lines = report.read(metrics) if first else []
    if first:
        figures.curves(metrics, run.out / "curves.png")
    # Last of all files: a run that has its student is finished.
    export(run, state, folder, kept, lines)
    windows, length = next(data.evaluation(run.corpus, 32)), min(24, config.seq_len)
    begins, ends = windows.segments[:, 0], windows.segments[:, length - 1]
    within = np.argsort(begins != ends, kind="stable")[:2]  # one document's, where there are such
    windows = windows.tokens[within[ends[within] > 0], :length]
    writers = {"student": (state.student, run.mesh)} if len(windows) else {}
    if writers and run.teacher is not None:
        writers = {"teacher": (run.teacher, run.teacher_mesh or run.mesh)} | writers
    for line in generate.continuations(
        writers, run.tokenizer, windows, layout=run.layout, dtype=run.objective.dtype
    ):
        say(config, line)
    if jax.process_index() == 0:
        print(figures.table(figures.rows(lines)))
        print(f"student  {folder}")
        best = run.out / "student-best"
        if config.keep_best and best.exists():
            name = "eval/kl" if any("eval/kl" in line for line in lines) else "eval/ce"
            told = [line for line in lines if line.get(name) is not None]
            at = min(reversed(told), key=lambda line: line[name])["step"]
            print(f"best     {best} (step {at})")
        print(f"curves   {run.out / 'curves.png'}")
    processes.sync("finished")
    return folder


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = errors.cli(Config)
    processes.start(
        distributed=config.distributed, coordinator=config.coordinator,
        processes=config.processes, process_id=config.process_id, devices=config.devices,
    )  # fmt: skip
    with processes.exit_with_peers():
        train(config)


if __name__ == "__main__":
    errors.run(main)
