"""Client of a backend that stores bytes: encodes the values of requests and decodes the payloads of replies."""

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
_NO_REPLY: Any = object()
_UNPROTECTED: Any = object()
"""Sentinel in place of an inline reply: the value is serialized, and must be protected in a worker thread."""


class InlineResult(NamedTuple):
    """Result of an inline turn that is not final: the encoded message, and the reply of the turn."""

    message: Request[Any]
    reply: Any


def _carries_value(kind: Any) -> bool:
    return issubclass(kind, Message) and kind is not Incremented and "value" in kind.__struct_fields__


has_value: Callable[[Any], bool] = cache(_carries_value)
"""Return `True` if messages of a class carry a user's value. A forgotten class would expose payloads."""


def with_value(message: Any, value: Any) -> Any:
    """Return a copy of a message with another value. The original may be sent again, or be a shared reply."""
    return replace(message, value=value)


class EncodingClient(BackendClient):
    """Client of a backend that encodes the values of requests as payloads and decodes the payloads of replies.

    Integers of 64 bits are stored as integers, for `increment`, unless payloads are sealed. A rejected payload is a
    miss, is counted and emits an event. The next write, including `add`, replaces it. On an event loop, payloads of at
    least `offload_above` bytes are encoded and decoded in a worker thread.
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
            self._encoded_get,
            self._encoded_set,
            self._encoded_lease,
        )

    @property
    def pipeline(self) -> PayloadPipeline:
        return self._pipeline

    def value_of(self, key: str, value: Any, default: Any) -> Any:
        """Return the caller's value for a stored one, or `UNREAD` if it must be decoded elsewhere.

        Returns `default` for a rejected payload and for a cached exception.
        """
        if type(value) is not bytes or (self._offload_above is not None and len(value) >= self._offload_above):
            return UNREAD
        try:
            value = self._pipeline.decode(key, value)
        except CacheSerializationError as error:
            self._rejected(key, error, by_store=False)
            return default
        return default if type(value) is CachedError else value

    async def request(self, message: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """Send a request and return its reply, or the fallback of `FailurePolicy`.

        The time limit is `timeout` plus `patience` seconds.
        """
        encoded = await self._encode(blocking, message)
        return cast("R", await self._answer(blocking, message, encoded, patience=patience))

    def send(self, message: Request[Any]) -> None:
        """Send a message without waiting for the reply."""
        if type(message) is ReleaseLease and (late := message.late) is not None:
            try:
                payload = self._protect(message.key, self._content(late.value))
                message = replace(message, late=with_value(late, payload))
            except CacheError:
                message = replace(message, late=None)  # Without the value, the followers load it themselves.
        super().send(message)

    async def wait_reply(self, message: Request[R], reply: Any, *, blocking: bool = False) -> R:
        """Return the reply to a message whose inline turn returned `reply`, or the fallback of `FailurePolicy`.

        Equivalent to `_answer`, in a third of its time for the most common replies.
        """
        inline_reply: Any = reply
        if blocking or (type(inline_reply) is InlineResult and inline_reply.reply is _UNPROTECTED):
            return cast("R", await self._answer(blocking, message, message, inline_reply))
        encoded: Any = message
        if type(inline_reply) is InlineResult:
            encoded, reply = inline_reply
        deadline = 0.0  # The deadline of a slot is computed only if it is needed.
        try:
            try:
                if type(reply) is ReplySlot:  # Inlined from `LocalBus.wait_reply`, to save a coroutine.
                    try:
                        received: Any = await reply.within(self.timeout, self._late)
                    except BaseException:
                        reply.leave()
                        raise
                    if type(received) is Failed:
                        raise received.error()
                else:
                    deadline = self.bus.clock.monotonic() + self.timeout
                    received = await self.bus.wait_reply(self.address, encoded, reply, self.timeout)
                kind = type(received)  # pyright: ignore[reportUnknownVariableType]
                if kind is Stored or kind is Missing or (kind is LeaseGranted and received.stale is None):
                    return received  # type: ignore[no-any-return]
                if kind is Found and type(encoded) is not GetOrLease:
                    payload = received.value
                    if type(payload) is not bytes:
                        return cast("R", self._read(encoded.key, received))
                    if self._offload_above is None or len(payload) < self._offload_above:
                        try:
                            value = self._pipeline.decode(encoded.key, payload)
                        except CacheSerializationError as error:
                            self._rejected(encoded.key, error, by_store=False)
                            return cast("R", _MISSING)
                        if type(value) is CachedError:
                            return cast("R", CachedFailure(value))
                        return cast(
                            "R", Found(value, received.version, received.ttl, received.tags, received.stored_at)
                        )
                ask = partial(self._ask, blocking, deadline or self.bus.clock.monotonic() + reply.seconds_left)
                return cast("R", await self._finish(blocking, ask, encoded, received))
            except CacheSerializationError as error:
                ask = partial(self._ask, blocking, deadline or self.bus.clock.monotonic() + reply.seconds_left)
                return cast("R", await self._unreadable(ask, encoded, error))
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    async def _answer(
        self, blocking: bool, message: Request[Any], encoded: Any, inline_reply: Any = _NO_REPLY, patience: float = 0.0
    ) -> Any:
        """Return the reply to an encoded message, or the fallback of `FailurePolicy`.

        `inline_reply` is the reply of its inline turn, if it had one.
        """
        if type(inline_reply) is InlineResult:
            encoded, inline_reply = inline_reply
        if inline_reply is _UNPROTECTED:
            protect, inline_reply = partial(self._protect, encoded.key, encoded.value), _NO_REPLY
            encoded = with_value(encoded, protect() if blocking else await to_thread.run_sync(protect))
        ask = partial(self._ask, blocking, self.bus.clock.monotonic() + self.timeout + patience)
        try:
            try:
                if inline_reply is _NO_REPLY:
                    reply = await ask(encoded)
                elif blocking:
                    reply = self.bus.wait_reply_blocking(self.address, encoded, inline_reply, self.timeout)
                else:
                    reply = await self.bus.wait_reply(self.address, encoded, inline_reply, self.timeout)
            except CacheSerializationError as error:
                return await self._unreadable(ask, encoded, error)
            return await self._finish(blocking, ask, encoded, reply)
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    async def _ask(self, blocking: bool, deadline: float, message: Request[Any]) -> Any:
        left = deadline - self.bus.clock.monotonic()
        if blocking:
            return self.bus.request_blocking(self.address, message, left)
        return await self.bus.request(self.address, message, left)

    # Encoding requests

    def _encoded_get(self, message: Get) -> Any:
        reply = self._inner_get(message)
        if type(reply) is ReplySlot or reply is None:  # The usual case for a remote backend.
            return reply
        return self._read(message.key, reply) if has_value(type(reply)) else reply

    def _encoded_set(self, message: Set) -> Any:
        value, pipeline = message.value, self._pipeline
        is_plain = type(value) is not int and type(value) is not CachedError
        value = pipeline.serialize(value) if is_plain else self._content(value)  # Saves a call for most values.
        if type(value) is bytes and self._offload_above is not None and len(value) >= self._offload_above:
            return InlineResult(with_value(message, value), _UNPROTECTED)
        protect = pipeline.protect if is_plain and pipeline.sealer is None else self._protect
        value = protect(message.key, value)
        encoded = Set(message.key, value, message.ttl, message.tags, message.only_if, message.lease, message.metadata)
        reply = self._inner_set(encoded)
        if type(reply) is Stored or (type(reply) is ReplySlot and message.only_if is None):
            return reply
        return InlineResult(encoded, reply)

    def _encoded_lease(self, message: GetOrLease) -> Any:
        reply = self._inner_lease(message)
        # A grant without a value is final. A reply with a value must be decoded, and a pending one must be awaited.
        is_ready = type(reply) is ReplySlot or (type(reply) is LeaseGranted and reply.stale is None)
        return reply if is_ready else InlineResult(message, reply)

    async def _encode(self, blocking: bool, message: Any) -> Any:
        """Return the message with its values encoded. Raises `CacheSerializationError` and similar errors."""
        several = isinstance(message, SetMany)
        if not several and not has_value(type_of(message)):
            if isinstance(message, Increment) and self._pipeline.sealed:
                raise CapabilityError("the store cannot increment a sealed number; use a cache without encryption")
            return message
        values = message.items if several else {message.key: message.value}
        contents = {key: self._content(value) for key, value in values.items()}

        def protected() -> dict[str, Any]:
            return {key: self._protect(key, content) for key, content in contents.items()}

        offloads = not blocking and self._offload_above is not None and _size(contents.values()) >= self._offload_above
        payloads = await to_thread.run_sync(protected) if offloads else protected()
        return replace(message, items=payloads) if several else with_value(message, payloads[message.key])

    def _content(self, value: Any) -> Any:
        """Return the serialized value. Integers of 64 bits and cached exceptions are returned unchanged."""
        if type(value) is int and _INT_MIN <= value <= _INT_MAX and not self._pipeline.sealed:
            return value
        return value if type(value) is CachedError else self._pipeline.serialize(value)

    def _protect(self, key: str, content: Any) -> Any:
        if type(content) is int:
            return content
        protect, is_error = self._pipeline.protect, type(content) is CachedError
        payload = protect(key, content.content, error=True) if is_error else protect(key, content)
        sealer = self._pipeline.sealer
        if sealer is not None and PayloadSealed in self.emitter.subscriptions.kinds:
            self.emitter.publish(PayloadSealed(key=key, key_id=sealer.key_id, tenant=sealer.tenant, size=len(payload)))
        return payload

    # Decoding replies

    async def _finish(self, blocking: bool, ask: _Ask, message: Any, reply: Any) -> Any:
        """Return the decoded reply to an encoded message. Rejected payloads are replaced."""
        if type(reply) is NotStored and (type(message) is Add or getattr(message, "only_if", None) == "absent"):
            return await self._add_again(ask, message)
        if blocking or self._offload_above is None or _size_of(reply) < self._offload_above:
            decoded = self._decoded(message, reply)
        else:
            decoded = await to_thread.run_sync(self._decoded, message, reply)
        if type(message) is GetOrLease and decoded is _MISSING:
            return await self._refresh_lease(ask, message)
        return decoded

    def _decoded(self, message: Any, reply: Any) -> Any:
        """Return the reply with its payloads decoded."""
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
        """Return the reply for values that the store cannot decode. Raises `error` if the request is not a read."""
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
        """Repeat an `add` that failed because of an existing entry. An entry that cannot be decoded is replaced."""
        try:
            found = await ask(Get(message.key))
        except CacheSerializationError as error:
            # The store cannot decode it either, so there is no version to compare.
            self._rejected(message.key, error)
            return await ask(Set(message.key, message.value, message.ttl, message.tags))
        if not isinstance(found, Found):
            return await ask(message)
        if isinstance(self._read(message.key, found), Found):
            return NotStored(found.version)
        return await ask(CompareAndSet(message.key, message.value, found.version, message.ttl, message.tags))

    async def _refresh_lease(self, ask: _Ask, message: GetOrLease) -> Any:
        """Request a lease to replace a value that is valid in the store but cannot be decoded here.

        One caller gets the lease. The others get `Missing`, because they have no load to wait for.
        """
        try:
            reply = await ask(replace(message, refresh=True, wait=0.0))
        except CacheSerializationError:
            return _MISSING  # Another caller has the lease, and the store cannot decode the value.
        decoded = self._decoded(message, reply)
        if isinstance(decoded, LeaseGranted) and not message.refresh:
            # Another caller may have loaded the value between the two requests.
            with contextlib.suppress(CacheSerializationError):
                found = self._decoded(message, await ask(Get(message.key)))
                if isinstance(found, Found):
                    self.send(ReleaseLease(message.key, decoded.token))
                    return found
        return decoded

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
        if by_store:  # Otherwise the pipeline has counted it.
            self._pipeline.statistics.rejected += 1
        reason, where = error.reason or "format", f" for key {key!r}" if self._debug else ""
        # One warning for each reason, because a deployment that changes its serializer reads thousands of these.
        level = logging.DEBUG if reason in self._known else logging.WARNING
        self._known.add(reason)
        logger.log(level, "%s: rejected a payload (%s)%s: %s", self.address, reason, where, error)
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
