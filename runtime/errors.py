"""Mistakes of the user: how they are raised, and the one line a program answers them with."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


# Flags that other tools have, and what does their work here where a program has it.
OTHERS = {
    "--learning-rate": "--optim.lr", "--max-steps": "--steps",
    "--num-layers": "--student-layers", "--output-dir": "--out", "--data": "--data.source",
    "--dataset": "--data.source",
    "--version": "the commit of its checkout: git log -1",
}  # fmt: skip


class UserError(Exception):
    """A mistake of the user; its text is one line: what was expected, found, and to be done."""


def run(main: Callable[[], object]) -> None:
    """Calls `main`; a `UserError` ends it with a line and status 2 or its own, Ctrl-C with 130."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # else a closed one would be the next file opened,
        pass  # and libraries print there
    screens = _Screen(sys.stdout, BrokenPipeError), _Screen(sys.stderr, OSError)
    with contextlib.redirect_stdout(screens[0]), contextlib.redirect_stderr(screens[1]):
        try:
            main()
        except UserError as error:
            tell(error)
            raise SystemExit(getattr(error, "status", 2)) from None
        except KeyboardInterrupt:
            words = "interrupted; the same command goes on from what was saved, if anything was"
            print(words, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)  # under a program that still computes, a tidy end of Python crashes
        finally:
            screens[0].flush()


class _Screen:
    """Standard output or error: it escapes what it cannot spell, and goes on without a reader."""

    def __init__(self, stream: Any, ignored: type[OSError]):
        self._stream, self._ignored = stream or open(os.devnull, "w"), ignored
        self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stream, name)
        return functools.partial(self._send, value) if name in ("write", "flush") else value

    def _send(self, method: Callable[..., object], *args: str) -> None:
        try:
            method(*args)
        except self._ignored:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # libraries print there too
            os.close(null)


def tell(error: UserError) -> None:
    print(f"error: {_one_line(str(error))}", file=sys.stderr, flush=True)


class Constraint(NamedTuple):
    """What a field must be, as `Annotated[float, above(0)]`; `--help` shows the words."""

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


LOCAL = Constraint(  # Orbax cannot write under other names
    "a path on this machine, in UTF-8",
    lambda path: not re.match(r"\w[\w+.-]+:/|.*[\ud800-\udfff]", path, re.DOTALL),
)
OUT = Constraint(
    f"{LOCAL.words}, s3://bucket/folder or gs://bucket/folder",
    lambda path: bool(re.match(r"(s3|gs)://[^/]+/.", path)) or LOCAL.holds(path),
)
SEED = Constraint("from 0 to 2^63 - 1", lambda seed: 0 <= seed < 2**63)


def constraints(kind: type) -> dict[str, Constraint]:
    hints = typing.get_type_hints(kind, include_extras=True).items()
    extras = [(name, extra) for name, hint in hints for extra in getattr(hint, "__metadata__", ())]
    return {name: extra for name, extra in extras if isinstance(extra, Constraint)}


def check(config: object, prefix: str = "--") -> None:
    """Refuses the first field of a dataclass that breaks its constraint; None keeps any. Names
    that are not in a `Literal`, and text in the place of a tuple, come from calls, not from flags.
    """
    limits = constraints(type(config))
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kind, names = getattr(config, name), typing.get_origin(hint), typing.get_args(hint)
        words = limits[name].words if name in limits else ""
        if kind is typing.Literal and value not in names:
            words = f"one of {', '.join(map(str, names))}"
        elif kind is tuple and isinstance(value, str):
            words = f"a tuple, such as {(value,)}"
        elif name not in limits or value is None or limits[name].holds(value):
            continue
        raise UserError(f"{prefix}{name.replace('_', '-')} is {value}: it must be {words}")


