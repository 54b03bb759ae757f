"""A limit on how many batches are under way at a time, with a bounded queue before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cachebus.bus import Port, open_port
from cachebus.messages import CacheError, Overloaded


class ConcurrencyLimiter:
    """`limit` places, of which so many are `taken`, and a queue of so many more callers that wait for one, in order. Belongs to one event loop."""

    __slots__ = ("_address", "_granted", "_most", "limit", "queue", "taken")

    def __init__(self, limit: int, queue: int, address: str) -> None:
        self.taken = 0
        self.limit = limit
        self._most = queue
        self._address = address
        self.queue: deque[Port] = deque()
        self._granted: set[Port] = set()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimiter {self.taken}/{self.limit} taken, {len(self.queue)}/{self._most} waiting>"

    @property
    def waiting(self) -> int:
        """How many callers wait for a place."""
        return len(self.queue)

    def try_acquire(self) -> bool:
        """Take a place if one is free."""
        if self.taken >= self.limit:
            return False
        self.taken += 1
        return True

    async def acquire(self) -> None:
        """Take a place, waiting for it. Raises `Overloaded` if too many wait already, and what `refuse_all` says."""
        if self.try_acquire():
            return
        if len(self.queue) >= self._most:
            detail = f"{self.taken} batches ask {self._address} and {len(self.queue)} wait"
            raise Overloaded(detail, self._address, self._most)
        port = open_port()
        self.queue.append(port)
        try:
            refusal: CacheError | None = await port.wait()
        except BaseException:
            if port in self._granted:
                self._granted.remove(port)
                self.release()  # The place was ours already, and we do not take it.
            elif port in self.queue:
                self.queue.remove(port)
            raise
        if refusal is not None:
            raise refusal
        self._granted.discard(port)

    def release(self) -> None:
        """Give the place to the caller that has waited longest."""
        if self.queue:
            port = self.queue.popleft()
            self._granted.add(port)
            port.answer(None)
        else:
            self.taken -= 1

    def refuse_all(self, refusal: Callable[[], CacheError]) -> int:
        """Refuse everyone in the queue, each with an error of its own. Returns how many there were."""
        refused = len(self.queue)
        while self.queue:
            self.queue.popleft().answer(refusal())
        return refused
