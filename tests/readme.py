"""The commands and snippets of README.md, as its text has them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("distill", "generate", "targets", "eval", "sweep")


def blocks(*languages: str) -> list[str]:
    """The blocks of code in these languages, in order."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return [block for language, block in fenced if language in languages]


def shell_lines() -> list[str]:
    """Every line of shell, of blocks and within sentences, with continued lines joined."""
    lines = []
    for block in blocks("sh"):
        lines += block.replace("\\\n", " ").splitlines()
    for block in blocks("console"):
        lines += re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.M)
    prose = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if " " in code and ".py" in code]
    return [line for line in lines if line.strip()]


def calls() -> list[tuple[str, list[str]]]:
    """The programs that are called there, however they are started, with their arguments."""
    entries = []
    for line in shell_lines():
        words = [
            part for word in split(line) for part in (split(word) if ".py" in word else [word])
        ]
        for i, word in enumerate(words):
            name = Path(word).stem
            if word.endswith(".py") and name in PROGRAMS:
                end = next((j for j in range(i, len(words)) if words[j] in ("&&", ";")), len(words))
                entries.append((name, words[i + 1 : end]))
    return entries


def split(text: str) -> list[str]:
    return shlex.split(text)


def with_flags(arguments: list[str], flags: dict[str, str]) -> list[str]:
    """The arguments with other values of some flags, which may not have been given."""
    arguments = list(arguments)
    for flag, value in flags.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    return arguments
