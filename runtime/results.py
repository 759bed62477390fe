"""What a run measures of its student, and what it leaves: the checkpoint, the curves, the table."""

import base64
import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices

import data
import eval as evaluation
import models
import sharding
import text
from config import DURING_STEPS, Config, run_folder, uses_teacher_loss
from generate import Decoding, Sampling, sample
from models.base import LanguageModel
from models.hub import GENERATION
from runtime import card, commits, figures, files, page, plan, report
from runtime.errors import UserError
from runtime.prepare import Run
from runtime.report import Log

PATIENCE = 5  # updates in a row that may be left out
LOSSES = "loss", "divergence", "ce", "features"
MEANS = tuple(f"mean_{name}" for name in LOSSES)  # of the steps since the line before
OF_ONE_START = ("tokens_per_second", "time", "mfu", "memory", *MEANS)  # figures of a step's line
EXPORTED = "exported.json"  # of which step the exported student is, and its dtype


class NotFinite(UserError):
    """A run whose updates are left out one after the other."""

    status = 4  # of the program that it ends


def open_log(run: Run, start: int) -> Log:
    path = run.out / "metrics.jsonl" if jax.process_index() == 0 else None
    divergence = run.config.loss.divergence.replace("forward_kl", "KL")
    settings = {"steps": run.config.steps, "divergence": divergence, "track": run.track}
    return Log(path, start=start, **settings)


def step_logger(
    run: Run, student: LanguageModel, start: int, log: Log, written: Any
) -> Callable[[int, dict[str, Any]], None]:
    """What records the metrics of a step, and shows them."""
    config = run.config
    teaches = run.targets is None and uses_teacher_loss(config.loss)
    loss = config.loss.divergence, config.loss.temperature, config.loss.temperature_end
    flops = plan.step_flops(student, run.teacher if teaches else None, config.seq_len)
    peak = plan.matrix_peak(config.compute_dtype)
    totals: collections.Counter[str] = collections.Counter()
    least = flops * (run.tokens(config.steps) - run.tokens(start)) / peak
    when = "at half of these devices' peak; --tokens sets it"
    report.say(f"time      about {report.duration(2 * least)}, {when}")

    def log_step(number: int, metrics: dict[str, Any]) -> None:
        metrics = jax.device_get(metrics)
        if metrics["skipped"]:
            log.say(f"step {number}: loss or gradient is not finite, the update is left out")
        if metrics["skipped"] >= PATIENCE:
            what = f"loss or gradient was not finite {PATIENCE} times in a row; the state is saved"
            remedy = "look at the data, or begin anew with --no-resume and a lower --optim.lr"
            raise NotFinite(f"step {number}: {what}: {remedy}")
        totals.update({x: float(metrics[x]) for x in LOSSES if x in metrics}, steps=1)
        if number % config.log_every and number != run.last_step:
            return
        seconds, steps = log.lap(number)
        names = (*LOSSES, "grad_norm", "lr")
        line = {"step": number} | {name: metrics[name] for name in names if name in metrics}
        since = totals.pop("steps")
        line |= {f"mean_{name}": total / since for name, total in totals.items()}
        totals.clear()
        if not uses_teacher_loss(config.loss):
            line["divergence"] = None
        elif loss == ("forward_kl", 1.0, None):  # what evaluations measure
            line["kl"] = line["divergence"]
        if config.on_policy.fraction:
            line["on_policy"] = int(written[number - 1 - start])
        rate = config.batch_size * config.seq_len * steps / seconds
        line |= {"tokens": run.tokens(number), "tokens_per_second": round(rate, 1)}
        mfu, memory = round(flops * rate / peak, 4), plan.peak_memory()
        line |= {"time": round(time.time(), 3), "mfu": mfu, "memory": memory}
        line |= {name: value for name, value in metrics.items() if "/" in name}
        log.step(line)

    return log_step


def score(run: Run, student: LanguageModel) -> dict[str, int | float | str]:
    """Figures on held-out windows, as metrics, and what they are comparable to."""
    teacher = None if run.placement.teacher_mesh is not None else run.teacher
    batches, total = run.held_out()
    scores = evaluation.evaluate(
        student, teacher, report.track(batches, "evaluating", total),
        to_device=run.to_device, dtype=run.objective.dtype, chunk=run.config.loss.chunk,
    )  # fmt: skip
    names = ("ce", "kl", "agreement", "teacher_ce")
    figures = {f"eval/{name}": scores[name] for name in names if name in scores}
    teacher = None if run.teacher is None else run.facts["teacher"]
    of = run.facts["held_out"], teacher, run.config.eval_windows, run.config.seq_len
    return figures | {"eval/of": text.digest(of)[:8]}


