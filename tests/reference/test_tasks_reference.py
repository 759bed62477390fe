"""Tasks of lm-eval: what its own Hugging Face model answers on the same checkpoint."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import sharding

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import eval
from runtime import tasks
from runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = (
    "the small cat sat on the mat and the dog ran to the door of the old house. a child saw the"
    " moon over the sea, and said: it is late, let us go home. they went along the river."
)
WORDS = TEXT.split(" ")
YAML = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "label",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{word}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{whole}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "{{text or word}}", "doc_to_target": "word",
        "generation_kwargs": {"until": ["th", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks, on some lines of text."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for i in range(24):
        text, word = " ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]), WORDS[i % 7 + 3 + i % 5]
        choices = [f" {WORDS[(i * k) % len(WORDS)]}" + " end" * (k % 2) for k in (1, 3, 5)]
        line = {"text": text + "  " * (i == 3), "word": word, "choices": choices, "label": i % 3}
        lines.append(line | {"whole": " ".join([TEXT] * (1 + i % 3))})
    lines[0]["text"] = ""  # nothing before what is scored
    data = folder / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
    }  # fmt: skip
    for name, settings in YAML.items():
        task = {"task": name} | common | settings
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module", params=["llama-2", "bloom"])
def checkpoint(request, tmp_path_factory):
    """A random model with a tokenizer; Llama's begins a text with <s>."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / request.param / name, folder)
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    if request.param != "bloom":
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_answers_are_those_of_the_hugging_face_model(checkpoint, folder):
    mesh = sharding.make_mesh()
    ours = tasks.Model(str(checkpoint), mesh, 8, None)
    # Its cache of logits confuses windows with equal tokens of which other parts are scored.
    options = {"device": "cpu", "dtype": "float32", "batch_size": 8, "logits_cache": False}
    theirs = HFLM(pretrained=str(checkpoint), **options)
    assert ours.max_length == theirs.max_length
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = []
    for model in (ours, theirs):
        with sharding.use_mesh(mesh):
            results.append(
                evaluator.simple_evaluate(
                    model, tasks=list(YAML), task_manager=manager, bootstrap_iters=0
                )
            )
    for name in YAML:
        answers = [
            [
                sample["resps"]
                for sample in sorted(result["samples"][name], key=lambda x: x["doc_id"])
            ]
            for result in results
        ]
        assert len(answers[0]) == 24
        if name == "local_answer":
            assert answers[0] == answers[1]
            assert len({str(answer) for answer in answers[0]}) > 1
        else:
            np.testing.assert_allclose(*map(flat, answers), rtol=0, atol=1e-3, err_msg=name)
        for key, value in results[0]["results"][name].items():
            other = results[1]["results"][name][key]
            if key.startswith(("acc", "exact")):
                assert value == other, (name, key)
            elif isinstance(value, float):
                assert value == pytest.approx(other, rel=1e-3), (name, key)


def test_eval_compares_a_model_to_its_teacher(checkpoint, folder, tmp_path, monkeypatch, capsys):
    """A table, an object and the files of lm-eval, of tasks and questions that are asked for."""
    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    words = ["eval.py", "--model", str(checkpoint), "--task-path", str(folder), "--windows", "8"]
    words += ["--out", str(tmp_path / "some.json"), "--tasks"]
    names, teacher = ["local_choice", "local_last*"], ["--teacher", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", [*words, *names, *teacher, "--json"])
    eval.main()
    table = json.loads(capsys.readouterr().out)
    assert table.keys() == {f"local_choice {x}" for x in ("acc", "acc_norm")} | {
        f"local_last_word {x}" for x in ("acc", "perplexity")
    }
    written = [json.loads((tmp_path / f"some{x}.json").read_text()) for x in ("", "-teacher")]
    for name, row in table.items():
        task, metric = name.split()
        assert row["model"] == row["teacher"] == written[1]["results"][task][f"{metric},none"]
        assert row["recovered"] == (1 if row["model"] else None) and row["±"] is not None
        assert written[0]["n-samples"][task]["effective"] == 8
    monkeypatch.setattr(sys, "argv", [*words, "local_choice"])
    eval.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["model", "±"] and len(printed) == 3
    assert float(printed[1].split()[2]) == pytest.approx(table["local_choice acc"]["model"])
    monkeypatch.setattr(sys, "argv", [*words, "local_choice", "none_such"])
    with pytest.raises(UserError, match=r"^--tasks none_such: .*--task-path$"):
        eval.main()


PROGRAM = """
from functools import partial
import eval
from runtime import errors, tasks
tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)
errors.run(eval.main)
"""


@pytest.mark.parametrize("checkpoint", ["llama-2"], indirect=True)
def test_two_processes_answer_as_one_does(checkpoint, folder, tmp_path):
    words = ["--model", str(checkpoint), "--task-path", str(folder), "--json", "--tasks", *YAML]
    tables = []
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2"]
        own = [[*where, "--process-id", str(i)] * (count > 1) for i in range(count)]
        program = [sys.executable, "-c", PROGRAM, *words, "--out", str(tmp_path / f"{count}.json")]
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(2 // count)}
        running = [
            subprocess.Popen([*program, *more], cwd=ROOT, env=environment, **pipes) for more in own
        ]
        said = [process.communicate(timeout=240) for process in running]
        assert [process.returncode for process in running] == [0] * count, said
        told = [[x for x in out.splitlines() if not x.startswith("[Gloo]")] for out, _ in said]
        assert not any(told[1:])
        tables.append(json.loads(told[0][-1]))
    assert tables[0].keys() == tables[1].keys()
    for name, row in tables[0].items():
        assert tables[1][name]["model"] == pytest.approx(row["model"], rel=1e-5), name


def test_what_is_recovered_is_a_share_of_the_better():
    """Where less is better, the teacher's part of the model's figure."""

    def results(acc: float, perplexity: float) -> dict:
        figures = {
            "alias": "t",
            "acc,none": acc,
            "acc_stderr,none": 0.1,
            "perplexity,f": perplexity,
        }
        less = {"acc": True, "perplexity": False}
        return {"results": {"t": figures}, "higher_is_better": {"t": less}}

    table = tasks.compare(results(0.4, 8.0), results(0.5, 6.0))
    assert table["t acc"] == {"model": 0.4, "±": 0.1, "teacher": 0.5, "recovered": 0.8}
    assert table["t perplexity,f"]["recovered"] == 0.75


def flat(answers) -> list[float]:
    """Log-likelihoods, and 0 or 1 for whether they are of the likeliest tokens."""
    if isinstance(answers, list | tuple):
        return [number for answer in answers for number in flat(answer)]
    return [float(answers)]
