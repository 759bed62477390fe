"""Mistakes of the user: how they are raised, and the one line a program answers them with."""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user; its text is one line: what was expected, found, and to be done."""


def run(main: Callable[[], object]) -> None:
    """Call `main`; a `UserError` ends the program with one line on stderr and exit status 2.

    So does Ctrl-C, with status 130.
    """
    try:
        main()
    except UserError as error:
        tell(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        told = "interrupted; the same command goes on from what was saved, if anything was"
        print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # under a program that still computes, a tidy end of Python crashes


def tell(error: UserError) -> None:
    print(f"error: {_one_line(str(error))}", file=sys.stderr, flush=True)


class Constraint(NamedTuple):
    """What a value must be beside its type, said where its field is: `Annotated[float, above(0)]`.

    `--help` shows the words, and `check` refuses what does not hold.
    """

    words: str
    holds: Callable[[Any], bool]


def above(low: float | int) -> Constraint:
    return Constraint(f"above {low:g}", lambda x: low < x < math.inf)


def at_least(low: float | int) -> Constraint:
    return Constraint(f"{low:g} or more", lambda x: low <= x < math.inf)


def between(low: float | int, high: float | int) -> Constraint:
    return Constraint(f"from {low:g} to {high:g}", lambda x: low <= x <= high)


def below(low: float | int, high: float | int) -> Constraint:
    return Constraint(f"from {low:g} to below {high:g}", lambda x: low <= x < high)


def constraint_of(hint: Any) -> Constraint | None:
    return next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Constraint)), None)


def check(config: object, prefix: str = "--") -> None:
    """Refuses the first field of a dataclass that breaks its constraint; None keeps any."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        constraint = constraint_of(hint)
        if constraint is None or (value := getattr(config, name)) is None:
            continue
        if not constraint.holds(value):
            flag = prefix + _spelled(name)
            raise UserError(f"{flag} is {value}: it must be {constraint.words}")


def check_counts(config: object, *names: str, least: int = 1, prefix: str = "--") -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            flag = prefix + _spelled(name)
            raise UserError(f"{flag} is {value}: it must be {least} or more")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}: it must be from 0 to 2^63 - 1")


def cli(
    Config: type[T],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """A `Config`, a dataclass whose every field is a flag, from `args` or the command line.

    Whatever is wrong with them is a `UserError`, and so is a `ValueError` that a `__post_init__`
    raises. A flag may be given once: tyro alone would silently keep the last.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_with_constraints)
    args = sys.argv[1:] if args is None else list(args)
    flags = _flags(Config, tyro.MISSING_NONPROP)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), registry:
            config = tyro.cli(Config, args=args, prog=prog, description=description)
    except SystemExit as refusal:
        if not refusal.code:  # --help
            raise
        reason = _repeated(flags, args) or _misused(flags, args) or _raised(refusal)
        raise UserError(_one_line(reason or _unboxed(printed.getvalue()))) from None
    sys.stderr.write(printed.getvalue())  # nothing was refused: these are warnings of a config
    if reason := _repeated(flags, args):
        raise UserError(reason)
    return config


def _with_constraints(info: Any) -> Any:
    """tyro's own reading of a dataclass, with the constraints in the help of its fields."""
    from tyro.constructors._struct_spec_dataclass import dataclass_rule

    if not dataclasses.is_dataclass(info.type):
        return None
    spec = dataclass_rule(info)

    def helped(field: Any) -> Any:
        constraint, text = constraint_of(field.type), field.helptext
        if constraint is None:
            return field
        text = (text() if callable(text) else text) or ""
        return dataclasses.replace(field, helptext=f"{text} Must be {constraint.words}.".strip())

    return dataclasses.replace(spec, fields=tuple(map(helped, spec.fields)))


class _Flag(NamedTuple):
    name: str  # `--no-x` is named `--x` too
    spec: Any  # tyro's PrimitiveConstructorSpec; None for a switch, which takes no value
    required: bool


def _flags(kind: Any, default: Any, path: tuple[str, ...] = ()) -> dict[str, _Flag]:
    """The flags tyro makes of a config, by spelling."""
    from tyro import MISSING, MISSING_NONPROP
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructTypeInfo,
    )

    group = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(kind, default, False))
    if group is not None:
        fields = [_flags(field.type, field.default, (*path, field.name)) for field in group.fields]
        return {spelling: flag for flags in fields for spelling, flag in flags.items()}
    name = _spelled("--" + ".".join(path))
    required = default is MISSING or default is MISSING_NONPROP
    value = PrimitiveTypeInfo.make(kind, set())
    if value.type is bool and not required:
        negated = _spelled("--" + ".".join((*path[:-1], f"no-{path[-1]}")))
        return dict.fromkeys((name, negated), _Flag(name, None, required))
    spec = ConstructorRegistry.get_primitive_spec(value)
    # no text stands for a function, say: tyro keeps such a default, and no flag can change it
    return {name: _Flag(name, spec, required)} if isinstance(spec, PrimitiveConstructorSpec) else {}


