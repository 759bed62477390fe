"""A tokenizer with the conventions of the files beside it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import _line, digest
from text.chat import Template, _encodable, _unmarked
from text.records import Piece


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
        with _refusing("tokenizer.json fails on a text"):
            return encode([piece.text for piece in pieces], add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """What the chat template writes, with marks around what it says is generated."""
        return self.template.render(
            messages=messages,
            add_generation_prompt=prompt,
            tools=None,
            documents=None,
            **self.special,
        )

    def conversation(self, messages: Sequence[Mapping[str, Any]], mask: str, place: str) -> Piece:
        """Messages as the chat template writes them, with the spans of the assistant's turns."""
        with self._rendering(place):
            text, spans = _unmarked(self.render(messages))
            if mask == "all":
                spans = None
            elif not self.marks:
                spans = self._turns(messages, text)
        return Piece(text, rendered=True, spans=spans)

    def question(self, messages: Sequence[Mapping[str, Any]], place: str) -> Piece:
        """Messages as the chat template writes them, up to where the assistant goes on."""
        with self._rendering(place):
            return Piece(self._written(messages, prompt=True), rendered=True)

    @contextlib.contextmanager
    def _rendering(self, place: str) -> Iterator[None]:
        """Whatever goes wrong with the template is told with the place of the messages."""
        if self.template is None:
            raise UserError(
                f"{place}: a conversation, but the tokenizer has no chat template: put a"
                " chat_template.jinja beside tokenizer.json, or give plain text"
            )
        try:
            yield
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise UserError(f"{place}: the chat template refuses it ({_line(error)})") from error

    def _turns(self, messages: list, text: str) -> tuple[tuple[int, int], ...]:
        """The assistant's turns in `text`, found by rendering the conversation up to each."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._begin(messages, i, text)
            through = self._written(messages[: i + 1])
            stop = len(through)
            if not text.startswith(through):
                rest = text[start:]
                ends = [rest.find(token) + len(token) for token in self.closing if token in rest]
                stop = start + min(ends, default=len(rest))
            body = text[start:stop].rstrip()
            spans.append((start, start + len(body) if body.endswith(self.closing) else stop))
        return tuple(spans)

    def _begin(self, messages: list, i: int, text: str) -> int:
        """Where in `text` the assistant's words of message `i` begin: behind what opens a turn."""
        if i:
            before = self._written(messages[:i])
            if not text.startswith(before):
                raise UserError(
                    "the chat template writes a turn differently when others follow, so that the"
                    " assistant's cannot be found: put {% generation %} around them in it"
                )
            start = len(before)
            opening = self._written(messages[:i], prompt=True)[start:]
        else:  # a template may refuse to write nothing: what opens a turn opens this one too
            opening = self._written(messages, prompt=True)[len(text) :]
            start = max(text.find(opening), 0)
        shared = os.path.commonprefix([opening, text[start:]])
        if shared != opening:
            # It opens a thought that the turn lacks, though both may begin with some letters.
            heads = [end for end in ("\n", *self.added) if end in shared]
            shared = shared[: max((shared.rfind(end) + len(end) for end in heads), default=0)]
        return start + len(shared)

    def _written(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        return _unmarked(self.render(messages, prompt))[0]


def _encoder(path: Path) -> Any:
    import tokenizers

    with _refusing(f"{path}: not a tokenizer"), _muted():
        encoder = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        encoder.no_truncation()  # either may have been saved with it
        encoder.no_padding()
        return encoder


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json and what the configs beside it say."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; save the model's fast tokenizer there")
    encoder = _encoder(path)
    with _refusing(f"{path}: not a tokenizer"), _muted():
        sample = encoder.encode("a").ids
    config = _config(folder / "tokenizer_config.json")
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    for key, value in special.items():
        if not isinstance(value, str) or not _encodable(value):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {_line(key)} is not text")
    models = [_config(folder / name) for name in ("generation_config.json", "config.json")]
    bos, eos = (_token(name, encoder, special, models) for name in ("bos", "eos"))
    if eos is None:
        raise UserError(f"{folder}: no eos_token in tokenizer_config.json to end documents with")
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            special.setdefault(name, encoder.id_to_token(token))
    added = config.get("add_bos_token")
    if added is None:  # then the tokenizer's own post-processor says so
        added = bos is not None and sample[:1] == [bos]
    source = _template(folder, config)
    own = encoder.get_added_tokens_decoder().values()
    closing = {token.content for token in own if token.special}
    facts = [
        hashlib.blake2b(path.read_bytes()).hexdigest(),
        eos,
        bos if added else None,
        source,
        special,
    ]
    return Tokenizer(
        encoder,
        size=max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        bos=bos if added else None,
        eos=eos,
        special=special,
        closing=tuple(sorted(closing | {special["eos_token"]})),
        added=tuple(token.content for token in own),
        template=source and Template(source, folder),
        marks=bool(source and re.search(r"\{%-?\s*generation\s*-?%\}", source)),
        fingerprint=digest(facts),
    )


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the tokenizer's library raises: nothing precise, and panics, which are no
    `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({_line(error)})") from error


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without what a panic prints of itself."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    return config


def _token(name: str, encoder: Any, special: Mapping, models: Sequence[Mapping]) -> int | None:
    if f"{name}_token" in special:
        token = encoder.token_to_id(special[f"{name}_token"])
        if token is None:
            found = _line(special[f"{name}_token"])
            raise UserError(f"{name}_token {found!r} is not in tokenizer.json")
        return token
    ids = [config.get(f"{name}_token_id") for config in models]
    ids = [found[0] if isinstance(found, list) and found else found for found in ids]
    ids = [found for found in ids if isinstance(found, int) and 0 <= found < 1 << 32]
    return next(filter(encoder.id_to_token, ids), None)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which the model of a folder has ended."""
    found = {load_tokenizer(folder).eos}
    for name in ("generation_config.json", "config.json"):
        ids = _config(folder / name).get("eos_token_id")
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return tuple(sorted(found))


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: its chat template cannot be read ({_line(error)})") from error
    if template is not None and not (isinstance(template, str) and _encodable(template)):
        raise UserError(f"{folder}: its chat template is not text")
    return template


def same_tokenizer(one: Path, other: Path) -> None:
    """Refuses two folders whose tokenizers give a token different ids."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    first, second = (
        {index: token for token, index in _encoder(file).get_vocab().items()} for file in files
    )
    for index in sorted(first.keys() | second.keys()):
        if first.get(index) != second.get(index):
            raise UserError(
                f"teacher and student have different tokenizers: id {index} is"
                f" {first.get(index)!r} in {one} and {second.get(index)!r} in {other}; train on the"
                " teacher's own text instead, with --loss.alpha 0"
            )
