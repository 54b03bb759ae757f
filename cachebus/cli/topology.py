"""`cachebus topology`: print the workers and their actors, as reported over NATS micro."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from msgspec import Struct, to_builtins

from cachebus.messages import CacheConfigurationError
from cachebus.node.node import Node

from .common import DONE, NO, Commands, add_bus, bus_settings, printable

Statistics = list[dict[str, Any]]
"""Replies of the workers to `$SRV.STATS`."""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    topology = commands.add_parser("topology", help="print workers with their actors, load and errors")
    add_bus(topology)
    topology.add_argument("--all", action="store_true", help="show all namespaces of the server")
    seconds: Any = {"type": float, "metavar": "SECONDS"}
    topology.add_argument(
        "--interval", **seconds, default=1.0, help="interval of the request rate (default: 1); 0: uptime"
    )
    topology.add_argument("--wait", **seconds, default=0.75, help="time limit for replies of workers (default: 0.75)")
    topology.add_argument("--json", action="store_true", help="print JSON instead of a table")
    topology.set_defaults(command=_topology)


class TopologyRow(Struct, frozen=True, kw_only=True):
    """Address of an actor at one worker, with statistics. Durations are seconds. `breaker` is empty without one."""

    address: str
    worker: str
    host: str
    version: str
    namespace: str
    shared: bool
    uptime: float
    mailbox: int
    requests: int
    requests_per_second: float
    errors: int
    last_error: str
    breaker: str
    problem: str


def _topology(arguments: argparse.Namespace) -> int:
    settings = bus_settings(arguments, backends=["bus:primary"])
    if arguments.interval < 0 or arguments.wait <= 0:
        raise CacheConfigurationError("--interval must be at least 0 seconds, and --wait above 0")

    async def discovered() -> list[TopologyRow]:
        async with Node(settings) as node:
            discover = import_module("cachebus.bus.nats.micro").discover
            bus: Any = node.bus
            before: Statistics = []
            started = time.monotonic()
            if arguments.interval:
                before = await discover(bus.connection, arguments.wait)
                await asyncio.sleep(max(0.0, started + arguments.interval - time.monotonic()))
            now: Statistics = await discover(bus.connection, arguments.wait)
            return rows(before, now, max(arguments.interval, arguments.wait))

    found = [each for each in asyncio.run(discovered()) if arguments.all or each.namespace == settings.namespace]
    if arguments.json:
        print(json.dumps(to_builtins(found), indent=2))
    else:
        print(table(found) if found else "no worker answered")
    return DONE if found else NO


def rows(before: Statistics, now: Statistics, seconds: float) -> list[TopologyRow]:
    """Return a sorted row for each address of each worker. `before` was collected `seconds` before `now`.

    The request rate of a worker that is missing from `before` is that of its uptime.
    """
    then = {
        (worker["id"], endpoint["subject"]): endpoint["num_requests"]
        for worker in before
        for endpoint in worker["endpoints"]
    }
    found: list[TopologyRow] = []
    for worker in now:
        uptime = (datetime.now(UTC) - datetime.fromisoformat(worker["started"])).total_seconds()
        for endpoint in worker["endpoints"]:
            requests: int = endpoint["num_requests"]
            earlier = then.get((worker["id"], endpoint["subject"]))
            rate = requests / max(uptime, 1e-3) if earlier is None else max(0, requests - earlier) / seconds
            data: dict[str, Any] = endpoint["data"]
            found.append(
                TopologyRow(
                    address=data["address"],
                    worker=worker["id"],
                    host=worker["metadata"]["host"],
                    version=worker["version"],
                    namespace=worker["metadata"]["namespace"],
                    shared=bool(endpoint["queue_group"]),
                    uptime=round(uptime, 3),
                    mailbox=data.get("mailbox", 0),
                    requests=requests,
                    requests_per_second=round(rate, 1),
                    errors=endpoint["num_errors"],
                    last_error=endpoint["last_error"],
                    breaker=data.get("statistics", {}).get("guard", {}).get("state", ""),
                    problem=data.get("error", ""),
                )
            )
    return sorted(found, key=lambda each: (each.namespace, each.address, each.worker))


def table(found: list[TopologyRow]) -> str:
    """Return the rows as a readable table."""
    rows = [("ADDRESS", "WORKER", "HOST", "VERSION", "SHARED", "UPTIME", "MAILBOX", "REQUESTS/S", "ERRORS", "BREAKER")]
    for each in found:
        sharing = "yes" if each.shared else "no"
        rows.append(
            (
                *(each.address, each.worker, each.host, each.version, sharing, _duration(each.uptime)),
                *(f"{each.mailbox:,}", f"{each.requests_per_second:,.1f}", f"{each.errors:,}"),
                each.breaker or (f"? ({each.problem})" if each.problem else "-"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(printable(line) for line in lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h" if days else f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
