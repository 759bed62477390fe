"""What a run leaves for its reader: valid lines, honest figures, nothing half-written."""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import Hub

import data
import distill
import models
from runtime import card, figures, prepare, report
from runtime.errors import UserError
from text import store

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def step(number, **more):
    known = {"loss": 2.5, "divergence": 0.4, "ce": 3.0, "grad_norm": 1.0, "lr": 1e-3}
    return {"step": number, **known, "tokens": 100 * number, "tokens_per_second": 50.0, **more}


def evaluation(number, ce, kl=0.5, agreement=0.6, teacher=2.0):
    figures = {"eval/ce": ce, "eval/kl": kl, "eval/agreement": agreement}
    return {"step": number, **figures, "eval/teacher_ce": teacher}


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_import_is_light():
    heavy = "jax numpy matplotlib tqdm"
    script = "import sys; from runtime import report;"
    script += f" print([m for m in '{heavy}'.split() if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.0k"), (1000, "1.0k"), (12_345, "12.3k")]
    + [(999_949, "999.9k"), (999_950, "1.0M"), (1_234_567, "1.2M"), (1.72e9, "1.7B")]
    + [(2e15, "2000.0T")],
)  # fmt: skip
def test_counts(number, text):
    assert report.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512 B"), (3.4e9, "3.4 GB"), (5_990_000, "6.0 MB")]
)
def test_sizes(number, text):
    assert report.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.7, "1m00s"), (61, "1m01s"), (3599.6, "1h00m"), (3725, "1h02m")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_every_line_is_valid_json_and_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with report.quietly(), report.Log(path, steps=10) as log:
        log.step(step(1, loss=math.nan, ce=np.float32("inf"), grad_norm=jnp.float32(1.5)))
        log.step(step(2, norms=jnp.array([1.0, jnp.nan])))

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        lines = [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]
    assert lines[0] == step(1, loss=None, ce=None, grad_norm=1.5)
    assert lines[1] == step(2, norms=[1.0, None])
    assert isinstance(lines[0]["step"], int)
    assert set(lines[0]) == set(
        "step loss divergence ce grad_norm lr tokens tokens_per_second".split()
    )


def test_resuming_drops_what_came_after_and_a_cut_last_line(tmp_path):
    path = written(
        tmp_path / "m", evaluation(0, 5.0), step(1), step(2), evaluation(2, 4.0), step(3)
    )
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with report.quietly(), report.Log(path, steps=10, start=2) as log:
        log.step(step(3, loss=1.0))
    lines = report.read_metrics(path)
    assert lines == [evaluation(0, 5.0), step(1), step(2), evaluation(2, 4.0), step(3, loss=1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_new_run_begins_with_an_empty_file(tmp_path):
    path = written(tmp_path / "m", evaluation(0, 5.0), step(1))
    with report.quietly(), report.Log(path, steps=10):
        assert report.read_metrics(path) == []


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path / "m", step(1), step(2))

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot be written .no space"):
        report.Log(path, steps=10, start=1)
    assert report.read_metrics(path) == [step(1), step(2)]


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m, line 2: .*'\{\"step\": '"):
        report.read_metrics(path)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with report.Log(tmp_path / "m", steps=10) as log:
        log.step(step(2) | {"mfu": 0.414})
        log.evaluation(evaluation(2, 4.0))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        # 8 steps of 100 tokens are left, at 50 a second
        "step 2/10  loss 2.5000  KL 0.4000  50 tok/s  MFU 41%  ETA 16s",
        "held out at step 2  ce 4.0000  kl 0.5000  agreement 0.6000  teacher_ce 2.0000",
    ]


def test_plain_lines_of_a_run_without_a_teacher_or_a_finite_loss():
    lone = step(10, divergence=None, loss=None, tokens_per_second=None)
    assert report.step_line(lone, 10) == "loss -"
    assert report.step_line(step(10), 10, divergence="JSD").split("  ")[1] == "JSD 0.4000"


