"""A connection to NATS that reconnects automatically, and the ages of incoming messages."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import nats.errors
from msgspec import Struct

from cachebus.messages import CacheConnectionError, Overloaded

from ..clock import SYSTEM_CLOCK, Clock
from .client import PENDING, connect
from .compat import CompatClient, Delivery, Listener, frame
from .options import NatsCounters, NatsOptions

logger = logging.getLogger("cachebus.bus")

PING_INTERVAL = 0.1  # Seconds between two pings of a connection that receives requests.
SLACK = 0.25  # Allowed age in seconds of the last answered ping: two intervals, and some time for the answer.
_DRIFT = 0.0005  # Allowed drift between two clocks while a sender is silent, in seconds per second.
_WINDOW = 10.0  # Seconds of messages after which the smallest difference is replaced by the smallest one in that time.
_SENDERS = 10_000  # Maximum number of senders to remember; the least recently active ones are forgotten.
_DOWN = "the connection to NATS is down"
_CHECK_INTERVAL = 0.25  # Seconds between two checks of a client, because nats-py may end without a callback.
_FLUSH = 5.0  # Seconds to wait for the last messages when the connection is closed.
_WARNING_INTERVAL = 10.0  # Seconds between two warnings about dropped messages.
_ERRORS = (nats.errors.Error, OSError, TimeoutError)


class NatsConnection:
    """A NATS connection that reconnects when it is lost. Bound to one asyncio loop.

    `on_lost` is called when the connection is lost, `on_back` when it is re-established and all listeners are
    subscribed again.
    """

    def __init__(
        self, options: NatsOptions, on_lost: Callable[[], None], on_back: Callable[[], None], now: Callable[[], float]
    ) -> None:
        self.options = options
        self.counters = NatsCounters()
        self._on_lost = on_lost
        self._on_back = on_back
        self._client: CompatClient | None = None
        self._listeners: list[Listener] = []
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.now = now  # The clock of `proven` and of message ages.
        self.ages = MessageAges()
        self._pinger: asyncio.TimerHandle | None = None
        self._warns_after = 0.0
        self._ready = False  # Connected and subscribed, so replies can be received.
        self._servers = list(options.servers)
        self.max_payload = 1_048_576  # Maximum message size that the server accepts, in bytes.
        self.loop: asyncio.AbstractEventLoop

    def __repr__(self) -> str:
        return f"<NatsConnection to {', '.join(self.options.servers)}, {'up' if self.up else 'down'}>"

    @property
    def up(self) -> bool:
        """True if messages can be sent now."""
        return self._ready and self._client is not None and self._client.is_connected

    @property
    def client(self) -> CompatClient:
        """The current client. Raises `CacheConnectionError` if the connection is down."""
        if self._client is None or not self._client.is_connected:
            raise CacheConnectionError(_DOWN, "nats")
        return self._client

    @property
    def proven(self) -> float:
        """The send time of the last answered ping.

        The server has sent all later messages after it. See `watch_link`.
        """
        return self._client.proven if self._client is not None else self.now()

    def watch_link(self) -> None:
        """Start to ping the server frequently, to detect delayed messages."""
        if self._pinger is None:
            self._ping()

    def _ping(self) -> None:
        self._pinger = self.loop.call_later(PING_INTERVAL, self._ping)
        if self._client is not None and self._ready:
            self._client.ping(self.now())

    async def open(self) -> None:
        """Connect. Raises `CacheConnectionError`."""
        self.loop = asyncio.get_running_loop()
        self._client = await self._connect()
        self._ready = True
        self._keeper = asyncio.create_task(self._keep(), name="cachebus-nats")

    async def close(self) -> None:
        """Send queued messages and close the connection."""
        if self._keeper is not None:
            await end_task(self._keeper)
        if self._pinger is not None:
            self._pinger.cancel()
        client, self._client = self._client, None
        self._ready = False
        if client is not None and not client.is_closed:
            try:
                async with asyncio.timeout(_FLUSH):
                    await client.flushed()
                    await client.close()
            except _ERRORS:
                client.abandon()

    def write(self, subject: str, payload: bytes, reply: str = "", head: bytes = b"") -> None:
        """Send a message without waiting. `head` is a block of headers.

        Raises `CacheConnectionError` if the connection is down, and `Overloaded` if too many bytes wait for the socket.
        """
        self.write_frames(frame(subject, payload, reply, head))

    def write_frames(self, frames: bytes) -> None:
        """Send the encoded frames of one or more messages. Otherwise like `write`."""
        client = self._client
        if client is None or not self._ready or not client.is_connected:
            raise CacheConnectionError(_DOWN, "nats")
        try:
            client.send(frames, PENDING)
        except BufferError:
            raise Overloaded(f"{client.backlog:,} bytes are waiting to be sent to NATS") from None
        except OSError as error:
            raise CacheConnectionError(f"cannot send to NATS: {type(error).__name__}", "nats") from None

    async def flush(self) -> None:
        """Wait until the server has processed all messages sent so far. Raises `CacheConnectionError`."""
        try:
            await self.client.flushed()
        except _ERRORS:
            raise CacheConnectionError(_DOWN, "nats") from None

    async def listen(self, subject: str, handler: Callable[[Delivery], None], group: str = "") -> Listener:
        """Call `handler` on the loop for each message on a subject, across reconnects. The handler must not wait."""
        listener = Listener(subject, group, handler, self.options.pending_messages, self.options.pending_bytes)
        self._listeners.append(listener)
        await self._subscribe(listener)
        return listener

    async def leave(self, listener: Listener) -> None:
        """Unsubscribe. Returns when all delivered messages have been passed to the handler."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        client, subscription = listener.client, listener.subscription
        listener.client = listener.subscription = None
        if client is None or subscription is None or client is not self._client or not client.is_connected:
            return
        with suppress(*_ERRORS):  # The connection was lost meanwhile, so no more messages arrive.
            async with asyncio.timeout(_FLUSH):
                await client.leave(subscription)

    async def _subscribe(self, listener: Listener) -> None:
        client = self._client
        if client is None or not client.is_connected or listener.client is client:
            return  # Subscribed already, or will be after the reconnect.
        listener.client = client
        try:
            await client.listen(listener)
        except nats.errors.Error:
            self._check_soon()

    async def _connect(self) -> CompatClient:
        began = self.now()
        client = await connect(self.options, self._servers, self._on_error, self._check_soon)
        client.connected(began)
        self.max_payload = client.max_payload
        found = {str(each.netloc).rpartition("@")[2] for each in client.discovered_servers}.difference(self._servers)
        self._servers = [*self._servers, *sorted(found)][:64]
        return client

    async def _keep(self) -> None:
        servers = ", ".join(self.options.servers)
        while True:
            client = self._client
            while client is not None and not client.is_closed:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_INTERVAL):
                        await self._changed.wait()
            self._ready = False
            if client is not None:
                client.abandon()
                self._client = None
            logger.warning("lost the connection to NATS at %s", servers)
            _notify(self._on_lost)
            await self._reconnect()
            self.counters.reconnects += 1
            logger.warning("reconnected to NATS at %s", servers)
            _notify(self._on_back)

    async def _reconnect(self) -> None:
        tries = 0
        while True:
            longest = min(self.options.reconnect_wait_max, self.options.reconnect_wait * 2.0 ** min(tries, 30))
            await asyncio.sleep(random.uniform(0.0, longest))
            tries += 1
            try:
                self._client = await self._connect()
                for listener in list(self._listeners):
                    await self._subscribe(listener)
                await self.flush()
                self._ready = True
                return
            except Exception as error:
                # Retry after any error, for example if a file cannot be read now, because no caller waits for this.
                logger.info("reconnecting to NATS failed: %s", error)
                if self._client is not None:
                    self._client.abandon()
                self._client = None

    def _check_soon(self) -> None:
        """Make the keeper task check the client after the current callback of nats-py."""
        self.loop.call_soon(self._changed.set)

    def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.counters.slow_consumer += 1
            if self.loop.time() >= self._warns_after:
                self._warns_after = self.loop.time() + _WARNING_INTERVAL
                logger.warning("messages on %s were dropped, because too many arrived at once", error.subject)
        elif "permissions violation" in str(error):
            logger.error("NATS denied an operation: %s", error)
        else:
            logger.debug("NATS error: %s", type(error).__name__)


