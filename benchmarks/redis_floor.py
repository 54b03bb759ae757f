"""The floor under any Redis client on asyncio: one connection, one write per loop turn, and hiredis.

It has no deadlines, reconnects, errors or values: a reply is raw bytes. The time above the floor is the cost of a
cache.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import hiredis


class Floor(asyncio.Protocol):
    """A connection that joins the commands of one loop turn."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._unsent: list[bytes] = []
        self._unanswered: deque[asyncio.Future[object]] = deque()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connected(cls, host: str, port: int) -> Floor:
        """Connect to a server."""
        _, protocol = await asyncio.get_running_loop().create_connection(cls, host, port)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            waiting = self._unanswered.popleft()
            if not waiting.done():
                waiting.set_result(reply)

    def get(self, key: str) -> asyncio.Future[object]:
        """Request a value; the future resolves to the bytes or `None`."""
        raw = key.encode()
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(raw), raw))
        waiting: asyncio.Future[object] = self._loop.create_future()
        self._unanswered.append(waiting)
        return waiting

    def close(self) -> None:
        """Close the connection."""
        assert self._transport is not None
        self._transport.close()

    def _send(self) -> None:
        assert self._transport is not None
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
