"""A conversation through a pipe, with a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = """\
{%- for message in messages %}{{ message['content'] + '\\n' }}{%- endfor %}
"""


@pytest.fixture
def chats(tmp_path):
    """The embedded teacher with a chat template."""
    for path in (ROOT / "demo" / "teacher").iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_answers_come_before_the_next_question(chats):
    command = [sys.executable, "generate.py", "--chat", "--model", str(chats), "--max-new", "8"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as talk:
        for question in ("One day a fox", "The fox", "The end"):
            talk.stdin.write(f"{question}\n")
            talk.stdin.flush()
            assert talk.stdout.readline().strip()
        rest, errors = talk.communicate("\n", timeout=60)
    assert talk.returncode == 0 and not rest and not errors, errors
