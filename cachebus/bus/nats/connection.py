"""A lasting connection to NATS, over reconnects, and the ages of the messages that come in."""

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

PING_INTERVAL = 0.1  # Seconds between two pings of a connection over which requests come in.
SLACK = 0.25  # Seconds that the last answered ping may be old: two intervals, and some time for the answer.
_DRIFT = 0.0005  # Seconds a second by which two clocks may come apart while a sender is silent.
_WINDOW = 10.0  # Seconds of messages after which the smallest difference is the smallest of these.
_SENDERS = 10_000  # Of those not heard for longest, the next message counts as the first.
_AWAY = "the connection to NATS is away"
_LOOK = 0.25  # Seconds between two looks at a client, because nats-py has ways to end without calling back.
_FLUSH = 5.0  # Seconds that the last messages may take on a connection that is being closed.
_QUIET = 10.0  # Seconds between two warnings that messages are thrown away.
_ERRORS = (nats.errors.Error, OSError, TimeoutError)


class NatsConnection:
    """A connection that is replaced whenever it is lost. Belongs to one asyncio loop. `on_lost` is called when it is
    lost. `on_back` is called when it is replaced and every listener is subscribed again."""

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
        self.now = now  # The clock of `proven`, and of the ages of messages.
        self.ages = MessageAges()
        self._pinger: asyncio.TimerHandle | None = None
        self._warns_after = 0.0
        self._ready = False  # Connected and subscribed: an answer would be heard.
        self._servers = list(options.servers)
        self.max_payload = 1_048_576  # Bytes that the server takes in one message.
        self.loop: asyncio.AbstractEventLoop

    def __repr__(self) -> str:
        return f"<NatsConnection to {', '.join(self.options.servers)}, {'up' if self.up else 'away'}>"

    @property
    def up(self) -> bool:
        """Whether something can be sent now."""
        return self._ready and self._client is not None and self._client.is_connected

    @property
    def client(self) -> CompatClient:
        """The present client. Raises `CacheConnectionError` while away."""
        if self._client is None or not self._client.is_connected:
            raise CacheConnectionError(_AWAY, "nats")
        return self._client

    @property
    def proven(self) -> float:
        """When the last answered ping was sent, after which the server sent what comes in now. See `watch_link`."""
        return self._client.proven if self._client is not None else self.now()

    def watch_link(self) -> None:
        """Ping the server often from now on, which shows when messages were held up."""
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
        """Send what waits to be sent, and close."""
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
        """Send a message without waiting; `head` is a block of headers. Raises `CacheConnectionError` while away, and
        `Overloaded` while too much waits for the socket."""
        self.write_frames(frame(subject, payload, reply, head))

    def write_frames(self, frames: bytes) -> None:
        """Send the bytes of one or more messages, as `write` does."""
        client = self._client
        if client is None or not self._ready or not client.is_connected:
            raise CacheConnectionError(_AWAY, "nats")
        try:
            client.send(frames, PENDING)
        except BufferError:
            raise Overloaded(f"{client.backlog:,} bytes wait for the connection to NATS") from None
        except OSError as error:
            raise CacheConnectionError(f"NATS does not take the message: {type(error).__name__}", "nats") from None

    async def flush(self) -> None:
        """Return when the server has handled everything that was sent so far. Raises `CacheConnectionError`."""
        try:
            await self.client.flushed()
        except _ERRORS:
            raise CacheConnectionError(_AWAY, "nats") from None

    async def listen(self, subject: str, handler: Callable[[Delivery], None], group: str = "") -> Listener:
        """Call `handler` on the loop for every message on a subject from now on, over every reconnect. It must not wait."""
        listener = Listener(subject, group, handler, self.options.pending_messages, self.options.pending_bytes)
        self._listeners.append(listener)
        await self._subscribe(listener)
        return listener

    async def leave(self, listener: Listener) -> None:
        """Listen no more. Returns when everything that was delivered was handed over."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        client, subscription = listener.client, listener.subscription
        listener.client = listener.subscription = None
        if client is None or subscription is None or client is not self._client or not client.is_connected:
            return
        with suppress(*_ERRORS):  # Lost meanwhile: nothing comes from there any more.
            async with asyncio.timeout(_FLUSH):
                await client.leave(subscription)

    async def _subscribe(self, listener: Listener) -> None:
        client = self._client
        if client is None or not client.is_connected or listener.client is client:
            return  # With the others, when the connection is back; or done.
        listener.client = client
        try:
            await client.listen(listener)
        except nats.errors.Error:
            self._look()

    async def _connect(self) -> CompatClient:
        began = self.now()
        client = await connect(self.options, self._servers, self._heard, self._look)
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
                    async with asyncio.timeout(_LOOK):
                        await self._changed.wait()
            self._ready = False
            if client is not None:
                client.abandon()
                self._client = None
            logger.warning("the connection to NATS at %s is lost", servers)
            _notify(self._on_lost)
            await self._return()
            self.counters.reconnects += 1
            logger.warning("the connection to NATS at %s is back", servers)
            _notify(self._on_back)

    async def _return(self) -> None:
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
                # Any error, such as a file that cannot be read just now: no caller waits for this.
                logger.info("no way back to NATS yet: %s", error)
                if self._client is not None:
                    self._client.abandon()
                self._client = None

    def _look(self) -> None:
        """Let the keeper look at the client, when the present callback of nats-py is over."""
        self.loop.call_soon(self._changed.set)

    def _heard(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.counters.slow_consumer += 1
            if self.loop.time() >= self._warns_after:
                self._warns_after = self.loop.time() + _QUIET
                logger.warning("messages on %s are thrown away: too many came in at once", error.subject)
        elif "permissions violation" in str(error):
            logger.error("NATS refuses: %s", error)
        else:
            logger.debug("NATS: %s", type(error).__name__)


def _notify(listener: Callable[[], None]) -> None:
    try:
        listener()
    except Exception:
        # Also if the connection is lost again meanwhile: the keeper must go on.
        logger.exception("a change of the connection to NATS could not be dealt with")


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has ended."""
    while not task.done():
        # Repeatedly, because nats-py swallows some cancellations, and so does wait_for of Python 3.11.
        task.cancel()
        await asyncio.wait([task], timeout=0.05)


