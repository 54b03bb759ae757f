"""The way from a facade to its backend."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cachebus.bus import Address, Bus, Emitter, Subscription, Turn
from cachebus.messages import CacheClosed, Event, Get, Request, Set

if TYPE_CHECKING:
    from .payload import PayloadPipeline

R = TypeVar("R")


class Link:
    """A bus, an address on it, and the time that a call may take, in seconds.

    `turn_get` and `turn_set` take a message's turn on the caller's stack where that is possible.
    """

    __slots__ = ("address", "bus", "emitter", "timeout", "turn_get", "turn_set")

    def __init__(self, bus: Bus, address: Address, timeout: float, emitter: Emitter) -> None:
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self.emitter = emitter
        recipient = bus.recipient(address)
        self.turn_get: Turn = recipient.turn(Get)
        self.turn_set: Turn = recipient.turn(Set)

    @property
    def pipeline(self) -> PayloadPipeline | None:
        """What turns values into payloads; `None` where they stay objects."""
        return None

    async def request(self, message: Request[R]) -> R:
        """Ask, awaiting the reply."""
        return await self.bus.request(self.address, message, self.timeout)

    async def request_blocking(self, message: Request[R]) -> R:
        """Ask, blocking this thread; a coroutine that never suspends, so that the facades can share their code."""
        return self.bus.request_blocking(self.address, message, self.timeout)

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

    @property
    def pipeline(self) -> NoReturn:
        raise CacheClosed(self._why)

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
