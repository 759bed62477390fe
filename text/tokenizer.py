"""A tokenizer with the conventions of the files beside it."""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import buckets
from runtime.errors import UserError
from runtime.files import digest, library_errors, printable, read_json
from text.chat import CHATML, environment, split_marks
from text.files import Source, written_settings
from text.records import Piece

Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with the conventions of the files beside it."""

    encoder: Any
    size: int  # one more than its largest id
    bos: int | None  # put before each document of plain text, if the model expects one
    eos: int  # put after each document of plain text
    special: Mapping[str, str]  # by their role, such as `eos_token`: templates refer to them
    closing: tuple[str, ...]  # the special tokens, one of which ends a turn
    added: tuple[str, ...]  # all that stand for a text of their own, special or not
    template: Any  # the compiled chat template, or None
    marks: bool  # whether the template says itself what the assistant generates
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
        text, spans = split_marks(self._render(messages, place))
        if mask == "all":
            spans = None
        elif not self.marks:
            turns = (i for i, message in enumerate(messages) if message["role"] == "assistant")
            spans = tuple(self._turn(messages, i, text, place) for i in turns)
        return Piece(text, rendered=True, spans=spans)

    def render_prompt(self, messages: Messages, place: str) -> Piece:
        """Messages as the chat template writes them, up to where the assistant goes on."""
        return Piece(split_marks(self._render(messages, place, prompt=True))[0], rendered=True)

    def _render(self, messages: Messages, place: str, prompt: bool = False) -> str:
        if self.template is None:
            problem = "a conversation, but the tokenizer has no chat template"
            remedy = "put a chat_template.jinja beside tokenizer.json"
            flag = "" if prompt else ", name one with --data.chat-template (a file, or chatml)"
            raise UserError(f"{place}: {problem}: {remedy}{flag}, or give plain text")
        options = {"add_generation_prompt": prompt, "tools": None, "documents": None}
        with library_errors(f"{place}: the chat template refuses it"):
            text = self.template.render(messages=messages, **options, **self.special)
            text.encode()  # fails for half a surrogate pair
        return text

    def _turn(self, messages: Messages, i: int, text: str, place: str) -> tuple[int, int]:
        """Where in `text` the assistant's turn `i` is, by rendering the messages up to it."""
        asked = messages[:i] or messages  # a template may refuse to write nothing
        before = self._render(asked, place)
        opening = self._render(asked, place, prompt=True)[len(before) :]
        if i and not text.startswith(before):
            return self._content(messages, i, text, place)
        start = len(before) if i else max(text.find(opening), 0)
        shared = os.path.commonprefix([opening, text[start:]])
        # It may open a thought that the turn lacks, though both may begin with some letters.
        heads = [shared.rfind(end) + len(end) for end in ("\n", *self.added) if end in shared]
        start += len(opening) if shared == opening else max(heads, default=0)
        through = self._render(messages[: i + 1], place)
        ends = [text.index(x, start) + len(x) for x in self.closing if x in text[start:]]
        stop = len(through) if text.startswith(through) else min(ends, default=len(text))
        body = text[start:stop].rstrip()
        return start, start + len(body) if body.endswith(self.closing) else stop

    def _content(self, messages: Messages, i: int, text: str, place: str) -> tuple[int, int]:
        """Where in `text` the content of message `i` is, what changes when it does, and its end.

        A template may write the turns before it differently when others follow, as Mistral's does.
        """
        one, two = (
            self._render([*messages[:i], {**messages[i], "content": x}, *messages[i + 1 :]], place)
            for x in ("1", "2")
        )
        start = len(os.path.commonprefix([one, two]))
        after = len(os.path.commonprefix([one[::-1], two[::-1]]))
        stop, around = len(text) - after, one[:start] + one[len(one) - after :]
        if one == two or start > stop or text[:start] + text[stop:] != around:
            problem = "the assistant's turns cannot be found in what the chat template writes"
            raise UserError(f"{place}: {problem}: put {{% generation %}} around them in it")
        end = next((token for token in self.closing if text.startswith(token, stop)), "")
        return start, stop + len(end)