class _Sender(Struct, eq=False):
    least: float
    recent: float  # The smallest difference since `since`.
    since: float
    heard: float


class MessageAges:
    """Estimates the ages of messages, although the clocks of senders and receiver have nothing in common.

    There are two sources. Neither is enough alone (decision 42 has the figures):

    * **Delays.** A message carries the time of sending, by the sender's clock. The difference to the time of arrival is the
      delay plus the difference of the two clocks. The smallest recent difference stands for a message that was not held up;
      the excess of another one is its age. A new sender has no smallest difference.
    * **Pings.** What a connection delivers after the answer to a ping was sent after that ping. If a process was stopped, or
      if something between it and the server holds bytes back, the last answered ping is old, and so may be the message.

    Bounded, and not safe for threads.
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[str, _Sender] = OrderedDict()

    def __repr__(self) -> str:
        return f"<MessageAges of {len(self._senders)}/{_SENDERS} senders>"

    def age(self, now: float, proven: float, sender: str = "", sent: float = 0.0) -> float:
        """Seconds that a message has been on its way. It is looked at `now`, and the last answered ping was sent at
        `proven`; `sender` sent it when its own clock said `sent`. An empty `sender` has said nothing."""
        link = max(0.0, now - proven - SLACK)
        if not sender:
            return link
        difference = now - sent
        known = self._senders.get(sender)
        if known is None:
            if link > 0.0:
                return link  # It may have been held up, and so its delay says nothing about the next one.
            self._senders[sender] = _Sender(difference, difference, now, now)
            if len(self._senders) > _SENDERS:
                self._senders.popitem(last=False)
            return 0.0
        most = difference - known.least
        # The clocks may have come apart since the sender was heard last. If the link is slow, that decides.
        known.least += _DRIFT * (now - known.heard)
        excess = difference - known.least
        if excess < 0.0:
            known.least, excess = difference, 0.0
        # Forget the smallest difference when `_WINDOW` seconds of messages have had none as small. A message that was held
        # up does not count, and neither does silence.
        if link > 0.0 or now - known.heard > _WINDOW:
            known.recent, known.since = difference, now
        elif difference < known.recent:
            known.recent = difference
        if now - known.since > _WINDOW:
            known.least, known.recent, known.since = known.recent, difference, now
        known.heard = now
        self._senders.move_to_end(sender)
        return max(excess, min(most, link))


def age_clock(clock: Clock) -> Callable[[], float]:
    """The clock by which ages are measured: one that goes on while the machine sleeps, where there is one."""
    if clock is SYSTEM_CLOCK and hasattr(time, "CLOCK_BOOTTIME"):
        return partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    return clock.monotonic
