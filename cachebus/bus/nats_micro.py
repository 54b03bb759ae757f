"""A worker as NATS micro shows it: it answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` (ADR-32 of NATS).

nats-py has a `micro` of its own, which belongs to one client and takes the requests itself; our clients come and go, and
our requests are taken by `nats_serving.py`. So these are plain subscriptions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import re
import socket
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

from cachebus.messages import CacheError, Reply, Request, TakeSnapshot

from .address import Address
from .clock import Clock
from .codec import JSON, encode
from .emitter import origin
from .nats_compat import Delivery
from .nats_connection import Listener, NatsConnection
from .nats_serving import Responder

NAME = "cachebus"
"""What every worker is called; which one it is, its id says."""

PREFIX = "$SRV"
SNAPSHOT_WAIT = 0.5
"""Seconds that an actor has for its statistics. Without them the rest is told all the same: whoever looks at a system that
is ill must not wait for the ill part of it."""

_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_numbers = itertools.count(1)

Ask = Callable[[Address, Request[Any], float], Coroutine[Any, Any, Reply]]


@runtime_checkable
class _Queueing(Protocol):
    @property
    def waiting(self) -> int: ...


class Micro:
    """The service of one bus. `serving` are the addresses as they are served now, and their queue groups."""

    def __init__(
        self,
        connection: NatsConnection,
        clock: Clock,
        namespace: str,
        serving: Callable[[], Mapping[str, tuple[Responder, Listener]]],
        ask: Ask,
    ) -> None:
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

    def __repr__(self) -> str:
        return f"<Micro {self.id}>"

    async def open(self) -> None:
        """Begin to answer."""
        # It is read from a file, so not on the loop.
        self._base["version"] = semantic_version(await asyncio.to_thread(_installed_version))
        verbs = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        for verb, answer in verbs.items():
            for subject in (f"{PREFIX}.{verb}", f"{PREFIX}.{verb}.{NAME}", f"{PREFIX}.{verb}.{NAME}.{self.id}"):
                self._listeners.append(await self._connection.listen(subject, answer))

    async def close(self) -> None:
        """Answer no more."""
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
            {**_place(serving, listener), "metadata": {"address": address}}
            for address, (serving, listener) in self._serving().items()
        ]
        self._answer(msg.reply, "info", {"description": "a worker of cachebus", "endpoints": endpoints})

    def _stats(self, msg: Delivery) -> None:
        # Everybody who asks while the figures are being put together gets the same ones.
        if len(self._waiting) < 1000:
            self._waiting.append(msg.reply)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell_statistics(), name="cachebus-micro")

    async def _tell_statistics(self) -> None:
        while self._waiting:
            places = list(self._serving().items())
            endpoints = await asyncio.gather(*(self._figures(address, *place) for address, place in places))
            waiting, self._waiting = self._waiting, []
            for reply_to in waiting:
                self._answer(reply_to, "stats", {"started": self._started, "endpoints": endpoints})

    async def _figures(self, address: str, serving: Responder, listener: Listener) -> dict[str, Any]:
        data: dict[str, Any] = {"address": address}
        if isinstance(serving.recipient, _Queueing):
            data["mailbox"] = serving.recipient.waiting
        try:
            told = await self._ask(Address(address), TakeSnapshot(), SNAPSHOT_WAIT)
            snapshot: dict[str, Any] = json.loads(encode(told, JSON))
            data["statistics"] = {name: each for name, each in snapshot.items() if name not in {"v", "kind", "address"}}
        except CacheError as error:
            data["error"] = error.code  # Not every actor has some, and one that is ill may have none just now.
        nanoseconds = round(serving.busy * 1e9)
        return {
            **_place(serving, listener),
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
        said = {**self._base, "type": f"io.nats.micro.v1.{kind}_response", **more}
        try:
            self._connection.write(reply_to, json.dumps(said).encode())
        except CacheError:
            return  # Away: whoever asked will ask again.


def _place(serving: Responder, listener: Listener) -> dict[str, Any]:
    # The name of an endpoint is one word.
    name = serving.address.replace(".", "-")
    return {"name": name, "subject": listener.subject, "queue_group": listener.group}


def _installed_version() -> str:
    try:
        return version("cachebus")
    except PackageNotFoundError:
        return "0.0.0"


def semantic_version(text: str) -> str:
    """A version as ADR-32 wants it: that of a source tree, or of a release of another form, is 0.0.0."""
    return text if _SEMVER.fullmatch(text) else "0.0.0"
