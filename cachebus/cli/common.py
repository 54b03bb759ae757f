"""Shared by the commands: exit codes, the options that choose a cache, and how results are shown."""

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
"""Exit codes: done; the answer is no; the user got something wrong; the system could not do it."""


def add_bus(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the bus is."""
    parser.add_argument("--bus", metavar="URL", help="the NATS server; left out, CACHEBUS_BUS names it")
    parser.add_argument("--namespace", metavar="WORD", help="of the application; `default` if left out")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="the time budget of one call")


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cache is asked."""
    add_bus(parser)
    parser.add_argument("--address", metavar="ADDRESS", help="who is asked; `backend.primary` if left out")
    parser.add_argument(
        "--cache", metavar="SOURCE", help="a URL or a file of settings, instead of an address on the bus"
    )
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")


def bus_settings(arguments: argparse.Namespace, source: object = None, **more: Any) -> Settings:
    """Return the settings that `source` and the options of `add_bus` give. Raises `CacheConfigurationError`."""
    given = {name: getattr(arguments, name) for name in ("bus", "namespace", "timeout")}
    return load_settings(source, **{name: value for name, value in given.items() if value is not None}, **more)


def target(arguments: argparse.Namespace) -> tuple[Settings, Address]:
    """Return the settings and the address that the options of `add_target` give. Raises `CacheConfigurationError`."""
    more = {} if arguments.cache is not None else {"backends": ["bus:primary"]}
    settings = bus_settings(arguments, arguments.cache, **more)
    try:
        address = Address(arguments.address) if arguments.address else backend_address(settings.default_backend.name)
    except ValueError as error:
        raise CacheConfigurationError(f"--address: {error}") from None
    return settings, address


def show(result: Any, *, as_json: bool) -> int:
    """Print a result as YAML, or as JSON."""
    dump: Callable[..., str] = cast("Any", yaml).safe_dump  # The hints of PyYAML are not complete.
    print(json.dumps(result, indent=2) + "\n" if as_json else dump(result, sort_keys=False, allow_unicode=True), end="")
    return DONE


def printable(text: str) -> str:
    """Return text for a terminal: everything that could control the terminal is escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
