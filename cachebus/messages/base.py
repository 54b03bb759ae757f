"""Messages: frozen structs with a wire name, in three kinds, and the registry of their wire names.

msgspec does not hand `frozen` down to a type checker, so every class spells it out. `gc=False` keeps a message out of
the garbage collector's books; only messages that hold no value of the user's may have it, because a value that refers
to its own message could never be collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec

ReplyT_co = TypeVar("ReplyT_co", covariant=True)

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer whose bounds msgspec checks as it decodes, which is faster than a second look."""


class _WireName:
    """The tag of a class, as an attribute of the class and of its instances."""

    def __get__(self, message: object, cls: type[Message]) -> str:
        tag = cls.__struct_config__.tag
        assert isinstance(tag, str)
        return tag


class Message(msgspec.Struct, frozen=True, tag_field="kind", tag=""):
    """A frozen struct with a wire name, its tag, such as `backend.get`. Threads may share it.

    A wire name is lower-case words joined by dots. It is given once and never given again. The class whose tag is empty
    is abstract.
    """

    WIRE_NAME: ClassVar[str] = _WireName()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def _freeze(self, *names: str) -> None:
        """Make these fields, which hold mappings, read-only copies. For `__post_init__`."""
        for name in names:
            if type(held := getattr(self, name)) is not MappingProxyType:
                msgspec.structs.force_setattr(self, name, MappingProxyType(dict(held)))


class Reply(Message, frozen=True, tag=""):
    """The outcome of a request."""


class Request(Message, Generic[ReplyT_co], frozen=True, tag=""):
    """A task for an actor; the parameter names the possible replies."""

    IDEMPOTENT: ClassVar[bool] = False
    """Twice has the effect of once: after a crash the actor's next incarnation may get it again."""

    INVALIDATES: ClassVar[bool] = False
    """It removes what is out of date: a full mailbox still takes it, because losing one means stale reads."""


class IdempotentRequest(Request[ReplyT_co], Generic[ReplyT_co], frozen=True, tag=""):
    """A request that may be carried out twice."""

    IDEMPOTENT: ClassVar[bool] = True


class Event(Message, frozen=True, kw_only=True, tag=""):
    """A fact about the past, published to its subscribers. The emitter fills in these common fields.

    `id` names the event for ever; `origin` is the process; `epoch` names the incarnation of the actor that emitted it,
    and `seq` counts the events of that incarnation, from 1, so that a subscriber notices a gap. `time` is Unix time in
    seconds. `trace` is the W3C `traceparent` of the call, if there is one.
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
    """The registry: every message class by its wire name, read-only. It is the set of classes that exist now."""

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
    """Return the replies that a request names, without `Failed`, which any request may get."""
    for base in getattr(request, "__orig_bases__", ()):
        if issubclass(getattr(base, "__origin__", object), Request):
            (answer,) = base.__args__
            return tuple(getattr(answer, "__args__", (answer,)))
    raise TypeError(f"{request.__name__} does not say Request[...] with its reply types")
