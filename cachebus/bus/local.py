"""The in-process bus. It passes message objects directly; nothing is encoded."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from anyio.lowlevel import checkpoint

from cachebus.messages import (
    AddressInUse,
    CacheClosed,
    CacheError,
    CacheTimeoutError,
    CapabilityError,
    DeadLetter,
    Event,
    Failed,
    Message,
    NoSuchActor,
    Request,
)

from .address import Address, check_word
from .api import Envelope, Recipient, Visibility
from .clock import SYSTEM_CLOCK, Clock, running_deadlines
from .events.emitter import Emitter
from .events.subscription import EVERYTHING, EventPolicy, Subscription, SubscriptionRegistry
from .reply_ports import AsyncioPort, DeferredReply, ReplyPort, ThreadPort, open_port, too_late
from .reply_slots import PENDING, Pending, ReplySlot
from .tracing import current_trace

R = TypeVar("R")

TURNS_PER_CHECKPOINT = 512
"""Number of inline turns on an event loop after which one caller lets other tasks run."""


class LocalBus:
    """A `Bus` within one process. Works on asyncio, on trio and from threads."""

    def __init__(
        self, namespace: str = "default", *, clock: Clock = SYSTEM_CLOCK, policy: EventPolicy = EVERYTHING
    ) -> None:
        self.namespace = check_word(namespace, "namespace")
        self.clock = clock
        self.subscriptions = SubscriptionRegistry()
        self.policy = policy
        self._recipients: dict[str, Recipient] = {}
        self._emitter = Emitter(self)
        self._guard = threading.Lock()
        self._turns_left = TURNS_PER_CHECKPOINT
        self._closed = False

    def __repr__(self) -> str:
        return f"<LocalBus {self.namespace!r} serving {', '.join(sorted(self._recipients)) or 'no addresses'}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def serve(self, address: Address, recipient: Recipient) -> None:
        with self._guard:
            if self._closed:
                raise CacheClosed("the bus is closed")
            if (holder := self._recipients.get(address)) is not None:
                raise AddressInUse(address=address, holder=repr(holder))
            self._recipients[address] = recipient

    def withdraw(self, address: Address) -> None:
        with self._guard:
            self._recipients.pop(address, None)

    async def claim(self, address: Address, visibility: Visibility) -> None:
        """Do nothing, because a local bus has no other processes."""

    async def announce(self, address: Address, visibility: Visibility) -> None:
        """Do nothing, because a local bus has no other processes."""

    async def retire(self, address: Address) -> None:
        """Do nothing, because a local bus has no other processes."""

    def recipient(self, address: Address) -> Recipient:
        found = self._recipients.get(address)
        if found is None:
            if self._closed:
                raise CacheClosed("the bus is closed")
            raise NoSuchActor(address=address)
        return found

    async def request(self, address: Address, message: Request[R], timeout: float) -> R:
        check_budget(address, timeout)
        reply = self.recipient(address).turn(type(message))(message)
        self._turns_left -= 1
        # Only with a complete reply: a pending one would be lost if the call were cancelled here, and it waits anyway.
        if self._turns_left <= 0 and reply is not None and not isinstance(reply, PENDING):
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        return await self.wait_reply(address, message, reply, timeout)

    async def wait_reply(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        if type(reply) is ReplySlot:
            slot = reply
            try:
                reply = await slot.within(timeout, too_late(address, timeout))
            except BaseException:
                slot.leave()
                raise
        elif reply is None or type(reply) is DeferredReply:
            recipient = self._recipients.get(address) or self.recipient(address)
            if (deadlines := running_deadlines()) is not None:
                # `AsyncioPort.wait` without its coroutine: every call that is not answered inline passes here.
                port = AsyncioPort(deadlines)
                if reply is None:
                    recipient.post(Envelope(message, port, self.clock.monotonic() + timeout, current_trace()))
                else:
                    reply.attach(port)
                bucket = deadlines.watch(port, timeout, too_late(address, timeout))
                try:
                    reply = await port.future
                finally:
                    bucket.pop(port, None)
                    if port.pending is not None:
                        port.pending.drop()
            else:
                trio_port = open_port()
                self._hand_over(recipient, message, timeout, reply, trio_port)
                reply = await trio_port.wait(timeout, too_late(address, timeout))
        if type(reply) is Failed:
            raise reply.error()
        return reply  # type: ignore[no-any-return]

    def request_blocking(self, address: Address, message: Request[R], timeout: float) -> R:
        check_budget(address, timeout)
        reply = self.recipient(address).turn(type(message))(message)
        return self.wait_reply_blocking(address, message, reply, timeout)

    def wait_reply_blocking(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        if reply is None or isinstance(reply, PENDING):
            recipient = self.recipient(address)
            # A reply that was already given, for example after a crash, does not block.
            if (reply is None or reply.waiting) and (obstacle := recipient.obstacle_to_blocking()) is not None:
                if type(reply) is ReplySlot:  # Nothing of it shall be sent, if it waits to be.
                    reply.deadline = 0.0
                    reply.leave()
                raise CacheError(f"a blocking call to {address} would deadlock: {obstacle}")
            port = ThreadPort()
            self._hand_over(recipient, message, timeout, reply, port)
            reply = port.wait(timeout, too_late(address, timeout))
        return cast("R", settled(reply))

    def send(self, address: Address, message: Message) -> None:
        try:
            self.recipient(address).post(Envelope(message, trace=current_trace()))
        except CacheError as error:
            self._emitter.publish(DeadLetter(address=address, wire_name=message.WIRE_NAME, reason=str(error)))

    def publish(self, event: Event) -> None:
        self.subscriptions.dispatch(event)

    def subscribe(
        self,
        *what: type[Event] | str,
        capacity: int = 1024,
        since: float | None = None,
        local: bool = False,
        real_keys: bool = False,
    ) -> Subscription:
        if since is not None:
            raise CapabilityError(
                "`since` requires a bus that stores events in a stream: bus='nats://...?events_stream=NAME'"
            )
        redact = self.policy.redacted if self.policy.redacts and not real_keys else None
        return self.subscriptions.subscribe(what, capacity, local=local, redact=redact)

    def close(self) -> None:
        """End every subscription and reject further calls. Does not stop the actors that it serves."""
        with self._guard:
            self._closed = True
            self._recipients.clear()
        self.subscriptions.close()

    def forked(self) -> None:
        """Close the bus in a forked child, where other threads no longer run but their locks may be held."""
        self._guard = threading.Lock()
        self.subscriptions.forked()
        self.close()

    def _hand_over(self, recipient: Recipient, message: Message, timeout: float, reply: Any, port: ReplyPort) -> None:
        if reply is None:
            recipient.post(Envelope(message, port, self.clock.monotonic() + timeout, current_trace()))
        else:
            cast("Pending", reply).attach(port)


def check_budget(address: str, timeout: float) -> None:
    """Raise `CacheTimeoutError` if the budget of a call is used up."""
    if not timeout > 0:
        raise CacheTimeoutError("the call had no time left", address, timeout)


def settled(reply: Any) -> Any:
    """Return the reply, or raise the error of a `Failed` reply."""
    if type(reply) is Failed:
        raise reply.error()
    return reply