def test_quiet_prints_only_what_must_be_said(tmp_path, capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with report.quietly(), report.Log(tmp_path / "m", steps=10) as log:
            log.step(step(2))
            log.evaluation(evaluation(2, 4.0))
            log.say("skipped")
        assert capsys.readouterr() == ("", "skipped\n")
    assert len(report.read_metrics(tmp_path / "m")) == 2


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with report.Log(tmp_path / "m", steps=10, start=2) as log:
        assert "2/10" in screen.getvalue()
        log.step(step(6) | {"mfu": 0.414})
        log.evaluation(evaluation(5, 4.0))
        log.step(step(10))
    shown = screen.getvalue().replace("\r", "\n").split("\n")
    assert any("6/10  loss 2.5000  KL 0.4000  50 tok/s  MFU 41%  ETA 8s" in x for x in shown)
    assert any(line.startswith("held out at step 5  ce 4.0000") for line in shown)
    assert any(line.startswith("100%") and "10/10" in line for line in shown)


# ---- phases --------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(report, "ON_TERMINAL", (0.001, 0.001))
    monkeypatch.setattr(report, "ELSEWHERE", (0.001, 0.001))


def wait_for(shown, text, seconds=10):
    deadline = time.monotonic() + seconds
    while text not in shown():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        (("compiling", 0, None, "", 75.0), "compiling  1m15s"),
        (("tokenizing", 10, None, "3.1M tokens", 5.0), "tokenizing  5s  3.1M tokens"),
        (("scoring", 0, 40, "", 5.0), "scoring  0/40"),
        (("scoring", 10, 40, "80 tok/s", 5.0), "scoring  10/40  80 tok/s  ETA 15s"),
        (("tokenizing", 1_200_000, 2_400_000, "", 5.0), "tokenizing  1.2M/2.4M  ETA 5s"),
        (("choosing", 0, 40, "", 5.0, "(cheaper)"), "choosing  0/40  (cheaper)"),
        (("choosing", 10, 40, "", 100.0, "(cheaper)"), "choosing  10/40  ETA 5m00s  (cheaper)"),
        (("choosing", 10, 40, "", 99.0, "(cheaper)"), "choosing  10/40  ETA 4m57s"),
    ],
)
def test_the_line_of_a_phase(phase, line):
    assert report.phase_line(*phase) == line


