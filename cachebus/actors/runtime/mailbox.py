"""Mailboxes: the messages that wait for an actor's turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

from cachebus.bus import Address, Clock, Emitter, Envelope, ThreadPort
from cachebus.messages import CacheError, CacheTimeoutError, DeadLetter, Failed, Message, Overloaded, Reply

from .actor import Actor, BatchHandler

STOP: Any = object()  # In the place of a message: the messages before it are served, and then the incarnation ends.


@cache
def _has_value(kind: Any) -> bool:
    """Whether messages of a kind carry values. Cached, because `hasattr` takes 1 us to say no."""
    return hasattr(kind, "value")


class Mailbox(deque[Envelope]):
    """The envelopes before an actor, in order. `overloaded` counts those that were turned away because it was full.
    `capacity` does not bound requests that invalidate: the callers that wait for them bound their number."""

    def __init__(self, address: Address, emitter: Emitter, clock: Clock, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity of a mailbox must be at least 1, not {capacity!r}")
        super().__init__()
        self.capacity = capacity
        self.overloaded = 0
        self._address = address
        self._publish = emitter.publish
        self._now = clock.monotonic

    def __repr__(self) -> str:
        return f"<Mailbox of {self._address}, {len(self)}/{self.capacity}>"

    def has_room(self, envelope: Envelope) -> bool:
        """Whether a message may come in. One that may not is answered `Overloaded`."""
        if len(self) < self.capacity or getattr(envelope.message, "INVALIDATES", False):
            return True
        self.overloaded += 1
        self.answer(envelope, Overloaded(address=self._address, capacity=self.capacity))
        return False

    def blocks_a_thread(self) -> bool:
        """Whether a thread is blocked for an answer from here."""
        return any(isinstance(each.port, ThreadPort) for each in tuple(self))

    def worthwhile(self, envelope: Envelope, now: float) -> bool:
        """Whether to work on a message: not if its time is up, nor if the caller has gone, unless it invalidates."""
        if envelope.deadline is not None and now >= envelope.deadline:
            self.answer(envelope, CacheTimeoutError("no turn was free", self._address, 0.0))
            return False
        return envelope.port is None or envelope.port.waiting or getattr(envelope.message, "INVALIDATES", False)

    def collect(
        self,
        first: Envelope,
        handler: BatchHandler,
        handler_of: Callable[[type[Message]], BatchHandler | None],
        actor: Actor,
    ) -> list[Envelope]:
        """`first` and the messages after it for the same handler, in order, up to the actor's bounds."""
        most, most_bytes = actor.max_batch, actor.max_batch_bytes
        envelopes = [first]
        size, now = first.size, self._now()
        last, weighs = None, False
        while self and len(envelopes) < most and size < most_bytes:
            following = self[0]
            kind = type(following.message)
            if kind is not last:
                if handler_of(kind) != handler:
                    break
                last, weighs = kind, _has_value(kind)
            self.popleft()
            port, deadline = following.port, following.deadline
            # The most frequent answer of `worthwhile` first.
            if (port is not None and port.waiting and (deadline is None or now < deadline)) or self.worthwhile(
                following, now
            ):
                envelopes.append(following)
                if weighs:
                    size += following.size
        return envelopes

    def answer(self, envelope: Envelope, reply: Reply | CacheError) -> None:
        """Give the reply to the caller. An error without a caller is a `DeadLetter`."""
        if isinstance(reply, CacheError):
            reply = Failed.of(reply)
        if envelope.port is not None:
            envelope.port.answer(reply)
        elif isinstance(reply, Failed):
            wire_name = getattr(envelope.message, "WIRE_NAME", type(envelope.message).__name__)
            self._publish(DeadLetter(address=self._address, wire_name=wire_name, reason=reply.detail))

    def refuse_all(self, error: CacheError) -> None:
        """Answer everything in here with `error`."""
        while True:
            try:
                envelope = self.popleft()
            except IndexError:
                return
            if envelope.message is not STOP:
                self.answer(envelope, error)
