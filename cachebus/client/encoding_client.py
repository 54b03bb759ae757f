"""The client of a backend that keeps bytes: values become payloads on the way out, payloads become values on the way back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar, cast

from anyio import to_thread
from msgspec.structs import replace

from cachebus.actors import Timers
from cachebus.bus import Address, Bus, Emitter, ReplySlot, too_late
from cachebus.messages import (
    Add,
    CacheError,
    CacheSerializationError,
    CapabilityError,
    CompareAndSet,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    LeaseGranted,
    Loading,
    Message,
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
from cachebus.payload.cached_errors import CachedError, CachedFailure
from cachebus.payload.pipeline import PayloadPipeline
from cachebus.payload.serializers.scalars import type_of

from .backend_client import UNREAD, BackendClient
from .failure_policy import BACKEND_FAILURES, OnError

logger = logging.getLogger("cachebus")

R = TypeVar("R")
_Ask = Callable[[Request[Any]], Awaitable[Any]]
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
_MISSING = Missing()
_UNASKED: Any = object()
_UNPROTECTED: Any = object()
"""In the place of a turn's reply: the value of the message is serialized, and large enough for a worker thread."""


class Handed(NamedTuple):
    """The reply of a turn for a write without an answer yet: the message with its payload, and the turn's own reply."""

    message: Request[Any]
    reply: Any


def _carries_value(kind: Any) -> bool:
    return issubclass(kind, Message) and kind is not Incremented and "value" in kind.__struct_fields__


has_value: Callable[[Any], bool] = cache(_carries_value)
"""Says if messages of a kind carry a user's value, also kinds to come: a forgotten one would hand out payloads."""


def with_value(message: Any, value: Any) -> Any:
    """Return a copy of a message with another value. The sender may send the message again, and two may share a reply."""
    return replace(message, value=value)


