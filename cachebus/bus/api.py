"""The interfaces of a bus and of the recipients that it delivers to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from msgspec import Struct

from cachebus.messages import Event, Message, Reply, Request

from .address import Address
from .clock import Clock
from .events.subscription import EventPolicy, Subscription, SubscriptionRegistry
from .reply_ports import ReplyPort
from .reply_slots import Pending

R = TypeVar("R")

Visibility = Literal["private", "shared", "sole"]
"""Which callers reach an actor. `private`: those of its process. `shared`: those of every process, and other processes
may serve its address too. `sole`: those of every process, and no other process serves its address."""

Turn = Callable[[Any], "Reply | Pending | None"]
"""Takes a turn for a message on the caller's stack. `None`: it must be posted; `Pending`: the reply comes later."""


class Envelope(Struct, eq=False):
    """A message in a mailbox: the port of the answer, until when it is worth working on, and how often it was tried.
    `deadline` is on the bus's monotonic clock, `None` without a caller. `trace` is the `traceparent` of the call."""

    message: Message
    port: ReplyPort | None = None
    deadline: float | None = None
    trace: str | None = None
    attempts: int = 0

    @property
    def size(self) -> int:
        """Bytes of the value that the message carries; 0 if it carries none, or an object."""
        value = getattr(self.message, "value", None)
        return len(value) if isinstance(value, bytes) else 0


class Recipient(Protocol):
    """The actor at an address, or a proxy for one in another process."""

    def turn(self, kind: type[Message]) -> Turn:
        """A function that takes turns for messages of one kind inline, for hot paths to keep."""
        ...

    def post(self, envelope: Envelope) -> None:
        """Put a message into the mailbox. Never waits; a message that cannot be taken is answered at once."""

    def obstacle_to_blocking(self) -> str | None:
        """Why this thread would wait for itself if it blocked for an answer from here; else `None`."""
        ...


class Bus(Protocol):
    """Delivery of messages to addresses and of events to listeners. Every request is answered exactly once. Messages
    from one sender to one address are handled in the order they were sent. Events never slow their publisher."""

    namespace: str
    clock: Clock
    subscriptions: SubscriptionRegistry
    policy: EventPolicy

    def serve(self, address: Address, recipient: Recipient) -> None:
        """Deliver messages to `address` to `recipient`. Raises `AddressInUse`."""

    def withdraw(self, address: Address) -> None:
        """Stop delivering to `address`. Harmless if it is not served."""

    async def claim(self, address: Address, visibility: Visibility) -> None:
        """Before an actor starts: make sure that no other process serves a `sole` address. Raises `AddressInUse`."""

    async def announce(self, address: Address, visibility: Visibility) -> None:
        """When an actor has started: let other processes reach it, as its visibility says."""

    async def retire(self, address: Address) -> None:
        """Before an actor stops: let only this process reach it. Returns when the requests of other processes that have
        arrived are in its mailbox. Harmless if the address was not announced."""

    def recipient(self, address: Address) -> Recipient:
        """The recipient at `address`. Raises `NoSuchActor`."""
        ...

    async def request(self, address: Address, message: Request[R], timeout: float) -> R:
        """Send a request, and wait up to `timeout` seconds for the reply. A `Failed` reply is raised as its error."""
        ...

    def request_blocking(self, address: Address, message: Request[R], timeout: float) -> R:
        """As `request`, from a thread: blocks it."""
        ...

    async def wait_reply(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """Do the second half of `request`: wait for the reply if a turn of the recipient has returned none."""
        ...

    def wait_reply_blocking(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """As `wait_reply`, from a thread: blocks it."""
        ...

    def send(self, address: Address, message: Message) -> None:
        """Send without waiting and without an answer. A message that cannot be delivered is a `DeadLetter` event."""

    def publish(self, event: Event) -> None:
        """Hand an event to its listeners. Never waits; a full listener loses it and counts that."""

    def subscribe(
        self,
        *what: type[Event] | str,
        capacity: int = 1024,
        since: float | None = None,
        local: bool = False,
        real_keys: bool = False,
    ) -> Subscription:
        """Listen to kinds of events, or to globs over their wire names such as `"cache_*"`; to all if none is named.

        With `since`, in Unix time, the events since then come first; raises `CapabilityError` if no stream keeps events.
        `local` leaves out the events of other processes. `real_keys` is for parts of the cache itself, which compare keys:
        the events of this process then come without redaction. Other processes have redacted theirs already.
        """
        ...