def _notify(listener: Callable[[], None]) -> None:
    try:
        listener()
    except Exception:
        # Caught even if the connection was lost again, because the keeper task must continue.
        logger.exception("a callback for a lost or restored NATS connection failed")


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended."""
    while not task.done():
        # Repeatedly, because nats-py and `asyncio.wait_for` in Python 3.11 swallow some cancellations.
        task.cancel()
        await asyncio.wait([task], timeout=0.05)


class _Sender(Struct, eq=False):
    smallest: float
    recent: float  # The smallest difference since `since`.
    since: float
    last_seen: float


class MessageAges:
    """An estimator of the ages of messages that does not need synchronized clocks.

    It uses two sources, because neither is sufficient alone (see decision 42 for measurements):

    * **Delays.** A message carries its send time on the sender's clock. The difference to the time of arrival is the
      delay plus the offset between the two clocks. The smallest recent difference is taken as that of a message
      without delay. The age of any other message is the excess over it. A new sender has no smallest difference yet.
    * **Pings.** Messages that arrive after the answer to a ping were sent after that ping. If a process was
      suspended, or if bytes are held back on the way from the server, the last answered ping is old, and the message
      may be old too.

    The number of senders is bounded. Not thread-safe.
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[str, _Sender] = OrderedDict()

    def __repr__(self) -> str:
        return f"<MessageAges of {len(self._senders)}/{_SENDERS} senders>"

    def age(self, now: float, proven: float, sender: str = "", sent: float = 0.0) -> float:
        """Return the estimated age of a message in seconds.

        `now` is the current time and `proven` the send time of the last answered ping. `sent` is the send time of the
        message on the clock of `sender`; an empty `sender` means that it is unknown.
        """
        link = max(0.0, now - proven - SLACK)
        if not sender:
            return link
        difference = now - sent
        known = self._senders.get(sender)
        if known is None:
            if link > 0.0:
                return link  # It may have been delayed, so it is no reference for later messages.
            self._senders[sender] = _Sender(difference, difference, now, now)
            if len(self._senders) > _SENDERS:
                self._senders.popitem(last=False)
            return 0.0
        most = difference - known.smallest
        # The clocks may have drifted since the sender's last message. If the link is slow, its age decides.
        known.smallest += _DRIFT * (now - known.last_seen)
        excess = difference - known.smallest
        if excess < 0.0:
            known.smallest, excess = difference, 0.0
        # Replace the smallest difference if `_WINDOW` seconds of messages had none as small. Delayed messages and
        # periods of silence do not count.
        if link > 0.0 or now - known.last_seen > _WINDOW:
            known.recent, known.since = difference, now
        elif difference < known.recent:
            known.recent = difference
        if now - known.since > _WINDOW:
            known.smallest, known.recent, known.since = known.recent, difference, now
        known.last_seen = now
        self._senders.move_to_end(sender)
        return max(excess, min(most, link))


def age_clock(clock: Clock) -> Callable[[], float]:
    """Return the clock for message ages.

    It includes the time that the machine is suspended, if the platform has one.
    """
    if clock is SYSTEM_CLOCK and hasattr(time, "CLOCK_BOOTTIME"):
        return partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    return clock.monotonic
