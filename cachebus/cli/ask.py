"""`cachebus get`, `set`, `delete`, `invalidate` and `ping`: send one request to a cache."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cachebus.bus.codec.messages import JSON, encode
from cachebus.client.validation import check_key, check_keys, check_tags, check_ttl
from cachebus.messages import (
    CacheConfigurationError,
    Deleted,
    DeleteMany,
    Found,
    Get,
    InvalidateTags,
    Missing,
    NotStored,
    Ping,
    Reply,
    Request,
    Set,
)
from cachebus.node.node import Node

from .common import DONE, NO, Commands, add_target, printable, target

T = TypeVar("T")


def add(commands: Commands) -> None:
    """Add the commands to the parser."""
    get = commands.add_parser("get", help="print the value of a key; exit code 1 if there is none")
    get.add_argument("key")
    put = commands.add_parser("set", help="store a value")
    put.add_argument("key")
    put.add_argument("value")
    put.add_argument(
        "--as", dest="form", choices=("text", "json"), default="text", help="type of VALUE (default: text)"
    )
    put.add_argument("--ttl", type=float, metavar="SECONDS", help="time to live (default: the backend's)")
    put.add_argument("--tag", action="append", default=[], metavar="TAG", help="tag of the value; may be repeated")
    put.add_argument(
        "--only-if",
        choices=("absent", "present"),
        help="store only if the key is absent or present; otherwise exit code 1",
    )
    delete = commands.add_parser("delete", help="remove keys")
    delete.add_argument("keys", nargs="+", metavar="KEY")
    invalidate = commands.add_parser("invalidate", help="invalidate all values that have one of the tags")
    invalidate.add_argument("tags", nargs="+", metavar="TAG")
    ping = commands.add_parser("ping", help="check that an actor answers")
    for parser, command in ((get, _get), (put, _set), (delete, _delete), (invalidate, _invalidate), (ping, _ping)):
        parser.set_defaults(command=command)
        add_target(parser)


def _get(arguments: argparse.Namespace) -> int:
    reply, _ = _ask(arguments, Get(check_key(arguments.key)))
    if isinstance(reply, Missing):
        print("cachebus: the key has no value", file=sys.stderr)
        return NO
    if isinstance(reply, Found) and not arguments.json:
        value = reply.value
        if isinstance(value, bytes):
            sys.stdout.buffer.write(value)
        elif isinstance(value, str):
            print(printable(value) if sys.stdout.isatty() else value)
        else:  # The JSON form of the wire, with nested bytes as base64.
            print(json.dumps(json.loads(encode(reply, JSON))["value"], ensure_ascii=False))
    return DONE


def _set(arguments: argparse.Namespace) -> int:
    value: Any = arguments.value
    if arguments.form == "json":
        try:
            value = json.loads(value)
        except ValueError as error:
            raise CacheConfigurationError(f"VALUE is not valid JSON: {error}") from None
    ttl = "default" if arguments.ttl is None else _checked(check_ttl, arguments.ttl)
    tags = _checked(check_tags, arguments.tag)
    reply, _ = _ask(arguments, Set(check_key(arguments.key), value, ttl, tags, arguments.only_if))
    if isinstance(reply, NotStored):
        print(f"cachebus: the value was not stored, because the key is not {arguments.only_if}", file=sys.stderr)
        return NO
    return DONE


def _delete(arguments: argparse.Namespace) -> int:
    reply, _ = _ask(arguments, DeleteMany(check_keys(arguments.keys)))
    if isinstance(reply, Deleted) and not arguments.json:
        print(f"{reply.count} removed")
    return DONE


def _invalidate(arguments: argparse.Namespace) -> int:
    _ask(arguments, InvalidateTags(_checked(check_tags, arguments.tags)))
    return DONE


def _ping(arguments: argparse.Namespace) -> int:
    _, seconds = _ask(arguments, Ping(), timed=True)
    if not arguments.json:
        print(f"{target(arguments)[1]} answered in {seconds * 1e3:.1f} ms")
    return DONE


def _checked(check: Callable[[Any], T], given: Any) -> T:
    try:
        return check(given)
    except ValueError as error:
        raise CacheConfigurationError(str(error)) from None


def _ask(arguments: argparse.Namespace, request: Request[Any], *, timed: bool = False) -> tuple[Reply, float]:
    """Return the reply and its duration in seconds. With `--json`, also print the reply."""
    settings, address = target(arguments)

    async def ask() -> tuple[Reply, float]:
        async with Node(settings) as node:
            started = time.perf_counter()
            reply: Reply = await node.bus.request(address, request, settings.timeout)
            return reply, time.perf_counter() - started

    reply, seconds = asyncio.run(ask())
    if arguments.json:
        more = {"seconds": seconds} if timed else {}
        print(json.dumps({**json.loads(encode(reply, JSON)), **more}, ensure_ascii=False))
    return reply, seconds
