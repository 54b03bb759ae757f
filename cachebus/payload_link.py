"""The way from a facade to its backend, with values as payloads on it: bytes going out, values coming back."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar, cast

from anyio import to_thread

from cachebus.bus import Address, Bus, Emitter
from cachebus.messages import (
    Add,
    CacheSerializationError,
    CapabilityError,
    CompareAndSet,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Missing,
    NotStored,
    PayloadRejected,
    PayloadSealed,
    Reply,
    Request,
    Set,
    SetMany,
    Snapshot,
    Stored,
    bare,
)

from .link import Link
from .payload import PayloadPipeline

logger = logging.getLogger("cachebus")

R = TypeVar("R")
_Write = Set | Add | CompareAndSet
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

    __slots__ = ("_debug", "_inner_get", "_inner_set", "_offload_above", "_pipeline")

    def __init__(
        self,
        bus: Bus,
        address: Address,
        timeout: float,
        emitter: Emitter,
        pipeline: PayloadPipeline,
        *,
        offload_above: int | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__(bus, address, timeout, emitter)
        self._pipeline = pipeline
        self._offload_above = offload_above
        self._debug = debug
        self._inner_get, self._inner_set = self.turn_get, self.turn_set
        self.turn_get, self.turn_set = self._coded_get, self._coded_set

    @property
    def pipeline(self) -> PayloadPipeline:
        return self._pipeline

    async def request(self, message: Request[R]) -> R:
        """As `Link.request`."""
        coded: Any = message
        if isinstance(message, Set | Add | CompareAndSet):
            coded = await self._written(message, message.value)
        else:
            coded = self._prepared(message)
        return cast("R", await self._settle(_WAITING, coded))

    async def request_blocking(self, message: Request[R]) -> R:
        """As `Link.request_blocking`."""
        return cast("R", await self._settle(_BLOCKING, self._prepared(message)))

    async def finish(self, message: Request[R], reply: Any) -> R:
        """As `Link.finish`."""
        if type(reply) is _Content:
            write: Any = message
            return cast("R", await self._settle(_WAITING, await self._written(write, None, reply.serialized)))
        return cast("R", await self._settle(_WAITING, message, reply))

    async def finish_blocking(self, message: Request[R], reply: Any) -> R:
        """As `Link.finish_blocking`."""
        if type(reply) is _Content:
            write: Any = message
            coded = _with_value(write, self._protected(write.key, reply.serialized))
            return cast("R", await self._settle(_BLOCKING, coded))
        return cast("R", await self._settle(_BLOCKING, message, reply))

    # Out

    def _coded_get(self, message: Get) -> Any:
        reply = self._inner_get(message)
        return self._read(message.key, reply) if type(reply) is Found else reply

    def _coded_set(self, message: Set) -> Any:
        value = self._number_or_content(message.value)
        if type(value) is bytes:
            if self._offload_above is not None and len(value) >= self._offload_above:
                return _Content(value)
            value = self._protected(message.key, value)
        coded = _with_value(message, value)
        reply = self._inner_set(coded)
        return reply if type(reply) is Stored else _Handed(coded, reply)

    def _prepared(self, message: Any) -> Any:
        """The message with payloads for values. Raises `CacheSerializationError` and the like before anything is sent."""
        if isinstance(message, Set | Add | CompareAndSet):
            return _with_value(message, self._encoded(message.key, message.value))
        if isinstance(message, SetMany):
            items = {key: self._encoded(key, value) for key, value in message.items.items()}
            return SetMany(items, message.ttl, message.tags)
        if isinstance(message, Increment) and self._pipeline.sealed:
            raise CapabilityError(
                "a counter cannot be sealed: the store has to add to it; use a cache without encryption"
            )
        return message

    async def _written(self, message: _Write, value: Any, serialized: bytes | None = None) -> Any:
        content = self._number_or_content(value) if serialized is None else serialized
        if type(content) is not bytes:
            return _with_value(message, content)
        if self._offload_above is None or len(content) < self._offload_above:
            return _with_value(message, self._protected(message.key, content))
        return _with_value(message, await to_thread.run_sync(self._protected, message.key, content))

    def _number_or_content(self, value: Any) -> int | bytes:
        if type(value) is int and _INT_MIN <= value <= _INT_MAX and not self._pipeline.sealed:
            return value
        return self._pipeline.serialize(value)

    def _encoded(self, key: str, value: Any) -> int | bytes:
        content = self._number_or_content(value)
        return self._protected(key, content) if type(content) is bytes else content

    def _protected(self, key: str, content: bytes) -> bytes:
        payload = self._pipeline.protect(key, content)
        sealer = self._pipeline.sealer
        if sealer is not None and PayloadSealed in self.emitter.audience.kinds:
            self.emitter.emit(PayloadSealed(key=key, key_id=sealer.key_id, tenant=sealer.tenant, size=len(payload)))
        return payload

    # Back

    async def _settle(self, blocking: bool, message: Any, turned: Any = _UNASKED) -> Any:
        """Come to the reply of a coded message, from what its turn has returned if there was one, and read it."""
        clock = self.bus.clock
        deadline = clock.monotonic() + self.timeout

        async def ask(another: Request[Any]) -> Any:
            left = deadline - clock.monotonic()
            if blocking:
                return self.bus.request_blocking(self.address, another, left)
            return await self.bus.request(self.address, another, left)

        if type(turned) is _Handed:
            message, turned = turned
        try:
            if turned is _UNASKED:
                reply = await ask(message)
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
                return FoundMany(await self._one_by_one(ask, message.keys))
            raise
        if type(message) is Get and not blocking and self._is_large(reply):
            return await to_thread.run_sync(self._read, message.key, reply)
        return await self._arrived(ask, message, reply)

    async def _arrived(self, ask: _Ask, message: Any, reply: Reply) -> Any:
        if type(reply) is Found:
            return self._read(message.key, reply)
        if type(reply) is FoundMany:
            read = {key: self._read(key, found) for key, found in reply.entries.items()}
            return FoundMany({key: found for key, found in read.items() if isinstance(found, Found)})
        if type(reply) is NotStored and (type(message) is Add or getattr(message, "only_if", None) == "absent"):
            return await self._add_again(ask, message)
        if type(reply) is Snapshot:
            reply.payload.update(self._pipeline.statistics.as_dict())
        return reply

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

    def _read(self, key: str, reply: Found) -> Found | Missing:
        value = reply.value
        if type(value) is not int or self._pipeline.sealed:
            try:
                value = self._pipeline.decode(key, value)
            except CacheSerializationError as error:
                self._tell_rejected(key, error.reason, str(error))
                return _MISSING
        # Another object: two callers may have been given this reply.
        found: Any = bare(Found)
        found.value = value
        found.version = reply.version
        found.ttl = reply.ttl
        found.tags = reply.tags
        found.stored_at = reply.stored_at
        return cast("Found", found)

    def _is_large(self, reply: Any) -> bool:
        if self._offload_above is None or type(reply) is not Found or type(reply.value) is not bytes:
            return False
        return len(reply.value) >= self._offload_above

    def _rejected(self, key: str, error: CacheSerializationError) -> None:
        self._pipeline.statistics.rejected += 1
        self._tell_rejected(key, error.reason or "format", str(error))

    def _tell_rejected(self, key: str, reason: str, detail: str) -> None:
        where = f" under {key!r}" if self._debug else ""
        logger.warning("%s: a payload%s is not taken (%s): %s", self.address, where, reason, detail)
        if PayloadRejected in self.emitter.audience.kinds:
            tenant = self._pipeline.sealer.tenant if self._pipeline.sealer else ""
            self.emitter.emit(
                PayloadRejected(key=key, reason=reason, serializer=self._pipeline.serializer, tenant=tenant)
            )


def _with_value(message: Any, value: Any) -> Any:
    match message:
        case Set():
            return Set(message.key, value, message.ttl, message.tags, message.only_if)
        case Add():
            return Add(message.key, value, message.ttl, message.tags)
        case _:
            return CompareAndSet(message.key, value, message.version, message.ttl, message.tags)
