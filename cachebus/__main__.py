"""The command line: `python -m cachebus`."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import yaml

from cachebus.messages import CacheError

from .options import sentence
from .production import insecurities
from .settings import POLICIES, load_settings
from .urls import known_schemes

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^]]*)\])?.*?;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 2 for what the user got wrong, which one line on stderr names."""
    arguments = _parser().parse_args(argv)
    try:
        shown = arguments.command(arguments)
    except CacheError as error:
        print("cachebus:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    if isinstance(shown, str):
        print(shown, end="")
    elif arguments.json:
        print(json.dumps(shown, indent=2))
    else:
        print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cachebus", description="A cache built of actors and messages.")
    parser.add_argument("--version", action="version", version=f"cachebus {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="what is installed and can be used")
    info.set_defaults(command=_info)
    settings = commands.add_parser("settings", help="the settings that a source gives, passwords masked")
    settings.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a file or a URL; left out, the environment alone"
    )
    settings.set_defaults(command=_settings)
    config = commands.add_parser("config", help="show or check a source of settings").add_subparsers(required=True)
    show = config.add_parser("show", help="the settings that a source gives, secrets masked")
    show.set_defaults(command=_settings)
    check = config.add_parser("check", help="say what is wrong with a source, and what production would refuse")
    check.set_defaults(command=_check)
    reference = config.add_parser("reference", help="every setting there is, as a page in Markdown")
    reference.set_defaults(command=_reference)
    for command in (show, check):
        command.add_argument("source", nargs="?", metavar="SOURCE", help="a file or a URL; else the environment alone")
    for command in (info, settings, show, check, reference):
        command.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    return parser


def installed_version() -> str:
    """The version of the installed package; `0+unknown` for a source tree that is not installed."""
    try:
        return version("cachebus")
    except PackageNotFoundError:
        return "0+unknown"


def _info(_: argparse.Namespace) -> dict[str, Any]:
    return {
        "cachebus": installed_version(),
        "python": platform.python_version(),
        "schemes": list(known_schemes()),
        "policies": list(POLICIES),
        "extras": extras(),
    }


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return load_settings(arguments.source).model_dump(mode="json")


def _reference(_: argparse.Namespace) -> str:
    from .configuration_page import configuration_page

    return configuration_page()


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = load_settings(arguments.source)
    found = [sentence(path, text) for path, text in insecurities(settings)]
    return {"valid": True, "environment": settings.environment, "insecure": found}


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


if __name__ == "__main__":
    raise SystemExit(main())
