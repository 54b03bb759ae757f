"""`cachebus events`: what happens in the caches of a namespace, one line for each event."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
from datetime import datetime
from typing import Any

from cachebus.bus import Subscription, event_kinds
from cachebus.bus.codec import JSON, encode
from cachebus.messages import CacheConfigurationError, Event, EventsMissed

from .command_line import DONE, FAILED, Commands, add_bus, bus_settings, on_terminal, printable
from .node import Node

_COMMON = frozenset(Event.__struct_fields__)
_COLOURS = {
    "cache_hit": 32,
    "cache_miss": 33,
    "cache_set": 36,
    "cache_deleted": 35,
    "cache_evicted": 31,
    "cache_expired": 34,
    "cache_cleared": 35,
    "tags_invalidated": 35,
    "events_missed": 91,
}
_ALARMING = ("circuit_opened", "backend_disconnected", "actor_gave_up", "actor_restarted", "load_failed", "dead_letter")
_CAPACITY = 100_000


def add(commands: Commands) -> None:
    """Add the command."""
    events = commands.add_parser("events", help="what happens, one line for each event, until ctrl-C")
    add_bus(events)
    events.add_argument(
        *("--kind",), action="append", default=[], metavar="KIND",
        help="such as hit, cache_set or circuit_*; several are allowed; all if left out",
    )  # fmt: skip
    events.add_argument("--backend", action="append", default=[], metavar="NAME", help="several are allowed")
    events.add_argument(
        *("--since",), type=_duration, metavar="DURATION",
        help="such as 90s, 10m, 2h or 1d: first what a stream of the bus has kept (`events_stream`)",
    )  # fmt: skip
    events.add_argument("--count", type=int, metavar="N", help="end after so many")
    events.add_argument("--json", action="store_true", help="one JSON object a line, as it is on the wire")
    events.set_defaults(command=_events)


def _events(arguments: argparse.Namespace) -> int:
    # What this process would tell of itself is nobody's business.
    settings = bus_settings(arguments, backends=["bus:primary"])
    kinds = [kind for each in arguments.kind for kind in kinds_of(each)]
    line = as_json if arguments.json else Line(coloured=on_terminal() and "NO_COLOR" not in os.environ)

    async def listen() -> int:
        async with Node(settings) as node:
            since = None if arguments.since is None else node.bus.clock.wall() - arguments.since
            wanted: list[str | type[Event]] = [*kinds, *([EventsMissed] if kinds else [])]
            with node.bus.subscribe(*wanted, capacity=_CAPACITY, since=since) as heard:
                return await _print(heard, arguments, line)

    return asyncio.run(listen())


async def _print(heard: Subscription, arguments: argparse.Namespace, line: Any) -> int:
    left = arguments.count if arguments.count is not None else -1
    dropped = 0
    async for event in heard:
        if arguments.backend and event.backend not in arguments.backend and not isinstance(event, EventsMissed):
            continue
        # Whoever reads a pipe wants each line when it is there.
        print(line(event), flush=True)
        if heard.dropped > dropped:
            print(f"cachebus: {heard.dropped - dropped} events were too many for this terminal", flush=True)
            dropped = heard.dropped
        left -= 1
        if left == 0:
            return DONE
    return FAILED  # It ended by itself: there is no stream, and the log says so.


def _duration(text: str) -> float:
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)) is None:
        raise argparse.ArgumentTypeError(f"expected a duration such as 90s, 10m, 2h or 1d, not {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds of events that a word names: `hit` is `cache_hit`. Raises `CacheConfigurationError`."""
    for each in (text, f"cache_{text}"):
        try:
            event_kinds((each,))
        except ValueError as error:
            problem = str(error)
        else:
            return (each,)
    raise CacheConfigurationError(f"--kind: {problem.replace('cache_' + text, text)}")


def as_json(event: Event) -> str:
    """An event as it is on the wire."""
    return encode(event, JSON).decode()


class Line:
    """Writes an event for people: when, what, where, and what is particular to its kind."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, event: Event) -> str:
        kind = event.WIRE_NAME.removeprefix("event.")
        when = datetime.fromtimestamp(event.time).astimezone().isoformat(sep=" ", timespec="milliseconds")[:23]
        own = " ".join(f"{name}={_word(value)}" for name, value in _own(event))
        line = f"{when}  {self._paint(kind, f'{kind:<20}')}  {event.backend or '-':<10}  {own}"
        return f"{line.rstrip()}  ({event.origin} #{event.seq})"

    def _paint(self, kind: str, text: str) -> str:
        if not self._coloured:
            return text
        return f"\x1b[{91 if kind in _ALARMING else _COLOURS.get(kind, 37)}m{text}\x1b[0m"


def _own(event: Event) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name in event.__struct_fields__
        if name not in _COMMON and (value := getattr(event, name)) not in (None, ())
    ]


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))  # pyright: ignore[reportUnknownArgumentType]
    text = printable(str(value))
    return text if text and " " not in text and '"' not in text else json.dumps(text, ensure_ascii=False)
