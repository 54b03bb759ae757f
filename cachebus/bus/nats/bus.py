"""The NATS bus: a `LocalBus` that can also reach addresses in other processes.

Addresses that are served in this process are reached as on a `LocalBus`, including inline turns. All others are reached
through NATS. `bus/address.py` builds the subjects, `bus/codec` the bytes.
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

GROUP = "q"  # Queue group of the processes that share an address. It is the default of NATS micro.


class NatsBus(LocalBus):
    """A `Bus` that connects processes over NATS. An asynchronous context manager, bound to one asyncio loop.

    Requests may come from any thread and event loop, including trio. If the connection is lost, requests to other
    processes fail immediately with `CacheConnectionError`, and so do those in flight. The bus reconnects automatically.
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
        up = "up" if self.connection.up else "down"
        return f"<NatsBus {self.namespace!r} {up}, serving {', '.join(sorted(self._recipients)) or 'no addresses'}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Connect. Raises `CacheConnectionError`, or `CacheConfigurationError` on trio or if a file cannot be used."""
        if running_loop() is None:
            raise CacheConfigurationError("the NATS bus requires asyncio, because nats-py supports no other event loop")
        if self._closed or self._requests is not None:
            raise CacheClosed("a bus can be opened only once; create a new one")
        # The first decoding makes pydantic scan the installed packages, so it runs outside of the event loop.
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
        """Stop accepting requests, answer those in flight within `grace` seconds, send queued events, and close."""
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
            self._beat()  # A final heartbeat, because no event follows.
        for claim in list(self._claims.values()):
            await claim.release()
        for task in list(self._tasks):
            task.cancel()
        await self.connection.close()

    def forked(self) -> None:
        """Close the bus in a forked child. The connection belongs to the parent."""
        if self._requests is not None:
            self._requests.closed = True
            self._requests = None
        super().forked()

    async def settled(self) -> None:
        """Wait until NATS knows all current subscriptions and addresses of this bus. Raises `CacheConnectionError`."""
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
        # The address was not retired, for example after a failed start.
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
            detail = "the connection to NATS was lost; the request may or may not have taken effect"
            self._requests.end(CacheConnectionError(detail, "nats"))

    def _back(self) -> None:
        self._outbox.wake()
        self._emitter.publish(EventsMissed(source="", event="", count=0))  # The number is not known.
        for claim in self._claims.values():
            try:
                claim.publish("again")
            except CacheConnectionError:
                return  # The connection is lost again. The next reconnect repeats this.
        if self.options.events_stream is not None:
            self._run(self._ensure_stream())

    async def _ensure_stream(self) -> None:
        # After a reconnect the server may be another one, without the stream.
        try:
            await ensure_stream(self.connection, self._subjects)
        except CacheError as error:
            logger.warning("events are not stored in a stream: %s", error)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _beat(self) -> None:
        """Publish the last event numbers in a heartbeat, so that listeners detect lost events.

        Skipped if none was sent.
        """
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
        with suppress(CacheError):  # The next heartbeat has the same information.
            self.connection.write(self._subjects.event(Heartbeat, ""), encode(beat, outbox.content_type), head=head)
            self.counters.heartbeats_sent = number

    async def _beat_every(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            self._beat()


class Claim:
    """A claim to an address that only one process may serve. `on_lost` is called if this process loses the address.

    Every process that holds or claims such an address listens on its owner subject. A claimant publishes its name and a
    random number there, and waits for objections:

        a holder always objects                             the claimant gives up
        a claimant with a lower number objects              the claimant gives up
        a claimant receives a claim with a lower number     it gives up without an objection

    A claimant subscribes before it publishes. So at least one of two claimants receives the other's claim, and both
    decide by the same rule. After a reconnect, holders publish their claims again, because both sides of a network
    partition may have a holder. The one with the higher number then retires.
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
        """Claim the address.

        Raises `AddressInUse` with its holder, or `CacheConnectionError` if the connection is down.
        """
        self._listener = await self._connection.listen(self._subject, self._on_message)
        try:
            await self._connection.flush()
            self.publish("claim")
            await self._connection.flush()
            done, _ = await asyncio.wait([self._objection], timeout=self._connection.options.claim_wait)
            if done:
                raise AddressInUse(address=self.address, holder=self._objection.result())
            self.held = True
        except BaseException:
            await self.release()
            raise

    async def release(self) -> None:
        """Give up the address."""
        self.held = False
        if self._listener is not None:
            listener, self._listener = self._listener, None
            await self._connection.leave(listener)

    def _on_message(self, msg: Delivery) -> None:
        try:
            message: Any = json.loads(msg.data)
            word, number, to = str(message["says"]), str(message["number"]), str(message["to"])
            who = str(message["who"])[:200]
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # Malformed.
        if word == "held":
            if to == self._number:
                self._yield_to(who)
        elif (word == "claim" and self.held) or ((self.held or word == "claim") and self._number < number):
            try:
                self.publish("held", number)
            except CacheError:
                logger.warning("could not object to a claim to %s: the connection to NATS is down", self.address)
        else:
            self._yield_to(who)

    def publish(self, word: str, to: str = "") -> None:
        """Publish `claim`, `held` (an objection to the claimant with the number `to`), or `again` after a reconnect.

        Raises `CacheConnectionError` if the connection is down.
        """
        words = {"says": word, "number": self._number, "to": to, "who": self.identity}
        self._connection.write(self._subject, json.dumps(words).encode())

    def _yield_to(self, who: str) -> None:
        if self.held:
            self.held = False
            logger.error("%s is also served by %s; this process stops serving it to others", self.address, who)
            self._on_lost()
        elif not self._objection.done():
            self._objection.set_result(who)
