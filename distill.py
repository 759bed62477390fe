"""Distil a student from a teacher: the run, from a checkpoint to a checkpoint.

python distill.py --teacher bigscience/bloom-1b7 --student-layers 12
"""

import contextlib
import dataclasses
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

import data
import losses
import models
import optim
import sharding
import text
from config import (
    Config,
    Data,
    Mesh,
    Optim,
    parse_flags,
    run_folder,
    stages,
    uses_teacher_loss,
    with_defaults,
)
from losses import features
from models.base import LanguageModel, add_rows, check_tokens
from runtime import (
    buckets,
    checkpoint,
    errors,
    on_policy,
    plan,
    prepare,
    processes,
    report,
    results,
    resume,
    selection,
    trackers,
)
from runtime.errors import UserError
from runtime.prepare import Placement, Run
from runtime.processes import STOP, watched

__all__ = ["Config", "Data", "Mesh", "Optim", "State", "init_state", "main", "step", "train"]


class Learner(eqx.Module):
    """What is trained: the student, and what maps its hidden states to the teacher's width."""

    student: LanguageModel
    projection: features.Projection | None = None


class State(eqx.Module):
    """What a step changes."""

    learner: Learner
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]  # updates left out in a row, because something was not finite

    @property
    def student(self) -> LanguageModel:
        return self.learner.student


def init_state(
    student: LanguageModel,
    optimizer: optim.Optimizer,
    projection: features.Projection | None = None,
) -> State:
    """The state before the first step, its moments where the mesh in scope wants them."""
    learner, zero = Learner(student, projection), jnp.zeros((), jnp.int32)
    moments = eqx.filter_jit(
        lambda learner: sharding.constrain_tree(optimizer.init(learner), moments=True)
    )
    return State(learner, moments(learner), zero, jnp.copy(zero))


def checked(program: Any) -> Any:
    """A step that refuses at the call what XLA would misread, or answer in its own words."""

    @functools.wraps(program.__wrapped__)
    def call(frozen, state, optimizer, objective):
        (teacher, batch), arrays = frozen, jax.tree.leaves(eqx.filter(state, eqx.is_array))
        if any(not isinstance(x, jax.core.Tracer) and x.is_deleted() for x in arrays):
            raise UserError("a step has consumed this state: go on with the one that it returned")
        for name, x in zip(("tokens", "segments", "mask"), batch[:3], strict=True):
            if not isinstance(x, np.ndarray | jax.Array):
                raise UserError(f"batch.{name} is a {type(x).__name__}, expected an array")
        for model in (state.student, teacher):
            if model is not None:
                check_tokens(batch.tokens, model.config.vocab)
        return program(frozen, state, optimizer, objective)

    call.lower = program.lower
    return call


@checked
@eqx.filter_jit(donate="all-except-first")
def step(
    frozen: tuple[LanguageModel | None, data.Batch],
    state: State,
    optimizer: optim.Optimizer,
    objective: losses.Objective,
) -> tuple[State, dict[str, Float32[Array, "..."]]]:
    """One optimizer step on `frozen`, a teacher (or none) and a batch; consumes `state`.

    The loss is a sum over the counted tokens of the whole batch, divided once by their number. An
    update that is not finite is left out.
    """
    teacher, batch = frozen
    tokens = jnp.sum(batch.mask).astype(jnp.float32)
    per_token = 1 / jnp.maximum(tokens, 1)
    trainable, rest = eqx.partition(state.learner, optimizer.trainable(state.learner))

    def loss(trainable, embedded, batch):
        learner = eqx.combine(trainable, rest)
        total, parts = loss_sum(learner, teacher, batch, embedded, objective, state.step)
        return total * per_token, {"loss": total} | parts

    def gradient(batch):
        read = batch.tokens[:, :-1]
        embedded = jax.lax.stop_gradient(state.student).look_up(read, objective.dtype)
        value_and_grads = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, parts), (grads, d_embedded) = value_and_grads(trainable, embedded, batch)
        if (d_head := grads.student.embedding) is not None:
            # Added to what the head has found where they are tied: autodiff would add two arrays.
            d_embedding = add_rows(d_head, read, d_embedded)
            grads = eqx.tree_at(lambda learner: learner.student.embedding, grads, d_embedding)
        return sharding.constrain_tree(grads), parts

    grads, parts = accumulate(gradient, batch, objective.microbatches)
    with jax.named_scope("update"):
        learner, opt_state, update = optimizer.update(
            grads, state.opt_state, state.learner, state.step, jnp.isfinite(parts["loss"])
        )
    skipped = jnp.where(update.pop("finite"), 0, state.skipped + 1)
    metrics = {name: value * per_token for name, value in parts.items()} | update
    metrics |= {"counted": tokens, "skipped": skipped}
    if objective.norms:
        metrics |= norms("param_norm", state.student) | norms("grad_norm", grads.student)
    # Where XLA would put them is not always where the next step expects them.
    learner, skipped, metrics = sharding.constrain_tree((learner, skipped, metrics))
    opt_state = sharding.constrain_tree(opt_state, moments=True)
    return State(learner, opt_state, state.step + 1, skipped), metrics


