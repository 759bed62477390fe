"""The commands and snippets of README.md and of docs/, as their text has them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("distill", "generate", "targets", "eval", "sweep")


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of code in these languages, in order."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for language, block in fenced if language in languages]


def shell_lines(page: Path) -> list[str]:
    """Every line of shell, of blocks and within sentences, with continued lines joined."""
    lines = []
    for block in blocks(page, "sh"):
        lines += block.replace("\\\n", " ").splitlines()
    for block in blocks(page, "console"):
        lines += re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.M)
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if " " in code and ".py" in code]
    return [line for line in lines if line.strip()]


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """The programs that are called there, however they are started, with their arguments."""
    return [call for line in shell_lines(page) for call in calls_in(line)]


def calls_in(line: str) -> list[tuple[str, list[str]]]:
    """The programs that a line of shell calls, with their arguments."""
    words = [part for word in split(line) for part in (split(word) if ".py" in word else [word])]
    entries = []
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
