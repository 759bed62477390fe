"""A Hugging Face config, read strictly: what is not computed here is refused by name."""

import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from runtime.errors import UserError

# Words that name, in some decoder's config, mathematics that is not computed here: switches, which
# may be there if they are off, and factors, which may be there if they are one.
SWITCHES = re.compile(
    r"quantiz|compression_config|soft_?cap|logit_cap|expert|moe|clip_qkv|qk_(layer_?)?norm|no_rope"
    r"|nope|^(use_)?alibi|rope_interleave|rope_local|rotary_dim|parallel_(attn|residual)|cross_att"
    r"|encoder_decoder|prefix_lm|bidirectional|attention_(chunk|sink)|sliding_window_pattern"
    r"|kv_shared|query_pre_attn|temperature_tuning|by_inverse_layer|swiglu_"
)


FACTORS = re.compile(
    r"multiplier|(logits?|residual|embedding|attn|attention|value)_scal|scale_(emb|depth)"
    r"|partial_rotary|rotary_pct"
)


def is_unsupported(name: str, value: Any) -> bool:
    if SWITCHES.search(name):
        return value not in (None, False, 0, "", [], {})
    return bool(FACTORS.search(name)) and (value is True or value not in (None, 1))


class HFConfig:
    """The fields of a checkpoint's config, read with errors that name the field."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        for name, value in raw.items():
            if is_unsupported(name, value):
                raise UserError(f"{name} = {reprlib.repr(value)} is not supported")

    def get(
        self,
        names: str | Sequence[str],
        kinds: type | tuple,
        what: str,
        default: Any,
        fits: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """The field under whichever of its names it is given."""
        names = [names] if isinstance(names, str) else names
        given = {name: self.raw[name] for name in names if self.raw.get(name) is not None}
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

    def layers(self, *names: str) -> int:
        """How many layers: names are made for each of them, so nonsense is refused before that."""
        return self.count(*names, below=10_000)

    def number(self, name: str, default: Any = ...) -> Any:
        kinds, what = (int, float), "a positive number"
        value = self.get(name, kinds, what, default, lambda value: 0 < value <= sys.float_info.max)
        return None if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self.get(name, bool, "true or false", default)

    def ids(self, name: str) -> Any:
        """Token ids: none, one, or several."""
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(type(v) is int for v in values):
            self.reject(name, value, "a token id, or a list of them")
        return tuple(value) if isinstance(value, list) else value

    def fixed(self, name: str, value: Any) -> None:
        """Refuses any value but the one that is computed here."""
        found = self.raw.get(name)
        if found is not None and found != value:
            raise UserError(f"{name} = {reprlib.repr(found)} is not supported, only {value!r} is")

    def reject(self, name: str, value: Any, expected: str) -> None:
        raise UserError(f"{name} must be {expected}, found {reprlib.repr(value)}")
