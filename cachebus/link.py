"""The way from a facade to its backend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from cachebus.bus import Address, Bus, Emitter, Subscription, Turn
from cachebus.messages import CacheClosed, Event, Get, Request, Set

R = TypeVar("R")


class Link:
    """A bus, an address on it, and the time that a call may take, in seconds.

    `turn_get` and `turn_set` take a message's turn on the caller's stack where that is possible. `call_after` calls a
    function that does not wait after so many seconds, on the event loop of the node; it may be called from any thread.
    """

    __slots__ = ("address", "bus", "call_after", "emitter", "timeout", "turn_get", "turn_set")

    def __init__(
        self,
        bus: Bus,
        address: Address,
        timeout: float,
        emitter: Emitter,
        call_after: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.call_after = call_after
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self.emitter = emitter
        recipient = bus.recipient(address)
        self.turn_get: Turn = recipient.turn(Get)
        self.turn_set: Turn = recipient.turn(Set)

    async def request(self, message: Request[R], patience: float = 0.0) -> R:
        """Ask, awaiting the reply for `patience` seconds more than a call may take."""
        return await self.bus.request(self.address, message, self.timeout + patience)

    async def request_blocking(self, message: Request[R], patience: float = 0.0) -> R:
        """Ask, blocking this thread; a coroutine that never suspends, so that the facades can share their code."""
        return self.bus.request_blocking(self.address, message, self.timeout + patience)

    def finish(self, message: Request[R], reply: Any) -> Awaitable[R]:
        """Come to the reply from what a turn has returned."""
        # The bus's own coroutine: one of ours around it would be one more to make and to resume.
        return self.bus.finish(self.address, message, reply, self.timeout)

    async def finish_blocking(self, message: Request[R], reply: Any) -> R:
        """As `finish`, in the manner of `request_blocking`."""
        return self.bus.finish_blocking(self.address, message, reply, self.timeout)

    def subscribe(self, *what: type[Event] | str, capacity: int) -> Subscription:
        """Listen to the events of the bus."""
        return self.bus.subscribe(*what, capacity=capacity)


class NoLink(Link):
    """A way that is not there: every use says why."""

    __slots__ = ("_why",)

    def __init__(self, why: str) -> None:
        self._why = why
        self.turn_get = self.turn_set = self._refuse

    def __getattr__(self, name: str) -> NoReturn:
        # Reached for the slots that stay empty, whatever method of Link asks for them.
        raise CacheClosed(self._why)

    def _refuse(self, message: Any) -> NoReturn:
        raise CacheClosed(self._why)


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that never suspends, such as those over a blocking link."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the synchronous cache has suspended")
