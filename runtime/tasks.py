"""Benchmarks: the tasks of lm-eval, answered by a model, beside the answers of its teacher."""

import contextlib
import json
import os
import sys
from itertools import chain, groupby
from typing import Any

import jax
import numpy as np

import data
import losses
import models
import sharding
import text
from generate import Decoding, Job, Sampling, generate
from models.base import unstacked
from runtime import files, report
from runtime.errors import UserError

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models import utils as harness
    from lm_eval.tasks import TaskManager
except ImportError:
    raise UserError("--tasks needs lm-eval: pip install -c constraints.txt -e '.[tasks]'") from None

UNLIMITED = 2048  # tokens that a model without a limit reads at once, as in lm-eval
LEAST = 32  # rows have this length or a larger power of two, so that few programs are compiled
BOOTSTRAPS = 1000  # samples behind the standard error of what is no mean


class Model(TemplateLM):
    """A model in the terms of lm-eval, which asks for log-likelihoods and for text."""

    def __init__(self, source: str, mesh: jax.sharding.Mesh, rows: int, seq_len: int | None):
        super().__init__()
        folder, limit = models.fetch(source), models.config(source).longest
        self.max_length = models.seq_len(seq_len, UNLIMITED if limit == np.inf else limit, source)
        self.mesh, self.rows = mesh, -(-rows // mesh.size) * mesh.size  # each device has as many
        part, parts = sharding.process_rows(mesh)
        self.own = slice(part * self.rows // parts, (part + 1) * self.rows // parts)
        self.dtype, self.stop = sharding.compute_dtype(), text.stop_ids(folder)
        self.model, self.words = models.load(folder, mesh=mesh), text.load_tokenizer(folder)

    @property
    def eot_token_id(self) -> int:
        return self.words.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text which nothing else precedes."""
        bos = self.words.encoder.token_to_id(self.words.special.get("bos_token", ""))
        return self.words.eos if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids, bos = self.words.encoder.encode(string, add_special_tokens=False).ids, self.words.bos
        bare = bos is None or add_special_tokens is False or ids[:1] == [bos]
        return ids if bare else [bos, *ids]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        inputs = [(before + after)[-self.max_length - 1 :] for _, before, after in requests]
        order, answers = sorted(range(len(inputs)), key=lambda i: -len(inputs[i])), {}
        groups = [order[i : i + self.rows] for i in range(0, len(order), self.rows)]
        for group in report.track(groups, "scoring", len(groups)):
            length = max(LEAST, 1 << (len(inputs[group[0]]) - 2).bit_length())
            tokens, segments = np.zeros((2, self.rows, length + 1), np.int32)
            for row, i in enumerate(group):
                tokens[row, : len(inputs[i])], segments[row, : len(inputs[i])] = inputs[i], 1
            rows = data.Batch(*(x[self.own] for x in (tokens, segments, segments[:, 1:] > 0)))
            batch = sharding.from_host(rows, self.mesh)
            figures = losses.token_figures(self.model, None, batch, top=1, dtype=self.dtype)
            ce, likeliest = (sharding.to_host(figures[name]) for name in ("ce", "ids"))
            for row, i in enumerate(group):
                end = len(inputs[i]) - 1
                counted = slice(max(0, end - len(requests[i][2])), end)
                greedy = np.array_equal(likeliest[row, counted, 0], tokens[row, 1:][counted])
                answers[i] = -float(ce[row, counted].sum()), greedy
        return [answers[i] for i in range(len(inputs))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, in windows as long as the model can read."""
        encoded = (self.tok_encode(request.args[0]) for request in requests)
        cut = (self.prefix_token_id, self.max_length, 1)
        pairs = [utils.get_rolling_token_windows(ids, *cut) for ids in encoded]
        windows = [[(None, *utils.make_disjoint_window(pair)) for pair in some] for some in pairs]
        answers = iter(self._loglikelihood_tokens(list(chain(*windows))))
        return [sum(next(answers)[0] for _ in some) for some in windows]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continues prompts as each request says, up to the first string that ends it."""
        on_cpu, answers = self.mesh.devices.flat[0].platform == "cpu", {}
        model = self.model if on_cpu else unstacked(self.model)
        for asked, some in groupby(enumerate(requests), key=lambda pair: pair[1].args[1]):
            how = harness.normalize_gen_kwargs(asked)
            until = harness.handle_stop_sequences(how["until"], self.words.special["eos_token"])
            temperature = float(how.get("temperature", 1)) if how["do_sample"] else 0.0
            sampling = Sampling(temperature, how.get("top_k", 0), how.get("top_p", 1.0))
            max_new = min(how["max_gen_toks"], self.max_length - 1)
            decoding = Decoding(max_new, sampling, self.stop, self.dtype)
            room = slice(max_new - self.max_length, None)  # what precedes is left out
            prompts = [(i, self.tok_encode(request.args[0])[room]) for i, request in some]
            jobs = [Job(i, 0, prompt or [self.prefix_token_id]) for i, prompt in prompts]
            parts = generate(model, jobs, jax.random.key(0), decoding, slots=self.rows)
            for job, new in report.track(chain.from_iterable(parts), "generating", len(jobs)):
                said = self.words.encoder.decode(new.tolist())
                answers[job.prompt] = harness.postprocess_generated_text(said, until, None)
        return [answers[i] for i in range(len(requests))]


def compare(model: Any, teacher: Any = None) -> dict[str, dict[str, Any]]:
    """Lists the figures of each task with their standard errors; beside a teacher its own, and the
    share recovered, which is model / teacher, or where less is better teacher / model."""
    table = {}
    for task, figures in model["results"].items():
        for key in (key for key in figures if "," in key and "_stderr," not in key):
            value, error = figures[key], figures.get(key.replace(",", "_stderr,"))
            row = {"model": value, "±": None if error == "N/A" else error}
            if teacher is not None:
                row["teacher"] = other = teacher["results"][task][key]
                less = model["higher_is_better"][task].get(key.partition(",")[0]) is False
                part, whole = (other, value) if less else (value, other)
                row["recovered"] = part / whole if whole else None
            table[f"{task} {key.removesuffix(',none')}"] = row
    return table


def evaluate(config: Any) -> dict[str, dict[str, Any]]:
    """Scores a model on tasks, beside its teacher if there is one, and writes all that lm-eval says
    of each as JSON."""
    with report.progress("indexing the tasks of lm-eval"):
        manager, names = TaskManager(include_path=config.task_path), list(config.tasks)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        remedy = "see `lm-eval ls tasks`, or name a folder of your own with --task-path"
        raise UserError(f"--tasks {' '.join(unknown)}: lm-eval has no such task: {remedy}")
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process that runs JAX
    mesh, results, out = sharding.make_mesh(**config.mesh.sizes), [], files.local_path(config.out)
    sources = filter(None, (config.model, config.teacher))
    for source, suffix in zip(sources, ("", "-teacher"), strict=False):
        model = Model(source, mesh, config.batch_size, config.seq_len)
        problem = files.library_errors(f"--tasks {' '.join(names)}: lm-eval fails")
        with sharding.use_mesh(mesh), contextlib.redirect_stdout(sys.stderr), problem:
            result = evaluator.simple_evaluate(
                model, tasks=manager.match_tasks(names), task_manager=manager, limit=config.windows,
                num_fewshot=config.num_fewshot, bootstrap_iters=BOOTSTRAPS, log_samples=False,
            )  # fmt: skip
        result["config"]["model"] = source
        results.append(json.loads(json.dumps(result, default=utils.handle_non_serializable)))
        if jax.process_index() == 0:
            files.write_json(out.with_stem(out.stem + suffix), results[-1])
    return compare(*results)
