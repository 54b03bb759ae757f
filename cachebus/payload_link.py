"""The way from a facade to its backend, with values as payloads on it: bytes going out, values coming back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from anyio import to_thread
from msgspec.structs import replace

from cachebus.actors import Timers
from cachebus.bus import Address, Bus, Emitter
from cachebus.messages import (
    Add,
    CacheError,
    CacheSerializationError,
    CapabilityError,
    CompareAndSet,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    LeaseGranted,
    Loading,
    Missing,
    NotStored,
    PayloadRejected,
    PayloadSealed,
    ReleaseLease,
    Request,
    Set,
    SetMany,
    Snapshot,
    Stale,
    Stored,
)

from .cached_errors import CachedError, Remembered
from .failures import BACKEND_FAILURES, OnError
from .link import Link
from .payload import PayloadPipeline
from .payload_places import has_value, size, size_of, with_value
from .payload_scalars import type_of

logger = logging.getLogger("cachebus")

R = TypeVar("R")
_Ask = Callable[[Request[Any]], Awaitable[Any]]
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
_MISSING = Missing()
_UNASKED: Any = object()
_WAITING, _BLOCKING = False, True


class _Content(NamedTuple):
    """What a turn returns for a value that is to be compressed and sealed beside the event loop."""

    serialized: bytes


class _Handed(NamedTuple):
    """What a turn returns for a write that is not answered yet: the message with its payload, and the turn's own answer."""

    message: Request[Any]
    reply: Any


