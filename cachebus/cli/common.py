"""Helpers for the commands: exit codes, options that select a cache, and output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import yaml

from cachebus.bus import Address
from cachebus.messages import CacheConfigurationError
from cachebus.node.node import backend_address
from cachebus.settings import Settings, load_settings

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]

DONE, NO, WRONG, FAILED = 0, 1, 2, 3
"""Exit codes: success; negative result; usage or configuration error; failure of the system."""


def add_bus(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the bus."""
    parser.add_argument("--bus", metavar="URL", help="URL of the NATS server (default: CACHEBUS_BUS)")
    parser.add_argument("--namespace", metavar="WORD", help="namespace of the application (default: `default`)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="time limit of a call")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the cache."""
    add_bus(parser)
    parser.add_argument("--address", metavar="ADDRESS", help="address of the actor (default: `backend.primary`)")
    parser.add_argument("--cache", metavar="SOURCE", help="URL or settings file, instead of an address on the bus")
    parser.add_argument("--json", action="store_true", help="print the complete reply as JSON")


def bus_settings(arguments: argparse.Namespace, source: object = None, **more: Any) -> Settings:
    """Return the settings from `source` and the options of `add_bus`. Raises `CacheConfigurationError`."""
    given = {name: getattr(arguments, name) for name in ("bus", "namespace", "timeout")}
    return load_settings(source, **{name: value for name, value in given.items() if value is not None}, **more)


def target(arguments: argparse.Namespace) -> tuple[Settings, Address]:
    """Return the settings and the address from the options of `add_target`. Raises `CacheConfigurationError`."""
    more = {} if arguments.cache is not None else {"backends": ["bus:primary"]}
    settings = bus_settings(arguments, arguments.cache, **more)
    try:
        address = Address(arguments.address) if arguments.address else backend_address(settings.default_backend.name)
    except ValueError as error:
        raise CacheConfigurationError(f"--address: {error}") from None
    return settings, address


def show(result: Any, *, as_json: bool) -> int:
    """Print a result as YAML or JSON."""
    dump: Callable[..., str] = cast("Any", yaml).safe_dump  # The type hints of PyYAML are incomplete.
    print(json.dumps(result, indent=2) + "\n" if as_json else dump(result, sort_keys=False, allow_unicode=True), end="")
    return DONE


def printable(text: str) -> str:
    """Escape all characters of a text that could control the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
