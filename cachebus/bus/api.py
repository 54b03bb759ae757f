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
"""The callers that can reach an actor.

* `private`: callers in the same process.
* `shared`: callers in every process. Other processes may serve the same address.
* `sole`: callers in every process. No other process serves the address.
"""

Turn = Callable[[Any], "Reply | Pending | None"]
"""Runs the turn for a message on the caller's stack and returns the reply.

`None` means that the message must be posted; `Pending` means that the reply follows later.
"""


class Envelope(Struct, eq=False):
    """A message in a mailbox, with its reply port, its deadline and the number of earlier attempts.

    `deadline` is on the bus's monotonic clock; it is `None` if no caller waits. `trace` is the `traceparent` of the
    call.
    """

    message: Message
    port: ReplyPort | None = None
    deadline: float | None = None
    trace: str | None = None
    attempts: int = 0

    @property
    def size(self) -> int:
        """Size in bytes of the value in the message; 0 if it has no value or the value is not `bytes`."""
        value = getattr(self.message, "value", None)
        return len(value) if isinstance(value, bytes) else 0


class Recipient(Protocol):
    """The actor at an address, or a proxy for one in another process."""

    def turn(self, kind: type[Message]) -> Turn:
        """Return a function that runs turns for messages of one kind inline. Hot paths may keep it."""
        ...

    def post(self, envelope: Envelope) -> None:
        """Put a message into the mailbox. Never waits; if the mailbox rejects a message, it is answered immediately."""

    def obstacle_to_blocking(self) -> str | None:
        """Return the reason why this thread would deadlock if it blocked for a reply from this recipient, or `None`."""
        ...


class Bus(Protocol):
    """Delivers messages to addresses and events to listeners.

    Every request is answered exactly once. Messages from one sender to one address are handled in the order in which
    they were sent. Events never slow down their publisher.
    """

    namespace: str
    clock: Clock
    subscriptions: SubscriptionRegistry
    policy: EventPolicy

    def serve(self, address: Address, recipient: Recipient) -> None:
        """Deliver messages for `address` to `recipient`. Raises `AddressInUse`."""

    def withdraw(self, address: Address) -> None:
        """Stop delivering to `address`. Does nothing if the address is not served."""

    async def claim(self, address: Address, visibility: Visibility) -> None:
        """Check, before an actor starts, that no other process serves a `sole` address. Raises `AddressInUse`."""

    async def announce(self, address: Address, visibility: Visibility) -> None:
        """Let other processes reach an actor that has started, according to its visibility."""

    async def retire(self, address: Address) -> None:
        """Stop accepting requests from other processes, before an actor stops.

        Returns when all remote requests that have arrived are in the mailbox. Does nothing if the address was not
        announced.
        """

    def recipient(self, address: Address) -> Recipient:
        """Return the recipient at `address`. Raises `NoSuchActor`."""
        ...

    async def request(self, address: Address, message: Request[R], timeout: float) -> R:
        """Send a request and wait up to `timeout` seconds for the reply. A `Failed` reply is raised as its error."""
        ...

    def request_blocking(self, address: Address, message: Request[R], timeout: float) -> R:
        """Send a request and block the calling thread until the reply arrives. Otherwise like `request`."""
        ...

    async def wait_reply(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """Complete a request: return `reply` if the inline turn has returned one, or else wait for it."""
        ...

    def wait_reply_blocking(self, address: Address, message: Request[R], reply: Any, timeout: float) -> R:
        """Complete a request and block the calling thread until the reply arrives. Otherwise like `wait_reply`."""
        ...

    def send(self, address: Address, message: Message) -> None:
        """Send a message without waiting for a reply.

        A message that cannot be delivered becomes a `DeadLetter` event.
        """

    def publish(self, event: Event) -> None:
        """Pass an event to its listeners. Never waits; if a listener's queue is full, it drops and counts the event."""

    def subscribe(
        self,
        *what: type[Event] | str,
        capacity: int = 1024,
        since: float | None = None,
        local: bool = False,
        real_keys: bool = False,
    ) -> Subscription:
        """Subscribe to event classes, or to globs over wire names such as `"cache_*"`. The default is all events.

        With `since`, a Unix time, the subscription first replays the events since then; it raises `CapabilityError`
        if no stream keeps events. With `local`, events of other processes are left out. With `real_keys`, events of
        this process carry their keys even if keys are redacted. The cache itself uses it to compare keys; events of
        other processes arrive redacted.
        """
        ...
