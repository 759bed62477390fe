"""Chat templates: rendered in a sandbox, and the spans of what the assistant says in them."""

import datetime
import functools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import _line
from text.files import LONGEST

# Around what a template generates, while it is rendered; NUL occurs in no text that is trained on.
OPEN, CLOSE = "\0generation(", "\0)generation"


def _unmarked(rendered: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """What a template rendered without its marks, and the spans that they enclosed."""
    text, spans = "", []
    for i, part in enumerate(re.split(f"{re.escape(OPEN)}|{re.escape(CLOSE)}", rendered)):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, tuple(spans)


def _encodable(text: str) -> bool:
    """Whether it is text that can be stored: JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Template:
    """A chat template: a program, and of somebody else's.

    A sandbox keeps it from what is Python's; a process of its own bounds the time and the memory
    that it takes, and can write no file.
    """

    SECONDS, MEMORY = 10, 1 << 30  # of the processor, and bytes; for all it does with one list

    def __init__(self, source: str, folder: Path):
        import jinja2

        self.source, self.pipe = source, None
        try:
            _environment().parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"{folder}: its chat template is malformed ({_line(error)})") from error

    def render(self, **variables: Any) -> str:
        """What it writes; a `ValueError` holds what it complains of."""
        if self.pipe is None:
            self.start()
        try:
            self.pipe.send_bytes(json.dumps(variables, default=str).encode())
            text, error = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise UserError(
                f"the chat template takes more than {self.SECONDS} s or {self.MEMORY >> 20} MiB"
            ) from None
        if error or not _encodable(text):
            raise ValueError(error or "it writes what is not text")
        return text

    def start(self) -> None:
        self.pipe, there = multiprocessing.Pipe()
        code = "import sys; sys.path[0] = sys.argv[1]; import text.chat; text.chat._serve(*sys.argv[2:])"
        here, end = str(Path(__file__).resolve().parents[1]), there.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", code, here, *map(str, (end, self.SECONDS, self.MEMORY))],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[end], start_new_session=True,
        )  # fmt: skip
        there.close()
        self.pipe.send_bytes(self.source.encode())
        weakref.finalize(self, _stop, self.pipe, process)


def _stop(pipe: Any, process: subprocess.Popen) -> None:
    pipe.close()
    process.kill()
    process.wait()


def _serve(end: str, seconds: str, memory: str) -> None:
    """What the process of a template does until nobody asks any more."""
    from multiprocessing.connection import Connection

    pipe = Connection(int(end))
    source, compiled = pipe.recv_bytes().decode(), functools.cache(_environment().from_string)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for kind, limit in (
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    while True:
        try:
            variables = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        last = int(time.process_time()) + int(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (last, hard))
        try:
            answer = compiled(source).render(**variables), None
            if len(answer[0]) > LONGEST:
                answer = None, f"it writes more than {LONGEST >> 20} MiB"
        except Exception as error:
            answer = None, _line(error)
        pipe.send_bytes(json.dumps(answer).encode())


def _environment() -> Any:
    """A sandbox for templates, with what those of published tokenizers expect there."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}...{% endgeneration %}` encloses what the assistant writes."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opened, closed = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            return nodes.Scope([opened, *body, closed], lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