class EncodingClient(BackendClient):
    """A `BackendClient` whose pipeline turns the values of requests into payloads, and the payloads of replies into values.

    Integers of 64 bits stay integers, for `increment`, unless payloads are sealed. A payload that is rejected is a miss, an
    event and a count, and the next write replaces it, `add` included. On an event loop, payloads of `offload_above` bytes or
    more are packed and unpacked in a worker thread.
    """

    __slots__ = ("_debug", "_inner_get", "_inner_lease", "_inner_set", "_known", "_late", "_offload_above", "_pipeline")

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
        self._known: set[str] = set()
        self._late = too_late(address, timeout)
        self._inner_get, self._inner_set, self._inner_lease = (
            self.try_inline_get,
            self.try_inline_set,
            self.try_inline_lease,
        )
        self.try_inline_get, self.try_inline_set, self.try_inline_lease = (
            self._coded_get,
            self._coded_set,
            self._coded_lease,
        )

    @property
    def pipeline(self) -> PayloadPipeline:
        return self._pipeline

    def value_of(self, key: str, value: Any, default: Any) -> Any:
        """As `BackendClient.value_of`."""
        if type(value) is not bytes or (self._offload_above is not None and len(value) >= self._offload_above):
            return UNREAD
        try:
            value = self._pipeline.decode(key, value)
        except CacheSerializationError as error:
            self._rejected(key, error, by_store=False)
            return default
        return default if type(value) is CachedError else value

    async def request(self, message: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """As `BackendClient.request`."""
        coded = await self._coded(blocking, message)
        return cast("R", await self._answer(blocking, message, coded, patience=patience))

    def send(self, message: Request[Any]) -> None:
        """As `BackendClient.send`."""
        if type(message) is ReleaseLease and (late := message.late) is not None:
            try:
                payload = self._protected(message.key, self._content(late.value))
                message = replace(message, late=with_value(late, payload))
            except CacheError:
                message = replace(message, late=None)  # The followers load by themselves.
        super().send(message)

    async def wait_reply(self, message: Request[R], reply: Any, *, blocking: bool = False) -> R:
        """As `BackendClient.wait_reply`: the commonest of `_answer`, in a third of the time, because most calls come by here."""
        turned: Any = reply
        if blocking or (type(turned) is Handed and turned.reply is _UNPROTECTED):
            return cast("R", await self._answer(blocking, message, message, turned))
        coded: Any = message
        if type(turned) is Handed:
            coded, reply = turned
        deadline = 0.0  # That of a slot is read when it is needed.
        try:
            try:
                if type(reply) is ReplySlot:  # As `LocalBus.wait_reply`, less a coroutine.
                    try:
                        came: Any = await reply.within(self.timeout, self._late)
                    except BaseException:
                        reply.leave()
                        raise
                    if type(came) is Failed:
                        raise came.error()
                else:
                    deadline = self.bus.clock.monotonic() + self.timeout
                    came = await self.bus.wait_reply(self.address, coded, reply, self.timeout)
                kind = type(came)  # pyright: ignore[reportUnknownVariableType]
                if kind is Stored or kind is Missing or (kind is LeaseGranted and came.stale is None):
                    return came  # type: ignore[no-any-return]
                if kind is Found and type(coded) is not GetOrLease:
                    payload = came.value
                    if type(payload) is not bytes:
                        return cast("R", self._read(coded.key, came))
                    if self._offload_above is None or len(payload) < self._offload_above:
                        try:
                            value = self._pipeline.decode(coded.key, payload)
                        except CacheSerializationError as error:
                            self._rejected(coded.key, error, by_store=False)
                            return cast("R", _MISSING)
                        if type(value) is CachedError:
                            return cast("R", CachedFailure(value))
                        return cast("R", Found(value, came.version, came.ttl, came.tags, came.stored_at))
                ask = partial(self._ask, blocking, deadline or self.bus.clock.monotonic() + reply.seconds_left)
                return cast("R", await self._come_back(blocking, ask, coded, came))
            except CacheSerializationError as error:
                ask = partial(self._ask, blocking, deadline or self.bus.clock.monotonic() + reply.seconds_left)
                return cast("R", await self._unreadable(ask, coded, error))
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    async def _answer(
        self, blocking: bool, message: Request[Any], coded: Any, turned: Any = _UNASKED, patience: float = 0.0
    ) -> Any:
        """Return the reply of a coded message, or what stands for it (see `FailurePolicy`). `turned` is the reply of its turn."""
        if type(turned) is Handed:
            coded, turned = turned
        if turned is _UNPROTECTED:
            protect, turned = partial(self._protected, coded.key, coded.value), _UNASKED
            coded = with_value(coded, protect() if blocking else await to_thread.run_sync(protect))
        ask = partial(self._ask, blocking, self.bus.clock.monotonic() + self.timeout + patience)
        try:
            try:
                if turned is _UNASKED:
                    reply = await ask(coded)
                elif blocking:
                    reply = self.bus.wait_reply_blocking(self.address, coded, turned, self.timeout)
                else:
                    reply = await self.bus.wait_reply(self.address, coded, turned, self.timeout)
            except CacheSerializationError as error:
                return await self._unreadable(ask, coded, error)
            return await self._come_back(blocking, ask, coded, reply)
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    async def _ask(self, blocking: bool, deadline: float, message: Request[Any]) -> Any:
        left = deadline - self.bus.clock.monotonic()
        if blocking:
            return self.bus.request_blocking(self.address, message, left)
        return await self.bus.request(self.address, message, left)

    # Out

    def _coded_get(self, message: Get) -> Any:
        reply = self._inner_get(message)
        if type(reply) is ReplySlot or reply is None:  # The usual reply of a remote backend.
            return reply
        return self._read(message.key, reply) if has_value(type(reply)) else reply

    def _coded_set(self, message: Set) -> Any:
        value, pipeline = message.value, self._pipeline
        is_plain = type(value) is not int and type(value) is not CachedError
        value = pipeline.serialize(value) if is_plain else self._content(value)  # Less a call for most values.
        if type(value) is bytes and self._offload_above is not None and len(value) >= self._offload_above:
            return Handed(with_value(message, value), _UNPROTECTED)
        protect = pipeline.protect if is_plain and pipeline.sealer is None else self._protected
        value = protect(message.key, value)
        coded = Set(message.key, value, message.ttl, message.tags, message.only_if, message.lease, message.metadata)
        reply = self._inner_set(coded)
        if type(reply) is Stored or (type(reply) is ReplySlot and message.only_if is None):
            return reply
        return Handed(coded, reply)

    def _coded_lease(self, message: GetOrLease) -> Any:
        reply = self._inner_lease(message)
        # A grant without a value is ready. A reply with a value to be read has to be finished, as one that is not there yet.
        is_ready = type(reply) is ReplySlot or (type(reply) is LeaseGranted and reply.stale is None)
        return reply if is_ready else Handed(message, reply)

    async def _coded(self, blocking: bool, message: Any) -> Any:
        """Return the message with payloads for values. Raises `CacheSerializationError` and the like before anything is sent."""
        several = isinstance(message, SetMany)
        if not several and not has_value(type_of(message)):
            if isinstance(message, Increment) and self._pipeline.sealed:
                raise CapabilityError(
                    "a counter cannot be sealed: the store has to add to it; use a cache without encryption"
                )
            return message
        values = message.items if several else {message.key: message.value}
        contents = {key: self._content(value) for key, value in values.items()}

        def protected() -> dict[str, Any]:
            return {key: self._protected(key, content) for key, content in contents.items()}

        offloads = not blocking and self._offload_above is not None and _size(contents.values()) >= self._offload_above
        payloads = await to_thread.run_sync(protected) if offloads else protected()
        return replace(message, items=payloads) if several else with_value(message, payloads[message.key])

    def _content(self, value: Any) -> Any:
        """Return the serialized value; an integer of 64 bits and the record of an exception stay what they are."""
        if type(value) is int and _INT_MIN <= value <= _INT_MAX and not self._pipeline.sealed:
            return value
        return value if type(value) is CachedError else self._pipeline.serialize(value)

    def _protected(self, key: str, content: Any) -> Any:
        if type(content) is int:
            return content
        protect, is_error = self._pipeline.protect, type(content) is CachedError
        payload = protect(key, content.content, error=True) if is_error else protect(key, content)
        sealer = self._pipeline.sealer
        if sealer is not None and PayloadSealed in self.emitter.subscriptions.kinds:
            self.emitter.publish(PayloadSealed(key=key, key_id=sealer.key_id, tenant=sealer.tenant, size=len(payload)))
        return payload

    # Back

    async def _come_back(self, blocking: bool, ask: _Ask, message: Any, reply: Any) -> Any:
        """Return the reply to a coded message as its caller sees it."""
        if type(reply) is NotStored and (type(message) is Add or getattr(message, "only_if", None) == "absent"):
            return await self._add_again(ask, message)
        if blocking or self._offload_above is None or _size_of(reply) < self._offload_above:
            arrived = self._arrived(message, reply)
        else:
            arrived = await to_thread.run_sync(self._arrived, message, reply)
        if type(message) is GetOrLease and arrived is _MISSING:
            return await self._refresh_lease(ask, message)
        return arrived

    def _arrived(self, message: Any, reply: Any) -> Any:
        """Return the reply with values for payloads."""
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

    async def _unreadable(self, ask: _Ask, message: Any, error: CacheSerializationError) -> Any:
        """Return the reply for keys whose value the store itself cannot read. Raises `error` if the request is no read."""
        if type(message) is GetMany:
            entries: dict[str, Found] = {}
            for key in dict.fromkeys(message.keys):
                try:
                    found = await ask(Get(key))
                except CacheSerializationError as unread:
                    self._rejected(key, unread)
                    continue
                if isinstance(found, Found) and isinstance(read := self._read(key, found), Found):
                    entries[key] = read
            return FoundMany(entries)
        if type(message) is Get:
            self._rejected(message.key, error)
            return _MISSING
        if type(message) is GetOrLease:
            self._rejected(message.key, error)
            return await self._refresh_lease(ask, message)
        raise error

    async def _add_again(self, ask: _Ask, message: Set | Add) -> Any:
        """Add again, if a payload that cannot be read is in the way: it is replaced if it is still there."""
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

    async def _refresh_lease(self, ask: _Ask, message: GetOrLease) -> Any:
        """Ask for a lease to replace a value that is live to the store and cannot be read here.

        One caller gets it. The others get `Missing`: there is nothing to wait for, and in a moment there will be a value.
        """
        try:
            reply = await ask(replace(message, refresh=True, wait=0.0))
        except CacheSerializationError:
            return _MISSING  # Another caller has the lease, and the store cannot read the value.
        arrived = self._arrived(message, reply)
        if isinstance(arrived, LeaseGranted) and not message.refresh:
            # The lease covers the present value, which another caller may have loaded in between.
            with contextlib.suppress(CacheSerializationError):
                found = self._arrived(message, await ask(Get(message.key)))
                if isinstance(found, Found):
                    self.send(ReleaseLease(message.key, arrived.token))
                    return found
        return arrived

    def _read(self, key: str, reply: Any) -> Any:
        value = reply.value
        if type(value) is not int or self._pipeline.sealed:
            try:
                value = self._pipeline.decode(key, value)
            except CacheSerializationError as error:
                self._rejected(key, error, by_store=False)
                return _MISSING
            if type(value) is CachedError:
                return CachedFailure(value)
        return with_value(reply, value)

    def _rejected(self, key: str, error: CacheSerializationError, *, by_store: bool = True) -> None:
        if by_store:  # Else the pipeline has counted it.
            self._pipeline.statistics.rejected += 1
        reason, where = error.reason or "format", f" under {key!r}" if self._debug else ""
        # Once for each reason: a fleet that changes its serializer reads thousands of these.
        level = logging.DEBUG if reason in self._known else logging.WARNING
        self._known.add(reason)
        logger.log(level, "%s: a payload%s is not taken (%s): %s", self.address, where, reason, error)
        if PayloadRejected in self.emitter.subscriptions.kinds:
            tenant = self._pipeline.sealer.tenant if self._pipeline.sealer else ""
            serializer = self._pipeline.serializer
            self.emitter.publish(PayloadRejected(key=key, reason=reason, serializer=serializer, tenant=tenant))


def _size_of(reply: Any) -> int:
    if type(reply) is FoundMany:
        return _size(found.value for found in reply.entries.values())
    return _size([getattr(reply.stale if type(reply) is LeaseGranted else reply, "value", None)])


def _size(payloads: Iterable[Any]) -> int:
    return sum(len(each) for each in payloads if type(each) is bytes)
