"""A limit on how many do something at a time, with a bounded queue before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cachebus.bus import Port, open_port
from cachebus.messages import CacheError, Overloaded


class Places:
    """`limit` places, and a queue of `queue` more who wait for one, in order. Belongs to one event loop."""

    __slots__ = ("_address", "_given", "_limit", "_queue", "_waiting", "taken")

    def __init__(self, limit: int, queue: int, address: str) -> None:
        self.taken = 0
        self._limit = limit
        self._queue = queue
        self._address = address
        self._waiting: deque[Port] = deque()
        self._given: set[Port] = set()

    def __repr__(self) -> str:
        return f"<Places {self.taken}/{self._limit} taken, {len(self._waiting)}/{self._queue} waiting>"

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def take_at_once(self) -> bool:
        """Take a place if there is one."""
        if self.taken >= self._limit:
            return False
        self.taken += 1
        return True

    async def take(self) -> None:
        """Take a place, waiting for it. Raises `Overloaded` if too many wait already, and what `turn_away` says."""
        if self.take_at_once():
            return
        if len(self._waiting) >= self._queue:
            detail = f"{self.taken} batches ask {self._address} and {len(self._waiting)} wait"
            raise Overloaded(detail, self._address, self._queue)
        port = open_port()
        self._waiting.append(port)
        try:
            refusal: CacheError | None = await port.wait()
        except BaseException:
            if port in self._given:
                self._given.remove(port)
                self.leave()  # The place was ours already, and we do not take it.
            elif port in self._waiting:
                self._waiting.remove(port)
            raise
        if refusal is not None:
            raise refusal
        self._given.discard(port)

    def leave(self) -> None:
        """Give one's place to who has waited longest."""
        if self._waiting:
            port = self._waiting.popleft()
            self._given.add(port)
            port.answer(None)
        else:
            self.taken -= 1

    def turn_away(self, refusal: Callable[[], CacheError]) -> int:
        """Tell everybody who waits that it is no use, each with an error of its own. Says how many there were."""
        turned_away = len(self._waiting)
        while self._waiting:
            self._waiting.popleft().answer(refusal())
        return turned_away
