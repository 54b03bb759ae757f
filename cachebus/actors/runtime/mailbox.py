"""Mailboxes: the queues of messages that wait for an actor's turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

from cachebus.bus import Address, Clock, Emitter, Envelope, ThreadPort
from cachebus.messages import CacheError, CacheTimeoutError, DeadLetter, Failed, Message, Overloaded, Reply

from .actor import Actor, BatchHandler

STOP: Any = object()  # Queued like a message. The incarnation ends after the messages that precede it.


@cache
def _has_value(kind: Any) -> bool:
    """True if messages of this kind carry a value. Cached, because `hasattr` takes 1 us if the attribute is missing."""
    return hasattr(kind, "value")


class Mailbox(deque[Envelope]):
    """The queued envelopes of an actor, in order.

    `overloaded` counts the messages that were rejected because the mailbox was full. Requests that invalidate are
    always accepted, beyond `capacity` too; their number is bounded by the callers that wait for them.
    """

    def __init__(self, address: Address, emitter: Emitter, clock: Clock, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a mailbox must be at least 1, not {capacity!r}")
        super().__init__()
        self.capacity = capacity
        self.overloaded = 0
        self._address = address
        self._publish = emitter.publish
        self._now = clock.monotonic

    def __repr__(self) -> str:
        return f"<Mailbox of {self._address}, {len(self)}/{self.capacity}>"

    def has_room(self, envelope: Envelope) -> bool:
        """True if the mailbox can take the message. Otherwise it is answered with `Overloaded`."""
        if len(self) < self.capacity or getattr(envelope.message, "INVALIDATES", False):
            return True
        self.overloaded += 1
        self.answer(envelope, Overloaded(address=self._address, capacity=self.capacity))
        return False

    def blocks_a_thread(self) -> bool:
        """True if a thread is blocked on the reply to a queued message."""
        return any(isinstance(each.port, ThreadPort) for each in tuple(self))

    def worthwhile(self, envelope: Envelope, now: float) -> bool:
        """True if a message should be handled.

        A message past its deadline is answered with a timeout. A message whose caller no longer waits is skipped,
        unless it invalidates.
        """
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
        """Take the messages that follow `first` and have the same handler, in order, up to the actor's batch limits.

        Returns a list that starts with `first`.
        """
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
            # Inline the most frequent case of `worthwhile`.
            if (port is not None and port.waiting and (deadline is None or now < deadline)) or self.worthwhile(
                following, now
            ):
                envelopes.append(following)
                if weighs:
                    size += following.size
        return envelopes

    def answer(self, envelope: Envelope, reply: Reply | CacheError) -> None:
        """Send the reply to the caller. If no caller waits, an error becomes a `DeadLetter` event."""
        if isinstance(reply, CacheError):
            reply = Failed.of(reply)
        if envelope.port is not None:
            envelope.port.answer(reply)
        elif isinstance(reply, Failed):
            wire_name = getattr(envelope.message, "WIRE_NAME", type(envelope.message).__name__)
            self._publish(DeadLetter(address=self._address, wire_name=wire_name, reason=reply.detail))

    def refuse_all(self, error: CacheError) -> None:
        """Answer every queued message with `error`."""
        while True:
            try:
                envelope = self.popleft()
            except IndexError:
                return
            if envelope.message is not STOP:
                self.answer(envelope, error)
