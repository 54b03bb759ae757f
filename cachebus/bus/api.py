"""What a bus is, and what it delivers to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from cachebus.messages import Event, Message, Reply, Request

from .address import Address
from .clock import Clock
from .event_policy import EventPolicy
from .ports import Port
from .slots import Pending
from .subscription import Audience, Subscription

R = TypeVar("R")

Visibility = Literal["private", "shared", "sole"]
"""Who reaches an actor: callers of its own process; callers everywhere, and then others may serve its address as well and
share the work; or callers everywhere, and nobody else serves its address."""

Turn = Callable[[Any], "Reply | Pending | None"]
"""Takes a message's turn on the caller's own stack. `None`: it must be posted; `Pending`: the reply comes later."""


class Envelope:
    """A message in a mailbox: where the answer goes, until when it is worth working on, and how often it was tried.

    `deadline` is on the bus's monotonic clock, `None` where nobody waits. `trace` is the `traceparent` of the call.
    """

    __slots__ = ("attempts", "deadline", "message", "port", "trace")

    def __init__(
        self, message: Message, port: Port | None = None, deadline: float | None = None, trace: str | None = None
    ) -> None:
        self.message = message
        self.port = port
        self.deadline = deadline
        self.trace = trace
        self.attempts = 0

    @property
    def size(self) -> int:
        """Bytes of the value that the message carries; 0 if it carries none, or an object."""
        value = getattr(self.message, "value", None)
        return len(value) if isinstance(value, bytes) else 0


class Recipient(Protocol):
    """What stands at an address: an actor of this process, or the way to one."""

    def turn(self, kind: type[Message]) -> Turn:
        """A function that takes turns for messages of one kind inline, for hot paths to keep."""
        ...

    def post(self, envelope: Envelope) -> None:
        """Put a message into the mailbox. Never waits; what cannot be taken is answered at once."""

    def obstacle_to_blocking(self) -> str | None:
        """Why this thread must not block for an answer from here, because it would wait for itself; else `None`."""
        ...


class Bus(Protocol):
    """Delivery of messages to addresses and of events to listeners.

    Every request is answered exactly once. Messages from one sender to one address are handled in the order they
    were sent. Events never slow whoever publishes them.
    """

    namespace: str
    clock: Clock
    audience: Audience
    policy: EventPolicy
    """What events may say, and how many of them are told."""

    def serve(self, address: Address, recipient: Recipient) -> None:
        """Deliver to `recipient` what is sent to `address`. Raises `AddressInUse`."""

    def withdraw(self, address: Address) -> None:
        """Stop delivering to `address`. Harmless if nobody serves it."""

    async def claim(self, address: Address, visibility: Visibility) -> None:
        """Before an actor starts: make sure that no other process serves the address if it is `sole`. Raises
        `AddressInUse`, naming the holder."""

    async def announce(self, address: Address, visibility: Visibility) -> None:
        """When an actor has started: let other processes reach who serves the address, as its visibility says."""

    async def retire(self, address: Address) -> None:
        """Before an actor stops: be reached from this process only. Returns when what had come from others is in the
        actor's mailbox. Harmless if the address was not announced."""

    def recipient(self, address: Address) -> Recipient:
        """Whoever serves `address`. Raises `NoSuchActor`."""
        ...

    async def request(self, address: Address, message: Request[R], timeout: float) -> R:
        """Ask, and wait up to `timeout` seconds for the reply. A `Failed` reply is raised as its error."""
        ...

    def request_blocking(self, address: Address, message: Request[R], timeout: float) -> R:
        """As `request`, from a thread: blocks it."""
        ...

    async def finish(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """Come to the reply from what a turn of the recipient's has returned: `request` less its first step."""
        ...

    def finish_blocking(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """As `finish`, from a thread: blocks it."""
        ...

    def send(self, address: Address, message: Message) -> None:
        """Tell, without waiting and without an answer. What cannot be delivered is a `DeadLetter` event."""

    def publish(self, event: Event) -> None:
        """Hand an event to every listener that wants it. Never waits; a full listener loses it and counts that."""

    def subscribe(
        self,
        *what: type[Event] | str,
        capacity: int = 1024,
        since: float | None = None,
        local: bool = False,
        real_keys: bool = False,
    ) -> Subscription:
        """Listen to kinds of events, or to a glob over their wire names such as `"cache_*"`; to all if none is named.

        With `since`, in Unix time, what has happened since then is told first. Raises `CapabilityError` where nobody
        keeps events. With `local`, only to what this process tells, as whoever counts does. `real_keys` is for parts of the
        cache itself, which compare keys: the events of this process then come as they are, however the policy redacts
        them. What others tell is as they sent it.
        """
        ...
