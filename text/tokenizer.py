"""A tokenizer with the conventions of the files beside it."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import digest, printable, read_json
from text.chat import compile_template, split_marks
from text.files import library_errors
from text.records import Piece

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with the conventions of the files beside it."""

    encoder: Any
    size: int
    """One more than its largest id."""
    bos: int | None
    """Put before each document of plain text; None where the model expects none."""
    eos: int
    """Put after each document of plain text."""
    special: Mapping[str, str]
    """Special tokens by their role, such as `eos_token`: templates refer to them."""
    closing: tuple[str, ...]
    """The special tokens, one of which ends a turn."""
    added: tuple[str, ...]
    """All tokens that stand for a text of their own, special or not."""
    template: Any
    """The compiled chat template, or None."""
    marks: bool
    """Whether the template says itself what the assistant generates."""
    fingerprint: str

    def encode(self, pieces: Sequence[Piece]) -> list[Any]:
        """Encodings on all cores, without special tokens."""
        # Offsets into the text cost a third of the speed and serve only to find the spans.
        spans = any(piece.spans is not None for piece in pieces)
        encode = self.encoder.encode_batch if spans else self.encoder.encode_batch_fast
        with library_errors("tokenizer.json fails on a text"):
            return encode([piece.text for piece in pieces], add_special_tokens=False)

    def render_chat(self, messages: Messages, mask: str, place: str) -> Piece:
        """Messages as the chat template writes them, with the spans of the assistant's turns."""
        text, spans = self._render(messages, place)
        if mask == "all":
            spans = None
        elif not self.marks:
            turns = (i for i, message in enumerate(messages) if message["role"] == "assistant")
            spans = tuple(self._turn(messages, i, text, place) for i in turns)
        return Piece(text, rendered=True, spans=spans)

    def render_prompt(self, messages: Messages, place: str) -> Piece:
        """Messages as the chat template writes them, up to where the assistant goes on."""
        return Piece(self._render(messages, place, prompt=True)[0], rendered=True)

    def _render(
        self, messages: Messages, place: str, prompt: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        """What the chat template writes, and the spans that it says are generated."""
        if self.template is None:
            raise UserError(
                f"{place}: a conversation, but the tokenizer has no chat template: put a"
                " chat_template.jinja beside tokenizer.json, or give plain text"
            )
        options = {"add_generation_prompt": prompt, "tools": None, "documents": None}
        with library_errors(f"{place}: the chat template refuses it"):
            text = self.template.render(messages=messages, **options, **self.special)
            text.encode()  # fails for half a surrogate pair
        return split_marks(text)

    def _turn(self, messages: Messages, i: int, text: str, place: str) -> Span:
        """Where in `text` the assistant's turn `i` is, by rendering the messages up to it."""
        asked = messages[:i] or messages  # a template may refuse to write nothing
        before = self._render(asked, place)[0]
        opening = self._render(asked, place, prompt=True)[0][len(before) :]
        if i and not text.startswith(before):
            return self._content(messages, i, text, place)
        start = len(before) if i else max(text.find(opening), 0)
        start += self._opening_length(opening, text[start:])
        through = self._render(messages[: i + 1], place)[0]
        ends = [text.index(x, start) + len(x) for x in self.closing if x in text[start:]]
        stop = len(through) if text.startswith(through) else min(ends, default=len(text))
        body = text[start:stop].rstrip()
        return start, start + len(body) if body.endswith(self.closing) else stop

    def _opening_length(self, opening: str, turn: str) -> int:
        """How much of what opens a turn, in a prompt, does so in `turn`."""
        shared = os.path.commonprefix([opening, turn])
        # It may open a thought that the turn lacks, though both may begin with some letters.
        heads = [shared.rfind(end) + len(end) for end in ("\n", *self.added) if end in shared]
        return len(opening) if shared == opening else max(heads, default=0)

    def _content(self, messages: Messages, i: int, text: str, place: str) -> Span:
        """Where in `text` the content of message `i` is, what changes when it does, and its end.

        A template may write the turns before it differently when others follow, for example the
        system prompt into the last turn of the user.
        """
        (one, _), (two, _) = (
            self._render([*messages[:i], {**messages[i], "content": x}, *messages[i + 1 :]], place)
            for x in ("1", "2")
        )
        start = len(os.path.commonprefix([one, two]))
        after = len(os.path.commonprefix([one[::-1], two[::-1]]))
        stop, around = len(text) - after, one[:start] + one[len(one) - after :]
        if one == two or start > stop or text[:start] + text[stop:] != around:
            raise UserError(
                f"{place}: the assistant's turns cannot be found in what the chat template writes:"
                " put {% generation %} around them in it"
            )
        end = next((token for token in self.closing if text.startswith(token, stop)), "")
        return start, stop + len(end)


# ---- from a folder -------------------------------------------------------------------------------


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json and what the configs beside it say."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; save the model's fast tokenizer there")
    encoder = _encoder(path)
    config = _config(folder / "tokenizer_config.json")
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    special = {key: token for key, token in special.items() if isinstance(token, str)}
    bos, eos = (_special_id(name, encoder, special, folder) for name in ("bos", "eos"))
    if eos is None:
        raise UserError(f"{folder}: no eos_token in tokenizer_config.json to end documents with")
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            special.setdefault(name, encoder.id_to_token(token))
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the tokenizer's own post-processor says so
        adds_bos = encoder.encode("a").ids[:1] == [bos]
    bos = bos if adds_bos else None
    template = _template(folder, config)
    facts = [hashlib.blake2b(path.read_bytes()).hexdigest(), eos, bos, template, special]
    added = encoder.get_added_tokens_decoder().values()
    closing = {token.content for token in added if token.special} | {special["eos_token"]}
    return Tokenizer(
        encoder,
        size=max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        bos=bos,
        eos=eos,
        special=special,
        closing=tuple(sorted(closing)),
        added=tuple(token.content for token in added),
        template=template and compile_template(template, folder),
        marks=bool(template and re.search(r"\{%-?\s*generation\s*-?%\}", template)),
        fingerprint=digest(facts),
    )


