"""Locks in Memcached: an item that only one client can add, and a counter for fencing tokens.

    <namespace>:@<hash>                      until|ticket|owner: exists while the lock is held, expires with the lease
    <namespace>:@<hash>+                     the last token, kept for a week
    <namespace>:@<hash>-<hash of a ticket>   kept for a minute after the ticket was abandoned (empty) or has released

The counter is incremented after the item was added, so a later holder has a larger token. If the counter is lost
(evicted, `flush_all`, a restart), it restarts at the server's time in microseconds, which is larger than any earlier
value. Memcached has no notifications and no queue. The manager keeps a queue for its process, and polls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

from .connection import Answer, Connection, Exchange, ask, read, store
from .entry import server_expiry
from .errors import BACKEND
from .store import MemcachedStore

RETAIN = 7 * 86_400
"""Seconds for which an unused counter is kept."""

DIGITS = 20
"""Maximum number of digits of a number in an item."""

TICKET_SECONDS = 60
"""Seconds for which the item of an abandoned or released ticket is kept."""

BACK = b"given back"
"""Value of the item of a ticket that has released its lock."""

TRIES = 100
"""Maximum number of attempts if other clients change the item in between."""


class MemcachedLockStore(MemcachedStore):
    """A `LockStore` in one or several Memcached servers. The name of a lock determines its server.

    In the server, leases are rounded up to whole seconds, plus one. A holder that dies keeps the lock for that much
    longer.
    """

    poll: float | None = 0.02
    listener: LockListener | None = None

    async def open(self) -> None:
        await super().open()
        self.capabilities = Capabilities(locks=True, ttl_resolution=1.0)
        self._exchange = lambda connection, batch: _Locks(connection, self._keys.namespace).run(batch)

    def _parts(self, request: Any) -> list[tuple[str, Request[Any]]]:
        return [(self._server(request.name), request)]


@dataclass(frozen=True, slots=True)
class _Holder:
    """The item of a lock that is held, with its CAS token."""

    until: float
    ticket: str
    owner: str
    token: int


@dataclass(frozen=True, slots=True)
class _Locks:
    """Executes lock requests over one connection."""

    connection: Connection
    namespace: str

    def run(self, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
        """Execute the requests one after another. Errors are returned as replies."""
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
                return self._acquire(request, self._item(request.name))
            case RenewLock():
                return self._renew(request, self._item(request.name))
            case ReleaseLock():
                return self._release(request, self._item(request.name))
            case DescribeLock():
                return self._describe(self._item(request.name))
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _acquire(self, request: AcquireLock, item: str) -> Exchange[Reply]:
        started = self.connection.now()
        ticket_item = read(self._ticket_item(item, request.ticket))
        holder: _Holder | None = None
        for _ in range(TRIES):
            answer, given_up = yield self._put(item, request, request.owner, holder) + ticket_item, 2
            if isinstance(given_up, tuple):
                yield from self._release(ReleaseLock(request.name, request.ticket, abandon=True), item)
                return LockDenied("", 0.0)
            if _done(answer):
                break
            holder = yield from self._read_holder(item)
            if holder is not None and holder.ticket != request.ticket:
                return LockDenied(holder.owner, self._left(holder))
        else:
            raise _contended()
        # Increment after adding: a client that incremented first and added later would hold the lock with a smaller
        # token.
        first = int(self.connection.now() * 1e6)
        token = _number((yield from ask(f"ma {item}+ N{RETAIN} J{first} D1 T{RETAIN} v c\r\n".encode())))
        if self.connection.now() - started >= request.ttl:
            raise CacheConnectionError("the lease of the lock had expired before it was granted", BACKEND)
        return LockGranted(token, request.ttl)

    def _renew(self, request: RenewLock, item: str) -> Exchange[Reply]:
        for _ in range(TRIES):
            holder = yield from self._read_holder(item)
            if holder is None:
                return NotHeld()
            if holder.ticket != request.ticket:
                raise LockNotOwned(name=request.name, owner=holder.owner)
            if _done((yield from ask(self._put(item, request, holder.owner, holder)))):
                return Renewed(request.ttl)
        raise _contended()

    def _release(self, request: ReleaseLock, item: str) -> Exchange[Reply]:
        if request.unclaimed:
            return NotHeld()  # The caller may have asked another manager, which the item does not show. It expires.
        ticket_item, note = self._ticket_item(item, request.ticket), b""
        if request.abandon:
            yield from ask(store(ticket_item, b"", TICKET_SECONDS))
        elif request.token:
            # Sent with the deletion, so it costs no round trip. It makes a repeated release succeed if the reply was
            # lost.
            note = store(ticket_item, BACK, TICKET_SECONDS)
        for _ in range(TRIES):
            holder = yield from self._read_holder(item)
            if holder is None or holder.ticket != request.ticket:
                if request.abandon:
                    return NotHeld()
                recorded = yield from ask(read(ticket_item))
                if isinstance(recorded, tuple) and recorded[0] == BACK:
                    return Released()
                if holder is not None:
                    raise LockNotOwned(name=request.name, owner=holder.owner)
                return NotHeld()
            answer, *_ = yield b"md %b C%d\r\n%b" % (item.encode(), holder.token, note), 1 + bool(note)
            if _done(answer):
                return Released()
            if note:
                yield from ask(f"md {ticket_item}\r\n".encode())
        raise _contended()

    def _describe(self, item: str) -> Exchange[Reply]:
        holder = yield from self._read_holder(item)
        if holder is None:
            return LockFree()
        counter = yield from ask(read(f"{item}+"))
        return LockInfo(holder.owner, _number(counter) if isinstance(counter, tuple) else 0, self._left(holder))

    def _read_holder(self, item: str) -> Exchange[_Holder | None]:
        answer = yield from ask(read(item))
        if not isinstance(answer, tuple):
            return None
        try:
            until, ticket, owner = answer[0].decode().split("|", 2)
            if len(until) <= DIGITS:
                return _Holder(int(until) / 1000, ticket, owner, answer[1])
        except ValueError:
            pass
        raise CacheBackendError("the item of the lock is not a valid lock", BACKEND)

    def _put(self, item: str, request: AcquireLock | RenewLock, owner: str, over: _Holder | None) -> bytes:
        now = self.connection.now()
        until = now + request.ttl
        body = f"{math.ceil(until * 1000)}|{request.ticket}|{owner}".encode()
        return store(item, body, server_expiry(until, now), b" ME" if over is None else b" C%d" % over.token)

    def _left(self, holder: _Holder) -> float:
        return max(0.0, holder.until - self.connection.now())

    def _item(self, name: str) -> str:
        return f"{self.namespace}:@{_hash(name, 32)}"

    def _ticket_item(self, item: str, ticket: str) -> str:
        return f"{item}-{_hash(ticket, 16)}"


def _hash(text: str, size: int) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, person=b"cachebus.lock").hexdigest()


def _done(answer: Answer) -> bool:
    """True if a write was executed, `False` if another client was faster. Raises `CacheError`."""
    if isinstance(answer, CacheError):
        raise answer
    return isinstance(answer, int) and answer >= 0


def _number(answer: Answer) -> int:
    """Return the number in an item. Raises `CacheBackendError` if it is not a number."""
    if isinstance(answer, tuple) and answer[0].isdigit() and len(answer[0]) <= DIGITS:
        return int(answer[0])
    raise CacheBackendError("the counter of the lock is not a number", BACKEND)


def _contended() -> CacheError:
    return CacheConnectionError(f"other clients changed the lock in between, {TRIES} times in a row", BACKEND)
