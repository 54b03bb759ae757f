"""Who waits for locks at a manager: each caller, and the room that those of one lock share."""

from __future__ import annotations

from collections.abc import Callable

from cachebus.bus import Deferred
from cachebus.messages import AcquireLock, Failed, ReleaseLock, Reply


class Answer:
    """Where the reply to a request goes: it is returned by the handler, or given later."""

    __slots__ = ("_deferred", "_reply")

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._deferred: Deferred | None = None

    def give(self, reply: Reply) -> None:
        """Give the reply."""
        if self._deferred is None:
            self._reply = reply
        else:
            self._deferred.answer(reply)

    def take(self, defer: Callable[[], Deferred]) -> Reply | Deferred:
        """What the handler returns."""
        if self._reply is not None:
            return self._reply
        self._deferred = defer()
        return self._deferred

    @property
    def waiting(self) -> bool:
        """Whether somebody may still wait for it."""
        return self._reply is None if self._deferred is None else self._deferred.waiting


class Waiter:
    """One attempt to have a lock. `answer` is `None` while its caller has been told to ask again and has not yet.

    `until` is when it is answered, or given up if nobody asks; `ends` is how long its caller is patient. `asking` says that
    the store is being asked for it, `again` that it is to be asked once more after that, `left` that the caller has given
    up meanwhile. `trouble` is why the store could not be asked the last time.
    """

    __slots__ = ("again", "answer", "asking", "ends", "left", "queued", "request", "trouble", "until")

    def __init__(self, request: AcquireLock, answer: Answer, ends: float) -> None:
        self.request = request
        self.answer: Answer | None = answer
        self.ends = ends
        self.until = ends
        self.asking = False
        self.again = False
        self.left = False
        self.queued = False
        self.trouble: Failed | None = None

    @property
    def is_there(self) -> bool:
        """Whether the caller waits for an answer."""
        return self.answer is not None and self.answer.waiting

    def abandoned(self, *, unclaimed: bool = False) -> ReleaseLock:
        """The request that takes back what was asked for it. `unclaimed`, its caller may ask again, of another manager."""
        return ReleaseLock(self.request.name, self.request.ticket, abandon=not unclaimed, unclaimed=unclaimed)


class Room:
    """Those who wait for one lock, in the order in which they came. `owner` holds it, to `ends_at` as far as is known.
    `pause` is how long a store that cannot tell is left alone. While the lock is `overdue`, the store has not answered since
    then that another holds it: it may have lost every place in the queue."""

    __slots__ = ("ends_at", "overdue", "owner", "pause", "waiters")

    def __init__(self) -> None:
        self.waiters: dict[str, Waiter] = {}
        self.owner = ""
        self.ends_at = 0.0
        self.overdue = False
        self.pause = 0.0