def _encoder(path: Path) -> Any:
    import tokenizers

    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # a panic prints lines of its own
    try:
        with library_errors(f"{path}: not a tokenizer"):
            encoder = tokenizers.Tokenizer.from_buffer(path.read_bytes())
            encoder.no_truncation()  # either may have been saved with it
            encoder.no_padding()
            encoder.encode("a")
            return encoder
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path, ": save it again") if path.exists() else {}
    with library_errors(f"{path}: it holds what is not text"):
        json.dumps(config, ensure_ascii=False).encode()
    return config


def _special_id(name: str, encoder: Any, special: Mapping, folder: Path) -> int | None:
    if (word := special.get(f"{name}_token")) is None:
        ids = _model_ids(folder, f"{name}_token_id")
        return next((i for i in ids if 0 <= i < 1 << 32 and encoder.id_to_token(i)), None)
    if (token := encoder.token_to_id(word)) is None:
        raise UserError(f"{name}_token {printable(word)!r} is not in tokenizer.json")
    return token


def _model_ids(folder: Path, key: str) -> list[int]:
    """The token ids of a role, by the configs of a model: one of them may name several."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        value = _config(folder / name).get(key)
        ids += value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int)]


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which the model of a folder has ended."""
    return tuple(sorted({load_tokenizer(folder).eos, *_model_ids(folder, "eos_token_id")}))


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    with library_errors(f"{folder}: its chat template cannot be read"):
        if path.is_file():
            template = path.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not isinstance(template, str):
            raise TypeError("it is not text")
    return template


def same_tokenizer(one: Path, other: Path) -> None:
    """Refuses two folders whose tokenizers give a token different ids."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    first, second = ({i: token for token, i in _encoder(x).get_vocab().items()} for x in files)
    for i in sorted(first.keys() | second.keys()):
        if first.get(i) != second.get(i):
            raise UserError(
                f"teacher and student have different tokenizers: id {i} is {first.get(i)!r} in"
                f" {one} and {second.get(i)!r} in {other}; train on the teacher's own text instead,"
                " with --loss.alpha 0"
            )
