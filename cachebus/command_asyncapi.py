"""`cachebus asyncapi`: the AsyncAPI document of a worker, for people who write in other languages."""

from __future__ import annotations

import argparse

from .asyncapi import document
from .command_info import installed_version
from .command_line import Commands, show


def add(commands: Commands) -> None:
    """Add the command."""
    asyncapi = commands.add_parser("asyncapi", help="the AsyncAPI 3 document of a worker")
    form = asyncapi.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--yaml", action="store_true", help="print YAML (what is printed if neither is said)")
    asyncapi.set_defaults(command=_asyncapi)


def _asyncapi(arguments: argparse.Namespace) -> int:
    return show(document(installed_version()), as_json=arguments.json)
