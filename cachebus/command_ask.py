"""One request to a running cache: `cachebus get`, `set`, `delete`, `invalidate` and `ping`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from cachebus.bus.codec import JSON, encode
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

from .checks import check_key, check_keys, check_tags, check_ttl
from .command_line import DONE, NO, Commands, add_target, on_terminal, printable, target
from .node import Node


def add(commands: Commands) -> None:
    """Add the commands."""
    get = commands.add_parser("get", help="read a key; exit code 1 if it has no value")
    get.add_argument("key")
    get.set_defaults(command=_get)
    put = commands.add_parser("set", help="store a value")
    put.add_argument("key")
    put.add_argument("value")
    put.add_argument("--as", dest="form", choices=("text", "json"), default="text", help="what VALUE is (text)")
    put.add_argument("--ttl", type=float, metavar="SECONDS", help="left out, the backend's default")
    put.add_argument("--tag", action="append", default=[], metavar="TAG", help="several are allowed")
    put.add_argument("--only-if", choices=("absent", "present"), help="exit code 1 if the condition does not hold")
    put.set_defaults(command=_set)
    delete = commands.add_parser("delete", help="remove keys")
    delete.add_argument("keys", nargs="+", metavar="KEY")
    delete.set_defaults(command=_delete)
    invalidate = commands.add_parser("invalidate", help="make everything unreadable that has one of the tags")
    invalidate.add_argument("tags", nargs="+", metavar="TAG")
    invalidate.set_defaults(command=_invalidate)
    ping = commands.add_parser("ping", help="whether an actor answers")
    ping.set_defaults(command=_ping)
    for command in (get, put, delete, invalidate, ping):
        add_target(command)


def _get(arguments: argparse.Namespace) -> int:
    reply = _ask(arguments, Get(_key(arguments.key)))
    if arguments.json:
        _show(reply)
    elif isinstance(reply, Found):
        _write(reply.value)
    if isinstance(reply, Missing):
        print("cachebus: there is no value under the key", file=sys.stderr)
        return NO
    return DONE


def _set(arguments: argparse.Namespace) -> int:
    value: Any = arguments.value
    if arguments.form == "json":
        try:
            value = json.loads(value)
        except ValueError as error:
            raise CacheConfigurationError(f"VALUE is no JSON: {error}") from None
    try:
        ttl = "default" if arguments.ttl is None else check_ttl(arguments.ttl)
        tags = check_tags(arguments.tag)
    except ValueError as error:
        raise CacheConfigurationError(str(error)) from None
    reply = _ask(arguments, Set(_key(arguments.key), value, ttl, tags, arguments.only_if))
    if arguments.json:
        _show(reply)
    if isinstance(reply, NotStored):
        print("cachebus: nothing was stored, the condition does not hold", file=sys.stderr)
        return NO
    return DONE


def _delete(arguments: argparse.Namespace) -> int:
    reply = _ask(arguments, DeleteMany(check_keys(arguments.keys)))
    if arguments.json:
        _show(reply)
    elif isinstance(reply, Deleted):
        print(f"{reply.count} removed")
    return DONE


def _invalidate(arguments: argparse.Namespace) -> int:
    try:
        tags = check_tags(arguments.tags)
    except ValueError as error:
        raise CacheConfigurationError(str(error)) from None
    reply = _ask(arguments, InvalidateTags(tags))
    if arguments.json:
        _show(reply)
    return DONE


def _ping(arguments: argparse.Namespace) -> int:
    _, address = target(arguments)
    reply, seconds = _timed(arguments, Ping())
    if arguments.json:
        _show(reply, seconds=seconds)
    else:
        print(f"{address} answers, {seconds * 1e3:.1f} ms")
    return DONE


def _key(text: str) -> str:
    return check_key(text)


def _ask(arguments: argparse.Namespace, request: Request[Any]) -> Reply:
    return _timed(arguments, request)[0]


def _timed(arguments: argparse.Namespace, request: Request[Any]) -> tuple[Reply, float]:
    settings, address = target(arguments)

    async def ask() -> tuple[Reply, float]:
        async with Node(settings) as node:
            started = time.perf_counter()
            reply: Reply = await node.bus.request(address, request, settings.timeout)
            return reply, time.perf_counter() - started

    return asyncio.run(ask())


def _show(reply: Reply, **more: Any) -> None:
    print(json.dumps({**json.loads(encode(reply, JSON)), **more}, ensure_ascii=False))


def _write(value: Any) -> None:
    if isinstance(value, bytes):
        sys.stdout.buffer.write(value)
    elif isinstance(value, str):
        print(printable(value) if on_terminal() else value)
    else:
        # As the wire says it, with bytes inside as base64.
        print(json.dumps(json.loads(encode(Found(value), JSON))["value"], ensure_ascii=False))
