"""Locks in Memcached: an item that only one can add, and a counter beside it.

    <namespace>:@<hash>     until|ticket|owner   there while the lock is held; its time to live is that of the lock
    <namespace>:@<hash>+    the last token, kept for a week
    <namespace>:@<hash>-<hash of a ticket>   there for a minute after the ticket was given up (empty), or gave the lock back

The token is counted after the item was added, so of two holders the later one has the larger token. A counter that is lost
(evicted, `flush_all`, a restart) begins again at the server's time in microseconds, which is more than it ever was.
Memcached tells nobody anything and keeps no queue: the manager has both, for its own process, and asks again in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from cachebus.actors.ports import Capabilities, LockListener
from cachebus.messages import (
    AcquireLock,
    CacheBackendError,
    CacheConnectionError,
    CacheError,
    CapabilityError,
    DescribeLock,
    Failed,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockNotOwned,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
    Reply,
    Request,
)

from .memcached import MemcachedStore
from .memcached_connection import Answer, Connection, Exchange
from .memcached_entry import server_expiry
from .memcached_errors import BACKEND

__all__ = ["MemcachedLockStore"]

RETAIN = 7 * 86_400
"""Seconds for which a counter is kept that nobody counts."""

GONE = 60
BACK = b"given back"

TRIES = 100
"""How often an item is looked at that others change in between."""


class MemcachedLockStore(MemcachedStore):
    """A `LockStore` in one or several Memcached servers: a lock is at the server that its name falls to.

    Leases are whole seconds in the server, rounded up, and one more: a holder that dies keeps the lock so much longer.
    """

    poll: float | None = 0.02
    told: LockListener | None = None

    async def open(self) -> None:
        await super().open()
        self.capabilities = Capabilities(locks=True, ttl_resolution=1.0)

    def _exchange(self, connection: Connection, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
        return _Locks(connection, self._keys.namespace).run(batch)

    def _parts(self, request: Any) -> list[tuple[str, Request[Any]]]:
        return [(self._server(request.name), request)]


class _Found:
    """The item of a lock that is held."""

    __slots__ = ("cas", "owner", "ticket", "until")

    def __init__(self, body: bytes, cas: int) -> None:
        until, ticket, owner = body.decode().split("|", 2)
        if len(until) > 20:
            raise ValueError
        self.until = int(until) / 1000
        self.ticket = ticket
        self.owner = owner
        self.cas = cas


class _Locks:
    """Requests about locks, on their way over one connection."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self._namespace = namespace

    def run(self, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
        """Carry out one after the other. What goes wrong is in the replies."""
        replies: list[Reply] = []
        for request in batch:
            try:
                replies.append((yield from self._one(request)))
            except CacheError as error:
                replies.append(Failed.of(error))
        return replies

    def _one(self, request: Request[Any]) -> Exchange[Reply]:
        match request:
            case AcquireLock():
                return (yield from self._acquire(request))
            case RenewLock():
                return (yield from self._renew(request))
            case ReleaseLock():
                return (yield from self._release(request))
            case DescribeLock():
                return (yield from self._describe(request))
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _acquire(self, request: AcquireLock) -> Exchange[Reply]:
        item, started = self._item(request.name), self._connection.now()
        command = self._put(item, request, request.owner, request.ttl, "ME")
        gone = f"mg {self._gone(item, request.ticket)} v c\r\n".encode()
        for _ in range(TRIES):
            answer, given_up = yield command + gone, 2
            if isinstance(given_up, tuple):
                yield from self._release(ReleaseLock(request.name, request.ticket, abandon=True))
                return LockDenied("", 0.0)
            if isinstance(answer, CacheError):
                raise answer
            if answer == 0:
                break
            found = yield from self._look(item)
            if found is None:
                command = self._put(item, request, request.owner, request.ttl, "ME")
            elif found.ticket == request.ticket:
                command = self._put(item, request, request.owner, request.ttl, f"C{found.cas}")
            else:
                return LockDenied(found.owner, self._left(found))
        else:
            raise _contended()
        # Not before: whoever counts first and adds later would hold the lock with the smaller number.
        first = int(self._connection.now() * 1e6)
        counted = yield from self._ask(f"ma {item}+ N{RETAIN} J{first} D1 T{RETAIN} v c\r\n".encode())
        token = _number(counted)
        if self._connection.now() - started >= request.ttl:
            raise CacheConnectionError("a lock was had only when its time was over", BACKEND)
        return LockGranted(token, request.ttl)

    def _renew(self, request: RenewLock) -> Exchange[Reply]:
        item = self._item(request.name)
        for _ in range(TRIES):
            found = yield from self._look(item)
            if found is None:
                return NotHeld()
            if found.ticket != request.ticket:
                raise LockNotOwned(name=request.name, owner=found.owner)
            answer = yield from self._ask(self._put(item, request, found.owner, request.ttl, f"C{found.cas}"))
            if answer == 0:
                return Renewed(request.ttl)
        raise _contended()

    def _release(self, request: ReleaseLock) -> Exchange[Reply]:
        item = self._item(request.name)
        if request.unclaimed:
            return NotHeld()  # Another manager may have been asked, and the item does not say: it ends by itself.
        gone, note = self._gone(item, request.ticket), b""
        if request.abandon:
            yield from self._ask(f"ms {gone} 0 T{GONE}\r\n\r\n".encode())
        elif request.token:
            # With the deletion, so that it costs no round trip: who was not heard, and says so again, did give it back.
            note = b"ms %s %d T%d\r\n%s\r\n" % (gone.encode(), len(BACK), GONE, BACK)
        for _ in range(TRIES):
            found = yield from self._look(item)
            if found is None or found.ticket != request.ticket:
                return (yield from self._not_held(request, gone, found))
            answer, *_ = yield f"md {item} C{found.cas}\r\n".encode() + note, 1 + bool(note)
            if isinstance(answer, CacheError):
                raise answer
            if answer == 0:
                return Released()
            if note:
                yield from self._ask(f"md {gone}\r\n".encode())
        raise _contended()

    def _not_held(self, request: ReleaseLock, gone: str, found: _Found | None) -> Exchange[Reply]:
        if not request.abandon:
            note = yield from self._ask(f"mg {gone} v c\r\n".encode())
            if isinstance(note, tuple) and bytes(note[0]) == BACK:
                return Released()
            if found is not None:
                raise LockNotOwned(name=request.name, owner=found.owner)
        return NotHeld()

    def _describe(self, request: DescribeLock) -> Exchange[Reply]:
        item = self._item(request.name)
        found = yield from self._look(item)
        if found is None:
            return LockFree()
        counter = yield from self._ask(f"mg {item}+ v c\r\n".encode())
        return LockInfo(found.owner, _number(counter) if isinstance(counter, tuple) else 0, self._left(found))

    def _look(self, item: str) -> Exchange[_Found | None]:
        answer = yield from self._ask(f"mg {item} v c\r\n".encode())
        if not isinstance(answer, tuple):
            return None
        try:
            return _Found(*answer)
        except ValueError:
            raise CacheBackendError("what stands in the place of a lock is none", BACKEND) from None

    def _ask(self, command: bytes) -> Exchange[Answer]:
        (answer,) = yield command, 1
        if isinstance(answer, CacheError):
            raise answer
        return answer

    def _put(self, item: str, request: AcquireLock | RenewLock, owner: str, ttl: float, condition: str) -> bytes:
        now = self._connection.now()
        body = f"{math.ceil((now + ttl) * 1000)}|{request.ticket}|{owner}".encode()
        return b"ms %s %d T%d %s\r\n%s\r\n" % (
            item.encode(),
            len(body),
            server_expiry(now + ttl, now),
            condition.encode(),
            body,
        )

    def _left(self, found: _Found) -> float:
        return max(0.0, found.until - self._connection.now())

    def _item(self, name: str) -> str:
        raw = name.encode("utf-8", "surrogatepass")
        return f"{self._namespace}:@{blake2b(raw, digest_size=32, person=b'cachebus.lock').hexdigest()}"

    def _gone(self, item: str, ticket: str) -> str:
        return f"{item}-{blake2b(ticket.encode(), digest_size=16, person=b'cachebus.lock').hexdigest()}"


def _number(answer: Answer) -> int:
    """Return the number in an item. Raises `CacheBackendError` for anything else."""
    if isinstance(answer, tuple) and answer[0].isdigit() and len(answer[0]) <= 20:
        return int(answer[0])
    raise CacheBackendError("the counter of a lock is no number", BACKEND)


def _contended() -> CacheError:
    return CacheConnectionError(f"others took the lock in between, {TRIES} times in a row", BACKEND)