def evaluate(run: Run, student: LanguageModel, number: int, log: Log) -> None:
    """Scores the student on held-out windows, and keeps the best one if that is asked for."""
    entry = {"step": number} | score(run, student)
    if run.config.keep_best:
        metrics = report.read_metrics(run.out / "metrics.jsonl")
        best = is_best([line for line in metrics if line["step"] < number], entry)
        if process_allgather(best)[0]:  # others may not see the file's last lines yet
            export(run, student, number, run.out / "student-best", [*metrics, entry])
    log.evaluation(entry)


def is_best(metrics: list[dict[str, Any]], entry: dict[str, Any]) -> bool:
    """Whether no other evaluation of the same has a lower KL (cross entropy without a teacher)."""
    name, of = "eval/kl" if "eval/kl" in entry else "eval/ce", entry.get("eval/of")
    same = [line for line in metrics if line.get("eval/of", of) == of]
    others = [line[name] for line in same if line.get(name) is not None]
    return entry[name] is not None and all(entry[name] <= x for x in [*others, float("inf")])


def export(
    run: Run, student: LanguageModel, step: int, folder: Path, metrics: list[dict[str, Any]]
) -> None:
    """The student as a checkpoint of Hugging Face, with a card that says how it came about."""
    dtype = jnp.dtype(run.config.export_dtype)
    exported = jax.tree.map(lambda leaf: leaf.astype(dtype), student)
    notes: dict[str, str | bytes] = dict(chat_files(run.tokenizer, run.corpus.chat_template))
    notes["README.md"] = card.model_card(run, exported, step, metrics)
    if (curves := run.out / "curves.png").exists():
        notes["curves.png"] = curves.read_bytes()
    with report.progress("exporting"):
        models.save(exported, folder, tokenizer=run.tokenizer, notes=notes)


def chat_files(tokenizer: Path, template: str | None) -> dict[str, str]:
    """A chat template that was not the tokenizer's own, and generation settings by which a student
    stops where it ends a turn."""
    if template is None:
        return {}
    chats, path = text.load_tokenizer(tokenizer, template=template), tokenizer / GENERATION
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    written = chats.render_chat(turns, "all", "--data.chat-template").text.rstrip()
    ends = (chats.encoder.token_to_id(x) for x in chats.closing if written.endswith(x))
    settings = files.read_json(path) if path.exists() else {}
    settings["eos_token_id"] = sorted({*text.stop_ids(tokenizer), *ends})
    return {"chat_template.jinja": template, GENERATION: json.dumps(settings, indent=2) + "\n"}


def is_exported(folder: files.RunFolder, step: int) -> bool:
    """Whether the student of this step is there in the dtype asked for; then what only a run that
    goes on can heed is refused."""
    path = folder.path / EXPORTED
    exported = files.read_json(path) if path.exists() else {}
    if exported.get("step") != step or not (folder.path / "student").exists():
        return False
    heeded = dataclasses.replace(folder, may_change=folder.may_change - DURING_STEPS)
    if changed := heeded.changed():
        remedy = "give more --steps, or --no-resume"
        raise UserError(f"{'; '.join(changed)}, but the run in {folder.path} is finished: {remedy}")
    return exported["dtype"] == folder.settings["export_dtype"]


def draw_curves(run: Run) -> None:
    """Draws the curves of a run that goes on or has saved: a full disk is not to end it here."""
    if jax.process_index() == 0:
        with contextlib.suppress(UserError):
            figures.curves({run.out.name: run.out / "metrics.jsonl"}, run.out / "curves.png")


