"""The bus between processes: a `LocalBus` that also reaches addresses in others.

An address that is served in this process is reached as on a `LocalBus`, inline turns and all; any other through NATS.
`address.py` makes the subjects, `codec.py` the bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

from cachebus.messages import (
    AddressInUse,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Event,
    EventsMissed,
    Heartbeat,
    Ping,
)

from ..address import Address, Subjects
from ..api import Recipient, Visibility
from ..clock import SYSTEM_CLOCK, Clock
from ..codec.messages import decode, encode
from ..compat import running_loop
from ..events.emitter import origin
from ..events.subscription import EVERYTHING, EventPolicy, Subscription, event_kinds
from ..local import LocalBus
from .compat import Delivery, Listener, header_block
from .connection import NatsConnection, age_clock, end_task
from .events import EventListener, Outbox
from .jetstream import Replay, ensure_stream
from .micro import Micro
from .options import NatsOptions
from .requester import RemoteRecipient, Requests
from .responder import Responder

logger = logging.getLogger("cachebus.bus")

GROUP = "q"  # The queue group of the processes that share an address: the default of NATS micro.


class NatsBus(LocalBus):
    """A `Bus` between processes, over NATS. An asynchronous context manager; it belongs to the asyncio loop that opens it.

    Requests may come from any thread and loop, on trio too. While the connection is away, requests to other processes
    fail at once with `CacheConnectionError`, and those under way with it; everything works again when it is back.
    """

    def __init__(
        self,
        namespace: str = "default",
        options: NatsOptions | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        policy: EventPolicy = EVERYTHING,
    ) -> None:
        super().__init__(namespace, clock=clock, policy=policy)
        self.options = options or NatsOptions()
        self.connection = NatsConnection(self.options, self._lost, self._back, age_clock(clock))
        self.counters = self.connection.counters
        self._subjects = Subjects(namespace)
        self._kinds = event_kinds(self.options.events) if self.options.events else frozenset[type[Event]]()
        self._serving: dict[str, tuple[Responder, Listener]] = {}
        self._claims: dict[str, Claim] = {}
        self._replays: set[Replay] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._micro: Micro | None = None
        self._requests: Requests | None = None
        self._outbox: Outbox
        self._listener: EventListener
        self._heart: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        up = "up" if self.connection.up else "away"
        return f"<NatsBus {self.namespace!r} {up}, serving {', '.join(sorted(self._recipients)) or 'nobody'}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Connect. Raises `CacheConnectionError`, and `CacheConfigurationError` on trio and for unusable files."""
        if running_loop() is None:
            raise CacheConfigurationError("a bus over NATS is opened on asyncio: nats-py knows no other event loop")
        if self._closed or self._requests is not None:
            raise CacheClosed("a bus is opened once; make a new one")
        # The first decoding makes pydantic look through the installed packages, so it is done off the loop.
        await asyncio.to_thread(lambda: decode(encode(Ping())))
        await self.connection.open()
        try:
            requests = Requests(self.connection, self.clock, self._emitter)
            await requests.open()
            self._outbox = Outbox(self.connection, self._subjects, self.policy)
            self._listener = EventListener(self.connection, self._subjects, self.subscriptions, self._emitter)
            if self.options.events_stream is not None:
                await ensure_stream(self.connection, self._subjects)
            await self.connection.flush()
        except BaseException:
            await self.connection.close()
            raise
        self._outbox.open()
        self._listener.open()
        if (interval := self.options.heartbeat) is not None:
            self._heart = asyncio.create_task(self._beat_every(interval), name="cachebus-heartbeat")
        self._requests = requests
        self.subscriptions.want_elsewhere(self._kinds)

    async def aclose(self, grace: float = 5.0) -> None:
        """Stop being reached, answer what is under way within `grace` seconds, send what waits, and disconnect."""
        for address in list(self._serving):
            await self.retire(Address(address))
        if self._micro is not None:
            await self._micro.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        requests, self._requests = self._requests, None
        self.close()
        if requests is None:
            return
        self.subscriptions.want_elsewhere(frozenset())
        requests.closed = True
        requests.end(CacheClosed("the bus is closed"))
        for replay in list(self._replays):
            await replay.close()
        await self._listener.close()
        await self._outbox.close(grace)
        if self._heart is not None:
            await end_task(self._heart)
            self._beat()  # A last time, because no event comes after this.
        for claim in list(self._claims.values()):
            await claim.release()
        for task in list(self._tasks):
            task.cancel()
        await self.connection.close()

    def forked(self) -> None:
        """Be closed in the child of a fork: the connection is the parent's."""
        if self._requests is not None:
            self._requests.closed = True
            self._requests = None
        super().forked()

    async def settled(self) -> None:
        """Return when NATS knows everything that this bus listened to and served at the call. Raises
        `CacheConnectionError`."""
        await self._listener.settled()

    def recipient(self, address: Address) -> Recipient:
        found = self._recipients.get(address)
        if found is not None:
            return found
        if self._closed:
            raise CacheClosed("the bus is closed")
        if self._requests is None:
            raise CacheConnectionError("the bus is not open", "nats")
        if (remote := self._requests.recipients.get(address)) is None:
            remote = RemoteRecipient(address, self._subjects.request(address), self._requests)
            remote = self._requests.recipients.setdefault(address, remote)
        return remote

    async def claim(self, address: Address, visibility: Visibility) -> None:
        if visibility != "sole":
            return
        claim = Claim(address, self._subjects.owner(address), self.connection, lambda: self._run(self.retire(address)))
        await claim.make()
        self._claims[address] = claim

    async def announce(self, address: Address, visibility: Visibility) -> None:
        if visibility == "private":
            return
        recipient = self._recipients[address]
        responder = Responder(address, recipient, self.connection, self.clock, self._emitter)
        self.connection.watch_link()
        group = GROUP if visibility == "shared" else ""
        listener = await self.connection.listen(self._subjects.request(address), responder.take, group)
        self._serving[address] = responder, listener
        if self._micro is None:
            self._micro = Micro(self.connection, self.clock, self.namespace, self._serving, self.request)
            await self._micro.open()
        await self.connection.flush()

    async def retire(self, address: Address) -> None:
        if (found := self._serving.pop(address, None)) is not None:
            responder, listener = found
            await self.connection.leave(listener)
            self._run(responder.drained())
        if (claim := self._claims.pop(address, None)) is not None:
            await claim.release()

    def withdraw(self, address: Address) -> None:
        super().withdraw(address)
        # Without having been retired, as after a start that failed.
        if (address in self._serving or address in self._claims) and self._requests is not None:
            self._run(self.retire(address))

    def publish(self, event: Event) -> None:
        self.subscriptions.dispatch(event)
        if type(event) in self._kinds and self._requests is not None:
            self._outbox.put(event)

    def subscribe(
        self,
        *what: type[Event] | str,
        capacity: int = 1024,
        since: float | None = None,
        local: bool = False,
        real_keys: bool = False,
    ) -> Subscription:
        if since is None:
            return super().subscribe(*what, capacity=capacity, local=local, real_keys=real_keys)
        if self._requests is None:
            raise CacheConnectionError("the bus is not open", "nats")
        replay = Replay(self.connection, self._subjects, what, since, capacity, self._replays.discard)
        self._replays.add(replay)
        self.connection.loop.call_soon_threadsafe(replay.start)
        return replay.subscription

    def _lost(self) -> None:
        if self._requests is not None:
            detail = "the connection to NATS was lost; whether it took effect is not known"
            self._requests.end(CacheConnectionError(detail, "nats"))

    def _back(self) -> None:
        self._outbox.wake()
        self._emitter.publish(EventsMissed(source="", event="", count=0))  # How many is not known.
        for claim in self._claims.values():
            try:
                claim.say("again")
            except CacheConnectionError:
                return  # Lost again. The next return comes back to it.
        if self.options.events_stream is not None:
            self._run(self._ensure_stream())

    async def _ensure_stream(self) -> None:
        # The server that is back may be another one, without the stream.
        try:
            await ensure_stream(self.connection, self._subjects)
        except CacheError as error:
            logger.warning("events are not kept: %s", error)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _beat(self) -> None:
        """Publish how far the numbers of the events go, once one was sent, so that the loss of the last ones is noticed."""
        outbox, interval, last = self._outbox, self.options.heartbeat, self._outbox.numbers()
        if interval is None or not last or not self.connection.up:
            return
        name, number = origin(), self.counters.heartbeats_sent + 1
        beat = Heartbeat(
            interval=interval,
            last=last,
            id=f"{name}-{outbox.epoch:x}-beat-{number}",
            namespace=self.namespace,
            origin=name,
            epoch=outbox.epoch,
            seq=number,
            time=self.clock.wall(),
        )
        head = header_block({"Content-Type": outbox.content_type})
        with suppress(CacheError):  # The next one says as much.
            self.connection.write(self._subjects.event(Heartbeat, ""), encode(beat, outbox.content_type), head=head)
            self.counters.heartbeats_sent = number

    async def _beat_every(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            self._beat()


class Claim:
    """An address that only one process serves: this one holds it, or wants it. `on_lost` is called when another has it.

    Every process that has or wants such an address listens on its owner subject. A claimant publishes its name and a number
    there, and waits a moment for objections:

        a holder objects, always                    the claimant gives up
        a claimant with a lower number objects      the claimant gives up
        a claimant hears a claim of a lower number  it gives up by itself

    Numbers are random. A claimant subscribes before it publishes, so of two claimants at least one hears the other, and both
    decide by the same rule. After a reconnect a holder publishes its claim again, because two parts of a split network may
    each have got one; the one with the higher number then retires.
    """

    def __init__(self, address: str, subject: str, connection: NatsConnection, on_lost: Callable[[], None]) -> None:
        self.address = address
        self.held = False
        self.identity = f"process {os.getpid()} on {socket.gethostname()}"
        self._subject = subject
        self._connection = connection
        self._on_lost = on_lost
        self._number = secrets.token_hex(16)
        self._listener: Listener | None = None
        self._objection: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def make(self) -> None:
        """Claim the address. Raises `AddressInUse` that names who has it, `CacheConnectionError` while away."""
        self._listener = await self._connection.listen(self._subject, self._heard)
        try:
            await self._connection.flush()
            self.say("claim")
            await self._connection.flush()
            done, _ = await asyncio.wait([self._objection], timeout=self._connection.options.claim_wait)
            if done:
                raise AddressInUse(address=self.address, holder=self._objection.result())
            self.held = True
        except BaseException:
            await self.release()
            raise

    async def release(self) -> None:
        """Give the address up."""
        self.held = False
        if self._listener is not None:
            listener, self._listener = self._listener, None
            await self._connection.leave(listener)

    def _heard(self, msg: Delivery) -> None:
        try:
            said: Any = json.loads(msg.data)
            word, number, to = str(said["says"]), str(said["number"]), str(said["to"])
            who = str(said["who"])[:200]
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # Junk.
        if word == "held":
            if to == self._number:
                self._yield_to(who)
        elif (word == "claim" and self.held) or ((self.held or word == "claim") and self._number < number):
            try:
                self.say("held", number)
            except CacheError:
                logger.warning("a claim to %s could not be objected to: the connection is away", self.address)
        else:
            self._yield_to(who)

    def say(self, word: str, to: str = "") -> None:
        """Publish a word: `claim`, `held` to the claimant with the number `to`, or `again` when the connection is back.
        Raises `CacheConnectionError` while away."""
        words = {"says": word, "number": self._number, "to": to, "who": self.identity}
        self._connection.write(self._subject, json.dumps(words).encode())

    def _yield_to(self, who: str) -> None:
        if self.held:
            self.held = False
            logger.error("%s is served by %s too; this process retires from it", self.address, who)
            self._on_lost()
        elif not self._objection.done():
            self._objection.set_result(who)
