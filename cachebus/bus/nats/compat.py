"""The private parts of nats-py that this package uses.

nats-py passes each message through a queue and a separate task, and always parses its headers. That is half of the
cost of a message. `CompatClient` parses the protocol itself: it passes the messages of one read to their listeners in
order, and writes frames directly to the transport. nats-py does everything else, such as authentication, TLS, errors
and JetStream.

nats-py may change these names in any release, so untested releases are rejected.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

from cachebus.messages import CacheConfigurationError

logger = logging.getLogger("cachebus.bus")

TESTED = ("2.14", "2.15", "2.16")  # Releases of nats-py that the tests have run with.
NO_TLS = "the server offers no TLS"

_MAX_LINE_BYTES = 1024 * 1024  # The INFO of a large cluster is one line.
_FLUSH = 10.0  # Seconds to wait until the server confirms a flush.
_KNOWN_LINES = 512
_LINE_ENDS = str.maketrans("\r\n", "  ")


def check_release(installed: str | None = None) -> None:
    """Raise `CacheConfigurationError` if the installed nats-py is not a tested release."""
    if installed is None:
        try:
            installed = version("nats-py")
        except PackageNotFoundError:
            installed = "none"
    if ".".join(installed.split(".")[:2]) not in TESTED:
        raise CacheConfigurationError(
            f"nats-py {installed} is installed, but cachebus was tested with {', '.join(TESTED)} "
            "(pip install 'cachebus[nats]')"
        )


class Delivery(msgspec.Struct, gc=False):
    """An incoming NATS message. `head` holds its raw headers."""

    subject: str
    reply: str
    data: bytes
    head: bytes = b""

    @property
    def headers(self) -> dict[str, str]:
        """The headers by name. The status line of the server appears as `Status`."""
        if not self.head:
            return {}
        first, *lines = self.head.decode("utf-8", "replace").split("\r\n")
        found: dict[str, str] = {}
        if status := first[8:].split():  # After NATS/1.0.
            found["Status"] = status[0]
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                found[name] = value.strip()
        return found


class Listener(msgspec.Struct, eq=False):
    """A subscription that survives reconnects: a subject, and the queue group that shares its messages, if any."""

    subject: str
    group: str
    handler: Callable[[Delivery], None]
    pending_messages: int
    pending_bytes: int
    client: CompatClient | None = None
    subscription: Any = None

    def take(self, deliveries: list[Delivery]) -> None:
        """Pass messages that arrived together to the handler. Does not wait and does not raise."""
        handler = self.handler
        for delivery in deliveries:
            try:
                handler(delivery)
            except Exception:
                # A bug. The next message must still be handled.
                logger.exception("handling a message on %s failed", self.subject)


def header_block(headers: Mapping[str, str]) -> bytes:
    """Return the headers encoded for a frame."""
    lines = "".join([f"{name}: {value.translate(_LINE_ENDS).strip()}\r\n" for name, value in headers.items()])
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def frame(subject: str, payload: bytes, reply: str = "", head: bytes = b"") -> bytes:
    """Return the frame that publishes a message. The subjects must not contain spaces or line ends."""
    to = f"{subject} {reply}" if reply else subject
    if head:
        size = len(head)
        return b"HPUB %b %d %d\r\n%b%b\r\n" % (to.encode(), size, size + len(payload), head, payload)
    return b"PUB %b %d\r\n%b\r\n" % (to.encode(), len(payload), payload)


class CompatClient(Client):
    """A nats-py client that delivers messages in batches and writes frames immediately.

    With `tls_wanted`, it sends nothing to a server without TLS. It continues to read after a flush was cancelled.
    """

    tls_wanted = False

    def __init__(self) -> None:
        super().__init__()
        self.listeners: dict[int, Listener] = {}
        self.proven = 0.0  # Send time of the last answered ping, on the clock of the caller of `ping`.
        self._pinging = False
        self._socket: asyncio.WriteTransport
        self._ps = _BatchParser(self)

    def connected(self, now: float) -> None:
        """Start writing frames, once the client is connected. `now` is the current time, as for `ping`."""
        writer = self._writer
        assert writer is not None
        self._socket = writer.transport
        self.proven = now

    @property
    def backlog(self) -> int:
        """Number of bytes that wait for the socket."""
        return int(self._pending_data_size) + self._socket.get_write_buffer_size()

    def send(self, frames: bytes, most: int) -> None:
        """Write frames, after all data that nats-py has not written yet.

        Raises `OSError` if the connection is closed, and `BufferError` if more than `most` bytes would wait for the
        socket.
        """
        socket = self._socket
        if socket.is_closing():
            raise ConnectionResetError("the connection is closed")
        if socket.get_write_buffer_size() + self._pending_data_size + len(frames) > most:
            raise BufferError
        if self._pending:
            waiting, self._pending, self._pending_data_size = self._pending, [], 0
            socket.writelines(waiting)
        socket.write(frames)

    def ping(self, now: float) -> None:
        """Ping the server, unless a ping is unanswered. The answer sets `proven` to `now`.

        The server has sent all messages that arrive after the answer after it read the ping.
        """
        if not self._pinging:
            self._pinging = True
            with suppress(OSError):
                self._await_pong(now)

    async def flushed(self) -> None:
        """Wait until the server has processed all messages sent so far. Raises `OSError` and `TimeoutError`."""
        async with asyncio.timeout(_FLUSH):
            await self._await_pong(None)

    def abandon(self) -> None:
        """Close the connection without waiting for the server."""
        writer = self._writer
        if writer is not None:
            writer.transport.abort()

    async def listen(self, listener: Listener) -> None:
        """Subscribe a listener to its subject."""
        subscription: Any = await self.subscribe(listener.subject, listener.group)  # pyright: ignore[reportUnknownMemberType]
        listener.subscription = subscription
        self.listeners[subscription._id] = listener

    async def leave(self, subscription: Any) -> None:
        """End a subscription. Returns when all messages delivered to it have been handled."""
        # Not the drain of nats-py: its ping overtakes the UNSUB, so messages that arrive in between are lost.
        await self._send_unsubscribe(subscription._id)
        await self.flushed()
        await subscription.unsubscribe()
        self.listeners.pop(subscription._id, None)

    @property
    def _writer(self) -> asyncio.StreamWriter | None:
        transport: Any = self._transport
        return cast("asyncio.StreamWriter | None", getattr(transport, "_io_writer", None))

    def _await_pong(self, now: float | None) -> asyncio.Future[Any]:
        answered: Any = _Pong()
        answered.sent = now
        self.send(b"PING\r\n", sys.maxsize)
        cast("list[Any]", self._pongs).append(answered)
        return cast("asyncio.Future[Any]", answered)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py continues without TLS if the server, or an attacker in between, does not offer it.
        if initial_connection and self.tls_wanted and not info.get("tls_required"):
            raise nats.errors.Error(NO_TLS)
        await super()._process_info(info, initial_connection)

    async def _process_pong(self) -> None:
        # A flush that was cancelled or timed out leaves its future in the queue. nats-py would set its result, fail,
        # and stop reading from the connection.
        pongs = cast("list[asyncio.Future[Any]]", self._pongs)  # type: ignore[redundant-cast]
        if pongs:
            first = pongs[0]
            if isinstance(first, _Pong) and first.sent is not None:
                self.proven = first.sent
                self._pinging = False
            if first.done():
                pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


class _Pong(asyncio.Future[Any]):
    """The future of the answer to a ping."""

    sent: float | None = None


_Opening = tuple[str, int, str, int, int]
"""Subject, subscription id, reply subject, size of the headers, and total size."""


class _BatchParser(Parser):
    """A parser of the server's messages that delivers the messages of one read together."""

    def __init__(self, client: CompatClient) -> None:
        super().__init__(client)  # pyright: ignore[reportUnknownMemberType]
        self._client: Any = client  # `Any`, because private attributes are used.
        self._rest = bytearray()
        self._needed = 0  # Size of the incomplete message in the rest; 0 if it is not known yet.
        self._known: dict[bytes, _Opening] = {}  # Parsed lines that are likely to recur.

    def reset(self) -> None:
        super().reset()
        self._rest = bytearray()
        self._needed = 0

    async def parse(self, data: bytes = b"") -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest = bytearray()
        client, known = self._client, self._known
        listeners: dict[int, Listener] = client.listeners
        listener: Listener | None = None
        run: list[Delivery] = []  # Consecutive messages for one listener.
        held = 0
        at, size = 0, len(data)
        self._needed = 0
        try:
            while at < size:
                end = data.find(b"\r\n", at)
                if end < 0:
                    if size - at > _MAX_LINE_BYTES:
                        raise nats.errors.ProtocolError
                    break
                line = data[at:end]
                opening = known.get(line) or self._opening(line)
                if opening is None:
                    if run and listener is not None:
                        listener.take(run)
                    listener, run = None, []
                    await self._line(data[at : end + 2])
                    at = end + 2
                    continue
                subject, sid, reply, head, length = opening
                body = end + 2
                stop = body + length
                if size < stop + 2:
                    self._needed = stop + 2 - at
                    break
                found = listeners.get(sid)
                at = stop + 2
                if found is not listener or found is None:
                    if run and listener is not None:
                        listener.take(run)
                    listener, run, held = found, [], 0
                    if found is None:
                        await client._process_msg(
                            sid, subject.encode(), reply.encode(), data[body + head : stop], data[body : body + head]
                        )
                        continue
                if len(run) >= found.pending_messages or held + stop - body > found.pending_bytes:
                    await client._error_cb(nats.errors.SlowConsumerError(subject, reply, sid, client._subs[sid]))
                    continue
                held += stop - body
                run.append(Delivery(subject, reply, data[body + head : stop], data[body : body + head]))
        except (ValueError, IndexError):
            raise nats.errors.ProtocolError from None
        finally:
            if run and listener is not None:
                listener.take(run)
        if at < size:
            self._rest += data[at:] if at else data

    def _opening(self, line: bytes) -> _Opening | None:
        """Parse the first line of a message. Return `None` for any other line."""
        words = line.split()
        verb, count = (words[0] if words else b""), len(words)
        if verb not in (b"MSG", b"HMSG"):
            return None
        has_head = verb == b"HMSG"
        if count - has_head not in (4, 5):
            raise nats.errors.ProtocolError
        has_reply, head = count - has_head == 5, int(words[-2]) if has_head else 0
        reply = words[3].decode() if has_reply else ""
        opening = (words[1].decode(), int(words[2]), reply, head, int(words[-1]))
        if not has_reply:  # For example an event: later ones of its kind have the same line if their size is equal.
            if len(self._known) >= _KNOWN_LINES:
                self._known.clear()
            self._known[line] = opening
        return opening

    async def _line(self, line: bytes) -> None:
        """Pass any other line to nats-py."""
        self.buf = bytearray(line)
        await super().parse()
