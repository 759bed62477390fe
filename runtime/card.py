"""The model card of a student: where it comes from, how it was trained, and what it is worth."""

import json
import os
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import models
from config import Config, describe_loss, run_folder, student_widths
from models.base import LanguageModel
from runtime import buckets, commits, figures, files, report
from runtime.prepare import Run

ELSEWHERE = {  # no matter
    "--out", "--resume", "--export", "--push", "--quiet", "--data.cache", "--track",
}  # fmt: skip


def model_card(run: Run, student: LanguageModel, step: int, metrics: list[dict[str, Any]]) -> str:
    """The README of a student after so many steps."""
    config, front, taught = run.config, "", ""
    source = ", ".join(Path(name).name for name in config.data.source)
    title = f"A model trained on {source}"
    teacher = config.teacher if run.targets is None else run.targets.teacher_name
    if run.targets is not None or teacher != config.student:
        license = license_of(teacher)
        if (folder := buckets.local_path(teacher)).exists():  # `base_model` is an id of the hub
            teacher = folder.resolve().name
        else:
            front = f"base_model: {json.dumps(teacher.partition('@')[0])}\n"
        front += f"license: {json.dumps(license)}\n" if license else ""
        title, taught = f"A student of {teacher}", f"- **Teacher**: {teacher}\n"
    leaves = jax.tree.leaves(student)
    parameters, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
    name = json.dumps(config.push or run.out.name)
    packages = ", ".join(f"{x} {version(x)}" for x in ("jax", "equinox", "optax"))
    return f"""---
{front}library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
---

# {title}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained({name}) for kind in (AutoTokenizer, AutoModelForCausalLM))
```

{taught}- **Student began as**: {start(run)}
- **Size**: {student.config.layers} blocks, {report.count(parameters)} parameters, \
{report.size(size)} in {config.export_dtype}
- **Data**: {source}
- **Loss**: {describe_loss(config.loss, config.on_policy)}
- **Training**: {report.count(run.tokens(step))} tokens in {step:,} optimizer steps{_speed(metrics)}
- **Software**: {packages}

Held-out figures: cross entropy in nats per token, KL(teacher ‖ student) at temperature 1, and the
share of the cross-entropy gap between teacher and untrained student that training closed.

{figures.markdown(figures.rows(metrics))}

![curves](curves.png)

```bash
{command(config)}
```
"""


def start(run: Run) -> str:
    """What the student was before its first step."""
    config = run.config
    if config.student is not None:
        grown = config.student_init is not None
        more = f", grown to {config.student_layers} blocks" if grown else ""
        return f"the weights of {Path(config.student).name}{more}"
    if run.layers is None:
        return "random weights"
    depth, blocks = models.config(config.teacher).layers, ", ".join(map(str, run.layers))
    start = f"{len(run.layers)} of the teacher's {depth} blocks: {blocks}"
    for axis, width in student_widths(config).items():
        start += f"; {width} of {getattr(models.config(config.teacher), axis)} {axis}"
    return start


def command(config: Config) -> str:
    """The flags that make this run from nothing; of paths on this machine, the names alone."""
    folder, words = run_folder(config), ["python", "distill.py"]
    default = dict(files.flags(folder.default))
    for flag, value in files.flags(folder.settings):
        if value != default[flag] and flag not in ELSEWHERE:
            flag, *values = files.arguments(flag, value)
            words += [flag, *(Path(x).name if os.path.isabs(x) else x for x in values)]
    return shlex.join(words)


def _speed(metrics: list[dict[str, Any]]) -> str:
    """How long the steps took, and on what."""
    lines = [line for line in metrics if line.get("tokens_per_second")]
    if not lines:
        return ""
    before = [0, *(line["tokens"] for line in lines[:-1])]
    taken = sum(
        (x["tokens"] - y) / x["tokens_per_second"] for x, y in zip(lines, before, strict=True)
    )
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    speed = report.count(lines[-1]["tokens"] / taken)
    return f", {report.duration(taken)} at {speed} tokens/s on {devices}"


def license_of(teacher: str) -> str | None:
    """What a teacher's own card says."""
    path = buckets.local_path(teacher) / "README.md"
    if path.is_file():
        words = re.search(
            r"(?m)^license: *(\S+)", path.read_text(encoding="utf-8", errors="replace")[:10_000]
        )
        return words and words[1]
    return commits.COMMITS.get(f"license models/{teacher.partition('@')[0]}")
