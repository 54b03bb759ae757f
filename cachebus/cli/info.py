"""`cachebus info`, `config` and `asyncapi`: print installation, settings, and the API of a worker."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from cachebus.bus.nats.asyncapi import document
from cachebus.settings.fields import sentence
from cachebus.settings.settings import POLICIES, load_settings, security_issues
from cachebus.settings.urls import known_schemes

from .common import DONE, Commands, show

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^]]*)\])?.*?;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    info = commands.add_parser("info", help="print versions, URL schemes, policies and installed extras")
    info.set_defaults(command=_info)
    config = commands.add_parser("config", help="print or check settings").add_subparsers(required=True)
    shown = config.add_parser("show", help="print the effective settings, with secrets masked")
    shown.set_defaults(command=_settings)
    check = config.add_parser("check", help="check settings, and list what production would reject")
    check.set_defaults(command=_check)
    reference = config.add_parser("reference", help="print the reference of all settings in Markdown")
    reference.set_defaults(command=_reference)
    for command in (shown, check):
        command.add_argument(
            "source", nargs="?", metavar="SOURCE", help="settings file or URL (default: only the environment)"
        )
    for command in (info, shown, check):
        command.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    asyncapi = commands.add_parser("asyncapi", help="print the AsyncAPI 3 document of a worker")
    form = asyncapi.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--yaml", action="store_true", help="print YAML, the default")
    asyncapi.set_defaults(command=_asyncapi)


def _info(arguments: argparse.Namespace) -> int:
    versions = {"cachebus": installed_version(), "python": platform.python_version()}
    usable = {"schemes": list(known_schemes()), "policies": list(POLICIES), "extras": extras()}
    return show(versions | usable, as_json=arguments.json)


def _settings(arguments: argparse.Namespace) -> int:
    return show(load_settings(arguments.source).model_dump(mode="json"), as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments.source)
    found = [sentence(path, text) for path, text in security_issues(settings)]
    return show({"valid": True, "environment": settings.environment, "insecure": found}, as_json=arguments.json)


def _reference(arguments: argparse.Namespace) -> int:
    from cachebus.settings.reference import configuration_page

    print(configuration_page(), end="")
    return DONE


def _asyncapi(arguments: argparse.Namespace) -> int:
    return show(document(installed_version()), as_json=arguments.json)


def installed_version(package: str = "cachebus") -> str:
    """Return the version of an installed package, or `0+unknown` if it is not installed, as in a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "0+unknown"


def extras() -> dict[str, bool]:
    """Return all extras of cachebus, and for each whether its requirements are installed, in any version."""
    try:
        wanted = requires("cachebus") or ()
    except PackageNotFoundError:
        return {}
    needs: dict[str, list[tuple[str, str]]] = {}
    for requirement in wanted:
        if found := _REQUIREMENT.match(requirement):
            needs.setdefault(found[3], []).append((found[1], found[2] or ""))
    return {extra: all(installed_version(each) != "0+unknown" for each in _packages(extra, needs)) for extra in needs}


def _packages(extra: str, needs: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for package, inner in needs.get(extra, ()):
        if package != "cachebus":
            yield package
            continue
        for name in inner.split(","):
            yield from _packages(name.strip(), needs)