def load_tokenizer(
    folder: Path | str, vocab: int | None = None, template: str | None = None
) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json and what the configs beside it say, unless
    it is given another chat template.

    It is refused if it has ids that a vocabulary of the size `vocab` lacks.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; save the model's fast tokenizer there")
    encoder, config = _encoder(path), _config(folder / "tokenizer_config.json")
    special, ids, template = {}, {}, template or chat_template(folder)
    for key, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            special[key] = token
    with library_errors(f"{folder}: what stands beside tokenizer.json cannot be read"):
        for role in ("bos_token", "eos_token"):
            known = map(encoder.id_to_token, _model_ids(folder, f"{role}_id"))
            if token := special.get(role) or next(filter(None, known), None):
                special[role], ids[role] = token, encoder.token_to_id(token)
                if ids[role] is None:
                    raise UserError(f"{role} {printable(token)!r} is not in tokenizer.json")
    bos, eos, adds_bos = ids.get("bos_token"), ids.get("eos_token"), config.get("add_bos_token")
    if eos is None:
        raise UserError(f"{folder}: no eos_token in tokenizer_config.json to end documents with")
    if adds_bos is None:  # then the tokenizer's own post-processor says so
        adds_bos = encoder.encode("a").ids[:1] == [bos]
    bos = bos if adds_bos else None
    known = encoder.get_added_tokens_decoder().values()
    added = tuple(token.content for token in known)
    closing = sorted({token.content for token in known if token.special} | {special["eos_token"]})
    size = max(encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if vocab is not None and size > vocab:
        problem = f"has ids up to {size - 1}, the model's vocabulary has {vocab}"
        raise UserError(f"{folder}: the tokenizer {problem}: they do not belong together")
    marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template or ""))
    facts = [hashlib.blake2b(path.read_bytes()).hexdigest(), eos, bos, template, special]
    with library_errors(f"{folder}: its chat template is malformed"):
        template = template and environment().from_string(template)
    return Tokenizer(
        encoder, size, bos, eos, special, tuple(closing), added, template, marks, digest(facts)
    )


def chat_template(folder: Path | str) -> str | None:
    """The chat template in a tokenizer's folder."""
    path = Path(folder) / "chat_template.jinja"
    template = _config(path.with_name("tokenizer_config.json")).get("chat_template")
    with library_errors(f"{folder}: its chat template cannot be read"):
        if path.is_file():
            template = path.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not isinstance(template, str):
            raise TypeError("it is not text")
    return template


def choose_template(asked: str | None, folder: Path | str, sources: Iterable[Source]) -> str | None:
    """The chat template for what the tokenizer's own is not: a file or chatml, as asked for, or
    where it has none, that of the model that wrote a source."""
    if asked == "chatml":
        return CHATML
    if asked is not None:
        with library_errors(f"--data.chat-template {asked}: cannot be read"):
            return buckets.local_path(asked).read_text(encoding="utf-8")
    if chat_template(folder) is None:
        for settings in (written_settings(x.files[0]) for x in sources if x.files):
            if isinstance(template := settings.get("chat-template"), str):
                return template
    return None


def _encoder(path: Path) -> Any:
    import tokenizers

    with library_errors(f"{path}: not a tokenizer"):
        encoder = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        encoder.no_truncation()  # either may have been saved with it
        encoder.no_padding()
        encoder.encode("a")
        return encoder


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, ": save it again") if path.exists() else {}


def _model_ids(folder: Path, key: str) -> list[int]:
    """The token ids of a role, by the configs of a model: one of them may name several."""
    values = [_config(folder / name).get(key) for name in ("generation_config.json", "config.json")]
    ids = itertools.chain(*(value if isinstance(value, list) else [value] for value in values))
    return [i for i in ids if isinstance(i, int) and 0 <= i < 1 << 32]


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which the model of a folder has ended."""
    return tuple(sorted({load_tokenizer(folder).eos, *_model_ids(folder, "eos_token_id")}))


def same_tokenizer(one: Path, other: Path) -> None:
    """Refuses two folders whose tokenizers give a token different ids."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    first, second = ({i: token for token, i in _encoder(x).get_vocab().items()} for x in files)
    for i in sorted(first.keys() | second.keys()):
        if first.get(i) != second.get(i):
            problem = f"id {i} is {first.get(i)!r} in {one} and {second.get(i)!r} in {other}"
            remedy = "train on the teacher's own text instead, with --loss.alpha 0"
            raise UserError(f"teacher and student have different tokenizers: {problem}; {remedy}")
