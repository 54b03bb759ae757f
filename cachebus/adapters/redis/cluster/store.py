"""Store for a Redis Cluster. Sends each command to the server of its slot, and follows redirections."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from cachebus.actors.ports import NO_PROGRESS, Gauges, OnReplies, Progress
from cachebus.messages import (
    Add,
    BadMessage,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Clear,
    Cleared,
    CompareAndSet,
    Deleted,
    DeletePattern,
    GetOrLease,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
)

from ..commands import Command, Countdown, ScriptCall
from ..connect import Connector, Endpoint
from ..connection import Argument, RedisConnection
from ..entry import CAPABILITIES, NO_STAMP, TagSpace, milliseconds, new_epoch, pack_tags
from ..errors import BACKEND
from ..leases import kept_for
from ..planner import Plan
from ..pubsub import ChannelSubscription, LeaseWatch
from ..scan import ScanRunner, matching, scan_words, submitted
from ..scripts import STAMP
from .router import Router

MAX_SCANS = 3  # Maximum number of scans for one deletion when slots move during it.
_CURSOR = re.compile(r"([0-9]{1,20})@(.+)", re.DOTALL)


class RedisClusterStore:
    """`PipelinedStore` for a Redis Cluster, version 6.2 or newer. Needs asyncio.

    `endpoints` are the endpoints of any servers of the cluster; the others are discovered. The other parameters are
    those of `RedisStore` and apply to each server. A batch is answered when every server has answered its part.
    Requests for one key take effect in the order in which they were submitted, even while its slot moves. Keys in
    different slots have no order.

    `Clear`, `DeletePattern` and `Scan` scan the servers in the order of their names. If slots move during a deletion,
    the deletion starts again, at most twice. A key that moves while both servers are scanned may be missed.
    """

    name = BACKEND
    capabilities = CAPABILITIES
    max_batch = 64
    long_running: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern, Scan})

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        connector: Connector | None = None,
        *,
        namespace: str,
        default_ttl: float | None = None,
        call: Callable[[Request[Any]], ScriptCall] | None = None,
    ) -> None:
        if not namespace or ":" in namespace or "{}" in namespace:
            # With an empty pair of braces in front, its tag counters would not be in one slot.
            raise CacheConfigurationError(
                f"redis: the namespace must be non-empty and contain no colon or {{}}, not {namespace!r}"
            )
        self._seeds = tuple(endpoints)
        self._connector = dataclasses.replace(connector or Connector(), counters_here=False)
        self._prefix = f"{namespace}:"
        self._default_ttl = default_ttl
        self._space = TagSpace(namespace, here=False)
        self._call = call
        self._router: Router | None = None
        self._scans = ScanRunner(self.long_running, self._run_scan, self.execute)
        self._watch = LeaseWatch(self.subscribe, namespace)
        self.watch = self._watch.watch

    def __repr__(self) -> str:
        return f"<RedisClusterStore {self._prefix!r} at {', '.join(map(str, self._seeds))}>"

    async def open(self) -> None:
        self._connector = await self._connector.prepared()
        self._router = Router(self._connector, self._seeds)
        try:
            await self._router.topology.update()
        except BaseException:
            self._router.topology.drop()
            raise

    async def close(self) -> None:
        """Wait for pending requests, then close. If cancelled, abort them and close."""
        if self._router is None:
            return
        try:
            await self._watch.close()
            await self._scans.finish()
            await self._router.close()
        finally:
            self._scans.cancel()
            self._router.topology.drop()

    def subscribe(self, *arguments: Any) -> ChannelSubscription:
        """Subscribe to a channel on any server; see `RedisStore.subscribe`."""
        return ChannelSubscription(self._connect_anywhere, *arguments, clock=self._connector.clock)

    async def _connect_anywhere(self) -> RedisConnection:
        endpoints = [] if self._router is None else self._router.topology.map.endpoints()
        reason: CacheError = CacheConnectionError("no server of the cluster is known", BACKEND)
        for endpoint in dict.fromkeys((*random.sample(endpoints, len(endpoints)), *self._seeds)):
            try:
                return await self._connector.connect(endpoint)
            except CacheError as error:
                reason = error
        raise reason

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await submitted(self.submit, batch)

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        router = self._opened()
        if not self.long_running.isdisjoint(map(type, batch)):
            self._scans.start(batch, on_replies)
            return NO_PROGRESS
        stamps = await self._stamps(router, batch) if _wants_stamps(batch, self._space) else None
        countdown = self._planned(router, batch, on_replies, stamps)
        await self._send(router, countdown)
        return countdown

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        router = self._router
        if router is None or type(batch[0]) in self.long_running or _wants_stamps(batch, self._space):
            return None
        countdown = self._planned(router, batch, on_replies)
        if not router.has_room(countdown.routed_commands):
            return None
        router.send(countdown.routed_commands)
        return countdown

    async def _send(self, router: Router, countdown: Countdown) -> None:
        unreachable = await router.room({routed.slot for routed in countdown.routed_commands})
        # No await from here on: the servers still have room, and batches keep their order.
        router.send(countdown.routed_commands, unreachable)

    async def _stamps(self, router: Router, batch: Sequence[Request[Any]]) -> Mapping[int, bytes | CacheError]:
        """Read the stamps that the batch needs before it is sent, by position in the batch."""
        stamps = Stamps(batch, self._space, self._default_ttl)
        read = asyncio.Event()
        if stamps.commands:
            await self._send(router, Countdown(stamps.commands, read.set))
            await read.wait()
        return stamps.by_position

    def _planned(
        self,
        router: Router,
        batch: Sequence[Request[Any]],
        on_replies: OnReplies,
        stamps: Mapping[int, bytes | CacheError] | None = None,
    ) -> Countdown:
        look = _looks_for_tags(batch, self._space)
        group = partial(router.group, {})
        plan = Plan(batch, self._prefix, self._default_ttl, self._space, group, stamps=stamps, call=self._call)
        countdown = Countdown(plan.commands, lambda: on_replies(plan.done()))
        if look is not None:
            countdown.add(look)
        elif not plan.commands:
            on_replies(plan.done())
        return countdown

    # Scans

    async def _run_scan(self, request: Request[Any]) -> Reply:
        try:
            if isinstance(request, Scan):
                return await self._page(request)
            if isinstance(request, DeletePattern):
                return Deleted(await self._remove(request.pattern))
            await self._remove("*")
            return Cleared()
        except CacheError:
            self._opened().topology.update_soon()
            raise

    async def _remove(self, pattern: str) -> int:
        topology = self._opened().topology
        removed = 0
        for _ in range(MAX_SCANS):
            version = topology.map.version
            for endpoint in topology.map.endpoints():
                connection = await topology.node(endpoint).pool.side()
                removed += await self._scans.remove(connection, self._prefix, pattern)
            if topology.map.version == version:
                break
        return removed

    async def _page(self, request: Scan) -> Reply:
        topology = self._opened().topology
        endpoints = topology.map.endpoints()
        names = [str(endpoint) for endpoint in endpoints]
        cursor, at = "0", 0
        if request.cursor:
            found = _CURSOR.fullmatch(request.cursor)
            if found is None:
                raise BadMessage(f"the cursor must come from a previous scan, not {request.cursor[:40]!r}")
            if found[2] not in names:
                raise CacheConnectionError("the cluster has changed during the scan: start the scan again", BACKEND)
            cursor, at = found[1], names.index(found[2])
        connection = await topology.node(endpoints[at]).pool.connect()
        following, listed = await connection.call(*scan_words(self._prefix, request.pattern, cursor))
        keys = tuple(matching(listed, self._prefix, request.pattern))
        if following != b"0":
            return Scanned(keys, f"{following.decode()}@{names[at]}")
        return Scanned(keys, f"0@{names[at + 1]}" if at + 1 < len(names) else "")

    def _opened(self) -> Router:
        if self._router is None:
            raise CacheConnectionError("the store is not open", BACKEND)
        return self._router


_STORING = frozenset({Set, SetMany, Add, CompareAndSet})


def _wants_stamps(batch: Sequence[Request[Any]], space: TagSpace) -> bool:
    """Return `True` if a request of the batch has tags, or may get tags from its loader."""
    return any(_wants_stamp(request, space) for request in batch)


def _wants_stamp(request: Any, space: TagSpace) -> bool:
    kind = cast("type[object]", type(request))
    return bool((kind in _STORING and request.tags) or (kind is GetOrLease and (space.seen or request.tags)))


def _looks_for_tags(batch: Sequence[Request[Any]], space: TagSpace) -> Command | None:
    """Return a command, sent with lease requests, that checks whether the namespace uses tags, if not known."""
    if space.seen or not any(type(request) is GetOrLease for request in batch):
        return None

    def settle(there: Any, now: float) -> None:
        space.seen = space.seen or bool(there)

    return Command(["EXISTS", space.sequence], space.sequence, settle, lambda error: None)


class Stamps:
    """Stamps for the requests of a batch, read before it is sent.

    `commands` read the stamps. `by_position` then holds each stamp, or the error that replaces it, by position in the
    batch.

    A stamp is read before its lease is requested or its value is written. If a tag is invalidated in between, the
    stored entry is a miss, because its stamp is older than the counter.
    """

    def __init__(self, batch: Sequence[Request[Any]], space: TagSpace, default_ttl: float | None) -> None:
        self.by_position: dict[int, bytes | CacheError] = {}
        groups: dict[str, list[tuple[int, Any]]] = {}
        request: Any
        for position, request in enumerate(batch):
            if not _wants_stamp(request, space):
                continue
            try:
                pack_tags(request.tags)
                groups.setdefault(_kept(request, default_ttl), []).append((position, request))
            except (CacheError, ValueError, OverflowError):
                # The plan fails this request.
                self.by_position[position] = BadMessage("the tags or the time to live are not valid")
        space.seen = True
        self.commands = [self._command(space, px, members) for px, members in groups.items()]

    def _command(self, space: TagSpace, px: str, members: Sequence[tuple[int, Any]]) -> Command:
        tags = list(dict.fromkeys(tag for _, request in members for tag in request.tags))
        names = [space.sequence, *(space.counter(tag) for tag in tags)]
        words: list[Argument] = [len(names), *names, new_epoch(), px]

        def settle(reply: Any, now: float) -> None:
            counters = dict(zip(tags, reply[1:], strict=True))
            for position, request in members:
                # A value stored under a lease has the stamp of the lease, which is compared with the largest counter.
                leased = isinstance(request, Set) and request.lease is not None and request.tags
                self.by_position[position] = max(counters[tag] for tag in request.tags) if leased else reply[0]

        def fail(error: CacheError) -> None:
            # Without a stamp, the lease still works for a value without tags.
            self.by_position.update((position, error if request.tags else NO_STAMP) for position, request in members)

        return Command(words, names[0], settle, fail, script=STAMP)


def _kept(request: Any, default_ttl: float | None) -> str:
    """Return the milliseconds for which the counters of a request are needed."""
    if isinstance(request, GetOrLease):
        return milliseconds(request.lease_ttl)
    px = milliseconds(default_ttl if request.ttl == "default" else request.ttl)
    return kept_for(request, px) if isinstance(request, Set) else px