def finish(run: Run, student: LanguageModel, step: int) -> Path:
    """Curves, the exported student, samples and the table. An older student stays until the new one
    is whole."""
    folder, path = run.out / "student", run.out / "metrics.jsonl"
    first = jax.process_index() == 0
    metrics = report.read_metrics(path) if first else []
    known = any(line["step"] == step and "eval/ce" in line for line in metrics)
    if process_allgather(first and not known).any():  # where --steps moved to an earlier save
        with open_log(run, step) as log:
            log.evaluation({"step": step} | score(run, student))
        metrics = report.read_metrics(path) if first else []
    if first:
        figures.curves({run.out.name: path}, run.out / "curves.png")
        (run.out / EXPORTED).unlink(missing_ok=True)
    export(run, student, step, folder, metrics)
    with report.progress("writing samples"):
        lines = list(samples(run, student))
        if run.teacher is not None:
            write_page(run, student, metrics, lines)
    if first:  # last of all files: a run that has it is finished
        facts = {"step": step, "dtype": run.config.export_dtype}
        files.write_json(run.out / EXPORTED, facts)
    report.say("\n".join(lines))
    if first:
        run.track({"step": step}, run.out / "curves.png", figures.rows(metrics))
        print(figures.table(figures.rows(metrics)), f"student  {folder}", sep="\n")
        evaluations = [line for line in metrics if "eval/ce" in line]
        lowest = [line["step"] for line in evaluations if is_best(evaluations, line)]
        if lowest and (best := run.out / "student-best").exists():
            print(f"best     {best} (step {lowest[-1]})")
        elif lowest and lowest[-1] < step:
            print(f"best     at step {lowest[-1]}: --keep-best keeps such a student")
        print(f"curves   {run.out / 'curves.png'}")
    sync_global_devices("finished")
    return folder


def write_page(run: Run, student: LanguageModel, metrics: list[Any], lines: list[str]) -> None:
    """Writes a page of the student beside its teacher, by tokens, and of what the run has left."""
    teacher = None if run.placement.teacher_mesh is not None else run.teacher
    batches, _ = run.held_out(min(page.WINDOWS, -(-page.TOKENS // run.config.seq_len)))
    content = page.windows(
        student, teacher, batches, run.tokenizer,
        to_device=run.to_device, dtype=run.objective.dtype, chunk=run.config.loss.chunk,
    )  # fmt: skip
    if jax.process_index() > 0:
        return
    image = base64.b64encode((run.out / "curves.png").read_bytes()).decode()
    blocks = run.layers and {"kept": run.layers, "of": run.teacher.config.layers}
    sections = [
        {"title": "Result", "table": figures.rows(metrics)},
        {"title": "Curves", "image": f"data:image/png;base64,{image}"},
        {"title": "Samples", "text": "\n".join(lines).strip()},
        {"title": "Start", "text": card.start(run), "blocks": blocks},
        {"title": "Settings", "text": card.command(run.config)},
    ]
    page.write(run.out / "report.html", run.out.name, content, sections)
    report.say(f"page      {run.out / 'report.html'}")


def push(config: Config) -> Path:
    """Uploads the exported student where that is asked for; returns its folder."""
    folder = run_folder(config).path / "student"
    if config.push is not None and jax.process_index() == 0:
        from huggingface_hub import HfApi

        commits.reserve(config.push, "model")  # of a finished run nobody has
        problem = f"--push {config.push}: cannot be written"
        with files.library_errors(problem), report.progress("uploading"):
            HfApi().upload_folder(repo_id=config.push, folder_path=folder)
        print(f"model    {HfApi().endpoint}/{config.push}")
    return folder


def samples(run: Run, student: LanguageModel) -> Iterator[str]:
    """Lines that show how teacher and student continue two held-out texts, by likeliest tokens."""
    mesh, layout, teacher_mesh = run.placement
    windows, length = next(data.evaluation(run.corpus, 32)), min(24, run.config.seq_len)
    first, last = windows.segments[:, 0], windows.segments[:, length - 1]
    rows = np.argsort(first != last, kind="stable")[:2]  # one document's, where there are such
    prompts = windows.tokens[rows[last[rows] > 0], :length]
    decode, stop = text.load_tokenizer(run.tokenizer).encoder.decode, text.stop_ids(run.tokenizer)
    greedy = Decoding(32, Sampling(temperature=0.0), stop, run.objective.dtype)
    lengths, written = np.full(len(prompts), length), {}
    writers = [("teacher", run.teacher, teacher_mesh or mesh), ("student", student, mesh)]
    for name, model, where in writers:
        if model is not None and len(prompts):
            with sharding.use_mesh(where, layout):
                key = jax.random.key(0)  # on these devices
                tokens_and_counts = sample(model, prompts, lengths, key, greedy)
                written[name] = tuple(map(sharding.to_host, tokens_and_counts))
    for row, prompt in enumerate(prompts):
        yield f"\n> {decode(prompt.tolist())!r}"
        for name, (tokens, counts) in written.items():
            yield f"{name:8}  {decode(tokens[row, : counts[row]].tolist())!r}"
