"""`cachebus events`: print the events of a namespace, one per line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
from datetime import datetime
from functools import partial
from typing import Any

from cachebus.bus import event_kinds
from cachebus.bus.codec.messages import JSON, encode
from cachebus.messages import CacheConfigurationError, Event, EventsMissed
from cachebus.node.node import Node
from cachebus.node.worker import own_fields

from .common import DONE, FAILED, Commands, add_bus, bus_settings, printable

_COLOURS = {
    "cache_hit": 32,
    "cache_miss": 33,
    "cache_set": 36,
    "cache_evicted": 31,
    "cache_expired": 34,
    "events_missed": 91,
    **dict.fromkeys(("cache_deleted", "cache_cleared", "tags_invalidated"), 35),
    **dict.fromkeys(
        ("circuit_opened", "backend_disconnected", "actor_gave_up", "actor_restarted", "load_failed", "dead_letter"), 91
    ),
}
_CAPACITY = 100_000


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    events = commands.add_parser("events", help="print events, one per line, until Ctrl-C")
    add_bus(events)
    several: Any = {"action": "append", "default": []}
    events.add_argument(
        "--kind",
        **several,
        metavar="KIND",
        help="kind of events, such as hit, cache_set or circuit_*; may be repeated (default: all)",
    )
    events.add_argument(
        "--backend", **several, metavar="NAME", help="name of a backend; may be repeated (default: all)"
    )
    since = "replay the stream of the bus (`events_stream`) first, from this long ago, such as 90s, 10m, 2h or 1d"
    events.add_argument("--since", type=_duration, metavar="DURATION", help=since)
    events.add_argument("--count", type=int, metavar="N", help="exit after N events")
    events.add_argument("--json", action="store_true", help="print each event as a JSON object, as on the wire")
    events.set_defaults(command=_events)


def _events(arguments: argparse.Namespace) -> int:
    # A backend on the bus, so that this process emits no events itself.
    settings = bus_settings(arguments, backends=["bus:primary"])
    kinds = [kind for each in arguments.kind for kind in kinds_of(each)]
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    line = as_json if arguments.json else partial(as_line, coloured=coloured)

    async def listen() -> int:
        left, dropped = arguments.count, 0
        async with Node(settings) as node:
            since = None if arguments.since is None else node.bus.clock.wall() - arguments.since
            wanted: list[str | type[Event]] = [*kinds, *([EventsMissed] if kinds else [])]
            with node.bus.subscribe(*wanted, capacity=_CAPACITY, since=since) as subscription:
                async for event in subscription:
                    missed = isinstance(event, EventsMissed)
                    if arguments.backend and event.backend not in arguments.backend and not missed:
                        continue
                    print(line(event), flush=True)  # Flushed, so that the reader of a pipe gets each line immediately.
                    if subscription.dropped > dropped:
                        lost = subscription.dropped - dropped
                        print(f"cachebus: {lost} events were dropped, because this terminal is too slow", flush=True)
                        dropped = subscription.dropped
                    if left is not None and (left := left - 1) <= 0:
                        return DONE
        return FAILED  # The subscription ended because there is no stream, which is logged.

    return asyncio.run(listen())


def _duration(text: str) -> float:
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)) is None:
        raise argparse.ArgumentTypeError(f"expected a duration such as 90s, 10m, 2h or 1d, not {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def kinds_of(text: str) -> tuple[str, ...]:
    """Return the event kinds of a `--kind` option; `hit` means `cache_hit`. Raises `CacheConfigurationError`."""
    for each in (text, f"cache_{text}"):
        try:
            event_kinds((each,))
        except ValueError as error:
            problem = str(error)
        else:
            return (each,)
    raise CacheConfigurationError(f"--kind: {problem.replace('cache_' + text, text)}")


def as_json(event: Event) -> str:
    """Return the JSON form of an event, as on the wire."""
    return encode(event, JSON).decode()


def as_line(event: Event, *, coloured: bool) -> str:
    """Return an event as readable text: time, kind, backend, and the fields of its kind."""
    kind = event.WIRE_NAME.removeprefix("event.")
    shown = f"{kind:<20}"
    if coloured:
        shown = f"\x1b[{_COLOURS.get(kind, 37)}m{shown}\x1b[0m"
    when = datetime.fromtimestamp(event.time).astimezone().isoformat(sep=" ", timespec="milliseconds")[:23]
    own = " ".join(f"{name}={_word(value)}" for name, value in own_fields(event).items() if value not in (None, ()))
    line = f"{when}  {shown}  {event.backend or '-':<10}  {own}"
    return f"{line.rstrip()}  ({event.origin} #{event.seq})"


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))  # pyright: ignore[reportUnknownArgumentType]
    text = printable(str(value))
    return text if text and " " not in text and '"' not in text else json.dumps(text, ensure_ascii=False)
