"""What is installed, and what settings come out of a source: `cachebus info` and `cachebus settings`."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from .command_line import Commands, show
from .settings import POLICIES, load_settings
from .urls import known_schemes

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^]]*)\])?.*?;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def add(commands: Commands) -> None:
    """Add the commands."""
    info = commands.add_parser("info", help="what is installed and can be used")
    info.set_defaults(command=_info)
    settings = commands.add_parser("settings", help="the settings that a source gives, passwords masked")
    settings.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a file or a URL; left out, the environment alone"
    )
    settings.set_defaults(command=_settings)
    for command in (info, settings):
        command.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def installed_version() -> str:
    """The version of the installed package; `0+unknown` for a source tree that is not installed."""
    try:
        return version("cachebus")
    except PackageNotFoundError:
        return "0+unknown"


def _info(arguments: argparse.Namespace) -> int:
    told = {
        "cachebus": installed_version(),
        "python": platform.python_version(),
        "schemes": list(known_schemes()),
        "policies": list(POLICIES),
        "extras": extras(),
    }
    return show(told, as_json=arguments.json)


def _settings(arguments: argparse.Namespace) -> int:
    told: dict[str, Any] = load_settings(arguments.source).model_dump(mode="json")
    return show(told, as_json=arguments.json)


def extras() -> dict[str, bool]:
    """Every extra of the installed package, and whether all that it asks for is installed, in whatever version."""
    try:
        wanted = requires("cachebus") or ()
    except PackageNotFoundError:
        return {}
    needs: dict[str, list[tuple[str, str]]] = {}
    for requirement in wanted:
        if found := _REQUIREMENT.match(requirement):
            needs.setdefault(found[3], []).append((found[1], found[2] or ""))
    return {extra: all(map(_is_installed, _packages(extra, needs))) for extra in needs}


def _packages(extra: str, needs: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for package, inner in needs.get(extra, ()):
        if package != "cachebus":
            yield package
            continue
        for name in inner.split(","):
            yield from _packages(name.strip(), needs)


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
