"""Chat templates, rendered in jinja2's immutable sandbox as everywhere in this ecosystem."""

import datetime
import json
import re
from functools import partial
from typing import Any

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Around what a template generates, while it is rendered; NUL occurs in no text that is trained on.
OPEN, CLOSE = "\0generation(", "\0)generation"


def split_marks(rendered: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """What a template rendered without its marks, and the spans that they enclosed."""
    text, spans = "", []
    for i, part in enumerate(re.split(f"{re.escape(OPEN)}|{re.escape(CLOSE)}", rendered)):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, tuple(spans)


def environment() -> Any:
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

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # One date, that of Llama 3's own template: else the tokens of a text would be others every day.
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment
