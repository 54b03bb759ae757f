"""Base classes of messages (requests, replies, events) and the registry of wire names.

Type checkers do not inherit `frozen` from msgspec base classes, so every class repeats it. `gc=False` exempts a message
from garbage collection. Only messages without user values may set it: a value that refers to its own message could
never be collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec

ReplyT_co = TypeVar("ReplyT_co", covariant=True)

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A signed 64-bit integer. msgspec checks the bounds during decoding, which is faster than a separate check."""


class _WireName:
    """Descriptor that returns the tag of a message class, for the class and its instances."""

    def __get__(self, message: object, cls: type[Message]) -> str:
        tag = cls.__struct_config__.tag
        assert isinstance(tag, str)
        return tag


class Message(msgspec.Struct, frozen=True, tag_field="kind", tag=""):
    """Base class of messages: a frozen, thread-safe struct whose tag is its wire name, such as `backend.get`.

    A wire name consists of lower-case words joined by dots, and is never reused. A class with an empty tag is abstract.
    """

    WIRE_NAME: ClassVar[str] = _WireName()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def _freeze(self, *names: str) -> None:
        """Replace these mapping fields with read-only copies. Call it in `__post_init__`."""
        for name in names:
            if type(held := getattr(self, name)) is not MappingProxyType:
                msgspec.structs.force_setattr(self, name, MappingProxyType(dict(held)))


class Reply(Message, frozen=True, tag=""):
    """The outcome of a request."""


class Request(Message, Generic[ReplyT_co], frozen=True, tag=""):
    """A message that asks an actor to do something. The type parameter lists the possible replies."""

    IDEMPOTENT: ClassVar[bool] = False
    """True if repeating the request has no further effect. It may be retried, also by a restarted actor."""

    INVALIDATES: ClassVar[bool] = False
    """True if the request removes outdated values.

    A full mailbox still accepts it, because losing it causes stale reads.
    """


class IdempotentRequest(Request[ReplyT_co], Generic[ReplyT_co], frozen=True, tag=""):
    """A request that can safely be repeated."""

    IDEMPOTENT: ClassVar[bool] = True


class Event(Message, frozen=True, kw_only=True, tag=""):
    """A fact about the past, published to subscribers. The emitter fills in these common fields.

    `id` is globally unique. `origin` identifies the process. `epoch` identifies the incarnation of the actor that
    emitted the event. `seq` numbers the events of that incarnation from 1, so that subscribers can detect gaps. `time`
    is Unix time in seconds. `trace` is the W3C `traceparent` of the call, or `None`.
    """

    id: str = ""
    namespace: str = ""
    backend: str = ""
    origin: str = ""
    epoch: Int64 = 0
    seq: Int64 = 0
    time: float = 0.0
    trace: str | None = None


class WireNames(Mapping[str, type[Message]]):
    """Read-only registry of message classes by wire name. It always reflects the classes that are currently defined."""

    def __getitem__(self, wire_name: str) -> type[Message]:
        return self._classes()[wire_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes())

    def __len__(self) -> int:
        return len(self._classes())

    def _classes(self) -> dict[str, type[Message]]:
        found: dict[str, type[Message]] = {}
        waiting: list[type[Message]] = [Message]
        while waiting:
            cls = waiting.pop()
            waiting.extend(reversed(cls.__subclasses__()))
            if cls.WIRE_NAME:
                found[cls.WIRE_NAME] = cls
        return found


WIRE_NAMES: Mapping[str, type[Message]] = WireNames()


def reply_types(request: type[Request[Any]]) -> tuple[type[Reply], ...]:
    """Return the reply types that a request class declares. `Failed`, a possible reply to any request, is not included.

    Raises `TypeError` if the class does not declare them.
    """
    for base in getattr(request, "__orig_bases__", ()):
        if issubclass(getattr(base, "__origin__", object), Request):
            (answer,) = base.__args__
            return tuple(getattr(answer, "__args__", (answer,)))
    raise TypeError(f"{request.__name__} does not declare its reply types with Request[...]")