def _spelled(flag: str) -> str:
    return flag.replace("_", "-")


def _grouped(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag as written, with the values after it; values that follow no flag have ""."""
    end = args.index("--") if "--" in args else len(args)
    groups: list[tuple[str, list[str]]] = [("", [])]
    for token in args[:end]:
        name, equals, value = token.partition("=")
        if re.match(r"-+[^\W\d_]", name) and not re.fullmatch(r"(?i)-(inf|infinity|nan)", name):
            groups.append((name, [value] if equals else []))
        else:
            groups[-1][1].append(token)
    return [*groups, ("", list(args[end + 1 :]))]


def _repeated(flags: Mapping[str, _Flag], args: Sequence[str]) -> str | None:
    seen: dict[str, str] = {}
    for written, _ in _grouped(args):
        if flag := flags.get(_spelled(written)):
            if first := seen.get(flag.name):
                return f"{flag.name} is given twice ({first} and {written}): keep one of the two"
            seen[flag.name] = written
    return None


def _misused(flags: Mapping[str, _Flag], args: Sequence[str]) -> str | None:
    """The first thing wrong with `args`, given that tyro refused them."""
    groups = _grouped(args)
    for (written, values), (following, _) in itertools.pairwise([*groups, ("", [])]):
        flag = flags.get(_spelled(written))
        if flag and not _fits(flag.spec, values):
            found = " ".join(map(repr, values)) or "nothing"
            hint = ""
            if flag.spec is None:
                hint = ": write " + " or ".join(name for name in flags if flags[name] is flag)
            elif not values and following:
                found = f"the flag {following}"
                hint = f" (as a value: {written}={following})"
            elif flag.spec.choices:
                wrong = [value for value in values if value not in flag.spec.choices]
                hint = _did_you_mean(wrong[0], flag.spec.choices) if wrong else ""
            return f"{written} expects {_expected(flag.spec)}, found {found}{hint}"
        if not flag and (written or values):
            what = f"unknown flag {written}" if written else f"unexpected argument {values[0]!r}"
            hint = _did_you_mean(_spelled(written or "--" + values[0].lstrip("-")), flags)
            return f"{what}{hint} (--help lists the flags)"
    given = {flags[_spelled(written)].name for written, _ in groups if written}
    missing = [flag for flag in flags.values() if flag.required and flag.name not in given]
    if missing:
        return "missing " + ", ".join(f"{flag.name} {flag.spec.metavar}" for flag in missing)
    return None


def _expected(spec: Any) -> str:
    if spec is None:
        return "no value"
    return f"one of {', '.join(spec.choices)}" if spec.choices else spec.metavar


def _fits(spec: Any, values: list[str]) -> bool:
    if spec is None:
        return not values
    counts = spec.nargs if isinstance(spec.nargs, tuple) else (spec.nargs,)
    if "*" not in counts and len(values) not in counts:
        return False
    if spec.choices and not set(values) <= set(spec.choices):
        return False
    try:
        spec.instance_from_str(values)
    except (ValueError, TypeError):
        return False
    return True


def _did_you_mean(word: str, options: Iterable[str]) -> str:
    """Names the options the fewest edits away; to leave out the group of a flag is one edit."""

    def leaf(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-")

    far = {name: min(_edits(word, name), _edits(leaf(word), leaf(name)) + 1) for name in options}
    nearest = [name for name in far if far[name] == min(far.values())]
    if not nearest or far[nearest[0]] > max(2, len(word) // 3):
        return ""
    return f": did you mean {' or '.join(nearest)}?"


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _raised(refusal: BaseException | None) -> str | None:
    """The text of the `ValueError` behind a refusal: tyro exits while it handles one."""
    while refusal is not None and not isinstance(refusal, ValueError):
        refusal = refusal.__context__
    return None if refusal is None else str(refusal)


def _unboxed(text: str) -> str:
    """What tyro printed, without its colours and frames."""
    return re.sub(r"\x1b\[[\d;]*m|[\u2500-\u257f]", "", text)


def _one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, text.splitlines())))
