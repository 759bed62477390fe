"""Which of the teacher's blocks and channels a run keeps: decided once, written down, healed."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import data
import models
import student as students
from config import Config, student_config
from models.base import LanguageModel
from runtime import files, processes, report
from runtime.errors import UserError

FILE = "choice.json"  # of a run
ROUNDS = "choice-rounds.json"  # what remains after each round of a choice that goes on
TRIAL = 16384  # tokens that heal a candidate of --student-params, or two for each input of a solve


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
    path = out / (f"choice-{stage + 1}.json" if stage else FILE)
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
    shape = student_config(config)
    enough = max(TRIAL, 2 * shape.mlp, 2 * shape.heads * shape.head_dim)
    config = dataclasses.replace(config, heal_tokens=min(config.heal_tokens, enough))
    read = max(config.calibration_windows, -(-config.heal_tokens // config.seq_len))
    text = calibration(corpus, config.calibration_windows, first=read)
    student = cut_and_heal(config, teacher, layers, corpus)
    kl = students.kl_between(teacher, student, text, config.compute_dtype)
    size, mlp = sum(leaf.size for leaf in jax.tree.leaves(student)), student.config.mlp
    shape = f"{len(layers)} blocks, MLPs of {mlp}, {report.count(size)} parameters"
    report.say(f"candidate {shape}: KL {kl:.3f}")
    return {"kl": kl, "mlp": mlp, "parameters": size}


def cut_and_heal(
    config: Config, teacher: LanguageModel, layers: list[int], corpus: data.Corpus
) -> LanguageModel:
    """The student that has these blocks and the widths of its flags, healed. It is the same each
    time, and so is not kept for a run that dies before its first checkpoint."""
    shape, text = student_config(config), calibration(corpus, config.calibration_windows)
    indices = students.choose_widths(teacher, shape, layers, text, config.compute_dtype)
    student = students.cut(teacher, indices)
    return heal(config, teacher, student, layers, corpus, embed=indices.get("embed"))


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