def cli(Config: type[T], args: Sequence[str] | None = None, **options: Any) -> T:
    """A `Config`, a dataclass whose every field is a flag, from `args` or the command line."""
    import tyro

    args = sys.argv[1:] if args is None else list(args)
    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_with_constraints)
    given: dict[str, str] = {}
    before = itertools.takewhile(lambda arg: arg != "--", args)
    for flag in (arg.partition("=")[0] for arg in before if arg.startswith("--")):
        name = re.sub(r"^--(.*\.)?no-", r"--\1", flag.replace("_", "-"))  # `--no-x` sets `--x` too
        if first := given.get(name):  # tyro would silently keep the last
            raise UserError(f"{name} is given twice ({first} and {flag}): keep one of the two")
        given[name] = flag
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), registry:
            config = tyro.cli(Config, args=args, **options)
    except SystemExit as refusal:
        if not refusal.code:  # --help
            raise
        reason, flags = _refusal(printed.getvalue(), args), set(_flags(Config))
        for name in (name for name in given if name in OTHERS and name not in flags):
            ours = OTHERS[name]
            if ours.partition(",")[0] in flags or not ours.startswith("--"):
                reason += f"; instead of {name} it has {ours}"
        raise UserError(reason) from None
    sys.stderr.write(printed.getvalue())  # nothing was refused: these are warnings of a config
    return config


def _flags(kind: type, prefix: str = "--") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        yield from _flags(hint, f"{flag}.") if dataclasses.is_dataclass(hint) else (flag,)


def _with_constraints(info: Any) -> Any:
    """tyro's own reading of a dataclass, in the order of its arguments, those that must be given
    first, those of its bases last, with its constraints."""
    import tyro

    if Constraint in info.markers or not dataclasses.is_dataclass(info.type):
        return None  # tyro's own rule for dataclasses reads it
    info = dataclasses.replace(info, markers=(*info.markers, Constraint))
    spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    hints, limits, fields = typing.get_type_hints(info.type), constraints(info.type), []
    given = inspect.signature(info.type).parameters
    names = [name for name in dict.fromkeys([*info.type.__annotations__, *given]) if name in given]
    order = sorted(names, key=lambda name: given[name].default is not inspect.Parameter.empty)
    for field in sorted(spec.fields, key=lambda field: order.index(field.name)):
        text = (field.helptext() if callable(field.helptext) else field.helptext) or ""
        if limit := limits.get(field.name):
            text += f" Must be {limit.words}."
        kind = field.type
        if field.default is None:  # the text says what that means
            one = typing.get_args(hints[field.name])[0]
            name = " ".join(part.__name__.upper() for part in typing.get_args(one) or [one])
            kind = typing.Annotated[kind, tyro.conf.arg(help_behavior_hint="", metavar=name)]
        text = " ".join(text.split())
        fields.append(dataclasses.replace(field, type=kind, helptext=text))
    return dataclasses.replace(spec, fields=tuple(fields))


def _refusal(printed: str, args: Sequence[str]) -> str:
    """What tyro says first in its box, and the flags it suggests below, without the frames."""
    text = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", printed).replace("─", "-")
    _, body, *sections = re.split(r"(?m)^ *(?:- [\w ]+ -+|-{8,}) *\n", text)
    # What a `__post_init__` complains of comes behind the name of a class or a group of flags.
    reason = re.sub(r"^Error parsing \w[\w.-]*: |Got errors:.*", "", _one_line(body)).rstrip(" .")
    optional = r"no type matching \{None\}\|(\w+) could be instantiated from \[(.*?)\]"
    reason = re.sub(optional, r"expected \1, found \2", reason)
    words = [word for arg in args for word in arg.split("=", 1)]
    stray = re.match(r"Unrecognized options: ([^-,][^,]*)", reason)
    if stray and stray[1] in words:  # a value too many, behind some flag
        before = [word for word in words[: words.index(stray[1])] if word.startswith("--")]
        reason += f" behind {before[-1]}" if before else ""
    for heading, *lines in (x.strip().splitlines() for x in sections if x.strip()):
        if flags := [line.strip() for line in lines if re.match(r"\s*--\w", line)]:
            reason += f"; {heading.strip()} {', '.join(flags)}"
    return reason.replace("Argument helptext:", "expected")


def _one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, text.splitlines())))
