"""What settings come out of a source, what is wrong with them, and which there are: `cachebus config`."""

from __future__ import annotations

import argparse
from typing import Any

from .command_line import DONE, Commands, show
from .options import sentence
from .production import insecurities
from .settings import load_settings


def add(commands: Commands) -> None:
    """Add the commands."""
    config = commands.add_parser("config", help="show or check a source of settings").add_subparsers(required=True)
    shown = config.add_parser("show", help="the settings that a source gives, secrets masked")
    shown.set_defaults(command=_show)
    check = config.add_parser("check", help="say what is wrong with a source, and what production would refuse")
    check.set_defaults(command=_check)
    for command in (shown, check):
        command.add_argument("source", nargs="?", metavar="SOURCE", help="a file or a URL; else the environment alone")
        command.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    reference = config.add_parser("reference", help="every setting there is, as a page in Markdown")
    reference.set_defaults(command=_reference)


def _show(arguments: argparse.Namespace) -> int:
    told: dict[str, Any] = load_settings(arguments.source).model_dump(mode="json")
    return show(told, as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments.source)
    found = [sentence(path, text) for path, text in insecurities(settings)]
    return show({"valid": True, "environment": settings.environment, "insecure": found}, as_json=arguments.json)


def _reference(arguments: argparse.Namespace) -> int:
    from .configuration_page import configuration_page

    print(configuration_page(), end="")
    return DONE