class PayloadLink(Link):
    """A `Link` whose pipeline turns the values of requests into payloads, and the payloads of replies into values.

    Integers of 64 bits stay integers, for `increment`, unless payloads are sealed. A payload that cannot be taken is a miss, an
    event and a counter, and what is written next takes its place, `add` included. On an event loop, payloads of
    `offload_above` bytes or more are packed and unpacked in a worker thread.
    """

    __slots__ = ("_debug", "_inner_get", "_inner_lease", "_inner_set", "_offload_above", "_pipeline", "_told")

    def __init__(
        self,
        bus: Bus,
        address: Address,
        timeout: float,
        emitter: Emitter,
        timers: Timers,
        pipeline: PayloadPipeline,
        *,
        offload_above: int | None = None,
        debug: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(bus, address, timeout, emitter, timers, on_error)
        self._pipeline = pipeline
        self._offload_above = offload_above
        self._debug = debug
        self._told: set[str] = set()
        self._inner_get, self._inner_set, self._inner_lease = self.turn_get, self.turn_set, self.turn_lease
        self.turn_get, self.turn_set, self.turn_lease = self._coded_get, self._coded_set, self._coded_lease

    @property
    def pipeline(self) -> PayloadPipeline:
        return self._pipeline

    async def request(self, message: Request[R], patience: float = 0.0) -> R:
        """As `Link.request`."""
        coded: Any = message
        if has_value(type(message)):
            coded = await self._written(coded, coded.value)
        elif isinstance(message, SetMany):
            coded = await self._written_many(message)
        else:
            coded = self._prepared(message)
        return cast("R", await self._answer(_WAITING, message, coded, patience=patience))

    async def request_blocking(self, message: Request[R], patience: float = 0.0) -> R:
        """As `Link.request_blocking`."""
        return cast("R", await self._answer(_BLOCKING, message, self._prepared(message), patience=patience))

    def send(self, message: Request[Any]) -> None:
        """As `Link.send`."""
        if type(message) is ReleaseLease and (late := message.late) is not None:
            try:
                message = replace(message, late=with_value(late, self._encoded(message.key, late.value)))
            except CacheError:
                message = replace(message, late=None)  # Who waits loads by itself.
        super().send(message)

    async def finish(self, message: Request[R], reply: Any) -> R:
        """As `Link.finish`."""
        # What most calls of a remote backend come by: it does the commonest of what `_settle` does, in a third of the time.
        coded: Any = message
        if type(message) is GetOrLease:
            return cast("R", await self._answer(_WAITING, message, message, reply))
        if type(reply) is _Content:
            write: Any = message
            return cast("R", await self._answer(_WAITING, message, await self._written(write, None, reply.serialized)))
        if type(reply) is _Handed:
            coded, reply = reply
        deadline = self.bus.clock.monotonic() + self.timeout
        try:
            came: Any = await self.bus.finish(self.address, coded, reply, self.timeout)
            kind = type(came)  # pyright: ignore[reportUnknownVariableType]
            if kind is Stored or kind is Missing:
                return came  # type: ignore[no-any-return]
            if kind is Found:
                payload = came.value
                if type(payload) is not bytes:
                    return cast("R", self._read(coded.key, came))
                # What `_read` does, less three calls and a look at each field.
                if self._offload_above is None or len(payload) < self._offload_above:
                    try:
                        value = self._pipeline.decode(coded.key, payload)
                    except CacheSerializationError as error:
                        self._tell_rejected(coded.key, error.reason, str(error))
                        return cast("R", _MISSING)
                    if type(value) is CachedError:
                        return cast("R", Remembered(value))
                    # Another object: two may share a reply.
                    return cast("R", Found(value, came.version, came.ttl, came.tags, came.stored_at))
            return cast("R", await self._come_back(_WAITING, coded, came, deadline))
        except CacheSerializationError as error:
            if type(coded) is not Get:
                raise
            self._rejected(coded.key, error)
            return cast("R", _MISSING)
        except BACKEND_FAILURES as error:
            return self.failures.settle(message, error)

    async def finish_blocking(self, message: Request[R], reply: Any) -> R:
        """As `Link.finish_blocking`."""
        if type(reply) is _Content:
            write: Any = message
            coded = with_value(write, self._protected(write.key, reply.serialized))
            return cast("R", await self._answer(_BLOCKING, message, coded))
        return cast("R", await self._answer(_BLOCKING, message, message, reply))

    async def _answer(
        self, blocking: bool, asked: Request[Any], coded: Any, turned: Any = _UNASKED, patience: float = 0.0
    ) -> Any:
        """The reply of a coded message, or what stands for it (see `Failures`)."""
        try:
            return await self._settle(blocking, coded, turned, patience)
        except BACKEND_FAILURES as error:
            return self.failures.settle(asked, error)

    # Out

    def _coded_get(self, message: Get) -> Any:
        if (reply := self._inner_get(message)) is None:  # What most calls of a remote backend get.
            return None
        return self._read(message.key, reply) if has_value(type(reply)) else reply

    def _coded_set(self, message: Set) -> Any:
        value = self._number_or_content(message.value)
        if type(value) is bytes:
            if self._offload_above is not None and len(value) >= self._offload_above:
                return _Content(value)
            value = self._protected(message.key, value)
        coded = with_value(message, value)
        reply = self._inner_set(coded)
        return reply if type(reply) is Stored else _Handed(coded, reply)

    def _coded_lease(self, message: GetOrLease) -> Any:
        reply = self._inner_lease(message)
        # A grant without a value is ready. What has a value to be read is, like what is not answered, to be finished.
        return reply if type(reply) is LeaseGranted and reply.stale is None else _Handed(message, reply)

    def _prepared(self, message: Any) -> Any:
        """The message with payloads for values. Raises `CacheSerializationError` and the like before anything is sent."""
        if has_value(type_of(message)):
            return with_value(message, self._encoded(message.key, message.value))
        if isinstance(message, SetMany):
            return replace(message, items={key: self._encoded(key, value) for key, value in message.items.items()})
        if isinstance(message, Increment) and self._pipeline.sealed:
            raise CapabilityError(
                "a counter cannot be sealed: the store has to add to it; use a cache without encryption"
            )
        return message

    async def _written(self, message: Any, value: Any, serialized: bytes | None = None) -> Any:
        if type(value) is CachedError:
            return with_value(message, self._encoded(message.key, value))
        content = self._number_or_content(value) if serialized is None else serialized
        if type(content) is not bytes:
            return with_value(message, content)
        if self._offload_above is None or len(content) < self._offload_above:
            return with_value(message, self._protected(message.key, content))
        return with_value(message, await to_thread.run_sync(self._protected, message.key, content))

    async def _written_many(self, message: SetMany) -> Any:
        contents = {key: self._number_or_content(value) for key, value in message.items.items()}

        def packed() -> dict[str, Any]:
            return {key: self._protected(key, each) if type(each) is bytes else each for key, each in contents.items()}

        if self._offload_above is None or size(contents.values()) < self._offload_above:
            return replace(message, items=packed())
        return replace(message, items=await to_thread.run_sync(packed))

    def _number_or_content(self, value: Any) -> int | bytes:
        if type(value) is int and _INT_MIN <= value <= _INT_MAX and not self._pipeline.sealed:
            return value
        return self._pipeline.serialize(value)

    def _encoded(self, key: str, value: Any) -> int | bytes:
        if type(value) is CachedError:
            return self._told_of(key, self._pipeline.encode(key, value))
        content = self._number_or_content(value)
        return self._protected(key, content) if type(content) is bytes else content

    def _protected(self, key: str, content: bytes) -> bytes:
        return self._told_of(key, self._pipeline.protect(key, content))

    def _told_of(self, key: str, payload: bytes) -> bytes:
        sealer = self._pipeline.sealer
        if sealer is not None and PayloadSealed in self.emitter.audience.kinds:
            self.emitter.emit(PayloadSealed(key=key, key_id=sealer.key_id, tenant=sealer.tenant, size=len(payload)))
        return payload

    # Back

    async def _settle(self, blocking: bool, message: Any, turned: Any, patience: float) -> Any:
        """Come to the reply of a coded message, from what its turn has returned if there was one, and read it."""
        deadline = self.bus.clock.monotonic() + self.timeout + patience
        if type(turned) is _Handed:
            message, turned = turned
        try:
            if turned is _UNASKED:
                reply = await self._ask(blocking, message, deadline)
            elif blocking:
                reply = self.bus.finish_blocking(self.address, message, turned, self.timeout)
            else:
                reply = await self.bus.finish(self.address, message, turned, self.timeout)
        except CacheSerializationError as error:
            # The store itself could not make sense of what stands under a key.
            if type(message) is Get:
                self._rejected(message.key, error)
                return _MISSING
            if type(message) is GetMany:
                return FoundMany(await self._one_by_one(partial(self._ask, blocking, deadline=deadline), message.keys))
            if type(message) is GetOrLease:
                self._rejected(message.key, error)
                return await self._lease_anew(partial(self._ask, blocking, deadline=deadline), message)
            raise
        return await self._come_back(blocking, message, reply, deadline)

    async def _ask(self, blocking: bool, message: Request[Any], deadline: float) -> Any:
        left = deadline - self.bus.clock.monotonic()
        if blocking:
            return self.bus.request_blocking(self.address, message, left)
        return await self.bus.request(self.address, message, left)

    async def _come_back(self, blocking: bool, message: Any, reply: Any, deadline: float) -> Any:
        """What the reply to a coded message is to whoever asked."""
        if type(reply) is NotStored and (type(message) is Add or getattr(message, "only_if", None) == "absent"):
            return await self._add_again(partial(self._ask, blocking, deadline=deadline), message)
        if blocking or self._offload_above is None or size_of(reply) < self._offload_above:
            arrived = self._arrived(message, reply)
        else:
            arrived = await to_thread.run_sync(self._arrived, message, reply)
        if type(message) is GetOrLease and arrived is _MISSING:
            return await self._lease_anew(partial(self._ask, blocking, deadline=deadline), message)
        return arrived

    def _arrived(self, message: Any, reply: Any) -> Any:
        """The reply with values for payloads."""
        if type(reply) is FoundMany:
            read = {key: self._read(key, found) for key, found in reply.entries.items()}
            return replace(reply, entries={key: found for key, found in read.items() if isinstance(found, Found)})
        if type(reply) is LeaseGranted:
            stale = None if reply.stale is None else self._read(message.key, reply.stale)
            return replace(reply, stale=stale if isinstance(stale, Stale) else None)
        if type(reply) is Stale:
            read = self._read(message.key, reply)
            return read if isinstance(read, Stale) else Loading(reply.lease, reply.remaining)
        if type(reply) is Snapshot:
            return replace(reply, payload=self._pipeline.statistics.as_dict())
        return self._read(message.key, reply) if has_value(type_of(reply)) else reply

    async def _add_again(self, ask: _Ask, message: Set | Add) -> Any:
        """What is in the way of an `add` may be a payload that nobody can read: that one is replaced, if it is still there."""
        try:
            found = await ask(Get(message.key))
        except CacheSerializationError as error:
            # The store cannot read it either, so there is no version to compare.
            self._rejected(message.key, error)
            return await ask(Set(message.key, message.value, message.ttl, message.tags))
        if not isinstance(found, Found):
            return await ask(message)
        if isinstance(self._read(message.key, found), Found):
            return NotStored(found.version)
        return await ask(CompareAndSet(message.key, message.value, found.version, message.ttl, message.tags))

    async def _lease_anew(self, ask: _Ask, message: GetOrLease) -> Any:
        """What is live to the store, and cannot be read here, is loaded anew in its place, by one caller. The others are
        told `Missing`: there is nothing to wait for, and in a moment there will be a value."""
        try:
            reply = await ask(replace(message, refresh=True, wait=0.0))
        except CacheSerializationError:
            return _MISSING  # Somebody else has the lease, and the store cannot read what stands there.
        arrived = self._arrived(message, reply)
        if isinstance(arrived, LeaseGranted) and not message.refresh:
            # The lease is good for whatever stands there by now: that may be what somebody else has loaded in between.
            with contextlib.suppress(CacheSerializationError):
                found = self._arrived(message, await ask(Get(message.key)))
                if isinstance(found, Found):
                    self.send(ReleaseLease(message.key, arrived.token))
                    return found
        return arrived

    async def _one_by_one(self, ask: _Ask, keys: tuple[str, ...]) -> dict[str, Found]:
        entries: dict[str, Found] = {}
        for key in dict.fromkeys(keys):
            try:
                found = await ask(Get(key))
            except CacheSerializationError as error:
                self._rejected(key, error)
                continue
            if isinstance(found, Found) and isinstance(read := self._read(key, found), Found):
                entries[key] = read
        return entries

    def _read(self, key: str, reply: Any) -> Any:
        value = reply.value
        if type(value) is not int or self._pipeline.sealed:
            try:
                value = self._pipeline.decode(key, value)
            except CacheSerializationError as error:
                self._tell_rejected(key, error.reason, str(error))
                return _MISSING
            if type(value) is CachedError:
                return Remembered(value)
        return with_value(reply, value)

    def _rejected(self, key: str, error: CacheSerializationError) -> None:
        self._pipeline.statistics.rejected += 1
        self._tell_rejected(key, error.reason or "format", str(error))

    def _tell_rejected(self, key: str, reason: str, detail: str) -> None:
        where = f" under {key!r}" if self._debug else ""
        # Once for each reason: a fleet that changes its serializer reads thousands of these.
        level = logging.DEBUG if reason in self._told else logging.WARNING
        self._told.add(reason)
        logger.log(level, "%s: a payload%s is not taken (%s): %s", self.address, where, reason, detail)
        if PayloadRejected in self.emitter.audience.kinds:
            tenant = self._pipeline.sealer.tenant if self._pipeline.sealer else ""
            self.emitter.emit(
                PayloadRejected(key=key, reason=reason, serializer=self._pipeline.serializer, tenant=tenant)
            )
