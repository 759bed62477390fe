"""A Hugging Face config, read strictly: what is not computed here is refused by name."""

import re
import reprlib
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from runtime.errors import UserError

# Fields, as patterns of fnmatch, that change nothing of what a decoder computes: where it comes
# from, how it was trained, which tokens mean what, and how text is drawn from it.
HARMLESS = (
    "", "_*", "architectures", "auto_map", "dtype", "torch_dtype", "*version*",
    "transformers.js*", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "finetuning_task", "tokenizer_class", "padding_side", "padding_idx",
    "prefix", "unsloth_*", "is_llama_config", "*seq*_len*", "model_max_length", "*dropout*",
    "*pdrop", "initializer_*", "gradient_checkpointing*", "*aux_loss*", "clip_grad", "*_token_id",
    "*_token_ids", "max_length", "min_length", "do_sample", "top_?", "typical_p", "temperature",
    "*_penalty", "*_beams", "*_beam_groups", "num_return_sequences", "*no_repeat_ngram_size",
    "early_stopping", "bad_words_ids", "remove_invalid_values", "suppress_tokens",
    "begin_suppress_tokens", "chunk_size_feed_forward", "output_attentions",
    "output_hidden_states", "output_scores", "*router_logits", "return_dict*", "use_return_dict",
    "use_cache", "torchscript", "tf_legacy_loss", "use_bfloat16", "*attn_implementation*",
    "use_flash_attention*", "pruned_heads", "tie_encoder_decoder", "is_decoder",
)  # fmt: skip

# Of fields with such names one means off too, as nothing does of all others.
FACTOR = re.compile(r"multiplier|scaling|scale(_|$)|partial_rotary|rotary_pct")

LAYERS = 10_000  # names are made for each, so more of them are refused before that


class HFConfig:
    """The fields of a checkpoint's config, read with errors that name the field."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        self.known: set[str] = set()  # the fields that were asked for

    def peek(self, name: str) -> Any:
        self.known.add(name)
        return self.raw.get(name)

    def reject_unread(self, harmless: Iterable[str] = ()) -> None:
        """Refuses the first field that nobody has read, that is on and not known to be harmless."""
        for name, value in self.raw.items():
            inert = any(fnmatchcase(name, pattern) for pattern in (*HARMLESS, *harmless))
            factor_of_one = FACTOR.search(name) and value == 1 and value is not True
            off = value in (None, False, 0, "", [], {}) or factor_of_one
            if not (name in self.known or inert or off):
                remedy = "if it changes nothing of what the model computes, remove it"
                if name == "quantization_config":
                    remedy = "give the float32, bfloat16 or float16 checkpoint it was made from"
                raise UserError(f"{name} = {reprlib.repr(value)} is not supported ({remedy})")

    def get(self, names, kinds, what: str, default: Any, fits=lambda value: True) -> Any:
        """The field, of one of the `kinds`, under whichever of its names it is given."""
        names = [names] if isinstance(names, str) else names
        given = {name: self.raw[name] for name in names if self.peek(name) is not None}
        for name, value in given.items():
            typed = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
            if not typed or not fits(value):
                self.reject(name, value, what)
        values = list(given.values())
        if any(value != values[0] for value in values):
            said = [f"{name} = {reprlib.repr(value)}" for name, value in given.items()]
            raise UserError(f"{' and '.join(said)} are two names of one field, and disagree")
        if not given and default is ...:
            raise UserError(f"it lacks {' or '.join(names)}, {what}")
        return values[0] if given else default

    def count(self, *names: str, default: Any = ..., below: int = 2**31) -> Any:
        what = f"a positive whole number below {below}"
        return self.get(names, int, what, default, lambda value: 0 < value < below)

    def number(self, name: str, default: Any = ...) -> Any:
        kinds, what = (int, float), "a positive number"
        value = self.get(name, kinds, what, default, lambda value: 0 < value <= sys.float_info.max)
        return None if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, bool, "true or false", default)

    def ids(self) -> dict[str, int | tuple[int, ...] | None]:
        """The ids of the tokens that begin, end and pad: none, one, or several of each."""
        ids = {}
        for name in ("bos", "eos", "pad"):
            value = self.peek(f"{name}_token_id")
            values = value if isinstance(value, list) else [value]
            if value is not None and not all(type(v) is int for v in values):
                self.reject(f"{name}_token_id", value, "a token id, or a list of them")
            ids[name] = tuple(value) if isinstance(value, list) else value
        return ids

    def fixed(self, name: str, value: Any) -> None:
        """Refuses any value but the one that is computed here."""
        given = self.peek(name)
        if given is not None and given != value:
            raise UserError(f"{name} = {reprlib.repr(given)} is not supported, only {value!r} is")

    def reject(self, name: str, value: Any, expected: str) -> None:
        raise UserError(f"{name} must be {expected}, found {reprlib.repr(value)}")
