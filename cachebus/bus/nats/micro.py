"""NATS micro services (ADR-32): workers answer `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`; `discover` queries them.

The `micro` module of nats-py does not fit: it is bound to one client and receives the requests itself. Here, clients
are replaced after a disconnect and `bus/nats/responder.py` receives the requests. So this module uses plain
subscriptions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import re
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from cachebus.messages import CacheError, Request, TakeSnapshot

from ..address import Address
from ..clock import Clock
from ..codec.messages import JSON, encode
from ..events.emitter import origin
from .compat import Delivery, Listener
from .connection import NatsConnection
from .responder import Responder

NAME = "cachebus"  # The service name of every worker; workers differ by id.
PREFIX = "$SRV"
SNAPSHOT_WAIT = 0.5  # Seconds to wait for an actor's statistics, so that a failing actor does not delay the others.
_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_numbers = itertools.count(1)

Serving = Mapping[str, tuple[Responder, Listener]]
Ask = Callable[[Address, Request[Any], float], Coroutine[Any, Any, Any]]


class Micro:
    """The micro service of one bus. `serving` maps each address to its responder and listener."""

    def __init__(self, connection: NatsConnection, clock: Clock, namespace: str, serving: Serving, ask: Ask) -> None:
        number = next(_numbers)
        self.id = origin() if number == 1 else f"{origin()}-{number}"
        self._connection = connection
        self._serving = serving
        self._ask = ask
        self._base: dict[str, Any] = {
            "name": NAME,
            "id": self.id,
            "metadata": {
                "namespace": namespace,
                "origin": origin(),
                "host": socket.gethostname(),
                "pid": str(os.getpid()),
                "python": platform.python_version(),
            },
        }
        self._started = datetime.fromtimestamp(clock.wall(), UTC).isoformat().replace("+00:00", "Z")
        self._listeners: list[Listener] = []
        self._waiting: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start answering."""
        self._base["version"] = await asyncio.to_thread(_installed_version)  # Reads a file.
        verbs = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        for verb, answer in verbs.items():
            for subject in (f"{PREFIX}.{verb}", f"{PREFIX}.{verb}.{NAME}", f"{PREFIX}.{verb}.{NAME}.{self.id}"):
                self._listeners.append(await self._connection.listen(subject, answer))

    async def close(self) -> None:
        """Stop answering."""
        for listener in self._listeners:
            await self._connection.leave(listener)
        self._listeners.clear()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=SNAPSHOT_WAIT)
            self._task.cancel()

    def _ping(self, msg: Delivery) -> None:
        self._answer(msg.reply, "ping", {})

    def _info(self, msg: Delivery) -> None:
        endpoints = [
            {**_endpoint(serving, listener), "metadata": {"address": address}}
            for address, (serving, listener) in self._serving.items()
        ]
        self._answer(msg.reply, "info", {"description": "cachebus worker", "endpoints": endpoints})

    def _stats(self, msg: Delivery) -> None:
        # Requests that arrive while the statistics are being collected share one result.
        if len(self._waiting) < 1000:
            self._waiting.append(msg.reply)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send_statistics(), name="cachebus-micro")

    async def _send_statistics(self) -> None:
        while self._waiting:
            places = list(self._serving.items())
            endpoints = await asyncio.gather(*(self._endpoint_statistics(address, *place) for address, place in places))
            waiting, self._waiting = self._waiting, []
            for reply_to in waiting:
                self._answer(reply_to, "stats", {"started": self._started, "endpoints": endpoints})

    async def _endpoint_statistics(self, address: str, serving: Responder, listener: Listener) -> dict[str, Any]:
        data: dict[str, Any] = {"address": address}
        if (waiting := getattr(serving.recipient, "waiting", None)) is not None:
            data["mailbox"] = waiting
        try:
            reply = await self._ask(Address(address), TakeSnapshot(), SNAPSHOT_WAIT)
            snapshot: dict[str, Any] = json.loads(encode(reply, JSON))
            data["statistics"] = {name: each for name, each in snapshot.items() if name not in {"v", "kind", "address"}}
        except CacheError as error:
            data["error"] = error.code  # Some actors have no statistics, and a failing one may not answer.
        nanoseconds = round(serving.busy * 1e9)
        return {
            **_endpoint(serving, listener),
            "num_requests": serving.requests,
            "num_errors": serving.errors,
            "last_error": serving.last_error,
            "processing_time": nanoseconds,
            "average_processing_time": nanoseconds // max(serving.requests, 1),
            "data": data,
        }

    def _answer(self, reply_to: str, kind: str, more: dict[str, Any]) -> None:
        if not reply_to.startswith(self._connection.options.inboxes):
            return
        answer = {**self._base, "type": f"io.nats.micro.v1.{kind}_response", **more}
        with suppress(CacheError):  # The connection is down; the operator can ask again.
            self._connection.write(reply_to, json.dumps(answer).encode())


def _endpoint(serving: Responder, listener: Listener) -> dict[str, Any]:
    # An endpoint name must be a single word.
    name = serving.address.replace(".", "-")
    return {"name": name, "subject": listener.subject, "queue_group": listener.group}


def _installed_version() -> str:
    try:
        return semantic_version(version("cachebus"))
    except PackageNotFoundError:
        return "0.0.0"


def semantic_version(text: str) -> str:
    """Return `text` if it is a semantic version, as ADR-32 requires, or else 0.0.0."""
    return text if _SEMVER.fullmatch(text) else "0.0.0"


class _Metadata(msgspec.Struct):
    namespace: str
    host: str


class _Data(msgspec.Struct):
    address: str
    mailbox: int = 0
    statistics: dict[str, Any] = {}
    error: str = ""


class _Endpoint(msgspec.Struct):
    subject: str
    num_requests: int
    num_errors: int
    last_error: str
    data: _Data
    queue_group: str = ""


class _Statistics(msgspec.Struct):
    id: str
    version: str
    started: str
    metadata: _Metadata
    endpoints: list[_Endpoint]


async def discover(connection: NatsConnection, wait: float) -> list[dict[str, Any]]:
    """Return the `$SRV.STATS` replies of the workers that arrive within `wait` seconds, the first one of each worker.

    Replies of other services are ignored. Raises `CacheConnectionError` if the connection is down.
    """
    found: dict[str, dict[str, Any]] = {}
    no_worker = asyncio.Event()

    def on_reply(msg: Delivery) -> None:
        if msg.headers.get("Status") == "503":
            no_worker.set()
            return
        with suppress(msgspec.MsgspecError, RecursionError):  # Another service with this name, or garbage.
            answer = msgspec.json.decode(msg.data, type=_Statistics)
            found.setdefault(answer.id, msgspec.to_builtins(answer))

    inbox = f"{connection.options.inbox_prefix}.{secrets.token_hex(12)}"
    listener = await connection.listen(inbox, on_reply)
    try:
        connection.write(f"{PREFIX}.STATS.{NAME}", b"", inbox)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await no_worker.wait()
    finally:
        await connection.leave(listener)
    return list(found.values())
