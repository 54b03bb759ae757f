"""Fenced blocks of a Markdown page, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHELLS = frozenset({"console", "sh", "bash", "shell"})


@dataclass(frozen=True)
class Block:
    """Fenced block of a page."""

    language: str
    text: str
    line: int
    expect: str | None
    """Expected output, from ``<!-- expect: ... -->`` directly before the fence."""
    serves: bool
    """True after ``<!-- serves -->``: the commands run until stopped, so the test runs only their ``--help``."""

    def __str__(self) -> str:
        return f"line {self.line}"


def read_blocks(text: str) -> list[Block]:
    """Return every fenced block. Raises ``ValueError`` if one is not closed."""
    blocks: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = re.match(r"( *)(`{3,}|~{3,})\s*([\w+-]*)", lines[at])
        if opening is None:
            at += 1
            continue
        indent, fence, language = opening.groups()
        start = at + 1
        at = start
        while at < len(lines) and lines[at].strip() != fence:
            at += 1
        if at == len(lines):
            raise ValueError(f"the block in line {start} is not closed")
        body = [line.removeprefix(indent) for line in lines[start:at]]
        notes = _notes("\n".join(lines[: start - 1]))
        expect = next((note[7:].strip() for note in notes if note.startswith("expect:")), None)
        blocks.append(Block(language, "\n".join(body) + "\n", start, expect, "serves" in notes))
        at += 1
    return blocks


def _notes(before: str) -> list[str]:
    """Return the HTML comments at the end of ``before``."""
    found: list[str] = []
    while match := re.search(r"<!--((?:(?!-->).)*)-->\s*\Z", before, re.DOTALL):
        found.append(match[1].strip())
        before = before[: match.start()]
    return found


def commands(block: Block) -> list[str]:
    """Return the commands of a block: in a console, the lines after ``$``, otherwise all lines but comments."""
    joined = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line.strip()[2:].strip() for line in joined if line.strip().startswith("$ ")]
    return [line.strip() for line in joined if line.strip() and not line.strip().startswith("#")]


@dataclass(frozen=True)
class Promises:
    """Names in the repository that commands may use."""

    targets: frozenset[str]
    """Targets of the Makefile."""
    extras: frozenset[str]
    """Extras in pyproject.toml."""
    services: frozenset[str]
    """Services in compose.yaml."""
    root: Path


def make_targets(makefile: str) -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))


def extras(project: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(project["project"]["optional-dependencies"])


ELSEWHERE = frozenset({"cd", "git", "nats", "redis-cli", "curl", "echo", "export", "source", "."})
"""Commands that do not refer to this repository."""


def split(command: str) -> list[str]:
    """Return the words of a command, without leading variable assignments."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def command_faults(command: str, promises: Promises) -> Iterator[str]:
    """Yield the names in a command that do not exist. The caller runs ``python -m cachebus`` commands itself."""
    match split(command):
        case ["make", *rest]:
            asked = [word for word in rest if "=" not in word and not word.startswith("-")]
            if not asked:
                yield f"{command}: names no target"
            yield from (f"{command}: no target {word}" for word in asked if word not in promises.targets)
        case ["pip", "install", *rest] | ["python", "-m", "pip", "install", *rest] | ["uv", "add", *rest]:
            for word in rest:
                if match := re.match(r"(?:cachebus|\.)\[([^\]]*)\]", word):
                    asked = [name.strip() for name in match[1].split(",")]
                    yield from (f"{command}: no extra {name}" for name in asked if name not in promises.extras)
        case ["docker", "compose", _, *rest]:
            asked = [word for word in rest if not word.startswith("-")]
            yield from (f"{command}: no service {word}" for word in asked if word not in promises.services)
        case ["python", "-m", "cachebus", *_] | ["cachebus", *_]:
            return
        case ["python", "-m", module, *_]:
            path = promises.root / module.replace(".", "/")
            if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
                yield f"{command}: no module {module}"
        case ["python", script, *_]:
            if not (promises.root / script).is_file():
                yield f"{command}: no file {script}"
        case [word, *_] if word in ELSEWHERE:
            return
        case _:
            yield f"{command}: this command is unknown to the test; add it in tests/house/readme.py"


def cachebus_arguments(command: str) -> list[str] | None:
    """Return the arguments of a cachebus command, or ``None`` for another command."""
    words = split(command)
    if words[:3] == ["python", "-m", "cachebus"]:
        return words[3:]
    return words[1:] if words[:1] == ["cachebus"] else None