def loss_sum(
    learner: Learner,
    teacher: LanguageModel | None,
    batch: data.Batch,
    embedded: Float[Array, "batch seq embed"],
    objective: losses.Objective,
    step: Int[Array, ""],
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The loss of a batch, a sum over its counted tokens, and the parts that it adds up."""
    read, segments, labels = batch.tokens[:, :-1], batch.segments[:, :-1], batch.tokens[:, 1:]
    student_layers, teacher_layers = features.tapped_layers(objective.pairs)
    signal = batch.signal
    with jax.named_scope("teacher"):
        if signal is None and teacher is not None and uses_teacher_loss(objective.config):
            signal = losses.teacher_states(
                teacher, batch, dtype=objective.dtype, taps=teacher_layers
            )
    with jax.named_scope("student"):
        hidden = learner.student.hidden(
            read, segments, embedded=embedded, dtype=objective.dtype, remat=objective.remat,
            taps=student_layers,
        )  # fmt: skip
        hidden, states = hidden if student_layers else (hidden, None)
    with jax.named_scope("loss"):
        total, parts = losses.distill_loss(
            hidden, learner.student.unembedding, signal, labels, batch.mask,
            objective=objective, step=step,
        )  # fmt: skip
    if student_layers:
        with jax.named_scope("features"):
            distance = features.loss(
                objective.config.features, objective.pairs, states, signal.taps, batch.mask,
                learner.projection,
            )  # fmt: skip
            total += objective.at("feature_weight", step) * distance
            parts["features"] = distance
    return total, parts


def accumulate(gradient: Any, batch: data.Batch, count: int) -> Any:
    """The sum of what `gradient` returns for `count` parts of a batch, one after the other.

    A part is every `count`-th row: so it takes rows from every device, and none moves.
    """
    if count == 1:
        return gradient(batch)

    def split(x):
        x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
        return sharding.constrain(x, " ".join(("parts", "batch", "seq", "width")[: x.ndim]))

    rows, whole = losses.partition_rows(batch)
    rows = jax.tree.map(split, rows)

    def part(rows):
        return gradient(eqx.combine(rows, whole))

    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], rows))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(
        lambda sums, rows: (jax.tree.map(jnp.add, sums, part(rows)), None), zeros, rows
    )[0]


def norms(what: str, tree: Any) -> dict[str, Float32[Array, "..."]]:
    """The norm of every leaf, of stacked leaves for each layer."""
    norm = {}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    axes = structure.flatten_up_to(sharding.axes(tree))
    for (path, leaf), names in zip(leaves, axes, strict=True):
        over = tuple(range(1 if names[0] == "layers" else 0, leaf.ndim))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        norm[f"{what}/{name}"] = jnp.sqrt(jnp.sum(leaf.astype(jnp.float32) ** 2, axis=over))
    return norm


def abstract_arguments(
    config: Config, placement: Placement, layers: list[int] | None = None
) -> tuple[tuple[Any, data.Batch], State]:
    """What a step of this run is given, as shapes in their places."""
    optimizer, _ = prepare.optimizer_and_objective(config)
    mesh, layout, _ = placement
    student, projection = eqx.filter_eval_shape(
        lambda: prepare.fresh_learner(config, jax.random.key(0), layers)
    )
    # First, so that what does not divide is named as a leaf of the student, not as its moment.
    sharding.specs(student, mesh, layout.params)
    state = eqx.filter_eval_shape(init_state, student, optimizer, projection)
    state = plan.with_shardings(state, plan.state_shardings(state, mesh, layout))
    return plan.abstract_frozen(config, placement), state


def device_bytes(config: Config, placement: Placement) -> plan.DeviceBytes:
    """What a device holds of this run while it takes a step."""
    optimizer, objective = prepare.optimizer_and_objective(config)
    arguments = abstract_arguments(config, placement)
    with report.progress("compiling"):
        program = plan.compile_abstract(step, arguments, optimizer, objective)
    return plan.resident_bytes(config, placement, *arguments, optimizer, program)


def print_plan(config: Config, placement: Placement) -> None:
    """Prints what each device would hold; what does not fit ends with a remedy and status 3."""
    need, objective = device_bytes(config, placement), prepare.optimizer_and_objective(config)[1]
    loss = plan.loss_bytes(config, *abstract_arguments(config, placement), objective)
    print(plan.table(config, placement, need, loss))
    if not plan.fits(config, need):
        print(remedy(config, placement, need))
        raise SystemExit(3)
    if plan.device_memory(config)[0] < float("inf"):
        print("it fits")


def remedy(config: Config, placement: Placement, need: plan.DeviceBytes) -> str:
    """What to change of a run that does not fit: the nearest settings that would, if there are."""
    if need.own_teacher > plan.device_memory(config)[0]:
        return "it does not fit: give the teacher more --teacher-devices"
    for flags, smaller in plan.smaller_settings(config, placement):
        if plan.fits(config, less := device_bytes(smaller, placement)):
            return f"it does not fit; with{flags} it does, in {report.size(less.total)}"
    return (
        "it does not fit, nor with --remat full, the most --microbatches, bfloat16 moments or"
        " adafactor: take more devices, a smaller --batch-size or --seq-len, fewer"
        " --student-layers, kept targets in the teacher's place (targets.py), or --optim.freeze"
    )


def check_memory(
    config: Config, placement: Placement, arguments: Any, optimizer: optim.Optimizer,
    program: Any = None,
) -> None:  # fmt: skip
    """Refuses a run that cannot fit: by its arrays alone, or by its compiled step."""
    need = plan.resident_bytes(config, placement, *arguments, optimizer, program)
    if config.force or plan.fits(config, need):
        return
    memory, source = plan.device_memory(config)
    needed = report.size(max(need.total, need.own_teacher))
    what = "arrays and gradients alone need" if program is None else "a step needs"
    why = f"a device has {report.size(memory)} ({source}), and {what} {needed}"
    words = "--plan tells what would fit"
    if program is not None:
        report.say(f"too large {why}: compiling with other settings, to find some that fit")
        words = remedy(config, placement, need)
    raise UserError(f"{why}: {words}; --force tries all the same")


@buckets.mirrored
def train(config: Config) -> Path:
    """Runs, or continues, what `config` describes; returns the folder of the exported student."""
    begun = time.monotonic()
    trackers.check_installed(config.track)
    if not config.plan:
        resume.restore_commits(with_defaults(config))  # they say where the run is
        config = prepare.with_epochs(config)
    config = with_defaults(config)
    placement, out = prepare.placement(config), run_folder(config).path
    with (
        sharding.use_mesh(placement.mesh, placement.layout),
        report.quietly(config.quiet or jax.process_index() > 0),
    ):
        deepest = selection.candidates(config)[0]
        deepest = dataclasses.replace(deepest, student_layers=stages(deepest)[0][0])
        if config.plan:
            print_plan(deepest, placement)
            return out
        with resume.open_folder(config) as folder, checkpoint.lock(out):
            last = resume.last_step(config, folder)
            if last is not None and last >= config.steps and results.is_exported(folder, last):
                report.say(f"this run is finished: the student is in {out / 'student'}")
                return results.push(config)
            models.hub.check_replaceable(out / "student")  # now, not in the end
            if config.keep_best:
                models.hub.check_replaceable(out / "student-best")
            optimizer, _ = prepare.optimizer_and_objective(deepest)
            check_memory(deepest, placement, abstract_arguments(deepest, placement), optimizer)
            run, state = prepare_state(config, out, placement)
            prepare.print_summary(run, state.student)
            names = () if jax.process_index() else config.track
            run = run._replace(track=trackers.open_all(names, folder, int(state.step)))
            if int(state.step) < config.steps and not config.export:
                apart = buckets.in_bucket(config.out)
                saves = checkpoint.Checkpoints(out / "checkpoints", config.keep, shared=not apart)
                with saves as saved:
                    while (done := int(state.step)) < config.steps:
                        if done == run.last_step:
                            run, state = next_stage(run, state)
                        state = loop(run, state, saved, begun)
            results.finish(run, state.student, int(state.step))
            return results.push(config)


def prepare_state(config: Config, out: Path, placement: Placement) -> tuple[Run, State]:
    """A run, and its state before the first step or at the last checkpoint."""
    run, student = prepare.prepare(config, out, placement)
    mesh, layout, _ = placement
    if student is not None:
        projection = prepare.projection(run.config, student.config.embed)
        state = init_state(student, run.optimizer, projection)
        # What lies there already stays: `sharding.shard` would hold all of it twice for a moment.
        return run, jax.device_put(state, plan.state_shardings(state, mesh, layout))
    _, like = abstract_arguments(run.config, placement, run.layers)
    with report.progress("reading the checkpoint"):
        state, extra, step = checkpoint.restore(out / "checkpoints", like)
    run = prepare.continued(run, step, extra)
    if not config.export:
        resume.write_config(run_folder(config))  # what is refused leaves the run as it was
    return run, eqx.tree_at(lambda state: state.skipped, state, jnp.zeros_like(state.skipped))


def next_stage(run: Run, state: State) -> tuple[Run, State]:
    """The run and its state with fewer blocks and fresh moments; the old ones go first."""
    for leaf in jax.tree.leaves(state.opt_state):
        leaf.delete()
    run, student = prepare.next_stage(run, state.student)
    fresh = init_state(student, run.optimizer)
    state = eqx.tree_at(lambda state: state.step, fresh, jnp.copy(state.step))
    mesh, layout, _ = run.placement
    return run, jax.device_put(state, plan.state_shardings(state, mesh, layout))


def loop(run: Run, state: State, saved: checkpoint.Checkpoints, begun: float) -> State:
    """Trains from the step of `state` to the last of its student; figures are read a step late."""
    config, start, last = run.config, int(state.step), run.last_step
    program, fixed = compile_step(run, state), (run.optimizer, run.objective)
    written = on_policy.on_policy_steps(config.on_policy, config.seed, start, last)
    write = compile_writer(run, state) if written.any() else None
    deadline = begun + 60 * (config.time_limit or float("inf"))
    pending: tuple[int, dict[str, Any]] | None = None
    trace = plan.Trace(config.profile_steps, run.out / "trace")
    with (
        results.open_log(run, start) as log,
        processes.Interruption(deadline, config.save_minutes) as interruption,
        contextlib.closing(data.prefetch(run.batch, start, last)) as batches,
    ):
        log_step = results.step_logger(run, state.student, start, log, written)
        if start == 0:
            results.evaluate(run, state.student, 0, log)
        log.lap(start)

        try:
            for number, batch in enumerate(watched(batches, config.hang_limit), start + 1):
                trace.before(number)
                if written[number - 1 - start]:
                    batch = write(state, batch)
                arguments = (run.step_teacher, batch), state
                # Before the step, so that reading it waits for no more than the one before.
                vote = processes.greatest(interruption.wish(), run.placement.mesh)
                state, metrics = processes.block_on_cpu(program(*arguments, *fixed))
                if pending is not None:
                    log_step(*pending)
                pending = number, metrics
                wish = interruption.wish() if vote is None else int(vote)
                ends, stops = number == last, wish == STOP and number < config.steps
                trace.after(number, state, log, ends=stops or ends)
                evaluates = number % config.eval_every == 0 or ends
                saves = wish > 0 or number % config.save_every == 0 or ends
                if not (evaluates or saves):
                    continue
                log_step(*pending)
                pending = None
                if evaluates:
                    results.evaluate(run, state.student, number, log)
                if saves:
                    saved.save(number, state, run.facts | {"tokens": run.tokens(number)})
                    interruption.last_save = time.monotonic()
                if stops or (evaluates and not ends):
                    results.draw_curves(run)
                log.lap(number)  # none of this is time of the steps
                if stops:
                    with report.progress("saving"):
                        saved.wait()
                    log.say(f"stopped at step {number}, all is saved; to continue: {command()}")
                    log.say("for the student of this step, add --export to that command")
                    raise SystemExit(config.requeue_status)
        except results.NotFinite:
            saved.save(last := int(state.step), state, run.facts | {"tokens": run.tokens(last)})
            saved.wait()
            results.draw_curves(run)
            raise
    return state


def compile_step(run: Run, state: State) -> Any:
    """The program of a step for the arrays of this run."""
    begun, start = time.monotonic(), int(state.step)
    arguments = (run.step_teacher, run.batch(start)), state
    with report.progress("compiling"):
        program = sharding.compiled(step.lower(*arguments, run.optimizer, run.objective))
    took = report.duration(time.monotonic() - begun)
    stats = program.compiled.memory_analysis()
    arrays, rest = map(report.size, (stats.argument_size_in_bytes, stats.temp_size_in_bytes))
    report.say(f"compiled  in {took}, {arrays} of arrays and {rest} to work in, a device")
    size = report.size(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    report.say(f"saves     {size} each, in {run.out / 'checkpoints'}")
    check_memory(run.config, run.placement, arguments, run.optimizer, program.compiled)
    if start:
        report.say(f"goes on   from step {start}")
    return program


def compile_writer(run: Run, state: State) -> Callable[[State, data.Batch], data.Batch]:
    """Makes the batch of a step from the state before it and the data's batch."""
    config, teacher, begun = run.config, run.teacher, time.monotonic()

    def writer(state: State) -> LanguageModel:
        return teacher if config.on_policy.writer == "teacher" else state.student

    def write(state: State, batch: data.Batch) -> data.Batch:
        return processes.block_on_cpu(program(writer(state), batch, state.step, **settings))

    settings = {
        "config": config.on_policy, "seed": config.seed, "dtype": run.objective.dtype,
        "vocab": min(state.student.config.vocab, teacher.config.vocab),
        "stop": text.stop_ids(run.tokenizer),
    }  # fmt: skip
    arrays = run.step_teacher, state
    settings["whole"] = plan.writer_fits(config, run.placement, writer(state), arrays)
    with report.progress("compiling the writer"):
        inputs = writer(state), run.batch(int(state.step)), state.step
        program = sharding.compiled(on_policy.continue_rows.lower(*inputs, **settings))
    took = report.duration(time.monotonic() - begun)
    report.say(f"writer    the {config.on_policy.writer}, compiled in {took}")
    return write


def command() -> str:
    """What continues this run."""
    words = [word for word in sys.argv if word not in ("--no-resume", "--no_resume")]
    return shlex.join(["python", *words])


def main() -> None:
    processes.end_at_once()
    config = parse_flags()
    processes.start(config, devices=1 if config.topology else config.devices)
    with processes.exit_with_peers():
        train(config)


if __name__ == "__main__":
    errors.run(main)
