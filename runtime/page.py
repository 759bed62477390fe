"""A page to look at: text token by token, coloured by how far the student is from its teacher."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import data
import losses
import sharding
import text
from models.base import LanguageModel
from runtime import files, report

WINDOWS, TOKENS, TOP = 20, 2048, 5  # of a page, of that of a run about, and of a card
BEFORE = 8  # tokens by which the text of the next one is known, with room to spare


def windows(
    student: LanguageModel, teacher: LanguageModel | None, batches: Iterable[data.Batch],
    tokenizer: Path, *, to_device: Callable[[data.Batch], data.Batch], **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Returns the tokens of windows with figures of each but the first, and texts of others."""
    encoder, rows, likeliest = text.load_tokenizer(tokenizer).encoder, [], set()

    def piece(before: Sequence[int], token: int) -> str:
        """What a token adds to a text; nothing, where it ends within a letter."""
        texts = (encoder.decode(x, skip_special_tokens=False) for x in (before, [*before, token]))
        start, whole = (decoded.rstrip("\ufffd") for decoded in texts)
        return whole[len(start) :]

    for batch in map(to_device, batches):
        figures = losses.token_figures(student, teacher, batch, top=TOP, **options)
        arrays = {"tokens": batch.tokens, "segments": batch.segments, "mask": batch.mask} | figures
        arrays = {name: sharding.to_host(array) for name, array in arrays.items()}
        tokens, sizes = arrays.pop("tokens"), (arrays.pop("segments") > 0).sum(1)
        for i in np.flatnonzero(sizes > 1):
            ids = tokens[i, : sizes[i]].tolist()
            pieces = [piece(ids[max(0, j - BEFORE) : j], token) for j, token in enumerate(ids)]
            row = {name: array[i, : sizes[i] - 1] for name, array in arrays.items()}
            likeliest.update(row["ids"].flat, row["teacher_ids"].flat)
            row = {k: x.astype(float).round(4) if x.dtype == "f4" else x for k, x in row.items()}
            row = {name: report.plain(values) for name, values in row.items()}
            rows.append(row | {"tokens": ids, "text": pieces})
    before = encoder.encode("a", add_special_tokens=False).ids
    return {"windows": rows, "names": {int(i): piece(before, int(i)) for i in likeliest}}


def write(path: Path, title: str, content: dict[str, Any], sections: Sequence[Any] = ()) -> None:
    """Writes one file that needs no other; what it embeds cannot end the element it stands in."""
    page = json.dumps({"title": title, "sections": sections} | content, separators=(",", ":"))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with files.atomic_write(path) as partial:
        html = template.replace("{page}", page.replace("<", r"\u003c"))
        partial.write_text(html, encoding="utf-8")