def test_plain_lines_of_a_phase_where_there_is_no_terminal(soon, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with report.progress("choosing", 12) as advance:
        wait_for(screen.getvalue, "choosing  0/12\n")
        advance(3, remark="KL 0.5")
        wait_for(screen.getvalue, "choosing  3/12  KL 0.5  ETA 0s\n")
        advance(4, 16)
        wait_for(screen.getvalue, "choosing  4/16  ETA 0s\n")
    with report.progress("compiling"):  # that nobody counts
        wait_for(screen.getvalue, "compiling  0s\n")
    length = len(screen.getvalue())
    time.sleep(0.01)
    assert len(screen.getvalue()) == length
    assert all(
        line.startswith(("choosing", "compiling")) for line in screen.getvalue().split("\n")[:-1]
    )


def test_items_that_somebody_works_through(soon, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    for item in report.track("abc", "scoring", 3):
        wait_for(screen.getvalue, f"scoring  {'abc'.index(item)}/3")


def test_a_phase_that_is_over_soon_or_in_a_quiet_run_shows_nothing(monkeypatch, capsys):
    with report.progress("fetching", 3) as advance:
        advance(3)
    monkeypatch.setattr(report, "ELSEWHERE", (0.0, 0.001))
    with report.quietly(), report.quietly(False), report.progress("fetching") as advance:
        advance(1, remark="x")
        time.sleep(0.01)
    assert capsys.readouterr() == ("", "")


def test_a_phase_ends_with_what_ends_it(soon, monkeypatch):
    screen, threads = io.StringIO(), threading.active_count()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), report.progress("compiling"):
        raise KeyboardInterrupt
    assert threading.active_count() == threads
    with report.progress("compiling"):  # on a terminal that goes away
        screen.close()
        time.sleep(0.01)


def on_screen(sent: str) -> list[str]:
    """The lines that a terminal shows of what it was sent."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|.", sent, re.DOTALL):
        if piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + piece + lines[row][column + 1 :]
            column += 1
        assert row >= 0
    return [line.rstrip() for line in lines]


class PseudoTerminal:
    """A terminal of 100 columns, and what it was sent."""

    def __enter__(self):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.stream, self.descriptor, self.sent = os.fdopen(theirs, "w"), ours, b""
        os.set_blocking(ours, False)
        return self

    def shown(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.descriptor, 1 << 16):
                self.sent += block
        return "\n".join(on_screen(self.sent.decode(errors="ignore")))

    def __exit__(self, *_):
        self.stream.close()
        os.close(self.descriptor)


def test_a_phase_on_a_terminal_leaves_no_trace(soon, monkeypatch):
    with PseudoTerminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with report.progress("choosing", 12) as advance:
            advance(3, remark="KL 0.5")
            wait_for(terminal.shown, "choosing  3/12  KL 0.5  ETA")
            assert terminal.shown().startswith(" 25%|")
        assert not terminal.shown().strip()
        with report.progress("compiling"):
            wait_for(terminal.shown, "compiling  0s")
            assert "|" not in terminal.shown()
        assert not terminal.shown().strip()


def test_a_phase_within_a_run_does_not_run_into_its_bar(soon, monkeypatch, tmp_path):
    with PseudoTerminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        with report.Log(tmp_path / "m", steps=10) as log:
            log.step(step(2))
            with report.progress("evaluating", 4) as advance:
                advance(2)
                wait_for(terminal.shown, "evaluating  2/4")
                bar, phase = terminal.shown().split("\n")[:2]
                assert bar.startswith(" 20%|") and bar.endswith("ETA 16s")
                assert phase.startswith(" 50%|") and "evaluating  2/4  ETA" in phase
            log.evaluation(evaluation(2, 4.0))
            said, bar, *rest = terminal.shown().split("\n")
            assert said.startswith("held out at step 2  ce 4.0000") and bar.startswith(" 20%|")
            assert not any(rest)


FETCH = """
import sys
from runtime import report
report.ON_TERMINAL = (0.0, 0.001)
import models
models.fetch("owner/tiny")
"""


def test_the_hub_client_shows_no_bars_of_its_own(tmp_path):
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    demo = ROOT / "demo" / "teacher"
    hub.add("owner/tiny", main={name: (demo / name).read_bytes() for name in names})
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    with PseudoTerminal() as terminal:
        command = [sys.executable, "-c", FETCH]
        assert not subprocess.run(
            command, cwd=ROOT, env=environment, stderr=terminal.stream
        ).returncode
        terminal.shown()
        sent = terminal.sent.decode(errors="replace")
    hub.shutdown()
    hub.server_close()
    assert "fetching owner/tiny  0s" in sent
    assert "Fetching" not in sent and "Download" not in sent


def test_tokenizing_says_how_far_it_is(soon, monkeypatch, tmp_path):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(store, "CHUNK", 1000)
    path = tmp_path / "a.txt"
    path.write_text((ROOT / "demo" / "stories.txt").read_text()[:50_000])
    for quiet in (False, True):
        config = data.Config((str(path),), documents="paragraph", cache=str(tmp_path / str(quiet)))
        with report.quietly(quiet):
            data.open_corpus(config, ROOT / "demo" / "teacher", seq_len=32, seed=0, vocab=2048)
        shown, _ = screen.getvalue(), screen.truncate(0)
        assert quiet or re.search(r"tokenizing \S+a.txt  \S+/\S+k  \S+ tokens.*  ETA", shown)
    assert not shown.strip("\0")


# ---- the table, the card, the curves -------------------------------------------------------------


def test_rows_compare_the_first_and_the_last_evaluation():
    lines = [
        evaluation(0, 6.0, kl=3.0),
        step(1),
        evaluation(5, 3.0),
        evaluation(9, 2.5, 0.25, 0.75),
    ]
    header, teacher, before, now = figures.rows(lines)
    assert teacher == ["teacher", "2.0000", "7.39", "-", "-", "-"]
    assert before == ["student at step 0", "6.0000", "403.43", "3.0000", "60.0%", "0.0%"]
    assert now == ["student at step 9", "2.5000", "12.18", "0.2500", "75.0%", "87.5%"]
    assert figures.rows(lines[:1]) == [header, teacher, before]
    assert figures.rows([step(1)]) == [header]


def test_rows_without_a_teacher_or_a_gap():
    alone = [{"step": n, "eval/ce": ce} for n, ce in ((0, 6.0), (9, 2.5))]
    _, *students = figures.rows(alone)
    assert [row[-1] for row in students] == ["-", "-"]
    assert [row[0] for row in students] == ["student at step 0", "student at step 9"]
    ahead = [evaluation(0, 1.9), evaluation(9, 1.8)]
    assert [row[-1] for row in figures.rows(ahead)[1:]] == ["-"] * 3
    lost = [evaluation(0, 6.0), evaluation(9, None)]
    assert figures.rows(lost)[-1][-1] == "-"


def test_table_is_aligned_and_says_what_the_rows_say():
    rows = figures.rows([evaluation(0, 13.4, 9.0, 0.01), evaluation(1000, 2.5, 0.0004, 0.75)])
    header, *lines = figures.table(rows).splitlines()
    assert {len(line) for line in lines} == {len(header)}
    assert [line.split()[-5:] for line in lines] == [
        ["2.0000", "7.39", "-", "-", "-"],
        ["13.4000", "660.0k", "9.0000", "1.0%", "0.0%"],
        ["2.5000", "12.18", "4.0e-04", "75.0%", "95.6%"],
    ]
    end = header.index("perplexity") + len("perplexity")
    assert all(line[end - 1] != " " and line[end] == " " for line in lines)
    cells = [line.split("|")[2:-1] for line in figures.markdown(rows).splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in cells] == [x.split()[-5:] for x in lines]


def test_a_table_survives_a_student_that_diverged():
    text = figures.table(figures.rows([evaluation(0, None), evaluation(1, 1e40)]))
    _, _, lost, wrong = text.splitlines()
    assert lost.split()[4:] == ["-", "diverged", "0.5000", "60.0%", "-"]
    assert wrong.split()[4:] == ["1.0e+40", "diverged", "0.5000", "60.0%", "-"]


def card_of(monkeypatch, teacher: str) -> str:
    """Of a student of three of the teacher's 24 blocks."""
    monkeypatch.setattr(models, "config", lambda source: SimpleNamespace(layers=24))
    text = distill.Data(source=("my/stories.txt",))
    config = distill.Config(teacher=teacher, data=text, batch_size=4, seq_len=1024, out="runs/x")
    facts = {"config": config, "out": Path("runs/x"), "layers": [0, 2, 23], "first_token": 0}
    run = prepare.Run(**dict.fromkeys(prepare.Run._fields) | facts)
    metrics = [evaluation(0, 6.0), evaluation(300, 3.0)]
    return card.model_card(run, models.load(ROOT / "demo" / "teacher"), 300, metrics)


def test_model_card_states_the_facts(monkeypatch):
    text = card_of(monkeypatch, "bigscience/bloom-1b7")
    _, front, body = text.split("---\n", 2)
    assert front.splitlines() == [
        'base_model: "bigscience/bloom-1b7"',
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- distillation",
    ]
    for fact in ("bigscience/bloom-1b7", "3 of the teacher's 24 blocks: 0, 2, 23", ": stories.txt"):
        assert fact in body
    for fact in ("**Loss**: forward_kl", "1.2M tokens in 300 optimizer steps", "| 75.0% |"):
        assert fact in body


def test_model_card_of_a_local_teacher_names_its_folder_only(monkeypatch, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    text = card_of(monkeypatch, str(teacher))
    assert "base_model" not in text
    assert str(tmp_path) not in text
    assert "- **Teacher**: teacher\n" in text


@pytest.fixture
def empty_pictures():
    """None here: that of all other tests is left out."""


def drawn(monkeypatch, tmp_path, *lines):
    """The panels of the figure by title, as drawn into a PNG."""
    from matplotlib.figure import Figure

    sheets, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (sheets.append(self), save(self, *a, **k))
    )
    figures.curves({"m": written(tmp_path / "m", *lines)}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "m"]
    return {panel.get_title(): panel for panel in sheets[0].axes}


def series(panel):
    return {line.get_label(): line.get_xydata().tolist() for line in panel.lines}


def test_curves_draw_what_the_file_says(monkeypatch, tmp_path):
    lines = [
        evaluation(0, 5.0, 2.0), step(1, kl=0.4), step(2, loss=None, ce=2.8),
        evaluation(2, 4.0, 0.01),
    ]  # fmt: skip
    panels = drawn(monkeypatch, tmp_path, *lines)
    loss, ce, kl, rate = panels.values()
    assert series(loss) == {"loss": [[1, 2.5]], "divergence": [[1, 0.4], [2, 0.4]]}
    assert series(ce) == {
        "training": [[1, 3.0], [2, 2.8]],
        "held out": [[0, 5.0], [2, 4.0]],
        "teacher, held out": [[0, 2.0], [2, 2.0]],
    }
    assert series(kl) == {"training": [[1, 0.4]], "held out": [[0, 2.0], [2, 0.01]]}
    assert kl.get_yscale() == "log"
    assert list(series(rate).values()) == [[[1, 1e-3], [2, 1e-3]]]


def test_curves_of_a_run_with_nothing_to_tell(monkeypatch, tmp_path):
    panels = drawn(monkeypatch, tmp_path, {"step": 0, "eval/ce": 5.0}, step(1, divergence=None))
    assert "teacher, held out" not in series(panels["cross entropy, nats per token"])
    assert panels["KL from the teacher, nats per token"].get_yscale() == "linear"


def test_curves_where_the_student_is_its_teacher(monkeypatch, tmp_path):
    lines = evaluation(0, 2.0, 0.0), evaluation(5, 2.0, 0.0)
    panels = drawn(monkeypatch, tmp_path, *lines)
    assert panels["KL from the teacher, nats per token"].get_yscale() == "linear"


def test_runs_are_drawn_into_one_picture(monkeypatch, tmp_path, capsys):
    from matplotlib.figure import Figure

    sheets, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (sheets.append(self), save(self, *a, **k))
    )
    monkeypatch.chdir(tmp_path)
    for name, kl in (("one", 0.4), ("other", 0.2)):
        Path(name).mkdir()
        lines = [evaluation(0, 5.0, 2.0), *(step(i, kl=kl / i) for i in (1, 2, 3))]
        written(Path(name) / "metrics.jsonl", *lines)
    monkeypatch.setattr(sys, "argv", ["figures", "one", "other", "--out", "both.png"])
    figures.main()
    assert capsys.readouterr().out == "both.png\n" and Path("both.png").exists()
    loss, ce, kl, rate = sheets[0].axes
    assert [line.get_color() for line in kl.lines] == ["C0", "C0", "C1", "C1"]
    assert [x.get_text() for x in kl.get_legend().get_texts()] == ["one", "other"]
    assert kl.lines[2].get_ydata().tolist() == [0.2, 0.1, 0.2 / 3]
    assert ce.get_yscale() == "linear" and kl.get_yscale() == "log"
    (axis,) = loss.child_axes
    sheets[0].canvas.draw()
    assert axis.get_xlim()[1] == pytest.approx(100 * loss.get_xlim()[1])  # tokens of a step
    lines = [json.loads(line) for line in Path("other/metrics.jsonl").read_text().splitlines()]
    written(Path("other/metrics.jsonl"), *({**x, "tokens": 7 * x["step"]} for x in lines))
    figures.main()
    assert not sheets[1].axes[0].child_axes  # their steps are not comparable


@pytest.mark.parametrize("folders, words", [([], "no folder: "), (["a", "b"], "a b: ")])
def test_a_picture_of_no_runs(monkeypatch, folders, words):
    monkeypatch.setattr(sys, "argv", ["figures", *folders])
    with pytest.raises(UserError, match=f"{words}name folders of runs that have begun"):
        figures.main()
