"""What an actor sees of the world."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from cachebus.bus import Address, Audience, Clock, Deferred
from cachebus.messages import Event, Message

from .ports import Timer, Timers


class Context(Protocol):
    """An actor's surroundings: its name, the time, and ways to speak and to be called back.

    `deadline` is until when the request of the current turn is worth working on, on `clock.monotonic`; `None` where no
    one waits, and in plain handlers, which do not wait either. `audience.kinds` holds the kinds of events that
    somebody listens to: look before you build one. `restarts` counts the actor's lives after the first, `overloaded` the
    requests that its full mailbox turned away. `timers` call functions back, even during a turn, until the actor ends.
    """

    address: Address
    clock: Clock
    audience: Audience
    deadline: float | None
    restarts: int

    @property
    def timers(self) -> Timers: ...

    @property
    def overloaded(self) -> int: ...

    @property
    def traces(self) -> list[str | None]:
        """In the turn of a batch, until its first await: the trace context of each request."""
        ...

    def emit(self, event: Event) -> None:
        """Publish an event."""

    def tell(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """Publish an event of a kind with these fields; it is built only if somebody wants it and the sample has it."""

    def defer(self) -> Deferred:
        """Promise a reply: return it from the handler, and answer it when you know. On stop it is answered for you."""
        ...

    def send_after(self, delay: float, message: Message) -> Timer:
        """Send `message` to this actor after `delay` seconds, unless the timer is cancelled."""
        ...

    def start_soon(self, function: Callable[[], Awaitable[None]], /) -> None:
        """Run `function` beside the turns. It ends with the actor's supervisor at the latest."""
