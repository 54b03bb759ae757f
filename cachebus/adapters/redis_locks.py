"""Locks in Redis, for every process that shares the server. Waiters listen to a channel, and ask nothing meanwhile."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

from cachebus.actors.ports import Capabilities, Gauges, LockListener, PipelinedStore
from cachebus.messages import (
    AcquireLock,
    CacheError,
    CapabilityError,
    DescribeLock,
    Failed,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockNotOwned,
    LockQueued,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
    Reply,
    Request,
)

from .redis_connection import Argument
from .redis_errors import BACKEND
from .redis_lock_scripts import ACQUIRE, CLAIM_MS, DESCRIBE, RELEASE, RENEW
from .redis_pubsub import ChannelSubscription
from .redis_scripts import Script


class _Transport(PipelinedStore, Protocol):
    """A `RedisStore` or a `RedisClusterStore`."""

    def subscribe(self, *arguments: Any) -> ChannelSubscription: ...


class RedisLockStore:
    """A `LockStore` and `PipelinedStore` in a Redis server or cluster. `transport` makes the store that sends its scripts;
    `clustered` says that `PUBLISH` counts the listeners of one server only.

    Uncontended, a lock costs one round trip to have and one to give back. Waiters stand in a queue in Redis. A lock that is
    given back goes to the first of them, in the same step: one of our own process hears it by the reply, one of another by
    its inbox. Tokens are microseconds of the server's clock, or one more than the last.
    """

    name = BACKEND
    capabilities = Capabilities(locks=True)
    poll: float | None = None
    max_batch = 128
    long_running: frozenset[type[Request[Any]]] = frozenset()

    def __init__(self, transport: Callable[..., _Transport], *, namespace: str, clustered: bool) -> None:
        self.told: LockListener | None = None
        self.inbox = os.urandom(8).hex()
        self._prefix = f"{namespace}#lock:"
        self._clustered = clustered
        self._transport = store = transport(call=self.call)
        self.execute, self.submit, self.try_submit = store.execute, store.submit, store.try_submit
        self._is_open = False
        self._subscription: ChannelSubscription | None = None
        self._deaf: CacheError | None = None  # Why our inbox cannot be heard.

    def __repr__(self) -> str:
        return f"<RedisLockStore over {self._transport!r}, {'listening' if self._subscription else 'nobody waited'}>"

    async def open(self) -> None:
        await self._transport.open()
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False  # Replies may come until the transport is closed.
        subscription, self._subscription, self._deaf = self._subscription, None, None
        try:
            if subscription is not None:
                await subscription.close()
        finally:
            await self._transport.close()

    def gauges(self) -> Gauges:
        return Gauges()

    # Commands

    def call(self, request: Request[Any]) -> tuple[list[Argument], str, Script, Callable[[Any, float], Reply]]:
        """The words after the script's name, the key that says which server, the script, and how its reply is read."""
        name = getattr(request, "name", "")
        state = f"{self._prefix}{{{_tag(name)}}}"
        keys: list[Argument] = [state, f"{state}:queue", f"{state}:waiting"]
        ticket = getattr(request, "ticket", "")
        ours: list[Argument] = [ticket, self.inbox, f"{self._prefix}to:", name, "1" if self._clustered else "0"]
        gone = f"{state}:gone:{ticket}"
        read: Callable[[Any], Reply]
        match request:
            case AcquireLock(owner=owner, ttl=ttl, wait=wait):
                keys.append(gone)
                ours += [owner, _ms(ttl), _ms(wait)]
                script, read = ACQUIRE, partial(_acquired, ttl)
            case RenewLock(ttl=ttl):
                ours.append(_ms(ttl))
                script, read = RENEW, partial(_held, Renewed(ttl), name)
            case ReleaseLock(token=token, abandon=abandon, unclaimed=unclaimed, offered=offered):
                keys.append(gone)
                ours += ["1" if abandon else "3" if offered else "2" if unclaimed else "0", token]
                script, read = RELEASE, partial(_held, Released(), name)
            case DescribeLock():
                script, read = DESCRIBE, _described
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

        def make(reply: Any, now: float) -> Reply:
            passed_on = len(reply) > 5 and self._told(name, reply)
            answer = read(reply)
            if type(answer) is Released and self.told is not None and not passed_on:
                self.told.look(name)  # The queue is empty. Waiters of ours have lost their places, as after a flush.
            if type(answer) is LockQueued:
                if self._subscription is None and self._is_open:
                    inbox = f"{self._prefix}to:{self.inbox}"
                    self._subscription = self._transport.subscribe(inbox, self._heard, self._look, self._refused)
                if self._deaf is not None:
                    return Failed.of(self._deaf)
            return answer

        return [len(keys), *keys, *ours], state, script, make

    def _told(self, name: str, reply: Any) -> bool:
        """Pass on what a reply says about other callers. Whether the lock was given, or offered, to one of them."""
        token = reply[1]
        next_ticket, next_ttl, offered, lost, lost_token = reply[5:]
        if self.told is None:
            return False
        if lost_token:
            self.told.expired(name, lost.decode(), lost_token)
        if next_ticket:
            self.told.granted(name, next_ticket.decode(), LockGranted(token, next_ttl / 1000))
        if offered:
            # If its process is away, ours must notice.
            self.told.look(name, delay=CLAIM_MS / 1000 + 0.1)
        return bool(next_ticket or offered)

    # The inbox

    def _refused(self, error: CacheError) -> None:
        if not error.transient:
            # The user may not listen. A caller that cannot hear its inbox does not wait, and gets the error now.
            self._deaf = error
            self._look()

    def _heard(self, payload: bytes) -> None:
        ticket, _, name = payload.decode().partition("|")
        if self.told is not None:
            self.told.look(name, ticket)

    def _look(self) -> None:
        if self.told is not None:
            self.told.look_everywhere()


def _tag(name: str) -> str:
    """What stands for a name between the braces that say which slot its keys are in."""
    raw = name.encode("utf-8", "surrogatepass")
    if len(raw) <= 200 and name.isprintable() and "{" not in name and "}" not in name:
        return name
    return f"\x01{blake2b(raw, digest_size=32, person=b'cachebus.lock').hexdigest()}"


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _acquired(ttl: float, reply: Any) -> Reply:
    code, token = reply[:2]
    if code == 0:
        return LockGranted(token, ttl)
    owner, remaining, fresh = reply[2:5]
    if code == 1:
        return LockQueued(owner.decode(), remaining / 1000, bool(fresh))
    return LockDenied(owner.decode(), remaining / 1000)


def _held(good: Reply, name: str, reply: Any) -> Reply:
    code = reply[0]
    if code == 0:
        return good
    if code == 1:
        return Failed.of(LockNotOwned(name=name, owner=reply[2].decode()))
    return NotHeld()


def _described(reply: Any) -> Reply:
    if not reply[0]:
        return LockFree()
    token, owner, remaining = reply[1:4]
    return LockInfo(owner.decode(), token, remaining / 1000)
